"""Kill -9 at random moments: the same command, given again, ends with the bits of a command that
nobody disturbed; nothing half-written bears a final name; what was finished is still somewhere.

`python tests/campaign/kills.py --seconds 60 --seed 7` kills for a minute. Moments are uniform over
the time of a command, over its stages, or between any two of its file operations."""
import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import counts  # noqa: E402
import server  # noqa: E402
import small  # noqa: E402
import nbformat  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import half_written  # noqa: E402

from pgolf.train.checkpoint import read_checkpoint  # noqa: E402

TIMES = {"seconds", "elapsed", "squeeze_seconds", "environment", "tokens_per_second", "compiled",
    "audit", "created", "path", "near", "tok_s", "train_seconds"}


# ---- what a command leaves, without its times

def timeless(value):
    "A JSON value without what differs between two runs that agree."
    if isinstance(value, dict): return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def lines_of(path):
    "Records of a log without times; notes tell of each start."
    found = [json.loads(s) for s in path.read_text().splitlines()]
    return [timeless(r) for r in found if "note" not in r]


def tensors_of(path):
    tensors, meta = read_checkpoint(path)
    tensors.pop("curve/seconds", None)
    plain = {n: t.contiguous().reshape(-1).view(torch.uint8) for n, t in tensors.items()}
    return sorted((n, t.numpy().tobytes()) for n, t in plain.items()), timeless(meta)


def arrays_of(path):
    with np.load(path) as z: return {k: z[k].tobytes() for k in z.files if k != "about"}


READERS = {".json": lambda p: timeless(json.loads(p.read_text())), ".jsonl": lines_of,
    ".safetensors": tensors_of, ".npz": arrays_of, ".log": lambda p: None,
    ".ipynb": lambda p: "there"}


def bits(folder):
    "Every file that counts below a folder: name -> a digest of its content."
    found = {}
    for p in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if p.name in ("lock", "job.json") or p.name.endswith(".partial.ipynb"): continue
        said = READERS.get(p.suffix, lambda p: p.read_bytes())(p)
        found[str(p.relative_to(folder))] = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
    return found


# ---- the commands

class Scene(NamedTuple):
    "A command, in a folder of its own."
    args:list            # of pgolf
    stages:int           # that it goes through
    keeps:str=""         # a finished result that is there before and must be somewhere afterwards
    before:Callable=lambda work, base: None # what is put into the folder first
    share:float=1.


def with_run(work, base): shutil.copytree(base/"run", work/"run")
def with_result(work, base):
    "Weights, and what an earlier command made of them."
    shutil.copytree(base/"run", work/"run")
    shutil.copy(base/"run"/"model.pgolf", work/"run"/"squeezed.pgolf")


def with_other_run(work, base):
    "A finished run of another seed, which is to be set aside."
    shutil.copytree(base/"other", work/"run")


def scenes(base):
    "Every command that writes something."
    run, plan, repeat, squeeze, score, build = lines(base)
    return {
        "run": Scene(run, 12, share=4),
        "run, 2 ranks": Scene([*run, "--nproc", "2"], 22, share=3),
        "run over a finished run": Scene([*run, "--overwrite"], 12, "run", with_other_run, 1),
        "batch": Scene(plan, 28, share=1.5),
        "batch, 2 ranks": Scene([*plan, "--nproc", "2"], 44, share=.7),
        "reproduce": Scene(repeat, 14, share=1),
        "squeeze": Scene(squeeze, 1, before=with_run, share=.5),
        "squeeze over a result": Scene([*squeeze, "--overwrite"], 1, "run/squeezed.pgolf",
            with_result, .4),
        "score": Scene(score, 1, before=with_run, share=2),
        "data build": Scene(build, 2, share=2),
    }


