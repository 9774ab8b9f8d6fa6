"""Reading ahead changes nothing: the same weights with the thread and without, over a resume, a
Ctrl-C and a failing disk, for every loader that a configuration can name."""

import signal
import threading
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_training import CFG, PLAN, TINY, Interrupt

from pgolf.game.shards import write_shard
from pgolf.model.gpt import GPT
from pgolf.train import loop
from pgolf.train.ahead import MOST, Ahead, joined
from pgolf.train.device import Ranks
from pgolf.train.loop import LOADERS, Run, TrainConfig, forward_backward, make_loader, pieces, train
from pgolf.train.muon import OptimConfig


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    "Documents that begin with 1, in four shards."
    folder, g = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for i in range(4):
        ids = g.integers(2, 64, 3000).astype(np.uint16)
        ids[::17] = 1
        write_shard(folder/f"train_{i:06}.bin", ids)
    return sorted(folder.glob("*.bin"))


def config(loader): return replace(CFG, loader=loader, warmup_steps=2)


def weights(shards, loader="spans", listeners=(), plan=PLAN, **kw):
    "Final weights and the result of a small run."
    model, cfg = GPT(TINY), config(loader)
    done = train(model, make_loader(shards, cfg), OptimConfig(), plan, cfg, listeners, **kw)
    return model.state_dict(), done


class Direct:
    "What `Ahead` was before: the loader itself."
    def __init__(self, loader, device): self.loader = loader
    def __enter__(self): return self.loader
    def __exit__(self, *_): pass


def threads(): return [t for t in threading.enumerate() if t.name.startswith("pgolf loader")]


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


BORDERED = ("packed", "segments")
PLAIN = [name for name in LOADERS if name not in BORDERED]  # of rows that any model takes


@pytest.mark.parametrize("name", PLAIN)
def test_the_same_bits_with_the_thread_and_without(shards, name):
    with patch.object(loop, "Ahead", Direct): alone, slow = weights(shards, name)
    mine, fast = weights(shards, name)
    assert fast.losses == slow.losses and equal(mine, alone) and not threads()


@pytest.mark.parametrize("name", PLAIN)
def test_a_resumed_run_reads_what_comes_next(shards, name, tmp_path):
    "Though the thread of the first run had read on."
    whole, full = weights(shards, name)
    _, first = weights(shards, name, [Interrupt(3)], out=tmp_path)
    again, second = weights(shards, name, out=tmp_path, resume=first.checkpoint)
    assert first.losses+second.losses == full.losses and equal(whole, again)


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_stands_where_the_run_ended(shards, name):
    cfg = config(name)
    alone, mine = make_loader(shards, cfg), make_loader(shards, cfg)
    with Ahead(mine) as reading:
        for _ in range(5): got, want = reading.next_step(), alone.next_step()
    assert mine.position == alone.position
    for a, b in zip((got, mine.next_step()), (want, alone.next_step())):
        for p, q in zip(a, b, strict=True):
            assert all(torch.equal(t, u) if torch.is_tensor(t) else t == u for t, u in zip(p, q))


def test_ctrl_c_leaves_a_checkpoint_and_no_thread(shards, tmp_path, capsys):
    class Press:
        def after_step(self, run):
            if run.step == 2: signal.raise_signal(signal.SIGINT)
    _, done = weights(shards, listeners=[Press()], out=tmp_path)
    assert (done.stopped_by, done.steps, threads()) == ("interrupted", 2, [])
    assert done.checkpoint.exists() and "stopping after this step" in capsys.readouterr().err


def test_ctrl_c_reaches_a_main_thread_that_waits_for_the_loader():
    asked, go = threading.Event(), threading.Event()
    class Stuck:
        position = 0
        def next_step(self):
            asked.wait()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            go.wait()
            return []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt), Ahead(Stuck()) as reading:
            try:
                asked.set()
                reading.next_step()
            finally: go.set()
    finally: signal.signal(signal.SIGINT, before)
    assert not threads()


def test_an_error_of_the_thread_ends_the_run_where_it_would_have(shards):
    class Torn:
        "The disk is gone at the fourth step."
        def __init__(self): self.inner = make_loader(shards, CFG)
        position = property(lambda s: s.inner.position,
            lambda s, n: setattr(s.inner, "position", n))
        def next_step(self):
            if self.inner.position >= 3*4*65: raise OSError("train_000000.bin: input/output error")
            return self.inner.next_step()
    seen = []
    class Heard:
        def after_step(self, run): seen.append(run.step)
        def on_failure(self, run): seen.append("failed")
    with pytest.raises(OSError, match="input/output error"):
        train(GPT(TINY), Torn(), OptimConfig(), PLAN, CFG, [Heard()])
    assert seen == [1, 2, 3, "failed"] and not threads()


def gradient(shards, cfg, parts):
    "Of one step, cut as `parts` says."
    run = Run(GPT(TINY), [], make_loader(shards, cfg), PLAN, cfg)
    with patch.object(loop, "pieces", lambda micros, *_: parts(micros)):
        loss = forward_backward(run, run.model.loss)
    return loss, torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


def test_joined_spans_have_the_gradient_of_the_spans(shards):
    "PR #1123's order of things on one card: 32 spans in fewer passes."
    cfg = TrainConfig(train_batch_tokens=1024, train_seq_len=32, num_spans=32, warmup_steps=0)
    apart, one = gradient(shards, cfg, list), gradient(shards, cfg, lambda m: joined(m, 256))
    assert len(joined(make_loader(shards, cfg).next_step(), 256)) == 4
    torch.testing.assert_close(one[0], apart[0], rtol=1e-6, atol=0)
    assert (one[1]-apart[1]).norm() < 1e-6*apart[1].norm()


@pytest.mark.parametrize("spans, rows, length, world, passes", [
    (8, 48, 2048, 1, 8),   # PR #610: as it is
    (8, 48, 2048, 8, 1),
    (32, 16, 1024, 1, 8),  # PR #1123: four spans at once
    (32, 16, 1024, 8, 1),
    (8, 64, 1024, 1, 8),   # PR #601
])
def test_passes_on_one_card_and_on_eight(spans, rows, length, world, passes):
    row = torch.zeros(rows, length, dtype=torch.int8)
    got = joined([(row, row)]*(spans//world))
    assert len(got) == passes and max(x.numel() for x, _ in got) <= MOST
    cfg = TrainConfig(spans*rows*length, length, spans)
    assert len(pieces(got, cfg, "cuda")) == passes, "and the loop cuts none of them"


def test_the_thread_asks_for_its_own_card(monkeypatch):
    "Memory is pinned through the card of the thread that asks, and a new thread has card 0."
    on = []
    monkeypatch.setattr(torch.cuda, "set_device", on.append)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t)
    class Ones:
        position = 0
        def next_step(self): return [(torch.ones(1, 2, dtype=torch.int64),)*2]
    with Ahead(Ones(), Ranks(3, 8, "cuda:3").device) as reading: step = reading.coming.result()
    assert on == [torch.device("cuda:3")] and step[0][0].dtype == torch.uint16
