"Several processes, and signals from outside: what one process cannot show of the training loop."
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from conftest import HANG, ROOT, on_ranks
from pgolf.game.shards import write_shard
from pgolf.train.checkpoint import read_checkpoint

JOB = '''
import json, sys, time
from pathlib import Path
from conftest import Hand
from pgolf.train.averaging import EMA
from pgolf.model.gpt import GPT, ModelConfig
from pgolf.train.listeners import Checkpointer, MetricsLog, Validate
from pgolf.train.muon import OptimConfig
from pgolf.train.schedule import ScheduleConfig
from pgolf.train.device import close_ranks, setup_ranks
from pgolf.train.loop import TrainConfig, make_loader, train

shard, out, args = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
ranks = setup_ranks("cpu")
model = GPT(ModelConfig(vocab_size=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2,
    mlp_mult=2., rope_dims=4, skip_init=1.))
cfg = TrainConfig(train_batch_tokens=512, train_seq_len=32, num_spans=4, warmup_steps=1,
    log_every=1)
steps = dict(iterations=8, warmdown_iters=4, muon_momentum_warmup_steps=4)
plan = ScheduleConfig(**steps | args.get("plan", {}))

class Lag:
    "Steps that take their time."
    def after_step(self, run): time.sleep(args.get("lag", 0))
class Ready:
    "Tell the parent that steps are being taken."
    def after_step(self, run):
        if run.is_main: print("step", run.step, flush=True)

loader = make_loader([shard], cfg, ranks)
listeners = [EMA(.9), MetricsLog(), Checkpointer(5), Lag(), Ready(),
    Validate(3, lambda m: {"val_loss": 0.})]
kw = {}
if "step" in args: # a clock of its own for each rank, the second twice as fast as the first
    hand = Hand(args["step"]*(1+ranks.rank))
    listeners, kw = [*listeners, hand], dict(now=hand)
res = train(model, loader, OptimConfig(), plan, cfg, listeners, out=out,
    resume=args.get("resume"), **kw)
state = {k: v.double().sum().item() for k,v in model.state_dict().items()}
(out/f"rank{ranks.rank}.json").write_text(json.dumps(dict(losses=res.losses, steps=res.steps,
    stopped_by=res.stopped_by, elapsed=res.elapsed, lr=res.lr_scales, weights=state,
    world=ranks.world)))
close_ranks()
'''


@pytest.fixture
def written(tmp_path):
    "The job and its data."
    g = np.random.default_rng(0)
    write_shard(tmp_path/"train.bin",
        (np.arange(20_000) % 50 + g.integers(0, 3, 20_000)).astype(np.uint16))
    (tmp_path/"job.py").write_text(JOB)
    return tmp_path/"job.py", tmp_path/"train.bin"


@pytest.fixture
def done(written, tmp_path):
    "Do the job on `world` ranks; their reports, and the folder."
    def call(name, world=1, **args):
        out = tmp_path/name
        out.mkdir()
        on_ranks(world, *written, out, json.dumps(args))
        return [json.loads(p.read_text()) for p in sorted(out.glob("rank*.json"))], out
    return call


@pytest.fixture
def job(written, tmp_path):
    "Start the job with `world` ranks, as people do; returns the process and its folder."
    def start(name, world=1, **args):
        out = tmp_path/name
        out.mkdir(exist_ok=True)
        launcher = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={world}"]
        cmd = [sys.executable, *launcher, *map(str, written), str(out), json.dumps(args)]
        env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/"tests")]))
        return subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=env), out
    return start


def finish(started, code=0):
    "Wait for a job; its reports by rank."
    process, out = started
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == code, err
    return [json.loads(p.read_text()) for p in sorted(out.glob("rank*.json"))]


def test_two_ranks_train_as_one_and_rank_zero_alone_writes(done):
    (a, b), out = done("two", world=2)
    [one], _ = done("one")
    assert (one["world"], a["world"], b["world"]) == (1, 2, 2)
    np.testing.assert_allclose(a["losses"], one["losses"], rtol=1e-4)
    assert a | dict(elapsed=0) == b | dict(elapsed=0)  # losses, rates, and every weight, to the bit
    lines = [json.loads(l) for l in (out/"metrics.jsonl").read_text().splitlines()]
    assert [l["step"] for l in lines if "loss" in l] == list(range(1, 9))
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.safetensors", "metrics.jsonl",
        "rank0.json", "rank1.json"]
    # one rank goes on with what two have begun
    [rest], _ = done("rest", resume=str(out/"checkpoint.safetensors"))
    assert rest["steps"] == 8 and len(rest["losses"]) == 3
    np.testing.assert_allclose(rest["losses"], a["losses"][5:], rtol=1e-4)


@pytest.mark.slow
def test_ranks_of_unequal_speed_agree_on_clock_and_rate(done):
    """The slower clock counts for both: twelve steps of half a second, though the faster has
    counted half."""
    plan = dict(iterations=1000, max_wallclock_seconds=6., warmdown_iters=5)
    (a, b), _ = done("lag", world=2, step=.25, plan=plan)
    assert [(r["stopped_by"], r["steps"], r["elapsed"]) for r in (a, b)] == [("wallclock", 12, 3.),
        ("wallclock", 12, 6.)]
    assert a["lr"] == b["lr"] and a["lr"][-1] < 1 and a["weights"] == b["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_ctrl_c_writes_a_checkpoint_that_can_be_resumed(job, world):
    started = process, out = job("cut", world=world, lag=.02,
        plan=dict(iterations=100_000, warmdown_iters=4))
    while "step 6" not in (line := process.stdout.readline()): assert line, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    if world == 1:
        [report] = finish(started)
        assert report["stopped_by"] == "interrupted" and report["steps"] >= 6
    else:
        # torchrun reports the signal with an exit code of its own
        process.communicate(timeout=HANG)
    tensors, meta = read_checkpoint(out/"checkpoint.safetensors")
    assert meta["step"] >= 6 and (world == 2 or meta["step"] == report["steps"])
    assert not list(out.glob(".*")) and any(k.startswith("EMA.0/") for k in tensors)