def lines(base):
    "The commands as words."
    data, own = str(base/"data"), small.as_options(small.SMALL)
    run = ["run", "pr610", "--scale", "tiny", "--corpus", data, "--out", "run", "--eval-tokens",
        small.TARGETS, "--quiet", "--device", "cpu", *own]
    many = ["--device", "cpu", "--notebooks", str(base/"notebooks"), "--out", "runs", "--jobs",
        "1", "--corpus"]
    plan = ["batch", "pr610", "pr576", *many, data, "--scale", "tiny", "--eval-tokens",
        small.TARGETS, *own]
    repeat = ["reproduce", *many, str(base/"wide"), "--scale", "least"]
    squeeze = ["squeeze", "run", "--corpus", data, "--samples", "2", "--budget", "84000",
        "--code-bytes", "20000", "--min-numel", "5000", "--device", "cpu"]
    score = ["score", "run", "--corpus", data, "--save", "scores.npz", "--stride", "2", "--quiet",
        "--device", "cpu"]
    build = ["data", "build", "made", "--train", str(base/"train.jsonl"), "--val",
        str(base/"val.jsonl"), "--vocab-size", "320"]
    return run, plan, repeat, squeeze, score, build


def run_notebook(folder, **fixed):
    "A run notebook of few cells, whose settings are small."
    from pgolf.scale.runs import OWN
    cell = nbformat.v4.new_code_cell
    known = "\n".join(f"{k} = {fixed.get(k)!r}" for k in sorted(OWN | {"out", "data", "machines"}))
    make = """from pgolf.scale.runs import Run
from pgolf.systems import pipeline
from pgolf.systems.ownership import open_corpus
run = Run(recipe, out, scale, corpus, "cpu", seed, nproc or 1, eval_tokens, overrides or {})
job = pipeline.start(run.resolve(), open_corpus(corpus), out, "cpu", run.targets(), run.nproc,
    progress=False)
pipeline.run(job)"""
    nb = nbformat.v4.new_notebook(cells=[cell(known, metadata=dict(tags=["parameters"])),
        cell(make), cell("print(out)")])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, folder)


def furnish(base):
    "What the commands start from."
    data = small.dataset(base/"data")
    small.dataset(base/"wide", 1024)
    small.finished(base/"run", data)
    small.finished(base/"other", data, seed=5)
    for name, texts in zip(("train", "val"), small.texts()):
        (base/f"{name}.jsonl").write_text("".join(json.dumps(dict(text=t))+"\n" for t in texts))
    (base/"notebooks").mkdir()
    for name in ("pr610", "pr576"): run_notebook(base/"notebooks"/f"{name}.ipynb", recipe=name)


# ---- a trial

class Trial:
    "A scene with the result of a command that nobody disturbed."
    def __init__(self, base, name):
        self.base, self.name, self.scene = base, name, scenes(base)[name]
        self.writes, self.stages = 100, self.scene.stages
        work = self.prepare()
        self.kept = bits(work/self.scene.keeps) if self._is_folder(work) else self._file(work)
        began = time.monotonic()
        code = self.start(work).end()
        self.seconds = time.monotonic()-began
        if code: raise RuntimeError(f"{name}: exit code {code}: {self.said(work)}")
        self.wanted = bits(work)
        shutil.rmtree(work)
    def prepare(self):
        work = Path(tempfile.mkdtemp(prefix="work-", dir=self.base))
        self.scene.before(work, self.base)
        return work
    def start(self, work, **death):
        return server.Command(self.scene.args, work, work.with_suffix(".said"), **death)
    def survived(self, way, seconds, death):
        "A fresh command ended before its time: later ones die earlier."
        if way == "time": self.seconds = min(self.seconds, seconds)
        if way == "write": self.writes = max(2, min(self.writes, death["writes"]))
        if way == "stage": self.stages = max(1, min(self.stages, death["stage"]))
    def said(self, work): return work.with_suffix(".said").read_text()[-600:]
    def _is_folder(self, work): return (work/self.scene.keeps).is_dir() and self.scene.keeps
    def _file(self, work):
        path = work/self.scene.keeps
        return hashlib.sha256(path.read_bytes()).hexdigest() if self.scene.keeps else None
    def lost(self, work):
        "Whether the finished result that was there before is nowhere any more."
        if not self.scene.keeps: return False
        if isinstance(self.kept, str):
            near = (work/self.scene.keeps).parent.iterdir()
            return self.kept not in {hashlib.sha256(p.read_bytes()).hexdigest() for p in near
                if p.is_file()}
        here = {}
        for p in sorted(work.glob(f"{self.scene.keeps}*")): here |= bits(p)
        places = [bits(p) for p in work.glob(f"{self.scene.keeps}*") if p.is_dir()]
        return not all(any(p.get(k) == v for p in places) for k, v in self.kept.items())


