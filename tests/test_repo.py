"What must hold for every chapter and module, read off the files."
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "pgolf").rglob("*.py")
    if p.name not in ("__init__.py", "_modidx.py"))


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]
def source(cell): return "".join(cell["source"])
def directives(cell): return re.findall(r"^#\|\s*([\w-]+):?", source(cell), re.M)
def by_name(path): return path.stem


def book_name(path): return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
def module_name(path): return ".".join(path.relative_to(ROOT / "pgolf").with_suffix("").parts)
def listed():
    names = re.findall(r"- (?:href: )?nbs/([\w/]+)\.ipynb", (ROOT / "_quarto.yml").read_text())
    return list(dict.fromkeys(names))  # the first page stands in the bar at the top, too


def order():
    "Module -> place in the book of the chapter that exports it."
    found = {}
    for p in NOTEBOOKS:
        for cell in cells(p):
            if m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(cell), re.M):
                found[m[1]] = listed().index(book_name(p))
    return found


# ---- the book

def test_the_site_lists_every_chapter_once_and_in_order():
    assert sorted(listed()) == sorted(map(book_name, NOTEBOOKS))
    numbers = [int(n) for n in re.findall(r"(?<![^/\n])(\d\d)_", "\n".join(listed()))]
    assert numbers == sorted(
        set(numbers)), "chapters stand in the order of their numbers, no number twice"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_title_cell_is_title_and_summary_alone(path):
    lines = [s for s in source(json.loads(path.read_text())["cells"][0]).splitlines() if s.strip()]
    assert lines[0].startswith("# ") and all(s.startswith("> ")
        for s in lines[1:]), "what else stands in the title cell would not reach the site"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_notebook_is_executed_without_errors_or_noise(path):
    code = [c for c in cells(path) if source(c).strip()]
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o["text"] for o in outputs if o.get("name") == "stderr"]
    ends_on_value = [c for c in code if "eval" not in directives(c) and is_value(source(c))]
    assert all(c["outputs"] for c in ends_on_value), "not executed"
    assert path.stat().st_size < 1_500_000, "notebooks stay small: about 60 kB a figure"


def is_value(code):
    "Does the cell end on a name or an operator, which always shows (calls may return None)?"
    body = ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.M)).body
    return bool(body) and isinstance(body[-1], ast.Expr) and isinstance(body[-1].value,
        (ast.Name, ast.BinOp, ast.Tuple)) and not code.rstrip().endswith(";")


