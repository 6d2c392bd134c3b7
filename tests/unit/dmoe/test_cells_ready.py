"""What a cell keeps ready for calls that come again; its lane in this process, without walls."""

import mmap
import os
import socket
from contextlib import contextmanager
from threading import Thread

import numpy as np
import pytest

from dmoe.cells import lanes, program
from dmoe.cells.lanes import CellLane, ParentLane, lane_bytes, sealed_memory
from dmoe.cells.program import Program
from dmoe.pages import Ahead
from dmoe.runtime import RuntimeOptions

NUMBER, LAYER, WIDTH = 1, 0, 4


class Counting:
    """A fake shard: answers with twice the rows and counts how often it was bound."""

    def __init__(self):
        self.bound = []

    def ready(self, lane, numbers, shards):
        rows = numbers[1]
        self.bound.append(rows)
        asked = np.frombuffer(lane.asked, np.float32, rows * WIDTH)
        answer = np.frombuffer(lane.answer, np.float32, rows * WIDTH)
        return lambda: np.multiply(asked, 2, out=answer)

    def answer(self, lane, numbers, shards):
        raise AssertionError("it is bound")

    def close(self):
        pass


@contextmanager
def served():
    """The parent's call on a shard, and the shard."""
    shard, size = Counting(), lane_bytes(lanes.ASKED_BYTES, lanes.ANSWER_BYTES)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = sealed_memory(size, "lane")
    memory = mmap.mmap(descriptor, size)
    os.close(descriptor)
    place = (memory, 0, lanes.ASKED_BYTES, lanes.ANSWER_BYTES)
    parent, inside = ParentLane(*place, near), CellLane(*place, far)
    with far:
        cell = Program(far, {}, RuntimeOptions(device="cpu", threads=1), Ahead())
        cell._shards[NUMBER] = shard
        thread = Thread(target=cell.serve, args=[inside], daemon=True)
        thread.start()

        def call(rows, seed=0):
            h = np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)
            parent.ask((NUMBER, LAYER, rows, WIDTH, 0, 0), [h])
            parent.wait(10)
            assert (parent.rows(rows, WIDTH) == 2 * h).all()

        yield call, shard, cell
        parent.close()
        thread.join(10)
        assert not thread.is_alive()


def test_a_call_that_comes_again_is_bound_once_however_many_rows_it_has():
    with served() as (call, shard, _):
        for seed in range(3):
            for rows in (1, 128, 1024):
                call(rows, seed)
        assert shard.bound == [1, 128, 1024]


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(program, "READY_MAX", 2)
    with served() as (call, shard, cell):
        for rows in range(1, 8):
            call(rows)
            assert all(len(ready) <= 2 for ready in cell._ready)
        call(7)
        assert shard.bound == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("rows", [1, 128])
def test_shards_that_come_or_go_make_what_was_kept_void(rows):
    with served() as (call, shard, cell):
        call(rows)
        cell._forget_ready()
        call(rows)
        assert shard.bound == [rows, rows]
