"""A tiny model with random weights behind the real engine, for tests of what is asked of an answer."""

from contextlib import asynccontextmanager

from tokenizers import pre_tokenizers

from config.generation import Delta, GenerationRequest, Sampling
from dmoe.engine import DEFAULT_PASSES, Engine
from dmoe.importer.tokenizer import tokenizer_json
from dmoe.models import StoredModels
from dmoe.runtime import RuntimeOptions
from dmoe.store import ModelStore
from dmoe.text import Tokenizer
from tests.unit.dmoe.engine_kit import SelfRunningEngine
from tests.unit.dmoe.model_kit import TOKENS, made

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer(template="", control=()):
    """A tokenizer of bytes, ``zz`` and control tokens; token 0 is ``<|stop|>``."""
    tokens = ["<|stop|>", *LETTERS, "zz", *control]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, *[1] * (len(LETTERS) + 1), *[3] * len(control)],
        "tokenizer.ggml.merges": ["z z"],
    }
    return Tokenizer(tokenizer_json(metadata), template)


@asynccontextmanager
async def engine_running(folder, **options):
    """:func:`tiny_engine` for as long as the block."""
    engine = await tiny_engine(folder, kind=Engine, **options)
    async with engine.running():
        yield engine


async def tiny_engine(folder, *, route="fused", kind=SelfRunningEngine, passes=DEFAULT_PASSES, **options):
    """An engine over one model called ``tiny``; ``options`` as :func:`model_kit.write_gguf` takes them. A model that is
    in the folder already is used as it is."""
    store = ModelStore(folder / "models")
    if not store.manifests():
        store, _ = await made(folder, **options)
    models = StoredModels(store, None, RuntimeOptions(device="cpu", threads=1), "me")
    return kind(models, default_route=route, passes=passes)


def request(prompt="hello", **sampling):
    asked = Sampling(**{"max_tokens": 200, "temperature": 1.0, "seed": 7, **sampling})
    return GenerationRequest(model="tiny", prompt=prompt, sampling=asked)


async def events_of(engine, asked):
    async with engine.stream(await engine.prepare(asked)) as stream:
        return [event async for event in stream]


async def answer(engine, asked):
    """Text and the last event."""
    events = await events_of(engine, asked)
    return "".join(event.text for event in events if isinstance(event, Delta)), events[-1]


def tokens_of(events):
    return [token for event in events if isinstance(event, Delta) for token in event.tokens]


def token_of(text):
    """The id of a token of the tiny model."""
    return [*TOKENS, "ab"].index(text)
