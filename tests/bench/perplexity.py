"""Perplexity of one text: this project's routes beside llama.cpp, on the same file and the same token ids.

Owns: the text, the question to llama.cpp, the arithmetic. Does not own: llama.cpp's environment (``bench_generate``).

llama.cpp's server tells log probabilities of answers, not of prompts: each place of the text is a prompt of its own,
one token longer than the last, whose next token's likeliest ones are asked for, and all of them where the text's own
is not among these.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmoe.layers import ModelRunner
from dmoe.runner import Feed

TOKENS_MAX = 300
TEXT = (
    "A lighthouse stands where the land ends and the sea becomes dangerous. For more than two thousand years people "
    "have lit fires on towers, so that ships at night could tell a harbour from a reef. The first keepers carried wood "
    "up the stairs, then coal, then oil; each of these fuels burned brighter than the last, and each had to be watched "
    "until the morning. In the nineteenth century a French engineer cut glass into rings of prisms, and a single lamp "
    "could be seen twenty miles away. The keepers wound the clockwork that turned the lens, trimmed the wick every few "
    "hours, polished the brass, and wrote the weather into a book. Storms sometimes kept their relief away for weeks. "
    "When electricity came, the lamp no longer needed a hand to light it, and one tower after another was left to its "
    "machines. Today satellites tell a captain where he is, but most of the towers are still there. Some are museums, "
    "some are houses, and a few of them still turn their beams over the water, because a light that does not depend "
    "on anything aboard the ship is a good thing to have when everything aboard the ship has failed."
)

PEER_PROGRAM = """
import json, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup = sys.argv[1], 1024, 1, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[2])
server, ids = xllamacpp.Server(p), json.loads(sys.argv[3])
for place in range(1, len(ids)):
    for count in (5000, 1 << 20):
        answer = server.handle_completions(dict(
            prompt=ids[:place], n_predict=1, temperature=0, logprobs=count, n_probs=count, cache_prompt=True))
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        (told,) = answer["choices"][0]["logprobs"]["content"]
        found = [top["logprob"] for top in told["top_logprobs"] if top["id"] == ids[place]]
        if found:
            break
    print("LOGPROB", found[0], flush=True)
"""


def theirs(python: Path, gguf: Path, threads: int, ids: list[int]) -> float:
    """llama.cpp's perplexity. Raises CalledProcessError if it does not run."""
    command = [str(python), "-c", PEER_PROGRAM, str(gguf), str(threads), json.dumps(ids)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [float(line.split()[1]) for line in told.splitlines() if line.startswith("LOGPROB ")]
    assert len(found) == len(ids) - 1
    return float(np.exp(-np.mean(found)))


async def ours(runner: ModelRunner, ids: list[int]) -> float:
    """This project's perplexity, of the same places."""
    sequence = await runner.open(len(ids))
    (logits,) = await runner.forward([Feed(sequence=sequence, tokens=tuple(ids), outputs=len(ids))])
    sequence.close()
    return float(np.exp(-_logprobs(logits[:-1].astype(np.float64), np.array(ids[1:])).mean()))


def _logprobs(logits: NDArray[np.float64], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    most = logits.max(axis=1)
    totals = most + np.log(np.exp(logits - most[:, None]).sum(axis=1))
    found: NDArray[np.float64] = logits[np.arange(len(chosen)), chosen] - totals
    return found
