"""Activations survive the wire as their rounding says, whatever batch they travel in, and bad bytes are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from config.errors import IntegrityError
from dmoe.core import wire

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
batches = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=finite)


def bits(rows):
    return np.ascontiguousarray(rows).view(np.uint32).tolist()


@given(batches)
def test_decode_of_encode_is_the_rounding_bit_for_bit(rows):
    assert bits(wire.decode(*wire.encode(rows))) == bits(wire.rounded(rows))


@given(batches)
def test_rounding_again_changes_nothing(rows):
    once = wire.rounded(rows)
    assert bits(wire.rounded(once)) == bits(once)


@given(batches)
def test_a_row_is_rounded_the_same_alone_and_in_any_batch(rows):
    alone = np.concatenate([wire.rounded(rows[i : i + 1]) for i in range(len(rows))])
    assert bits(alone) == bits(wire.rounded(rows))


def test_rows_in_range_are_fp16_and_rows_out_of_range_bf16():
    rows = np.array([[1.0002, 65504.0], [1.0002, 65505.0]], np.float32)
    seen = wire.rounded(rows)
    assert seen[0].tolist() == [1.0, 65504.0]
    assert seen[1].tolist() == [1.0, 65536.0]
    assert wire.encode(rows)[0]["bf16"] == b"\x02"
    assert "bf16" not in wire.encode(rows[:1])[0]


def test_the_largest_float_stays_finite():
    rows = np.full((1, 3), np.finfo(np.float32).max, np.float32)
    assert np.isfinite(wire.rounded(rows)).all()
    assert np.isfinite(wire.rounded(-rows)).all()


def test_views_and_slices_are_encoded_by_value():
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert wire.decode(*wire.encode(rows[:, ::2])).tolist() == rows[:, ::2].tolist()
    assert wire.decode(*wire.encode(rows.T)).tolist() == rows.T.tolist()


def test_no_rows_are_fine():
    empty = np.zeros((0, 8), np.float32)
    assert wire.decode(*wire.encode(empty)).shape == (0, 8)
    assert wire.rounded(empty).shape == (0, 8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_and_its_row_named(bad):
    rows = np.zeros((3, 4), np.float32)
    rows[1, 2] = bad
    with pytest.raises(IntegrityError, match="row 1 of 3"):
        wire.encode(rows)
    with pytest.raises(IntegrityError, match="row 1 of 3"):
        wire.rounded(rows)
    with np.errstate(all="ignore"):
        buffer = rows.astype("<f2").tobytes()
    with pytest.raises(IntegrityError, match="row 1 of 3"):
        wire.decode({"shape": [3, 4]}, buffer)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({}, 8),
        ({"shape": [2]}, 8),
        ({"shape": ["2", 2]}, 8),
        ({"shape": [True, 4]}, 8),
        ({"shape": [-1, 4]}, 8),
        ({"shape": [2, 0]}, 0),
        ({"shape": [1 << 40, 1 << 40]}, 8),
        ({"shape": [2, 2]}, 7),
        ({"shape": [2, 2], "bf16": b""}, 8),
        ({"shape": [2, 2], "bf16": "x"}, 8),
        ({"shape": [2, 2], "bf16": b"\x01\x01"}, 8),
    ],
)
def test_malformed_input_is_refused(header, size):
    with pytest.raises(IntegrityError):
        wire.decode(header, bytes(size))


@given(st.dictionaries(st.sampled_from(["shape", "bf16", "x"]), st.binary() | st.lists(st.integers())), st.binary())
def test_garbage_gives_rows_or_an_integrity_error(header, buffer):
    try:
        rows = wire.decode(header, buffer)
    except IntegrityError:
        return
    assert np.isfinite(rows).all()


@given(batches)
def test_fp32_travels_as_it_is(rows):
    header, buffer = wire.encode(rows, "fp32")
    assert bits(wire.decode(header, buffer)) == bits(rows) == bits(wire.rounded(rows, "fp32"))
    assert len(buffer) == rows.nbytes
    before = rows.copy()
    rows[:] = 7
    assert bits(wire.decode(header, buffer)) == bits(before), "what was encoded does not change with its source"


def test_fp32_is_read_wherever_it_lies_in_a_frame():
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    header, buffer = wire.encode(rows, "fp32")
    for start in range(5):
        frame = memoryview(bytes(start) + bytes(buffer))[start:]
        read = wire.decode(header, frame)
        assert read.flags.aligned
        assert read.tolist() == rows.tolist()


def test_fp32_has_the_same_rules():
    with pytest.raises(IntegrityError, match="not finite"):
        wire.encode(np.array([[np.inf]], np.float32), "fp32")
    with pytest.raises(IntegrityError, match="not finite"):
        wire.decode({"shape": [1, 1], "dtype": "fp32"}, np.array([np.nan], "<f4").tobytes())
    with pytest.raises(IntegrityError, match="need 8 bytes"):
        wire.decode({"shape": [1, 2], "dtype": "fp32"}, bytes(4))
    with pytest.raises(IntegrityError, match="'int8'"):
        wire.decode({"shape": [1, 2], "dtype": "int8"}, bytes(4))
