"""Lanes: shared memory with a doorbell, one call at a time on each. The parent's side and the cell's.

Owns: the layout, waiting, who may trust what. Does not own: what a call means (``shard``, ``program``), or lives
(``cell``).

A lane is a head (numbers), a place for what is asked and one for the answer, in one memfd of all lanes, sealed before
the cell gets it. The doorbell is a socket: a message is the call's number. Whoever waits looks at a number in memory
for some tens of microseconds first, then sleeps in the kernel; the doorbell is always rung, and always heard before
memory is read, so that nothing depends on the order in which a processor writes.

Invariants:
1. The memory cannot shrink: a cell that tried to truncate it would fail, and the parent cannot be killed by reading it.
2. The parent reads numbers once, and copies an answer out before it looks at it: a cell that scribbles later changes
   nothing that was checked.
3. Waiting is bounded by a deadline on the parent's side; a cell that has ended is noticed at once.
"""

import fcntl
import math
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from config.errors import RemoteError
from config.vocabulary import KIB, MIB
from dmoe.core.wire import FloatRows

HEAD_BYTES = 4 * KIB
ASKED_BYTES = ANSWER_BYTES = 4 * MIB
TOUCHED_BYTES = MIB
"""Of each place, written once at the start: a page that is new costs a call several microseconds."""
NUMBERS = 16
"""Numbers in each half of the head."""
ERROR_BYTES_MAX = 1024
ASKER_SPIN_SECONDS = (10e-6, 300e-6)
"""For how long the parent looks at memory before it sleeps, at least and at most. Waking up costs 20 us, and again
until caches are warm."""
ANSWERER_SPIN_SECONDS = (10e-6, 50e-6)
"""The same in the cell, where it is a guess whether another call comes, and the core may be wanted elsewhere."""
NO_SPIN_TURNS = 16
"""Where the shortest look did not help, so many turns go without one."""
ANSWERED, FAILED = 1, 2

_NUMBERS = struct.Struct(f"<{NUMBERS}q")
_REPLY = struct.Struct("<3q")
"""The call's number, how it went, and the size of what is said if it went wrong."""
_BELL = struct.Struct("<q")
_PADDING = (0,) * NUMBERS
_TICK_SECONDS = 0.02
"""So often whoever waits in the kernel looks at its deadline: a wait is one system call, most of the time."""
_TICK = struct.pack("@ll", 0, int(_TICK_SECONDS * 1e6))
_FINITE_AT_ONCE_MAX = 8192
"""Numbers whose sum of squares is taken in one go: for more, a pool of threads may wake."""
_ANSWER_AT = 2 * KIB
"""Where the cell's half of the head begins: in a cache line of its own."""
_RANG_AT = KIB
"""Within each half: the number of the last call whose doorbell was rung."""
_BELLS_MAX = 64
"""A cell that rings more often than it is asked is at fault."""


class LaneLost(Exception):
    """The cell broke the rules, or ``late``: it did not answer in time, or ``gone``: it has hung up."""

    def __init__(self, why: str, *, late: bool = False, gone: bool = False) -> None:
        super().__init__(why)
        self.late = late
        self.gone = gone


