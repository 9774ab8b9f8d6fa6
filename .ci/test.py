"""Run chapters and tests/ on all cores; end with every failure by name and the counts.

  python .ci/test.py          all but what is marked slow
  python .ci/test.py --all    everything
  python .ci/test.py --beside 4    beside four processes that keep a core busy

What else is given goes to pytest: `python .ci/test.py tests/test_muon.py`, or
`-k "chapter and muon"`. The last line is `N passed, N failed, N skipped`.
"""

import argparse
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Outcomes:
    "What pytest counted, over all workers."
    def __init__(self): self.line = ""
    def pytest_terminal_summary(self, terminalreporter):
        n = {k: len(v) for k, v in terminalreporter.stats.items()}
        failed = n.get("failed", 0) + n.get("error", 0)
        skipped = n.get("skipped", 0) + n.get("xfailed", 0)
        self.line = (
            f"{n.get('passed', 0) + n.get('xpassed', 0)} passed, {failed} failed, {skipped} skipped"
        )


class Shares:
    """Hands out a file of tests to one worker, so that what they share is made once, and chapters
    one by one."""
    def pytest_xdist_make_scheduler(self, config, log):
        from xdist.scheduler import LoadScopeScheduling
        class ByFile(LoadScopeScheduling):
            def _split_scope(self, nodeid):
                return nodeid if "::test_chapter[" in nodeid else nodeid.partition("::")[0]
        return ByFile(config, log)


def cores():
    "Cores that this process may use, eight at most: a worker takes about a gigabyte."
    free = os.sched_getaffinity(0) if hasattr(os,
        "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(len(free), 8)


@contextmanager
def busy(n):
    "Keep `n` processes busy, and end them."
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try: yield
    finally:
        for p in loops: p.kill()


def options():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the slow ones too")
    parser.add_argument("--beside", type=int, default=0, metavar="N",
        help="busy loops beside the tests")
    return parser


def main(args):
    import pytest
    ours, rest = options().parse_known_args(args)
    os.environ.update(dict.fromkeys(THREADS, "1"))  # a worker a core, so a thread a worker
    os.chdir(ROOT)
    outcomes, chosen = Outcomes(), [] if ours.all else ["-m", "not slow"]
    with busy(ours.beside):
        code = pytest.main(["-n", str(cores()), "--dist", "loadscope", *chosen, *rest],
            [outcomes, Shares()])
    print(outcomes.line or "0 passed, 1 failed, 0 skipped", flush=True)
    return code


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
