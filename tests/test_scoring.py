"Scores and adaptation across chapters: coverage, causality and the published numbers."
import copy
import json
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.game.bpb import ByteTables
from pgolf.model.gpt import GPT, ModelConfig
from pgolf.squeeze.formats import load_published
from pgolf.score.windows import (ScoreConfig, batches, deal, document_starts, join, plan_windows,
                                 score, Scores, stream, window_table)
from pgolf.score.compare import (KINDS, compare, describe, load_scores, save_scores, score_into,
                                 token_kinds)
from pgolf.train.device import can_compile
from pgolf.score.ttt import Learner, TTTConfig, adapt, chunk_plan, score_and_adapt, scored_chunks

CFG = ModelConfig(vocab_size=64, num_layers=4, model_dim=64, num_heads=4, num_kv_heads=2,
    rope_dims=8, skip_init=1., smear=True, bigram_vocab_size=64,
                  bigram_dim=64, ve_dim=64, ve_layers=(2, 3), xsa_last_n=2, ln_scale=True)
TABLES = ByteTables(torch.arange(64).remainder(4).to(torch.int16),
    torch.arange(64).remainder(3) == 0, torch.arange(64) == 1)
WINDOWS = ScoreConfig(eval_seq_len=32, eval_stride=8)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    m, gen = GPT(CFG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        # every path carries signal
        for p in m.parameters(): p += .05*torch.randn(p.shape, generator=gen)
    return m


@pytest.fixture(scope="module")
def tokens(): return torch.randint(64, (701,), generator=torch.Generator().manual_seed(1))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 64), st.integers(1, 9))
def test_each_target_once_with_maximal_context(n, seq_len, stride, batch):
    stride = min(stride, seq_len)
    plan = plan_windows(n, seq_len, stride)
    assert [t for _, stop, first in plan for t in range(first, stop)] == list(range(n))
    assert all(stop-start == min(stop, seq_len) for start, stop, _ in plan)
    groups = batches(plan, batch)
    assert [w for g in groups for w in g] == plan
    assert all(len(g) <= batch and len({(b-a, f-a) for a, b, f in g}) == 1 for g in groups)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 64), st.integers(0, 100))
def test_chunks_keep_the_windows_and_grade_before_learning(n, seq_len, stride, more):
    cfg, size = ScoreConfig(seq_len, min(stride, seq_len)), seq_len+more
    chunks = chunk_plan(n, cfg, size)
    assert [w for ws in chunks for w in ws] == plan_windows(n, cfg.eval_seq_len, cfg.eval_stride)
    graded = 0
    for c, ws in enumerate(chunks):
        if ws: graded = ws[-1][1]
        # all of a chunk is graded when its turn to be learnt comes
        assert graded >= min(n, (c+1)*size)


def test_windows_of_the_full_validation_split_as_published():
    plan = plan_windows(62_021_632, 2048, 64)
    # PR #610 also starts 31 short windows near the end, which score the last 64 targets again
    assert len(plan) == 969_088-31
    assert sum(b-f for _, b, f in plan) == 62_021_632


def test_stride_one_is_one_window_per_target(model, tokens):
    slow = []
    with torch.no_grad():
        for t in range(120):
            z = model(tokens[None, max(0, t-31):t+1])[0, -1]
            slow.append(float(z.float().log_softmax(-1)[tokens[t+1]].neg()))
    found = score(model, tokens[:121], TABLES, 32, 1)
    torch.testing.assert_close(found.nll, torch.tensor(slow).double(), rtol=1e-5, atol=1e-5)


def nll_of(pieces): return torch.cat([p.nll for p in pieces])


@pytest.fixture
def double(model):
    "The model, computing in float64."
    model.compute_dtype = torch.float64
    yield model
    model.compute_dtype = torch.float32


def test_score_does_not_depend_on_the_batch(model, tokens):
    base = score(model, tokens, TABLES, 32, 8)
    for batch in (1, 2, 5, 64):
        torch.testing.assert_close(score(model, tokens, TABLES, 32, 8, batch=batch).nll, base.nll,
            rtol=1e-5, atol=1e-5)


