"""The built site in a real browser: every page, its links, figures, maths, search and dark mode,
with no network."""

import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from html import unescape
from urllib.parse import unquote, urldefrag, urljoin

import nbformat
import numpy as np
import pytest
from PIL import Image
from conftest import HANG, ROOT

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.support.ui import WebDriverWait

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
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in QUIET.split(): options.add_argument(flag)
    options.add_argument("--window-size=1400,1000")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def notebooks():
    "Page name -> notebook, for every page that _quarto.yml lists and that exists."
    names = re.findall(r"nbs/([\w/]+)\.ipynb", (ROOT / "_quarto.yml").read_text())
    return {re.sub(r"^\d+[a-z]?_", "", n.rpartition("/")[2]): ROOT / "nbs" / f"{n}.ipynb"
        for n in names if (ROOT / "nbs" / f"{n}.ipynb").exists()}


def cells(path): return json.loads(path.read_text())["cells"]
def shown(cell): return not re.match(r"#\|\s*hide\b", "".join(cell["source"]))
def console(browser):
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "ERROR")]


@functools.cache
def anchors(name):
    text = (SITE / name).read_text()
    return {unquote(unescape(i)) for i in re.findall(r'\bid="([^"]+)"', text)}


def test_every_notebook_has_its_page(site):
    assert {p.stem for p in SITE.glob("*.html")} == set(notebooks())


@pytest.mark.parametrize("page", notebooks())
def test_page(site, browser, page):
    browser.get(f"{site}{page}.html")
    assert not console(browser)
    run, prose = browser.execute_script, "\n".join("".join(c["source"])
        for c in cells(notebooks()[page]) if c["cell_type"] == "markdown")

    away = [u for u in run("return performance.getEntriesByType('resource').map(r => r.name)")
        if not u.startswith((site, "data:"))]
    assert not away, "the page loads from elsewhere"

    for href in run(
        "return [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"):
        url, anchor = urldefrag(urljoin(f"{site}{page}.html", href))
        if not url.startswith(site): continue
        name = url.removeprefix(site) or "index.html"
        assert (SITE / name).exists(), f"broken link {href}"
        assert not anchor or not name.endswith(".html") or unquote(anchor) in anchors(
            name), f"broken anchor {href}"

    widths = run("return [...document.images].map(i => i.naturalWidth)")
    figures = sum("image/png" in o.get("data", {}) for c in cells(notebooks()[page])
        if c["cell_type"] == "code" and shown(c) for o in c["outputs"])
    assert len(widths) >= figures and all(widths), "a figure is missing"

    assert not re.search(r"^#\|", run("return document.body.innerText"), re.M), "a directive shows"
    text = run(
        "const b = document.body.cloneNode(true); b.querySelectorAll('pre, code, script, style,"
        " math').forEach(e => e.remove()); return b.textContent"
    )
    for literal in (":::", "$", r"\(", r"\[", "{.callout", "{=html}", "```"):
        assert (
            literal not in text
        ), f"{literal} shows as text: {text[max(0, text.find(literal)-80):][:160]!r}"
    heights = run(
        "return [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().height)")
    assert all(heights) and (heights
        or not re.search(r"\$[^$\n`]+\$", re.sub(r"```.*?```|`[^`]*`", "", prose, flags=re.S)))
    if heights:
        assert run(
            "return document.fonts.ready.then(() => [...document.fonts].filter(f =>"
            " f.family.includes('STIX')).every(f => f.status == 'loaded'))"
        )

    assert run("return document.querySelectorAll('#TOC a').length") or not re.search("^##? ",
        prose.replace("# ", "", 1), re.M), "no table of contents"
    assert run(
        "return document.documentElement.scrollWidth <= window.innerWidth"
    ), "the page is wider than the window"


def ink(browser, box):
    "Where a part of the window differs from its ground."
    left, top, right, bottom = map(int, box)
    window = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L")
    grey = np.asarray(window.crop((left, top, right + 1, bottom + 1))).astype(int)
    return abs(grey - np.median(grey)) > 60


SIGN = """const [root] = arguments;
root.scrollIntoView({block: 'center', behavior: 'instant'});
const all = root.getBoundingClientRect(), inside = root.firstElementChild.getBoundingClientRect();
return [all.left, all.top, inside.left, all.bottom]"""


@pytest.mark.parametrize("page",
    [p for p in notebooks() if r"\\sqrt" in notebooks()[p].read_text()])
def test_roots_have_their_sign(site, browser, page):
    "A font without the sign leaves its place empty, and the formula says something else."
    browser.get(f"{site}{page}.html")
    run = browser.execute_script
    run("return document.fonts.ready.then(() => true)")
    roots = run("return [...document.querySelectorAll('msqrt')]")
    assert roots
    for root in roots:
        sign = run(SIGN, root)
        assert sign[2] > sign[0] + 2 and ink(browser, sign).any(), root.get_attribute("outerHTML")


# What an element that scrolls or hides lets through, against what stands in it.
CUT = """const cut = [];
const parts = 'math mfrac > *, math msup > *, math munderover > *';
for (const part of document.querySelectorAll(parts)) {
  const box = part.getBoundingClientRect();
  for (let out = part.parentElement; out; out = out.parentElement) {
    const style = getComputedStyle(out);
    if (style.overflowY == 'visible') continue;
    if (out == document.documentElement || out == document.body) continue;
    const room = out.getBoundingClientRect();
    if (box.top < room.top - 1 || box.bottom > room.bottom + 1) cut.push(part.textContent);
  }
}
return cut"""

