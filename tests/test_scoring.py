"Scores and adaptation across chapters: coverage, causality and the published numbers."
import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.bpb import ByteTables
from pgolf.gpt import GPT, ModelConfig, load_published
from pgolf.scoring import ScoreConfig, batches, plan_windows, score
from pgolf.ttt import Learner, TTTConfig, adapt, chunk_plan, score_and_adapt, scored_chunks

CFG = ModelConfig(vocab_size=64, num_layers=4, model_dim=64, num_heads=4, num_kv_heads=2, rope_dims=8, skip_init=1., smear=True, bigram_vocab_size=64,
                  bigram_dim=64, ve_dim=64, ve_layers=(2, 3), xsa_last_n=2, ln_scale=True)
TABLES = ByteTables(torch.arange(64).remainder(4).to(torch.int16), torch.arange(64).remainder(3) == 0, torch.arange(64) == 1)
WINDOWS = ScoreConfig(eval_seq_len=32, eval_stride=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models this small are faster on one thread, by far so on a busy machine."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    m, gen = GPT(CFG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in m.parameters(): p += .05*torch.randn(p.shape, generator=gen) # every path carries signal
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
        assert graded >= min(n, (c+1)*size) # all of a chunk is graded when its turn to be learnt comes


def test_windows_of_the_full_validation_split_as_published():
    plan = plan_windows(62_021_632, 2048, 64)
    assert len(plan) == 969_088-31 # PR #610 also starts 31 short windows near the end, which score the last 64 targets again
    assert sum(b-f for _, b, f in plan) == 62_021_632


def test_stride_one_is_one_window_per_target(model, tokens):
    slow = []
    with torch.no_grad():
        for t in range(120):
            z = model(tokens[None, max(0, t-31):t+1])[0, -1]
            slow.append(float(z.float().log_softmax(-1)[tokens[t+1]].neg()))
    found = score(model, tokens[:121], TABLES, 32, 1)
    torch.testing.assert_close(found.nll, torch.tensor(slow).double(), rtol=1e-5, atol=1e-5)


def test_score_does_not_depend_on_the_batch(model, tokens):
    base = score(model, tokens, TABLES, 32, 8)
    for batch in (1, 2, 5, 64): assert abs(score(model, tokens, TABLES, 32, 8, batch=batch).val_loss-base.val_loss) < 1e-7


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
    one = ScoreConfig(32, 8, eval_batch=1) # one window per pass: both run the same operations, so the bits must agree
    still = TTTConfig(ttt_lr=0., ttt_chunk_tokens=chunk, ttt_optimizer=opt, ttt_freeze_blocks=0, ttt_freeze_embeddings=False, ttt_epochs=1)
    assert torch.equal(score_and_adapt(model, tokens, TABLES, one, still).nll, score(model, tokens, TABLES, 32, 8, batch=1).nll)


@pytest.mark.parametrize("place", [1, 95, 96, 97, 300, 672, 700])
def test_no_grade_depends_on_its_target_or_what_follows(model, tokens, place):
    cfg = TTTConfig(ttt_lr=.05, ttt_chunk_tokens=96, ttt_freeze_blocks=0, ttt_freeze_embeddings=False)
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
        cut = score_and_adapt(model, tokens, TABLES, WINDOWS, TTTConfig(**vars(LEARN) | dict(ttt_max_chunks=limit))).nll
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
        if hasattr(m, "fake_quant"): m.fake_quant = lambda w: (w*4).round()/4+w-w.detach() # a grid that would show
    assert torch.equal(score(quantized, tokens, TABLES, 32, 8).nll, score(model, tokens, TABLES, 32, 8).nll)
    plain = score_and_adapt(model, tokens, TABLES, WINDOWS, LEARN).nll
    assert torch.equal(score_and_adapt(quantized, tokens, TABLES, WINDOWS, LEARN).nll, plain)
    noisy = score_and_adapt(quantized, tokens, TABLES, WINDOWS, TTTConfig(**vars(LEARN) | dict(ttt_train_mode=True))).nll
    assert torch.equal(noisy[:96], plain[:96]) and not torch.equal(noisy, plain)


def test_diverging_adaptation_says_so(model, tokens):
    with pytest.raises(ValueError, match="chunk 1.*no grade.*diverged"):
        score_and_adapt(model, tokens, TABLES, WINDOWS, TTTConfig(ttt_lr=1e30, ttt_chunk_tokens=96, ttt_freeze_blocks=0, ttt_grad_clip=0.))


def test_configs_are_json():
    for cfg in (ScoreConfig(), TTTConfig()): assert type(cfg)(**json.loads(json.dumps(vars(cfg)))) == cfg


def test_golden_losses_are_those_of_the_scorer(golden):
    g = golden("pr610")
    ids = torch.as_tensor(g["ids"]).long()
    raw = json.loads(str(g["config"]))
    model = load_published(GPT(published_config(raw)), {k.removeprefix("param/"): g[k] for k in g.files if k.startswith("param/")})
    T, V = ids.shape[1]-1, raw["vocab_size"]
    tables = ByteTables(torch.ones(V, dtype=torch.int16), torch.zeros(V, dtype=torch.bool), torch.zeros(V, dtype=torch.bool))
    found = [score(model, row, tables, T, T).val_loss for row in ids]
    assert math.isclose(sum(found)/len(found), float(g["loss"]), rel_tol=1e-5)


def published_config(raw):
    return ModelConfig(vocab_size=raw["vocab_size"], num_layers=raw["num_layers"], model_dim=raw["model_dim"], num_heads=raw["num_heads"],
                       num_kv_heads=raw["num_kv_heads"], mlp_mult=raw["mlp_mult"], activation="leaky_relu2", rope_dims=raw["rope_dims"], smear=True,
                       bigram_vocab_size=raw["bigram_vocab_size"], bigram_dim=raw["bigram_dim"], ve_dim=raw["ve_dim"],
                       ve_layers=tuple(int(i) for i in str(raw["ve_layers"]).split(",")), xsa_last_n=raw["xsa_last_n"], ln_scale=True, skip_init=1.)
