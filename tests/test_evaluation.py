"Slices of an evaluation on two processes, timed for the table of what all of the text costs."

import pytest

from pgolf.speed.bench import make_case
from pgolf.speed.evaluation import Slice, cost_of, evaluation_table, measure_slices


@pytest.mark.slow
def test_slices_are_shared_by_processes_and_counted():
    found = measure_slices(make_case("pr610", "tiny", quick=True), (2, 4), (1, 2))
    slices = [Slice(**s) for s in found["slices"]]
    told = {(s.stage, s.cards): s.targets for s in slices}
    assert set(told) == {(stage, n) for stage in ("blocks", "sliding", "adapted") for n in (1, 2)}
    for stage in ("blocks", "sliding", "adapted"):
        assert told[stage, 1] == told[stage, 2], "the longest slice is what two of them share"
        cost = cost_of([s for s in slices if s.stage == stage])
        assert 0 <= cost.shared <= 1
    assert "not measured" not in evaluation_table({"here": found})
