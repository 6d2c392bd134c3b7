"""Real runners: an answer's text is the same alone, in company, with any drafts, and behind a taken-over beginning."""

import numpy as np
import pytest

from config.generation import Sampling
from dmoe.core.answer import Answer, Job
from dmoe.core.speculate import Lookup
from dmoe.models import StoredModels
from dmoe.runner import Feed
from dmoe.runtime import RuntimeOptions
from tests.unit.dmoe.model_kit import VOCAB, made

PROMPTS = [tuple(range(3, 60)), tuple(range(3, 30)) * 2, (5, 6, 7, 8) * 8, (9, 11)]
SAMPLINGS = [Sampling(temperature=0), Sampling(seed=4, temperature=0.8), Sampling(seed=5, repetition_penalty=1.3)]
TOKENS = 24


def plain(answer, _):
    return ()


def looked_up(answer, _):
    return Lookup(answer.tokens, 400).draft(6).tokens


def random_guesses(answer, random):
    return tuple(random.integers(1, VOCAB, random.integers(0, 5)).tolist())


async def say(runner, tokenizer, prompts, drafts, *, like=(), chunk=20):
    """Answers to all prompts at once, each with drafts; their tokens and how many drafts came true."""
    random = np.random.default_rng(1)
    running = {}
    for number, prompt in enumerate(prompts):
        source = like[number] if like else None
        length = min(len(prompt) - 1, source.length) if source else 0
        sequence = await runner.open(len(prompt) + TOKENS, like=source, length=length)
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        job = Job(prompt_tokens=prompt, max_tokens=TOKENS, sampling=sampling, stop_tokens=frozenset())
        running[number] = (Answer(job, tokenizer, length=length), sequence)
    everything = dict(running)
    while running:
        steps = {n: answer.next(chunk, drafts(answer, random)) for n, (answer, _) in running.items()}
        feeds = [Feed(sequence=running[n][1], tokens=step.tokens, outputs=step.outputs) for n, step in steps.items()]
        for (n, step), rows in zip(steps.items(), await runner.forward(feeds), strict=True):
            answer, sequence = running[n]
            taken = answer.take(step, rows)
            sequence.truncate(taken.length)
            if taken.reason:
                del running[n]
    said = [answer.tokens[len(prompt) :] for (answer, _), prompt in zip(everything.values(), prompts, strict=True)]
    return said, [sequence for _, sequence in everything.values()], sum(a.accepted for a, _ in everything.values())


@pytest.mark.parametrize("quantisation", ["fp32", "int8", "source"])
@pytest.mark.parametrize("route", ["fused", "local"])
async def test_company_drafts_and_taken_over_beginnings_change_no_text(tmp_path, route, quantisation):
    store, _ = await made(tmp_path, quantisation=quantisation)
    (model,) = StoredModels(store, None, RuntimeOptions(device="cpu", threads=2), "me").models()
    runner, tokenizer = await model.runner(route), await model.tokenizer()
    alone = [(await say(runner, tokenizer, [prompt], plain))[0][0] for prompt in PROMPTS[:1]]
    together, sequences, _ = await say(runner, tokenizer, PROMPTS, plain)
    assert together[0] == alone[0]
    drafted, _, accepted = await say(runner, tokenizer, PROMPTS, looked_up, chunk=7)
    assert drafted == together
    assert accepted > 0
    assert (await say(runner, tokenizer, PROMPTS, random_guesses, chunk=33))[0] == together
    assert (await say(runner, tokenizer, PROMPTS, looked_up, like=sequences))[0] == together
