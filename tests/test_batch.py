"""Many runs side by side: plans, their order, failures, signals, the scoreboard, and the notebooks
in the wheel."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
from conftest import HANG, ROOT, last_words, run_pgolf, start_pgolf
from hypothesis import given
from hypothesis import strategies as st
from test_end_to_end import wait_until

from pgolf.command import batches
from pgolf.scale import batch
from pgolf.systems import pipeline
from pgolf.systems.report import Report, by_system
from pgolf.scale.runs import OWN, Run, check_plan, make_plan, read_plan
from pgolf.scale.batch import Local, jobs_for

FAKE = """
from pathlib import Path
from pgolf.systems.ownership import open_corpus
from pgolf.systems import pipeline
from pgolf.scale.runs import Run
import time
run = Run(recipe, out, scale, corpus, device, seed, nproc, eval_tokens, overrides)
job = pipeline.start(run.resolve(), open_corpus(corpus), out, device)
print("seed", seed, flush=True)
"""
ENDS = """
if seed == 3 and not Path(out, "again").exists():
    Path(out, "again").touch()
    raise ValueError("the third seed fails")
while seed == 9 and not Path(out, "again").exists():
    Path(out, "again").touch()
    while True: time.sleep(.05)
"""
LAST = """
job.report.complete = True
job.report.rows = [dict(stage="sliding", val_loss=4.+seed, val_bpb=2.+seed, legal=True,
    coverage=1., what="", targets=1, text_bytes=1, seconds=0.)]
