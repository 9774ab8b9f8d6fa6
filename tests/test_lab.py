"""In JupyterLab: where it opens, that figures live there, that chapters write in a scratch folder
alone."""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import HANG, ROOT
from scratch import outside
from test_site import browser, console, notebooks  # noqa: F401

ui = pytest.importorskip("selenium.webdriver.support.ui")
FIGURE = "application/vnd.vegalite.v5+json"
LEFT, RIGHT = "\ue012", "\ue014"


def test_make_lab_opens_on_the_page_that_says_where_to_go():
    recipe = re.search(r"^lab:.*\n\t(.*)$", (ROOT/"Makefile").read_text(), re.M)[1]
    page = ROOT/re.search(r"jupyter lab (\S+)", recipe)[1]
    text = written(page)
    assert "What do you want to do?" in text and "Run All Cells" in text
    assert "](game/02_bpb.ipynb)" in text and "](findings/reading.ipynb)" in text


def written(page):
    "Prose of a notebook, and the tables that its cells show."
    found = json.loads(page.read_text())["cells"]
    prose = [c["source"] for c in found if c["cell_type"] == "markdown"]
    prose += [o["data"].get("text/markdown", []) for c in found for o in c.get("outputs", [])
        if "data" in o]
    return "\n".join("".join(p) for p in prose)


@pytest.mark.parametrize("page", notebooks().values(), ids=lambda p: p.stem)
def test_links_of_a_notebook_lead_to_files_beside_it(page):
    "As JupyterLab follows them, also those in tables that a cell has made."
    for link in re.findall(r"\]\(([^()\s]+)\)", written(page)):
        path = link.partition("#")[0]
        if path and not re.match(r"\w+:", link): assert (page.parent/path).exists(), link


def test_a_write_outside_the_scratch_folder_is_seen(tmp_path, monkeypatch):
    "What the chapters' test looks at, tried on what chapters may and may not do."
    allowed = [tmp_path/"x.json", Path(tempfile.gettempdir())/"a"/"b", "/dev/null", "/proc/self/x",
        ROOT/"pgolf"/"__pycache__"/"a.pyc", Path.home()/".cache"/"torch"/"x", 3]
    assert not [p for p in allowed if outside(p)]
    monkeypatch.chdir(ROOT)
    assert all(map(outside, [ROOT/"nbs"/"data.bin", "model.pgolf", ROOT/"runs"/"x", "/opt/x"]))
    code = """if 1:
        import sys
        sys.path.insert(0, sys.argv[1])
        from scratch import watch
        seen = watch()
        open(sys.argv[2], 'w').close()
        open(sys.argv[2]).close()
        print(len(seen))"""
    inside = [sys.executable, "-c", code, str(ROOT/"tests")]
    planted = ROOT/"tests"/f".planted-{os.getpid()}"
    try:
        found = [subprocess.run([*inside, str(p)], capture_output=True, text=True, cwd=tmp_path)
            for p in (tmp_path/"fine", planted)]
    finally: planted.unlink(missing_ok=True)
    assert [f.stdout.strip() for f in found] == ["0", "1"], found


def figures(path):
    "What the chapter stores of its figures."
    cells = json.loads(path.read_text())["cells"]
    return [o["data"][FIGURE] for c in cells for o in c.get("outputs", [])
        if FIGURE in o.get("data", {})]


TOUCHED = [p for p in notebooks().values() if FIGURE in p.read_text()]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on copies of the chapters with such figures; gives its address."
    folder = tmp_path_factory.mktemp("lab")
    for path in [*TOUCHED, ROOT/"nbs"/"index.ipynb"]:
        copy = folder/path.relative_to(ROOT/"nbs")
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    told = folder/"jupyter"
    home = {k: str(told) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.port=0",
        "--ServerApp.token=", f"--ServerApp.root_dir={folder}", "--allow-root",
        "--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
    with open(folder/"log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | home, stdout=log, stderr=log)
    try:
        for _ in range(10*HANG):
            if found := list(told.glob("jpserver-*.json")): break
            assert server.poll() is None, (folder/"log").read_text()
            time.sleep(.1)
        url = json.loads(found[0].read_text())["url"].replace("localhost", "127.0.0.1")
        urllib.request.urlopen(f"{url}api").read()
        yield url
    finally:
        server.terminate()
        server.wait()


LIVE = ".jp-RenderedVegaCommon5"
# JupyterLab draws the cells that are in sight: go down a page until the figure is there.
FURTHER = """const panel = [...document.querySelectorAll('.jp-WindowedPanel-outer')].at(-1);
if (panel) panel.scrollTop += .8*panel.clientHeight"""


def seen(browser, what):
    "The elements that fit, once there are any."
    def there(b):
        found = b.find_elements("css selector", what)
        if not found: b.execute_script(FURTHER)
        return found
    return ui.WebDriverWait(browser, HANG).until(there)


@pytest.mark.slow
@pytest.mark.parametrize("path", TOUCHED, ids=lambda p: p.stem)
def test_a_figure_lives_in_jupyterlab(lab, browser, path):
    """Drawn by JupyterLab itself from what the notebook stores: nothing has been run. The keyboard
    moves it, it has names, nothing is loaded from elsewhere, and nothing fails."""
    console(browser)  # what came before is no matter of ours
    browser.get(f"{lab}lab/tree/{path.relative_to(ROOT/'nbs')}?reset")
    control = seen(browser, f"{LIVE} .vega-bind input")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", control)
    spec = figures(path)[0]
    start, last = spec["params"][0]["value"], len(spec["usermeta"]["said"]) - 1
    def picture(): return browser.find_element("css selector", f"{LIVE} .marks").screenshot_as_png
    before = picture()
    assert int(control.get_attribute("value")) == start
    control.send_keys(LEFT if start == last else RIGHT)
    ui.WebDriverWait(browser, HANG).until(lambda b: picture() != before)
    assert int(control.get_attribute("value")) == (start - 1 if start == last else start + 1)
    names = browser.execute_script("""return [arguments[0].closest('.vega-bind').textContent,
        document.querySelector(arguments[1] + ' [aria-label]').getAttribute('aria-label')]""",
        control, LIVE)
    assert spec["params"][0]["bind"]["name"].strip() in names[0] and names[1] == spec["description"]
    away = [u for u in browser.execute_script(
        "return performance.getEntriesByType('resource').map(r => r.name)")
        if not u.startswith((lab, "data:", "blob:"))]
    assert not away, "JupyterLab loads from elsewhere"
    assert not console(browser)
