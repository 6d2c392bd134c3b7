"""The engine over a fake model: limits, order, cancelling, failing, reproducible answers.

The fake stands for the network's arithmetic only: its logits are a function of the whole sequence, so a token that is
lost, doubled or out of order changes the answer.
"""

import hashlib
from contextlib import AsyncExitStack
from dataclasses import replace

import numpy as np
import pytest
import trio
import trio.testing
from tokenizers import pre_tokenizers

from config.errors import BusyError, RemoteError, RequestError, RiosError
from config.generation import Delta, EmbeddingRequest, Finished, GenerationRequest, Message, Sampling
from dmoe import embedding
from dmoe.bills import Bills
from dmoe.engine import Engine
from dmoe.importer.tokenizer import tokenizer_json
from dmoe.passes import PassOptions
from dmoe.runner import Report
from dmoe.text import Tokenizer
from tests.unit.dmoe.engine_kit import SelfRunningEngine

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
STOP = 0
TOKENIZER = Tokenizer(
    tokenizer_json(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["<|stop|>", *LETTERS, "zz"],
            "tokenizer.ggml.token_type": [3, *[1] * (len(LETTERS) + 1)],
            "tokenizer.ggml.merges": ["z z"],
        }
    ),
    "{% for m in messages %}{{ m.content }}<|stop|>{% endfor %}",
)


class FakeSequence:
    def __init__(self, model: "FakeModel", capacity: int, sequence: list[int]) -> None:
        self.model, self.capacity, self.sequence, self.chunks = model, capacity, sequence, []

    @property
    def length(self):
        return len(self.sequence)

    def truncate(self, length):
        assert length <= self.length
        del self.sequence[length:]

    def logits(self, end):
        if self.model.script:
            logits = np.zeros(TOKENIZER.vocabulary, dtype=np.float32)
            answer = TOKENIZER.encode(self.model.script)
            done = end - self.model.prompt
            logits[answer[done] if 0 <= done < len(answer) else STOP] = 50
            return logits
        seed = hashlib.sha256(str(self.sequence[:end]).encode()).digest()[:8]
        return np.random.default_rng(list(seed)).normal(size=TOKENIZER.vocabulary).astype(np.float32)

    def report(self):
        return Report(expert_rows={"peer": len(self.sequence)}, serving={"peer": {"layers": [0], "experts": [1]}})

    def close(self):
        assert self not in self.model.busy, "closed while a pass uses it"
        self.model.open_sequences.remove(self)


class FakeModel:
    id, name, created, context_tokens = "ab" * 32, "fake", 7, 4096

    def __init__(self, script="", prompt=0, problem=None):
        self.script, self.prompt, self.problem = script, prompt, problem
        self.stop_tokens = (STOP,)
        self.open_sequences, self.opened, self.calls = [], [], 0
        self.busy, self.passes, self.seconds = [], [], 0
        self.words = TOKENIZER
        self.gate = trio.Event()
        self.gate.set()

    async def before(self, feeds):
        await self.gate.wait()

    def fault(self, route):
        return self.problem

    async def tokenizer(self):
        return self.words

    async def runner(self, route):
        return self

    async def open(self, capacity, *, like=None, length=0):
        assert like is None or (like in self.open_sequences and length <= min(like.length, capacity))
        sequence = FakeSequence(self, capacity, like.sequence[:length] if like else [])
        self.open_sequences.append(sequence)
        self.opened.append(sequence)
        return sequence

    async def forward(self, feeds):
        assert not self.busy, "one pass at a time"
        self.busy = [feed.sequence for feed in feeds]
        try:
            await trio.sleep(self.seconds)
            self.calls += 1
            await self.before(feeds)
        finally:
            self.busy = []
        self.passes.append([len(feed.tokens) for feed in feeds])
        return [self.append(feed) for feed in feeds]

    def append(self, feed):
        sequence = feed.sequence
        assert sequence in self.open_sequences
        sequence.sequence += feed.tokens
        sequence.chunks.append(len(feed.tokens))
        assert sequence.length <= sequence.capacity, "the cache is too small"
        ends = range(sequence.length - feed.outputs + 1, sequence.length + 1)
        return np.array([sequence.logits(end) for end in ends], np.float32)


class Shelf:
    def __init__(self, *models):
        self._models = models

    def models(self):
        return self._models


