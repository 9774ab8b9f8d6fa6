"""The built site in a real browser: every page, its links, figures, maths, search and dark mode,
with no network."""

import contextlib
import csv
import functools
import gzip
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import nbformat
import numpy as np
import pytest
from PIL import Image
from conftest import HANG, ROOT

sys.path.insert(0, str(ROOT / ".ci"))
import reader
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
    "Sends text compressed, as servers of the web do."
    def log_message(self, *args): pass
    def send_head(self):
        path = Path(self.translate_path(self.path))
        if path.suffix not in (".html", ".js", ".css", ".json", ".svg") or not path.is_file():
            return super().send_head()
        data = gzip.compress(path.read_bytes())
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)


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


def some(pages, every=6):
    "One page in `every` always, the others with the slow tests."
    return [p if i%every == 0 else pytest.param(p, marks=pytest.mark.slow)
        for i, p in enumerate(pages)]


@functools.cache
def anchors(name):
    text = (SITE / name).read_text()
    return {unquote(unescape(i)) for i in re.findall(r'\bid="([^"]+)"', text)}


def appendix():
    "Page names of the sources: sheets and bibliography."
    return [p.stem for p in sorted((ROOT/"nbs"/"sources").glob("*.md"))] + ["bibliography"]


def test_every_notebook_has_its_page(site):
    pages = {p.stem for p in SITE.glob("*.html")}
    assert pages == {*notebooks(), *appendix(), "404"}


def check_links(site, page, run):
    "Every link within the site leads to a file and an anchor that exist."
    for href in run(
        "return [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"):
        url, anchor = urldefrag(urljoin(f"{site}{page}.html", href))
        if not url.startswith(site): continue
        name = url.removeprefix(site) or "index.html"
        assert (SITE / name).exists(), f"broken link {href}"
        assert not anchor or not name.endswith(".html") or unquote(anchor) in anchors(
            name), f"broken anchor {href}"


@pytest.mark.parametrize("page", some(notebooks()))
def test_page(site, browser, page):
    browser.get(f"{site}{page}.html")
    assert not console(browser)
    run, prose = browser.execute_script, "\n".join("".join(c["source"])
        for c in cells(notebooks()[page]) if c["cell_type"] == "markdown")

    away = [u for u in run("return performance.getEntriesByType('resource').map(r => r.name)")
        if not u.startswith((site, "data:"))]
    assert not away, "the page loads from elsewhere"

    check_links(site, page, run)

    widths = run("return [...document.images].map(i => i.naturalWidth)")
    figures = sum("image/png" in o.get("data", {}) for c in cells(notebooks()[page])
        if c["cell_type"] == "code" and shown(c) for o in c["outputs"])
    assert len(widths) >= figures and all(widths), "a figure is missing"
    drawn = run("return [...document.querySelectorAll('figure svg')].map(s =>"
        " s.getBoundingClientRect()).map(b => Math.min(b.width, b.height))")
    assert all(side > 50 for side in drawn), "a drawing has no room"

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
    for width in (1400, 390):
        with wide(browser, width):
            assert run("return document.documentElement.scrollWidth") <= width, "too wide"


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
    some([p for p in notebooks() if r"\\sqrt" in notebooks()[p].read_text()], 2))
def test_roots_have_their_sign(site, browser, page):
    "A font without the sign leaves its place empty, and the formula says something else."
    browser.get(f"{site}{page}.html")
    run = browser.execute_script
    run("return document.fonts.ready.then(() => true)")
    run("document.querySelectorAll('details').forEach(d => d.open = true)")
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


@pytest.mark.parametrize("page",
    some([p for p in notebooks() if "$" in notebooks()[p].read_text()]))
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
    def asked(html): return re.findall(FOREIGN, re.sub(r'<link rel="canonical"[^>]*>', "", html))
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


DARK = "return !!document.querySelector('html.quarto-dark, body.quarto-dark')"


def test_dark_mode_changes_the_page(site, browser, tmp_path):
    page = "bpb" if "bpb" in notebooks() else "index"
    browser.get(f"{site}{page}.html")
    def dark(): return browser.execute_script(DARK)
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


# ---- sources

