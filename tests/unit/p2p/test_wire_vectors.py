"""The wire vectors: the code makes exactly these bytes, reads them back and refuses what must be refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from config.errors import IntegrityError, RiosError
from dmoe.core import wire
from p2p.core import headers
from p2p.core.advert import BadAdvert, open_advert
from p2p.core.heartbeat import open_heartbeat
from p2p.core.identity import public_key_of, verify

VECTORS = Path(__file__).parents[2] / "vectors"
WIRE: dict[str, Any] = json.loads((VECTORS / "wire.json").read_text())

sys.path.insert(0, str(VECTORS))


def test_the_code_makes_exactly_these_vectors():
    import make_wire

    assert json.loads(json.dumps(make_wire.make())) == WIRE


@pytest.mark.parametrize("case", WIRE["not_peer_ids"], ids=lambda case: case["why"])
def test_what_is_no_peer_id(case):
    with pytest.raises(IntegrityError):
        public_key_of(case["peer_id"])


@pytest.mark.parametrize("case", WIRE["signatures"], ids=lambda case: case["name"])
def test_signatures(case):
    key, tag, body, signature = (bytes.fromhex(case[field]) for field in ("public_key", "tag", "body", "signature"))
    assert verify(key, tag, body, signature) is case["valid"]


def _refused(part: str) -> list[Any]:
    return [case for case in WIRE[part] if "refused" in case]


@pytest.mark.parametrize("case", _refused("adverts"), ids=lambda case: case["name"])
def test_adverts_that_are_refused_by_kind(case):
    data = bytes.fromhex(case["data"]) + bytes(case.get("then_zeros", 0))
    with pytest.raises(BadAdvert) as caught:
        open_advert(data, now_ms=WIRE["now_ms"])
    assert caught.value.kind == case["refused"]


@pytest.mark.parametrize("case", _refused("heartbeats"), ids=lambda case: case["name"])
def test_heartbeats_that_are_refused_by_kind(case):
    with pytest.raises(BadAdvert) as caught:
        open_heartbeat(bytes.fromhex(case["data"]), now_ms=WIRE["now_ms"])
    assert caught.value.kind == case["refused"]


@pytest.mark.parametrize("case", _refused("headers"), ids=lambda case: case["name"])
def test_headers_that_are_refused(case):
    with pytest.raises(IntegrityError):
        headers.unpack(bytes.fromhex(case["data"]))


@pytest.mark.parametrize("case", _refused("frames"), ids=lambda case: case["refused"])
def test_frames_that_are_refused(case):
    import make_wire

    with pytest.raises(IntegrityError) as caught:
        make_wire.feed(case["made"], bytes.fromhex(case["data"]))
    assert caught.value.code == ("too_large" if case["refused"] == "size" else "protocol")


@pytest.mark.parametrize("case", _refused("tensors"), ids=lambda case: case["name"])
def test_tensors_that_are_refused(case):
    header = {name: bytes.fromhex(v["hex"]) if isinstance(v, dict) else v for name, v in case["header"].items()}
    with pytest.raises(RiosError):
        wire.decode(header, bytes.fromhex(case["buffer"]))
