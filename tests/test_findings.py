"""Rows of findings against what they are about: the sheets and descriptions of the systems, the
recipes, the results, and the pages that they point to."""
import ast
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT
from pgolf.systems.effects import PROBES, changes
from pgolf.systems.evidence import (QUESTIONS, book, counted, findings_table, great_text, has,
    headline_table, measured, read_rows, slug, techniques_table, value_of, worth)
from pgolf.systems.pictures import finding_of, pictures, to_draw
from pgolf.systems.recipes import get_recipe

NBS = ROOT / "nbs"
FOLDER, RESULTS = NBS / "findings", NBS / "results"
SYSTEMS = [r["file"] for r in read_rows("system", FOLDER)]


def rows(kind, system=None):
    return [r for r in read_rows(kind, FOLDER) if system in (None, r["file"])]


@pytest.fixture(autouse=True)
def in_the_book(monkeypatch):
    "Pages are made in the folder of notebooks."
    monkeypatch.chdir(NBS)


# ---- complete

def points(sheet, section="12."):
    "Numbers of the points of a section, written as a list or as a table."
    part = re.split(r"^## ", sheet, flags=re.M)
    text = next(p for p in part if p.startswith(f"{section} "))
    return {int(n) for n in re.findall(r"^(?:\| )?(\d+)(?:\.| \|) ", text, re.M)[1:]}


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_point_of_the_sheet_has_a_row(shared, system):
    found = points((shared / "spec" / f"{system}.md").read_text())
    assert len(found) > 10 and {r["n"] for r in rows("claim", system)} == found


def test_points_are_read_in_both_forms():
    sheet = ("## 11. Other\n1. no\n## 12. Claims\n1. **yes**\n2. yes\n### more\n- no\n"
        "## 13. End\n9. no")
    assert points(sheet) == {1, 2}
    assert points("## 12. Claims\n| # | x |\n|---|---|\n| 1 | a |\n| 2 | b |") == {1, 2}


GREAT = {"pr1394": "10.", "pr1855": "14."}  # where their sheets list what parts from the code


@pytest.mark.parametrize("system", GREAT)
def test_every_point_of_a_great_system_has_a_row(shared, system):
    text = (shared / "spec" / f"{system}.md").read_text()
    found = points("## 0. Title\n" + text, GREAT[system]) | {1}
    assert len(found) > 5 and {r["n"] for r in rows("claim", system)} == found


def test_every_entry_of_the_road_whose_claims_part_from_its_code_has_a_row(shared):
    text = (shared / "spec" / "frontier.md").read_text()
    part = next(p for p in re.split(r"^## ", text, flags=re.M) if p.startswith("6. "))
    heads = re.findall(r"^\* \*\*(.*?)\*\*", part, re.M)
    found = [{int(n) for n in re.findall(r"#(\d+)", h)} for h in heads]
    ours = {r["pr"] for r in rows("claim", "frontier")} | {1855, 1626, 1736}
    assert len(found) > 20 and all(not prs or prs & ours for prs in found), found
    assert len(rows("claim", "frontier")) >= len(found) - 2


def test_numbers_are_kept_and_each_is_asked_for():
    kept = json.loads((RESULTS / "frontier-claims.json").read_text())
    asked = {r["number"] for r in rows("claim") if "number" in r}
    assert asked == set(kept) and len(asked) > 10
    for key in asked: assert re.match(r"-?[\d,.]+ \S", counted(key, RESULTS))


def test_a_number_that_nobody_counted_is_not_measured(tmp_path):
    assert counted("caps-moved", tmp_path) == counted("no such", RESULTS) == "not measured"
    (tmp_path / "frontier-claims.json").write_text(json.dumps(
        {"caps-moved": dict(value=1234.5, unit="steps", digits=1)}))
    assert counted("caps-moved", tmp_path) == "1,234.5 steps"


def test_a_claim_names_the_entry_that_makes_it():
    table = findings_table(RESULTS)
    assert "[#1769]" in table and "[#1412]" in table and "#ontier" not in table
    assert {r["file"] for r in read_rows("great", FOLDER)} == {"pr1394", "pr1855", "pr2135"}
    for r in read_rows("great", FOLDER): assert f"#{r['file'][2:]}" in great_text(r)


