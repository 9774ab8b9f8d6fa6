"""What a GPU shows: every recipe at full size, for twenty steps. And what it would object to, found
without one."""

import numpy as np
import pytest
import torch

from pgolf.train import loop as training
from pgolf.speed.bench import ids, make_case, toy_tables
from pgolf.game.shards import write_shard
from pgolf.model.gpt import GPT
from pgolf.systems.pipeline import Job, make_average, make_listeners
from pgolf.systems.recipes import RECIPES, at_scale
from pgolf.score.windows import stream
from pgolf.train.device import Ranks
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


def twenty_steps(recipe, shard, out, device):
    "Model, result and graphs of a short run whose rate falls to a tenth of its peak at the end."
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    r = recipe.but(iterations=20, max_wallclock_seconds=0., warmdown_iters=10,
        lr_warmup_iters=0, warmup_steps=2)
    model, graphs = GPT(r.model, r.train.seed), Graphs()
    listeners = [*make_listeners(Job(r, None, out, device, progress=False), make_average(r)),
        graphs]
    return model, train(model, make_loader([shard], r.train), r.optim, r.schedule, r.train,
        listeners, device, out), graphs.seen


@pytest.mark.skipif(not BIG, reason="no CUDA device with 70 GB")
@pytest.mark.parametrize("name", RECIPES)
def test_full_size_on_a_gpu(name, shard, tmp_path):
    recipe = RECIPES[name]
    model, done, graphs = twenty_steps(recipe, shard, tmp_path, "cuda")
    assert (done.compiled and done.steps == 20 and np.isfinite(done.losses).all()
        and done.losses[-1] < done.losses[0])
    with torch.inference_mode():
        hidden = model.eval().hidden(torch.zeros(1, 64, dtype=torch.long, device="cuda"))
    assert model.compute_dtype == hidden.dtype == torch.bfloat16 and all(p.isfinite().all()
        for p in model.parameters())
    late = 0 < recipe.stages.late_qat_threshold <= 1
    assert graphs[:10] == [
        1]*10 and graphs[
        -1] == 1 + late, "one compilation in the warm-up, one more when late QAT switches on"


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
@pytest.mark.parametrize("name", RECIPES)
def test_no_step_waits_for_the_device(name, shard, tmp_path):
    """Two steps at the full rate, two near the end with fake quantization and averages; the first
    ten and the last are logged, and wait."""
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


@pytest.mark.parametrize("name", RECIPES)
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
