"""Mutated files whose mutants go on from what reached new code: atheris counts the branches of the
package that a file takes, our mutations make the next ones from those that took new ones.

`pip install atheris`, then `python tests/campaign/guided.py --runs 20000 --only recipe manifest`.
Each target has a process of its own, since libFuzzer ends the one that it runs in."""
import argparse
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent))
with atheris.instrument_imports(include=["pgolf"], enable_loader_override=False):
    import counts  # noqa: E402
    import guard  # noqa: E402
    import small  # noqa: E402
    from mutations import Trial, keep  # noqa: E402
    from targets import TARGETS, furnish  # noqa: E402

LONGEST = 2**20  # bytes of a file
TOLD = 500       # files between two counts


class Guided:
    "A target under libFuzzer: what it judges, and what comes next."
    def __init__(self, trial, path):
        self.trial, self.path, self.done, self.known = trial, path, Counter(), set()
    def judge(self, data):
        "Called with each file; counts go out as they come, for libFuzzer ends the process."
        said = self.trial.judge(data)
        self.done[said if said in ("read", "refused") else "failed"] += 1
        if said not in ("read", "refused"): self.note(data, said)
        if (n := sum(self.done.values())) < TOLD: return
        counts.add("mutations", self.trial.name, self.path, mutated_files=n, guided=n, **self.done)
        self.done.clear()
    def note(self, data, said):
        "Keep a failure of a new kind as a seed."
        words = self.trial.words[:160]
        if (sort := (said, words.partition(":")[0])) in self.known: return
        self.known.add(sort)
        name = keep(self.trial, data, said)
        counts.found("mutations", f"{self.trial.name}: {said}; {words}", self.path)
        print(f"FAILED {self.trial.name}: {said}; {words}; seeds/{name}", flush=True)
    def mutate(self, data, longest, seed):
        "One of our mutations of a file that libFuzzer chose; not each fits."
        rand, t = random.Random(seed), self.trial
        for _ in range(9):
            kind = rand.choice(list(t.target.kinds))
            try: new = t.target.kinds[kind](rand, data, rand.choice(t.start))
            except Exception: continue
            if len(new) <= longest: return bytes(new)
        return atheris.Mutate(data, longest)


def fuzz(folder, name, runs, seed, path):
    "In a child: files until the runs are over."
    os.chdir(folder)
    warnings.simplefilter("ignore")
    guided = Guided(Trial(folder, name), path)
    corpus = Path(tempfile.mkdtemp(prefix="corpus-", dir=folder))
    for i, data in enumerate(guided.trial.start): (corpus/str(i)).write_bytes(data)
    guard.install(more=0)
    atheris.Setup([sys.argv[0], f"-runs={runs}", f"-seed={seed}", f"-max_len={LONGEST}",
        "-rss_limit_mb=0", "-timeout=60", "-verbosity=0", "-print_final_stats=0", str(corpus)],
        guided.judge, custom_mutator=guided.mutate)
    atheris.Fuzz()


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=20_000, help="files of each target")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--only", nargs="*", choices=list(TARGETS))
    options.add_argument("--counts", type=Path, default=counts.RESULTS)
    given = options.parse_args()
    began = time.monotonic()
    with small.folder() as folder:
        furnish(folder)
        for name in given.only or TARGETS:
            file = folder/TARGETS[name].file
            whole = file.read_bytes()
            if (pid := os.fork()) == 0: fuzz(folder, name, given.runs, given.seed, given.counts)
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]): print(f"{name}: ended early")
            file.write_bytes(whole) # others read it, too
    counts.sat(time.monotonic()-began, counts.commit(), given.counts)


if __name__ == "__main__": main()
