"""A whole daemon that is told to stop in the middle of its first call: SIGTERM comes before the answer is computed.

Not a test, and no part of the product. Stands before the usual command, as ``NodeProcess.prefix`` does it: ``experts``
or ``stages`` (whose call), the seconds that computing takes from then on, then ``python -P -m node`` and what ``rios``
takes.
"""

import os
import signal
import sys

import trio

from dmoe.stages.host import StageHost
from dmoe.worker import Worker
from node import cli

KIND, SECONDS = sys.argv[1], float(sys.argv[2])


def main() -> int:
    owner, name = (Worker, "compute") if KIND == "experts" else (StageHost, "_turn")
    honest = getattr(owner, name)

    async def leaving(self, *args, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep(SECONDS)
        return await honest(self, *args, **named)

    setattr(owner, name, leaving)
    Worker._quick = lambda self, call: None  # nothing is answered before the signal can be heard
    return cli.main(sys.argv[sys.argv.index("node") + 1 :])


if __name__ == "__main__":
    sys.exit(main())
