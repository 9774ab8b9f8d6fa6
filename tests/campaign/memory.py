"""Memory: readers do not grow over fifty repetitions; at full size the plan of every system, the
scoring of its model, and its run stay below 24 GB. `python tests/campaign/memory.py`.

A run here has two steps of one pass, and scores one window of 2,048 and one stride of 64: a whole
step, and a whole text, are many of them, one after the other."""
import argparse
import gc
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import counts  # noqa: E402
import guard  # noqa: E402
import small  # noqa: E402
from odd import SYSTEMS, note  # noqa: E402
from targets import TARGETS, furnish  # noqa: E402

from pgolf.files import write_json  # noqa: E402
from pgolf.game.data import austen_documents, build_dataset  # noqa: E402
from pgolf.model.gpt import GPT, stored  # noqa: E402
from pgolf.squeeze.artifact import save_artifact  # noqa: E402
from pgolf.squeeze.gptq import quantize_state  # noqa: E402
from pgolf.systems.recipes import get_recipe  # noqa: E402

MOST, GROWTH = 24*10**9, 8*10**6  # bytes of a command; of a reader over 40 repetitions


def now():
    "Memory of this process."
    text = Path("/proc/self/status").read_text()
    return 1024*int(text.partition("VmRSS:")[2].split()[0])


def growth(read, path, times=50):
    "Bytes by which this process grows from the tenth reading on; the least of three trials."
    def once():
        for i in range(times):
            read(path)
            if i == 9:
                gc.collect()
                before = now()
        gc.collect()
        return now()-before
    return min(once() for _ in range(3))


def readers(base, path):
    "Every reader on its sound file."
    for name, t in TARGETS.items():
        grown = growth(t.read, base/t.file)
        counts.add("memory", "readers, 50 times", path, most_grown_bytes=max(0, grown))
        note("memory", "readers, 50 times", f"{name} grows by {grown:,} bytes"
            if grown > GROWTH else "", path)
    wrong = "" if guard.peak_bytes() < guard.BYTES else f"{guard.peak_bytes():,} bytes"
    note("memory", "all readers in one process under 1 GB", wrong, path)


def limited(what, words, path):
    "A command of pgolf under the limit, and the most that one of them took."
    done = subprocess.run([sys.executable, "-m", "pgolf.cli", *words, "--device", "cpu"],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST)))
    counts.add("memory", what, path,
        most_bytes=1024*resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    note("memory", what, done.stderr[-200:] if done.returncode else "", path)


def plans(path):
    "`pgolf plan` of each system at full size."
    for s in SYSTEMS:
        limited("plans at full size under 24 GB", ["plan", s, "--scale", "full"], path)


def full_model(folder, recipe):
    "An artifact of full size: the weights that training begins with, rounded without GPTQ."
    folder.mkdir()
    codes = quantize_state(GPT(recipe.model).state_dict(), recipe.quant)
    meta = dict(recipe=recipe.name, scale=recipe.scale, model=stored(recipe.model))
    save_artifact(folder/"model.pgolf", codes, meta, 1)
    write_json(folder/"recipe.json", asdict(recipe))


def scored(base, path):
    "`pgolf score` of models of full size over the vocabulary that the embedded text has."
    for s in SYSTEMS:
        if (recipe := get_recipe(s)).model.vocab_size != 1024: continue
        full_model(base/s, recipe)
        limited("models of full size scored under 24 GB", ["score", str(base/s), "--corpus",
            "austen", "--tokens", "4096", "--stride", "1024", "--quiet"], path)


def novels(base):
    "The embedded novels in 1,024 pieces and in 8,192."
    build_dataset(austen_documents("train"), austen_documents("val"), base/"pieces", 8192)
    return {1024: "austen", 8192: str(base/"pieces")}


def trained(base, path, systems=SYSTEMS):
    "A run at full size: passes, Hessians, rounding, coding, the file read back, scored, adapted."
    data = novels(base)
    for s in systems:
        corpus = data[get_recipe(s).model.vocab_size]
        limited("runs at full size under 24 GB", ["run", s, "--scale", "full", "--corpus", corpus,
            "--out", str(base/"full"/s), "--steps", "2", "--eval-tokens", "2112", "--quiet",
            *small.as_options(dict(num_spans=1, train_batch_tokens=8192, samples=8))], path)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--counts", type=Path, default=counts.RESULTS)
    options.add_argument("--only", nargs="*", metavar="SYSTEM", help="run these at full size alone")
    given = options.parse_args()
    with small.folder() as folder:
        if not given.only:
            furnish(folder)
            readers(folder, given.counts)
            plans(given.counts)
            scored(folder, given.counts)
        trained(folder, given.counts, given.only or SYSTEMS)
