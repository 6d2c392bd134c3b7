"""Answers that are remembered: who asks the same again, and says that an old answer is good enough, gets it at once.

Only what is always answered the same (temperature 0), and only where it is asked for: by the request (``x-rios-cache:
use``) or by its key. A request can say otherwise: ``cache-control: no-cache`` wants a new answer, which is kept,
``no-store`` one that is not. Owns the store and what makes two requests the same; an answer from here costs nothing and
is not generated, so it leaves no usage behind.

Invariants:
1. Nobody gets an answer to another user's request: the account is part of the name.
2. A model deployed anew under an old name has other answers: its id is part of the name.
3. What was computed without some experts is not kept. All together takes at most ``bytes_max``.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response

from config.generation import Finished
from gateway.errors import invalid
from gateway.openai.job import Order, Service

HEADER = "x-rios-cache"
_ANSWER_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class _Kept:
    body: bytes
    media: str
    until: float


class Remembered:
    """Answers by name, the least lately used forgotten first."""

    def __init__(self, *, bytes_max: int, seconds: float) -> None:
        self._bytes_max = bytes_max
        self._seconds = seconds
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._bytes = 0

    @property
    def size(self) -> int:
        """Bytes of all answers here."""
        return self._bytes

    def find(self, name: bytes) -> tuple[bytes, str] | None:
        """An answer and its content type."""
        kept = self._kept.get(name)
        if kept is None:
            return None
        if kept.until <= trio.current_time():
            self._forget(name)
            return None
        self._kept.move_to_end(name)
        return kept.body, kept.media

    def keep(self, name: bytes, body: bytes, media: str) -> None:
        """Remember an answer, unless it is too long."""
        self._forget(name)
        if len(body) > min(_ANSWER_BYTES_MAX, self._bytes_max):
            return
        self._kept[name] = _Kept(body, media, trio.current_time() + self._seconds)
        self._bytes += len(body)
        while self._bytes > self._bytes_max:
            self._forget(next(iter(self._kept)))

    def _forget(self, name: bytes) -> None:
        kept = self._kept.pop(name, None)
        if kept is not None:
            self._bytes -= len(kept.body)


class Memory:
    """One request's view: what it may be answered with, and where its answer may be kept. ``anew``: with nothing."""

    def __init__(self, store: Remembered, name: bytes, *, anew: bool = False) -> None:
        self._store = store
        self._name = name
        self._anew = anew

    def answer(self) -> Response | None:
        """What was answered before."""
        found = None if self._anew else self._store.find(self._name)
        return None if found is None else Response(found[0], headers={HEADER: "hit"}, media_type=found[1])

    def keep(self, body: bytes, media: str, parts: Sequence[Finished]) -> None:
        """The answer, for who asks next."""
        if not any(part.missing for part in parts):
            self._store.keep(self._name, body, media)


def memory_of(request: Request, service: Service, order: Order, body: msgspec.Struct) -> Memory | None:
    """None: this request's answer is not remembered. Raises ApiError for a header that says something else."""
    wish = ",".join(request.headers.getlist(HEADER)).strip().lower()
    if wish not in ("", "use"):
        raise invalid(HEADER, f"{HEADER} is use, not {wish!r:.60}")
    if not (wish or order.principal.cache) or order.request.sampling.temperature != 0:
        return None
    control = ",".join(request.headers.getlist("cache-control")).lower()
    directives = {each.strip() for each in control.split(",")}
    if "no-store" in directives:
        return None
    asked = order.request.model
    model = next((each.id for each in service.engine.models() if asked in (each.id, each.name)), asked)
    parts = (order.principal.account_id, order.endpoint, model, order.request.privacy)
    digest = hashlib.sha256(msgspec.json.encode([*parts, body], order="deterministic"))
    return Memory(service.remembered, digest.digest(), anew="no-cache" in directives)
