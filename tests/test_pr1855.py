"""PR #1855: losses, logits and gradients of its own code (golden/pr1855.npz), twelve steps of it
(golden/train_pr1855.npz) under its limits with planted faults; its recipe against its sheet; a tiny
run to an audited score."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf.game.loaders import cumulative_lengths, segment_starts
from pgolf.game.shards import write_shard
from pgolf.model.gpt import GPT, ModelConfig, count_parameters
from pgolf.squeeze.artifact import peek
from pgolf.systems import pipeline
from pgolf.systems.great import PR1394
from pgolf.systems.recipes import at_scale, parent_of
from pgolf.systems.summit import PR1855
from pgolf.systems.verdict import audit_run
from pgolf.train import loop
from pgolf.train.averaging import EMA
from pgolf.train.device import Ranks
from pgolf.train.frontier import from_banks, to_banks
from pgolf.train.listeners import OrderSwitch
from pgolf.train.loop import TrainConfig, make_loader, train
from pgolf.train.muon import Muon, make_optimizers
from pgolf.train.schedule import ScheduleConfig

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = {r"attn\.attn_gate_w$": "attn.out_gate.gate", r"^smear_gate\.weight$": "token_smear.gate",
    r"^smear_lambda$": "token_smear.scale", r"^parallel_resid_lambdas$": "lanes.resid_scale",
    r"^parallel_post_lambdas$": "lanes.post_scale"}


def own_name(name):
    "Name here of a published parameter that is in no bank."
    for pattern, new in NAMES.items(): name = re.sub(pattern, new, name)
    return name


def build(z, prefix):
    "The small model of a golden file in the long order, its weights loaded."
    c = json.loads(str(z["config"]))
    fields = {k: v for k, v in c.items() if k in ModelConfig.__dataclass_fields__}
    loop = range(c["loop_start"], c["loop_end"]+1)
    order = (*range(c["loop_start"]), *(list(loop)*(c["num_loops"]+1)),
        *range(c["loop_end"]+1, c["num_layers"]))
    cfg = ModelConfig(**fields | dict(activation="leaky_relu2", ln_scale=True, skip_init=1.,
        skip_gate=True, rope_train_seq_len=0, layer_order=order, output_gate="sparse",
        gate_slope=c["sparse_attn_gate_scale"], smear_window=c["gate_window"], parallel="lanes",
        parallel_start=c["parallel_start_layer"]))
    model = GPT(cfg)
    state = from_banks({k.removeprefix(prefix): torch.from_numpy(z[k]) for k in z.files
        if k.startswith(prefix)})
    model.load_state_dict({own_name(n): t.view(-1) if "smear_gate" in n else t
        for n, t in state.items()})
    return model


def in_banks(state):
    "Tensors by our names as a dictionary by published names."
    back = {new: old.strip("^$").replace("\\", "") for old, new in NAMES.items()}
    def published(name):
        return next((name.removesuffix(new)+old for new, old in back.items()
            if name.endswith(new)), name)
    return {published(n): t for n, t in to_banks(state).items()}


def test_the_small_order_is_the_published_one(golden):
    z = golden("pr1855")
    assert build(z, "param/").cfg.order == (*z["encoder_indices"], *z["decoder_indices"])


@pytest.mark.parametrize("part", ["", "noloop/", "packed/"])
def test_loss_logits_and_gradients_are_the_published_ones(golden, part):
    z = golden("pr1855")
    model = build(z, "param/")
    if part == "noloop/": model.order = tuple(range(model.cfg.num_layers))
    ids = torch.from_numpy(z["packed/ids" if part == "packed/" else "ids"].astype(np.int64))
    x, y = ids[:, :-1], ids[:, 1:]
    borders = ((torch.from_numpy(z["packed/cu_seqlens"]), int(z["packed/max_segment"]))
        if part == "packed/" else ())
    logits, loss = model(x, *borders), model.loss(x, y, *borders)
    loss.backward()
    assert loss.item() == pytest.approx(float(z[part+"loss"]), rel=1e-5)
    for name, got in (("first8", logits[:, :8]), ("last8", logits[:, -8:])):
        torch.testing.assert_close(got, torch.from_numpy(z[f"{part}logits_{name}"]),
            rtol=1e-5, atol=1e-5)
    names = [k for k in z.files if k.startswith(part+"gradnorm/")]
    grads = in_banks({n: p.grad for n, p in model.named_parameters()})
    assert len(names) == len(grads)
    for k in names:
        norm = grads[k.removeprefix(part+"gradnorm/")].norm().item()
        assert norm == pytest.approx(float(z[k]), rel=1e-4, abs=1e-9), k


def test_a_packed_row_before_the_repeats(golden):
    z = golden("pr1855")
    model = build(z, "param/")
    model.order = tuple(range(model.cfg.num_layers))
    ids = torch.from_numpy(z["packed/ids"].astype(np.int64))
    loss = model.loss(ids[:, :-1], ids[:, 1:], torch.from_numpy(z["packed/cu_seqlens"]), 32)
    assert loss.item() == pytest.approx(float(z["packed_noloop/loss"]), rel=1e-5)


# ---- twelve steps

@pytest.fixture(scope="module")
def g(golden): return golden("train_pr1855")


class Rows:
    "The golden batches, each a packed row; `bos` and `longest` say where its segments begin."
    def __init__(self, g, h, bos=1, longest=48):
        self.ids, self.position = torch.from_numpy(g["ids"].astype(np.int64)), 0
        self.n, self.bos, self.longest = h["batch"]*h["seq_len"], bos, longest
    def next_step(self):
        span = self.ids[self.position*self.n:(self.position+1)*self.n+1]
        self.position += 1
        starts = segment_starts(span[:-1].numpy(), self.bos, self.longest)
        cu = cumulative_lengths(starts, self.n)
        return [(span[None, :-1], span[None, 1:], cu, self.longest)]


class Norms:
    "Norm of the gradient before clipping, each step."
    def __init__(self): self.seen = []
    def after_step(self, run): self.seen.append(run.grad_norm)


def twelve(g, optim={}, momentum=None, clip=None, switch=.5, decay=None, model={}, **rows):
    "Losses, clipping norms, norms of the changes, and those of the average's; faults if asked for."
    h, m = json.loads(str(g["hyper"])), build(g, "param0/")
    for name, value in model.items(): setattr(m, name, value)
    start = {n: t.clone() for n, t in in_banks(m.state_dict()).items()}
    cfg = TrainConfig(train_batch_tokens=h["batch"]*h["seq_len"], train_seq_len=h["seq_len"],
        num_spans=1, warmup_steps=0, grad_clip_norm=h["grad_clip"] if clip is None else clip)
    flat = ScheduleConfig(iterations=h["steps"], warmdown_iters=0, muon_momentum=momentum or
        h["momentum"], muon_momentum_warmup_steps=0)
    optims = make_optimizers(m, replace(PR1855.optim, **optim))
    norms, average = Norms(), EMA(h["ema_decay"] if decay is None else decay)
    done = train(m, Rows(g, h, **rows), optims, flat, cfg, [*([OrderSwitch(switch)] if switch
        else []), average, norms])
    def moved(state): return {n: (t-start[n]).norm().item() for n, t in in_banks(state).items()}
    return done.losses, norms.seen, moved(m.state_dict()), moved(average.weights())


def off(got, want): return np.abs(np.array(got)/want - 1).max()


def median_off(moved, g, key):
    want = {n: float(g[f"{key}/{n}"]) for n in moved}
    return np.median([abs(moved[n]/w - 1) for n, w in want.items() if w > 0])


def distances(g, **faults):
    losses, norms, moved, averaged = twelve(g, **faults)
    return dict(losses=off(losses, g["losses"]), clip_norms=off(norms, g["clip_norms"]),
        delta=median_off(moved, g, "delta_norm"), ema=median_off(averaged, g, "ema_delta_norm"))


LIMITS = dict(losses=1.2e-4, clip_norms=3e-4, delta=1.2e-3)


def test_hyperparameters_and_groups_are_the_recipes(g):
    h, o = json.loads(str(g["hyper"])), PR1855.optim
    assert (o.matrix_lr, o.tied_embed_lr, o.scalar_lr) == (h["matrix_lr"], h["tied_embed_lr"],
        h["scalar_lr"])
    assert (o.muon_weight_decay, o.table_weight_decay, o.adam_weight_decay) == (h["muon_wd"],
        h["embed_wd"], h["adam_wd"])
    assert (o.beta1, o.beta2, o.adam_eps, o.ns_steps, o.even_rows) == (h["beta1"], h["beta2"],
        h["adam_eps"], h["muon_backend_steps"], h["muon_row_normalize"])
    assert (PR1855.train.grad_clip_norm, PR1855.stages.ema_decay) == (h["grad_clip"],
        h["ema_decay"])
    model = build(g, "param0/")
    names = {id(p): n for n, p in model.named_parameters()}
    ours = [[names[id(p)] for p in group["params"]] for opt in make_optimizers(model, o)
        for group in opt.param_groups]
    assert {re.sub(r"^blocks\.\d+\.", "", n) for n in ours[0]} == {"attn.c_q.weight",
        "attn.c_k.weight", "attn.c_v.weight", "attn.proj.weight", "mlp.fc.weight",
        "mlp.proj.weight"}
    published = {n for n in in_banks(model.state_dict()) if not n.endswith("_bank")}
    assert published == {*h["groups"]["adam_embed"], *h["groups"]["adam_scalar"]}
    assert len(ours[1]) == 1 and len(ours[2]) == len(h["groups"]["adam_scalar"])


def test_twelve_steps_are_the_published_ones(g):
    found = distances(g)
    assert all(found[k] <= limit for k, limit in LIMITS.items()), found
    assert found["ema"] <= LIMITS["delta"], found


FAULTS = {
    "no decay of scalars": dict(optim=dict(adam_weight_decay=0.)),
    "no decay in Muon": dict(optim=dict(muon_weight_decay=0.)),
    "no decay of the table": dict(optim=dict(table_weight_decay=0.)),
    "rows as they are": dict(optim=dict(even_rows=False)),
    "one triple for all steps": dict(optim=dict(polar=False)),
    "no clipping": dict(clip=0.),
    "momentum 0.95": dict(momentum=.95),
    "beta2 0.95": dict(optim=dict(beta2=.95)),
    "repeats a step early": dict(switch=5/12),
    "repeats never": dict(switch=.999),
    "no borders of documents": dict(bos=-1),
    "longer segments": dict(longest=96),
    "one stream": dict(model=dict(lanes=None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_breaks_a_limit(g, fault):
    found = distances(g, **FAULTS[fault])
    assert any(found[k] > limit for k, limit in LIMITS.items()), found


def test_another_average_shows(g):
    assert distances(g, decay=.99)["ema"] > LIMITS["delta"]


@pytest.mark.parametrize("i", range(3))
def test_muon_takes_the_published_steps(golden, i):
    "Momentum in bfloat16 and Polar Express; a float32 momentum would be up to 7 % off."
    z = golden("frontier_functions")
    h = json.loads(str(z["muon/hyper"]))["muon1855"]
    stack = torch.from_numpy(z[f"muon1855/{i}/p0"])
    params = [torch.nn.Parameter(m.clone()) for m in stack.reshape(-1, *stack.shape[-2:])]
    opt = Muon(params, lr=h["lr"], momentum=h["momentum"], weight_decay=h["weight_decay"],
        ns_steps=h["steps"], even=True, polar=True, half=True)
    for k in (1, 2, 3):
        before, want = (torch.from_numpy(z[f"muon1855/{i}/p{j}"]) for j in (k-1, k))
        grads = torch.from_numpy(z[f"muon1855/{i}/g{k}"])
        for p, g in zip(params, grads.reshape(-1, *stack.shape[-2:])): p.grad = g
        opt.step()
        got = torch.stack([p.detach() for p in params]).view_as(want)
        assert (got-want).norm() <= 1e-6*(want-before).norm()


def test_a_momentum_in_bfloat16_survives_a_resume():
    "An optimizer's state is loaded in the dtype of the parameter; the next step sets it right."
    gen = torch.Generator().manual_seed(0)
    def made(): return torch.nn.Parameter(torch.ones(8, 8))
    p, q = made(), made()
    one, two = (Muon([w], lr=.1, even=True, polar=True, half=True) for w in (p, q))
    for k in range(4):
        p.grad = torch.randn(8, 8, generator=gen)
        q.grad = p.grad.clone()
        one.step(); two.step()
        two.load_state_dict(two.state_dict())
    assert torch.equal(p, q)
