"Byte shuffle, order of rows and packed streams against the published bytes."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.squeeze.streams import (byte_shuffle, byte_unshuffle, group_blob, pack_streams,
                                   similarity_order, ungroup_blob, unpack_streams)


@pytest.mark.parametrize("i", range(8))
def test_shuffled_bytes_are_the_published_ones(golden, i):
    z = golden("frontier_functions")
    data, want = (z[f"byteshuffle/{i}/{k}"].tobytes() for k in ("in", "out"))
    assert byte_shuffle(data) == want and byte_unshuffle(want) == data


def test_order_of_rows_is_the_published_one(golden):
    z = golden("frontier_functions")
    np.testing.assert_array_equal(similarity_order(z["simsort/in"]), z["simsort/order"])


def test_packed_streams_are_the_published_ones(golden):
    z = golden("frontier_functions")
    data = z["packstreams/out"].tobytes()
    streams = unpack_streams(data)
    assert [len(s) for s in streams] == z["packstreams/lengths"].tolist()
    assert pack_streams(streams) == data


@given(st.binary(max_size=60), st.integers(1, 255))
@settings(deadline=None)
def test_any_bytes_come_back(data, stride):
    assert byte_unshuffle(byte_shuffle(data, stride)) == data


@given(st.lists(st.binary(max_size=9), max_size=5), st.binary(max_size=40))
@settings(deadline=None)
def test_streams_come_back_and_what_is_none_is_an_error_of_ours(streams, junk):
    assert unpack_streams(pack_streams(streams)) == streams
    for damaged in (junk, b"PGRP"+junk, pack_streams(streams)+b"x"):
        try: unpack_streams(damaged)
        except ValueError: pass
        else: assert damaged[:4] == b"PGRP" and pack_streams(unpack_streams(damaged)) == damaged


@given(st.integers(1, 12), st.integers(1, 9), st.booleans(), st.integers(0, 9))
@settings(deadline=None)
def test_matrices_come_back(rows, columns, reorder, seed):
    m = np.random.default_rng(seed).integers(-128, 128, (2, rows, columns)).astype(np.int8)
    blob, lists = group_blob(list(m), reorder)
    np.testing.assert_array_equal(ungroup_blob(blob, [(rows, columns)]*2, lists), m)
