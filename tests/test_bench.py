"""`pgolf bench`: rows that can be read again, and a published script beside ours, here a stand-in
of our own."""

import json
import os
import re
from textwrap import dedent

import pytest
import torch

from pgolf.speed import bench
from pgolf.speed import growth
from pgolf.speed import peer as peer_module
from pgolf.command.measuring import told
from pgolf.files import find_results
from pgolf.command.options import as_table
from pgolf.speed.timing import Row, bench_figure, bench_table, peak_memory, read_bench
from pgolf.speed.bench import BENCHES, make_case, run_benches
from pgolf.speed.peer import bench_peer, call_by_name, load_peer, peer_bench, profile_peer

pytestmark = pytest.mark.usefixtures("one_thread")

# The naive baseline in our own words, with the parts a benchmark looks for. FAULT is what a test
# puts wrong.
BASELINE = dedent('''
    import math
    import torch
    import torch.nn.functional as F
    from torch import nn
    {imports}

    class Hyperparameters:
        train_seq_len = 1024

    def norm(x): return F.rms_norm(x, (x.shape[-1],))

    class Linear(nn.Linear):
        def __init__(self, n, m): super().__init__(n, m, bias=False)
        def forward(self, x): return F.linear(x, self.weight.to(x.dtype))

    class Attention(nn.Module):
        def __init__(self, d, heads, kv_heads, base, gain):
            super().__init__()
            self.h, self.kv, self.base = heads, kv_heads, base
            narrow = d//heads*kv_heads
            self.c_q, self.proj = Linear(d, d), Linear(d, d)
            self.c_k, self.c_v = Linear(d, narrow), Linear(d, narrow)
            self.q_gain = nn.Parameter(torch.full((heads,), gain))
        def turn(self, x):
            t, half = x.shape[2], x.shape[3]//2
            angle = torch.outer(torch.arange(t), self.base**(-torch.arange(half)/half))
            a, b = x.chunk(2, -1)
            return torch.cat([a*angle.cos() + b*angle.sin(), b*angle.cos() - a*angle.sin()], -1)
        def forward(self, x):
            b, t, d = x.shape
            heads = lambda y, n: y.view(b, t, n, -1).transpose(1, 2)
            q = heads(self.c_q(x), self.h)
            k, v = heads(self.c_k(x), self.kv), heads(self.c_v(x), self.kv)
            q, k = self.turn(norm(q)), self.turn(norm(k))
            q = q*self.q_gain[:, None, None]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.proj(y.transpose(1, 2).reshape(b, t, d))

    class MLP(nn.Module):
        def __init__(self, d, hidden):
            super().__init__()
            self.fc, self.proj = Linear(d, hidden), Linear(hidden, d)
        def forward(self, x): return self.proj(F.relu(self.fc(x)).{square}())

    class Block(nn.Module):
        def __init__(self, d, heads, kv_heads, mult, base, gain):
            super().__init__()
            self.attn, self.mlp = Attention(d, heads, kv_heads, base, gain), MLP(d, mult*d)
            self.attn_scale = nn.Parameter(torch.ones(d))
            self.mlp_scale = nn.Parameter(torch.ones(d))
            self.resid_mix = nn.Parameter(torch.stack([torch.ones(d), torch.zeros(d)]))
        def forward(self, x, x0):
            x = self.resid_mix[0]*x + self.resid_mix[1]*x0
            x = x + self.attn_scale*self.attn(norm(x))
            return x + self.mlp_scale*self.mlp(norm(x))

    class GPT(nn.Module):
        def __init__(self, vocab_size, num_layers, model_dim, num_heads, num_kv_heads, mlp_mult,
            tie_embeddings, tied_embed_init_std, logit_softcap, rope_base, qk_gain_init):
            super().__init__()
            self.cap, self.half = logit_softcap, num_layers//2
            self.tok_emb = nn.Embedding(vocab_size, model_dim)
            args = model_dim, num_heads, num_kv_heads, mlp_mult, rope_base, qk_gain_init
            self.blocks = nn.ModuleList(Block(*args) for _ in range(num_layers))
            self.skip_weights = nn.Parameter(torch.ones(self.half, model_dim))
        def forward_logits(self, ids):
            x = x0 = norm(self.tok_emb(ids))
            stack = []
            for i, block in enumerate(self.blocks):
                if i >= self.half and stack: x = x + self.skip_weights[i-self.half]*stack.pop()
                x = block(x, x0)
                if i < self.half: stack.append(x)
            return self.cap*torch.tanh(F.linear(norm(x), self.tok_emb.weight)/self.cap)
        def forward(self, ids, targets):
            return F.cross_entropy(self.forward_logits(ids).flatten(0, 1), targets.flatten())

    def zeropower_via_newtonschulz5(G, steps=5):
        X = G.bfloat16()/(G.norm() + 1e-7)
        if tall := G.size(0) > G.size(1): X = X.T
        for _ in range(steps):
            A = X @ X.T
            X = 3.4445*X + (-4.7750*A + 2.0315*A @ A) @ X
        return X.T if tall else X

    class Muon(torch.optim.Optimizer):
        def __init__(self, params, lr, momentum, backend_steps, nesterov=True):
            super().__init__(params, dict(lr=lr, momentum=momentum, steps=backend_steps))
        @torch.no_grad()
        def step(self):
            for g in self.param_groups:
                for p in g["params"]:
                    buf = self.state[p].setdefault("buf", torch.zeros_like(p))
                    buf.mul_(g["momentum"]).add_(p.grad)
                    u = zeropower_via_newtonschulz5({update}, g["steps"])
                    p.add_(u.to(p.dtype), alpha=-g["lr"]*max(1, p.size(0)/p.size(1))**.5)

    def eval_val_sliding(args, base_model, rank, world_size, device, val_tokens, base_bytes_lut,
        has_leading_space_lut, is_boundary_token_lut, stride, batch_seqs=32, eval_seq_len=None):
        length, n = eval_seq_len or args.train_seq_len, len(val_tokens) - 1
        total, count = 0., 0
        logits = torch.compile(base_model.forward_logits, dynamic=False)
        with torch.inference_mode():
            for stop in [length, *range(length + stride, n + 1, stride), *{tail}]:
                x, y = val_tokens[stop-length:stop], val_tokens[stop-length+1:stop+1]
                first = 0 if stop == length else length - stride
                nll = F.cross_entropy(logits(x[None])[0], y, reduction="none")[first:]
                total, count = total + nll.double().sum().item(), count + len(nll)
        print("scored")
        return total/count, total/count/math.log(2)

    def quantize_float_tensor(t):
        scale = (t.abs().amax(1)/127).half()
        return (t/scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale

    if __name__ == "__main__": raise SystemExit("main must not run")
    ''')
