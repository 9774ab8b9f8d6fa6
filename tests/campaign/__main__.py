"""The campaign, kills and mutations in turn: `python tests/campaign --hours 1`, or `make campaign`.

`--rows surroundings odd repeat memory` does these once instead, in a few minutes of a quiet core.
It may be stopped at any moment; what it did is in nbs/results/campaign.json, to which the next
sitting adds."""
import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import counts  # noqa: E402
import kills  # noqa: E402
import memory  # noqa: E402
import mutations  # noqa: E402
import odd  # noqa: E402
import server  # noqa: E402
import surroundings  # noqa: E402


def commit():
    "Of this checkout, or nothing."
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
        cwd=Path(__file__).parent)
    return done.stdout.strip()


def sitting(hours, seed, turn, path):
    "Kills for one turn, mutations for the next, until the time is over."
    server.loaded()
    until, at = time.monotonic()+3600*hours, commit()
    with tempfile.TemporaryDirectory(prefix="pgolf-campaign-") as folder:
        places = Path(folder)/"kills", Path(folder)/"mutations"
        for place, module in zip(places, (kills, mutations)):
            place.mkdir()
            module.furnish(place)
        trials, known = {}, set()
        while (left := until-time.monotonic()) > 0:
            began = time.monotonic()
            n = kills.campaign(places[0], min(turn, left), seed, path=path, trials=trials)
            m = mutations.campaign(places[1], min(turn, left), seed, path=path, known=known)
            print(f"{n} kills, {m:,} files", flush=True)
            counts.sat(time.monotonic()-began, at, path)
            seed += 1000


def once(rows, seed, path):
    "The rows that are gone through from end to end."
    server.loaded()
    with tempfile.TemporaryDirectory(prefix="pgolf-campaign-") as folder:
        base = Path(folder)
        base.chmod(0o755)  # for another user's attempts
        for name in rows:
            (base/name).mkdir()
            if name == "surroundings": kills.furnish(base/name)
            if name == "memory": mutations.furnish(base/name)
        if "surroundings" in rows: surroundings.campaign(base/"surroundings", seed, path)
        if "odd" in rows: odd.odd(base/"odd", path)
        if "repeat" in rows: odd.repeat(base/"repeat", path)
        if "memory" in rows: memory.readers(base/"memory", path), memory.plans(path)


def main():
    options = argparse.ArgumentParser(prog="campaign", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--hours", type=float, default=1.)
    options.add_argument("--turn", type=float, default=120., help="seconds of kills, then of files")
    options.add_argument("--seed", type=int, help="default: another one each time")
    options.add_argument("--rows", nargs="*", default=[],
        choices=["surroundings", "odd", "repeat", "memory"])
    options.add_argument("--counts", type=Path, default=counts.RESULTS)
    given = options.parse_args()
    seed = random.SystemRandom().randrange(10**9) if given.seed is None else given.seed
    if given.rows: return once(given.rows, seed, given.counts)
    sitting(given.hours, seed, given.turn, given.counts)


if __name__ == "__main__": main()
