"""Calibrated rounding where it could go wrong: bad Hessians, shared ones, tables, and what it may
be calibrated on."""

import gc

import pytest
import torch

import pgolf.squeeze.gptq as gptq_module
from pgolf.speed.timing import _Live
from pgolf.model.gpt import GPT, ModelConfig
from pgolf.squeeze.gptq import (GPTQConfig, damped_cholesky, dequantize_state, factor, gptq,
                                gptq_fit, hessian_error, quantize_state)
from pgolf.squeeze.calibration import collect_hessians, sample_tokens
from pgolf.squeeze.calibration import calibrate
from pgolf.squeeze.quant import QuantConfig, int_grid, quantize, search_scale, to_codes

CLIPS = (.9, .95, .98, .995, 1.)
pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(n, seed=0, rows=None):
    X = numbers(rows or 2*n, n, seed=seed)*numbers(n,
        seed=seed+1).exp() @ numbers(n, n, seed=seed+2)
    return X.T@X/len(X)


def model(**changes):
    m = GPT(ModelConfig(vocab_size=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2,
        mlp_mult=2, rope_dims=4, bigram_vocab_size=50, bigram_dim=16, ve_dim=8,
        ve_layers=(1,), **changes))
    for i, p in enumerate(m.parameters()):
        if not p.any(): p.data = .05*numbers(*p.shape, seed=i)
    return m.eval()


def texts(n=4):
    return [torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(i))
        for i in range(n)]


