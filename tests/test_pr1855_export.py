"""PR #1855 behind training: adapters and end-to-end adaptation of its own code
(golden/frontier_functions.npz), its squeeze and container as settings of a recipe, bytes foreseen,
and a tiny run to an audited score."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.game.bpb import ByteTables
from pgolf.score.lora import LoRAConfig, grade_rows
from pgolf.score.phased import PhasedConfig, WorkingAdapters, score_phased
from pgolf.score.windows import ScoreConfig
from test_pr1855 import build, in_banks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def z(golden): return golden("frontier_functions")


@pytest.fixture
def model(golden): return build(golden("pr1855"), "param/")


# ---- adapters

FAMILIES = dict(q="q_loras", k="k_loras", v="v_loras", o="o_loras", mlp="mlp_loras")


def published(name):
    "Name of an adapter in the golden file."
    place, _, visit = name.partition(".")
    return "lm_head_lora" if place == "head" else f"{FAMILIES[place]}.{visit}"


def adapted(z, model, part):
    "The golden adapters of three documents."
    meta = json.loads(str(z["lora/meta"]))
    cfg = LoRAConfig(ttt_lora_rank=meta["rank"], ttt_lora_scale=meta["alpha"]/meta["rank"])
    own = WorkingAdapters(model, cfg, PhasedConfig(), meta["batch"], torch.Generator())
    with torch.no_grad():
        for f, factors in (("A", own.A), ("B", own.B)):
            for n, t in factors.items():
                t.copy_(torch.from_numpy(z[f"{part}/adapter/{published(n)}.{f}"]))
    return own


def grades(model, own, ids):
    "Losses of all targets of three rows, each with its own adapters."
    n = ids.shape[1]
    text = torch.cat([row for row in ids])
    windows = [(n*i, n*i+n-1, n*i) for i in range(len(ids))]
    rows = grade_rows(model, own, text, windows, list(range(len(ids))))
    return rows.nll.view(len(ids), n-1)


@pytest.mark.parametrize("part", ["lora_loop", "lora_noloop"])
def test_adapters_grade_and_learn_as_published(z, model, part):
    if part == "lora_noloop": model.order = tuple(range(model.cfg.num_layers))
    model.eval()
    own, ids = adapted(z, model, part), torch.from_numpy(z[f"{part}/ids"].astype(np.int64))
    nll = grades(model, own, ids)
    torch.testing.assert_close(nll.detach(), torch.from_numpy(z[f"{part}/nll"]), rtol=1e-5,
        atol=1e-5)
    nll[:, -8:].mean(1).sum().backward()
    for f, factors in (("A", own.A), ("B", own.B)):
        for n, t in factors.items():
            want = float(z[f"{part}/gradnorm/{published(n)}.{f}"])
            assert t.grad.norm().item() == pytest.approx(want, rel=1e-5, abs=1e-9), n
    first = {n: t.detach().clone() for n, t in own.A.items()}
    own.restart()
    assert all(torch.equal(t, first[n]) for n, t in own.A.items()), "warm"
    torch.testing.assert_close(grades(model, own, ids).detach(),
        torch.from_numpy(z[f"{part}/nll_reset"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["rank", "o", "visits"])
def test_a_fault_in_the_adapters_shows(z, model, fault):
    "Scale 144 in place of 144/4, the output adapter left out, the visits of a block mixed up."
    own = adapted(z, model, "lora_loop")
    if fault == "rank": own.cfg = replace(own.cfg, ttt_lora_scale=144.)
    if fault == "o": del own.parts["o"]
    if fault == "visits": own.A["q.2"], own.A["q.4"] = own.A["q.4"], own.A["q.2"]
    ids = torch.from_numpy(z["lora_loop/ids"].astype(np.int64))
    assert (grades(model.eval(), own, ids).detach()-torch.from_numpy(z["lora_loop/nll"])).abs(
        ).max() > 1e-3


# ---- end to end

class Sine(WorkingAdapters):
    "First factors as the golden runs draw them."
    def draw(self, name, width):
        b, r, i = (torch.arange(n, dtype=torch.float64) for n in (self.docs,
            self.cfg.ttt_lora_rank, width))
        phase = 1+.7*r[:, None]+.37*i+1.9*b[:, None, None]
        return (width**-.5*phase.sin()).float()


@pytest.fixture
def sine(monkeypatch): monkeypatch.setattr("pgolf.score.phased.WorkingAdapters", Sine)


class Counts(ByteTables):
    "Bytes by position, as the golden file gives them."
    def __init__(self, n_bytes, vocab_size):
        object.__setattr__(self, "base_bytes", torch.zeros(vocab_size))
        object.__setattr__(self, "n_bytes", n_bytes)
    def count(self, prev, targets): return self.n_bytes


def run(z, model, part, lora={}, phased={}, **kw):
    "An evaluation with the golden settings, and how far its losses are off."
    h = json.loads(str(z[f"{part}/hyper"]))
    cfg = LoRAConfig(ttt_lora_rank=h["ttt_lora_rank"], ttt_lora_lr=h["ttt_lora_lr"],
        ttt_lora_scale=h["alpha"]/h["ttt_lora_rank"], ttt_lora_beta2=h["ttt_beta2"],
        ttt_lora_weight_decay=h["ttt_weight_decay"], ttt_lora_chunk_tokens=h["ttt_chunk_size"],
        ttt_lora_docs=h["ttt_batch_size"])
    docs = h["phased_ttt_prefix_docs"]
    pauses = PhasedConfig(ttt_phases=h["phased_ttt_num_phases"] if docs else 0,
        ttt_phase_docs=max(1, docs), ttt_phase_lr=h["global_ttt_lr"],
        ttt_phase_momentum=h["global_ttt_momentum"], ttt_phase_clip=h["global_ttt_grad_clip"],
        ttt_phase_chunk_tokens=h["global_ttt_chunk_tokens"], ttt_phase_seq_len=h["eval_seq_len"])
    tokens = torch.from_numpy(z[f"{part}/tokens"].astype(np.int64))
    n_bytes = torch.from_numpy(z[f"{part}/bytes"].astype(np.int64))[1:]
    got = score_phased(model, tokens, Counts(n_bytes, model.cfg.vocab_size),
        ScoreConfig(h["ttt_eval_seq_len"], h["ttt_eval_seq_len"]), replace(cfg, **lora),
        replace(pauses, **phased), **kw)
    return got, np.abs(got.nll.numpy()-z[f"{part}/nll"][1:]).max()


@pytest.mark.parametrize("part", ["ttt_lora_only", "ttt_phased"])
def test_the_whole_evaluation_is_the_published_one(z, model, sine, part):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    got, off = run(z, model, part)
    assert off < 2e-5
    assert got.val_loss == pytest.approx(float(z[f"{part}/val_loss"]), rel=1e-6)
    assert got.val_bpb == pytest.approx(float(z[f"{part}/val_bpb"]), rel=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


FAULTS = {
    "a decay of zero": ("ttt_lora_only", dict(ttt_lora_weight_decay=0.), {}),
    "beta2 0.95": ("ttt_lora_only", dict(ttt_lora_beta2=.95), {}),
    "fresh first factors": ("ttt_lora_only", {}, dict(ttt_warm=False)),
    "no pauses": ("ttt_phased", {}, dict(ttt_phases=0)),
    "momentum 0.8": ("ttt_phased", {}, dict(ttt_phase_momentum=.8)),
    "no clipping": ("ttt_phased", {}, dict(ttt_phase_clip=0.)),
    "longer segments": ("ttt_phased", {}, dict(ttt_phase_seq_len=64)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_evaluation_shows(z, model, sine, monkeypatch, fault):
    part, lora, phased = FAULTS[fault]
    if fault == "fresh first factors":  # drawn anew they would be the same sines
        monkeypatch.setattr(Sine, "draw", lambda s, n, w: torch.rand(s.docs,
            s.cfg.ttt_lora_rank, w, generator=s.gen))
    assert run(z, model, part, lora, phased)[1] > 4e-4
