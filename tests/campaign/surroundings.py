"""Full disks, folders that may not be written, files exchanged while they are read, a clock that
goes back, two programs in one folder: one clear error, what was there stays, and the same command
ends with the bits of an undisturbed one as soon as it can."""
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import counts  # noqa: E402
import kills  # noqa: E402
import server  # noqa: E402
from conftest import half_written  # noqa: E402

SCENES = ("run", "run over a finished run", "squeeze", "squeeze over a result", "score",
    "data build", "batch")


# ---- what befalls a command, in its own process before it begins

def full_disk(rand, work):
    "No file can grow beyond a limit."
    limit = int(10**rand.uniform(2, 5.5))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def full_later(rand, work):
    "The same from a moment on: when a file of some number is opened for writing."
    limit, first = int(10**rand.uniform(0, 4)), rand.randrange(2, 25)
    def arm():
        left = [first]
        def hook(event, args):
            if event != "open" or not isinstance(args[1], str) or "w" not in args[1]: return
            left[0] -= 1
            if left[0] == 0: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        sys.addaudithook(hook)
    return arm


def nobody(rand, work):
    "Another user than the one whom the folder belongs to."
    for p in (work, *work.rglob("*")): p.chmod(0o755 if p.is_dir() else 0o644)
    def drop():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    return drop


def clock_back(rand, work):
    "The time of day jumps back by hours, again and again."
    real = time.time
    def arm(): time.time = lambda: real()-rand.choice([0, 3600, 10**6])
    for p in (p for p in work.rglob("*") if p.is_file()):
        os.utime(p, (2*10**9, 2*10**9))  # and what is there is from the future
    return arm


WAYS:dict[str, Callable] = {"disk full": full_disk, "disk full later on": full_later,
    "no permission": nobody, "clock set back": clock_back}


def one_error(text):
    "Whether a command ended with one line that says what is wrong."
    said = [s for s in text.splitlines() if "pgolf: error: " in s]
    return "Traceback" not in text and len(said) >= 1


def befall(trial, way, rand):
    "A command under such conditions, then once more without; what is wrong, or nothing."
    work = trial.prepare()
    try:
        command = trial.start(work, before=WAYS[way](rand, work))
        command.wait(server.HANG)
        code = command.end()
        if code and not one_error(trial.said(work)): return f"no clear error: {trial.said(work)}"
        if bad := half_written(work): return f"half-written: {bad[0]}"
        if trial.lost(work): return "the finished result that was there is gone"
        if not code: return kills.compared(trial, work)
        work.with_suffix(".said").unlink()
        return kills.again(trial, work)
    finally:
        shutil.rmtree(work)
        work.with_suffix(".said").unlink(missing_ok=True)


def two_at_once(trial):
    "The same command twice in one folder: one of them may be refused, the other is undisturbed."
    work = trial.prepare()
    try:
        pair = [trial.start(work) for _ in range(2)]
        for c in pair: c.wait(server.HANG)
        codes = [c.end() for c in pair]
        if min(codes) and not one_error(trial.said(work)): return f"both fail: {trial.said(work)}"
        if "Traceback" in trial.said(work): return f"no clear error: {trial.said(work)}"
        return kills.compared(trial, work) if not all(codes) else kills.again(trial, work)
    finally:
        shutil.rmtree(work)
        work.with_suffix(".said").unlink(missing_ok=True)


def exchange(victim, first):
    "Put another file in the place of one, when so many files have been opened."
    left = [first]
    def hook(event, args):
        if event != "open" or not left[0]: return
        left[0] -= 1
        if left[0]: return
        new = victim.with_name("new")
        new.write_bytes(victim.read_bytes()[::-1])
        os.replace(new, victim)
    sys.addaudithook(hook)


def exchanged(trial, rand):
    "A file of its input is exchanged while the command is at work: its bits, or one clear error."
    work = trial.prepare()
    data = work/"data"
    shutil.copytree(trial.base/"data", data)
    files = [p for p in data.rglob("*") if p.is_file()]
    victim, first = rand.choice(files), rand.randrange(1, 40)
    try:
        args = [str(data) if a == str(trial.base/"data") else a for a in trial.scene.args]
        command = server.Command(args, work, work.with_suffix(".said"),
            lambda: exchange(victim, first))
        command.wait(server.HANG)
        code, text = command.end(), trial.said(work)
        return "" if code == 0 or one_error(text) else f"{victim.name}: no clear error: {text}"
    finally:
        shutil.rmtree(work)
        work.with_suffix(".said").unlink(missing_ok=True)


def campaign(base, seed, path=counts.RESULTS, rounds=1, trials=None):
    "Each way with each command."
    trials = {} if trials is None else trials
    for name in SCENES:
        if name not in trials: trials[name] = kills.Trial(base, name)
    rand = random.Random(seed)
    jobs = [(w, n, lambda w=w, n=n: befall(trials[n], w, rand)) for w in WAYS for n in SCENES]
    jobs += [("two programs", n, lambda n=n: two_at_once(trials[n])) for n in SCENES]
    jobs += [("file exchanged", n, lambda n=n: exchanged(trials[n], rand)) for n in ("run", "score",
        "squeeze")]
    for way, name, job in jobs*rounds:
        if way == "no permission" and os.getuid(): continue
        wrong = job()
        counts.add("surroundings", way, path, tried=1, passed=int(not wrong))
        if wrong:
            counts.found("surroundings", f"{way}, {name}: {wrong[:300]}", path)
            print(f"WRONG {way}, {name}: {wrong}", flush=True)
