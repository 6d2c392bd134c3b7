"""A whole daemon that does not hedge: whoever fails is asked again elsewhere once it has failed, not before.

Not a test, and no part of the product. Stands before the usual command, as ``NodeProcess.prefix`` does it: ``python -P
-m node`` and what ``rios`` takes.
"""

import sys

from dmoe.core.hedge import HedgeBudget
from node import cli


def main() -> int:
    HedgeBudget.take = lambda self, count=1: False
    return cli.main(sys.argv[sys.argv.index("node") + 1 :])


if __name__ == "__main__":
    sys.exit(main())