def test_in_float64_nothing_depends_on_batch_ranks_or_where_it_was_interrupted(double, tokens):
    base = score(double, tokens, TABLES, 32, 8)
    for batch in (1, 3, 64):
        cfg = ScoreConfig(32, 8, eval_batch=batch)
        for world in (1, 3):
            found = nll_of(p for r in range(world) for p in stream(double, tokens, TABLES, cfg,
                part=(r, world)))
            torch.testing.assert_close(found, base.nll, rtol=0, atol=1e-12)
            assert abs(found.sum()-base.nll.sum()) < 1e-9
        torch.testing.assert_close(score(double, tokens, TABLES, 32, 8, batch,
            begun=base.first(333)).nll, base.nll, rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 40),
    st.lists(st.integers(1, 499), max_size=6), st.integers(1, 9), st.integers(1, 5))
def test_table_is_the_plan_of_each_document_and_is_dealt_out_whole(n, seq_len, stride,
    cuts, batch, world):
    stride, cuts = min(stride, seq_len), sorted({0, *(c for c in cuts if c < n)})
    slow = [[v+a for v in w] for a, b in pairwise([*cuts, n])
        for w in plan_windows(b-a, seq_len, stride)]
    table = window_table(n, seq_len, stride, torch.tensor(cuts))
    assert table.tolist() == slow
    dealt = [w for r in range(world) for span in deal(table, batch, r, world)
        for w in span.tolist()]
    assert dealt == slow


@pytest.mark.parametrize("stride", [1, 8, 32])
def test_documents_on_their_own_are_scored_as_if_alone(model, tokens, stride):
    text = tokens.clone()
    text[text == 1] = 2
    text[[0, 3, 4, 100, 350]] = 1
    starts = document_starts(text, 1)
    assert starts.tolist() == [0, 3, 4, 100, 350]
    found = score(model, text, TABLES, 32, stride, documents=starts)
    alone = join([score(model, text[a:b+1], TABLES, 32, stride)
        for a, b in pairwise([*starts.tolist(), 700])])
    torch.testing.assert_close(found.nll, alone.nll, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.bytes, alone.bytes)
    seen = torch.cat(
        [p.start for p in stream(model, text, TABLES, ScoreConfig(32, stride), starts)])
    assert torch.equal(seen >= 100,
        torch.arange(700) >= 100), "no window reaches across the start of a document"
    other = text.clone()
    other[50] = (other[50]+7) % 64
    assert torch.equal(score(model, other, TABLES, 32, stride, documents=starts).nll[100:],
        found.nll[100:])


def test_a_short_document_is_seen_at_the_length_the_model_was_trained_for(tokens):
    "Rotary tables that stretch with the window must not change with the length of a document."
    stretched = GPT(ModelConfig(**vars(CFG) | dict(rope_train_seq_len=16)))
    with torch.no_grad():
        for p in stretched.parameters():
            p += .05*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    whole = score(stretched, tokens, TABLES, 32, 8).nll
    for n in (5, 20, 31):
        torch.testing.assert_close(score(stretched, tokens[:n+1], TABLES, 32, 8).nll, whole[:n])


@pytest.mark.parametrize("k", [1, 7, 32, 36, 300, 699])
def test_going_on_gives_the_same_bits(model, tokens, k):
    cfg = ScoreConfig(32, 8, eval_batch=4)
    whole = nll_of(stream(model, tokens, TABLES, cfg))
    pieces = list(stream(model, tokens, TABLES, cfg, start=k))
    assert torch.equal(nll_of(pieces), whole[k:]) and pieces[0].first == k
    assert torch.equal(score(model, tokens, TABLES, 32, 8, 4,
        begun=score(model, tokens, TABLES, 32, 8, 4).first(k)).nll, whole)


