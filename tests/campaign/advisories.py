"""Every version that requirements.lock pins against published advisories: a git directory of the
Python Packaging Advisory Database, which is what `pip-audit` asks as well.

`git clone --bare https://github.com/pypa/advisory-database`, then
`python tests/campaign/advisories.py advisory-database.git`."""
import argparse
import re
import subprocess
import sys
from pathlib import Path

import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).resolve().parent))
import counts  # noqa: E402

WHAT = "pinned packages against advisories"
LOCK = counts.ROOT/"requirements.lock"
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.M)


def pinned(text):
    "Name and version of each package of a lock file; a name may have several."
    return {(canonicalize_name(n), v) for n, v in PINNED.findall(text)}


def within(version, events):
    "Whether a version lies in a range of OSV: introduced, and not yet fixed."
    state = False
    for event in events:
        [(what, at)] = event.items()
        passed = at == "0" or version >= Version(at)
        if what == "introduced" and passed: state = True
        if what == "fixed" and passed or what == "last_affected" and version > Version(at):
            state = False
    return state


def affects(advisory, name, version):
    "Whether an advisory names a package in this version."
    for a in advisory.get("affected", []):
        if canonicalize_name(a["package"]["name"]) != name: continue
        ranges = [r["events"] for r in a.get("ranges", []) if r["type"] == "ECOSYSTEM"]
        if version in a.get("versions", []): return True
        if any(within(Version(version), events) for events in ranges): return True
    return False


def git(folder, *words):
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True,
        check=True).stdout


def advisories(folder, names):
    "Those of a database that may concern a package, by package."
    for path in git(folder, "ls-tree", "-r", "--name-only", "HEAD", "vulns").splitlines():
        if (name := canonicalize_name(Path(path).parent.name)) in names:
            one = yaml.load(git(folder, "show", f"HEAD:{path}"), Loader=yaml.CSafeLoader)
            if not one.get("withdrawn"): yield name, one


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("database", help="git directory of the advisory database")
    options.add_argument("--counts", type=Path, default=counts.RESULTS)
    given = options.parse_args()
    locked = pinned(LOCK.read_text())
    found = list(advisories(given.database, {n for n, _ in locked}))
    bad = {(n, v, a["id"]) for n, a in found for m, v in locked if m == n and affects(a, n, v)}
    for n, v, a in sorted(bad):
        counts.found("supply chain", f"{n} {v}: {a}", given.counts)
        print(f"{n} {v}: {a}")
    hit = {(n, v) for n, v, _ in bad}
    counts.add("supply chain", WHAT, given.counts, tried=len(locked), passed=len(locked-hit),
        advisories=len(found))
    with counts.changing(given.counts) as c: c["rows"]["supply chain"][WHAT]["until"] = git(
        given.database, "log", "-1", "--format=%cs").strip()
    print(f"{len(locked)} pinned packages, {len(found)} advisories name one, {len(hit)} affected")


if __name__ == "__main__": main()
