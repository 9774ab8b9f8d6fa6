"The training loop against the published run, under compilation, at its limits and with faults."
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, Hand
from test_golden_train import model_config
from test_golden_train import run as golden_steps

from pgolf import files
from pgolf.game.shards import write_shard
from pgolf.model.gpt import GPT, Group, ModelConfig
from pgolf.squeeze.quant import Grid, LateQAT
from pgolf.train import device
from pgolf.train.averaging import EMA, SWA
from pgolf.train.device import can_compile
from pgolf.train.listeners import (Checkpointer, MetricsLog, Progress, TensorBoard, Validate,
                                   expected_steps)
from pgolf.train.loop import Run, TrainConfig, TrainingDiverged, make_loader, settle, train
from pgolf.train.checkpoint import CheckpointError, read_checkpoint
from pgolf.train.muon import OptimConfig
from pgolf.train.schedule import ScheduleConfig

TINY = ModelConfig(vocab_size=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2,
    mlp_mult=2., rope_dims=4, skip_init=1.)
CFG = TrainConfig(train_batch_tokens=256, train_seq_len=32, num_spans=4,
    warmup_steps=0, log_every=2)
PLAN = ScheduleConfig(iterations=6, warmdown_iters=3, muon_momentum_warmup_steps=4)


@pytest.fixture
def shard(tmp_path):
    "Two periods of a noisy pattern as a shard."
    g = np.random.default_rng(0)
    path = tmp_path / "data" / "train_000000.bin"
    path.parent.mkdir()
    write_shard(path, (np.arange(6000) % 50 + g.integers(0, 3, 6000)).astype(np.uint16))
    return path


def run(shard, cfg=CFG, plan=PLAN, listeners=(), optim=OptimConfig(), **kw):
    "Model and result of a small run on the real loader."
    model = GPT(TINY)
    return model, train(model, make_loader([shard], cfg), optim, plan, cfg, listeners, **kw)


class Interrupt:
    "Ask for the end after a step."
    def __init__(self, step): self.step = step
    def after_step(self, run): run.interrupted |= run.step == self.step


class GoldenLoader:
    "Batches of the golden run: step s reads tokens 256s .. 256s+256."
    def __init__(self, ids): self.ids, self.position = torch.tensor(ids.astype(np.int64)), 0
    def next_step(self):
        t = self.ids[256*self.position:256*self.position + 257]
        self.position += 1
        return [(t[:-1].view(4, 64), t[1:].view(4, 64))]


def test_golden_twelve_steps(golden):
    """The loop gives the losses of PR #610's own code, since it gives those of the hand-written
    steps."""
    z = golden("train_pr610")
    h = json.loads(str(z["hyper"]))
    model = GPT(model_config(json.loads(str(z["config"]))))
    model.load_state_dict({n: torch.from_numpy(z[f"param0/{n}"])
        for n, _ in model.named_parameters()})
    opt = OptimConfig(matrix_lr=h["matrix_lr"], tied_embed_lr=h["embed_lr"],
        scalar_lr=h["scalar_lr"])
    plan = ScheduleConfig(iterations=12, warmdown_iters=0, muon_momentum=h["momentum"],
        muon_momentum_warmup_steps=0)
    cfg = TrainConfig(train_batch_tokens=256, train_seq_len=64, num_spans=1, warmup_steps=2,
        grad_clip_norm=h["grad_clip"])
    losses = np.array(train(model, GoldenLoader(z["ids"]), opt, plan, cfg).losses)
    assert abs(losses[0]/z["losses"][0] - 1) < 1e-5
    by_hand = golden_steps(z)[0]  # held against the published losses in test_golden_train.py
    np.testing.assert_allclose(losses, by_hand, rtol=1e-6)