def test_stream_gives_the_whole_distribution(model, tokens):
    for temperature in (1., 1.7):
        for p in stream(model, tokens[:201], TABLES, ScoreConfig(32, 8, temperature, eval_batch=3),
            distribution=True):
            torch.testing.assert_close(p.logprobs.exp().sum(1), torch.ones(len(p.nll)).double())
            torch.testing.assert_close(
                -p.logprobs[torch.arange(len(p.nll)), tokens[p.first+1:p.stop+1]], p.nll,
                rtol=1e-5, atol=1e-5)
            assert (p.start <= torch.arange(p.first, p.stop)).all() and (torch.arange(p.first,
                p.stop)-p.start < 32).all()


RANKS = """if 1:
    import sys, torch
    from pgolf.game.bpb import ByteTables
    from pgolf.model.gpt import GPT, ModelConfig
    from pgolf.score.windows import score
    from pgolf.score.compare import save_scores, describe
    from pgolf.train.device import Ranks, close_ranks, setup_ranks
    ranks, n = setup_ranks("cpu"), 64
    model = GPT(ModelConfig(vocab_size=n, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=2,
        rope_dims=8), 3)
    torch.nn.init.normal_(model.tok_emb.weight, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(n, (501,), generator=torch.Generator().manual_seed(1))
    never = torch.zeros(n, dtype=torch.bool)
    tables = ByteTables(torch.ones(n, dtype=torch.int16), never, never)
    begun = score(model, tokens, tables, 32, 8, batch=4, ranks=Ranks()).first(40)
    s = score(model, tokens, tables, 32, 8, batch=4, begun=begun, ranks=ranks)
    save_scores(f"{sys.argv[1]}/{ranks.world}-{ranks.rank}.npz", describe(s, tokens))
    close_ranks()
"""


def test_two_processes_score_as_one(tmp_path):
    (tmp_path/"job.py").write_text(RANKS)
    for world in (1, 2): on_ranks(world, tmp_path/"job.py", tmp_path)
    one, *two = (load_scores(tmp_path/f"{n}.npz") for n in ("1-0", "2-0", "2-1"))
    for s in two: assert torch.equal(s.scores.nll, one.scores.nll)


class Plain:
    "The same model without the short way through the last block."
    def __init__(self, model): self.model = model
    def __getattr__(self, name): return getattr(self.model, name)
    def hidden(self, ids, last): return self.model.hidden(ids)[:, -last:]


@pytest.mark.parametrize("more",
    [{}, dict(value_residual=True, gated_attention=True, xsa_last_n=4),
        dict(skip_gate=True, activation="star_relu"),
        dict(num_layers=1, ve_layers=(0,), xsa_last_n=1)])
def test_the_last_block_works_for_scored_rows_alone(tokens, more):
    m = GPT(ModelConfig(**vars(CFG) | more), 1)
    with torch.no_grad():
        for p in m.parameters():
            p += .1*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    a, b = (score(x, tokens, TABLES, 32, 8) for x in (m, Plain(m)))
    torch.testing.assert_close(a.nll, b.nll, rtol=1e-6, atol=1e-6)
    assert all(m.hidden(tokens[None, :32], last=n).shape[1] == n for n in (1, 5, 32))


def published_loop(model, tokens, seq_len, stride, batch=32):
    """Section 9 of PR #576's sheet, its sums left out: every row of every window goes through the
    head."""
    n, out = len(tokens)-1, torch.zeros(len(tokens)-1)
    starts = [a for a in range(0, n, stride) if a == 0 or min(a+seq_len, n)-a >= stride]
    starts = [a for a in starts if a+seq_len <= n] # the repeats at the end would flatter us
    for i in range(0, len(starts), batch):
        x = torch.stack([tokens[a:a+seq_len] for a in starts[i:i+batch]])
        y = torch.stack([tokens[a+1:a+seq_len+1] for a in starts[i:i+batch]])
        with torch.no_grad(): logits = model(x)/1.
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten(),
            reduction="none").view(x.shape)
        for r, a in enumerate(starts[i:i+batch]):
            first = 0 if a == 0 else seq_len-stride
            out[a+first:a+seq_len] = losses[r, first:]
    return out.double()


