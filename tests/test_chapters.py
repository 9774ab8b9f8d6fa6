"Every chapter runs from top to bottom, in a process of its own; its visible tests are the tests."
import os
import re
import sys

import pytest
from conftest import CLEAN, ROOT
from scratch import watch

# What is left to `make test-all`; the module of each is tried by other tests as well.
SLOW = {"adaptation", "artifact", "audit", "averaging", "batch", "bench", "ours", "budget",
        "calibration", "card", "caseops", "claims", "cli", "compare", "counts", "data", "device",
        "effects", "embeddings", "entropy", "evaluation", "evidence", "flatten", "formats", "gpt",
        "gptq", "great", "growth", "listeners", "loaders", "loop", "lora", "lowrank", "machines",
        "muon", "notebook", "order", "ownership", "page", "peer", "phased", "pipeline", "plan",
        "published", "quant", "queue", "race", "rate", "reach", "recipes", "record", "road",
        "ruled", "rulings", "running", "schedule", "script", "sdclip", "segments", "slurm",
        "softcap", "streams", "submission", "submitting", "summit", "tilt", "tokenizer", "ttt",
        "unwrap", "verdict", "windows"}
CHAPTERS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                  # those are runs: `make reproduce`
                  if p.parent.name not in ("runs", ".ipynb_checkpoints"))


def execute(path, log):
    "Run a chapter as `nbdev_test` does; what it prints goes into a file."
    from nbdev.test import test_nb
    with open(log, "w") as out:
        for stream in (1, 2): os.dup2(out.fileno(), stream)
    written = watch()
    ok, _ = test_nb(path, skip_flags=["notest"], basepath=ROOT)
    if written: print(f"AssertionError: writes outside of a scratch folder: {written[:5]}")
    sys.exit(not ok or bool(written))


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


def test_a_chapter_that_writes_beside_itself_is_seen(tmp_path):
    import nbformat
    planted = ROOT/"nbs"/f"planted-{os.getpid()}.txt"
    code = f"open({str(planted)!r}, 'w').close()"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]),
        tmp_path/"00_beside.ipynb")
    try:
        with pytest.raises(pytest.fail.Exception, match="outside of a scratch folder"):
            test_chapter(tmp_path/"00_beside.ipynb", tmp_path)
    finally: planted.unlink(missing_ok=True)


def test_what_is_left_out_are_chapters():
    assert SLOW <= {name_of(p) for p in CHAPTERS}
