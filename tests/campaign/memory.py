"""Memory: readers do not grow over fifty repetitions, plans of every system at full size stay below
24 GB. `python tests/campaign/memory.py`."""
import argparse
import gc
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import counts  # noqa: E402
import guard  # noqa: E402
import small  # noqa: E402
from odd import SYSTEMS, note  # noqa: E402
from targets import TARGETS, furnish  # noqa: E402

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


def plans(path):
    "`pgolf plan` of each system at full size, under the limit."
    for s in SYSTEMS:
        done = subprocess.run([sys.executable, "-m", "pgolf.cli", "plan", s, "--scale", "full",
            "--device", "cpu"], capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST)))
        note("memory", "plans at full size under 24 GB", done.stderr[-200:]
            if done.returncode else "", path)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--counts", type=Path, default=counts.RESULTS)
    given = options.parse_args()
    with small.folder() as folder:
        furnish(folder)
        readers(folder, given.counts)
        plans(given.counts)