SETTINGS = dict(num_layers=4, activation="relu2", mlp_mult=2., rope_dims=16, rope_train_seq_len=0,
    xsa_last_n=0, ln_scale=False, skip_init=1., smear=False, bigram_vocab_size=0,
    ve_dim=0, ve_layers=())


def script(folder, imports="", square="square", update='p.grad + g["momentum"]*buf', tail="[]"):
    "The stand-in on disk; the parameters are where tests put in faults."
    path = folder/"train_gpt.py"
    path.write_text(BASELINE.format(imports=imports, square=square, update=update, tail=tail))
    return path


@pytest.fixture(scope="module")
def case(): return make_case("pr610-as-run", "tiny", quick=True, overrides=SETTINGS)


def test_the_coder_stands_beside_the_entropy_of_what_it_codes():
    row = bench.bench_entropy(make_case("pr610", "tiny", quick=True))[0]
    bits, bound = map(float, re.findall(r"\d+\.\d+", row.what))
    assert bound <= bits < 1.02*bound and 4.5 < bound < 4.8  # 4.63: log2 of 6 sqrt(2 pi e)



def test_a_published_script_is_timed_beside_ours(case, tmp_path):
    rows = {r.name: r for r in bench_peer(case, load_peer(script(tmp_path)))}
    for what in ("forward", "forward and backward", "Muon", "sliding", "round to nearest"):
        ours, theirs = rows[f"{what}: ours"], rows[f"{what}: theirs"]
        assert (ours.ratio > 0 and ours.against == "theirs" and ours.work == theirs.work > 0
            and theirs.ratio is None)
    assert rows["forward and backward: theirs"].memory > 0 and "GPTQ: ours" not in rows