def engine_of(*models, **limits):
    """Without drafts and kept prompts, unless a test asks for them."""
    bounds = {name: limits.pop(name) for name in ("rows_max", "drafts_max", "prefix_positions_max") if name in limits}
    options = PassOptions(**{"drafts_max": 0, "prefix_positions_max": 0, **bounds})
    return SelfRunningEngine(Shelf(*models), passes=options, **limits)


def request(prompt="hello", **sampling):
    return GenerationRequest(model="fake", prompt=prompt, sampling=Sampling(**{"max_tokens": 8, **sampling}))


def scripted(script, **sampling):
    return FakeModel(script, prompt=len(TOKENIZER.encode("hello"))), request(temperature=0, **sampling)


async def answer(engine, asked):
    return await events_of(engine, await engine.prepare(asked))


async def events_of(engine, prepared):
    async with engine.stream(prepared) as stream:
        return [event async for event in stream]


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Delta))


def tokens_of(events):
    return [token for event in events if isinstance(event, Delta) for token in event.tokens]


async def test_an_answer_ends_at_its_stop_token():
    model, asked = scripted("Paris.", max_tokens=20)
    events = await answer(engine_of(model), asked)
    assert text_of(events) == "Paris."
    last = events[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.prompt_tokens, last.completion_tokens) == ("stop", 5, 6)
    assert (last.route, last.expert_rows, last.serving["peer"]["layers"]) == ("experts", {"peer": 11}, [0])
    assert tokens_of(events) == list(TOKENIZER.encode("Paris."))
    assert model.open_sequences == []


async def test_an_answer_ends_at_max_tokens():
    model, asked = scripted("Paris is big", max_tokens=5)
    events = await answer(engine_of(model), asked)
    assert (text_of(events), events[-1].reason, events[-1].completion_tokens) == ("Paris", "length", 5)
    assert model.calls == 5, "the last token needs no forward call"


async def test_a_character_cut_off_by_max_tokens_is_not_shown_broken():
    model, asked = scripted("né", max_tokens=2)
    assert text_of(await answer(engine_of(model), asked)) == "n"


async def test_a_stop_string_across_tokens_ends_the_answer_unseen():
    model, asked = scripted("one END two", max_tokens=30, stop=("END",))
    events = await answer(engine_of(model), asked)
    assert (text_of(events), events[-1].reason) == ("one ", "stop")
    assert events[-1].completion_tokens == len("one END")


async def test_text_held_for_a_stop_string_comes_out_at_the_end():
    model, asked = scripted("one EN", max_tokens=30, stop=("END",))
    assert text_of(await answer(engine_of(model), asked)) == "one EN"
    model, asked = scripted("one ENX", max_tokens=6, stop=("END",))
    assert text_of(await answer(engine_of(model), asked)) == "one EN"


async def test_min_tokens_bans_stop_tokens_and_stop_strings():
    model, asked = scripted("a.", max_tokens=10, min_tokens=6)
    events = await answer(engine_of(model), asked)
    assert events[-1].completion_tokens == 6
    model, asked = scripted("a.b.c", max_tokens=10, min_tokens=3, stop=(".",))
    assert text_of(await answer(engine_of(model), asked)) == "a.b"


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "top_k": 20, "top_p": 0.9}, {}])
async def test_a_prepared_request_gives_the_same_answer_alone_and_in_company(sampling):
    engine = engine_of(FakeModel(), generations_max=3)
    prepared = await engine.prepare(request(max_tokens=30, **sampling))
    alone = tokens_of(await events_of(engine, prepared))
    together = []

    async def one():
        together.append(tokens_of(await events_of(engine, prepared)))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    assert together == [alone] * 5


async def test_without_a_seed_answers_differ():
    engine = engine_of(FakeModel())
    assert tokens_of(await answer(engine, request(max_tokens=30))) != tokens_of(
        await answer(engine, request(max_tokens=30))
    )


async def test_long_prompts_go_in_chunks():
    model = FakeModel()
    await answer(engine_of(model, rows_max=100), request("a" * 201, max_tokens=1))
    assert model.opened[0].chunks == [100, 100, 1]


