"""A submission's script runs where there is no pgolf, and gives the package's bytes and scores;
faults in a folder are found."""

import ast
import builtins
import functools
import json
import re
import shutil
import site
import subprocess
import venv

import pytest
from conftest import HANG, described_first
from pgolf.submit import doctor
from pgolf.submit import flatten, reach
from pgolf.systems import pipeline
from pgolf.systems.report import Report
from pgolf.submit import script
from pgolf.submit import submission
from pgolf.game.bpb import BYTE_LIMIT
from pgolf.systems.recipes import at_scale, get_recipe

# the script runs on one: another number gives other last bits
pytestmark = pytest.mark.usefixtures("one_thread")

SYSTEMS = ["pr610", "pr576", "pr598", "pr1123", "pr601"]
TARGETS = 1024

DRIVER = """
import runpy, sys
for folder, data in zip(sys.argv[2:], [sys.argv[1]]*len(sys.argv)):
    print("==", flush=True)
    sys.argv = [folder, data, "--eval", folder+"/model.pgolf", "--eval-tokens", "%d",
        "--device", "cpu"]
    runpy.run_path(folder+"/train_gpt.py", run_name="__main__")
""" % TARGETS


def tiny(name): return at_scale(get_recipe(name), "tiny").but(iterations=12, warmup_steps=0)


@functools.cache
def code_of(name): return script.make_code(tiny(name))