def test_less_work_than_the_published_loop():
    "Equal to 1e-6, by two thirds of the operations or fewer."
    from torch.utils.flop_counter import FlopCounterMode
    m = GPT(ModelConfig(num_layers=3, model_dim=64, num_heads=4, num_kv_heads=2, rope_dims=4,
        smear=True, skip_init=1., bigram_vocab_size=128, bigram_dim=64))
    torch.nn.init.normal_(m.tok_emb.weight, std=.1, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(1024, (256+32*39+1,), generator=torch.Generator().manual_seed(1))
    even = ByteTables(torch.ones(1024, dtype=torch.int16), *torch.zeros(2, 1024, dtype=torch.bool))
    with FlopCounterMode(display=False) as theirs: a = published_loop(m, ids, 256, 32)
    with FlopCounterMode(display=False) as ours: b = score(m, ids, even, 256, 32).nll
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert 0 < 1.5*ours.get_total_flops() < theirs.get_total_flops()


@pytest.mark.slow
@pytest.mark.skipif(not can_compile("cpu")[0], reason="no compiler")
def test_compiled_and_plain_give_one_score(tokens):
    m = GPT(ModelConfig(vocab_size=64, num_layers=1, model_dim=32, num_heads=2, num_kv_heads=1,
        mlp_mult=2, rope_dims=8, smear=True))
    torch.nn.init.normal_(m.tok_emb.weight, std=.1, generator=torch.Generator().manual_seed(0))
    fast = score(m, tokens, TABLES, 32, 8, batch=16, compile=True)
    torch.testing.assert_close(fast.nll, score(m, tokens, TABLES, 32, 8).nll, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not can_compile("cpu")[0], reason="no compiler")
def test_one_compilation_for_each_shape_however_many_models(tokens, monkeypatch):
    """Blocks and windows of two models of one run are two graphs; left to itself a CPU compiles
    nothing."""
    from torch._dynamo.utils import counters
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    models, seen = [GPT(ModelConfig(vocab_size=64, num_layers=2, model_dim=32, num_heads=2,
        num_kv_heads=1, rope_dims=8), s) for s in (0, 1)], []
    for stride, compile in ((32, "auto"), (32, True), (8, True)):
        for m in models: score(m, tokens, TABLES, 32, stride, batch=16, compile=compile)
        seen.append(counters["stats"]["unique_graphs"])
    assert seen == [0, 1, 2]
    with pytest.raises(ValueError, match="eval_compile='yes'"): ScoreConfig(eval_compile="yes")


class Stops:
    "A model whose user gives up."
    def __init__(self, model, after): self.model, self.left = model, after
    def __getattr__(self, name): return getattr(self.model, name)
    def hidden(self, ids, last):
        self.left -= 1
        if self.left < 0: raise KeyboardInterrupt
        return self.model.hidden(ids, last)


@pytest.mark.parametrize("after", [0, 2, 9]) # the first piece takes two passes
def test_an_interrupted_file_is_completed(model, tokens, tmp_path, after):
    path, cfg, kinds = tmp_path/"s.npz", ScoreConfig(32, 8, eval_batch=4), torch.arange(64,
        dtype=torch.uint8) % len(KINDS)
    starts = document_starts(tokens, 1)
    with pytest.raises(KeyboardInterrupt):
        score_into(path, Stops(model, after), tokens, TABLES, cfg, kinds, starts,
            about=dict(model="m"))
    assert path.exists() == (after > 0)
    if after: assert 0 < load_scores(path).scores.coverage < 1
    whole = score_into(path, model, tokens, TABLES, cfg, kinds, starts, about=dict(model="m"))
    # complete: nothing to do
    again = score_into(path, Stops(model, 0), tokens, TABLES, cfg, kinds, starts,
        about=dict(model="m"))
    for s in (whole, again):
        assert torch.equal(s.scores.nll, score(model, tokens, TABLES, 32, 8, batch=4).nll)
    assert torch.equal(again.documents, starts) and torch.equal(again.kind, kinds[tokens[1:]])
    for other in (dict(about=dict(model="n")), dict(isolated=True)):
        with pytest.raises(ValueError, match="another text, model or setting"):
            score_into(path, model, tokens, TABLES, cfg, kinds, starts,
                **dict(about=dict(model="m")) | other)


def test_files_of_scores_hold_no_pickle_and_foreign_files_are_named(model, tokens, tmp_path):
    path = tmp_path/"s.npz"
    save_scores(path, describe(score(model, tokens, TABLES, 32, 8), tokens))
    with np.load(path, allow_pickle=False) as z:
        assert {"nll", "bytes", "position", "kind", "target", "about"} == set(z.files)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="s.npz is not a file of scores"): load_scores(path)
    np.savez(path, raw=np.zeros(3)) # what a run leaves
    with pytest.raises(ValueError, match="s.npz is not a file of scores.*pgolf score RUN --save"):
        load_scores(path)
    with pytest.raises(FileNotFoundError): load_scores(tmp_path/"absent.npz")