# How far the middle of a sign is from the middle of what it stands over or under, in widths of the
# latter.
ASIDE = """return [...document.querySelectorAll('math mover, math munder')]
  .filter(pair => pair.children[1].tagName == 'mo').map(pair => {
  const [base, sign] = [...pair.children].map(e => e.getBoundingClientRect());
  const apart = Math.abs((base.left + base.right - sign.left - sign.right)/2);
  const far = apart/Math.max(base.width, sign.width);
  return [far, pair.textContent] }).filter(([far]) => far > .25)"""


@pytest.mark.parametrize("page", [p for p in notebooks() if "$" in notebooks()[p].read_text()])
def test_formulas_are_whole(site, browser, page):
    "Numerators are not cut by what scrolls; hats and braces stand where they belong."
    browser.get(f"{site}{page}.html")
    browser.execute_script("return document.fonts.ready.then(() => true)")
    assert not browser.execute_script(CUT)
    assert not browser.execute_script(ASIDE)


def test_such_faults_would_show(site, browser):
    "The two faults that were there: a box that cuts what is above it, and a hat beside its letter."
    formula = "<math><mfrac><mi>a</mi><mi>b</mi></mfrac></math>"
    cut = f"<div style='overflow-y:hidden;height:9px'>{formula}</div>"
    aside = "<math><mover><mi>w</mi><mo style='margin-left:2em'>^</mo></mover></math>"
    browser.get(f"{site}index.html")
    browser.execute_script("document.querySelector('main').innerHTML = arguments[0]", cut + aside)
    assert browser.execute_script(CUT) and browser.execute_script(ASIDE)


FOREIGN = (
    r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


def test_no_page_asks_another_host_for_anything(site):
    "Links lead out; scripts, styles, fonts and pictures come from the site itself."
    def asked(html): return re.findall(FOREIGN, html)
    found = {p.name: hosts for p in SITE.glob("*.html") if (hosts := asked(p.read_text()))}
    assert not found
    for path in SITE.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", path.read_text()), path.name
    assert asked('<script async src="https://cdn.example.org/a.js">') == [
        "https://cdn.example.org/a.js"]


def test_pull_requests_can_be_opened(site):
    "The first mention on a page is a link; the sources of a chapter are such mentions."
    for page, path in notebooks().items():
        prose = "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
        named = set(re.findall(r"(?<!\[)\bPR #(\d+)",
            re.sub(r"```.*?```|^#.*$|`[^`\n]*`|\[[^\]\n]*\]\([^)\n]*\)", "", prose,
                flags=re.M | re.S)))
        linked = set(re.findall(r'href="https://github.com/openai/parameter-golf/pull/(\d+)"',
            (SITE/f"{page}.html").read_text()))
        assert named <= linked, page


def test_staged_notebooks_are_notebooks(site):
    """What the renderer reads follows the format, source as a list of lines: one long string loses
    its line ends in Quarto."""
    staged = sorted((ROOT / "build" / "site").glob("*.ipynb"))
    if not staged: pytest.skip("the site was built elsewhere")
    for path in staged:
        nbformat.validate(nbformat.read(path, 4))
        for cell in cells(path):
            assert isinstance(cell["source"], list) and not any("\n" in line[:-1]
                for line in cell["source"]), path.name


def test_sidebar_shows_the_parts(site, browser):
    browser.get(f"{site}index.html")
    sidebar = browser.execute_script("return document.querySelector('#quarto-sidebar').textContent")
    for part in re.findall(r'section: "(.*)"', (ROOT / "_quarto.yml").read_text()):
        assert part in sidebar


def test_search_finds_a_definition(site, browser):
    browser.get(f"{site}index.html")
    box = browser.find_element("css selector", ".smalldocs-search input, #quarto-search input")
    box.send_keys("frozen")
    results = ".smalldocs-search-results a, .aa-Item a"
    WebDriverWait(browser, HANG).until(lambda b: b.find_elements("css selector", results))
    assert not console(browser)


def test_dark_mode_changes_the_page(site, browser, tmp_path):
    page = "bpb" if "bpb" in notebooks() else "index"
    browser.get(f"{site}{page}.html")
    def dark():
        return browser.execute_script(
            "return !!document.querySelector('html.quarto-dark, body.quarto-dark')")
    def background():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    before, colour = dark(), background()
    browser.save_screenshot(str(tmp_path / "before.png"))
    browser.find_element("css selector", ".quarto-color-scheme-toggle").click()
    WebDriverWait(browser, HANG).until(lambda b: dark() != before and background() != colour)
    browser.save_screenshot(str(tmp_path / "after.png"))
    assert (tmp_path / "after.png").stat().st_size > 10_000
    browser.find_element("css selector", ".quarto-color-scheme-toggle").click()
    assert not console(browser)


def test_page_fits_a_phone(site, browser):
    size = browser.get_window_size()
    browser.set_window_size(500, 900)
    try:
        for page in notebooks():
            browser.get(f"{site}{page}.html")
            assert browser.execute_script(
                "return document.documentElement.scrollWidth <= window.innerWidth + 1"
            ), f"{page} is wider than a phone"
    finally:
        browser.set_window_size(size["width"], size["height"])
