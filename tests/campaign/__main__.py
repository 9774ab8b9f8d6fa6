"""The campaign, kills and mutations, whichever is behind: `python tests/campaign --hours 1`, or
`make campaign`.

`--rows surroundings odd repeat memory` does these once instead; full sizes take a core an hour.
It may be stopped at any moment; what it did is in nbs/results/campaign.json, to which the next
sitting adds."""
import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import counts  # noqa: E402
import kills  # noqa: E402
import memory  # noqa: E402
import mutations  # noqa: E402
import odd  # noqa: E402
import server  # noqa: E402
import small  # noqa: E402
import surroundings  # noqa: E402


HEAD = dict(kills="kills", mutations="mutated_files")


def behind(path):
    "Which of the two is further from what is planned."
    c = counts.read(path)
    return min(("kills", "mutations"), key=lambda k: c[HEAD[k]]/counts.PLANNED[k])


def sitting(hours, seed, turn, path):
    "Turns of kills or of mutations, whichever is behind, until the time is over."
    server.loaded()
    until, at, known = time.monotonic()+3600*hours, counts.commit(), set()
    with small.folder() as folder:
        rows = dict(kills=(kills, {}), mutations=(mutations, {}))
        for name, (module, _) in rows.items():
            (folder/name).mkdir()
            module.furnish(folder/name)
        while (left := until-time.monotonic()) > 0:
            began, name = time.monotonic(), behind(path)
            module, trials = rows[name]
            more = dict(known=known) if module is mutations else {}
            n = module.campaign(folder/name, min(turn, left), seed, path=path, trials=trials,
                **more)
            print(f"{n:,} {HEAD[name].replace('_', ' ')}", flush=True)
            counts.sat(time.monotonic()-began, at, path)
            seed += 1000


def once(rows, seed, path):
    "The rows that are gone through from end to end."
    server.loaded()
    began = time.monotonic()
    with small.folder() as base:  # which another user's attempts reach
        for name in rows:
            (base/name).mkdir()
            if name == "surroundings": kills.furnish(base/name)
            if name == "memory": mutations.furnish(base/name)
        if "surroundings" in rows: surroundings.campaign(base/"surroundings", seed, path)
        if "odd" in rows: odd.odd(base/"odd", path)
        if "repeat" in rows: odd.repeat(base/"repeat", path)
        if "memory" in rows:
            memory.readers(base/"memory", path)
            memory.plans(path)
            memory.scored(base/"memory", path)
            memory.trained(base/"memory", path)
    counts.sat(time.monotonic()-began, counts.commit(), path)


def main():
    options = argparse.ArgumentParser(prog="campaign", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--hours", type=float, default=1.)
    options.add_argument("--turn", type=float, default=120., help="seconds of kills, or of files")
    options.add_argument("--seed", type=int, help="default: another one each time")
    options.add_argument("--rows", nargs="*", default=[],
        choices=["surroundings", "odd", "repeat", "memory"])
    options.add_argument("--counts", type=Path, default=counts.RESULTS)
    given = options.parse_args()
    seed = random.SystemRandom().randrange(10**9) if given.seed is None else given.seed
    if given.rows: return once(given.rows, seed, given.counts)
    sitting(given.hours, seed, given.turn, given.counts)


if __name__ == "__main__": main()
