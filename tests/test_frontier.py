"Even-row Muon, Polar Express and the fused loss against the published numbers; two ranks."
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from golden_steps import LAST_BITS
from pgolf.model.softcap import softcapped_loss
from pgolf.train.frontier import EvenMuon
from pgolf.train.muon import newton_schulz, polar_express

SYSTEMS = {"muon1394": {}, "muon1855": dict(polar=True, half_state=True)}


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("system", SYSTEMS)
def test_three_steps_are_the_published_ones(golden, plain_products, system, i):
    z = golden("frontier_functions")
    h = json.loads(str(z["muon/hyper"]))[system]
    p = nn.Parameter(torch.from_numpy(z[f"{system}/{i}/p0"].copy()))
    opt = EvenMuon([p], lr=h["lr"], momentum=h["momentum"], weight_decay=h["weight_decay"],
        ns_steps=h["steps"], **SYSTEMS[system])
    for k in (1, 2, 3):
        before = torch.from_numpy(z[f"{system}/{i}/p{k-1}"])
        want = torch.from_numpy(z[f"{system}/{i}/p{k}"])
        p.grad = torch.from_numpy(z[f"{system}/{i}/g{k}"])
        opt.step()
        assert (p-want).norm() <= LAST_BITS*(want-before).norm()


@pytest.mark.parametrize("i", range(3))
def test_polynomials_are_the_published_ones(golden, plain_products, i):
    z = golden("frontier_functions")
    G = torch.from_numpy(z[f"ns/{i}/in"])
    for f, key in ((newton_schulz, "out1394"), (polar_express, "out1855")):
        got, want = f(G).float(), torch.from_numpy(z[f"ns/{i}/{key}"])
        assert torch.equal(got, want) or LAST_BITS > 1e-6
        assert (got-want).norm() <= LAST_BITS*want.norm()


def test_fused_loss_and_its_gradient_are_the_published_ones(golden):
    z = golden("frontier_functions")
    x = torch.from_numpy(z["fused_ce/x"].copy()).requires_grad_()
    loss = softcapped_loss(x, torch.from_numpy(z["fused_ce/t"]), block=16)
    loss.mean().backward()
    np.testing.assert_allclose(loss.detach(), z["fused_ce/loss"], rtol=1e-6, atol=6e-6)
    np.testing.assert_allclose(x.grad, z["fused_ce/grad"], rtol=1e-5, atol=1e-7)


def test_gradient_of_the_fused_loss_by_differences():
    z = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))*20
    t, h = torch.tensor([0, 6, 3]), .02
    z = z.float().requires_grad_()
    softcapped_loss(z, t, 30., 4).sum().backward()
    for i in range(3):
        for j in range(7):
            ends = [torch.nn.functional.cross_entropy(30*torch.tanh((z.detach().double()
                + d*torch.eye(7, dtype=torch.float64)[j]*(torch.arange(3) == i)[:, None])/30), t,
                reduction="sum") for d in (h, -h)]
            assert z.grad[i, j].item() == pytest.approx(((ends[0]-ends[1])/2/h).item(), abs=1e-4)


SHAPES = [(4, 32, 32), (64, 32), (3, 16, 32), (64, 32)]


def solve(rank=0, world=1, **settings):
    gen = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=gen)) for s in SHAPES]
    opt = EvenMuon(params, lr=.02, weight_decay=.1, rank=rank, world=world, **settings)
    for _ in range(3):
        for p in params: p.grad = torch.randn(p.shape, generator=gen)
        opt.step()
    return [p.detach() for p in params]


def _rank(rank, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=world)
    torch.save({s: solve(rank, world, **kw) for s, kw in SYSTEMS.items()}, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_take_the_steps_of_one(tmp_path):
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path/f"{r}.pt") for r in (0, 1))
    for system, settings in SYSTEMS.items():
        for a, b, c in zip(first[system], second[system], solve(**settings), strict=True):
            assert torch.equal(a, b)
            assert (a-c).norm() <= 1e-3*c.norm()
