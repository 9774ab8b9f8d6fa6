"The queue of documents, their windows and phases against the published evaluation."
import json

import numpy as np
import pytest

from pgolf.score.queue import (chunk_rates, chunk_window, length_queue, phase_boundaries,
                               phase_documents)


def test_windows_are_the_published_ones(golden):
    rows = golden("frontier_functions")["ttt_windows"]
    assert len(rows) > 50
    for chunk, window, targets, c, *want in rows.tolist():
        assert list(chunk_window(targets, c, chunk, window)) == want


@pytest.fixture(scope="module", params=["ttt_lora_only", "ttt_phased"])
def published(golden, request):
    "Tokens, settings and order of a published evaluation of seven documents."
    z = golden("frontier_functions")
    tokens = z[f"{request.param}/tokens"].astype(int)
    starts = np.flatnonzero(tokens == 1).tolist()
    ends = [*(b+1 for b in starts[1:]), len(tokens)]  # the next BOS is the last target
    hyper = json.loads(str(z[f"{request.param}/hyper"]))
    order = json.loads(str(z[f"{request.param}/order"]))
    return z, request.param, starts, [b-a for a, b in zip(starts, ends)], hyper, order


def test_order_of_work_is_the_published_one(published):
    _, _, starts, lengths, hyper, order = published
    queue = length_queue(lengths, hyper["ttt_batch_size"])
    assert len(queue) == len(order) > 3
    for batch, (_, at, sizes) in zip(queue, order):
        assert [starts[i] for i in batch] == at and [lengths[i] for i in batch] == sizes


def test_phases_learn_from_the_published_tokens_at_the_published_rates(published):
    z, run, _, lengths, hyper, _ = published
    queue, found, rates = length_queue(lengths, hyper["ttt_batch_size"]), [], []
    if hyper["phased_ttt_prefix_docs"]:
        for b in phase_boundaries(hyper["phased_ttt_prefix_docs"], hyper["phased_ttt_num_phases"]):
            found.append(sum(lengths[i] for i in phase_documents(queue, b)[1]))
            rates += chunk_rates(found[-1], hyper["global_ttt_chunk_tokens"],
                hyper["global_ttt_lr"])
    assert found == z[f"{run}/global_tokens"].tolist()
    assert [f"{r:.6f}" for r in rates] == json.loads(str(z[f"{run}/lrs"]))