def is_table_line(node, lines):
    "A field of a configuration or a setting of a recipe or table that has its line to itself."
    if isinstance(node, ast.AnnAssign): return True
    if not isinstance(node, ast.keyword) or node.lineno != node.end_lineno: return False
    return bool(re.match(r"\s*(\w+=|\*\*).*,\s*(#.*)?$", lines[node.lineno-1]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_exported_cells_are_short(path):
    def size(code):  # fields and settings, one a line, are a table and do not count
        lines = code.splitlines()
        table = {n.lineno for n in ast.walk(ast.parse(code)) if is_table_line(n, lines)}
        return len(lines) - len(table)
    exported = [source(c) for c in cells(path) if {"export", "exports"} & set(directives(c))]
    assert not {code.split("\n")[1]: size(code) for code in exported if size(code) > 25}


def wide(code, most=100):
    "Lines that a page cuts off; the directives of a cell are one line by their grammar."
    return [line for line in code.splitlines() if len(line) > most and not line.startswith("#|")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_code_fits_the_page(path):
    assert not [line for cell in cells(path) for line in wide(source(cell))]


@pytest.mark.parametrize("folder", ["tests", ".ci"])
def test_tests_and_tools_fit_the_page(folder):
    found = {p.name: wide(p.read_text()) for p in sorted((ROOT / folder).glob("*.py"))}
    assert found and not {name: lines for name, lines in found.items() if lines}


def test_a_planted_wide_line_is_seen():
    long = "x = " + "1"*97
    assert wide(f"y = 1\n{long}") == [long] and wide(f'"""\n{long}\n"""') == [long]
    assert not wide(long[:100]) and not wide(f"#| fig-alt: {long}")


def as_options(code):
    "Options of a cell, as a renderer reads them."
    return [yaml.safe_load(line) for line in re.findall(r"^#\|\s*([\w-]+:.*)$", code, re.M)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_cell_options_are_yaml(path):
    for cell in cells(path):
        assert all(isinstance(o, dict) for o in as_options(source(cell))), source(cell)


def test_an_unquoted_colon_is_no_yaml():
    with pytest.raises(yaml.YAMLError): as_options("#| fig-alt: three ways: plain, once, twice")
    assert as_options('#| echo: false\n#| fig-alt: "three ways: plain"') == [{"echo": False},
        {"fig-alt": "three ways: plain"}]


# As Python writes it: a bracket first, or a name with fields. An array is what a chapter computes.
RAW = re.compile(r"[{(\[]|dict_\w+\(|[A-Za-z_][\w.]*\(\w+=")


def raw_results(path_cells):
    "Results that a reader would have to read as Python."
    seen = [o["data"] for c in path_cells if "hide" not in directives(c)
        for o in c["outputs"] if "data" in o]
    plain = ["".join(d["text/plain"]) for d in seen if set(d) == {"text/plain"}]
    return [text for text in plain if RAW.match(text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_results_are_tables_or_sentences(path):
    assert not raw_results(cells(path)), "use pgolf.show.show, or a sentence with its unit"


def test_a_raw_result_would_be_seen():
    def cell(text, source="x", **more):
        return dict(source=[source], outputs=[dict(data={"text/plain": [text]} | more)])
    raw = ["{'a': 1.0}", "(1, 2)", "[(1, 2)]", "[0.1]", "Finding(name='T1a')", "dict_keys(['a'])",
        "muon.Group(name='a')"]
    assert raw_results([cell(t) for t in raw]) == raw
    fine = [cell(t) for t in ("'3 of 4'", "tensor([1, 2])", "array([1.])", "torch.Size([2])", "0.5",
        "<Figure size 1x1 with 1 Axes>")]
    hidden, table = cell("{}", "#| hide\nx"), cell("(1, 2)", **{"text/markdown": ["|a|"]})
    assert not raw_results([*fine, hidden, table])


def unseen_tables(code):
    "Calls of `show` whose table nobody sees, since the cell goes on behind them."
    lines = [l if l[:1] not in "%!" else "" for l in code.split("\n")]
    return [s.lineno for s in ast.parse("\n".join(lines)).body[:-1] if isinstance(s, ast.Expr)
        and isinstance(s.value, ast.Call) and ast.unparse(s.value.func) == "show"]


def test_every_table_is_seen():
    assert unseen_tables("show([1])\nx = 2") == [1] and not unseen_tables("x = 2\nshow([x])")
    for p in NOTEBOOKS:
        if p.stem == "90_cli": continue  # its `show` prints
        found = {c["id"]: lines for c in cells(p) if c["cell_type"] == "code"
            and (lines := unseen_tables("".join(c["source"])))}
        assert not found, (p.name, found)


def test_no_progress_bar_stays_in_a_notebook():
    "On a busy machine a bar takes long enough to be drawn; its state is no result."
    for p in NOTEBOOKS:
        kept = [o for c in cells(p) for o in c.get("outputs", ())
            if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
        assert not kept and "widgets" not in json.loads(p.read_text())["metadata"], p.name


def test_run_notebooks_keep_their_parameters_tag():
    for p in NOTEBOOKS:
        if p.parent.name == "runs" and p.stem != "scoreboard":
            assert any("parameters" in c["metadata"].get("tags", []) for c in cells(p)), p.name


def test_readme_is_the_index():
    sys.path.insert(0, str(ROOT / ".ci"))
    import docs
    assert (ROOT / "README.md").read_text() == docs.readme_text(), "run: make readme"


def left_by_use(folder, names):
    "What executed notebooks leave behind; the folder of run notebooks is none of it."
    left = {"__pycache__", ".ipynb_checkpoints",
        "data"} | ({"runs"} if folder != str(ROOT / "nbs") else set())
    return left & set(names)


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    "A copy of the sources after nbdev_export and nbdev_clean."
    copy = tmp_path_factory.mktemp("sources")
    for name in ("nbs", "pgolf"): shutil.copytree(ROOT / name, copy / name, ignore=left_by_use)
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, copy)
    code = (
        "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean;"
        " nbdev_export(); nbdev_clean()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True)
    return copy


def test_package_is_what_the_notebooks_export(regenerated):
    fresh = {p.relative_to(regenerated): p.read_text()
        for p in (regenerated / "pgolf").rglob("*.py")}
    stale = [str(p) for p, text in fresh.items() if not (ROOT / p).exists()
        or (ROOT / p).read_text() != text]
    assert not stale, "run: nbdev_export"
    assert set(map(module_name, MODULES)) == set(
        order()), "a module without a chapter, or a chapter without its module"


def test_notebooks_are_clean(regenerated):
    assert not [p.name for p in NOTEBOOKS
        if p.read_text() != (regenerated / p.relative_to(ROOT)).read_text()], "run: nbdev_clean"


# ---- the package

def imports(path):
    "Every module that a file imports, by its full name."
    tree, top = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): top |= {a.name for a in node.names}
        if not isinstance(node, ast.ImportFrom): continue
        folder = (["pgolf", *path.relative_to(ROOT / "pgolf").parts][:-node.level]
            if node.level else [])
        source = ".".join([*folder, *filter(None, [node.module])])
        is_folder = source == "pgolf" or (ROOT / source.replace(".", "/")).is_dir()
        top |= {f"{source}.{a.name}" for a in node.names} if is_folder else {source}
    return top


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_module_imports_only_earlier_chapters(path):
    place = order()
    used = {m.removeprefix("pgolf.") for m in imports(path)
        if m.startswith("pgolf.")} - {"__version__"}
    assert all(place[m] < place[module_name(path)] for m in used), used


@pytest.mark.parametrize("path", MODULES, ids=by_name)
def test_module_keeps_the_house_rules(path):
    text = path.read_text()
    assert not imports(path) & {"pickle", "nbdev", "fastcore"} and "fastcore" not in text
    assert not re.search(r"os\.environ|getenv", text), "configuration is values"
    if path.stem != "peer": assert "torch.autocast" not in text, "ours are explicit, theirs are not"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    for load in re.findall(r"torch\.load\([^)]*\)", text): assert "weights_only=True" in load
    assert len(text.splitlines()) <= 500


def test_importing_everything_touches_neither_network_nor_cuda_nor_what_is_slow_to_load():
    code = """if 1:
        import socket, sys, torch
        def refuse(*a, **k): raise AssertionError('network at import')
        socket.socket.connect = socket.getaddrinfo = refuse
        torch.cuda._lazy_init = refuse
        import importlib
        before = set(sys.modules)
        for m in sys.argv[1:]: importlib.import_module(f'pgolf.{m}')
        assert not torch.cuda.is_initialized()
        slow = {'torch._dynamo', 'torch._inductor', 'matplotlib', 'scipy.stats', 'papermill',
            'IPython'}
        assert not (found := slow & set(sys.modules) - before), found"""
    out = subprocess.run([sys.executable, "-c", code, *map(module_name, MODULES)], cwd=ROOT,
        capture_output=True, text=True)
    assert not out.returncode, out.stderr


# ---- the files

def tracked():
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode: pytest.skip("not a git checkout")
    return [ROOT / f for f in out.stdout.split("\n") if f and (ROOT / f).is_file()]


def test_no_file_names_a_place_on_somebodys_machine():
    places = re.compile(r"(?<![\w.:/-])/(?:home|root|work|Users|tmp|mnt)/[\w.-]+|[A-Z]:\\\\Users")
    found = {}
    for p in tracked():
        if p.suffix in (".py", ".ipynb", ".md", ".ini", ".toml", ".yml", ".txt", ".json",
            ".css") and p != ROOT / "tests" / "test_repo.py":
            if hits := places.findall(re.sub(r'"image/png": "[^"]*"', "",
                p.read_text(encoding="utf-8"))):
                found[p.name] = hits[:3]
    assert not found


def test_every_direct_requirement_is_pinned():
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini")
    wanted = " ".join(v for k, v in cfg["DEFAULT"].items()
        if k.endswith("requirements")).lower().replace("_", "-")
    pinned = {s.split("==")[0].lower().replace("_", "-")
        for s in (ROOT / "constraints.txt").read_text().split("\n") if "==" in s}
    assert {re.split(r"[<>=!~]", w)[0] for w in wanted.split()} <= pinned


def reached(name, functions):
    "A function's text and that of the functions of its module that it calls."
    seen, left = {}, [name]
    while left:
        if (n := left.pop()) in seen or n not in functions: continue
        seen[n] = functions[n]
        left += re.findall(r"\b(\w+)\(", functions[n])
    return "\n".join(seen.values())


def commands():
    "Name and text of every command that help lists, with the helpers of its module."
    for path in sorted((ROOT / "pgolf" / "command").glob("*.py")):
        body = ast.parse(path.read_text()).body
        functions = {f.name: ast.unparse(f) for f in body if isinstance(f, ast.FunctionDef)}
        for f in body:
            marks = [ast.unparse(d) for d in getattr(f, "decorator_list", [])]
            if any(m.startswith("command(") and "hidden=True" not in m for m in marks):
                yield f.name, reached(f.name, functions)


def says_what_is_next(text): return bool(re.search(r"\b(say_next|describe|run_batch)\(", text))


@pytest.mark.parametrize("name, text", list(commands()), ids=lambda v: v if len(v) < 30 else "")
def test_every_command_says_what_is_next(name, text): assert says_what_is_next(text)


def test_a_command_that_says_nothing_is_seen():
    own = dict(run="def run(): _end()", _end="def _end(): say_next(1)", plan="def plan(): print(1)")
    assert says_what_is_next(reached("run", own)) and not says_what_is_next(reached("plan", own))


def test_no_two_notebooks_make_one_page():
    "The site has one folder: a page is named after its notebook, without the number."
    names = [re.sub(r"^\d+[a-z]?_", "", p.stem) for p in (ROOT/"nbs").rglob("*.ipynb")
        if "checkpoints" not in str(p)]
    assert sorted(names) == sorted(set(names))
