"""What the campaign has done so far: counts by row in one JSON file, which add up over sittings."""
import fcntl
import json
import os
import subprocess
from contextlib import contextmanager
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT/"nbs"/"results"/"campaign.json"
EMPTY = dict(kills=0, mutated_files=0, losses=0, hours=0., sittings=[], rows={}, found=[])
# each way with each command; each text and each rate with each system; and so on
PLANNED = {"kills": 500, "mutations": 1_000_000, "surroundings": 38, "odd texts": 72,
    "odd numbers": 36, "repeatability": 45, "memory": 49}
HEADS = ("kills", "mutated_files", "losses")  # sums over all rows, which stand at the top


def read(path=RESULTS):
    "The counts, of nothing if there is no file."
    return json.loads(path.read_text()) if path.exists() else json.loads(json.dumps(EMPTY))


def write(path, counts):
    "Whole or not at all."
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    tmp.write_text(json.dumps(counts, indent=1)+"\n")
    os.replace(tmp, path)


@contextmanager
def changing(path=RESULTS):
    "The counts, to be changed by one process at a time; written at the end."
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        counts = read(path)
        yield counts
        counts["planned"] = PLANNED
        write(path, counts)


@contextmanager
def _locked(folder):
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally: os.close(fd)


def add(row, what, path=RESULTS, **numbers):
    "Add numbers to a line of a row; those of the heads are added up at the top, too."
    with changing(path) as counts:
        line = counts["rows"].setdefault(row, {}).setdefault(what, {})
        for k, n in numbers.items():
            line[k] = max(line.get(k, 0), n) if k.startswith("most_") else line.get(k, 0)+n
        for k in HEADS: counts[k] += numbers.get(k, 0)
        line["last"] = today = date.today().isoformat()
        line.setdefault("first", today)


def found(row, what, path=RESULTS):
    "Note a kind of failure, once."
    with changing(path) as counts:
        if any(f["what"] == what for f in counts["found"]): return
        counts["found"].append(dict(date=date.today().isoformat(), row=row, what=what, mended=""))


def commit():
    "Of this checkout, or nothing."
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
        cwd=ROOT)
    return done.stdout.strip()


def sat(seconds, commit="", path=RESULTS):
    "Add a sitting; those of one day and commit are one."
    with changing(path) as counts:
        today, hours = date.today().isoformat(), seconds/3600
        same = [s for s in counts["sittings"] if (s["date"], s["commit"]) == (today, commit)]
        if same: same[0]["hours"] = round(same[0]["hours"]+hours, 3)
        else: counts["sittings"].append(dict(date=today, commit=commit, hours=round(hours, 3)))
        counts["hours"] = round(sum(s["hours"] for s in counts["sittings"]), 3)
