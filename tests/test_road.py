"""The milestones of the road against their rows of the sheet: what is typed here stands there, and
the recipes have it."""

import pytest
import torch
from conftest import ROOT
from pgolf.model.gpt import GPT
from pgolf.squeeze.quant import Grid
from pgolf.systems import pipeline
from pgolf.systems.effects import training_key
from pgolf.systems.plan import plan_run, settings_text
from pgolf.systems.recipe import diff, load_recipe
from pgolf.systems.recipes import at_scale, get_recipe, parent_of
from pgolf.systems.road import MILESTONES, ROAD
from pgolf.systems.verdict import audit_run

FLOOR8 = Grid(-127, 127, quantiles=(.9999984,), scale_floor=1/127, half_first=False)
INT6 = Grid(-31, 31)
CLIPS = (.999, .9995, .9999, .99999, 1.)

# name: row, score, words of the row, parameters, steps, bytes, settings that the words stand for
ROWS = {
    "launch": ("launch", "1.2244", ("9 layers, MLP 2x, sp1024, int8 + zlib",), "17.06 M", "13,780",
        "15,863,489", dict(num_layers=9, mlp_mult=2., vocab_size=1024, rules=((".*", FLOOR8),))),
    "pr50": ("#50", "1.1925", ("baseline + sliding-window evaluation, stride 64",), "17.06 M",
        "13,450", "15,874,829", dict(eval_stride=64, num_layers=9)),
    "pr65": ("#65 (b)", "1.1556", ("SmearGate (per-dimension)", "BigramHash 4096x128",
        "orthogonal init", "Muon decay 0.01"), "22.37 M", "12,047", "15,878,809",
        dict(smear=True, bigram_vocab_size=4096, bigram_dim=128, uniform_init=False,
            muon_weight_decay=.01)),
    "pr162": ("#162", "1.1458", ("SmearGate + BigramHash(4096) + orthogonal init",
        "SWA every 50 over last half", "length 2,048", "batch 786,432"), "22.37 M", "7,379",
        "15,944,907", dict(smear=True, bigram_vocab_size=4096, uniform_init=False, average="swa",
            swa_every=50, swa_start_scale=.5, train_seq_len=2048, eval_seq_len=2048,
            train_batch_tokens=786_432)),
    "pr287": ("#287", "1.1271", ("XSA on the last 4", "EMA 0.997 instead of SWA"), "26.83 M",
        "7,103", "15,745,973", dict(xsa_last_n=4, average="ema", ema_decay=.997, swa_every=0)),
    "pr315": ("#315", "1.1248", ("partial RoPE 16/64", "LN scale 1/sqrt(l+1)"), "26.83 M",
        "7,051", "15,639,340", dict(rope_dims=16, ln_scale=True, late_qat_threshold=0.)),
    "pr414": ("#414", "1.1228", ("GPTQ-lite", "value embeddings (from #374)", "warmdown 3,500"),
        "26.99 M", "7,096", "15,586,805", dict(ve_dim=128, ve_layers=(9, 10), warmdown_iters=3500,
            use_gptq=False, late_qat_threshold=0.)),
    "pr549": ("#549", "1.1194", ("LeakyReLU(0.5)^2", "score-first SGD TTT"), "26.93 M", "7,185",
        "15,990,006", dict(activation="leaky_relu2", use_ttt=True, adaptation="chunks",
            ttt_optimizer="sgd", ttt_chunk_tokens=32_768, ttt_epochs=3, ttt_lr=.002,
            ttt_momentum=.9, ttt_grad_clip=1.)),
    "pr1019": ("#1019", "1.1147", ("full-Hessian GPTQ with self-generated calibration",
        "XSA on all 11", "BigramHash 3072x112", "warmdown 4,000", "no TTT"), "27.07 M", "6,922",
        "15,984,850", dict(use_gptq=True, windows="self", xsa_last_n=11, bigram_vocab_size=3072,
            bigram_dim=112, warmdown_iters=4000, use_ttt=False, samples=64)),
    "pr1218": ("#1218", "1.0979", ("sp4096", "MLP 4x", "decay 0.085 on matrices and embedding",
        "q gain 4", "gated skips", "byte-shuffle + brotli",
        "hash embeddings, SmearGate, TTT, QAT removed"), "34.40 M", "5,963", "15,927,782",
        dict(vocab_size=4096, mlp_mult=4., muon_weight_decay=.085, table_weight_decay=.085,
            qk_gain_init=4., skip_gate=True, codec="brotli", bigram_vocab_size=0, smear=False,
            loader="strides", use_ttt=False, late_qat_threshold=0.)),
    "pr1394": ("#1394", "1.0856", ("sp8192", "GPTQ on the embedding", "SDClip",
        "loop 4-5 three passes from 50 %", "value embeddings removed", "shuffled-sequence loader"),
        "35.94 M", "4,989", "15,988,983", dict(vocab_size=8192, tables=True, order_from=.5,
            layer_order=(*range(6), 4, 5, *range(4, 11)), ve_dim=0, loader="shuffled")),
    "pr1493": ("#1493", "1.0810", ("loop 3-5 from 35 %", "GPT-J parallel 7+", "q gain 5.25",
        "decay 0.095", "lr 0.022", "EMA 0.9965", "warmdown 0.72"), "35.94 M", "4,554",
        "15,993,232", dict(layer_order=(*range(6), *range(3, 6), *range(3, 11)), order_from=.35,
            parallel="joint", parallel_start=7, qk_gain_init=5.25, muon_weight_decay=.095,
            matrix_lr=.022, ema_decay=.9965, warmdown_ratio=.72, use_ttt=True)),
    "pr1530": ("#1530", "1.0734", ("varlen attention with document masks",
        "document-wise LoRA TTT"), "35.94 M", "4,853", "15,996,664", dict(loader="packed",
            adaptation="queue", ttt_phases=0, ttt_lora_rank=96, ttt_lora_scale=1., ttt_warm=False,
            ttt_lora_chunk_tokens=32, parallel="lanes", parallel_start=8, muon_momentum=.97)),
    "pr1729": ("#1729", "1.0678", ("CaseOps tokenizer", "Muon decay taper (on #1626)"), "35.94 M",
        "4,886", "15,943,106", dict(taper_from=.7, matrix_lr=.026, warmdown_ratio=.75,
            max_wallclock_seconds=600.-4, samples=16*48, ttt_lora_chunk_tokens=48, ttt_phases=3,
            ttt_phase_docs=2000)),
    "pr1855": ("#1855", "1.0611", ("nine hyperparameters",), "35.95 M", "4,931", "15,907,550",
        dict(matrix_lr=.026, muon_momentum=.97, min_lr=.1, warmdown_ratio=.85, beta2=.99,
            output_gate="sparse", gate_slope=.5, smear_window=12, parallel_start=8, polar=True)),
}
# the row of #2135 stands in section 1 of another sheet, its settings in section 2.6
LAST = dict(matrix_lr=.028, samples=32*48, lqer_group=32, ttt_lora_lr=8e-5, eval_seq_len=2560,
    asymmetric_cap=True, use_tilt=True, ttt_phases=1, ttt_phase_docs=2500)