def test_comparison_finds_a_planted_gain():
    g = np.random.default_rng(0)
    text = torch.tensor(g.integers(2, 64, 20_001))
    text[::100] = 1
    kinds = torch.tensor([0, 0]+[1+i % 4 for i in range(62)], dtype=torch.uint8)
    worse = torch.tensor(g.normal(3, 1, 20_000))
    better = worse-.5*(kinds[text[1:]] == 3)+torch.tensor(g.normal(0, .01, 20_000))
    a, b = (describe(Scores(x, torch.ones(20_000, dtype=torch.int64)), text, kinds,
        document_starts(text, 1)) for x in (better, worse))
    found = compare(a, b)
    rows = {r["of"]: r for r in found["kind"]}
    share = float((kinds[text[1:]] == 3).double().mean())
    assert found["all"].blocks == 200 and found["all"].high < 0
    assert abs(rows["digits"]["bpb a - b"]+.5*share/math.log(2)) < .002 and all(
        abs(r["bpb a - b"]) < 3*r["+-"]+1e-4 for k, r in rows.items() if k != "digits")
    for key in ("kind", "position", "frequency"):
        assert math.isclose(sum(r["bpb a - b"] for r in found[key]), found["all"].bpb, rel_tol=1e-9)
        assert sum(r["targets"] for r in found[key]) == 20_000
    assert compare(a, a)["all"].bpb == 0


def test_intervals_hold_what_they_promise():
    "Of 200 comparisons without a difference, about one in twenty finds one."
    g, text = np.random.default_rng(1), torch.arange(6001) % 60
    out = 0
    for _ in range(200):
        shift = np.repeat(g.normal(0, .1, 60), 100) # documents have something in common
        s = [Scores(torch.tensor(g.normal(3, 1, 6000)+x), torch.ones(6000, dtype=torch.int64))
            for x in (shift, 0*shift)]
        a, b = (describe(x, text, None, torch.arange(0, 6000, 100)) for x in s)
        d = compare(a, b)["all"]
        out += not d.low < 0 < d.high
    assert 2 <= out <= 22


def test_kinds_of_an_official_tokenizer(shared):
    from pgolf.game.tokenizer import load_tokenizer
    sp = load_tokenizer(shared/"data"/"fineweb_1024_bpe.model", 1024)
    kinds = token_kinds(sp, 1030)
    assert (kinds.bincount(minlength=6)[5] == 256 and (kinds[1024:] == 0).all()
        and kinds[sp.bos_id()] == 0)
    for piece, name in (("▁the", "word start"), ("ing", "inside a word"), (",", "punctuation")):
        assert KINDS[kinds[sp.piece_to_id(piece)]] == name