@pytest.mark.parametrize("page", appendix())
def test_source_page(site, browser, page):
    "Sheets and bibliography: every link resolves, tables and signs are what the text has."
    browser.get(f"{site}{page}.html")
    run = browser.execute_script
    assert not console(browser)
    check_links(site, page, run)
    with wide(browser, 390): assert run("return document.documentElement.scrollWidth") <= 390
    text = run("return document.querySelector('main').innerText")
    assert not re.search(r"\{#section|\\[\^~$<*]|^\|", text, re.M), "Markdown shows as text"
    source = ROOT/"nbs"/"sources"/f"{page}.md"
    if not source.exists(): return
    lines = source.read_text().splitlines()
    assert run("return document.querySelectorAll('main table').length") == sum(
        bool(re.match(r"\s*\|[-:| ]*-[-:| ]*\|$", line)) for line in lines)
    assert run("return document.querySelectorAll('main :is(sup, sub, math)').length") == 0
    for raw in re.findall(r"(?m)^[^|`\n]*\w\^\w[^|`\n]*$", source.read_text())[:3]:
        at = raw.index("^")
        assert raw[at-1:at+2] in text, raw


def test_each_paper_of_the_bibliography_can_be_opened(site):
    page = (SITE/"bibliography.html").read_text()
    for paper in reader.papers():
        assert f'id="{paper["key"]}"' in page and f'href="{reader.address(paper)}"' in page


# ---- what readers expect on each page

def test_each_page_says_where_it_comes_from(site):
    for page, path in notebooks().items():
        line = re.search(r'<div class="page-tools">(.*?)</div>',
            (SITE/f"{page}.html").read_text(), re.S)
        name = path.relative_to(ROOT)
        for part in (f"/blob/main/{name}", f'href="notebooks/{path.name}"',
            "colab.research.google.com", f"jupyter lab {name}", "version "):
            assert line and part in line[1], f"{page}: no {part}"
        assert (SITE/"notebooks"/path.name).read_bytes() == path.read_bytes()


def test_the_head_of_each_page_tells_other_sites_what_it_is(site):
    address = reader.settings()["site_url"]
    for page in [*notebooks(), *appendix()]:
        head = (SITE/f"{page}.html").read_text().partition("</head>")[0]
        for part in ('property="og:title"', 'property="og:description"',
            f'content="{address}/card.png"', 'name="description"',
            f'rel="canonical" href="{address}/{"" if page == "index" else page}'):
            assert part in head, f"{page}: no {part}"
    assert Image.open(SITE/"card.png").size == (1200, 630)


def test_figures_are_numbered_and_captioned(site):
    for page in notebooks():
        text = (SITE/f"{page}.html").read_text()
        captions = [unescape(c) for c in re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S)]
        numbers = [int(m[1]) for c in captions if (m := re.match(r"Figure (\d+)\. \S", c))]
        drawn = len(re.findall(r'<img [^>]*src="data:image/(?:png|svg\+xml)', text))
        assert numbers == list(range(1, drawn + 1)), page


def test_a_lost_reader_finds_back(site):
    page = (SITE/"404.html").read_text()
    assert "does not exist" in page and 'href="index.html"' in page and "bibliography.html" in page


# Colours as they are painted: the ground is that of the nearest element that has one.
CONTRAST = """const [selector] = arguments;
const numbers = (c) => c.match(/[\\d.]+/g).map(Number);
const linear = (v) => v/255 <= .03928 ? v/255/12.92 : ((v/255 + .055)/1.055)**2.4;
const light = ([r, g, b]) => .2126*linear(r) + .7152*linear(g) + .0722*linear(b);
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > .5) return c;
  }
  return [255, 255, 255];
};
return [...document.querySelectorAll(selector)]
  .filter(e => e.offsetParent && e.textContent.trim() + (e.placeholder || ''))
  .map(e => { const [a, b] = [numbers(getComputedStyle(e).color), ground(e)].map(light);
    return [(Math.max(a, b) + .05)/(Math.min(a, b) + .05), e.outerHTML.slice(0, 120)]; })
  .filter(([ratio]) => ratio < 4.5)"""
READ = (
    "main a, main p, main li, main td, main figcaption, #TOC a, #quarto-sidebar a, .footer a,"
    " #quarto-search input"
)


