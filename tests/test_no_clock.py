"""Nothing judges by the clock: no assertion compares a time that was measured.

Read off the syntax of every chapter and test. A value is measured when it comes from a clock of the
machine, or when it is a field that holds seconds; equality with a time source moved by hand is
exact, and stays."""
import ast
import json
import re

import pytest
from conftest import ROOT

CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time",
    "time_ns", "timeit"}
FIELDS = {"elapsed", "seconds", "tokens_per_second", "wall_s", "eta"}
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def word(node):
    "The name that a node stands for: a variable, an attribute, or a key in quotes."
    if isinstance(node, ast.Name): return node.id
    if isinstance(node, ast.Attribute): return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return node.slice.value


def reads_a_clock(node):
    whole = ast.unparse(node)
    return any(word(n) in CLOCKS for n in ast.walk(node)) or "time.time()" in whole


def pairs(node):
    "Targets and values of an assignment, one by one where both are tuples."
    for t in getattr(node, "targets", None) or [node.target]:
        both = isinstance(t, ast.Tuple) and isinstance(node.value, ast.Tuple)
        yield from zip(t.elts, node.value.elts) if both else [(t, node.value)]


def measured_names(tree):
    "Variables that hold a measured time: read from a clock, or computed from such a variable."
    found = set()
    while True:
        before = len(found)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                found |= {n.id for t, v in pairs(node) if is_measured(v, found)
                          for n in ast.walk(t) if isinstance(n, ast.Name)}
        if len(found) == before: return found


def is_measured(node, names):
    sums = [n for n in ast.walk(node) if isinstance(n, (ast.BinOp, ast.Name))]
    used = {n.id for s in sums for n in ast.walk(s) if isinstance(n, ast.Name)}
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and not word(n.func) in CLOCKS]
    return reads_a_clock(node) or not calls and bool(used & names)


def orders_times(c, names):
    "Is it a comparison by size with a time in it? That a time is above zero may be said."
    if not isinstance(c, ast.Compare) or not any(isinstance(o, ORDERS) for o in c.ops): return False
    above_zero = len(c.ops) == 1 and ast.unparse(c.comparators[0]) == "0"
    return not above_zero and any(word(n) in FIELDS | names
        for n in ast.walk(c)) or reads_a_clock(c)


def judges(tree):
    "Lines that assert an order of times: `assert a < b`, or that a time is close to a number."
    scopes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)] or []
    for scope in [*scopes, tree]:
        names = measured_names(scope)
        for node in ast.walk(scope):
            if isinstance(node, ast.Assert):
                if any(orders_times(c, names) for c in ast.walk(node.test)): yield node.lineno
            elif isinstance(node, ast.Call) and word(node.func) == "test_close":
                one, other = node.args[:2]
                if word(one) in FIELDS | names and isinstance(other, ast.Constant):
                    yield node.lineno


def codes_of(path):
    "A file, or the cells of a notebook, as texts of Python."
    if path.suffix == ".py": return [path.read_text()]
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    return [re.sub(r"^\s*[%!].*$", "", "".join(c["source"]), flags=re.M) for c in cells]


FILES = [*sorted((ROOT / "nbs").rglob("*.ipynb")), *sorted((ROOT / "tests").rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_assertion_judges_by_the_clock(path):
    found = [code.splitlines()[n - 1] for code in codes_of(path) for n in judges(ast.parse(code))]
    assert not found


FAULTS = ["assert res.elapsed < 3*.2", "assert .4 <= res.elapsed < .8",
          "assert real > res.elapsed + idle",
          "import time\nstart = time.time()\nwork()\nassert time.time() - start < 2",
          "start = time.perf_counter()\nwork()\ntook = time.perf_counter() - start\n"
          "assert took < 5",
          "ours, loop = [timeit.timeit(f) for f in (a, b)]\nratio = loop/ours\nassert ratio > 1",
          "assert row['seconds'] <= 12", "test_close(res.elapsed, 1.2, .3)"]
FAIR = ["assert res.elapsed == 6*.25", "test_eq(timed.seconds, [.25, .5])", "assert len(rows) < 3",
        "start = time.perf_counter()\nprint(time.perf_counter() - start)\nassert result > 1"]


@pytest.mark.parametrize("code", FAULTS)
def test_such_an_assertion_is_seen(code): assert list(judges(ast.parse(code)))


@pytest.mark.parametrize("code", FAIR)
def test_what_does_not_judge_is_left_alone(code): assert not list(judges(ast.parse(code)))
