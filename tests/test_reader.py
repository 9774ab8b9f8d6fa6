"""What the site adds around a chapter, as text: links to sheets, papers and pull requests,
captions, the index of search."""

import io
import json
import re
import sys

import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / ".ci"))
import docs
import reader

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts)
SHEETS = sorted(reader.SOURCES.glob("sheet_*.md"))
PAPERS = reader.papers()


def prose(path):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"][1:]
        if c["cell_type"] == "markdown"]
def addresses(text): return re.findall(r"\]\(([^)\n]*)\)", text)
def sheets_in(text, page="page", heard=()):
    return addresses(reader.link_sheets(text, page, list(heard)))


# ---- sheets

@pytest.mark.parametrize("said, meant", [
    ("section 9 of PR #576's sheet", ["sheet_pr576.html#section-9"]),
    ("PR #610 (section 8 of its\nsheet)", ["sheet_pr610.html#section-8"]),
    ("| #601 | as in its sheet |", ["sheet_pr601.html"]),
    ("Section 10 of the challenge sheet", ["sheet_challenge.html#section-10"]),
    ("the frontier sheet, section 4.18", ["sheet_frontier.html#section-4-18"]),
    ("challenge sheet 10.7", ["sheet_challenge.html#section-10-7"]),
    ("sections 7 and 8 of the sheets of PRs #610 and #598",
        ["sheet_pr610.html#section-7", "sheet_pr598.html#section-7"]),
    ("The sheets report it", ["sheets.html"]),
    ("a spreadsheet, and `the sheet` in code", []),
    ("## The sheet in a heading", []),
])
def test_a_mention_of_a_sheet_leads_to_its_section(said, meant):
    assert sheets_in(said) == meant


def test_its_sheet_is_that_of_the_system_named_last():
    heard = []
    reader.link_sheets("PR #610 and then PR #576.", "page", heard)
    assert sheets_in("section 10.2 of its sheet", heard=heard) == ["sheet_pr576.html#section-10-2"]
    assert sheets_in("its sheet", page="pr598") == ["sheet_pr598.html"]
    assert sheets_in("its sheet") == ["sheets.html"]


@pytest.mark.parametrize("said", ["section 99 of PR #576's sheet", "PR #77's sheet"])
def test_a_section_that_is_not_there_is_an_error(said):
    with pytest.raises(ValueError, match="does not exist in nbs/sources"): sheets_in(said)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_mention_of_a_sheet_resolves(path):
    heard = []
    for text in prose(path):
        linked = reader.link_sheets(text, docs.page_name(path), heard)
        rest = re.sub(rf"{reader.KEPT}|sheets? of (?:the )?\[?PRs?", "", linked, flags=re.M | re.S)
        assert not re.search(r"\bsheets?\b", rest), f"not linked: {rest}"


def test_sheets_say_nothing_about_where_they_were_written():
    for path in [*SHEETS, reader.SOURCES/"sheets.md"]:
        assert not re.search(r"(?i)golden|\.npz|shared/|spec/", path.read_text()), path.name


@pytest.mark.parametrize("path", SHEETS, ids=lambda p: p.stem)
def test_sections_of_a_sheet_are_numbered_once_and_its_links_stay_within(path):
    known = reader.sections(path.stem)
    assert len(known) == len(set(known)) and len(known) >= 5
    text, _ = reader.sheet_page(path, PAPERS)
    anchors = set(re.findall(r"\{#([\w-]+)\}", text))
    own = {a[1:] for a in addresses(text) if a.startswith("#")}
    assert own <= anchors and anchors == {f"section-{n.replace('.', '-')}" for n in known}


def test_signs_of_formulas_stay_signs():
    assert reader.literal("x^2 ~ y, W <name> a*b") == r"x\^2 \~ y, W \<name> a\*b"
    assert reader.literal("`x^2` and 3 < 4, **bold**") == "`x^2` and 3 < 4, **bold**"


# ---- pull requests and papers

def test_pull_requests_and_issues_are_told_apart():
    text = reader.link_pulls("PRs #610 and #576; issues #402, #677 and #1017, then PR #598.", set())
    assert [a.removeprefix(reader.PULLS) for a in addresses(text)] == [
        "/pull/610", "/pull/576", "/issues/402", "/issues/677", "/issues/1017", "/pull/598"]


def test_links_are_made_below_a_heading_and_once():
    seen = set()
    text = reader.link_pulls("## PR #610\n\nPR #610, `PR #576`, PR #610\n", seen)
    assert text == f"## PR #610\n\n[PR #610]({reader.PULLS}/pull/610), `PR #576`, PR #610\n"
    assert reader.link_pulls("PR #610", seen) == "PR #610"


def test_a_paper_is_linked_once_a_page_and_not_inside_a_word():
    seen = set()
    text = reader.link_papers("GPTQ-lite, GPTQ (Frantar et al., 2022), AdamW and $GPTQ$", seen,
        PAPERS)
    assert addresses(text) == ["bibliography.html#frantar2023gptq",
        "bibliography.html#loshchilov2019adamw"]
    assert text.startswith("GPTQ-lite, [GPTQ]") and text.endswith("$GPTQ$")
    assert reader.link_papers("GPTQ again", seen, PAPERS) == "GPTQ again"


def test_a_list_of_papers_is_all_links():
    seen = {"jordan2024muon"}
    text = reader.link_papers("Muon.\n\n- Papers: Muon (Jordan et al., 2024), AdamW.\n- AdamW",
        seen, PAPERS)
    assert addresses(text) == ["bibliography.html#jordan2024muon",
        "bibliography.html#loshchilov2019adamw"] and text.startswith("Muon.")


