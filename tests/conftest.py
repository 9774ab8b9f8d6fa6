"Fixtures shared by all tests; what needs the reference data skips where it is absent."
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
HANG = 900  # seconds for a child that takes less than 20: it stops what hangs, and judges nothing
CLEAN = multiprocessing.get_context("forkserver")  # a process forks off one that has loaded what
CLEAN.set_forkserver_preload(["torch", "nbdev.test"])  # they all need, and has run nothing


class Hand:
    """A time source that moves when told to: by `step` seconds in every step of a run, and by
    `move`."""
    def __init__(self, step=0.): self.time, self.step = 0., step
    def __call__(self): return self.time
    def before_step(self, run): self.move(self.step)
    def move(self, seconds): self.time += seconds


@contextmanager
def no_hang(seconds):
    "Break off what uses `seconds` of processor time, to be fifty times what is normal or more."
    def stop(*_): raise TimeoutError(f"{seconds} s of processor time")
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def described_first():
    "Names of recipes; what differs as it was run is tried with the slow tests."
    from pgolf.systems.recipes import RECIPES
    return [pytest.param(n, marks=pytest.mark.slow) if n.endswith("-as-run") else n
        for n in RECIPES]


@pytest.fixture(scope="session")
def shared():
    "Folder of the reference data beside the checkout."
    path = ROOT.parent / "shared"
    if not path.is_dir(): pytest.skip("reference data absent")
    return path


@pytest.fixture(scope="session")
def golden(shared):
    "Open a golden file by name: `golden('pr610')`."
    return lambda name: np.load(shared / "golden" / f"{name}.npz")


@pytest.fixture
def plain_products(monkeypatch):
    "Products in bfloat16 as published code takes them, `A @ B`, on a CPU of any kind."
    from pgolf.train import muon
    monkeypatch.setattr(muon, "_multiplies_bf16", lambda: True)


@pytest.fixture(scope="module")
def one_thread():
    "Models of tests are faster on one thread."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def novels(tmp_path_factory):
    "The embedded novels as a dataset."
    from pgolf.game.data import austen
    # workers of one run share a folder, and whoever comes first fills it
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: base = base.parent
    return austen(base / "austen" / "austen_sp1024")


def start_pgolf(*args, **kw):
    "The command as a child in a process group of its own, on one thread."
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "pgolf.cli", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=env, start_new_session=True, **kw)


def run_pgolf(*args, **kw):
    "Run the command to its end: exit code, standard output, standard error."
    child = start_pgolf(*args, **kw)
    out, err = child.communicate(timeout=HANG)
    return child.returncode, out, err


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(script, args, log, env):
    with open(log, "w") as out:
        for stream in (1, 2): os.dup2(out.fileno(), stream)
    os.environ.update(env)
    sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
    sys.argv = [str(script), *map(str, args)]
    runpy.run_path(str(script), run_name="__main__")


def on_ranks(world, script, *args):
    """Run a script as torchrun would on one machine, in `world` processes that need not load torch
    anew; the first that fails ends them all, and is told with what it said."""
    env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    if world > 1: env["TORCHELASTIC_RUN_ID"] = "tests"
    logs = [Path(script).with_name(f"said-{r}-of-{world}") for r in range(world)]
    ranks = [CLEAN.Process(target=_rank, args=(script, args, log, env | dict(RANK=str(r),
        LOCAL_RANK=str(r)))) for r, log in enumerate(logs)]
    for p in ranks: p.start()
    left = {p.sentinel: p for p in ranks}
    try:
        while left:
            ended = [left.pop(s) for s in wait(list(left), timeout=HANG)]
            if not ended or any(p.exitcode for p in ended):
                said = "\n".join(log.read_text()[-4000:] for log in logs if log.exists())
                pytest.fail(f"a rank of {world} failed or hangs:\n{said}", pytrace=False)
    finally:
        for p in left.values(): p.kill()
        for p in ranks: p.join()


@pytest.fixture
def main(monkeypatch, capsys):
    """The command in this process: `main('plan', 'pr610')` gives exit code, standard output,
    standard error."""
    def call(*args):
        from pgolf import cli
        monkeypatch.setattr(sys, "argv", ["pgolf", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: cli.main()
        return e.value.code or 0, *capsys.readouterr()
    return call


@pytest.fixture
def coarse(monkeypatch):
    """`pgolf squeeze` tries few steps for each matrix, and a file a little below its budget will
    do."""
    from pgolf.command import submitting
    few = partial(submitting.SqueezeConfig, rungs=8, sample=2048, tries=2, slack=.05)
    monkeypatch.setattr(submitting, "SqueezeConfig", few)


def half_written(folder):
    """What an atomic writer would have removed, and JSON, checkpoints and artifacts that cannot be
    read."""
    import json

    from pgolf.squeeze.artifact import load_artifact
    from pgolf.train.checkpoint import read_checkpoint
    readers = {".json": lambda p: json.loads(p.read_text()), ".safetensors": read_checkpoint,
        ".pgolf": load_artifact, ".npz": lambda p: dict(np.load(p))}
    bad = [p.name for p in folder.rglob("*") if p.name.startswith(".")]
    for p in sorted(folder.rglob("*")):
        try:readers.get(p.suffix, str)(p)
        except Exception as e: bad.append(f"{p.name}: {e}")
    return bad


def last_words(said):
    "What a command says at its end about the next step; nothing if more follows that."
    last = said.rpartition("\nnext:")[2]
    return "" if last == said or "\n\n" in last else " ".join(last.split())
