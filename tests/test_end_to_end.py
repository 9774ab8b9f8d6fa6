"""From text to a scored artifact through the doors that users take: the command, papermill, several
processes, interruptions."""

import json
import os
import signal
import time

import nbformat
import numpy as np
import pytest
from conftest import HANG, ROOT, half_written, run_pgolf, start_pgolf

from pgolf.scale.notebook import execute
from pgolf.scale.runs import OWN
from pgolf.game.bpb import BYTE_LIMIT
from pgolf.systems.report import Report
from pgolf.systems.pipeline import read_artifact
from pgolf.systems.plan import estimate_bytes
from pgolf.systems.recipe import load_recipe
from pgolf.systems.recipes import SCALES, at_scale, get_recipe
from pgolf.submit.script import script_bytes

STAGES = ["raw", "averaged", "quantized", "artifact", "sliding", "adapted"]
LONG = ("-o", "iterations=60")  # a second or more of training: time to interrupt it


def tiny(novels, out, *more):
    "Arguments of a tiny run."
    return "run", "pr610", "--scale", "tiny", "--corpus", novels.path, "--out", out, *more


def numbers(out):
    "What a run computed, without its times."
    report = json.loads((out/"report.json").read_text())
    rows = [{k: v for k, v in r.items() if k != "seconds"} for r in report["rows"]]
    return rows, report["bytes_artifact"], report["parameters"], report["settings"]


def losses(out): return np.array(json.loads((out/"training.json").read_text())["losses"])


def wait_until(ready, child, seconds=HANG):
    "Poll until `ready()`; a child that ends first is an error."
    end = time.monotonic() + seconds
    while not ready():
        if child.poll() is not None or time.monotonic() > end: pytest.fail(child.communicate()[1])
        time.sleep(.005)


def lines(path): return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="session")
def reference(novels, tmp_path_factory):
    "A run that nothing disturbs: folder, exit code, both outputs."
    out = tmp_path_factory.mktemp("runs")/"reference"
    return out, *run_pgolf(*tiny(novels, out, *LONG))


# ---- the command

def test_run_ends_with_a_table_and_a_complete_report(reference):
    out, code, said, err = reference
    assert code == 0, err
    report = Report.load(out/"report.json")
    assert report.complete and [r["stage"]
        for r in report.rows] == STAGES and report.training["stopped_by"] == "iterations"
    assert [line.split()[0] for line in said.splitlines()[2:8]] == STAGES
    for r in report.rows:
        assert (0 < r["val_bpb"] < 8 and r["targets"] == SCALES["tiny"].eval_tokens
            and r["coverage"] == 1 and f"{r['val_bpb']:.4f}" in said)
    assert report.bytes_artifact == (out/"model.pgolf").stat().st_size and 1000 < (
        script := script_bytes(load_recipe(out/"recipe.json"))) < report.bytes_code
    assert f"{report.bytes_artifact+script:,} of {BYTE_LIMIT:,}" in said
    assert sum(p.numel()
        for p in read_artifact(out/"model.pgolf").parameters()) == report.parameters
    assert "60/60" in err and half_written(out) == []
    planned = sum(b for *_, b in estimate_bytes(at_scale(get_recipe("pr610"), "tiny")))
    assert abs(planned/report.bytes_artifact
        -1) < .15, "the plan's estimate against the bytes that came"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_same_command_gives_the_same_bits(reference, novels, main, tmp_path):
    "In another process, into another folder."
    out, again = reference[0], tmp_path/"again"
    code, _, err = main(*tiny(novels, again, *LONG))
    assert code == 0, err
    assert numbers(again) == numbers(out) and (losses(again) == losses(out)).all()
    assert (again/"model.pgolf").read_bytes() == (out/"model.pgolf").read_bytes()


@pytest.mark.slow
def test_two_processes_train_as_one(reference, novels, tmp_path):
    one, two = reference[0], tmp_path/"two"
    code, said, err = run_pgolf(*tiny(novels, two, *LONG, "--nproc", 2))
    assert code == 0, said + err
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
    report = Report.load(two/"report.json")
    assert report.complete and report.nproc == 2 and [r["stage"] for r in report.rows] == STAGES
    np.testing.assert_allclose([r["val_loss"] for r in report.rows],
        [r["val_loss"] for r in Report.load(one/"report.json").rows], rtol=1e-3)
    assert half_written(two) == []


# ---- interruptions

@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_ctrl_c_leaves_a_partial_report_and_the_same_command_goes_on(reference, novels,
    tmp_path, nproc):
    out = tmp_path/"cut"
    # the signal has a longer way
    steps, slow = (60, ()) if nproc == 1 else (20,
        ("-o", "iterations=20", "-o", "train_batch_tokens=8192"))
    args = tiny(novels, out, *LONG, "--nproc", nproc, *slow)
    child = start_pgolf(*args)
    wait_until(lambda: lines(out/"metrics.jsonl") > 6, child)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to every process of the job
    said, err = child.communicate(timeout=HANG)
    assert child.returncode == 130, said + err
    last = err.splitlines()[-1]
    assert last.startswith("pgolf: interrupted: stopped at step ") and "goes on" in last, err
    report = Report.load(out/"report.json")
    assert (not report.complete and report.training["stopped_by"] == "interrupted"
        and 4 < report.training["steps"] < steps)
    assert ((out/"checkpoint.safetensors").exists() and not (out/"weights.safetensors").exists()
        and half_written(out) == [])
    code, said, err = run_pgolf(*args)
    assert code == 0, said + err
    assert half_written(out) == [] and Report.load(out/"report.json").complete
    assert len(losses(out)) == steps  # the whole curve, both parts
    if nproc == 1:
        assert numbers(out) == numbers(reference[0]) and (losses(out) == losses(reference[0])).all()


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(reference, novels, tmp_path):
    out = tmp_path/"killed"
    args = tiny(novels, out, *LONG, "-o", "checkpoint_every=5")
    child = start_pgolf(*args)
    wait_until((out/"checkpoint.safetensors").exists, child)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate(timeout=HANG)
    assert not Report.load(out/"report.json").complete
    # what a power cut can leave
    with (out/"metrics.jsonl").open("a") as f: f.write('{"step": 5, "ela')
    code, _, err = run_pgolf(*args)
    assert code == 0, err
    rows, want = numbers(out)[0], numbers(reference[0])[0]
    assert rows == want and Report.load(out/"report.json").complete
    assert all(json.loads(line) for line in (out/"metrics.jsonl").read_text().splitlines())