def test_references_are_whole():
    keys = [p["key"] for p in PAPERS]
    assert len(keys) == len(set(keys)) == reader.BIBLIOGRAPHY.read_text().count("\n@")
    for paper in PAPERS:
        assert paper.keys() >= {"author", "title", "year", "names"}, paper["key"]
        assert reader.address(paper).startswith("https://")
        assert paper["year"] in paper["key"], f"{paper['key']} carries another year"


def test_every_paper_is_named_on_some_page():
    named = set()
    for path in NOTEBOOKS:
        for text in prose(path): reader.link_papers(text, named, PAPERS)
    for path in SHEETS: named |= reader.sheet_page(path, PAPERS)[1]
    assert {p["key"] for p in PAPERS} <= named


@pytest.mark.parametrize("authors, read", [
    ("Duda, Jarek", "Duda"), ("Press, Ofir and Wolf, Lior", "Press and Wolf"),
    ("A, a and B, b and C, c", "A, B and C"), ("{Gemma Team}", "Gemma Team"),
    (" and ".join(f"{c}, x" for c in "ABCDE"), "A et al.")])
def test_names_of_authors(authors, read): assert reader.people(authors) == read


# ---- figures and titles

def figure(code, count=1):
    return dict(cell_type="code", source=[code], outputs=[dict(data={"image/png": ""})]*count)


def test_figures_are_numbered_through_a_page():
    cells = [figure('#| fig-alt: "one: a line"\nplot()'), dict(cell_type="markdown", source=["x"]),
        figure('#| echo: false\n#| fig-cap: "said"\nplot()', 2), figure("plot()")]
    reader.number_figures(cells)
    captions = [reader.options("".join(c["source"])).get("fig-cap") for c in cells]
    assert captions == ["Figure 1. One: a line.", None, ["Figure 2. Said.", "Figure 3. Said."],
        "Figure 4."]
    assert "".join(cells[0]["source"]).endswith('#| fig-alt: "one: a line"\nplot()')


@pytest.mark.parametrize("dots, drawn", [(100, 500), (200, 500), (72, 360)])
def test_a_picture_of_double_density_is_shown_at_its_size(dots, drawn):
    from matplotlib.figure import Figure
    out = io.BytesIO()
    Figure(figsize=(5, 2), dpi=dots).savefig(out, dpi=dots)
    assert abs(reader.drawn_width(out.getvalue()) - drawn) <= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_title_says_more_than_the_name_of_a_module(path):
    first = "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines()[0]
    assert path.stem == "index" or not re.fullmatch(r"# [a-z0-9_]+", first), "say something"


# ---- the line under a title, the head, search

def test_the_line_under_a_title():
    path = NOTEBOOKS[0].relative_to(ROOT)
    line = reader.tools(path, "game.bpb", {str(path): "2026-01-02"})
    for part in ("<code>pgolf.game.bpb</code>", f"/blob/main/{path}", f'"notebooks/{path.name}"',
        "https://colab.research.google.com/github/", f"jupyter lab {path}", ", 2026-01-02"):
        assert part in line
    assert "Colab" not in reader.tools((SHEETS[0]).relative_to(ROOT))


def test_the_address_of_the_repository_is_written_once():
    known = reader.settings()
    for name in ("_quarto.yml", ".ci/docs.py", ".ci/reader.py", ".ci/site/404.qmd"):
        text = (ROOT/name).read_text()
        assert known["git_url"] not in text and known["site_url"] not in text, name
    assert reader.fill("@git_url@ @nothing@") == f"{known['git_url']} @nothing@"


def test_a_page_names_its_address():
    page = reader.head("<head></head>", "muon.html")
    assert f'<link rel="canonical" href="{reader.settings()["site_url"]}/muon.html">' in page
    assert reader.head(page, "muon.html") == page
    base = reader.settings()["doc_baseurl"]
    assert reader.head("<head></head>", "404.html") == f'<head><base href="{base}/"></head>'


def test_search_index_keeps_prose_and_code_apart(tmp_path):
    (tmp_path/"a.html").write_text(
        "<html><body><nav>menu</nav><main><h1>Title <code>x</code></h1><p>first<br>line</p>"
        '<div class="page-tools"><p>View source</p></div>'
        '<h2 id="s" data-anchor-id="s">Part</h2><p>words</p><pre><code>code()</code></pre>'
        "<script>no()</script></main><footer>foot</footer></body></html>")
    reader.search_index(tmp_path)
    first, second = json.loads((tmp_path/"search.json").read_text())
    assert (first["title"], first["text"], first["code"]) == ("Title x", "first line", "")
    assert (second["href"], second["section"]) == ("a.html#s", "Part")
    assert (second["text"], second["code"]) == ("words", "code()")


# ---- the files around the book

def test_citation_and_changes_speak_of_this_version():
    assert (ROOT/"CITATION.cff").read_text() == docs.citation_text(), "run: make readme"
    cited = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["version"] == reader.settings()["version"]
    assert re.search(rf"^## {re.escape(cited['version'])}\b",
        (ROOT/"CHANGELOG.md").read_text(), re.M)


def test_workflows_run_what_a_change_must_pass_and_publish_the_site():
    flows = {p.stem: yaml.safe_load(p.read_text())
        for p in (ROOT/".github"/"workflows").glob("*.yml")}
    steps = {name: [s for job in flow["jobs"].values() for s in job["steps"]]
        for name, flow in flows.items()}
    assert any(s.get("run") == ".ci/run" for s in steps["test"])
    assert any(s.get("run", "").endswith(" docs") for s in steps["pages"])
    assert any(s.get("with", {}).get("path") == docs.SITE.name for s in steps["pages"])
    assert flows["pages"]["permissions"] == {"contents": "read", "pages": "write",
        "id-token": "write"}