def moment(rand, trial):
    "When the next command dies: (seconds until it is killed, what it is told)."
    way = rand.choice(["time", "time", "stage", "write"])
    if way == "time": return way, rand.uniform(0, 1.05*trial.seconds), {}
    if way == "write": return way, server.HANG, dict(writes=int(trial.writes**rand.random()))
    stage = rand.randrange(trial.stages)+1
    return way, server.HANG, dict(stage=stage, wait=rand.uniform(0, trial.seconds/8))


def attempt(rand, trial, done):
    "Kill a command once to eight times, let it end; what was lost, or nothing if all is well."
    work = trial.prepare()
    try:
        for i in range(rand.choice([1, 2, 3, 5, 8])):
            way, seconds, death = moment(rand, trial)
            command, began = trial.start(work, **death), time.monotonic()
            if command.wait(seconds):
                if i == 0: trial.survived(way, time.monotonic()-began, death)
                return finished(trial, work, command)
            command.kill(alone=way == "time" and rand.random() < .2)
            done[way] = done.get(way, 0)+1
            if bad := [b for b in half_written(work) if not b.startswith(".")]:
                return f"half-written: {bad[0]}"
            if trial.lost(work): return "the finished result that was there is gone"
        return again(trial, work)
    finally:
        shutil.rmtree(work)
        work.with_suffix(".said").unlink(missing_ok=True)


def again(trial, work):
    "The same command once more, undisturbed."
    command = trial.start(work)
    if not command.wait(server.HANG):
        command.kill()
        return "the same command hangs"
    return finished(trial, work, command)


def finished(trial, work, command):
    "What is wrong with a command that has ended by itself."
    code = command.end()
    # a command that had been killed after its last write has nothing left to do
    if code and "exists: " not in trial.said(work):
        return f"the same command fails with {code}: {trial.said(work)}"
    return compared(trial, work)


def compared(trial, work):
    "What differs from the undisturbed command, or is gone."
    if trial.lost(work): return "the finished result that was there is gone"
    found = bits(work)
    if trial.scene.keeps: found = {k: v for k, v in found.items() if ".old-" not in k}
    wanted = {k: v for k, v in trial.wanted.items() if ".old-" not in k}
    differ = [k for k in wanted if found.get(k) != wanted[k]]
    more = [k for k in found if k not in wanted and "checkpoint" not in k]
    return f"other bits than undisturbed in {', '.join(differ+more)}" if differ or more else ""


def campaign(base, seconds, seed, names=None, path=counts.RESULTS, trials=None):
    "Kill for so many seconds; how many kills."
    rand, until, total = random.Random(seed), time.monotonic()+seconds, 0
    all_scenes = scenes(base)
    names, trials = names or list(all_scenes), {} if trials is None else trials
    shares = [all_scenes[n].share for n in names]
    while time.monotonic() < until:
        name = rand.choices(names, shares)[0]
        if name not in trials: trials[name] = Trial(base, name)
        done:dict[str, int] = {}
        lost = attempt(rand, trials[name], done)
        kills = sum(done.values())
        by = {f"by_{k}": n for k, n in done.items()}
        counts.add("kills", name, path, kills=kills, ends=1, losses=int(bool(lost)), **by)
        if lost:
            counts.found("kills", f"{name}: {lost[:300]}", path)
            print(f"LOST {name}: {lost}", flush=True)
        total += kills
    return total


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", nargs="*")
    options.add_argument("--counts", type=Path, default=counts.RESULTS)
    given = options.parse_args()
    server.loaded()
    with small.folder() as folder:
        furnish(folder)
        began = time.monotonic()
        n = campaign(folder, given.seconds, given.seed, given.only, given.counts)
        counts.sat(time.monotonic()-began, counts.commit(), given.counts)
        print(f"{n:,} kills in {time.monotonic()-began:.0f} s")


if __name__ == "__main__": main()