@pytest.mark.parametrize("page", ["index", "muon", "sheets"])
def test_text_and_links_stand_out_from_their_ground(site, browser, page):
    browser.get(f"{site}{page}.html")
    run, body = browser.execute_script, "return getComputedStyle(document.body).backgroundColor"
    run("document.head.append(Object.assign(document.createElement('style'),"
        " {textContent: '* { transition: none !important }'}))")
    for _ in range(2):
        assert not run(CONTRAST, READ)
        before, named = run(body), run(DARK)
        browser.find_element("css selector", ".quarto-color-scheme-toggle").click()
        WebDriverWait(browser, HANG).until(lambda b: run(body) != before and run(DARK) != named)


def test_pale_links_would_be_seen(site, browser):
    browser.get(f"{site}muon.html")
    browser.execute_script("document.querySelector('main').innerHTML ="
        " '<div style=background:#fff><a href=# style=color:#2780e3!important>pale</a></div>'")
    assert browser.execute_script(CONTRAST, "main a")


def test_the_first_stop_of_the_keyboard_is_the_text(site, browser):
    browser.get(f"{site}muon.html")
    browser.switch_to.active_element.send_keys("\ue004")  # the tabulator
    link = browser.switch_to.active_element
    assert link.get_attribute("href").endswith("#quarto-document-content") and link.rect["x"] >= 0
    assert browser.execute_script("return !!document.getElementById('quarto-document-content')")


def test_tables_can_be_taken_along(site, browser):
    "Wide tables scroll in their box; what is downloaded is what stands there."
    browser.get(f"{site}scoreboard.html")
    run = browser.execute_script
    wide = browser.find_element("css selector", ".table-box:has(.many-columns)")
    assert run("return getComputedStyle(arguments[0]).overflowX", wide) == "auto"
    link = run("return arguments[0].nextElementSibling", wide)
    assert link.text == "CSV"
    run("arguments[0].addEventListener('click', e => e.preventDefault()); arguments[0].click()",
        link)
    rows = list(csv.reader(io.StringIO(unquote(link.get_attribute("href").partition(",")[2]))))
    shown = run(
        "return [...arguments[0].querySelectorAll('tr')].map(r => [...r.children].map(c =>"
        " c.textContent.trim()))",
        wide,
    )
    assert rows == shown and len(rows) > 2


def test_contents_and_search_are_at_hand_on_a_phone(site, browser):
    with wide(browser, 390):
        browser.get(f"{site}muon.html")
        folded = browser.find_element("css selector", "details.contents-here")
        assert folded.is_displayed()
        folded.find_element("css selector", "summary").click()
        links = folded.find_elements("css selector", "a")
        assert (len(links) == len(browser.find_elements("css selector", "#TOC a"))
            and links[0].is_displayed())
        assert browser.find_element("css selector", "#quarto-search").is_displayed()
    assert not browser.find_element("css selector", "details.contents-here").is_displayed()


def test_on_paper_the_text_stands_alone(site, browser):
    browser.get(f"{site}muon.html")
    run = browser.execute_script
    seen = (
        "return [...document.querySelectorAll(arguments[0])].some(e => e.offsetParent ||"
        " e.getClientRects().length)"
    )
    around = "#quarto-sidebar, #quarto-header, #quarto-margin-sidebar, .page-navigation, .table-csv"
    assert run(seen, around) and run(seen, "main pre")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try: assert not run(seen, around) and run(seen, "main pre")
    finally: browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize("asked, found", [("YaRN", "layers"), ("GPTQ fault", "gptq"),
    ("coverage", None), ("frozen", None), ("test-time training", "ttt")])
def test_search_finds_what_is_asked_for(site, browser, asked, found):
    "Words of titles before headings, headings before prose, prose before code."
    browser.get(f"{site}bibliography.html")
    if not (SITE/"site_libs"/"fuse").exists(): pytest.skip("the search is Quarto's own")
    hits = browser.execute_async_script("""const [asked, done] = arguments;
        fetch('search.json').then(r => r.json())
          .then(all => done(new Fuse(all).search(asked).map(h => h.item)))""", asked)
    words = asked.lower().split()
    assert hits and all(w in json.dumps(hits[0], ensure_ascii=False).lower() for w in words)
    if found: assert f"{found}.html" in {h["href"].partition("#")[0] for h in hits[:5]}
    prose = [all(w in (h["title"] + h["section"] + h["text"]).lower() for w in words) for h in hits]
    assert prose[0] or not any(prose), "code before prose"
