"Races: whose weights may be shared, what is compared, and what a page may say of it."
import json

import pytest
from conftest import ROOT

from pgolf.files import read_json, write_json
from pgolf.scale.race import borrow, main, race_of, read_entries, trains_alike
from pgolf.systems.recipes import at_scale, get_recipe

PLAN = ROOT/"nbs"/"scale"/"race.yaml"
RESULTS = ROOT/"nbs"/"results"/"ours.json"


def made(bpb, seed, **more):
    return dict(stages={"adapted": bpb}, result="adapted", audit=True, total=10, tokens=5, flops=7.,
        seconds=1., seed=seed) | more


def test_the_plan_names_what_there_is():
    entries, races = read_entries(PLAN)
    for e in entries.values():
        r = at_scale(get_recipe(e.recipe), "pocket").but(**dict(e.overrides))
        if e.lender: assert trains_alike(at_scale(get_recipe(e.lender), "pocket"), r) == []
    forms = {(r["form"], r["rival"].split("-")[0]) for r in races}
    assert {("as published", "pr1855"), ("as published", "pr2135")} <= forms


def test_other_training_is_not_borrowed(tmp_path):
    a, b = (at_scale(get_recipe(n), "tiny") for n in ("pr1855", "pr2135"))
    assert {"optim.matrix_lr", "model.asymmetric_cap"} <= set(trains_alike(a, b))
    a.save(tmp_path/"recipe.json")
    write_json(tmp_path/"report.json", {})
    with pytest.raises(ValueError, match=r"another .*asymmetric_cap.* train it by itself"):
        borrow(tmp_path, b, tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_a_race_needs_the_same_seeds_and_says_when_it_is_illegal():
    old, new = ({s: made(b + s/100, s) for s in (1, 2, 3)} for b in (1.8, 1.7))
    r = race_of(new | {9: made(0., 9)}, old)
    assert r["seeds"] == [1, 2, 3] and r["audited"] and r["p"] < .01
    assert not race_of(new | {2: made(1.7, 2, audit=False)}, old)["audited"]
    assert race_of(new, {1: old[1]})["p"] is None
    assert race_of(new | {3: made(1.7, 3, total=99)}, old)["bytes"] == dict(ours=99, theirs=10)


def test_what_is_committed_is_what_a_page_can_read():
    races = read_json(RESULTS)["races"]
    for r in races:
        assert len(r["ours"]) == len(r["theirs"]) == len(r["seeds"]) and r["text"] and r["form"]
        assert (r["p"] is None) == (len(r["seeds"]) < 2)
        assert r["bytes"]["ours"] <= r["bytes"]["theirs"]
        assert r["tokens"]["ours"] <= r["tokens"]["theirs"]
        assert r["flops"]["ours"] <= 1.05*r["flops"]["theirs"]


def test_wrong_words(tmp_path, capsys):
    with pytest.raises(SystemExit, match="usage"): main(["one"])
    with pytest.raises(SystemExit, match="pgolf: error"):
        main([str(tmp_path/"none.yaml"), str(tmp_path), str(tmp_path/"out.json")])
    (tmp_path/"plan.yaml").write_text(json.dumps(dict(entries={}, races=[dict(form="f", ours="a",
        rival="b")])))
    with pytest.raises(SystemExit, match="a, b: no such entry"):
        main([str(tmp_path/"plan.yaml"), str(tmp_path), str(tmp_path/"out.json")])