async def test_prompts_as_text_ids_and_chat():
    engine = engine_of(FakeModel())
    ids = TOKENIZER.encode("hello")
    assert (await engine.prepare(request("hello"))).prompt_tokens == ids
    assert (await engine.prepare(request(ids))).prompt_tokens == ids
    chat = replace(request(), prompt=None, messages=(Message(role="user", content="hello"),))
    assert (await engine.prepare(chat)).prompt_tokens == (*ids, STOP)
    long = replace(request(), prompt="z" * 8190)
    assert len((await engine.prepare(long)).prompt_tokens) == 4095


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"model": "other"}, "not_found", "known models: fake"),
        ({"prompt": ""}, "invalid_request", "empty"),
        ({"prompt": ()}, "invalid_request", "empty"),
        ({"prompt": None, "messages": ()}, "invalid_request", "empty"),
        ({"prompt": None}, "invalid_request", "exactly one"),
        ({"messages": (Message(role="user", content="x"),)}, "invalid_request", "exactly one"),
        ({"prompt": (1, 999999)}, "invalid_request", "token 1 is 999999"),
        ({"prompt": "a" * 4096}, "context_length_exceeded", "4096 tokens, this model's maximum context length is 4096"),
        ({"prompt": "a" * 5000}, "context_length_exceeded", "5000 tokens"),
        ({"prompt": "a" * 4090, "sampling": Sampling(min_tokens=7)}, "context_length_exceeded", "min_tokens 7"),
        ({"sampling": Sampling(top_p=2)}, "invalid_request", "top_p"),
    ],
)
async def test_impossible_requests_are_refused_before_anything_streams(changes, code, said):
    with pytest.raises(RequestError) as caught:
        await engine_of(FakeModel()).prepare(replace(request(), **changes))
    assert caught.value.code == code
    assert said in str(caught.value)


async def test_max_tokens_is_what_the_context_leaves():
    engine = engine_of(FakeModel())
    assert (await engine.prepare(request("a" * 4000, max_tokens=None))).max_tokens == 96
    assert (await engine.prepare(request("a" * 4000, max_tokens=500))).max_tokens == 96
    assert (await engine.prepare(request("a" * 4000, max_tokens=5))).max_tokens == 5


async def test_models_say_whether_they_are_ready_and_why_not():
    gone = RemoteError("no_replica", "layers 10 to 19, group 2 have no replica", "start another node")
    ready, broken = engine_of(FakeModel()).models()[0], engine_of(FakeModel(problem=gone))
    assert (ready.id, ready.name, ready.ready, ready.reason, ready.context_tokens) == (
        "ab" * 32,
        "fake",
        True,
        "",
        4096,
    )
    assert not broken.models()[0].ready
    assert "group 2" in broken.models()[0].reason
    with pytest.raises(RemoteError, match="group 2"):
        await broken.prepare(request())


async def test_slots_and_line_are_bounded_and_served_in_order():
    model = FakeModel()
    model.gate = trio.Event()
    engine = engine_of(model, generations_max=1, waiting_max=4)
    prepared = [await engine.prepare(request(chr(97 + number), min_tokens=8)) for number in range(6)]
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(engine.stream(prepared[number])) for number in range(5)]
        await trio.testing.wait_all_tasks_blocked()
        assert (engine.statistics().active, engine.statistics().waiting) == (1, 4)
        with pytest.raises(BusyError) as caught:
            await engine.prepare(request())
        assert caught.value.retry_after_ms > 0
        with pytest.raises(BusyError):
            await stack.enter_async_context(engine.stream(prepared[5]))
        model.gate.set()
        assert [len([event async for event in stream]) for stream in streams] == [9] * 5
    assert [run.sequence[0] for run in model.opened] == [TOKENIZER.encode(chr(97 + number))[0] for number in range(5)]
    assert (engine.statistics().active, engine.statistics().waiting, engine.statistics().finished) == (0, 0, 5)


async def test_leaving_early_frees_slot_and_cache_at_once():
    model = FakeModel()
    engine = engine_of(model, generations_max=1, waiting_max=1)
    async with engine.stream(await engine.prepare(request(max_tokens=4000, min_tokens=4000))) as stream:
        assert isinstance(await anext(stream), Delta)
    assert (engine.statistics().active, engine.statistics().cancelled) == (0, 1), "at once"
    await trio.testing.wait_all_tasks_blocked()
    assert model.open_sequences == []
    assert (engine.statistics().active, engine.statistics().cancelled) == (0, 1)


async def test_leaving_the_line_frees_the_place():
    model = FakeModel()
    model.gate = trio.Event()
    engine = engine_of(model, generations_max=1, waiting_max=1)
    prepared = await engine.prepare(request(min_tokens=8))
    async with engine.stream(prepared) as first:
        async with engine.stream(prepared):
            assert engine.statistics().waiting == 1
        assert engine.statistics().waiting == 0
        model.gate.set()
        assert [event async for event in first][-1].reason == "length"


