"Every chapter runs from top to bottom, in a process of its own; its visible tests are the tests."
import multiprocessing
import os
import re
import sys

import pytest
from conftest import ROOT

# What is left to `make test-all`; the module of each is tried by other tests as well.
SLOW = {"adaptation", "artifact", "audit", "batch", "bench", "budget", "calibration", "card",
        "caseops", "cli", "data", "effects", "embeddings", "entropy", "formats", "gpt", "gptq",
        "growth", "loop", "lora", "muon", "page", "pipeline", "plan", "running", "script",
        "segments", "slurm", "softcap", "submission", "submitting", "tilt", "tokenizer", "ttt",
        "verdict", "windows"}
CHAPTERS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                  # those are runs: `make reproduce`
                  if p.parent.name not in ("runs", ".ipynb_checkpoints"))
CLEAN = multiprocessing.get_context("forkserver")  # every chapter forks off a process that has
CLEAN.set_forkserver_preload(["torch", "nbdev.test"])  # loaded what they all need, and run nothing


def execute(path, log):
    "Run a chapter as `nbdev_test` does; what it prints goes into a file."
    from nbdev.test import test_nb
    with open(log, "w") as out:
        for stream in (1, 2): os.dup2(out.fileno(), stream)
    ok, _ = test_nb(path, skip_flags=["notest"], basepath=ROOT)
    sys.exit(not ok)


def name_of(path): return re.sub(r'^\d+[a-z]?_', '', path.stem)


def parameter(path):
    marks = [pytest.mark.slow] if name_of(path) in SLOW else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [parameter(p) for p in CHAPTERS])
def test_chapter(path, tmp_path):
    child = CLEAN.Process(target=execute, args=(path, tmp_path/"log"))
    child.start()
    child.join()
    if child.exitcode:
        pytest.fail(f"{path.name}: {(tmp_path/'log').read_text()[-4000:]}", pytrace=False)


def test_a_chapter_that_fails_is_seen(tmp_path):
    "The other outcome, with what it said."
    import nbformat
    cells = [nbformat.v4.new_code_cell(s)
        for s in ("import torch", "print('so far')\nassert 1 == 2")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/"00_bad.ipynb")
    with pytest.raises(pytest.fail.Exception, match="00_bad.ipynb: .*AssertionError"):
        test_chapter(tmp_path/"00_bad.ipynb", tmp_path)


def test_what_is_left_out_are_chapters():
    assert SLOW <= {name_of(p) for p in CHAPTERS}
