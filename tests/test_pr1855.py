"""PR #1855: losses, logits and gradients of its own code (golden/pr1855.npz), twelve steps of it
(golden/train_pr1855.npz) under its limits with planted faults; its recipe against its sheet; a tiny
run to an audited score."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import golden_steps
from golden_steps import LAST_BITS, LIMITS
from pgolf.game.loaders import cumulative_lengths, segment_starts
from pgolf.game.shards import write_shard
from pgolf.model.gpt import GPT, ModelConfig, count_parameters
from pgolf.squeeze.artifact import peek
from pgolf.submit import script
from pgolf.systems import pipeline
from pgolf.systems.great import PR1394
from pgolf.systems.recipe import load_recipe
from pgolf.systems.recipes import at_scale, parent_of
from pgolf.systems.summit import PR1855
from pgolf.systems.verdict import audit_run
from pgolf.train import loop
from pgolf.train.device import Ranks
from pgolf.train.frontier import DecayTaper, from_banks, to_banks
from pgolf.train.listeners import LongerSegments
from pgolf.train.listeners import OrderSwitch
from pgolf.train.loop import make_loader, train
from pgolf.train.muon import Muon, make_optimizers

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
    training = model.train().loss(x, y, *borders).item()  # nothing differs between the modes
    assert training == pytest.approx(float(z[part+"train_loss"]), rel=1e-5)
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


def distances(g, model={}, rows={}, **faults):
    "Of twelve steps, with faults if asked for."
    m = build(g, "param0/")
    for name, value in model.items(): setattr(m, name, value)
    rows = Rows(g, json.loads(str(g["hyper"])), **rows)
    return golden_steps.distances(g, m, rows, PR1855.optim, named=in_banks, **faults)


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


def test_twelve_steps_are_the_published_ones(g, plain_products):
    found = distances(g)
    assert all(found[k] <= limit for k, limit in LIMITS.items()), found
    assert found["ema"] <= LIMITS["delta"], found


FAULTS = {
    "no decay of scalars": dict(changes=dict(adam_weight_decay=0.)),
    "no decay in Muon": dict(changes=dict(muon_weight_decay=0.)),
    "no decay of the table": dict(changes=dict(table_weight_decay=0.)),
    "rows as they are": dict(changes=dict(even_rows=False)),
    "one triple for all steps": dict(changes=dict(polar=False)),
    "no clipping": dict(clip=0.),
    "momentum 0.95": dict(momentum=.95),
    "beta2 0.95": dict(changes=dict(beta2=.95)),
    "repeats a step early": dict(switch=5/12),
    "repeats never": dict(switch=.999),
    "no borders of documents": dict(rows=dict(bos=-1)),
    "longer segments": dict(rows=dict(longest=96)),
    "one stream": dict(model=dict(lanes=None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_breaks_a_limit(g, plain_products, fault):
    found = distances(g, **FAULTS[fault])
    assert any(found[k] > limit for k, limit in LIMITS.items()), found


def test_another_average_shows(g, plain_products):
    assert distances(g, decay=.99)["ema"] > LIMITS["delta"]


@pytest.mark.parametrize("i", range(3))
def test_muon_takes_the_published_steps(golden, plain_products, i):
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
        assert (got-want).norm() <= LAST_BITS*(want-before).norm()


def test_a_momentum_in_bfloat16_survives_a_resume():
    "An optimizer's state is loaded in the dtype of the parameter; the next step sets it right."
    gen = torch.Generator().manual_seed(0)
    def made(): return torch.nn.Parameter(torch.ones(8, 8))
    p, q = made(), made()
    one, two = (Muon([w], lr=.1, even=True, polar=True, half=True) for w in (p, q))
    for _ in range(4):
        p.grad = torch.randn(8, 8, generator=gen)
        q.grad = p.grad.clone()
        one.step(); two.step()
        two.load_state_dict(two.state_dict())
    assert torch.equal(p, q)


# ---- the recipe

def test_the_recipe_is_the_table_of_its_sheet(shared):
    "Sections 2 and 5 of the sheet, line by line."
    sheet = " ".join((shared/"spec"/"pr1855.md").read_text().split())
    r, m, s = PR1855, PR1855.model, PR1855.schedule
    for line in (
        f"batch {r.train.train_batch_tokens:,} = one packed row of"
            f" {r.train.train_batch_tokens//r.train.num_spans:,} per rank, segments <="
            f" {r.train.train_seq_len:,} |",
        f"{m.num_layers} x {m.model_dim}, heads {m.num_heads}/{m.num_kv_heads}, MLP"
            f" {m.mlp_hidden:,} ({m.mlp_mult}), LeakyReLU(0.5)^2, tied (std"
            f" {m.tied_embed_init_std}), softcap {m.logit_softcap:g}, RoPE {m.rope_dims} dims",
        f"q gain {m.qk_gain_init}, XSA on all {m.xsa_last_n}, skip gates on |",
        f"3..5, num_loops 2, enable at {r.stages.order_from} |",
        f"parallel_start_layer {m.parallel_start}, final lane mean |",
        f"gate_window {m.gate_window}; sparse_attn_gate on*, init std 0, scale {m.gate_slope}*;",
        f"lr {r.optim.matrix_lr}, momentum {s.muon_momentum} ({s.muon_momentum_warmup_start} over"
            f" {s.muon_momentum_warmup_steps:,} steps), {r.optim.ns_steps} Polar Express steps, row"
            f" normalise, wd {r.optim.muon_weight_decay} |",
        f"embedding lr {r.optim.tied_embed_lr} wd {r.optim.table_weight_decay}; scalars lr"
            f" {r.optim.scalar_lr} wd {r.optim.adam_weight_decay}; betas ({r.optim.beta1},"
            f" {r.optim.beta2}*), eps 1e-8; clip {r.train.grad_clip_norm} |",
        f"warmdown {s.warmdown_ratio}*, min_lr {s.min_lr}*, cap 600 s, reserve 0.5*, warm-up"
            f" {r.train.warmup_steps},",
        f"| EMA | {r.stages.ema_decay} |",
    ): assert line in sheet, line
    assert s.max_wallclock_seconds == 600-.5 and m.vocab_size == 8192 and m.smear_window == 12
    assert m.order == (*range(6), 3, 4, 5, 3, 4, 5, *range(6, 11)) and m.rope_train_seq_len == 0
    assert (m.output_gate, m.parallel, r.optim.polar, r.optim.half_momentum, r.optim.even_rows,
        r.train.loader, r.train.clip_each_rank) == ("sparse", "lanes", True, True, True, "packed",
        True)
    logged = {c.stage: c.logged for c in r.claims}
    for stage, of_seeds in dict(averaged=(1.06395844, 1.06544819, 1.06596989), artifact=(1.07254371,
        1.07406724, 1.07477929), adapted=(1.05989454, 1.06124613, 1.06208695)).items():
        assert all(f"{x:.8f}" in sheet for x in of_seeds)
        assert logged[stage] == round(sum(of_seeds)/3, 5)
    assert r.claims[-1].bytes_logged == round((15_897_259+15_900_947+15_907_550)/3)
    assert sum(count_parameters(m).values()) == 35_945_671 and parent_of(r).name == "pr1394"


def test_the_floor_binds_where_the_sheet_says():
    s = PR1855.schedule
    def at(share): return s.lr_scale(100, share*s.max_wallclock_seconds)
    assert at(.149) == 1 and at(.5) == pytest.approx(.5/.85) and at(.92) == at(1) == .1
    assert at(.914) > .1 and [s.momentum(k) for k in (0, 1500, 4000)] == [.92, .97, .97]


@pytest.mark.parametrize("scale", ["tiny", "mini", "pocket", "full"])
def test_every_scale_has_lanes_at_its_end_in_both_orders(scale):
    m = at_scale(PR1855, scale).model
    start = m.parallel_start
    assert 0 < start < m.num_layers and len(m.order) > m.num_layers
    for order in (m.order, tuple(range(m.num_layers))):
        first = order.index(start)
        assert first >= len(order)//2 and min(order[first:]) == start


def test_lanes_in_the_encoder_are_an_error():
    small = dict(num_layers=4, model_dim=32, num_heads=2, num_kv_heads=1, parallel="lanes")
    for start, order in ((1, ()), (2, (0, 1, 2, 1, 2, 3))):
        with pytest.raises(ValueError, match=f"parallel_start={start} must be a block of the dec"):
            ModelConfig(**small, parallel_start=start, layer_order=order)
    for field, value in (("output_gate", "wide"), ("parallel", "both"), ("gate_window", 0),
        ("smear_window", 33), ("asymmetric_cap", True)):
        with pytest.raises(ValueError, match=f"{field}="):
            ModelConfig(**small | dict(parallel_start=3, logit_softcap=0., output_gate="sparse",
                gate_window=9) | {field: value})


# ---- its settings in a run

@pytest.fixture
def shards(tmp_path):
    "Documents of ten tokens on average."
    gen = np.random.default_rng(0)
    for i in range(2):
        ids = gen.integers(2, 64, 4000, np.uint16)
        ids[gen.random(4000) < .1] = 1
        write_shard(tmp_path/f"s_train_{i:06d}.bin", ids)
    return sorted(tmp_path.glob("*.bin"))


def tiny(**changes):
    return at_scale(PR1855, "tiny").but(vocab_size=64, train_batch_tokens=256, train_seq_len=32,
        warmup_steps=0, checkpoint_every=0, compile=False, **changes)


def test_a_packed_step_is_the_mean_over_its_documents(shards):
    "Borders reach the loss: each document by itself gives the same sum of losses."
    r = tiny(smear_window=0)
    model = GPT(r.model)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn(p.shape, generator=gen))
    loader = make_loader(shards, r.train, Ranks(), vocab_size=64)
    run = loop._prepare(model, loader, r.optim, r.schedule, r.train, [], Ranks(), None)
    total = loop.forward_backward(run, model.loss)
    loader.position, alone = 0, 0.
    for x, y, cu, longest in loader.next_step():
        assert longest == 32 and x.shape == (1, 128)
        for a, b in zip(cu.unique().tolist(), cu.unique().tolist()[1:]):
            alone += model.loss(x[:, a:b], y[:, a:b]).item()*(b-a)
    assert alone/256 == pytest.approx(float(total), rel=1e-5)


def test_a_packed_run_goes_on_from_a_checkpoint(shards, tmp_path):
    r = tiny(iterations=6)
    def go(steps, resume=None):
        model = GPT(r.model, 1)
        class Stop:
            def after_step(self, run): run.interrupted = run.step == steps
        out = tmp_path/f"{steps}"
        done = train(model, make_loader(shards, r.train), r.optim, r.schedule, r.train, [Stop()],
            out=out, resume=resume)
        return model, done
    whole, _ = go(0)
    _, part = go(3)
    rest, _ = go(0, part.checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters()))


def test_the_repeats_are_rehearsed_in_packed_rows(shards):
    r, ran = tiny(), []
    model = GPT(r.model)
    run = loop._prepare(model, make_loader(shards, r.train), r.optim, r.schedule, r.train,
        [OrderSwitch(r.stages.order_from)], Ranks(), None)
    run.call("on_start")
    def loss(*part):
        ran.append((model.order, len(part)))
        return model.loss(*part)
    loop.warm_up(run, loss, compiled=True)
    assert {o for o, _ in ran} == {(0, 1, 2), r.model.layer_order} and {n for _, n in ran} == {4}
    assert run.loader.position == 0


@pytest.mark.slow
def test_one_graph_with_lanes_and_gates():
    "What is compiled on a card breaks nowhere, with borders left to a kernel of one call."
    from pgolf.model import gpt
    model = GPT(tiny().model)
    def one_call(q, k, v, cu, longest):
        k, v = (t.repeat_interleave(2, 2) for t in (k, v))
        of = torch.searchsorted(cu, torch.arange(q.shape[1], dtype=cu.dtype), right=True)
        seen = (of[:, None] == of).tril()
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)
    ids = torch.randint(1, 64, (1, 65), generator=torch.Generator().manual_seed(0))
    starts = segment_starts(ids[0, :-1].numpy(), 1, 32)
    part = ids[:, :-1], ids[:, 1:], cumulative_lengths(starts, 64), 32
    want = model.loss(*part)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(gpt, "attend_segments", one_call)
        torch._dynamo.reset()
        loss = torch.compile(model.loss, backend="eager", fullgraph=True)
        for order in (tuple(range(3)), model.cfg.order):
            model.order = order
            torch.testing.assert_close(loss(*part), model.loss(*part))
    torch.testing.assert_close(want, model.loss(*part))


@pytest.mark.parametrize("own", [True, False])
def test_each_rank_clips_its_own_gradient_before_the_average(shards, monkeypatch, own):
    r = tiny(clip_each_rank=own, grad_clip_norm=1e-3)
    model, seen = GPT(r.model), []
    loader = make_loader(shards, r.train, Ranks(1, 2), vocab_size=64)
    run = loop._prepare(model, loader, r.optim, r.schedule, r.train, [], Ranks(1, 2), None)
    def average(params, loss, world):
        grads = [p.grad for p in params if p.grad is not None]
        seen.append(torch.nn.utils.get_total_norm(grads).item())
        return loss
    monkeypatch.setattr(loop, "average_gradients", average)
    loop.forward_backward(run, model.loss)
    assert (seen[0] == pytest.approx(1e-3, rel=1e-2)) == own and (seen[0] > .1) != own


def test_a_decay_that_tapers_is_a_setting_of_runs_and_scripts():
    r = tiny(taper_from=.7)
    heard = pipeline.make_listeners(SimpleNamespace(recipe=r, progress=False), None)
    tapers = [l for l in heard if isinstance(l, DecayTaper)]
    assert [(t.start, t.end) for t in tapers] == [(.7, .5)]
    assert "OrderSwitch(0.35), DecayTaper(0.7), average, Log()" in script.entry_script(r)
    assert "DecayTaper" not in script.entry_script(tiny())
    with pytest.raises(ValueError, match="taper_from=1"): tiny(taper_from=1.)


def test_limits_of_segments_are_a_setting_of_runs_files_and_scripts(tmp_path):
    r = tiny(lengths=[[0, .5], [.25, 1]])
    heard = pipeline.make_listeners(SimpleNamespace(recipe=r, progress=False), None)
    [longer] = [l for l in heard if isinstance(l, LongerSegments)]
    n = r.train.train_seq_len
    assert longer.limits == [(0, n//2), (.25, n)]
    assert f"LongerSegments({r.stages.lengths}, TRAIN.train_seq_len)" in script.entry_script(r)
    assert "LongerSegments" not in script.entry_script(tiny())
    r.save(tmp_path/"recipe.json")
    assert load_recipe(tmp_path/"recipe.json") == r
    saved = json.loads((tmp_path/"recipe.json").read_text())
    del saved["stages"]["lengths"]                    # written before the setting was there
    (tmp_path/"old.json").write_text(json.dumps(saved))
    assert load_recipe(tmp_path/"old.json") == r.but(lengths=())
    with pytest.raises(ValueError, match="begin with 0"): tiny(lengths=[[.1, 1]])
    with pytest.raises(ValueError, match="set loader='packed'"):
        pipeline.check_recipe(r.but(loader="spans"))


def test_only_the_table_is_bfloat16():
    model = GPT(at_scale(PR1855, "tiny").model)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16} == {
        "tok_emb.weight"}


@pytest.mark.slow
def test_a_tiny_run_ends_in_an_audited_score(novels, tmp_path):
    r = at_scale(PR1855, "tiny").but(iterations=12, warmup_steps=0)
    job = pipeline.start(r, novels, tmp_path/"run", "cpu", 512, progress=False)
    report = pipeline.run(job)
    assert report.result["targets"] == 512
    meta, _ = peek(job.artifact)
    assert meta["model"]["parallel"] == "lanes" and meta["model"]["output_gate"] == "sparse"
    assert "fused_loss" in meta["model"] and "asymmetric_cap" not in meta["model"]
    assert audit_run(job.out, novels)["passed"]


@pytest.mark.slow
def test_the_plan_is_made_at_full_size(main):
    code, said, err = main("plan", "pr1855")
    assert code == 0 and "35,945,671" in said, err
    assert PR1855.model.order != PR1394.model.order