def test_byte_totals_of_the_validation_sample_whatever_the_windows(shared):
    from pgolf.game.bpb import byte_tables
    from pgolf.game.shards import read_shard
    from pgolf.game.tokenizer import load_tokenizer
    sp = load_tokenizer(shared/"data"/"fineweb_1024_bpe.model", 1024)
    text = torch.from_numpy(read_shard(shared/"data"/"fineweb_val_000000.sample.bin",
        1024).astype(np.int64))[:40_001]
    starts = document_starts(text, sp.bos_id())
    m = GPT(ModelConfig(num_layers=1, model_dim=16, num_heads=1, num_kv_heads=1,
        mlp_mult=1, rope_dims=4))
    expect = sum(len(sp.decode(text[a+1:b].tolist()).encode())
        for a, b in pairwise([*starts.tolist(), 40_001]))
    for documents in (None, starts):
        # the text may be cut inside a character
        assert abs(score(m, text, byte_tables(sp), 256, 256, documents=documents)
            .n_bytes-expect) <= 2


def test_bytes_are_those_of_the_tables_for_any_stride(model, tokens):
    expect = int(TABLES.count(tokens[:-1], tokens[1:]).sum())
    for stride in (1, 8, 32): assert score(model, tokens, TABLES, 32, stride).n_bytes == expect


def test_temperature_and_mode(model, tokens):
    model.train()
    a = score(model, tokens, TABLES, 32, 8, temperature=2.)
    assert model.training
    for p in model.parameters(): assert p.requires_grad and p.grad is None
    model.eval()
    half = copy.deepcopy(model)
    half.logits = lambda h: model.logits(h)/2
    torch.testing.assert_close(a.nll, score(half, tokens, TABLES, 32, 8).nll)


def test_progress_bar_does_not_change_the_score(model, tokens, capsys):
    plain = score(model, tokens, TABLES, 32, 8).nll
    assert capsys.readouterr().err == ""
    assert torch.equal(score(model, tokens, TABLES, 32, 8, progress=True).nll, plain)
    assert "targets" in capsys.readouterr().err


LEARN = TTTConfig(ttt_lr=.05, ttt_chunk_tokens=96, ttt_freeze_blocks=1)


@pytest.mark.parametrize("chunk", [32, 50, 96, 699, 5000])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_zero_learning_rate_is_the_sliding_score(model, tokens, chunk, opt):
    # one window per pass: both run the same operations, so the bits must agree
    one = ScoreConfig(32, 8, eval_batch=1)
    still = TTTConfig(ttt_lr=0., ttt_chunk_tokens=chunk, ttt_optimizer=opt, ttt_freeze_blocks=0,
        ttt_freeze_embeddings=False, ttt_epochs=1)
    assert torch.equal(score_and_adapt(model, tokens, TABLES, one, still).nll,
        score(model, tokens, TABLES, 32, 8, batch=1).nll)


@pytest.mark.parametrize("place", [1, 95, 96, 97, 300, 672, 700])
def test_no_grade_depends_on_its_target_or_what_follows(model, tokens, place):
    cfg = TTTConfig(ttt_lr=.05, ttt_chunk_tokens=96, ttt_freeze_blocks=0,
        ttt_freeze_embeddings=False)
    base = score_and_adapt(model, tokens, TABLES, WINDOWS, cfg).nll
    one, rest = tokens.clone(), tokens.clone()
    one[place] = (one[place]+7) % 64
    rest[place:] = (rest[place:]+7) % 64
    for other in (one, rest):
        nll = score_and_adapt(model, other, TABLES, WINDOWS, cfg).nll
        assert torch.equal(nll[:place-1], base[:place-1]) and nll[place-1] != base[place-1]