def test_sliding_windows_are_compared_one_by_one(case, tmp_path, monkeypatch):
    """A script that runs as many windows again takes twice our time, and per window as long: what
    is compared."""
    def sliding(**changes):
        peer = load_peer(script(tmp_path, **changes))
        at, model, theirs, _ = peer_module._both_models(case, peer)
        return peer_module.peer_sliding(at, peer, model.eval(), theirs)[0]
    def half_the_time(case, name, ours, theirs, **kw):
        ours(), theirs()
        return [Row("peer", name, case.system, case.scale, ratio=.5, ratio_low=.5,
            ratio_high=.5, ratio_cpu=.5) for _ in range(2)]
    monkeypatch.setattr(peer_module, "_pair", half_the_time)
    once, twice = sliding(), sliding(tail="[length, *range(length + stride, n + 1, stride)]")
    assert "33 windows here, 33 there" in once.what and "33 windows here, 66 there" in twice.what
    assert (once.ratio, twice.ratio) == (.5, 1.)


@pytest.mark.parametrize("fault,error",
    [(dict(square="abs"), "difference of"), (dict(update="buf"), "moves the weights elsewhere"),
    (dict(imports="import a_package_that_is_not_there"),
        "'a_package_that_is_not_there', which is not installed"),
        (dict(imports="1/0"), "ZeroDivisionError")])
def test_what_computes_something_else_is_not_timed(case, tmp_path, fault, error):
    with pytest.raises(ValueError, match=error):
        bench_peer(case, load_peer(script(tmp_path, **fault)))


def test_a_peer_is_one_more_bench(tmp_path):
    extra = peer_bench([script(tmp_path)], "pr610", "tiny", quick=True, overrides=SETTINGS)
    found = run_benches(("pr610",), "tiny", quick=True, only=("loader", "peer"),
        benches=BENCHES | extra)
    assert list(extra) == ["peer", "peer_profile"] and [r["bench"]
        for r in found["rows"]][:2] == ["loader", "peer"] and {r["system"]
        for r in found["rows"]} == {"pr610", "pr610-as-run"}


def test_another_system_is_told_by_its_parameters(tmp_path):
    with pytest.raises(ValueError, match="missing bigram"):
        bench_peer(make_case("pr610-as-run", "tiny", quick=True), load_peer(script(tmp_path)))


def test_flash_attention_is_stood_in_for_while_importing(case, tmp_path):
    import sys
    peer = load_peer(script(tmp_path, imports="from flash_attn_interface import flash_attn_func"))
    if not peer.stand_ins: pytest.skip("flash attention is installed")
    assert "flash_attn_interface" not in sys.modules and str(tmp_path) not in sys.path
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    y = peer.find("flash_attn_func")(q, k, k, causal=True)
    assert y.shape == q.shape and torch.allclose(y[:, 0], k[:, 0].repeat_interleave(2, 1),
        atol=1e-6), "the first position sees itself alone"


def test_functions_are_called_with_what_they_name():
    assert call_by_name(lambda a, *, b=2: (a, b), dict(a=1, c=3)) == (1, 2)
    with pytest.raises(ValueError, match="wants a"): call_by_name(lambda a: a, {})


@pytest.mark.slow
def test_every_bench_gives_rows_that_json_keeps(tmp_path):
    found = run_benches(("pr610", "pr1123"), "tiny", quick=True)
    assert {r["bench"] for r in found["rows"]} == set(BENCHES) and "growth" not in found
    assert {r["system"] for r in found["rows"] if r["bench"] == "step"} == {"pr610", "pr1123"}
    (tmp_path/"b.json").write_text(json.dumps(found))
    again = read_bench(tmp_path/"b.json")
    assert again == found and len(bench_table(again["rows"]).splitlines()) == len(found["rows"]) + 2
    for r in (Row(**r) for r in again["rows"]):
        assert sorted(q := [r.low, r.seconds, r.high]) == q and r.repeats >= 3, r
    bench_figure(again["rows"], tmp_path/"b.png")
    assert (tmp_path/"b.png").stat().st_size > 1000