OWN_SHEET = ("pr1394", "pr1855")  # whose claims are means, not the largest file


def test_every_milestone_is_in_the_table():
    assert [*ROWS, "pr2135"] == list(MILESTONES)


def test_the_last_one_is_what_its_sheet_knows(shared):
    r, sheet = get_recipe("pr2135"), (shared/"spec"/"after1855.md").read_text()
    assert {k: value(r, k) for k in LAST} == LAST
    assert {k.split(".")[1] for k, *_ in diff(get_recipe("pr1855"), r)} <= LAST.keys()
    for words in ("| **#2135** | **1.05651** (0.00036) |", "matrix lr 0.028, LQER group 32",
        "adapter lr 8e-5", "evaluation window 2,560. #2135: the same with 32 calibration batches"):
        assert words in sheet
    last = r.claims[-1]
    assert (last.stage, last.claimed, last.logged) == ("tilted", 1.0565, 1.05651)
    assert at_scale(r, "mini").score.eval_seq_len == 160  # a quarter more than training's 128


def value(recipe, name):
    "A setting by its short name."
    found = [v for k, v in recipe.settings().items() if k.split(".")[1] == name]
    assert len(found) == 1, name
    return found[0]


def test_a_wrong_setting_would_be_seen():
    assert value(get_recipe("pr65"), "muon_weight_decay") != ROWS["pr1218"][-1]["muon_weight_decay"]
    with pytest.raises(AssertionError, match="no_such"): value(get_recipe("pr65"), "no_such")


@pytest.mark.parametrize("name", ROWS)
def test_the_recipe_has_what_its_row_says(name):
    _, bpb, _, parameters, steps, size, settings = ROWS[name]
    r = get_recipe(name)
    assert {k: value(r, k) for k in settings} == settings
    assert r.full_steps == int(steps.replace(",", ""))
    with torch.device("meta"): model = GPT(r.model)
    count = sum(p.numel() for p in model.parameters())
    assert f"{count/1e6:.2f} M" == parameters
    result = r.claims[-1]
    if name not in OWN_SHEET:
        assert result.stage == ("adapted" if r.stages.use_ttt else "sliding")
        assert (f"{result.claimed:.4f}", f"{result.bytes_logged:,}") == (bpb, size)
        assert parameters in result.note


