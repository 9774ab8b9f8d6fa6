"The campaign's programs see what they should, and what they have found stays mended."
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/"tests"/"campaign"))
import advisories  # noqa: E402
import counts  # noqa: E402
import guard  # noqa: E402
import mutations  # noqa: E402
from targets import TARGETS, furnish  # noqa: E402

SEEDS = sorted(p for p in mutations.SEEDS.iterdir() if not p.name.startswith("."))
CLEAN = ("read", "refused")


@pytest.fixture(scope="module", autouse=True)
def hook(): guard.install(more=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The small things that all readers start from."
    path = tmp_path_factory.mktemp("campaign")
    furnish(path)
    return path


@pytest.fixture
def trial(folder, monkeypatch):
    monkeypatch.chdir(folder)
    made = []
    def make(name): return made.append(mutations.Trial(folder, name)) or made[-1]
    yield make
    for t in made: t.restore()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_whole_is_read_and_what_is_changed_is_read_or_refused(name, trial):
    t, rand = trial(name), random.Random(3)
    assert [t.judge(data) for data in t.start] == ["read"]*len(t.start)
    for _ in range(8):
        kind, data = t.mutant(rand)
        assert t.judge(data) in CLEAN, (kind, t.words, data[:2000])


@pytest.mark.parametrize("path", SEEDS, ids=lambda p: p.name)
def test_what_once_failed_is_read_or_refused(path, trial):
    "The smallest files of each kind that a reader failed on, before it was mended."
    name = next(n for n in TARGETS if mutations.slug(n) == path.name.rpartition(".")[0])
    t = trial(name)
    assert t.judge(path.read_bytes()) in CLEAN, t.words


def loop(path):
    while True: pass


def huge(path): raise ValueError(f"{path}: Unable to allocate 1.16 TiB")
def wrong(path): raise KeyError(f"{path}")
def mute(path): raise ValueError("something is wrong")
def chatty(path): raise ValueError(f"{path}"+"x"*2000)
def starts(path): subprocess.run(["true"])
def strays(path): return (path.parent.parent/"other").exists() or open("/var/lib/stray", "w")
def runs(path): exec(compile("1", "their_script.py", "exec"))


FAULTY = dict(hangs=loop, wants=huge, KeyError=wrong, ValueError=mute, more=starts, open=strays,
    executes=runs, characters=chatty, reads=len)


@pytest.mark.parametrize("word", FAULTY)
def test_a_reader_that_does_wrong_is_seen(word, tmp_path):
    path = tmp_path/"file"
    path.write_bytes(b"x")
    read = FAULTY[word] if word != "reads" else (lambda p: 1)
    said = guard.judge(read, lambda data, value: False, (ValueError,), path, b"x", seconds=.2)
    assert word in said and said not in CLEAN


def test_an_oracle_that_fails_is_a_failure(tmp_path):
    (tmp_path/"file").write_bytes(b"x")
    said = guard.judge(len, lambda *_: 1/0, (ValueError,), tmp_path/"file", b"x")
    assert said.startswith("TypeError")  # len of a path
    said = guard.judge(str, lambda *_: 1/0, (ValueError,), tmp_path/"file", b"x")
    assert said == "is read where the oracle fails: ZeroDivisionError"


def test_a_child_that_dies_is_a_failure(folder, monkeypatch, tmp_path):
    import os
    monkeypatch.setattr(mutations, "SEEDS", tmp_path)
    monkeypatch.setitem(TARGETS, "report", TARGETS["report"]._replace(read=lambda p: os.abort()))
    until = time.monotonic()+600
    trials = dict(report=mutations.Trial(folder, "report"))
    told, failures = mutations.batch(trials, 0, until, set())
    assert [f[:2] for f in failures] == [["report", "dies of SIGABRT"]]
    assert told["rows"] == [["report", "failed", 1]] and len(list(tmp_path.iterdir())) == 1


def test_what_a_child_learns_the_next_one_goes_on_from(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(mutations, "SEEDS", tmp_path)
    monkeypatch.setattr(mutations, "BATCH", 100)
    t = mutations.Trial(folder, "report")
    first = len(t.pool)
    told, failures = mutations.batch(dict(report=t), 0, time.monotonic()+600, set())
    assert not failures and sum(n for *_, n in told["rows"]) == 100
    assert len(t.heard) > 2 and len(t.pool) == first+min(mutations.KEPT, len(t.heard))
    assert t.path.read_bytes() == t.whole


def test_moments_move_to_where_a_command_lives():
    import kills
    t = object.__new__(kills.Trial)
    t.seconds, t.writes, t.stages = 9., 100, 12
    for way, death in (("time", {}), ("write", dict(writes=7)), ("stage", dict(stage=3))):
        t.survived(way, 2., death)
        t.survived(way, 8., {k: 10*n for k, n in death.items()})  # an older, slower command
    assert (t.seconds, t.writes, t.stages) == (2., 7, 3)
    rand = random.Random(0)
    for way, when, death in (kills.moment(rand, t) for _ in range(200)):
        assert death.get("writes", 1) in range(1, 8) and death.get("stage", 1) in (1, 2, 3)
        assert way != "time" or when <= 2.1


def test_counts_add_up_over_sittings(tmp_path):
    path = tmp_path/"campaign.json"
    counts.add("kills", "run", path, kills=3, losses=1)
    counts.add("kills", "run", path, kills=2)
    counts.add("mutations", "report", path, mutated_files=7, most_bytes=5)
    counts.add("mutations", "report", path, mutated_files=1, most_bytes=4)
    counts.found("kills", "x", path), counts.found("kills", "x", path)
    counts.sat(1800, "a", path), counts.sat(1800, "a", path)
    d = json.loads(path.read_text())
    assert (d["kills"], d["losses"], d["mutated_files"], d["hours"]) == (5, 1, 8, 1)
    assert d["rows"]["mutations"]["report"]["most_bytes"] == 5
    assert len(d["sittings"]) == len(d["found"]) == 1


def test_the_counts_of_the_book_are_sums():
    d = counts.read()
    for head in counts.HEADS:
        assert d[head] == sum(line.get(head, 0) for row in d["rows"].values()
            for line in row.values())


KILLS = """
import random, sys, tempfile
from pathlib import Path
sys.path.insert(0, "tests/campaign")
import kills, server
server.loaded()
base = Path(tempfile.mkdtemp(dir=sys.argv[1]))
kills.furnish(base)
for name in sys.argv[2:]:
    trial, done = kills.Trial(base, name), {}
    kills.moment = lambda rand, trial: ("write", 300, dict(writes=rand.choice([5, 9, 14])))
    print(name, "|", kills.attempt(random.Random(1), trial, done), "|", done.get("write", 0))
"""


@pytest.mark.slow
def test_a_killed_command_ends_as_if_nothing_had_happened(tmp_path):
    "Whole curve, weights, artifact, scores; also when two ranks are killed."
    names = ["run", "run, 2 ranks", "score", "data build"]
    child = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path), *names], cwd=ROOT,
        capture_output=True, text=True, timeout=900)
    rows = [line.split(" | ") for line in child.stdout.splitlines() if " | " in line]
    assert [r[:2] for r in rows] == [[n, ""] for n in names], child.stdout + child.stderr[-2000:]
    assert sum(int(r[2]) for r in rows) > 1


