"""A whole daemon that a signal hits in the middle of a call: taken, and not computed yet.

Not a test, and no part of the product. Stands before the usual command, as ``NodeProcess.prefix`` does it: ``experts``
or ``stages`` (whose call), which call it is (1: the first; 0: the first after SIGUSR1, and slowly until then, so that
an answer is still under way when that comes), the signal (``KILL``, ``TERM``), the seconds that computing takes from
then on, then ``python -P -m node`` and what ``rios`` takes.
"""

import itertools
import os
import signal
import sys

import trio

from dmoe.stages.host import StageHost
from dmoe.worker import Worker
from node import cli

KIND, NUMBER, SIGNAL, SECONDS = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
PACE_SECONDS = 0.01


def main() -> int:
    owner, name = (Worker, "compute") if KIND == "experts" else (StageHost, "_turn")
    honest = getattr(owner, name)

    calls, told = itertools.count(1), []
    signal.signal(signal.SIGUSR1, lambda *_: told.append(True))

    async def leaving(self, *args, **named):
        if not NUMBER and not told:
            await trio.sleep(PACE_SECONDS)
        elif next(calls) >= NUMBER:
            os.kill(os.getpid(), signal.Signals[f"SIG{SIGNAL}"])
            await trio.sleep(SECONDS)
        return await honest(self, *args, **named)

    setattr(owner, name, leaving)
    Worker._quick = lambda self, call: None  # every call is one that can be hit
    return cli.main(sys.argv[sys.argv.index("node") + 1 :])


if __name__ == "__main__":
    sys.exit(main())