@pytest.mark.parametrize("name", ROWS)
def test_the_row_stands_in_the_sheet(shared, name):
    label, bpb, words, parameters, steps, size, _ = ROWS[name]
    sheet = (shared/"spec"/"frontier.md").read_text()
    rows = [l for l in sheet.splitlines() if l.startswith(f"| {label} |") and l.count("|") == 9]
    cells = [c.strip() for c in rows[0].split("|")[1:-1]]
    assert len(rows) >= 1 and cells[1].split()[0] == bpb and cells[4:6] == [parameters, steps]
    assert cells[7] == size and all(w in cells[3] for w in words)


def test_grids_are_those_of_their_rows():
    for name, own in (("pr65", INT6), ("pr162", INT6), ("pr287", INT6), ("pr315", INT6),
        ("pr414", Grid(-31, 31, quantiles=CLIPS, scale_floor=1/31)),
        ("pr1019", Grid(-31, 31, quantiles=CLIPS, scale_floor=1/31))):
        assert [g for _, g in get_recipe(name).quant.rules] == [own, FLOOR8]
    assert [(g.hi, g.sigmas) for _, g in get_recipe("pr1729").quant.rules] == [(31, 12.), (31, 13.),
        (63, 15.)]  # "int7 embedding, per-group clip 12/13/15" (#1626)
    trained = [n for n in ROWS if get_recipe(n).stages.late_qat_threshold]
    assert trained == ["pr65", "pr162", "pr287"]  # from step 0: no multiplier exceeds 1
    for n in trained:
        s = get_recipe(n).stages
        assert s.late_qat_threshold > 1 and [g for _, g in s.qat_rules] == [INT6]


def test_the_tables_of_1218_decay_by_themselves():
    r = get_recipe("pr1218")
    assert {g.name: g.weight_decay for g in r.optim.groups} == dict(matrices="",
        tables="table_weight_decay", scalars="")
    assert r.optim.adam_weight_decay == get_recipe("pr1019").optim.adam_weight_decay != .085


def test_a_milestone_is_its_parent_with_what_it_adds():
    for m in ROAD[1:]:
        assert diff(get_recipe(m.parent), m.recipe), m.recipe.name
        if m.recipe.name not in OWN_SHEET:
            assert parent_of(at_scale(m.recipe, "mini")).name == m.parent
    same = {m.recipe.name for m in ROAD[1:]
        if training_key(m.recipe) == training_key(get_recipe(m.parent))}
    assert same == {m.recipe.name for m in ROAD if m.only_score} == {"pr50"}


@pytest.mark.parametrize("name", [n if n in ("launch", "pr549", "pr1729") else
    pytest.param(n, marks=pytest.mark.slow) for n in ROWS])
def test_it_can_be_planned_and_read_back(name, tmp_path):
    full = at_scale(get_recipe(name), "full")
    plan = plan_run(full)
    assert plan["steps"] == full.full_steps
    assert f"{sum(plan['parameters'].values())/1e6:.2f} M" == ROWS[name][3]
    assert "\n* " in settings_text(full)
    for scale in ("full", "pocket", "mini", "tiny"):
        r = at_scale(get_recipe(name), scale)
        r.save(tmp_path/"r.json")
        assert load_recipe(tmp_path/"r.json") == r


def test_a_scale_keeps_what_a_milestone_is_about():
    "Overlap, the share of a head that turns, and its batch against its parent's."
    for scale in ("mini", "pocket"):
        r = {n: at_scale(get_recipe(n), scale) for n in ROWS}
        assert r["launch"].score.eval_stride == r["launch"].score.eval_seq_len
        assert r["pr50"].score.eval_stride < r["pr50"].score.eval_seq_len
        whole, part = r["pr287"].model, r["pr315"].model
        assert whole.rope_dims == whole.head_dim == 4*part.rope_dims


@pytest.mark.parametrize("name", ["launch", "pr2135"])
def test_the_command_plans_a_milestone(main, name):
    code, said, err = main("plan", name, "--scale", "mini", "--settings")
    assert code == 0 and name in said and "* differs from" in said, err
    code, said, err = main("plan", "pr66")
    assert code and "near matches: pr65" in err + said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["launch", "pr65", "pr549", "pr1218", "pr1530"])
def test_a_tiny_run_ends_in_an_audited_score(novels, tmp_path, name):
    r = at_scale(get_recipe(name), "tiny").but(iterations=4, warmup_steps=0)
    job = pipeline.start(r, novels, tmp_path/"run", "cpu", 512, progress=False)
    report = pipeline.run(job)
    assert report.result["stage"] == r.claims[-1].stage and report.result["targets"] == 512
    assert audit_run(job.out, novels)["passed"]


def test_the_plan_of_the_road_lists_every_milestone():
    from pgolf.scale.runs import read_plan
    plan = read_plan(ROOT/"nbs"/"scale"/"road.yaml")
    assert {r.recipe for r in plan} == set(MILESTONES) and {r.scale for r in plan} == {"mini"}
    assert all(sum(p.label == r.label for p in plan) >= 3 for r in plan)
    for r in plan: r.resolve()
