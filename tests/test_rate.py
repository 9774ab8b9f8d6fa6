"Rounding with the rate in the decision: from a recipe's settings to the file and back."
from dataclasses import replace

import pytest
import torch

from pgolf.model.gpt import GPT
from pgolf.squeeze.artifact import ArtifactError, pack, unpack
from pgolf.squeeze.gptq import (GPTQConfig, factor, gptq, gptq_fit, hessian_error,
                                quantize_state)
from pgolf.squeeze.lowrank import load_codes
from pgolf.squeeze.quant import Grid, QuantConfig, Quantized
from pgolf.squeeze.rate import rate_fit, rate_fitter
from pgolf.systems.pipeline import check_recipe, read_artifact, squeeze_here, start
from pgolf.systems.plan import estimate_bytes
from pgolf.systems.recipes import at_scale, get_recipe
from pgolf.train.checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = Grid(-31, 31, sigmas=12.)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(n, seed=0):
    "Inputs of which few directions hold most."
    X = numbers(4*n, n, seed=seed)*torch.arange(1, n+1).pow(-1.) @ numbers(n, n, seed=seed+1)
    return X.T@X/len(X)


@pytest.fixture(scope="module")
def squeezed(novels, tmp_path_factory):
    "The settings of two exports of the same weights: job, and the codes as they were in memory."
    recipe = at_scale(get_recipe("pr1855"), "tiny").but(use_ttt=False, samples=4, keep_numel=4000)
    weights = GPT(recipe.model).state_dict()
    for i, t in enumerate(weights.values()):
        if t.dim() == 2 and not t.any(): t.copy_(.05*numbers(*t.shape, seed=i))
    def export(**settings):
        job = start(recipe.but(**settings), novels, tmp_path_factory.mktemp("rate")/"run", "cpu",
            progress=False)
        write_checkpoint(job.weights, {f"averaged/{n}": t for n, t in weights.items()}, {})
        return job, squeeze_here(job)[0]
    return dict(plain=export(), both=export(rate=.1, column_steps=True),
        rate=export(rate=.3))


@pytest.mark.slow
def test_a_recipe_with_a_rate_takes_fewer_bytes(squeezed):
    sizes = {k: job.report.bytes_artifact for k, (job, _) in squeezed.items()}
    assert sizes["rate"] < sizes["plain"]
    assert all(job.artifact.stat().st_size == sizes[k] for k, (job, _) in squeezed.items())


@pytest.mark.slow
def test_steps_of_columns_come_back_from_the_file(squeezed):
    job, codes = squeezed["both"]
    back, model = load_codes(job.artifact)[0], read_artifact(job.artifact).state_dict()
    with_columns = 0
    for name, t in codes.items():
        if isinstance(t, torch.Tensor): continue
        assert torch.equal(back[name].dequantize(), t.dequantize())
        assert torch.equal(model[name], t.dequantize().to(model[name].dtype))
        base = getattr(back[name], "base", back[name])
        with_columns += base.columns is not None and len(base.columns.unique()) > 1
    assert with_columns > 8


def test_without_the_settings_nothing_changes():
    W, f = numbers(2, 24, 40), [factor(hessian(40, s), GPTQConfig()) for s in (0, 3)]
    for refit in ("", "hessian"):
        cfg = GPTQConfig(refit=refit)
        for q, c, s in zip(rate_fit(W, f, GRID, cfg), *gptq_fit(W, f, GRID, cfg)):
            assert torch.equal(q.codes, c) and torch.equal(q.scale, s.half()) and q.columns is None


@pytest.mark.parametrize("block", [1, 8, 64])
def test_steps_by_column_are_gptq_of_the_scaled_problem(block):
    "W/t against t H t, its damped Hessian factored anew, in the same order of columns."
    W, cfg = numbers(24, 40), GPTQConfig(block=block)
    f = factor(hessian(40), cfg)
    q = rate_fit(W[None], [f], GRID, replace(cfg, column_steps=True))[0]
    t = (q.columns.float()/8).exp2()
    damped = hessian(40) + .01*hessian(40).diagonal().mean()*torch.eye(40)
    back = f.order.flip(0)                      # rounded from the first to the last
    scaled = (damped*t*t[:, None])[back][:, back]
    anew = factor(scaled, GPTQConfig(order="natural", damping=1e-7))
    wide = replace(GRID, lo=-127, hi=127, peak=31)
    again = gptq((W/t)[:, back], [anew], q.scale.float(), wide, cfg)
    assert (q.codes[:, back] != again).float().mean() < .02, "roundings may tip single codes"