def test_accumulation_does_not_change_the_losses(shard):
    base = run(shard, replace(CFG, num_spans=1))[1].losses
    loader = lambda cfg: make_loader([shard], cfg)
    whole, split = loader(replace(CFG, num_spans=1)).next_step(), loader(CFG).next_step()
    assert len(whole) == 1 and len(split) == 4 and len(base) == 6

    class Rows:
        "The same global batch, row by row."
        position = 0
        def __init__(self): self.inner = loader(replace(CFG, num_spans=1))
        def next_step(self):
            return [(x[None], y[None]) for xs, ys in self.inner.next_step() for x, y in zip(xs, ys)]
    ours = train(GPT(TINY), Rows(), OptimConfig(), PLAN, CFG).losses
    np.testing.assert_allclose(ours, base, rtol=1e-4)


def test_resume_is_bitwise_with_the_real_loader(shard, tmp_path):
    straight, cut, on = [[EMA(.9), SWA(2, 1.)] for _ in range(3)]
    full, whole = run(shard, listeners=straight)
    _, first = run(shard, listeners=[*cut, Interrupt(3)], out=tmp_path)
    again, second = run(shard, listeners=on, out=tmp_path, resume=first.checkpoint)
    assert (first.stopped_by, first.steps, second.stopped_by, second.steps) == ("interrupted", 3,
        "iterations", 6)
    assert first.losses + second.losses == whole.losses and second.tokens == whole.tokens
    for k, v in full.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k
    for a, b in zip(straight, on):
        for k, v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k


def test_warm_up_leaves_no_trace(shard):
    model, cfg = GPT(TINY), replace(CFG, warmup_steps=3)
    plain, res = run(shard)
    loader = make_loader([shard], cfg)
    warm = train(model, loader, OptimConfig(), PLAN, cfg)
    assert warm.losses == res.losses and warm.tokens == res.tokens
    for k, v in plain.state_dict().items(): assert torch.equal(v, model.state_dict()[k]), k


def test_wallclock_limit_and_time_off_the_clock(shard):
    "Steps of a quarter of a second, validations of a minute: the limit counts the steps alone."
    plan = ScheduleConfig(iterations=10_000, max_wallclock_seconds=1.9, warmdown_iters=3)
    hand = Hand(.25)
    slow = Validate(3, lambda model: hand.move(60.) or {"val_loss": 0.})
    _, res = run(shard, plan=plan, listeners=[hand, slow], now=hand)
    assert (res.stopped_by, res.steps, res.elapsed) == ("wallclock", 8, 2.)
    assert res.seconds == [.25*n for n in range(1, 9)]
    assert [(step, at) for step, at, _ in slow.history] == [(3, .75), (6, 1.5), (8, 2.)]
    assert hand.time == 2. + 3*60.
    assert res.lr_scales == [plan.lr_scale(n, .25*n) for n in range(8)]


def test_the_clock_goes_on_where_a_checkpoint_left_it(shard, tmp_path):
    "Whatever the time is when the run goes on."
    plan, late = ScheduleConfig(iterations=10_000, max_wallclock_seconds=2.,
        warmdown_iters=3), Hand(.25)
    late.move(1e6)
    hand = Hand(.25)
    _, first = run(shard, plan=plan, listeners=[hand, Interrupt(3)], out=tmp_path, now=hand)
    _, rest = run(shard, plan=plan, listeners=[late], resume=first.checkpoint, now=late)
    assert (first.stopped_by, first.elapsed) == ("interrupted", .75)
    assert (rest.stopped_by, rest.steps, rest.elapsed) == ("wallclock", 8, 2.)
    assert first.seconds + rest.seconds == [.25*n for n in range(1, 9)]


def test_the_clock_is_not_on_while_a_run_warms_up(shard):
    hand, forwards = Hand(.25), []
    class Slow(GPT):
        "A model whose passes before the first step take an hour."
        def loss(self, *args):
            forwards.append(hand.time)
            if len(forwards) <= 2*CFG.num_spans: hand.move(3600.)
            return super().loss(*args)
    cfg = replace(CFG, warmup_steps=2)
    res = train(Slow(TINY), make_loader([shard], cfg), OptimConfig(), PLAN, cfg, [hand], now=hand)
    assert res.elapsed == 6*.25 and hand.time == res.elapsed + 8*3600.