async def test_cancelling_the_consumer_cancels_the_answer():
    model = FakeModel()
    model.gate = trio.Event()
    engine = engine_of(model)
    prepared = await engine.prepare(request())
    with trio.move_on_after(10) as scope:
        async with engine.stream(prepared) as stream:
            scope.cancel()
            await anext(stream)
    assert scope.cancelled_caught
    assert engine.statistics().active == 0
    await trio.testing.wait_all_tasks_blocked()
    assert (model.open_sequences, model.busy) == ([], []), "the pass that nobody wants has been cancelled"


async def test_who_leaves_in_a_pass_pays_for_its_rows_to_the_end_of_the_pass():
    """The pass goes on for others, and its later calls are shared by what its sequences say then."""
    model = FakeModel()
    engine = engine_of(model, prefix_positions_max=1000)
    leaves, stays = [
        await engine.prepare(replace(request(letter * 40, max_tokens=20, min_tokens=20), user=letter, bill=letter))
        for letter in "ab"
    ]
    model.gate = trio.Event()
    async with engine.stream(stays) as others:
        async with engine.stream(leaves) as mine:
            model.gate.set()
            await anext(mine)  # its prompt is through: it will be kept
            model.gate = trio.Event()
            await trio.testing.wait_all_tasks_blocked()
        assert {sequence.bill.name for sequence in model.busy} == {"a", "b"}
        kept = next(sequence for sequence in model.busy if sequence.bill.name == "a")
        model.gate.set()
        assert isinstance([event async for event in others][-1], Finished)
    assert kept in model.open_sequences
    assert kept.bill is None


async def test_the_texts_of_one_request_for_vectors_have_one_bill(monkeypatch):
    """Its sums are taken again and again while some of its texts are through and none is under way."""
    monkeypatch.setattr(embedding, "_AT_ONCE_MAX", 1)
    bills, written = Bills(), {}

    class Paid(FakeModel):
        async def before(self, feeds):
            for feed in feeds:
                feed.sequence.bill.add("peer", b"channel", len(feed.tokens))
            written.update({(each.bill, cost.channel): cost.nano for each in bills.take() for cost in each.costs})

    engine = engine_of(Paid(), bills=bills)
    texts = tuple("a" * (1 + number % 5) for number in range(40))
    asked = await engine.prepare_embeddings(EmbeddingRequest(model="fake", inputs=texts, bill="mine"))
    await engine.embed(asked)
    assert written == {("mine", b"channel".hex()): sum(map(len, texts))}


async def test_the_consumers_own_error_leaves_as_it_is():
    engine = engine_of(FakeModel())
    prepared = await engine.prepare(request())
    with pytest.raises(KeyError):
        async with engine.stream(prepared):
            raise KeyError("mine")
    assert engine.statistics().active == 0


@pytest.mark.parametrize("call", [1, 3])
async def test_a_failed_expert_call_reaches_the_consumer_after_what_was_generated(call):
    class Failing(FakeModel):
        async def before(self, feeds):
            if self.calls == call:
                raise RemoteError("no_replica", "layer 3, group 1: no replica left", peer_id="somebody")

    model = Failing()
    engine = engine_of(model)
    prepared = await engine.prepare(request(min_tokens=8))
    seen = []
    with pytest.raises(RiosError, match="layer 3, group 1") as caught:  # noqa: PT012 - what came before matters
        async with engine.stream(prepared) as stream:
            async for event in stream:
                seen.append(event)
    assert caught.value.code == "no_replica"
    assert len(seen) == call - 1
    assert model.open_sequences == []
    assert (engine.statistics().failed, engine.statistics().active) == (1, 0)


async def test_a_slow_consumer_slows_only_its_own_answer():
    model = FakeModel()
    engine = engine_of(model, events_max=4)
    prepared = await engine.prepare(request(max_tokens=100, min_tokens=100))
    async with engine.stream(prepared) as slow:
        assert len(await events_of(engine, prepared)) == 101
        await trio.testing.wait_all_tasks_blocked()
        assert len(model.open_sequences[0].sequence) < 5 + 4 + 3, "the slow one's answer waits at its channel"
        assert len([event async for event in slow]) == 101