def test_a_narrow_column_of_large_weights_is_not_cut_off():
    "One column's errors cost 2^20 times those of the others, and its weights are the largest."
    W, stretch = numbers(64, 32, seed=3), torch.ones(32)
    W[:, 5] *= 4
    stretch[5] = 2**10
    H = hessian(32)*stretch*stretch[:, None]
    q = rate_fit(W[None], [factor(H, GPTQConfig())], GRID,
        replace(GPTQConfig(), column_steps=True))[0]
    assert q.codes.abs().max() < 127
    plain = rate_fit(W[None], [factor(H, GPTQConfig())], GRID, GPTQConfig())[0]
    off = [hessian_error(W, x.dequantize(), H) for x in (q, plain)]
    assert off[0] < .5*off[1] and (W-q.dequantize()).norm() < .2*W.norm()


def test_all_kinds_of_matrices():
    "Dead inputs, rows of zeros, one row, several matrices; errors stay below rounding to nearest."
    H = hessian(40)
    H[:, 3] = H[3] = 0
    W = numbers(3, 24, 40)
    W[1, 5] = 0
    cfg = GPTQConfig(rate=.1, column_steps=True, zero_dead=True, refit="hessian")
    for q, w in zip(rate_fit(W, [factor(H, cfg)]*3, GRID, cfg), W):
        assert not q.codes[:, 3].any() and not q.dequantize()[w.abs().sum(1) == 0].any()
        nearest = (w/GRID.sigmas*31/w.std(1, keepdim=True)).round()
        plain = torch.nan_to_num(nearest)*GRID.sigmas*w.std(1, keepdim=True)/31
        assert hessian_error(w, q.dequantize(), H) < hessian_error(w, plain, H)
    one = rate_fit(W[:1, :1], [factor(H, cfg)], GRID, cfg)[0]
    assert one.dequantize().isfinite().all()


def test_a_file_whose_columns_do_not_fit_is_refused():
    q = Quantized(torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 1).half())
    for wrong in (torch.zeros(3, dtype=torch.int8), torch.zeros(4)):
        with pytest.raises(ArtifactError, match="do not fit"):
            unpack(pack({"w": replace(q, columns=wrong)}))
    good = replace(q, columns=torch.tensor([0, 8, -8, 4], dtype=torch.int8))
    back = unpack(pack({"w": good}))[0]["w"].dequantize()
    assert torch.allclose(back, torch.tensor([1, 2, .5, 2**.5]).expand(3, 4))


def test_nobody_ignores_the_settings(squeezed):
    "Plain GPTQ refuses them and says what to give; without Hessians a recipe is refused at once."
    state = {"w": numbers(8, 16)}
    quant = QuantConfig(rules=((".*", GRID),), keep_numel=0)
    for asked in (GPTQConfig(rate=.1), GPTQConfig(column_steps=True)):
        with pytest.raises(ValueError, match="fit=rate_fitter"):
            quantize_state(state, quant, asked, {"w": hessian(16)})
        with pytest.raises(ValueError, match="fit=rate_fitter"):
            gptq_fit(state["w"][None], hessian(16)[None], GRID, asked)
        q = quantize_state(state, quant, asked, {"w": hessian(16)}, rate_fitter(asked))["w"]
        assert (q.columns is not None) == asked.column_steps
    recipe = squeezed["both"][0].recipe
    with pytest.raises(ValueError, match="set use_gptq, or rate=0"):
        check_recipe(recipe.but(use_gptq=False, use_ttt=False))


def test_a_plan_counts_what_prices_save():
    recipe = at_scale(get_recipe("pr1855"), "pocket")
    def size(**settings): return sum(b for *_, b in estimate_bytes(recipe.but(**settings)))
    assert size(rate=.1) < size() < size(column_steps=True) < size() + 40_000
