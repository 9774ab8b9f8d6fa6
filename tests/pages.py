"""The built site and a browser to read it with, for the tests of its pages; needs no network."""
import contextlib
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

SITE = ROOT / "_docs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome")
DRIVER = shutil.which("chromedriver")
# Without these, Chromium itself looks for updates and sign-in services.
QUIET = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
    " --disable-dev-shm-usage"
)


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def site():
    "Build the site if needed and serve it; gives its address."
    built = subprocess.run([sys.executable, ROOT / ".ci" / "docs.py", "site"], capture_output=True,
        text=True, cwd=ROOT)
    if built.returncode:
        pytest.fail(f"the site does not build: {built.stderr[-2000:]}", pytrace=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0),
        functools.partial(Silent, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip(
            "Chromium and chromedriver are not installed (Debian packages chromium,"
            " chromium-driver)"
        )
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in QUIET.split(): options.add_argument(flag)
    options.add_argument("--window-size=1400,1000")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@functools.cache
def notebooks():
    "Page name -> notebook, for every page that _quarto.yml lists and that exists."
    names = re.findall(r"nbs/([\w/]+)\.ipynb", (ROOT / "_quarto.yml").read_text())
    return {re.sub(r"^\d+[a-z]?_", "", n.rpartition("/")[2]): ROOT / "nbs" / f"{n}.ipynb"
        for n in names if (ROOT / "nbs" / f"{n}.ipynb").exists()}


def cells(path): return json.loads(path.read_text())["cells"]
def shown(cell): return not re.match(r"#\|\s*hide\b", "".join(cell["source"]))
def console(browser):
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "ERROR")]


@contextlib.contextmanager
def wide(browser, width):
    "The window with another width, the page as it is."
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try: yield
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
