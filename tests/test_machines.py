"""Several machines train one model: two agents on this one's loopback, each with the command, the
folders and the files of its own that two machines would have."""

import json
import os
import signal
import socket

import psutil
import pytest
from conftest import HANG, half_written, run_pgolf, start_pgolf
from test_end_to_end import losses, wait_until

from pgolf.systems.report import Report
from pgolf.train.checkpoint import read_checkpoint

LONGER = ("-o", "iterations=120", "-o", "checkpoint_every=20")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def pair(novels, tmp_path):
    "Start the command on both; each has a folder of its own to be in and to write to."
    def start(name, *more, port=None, seeds=(1, 1)):
        port, children = port or free_port(), []
        for place, seed in enumerate(seeds):
            at = tmp_path/f"{name}-{place}"
            at.mkdir(exist_ok=True)
            children.append(start_pgolf(*words(novels, at/"run", seed, *more), "--nnodes", 2,
                "--rdzv", f"127.0.0.1:{port}", "--node-rank", place, cwd=at))
        return children, tmp_path/f"{name}-0"/"run", tmp_path/f"{name}-1"
    return start


def words(novels, out, seed=1, *more):
    return ("run", "pr610", "--scale", "tiny", "--corpus", novels.path, "--out", out, "--device",
        "cpu", "--seed", seed, "--eval-tokens", 512, *more)


def ends(children):
    "Exit codes, and what each said."
    said = [c.communicate(timeout=HANG) for c in children]
    return [c.returncode for c in children], [a+b for a, b in said]


def family(child):
    "All processes that a command has started, itself last."
    return [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]


def assert_same_weights(a, b):
    "To the bit, raw and averaged."
    x, y = (read_checkpoint(f/"weights.safetensors")[0] for f in (a, b))
    assert x.keys() == y.keys() and all(x[n].equal(y[n]) for n in x)


@pytest.fixture(scope="module")
def undisturbed(novels, tmp_path_factory):
    "The same run by two processes of one machine."
    out = tmp_path_factory.mktemp("undisturbed")/"run"
    code, _, err = run_pgolf(*words(novels, out, 1, *LONGER), "--nproc", 2)
    assert code == 0, err
    return out


@pytest.mark.slow
def test_two_machines_are_one_with_as_many_ranks(pair, undisturbed):
    children, out, other = pair("two", *LONGER)
    codes, said = ends(children)
    assert codes == [0, 0], said
    assert losses(out).tolist() == losses(undisturbed).tolist()
    assert_same_weights(out, undisturbed)
    assert Report.load(out/"report.json").nproc == 2
    assert list(other.iterdir()) == [], "the other machine writes nothing that stays"
    assert half_written(out) == [] and "this was machine 1 of 2" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["machine", "agent"])
def test_a_lost_machine_ends_the_other_and_the_same_command_goes_on(pair, undisturbed, whole):
    "A machine that is cut off takes all its processes along; an agent that dies leaves its rank."
    children, out, _ = pair("lost", *LONGER)
    state = out/"checkpoint.safetensors"
    wait_until(state.exists, children[0])
    gone = family(children[1])
    if not whole: gone = [p for p in gone if "torch.distributed.run" in p.cmdline()]
    for p in gone: p.send_signal(signal.SIGKILL)
    codes, said = ends(children)
    assert codes[0] == 1 and codes[1] != 0, said
    last = said[0].splitlines()[-1]
    assert last.startswith("pgolf: error: the stage 'train' in 1 processes on each of 2 machines")
    assert str(out) in last and not [p for p in gone if p.is_running()
        and p.status() != psutil.STATUS_ZOMBIE]
    reached = read_checkpoint(state)[1]["step"]
    assert 20 <= reached < 120
    children, out, _ = pair("lost", *LONGER)
    codes, said = ends(children)
    assert codes == [0, 0], said
    assert json.loads((out/"training.json").read_text())["steps"] == 120
    assert losses(out)[reached-120:].tolist() == losses(undisturbed)[reached:].tolist()
    assert_same_weights(out, undisturbed)


