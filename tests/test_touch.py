"""Figures that can be touched and pictures drawn by code: in notebooks, and on the built site in a
real browser, by keyboard, in the dark, on a phone, on a slow line and without scripts."""
import io
import json
import re
from html import unescape

import numpy as np
import pytest
from conftest import HANG
from PIL import Image
from test_site import SITE, browser, cells, console, notebooks, site, wide  # noqa: F401

ui = pytest.importorskip("selenium.webdriver.support.ui")
FIGURE = "application/vnd.vegalite.v5+json"
WEIGHT = 1_500_000  # bytes of a page with such a figure, its scripts and all, as sent compressed
LEFT, RIGHT, TAB = "\ue012", "\ue014", "\ue004"


def figures(path):
    "What a notebook stores of each of its figures."
    return [o["data"] for c in cells(path) if c["cell_type"] == "code"
        for o in c["outputs"] if FIGURE in o.get("data", {})]


TOUCHED = {page: path for page, path in notebooks().items() if FIGURE in path.read_text()}
ALL = [(page, i) for page, path in TOUCHED.items() for i in range(len(figures(path)))]


# ---- in the notebooks

def test_there_are_eight_figures_that_make_a_point():
    assert {"windows", "quant", "muon", "gptq", "averaging", "ttt", "budget"} <= set(TOUCHED)
    assert len(ALL) >= 8


@pytest.mark.parametrize("page, i", ALL)
def test_each_figure_has_rows_for_every_value_a_sentence_and_a_still_picture(page, i):
    spec, still = (figures(TOUCHED[page])[i][k] for k in (FIGURE, "image/svg+xml"))
    rows, known = spec["data"]["values"], spec["usermeta"]
    shown = [layer for panel in spec["hconcat"] for layer in panel["layer"] if "transform" in layer]
    assert len(shown) == len(spec["hconcat"])
    column = json.loads(re.search(r'datum\[(".*?")\]', shown[0]["transform"][0]["filter"])[1])
    assert {json.dumps(r[column]) for r in rows} == set(map(json.dumps, known["values"]))
    assert 3 <= len(known["values"]) == len(set(known["said"])) and len(rows) <= 1000
    start = known["said"][spec["params"][0]["value"]]
    assert start in unescape(re.sub(r"<[^>]*>", "", "".join(still)))
    assert len(spec["description"]) > 60 and spec["title"]["text"] not in known["said"]


# ---- on the site

LIVE = "return [...document.querySelectorAll('figure.touch')].every(f => f.querySelector('svg'))"


def opened(browser, site, page, i=0):
    "The figure of a page once it is alive."
    browser.get(f"{site}{page}.html")
    ui.WebDriverWait(browser, HANG).until(lambda b: b.execute_script(LIVE))
    return browser.find_elements("css selector", "figure.touch")[i]


def control(figure):
    return figure.find_element("css selector", ".vega-bind input")


# What the chosen layer draws: marks that aren't pale; and the sentence below the title.
DRAWN = """const marks = [...arguments[0].querySelectorAll(
  'svg .mark-line path, svg .mark-rect path, svg .mark-symbol path')];
return JSON.stringify(marks.map(m => [m.getAttribute('d'), m.getAttribute('transform'),
  m.getAttribute('stroke'), m.getAttribute('fill')]))"""
SAID = "return arguments[0].querySelector('svg .role-title-subtitle').textContent"


def walk(browser, figure, keys):
    "Press keys on the control; what is drawn, said and announced after each."
    seen = []
    for key in keys:
        control(figure).send_keys(key)
        browser.execute_async_script("const done = arguments[0]; setTimeout(() =>"
            " requestAnimationFrame(() => requestAnimationFrame(() => done())))")
        seen.append((browser.execute_script(DRAWN, figure), browser.execute_script(SAID, figure),
            figure.find_element("css selector", ".touch-says").get_attribute("textContent")))
    return seen


