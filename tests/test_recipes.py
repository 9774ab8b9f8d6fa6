"""Recipes against the sheets and the descriptions: each value is stated here, and read there where
they are at hand."""

import json
import re
from dataclasses import asdict

import pytest
import torch

from pgolf.systems.effects import PROBES, UNPROBED, changes, effect_table
from pgolf.systems.phrases import CHANGES, PHRASES, SECTIONS, say
from pgolf.systems.pipeline import check_recipe
from pgolf.systems.plan import settings_text
from pgolf.squeeze.quant import Grid, LateQAT, first_match, quantize
from pgolf.systems.recipe import claim_table, diff, diff_table, load_recipe
from pgolf.systems.recipes import RECIPES, SCALES, VARIANTS, at_scale, get_recipe, parent_of
from pgolf.score.ttt import Learner, ScoredChunk, adapt

SYSTEMS = ("pr610", "pr576", "pr598", "pr1123", "pr601")
CLIPS = (.999, .9995, .9999, .99999, 1.)


@pytest.fixture(scope="session")
def says(shared):
    "Look for a pattern in a sheet or a description; give its groups without commas."
    def look(name, pattern):
        text = " ".join((shared/"spec"/name).read_text().split())
        assert (found := re.search(pattern, text)), f"{name}: {pattern}"
        return [g.replace(",", "") for g in found.groups()]
    return look


def both(system): return get_recipe(system), get_recipe(f"{system}-as-run")


def grid(recipe, name, rules="rules"):
    r = at_scale(recipe, "full")
    return first_match(name, r.settings()[f"{'quant' if rules == 'rules' else 'stages'}.{rules}"])


class Counted(torch.nn.Module):
    "Stands for a model where only the number of steps matters."
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(()))
    def loss(self, x, y): return self.w*x.float().mean()


def steps_of(recipe):
    "Optimizer steps that `adapt` takes on one full chunk."
    learner, n = (Learner(Counted(), recipe.but(ttt_only="", ttt_freeze_blocks=0).ttt),
        recipe.ttt.ttt_chunk_tokens)
    chunk = ScoredChunk(0, 2, torch.zeros(n+1, dtype=torch.long), torch.ones(n), 0)
    learner._graded.append(chunk)
    adapt(learner, chunk, recipe.score.eval_seq_len)
    return learner.updates


@pytest.mark.parametrize("scale", ["full", *SCALES])
def test_576_takes_three_steps_a_chunk(scale):
    for r in both("pr576"):
        r = at_scale(r, scale)
        assert r.ttt.ttt_chunk_tokens == 64*r.score.eval_seq_len and r.ttt.ttt_batch_seqs == 64
        assert steps_of(r) == 3
        assert steps_of(r.but(ttt_batch_seqs=32)) == 6


def test_576_takes_the_steps_of_its_sheet(says):
    steps, rows = map(int,
        says("pr576.md", r"So (\d+) steps per chunk at a global batch of (\d+) sequences"))
    for r in both("pr576"):
        assert (steps_of(at_scale(r, "pocket")), r.ttt.ttt_batch_seqs) == (steps, rows)


def slow(W, lo, hi, clip_to, floor, quantiles, per_tensor, half):
    "The sheets' searches written plainly: codes, and the step as it is stored."
    best = None
    for p in quantiles:
        s = (torch.quantile(W.abs(), p, dim=1, keepdim=True)/clip_to).clamp(min=floor)
        if half: s = s.half().float()
        q = (W/s).round().clamp(lo, hi)
        err = (W - s*q).square()
        err = err.mean() if per_tensor else err.mean(1, keepdim=True)
        if best is None: best = err, q, s
        else:
            best = torch.minimum(err, best[0]), *(torch.where(err < best[0], x, y)
                for x, y in zip((q, s), best[1:]))
    return best[1].to(torch.int8), best[2].half()


# system, tensor, lo, hi, clip lands on, floor, quantiles, one for the tensor, float16 before the
# codes
RAN = [
    ("pr610", "blocks.3.mlp.fc.weight", -31, 31, 31, 1/31, CLIPS, True, True),
    ("pr576", "blocks.3.mlp.fc.weight", -15, 15, 15, 1/15, CLIPS, False, False),
    ("pr598", "blocks.3.mlp.fc.weight", -32, 31, 31, 1/31, CLIPS, True, False),
    ("pr1123", "blocks.3.attn.c_q.weight", -32, 31, 32, 1e-5/32, (1.,), False, False),
    ("pr1123", "blocks.3.attn.proj.weight", -16, 15, 16, 1e-5/16, (1.,), False, False),
    ("pr1123", "blocks.3.mlp.proj.weight", -8, 7, 8, 1e-5/8, (1.,), False, False),
    ("pr601", "blocks.3.attn.c_q.weight", -32, 31, 31, 2**-14, (1.,), False, True),
    ("pr601", "blocks.3.mlp.fc.weight", -16, 15, 15, 2**-14, (1.,), False, True),
]


