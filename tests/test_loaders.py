"Loaders against the batches of the published ones."
import json

import numpy as np
import pytest
import torch

from pgolf.game.shards import write_shard
from pgolf.game.loaders import PackedLoader, ShuffledLoader, next_packed


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    "The golden numbers, and the published shards as files."
    z, folder = golden("frontier_functions"), tmp_path_factory.mktemp("shards")
    for i in range(5): write_shard(folder/f"shard_{i:06d}.bin", z[f"loader/shard{i}"])
    return z, sorted(folder.glob("*.bin"))


RANKS = [(1, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize("world,rank", RANKS)
def test_shuffled_rows_are_the_published_ones(published, world, rank):
    z, shards = published
    hyper = json.loads(str(z["loader/shuffled/hyper"]))
    loader = ShuffledLoader(shards, hyper["global_tokens"], hyper["seq_len"], rank, world)
    for x, last in zip(z[f"loader/shuffled/w{world}r{rank}/x"],
                       z[f"loader/shuffled/w{world}r{rank}/y_last"], strict=True):
        got, y = loader.next_batch()
        np.testing.assert_array_equal(got, x)
        np.testing.assert_array_equal(y[:, -1], last)
        assert torch.equal(got[:, 1:], y[:, :-1])


@pytest.mark.parametrize("world,rank", RANKS)
def test_packed_rows_and_their_borders_are_the_published_ones(published, world, rank):
    z, shards = published
    h = json.loads(str(z["loader/packed/hyper"]))
    key = f"loader/packed/w{world}r{rank}"
    loader = PackedLoader(shards, h["tokens_per_rank"], h["max_segment"], h["bos"], h["bucket"],
        rank, world)
    borders = json.loads(str(z[f"{key}/cu_seqlens"]))
    for x, last, cu, longest in zip(z[f"{key}/x"], z[f"{key}/y_last"], borders,
                                    z[f"{key}/max_seqlen"], strict=True):
        row = next_packed(loader)
        np.testing.assert_array_equal(row.x[0], x)
        assert row.y[0, -1] == last and row.cu.tolist() == cu and row.longest == longest


def test_published_model_rows_have_the_published_borders(golden):
    from pgolf.game.loaders import cumulative_lengths, segment_starts
    z = golden("pr1855")
    ids = z["packed/ids"][0, :-1]
    starts = segment_starts(ids, 1, int(z["packed/max_segment"]))
    assert cumulative_lengths(starts, len(ids)).tolist() == z["packed/cu_seqlens"].tolist()


def test_loaders_name_the_shard_with_a_wrong_id(tmp_path):
    write_shard(tmp_path/"a.bin", np.array([1, 2, 99, 3]*50))
    for loader in (lambda: ShuffledLoader([tmp_path/"a.bin"], 16, 16, vocab_size=50),
                   lambda: PackedLoader([tmp_path/"a.bin"], 16, vocab_size=50)):
        with pytest.raises(ValueError, match="a.bin: token id 99 at position 2"): loader()
