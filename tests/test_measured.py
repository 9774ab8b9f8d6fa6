"""The road, measured: what is gathered from runs, and what is read from it."""
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from pgolf.scale import measured
from pgolf.scale.measured import (difference, down_the_road, gather, main, reads, road_steps)
from pgolf.scale.runs import read_plan
from pgolf.systems.effects import read_runs
from pgolf.systems.recipes import at_scale, get_recipe
from pgolf.systems.report import Report
from pgolf.systems.road import MILESTONES

KEPT = ROOT/"nbs"/"results"/"road"


def pretend(runs, name, seed, bpb, complete=True, tokens=409_600, **more):
    "A run of a milestone, without the run."
    r = at_scale(get_recipe(name), "mini").but(seed=seed)
    out = runs/f"{more.pop('called', name)}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    r.save(out/"recipe.json")
    row = dict(stage="sliding", what="", val_loss=bpb, val_bpb=bpb, targets=16_384,
        text_bytes=40_000, coverage=1., seconds=2., legal=True)
    report = Report(name, r.title, "mini", "austen_sp1024", seed, "cpu", 1, 592_144, rows=[row],
        training=dict(steps=200, tokens=tokens, elapsed=40.), bytes_artifact=5,
        environment=dict(pgolf="0", torch="2"), complete=complete, **more)
    report.save(out/"report.json")


def test_finished_runs_are_kept_and_others_are_not(tmp_path):
    pretend(tmp_path/"runs", "launch", 1, 2.2)
    pretend(tmp_path/"runs", "launch", 2, 2.3, complete=False)
    (tmp_path/"runs"/"empty").mkdir()
    found = gather(tmp_path/"runs", tmp_path/"kept")
    assert [p.name for p in found] == ["launch-mini-1.json"]
    kept = json.loads(found[0].read_text())
    assert (kept["stages"], kept["result"], kept["bytes"], kept["tokens"]) == ({"sliding": 2.2},
        "sliding", 5, 409_600)
    assert kept["seconds"] == 42. and kept["audit"] is False
    before = found[0].read_bytes()
    pretend(tmp_path/"runs", "launch", 2, 2.3)
    assert len(gather(tmp_path/"runs", tmp_path/"kept")) == 2 and found[0].read_bytes() == before


def test_another_number_under_the_same_name_is_an_error(tmp_path):
    pretend(tmp_path/"runs", "launch", 1, 2.2)
    [path] = gather(tmp_path/"runs", tmp_path/"kept")
    before = path.read_bytes()
    pretend(tmp_path/"runs", "launch", 1, 2.1)
    with pytest.raises(ValueError, match="another stages than .*launch-1.*remove the file"):
        gather(tmp_path/"runs", tmp_path/"kept")
    assert path.read_bytes() == before


def test_the_command_says_what_it_did_and_what_is_wrong(tmp_path, capsys):
    pretend(tmp_path/"runs", "pr50", 3, 2.2, called="pr50-own")
    main([str(tmp_path/"runs"), str(tmp_path/"kept")])
    assert capsys.readouterr().out.startswith("1 finished run(s) in ")
    assert set(read_runs(tmp_path/"kept")) == {"pr50-own"}
    (tmp_path/"runs"/"pr50-own-3"/"recipe.json").write_text("{}")
    for words in (["one"], ["a", "b", "c"]):
        with pytest.raises(SystemExit, match="usage"): main(words)
    pretend(tmp_path/"runs", "pr50", 3, 2.4, called="pr50-own")
    with pytest.raises(SystemExit, match="pgolf: error: .*another stages"):
        main([str(tmp_path/"runs"), str(tmp_path/"kept")])


def test_a_later_sitting_makes_what_is_not_kept(tmp_path, capsys):
    plan = tmp_path/"plan.yaml"
    plan.write_text("scale: mini\nseeds: [1, 2]\nruns:\n- launch\n"
        "- {recipe: pr50, name: pr50-own, overrides: {eval_stride: 16}}\n")
    pretend(tmp_path/"runs", "launch", 1, 2.2)
    gather(tmp_path/"runs", tmp_path/"kept")
    main([str(plan), str(tmp_path/"kept")])
    rest = tmp_path/"left.yaml"
    rest.write_text(capsys.readouterr().out)
    found, whole = read_plan(rest), read_plan(plan)
    assert [(r.label, r.seed) for r in found] == [("launch", 2), ("pr50-own", 1), ("pr50-own", 2)]
    assert [r.resolve() for r in found] == [r.resolve() for r in whole[1:]]
    rest.write_text("runs: 3")
    with pytest.raises(SystemExit, match="left.yaml"): main([str(rest), str(tmp_path)])


