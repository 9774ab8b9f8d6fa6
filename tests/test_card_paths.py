"""Faults of the paths that only a card takes, each shown without one."""

import types
from unittest.mock import patch

import pytest
import torch
import test_golden_model
from test_golden_model import ODD, batch, build, check_gradients
from torch import nn

from pgolf.model import attention, gpt
from pgolf.model.attention import attend, many_lengths, share_product
from pgolf.model.gpt import GPT, ModelConfig
from pgolf.model.layers import CastLinear
from pgolf.squeeze.budget import metrics
from pgolf.squeeze.quant import Grid, LateQAT, candidate_scales, int_grid, to_half
from pgolf.speed.peer import Peer, _compile_newton_schulz, as_its_main
from pgolf.systems.recipes import RECIPES, at_scale
from pgolf.train import device, loop, muon
from pgolf.train.device import WIDE, Lag, Ranks
from pgolf.train.muon import OptimConfig
from pgolf.train.schedule import ScheduleConfig


class CastedLinear(nn.Linear): "As the scripts call it."


class Theirs(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_emb = nn.Embedding(8, 4)
        self.c_q = CastedLinear(4, 4, bias=False)
        self.gain = nn.Parameter(torch.ones(4))


def restore(model):
    for p in model.parameters():
        if p.ndim < 2: p.data = p.data.float()


def test_their_model_gets_the_dtypes_of_their_main():
    "Tables bfloat16, matrices float32 (cast where they are used), small ones float32."
    peer = Peer(None, (types.SimpleNamespace(restore_low_dim_params_to_fp32=restore),))
    theirs = Theirs()
    as_its_main(peer, theirs)
    found = {n: p.dtype for n, p in theirs.named_parameters()}
    assert found == {"tok_emb.weight": torch.bfloat16, "c_q.weight": torch.float32,
        "gain": torch.float32}
    as_its_main(Peer(None, (types.SimpleNamespace(),)), other := Theirs())
    assert other.gain.dtype == torch.bfloat16, "a script that restores nothing gets nothing back"


def test_their_newton_schulz_is_compiled():
    module = types.SimpleNamespace(zeropower_via_newtonschulz5=len)
    with patch("torch.compile", lambda fn: ("compiled", fn)):
        _compile_newton_schulz(Peer(None, (module, types.SimpleNamespace())))
    assert module.zeropower_via_newtonschulz5 == ("compiled", len)


def test_what_an_error_costs_is_on_the_device_of_the_weights():
    state = {"a": torch.empty(4, 6, device="meta"), "b": torch.empty(4)}
    found = metrics(state)
    assert list(found) == ["a"] and found["a"].rows.is_meta


@pytest.mark.slow
def test_a_compiled_step_is_rounded():
    "Inductor leaves a cast there and back out; integer arithmetic stays."
    if not device.can_compile("cpu")[0]: pytest.skip("no compiler")
    W, grid = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), Grid(hi=31)
    compiled = torch.compile(candidate_scales)(W, grid)
    assert torch.equal(compiled, candidate_scales(W, grid))
    assert torch.equal(compiled, compiled.half().float())


def test_steps_are_rounded_to_float16_exactly():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    for size in (1., 1e-4, 1e-7, 1e5): assert torch.equal(to_half(x*size), (x*size).half().float())


class Group:
    "What torch.distributed would be asked, in a process that torchrun started."
    def __init__(self): self.asked = {}
    def __call__(self, backend, **kw): self.asked |= dict(backend=backend, **kw)


@pytest.mark.parametrize("kind, rank, expected", [("cuda", 3, "cuda:3"), ("cpu", 3, "cpu")])
def test_a_rank_names_its_card_before_it_joins(monkeypatch, kind, rank, expected):
    "NCCL is told the device, and torch has been set to it."
    group, on = Group(), []
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    d = device.dist
    for name, value in dict(is_initialized=lambda: False, is_torchelastic_launched=lambda: True,
            init_process_group=group, get_rank=lambda: 7, get_world_size=lambda: 8).items():
        monkeypatch.setattr(d, name, value)
    monkeypatch.setattr(torch.cuda, "set_device", on.append)
    ranks = device.setup_ranks(kind)
    assert (ranks.rank, ranks.world, ranks.device) == (7, 8, expected)
    assert on == ([expected] if kind == "cuda" else [])
    assert group.asked.get("device_id") == (torch.device(expected) if kind == "cuda" else None)


def test_a_card_that_is_named_is_the_current_one(monkeypatch):
    on = []
    monkeypatch.setattr(torch.cuda, "set_device", on.append)
    assert device.setup_ranks("cuda:1").device == "cuda:1" and on == ["cuda:1"]
    device.setup_ranks("cuda")
    assert on == ["cuda:1"], "without a number the current one stays"


def test_late_qat_rehearses_and_leaves_no_trace():
    model = nn.Sequential(CastLinear(4, 4))
    run = types.SimpleNamespace(model=model, lr_scale=1.)
    late = LateQAT(.15, ((".*", int_grid(4)),))
    with late.rehearse(run): assert model[0].fake_quant
    assert model[0].fake_quant is None and not late.switched
    run.lr_scale = .1
    late.before_step(run)
    with late.rehearse(run): assert model[0].fake_quant
    assert model[0].fake_quant, "what was on before stays on"


