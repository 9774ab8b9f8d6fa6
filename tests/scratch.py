"""Watch what a process writes: everything outside the scratch folder, save the caches of Python and
of libraries."""
import os
import sys
import tempfile
from pathlib import Path

CACHES = {"__pycache__", ".cache", ".config", ".ipython", ".jupyter", ".local", ".hypothesis",
    ".triton"}
ROOT = Path(__file__).resolve().parent.parent
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# asked for once: its first call opens a file under a lock, which a hook would wait for
SCRATCH = Path(tempfile.gettempdir()).resolve()


def outside(path):
    "Whether a path, seen from here, is no place to write."
    if not isinstance(path, (str, bytes, Path)): return False  # a file that is open already
    path = Path(os.path.abspath(os.fsdecode(path)))
    if path.parts[1:2] and path.parts[1] in ("dev", "proc", "sys"): return False
    if CACHES & set(path.parts): return False
    if path.is_relative_to(ROOT): return True  # a checkout may lie among scratch folders
    return not path.resolve().is_relative_to(SCRATCH)


def watch():
    "From now on, list each file that is opened for writing, and each folder that is made, outside."
    seen = []
    def hook(event, args):
        if event == "open" and (args[2] or 0) & WRITES and outside(args[0]): seen.append(args[0])
        if event in ("os.mkdir", "os.rename") and outside(args[0]): seen.append(args[0])
    sys.addaudithook(hook)
    return seen