def test_a_difference_of_bits_is_seen(tmp_path):
    from kills import bits
    (tmp_path/"a.json").write_text('{"seconds": 1, "loss": 2.5}')
    np.savez(tmp_path/"b.npz", x=np.arange(3))
    before = bits(tmp_path)
    (tmp_path/"a.json").write_text('{"seconds": 9, "loss": 2.5}')
    assert bits(tmp_path) == before
    (tmp_path/"a.json").write_text('{"seconds": 9, "loss": 2.4}')
    np.savez(tmp_path/"b.npz", x=np.arange(3)+1)
    assert {k for k, v in bits(tmp_path).items() if before[k] != v} == {"a.json", "b.npz"}


# as the advisory database has them: a fixed range, a range that ends with a version, a list
ADVISORY = dict(id="A-1", affected=[dict(package=dict(name="Some_Lib"), versions=["0.9.post2"],
    ranges=[dict(type="GIT", events=[dict(introduced="0")]), dict(type="ECOSYSTEM", events=[
        dict(introduced="1.0"), dict(fixed="1.2"), dict(introduced="2.0"),
        dict(last_affected="2.3")])])])


@pytest.mark.parametrize("version, hit", [("0.9", False), ("0.9.post2", True), ("1.0", True),
    ("1.1.9", True), ("1.2", False), ("1.10", False), ("2.0", True), ("2.3", True),
    ("2.3.1", False)])
def test_an_advisory_is_held_against_a_version(version, hit):
    assert advisories.affects(ADVISORY, "some-lib", version) is hit
    assert not advisories.affects(ADVISORY, "other", version)


def test_a_pinned_package_with_an_advisory_is_found(tmp_path, monkeypatch, capsys):
    def run(*words): subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path/"vulns"/"some-lib").mkdir(parents=True)
    (tmp_path/"vulns"/"some-lib"/"A-1.yaml").write_text(json.dumps(ADVISORY))
    for words in (("init", "-q"), ("add", "-A"), ("-c", "user.name=a", "-c", "user.email=a@b",
        "commit", "-qm", "one")): run(*words)
    (tmp_path/"lock").write_text("some-lib==1.1 ; python_version < '3' \\\n --hash=a\nb==1\n")
    monkeypatch.setattr(advisories, "LOCK", tmp_path/"lock")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "--counts", str(tmp_path/"c.json")])
    advisories.main()
    assert "2 pinned packages, 1 advisories name one, 1 affected" in capsys.readouterr().out
    [line] = counts.read(tmp_path/"c.json")["rows"]["supply chain"].values()
    assert (line["tried"], line["passed"], len(line["until"])) == (2, 1, 10)
