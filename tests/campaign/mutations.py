"""Mutated files for every reader: read exactly, or refused in one clear error, within two seconds
and a gigabyte; nothing is executed, and no file is touched outside of the folder.

`python tests/campaign/mutations.py --seconds 60 --seed 7` tries files for a minute. The work is
done in children that may die; what they were reading when they died is a failure as well."""
import argparse
import base64
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
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
import small  # noqa: E402
from targets import TARGETS, Target, furnish  # noqa: E402

SEEDS = HERE/"seeds"  # failures, each as small as it became, kept for tests/test_campaign.py
BATCH = 5_000         # files of one child, whose address space fills up
STREAK = 25           # files of one target in a row, before its sound file is put back
KEPT = 60             # files of a target that were kept because something new was said of them
SPACE = 2**24         # bytes for the file that is being read


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
        self.whole, self.place = self.path.read_bytes(), str(self.path)
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
        self.put(data)
        said = guard.judge(read, t.exact, t.errors, self.path, data, self.folder)
        if not os.path.exists("executed"): return said
        os.remove("executed")
        return "leaves a file behind"
    def put(self, data):
        with open(self.place, "wb") as f: f.write(data)
    def restore(self): self.put(self.whole)
    def mutant(self, rand):
        "A new file, and the name of the mutation; not each fits what was kept."
        for _ in range(9):
            kind = rand.choice(list(self.target.kinds))
            a, b = rand.choice(self.pool), rand.choice(self.start)
            try: return kind, self.target.kinds[kind](rand, a, b)
            except Exception: continue
        return "noise", rand.randbytes(rand.randrange(99))
    def learn(self, data, said):
        """Keep a file that made the reader say something new: its mutants go on from there. Gives
        what was new, or nothing."""
        new = classed(f"{said} {self.words[:600]}")
        if new in self.heard: return ""
        self.heard.add(new)
        if len(self.pool) < KEPT+len(self.start) and len(data) < 10**6: self.pool.append(data)
        return new


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


class Reading:
    "What a child reads just now, in memory that its parent sees; each file is a sign of life."
    def __init__(self): self.memory, self.turn = mmap.mmap(-1, SPACE), 0
    def note(self, name, data):
        text, self.turn = name.encode()+b"\0"+data[:SPACE-100], self.turn+1
        self.memory[16:16+len(text)] = text
        self.memory[:16] = struct.pack("<QQ", self.turn, len(text))
    def sign(self): return self.memory[:8]
    def last(self):
        "Name of the target and the file, or nothing."
        turn, size = struct.unpack("<QQ", self.memory[:16])
        name, _, data = self.memory[16:16+size].partition(b"\0")
        return (name.decode(), data) if turn else None


def child(trials, seed, until, results, reading, known):
    "Judge files until the time is over; write counts now and then, failures as they come."
    names = list(trials)
    os.chdir(trials[names[0]].folder)
    warnings.simplefilter("ignore")
    guard.install()
    rand, done = random.Random(seed), Counter()
    shares = [t.target.share for t in trials.values()]
    for _ in range(BATCH//STREAK):
        trial = trials[rand.choices(names, shares)[0]]
        for _ in range(STREAK):
            if time.monotonic() > until: break
            data = trial.mutant(rand)[1]
            reading.note(trial.name, data)
            said = trial.judge(data)
            if new := trial.learn(data, said): _learned(trial, new, data, results)
            done[trial.name, said if said in ("read", "refused") else "failed"] += 1
            if said not in ("read", "refused"): _note(trial, data, said, results, known)
        trial.restore()
        _tell(results, done)


def _learned(trial, new, data, results):
    "Tell the parent, whose next child goes on from there."
    kept = base64.b64encode(data).decode() if data is trial.pool[-1] else ""
    with open(results/"learned", "a") as f: f.write(json.dumps([trial.name, new, kept])+"\n")


def _remember(trials, results):
    "What a child has learned, for the next one."
    for name, new, kept in _lines(results/"learned"):
        trials[name].heard.add(new)
        if kept: trials[name].pool.append(base64.b64decode(kept))


def _lines(path):
    "JSON values, one a line; of a file that may not be there, or end in the middle."
    text = path.read_text() if path.exists() else ""
    return [json.loads(s) for s in text[:text.rfind("\n")+1].splitlines()]


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


def batch(trials, seed, until, known):
    "One child from its start to its end: its counts, and what failed."
    results, reading = Path(tempfile.mkdtemp(prefix="results-", dir=small.roomy())), Reading()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(trials, seed, until, results, reading, known)
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    died, last = _wait(pid, reading), reading.last()
    told = json.loads((results/"counts").read_text()) if (results/"counts").exists() else {}
    failures = _lines(results/"failures")
    _remember(trials, results)
    shutil.rmtree(results)
    for t in trials.values(): t.restore()
    if died and not last:
        raise RuntimeError(f"a child of the campaign {died} before it had read a file")
    if died: _dead(died, *last, told, failures)
    return told, failures


def _dead(how, name, data, told, failures):
    "The file that a child was reading when it died is a failure, and a seed."
    file = f"{slug(name)}.{hashlib.sha256(data).hexdigest()[:8]}"
    (SEEDS/file).write_bytes(data)
    failures.append([name, how, "", file, f"{name}: {how}"])
    told.setdefault("rows", []).append([name, "failed", 1])


def _wait(pid, reading):
    "Wait for a child, and end one that hangs; how it died, or nothing."
    mark, since = None, (0., 0.)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: break
        now = reading.sign()
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


def campaign(folder, seconds, seed, names=None, path=counts.RESULTS, known=None, trials=None):
    "Try files for so many seconds."
    until, tried = time.monotonic()+seconds, 0
    known, trials = set() if known is None else known, {} if trials is None else trials
    for n in names or TARGETS: trials[n] = trials.get(n) or Trial(folder, n)
    while time.monotonic() < until:
        told, failures = batch(trials, seed, until, known)
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
    with small.folder() as folder:
        furnish(folder)
        began = time.monotonic()
        n = campaign(folder, given.seconds, given.seed, given.only, given.counts)
        counts.sat(time.monotonic()-began, counts.commit(), given.counts)
        print(f"{n:,} files in {time.monotonic()-began:.0f} s")


if __name__ == "__main__": main()