def faults_of(seen, said):
    "What is wrong with a walk over all values."
    faults = []
    if len({drawn for drawn, *_ in seen}) < len(seen): faults.append("the drawing stands still")
    if [s for _, s, _ in seen] != said: faults.append("the sentences are others")
    if any(s != heard for _, s, heard in seen): faults.append("the ear is told something else")
    return faults


@pytest.mark.parametrize("page, i", ALL)
def test_moving_the_control_changes_what_is_drawn(site, browser, page, i):
    "By keyboard, to each value."
    figure = opened(browser, site, page, i)
    known = figures(TOUCHED[page])[i][FIGURE]
    start, said = known["params"][0]["value"], known["usermeta"]["said"]
    down = walk(browser, figure, [LEFT]*start)
    up = walk(browser, figure, [RIGHT]*(len(said)-1))
    assert not faults_of(down, said[:start][::-1])
    assert not faults_of(up, said[1:])
    assert not console(browser)


BROKEN = {  # what is changed in a figure, and what must be seen then
    "the drawing stands still": """for (const p of spec.hconcat) for (const l of p.layer)
        if (l.transform) l.transform[0].filter = 'true'""",
    "the sentences are others": "spec.title.subtitle = 'one for all'",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_figure_that_does_not_follow_would_be_seen(site, browser, fault):
    figure = opened(browser, site, "muon")
    browser.execute_async_script("const [figure, done] = arguments; const spec = JSON.parse("
        "figure.querySelector('script').textContent);" + BROKEN[fault] + """
        const says = figure.querySelector('.touch-says'), {values, said} = spec.usermeta;
        vegaEmbed(figure.querySelector('.touch-live'), spec, {mode: 'vega-lite', renderer: 'svg',
          actions: false}).then(({view}) => { view.addSignalListener('chosen', (_, v) => {
          says.textContent = said[values.indexOf(v)]; }); done(); })""", figure)
    known = figures(TOUCHED["muon"])[0][FIGURE]
    start, said = known["params"][0]["value"], known["usermeta"]["said"]
    found = faults_of(walk(browser, figure, [RIGHT]*2), said[start+1:start+3])
    assert fault in found


@pytest.mark.parametrize("page, i", ALL)
def test_control_and_figure_have_names(site, browser, page, i):
    "For those who hear the page: the figure says what it shows, the control what it sets."
    figure = opened(browser, site, page, i)
    spec = figures(TOUCHED[page])[i][FIGURE]
    named = browser.execute_script("return [...arguments[0].labels].map(l => l.textContent).join()",
        control(figure))
    assert spec["params"][0]["bind"]["name"].strip() in named
    drawing = figure.find_element("css selector", ".touch-live[aria-label]")
    assert drawing.get_attribute("aria-label") == spec["description"]
    assert drawing.get_attribute("role") == "graphics-document"
    says = figure.find_element("css selector", ".touch-says")
    assert says.get_attribute("aria-live") == "polite"
    assert figure.find_element("css selector", "figcaption").text.startswith("Figure ")


@pytest.mark.parametrize("page, i", ALL)
def test_by_keyboard_alone_a_control_is_reached_moved_and_heard(site, browser, page, i):
    "Tab comes to it, an arrow moves it, and its value is a sentence, not a position."
    figure = opened(browser, site, page, i)
    known = figures(TOUCHED[page])[i][FIGURE]
    start, said = known["params"][0]["value"], known["usermeta"]["said"]
    browser.execute_script("arguments[0].tabIndex = -1; arguments[0].focus()", figure)
    browser.switch_to.active_element.send_keys(TAB)
    reached = browser.switch_to.active_element
    assert reached == control(figure) and reached.get_attribute("aria-valuetext") == said[start]
    forth = start + 1 < len(said)
    walk(browser, figure, [RIGHT if forth else LEFT])
    assert reached.get_attribute("aria-valuetext") == said[start + 1 if forth else start - 1]


def shades(browser, element):
    "Grey values of a part of the page."
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("L")).astype(int)