# ---- notebooks

@pytest.fixture(scope="session")
def quiet():
    "Kernels on one thread, with this checkout's package."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("OMP_NUM_THREADS", "1")
        m.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="session")
def executed(quiet, novels, tmp_path_factory):
    "The run notebook, executed with parameters that all differ from its own."
    out = tmp_path_factory.mktemp("notebook")/"pr610"
    given = dict(scale="tiny", data=str(novels.path), out=str(out), seed=7, nproc=2,
        eval_tokens=1024, overrides=dict(iterations=12))
    return out, nbformat.read(execute(ROOT/"nbs"/"runs"/"pr610.ipynb", out, given), 4)


@pytest.mark.slow
def test_papermill_parameters_reach_the_run(executed):
    out, nb = executed
    report = Report.load(out/"report.json")
    assert report.complete and [r["stage"] for r in report.rows] == STAGES
    assert (report.recipe, report.scale, report.seed, report.nproc,
        report.training["steps"]) == ("pr610", "tiny", 7, 2, 12)
    assert {r["targets"] for r in report.rows} == {1024}
    tags = [c.metadata.get("tags", []) for c in nb.cells]
    assert tags.index(["injected-parameters"]) == tags.index(
        ["parameters"]) + 1, "papermill found no parameters cell"


@pytest.mark.slow
def test_executed_notebook_tells_the_run(executed):
    out, nb = executed
    shown = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in shown if o.output_type == "error" or o.get("name") == "stderr"]
    text = "\n".join(o.get("data", {}).get("text/markdown", "") for o in shown)
    report = Report.load(out/"report.json")
    assert (all(f"{r['val_bpb']:.4f}" in text for r in report.rows) and "seed 7" in text
        and f"{report.bytes_artifact:,}" in text)
    assert all(c.stage in text for c in get_recipe("pr610").claims) and "xz" in text
    assert sum("image/png" in o.get("data", {}) for o in shown) >= 3
    assert {p.name for p in (out/"figures").iterdir()} >= {"loss.png", "bytes.png", "scores.png"}
    assert half_written(out) == []


@pytest.mark.slow
def test_report_prints_scoreboard_and_paths(executed, main):
    out = executed[0]
    code, said, _ = main("report", out)
    assert (code == 0 and "pr610" in said
        and f"{Report.load(out/'report.json').bpb('adapted'):.4f}" in said)
    for name in ("pr610.ipynb", "report.json", "model.pgolf", "loss.png"):
        assert str(out) in said and name in said


def test_unknown_override_stops_the_notebook_with_near_matches(quiet, novels, tmp_path):
    given = dict(scale="tiny", corpus=str(novels.path), out=str(tmp_path),
        overrides=dict(matrix_rl=.1))
    with pytest.raises(
        RuntimeError,
        match=(
            r"ValueError: unknown setting 'matrix_rl'; near matches: .*matrix_lr.*the partial"
            r" notebook is"
        ),
    ):
        execute(ROOT/"nbs"/"runs"/"pr610.ipynb", tmp_path, given)
    partial = nbformat.read(tmp_path/"pr610.partial.ipynb", 4)
    assert any("matrix_rl" in o.get("evalue", "") for c in partial.cells if c.cell_type == "code"
        for o in c.outputs)


@pytest.mark.slow
def test_failing_cell_leaves_the_partial_notebook_and_a_clear_last_line(quiet, main, tmp_path):
    cell = nbformat.v4.new_code_cell
    known = "\n".join(f"{k} = None" for k in sorted(OWN | {"out"}))
    nb = nbformat.v4.new_notebook(cells=[cell(known, metadata=dict(tags=["parameters"])),
        cell("print('reached', out)"), cell("1/0"), cell("print('too far')")])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, tmp_path/"pr610.ipynb")
    code, said, err = main("reproduce", "pr610", "--scale", "tiny", "--notebooks", tmp_path,
        "--out", tmp_path/"runs")
    partial = tmp_path/"runs"/"tiny"/"pr610"/"pr610.partial.ipynb"
    last = err.splitlines()[-1]
    assert (code == 1 and last.startswith("pgolf: error: ")
        and "ZeroDivisionError: division by zero" in last and str(partial) in last)
    assert "Traceback" not in err
    text = partial.read_text()
    assert f"reached {partial.parent}" in text and "ZeroDivisionError" in text
    outputs = [c.outputs for c in nbformat.read(partial, 4).cells if c.cell_type == "code"
        and "too far" in c.source]
    assert outputs == [[]]
