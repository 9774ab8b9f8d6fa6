"The n-gram tilt against an independent implementation of the same description."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.score.tilt import next_hints, tilted


@pytest.mark.parametrize("order", [3, 4])
def test_hints_and_confidences(golden, order):
    z = golden("frontier_functions")
    h = next_hints(torch.from_numpy(z["ngram/tokens"].astype(np.int64)), order)
    hint, prob = z[f"ngram/{order}/hint"][1:], z[f"ngram/{order}/prob"][1:]
    assert (prob > 0).sum() > 300
    np.testing.assert_array_equal(h.token >= 0, prob > 0)
    np.testing.assert_array_equal(h.token[prob > 0], hint[prob > 0])
    np.testing.assert_allclose(h.confidence, prob, rtol=1e-6)


def test_tilted_scores(golden):
    z = {k: golden("frontier_functions")[f"ngram/tilt/{k}"] for k in
        ("nll", "q_hint", "hit", "out", "boost")}
    got = tilted(*(torch.from_numpy(z[k]) for k in ("nll", "q_hint", "hit")),
        torch.ones(20, dtype=torch.bool), float(z["boost"]))
    np.testing.assert_allclose(got, z["out"], rtol=1e-9)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(2, 5), st.data())
@settings(deadline=None)
def test_no_hint_knows_its_target_or_what_follows(tokens, order, data):
    t = data.draw(st.integers(1, len(tokens)-1))
    changed = tokens[:t] + data.draw(st.lists(st.integers(0, 3), min_size=len(tokens)-t,
        max_size=len(tokens)-t))
    a, b = (next_hints(torch.tensor(x), order) for x in (tokens, changed))
    assert torch.equal(a.token[:t], b.token[:t])
    assert torch.equal(a.confidence[:t], b.confidence[:t])
