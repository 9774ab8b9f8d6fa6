"""Mutated files for every reader: read exactly, or refused in one clear error, within two seconds
and a gigabyte; nothing is executed, and no file is touched outside of the folder.

`python tests/campaign/mutations.py --seconds 60 --seed 7` tries files for a minute. The work is
done in children that may die; what they were reading when they died is a failure as well."""
import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import counts  # noqa: E402
import guard  # noqa: E402
import psutil  # noqa: E402
from targets import TARGETS, Target, furnish  # noqa: E402

SEEDS = HERE/"seeds"  # failures, each as small as it became, kept for tests/test_campaign.py
BATCH = 5000          # files of one child
KEPT = 40             # files of a target that were kept because something new was said of them


def slug(name): return re.sub(r"\W+", "-", name)


def classed(said):
    "An outcome without its numbers and names, to tell new ones from old ones."
    return re.sub(r"'[^']*'|\"[^\"]*\"|[\d.,e+-]*\d|0x\w+", "*", said)[:120]


class Trial:
    "A target in its folder: judges files."
    def __init__(self, folder, name):
        self.target:Target = TARGETS[name]
        self.folder, self.name, self.path = folder, name, Path(folder)/self.target.file
        self.start = [self.path.read_bytes()] if name.partition(",")[0] != "published" else []
        self.start += self.target.more(folder)
        self.whole = self.path.read_bytes()
        self.pool, self.heard, self.words = list(self.start), set(), ""
    def judge(self, data):
        "Outcome of one file, which lies there for the reader alone."
        t = self.target
        self.words = ""
        def read(path):
            try: return t.read(path)
            except BaseException as e:
                self.words = f"{type(e).__name__}: {e}"
                raise
        self.path.write_bytes(data)
        try: said = guard.judge(read, t.exact, t.errors, self.path, data, self.folder)
        finally: self.path.write_bytes(self.whole)
        return "leaves a file behind" if Path("executed").exists() else said
    def mutant(self, rand):
        "A new file, and the name of the mutation."
        kind = rand.choice(list(self.target.kinds))
        a, b = rand.choice(self.pool), rand.choice(self.start)
        try: return kind, self.target.kinds[kind](rand, a, b)
        except Exception: return "raw", self.target.kinds.get("raw", lambda *_: a[:-1])(rand, a, b)
    def learn(self, data, said):
        "Keep a file that made the reader say something new: its mutants go on from there."
        new = classed(f"{said} {self.words}")
        if new in self.heard: return
        self.heard.add(new)
        if len(self.pool) < KEPT+len(self.start) and len(data) < 10**6: self.pool.append(data)