BAD = {"zero": lambda n: torch.zeros(n, n), "rank 1": lambda n: numbers(n, 1)@numbers(n, 1).T,
    "rank n/4": lambda n: hessian(n, rows=n//4), "tiny": lambda n: 1e-30*hessian(n),
    "huge": lambda n: 1e20*hessian(n),
       "dead columns": lambda n: hessian(n)
       *((torch.arange(n) % 3 > 0).float()[:,None]*(torch.arange(n) % 3 > 0).float()),
       "alive in one": lambda n: torch.diag((torch.arange(n) == 7).float()),
       "indefinite": lambda n: hessian(n) - .5*hessian(n).diagonal().mean()*torch.eye(n)}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("n", [40, 800])
@pytest.mark.parametrize("damping", [1e-7, .01])
def test_any_symmetric_hessian_is_rounded_against(kind, n, damping):
    """No failure, codes in range, an error no higher than rounding to nearest; both sizes of
    factorization."""
    H, W, grid = BAD[kind](n), numbers(24, n, seed=5), int_grid(4)
    scale = search_scale(W, grid)
    nearest = to_codes(W, scale, grid)
    for order in ("natural", "descending"):
        codes = gptq(W, H, scale, grid, GPTQConfig(damping=damping, order=order))
        assert codes.isfinite().all() and codes.abs().max() <= 7 and torch.equal(
            codes, codes.round())
        if kind != "indefinite":
            assert hessian_error(W, codes*scale, H.double()) <= 1.0001*hessian_error(W,
                nearest*scale, H.double())
        silent = H.diagonal() == 0
        assert torch.equal(codes[:,silent], nearest[:,silent])
    for rows in (W, W[:1], 0*W):
        c, s = gptq_fit(rows[None], H[None], int_grid(4, quantiles=CLIPS),
            GPTQConfig(damping=damping, search="hessian", refit="hessian"))
        assert c.isfinite().all() and s.isfinite().all()


@pytest.mark.parametrize("n", [1, 767, 768, 769, 1000])
def test_factor_in_panels(n):
    A = hessian(n).double()
    L = damped_cholesky(A, .01)
    assert torch.equal(L, L.tril())
    assert torch.allclose(L@L.T, A + .01*A.diagonal().mean()*torch.eye(n, dtype=A.dtype),
        rtol=1e-10, atol=1e-10*A.diagonal().max().item())


def test_halving_stops_anywhere():
    "A float32 rounding may tip a weight that lies between two codes; the error stays."
    W, H, grid = numbers(2, 16, 130), torch.stack([hessian(130), hessian(130, seed=9)]), int_grid(4)
    scale = search_scale(W, grid)
    def err(block):
        return hessian_error(W, gptq(W, H, scale, grid, GPTQConfig(block=block))*scale, H)
    for block in (2, 7, 128, 1000): assert torch.allclose(err(block), err(1), rtol=1e-3)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_searched_steps_have_the_smallest_hessian_error(bits):
    "Row by row, in the metric of the pass; a refit never adds to the plain Hessian error."
    W, H, cfg = numbers(3, 20, 64,
        seed=bits), torch.stack([hessian(64, seed=i) for i in range(3)]), GPTQConfig(
        search="hessian")
    grid = int_grid(bits, quantiles=CLIPS)
    def row_error(c, s):
        D, damped = W - c*s, H + .01*H.diagonal(dim1=1, dim2=2).mean(1)[:,None,None]*torch.eye(64)
        return ((D@damped)*D).sum(-1)
    codes, scale = gptq_fit(W, H, grid, cfg)
    tried = [row_error(*gptq_fit(W, H, int_grid(bits, quantiles=(q,)), GPTQConfig()))
        for q in CLIPS]
    assert torch.allclose(row_error(codes, scale), torch.stack(tried).amin(0), rtol=1e-3)
    again, refitted = gptq_fit(W, H, grid, GPTQConfig(search="hessian", refit="hessian"))
    assert torch.equal(codes, again) and (hessian_error(W, codes*refitted, H) <= hessian_error(W,
        codes*scale, H)*(1+1e-6)).all()


def test_one_factor_for_all_that_share_a_hessian(monkeypatch):
    "Also where the sharers have different grids; and sharing changes no code."
    m = model()
    state, H, made = m.state_dict(), collect_hessians(m, texts()), []
    monkeypatch.setattr(gptq_module, "factor", lambda *a: made.append(1) or factor(*a))
    cfg = QuantConfig(rules=((r"c_[qk]\.", int_grid(5)), (r"c_v\.", int_grid(3)),
        (".*", int_grid(6))), keep_numel=0)
    q = quantize_state(state, cfg, GPTQConfig(), H)
    assert len(made) == len({id(h) for h in H.values()}) < len(H)
    apart = quantize_state(state, cfg, GPTQConfig(), {n: h.clone() for n, h in H.items()})
    assert len(made) == len({id(h) for h in H.values()}) + len(H)
    for n in H:
        assert torch.equal(q[n].codes, apart[n].codes) and torch.equal(q[n].scale, apart[n].scale)


def test_what_is_not_finite_names_its_tensor():
    m, name = model(), "blocks.1.mlp.fc.weight"
    cfg, state = QuantConfig(rules=((".*", int_grid(6)),), keep_numel=0), m.state_dict()
    H = collect_hessians(m, texts())
    def spoilt(t): t = t.clone(); t[0,0] = float("nan"); return t
    with pytest.raises(ValueError, match=f"{name}: Hessian holds NaN"):
        quantize_state(state, cfg, GPTQConfig(), H | {name: spoilt(H[name])})
    with pytest.raises(ValueError, match=f"{name}: the weight holds NaN"):
        quantize_state(state | {name: spoilt(state[name])}, cfg, GPTQConfig(), H)
    with pytest.raises(ValueError, match=f"{name}: .*check the weights"):
        quantize_state(state | {name: spoilt(state[name])}, cfg)
    with pytest.raises(ValueError, match=f"{name}: Hessian of shape"):
        quantize_state(state, cfg, GPTQConfig(), H | {name: torch.eye(7)})
    m.blocks[1].attn.proj.weight.data[0,0] = float("inf")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc\.weight: its inputs hold NaN"):
        collect_hessians(m, texts())


def test_calibration_never_sees_validation_tokens():
    "Refused by name; and the pipeline has no other way than the training tokens."
    m, asked = model(), []
    with pytest.raises(ValueError, match="must not see validation"):
        collect_hessians(m, texts(), split="val")
    class Data:
        vocab_size = 64
        def train_tokens(self, n): asked.append(n); return torch.arange(n) % 64
        def __getattr__(self, name):
            raise AssertionError(f"calibration asked the dataset for {name}")
    assert set(calibrate(m, Data(), GPTQConfig(samples=4), 16)) and asked == [64]
    assert set(calibrate(m, Data(), GPTQConfig(samples=4, windows="self"), 16)) and asked == [64]
    with pytest.raises(ValueError, match="windows='val'"): GPTQConfig(windows="val")


def test_tables_are_collected_only_when_asked():
    m = model(tied_embed_init_std=.3)
    plain, both = collect_hessians(m, texts()), collect_hessians(m, texts(), tables=True)
    assert set(both) - set(plain) == {"tok_emb.weight", "bigram.embed.weight",
        "ve_shared.embed.weight"}
    for n in plain: assert torch.allclose(plain[n], both[n])
    assert both["tok_emb.weight"].shape == (32, 32) and both["bigram.embed.weight"].shape == (50,)
    counts = torch.bincount(torch.cat(texts()).flatten(), minlength=64)
    assert torch.allclose(both["ve_shared.embed.weight"], (counts+1)/(counts.sum()+64))
    cfg = QuantConfig(rules=(("embed", int_grid(3, scale_per="tensor", quantiles=CLIPS)),
        (".*", int_grid(4))), keep_numel=0)
    q = quantize_state(m.state_dict(), cfg, GPTQConfig(), both)
    W, p = m.bigram.embed.weight.detach(), both["bigram.embed.weight"]
    assert hessian_error(W, q["bigram.embed.weight"].dequantize(), p) <= hessian_error(W,
        quantize(W, cfg.rules[0][1]).dequantize(), p)
    T, H = m.tok_emb.weight.detach(), both["tok_emb.weight"]
    assert hessian_error(T, q["tok_emb.weight"].dequantize(), H) < hessian_error(T,
        quantize(T, int_grid(4)).dequantize(), H)
    m.load_state_dict(dequantize_state(q))


def test_samples_are_one_generator_s_and_calibrate():
    m = model().train()
    ids = sample_tokens(m, 5, 12, seed=3, batch=2)
    assert ids.shape == (5, 12) and ids.min() >= 0 and ids.max() < 64 and m.training
    before = torch.get_rng_state()
    assert torch.equal(ids, sample_tokens(m, 5, 12, seed=3, batch=2)) and torch.equal(before,
        torch.get_rng_state())
    assert (sample_tokens(m, 3, 4, seed=0, bos=9)[:,0] == 9).all()
    H = collect_hessians(m, ids.split(2), split="self", tables=True)
    assert all(h.isfinite().all() for h in H.values()) and m.training
    with pytest.raises(ValueError, match="temperature=-1"):
        sample_tokens(m, 1, 4, 0, temperature=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_error_on_a_gpu():
    W, grid = numbers(2, 48, 400), int_grid(4, quantiles=CLIPS)
    H = torch.stack([hessian(400), hessian(400, seed=9)])
    for cfg in (GPTQConfig(), GPTQConfig(search="hessian", refit="hessian")):
        (c, s), (cg, sg) = gptq_fit(W, H, grid, cfg), gptq_fit(W.cuda(), H.cuda(), grid, cfg)
        assert torch.allclose(hessian_error(W, c*s, H),
            hessian_error(W, cg.cpu()*sg.cpu(), H), rtol=1e-2)


def test_what_a_pass_needed_is_freed_at_once():
    "Large matrices that wait for the garbage collector would make memory grow from call to call."
    W, H = numbers(3, 24, 40), torch.stack([hessian(40, s) for s in range(3)])
    for _ in range(2):  # the first time torch itself keeps frames
        gc.disable()
        try:
            with _Live() as live:
                out = gptq_fit(W, H, int_grid(4, quantiles=CLIPS),
                    GPTQConfig(search="hessian", refit="hessian"))
            kept = sum(n for s, n in live.alive.values() if not s.expired())
        finally: gc.enable()
        gc.collect()
    assert kept == sum(t.untyped_storage().nbytes() for t in out)