@pytest.mark.slow
def test_in_the_dark_a_figure_is_dark_and_can_be_read(site, browser):
    def ground_and_ink(figure):
        grey = shades(browser, figure.find_element("css selector", ".touch-live svg"))
        ground = int(np.median(grey))
        return ground, int(abs(grey-ground).max())
    figure = opened(browser, site, "muon")
    light = ground_and_ink(figure)
    switch = browser.find_element("css selector", ".quarto-color-scheme-toggle")
    browser.execute_script("arguments[0].click()", switch)
    dark = ground_and_ink(figure)
    browser.execute_script("arguments[0].click()", switch)
    assert light[0] > 240 and dark[0] < 60 and min(light[1], dark[1]) > 120


@pytest.mark.slow
def test_without_scripts_the_still_picture_stays(site, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(f"{site}muon.html")
        still = browser.find_element("css selector", ".touch-still")
        assert still.is_displayed() and still.rect["width"] > 300 and still.get_attribute("alt")
        assert shades(browser, still).std() > 5, "nothing is drawn"
        assert not browser.find_elements("css selector", ".touch-live svg")
    finally: browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_without_the_library_the_still_picture_stays(site, browser):
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*vega.js"]})
    try:
        browser.get(f"{site}muon.html")
        assert browser.find_element("css selector", ".touch-still").is_displayed()
        assert not browser.find_elements("css selector", ".touch-live svg")
    finally:
        browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        browser.get_log("browser")


def test_a_figure_fits_a_phone(site, browser):
    with wide(browser, 390):
        figure = opened(browser, site, "windows")
        drawing = figure.find_element("css selector", ".touch-live svg")
        assert drawing.rect["width"] <= 390 and control(figure).is_displayed()


LOADED = """return performance.getEntries().filter(e => e.encodedBodySize)
  .map(e => [e.name.split('/').pop(), e.encodedBodySize])"""


def weight(browser, site, page):
    "Bytes of a page with everything it loads."
    opened(browser, site, page)
    return dict(browser.execute_script(LOADED))


@pytest.mark.parametrize("page", TOUCHED)
def test_a_page_is_not_heavy(site, browser, page):
    browser.execute_cdp_cmd("Network.clearBrowserCache", {})
    parts = weight(browser, site, page)
    assert {"vega.js", f"{page}.html"} <= set(parts) and sum(parts.values()) <= WEIGHT, parts


def test_pages_without_such_figures_load_no_library(site):
    for page in notebooks():
        assert ("vega.js" in (SITE/f"{page}.html").read_text()) == (page in TOUCHED), page


# ---- pictures

DRAWINGS = {"gpt", "attention", "gptq", "windows", "ttt", "artifact", "diagrams", "pictures"}


@pytest.mark.parametrize("page", sorted(DRAWINGS))
def test_pictures_are_drawn_and_have_a_title(site, browser, page):
    browser.get(f"{site}{page}.html")
    titles = browser.execute_script("return [...document.querySelectorAll('main svg[role=img]')]"
        ".map(s => [s.querySelector('title').textContent, s.getBoundingClientRect().width])")
    assert titles and all(title and width > 300 for title, width in titles)


# Words of a drawing against its edge, and against each other.
CROWDED = """const out = [];
for (const svg of document.querySelectorAll('main svg[role=img]')) {
  const room = svg.getBoundingClientRect();
  const words = [...svg.querySelectorAll('text')]
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  for (const [w, b] of words)
    if (b.left < room.left || b.right > room.right || b.bottom > room.bottom) out.push(w);
  words.forEach(([w, a], i) => words.slice(i + 1).forEach(([v, b]) => {
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 2 && y > 5) out.push(w + ' | ' + v); }));
}
return out"""


@pytest.mark.parametrize("page", sorted(DRAWINGS - {"pictures"}))
def test_words_of_a_picture_have_room(site, browser, page):
    browser.get(f"{site}{page}.html")
    assert not browser.execute_script(CROWDED)


def test_crowded_words_would_be_seen(site, browser):
    browser.get(f"{site}diagrams.html")
    browser.execute_script("document.querySelector('main svg[role=img] text').textContent ="
        " 'far more words than there is room for '.repeat(9)")
    assert browser.execute_script(CROWDED)