def smaller(trial, data, said, tries=100):
    "The file with pieces left out, as long as the same is said of it."
    size = max(1, len(data)//2)
    while size and tries > 0:
        at = 0
        while at < len(data) and tries > 0:
            less, tries = data[:at]+data[at+size:], tries-1
            if trial.judge(less) == said: data = less
            else: at += size
        size //= 2
    return data


def keep(trial, data, said):
    "Store a failure as the seed of a test."
    if not said.startswith("hangs"): data = smaller(trial, data, said)
    name = f"{slug(trial.name)}.{hashlib.sha256(data).hexdigest()[:8]}"
    (SEEDS/name).write_bytes(data)
    return name


def child(folder, seed, names, until, results, known):
    "Judge files until the time is over; write counts now and then, failures as they come."
    os.chdir(folder)
    warnings.simplefilter("ignore")
    guard.install()
    rand, done = random.Random(seed), Counter()
    trials:dict[str, Trial] = {}
    shares = [TARGETS[n].share for n in names]
    for i in range(BATCH):
        if time.monotonic() > until: break
        name = rand.choices(names, shares)[0]
        if name not in trials: trials[name] = Trial(folder, name)
        trial = trials[name]
        _, data = trial.mutant(rand)
        (results/"now").write_bytes(trial.name.encode()+b"\0"+data)
        said = trial.judge(data)
        trial.learn(data, said)
        done[trial.name, said if said in ("read", "refused") else "failed"] += 1
        if said not in ("read", "refused"): _note(trial, data, said, results, known)
        if i % 50 == 0 or time.monotonic() > until: _tell(results, done)
    _tell(results, done)


def _note(trial, data, said, results, known):
    "Keep a failure of a kind that is new."
    words = trial.words[:300]
    sort = classed(f"{trial.name}: {said}: {words.partition(':')[0]}")
    if sort in known: return
    known.add(sort)
    line = json.dumps([trial.name, said, words, keep(trial, data, said), sort])
    with open(results/"failures", "a") as f: f.write(line+"\n")


def _tell(results, done):
    "Counts so far, and the peak of memory."
    rows = [[*k, n] for k, n in done.items()]
    text = json.dumps(dict(rows=rows, peak=guard.peak_bytes()))
    (results/"counts.new").write_text(text)
    os.replace(results/"counts.new", results/"counts")


def batch(folder, seed, names, until, known):
    "One child from its start to its end: its counts, and what failed."
    results = Path(tempfile.mkdtemp(prefix="results-"))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(folder, seed, names, until, results, known)
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    died = _wait(pid, results)
    told = json.loads((results/"counts").read_text()) if (results/"counts").exists() else {}
    failures = [json.loads(s) for s in (results/"failures").read_text().splitlines()] if (
        results/"failures").exists() else []
    if died and not (results/"now").exists():
        raise RuntimeError(f"a child of the campaign {died} before it had read a file")
    if died:
        name, _, data = (results/"now").read_bytes().partition(b"\0")
        file = f"{slug(name.decode())}.{hashlib.sha256(data).hexdigest()[:8]}"
        (SEEDS/file).write_bytes(data)
        failures.append([name.decode(), died, "", file, died])
        told.setdefault("rows", []).append([name.decode(), "failed", 1])
    shutil.rmtree(results)
    return told, failures


def _wait(pid, results):
    "Wait for a child, and end one that hangs; how it died, or nothing."
    mark, since = None, (0., 0.)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: break
        now = (results/"now").stat().st_mtime_ns if (results/"now").exists() else 0
        spent = sum(psutil.Process(pid).cpu_times()[:2]), time.monotonic()
        if now != mark: mark, since = now, spent
        if spent[0]-since[0] > guard.HANG or spent[1]-since[1] > 20*guard.HANG:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs where no alarm is heard"
        time.sleep(.05)
    if os.WIFSIGNALED(status): return f"dies of {signal.Signals(os.WTERMSIG(status)).name}"
    return "ends the process" if os.WEXITSTATUS(status) else ""


def count(told, failures, path):
    "Add a child's counts to the file."
    lines = {}
    for name, said, n in told.get("rows", []): lines.setdefault(name, Counter())[said] += n
    for name, c in lines.items():
        counts.add("mutations", name, path, mutated_files=sum(c.values()), **c)
    for name, said, words, file, _ in failures:
        counts.found("mutations", f"{name}: {said}; {words[:160]}", path)
        print(f"FAILED {name}: {said}; {words}; seeds/{file}", flush=True)


def campaign(folder, seconds, seed, names=None, path=counts.RESULTS, known=None):
    "Try files for so many seconds."
    names, until, tried = names or list(TARGETS), time.monotonic()+seconds, 0
    known = set() if known is None else known
    while time.monotonic() < until:
        told, failures = batch(folder, seed, names, until, known)
        known.update(f[-1] for f in failures)
        count(told, failures, path)
        tried += sum(n for *_, n in told.get("rows", []))
        seed += 1
    return tried


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", nargs="*", choices=list(TARGETS))
    options.add_argument("--counts", type=Path, default=counts.RESULTS)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="pgolf-campaign-") as folder:
        furnish(Path(folder))
        began = time.monotonic()
        n = campaign(folder, given.seconds, given.seed, given.only, given.counts)
        print(f"{n:,} files in {time.monotonic()-began:.0f} s")


if __name__ == "__main__": main()
