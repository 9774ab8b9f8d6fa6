"Every dependency of the two commands is pinned with hashes, and the pins agree."
import re

from conftest import ROOT


def normal(name): return re.sub(r"[-_.]+", "-", name).lower()


def locked(text):
    "Package -> (version, number of hashes)."
    found = {}
    for block in re.split(r"\n(?=[a-z0-9])", text):
        if m := re.match(r"([\w.\[\]-]+)==(\S+)", block):
            found[normal(m[1].partition("[")[0])] = m[2], len(
                re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block))
    return found


LOCK = locked((ROOT/"requirements.lock").read_text())


def test_every_pin_of_constraints_is_locked_at_its_version():
    pins = dict(line.split("==") for line in (ROOT/"constraints.txt").read_text().split("\n")
        if "==" in line)
    assert len(pins) > 20
    assert {normal(n): v for n, v in pins.items()} == {normal(n): LOCK.get(normal(n), ("absent",
        0))[0] for n in pins}


def test_every_package_has_a_hash():
    assert len(LOCK) > 100 and not [n for n, (_, hashes) in LOCK.items() if not hashes]


def test_nothing_is_fetched_from_elsewhere():
    text = (ROOT/"requirements.lock").read_text()
    assert not re.search(r"https?://|file:|git\+|^-[ef]|--index-url|--find-links", text, re.M)


def test_a_package_without_a_hash_would_be_seen():
    assert locked("a==1 \\\n    --hash=sha256:"+"0"*64+"\nb==2\n") == {"a": ("1", 1), "b": ("2", 0)}