def test_expected_steps_uses_the_nearer_limit():
    r = Run(None, [], None, ScheduleConfig(iterations=100, max_wallclock_seconds=10.), CFG)
    assert expected_steps(r) == 100
    r.step, r.clock.total = 5, 1.
    assert expected_steps(r) == 50
    r.clock.total = .1
    assert expected_steps(r) == 100


def test_divergence_is_found_late_and_keeps_the_good_checkpoint(shard, tmp_path):
    class Spoil:
        def before_step(self, run):
            if run.step == 3: run.model.tok_emb.weight.data.fill_(float("inf"))
    with pytest.raises(TrainingDiverged,
        match=r"step 3: .*last finite loss .*diverged\.safetensors") as e:
        run(shard, listeners=[Spoil(), Checkpointer(1)], out=tmp_path)
    assert e.value.step == 3 and np.isfinite(e.value.last_loss)
    assert read_checkpoint(tmp_path/"checkpoint.safetensors")[1]["step"] == 3
    # as on a GPU: several losses wait, the second of them is bad
    r = Run(None, [], None, PLAN, CFG)
    r.pending = [torch.tensor([2., 1.]), torch.tensor([float("nan"), 1.]), torch.tensor([2., 1.])]
    with pytest.raises(TrainingDiverged,
        match="step 1: loss nan.*last finite loss 2.0000.*no state written"):
        settle(r)


def test_checkpoint_faults(shard, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    _, res = run(shard, listeners=[Interrupt(2)], out=tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:40], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError,
            match=r"checkpoint\.safetensors: truncated or not a checkpoint"):
            run(shard, resume=path)
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="train.seed is 1337 there and 1 here"):
        run(shard, replace(CFG, seed=1), resume=path)
    with pytest.raises(CheckpointError, match="listeners is"):
        run(shard, listeners=[EMA()], resume=path)
    run(shard, replace(CFG, log_every=1), resume=path)  # an interval may differ

    def full(self, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "open",
        lambda *a: type("Full", (io.BytesIO,), {"write": full})(), raising=False)
    with pytest.raises(OSError,
        match=r"No space left on device while writing .*checkpoint\.safetensors.*free some space"):
        run(shard, listeners=[Checkpointer(2)], out=tmp_path)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()
        if p.is_file()] == [path.name]


def test_metrics_log_drops_lines_that_will_be_written_again(shard, tmp_path):
    class Crash:
        def before_step(self, run):
            if run.step == 5: raise RuntimeError("power cut")
    with pytest.raises(RuntimeError, match="power cut"):
        run(shard, listeners=[MetricsLog(), Checkpointer(3), Crash()], out=tmp_path)
    run(shard, listeners=[MetricsLog(), Checkpointer(3)], out=tmp_path,
        resume=tmp_path/"checkpoint.safetensors")
    lines = [json.loads(l) for l in (tmp_path/"metrics.jsonl").read_text().splitlines()]
    assert [l["step"] for l in lines if "loss" in l] == [1, 2, 3, 4, 5, 6]
    assert {"step", "elapsed", "loss", "lr_scale", "grad_norm", "tokens",
        "tokens_per_second"} == set(lines[-1])


def test_progress_bar_and_lines(shard):
    bar, text = io.StringIO(), io.StringIO()
    run(shard,
        listeners=[Progress(bar), Progress(text, lines=True),
            Validate(3, lambda m: {"val_loss": 1.5})])
    assert "6/6" in bar.getvalue() and "step 3: val_loss 1.5000" in bar.getvalue()
    assert re.search(
        r"step 4/6, \d\.\d s, 00:0\d left: loss \d\.\d{4}, lr_scale 1\.000, grad_norm \d\.\d{3},"
        r" tokens 1,024, tokens_per_second [\d,]+\n",
        text.getvalue(),
    )
    assert text.getvalue().startswith("compile: off (auto)")