@pytest.mark.slow
def test_ctrl_c_on_one_stops_both_at_the_same_step(pair):
    children, out, _ = pair("stop", "-o", "iterations=100000")
    wait_until(lambda: (out/"metrics.jsonl").exists()
        and '"step": 3' in (out/"metrics.jsonl").read_text(), children[0])
    os.killpg(children[0].pid, signal.SIGINT)
    for p in family(children[0])[:-1]:  # torchrun's children are in sessions of their own
        if "worker" in p.cmdline() and "torch.distributed.run" not in p.cmdline():
            p.send_signal(signal.SIGINT)
    codes, said = ends(children)
    assert codes[0] == 130, said
    state = read_checkpoint(out/"checkpoint.safetensors")[1]["step"]
    assert json.loads((out/"training.json").read_text())["steps"] == state


@pytest.mark.slow
def test_machines_that_mean_different_runs_are_told(pair):
    children, out, _ = pair("differ", seeds=(1, 2))
    codes, said = ends(children)
    assert codes == [1, 1], said
    assert all("the machines do not mean the same run: recipe differ" in s for s in said)
    assert not (out/"metrics.jsonl").exists()


def test_what_cannot_meet_is_refused_before_anything_is_written(main, novels, tmp_path):
    out = tmp_path/"run"
    for more, word in ((("--nnodes", 2), "--rdzv HOST:PORT"), (("--nnodes", 0), "--nnodes 0"),
        (("--nnodes", 3, "--rdzv", "192.0.2.1:1"), "--node-rank 1 to 2"),
        (("--nnodes", 2, "--rdzv", "127.0.0.1:1", "--node-rank", 2), "--node-rank 2"),
        (("--nnodes", 3, "--rdzv", "127.0.0.1:1"), "nproc=3")):
        code, _, err = main(*words(novels, out), *more)
        assert code == 1 and word in err, err
    assert not out.exists()


def test_inside_slurm_nothing_need_be_said(main, novels, tmp_path, monkeypatch):
    "What srun sets tells the command that it is the third of four, and whom to call."
    from pgolf.systems import pipeline
    seen = []
    monkeypatch.setattr(pipeline, "join", lambda *args: seen.append(args))
    for name, value in dict(SLURM_STEP_NUM_NODES=4, SLURM_NODEID=2, SLURM_JOB_ID=77,
        SLURM_STEP_NODELIST="gpu[07-10]").items(): monkeypatch.setenv(name, str(value))
    code, _, err = main(*words(novels, tmp_path/"run"), "--nproc", 2)
    assert code == 0, err
    machines = seen[0][2]
    assert (machines.count, machines.place, machines.host, machines.port) == (4, 2, "gpu07", 29477)
    assert "machine 2 of 4" in err and list(tmp_path.iterdir()) == []


def test_a_job_of_several_machines_trains_beside_the_first(main, novels, tmp_path, monkeypatch):
    "The first executes the notebook and hands the machines on; another one only trains."
    from dataclasses import asdict

    from pgolf.command import batches
    from pgolf.scale.runs import Run
    from pgolf.train.machines import Machines
    calls = []
    monkeypatch.setattr(batches, "join", lambda *args: calls.append(args))
    monkeypatch.setattr(batches, "execute", lambda *args: calls.append(args))
    given = json.dumps(asdict(Run("pr610", str(tmp_path), "tiny", str(novels.path), nproc=2)))
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "a,b")
    for place in ("0", "1"):
        monkeypatch.setenv("SLURM_NODEID", place)
        code, _, err = main("execute", "x.ipynb", tmp_path, given)
        assert code == 0, err
    assert calls[0][2]["machines"] == asdict(Machines(2, 0, "a")) and calls[0][2]["nproc"] == 2
    assert calls[1][2] == Machines(2, 1, "a") and calls[1][4] == 2
