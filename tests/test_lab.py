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
from test_site import browser  # noqa: F401

ui = pytest.importorskip("selenium.webdriver.support.ui")


def test_make_lab_opens_on_the_page_that_says_where_to_go():
    recipe = re.search(r"^lab:.*\n\t(.*)$", (ROOT/"Makefile").read_text(), re.M)[1]
    page = ROOT/re.search(r"jupyter lab (\S+)", recipe)[1]
    text = "".join(s for c in json.loads(page.read_text())["cells"] for s in c["source"])
    assert "What do you want to do?" in text and "Run All Cells" in text
    for link in re.findall(r"\]\(([\w/]+\.ipynb)", text): assert (page.parent/link).exists(), link


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


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a copy of a chapter; gives its address."
    (tmp_path/"touch.ipynb").write_text((ROOT/"nbs"/"01a_touch.ipynb").read_text())
    told = tmp_path/"jupyter"
    home = {k: str(told) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.port=0",
        "--ServerApp.token=", f"--ServerApp.root_dir={tmp_path}", "--allow-root",
        "--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
    with open(tmp_path/"log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | home, stdout=log, stderr=log)
    try:
        for _ in range(10*HANG):
            if found := list(told.glob("jpserver-*.json")): break
            assert server.poll() is None, (tmp_path/"log").read_text()
            time.sleep(.1)
        url = json.loads(found[0].read_text())["url"].replace("localhost", "127.0.0.1")
        urllib.request.urlopen(f"{url}api").read()
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_a_figure_lives_in_jupyterlab(lab, browser):
    "Drawn by JupyterLab itself from what the notebook stores: nothing has been run."
    browser.get(f"{lab}lab/tree/touch.ipynb?reset")
    figure = ".jp-RenderedVegaCommon5"
    def there(b): return b.find_elements("css selector", f"{figure} .vega-bind input")
    slider = ui.WebDriverWait(browser, HANG).until(there)[0]
    drawn = f"return document.querySelector('{figure} svg, {figure} canvas').outerHTML"
    def picture():
        live = browser.find_element("css selector", f"{figure} svg, {figure} canvas")
        return live.screenshot_as_png
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
    assert browser.execute_script(drawn)
    before = picture()
    slider.send_keys("\ue014")
    ui.WebDriverWait(browser, HANG).until(lambda b: picture() != before)
    away = [u for u in browser.execute_script(
        "return performance.getEntriesByType('resource').map(r => r.name)")
        if not u.startswith((lab, "data:", "blob:"))]
    assert not away, "JupyterLab loads from elsewhere"