def test_lines_are_the_first_step_the_due_ones_and_the_last(shard, tmp_path):
    def lines(iterations, **kw):
        text, plan = io.StringIO(), replace(PLAN, iterations=iterations, **kw)
        hand, cfg = Hand(.0625), replace(CFG, log_every=12)
        listeners = [Progress(text, lines=True), MetricsLog(), hand]
        _, res = run(shard, cfg, plan, listeners, out=tmp_path, now=hand)
        filed = [r["step"]
            for r in map(json.loads, (tmp_path/"metrics.jsonl").read_text().splitlines())
            if "loss" in r]
        return res.steps, [int(n) for n in re.findall(r"^step (\d+)/.* loss ",
            text.getvalue(), re.M)], filed
    assert lines(26) == (26, [1, 12, 24, 26], [*range(1, 11), 12, 24, 26])
    assert lines(5) == (5, [1, 5], [1, 2, 3, 4, 5])
    for n in (5, 19):  # the clock ends it, among the first ten steps and after them
        steps, shown, filed = lines(10_000, max_wallclock_seconds=.0625*n)
        assert steps == n
        assert shown == sorted({1, n, *range(12, n+1, 12)}) and filed == sorted(
            {n, *range(1, min(n, 10)+1), *range(12, n+1, 12)})


@pytest.mark.parametrize("limit",
    [dict(iterations=8), dict(iterations=10_000, max_wallclock_seconds=32.)])
def test_both_forms_foresee_the_end_under_either_limit(shard, limit):
    "Steps of 4 s, each with a pause of 10: eight of them, however they are limited."
    bar, text, hand = io.StringIO(), io.StringIO(), Hand(4.)
    class Pauses:
        """Take an hour before the first step, which must not count, and time off the clock after
        each."""
        def on_start(self, run): hand.move(3600.)
        def after_step(self, run):
            with run.paused(): hand.move(10.)
    listeners = [Progress(bar), Progress(text, lines=True), Pauses(), hand]
    _, res = run(shard, replace(CFG, log_every=1), replace(PLAN, **limit), listeners, now=hand)
    assert res.steps == 8 and "8/8" in bar.getvalue()
    steps = re.findall(r"step (\d+)/(\d+), ([\d.]+) s, (\d\d):(\d\d) left", text.getvalue())
    assert [(int(n), int(of), float(s)) for n, of, s, *_ in steps] == [(n, 8, 4.*n)
        for n in range(1, 9)]
    # the step that is just over has had its pause only when the next is recorded
    expected = [int((8-n)*(14*n-10)/n) for n in range(1, 9)]
    assert [60*int(m) + int(s) for *_, m, s in steps] == expected


