"Counts of what followed before: causal, normalised, and the same through every door."
import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.score.counts import count_rows, counted, seen
from pgolf.score.order import CountWatch, last_words, turns
from pgolf.score.tilt import TiltConfig
from pgolf.score.windows import Scores
from pgolf.submit.script import make_code, script
from pgolf.systems.pipeline import run, start
from pgolf.systems.recipe import load_recipe
from pgolf.systems.recipes import at_scale, get_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXTS = 3
TOKENS = st.lists(st.integers(0, 4), min_size=2, max_size=40)


def logp_of(n, V=5, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, V, generator=gen, dtype=torch.float64).log_softmax(-1)


@given(TOKENS, st.sampled_from([1, 3, 1000]))
@settings(deadline=None)
def test_rows_sum_to_one_and_hold_the_score(tokens, block):
    x = torch.tensor(tokens)
    at = torch.arange(len(x)-1)
    nll = -logp_of(len(at))[at, x[1:]]
    rows = count_rows(logp_of(len(at)), nll, x, at, CONTEXTS, block)
    assert torch.allclose(rows.exp().sum(1), torch.ones(len(at), dtype=torch.float64))
    scores = counted(nll, x, CONTEXTS, block)
    assert torch.allclose(scores, -rows[at, x[1:]])


@given(TOKENS, st.integers(1, 4), st.data())
@settings(deadline=None)
def test_no_count_knows_its_target_or_what_follows(tokens, order, data):
    t = data.draw(st.integers(1, len(tokens)-1))
    later = data.draw(st.lists(st.integers(0, 4), min_size=len(tokens)-t, max_size=len(tokens)-t))
    a, b = (seen(torch.tensor(x), order) for x in (tokens, tokens[:t]+later))
    assert torch.equal(a.times[:t], b.times[:t]) and torch.equal(a.kinds[:t], b.kinds[:t])
    assert torch.equal(a.same[:t-1], b.same[:t-1])


@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.integers(1, 3))
@settings(deadline=None)
def test_documents_take_turns_once_each(lengths, docs):
    "Every target once; counts see nothing of a document whose turn is later."
    gen = torch.Generator().manual_seed(sum(lengths))
    parts = [torch.cat([torch.ones(1, dtype=torch.long),
        torch.randint(2, 6, (n-1,), generator=gen)]) for n in lengths]
    text = torch.cat([*parts, torch.ones(1, dtype=torch.long)])
    spans = turns(text, docs)
    at = torch.cat([torch.arange(*s) for s in spans])
    assert sorted(at.tolist()) == list(range(len(text)-1))
    scores = Scores(torch.rand(len(text)-1, generator=gen).double(), torch.ones(len(text)-1))
    cfg = TiltConfig(tilt_contexts=CONTEXTS)
    before = CountWatch(spans).raised(scores, text, cfg).nll
    a, b = spans[-1]
    other = text.clone()
    other[a+1:b] = 6
    after = CountWatch(spans).raised(scores, other, cfg).nll
    done = torch.ones(len(text)-1, dtype=torch.bool)
    done[a:b] = False
    assert torch.equal(before[done], after[done])


def test_a_recipe_says_which_has_the_last_word(tmp_path):
    birdie = at_scale(get_recipe("birdie"), "tiny")
    text = torch.randint(1, 9, (60,), generator=torch.Generator().manual_seed(0))
    assert isinstance(last_words(birdie, text), CountWatch)
    assert not isinstance(last_words(birdie.but(tilt_contexts=0), text),
        CountWatch)
    birdie.save(tmp_path/"recipe.json")
    assert load_recipe(tmp_path/"recipe.json") == birdie
    with pytest.raises(ValueError, match="tilt_contexts=-1 not in 0..16"):
        birdie.but(tilt_contexts=-1)


def test_the_script_counts_and_leaves_hints_out():
    birdie = at_scale(get_recipe("birdie"), "tiny")
    text = script(birdie)
    assert "CountWatch(turns(text[0], LORA.ttt_lora_docs))" in text
    assert "def strong_hints" not in text and "def counted" in text
    assert make_code(birdie).sizes()["lines"] < 1500
    alone = script(birdie.but(use_ttt=False))
    assert "CountWatch(turns(text[0], 0))" in alone and "def learn_all" not in alone


@pytest.mark.slow
def test_the_packed_script_ends_on_the_same_score(novels, tmp_path):
    "Trained, squeezed and counted by the script alone."
    r = at_scale(get_recipe("birdie"), "tiny").but(iterations=4, samples=4, ttt_phases=0,
        ttt_lora_chunk_tokens=64)
    report = run(start(r, novels, tmp_path/"run", "cpu", 2048, progress=False))
    (tmp_path/"train_gpt.py").write_text(make_code(r).packed)
    flat = tmp_path/"flat"
    flat.mkdir()
    for p in (*novels.train_shards, *novels.val_shards, novels.tokenizer_path): shutil.copy(p, flat)
    done = subprocess.run([sys.executable, "train_gpt.py", "flat", "--eval-tokens", "2048",
        "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [json.loads(line.removeprefix("score ")) for line in done.stdout.splitlines()
        if line.startswith("score ")]
    found = {row["stage"]: row["val_bpb"] for row in rows}
    assert found["tilted"] == pytest.approx(report.bpb("tilted"), abs=1e-9)
    assert found["tilted"] < found["adapted"]
