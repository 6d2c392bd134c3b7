"""Hostile DHT records against the rules that decide what this node stores for others and believes when it asks."""

import time
from random import Random
from types import SimpleNamespace
from typing import Any

from libp2p.records.utils import InvalidRecordType
from libp2p.records.validator import NamespacedValidator

from dmoe.core import deployment
from dmoe.core.deployment import Deployment
from p2p import host as hosts
from p2p.core import advert as adverts
from p2p.core.advert import Advert
from p2p.core.identity import Identity
from p2p.directory import PeerDirectory
from p2p.face import RecordRule
from p2p.rules import Rules
from tests.fuzz import fuzz_adverts
from tests.fuzz.mutation import spoil, text

EPISODE = 50


def make_validator() -> NamespacedValidator:
    """The rules a node registers, behind the library's own dispatch."""
    rules = Rules()
    host: Any = SimpleNamespace(accept_records=rules.rules.__setitem__, learn=lambda *_: None)
    caller: Any = SimpleNamespace(peers=lambda: (), is_linked=lambda _: False)
    me = fuzz_adverts.ME
    PeerDirectory(me, host, caller, Advert(me.peer_id, 0, 0), advert_seconds=60)
    rules.rules["deployment"] = RecordRule(deployment.check_record, deployment.newest)
    return NamespacedValidator({hosts.NAMESPACE: rules}, strict_validation=True)


VALIDATOR = make_validator()


def _record(random: Random, now_ms: int) -> tuple[str, bytes]:
    """A valid record and its name."""
    identity: Identity = random.choice(fuzz_adverts.IDENTITIES)
    if random.random() < 0.5:
        advert = Advert(identity.peer_id, now_ms, now_ms + 2 * 3600_000)
        return f"node/{identity.peer_id}", adverts.sign(identity, advert).data
    wish = Deployment("b" * 64, b"d" * 32, random.randrange(1, 9), identity.peer_id, now_ms)
    return f"deployment/{'b' * 64}", deployment.sign(identity, wish).data


def _key(random: Random, name: str) -> str:
    pick = random.random()
    if pick < 0.6:
        return f"/rios/{name}"
    if pick < 0.8:
        return spoil(random, f"/rios/{name}".encode()).decode(errors="replace")
    return random.choice(
        ("", "/", "/rios", "/rios/", "/rios/node", "/rios/node/", "/pk/x", "rios/node/x", text(random))
    )


def run(random: Random) -> int:
    """One episode: the number of records."""
    now_ms = int(time.time()) // 3600 * 3600_000
    for _ in range(EPISODE):
        name, good = _record(random, now_ms)
        pick = random.random()
        bad = good if pick < 0.2 else spoil(random, good) if pick < 0.9 else bytes(random.choice((0, 65536, 65537)))
        key = _key(random, name)
        try:
            VALIDATOR.validate(key, bad)
            values = [bad, good] if random.random() < 0.5 and key == f"/rios/{name}" else [bad]
            assert 0 <= VALIDATOR.select(key, values) < len(values)
        except (InvalidRecordType, ValueError):
            pass
    return EPISODE