def test_tensorboard_is_optional(shard, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    run(shard, listeners=[TensorBoard()], out=tmp_path)
    assert list((tmp_path/"tensorboard").glob("events.*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        run(shard, listeners=[TensorBoard()], out=tmp_path)


def test_compile_falls_back_where_there_is_no_compiler(shard, monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    text = io.StringIO()
    _, res = run(shard, replace(CFG, compile=True), listeners=[Progress(text, lines=True)])
    assert not res.compiled and "compile: off, no compiler on the PATH" in text.getvalue()


@pytest.mark.slow
def test_late_qat_compiles_in_the_warm_up_and_takes_effect(shard):
    able, why = can_compile("cpu")
    if not able: pytest.skip(why)
    from torch._dynamo.utils import counters

    class Count:
        def __init__(self): self.seen = []
        def after_step(self, run): self.seen.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    counters.clear()
    # ternary, so that the effect is plain; on at step 4
    qat = lambda: LateQAT(.9, ((r"\.weight$", Grid(-1, 1)),))
    # bfloat16 would enlarge the last bits that compilation changes
    kw = dict(optim=OptimConfig(ns_dtype="float32", matrix_lr=.1))
    cfg, count = replace(CFG, compile=True, warmup_steps=1), Count()
    # eval mode between steps
    look = Validate(2, lambda m: {"x": float(m(torch.zeros(1, 4, dtype=torch.long)).sum())})
    _, compiled = run(shard, cfg, listeners=[qat(), look, count], **kw)
    eager, plain = run(shard, listeners=[qat()], **kw)[1].losses, run(shard, **kw)[1].losses
    assert compiled.compiled and set(count.seen) == {2}, "both graphs before the first step"
    np.testing.assert_allclose(compiled.losses, eager, rtol=1e-3)  # last bits flip a few roundings
    assert eager[:4] == plain[:4] and abs(eager[4] - plain[4]) > 1e-2


@pytest.mark.slow
def test_compiled_runs_of_many_models_do_not_use_up_the_recompile_limit(shard, monkeypatch):
    able, why = can_compile("cpu")
    if not able: pytest.skip(why)
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    class Other:
        "A switch that the compiled loss must notice."
        def before_step(self, run):
            if run.step == 2: run.model.blocks[0].mlp.fc.fake_quant = lambda w: w/2
    other = torch.compile(lambda x: 2*x, backend="eager")
    assert other(torch.ones(1)) == 2
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    cfg, made = replace(CFG, compile=True), []
    with config.patch(recompile_limit=2):
        for layers in (1, 2, 3):
            before, model = (counters["stats"]["unique_graphs"],
                GPT(replace(TINY, num_layers=layers)))
            assert train(model, make_loader([shard], cfg), OptimConfig(), PLAN, cfg,
                [Other()]).compiled
            made.append(counters["stats"]["unique_graphs"] - before)
    assert made == [2, 2, 2]  # none fell back to eager
    assert other(torch.ones(1)) == 2  # what others have compiled still runs


def test_the_gradient_of_a_parameter_in_no_optimizer_is_never_cleared(shard):
    """As PR #598 ran: gradients are cleared through the optimizers, so that of its bigram scale
    goes on adding up, and counts in the norm that is clipped."""
    model = GPT(replace(TINY, bigram_vocab_size=32, bigram_dim=16))
    left_out, seen = model.bigram.scale, []
    left_out.register_hook(lambda g: seen.append(g.clone()))
    optim = OptimConfig(groups=(Group("left out", r"^bigram\.scale$", "none"),
        *OptimConfig().groups))
    cfg, before = replace(CFG, grad_clip_norm=0., warmup_steps=1), left_out.item()
    train(model, make_loader([shard], cfg), optim, PLAN, cfg)
    assert left_out.item() == before and len(seen) > PLAN.iterations
    torch.testing.assert_close(left_out.grad, sum(seen))


def test_a_run_on_a_cpu_keeps_the_memory_it_has_freed():
    """In a fresh process, since the choice is the process's: once ranks are set up and the heap has
    found its size, hardly a page is fetched."""
    code = """if 1:
        import resource, torch
        from pgolf.train.device import setup_ranks
        def fetched():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5): [torch.ones(10_000_000) for _ in range(3)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(fetched(), setup_ranks().world, (fetched(), fetched())[1])"""
    before, world, after = map(int,
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
            check=True).stdout.split())
    if not device.keep_memory(): pytest.skip("this C library cannot be told")
    assert world == 1 and after < before/10


def test_a_run_too_short_for_a_snapshot_keeps_its_last_weights(novels, tmp_path):
    "SWA begins late; the weights of a short run are not lost."
    from pgolf.systems.pipeline import start, train_weights
    from pgolf.systems.recipes import at_scale, get_recipe, in_steps
    recipe = in_steps(at_scale(get_recipe("pr1123"), "tiny"), 2)
    with pytest.warns(UserWarning, match="SWA took no snapshot"):
        curve = train_weights(start(recipe, novels, tmp_path/"run", "cpu", 256, progress=False))
    kept = read_checkpoint(tmp_path/"run"/"weights.safetensors")[0]
    last = {n: t for n, t in kept.items() if n.startswith("raw/")}
    assert curve["steps"] == 2 and last and all(torch.equal(t, kept["averaged/"+n[4:]])
        for n, t in last.items())