@pytest.mark.parametrize("system,name,lo,hi,to,floor,quantiles,per_tensor,half", RAN)
def test_grids_as_run(system, name, lo, hi, to, floor, quantiles, per_tensor, half):
    g = grid(get_recipe(f"{system}-as-run"), name)
    assert (g.lo, g.hi, g.peak or g.hi, g.scale_floor, g.quantiles, g.half_first) == (lo, hi, to,
        floor, quantiles, half)
    W = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))*torch.logspace(-9,
        1, 200)[:, None]
    codes, step = slow(W, lo, hi, to, floor, quantiles, per_tensor, half)
    ours = quantize(W, g)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.scale, step)
    # the order of roundings shows
    assert not torch.equal(slow(W, lo, hi, to, floor, quantiles, per_tensor, not half)[0], codes)


def test_grids_as_run_are_those_of_the_sheets(says):
    says("pr610.md", r"s = max\(clip/31, \*\*1/31\*\*\) rounded to fp16, q = clamp")
    says("pr576.md", r"Scales are fixed before the loop, fp32 during it, stored fp16")
    says("pr576.md", r"Δ = \*\*max\(c/15, 1/15\)\*\*")
    says("pr598.md", r"Stored scale is fp16\(s_r\); q is not recomputed for the rounded scale")
    assert float(says("pr1123.md", r"M_r = max_j \|w_rj\|, at least (1e-5)")[0]) == 32*RAN[3][5]
    says("pr1123.md", r"stored scale = fp16\(M_r\)")
    assert float(says("pr601.md",
        r"max\(fp16\(rowmax abs\(W\)/clip\), ([\d.e-]+) = smallest normal fp16\)")[
        0]) == pytest.approx(2**-14, rel=1e-3)


def test_uniform_grids_of_1123_as_run_equal_the_golden_codes(golden):
    "Trained in: fake-quantized weights bit for bit, by the grid that the recipe holds."
    from pgolf.squeeze.quant import fake_quantize
    z, ran = golden("functions"), get_recipe("pr1123-as-run")
    for bits, name in ((6, "attn.c_q.weight"), (5, "attn.c_v.weight"), (4, "mlp.proj.weight")):
        for rules in ("rules", "qat_rules"):
            out = fake_quantize(torch.tensor(z["quant/W"]), grid(ran, f"blocks.0.{name}", rules))
            assert torch.equal(out, torch.tensor(z[f"intn/{bits}"]))


def test_tables_of_three_systems_have_a_floor_in_int8():
    floored = {s for s in SYSTEMS if (g := grid(get_recipe(f"{s}-as-run"), "bigram.embed.weight"))
        and g == Grid(-127, 127, quantiles=(.9999984,), scale_floor=1/127, half_first=False)}
    assert floored == {"pr610", "pr576", "pr601"}


def switches_at(recipe):
    "First step that late QAT is on."
    late, model = LateQAT(recipe.stages.late_qat_threshold, ((".*", Grid()),
        )), torch.nn.Linear(2, 2)
    model.fake_quant = None
    for step in range(recipe.schedule.iterations):
        late.before_step(type("Run", (),
            dict(model=model, lr_scale=recipe.schedule.lr_scale(step))))
        if late.switched: return step


def test_late_qat_of_598_keeps_cosine_and_threshold():
    "The description's step belongs to the linear decay that ran."
    described, ran = both("pr598")
    assert (described.schedule.decay, described.stages.late_qat_threshold) == ("cosine", .15)
    assert switches_at(described) == 6114
    assert switches_at(ran.but(late_qat_threshold=.15)) == 6476


def test_late_qat_of_598_in_its_description(says):
    step, threshold = says("descriptions/pr598.txt", r'"step_enabled":(\d+),.*"threshold":([\d.]+)')
    described, ran = both("pr598")
    assert float(threshold) == described.stages.late_qat_threshold
    assert switches_at(ran.but(late_qat_threshold=float(threshold))) == int(
        step) != switches_at(described)
    assert "cosine" in says("descriptions/pr598.txt", r'"type":"([^"]+)"')[0]


