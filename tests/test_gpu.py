"What only a GPU can show: every recipe at full size, for twenty steps."
import numpy as np
import pytest
import torch

from pgolf.data import write_shard
from pgolf.gpt import GPT
from pgolf.pipeline import Job, make_average, make_listeners
from pgolf.recipes import RECIPES
from pgolf.training import make_loader, train

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
    r = recipe.but(iterations=20, max_wallclock_seconds=0., warmdown_iters=10, lr_warmup_iters=0, warmup_steps=2)
    model, graphs = GPT(r.model, r.train.seed), Graphs()
    listeners = [*make_listeners(Job(r, None, out, device, progress=False), make_average(r)), graphs]
    return model, train(model, make_loader([shard], r.train), r.optim, r.schedule, r.train, listeners, device, out), graphs.seen


@pytest.mark.skipif(not BIG, reason="no CUDA device with 70 GB")
@pytest.mark.parametrize("name", RECIPES)
def test_full_size_on_a_gpu(name, shard, tmp_path):
    recipe = RECIPES[name]
    model, done, graphs = twenty_steps(recipe, shard, tmp_path, "cuda")
    assert done.compiled and done.steps == 20 and np.isfinite(done.losses).all() and done.losses[-1] < done.losses[0]
    with torch.inference_mode(): hidden = model.eval().hidden(torch.zeros(1, 64, dtype=torch.long, device="cuda"))
    assert model.compute_dtype == hidden.dtype == torch.bfloat16 and all(p.isfinite().all() for p in model.parameters())
    late = 0 < recipe.stages.late_qat_threshold <= 1
    assert graphs[:10] == [1]*10 and graphs[-1] == 1 + late, "one compilation in the warm-up, one more when late QAT switches on"