def test_lr_zero_from_a_chunk_on_leaves_earlier_grades(model, tokens):
    base = score_and_adapt(model, tokens, TABLES, WINDOWS, LEARN).nll
    for limit in (1, 2, 5):
        cut = score_and_adapt(model, tokens, TABLES, WINDOWS,
            TTTConfig(**vars(LEARN) | dict(ttt_max_chunks=limit))).nll
        end = (limit+1)*96
        assert torch.equal(cut[:end], base[:end]) and not torch.equal(cut[end:], base[end:])


def test_the_model_stays_and_frozen_parameters_stay(model, tokens):
    before = {n: p.clone() for n, p in model.named_parameters()}
    learner = Learner(model, LEARN)
    for chunk in scored_chunks(learner, tokens, TABLES, WINDOWS):
        assert chunk.updates == learner.updates
        if not chunk.last: adapt(learner, chunk, 32)
    assert learner.updates == 7*3
    for n, p in model.named_parameters(): assert torch.equal(p, before[n]) and p.requires_grad
    moved = {n for n, p in learner.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(not n.startswith(("blocks.0.", "tok_emb", "bigram", "ve_")) for n in moved)


def test_fake_quantization_acts_only_where_asked(model, tokens):
    quantized = copy.deepcopy(model)
    for m in quantized.modules():
        # a grid that would show
        if hasattr(m, "fake_quant"): m.fake_quant = lambda w: (w*4).round()/4+w-w.detach()
    assert torch.equal(score(quantized, tokens, TABLES, 32, 8).nll,
        score(model, tokens, TABLES, 32, 8).nll)
    plain = score_and_adapt(model, tokens, TABLES, WINDOWS, LEARN).nll
    assert torch.equal(score_and_adapt(quantized, tokens, TABLES, WINDOWS, LEARN).nll, plain)
    noisy = score_and_adapt(quantized, tokens, TABLES, WINDOWS,
        TTTConfig(**vars(LEARN) | dict(ttt_train_mode=True))).nll
    assert torch.equal(noisy[:96], plain[:96]) and not torch.equal(noisy, plain)


def test_diverging_adaptation_says_so(model, tokens):
    with pytest.raises(ValueError, match="chunk 1.*no grade.*diverged"):
        score_and_adapt(model, tokens, TABLES, WINDOWS,
            TTTConfig(ttt_lr=1e30, ttt_chunk_tokens=96, ttt_freeze_blocks=0, ttt_grad_clip=0.))


def test_configs_are_json():
    for cfg in (ScoreConfig(), TTTConfig()):
        assert type(cfg)(**json.loads(json.dumps(vars(cfg)))) == cfg


def test_golden_losses_are_those_of_the_scorer(golden):
    g = golden("pr610")
    ids = torch.as_tensor(g["ids"]).long()
    raw = json.loads(str(g["config"]))
    model = load_published(GPT(published_config(raw)),
        {k.removeprefix("param/"): g[k] for k in g.files if k.startswith("param/")})
    T, V = ids.shape[1]-1, raw["vocab_size"]
    tables = ByteTables(torch.ones(V, dtype=torch.int16), torch.zeros(V, dtype=torch.bool),
        torch.zeros(V, dtype=torch.bool))
    found = [score(model, row, tables, T, T).val_loss for row in ids]
    assert math.isclose(sum(found)/len(found), float(g["loss"]), rel_tol=1e-5)


def published_config(raw):
    return ModelConfig(vocab_size=raw["vocab_size"], num_layers=raw["num_layers"],
        model_dim=raw["model_dim"], num_heads=raw["num_heads"],
                       num_kv_heads=raw["num_kv_heads"], mlp_mult=raw["mlp_mult"],
                       activation="leaky_relu2", rope_dims=raw["rope_dims"], smear=True,
                       bigram_vocab_size=raw["bigram_vocab_size"], bigram_dim=raw["bigram_dim"],
                       ve_dim=raw["ve_dim"],
                       ve_layers=tuple(int(i) for i in str(raw["ve_layers"]).split(",")),
                       xsa_last_n=raw["xsa_last_n"], ln_scale=True, skip_init=1.)
