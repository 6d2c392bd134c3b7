"""Stored models behind the engine, all parts real: a small model with random weights, imported from a GGUF file,
answers by every route; experts on other nodes of a network in memory give the same answer as experts here."""

import shutil
from contextlib import asynccontextmanager

import gguf
import msgspec
import numpy as np
import pytest
import trio
import trio.testing
from tokenizers import pre_tokenizers

from config.errors import IntegrityError, RemoteError, RiosError
from config.generation import Delta, GenerationRequest, Message, Sampling
from dmoe.caller import Caller
from dmoe.importer.build import import_gguf
from dmoe.models import StoredModels, SwarmExperts
from dmoe.passes import PassOptions
from dmoe.ports import Quote
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.store import ModelStore
from dmoe.worker import Worker, plan_of
from p2p.core.advert import ModelOffer, bitmap
from p2p.core.identity import Identity
from p2p.memory import MemoryHub
from tests.unit.dmoe.engine_kit import SelfRunningEngine

HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH, CONTEXT = 64, 2, 4, 2, 128, 600
OPTIONS = RuntimeOptions(device="cpu", threads=1)
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>{% endfor %}<|start|>"
FREE = Quote(0, 0, 0)


def write_gguf(path):
    tokens = ["<|stop|>", "<|start|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)

    def add(name, *shape):
        scale = 0.3 if len(shape) > 1 else 0
        writer.add_tensor(name, (random.normal(size=shape) * scale + (scale == 0)).astype(np.float32))

    head_dim = HIDDEN // HEADS
    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        add(f"blk.{layer}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", KV_HEADS * head_dim, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", KV_HEADS * head_dim, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", WIDTH, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", WIDTH, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_gguf(folder / "tiny.gguf")
    import_gguf(folder / "tiny.gguf", ModelStore(folder / "store"), Identity.from_seed(b"p" * 32), name="tiny")
    return folder / "store"


@pytest.fixture
def store(imported, tmp_path):
    return ModelStore(shutil.copytree(imported, tmp_path / "store"))


def engine_of(store, experts=None):
    """Without drafts, whose rows would count, and without kept prompts."""
    models, route = StoredModels(store, experts, OPTIONS, "me"), "experts" if experts else "local"
    passes = PassOptions(drafts_max=0, prefix_positions_max=0)
    return SelfRunningEngine(models, default_route=route, passes=passes)


def request(route, prompt="hello there", **sampling):
    return GenerationRequest(
        model="tiny", prompt=prompt, route=route, sampling=Sampling(**{"max_tokens": 24, "min_tokens": 24, **sampling})
    )


async def answer(engine, asked):
    async with engine.stream(await engine.prepare(asked)) as stream:
        events = [event async for event in stream]
    return [token for event in events if isinstance(event, Delta) for token in event.tokens], events[-1]


@asynccontextmanager
async def swarm(store, held):
    """A caller without experts and one worker for each list of shard ids in ``held``. Yields experts and networks."""
    manifest = store.find("tiny")
    async with trio.open_nursery() as nursery:
        hub = MemoryHub(3)
        networks = [hub.add() for _ in range(1 + len(held))]
        workers = [Worker(network, quote=FREE) for network in networks]
        for network, worker, ids in zip(networks, workers, [[], *held], strict=True):
            await nursery.start(worker.run)
            for shard in manifest.expert_shards():
                if shard.id in ids:
                    worker.load(plan_of(manifest, shard), ExpertShard(manifest, shard, store, OPTIONS))
            offer = ModelOffer(manifest.model_id, bitmap(worker.indices(manifest.model_id)), 0, 0, 0)
            network.directory.update(lambda advert, offer=offer: msgspec.structs.replace(advert, models=(offer,)))
        caller = Caller(networks[0], worker=workers[0])
        await nursery.start(caller.run)
        await trio.testing.wait_all_tasks_blocked()
        yield SwarmExperts(caller), networks
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 5}])
async def test_experts_elsewhere_answer_like_experts_here(store, sampling):
    ids = [shard.id for shard in store.find("tiny").expert_shards()]
    reference, local = await answer(engine_of(store), request("local", **sampling))
    assert (await answer(engine_of(store), request("local", **sampling)))[0] == reference
    async with swarm(store, [ids[: len(ids) // 2], ids[len(ids) // 2 :]]) as (experts, networks):
        tokens, finished = await answer(engine_of(store, experts), request("experts", **sampling))
    assert tokens == reference
    assert set(finished.serving) == {network.peer_id for network in networks[1:]}
    assert sorted(e for served in finished.serving.values() for e in served["experts"]) == [0, 1, 2, 3]
    assert sum(finished.expert_rows.values()) == sum(local.expert_rows.values())
    assert finished.route == "experts"


async def test_fused_and_chat(store):
    engine = engine_of(store)
    chat = GenerationRequest(
        model="tiny",
        messages=(Message(role="user", content="hello"),),
        route="fused",
        sampling=Sampling(temperature=0, max_tokens=8, min_tokens=8),
    )
    first, second = await answer(engine, chat), await answer(engine, chat)
    assert first[0] == second[0]
    assert len(first[0]) == 8
    assert first[1].prompt_tokens == len("<user\nhello><")


async def test_answers_beside_each_other_are_the_answers_alone(store):
    engine = engine_of(store)
    prompts = ["a" * 300, "b", "hello there", "c" * 10]
    alone = [(await answer(engine, request("local", prompt, temperature=0)))[0] for prompt in prompts]
    beside = {}

    async def one(prompt):
        beside[prompt] = (await answer(engine, request("local", prompt, temperature=0)))[0]

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(one, prompt)
    assert [beside[prompt] for prompt in prompts] == alone


async def test_a_left_answer_frees_its_slot(store):
    engine = engine_of(store)
    prepared = await engine.prepare(request("local"))
    async with engine.stream(prepared) as stream:
        await anext(stream)
    await answer(engine, request("local"))
    runner = await prepared.model.runner("local")
    first, second = await runner.open(20), await runner.open(20)
    assert [sequence.caches[0].slot for sequence in (first, second)] == [0, 1]


async def test_a_shard_without_replica_is_named_before_anything_streams(store):
    ids = [shard.id for shard in store.find("tiny").expert_shards()]
    async with swarm(store, [ids[1:]]) as (experts, _):
        engine = engine_of(store, experts)
        info = engine.models()[0]
        assert not info.ready
        assert ids[0] in info.reason
        with pytest.raises(RemoteError, match=f"{ids[0]}.*: it was never seen") as caught:
            await engine.prepare(request("experts"))
        assert caught.value.code == "no_replica"


async def test_an_absent_file_is_named_before_and_an_altered_one_when_it_is_loaded(store):
    manifest = store.find("tiny")
    path = store.path(manifest.model_id, manifest.expert_shards()[0].files[0])
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=path.name):
        await answer(engine_of(store), request("local"))
    path.unlink()
    engine = engine_of(store)
    assert not engine.models()[0].ready
    with pytest.raises(RiosError, match=str(manifest.expert_shards()[0].id)) as caught:
        await engine.prepare(request("local"))
    assert caught.value.code == "unavailable"


async def test_the_whole_context_can_be_used(store):
    tokens, finished = await answer(
        engine_of(store), request("local", "a" * (CONTEXT - 3), max_tokens=None, min_tokens=0)
    )
    assert len(tokens) <= 3
    assert finished.prompt_tokens == CONTEXT - 3


async def test_a_model_removed_from_the_store_is_gone(store):
    engine = engine_of(store)
    store.remove(store.find("tiny").model_id)
    assert list(engine.models()) == []