# What a page has around a description.
FRAME = set("""Skip to content|Open|Conversation|@anantdgoel|anantdgoel|Copy link|Markdown|Labels|
None yet|Projects|Development|Milestone|Training Techniques|Contributor|1 participant|
parameters: null""".replace("\n", "").split("|"))
CHROME = re.compile(
    r"anantdgoel |wants to merge|Copy Markdown|Sign up for free|Co-Authored-By|Successfully|"
    r"None yet|participant|:submission-|val_bpb: 1\.1418 \| 15\.7|^\W*$")
LABELS = ("val_bpb", "Architecture", "Optimizer", "Artifact Size")


def lines_of(text):
    "Lines of a description; a label at its head stands with its value."
    lines = [re.sub(r"^(?:parameters|other_params): (?=\{)", "", s.strip(" •\t\ufeff"))
             for s in text.splitlines()]
    lines = [s for s in lines if s and s not in FRAME and not CHROME.search(s)]
    out = []
    while lines:
        line = lines.pop(0)
        first = not any(s.startswith(line + " ") for s in out)
        out.append(f"{line} {lines.pop(0)}" if line in LABELS and first and lines else line)
    return out


def unanswered(text, system):
    "What is left of a description without the words of its rows."
    known = ["Architecture"] + [w for r in rows("line", system)
        for w in (*r["name"], r.get("says", ""), *r.get("fields", [])) if w]
    left = []
    for line in lines_of(text):
        for words in sorted(known, key=len, reverse=True): line = line.replace(words, "")
        if re.search(r"\w", line): left.append(line)
    return left


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_line_of_the_description_has_a_row(shared, system):
    text = (shared / "spec" / "descriptions" / f"{system}.txt").read_text()
    assert len(lines_of(text)) > 10 and not unanswered(text, system)


@pytest.mark.parametrize("system", SYSTEMS)
def test_rows_quote_what_stands_there(shared, system):
    text = (shared / "spec" / "descriptions" / f"{system}.txt").read_text()
    flat = " ".join(text.split())
    for r in rows("line", system):
        for words in (*r["name"], r.get("says", ""), *r.get("fields", [])):
            assert " ".join(words.split()) in flat, words


def test_an_unanswered_line_is_seen():
    text = "XSA4\nLast 4 layers attend across batch sequences (Cross-Sequence Attention)\nand more"
    assert unanswered(text, "pr610") == ["and more"]


# ---- true to the recipes, the results and the book

@pytest.mark.parametrize("system", SYSTEMS)
def test_settings_exist_and_what_differs_did_not_run_as_said(system):
    a, b = get_recipe(system), get_recipe(f"{system}-as-run")
    for r in rows("line", system):
        assert r["ran"] in ("as said", "otherwise", "did not run", "nowhere"), r["name"]
        differ = [k for k in r.get("setting", []) if value_of(a, b, k) != b.settings()[k]]
        assert not differ or r["ran"] != "as said", (r["name"], differ)


def test_verdicts_and_kinds_are_those_of_the_menus():
    for r in rows("claim"):
        assert r["verdict"] in ("holds", "does not hold", "not measurable here"), r
        assert r["kind"] in ("model", "training", "squeezing", "scoring", "adaptation", "size",
                             "record", "words"), r
    assert len({(r["file"], r["n"]) for r in rows("claim")}) == len(rows("claim"))


def keys():
    "Every measurement that a row asks for."
    for kind in ("claim", "line", "technique"):
        yield from (tuple(r["worth"]) for r in rows(kind) if "worth" in r)
    yield from (tuple(w[1:]) for s in rows("story") for w in s["worth"])


def test_what_rows_ask_for_is_measured_or_a_probe():
    known = {(m.system, m.change) for m in measured(RESULTS)}
    for system in SYSTEMS:
        settings = changes(get_recipe(system), get_recipe(f"{system}-as-run"))
        known |= {(system, c) for c in settings}
    known |= {(system, c) for system, probes in PROBES.items() for c in probes}
    for key in set(keys()):
        if key[0] in {*QUESTIONS, "step", "kept"}: assert worth(key, RESULTS)
        else: assert key in known, key


def test_every_single_difference_has_words():
    phrases = {r["file"]: r for r in rows("phrases")}
    assert not [(m.system, m.change) for m in to_draw(measured(RESULTS))
                if m.change not in phrases[m.system]]


