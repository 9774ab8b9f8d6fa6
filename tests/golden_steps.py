"""Twelve steps of a great system on golden batches, under limits that together catch faults."""

import json
from dataclasses import replace

import numpy as np

from pgolf.train import muon
from pgolf.train.averaging import EMA
from pgolf.train.listeners import OrderSwitch
from pgolf.train.loop import TrainConfig, train
from pgolf.train.muon import make_optimizers
from pgolf.train.schedule import ScheduleConfig

# Bits of a step in bfloat16 are those of a CPU with instructions for it. Another one adds in
# another order; a last bit that differs grows over the products that follow, to 1.9 % of a step
# where it was measured. `tests/test_muon.py` holds both ways of a product to the same 3 %.
LAST_BITS = 1e-6 if muon._multiplies_bf16() else .03
LIMITS = dict(losses=1.2e-4, clip_norms=3e-4, delta=1.2e-3)


class Norms:
    "Norm of the gradient before clipping, each step."
    def __init__(self): self.seen = []
    def after_step(self, run): self.seen.append(run.grad_norm)


def twelve(g, model, rows, optim, named=dict, momentum=None, clip=None, switch=.5, decay=None):
    """Losses, clipping norms, norms of the changes, and those of the average's; faults if asked
    for. `named` turns our tensors into those of the published names."""
    h = json.loads(str(g["hyper"]))
    start = {n: t.clone() for n, t in named(model.state_dict()).items()}
    cfg = TrainConfig(train_batch_tokens=h["batch"]*h["seq_len"], train_seq_len=h["seq_len"],
        num_spans=1, warmup_steps=0, grad_clip_norm=h["grad_clip"] if clip is None else clip)
    flat = ScheduleConfig(iterations=h["steps"], warmdown_iters=0, muon_momentum=momentum or
        h["momentum"], muon_momentum_warmup_steps=0)
    norms, average = Norms(), EMA(h["ema_decay"] if decay is None else decay)
    done = train(model, rows, make_optimizers(model, optim), flat, cfg,
        [*([OrderSwitch(switch)] if switch else []), average, norms])
    def moved(state): return {n: (t-start[n]).norm().item() for n, t in named(state).items()}
    return done.losses, norms.seen, moved(model.state_dict()), moved(average.weights())


def off(got, want): return np.abs(np.array(got)/want - 1).max()


def median_off(moved, g, key):
    want = {n: float(g[f"{key}/{n}"]) for n in moved}
    return np.median([abs(moved[n]/w - 1) for n, w in want.items() if w > 0])


def distances(g, model, rows, optim, changes={}, **faults):
    "How far twelve steps are from the published ones."
    optim = replace(optim, **changes)
    losses, norms, moved, averaged = twelve(g, model, rows, optim, **faults)
    return dict(losses=off(losses, g["losses"]), clip_norms=off(norms, g["clip_norms"]),
        delta=median_off(moved, g, "delta_norm"), ema=median_off(averaged, g, "ema_delta_norm"))