async def test_a_defect_is_not_mistaken_for_the_end_of_the_answer():
    class Defective(FakeModel):
        async def before(self, feeds):
            raise ZeroDivisionError

    model = Defective()
    engine = engine_of(model)
    prepared = await engine.prepare(request())
    with pytest.raises(ZeroDivisionError):
        await events_of(engine, prepared)
    assert (model.open_sequences, engine.statistics().active) == ([], 0)


async def test_statistics_count_tokens(autojump_clock):
    engine = engine_of(FakeModel())
    await answer(engine, request(max_tokens=20, min_tokens=20))
    numbers = engine.statistics()
    assert (numbers.prompt_tokens, numbers.completion_tokens, numbers.tokens_per_s) == (5, 20, 2.0)
    await trio.sleep(11)
    assert engine.statistics().tokens_per_s == 0


async def test_log_probabilities_are_of_the_raw_logits_whatever_chose_the_token():
    model, asked = scripted("ab", max_tokens=3, logprobs=2, presence_penalty=1, logit_bias=((7, 100),))
    events = await answer(engine_of(model), asked)
    places = [place for event in events if isinstance(event, Delta) for place in event.logprobs]
    assert [place.chosen.token for place in places] == [7, 7, 7]  # the bias outweighs the script's 50
    assert [place.chosen.logprob for place in places] == pytest.approx([-50.0] * 3, abs=1e-6)
    assert [place.top[0].data for place in places[:2]] == [b"a", b"b"]
    assert places[2].top[0].data == b"<|stop|>"
    assert [place.offset for place in places] == [0, 1, 2]
    assert all(len(place.top) == 2 and place.top[0].logprob == pytest.approx(0, abs=1e-6) for place in places)


async def test_log_probabilities_change_no_answer_and_are_there_only_when_asked_for():
    plain = await answer(engine_of(FakeModel()), request(seed=3, max_tokens=20))
    told = await answer(engine_of(FakeModel()), request(seed=3, max_tokens=20, logprobs=0))
    assert tokens_of(plain) == tokens_of(told)
    assert not any(event.logprobs for event in plain if isinstance(event, Delta))
    deltas = [event for event in told if isinstance(event, Delta) and event.tokens]
    assert [tuple(place.chosen.token for place in event.logprobs) for event in deltas] == [
        event.tokens for event in deltas
    ]


async def test_an_offset_counts_the_characters_that_were_complete():
    model, asked = scripted("\u20aca", max_tokens=8, logprobs=0)
    events = await answer(engine_of(model), asked)
    places = [place for event in events if isinstance(event, Delta) for place in event.logprobs]
    assert [(place.chosen.data, place.offset) for place in places] == [
        (b"\xe2", 0),
        (b"\x82", 0),
        (b"\xac", 0),
        (b"a", 1),
    ]


async def test_a_frequency_penalty_ends_a_repetition():
    """The script says one letter 60 times; each time costs it 2 of its 50, then the stop token is as likely."""
    model, asked = scripted("a" * 60, max_tokens=60, frequency_penalty=2)
    assert text_of(await answer(engine_of(model), asked)) == "a" * 25
    model, asked = scripted("a" * 60, max_tokens=60)
    assert text_of(await answer(engine_of(model), asked)) == "a" * 60


async def test_choices_differ_and_each_can_be_repeated():
    async def tokens(choice, **sampling):
        asked = replace(request(max_tokens=20, **sampling), choice=choice)
        return tokens_of(await answer(engine_of(FakeModel()), asked))

    answers = [await tokens(choice, seed=9) for choice in range(3)]
    assert answers == [await tokens(choice, seed=9) for choice in range(3)]
    assert len({tuple(each) for each in answers}) == 3
    assert answers[0] == tokens_of(await answer(engine_of(FakeModel()), request(max_tokens=20, seed=9)))
    assert await tokens(1, temperature=0) == await tokens(0, temperature=0)


async def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused_by_name():
    with pytest.raises(RequestError, match="logit_bias names token 100000") as caught:
        await answer(engine_of(FakeModel()), request(logit_bias=((100000, 1),)))
    assert caught.value.code == "invalid_request"


async def side_by_side(engine, *prepared):
    """All answers at once, in the order asked."""
    found = [None] * len(prepared)

    async def one(number):
        found[number] = await events_of(engine, prepared[number])

    async with trio.open_nursery() as nursery:
        for number in range(len(prepared)):
            nursery.start_soon(one, number)
    return found