def test_shares_of_a_step_are_rows():
    rows = {r.name: r for r in bench.bench_step(make_case("pr610", "tiny", quick=True))}
    assert {"loader", "listeners", "clip", "optimizer: Muon", "optimizer: AdamW"} <= set(rows)
    assert (0 < rows["loader"].ratio < 1 and 0 < rows["listeners"].ratio < 1
        and rows["listeners"].against == "step of 1,024 tokens")
    assert (0 < rows["forward and backward"].utilisation
        and rows["forward and backward"].memory > 100_000)


def test_memory_counts_what_is_alive_at_once():
    def held(n): return lambda: [torch.ones(1000) for _ in range(n)]
    assert [peak_memory(held(n)) for n in (1, 2, 7)] == [4000, 8000, 28_000]
    x = torch.ones(1000)
    assert peak_memory(lambda: x.add_(1)) == 0 and peak_memory(lambda: x.view(10,
        100).mul(2)) == 4000


@pytest.mark.slow
def test_growth_follows_flops_and_memory_the_batch():
    points = growth.bench_growth(make_case("pr610", "tiny", quick=True))
    for axis in growth.AXES:
        mine = [p for p in points if p["axis"] == axis]
        assert len(mine) == 3 and all(a["flops"] < b["flops"] and a["memory"] < b["memory"]
            for a, b in zip(mine, mine[1:]))
    growth.growth_figure(points)


@pytest.mark.slow
def test_the_profile_of_a_script_stands_beside_ours(case, tmp_path):
    phases = profile_peer(case, load_peer(script(tmp_path)))
    assert list(phases) == ["passes: theirs", "passes: ours", "Muon: theirs", "Muon: ours"]
    for ops in phases.values():
        assert ops and all(o["seconds"] > 0 and o["calls"] >= 1 for o in ops)
        assert ops == sorted(ops, key=lambda o: -o["seconds"])
    shares = [growth.by_kind(ops)["matrix products"] for ops in phases.values()]
    assert all(s > 0 for s in shares), "every phase multiplies matrices"


@pytest.mark.slow
def test_ranks_share_a_step():
    points = growth.bench_ranks(make_case("pr610", "tiny", quick=True))
    assert [p["value"] for p in points] == [1, 2][:os.cpu_count()] and all(p["seconds"] > 0
        and p["memory"] > 100_000 for p in points)
    assert [p["flops"]*p["value"] for p in points] == [points[0]["flops"]]*len(points)


def test_names_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="choose among step"): run_benches(only=("steps",))
    with pytest.raises(ValueError, match="only='peer'"): run_benches(only=("peer",))


def test_the_command_measures_and_writes(main, tmp_path):
    code, out, err = main("bench", "--only", "loader", "--only", "step", "--quick", "--scale",
        "tiny", "--json", tmp_path/"b.json")
    assert code == 0, err
    assert "listeners" in out and "step of 1,024 tokens" in out and read_bench(
        tmp_path/"b.json")["quick"]
    code, _, err = main("bench", "--only", "nothing")
    assert code == 1 and "choose among" in err


def test_a_terminal_of_100_columns_shows_every_bench_whole():
    "The committed measurements, whose notes and ratios are long; each thing has its line."
    rows = read_bench(find_results()/"bench-cpu.json")["rows"]
    for name in {r["bench"] for r in rows}:
        part = [r for r in rows if r["bench"] == name]
        text = as_table(*told(part))
        assert max(map(len, text.splitlines())) <= 100, name
        assert all(f"{1e3*r['seconds']:,.3g}" in text for r in part)
        assert all(any(column) for column in zip(*told(part)[0]))