def test_on_a_cpu_no_kernel_is_left_out():
    q = torch.randn(1, 5, 4, 8)
    with many_lengths("cpu"): a = attend(q, q, q)
    assert torch.equal(a, attend(q, q, q))


class OnCard(torch.Tensor):
    "A tensor that says it is on a card, so that code takes the way it would take there."
    is_cuda = True


def test_queries_keys_and_values_share_a_product_in_training_on_a_card_where_no_one_listens():
    layers = [CastLinear(8, n) for n in (8, 4, 4)]
    here = torch.randn(2, 3, 8)
    card = here.as_subclass(OnCard)
    assert share_product(card, layers) and not share_product(here, layers)
    for m in layers: m.eval()
    assert not share_product(card, layers), "scores stay what they are"
    for m in layers: m.train()
    handle = layers[2].register_forward_pre_hook(lambda m, args: None)
    assert not share_product(card, layers), "calibration hears each of them"
    handle.remove()
    assert not share_product(card, [*layers[:2], CastLinear(8, 4, bias=True)])


@pytest.mark.parametrize("name", [n for n in ODD if n != "pr1123"])
def test_training_on_a_card_has_the_published_gradients(golden, name, monkeypatch):
    "One product for queries, keys and values, and the fused loss, against the systems' own code."
    asked, fused, one = [], gpt.softcapped_loss, attention.one_product
    monkeypatch.setattr(gpt, "softcapped_loss", lambda *a: asked.append("loss") or fused(*a))
    monkeypatch.setattr(attention, "one_product", lambda *a: asked.append("product") or one(*a))
    z = golden(name)
    card = tuple(t.as_subclass(OnCard) for t in batch(z))
    monkeypatch.setattr(test_golden_model, "batch", lambda z: card)
    model = build(z, name).train()
    check_gradients(model, z)
    assert asked == ["product"]*len(model.order) + ["loss"]
    asked.clear()
    model.eval().loss(*card)
    assert not asked, "evaluation keeps the plain forms"


@pytest.mark.parametrize("method", [muon.newton_schulz, muon.polar_express])
def test_sums_within_products_are_those_of_the_plain_polynomials(method, monkeypatch):
    g, fused, calls = torch.Generator().manual_seed(0), muon.summed_products, []
    monkeypatch.setattr(muon, "summed_products", lambda *a: calls.append(1) or fused(*a))
    for shape in ((3, 24, 40), (40, 24), (1, 1)):
        G = torch.randn(shape, generator=g)
        plain = method(G, 5, torch.float32)
        assert not calls, "a CPU keeps the published order"
        got = method(G.as_subclass(OnCard), 5, torch.float32).as_subclass(torch.Tensor)
        torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-4)
        assert len(calls) == 5
        calls.clear()


class Mark:
    "An event of a device that has done a step when it is waited for."
    made:list = []
    def __init__(self):
        self.waited = 0
        self.made.append(self)
    def record(self): pass
    def synchronize(self): self.waited += 1


@pytest.mark.parametrize("seconds, waits", [(1e9, True), (0., False)])
def test_a_run_with_a_limit_waits_for_the_step_before_the_last(monkeypatch, seconds, waits):
    monkeypatch.setattr(Mark, "made", [])
    model = GPT(ModelConfig(vocab_size=16, num_layers=1, model_dim=16, num_heads=1, num_kv_heads=1,
        rope_dims=0))
    class Zeros:
        position = 0
        def next_step(self): return [(torch.zeros(1, 8, dtype=torch.long),)*2]
    class Card:
        def on_start(self, run): run.lag = Lag("cuda", Mark)
    cfg = loop.TrainConfig(train_batch_tokens=8, train_seq_len=8, num_spans=1, warmup_steps=0)
    loop.train(model, Zeros(), OptimConfig(), ScheduleConfig(iterations=4, warmdown_iters=0,
        max_wallclock_seconds=seconds), cfg, [Card()])
    assert [m.waited for m in Mark.made] == ([1, 1, 1, 1, 0] if waits else [])


def test_wide_models_train_in_bfloat16_where_a_cpu_has_amx(monkeypatch):
    for amx in (True, False):
        monkeypatch.setattr(device, "has_amx", lambda: amx)
        for width in (WIDE-8, WIDE):
            model = GPT(ModelConfig(vocab_size=16, num_layers=1, model_dim=width, num_heads=4,
                num_kv_heads=1, rope_dims=0))
            loop._prepare(model, None, OptimConfig(), ScheduleConfig(), loop.TrainConfig(), (),
                Ranks(), None)
            wide = amx and width == WIDE
            assert model.compute_dtype == (torch.bfloat16 if wide else torch.float32)


def test_small_runs_do_not_depend_on_the_instructions_of_a_cpu():
    for name, r in RECIPES.items():
        for scale in ("tiny", "pocket"): assert at_scale(r, scale).model.model_dim < WIDE, name