def test_coverage_of_610_is_no_difference_between_code_and_description():
    a, b = both("pr610")
    assert (a.ttt.ttt_coverage, b.ttt.ttt_coverage) == (1, 900/1893)
    table, _, ours = diff_table(a, b).partition("Set by us")
    assert "ttt_coverage" not in table and "codec" not in table and "rules" in table
    assert ("`ttt_coverage` 1 (described and run: 0.475436)" in ours
        and "`codec` best (described and run: zstd)" in ours)
    assert "Set by us" not in diff_table(a, get_recipe("pr576"))


def test_coverage_of_610_in_description_and_sheet(says):
    assert says("descriptions/pr610.txt", r'"max_chunks":(\d+)') == ["900"]
    total, = says("pr610.md", r"chunks of 32,768 positions: ([\d,]+) possible")
    assert get_recipe("pr610-as-run").ttt.ttt_coverage == 900/int(total)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_setting_of_ours_is_one_that_differs_as_run(system):
    a, b = both(system)
    ours = [k for k in a.settings() if k in a.ours and a.settings()[k] != b.settings()[k]]
    assert "stages.codec" in ours and ("ttt.ttt_coverage" in ours) == (system == "pr610")
    assert set(a.ours) <= set(a.settings())


SIZES = {"pr610": ("15,750,888 bytes", 16_387_453), "pr576": ("15.6MB", 15_576_393),
    "pr598": ("15.70 MB", 15_703_198),
    "pr1123": ("15,132,719 bytes", 15_132_719), "pr601": ("15.7 MB", 16_442_824)}


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_sizes_are_claims(system):
    for r in both(system):
        assert [(c.size, c.bytes_logged) for c in r.claims if c.size] == [SIZES[system]]
        table = claim_table(r, {}, 1_234_567, "no: other data and size")
        assert (SIZES[system][0] in table and f"{SIZES[system][1]:,}" in table
            and "1,234,567" in table)


@pytest.mark.parametrize("system,pattern",
    [("pr610", r"\*\*([\d,]+) bytes\*\* \(JSON\)"), ("pr576", r"\| 15,576,393 \| ([\d,]+) ✓"),
    ("pr598", r"\| Total counted \| ([\d,]+)"), ("pr1123", r"\*\*Total\*\* \| \*\*([\d,]+) B"),
    ("pr601", r"Artifact bytes \| ([\d,]+)")])
def test_published_sizes_in_descriptions_and_sheets(says, system, pattern):
    size, total = SIZES[system]
    assert says(f"descriptions/{system}.txt",
        "(" + re.escape(size) + ")") == [size.replace(",", "")]
    code = (int(says("pr610.md", r"Code bytes \(train script only\) \| ([\d,]+)")[0])
        if system == "pr610" else 0)
    assert int(says(f"{system}.md", pattern)[0])+code == total


def test_claims_and_our_choices_go_through_json(tmp_path):
    for r in RECIPES.values():
        r.save(tmp_path/"r.json")
        assert load_recipe(tmp_path/"r.json") == r
    old = json.loads(json.dumps(asdict(get_recipe("pr610"))))
    del old["ours"]
    for c in old["claims"]: del c["size"], c["bytes_logged"]
    (tmp_path/"old.json").write_text(json.dumps(old))
    # a recipe saved before there were these
    assert load_recipe(tmp_path/"old.json").sections() == get_recipe("pr610").sections()


def test_variants_of_601():
    base, v0, wide = (get_recipe(n) for n in ("pr601", "pr601-v0", "pr601-bh10240"))
    c_v, other = "blocks.0.attn.c_v.weight", "blocks.1.attn.c_v.weight"
    assert grid(base, c_v) == Grid(-32, 31) and grid(v0, c_v) is None and grid(v0,
        other) == grid(base, other)
    assert wide.model.bigram_vocab_size == 10_240 and max(r.model.bigram_vocab_size
        for r in RECIPES.values()) == 8192
    assert at_scale(wide, "pocket").model.bigram_vocab_size == 5120


def test_float16_of_values_already_rounded_is_a_void_test():
    "#601's VR_V0_FP16 stores the int6 values of block 0 once more, within half a float16 step."
    W = quantize(torch.randn(256, 512, generator=torch.Generator().manual_seed(0)),
        Grid(-32, 31)).dequantize()
    assert ((W.half().float()-W).abs() <= W.abs()*2**-11).all()


