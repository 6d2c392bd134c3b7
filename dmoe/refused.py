"""What of strangers' models was refused or stopped here, by kind, for the security log and the metrics.

Invariants: a few kinds only; the log tells of each at most every :data:`LOG_SECONDS`, with the number it left out.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Literal

from config.errors import IntegrityError

log = logging.getLogger("rios.security.models")

LOG_SECONDS = 10.0
Kind = Literal["manifest", "file", "text"]
"""``file``: its path, hash, form or numbers. ``text``: a tokenizer or chat template that exceeded its limits."""


class Refused:
    """Counters of one node. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.by_kind: Counter[Kind] = Counter()
        self._clock = clock
        self._said: dict[Kind, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def count(self, kind: Kind, error: IntegrityError) -> None:
        """One more."""
        now = self._clock()
        with self._lock:
            self.by_kind[kind] += 1
            said_at, left_out = self._said.get(kind, (float("-inf"), 0))
            if now - said_at < LOG_SECONDS:
                self._said[kind] = (said_at, left_out + 1)
                return
            self._said[kind] = (now, 0)
        more = f" ({left_out} more since the last line)" if left_out else ""
        log.warning("%s refused: %s%s", kind, error.message, more)

    @contextmanager
    def counting(self, kind: Kind) -> Iterator[None]:
        """Count the IntegrityError that the block raises."""
        try:
            yield
        except IntegrityError as error:
            self.count(kind, error)
            raise
