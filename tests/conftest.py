"Fixtures shared by all tests; what needs the reference data skips where it is absent."
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
HANG = 900  # seconds for a child that takes less than 20: it stops what hangs, and judges nothing


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
    return austen(tmp_path_factory.mktemp("austen") / "austen_sp1024")


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
