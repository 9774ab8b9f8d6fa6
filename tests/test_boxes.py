"The box that opens each chapter: there, true to the results, and the minutes that it names."
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / ".ci"))
import boxes
import docs
from pgolf.systems.effects import PROBES
from pgolf.systems.evidence import QUESTIONS, measured, read_rows, worth

NBS = ROOT / "nbs"
ROWS = {r["page"]: r for r in read_rows("chapter", NBS / "findings")}
PAGES = boxes.chapters()
ORDER = list(PAGES)


@pytest.fixture(scope="module")
def known(): return measured(NBS / "results")


@pytest.fixture(autouse=True)
def in_the_book(monkeypatch): monkeypatch.chdir(NBS)


def cells(path): return json.loads(path.read_text())["cells"]


def written(path):
    "The box that a chapter has, below its title."
    return "".join(next(c["source"] for c in cells(path)[:3] if c.get("id") == boxes.BOX))


def without_minutes(text): return re.sub(r"\d+ minutes to read.*", "", text)


# ---- each chapter has one, and it is fresh

def test_every_chapter_has_one_row():
    assert set(PAGES) <= set(ROWS), "a new chapter needs a row in chapters.toml, then: make boxes"
    assert len(read_rows("chapter", NBS / "findings")) == len(ROWS)


@pytest.mark.parametrize("page", ORDER)
def test_a_box_says_what_the_rows_and_results_say(page, known):
    path = PAGES[page]
    fresh = boxes.box(ROWS[page], path, NBS / "results", known)
    assert without_minutes(written(path)) == without_minutes(fresh), "run: make boxes"


@pytest.mark.parametrize("page", ORDER)
def test_minutes_are_those_of_the_chapter(page):
    "Five minutes off are allowed, so that a sentence more does not ask for a new box."
    named, running = re.search(r"(\d+) minutes to read, (.*)\.", written(PAGES[page])).groups()
    assert abs(int(named) - boxes.reading(cells(PAGES[page]))) <= 5, "run: make boxes"
    seconds = json.loads(boxes.SECONDS.read_text()).get(page)
    assert running == boxes.running(seconds), "run: make boxes"


@pytest.mark.parametrize("page", ORDER)
def test_a_row_asks_and_answers(page):
    row = ROWS[page]
    assert row["question"].endswith("?") and row["answer"].endswith(".")
    assert len(re.findall(r"[.!?](?:\s|$)", row["answer"])) == 1, "one sentence"
    assert len(row["question"]) <= 160 and len(row["answer"]) <= 260


@pytest.mark.parametrize("page", ORDER)
def test_what_to_read_before_stands_before(page):
    for name in ROWS[page]["before"]: assert ORDER.index(name) < ORDER.index(page)


def test_every_key_is_measured_or_a_probe(known):
    there = {(m.system, m.change) for m in known}
    for row in ROWS.values():
        for label, key, _ in boxes.asked(row):
            if key[0] in {*QUESTIONS, "step", "kept"}: assert worth(key, NBS / "results"), label
            else: assert tuple(key) in there or key[1] in PROBES.get(key[0], {}), (label, key)


@pytest.mark.parametrize("page", ORDER)
def test_a_chapter_asks_its_question_once(page):
    found = cells(PAGES[page])
    assert found == boxes.without_opening(found), "run: make boxes"


def test_an_older_opening_is_taken_out():
    old = [prose("# Title", "a"), prose("**Question** Why? **Answer** So.\n\n## Problem\n\nx", "b"),
        prose("**Question** Why?\n**Answer** So.", "c"), dict(cell_type="code", source=["1"])]
    new = boxes.without_opening(old)
    assert ["".join(c["source"]) for c in new] == ["# Title", "## Problem\n\nx", "1"]


# ---- numbers follow the results and the chapter's own outputs

def test_another_result_is_another_box(tmp_path):
    results = shutil.copytree(NBS / "results", tmp_path / "results")
    shutil.copytree(NBS / "findings", tmp_path / "findings")
    path = results / "effects-pr610-pocket.json"
    found = json.loads(path.read_text())
    found[0]["stages"]["averaged"] = [x + .5 for x in found[0]["stages"]["averaged"]]
    path.write_text(json.dumps(found))
    said = boxes.scores(ROWS["averaging"], results, measured(results))
    assert said != boxes.scores(ROWS["averaging"], NBS / "results", None)
    assert "+0.4964" in said[0]


def test_a_pattern_that_finds_nothing_names_the_chapter():
    row = dict(page="some", find=r"(\d+) bytes", shown="{0} bytes")
    shown = [dict(outputs=[dict(data={"text/plain": ["12 bytes"]})])]
    assert boxes.found_in(row, shown) == "12 bytes"
    with pytest.raises(ValueError, match="chapters.toml, some: no output"):
        boxes.found_in(row, [dict(outputs=[])])
    assert boxes.found_in(dict(row, find=r"(\S+)$"), [dict(outputs=[dict(text="2.0e-04")])]) \
        == "0.0002 bytes"


def test_a_row_without_worth_is_refused():
    with pytest.raises(ValueError, match="say what it is worth"):
        boxes.worth_of(dict(page="some"), [])


# ---- minutes

def test_seconds_are_read_from_what_pytest_prints():
    text = ("39.1s setup    tests/test_site.py::test_x\n"
        "63.4s call     tests/test_chapters.py::test_chapter[31_gptq]\n"
        "0.6s call     tests/test_chapters.py::test_chapter[44a_tilt]\n")
    assert boxes.durations(text) == dict(gptq=63, tilt=1)
    again = text + "nbs/squeeze/31_gptq.ipynb: 50 s\nnbs/01_show.ipynb: 2 s\n"
    assert boxes.durations(again) == dict(gptq=50, tilt=1, show=2)


@pytest.mark.parametrize("seconds, said", [(None, "to run: not timed yet"),
    (20, "less than a minute to run"), (21, "1 minute to run"), (41, "2 minutes to run")])
def test_minutes_are_rounded_up(seconds, said): assert boxes.running(seconds) == said


def test_the_box_itself_and_hidden_cells_take_no_time_to_read():
    words = dict(cell_type="markdown", id="a", source=["word "*999])
    hidden = dict(cell_type="code", id="b", source=["#| hide\n" + "x\n"*999])
    assert boxes.reading([words]) == boxes.reading([words, hidden]) == 5
    assert boxes.reading([words, dict(words, id=boxes.BOX)]) == 5
    assert boxes.reading([words, words]) == 10


# ---- on the site

def prose(text, name): return dict(cell_type="markdown", id=name, source=[text])


def test_a_box_of_the_site_is_the_quotation_of_the_notebook():
    assert docs.boxed("> **A.** b\n>\n> c") == "::: {.chapter-box}\n**A.** b\n\nc\n:::"


def test_answers_are_folded_up_to_the_next_heading():
    given = [prose("## Exercises\n\n1. Why?", "a"), prose("### Answers\n\n1. So.", "b"),
        dict(cell_type="code", id="c", source=["1+1"]), prose("#### More\n\nx", "d"),
        prose("## Next", "e")]
    got = ["".join(c["source"]) for c in docs.folded(given)]
    assert len(got) == 7 and got[0] == "## Exercises\n\n1. Why?" and got[-1] == "## Next"
    assert '<details class="folded" id="answers"><summary>Answers</summary>' in got[1]
    assert got[2:5] == ["1. So.", "1+1", "[**More**]{#more}\n\nx"]
    assert "</details>" in got[5]
    assert "</details>" in "".join(docs.folded(given[:3])[-1]["source"])
    plain = [given[0], given[2]]
    assert docs.folded(plain) == plain