async def test_answers_share_passes(autojump_clock):
    model = FakeModel()
    model.seconds = 0.001
    engine = engine_of(model)
    prepared = [await engine.prepare(request(chr(97 + number), min_tokens=30, max_tokens=30)) for number in range(8)]
    alone = [tokens_of(await events_of(engine, each)) for each in prepared]
    model.passes.clear()
    together = await side_by_side(engine, *prepared)
    assert [tokens_of(events) for events in together] == alone
    assert len(model.passes) < 40
    assert [1] * 8 in model.passes
    assert engine.statistics().rows == sum(map(sum, model.passes)) + 8 * 30


async def test_a_long_prompt_does_not_stop_the_others(autojump_clock):
    model = FakeModel()
    model.seconds = 0.001
    engine = engine_of(model, rows_max=32)
    short = await engine.prepare(request(min_tokens=50, max_tokens=50))
    long = await engine.prepare(replace(request("b" * 600, max_tokens=1), user="another"))
    await side_by_side(engine, short, long)
    mixed = [shares for shares in model.passes if len(shares) == 2]
    assert len(mixed) >= 18
    assert all(sum(shares) <= 33 for shares in mixed)


async def test_what_fails_in_company_is_run_alone_and_only_the_broken_answer_ends(autojump_clock):
    class Fragile(FakeModel):
        async def before(self, feeds):
            if any(feed.sequence.sequence[:1] == [BROKEN] and feed.sequence.length > 8 for feed in feeds):
                raise RemoteError("no_replica", "layer 3, group 1: no replica left", peer_id="somebody")

    (BROKEN,) = TOKENIZER.encode("x")
    model = Fragile()
    model.seconds = 0.001
    engine = engine_of(model)
    whole = [await engine.prepare(request(chr(97 + number), min_tokens=20, max_tokens=20)) for number in range(3)]
    alone = [tokens_of(await events_of(engine, each)) for each in whole]
    broken = await engine.prepare(request("x", min_tokens=20, max_tokens=20))
    failures, found = [], []

    async def ends_badly():
        with pytest.raises(RemoteError) as caught:
            await events_of(engine, broken)
        failures.append(caught.value.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends_badly)
        found += await side_by_side(engine, *whole)
    assert [tokens_of(events) for events in found] == alone
    assert failures == ["no_replica"]
    assert model.open_sequences == []
    assert (engine.statistics().finished, engine.statistics().failed) == (6, 1)


async def test_leaving_a_shared_pass_lets_the_others_go_on(autojump_clock):
    model = FakeModel()
    model.seconds = 0.002
    engine = engine_of(model)
    kept = await engine.prepare(request("a", min_tokens=30, max_tokens=30))
    left = await engine.prepare(request("b", min_tokens=4000, max_tokens=4000))
    alone = tokens_of(await events_of(engine, kept))
    found = []

    async def leaves():
        async with engine.stream(left) as stream:
            for _ in range(5):
                await anext(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leaves)
        found += await events_of(engine, kept)
    assert tokens_of(found) == alone
    assert model.open_sequences == []


async def test_an_engine_that_stops_ends_its_answers_as_unavailable():
    model = FakeModel()
    model.gate = trio.Event()
    engine = Engine(Shelf(model))
    prepared = await engine.prepare(request())
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        async with engine.stream(prepared) as stream, engine.stream(prepared):
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(RiosError) as caught:
                    await anext(stream)
    assert caught.value.code == "unavailable"
    assert model.open_sequences == []
    assert engine.statistics().active == engine.statistics().waiting == 0


TEXT = "the cat sat on the mat. the cat sat on the hat. the cat sat"


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 3, "temperature": 0.5}])
async def test_drafts_save_passes_and_change_no_text(sampling, autojump_clock):
    async def tokens(drafts_max):
        model = FakeModel(TEXT * 3, prompt=len(TOKENIZER.encode(TEXT)))
        model.seconds = 0.002
        engine = engine_of(model, drafts_max=drafts_max)
        found = tokens_of(await answer(engine, request(TEXT, max_tokens=150, **sampling)))
        return found, len(model.passes), engine.statistics()

    plain, passes, _ = await tokens(0)
    drafted, fewer, numbers = await tokens(16)
    assert drafted == plain
    assert fewer < passes / 2
    assert numbers.drafts_proposed >= numbers.drafts_accepted >= passes - fewer


