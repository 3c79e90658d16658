"""`ColumnDigest`: blind to how a column lies in memory, and to nothing else."""

import random

import numpy as np
import pyarrow as pa
import pytest

from lidit.store.checksum import ColumnDigest

pytestmark = pytest.mark.unit

COLUMNS = {
    "large_binary": pa.array([b"one", None, b"", b"three", b"\0\xff" * 50, None], pa.large_binary()),
    "binary": pa.array([b"one", None, b"", b"three"], pa.binary()),
    "string": pa.array(["eins", None, "", "drei", "\u732b \U0001f415"], pa.string()),
    "large_string": pa.array(["eins", None, "", "drei"], pa.large_string()),
    "int32": pa.array([1, None, -3, 2**31 - 1], pa.int32()),
    "float64": pa.array([0.0, -0.0, None, float("inf"), 1e-300], pa.float64()),
    "bool": pa.array([True, None, False, True], pa.bool_()),
    "fixed_size_binary": pa.array([b"abcd", None, b"efgh", b"\0\0\0\0"], pa.binary(4)),
    "no nulls": pa.array([b"a", b"bc"], pa.large_binary()),
    "all null": pa.array([None, None, None], pa.large_binary()),
    "all empty": pa.array([b"", b""], pa.large_binary()),
}


def digest(*arrays):
    made = ColumnDigest()
    for array in arrays:
        made.update(array)
    return made.hexdigest()


def copy(array):
    """The same values in buffers of their own."""
    return pa.array(array.to_pylist(), array.type)


@pytest.mark.parametrize("name", COLUMNS)
def test_the_same_values_have_the_same_digest(name):
    assert digest(COLUMNS[name]) == digest(copy(COLUMNS[name]))


@pytest.mark.parametrize("name", COLUMNS)
def test_independent_of_cuts_and_offsets(name):
    column = COLUMNS[name]
    whole = digest(copy(column))
    draw = random.Random(0)
    for _ in range(20):
        cuts = sorted(draw.choices(range(len(column) + 1), k=3))
        parts = [column[a:b] for a, b in zip([0, *cuts], [*cuts, len(column)])]
        assert digest(*parts) == whole
    padded = pa.concat_arrays([column, column, column])
    assert digest(padded.slice(len(column), len(column))) == whole


@pytest.mark.parametrize("name", COLUMNS)
def test_sensitive_to_order_count_and_nulls(name):
    column = COLUMNS[name]
    values = column.to_pylist()
    changed = {
        "one less": values[:-1],
        "one null more": [*values, None],
        "other null": [None if value is not None else values[0] for value in values],
    }
    if len(set(values)) > 1:
        changed["reversed"] = values[::-1]
    made = {key: digest(pa.array(other, column.type)) for key, other in changed.items() if other != values}
    assert made and digest(column) not in made.values()


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
def test_every_byte_counts(binary):
    data = bytes(range(40))
    rows = [data[:10], None, b"", data[10:]]
    whole = digest(pa.array(rows, binary))
    for position in range(40):
        changed = bytearray(data)
        changed[position] ^= 1
        assert digest(pa.array([bytes(changed[:10]), None, b"", bytes(changed[10:])], binary)) != whole


def test_every_bit_of_a_number_counts():
    values = np.array([1, 2, 3], np.int32)
    whole = digest(pa.array(values))
    for bit in range(32):
        changed = values.copy()
        changed[1] ^= np.int32(1 << bit) if bit < 31 else np.int32(-(2**31))
        assert digest(pa.array(changed)) != whole
    assert digest(pa.array([0.0])) != digest(pa.array([-0.0]))


def test_null_is_not_empty_and_boundaries_count():
    made = [
        digest(pa.array(rows, pa.large_binary()))
        for rows in (
            [b"ab", b"c"],
            [b"a", b"bc"],
            [b"", b"abc"],
            [b"abc", b""],
            [b"abc", None],
            [None, b"abc"],
            [b"abc"],
        )
    ]
    assert len(set(made)) == len(made)


def test_bytes_under_nulls_do_not_count():
    validity = pa.py_buffer(bytes([0b101]))
    one, other = (
        pa.Array.from_buffers(pa.int32(), 3, [validity, pa.py_buffer(np.array(v, np.int32))])
        for v in ([1, 77, 3], [1, -5, 3])
    )
    assert one.to_pylist() == other.to_pylist() == [1, None, 3]
    assert digest(one) == digest(other) == digest(pa.array([1, None, 3], pa.int32()))
    offsets = pa.py_buffer(np.array([0, 1, 4, 5], np.int64))
    one, other = (
        pa.Array.from_buffers(pa.large_binary(), 3, [validity, offsets, pa.py_buffer(data)])
        for data in (b"aXYZb", b"aQQQb")
    )
    assert one.to_pylist() == [b"a", None, b"b"]
    assert digest(one) == digest(other) == digest(pa.array([b"a", None, b"b"], pa.large_binary()))


def test_width_of_offsets_does_not_count():
    rows = [b"one", None, b""]
    assert digest(pa.array(rows, pa.binary())) == digest(pa.array(rows, pa.large_binary()))


def test_nothing():
    assert digest() == digest(pa.array([], pa.large_binary())) == digest(pa.array([], pa.int32()))
