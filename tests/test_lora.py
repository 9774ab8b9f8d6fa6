"""Adapters per document against a second implementation, and the properties that keep documents
apart."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from pgolf.game.bpb import ByteTables
from pgolf.model.gpt import GPT, ModelConfig
from pgolf.score.lora import Adapters, LoRAConfig, grade_rows, learn_rows, merged, score_documents
from pgolf.score.windows import ScoreConfig, document_starts, join, score

pytestmark = pytest.mark.usefixtures("one_thread")
TABLES = ByteTables(torch.ones(64, dtype=torch.int16), torch.zeros(64, dtype=torch.bool),
    torch.zeros(64, dtype=torch.bool))
WINDOWS = ScoreConfig(eval_seq_len=16, eval_stride=4)
LORA = LoRAConfig(ttt_lora_rank=4, ttt_lora_lr=.01, ttt_lora_chunk_tokens=4, ttt_lora_docs=3,
    ttt_lora_scale=1.5, ttt_lora_targets=r"attn\.c_[qv]$|mlp\.proj$")
LENGTHS = (37, 5, 1, 50, 16, 23, 4) # targets; short ones, and some that end on a chunk or a window


@pytest.fixture(scope="module")
def model():
    cfg = ModelConfig(vocab_size=64, num_layers=3, model_dim=32, num_heads=2, num_kv_heads=1,
        mlp_mult=2, rope_dims=8, skip_init=1., smear=True, bigram_vocab_size=64,
                      bigram_dim=32, ve_dim=32, ve_layers=(2,), xsa_last_n=1)
    model, gen = GPT(cfg), torch.Generator().manual_seed(0)
    with torch.no_grad():
        # every path carries signal
        for p in model.parameters(): p += .1*torch.randn(p.shape, generator=gen)
    return model.eval()


@pytest.fixture(scope="module")
def docs():
    "Documents that open with token 1, which is nowhere else in them."
    gen = torch.Generator().manual_seed(1)
    return [torch.cat([torch.tensor([1]), torch.randint(2, 64, (n-1,), generator=gen)])
        for n in LENGTHS]


# every document is followed by a start token
def stream(docs): return torch.cat([*docs, torch.tensor([1])])
def grades(model, docs, **kw):
    return score_documents(model, stream(docs), TABLES, WINDOWS, replace(LORA, **kw)).nll
def same(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def slow(model, doc, cfg, seq_len=16):
    "One document, its weights written out for each chunk, AdamW by hand."
    base, gen = dict(model.named_parameters()), torch.Generator().manual_seed(cfg.ttt_lora_seed)
    names = [f"blocks.{b}.{layer}.weight" for b in range(3)
        for layer in ("attn.c_q", "attn.c_v", "mlp.proj")]
    A = {n: (2*torch.rand(cfg.ttt_lora_rank, base[n].shape[1], generator=gen)-1)*base[n]
        .shape[1]**-.5 for n in names}
    B = {n: torch.zeros(base[n].shape[0], cfg.ttt_lora_rank) for n in names}
    square, out, n, step = {}, [], len(doc)-1, 0
    for first in range(0, n, cfg.ttt_lora_chunk_tokens):
        stop = min(n, first+cfg.ttt_lora_chunk_tokens)
        start = max(0, stop-seq_len)
        leaves = {("A", k): v.requires_grad_()
            for k, v in A.items()} | {("B", k): v.requires_grad_() for k, v in B.items()}
        weights = base | {k: base[k].detach()+cfg.ttt_lora_scale*B[k]@A[k] for k in names}
        nll = F.cross_entropy(functional_call(model, weights,
            doc[None, start:stop])[0, first-start:], doc[first+1:stop+1], reduction="none")
        out.append(nll.detach())
        step += 1
        for (f, k), g in zip(leaves, torch.autograd.grad(nll.mean(), list(leaves.values()))):
            square[f, k] = cfg.ttt_lora_beta2*square.get((f, k), 0)+(1-cfg.ttt_lora_beta2)*g*g
            table = A if f == "A" else B
            root = (square[f, k]/(1-cfg.ttt_lora_beta2**step)).sqrt()
            table[k] = table[k].detach()*(
                1-cfg.ttt_lora_lr*cfg.ttt_lora_weight_decay)-cfg.ttt_lora_lr*g/(root+1e-10)
    return torch.cat(out).double()


def test_equals_weights_written_out(model, docs):
    got = grades(model, docs).split(LENGTHS)
    for i in (0, 1, 3, 4):
        torch.testing.assert_close(got[i],
            slow(model, torch.cat([docs[i], torch.tensor([1])]), LORA), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kw",
    (dict(ttt_lora_rank=0), dict(ttt_lora_lr=0.), dict(ttt_lora_scale=0.)))
def test_without_learning_it_is_each_document_alone(model, docs, kw):
    same(grades(model, docs, **kw),
        join([score(model, stream([d]), TABLES, 16, 4) for d in docs]).nll)


def test_adapters_learn(model, docs):
    assert not torch.allclose(grades(model, docs), grades(model, docs, ttt_lora_rank=0), atol=1e-3)


@pytest.mark.parametrize("side_by_side", (1, 2, 7, 64))
def test_company_does_not_matter(model, docs, side_by_side):
    same(grades(model, docs, ttt_lora_docs=side_by_side), grades(model, docs))


def test_order_does_not_matter(model, docs):
    order = (3, 6, 0, 5, 1, 4, 2)
    got = dict(
        zip(order, grades(model, [docs[i] for i in order]).split([LENGTHS[i] for i in order])))
    for i, want in enumerate(grades(model, docs).split(LENGTHS)): same(got[i], want)
    same(grades(model, docs[3:4]), got[3]) # alone


@pytest.mark.parametrize("place", (1, 20, 60, 100))
def test_no_grade_knows_its_target_what_follows_or_another_document(model, docs, place):
    tokens, starts = stream(docs), [0, 37, 42, 43, 93, 109, 132, 136]
    assert document_starts(tokens, 1).tolist() == starts[:-1]
    other = tokens.clone()
    other[place] = 2+(other[place]-1) % 62
    runs = [score_documents(model, t, TABLES, WINDOWS, LORA).nll for t in (tokens, other)]
    changed = (runs[0] != runs[1]).nonzero().flatten().tolist()
    end = next(s for s in starts if s > place)
    assert changed[0] == place-1 and changed[-1] == end-1


def test_orders_that_grade_nothing_are_errors(model, docs):
    tokens, adapters = stream(docs), Adapters(model, LORA, 2)
    graded = grade_rows(model, adapters, tokens, [(0, 4, 0), (43, 47, 43)], [0, 1])
    ahead = grade_rows(model, adapters, tokens, [(0, 8, 4), (43, 51, 47)], [0, 1])
    learn_rows(graded, torch.tensor([True, True]))
    for rows in (graded, ahead): # twice, and out of order
        with pytest.raises(ValueError, match="learn from a chunk once"):
            learn_rows(rows, torch.tensor([True, True]))


def test_merged_weights_are_the_adapted_model(model, docs):
    adapters, x = Adapters(model, LORA, 3), stream(docs)[None, 43:59].repeat(2, 1)
    for _ in range(2):
        learn_rows(grade_rows(model, adapters, stream(docs),
            [(0, 4, 0), (43, 47, 43), (93, 97, 93)], [0, 1, 2]), torch.tensor([True, True, False]))
    with torch.no_grad(), adapters.on([1, 2]): got = model(x)
    with torch.no_grad():
        same(got[0], merged(model, adapters, 1)(x[:1])[0])
        same(got[1], model(x[:1])[0]) # its document had ended: nothing was learnt
    assert not torch.equal(got[0], got[1])
    assert all(p.grad is None for p in model.parameters())


def test_a_failure_takes_the_adapters_off(model, docs):
    with pytest.raises(IndexError):
        grade_rows(model, Adapters(model, LORA, 1), stream(docs), [(0, 4, 0), (43, 47, 43)], [0, 1])
    assert not any(m._forward_hooks for m in model.modules())