def printable(text: str) -> str:
    """A stranger's words without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _is_finite(numbers: FloatRows) -> bool:
    """Of a vector. Sums first: they are twice as quick, and only numbers beyond all reason make them overflow."""
    step = _FINITE_AT_ONCE_MAX
    parts = [numbers] if numbers.size <= step else [numbers[n : n + step] for n in range(0, numbers.size, step)]
    return all(part.dot(part) < np.inf for part in parts) or bool(np.isfinite(numbers).all())


def lane_bytes(asked: int, answer: int) -> int:
    """What a lane takes of the shared memory."""
    return HEAD_BYTES + asked + answer


def sealed_memory(size: int, name: str) -> int:
    """A descriptor of zeroed memory that nobody can shrink or grow or seal differently. Raises OSError."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def sealed_copy(data: bytes, name: str) -> int:
    """A descriptor of memory that holds ``data`` and can never change. Raises OSError."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class _Spin:
    """Looking at a number in memory before sleeping: longer while that helps, shorter while it does not (long calls,
    long pauses, a core that others want), then not at all for a while."""

    __slots__ = ("_longest", "_place", "_seconds", "_shortest", "_turns_off")

    def __init__(self, place: memoryview, bounds: tuple[float, float]) -> None:
        self._place = place
        self._shortest, self._longest = bounds
        self._seconds = self._longest
        self._turns_off = 0

    def until(self, number: int) -> None:
        """Look until the number is there, or this has taken long enough."""
        if self._turns_off:
            self._turns_off -= 1
            return
        place, end = self._place, perf_counter() + self._seconds
        while place[0] != number:
            if perf_counter() >= end:
                break
        else:
            self._seconds = min(self._longest, 2 * self._seconds)
            return
        if self._seconds > self._shortest:
            self._seconds = max(self._shortest, self._seconds / 2)
        else:
            self._turns_off = NO_SPIN_TURNS


class _Side:
    """What both sides of a lane have."""

    def __init__(self, memory: mmap.mmap, start: int, asked: int, answer: int, bell: socket.socket) -> None:
        self._memory = memory
        self._start = start
        self.size_bytes = lane_bytes(asked, answer)
        whole = memoryview(memory)[start : start + lane_bytes(asked, answer)]
        self._asked_rang = whole[_RANG_AT : _RANG_AT + 8].cast("q")
        self._answer_rang = whole[_ANSWER_AT + _RANG_AT : _ANSWER_AT + _RANG_AT + 8].cast("q")
        self.asked = whole[HEAD_BYTES : HEAD_BYTES + asked]
        self.answer = whole[HEAD_BYTES + asked :]
        self._answer_rows = np.frombuffer(self.answer, np.float32)
        self._bell = bell


class ParentLane(_Side):
    """Asks. Used by one thread at a time."""

    def __init__(self, memory: mmap.mmap, start: int, asked: int, answer: int, bell: socket.socket) -> None:
        super().__init__(memory, start, asked, answer, bell)
        bell.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TICK)
        self._number = 0
        self._spin = _Spin(self._answer_rang, ASKER_SPIN_SECONDS)
        for place in (self.asked, self.answer):
            np.frombuffer(place, np.uint8)[: TOUCHED_BYTES : 4 * KIB] = 0

    def ask(self, numbers: Sequence[int], parts: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.generic]]]) -> None:
        """Begin a call: numbers for the head, contiguous arrays one behind the other. They must fit. Raises
        LaneLost."""
        self._number += 1
        end = 0
        for part in parts:
            begin, end = end, end + part.nbytes
            self.asked[begin:end] = part.data.cast("B")
        padding = _PADDING[len(numbers) + 1 :]
        _NUMBERS.pack_into(self._memory, self._start, self._number, *numbers, *padding)
        try:
            self._bell.send(_BELL.pack(self._number), socket.MSG_DONTWAIT)  # a cell need not listen
        except OSError as error:
            raise LaneLost(f"it takes no call: {error.strerror}", gone=True) from error
        self._asked_rang[0] = self._number

    def wait(self, seconds: float) -> None:
        """Until the answer is there. Raises LaneLost."""
        begun = perf_counter()
        number = self._number
        self._spin.until(number)
        rings = 0
        while (heard := self._heard()) != number:
            rings += heard is not None
            if rings > _BELLS_MAX:
                raise LaneLost("it rings without being asked")
            if perf_counter() - begun >= seconds:
                raise LaneLost(f"it did not answer within {seconds:.3f} s", late=True)

    def is_answered(self) -> bool:
        """Whether a call that was given up is answered by now. Raises LaneLost."""
        return self._heard(socket.MSG_DONTWAIT) == self._number

    def _heard(self, flags: int = 0) -> int | None:
        """The next bell; None if there is none, for a tick or now."""
        try:
            bell = self._bell.recv(2 * _BELL.size, flags)
        except BlockingIOError:
            return None
        except OSError as error:
            raise LaneLost(f"it ended: {error.strerror}", gone=True) from error
        if len(bell) != _BELL.size:
            raise LaneLost("it rings wrongly" if bell else "it ended", gone=not bell)
        return int(_BELL.unpack(bell)[0])

    def outcome(self) -> tuple[int, int]:
        """How the call went and the size of what is said of it, read once: to be checked."""
        _, status, size = _REPLY.unpack_from(self._memory, self._start + _ANSWER_AT)
        return status, size

    def rows(self, *shape: int) -> FloatRows:
        """The answer as ``f32[shape]``, copied out first. Raises RemoteError if a number in it is not finite."""
        rows: FloatRows = self._answer_rows[: math.prod(shape)].copy()
        if not _is_finite(rows):
            raise RemoteError("integrity", "a shard's answer is not finite", "ask another replica")
        return rows.reshape(shape)

    def error_text(self, size: int) -> str:
        """What a cell says of a failure, copied out, printable."""
        return printable(bytes(self.answer[: max(0, min(size, ERROR_BYTES_MAX))]).decode(errors="replace"))

    def close(self) -> None:
        """Hang up; the memory goes with the last who looks at it."""
        self._bell.close()


class CellLane(_Side):
    """Answers."""

    def __init__(self, memory: mmap.mmap, start: int, asked: int, answer: int, bell: socket.socket) -> None:
        super().__init__(memory, start, asked, answer, bell)
        self._number = 0
        self._spin = _Spin(self._asked_rang, ANSWERER_SPIN_SECONDS)
        for place in (self.asked, self.answer):  # map what the parent touched
            np.add.reduce(np.frombuffer(place, np.uint8)[: TOUCHED_BYTES : 4 * KIB])

    def wait(self) -> tuple[int, ...] | None:
        """The numbers of the next call; None: the parent is gone."""
        self._spin.until(self._number + 1)
        bell = self._bell.recv(_BELL.size)
        if len(bell) != _BELL.size:
            return None
        numbers = _NUMBERS.unpack_from(self._memory, self._start)
        self._number = numbers[0]
        return tuple(numbers[1:])

    def reply(self, status: int, size: int = 0) -> None:
        """What was asked is done, the answer in its place."""
        _REPLY.pack_into(self._memory, self._start + _ANSWER_AT, self._number, status, size)
        self._bell.send(_BELL.pack(self._number))
        self._answer_rang[0] = self._number

    def give(self, *parts: FloatRows) -> None:
        """Answer with rows, matrices one behind the other."""
        end = 0
        for rows in parts:
            begin, end = end, end + rows.nbytes
            np.frombuffer(self.answer, np.float32, rows.size, begin)[:] = rows.reshape(-1)
        self.reply(ANSWERED)

    def fail(self, text: str) -> None:
        """Say what went wrong."""
        said = text.encode()[:ERROR_BYTES_MAX]
        self.answer[: len(said)] = said
        self.reply(FAILED, len(said))
