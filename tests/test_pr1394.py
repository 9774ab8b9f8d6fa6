"""PR #1394: twelve steps of its own code (golden/train_pr1394.npz) under its limits, with planted
faults; its recipe against its sheet; a tiny run to an audited score."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import golden_steps
from golden_steps import LAST_BITS, LIMITS
from pgolf.game.loaders import ShuffledLoader
from pgolf.game.shards import write_shard
from pgolf.model.gpt import GPT, count_parameters
from pgolf.squeeze.artifact import ArtifactError, pack, peek, unpack
from pgolf.squeeze.calibration import shuffled_windows
from pgolf.squeeze.quant import Grid, candidate_scales, int_grid
from pgolf.squeeze.sdclip import clip_scale
from pgolf.systems import pipeline
from pgolf.systems.great import PR1394
from pgolf.systems.plan import estimate_bytes
from pgolf.systems.recipes import at_scale
from pgolf.systems.verdict import audit_run
from pgolf.train import loop
from pgolf.train.device import Ranks
from pgolf.train.listeners import OrderSwitch
from pgolf.train.loop import LOADERS, TrainConfig, make_loader
from pgolf.train.muon import Muon, make_optimizers

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- twelve steps

@pytest.fixture(scope="module")
def g(golden): return golden("train_pr1394")


def small(g):
    "The recipe's model at the size of the golden file, with the golden weights."
    c = json.loads(str(g["config"]))
    order = (0, 1, 2, 3, 2, 3, 2, 3, 4, 5, 6)
    named = {k: c[k] for k in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads",
        "mlp_mult", "rope_dims", "xsa_last_n")}
    model = GPT(replace(PR1394.model, **named, layer_order=order, bf16_names=""))
    model.load_state_dict({n: torch.from_numpy(g[f"param0/{n}"]) for n in model.state_dict()})
    return model


class Rows:
    "The golden batches, step by step."
    def __init__(self, g, h):
        self.ids, self.position = torch.from_numpy(g["ids"].astype(np.int64)), 0
        self.shape = h["batch"], h["seq_len"]
    def next_step(self):
        n = self.shape[0]*self.shape[1]
        span = self.ids[self.position*n:(self.position+1)*n+1]
        self.position += 1
        return [(span[:-1].view(self.shape), span[1:].view(self.shape))]


def distances(g, **faults):
    "Of twelve steps, with faults if asked for."
    rows = Rows(g, json.loads(str(g["hyper"])))
    return golden_steps.distances(g, small(g), rows, PR1394.optim, **faults)


def test_hyperparameters_and_groups_are_the_recipes(g):
    h, o = json.loads(str(g["hyper"])), PR1394.optim
    assert (o.matrix_lr, o.tied_embed_lr, o.scalar_lr) == (h["matrix_lr"], h["tied_embed_lr"],
        h["scalar_lr"])
    assert (o.muon_weight_decay, o.table_weight_decay, o.adam_weight_decay) == (h["muon_wd"],
        h["embed_wd"], h["adam_wd"])
    assert (o.beta1, o.beta2, o.adam_eps, o.ns_steps, o.even_rows) == (h["beta1"], h["beta2"],
        h["adam_eps"], h["muon_backend_steps"], h["muon_row_normalize"])
    assert (PR1394.train.grad_clip_norm, PR1394.stages.ema_decay) == (h["grad_clip"],
        h["ema_decay"])
    model = small(g)
    names = {id(p): n for n, p in model.named_parameters()}
    ours = [{names[id(p)] for p in group["params"]} for opt in make_optimizers(model, o)
        for group in opt.param_groups]
    assert ours == [set(h["groups"][k]) for k in ("muon", "adam_embed", "adam_scalar")]


def test_twelve_steps_are_the_published_ones(g, plain_products):
    found = distances(g)
    assert all(found[k] <= limit for k, limit in LIMITS.items()), found
    assert found["ema"] <= LIMITS["delta"], found


FAULTS = {
    "no decay of scalars": dict(changes=dict(adam_weight_decay=0.)),
    "no decay in Muon": dict(changes=dict(muon_weight_decay=0.)),
    "no decay of the table": dict(changes=dict(table_weight_decay=0.)),
    "rows as they are": dict(changes=dict(even_rows=False)),
    "rows of the result": dict(changes=dict(even_rows=False, row_norm=True)),
    "no clipping": dict(clip=0.),
    "momentum 0.94": dict(momentum=.94),
    "beta2 0.99": dict(changes=dict(beta2=.99)),
    "repeats a step early": dict(switch=5/12),
    "repeats from the start": dict(switch=0),
    "repeats never": dict(switch=.999),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_breaks_a_limit(g, plain_products, fault):
    found = distances(g, **FAULTS[fault])
    assert any(found[k] > limit for k, limit in LIMITS.items()), found


def test_another_average_shows(g, plain_products):
    assert distances(g, decay=.99)["ema"] > LIMITS["delta"]


@pytest.mark.parametrize("i", range(3))
def test_muon_with_even_rows_takes_the_published_steps(golden, plain_products, i):
    "Bit for bit where a CPU adds alike; matrix 0 has a row whose gradient is zero."
    z = golden("frontier_functions")
    h = json.loads(str(z["muon/hyper"]))["muon1394"]
    p = torch.nn.Parameter(torch.from_numpy(z[f"muon1394/{i}/p0"].copy()))
    opt = Muon([p], lr=h["lr"], momentum=h["momentum"], weight_decay=h["weight_decay"],
        ns_steps=h["steps"], even=True)
    for k in (1, 2, 3):
        p.grad = torch.from_numpy(z[f"muon1394/{i}/g{k}"])
        before, want = (torch.from_numpy(z[f"muon1394/{i}/p{j}"]) for j in (k-1, k))
        opt.step()
        assert torch.equal(p.detach(), want) or LAST_BITS > 1e-6
        assert (p.detach()-want).norm() <= LAST_BITS*(want-before).norm()


# ---- the recipe

def test_the_recipe_is_the_table_of_its_sheet(shared):
    "Section 2 of the sheet, line by line."
    sheet = " ".join((shared/"spec"/"pr1394.md").read_text().split())
    r, m = PR1394, PR1394.model
    for line in (
        f"| layers / d / heads / kv heads / head dim | {m.num_layers} / {m.model_dim} /"
            f" {m.num_heads} / {m.num_kv_heads} / {m.head_dim} |",
        f"MLP | {m.mlp_mult} x {m.model_dim} = {m.mlp_hidden}, LeakyReLU(0.5) squared |",
        f"softcap | {m.logit_softcap:g} |",
        f"first {m.rope_dims} of 64 dims, trained length {m.rope_train_seq_len} |",
        f"q gain init | {m.qk_gain_init} |",
        f"enable at | frac {r.stages.order_from} |",
        f"Muon lr / wd / momentum / steps | {r.optim.matrix_lr} / {r.optim.muon_weight_decay} /"
            f" {r.schedule.muon_momentum} (from {r.schedule.muon_momentum_warmup_start} over"
            f" {r.schedule.muon_momentum_warmup_steps:,} steps) / {r.optim.ns_steps}; row"
            " normalisation on |",
        f"embedding AdamW | lr {r.optim.tied_embed_lr}, wd {r.optim.table_weight_decay} |",
        f"scalar AdamW | lr {r.optim.scalar_lr}, wd {r.optim.adam_weight_decay} |",
        f"gradient clip | {r.train.grad_clip_norm} |",
        f"warmdown_frac / min_lr | {r.schedule.warmdown_ratio} / {r.schedule.min_lr:g} |",
        f"EMA | {r.stages.ema_decay} |",
        f"calibration | {r.gptq.samples//48} batches |",
        f"compressor | {r.stages.codec} |",
    ): assert line in sheet, line
    assert r.schedule.max_wallclock_seconds == 600-12
    assert [(g.lo, g.hi, g.sigmas) for _, g in r.quant.rules] == [(-31, 31, 12.85), (-127, 127, 20)]
    assert r.train.train_batch_tokens == 8*48*2048 and m.vocab_size == 8192
    assert m.order == (0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 6, 7, 8, 9, 10)
    assert r.claims[-1].logged == 1.08562 and r.claims[-1].bytes_logged == 15_985_678
    assert sum(count_parameters(m).values()) == 35_943_512


def test_only_the_table_is_bfloat16():
    with torch.device("meta"): model = GPT(at_scale(PR1394, "tiny").model)
    assert model.tok_emb.weight.dtype == torch.float32  # nothing is drawn on the meta device
    model = GPT(at_scale(PR1394, "tiny").model)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16} == {
        "tok_emb.weight"}
    for p in model.parameters(): assert torch.equal(p, p.bfloat16().to(p.dtype))


# ---- its settings

@pytest.mark.parametrize("bits, k", [(6, 12.85), (8, 20.)])
def test_a_grid_in_standard_deviations_is_sdclip(bits, k):
    gen = torch.Generator().manual_seed(bits)
    W = torch.randn(40, 96, generator=gen)*torch.logspace(-6, 2, 40)[:, None]
    W[3], W[5] = 0, .25
    scale = candidate_scales(W, int_grid(bits, sigmas=k))
    want = (k*W.std(1, keepdim=True)/int_grid(bits).hi).half().float()
    want[3], want[5] = 0, torch.tensor(.25/int_grid(bits).hi).half()
    assert torch.equal(scale[0], want) and torch.equal(clip_scale(W, k, int_grid(bits)), want)
    with pytest.raises(ValueError, match="sigmas=20"): Grid(sigmas=20., scale_per="tensor")


@pytest.fixture
def shards(tmp_path):
    gen = np.random.default_rng(0)
    for i in range(4):
        write_shard(tmp_path/f"s_train_{i:06d}.bin", gen.integers(0, 64, 3000+100*i, np.uint16))
    return sorted(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("world", [1, 2])
def test_shuffled_rows_come_through_the_loop_and_into_calibration(shards, world):
    cfg = TrainConfig(train_batch_tokens=512, train_seq_len=32, num_spans=4, loader="shuffled")
    loader = make_loader(shards, cfg, Ranks(0, world), vocab_size=64)
    plain = ShuffledLoader(shards, 512, 32, 0, world)
    seen = []
    for _ in range(3):
        micros, (x, y) = loader.next_step(), plain.next_batch()
        assert len(micros) == 4//world
        for part, whole in zip(zip(*micros), (x, y)): assert torch.equal(torch.cat(part), whole)
        seen.append(x)
    class Data: train_shards, vocab_size, path = shards, 64, "here"
    assert torch.equal(shuffled_windows(Data, 64, 3*len(x), 32, world), torch.cat(seen))
    assert set(LOADERS) == {"spans", "shuffled", "packed", "strides", "segments"}


def test_brotli_stores_what_it_is_given_and_best_leaves_it_out():
    gen = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(40, 8, generator=gen).half(),
        "b": (9*torch.randn(64, 32, generator=gen)).to(torch.int8)}
    data = pack(tensors, codec="brotli")
    back = unpack(data)[0]
    assert all(torch.equal(t, back[n]) for n, t in tensors.items()) and data != pack(tensors)
    assert pack(tensors, codec="best") == pack(tensors, codec="best")
    assert b'brotli' not in pack(tensors, codec="best")
    for i in range(0, len(data), 7):
        with pytest.raises(ArtifactError): unpack(data[:i]+bytes([data[i]^1])+data[i+1:])


@pytest.mark.slow
def test_a_tiny_run_ends_in_an_audited_score(novels, tmp_path):
    r = at_scale(PR1394, "tiny").but(iterations=12, warmup_steps=0)
    job = pipeline.start(r, novels, tmp_path/"run", "cpu", 512, progress=False)
    report = pipeline.run(job)
    assert (report.result["stage"], report.result["targets"]) == ("sliding", 512)
    meta, rows = peek(job.artifact)
    assert tuple(meta["model"]["layer_order"]) == r.model.layer_order != ()
    assert {row.name for row in rows if row.kind == "codes"} >= {"tok_emb.weight"}
    assert audit_run(job.out, novels)["passed"]


def test_the_plan_foresees_the_logged_bytes():
    "Mean of the five files that were logged."
    assert sum(b for *_, b in estimate_bytes(PR1394)) == pytest.approx(15_970_162, rel=.01)


def test_the_repeats_are_rehearsed_before_the_clock_starts(shards):
    "Where the loss is compiled, the warm-up takes a step in either order and undoes both."
    r = at_scale(PR1394, "tiny").but(vocab_size=64, warmup_steps=0, checkpoint_every=0)
    model, ran = GPT(r.model), []
    start = {n: t.clone() for n, t in model.state_dict().items()}
    run = loop._prepare(model, make_loader(shards, r.train), r.optim, r.schedule, r.train,
        [OrderSwitch(r.stages.order_from)], Ranks(), None)
    run.call("on_start")
    def loss(ids, targets):
        ran.append(model.order)
        return model.loss(ids, targets)
    loop.warm_up(run, loss, compiled=True)
    assert set(ran) == {(0, 1, 2), r.model.layer_order} and model.order == (0, 1, 2)
    assert all(torch.equal(t, start[n]) for n, t in model.state_dict().items())
    assert run.loader.position == 0