def anchors(path):
    "Names of definitions and headings on a page."
    found = set()
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heads = re.findall(r"^##+ (.*)$", text, re.M)
            found |= {re.sub(r"[^\w\s-]", "", h.lower()).strip().replace(" ", "-") for h in heads}
        elif re.match(r"#\|\s*exports?\b", text):
            for n in ast.parse(text).body:
                found |= {n.name} if isinstance(n, (ast.FunctionDef, ast.ClassDef)) else set()
                if isinstance(n, ast.Assign):
                    found |= {t.id for t in n.targets if isinstance(t, ast.Name)}
    return found


@pytest.mark.parametrize("kind", ["claim", "line", "technique", "term", "story"])
def test_links_lead_to_places_that_are_there(kind):
    pages, techniques = book(NBS), {t["id"] for t in rows("technique")}
    for r in rows(kind):
        if kind == "line" and "see" not in r: assert r["technique"] in techniques, r
        if "see" not in r: continue
        page, _, anchor = r["see"].partition("#")
        assert page in pages and (not anchor or anchor in anchors(NBS / pages[page])), r["see"]
        if "test" in r: assert (ROOT / r["test"]).exists(), r["test"]


def test_no_technique_is_without_a_system_unless_nobody_stored_it():
    known = [*SYSTEMS, *GREAT, "pr2135"]
    without = {t["id"] for t in rows("technique") if not any(has(t, s) for s in known)}
    assert without == {"hma", "caseops", "awq", "strides", "mixed", "joint", "split-lanes", "taper",
        "banks", "lengths", "hessian-clip", "counts"}


# ---- numbers are looked up

def test_a_number_on_a_page_is_the_one_in_the_results(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    shutil.copytree(FOLDER, tmp_path / "findings")
    path = tmp_path / "results" / "effects-pr601-pocket.json"
    found = json.loads(path.read_text())
    row = next(r for r in found if r["change"] == "adaptation")
    row["stages"]["adapted"] = [x + .5 for x in row["stages"]["adapted"]]
    path.write_text(json.dumps(found))
    for table in (findings_table, headline_table):
        before, after = table(RESULTS).splitlines(), table(tmp_path / "results").splitlines()
        moved = [(x, y) for x, y in zip(before, after) if x != y]
        if table is findings_table: assert moved and all("+0.5180" in y for _, y in moved)
    assert "+0.5180" not in techniques_table(tmp_path / "results")
    assert pictures(RESULTS)["differences.svg"] != pictures(tmp_path / "results")["differences.svg"]


def test_pictures_of_the_first_page_are_fresh():
    for name, picture in pictures(RESULTS).items():
        assert (NBS / name).read_text() == picture, "run: make readme"


def test_title_of_the_picture_counts():
    found = to_draw(measured(RESULTS))
    clear = [m for m in found if m.effect.clear]
    assert finding_of(found).startswith(f"{len(found) - len(clear)} of {len(found)} ")


# ---- terms

@pytest.fixture
def link_terms(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import docs
    yield docs.reader.link_terms
    sys.modules.pop("docs", None)


def test_a_term_is_linked_where_it_is_first_used(link_terms):
    seen = set()
    assert link_terms("The loss under QAT and QAT.", seen) == (
        "The loss under [QAT](glossary.html#term-qat) and QAT.")
    assert link_terms("QAT again", seen) == "QAT again"


def test_terms_in_code_headings_formulas_and_links_stay(link_terms):
    for text in ("`GPTQ`", "# GPTQ", "$GPTQ$", "[GPTQ](gptq.html)", "```\nGPTQ\n```", "GPTQ_x",
                 '<a id="GPTQ">', "https://example.org/GPTQ"):
        assert link_terms(text, set()) == text


def test_every_term_is_found_as_pages_write_it(link_terms):
    for t in rows("term"):
        if "match" in t or not t["term"].isalpha(): continue
        assert f"#{slug(t['term'])})" in link_terms(f"See {t['term']} here.", set()), t["term"]


def test_a_term_s_place_is_the_one_that_the_glossary_gives_it(link_terms):
    assert f"#{slug('value residual')})" in link_terms("A value residual.", set())