def test_seeds_are_paired_and_steps_follow_the_road(tmp_path):
    for seed, a, b in ((1, 2.2, 2.1), (2, 2.3, 2.21), (3, 2.25, 2.14)):
        pretend(tmp_path/"runs", "launch", seed, a)
        pretend(tmp_path/"runs", "pr50", seed, b)
    pretend(tmp_path/"runs", "launch", 9, 1.)  # has no partner
    gather(tmp_path/"runs", tmp_path/"kept")
    found = read_runs(tmp_path/"kept")
    assert difference(found, "launch", "pr50") == pytest.approx([-.1, -.09, -.11])
    steps = road_steps(found)
    assert [s.name for s in steps] == list(MILESTONES)
    assert steps[1].seeds == 3 and steps[1].here.mean == pytest.approx(-.1)
    assert [reads(s) for s in steps[:3]] == ["the start", "as published, by its sign",
        "not measured"]
    assert reads(replace(steps[2], level=2.)) == "no parent measured"
    name, there, here = down_the_road(found)[0]
    assert (name, here.mean) == ("pr50", pytest.approx(-.1)) and there == pytest.approx(-.0319)
    assert all(e is None for _, _, e in down_the_road(found)[1:])


def test_a_seed_alone_claims_nothing(tmp_path):
    pretend(tmp_path/"runs", "launch", 1, 2.2)
    pretend(tmp_path/"runs", "pr50", 1, 1.2)
    gather(tmp_path/"runs", tmp_path/"kept")
    step = road_steps(read_runs(tmp_path/"kept"))[1]
    assert not np.isfinite(step.here.half) and reads(step) == "one seed: no interval"


def test_repeats_cost_from_their_start_on():
    r = at_scale(get_recipe("pr1394"), "mini")
    whole, none = r.but(order_from=0.), r.but(layer_order=(), order_from=0.)
    cost = [measured.training_flops(x, 100) for x in (none, r, whole)]
    assert cost[0] < cost[1] < cost[2] and cost[1] == pytest.approx((cost[0]+cost[2])/2)


SIZES = dict(mini=(200, 16_384, 409_600), pocket=(250, 65_536, 1_024_000))


@pytest.mark.parametrize("scale", SIZES)
def test_what_is_committed_are_runs_of_the_road(scale):
    found, (steps, targets, whole) = read_runs(KEPT, scale), SIZES[scale]
    for name, seeds in found.items():
        recipe = get_recipe(re.sub("-(own|in-order)$", "", name))
        assert recipe.name in MILESTONES
        for seed, one in seeds.items():
            assert one["seed"] == seed and one["recipe"] == recipe.name and one["audit"]
            assert one["result"] == recipe.claims[-1].stage
            assert one["steps"] == steps and one["targets"] == targets
    tokens = {one["tokens"] for name, seeds in found.items() for one in seeds.values()
        if not name.endswith("-own")}
    assert tokens <= {whole}  # equal steps and equal tokens


def test_the_largest_rows_of_the_leaderboard_lie_on_the_road(shared):
    "By the sheet's order each row lies behind its milestone's parent and not behind itself."
    sheet = (shared/"spec"/"frontier.md").read_text()
    table = sheet.split("| PR | val_bpb | d prev |")[1].split("\n\n")[0]
    names = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    place = {n.split(",")[0]: i for i, n in enumerate(names)}
    page = (ROOT/"nbs"/"scale"/"73_measured.ipynb").read_text()
    said = dict(re.findall(r'\\"(#[^"\\]+)\\": \\"(pr\d+)\\"', page))
    assert len(said) == 10
    def at(name): return place.get(name.replace("pr", "#"), place.get(f"#{name[2:]} (b)", -1))
    later = {"#39", "#49", "#77", "#86"} # what they brought comes to the road only later
    for row, milestone in said.items():
        first = at(MILESTONES[milestone].parent)
        assert (first < place[row] <= at(milestone)) == (row not in later), row
        assert place[row] <= at(milestone), row


def test_the_pocket_plan_has_the_ends_the_great_and_the_ten_largest_steps():
    found = read_plan(ROOT/"nbs"/"scale"/"road-pocket.yaml")
    names = {r.label for r in found}
    steps = {n: measured.published_bpb(n)-measured.published_bpb(m.parent)
        for n, m in MILESTONES.items() if m.parent}
    largest = sorted(steps, key=steps.get)[:10]
    ends = {"launch", "pr1394", "pr1855", "pr2135"}
    assert names == ends | {*largest} | {MILESTONES[n].parent for n in largest}
    assert {r.scale for r in found} == {"pocket"} and len(found) == 3*len(names)
    assert all(r.resolve() for r in found)