def test_variants_in_description_and_sheet(says):
    assert (int(says("descriptions/pr601.txt", r"BH10240 \(bigram hash (\d+) buckets\)")[0])
        == get_recipe("pr601-bh10240").model.bigram_vocab_size)
    says("pr601.md", r"also Wv of layer 0 if VR_V0_FP16=1 → fp16")


def test_lines_that_only_a_probe_can_answer(says):
    every = int(says("descriptions/pr610.txt", r'"frequency_steps":(\d+)')[0])
    assert PROBES["pr610"]["SWA"] == dict(average="swa", swa_every=every)
    assert float(says("pr610.md",
        r"LeakyReLU² \(the logged run\) \| 1.1243 \| −([\d.]+)")[0]) == .0026
    assert PROBES["pr610"]["relu2"] == dict(activation="relu2")
    lite = get_recipe("pr601").but(**PROBES["pr601"]["GPTQ-lite"])
    assert {g.quantiles for _, g in lite.quant.rules if g and g.hi < 127} == {CLIPS}


def test_every_change_measured_has_a_name_that_fits():
    "QAT of #1123 runs from step 0; nobody calls that late."
    assert {"QAT", "rules"} <= set(changes(*both("pr1123"))) and not any("late" in n
        for s in SYSTEMS for n in changes(*both(s)))


# ---- in words

ADD = "add one to nbs/systems/46_phrases.ipynb"


def test_every_setting_has_a_phrase():
    "All of them, so also those in which two recipes differ."
    known = {f"{section}.{name}" for section, (_, part) in SECTIONS.items() for name in part}
    settings = set(get_recipe("pr610").settings())
    assert not (bare := settings - known), f"no phrase for {bare}: {ADD}"
    assert not (gone := known - settings), f"a phrase for what is no setting: {gone}"
    differ = {k for r in (RECIPES | VARIANTS).values() for k, *_ in diff(get_recipe("pr610"), r)}
    assert len(differ) > 50 and differ <= known


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_change_of_a_system_has_a_phrase_of_its_own(system):
    names = set(changes(*both(system)))
    assert names == set(CHANGES[system]), ADD
    for name in names: assert say(name, system) != PHRASES.get(name)


def test_every_probe_is_in_words():
    names = {(s, n) for s, probes in PROBES.items() for n in probes}
    short = {n for s, n in names if " " not in say(n, s)}
    assert not short, ADD


@pytest.mark.parametrize("system", PROBES)
def test_every_probe_is_a_run_of_its_own(system):
    "It can be run, and differs from the description and from every other probe."
    base = get_recipe(system).but(**UNPROBED.get(system, {}))
    runs = {"as described": base, **{n: base.but(**s) for n, s in PROBES[system].items()}}
    for r in runs.values(): check_recipe(at_scale(r, "mini"))
    assert len({str(r.settings()) for r in runs.values()}) == len(runs)


def test_tables_show_no_bare_name():
    "A control with a setting that nobody knows, too: it stays as it was given."
    def row(change):
        return dict(system="pr610", change=change, stages={"sliding": [2.], "adapted": [2.]},
                    bytes=[1], coverage=[1])
    table = effect_table([row(n) for n in ("as described", "rules", "ttt_coverage", "tail")])
    first = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert first == ["as described", "a floor under the steps and one clip for all rows",
                     "47.55 % of the text adapted to and scored", "tail"]
    for line in diff_table(*both("pr598")).split("\n\n")[0].splitlines()[2:]:
        assert re.search(r"^\| [^`]+ [^`]+, `\w+` +\|", line), line


def starred(text): return {l.split()[1] for l in text.splitlines()[2:] if l.startswith("* ")}


@pytest.mark.parametrize("name", [*RECIPES, *VARIANTS])
def test_a_resolved_recipe_is_read_beside_its_parent(name):
    r = at_scale(get_recipe(name), "full")
    text, parent = settings_text(r), parent_of(r)
    assert starred(text) == {k.split(".")[1] for k, *_ in diff(parent, r)}
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"\n{title}\n" in text for title, _ in SECTIONS.values())
    for line in text.splitlines():
        if line.startswith("* ") and not line.startswith("* differs from"):
            assert PHRASES[line.split()[1]] in line


def test_an_override_is_marked():
    r = at_scale(get_recipe("pr576"), "tiny")
    assert "ttt_epochs" not in starred(settings_text(r))
    assert "ttt_epochs" in starred(settings_text(r.but(ttt_epochs=1)))
    assert "(pr610: 3)" in settings_text(r.but(ttt_epochs=1))
