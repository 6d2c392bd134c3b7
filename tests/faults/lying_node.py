"""A whole daemon that lies: its experts' and its stages' answers are altered before they are encoded, paid for and
signed.

Not a test, and no part of the product. Stands before the usual command, as ``NodeProcess.prefix`` does it: arguments
are the lie, then ``python -P -m node`` and what ``rios`` takes. A lie is a kind and a share of the calls, such as
``zeros:0.05``: ``zeros`` (zeros), ``one`` (one element 1 % too large), ``fp16`` (rounded to fp16), ``noise`` (1e-3 of
it is noise).
"""

import random
import sys

import numpy as np

from dmoe.stages.loaded import Job
from dmoe.worker import Worker
from node import cli

KIND, _, SHARE = sys.argv[1].partition(":")
DICE = random.Random(1)


def altered(answer: np.ndarray) -> np.ndarray:
    """A lie of the kind asked for."""
    lie = answer.copy()
    if KIND == "zeros":
        lie[:] = 0
    elif KIND == "one":
        lie.flat[int(np.abs(lie).argmax())] *= np.float32(1.01)
    elif KIND == "fp16":
        lie = lie.astype(np.float16).astype(np.float32)
    else:
        assert KIND == "noise", KIND
        lie *= 1 + np.float32(1e-3) * np.random.default_rng(1).standard_normal(lie.shape).astype(np.float32)
    return lie


def main() -> int:
    honest, truth = Worker._reply, Job.answered

    def lying(self, call, asked, shards, partials, *more, **named):
        if DICE.random() < float(SHARE or 1):
            partials = [altered(partial) for partial in partials]
        return honest(self, call, asked, shards, partials, *more, **named)

    def untrue(self, y, ended):
        truth(self, altered(y) if DICE.random() < float(SHARE or 1) else y, ended)

    Worker._reply, Job.answered = lying, untrue
    return cli.main(sys.argv[sys.argv.index("node") + 1 :])


if __name__ == "__main__":
    sys.exit(main())