job.report.save(job.out/"report.json")
"""


def notebook(folder, name, *sources):
    "A run notebook that trains nothing."
    cells = [nbformat.v4.new_code_cell(s)
        for s in ("\n".join(f"{f} = None" for f in sorted(OWN | {"out"})), *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    meta = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=meta), folder/name)


@pytest.fixture(scope="session")
def fakes(tmp_path_factory):
    "Folder of two quick run notebooks: of pr610 and pr576."
    folder = tmp_path_factory.mktemp("fakes")
    for name in ("pr610.ipynb", "pr576.ipynb"): notebook(folder, name, FAKE, ENDS, LAST)
    return folder


@pytest.fixture
def here(monkeypatch):
    "Children find this checkout's package."
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def command(fakes, novels, out, *more):
    return ("batch", *more, "--scale", "tiny", "--corpus", novels.path, "--device", "cpu",
        "--notebooks", fakes, "--out", out)


# ---- plans

@given(st.lists(st.sampled_from(["pr610", "pr576", "pr598-as-run"]), min_size=1, unique=True),
       st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_a_plan_is_all_recipes_with_all_seeds(recipes, seeds):
    plan = make_plan(recipes, seeds=seeds)
    assert [(r.recipe, r.seed) for r in plan] == [(r, s) for r in recipes for s in seeds]
    assert len({r.out for r in plan}) == len(plan) and {r.label for r in plan} == set(recipes)


def test_the_same_plan_from_names_yaml_and_toml(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "scale: tiny\nout: there\noverrides: {matrix_lr: 0.02}\nruns: [pr610, {recipe: pr576,"
        " seeds: [1, 2]}]"
    )
    (tmp_path / "a.toml").write_text(
        'scale = "tiny"\nout = "there"\noverrides.matrix_lr = 0.02\nruns = ["pr610", {recipe ='
        ' "pr576", seeds = [1, 2]}]'
    )
    entries = ["pr610", dict(recipe="pr576", seeds=[1, 2])]
    plan = make_plan(entries, "there", scale="tiny", overrides=dict(matrix_lr=.02))
    assert read_plan(tmp_path/"a.yaml") == read_plan(tmp_path/"a.toml") == plan
    assert [r.out for r in plan] == [f"there/tiny/{n}"
        for n in ("pr610-matrix_lr=0.02-1337", "pr576-matrix_lr=0.02-1", "pr576-matrix_lr=0.02-2")]
    more = read_plan(tmp_path/"a.yaml", seeds=[5], out="here", overrides=dict(ttt_lr=.1))
    assert [(r.seed, r.out.split("/")[0]) for r in more] == [(5, "here"), (1, "here"), (2, "here")]
    assert more[0].overrides == dict(matrix_lr=.02, ttt_lr=.1)


def test_long_settings_make_short_folders_that_differ():
    many = [make_plan(["pr610"], overrides={f"a_long_name_{i}": v for i in range(20)})[0].out
        for v in (1, 2)]
    assert many[0] != many[1] and all(len(Path(m).name) < 100 for m in many)


@pytest.mark.parametrize("text, words", [
    ("runs: [pr61]", ["run 1 of 1", "unknown recipe 'pr61'", "pr610"]),
    ("runs: [pr610, {recipe: pr576, overrides: {matrx_lr: 1}}]",
        ["run 2 of 2", "'matrx_lr'", "matrix_lr"]),
    ("runs: [{recipe: pr610, overrides: {num_heads: 5}}]", ["num_heads=5"]),
    ("runs: [{recipe: pr610, overrides: 3}]", ["overrides=3", "ttt_lr: 0.001"]),
    ("runs: [{recipe: pr610, overrides: {seed: 3}}]", ["--seeds"]),
    ("runs: [{recipe: pr610, nproc: 3}]", ["nproc=3"]),
    ("runs: [{recipe: pr610, nproc: two}]", ["nproc='two'", "int"]),
    ("runs: [{recipe: pr610, corpus: nowhere}]", ["nowhere"]),
    ("runs: [{recipe: pr610, scale: huge}]", ["huge"]),
    ("runs: [{recipe: pr610, seads: [1]}]", ["'seads'", "near matches: seeds"]),
    ("runs: [{recipe: pr610, seeds: 1}]", ["seeds=1", "whole numbers"]),
    ("runs: [pr610, pr610]", ["runs 1 and 2 share", "`name`"]),
    ("runs: [{scale: tiny}]", ["run 1", "`recipe`"]),
    ("runs: []", ["no runs"]),
    ("runs: pr610", ["a plan has a list"]),
    ("runs: [", ["is no YAML"]),
])
def test_what_cannot_run_is_refused_before_anything_runs(main, tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(text)
    for dry in ([], ["--dry-run"]):
        code, _, err = main("batch", "plan.yaml", *dry)
        assert (code == 1 and err.splitlines()[-1].startswith("pgolf: error: ")
            and "Traceback" not in err)
        assert all(w in err for w in words), err
    assert not Path("runs").exists()


def test_other_mistakes_of_the_command_line(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, word in ((("absent.yaml",), "no plan absent.yaml"),
        (("a.yaml", "pr610"), "one file"), (("pr610", "--jobs", "0"), "jobs='0'"),
                       (("pr610", "--threads", "0"), "threads=0"),
                       (("pr610", "-o", "ttt_lr"), "write field=value"),
                       (("pr610", "--notebooks", tmp_path), "no run notebooks")):
        code, _, err = main("batch", *args, "--dry-run")
        assert code == 1 and word in err, err


def test_dry_run_prints_the_plan_and_writes_nothing(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, _ = main("batch", "pr610", "pr576", "--seeds", 1337, 1, 2, "-o", "matrix_lr=0.02",
        "--jobs", "auto", "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == []
    rows = [line.split() for line in said.splitlines()[2:8]]
    assert [(r[1], r[2], r[3]) for r in rows] == [(r, "pocket", s) for r in ("pr610", "pr576")
        for s in ("1337", "1", "2")]
    assert max(map(len, said.splitlines())) <= 100
    assert last_words(said) == "the same command without --dry-run makes them"


# ---- how many at once

@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 10**12), st.integers(1, 9))
def test_jobs_fill_the_machine_and_no_more(cores, threads, memory, runs):
    plan, need = make_plan(["pr610"], seeds=list(range(runs)), scale="tiny"), 3*10**9
    with pytest.MonkeyPatch.context() as m:
        m.setattr(batch, "memory_of", lambda run: need)
        n, _ = jobs_for(plan, "auto", threads, cores, memory)
    assert 1 <= n <= runs
    assert n == 1 or (n*threads <= cores and n*need <= memory)
    assert n == runs or (n+1)*threads > cores or (n+1)*need > memory
    assert jobs_for(plan, 3, threads)[0] == min(3, runs), "what is asked for is taken"


def test_a_command_names_its_threads_and_its_cards():
    run = Run("pr610", "there", overrides=dict(ttt_lr="0.1"))
    words = batch.command(run, Path("a b.ipynb"), 3, "GPU-1,GPU-2")
    assert words[0] == "env" and {"OMP_NUM_THREADS=3",
        "CUDA_VISIBLE_DEVICES=GPU-1,GPU-2"} < set(words)
    assert Run(**json.loads(words[-1])) == run and "a b.ipynb" in words
    assert not [w for w in batch.command(run, Path("a")) if w.startswith("CUDA")]


# ---- runs

@pytest.mark.slow
def test_failed_runs_stop_nothing_and_are_tried_again(fakes, novels, here, tmp_path):
    out = tmp_path/"runs"
    args = command(fakes, novels, out, "pr610", "--seeds", 1, 3, "--jobs", 2)
    code, said, err = run_pgolf(*args)
    assert (
        code == 1
        and "Traceback (most recent call last)" not in err
        and "IPKernelApp" not in err + said
    ), err
    last = err.splitlines()[-1]
    assert (last.startswith("pgolf: error: 1 of 2 run(s) finished; failed: ")
        and "ValueError: the third seed fails" in last)
    assert str(out/"tiny"/"pr610-3"/"run.log") in err and "the same command" in last
    assert "3.0000" in said, "what has finished is on the board"
    def started():
        return {p.parent.name: len(re.findall(r"^seed \d", p.read_text(), re.M))
            for p in out.rglob("run.log")}
    assert started() == {"pr610-1": 1, "pr610-3": 1}
    code, said, err = run_pgolf(*args)
    assert code == 0, err
    assert started() == {"pr610-1": 1, "pr610-3": 2}, "finished runs are not run again"
    mean = said.split("over seeds")[1].splitlines()[4].split()
    assert mean[0] == "pr610" and mean[2:5] == ["2", "4.0000", "1.4142"]
    assert (max(map(len, said.splitlines())) <= 100 + len(str(out))
        and "`pgolf report" in last_words(said))


@pytest.mark.slow
def test_ctrl_c_stops_all_and_the_same_command_goes_on(fakes, novels, here, tmp_path):
    out = tmp_path/"runs"
    args = command(fakes, novels, out, "pr610", "pr576", "--seeds", 9, "--jobs", 2)
    child = start_pgolf(*args)
    marks = [out/"tiny"/f"{r}-9"/"again" for r in ("pr610", "pr576")]
    wait_until(lambda: all(m.exists() for m in marks), child)
    child.send_signal(signal.SIGINT)
    said, err = child.communicate(timeout=HANG)
    assert child.returncode == 130, said + err
    assert (
        err.splitlines()[-1]
        == "pgolf: interrupted: 0 of 2 run(s) finished; the same command goes on")
    for m in marks:
        assert not Report.load(m.parent/"report.json").complete
        assert "interrupted" in (m.parent/"run.log").read_text().splitlines()[-1]
        assert "Traceback" not in (m.parent/"run.log").read_text()
    code, said, err = run_pgolf(*args)
    assert code == 0, err
    assert all(Report.load(m.parent/"report.json").complete for m in marks)


def test_what_does_not_hear_an_interrupt_is_ended(tmp_path):
    """One that ignores SIGINT hears SIGTERM, one that ignores both is killed; the rest is not
    started."""
    shells = [f"trap '' {s}; touch {tmp_path}/{i}; while :; do sleep .05; done"
        for i, s in enumerate(("INT", "INT TERM"))]
    todo = [(lambda _, s=s: ["sh", "-c", s], tmp_path/f"{i}.log")
        for i, s in enumerate([*shells, "true"])]
    pool = Local(2, patience=.2)
    def press():
        while not all((tmp_path/n).exists() for n in "01"): time.sleep(.02)
        pool.children.press()
    threading.Thread(target=press).start()
    assert dict(pool.run(todo)) == {0: -signal.SIGTERM, 1: -signal.SIGKILL, 2: None}


def test_folder_of_another_run_is_refused_and_kept(novels, tmp_path):
    run = Run("pr610", str(tmp_path/"a"), "tiny", str(novels.path), "cpu")
    pipeline.start(run.resolve(), novels, run.out, "cpu")
    assert check_plan([run]) == ["unfinished"]
    other = Run("pr610", run.out, "tiny", str(novels.path), "cpu", seed=2)
    with pytest.raises(ValueError, match=r"run 1 of 1 .*holds another run.*--out"):
        check_plan([other])
    (tmp_path/"file").touch()
    with pytest.raises(ValueError, match="is a file"):
        check_plan([Run("pr610", str(tmp_path/"file"), "tiny", str(novels.path))])


def test_settings_are_not_mixed_into_one_mean(tmp_path):
    "Seeds are averaged per settings: another matrix_lr is another system."
    plans = [make_plan(["pr610"], tmp_path, scale="tiny", seeds=[1, 2], overrides=o)
        for o in ({}, dict(matrix_lr=.02))]
    for i, plan in enumerate(plans):
        for run in plan:
            job = Report("pr610", "", "tiny", "x", run.seed, "cpu", 1, 1, complete=True)
            job.rows = [dict(stage="sliding", val_loss=1.+i, val_bpb=1.+i, legal=True,
                coverage=1., what="", targets=1, text_bytes=1, seconds=0.)]
            Path(run.out).mkdir(parents=True)
            job.save(Path(run.out)/"report.json")
    done = [batch.Outcome(r, "finished") for plan in plans for r in plan]
    groups = by_system(
        batch.plan_reports([*done, batch.Outcome(Run("pr576", "absent"), "failed")]))
    assert [(g["system"], g["seeds"], g["bpb"]) for g in groups] == [("pr610", 2, 1.),
        ("pr610-matrix_lr=0.02", 2, 2.)]


def test_other_recipes_have_the_general_notebook(novels, tmp_path):
    from pgolf.scale.notebook import notebook_of
    assert notebook_of("pr610-as-run").name == "pr610.ipynb" and notebook_of(
        "baseline").name == "any.ipynb"


# ---- the terminal

def test_every_command_knows_h_and_version(main):
    import pgolf
    from pgolf import cli
    names = [[c.name or c.callback.__name__] for c in cli.app.registered_commands]
    for name in [[], ["data"], ["data", "build"], *names]:
        code, said, _ = main(*name, "--version")
        assert (code, said) == (0, f"pgolf {pgolf.__version__}\n"), name
        code, said, _ = main(*name, "-h")
        assert code == 0 and said.startswith("Usage: ") and "--version" in said, name


def test_ctrl_c_while_modules_load_is_a_line():
    "The signal arrives inside an import of torch, from the import itself."
    hook = ("import os, signal, sys\n"
            # a shell that starts this in the background has the signal ignored
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "class Finder:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'torch.nn': os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Finder())\n")
    for start in (
        "import pgolf; sys.argv = ['pgolf', 'plan', 'pr610']; pgolf.main()",
        "sys.argv[0] = '-m'; sys.orig_argv = ['python', '-m', 'pgolf.cli']; import pgolf.cli",
    ):
        out = subprocess.run([sys.executable, "-c", hook + start], cwd=ROOT,
            capture_output=True, text=True)
        assert (out.returncode == 130 and out.stderr.startswith("pgolf: interrupted while loading")
            and out.stderr.count("\n") == 1)


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    code = "import pgolf, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    for given_, want in (({}, "passive"), (dict(OMP_WAIT_POLICY="active"), "active")):
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env | given_,
            capture_output=True, text=True)
        assert out.stdout.split() == [want, "False"], out.stderr


@pytest.mark.parametrize("system, wanted", [
    ([], ["pr610", "pr576", "pr598", "pr1123", "pr601", "pr1855"]), (["pr2135"], ["pr2135"])])
def test_reproduce_runs_the_book_and_the_summit_or_what_is_named(main, monkeypatch, system, wanted):
    asked = []
    monkeypatch.setattr(batches, "run_batch", lambda runs, *_: asked.extend(r.recipe for r in runs))
    code, _, err = main("reproduce", *system)
    assert (code, asked) == (0, wanted), err


# ---- the wheel

@pytest.mark.slow
def test_the_wheel_carries_the_run_notebooks(tmp_path):
    "Built from a copy of the sources; without the checkout the package finds its own notebooks."
    copy = tmp_path/"sources"
    copy.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "data", "notebooks")
    for name in ("pgolf", "nbs"): shutil.copytree(ROOT/name, copy/name, ignore=skip)
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in",
        "README.md", "LICENSE"):
        shutil.copy(ROOT/name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "--wheel-dir", str(tmp_path), str(copy)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    wanted = {p.name for p in (ROOT/"nbs"/"runs").glob("*.ipynb")}
    with zipfile.ZipFile(wheel) as z:
        assert ({Path(n).name for n in z.namelist() if n.startswith("pgolf/notebooks/")} == wanted
            and len(wanted) >= 6)
        z.extractall(tmp_path/"site")
    env = {k: v for k, v in os.environ.items()
        if k != "PYTHONPATH"} | dict(PYTHONPATH=str(tmp_path/"site"))
    code = (
        "from pgolf.scale.notebook import own_notebooks; print(*own_notebooks().values(),"
        " sep='\\n')"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env,
        capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    paths = [Path(p) for p in found.stdout.split()]
    assert {p.parent for p in paths} == {tmp_path/"site"/"pgolf"/"notebooks"}
    assert {p.name for p in paths} == wanted - {"any.ipynb", "scoreboard.ipynb"} # of no system