async def test_drafts_that_never_come_true_are_no_longer_fed(autojump_clock):
    model = FakeModel()
    model.seconds = 0.002
    engine = engine_of(model, drafts_max=8)
    await answer(engine, request("abcabcabc" * 20, max_tokens=300, min_tokens=300))
    assert engine.statistics().drafts_proposed < 60
    assert engine.statistics().drafts_accepted < 3


async def test_a_prompt_that_begins_like_an_earlier_one_starts_behind_it():
    model = FakeModel()
    engine = engine_of(model, prefix_positions_max=1000)
    first = await answer(engine, request("a" * 60, min_tokens=8, seed=5))
    again = await answer(engine, request("a" * 60, min_tokens=8, seed=5))
    longer = await answer(engine, request("a" * 60 + "b" * 20, min_tokens=8, seed=5))
    assert tokens_of(again) == tokens_of(first)
    assert [events[-1].cached_tokens for events in (first, again, longer)] == [0, 59, 60]
    assert model.opened[1].chunks[0] == 1
    fresh = await answer(engine_of(FakeModel()), request("a" * 60 + "b" * 20, min_tokens=8, seed=5))
    assert tokens_of(longer) == tokens_of(fresh)
    numbers = engine.statistics()
    assert (numbers.prefix_hits, numbers.prefix_tokens) == (2, 119)
    assert 80 < numbers.prefix_positions <= 1000


async def test_a_conversation_goes_on_behind_its_last_answer():
    engine = engine_of(FakeModel(), prefix_positions_max=1000)
    said = tokens_of(await answer(engine, request(tuple(range(1, 41)), min_tokens=8)))
    more = await answer(engine, request((*range(1, 41), *said, 7, 8, 9), min_tokens=8))
    assert more[-1].cached_tokens == 40 + 7, "all but the last token of the answer, which was never fed"


async def test_users_do_not_see_each_others_prompts():
    engine = engine_of(FakeModel(), prefix_positions_max=1000)
    await answer(engine, replace(request("a" * 60), user="ann"))
    assert (await answer(engine, replace(request("a" * 60), user="bob")))[-1].cached_tokens == 0
    assert (await answer(engine, replace(request("a" * 60), user="ann")))[-1].cached_tokens == 59


async def test_kept_prompts_are_bounded_and_their_sequences_closed():
    model = FakeModel()
    engine = engine_of(model, prefix_positions_max=200)
    for number in range(10):
        await answer(engine, request(chr(97 + number) * 60, max_tokens=5, min_tokens=5))
        await trio.testing.wait_all_tasks_blocked()
        assert engine.statistics().prefix_positions <= 200
    assert len(model.open_sequences) == 3


async def test_a_kept_sequence_is_no_longer_than_what_is_in_it():
    model = FakeModel()
    engine = engine_of(model, prefix_positions_max=2000)
    async with engine.stream(await engine.prepare(request("a" * 60, max_tokens=1000, min_tokens=1000))) as stream:
        await anext(stream)
    await trio.testing.wait_all_tasks_blocked()
    assert [sequence.capacity < 100 for sequence in model.open_sequences] == [True]
    assert (await answer(engine, request("a" * 60)))[-1].cached_tokens == 59


async def test_choices_of_one_request_read_its_prompt_once(autojump_clock):
    model = FakeModel()
    model.seconds = 0.001
    engine = engine_of(model, rows_max=50)
    choices = [replace(request("a" * 120, seed=4, min_tokens=8), choice=choice) for choice in range(4)]
    prepared = [await engine.prepare(each) for each in choices]
    found = await side_by_side(engine, *prepared)
    assert sum(events[-1].cached_tokens for events in found) == 3 * 119
    assert sum(map(sum, model.passes)) == 120 + 3 + 4 * 7
    assert len({tuple(tokens_of(events)) for events in found}) == 4


async def test_who_waits_for_a_neighbours_prompt_goes_on_when_the_neighbour_leaves(autojump_clock):
    model = FakeModel()
    model.seconds = 0.001
    engine = engine_of(model, rows_max=10)
    prepared = await engine.prepare(request("a" * 120, min_tokens=8))
    async with engine.stream(prepared):
        await trio.sleep(0.003)
        async with engine.stream(prepared) as second:
            await trio.sleep(0.003)
            third = engine.stream(prepared)
            async with third as stream:
                assert len([event async for event in stream]) == 9
            assert len([event async for event in second]) == 9
    await trio.testing.wait_all_tasks_blocked()
    assert model.open_sequences == []


