"""Two implementations, one verdict: on the vectors, and on thousands of hostile bytes."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from config.errors import IntegrityError
from p2p.core import headers
from p2p.core.advert import BadAdvert, open_advert

VECTORS = Path(__file__).parents[1] / "vectors"
WIRE: dict[str, Any] = json.loads((VECTORS / "wire.json").read_text())
ROUNDS = {"frames": 2500, "headers": 1500, "adverts": 400}
NAMES = {"error": "failed", "cancel": "cancelled", "credit": "granted"}

sys.path.insert(0, str(VECTORS))


def mutated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.choice((0, 1, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xC4, 0xD9, 0xFF))
            case 2:
                out[at:at] = rng.randbytes(rng.randint(1, 4))
            case 3:
                del out[at : at + rng.randint(1, 4)]
            case 4:
                out += other
            case _:
                del out[at:]
    return bytes(out)


def cases(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    made = []
    for kind, rounds in ROUNDS.items():
        known = [(bytes.fromhex(case["data"]), case.get("made", 0)) for case in WIRE[kind]]
        for _ in range(rounds):
            (data, calls), (other, _) = rng.choice(known), rng.choice(known)
            made.append({"kind": kind, "made": calls, "data": mutated(rng, data, other).hex()})
    return made


def verdict(case: dict[str, Any]) -> Any:
    import make_wire

    data = bytes.fromhex(case["data"])
    try:
        if case["kind"] == "adverts":
            return open_advert(data, now_ms=WIRE["now_ms"]).advert.peer_id
        if case["kind"] == "headers":
            return len(headers.unpack(data))
        return [type(event).__name__.lower() for event in make_wire.feed(case["made"], data)]
    except BadAdvert as error:
        return f"refused: {error.kind}"
    except IntegrityError:
        return "refused"


def test_two_implementations_come_to_one_verdict(javascript, node22):
    asked = cases(seed=20)
    command = [node22, str(javascript / "verdicts.mjs"), str(WIRE["now_ms"]), str(WIRE["frame_bytes_max"])]
    lines = "".join(json.dumps(case) + "\n" for case in asked)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    differences = []
    for case, answer in zip(asked, answers, strict=True):
        theirs = answer.get("read", "refused")
        if isinstance(theirs, list):
            theirs = [NAMES.get(kind, kind) for kind in theirs]
        elif case["kind"] == "adverts" and "refused" in answer:
            theirs = f"refused: {answer['refused']}"
        if theirs != verdict(case):
            differences.append((case, verdict(case), answer))
    assert differences == []
    assert sum("read" in answer for answer in answers) > len(answers) // 20


def test_javascript_agrees_on_every_vector(javascript, node22):

    program, file = str(javascript / "vectors.mjs"), str(VECTORS / "wire.json")
    done = subprocess.run([node22, program, file], capture_output=True, text=True, timeout=60, check=True)
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["checked"] >= sum(len(cases) for cases in WIRE.values() if isinstance(cases, list))