@pytest.fixture(scope="module")
def finished(novels, tmp_path_factory):
    "Runs of the package: `finished('pr610')` gives the folder of a tiny one."
    root, made = tmp_path_factory.mktemp("finished"), {}

    def get(name, seed=1337):
        if (name, seed) not in made:
            made[name, seed] = root/f"{name}-{seed}"
            pipeline.run(pipeline.start(tiny(name).but(seed=seed), novels, made[name, seed], "cpu",
                TARGETS, progress=False))
        return made[name, seed]
    return get


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Python of a new environment that finds the installed packages, but neither this checkout nor
    what is installed from it in place."""
    path = tmp_path_factory.mktemp("clean")
    # installing torch anew would take minutes, so its packages are found where they are
    venv.create(path, symlinks=True)
    home = next(path.glob("lib/python*/site-packages"))
    # a .pth in there is not followed: an editable pgolf stays out
    (home/"packages.pth").write_text("\n".join(site.getsitepackages()))
    python = path/"bin"/"python"
    if subprocess.run([python, "-I", "-c", "import pgolf"], capture_output=True,
        cwd=path).returncode == 0:
        pytest.skip("pgolf is installed, not in place: no environment without it")
    return python


def run_clean(python, *args, cwd):
    done = subprocess.run([python, "-I", *map(str, args)], capture_output=True, text=True, cwd=cwd,
        env=dict(OMP_NUM_THREADS="1"), timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_time(rows):
    return [{k: v for k, v in r.items() if k not in ("seconds", "what")} for r in rows]


# ---- the script

@pytest.mark.parametrize("name, scores", [("pr610", 2),
    pytest.param("pr1394", 1, marks=pytest.mark.slow)])
def test_script_trains_without_pgolf_to_the_same_bytes(finished, clean, novels, tmp_path, name,
    scores):
    run, code = finished(name), code_of(name)
    (tmp_path/"train_gpt.py").write_text(code.packed)
    log = submission.read_log(run_clean(clean, "train_gpt.py", novels.path, "--eval-tokens",
        TARGETS, "--device", "cpu", cwd=tmp_path))
    report = Report.load(run/"report.json")
    assert (tmp_path/"model.pgolf").read_bytes() == (run/"model.pgolf").read_bytes()
    assert without_time(log["score"]) == without_time(report.rows[-scores:])
    assert log["squeezed"][0]["bytes_total"] == report.bytes_artifact + len(code.packed.encode())
    assert log["trained"][0]["steps"] == 12 and [s["loss"] for s in log["step"] if "loss" in s]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pr610", "pr576"])
def test_ranks_share_the_scoring_of_a_script(finished, clean, novels, tmp_path, name):
    "Two processes score an artifact as one did: windows to the bit, adaptation to 1e-6."
    (tmp_path/"train_gpt.py").write_text(code_of(name).packed)
    log = submission.read_log(run_clean(clean, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node=2", "train_gpt.py", novels.path, "--eval", finished(name)/"model.pgolf",
        "--eval-tokens", TARGETS, "--device", "cpu", cwd=tmp_path))
    rows = {r["stage"]: r for r in Report.load(finished(name)/"report.json").rows}
    assert [r["stage"] for r in log["score"]] == ["sliding", "adapted"], "each is said once"
    sliding, adapted = log["score"]
    assert sliding["val_loss"] == rows["sliding"]["val_loss"]
    assert abs(adapted["val_loss"] - rows["adapted"]["val_loss"]) < 1e-6


@pytest.mark.slow
def test_scripts_of_all_systems_score_their_artifacts_as_the_package_did(finished, clean,
    novels, tmp_path):
    for name in SYSTEMS:
        (tmp_path/name).mkdir()
        (tmp_path/name/"train_gpt.py").write_text(code_of(name).packed)
        shutil.copy(finished(name)/"model.pgolf", tmp_path/name)
    (tmp_path/"driver.py").write_text(DRIVER)
    said = run_clean(clean, "driver.py", novels.path, *SYSTEMS, cwd=tmp_path).split("==\n")[1:]
    for name, text in zip(SYSTEMS, said, strict=True):
        report, result = (Report.load(finished(name)/"report.json"),
            submission.result_of(submission.read_log(text)))
        assert result["stage"] == report.result["stage"] and abs(
            result["val_bpb"] - report.result["val_bpb"]) < 1e-6, name


@pytest.mark.parametrize("name", described_first())
def test_script_of_every_recipe_is_whole(name):
    tree = ast.parse(script.script(at_scale(get_recipe(name), "full"), 4))
    used = {n.id for s in tree.body for n in reach.global_names(s) if isinstance(n.ctx, ast.Load)}
    unknown = used - reach.bound_names(tree.body) - set(dir(builtins)) - {"__file__"}
    assert not unknown, unknown


@pytest.mark.parametrize("name", [*SYSTEMS, "pr1394", "pr2135"])
def test_readable_script_has_fewer_than_1500_lines(name):
    code = code_of(name)
    assert code.sizes()["lines"] < 1500 and len(code.packed) < len(
        code.minified) < len(code.readable)
    coder = {"brotli"} if name in ("pr1394", "pr2135") else set()
    assert set(submission.outside_imports(code.minified)) - {"numpy", "sentencepiece",
        "safetensors", "torch", "zstandard"} == coder


def test_what_is_left_out_still_exists():
    known = {n for m in reach.read_package().values() for n in m.defs}
    assert (
        set(script.UNUSED) <= known
    ), "script.UNUSED names definitions that are gone: rename or remove them there"
    stand_ins = reach.Module("stand_ins", script.STAND_INS, "pgolf")
    assert set(stand_ins.defs) <= known, "script.STAND_INS stands in for definitions that are gone"


@pytest.mark.parametrize("name", reach.Module("stand_ins", script.STAND_INS, "pgolf").defs)
def test_a_stand_in_replaces_one_definition(name):
    "Another of the same name would be replaced as well, without a word."
    found = [m.name for m in reach.read_package().values() if name in m.defs]
    assert len(found) == 1, found


def test_packing_is_deterministic():
    assert script.make_code(tiny("pr610")) == code_of("pr610")


# ---- the folder

@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed")/"folder"
    return submission.pack_submission([finished("pr610"), finished("pr610", 7)], out, "A. Author",
        "author", date="2026-04-30")


def test_folder_of_two_seeds(folder, finished):
    facts = json.loads((folder/"submission.json").read_text())
    reports = [Report.load(finished("pr610", s)/"report.json").result for s in (7, 1337)]
    assert facts["seeds"] == [7, 1337] and set(facts["seed_results"]) == {"7", "1337"}
    assert (abs(facts["val_bpb"] - sum(r["val_bpb"] for r in reports)/2) < 1e-12
        and facts["val_bpb_std"] > 0)
    assert facts["bytes_total"] == (folder/"train_gpt.py").stat().st_size + max(
        (folder/f"model_seed{s}.pgolf").stat().st_size for s in (7, 1337))
    assert facts["track"] == "non_record_16mb" and not facts["compliance"]["three_seeds"]
    assert doctor.verdict(doctor.doctor(folder)) == "warn"
    text = (folder/"README.md").read_text()
    assert (f"{facts['val_bpb']:.4f}" in text and f"{facts['bytes_total']:,}" in text
        and "2 seeds" in text)
    assert not [p for p in folder.parent.iterdir() if p != folder]


def test_command_packs_and_examines(finished, main, tmp_path):
    out = tmp_path/"folder"
    code, said, err = main("pack", finished("pr610"), "--out", out, "--author", "A",
        "--github-id", "a")
    assert code == 0 and str(out) in said, err
    code, said, _ = main("doctor", out)
    assert code == 0 and "warn" in said
    (out/"README.md").unlink()
    code, said, _ = main("doctor", out)
    assert code == 1 and "README.md" in said
    assert main("doctor", tmp_path/"none")[0] == 1
    code, _, err = main("pack", finished("pr610"), "--out", out, "--author", "A",
        "--github-id", "a")
    assert code == 1 and "exists" in err


def edit(**kw): return lambda text: json.dumps(json.loads(text) | kw)
def swap(a, b): return lambda text: re.sub(a, b, text)


FAULTS = [  # file, change (None: remove it), finding
    ("README.md", None, "files"), ("requirements.txt", None, "requirements"),
    ("train_seed7.log", None, "seed list"),
    ("submission.json", lambda t: "{", "files"), ("submission.json", lambda t: "[]", "fields"),
    ("submission.json", edit(val_bpb=1.0), "val_bpb"),
    ("submission.json", edit(val_loss=None), "usual fields"),
    ("submission.json", edit(val_bpb=float("nan")), "fields"),
    ("submission.json", edit(val_bpb_std=.5), "val_bpb_std"),
    ("submission.json", edit(bytes_total=1), "claimed bytes"),
    ("submission.json", edit(github_id=""), "fields"),
    ("submission.json", edit(date="yesterday"), "date"),
    ("submission.json", edit(seeds=[7]), "seed list"),
    ("submission.json", edit(seeds=[7, 8, 1337]), "seed list"),
    ("submission.json", edit(track="10min_16mb"), "seeds"),
    ("submission.json", edit(track="10min_16mb"), "hardware"),
    ("submission.json", edit(track="10min_16mb"), "split"),
    ("train_gpt.py", lambda t: "from pgolf import gpt\n"+flatten.unpack_code(t), "imports"),
    ("train_gpt.py", lambda t: "import scipy\n"+flatten.unpack_code(t), "requirements"),
    ("train_gpt.py", lambda t: "def f(:", "script"),
    ("train_gpt.py", lambda t: t.replace("b85decode('", "b85decode('zzzz"), "script"),
    ("train_gpt.py", lambda t: t+"#"*BYTE_LIMIT, "bytes"),
    ("train_gpt_readable.py", swap("Muon", "Moon"), "readable form"),
    ("train_seed7.log", swap('"coverage": 1.0', '"coverage": 0.5'), "coverage"),
    ("train_seed7.log", swap('"legal": true', '"legal": false'), "val_bpb"),
    ("train_seed7.log", swap('"text_bytes": ', '"text_bytes": 9'), "arithmetic"),
    ("train_seed7.log", swap(r'(trained .*"seconds": )[\d.]+', r"\g<1>1e4"), "training time"),
    ("train_seed7.log", swap('("stage": "adapted".*"seconds": )[0-9.]+', r"\g<1>601"),
        "evaluation time"),
    ("train_seed7.log", swap('"bytes_artifact": ', '"bytes_artifact": 1'), "logged bytes"),
]


def wrong(found): return {c.check for c in found if c.status in ("warn", "fail")}


@pytest.fixture(scope="module")
def before(folder):
    "What is wrong with the folder before a fault is planted; two may be found twice."
    return wrong(doctor.doctor(folder)) - {"hardware", "split"}


@pytest.mark.parametrize("name,change,check", FAULTS,
    ids=[f"{n}-{c}-{i}" for i, (n, _, c) in enumerate(FAULTS)])
def test_planted_faults_are_found(folder, before, tmp_path, name, change, check):
    copy = tmp_path/"copy"
    shutil.copytree(folder, copy)
    if change is None: (copy/name).unlink()
    else: (copy/name).write_text(change((copy/name).read_text()))
    found = doctor.doctor(copy)
    assert check in wrong(found) - before, [c for c in found if c.status != "ok"]
    assert all(c.remedy for c in found if c.status in ("warn", "fail"))


def test_what_a_log_leaves_out_is_not_known(folder, tmp_path):
    copy = tmp_path/"copy"
    shutil.copytree(folder, copy)
    for log in copy.glob("*.log"): log.write_text(re.sub("(?m)^trained.*$", "", log.read_text()))
    assert [c.status for c in doctor.doctor(copy) if c.check == "training time"] == ["unknown"]


def test_damaged_artifact_and_helper_sources_are_found(folder, tmp_path):
    copy = tmp_path/"copy"
    shutil.copytree(folder, copy)
    data = bytearray((copy/"model_seed7.pgolf").read_bytes())
    data[len(data)//2] ^= 1
    (copy/"model_seed7.pgolf").write_bytes(data)
    (copy/"helper.py").write_text("x = 1\n")
    status = {(c.check, c.status) for c in doctor.doctor(copy)}
    assert ("artifact", "fail") in status and ("other sources", "warn") in status


def test_packing_refuses_what_does_not_belong_together(finished, novels, tmp_path):
    with pytest.raises(ValueError, match="other settings"):
        submission.read_runs([finished("pr610"), finished("pr598")])
    with pytest.raises(ValueError, match="not a report"): submission.read_runs([tmp_path])
    shutil.copytree(finished("pr610"), tmp_path/"run")
    (tmp_path/"run"/"model.pgolf").write_bytes(b"")
    with pytest.raises(ValueError, match="is not the file"):
        submission.pack_submission(tmp_path/"run", tmp_path/"out", "A", "a")
    assert not (tmp_path/"out").exists()