async def test_memory_bounds_an_answer_and_all_of_them_together():
    model = FakeModel()
    model.gate = trio.Event()
    engine = engine_of(model, kv_tokens_max=100)
    with pytest.raises(RequestError, match="kv_tokens_max") as caught:
        await engine.prepare(request("a" * 100))
    assert caught.value.code == "context_length_exceeded"
    assert (await engine.prepare(request("a" * 40, max_tokens=None))).max_tokens == 60
    prepared = await engine.prepare(request("a" * 40, max_tokens=20))
    async with engine.stream(prepared), engine.stream(prepared):
        await trio.testing.wait_all_tasks_blocked()
        assert (engine.statistics().active, engine.statistics().waiting) == (1, 1)
        assert engine.statistics().kv_positions == 60
    assert engine.statistics().kv_positions == 0


async def test_one_users_many_requests_do_not_keep_another_waiting(autojump_clock):
    model = FakeModel()
    model.seconds = 0.001
    engine = engine_of(model, generations_max=2, waiting_max=100)
    many = [await engine.prepare(replace(request("a", max_tokens=100, min_tokens=100), user="many")) for _ in range(12)]
    one = await engine.prepare(replace(request("b", max_tokens=5, min_tokens=5), user="one"))
    ends = []

    async def run(prepared):
        await events_of(engine, prepared)
        ends.append(prepared.request.user)

    async with trio.open_nursery() as nursery:
        for each in many:
            nursery.start_soon(run, each)
        await trio.sleep(0.005)
        nursery.start_soon(run, one)
    assert ends.index("one") <= 7
    assert len(ends) == 13


SAID = "Pack my box with five dozen liquor jugs, quick brown fox!"


def small_model(script=SAID, **changes):
    """A quick model that says the same, for drafts."""
    small = FakeModel(script, prompt=5)
    small.id, small.name = "cd" * 32, "small"
    for name, value in changes.items():
        setattr(small, name, value)
    return small


async def with_drafts_of(small):
    """What a slow model says with the other's guesses, its passes, and the engine's numbers."""
    model, asked = scripted(SAID, max_tokens=100)
    model.seconds = 0.02
    engine = engine_of(model, small, drafts_max=8, draft_model="small")
    found = text_of(await answer(engine, asked))
    await trio.testing.wait_all_tasks_blocked()
    assert model.open_sequences == small.open_sequences == []
    return found, len(model.passes), engine.statistics()


async def test_a_draft_model_saves_passes_and_changes_no_text(autojump_clock):
    found, passes, numbers = await with_drafts_of(small_model())
    assert found == SAID
    assert passes < len(SAID) / 2
    assert numbers.drafts_accepted > len(SAID) / 2


async def test_a_draft_model_that_guesses_wrong_is_hardly_asked(autojump_clock):
    small = small_model("x" * 100, seconds=0.004)
    found, passes, _ = await with_drafts_of(small)
    assert found == SAID
    assert passes > len(SAID) - 5
    assert len(small.passes) < 20


async def test_a_draft_model_that_is_as_slow_is_hardly_asked(autojump_clock):
    small = small_model(seconds=0.02)
    assert (await with_drafts_of(small))[0] == SAID
    assert len(small.passes) < 20


async def test_a_draft_model_that_fails_ends_no_answer(caplog, autojump_clock):
    class Broken(FakeModel):
        async def before(self, feeds):
            raise RemoteError("no_replica", "gone", peer_id="somebody")

    small = Broken(SAID, prompt=5)
    small.id, small.name = "cd" * 32, "small"
    assert (await with_drafts_of(small))[0] == SAID
    assert "no drafts from the draft model" in caplog.text
    assert caplog.text.count("no drafts") == 1


async def test_a_draft_model_of_another_vocabulary_is_not_used(caplog, autojump_clock):
    small = small_model(words=tokenizer_of_letters())
    assert (await with_drafts_of(small))[0] == SAID
    assert small.passes == []
    assert "small has another vocabulary than fake" in caplog.text


def tokenizer_of_letters():
    """Another vocabulary."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<|stop|>", *reversed(LETTERS), "zz"],
        "tokenizer.ggml.token_type": [3, *[1] * (len(LETTERS) + 1)],
        "tokenizer.ggml.merges": ["z z"],
    }
    return Tokenizer(tokenizer_json(metadata), "")
