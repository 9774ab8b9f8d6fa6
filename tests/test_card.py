"""The first minutes on a card, played on a CPU at the smallest size: every step answers, none takes
the answers of another along when it is cut off, and what travels is all that is needed."""

import importlib.util
import json
import subprocess
import sys

import nbformat
import pytest
from conftest import HANG, ROOT

from pgolf.speed.card import STEPS, read_answers
from pgolf.speed.timing import read_bench
from pgolf.systems.report import Report

spec = importlib.util.spec_from_file_location("card", ROOT/".ci"/"card.py")
card = importlib.util.module_from_spec(spec)
spec.loader.exec_module(card)

# Of what papermill, kernels and coders ask for, this the card's image has.
THERE = {"aiohttp", "aiohappyeyeballs", "aiosignal", "frozenlist", "multidict", "propcache", "yarl",
    "certifi", "charset-normalizer", "click", "idna", "packaging", "psutil",
    "pygments", "python-dateutil", "pyyaml", "requests", "six", "tqdm", "typing-extensions",
    "urllib3"}
PYTHON = dict(python_version="3.12", python_full_version="3.12.3", os_name="posix", extra="",
    implementation_name="cpython", platform_python_implementation="CPython",
    sys_platform="linux", platform_system="Linux", platform_machine="x86_64")


def asked(tmp_path, *args):
    "The script, small; its answers, and what it printed."
    words = [sys.executable, ROOT/".ci"/"card.py", *args, "--size", "tiny", "--out", tmp_path/"out",
        "--work", tmp_path/"work", "--wheels", tmp_path/"none"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return read_answers(tmp_path/"out"/"card-answers.jsonl"), done.stdout


@pytest.mark.slow
def test_both_calls_answer_everything(tmp_path):
    found, said = asked(tmp_path, "all", "--slower", 50)  # a busy machine judges nothing
    assert list(dict.fromkeys(a["step"] for a in found)) == list(STEPS)
    log = (tmp_path/"out"/"card.log").read_text()
    bad = [a for a in found if a["question"] == "(the step)" or "NO" in a["answer"].split(":")[0]]
    assert not bad, f"{bad}\n{log[-3000:]}"
    assert all(a["question"] in said and a["answer"] in said for a in found)
    by = {a["question"]: a["answer"] for a in found}
    assert by["Does an interrupted run keep its work?"].startswith("yes: exit code 130")
    assert by["Does its audit pass?"] == "yes"
    assert "no script at hand" in by.values()
    out = tmp_path/"out"
    assert read_bench(out/"card-bench.json")["rows"]
    report = Report.load(out/"card-run.json")
    assert report.complete and report.training["steps"] == 12
    nbformat.read(out/"card-run.ipynb", 4)
    assert len(list(out.iterdir())) <= 8, "so many files come back from a card"


def test_a_step_that_is_cut_off_costs_itself_alone(tmp_path):
    out = tmp_path/"out"
    out.mkdir()
    answers, settings = out/"card-answers.jsonl", tmp_path/"settings.json"
    settings.write_text(json.dumps(dict(out=str(out), work=str(tmp_path)) | card.SIZES["tiny"]))
    card.append(answers, "versions", "Which torch?", "this one", 1.)
    with (out/"card.log").open("ab") as log: card.step("recipes", .05, settings, answers, log)
    with answers.open("a") as f: f.write('{"step": "attention", "qu')  # the machine is taken away
    first, second = read_answers(answers)
    assert first["answer"] == "this one" and second["answer"].startswith("cut off after")
    assert [line.split(" | ")[0].strip() for line in card.table(answers).splitlines()] == [
        "step", "versions", "recipes"]


def test_a_step_that_fails_says_why(tmp_path):
    out = tmp_path/"out"
    out.mkdir()
    answers, settings = out/"card-answers.jsonl", tmp_path/"settings.json"
    settings.write_text(json.dumps(dict(out=str(out), work=str(tmp_path), scale="huge")))
    with (out/"card.log").open("ab") as log: card.step("recipes", HANG, settings, answers, log)
    [only] = read_answers(answers)
    assert only["answer"].startswith("FAILED: ValueError: scale='huge'")


def test_no_time_no_step(tmp_path):
    found, _ = asked(tmp_path, "B", "--limit", "0.5")
    assert [(a["step"], a["answer"]) for a in found] == [(n, "left out: no time")
        for n in card.CALLS["B"]]


def test_the_calls_fit_a_lease_and_name_every_step():
    assert sum(card.CALLS["A"].values()) <= 330 and sum(card.CALLS["B"].values()) <= 360
    assert list(card.CALLS["A"] | card.CALLS["B"]) == list(STEPS)


def test_what_travels_is_all_that_the_image_lacks():
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement
    todo, needed = ["papermill", "ipykernel", "brotli", "zstandard"], set()
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in needed: continue
        needed.add(name)
        try: wants = [Requirement(r) for r in requires(name) or ()]
        except PackageNotFoundError: continue
        todo += [r.name for r in wants if r.marker is None or r.marker.evaluate(PYTHON)]
    assert needed - THERE - {"debugpy"} == set(card.LACKING)


def test_shards_become_a_dataset(shared, tmp_path):
    "Decompressed on the card, by what travelled."
    from pgolf.game.data import open_dataset
    at = tmp_path/"debdocs"
    at.mkdir()
    for name in card.SHARDS[-1:]:
        for split in ("train", "val"):
            (at/name.replace("val", split)).symlink_to(shared/"data"/"debdocs"/name)
    (at/card.TOKENIZER).symlink_to(shared/"data"/card.TOKENIZER)
    data = open_dataset(card.unpack(at, tmp_path/"work"))
    assert (data.vocab_size, len(data.val_tokens())) == (1024, 486_346)
