"""Commits certified entries and votes to a ledger as fast as it can and says after each commit how many are durable.

Arguments: the database, ``full`` or ``normal`` (the setting under test; ``normal`` is there to show that the test sees
what is lost).
"""

import sys
from pathlib import Path

from ledger.core.objects import Grant
from ledger.records import Voted
from ledger.store import Store
from tests.unit.ledger.ledger_kit import Maker

GROUP = 3


def main() -> None:
    maker = Maker(2)
    store = Store(Path(sys.argv[1]), maker.genesis.net)
    store._writer.execute(f"PRAGMA synchronous = {sys.argv[2]}")
    done = 0
    while True:
        for _ in range(GROUP):
            maker.entry(0, Grant(maker.people[1].public_key, 1))
        group = maker.finals[done:]
        store.commit([*group, *(Voted(final.item) for final in group)])
        done += len(group)
        print(done, flush=True)


if __name__ == "__main__":
    main()
