"""Faults of the paths that only a card takes, each shown without one."""

import types
from unittest.mock import patch

import pytest
import torch
from torch import nn

from pgolf.model.attention import attend, many_lengths
from pgolf.squeeze.budget import metrics
from pgolf.squeeze.quant import Grid, LateQAT, candidate_scales, int_grid, to_half
from pgolf.speed.peer import Peer, _compile_newton_schulz, as_its_main
from pgolf.train import device


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
    from pgolf.model.layers import CastLinear
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
