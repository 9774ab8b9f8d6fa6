"""What a GPU shows: every recipe at full size, for some steps. And what it would object to, found
without one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import described_first

from pgolf.train import loop as training
from pgolf.speed.bench import ids, make_case, toy_tables
from pgolf.game.data import write_shard
from pgolf.model import segments
from pgolf.model.attention import attend
from pgolf.model.gpt import GPT
from pgolf.model.softcap import softcap, softcapped_loss
from pgolf.systems.pipeline import Job, make_average, make_listeners
from pgolf.systems.recipes import RECIPES, at_scale
from pgolf.score.audit import audit, model_evaluation, passes
from pgolf.score.windows import stream
from pgolf.train.device import Ranks, exactly
from pgolf.train.loop import make_loader, train, train_step

BIG = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 70e9


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    "Ids that any vocabulary has, in a pattern that can be learnt."
    path = tmp_path_factory.mktemp("data")/"train_000000.bin"
    g = np.random.default_rng(0)
    write_shard(path, (np.arange(4_000_000) % 500 + g.integers(0, 50, 4_000_000)).astype(np.uint16))
    return path


class Graphs:
    "The number of compiled graphs after each step."
    def __init__(self): self.seen = []
    def after_step(self, run):
        from torch._dynamo.utils import counters
        self.seen.append(counters["stats"]["unique_graphs"])


def some_steps(recipe, shard, out, steps, compile):
    "Model, result and graphs of a short run whose rate falls to a tenth of its peak at the end."
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    r = recipe.but(iterations=steps, max_wallclock_seconds=0., warmdown_iters=steps//2,
        lr_warmup_iters=0, warmup_steps=2*compile, compile=compile)
    model, graphs = GPT(r.model, r.train.seed), Graphs()
    listeners = [*make_listeners(Job(r, None, out, "cuda", progress=False), make_average(r)),
        graphs]
    return model, train(model, make_loader([shard], r.train), r.optim, r.schedule, r.train,
        listeners, "cuda", out), graphs.seen


def check_trained(model, done, steps):
    assert done.steps == steps and np.isfinite(done.losses).all()
    assert done.losses[-1] < done.losses[0]
    with torch.inference_mode():
        hidden = model.eval().hidden(torch.zeros(1, 64, dtype=torch.long, device="cuda"))
    assert model.compute_dtype == hidden.dtype == torch.bfloat16
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(not BIG, reason="no CUDA device with 70 GB")
def test_full_size_compiled(shard, tmp_path):
    "Two graphs, one of them with late QAT, and both before the clock starts."
    model, done, graphs = some_steps(RECIPES["pr610"], shard, tmp_path, 20, True)
    check_trained(model, done, 20)
    assert done.compiled and set(graphs) == {2}


@pytest.mark.skipif(not BIG, reason="no CUDA device with 70 GB")
@pytest.mark.parametrize("name", [n for n in RECIPES if n != "pr610"])
def test_full_size_on_a_gpu(name, shard, tmp_path):
    "Every recipe, eager: a compilation takes a minute, and a lease has few."
    model, done, _ = some_steps(RECIPES[name], shard, tmp_path, 4, False)
    check_trained(model, done, 4)


CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@CARD
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(8, 4, 64), (8, 8, 64), (4, 2, 32)])
@pytest.mark.parametrize("queries", [1, 64, 255])
def test_the_last_queries_are_those_of_all(heads, kv_heads, head_dim, queries):
    "Fewer queries than keys, against the slice of the full output and against float32."
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 256, n, head_dim, generator=g, device="cuda", dtype=torch.bfloat16)
        for n in (heads, kv_heads, kv_heads))
    last = attend(q[:, -queries:], k, v).float()
    exact = attend(*(t.float() for t in (q, k, v)))[:, -queries:]
    full = attend(q, k, v)[:, -queries:].float()
    noise = (full-exact).abs().max()
    assert (last-exact).abs().max() <= 2*noise and (last-full).abs().max() <= 2*noise


@CARD
def test_the_residual_stream_stays_bfloat16():
    "From 2.12 on torch takes rms_norm to float32 under autocast; the casts here are explicit."
    r = at_scale(RECIPES["pr610"], "tiny")
    model, seen = GPT(r.model).cuda(), []
    model.compute_dtype = torch.bfloat16
    for b in model.blocks:
        b.register_forward_hook(lambda m, args, out: seen.extend(
            t.dtype for t in (args[0], *(out if isinstance(out, tuple) else (out,)))
            if torch.is_tensor(t)))
    model.loss(*torch.zeros(2, 1, 64, dtype=torch.long, device="cuda"))
    assert seen and set(seen) == {torch.bfloat16}


@CARD
def test_an_honest_run_passes_on_a_card():
    "In bfloat16 an audit would look for effects of 1e-6 in noise of 1e-2."
    r = at_scale(RECIPES["pr610"], "tiny")
    model = GPT(r.model).cuda().eval()
    model.compute_dtype = torch.bfloat16
    text = torch.randint(r.model.vocab_size, (4*r.score.eval_seq_len+1,))
    ev = model_evaluation(model, toy_tables(r.model.vocab_size), r.score, len(text)-1)
    with exactly(model): found = audit(ev, text)
    assert passes(found)


# Tensors on torch's "meta" device have shapes but no values. To read one on the host, where a GPU
# would have to be waited for, is an
# error, and so is an operator whose inputs lie on two devices.

def on_meta(recipe, shard, out):
    """A run of a recipe at its smallest scale, its model on the device without values, in bfloat16
    as on a GPU."""
    r = at_scale(recipe, "tiny").but(max_wallclock_seconds=0., log_every=10**6,
        checkpoint_every=0, val_every=0)
    with torch.device("meta"): model = GPT(r.model)
    listeners = make_listeners(Job(r, None, out, "cpu", progress=False), make_average(r))
    run = training._prepare(model, make_loader([shard], r.train), r.optim, r.schedule, r.train,
        listeners, Ranks(device="meta"), out)
    model.compute_dtype = torch.bfloat16
    run.call("on_start")
    run.clock.start()
    return r, run


@pytest.mark.filterwarnings("ignore:SWA took no snapshot")
@pytest.mark.parametrize("name", described_first())
def test_no_step_waits_for_the_device(name, shard, tmp_path, monkeypatch):
    """Two steps at the full rate, two near the end with fake quantization and averages; the first
    ten and the last are logged, and wait."""
    # a GPU has kernels that take borders of segments; one call per segment is the CPU's way
    monkeypatch.setattr(segments, "attend_cut", lambda q, k, v, cu: attend(q, k, v))
    r, run = on_meta(RECIPES[name], shard, tmp_path)
    average, = [l for l in run.listeners if hasattr(l, "weights")]
    for run.step in (10, 11, r.schedule.iterations-3, r.schedule.iterations-2):
        train_step(run, run.model.loss)
        average.risen = True # SWA counts from a high rate on, which these steps leave out
    assert len(run.pending) == 4 and all(t.is_meta for t in (run.loss, *run.model.parameters(),
        *average.weights().values()))
    assert any(getattr(m, "fake_quant", None) for m in run.model.modules()) == (
        r.stages.late_qat_threshold > 0)
    run.call("on_failure")


def test_a_step_that_is_logged_waits(shard, tmp_path):
    "The control: reading the loss is what the device without values refuses."
    _, run = on_meta(RECIPES["pr610"], shard, tmp_path)
    with pytest.raises(NotImplementedError, match="no data"): train_step(run, run.model.loss)
    run.call("on_failure")


@pytest.mark.parametrize("name", described_first())
def test_scoring_does_not_wait_either(name):
    "All pieces of a text, windows of both kinds, with and without the whole distribution."
    case = make_case(name, "tiny")
    with torch.device("meta"): model = GPT(case.recipe.model)
    model.compute_dtype = torch.bfloat16
    text, tables = ids(case, 400), toy_tables(case.recipe.model.vocab_size)
    for distribution in (False, True):
        pieces = list(stream(model, text, tables, case.recipe.score, distribution=distribution))
        assert sum(len(p.nll) for p in pieces) == 399 and all(p.nll.is_meta
            and (p.logprobs is not None) == distribution for p in pieces)


def with_gradients(f, leaves, device, dtype):
    "What a function gives on a device, and the gradients of its mean square, in float32."
    leaves = [t.to(device, dtype).requires_grad_() for t in leaves]
    y = f(*leaves)
    y.float().square().mean().backward()
    return [t.detach().float().cpu() for t in (y, *(t.grad for t in leaves))]


def apart(got, want):
    "Largest relative distance of pairs of tensors."
    return max(((a-b).norm()/b.norm()).item() for a, b in zip(got, want, strict=True))


@CARD
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("flex", [False, True])
def test_segments_on_a_card_are_those_of_the_slow_form(dtype, most, flex):
    "Values and gradients against one call a segment on the CPU: the kernel there is, and the mask."
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 512, heads, 64, generator=g) for heads in (8, 4, 4)]
    cu = torch.tensor([0, 7, 200, 201, 450, 512, 512, 512], dtype=torch.int32)
    want = with_gradients(lambda *x: segments.attend_cut(*x, cu), leaves, "cpu", torch.float32)
    def fast(*x):
        if flex: return segments.attend_flex(*x, cu.cuda())
        return segments.attend_segments(*x, cu.cuda(), 256)
    got = with_gradients(fast, leaves, "cuda", dtype)
    assert apart(got, want) < most


@CARD
@pytest.mark.parametrize("compiled", [False, True])
def test_the_fused_loss_on_a_card_is_the_slow_one(compiled):
    g = torch.Generator().manual_seed(0)
    z, targets = 40*torch.randn(300, 2000, generator=g), torch.randint(2000, (300,), generator=g)
    def slow(z): return F.cross_entropy(softcap(z, 30.), targets, reduction="none")
    fused = torch.compile(softcapped_loss) if compiled else softcapped_loss
    want = with_gradients(slow, [z], "cpu", torch.float32)
    got = with_gradients(lambda z: fused(z, targets.cuda(), 30., 1024), [z], "cuda", torch.float32)
    assert apart(got, want) < 1e-5
