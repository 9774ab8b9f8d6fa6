"""Build what readers see from the notebooks, the site in _docs/ and README.md, without a download.

  python .ci/docs.py site     _docs/, with Quarto if it is installed, else with smalldocs;
                              reused when no input has changed
  python .ci/docs.py readme   README.md from nbs/index.ipynb

The way: nbdev takes directives and hidden cells out (_proc/); `stage` gives pages their names,
marks exported cells and links names to them (build/site/); the renderer makes HTML; `finish` turns
the maths into MathML and refuses anything that would need a network.
"""
import ast, hashlib, html, json, re, shutil, subprocess, sys, unicodedata
import xml.etree.ElementTree as ET
from pathlib import Path

# what a reader expects around a chapter: sheets, papers, captions, the line under the title
sys.path.insert(0, str(Path(__file__).resolve().parent))
import figures
import reader

ROOT = Path(__file__).resolve().parent.parent
PROC, STAGE, SITE = ROOT/'_proc', ROOT/'build'/'site', ROOT/'_docs'
PARTS = ROOT/'.ci'/'site'   # styles, scripts and pages that belong to the site alone
STAMP = SITE/'.inputs'


def source(cell): return ''.join(cell['source'])
# how the notebook format stores text; Quarto joins one long string without its line ends
def lines(text): return text.splitlines(True)
def load(path): return json.loads(path.read_text(encoding='utf-8'))
# 00_bpb.ipynb -> bpb, as nbdev names pages
def page_name(nb): return re.sub(r'^\d+[a-z]?_', '', Path(nb).stem)
def chapters():
    return list(
        dict.fromkeys(re.findall(r'nbs/([\w/]+\.ipynb)',
            (ROOT/'_quarto.yml').read_text(encoding='utf-8'))))


def digest():
    "Name the state of every input of the site."
    sums = hashlib.sha256()
    for p in sorted([*(ROOT/'.ci').glob('*.py'), ROOT/'_quarto.yml', ROOT/'settings.ini',
        *PARTS.iterdir(), *filter(Path.is_file, (ROOT/'nbs').rglob('*'))]):
        sums.update(p.name.encode() + b'\0' + p.read_bytes())
    return sums.hexdigest()


# ---- names: where each exported definition stands

def exported(cell):
    return cell['cell_type'] == 'code' and bool(re.match(r'#\|\s*exports?\b', source(cell)))


def definitions(code):
    "List the public names that a cell defines, and whether it only imports."
    try: body = ast.parse(code).body
    except SyntaxError: return [], False
    names = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    names += [t.id for n in body if isinstance(n, ast.Assign) for t in n.targets
        if isinstance(t, ast.Name)]
    only_imports = bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)
    return [n for n in names if not n.startswith('_')], only_imports


def name_index(notebooks):
    "Map each exported name to the pages that define it."
    index = {}
    for nb in notebooks:
        for cell in filter(exported, load(ROOT/'nbs'/nb)['cells']):
            for name in definitions(source(cell))[0]:
                index.setdefault(name, []).append(page_name(nb))
    return index


# ---- stage: the notebooks as the renderer gets them

def link_names(text, page, index):
    """Link `name` in prose to the cell that defines it; code fences, headings and existing links
    stay as they are."""
    def link(m):
        pages = index.get(m[1].split('.')[0], [])
        target = page if page in pages else pages[0] if len(pages) == 1 else None
        return f"[`{m[1]}`]({target}.html#{m[1].split('.')[0]})" if target else m[0]
    def line(s):
        return s if s.startswith('#') else re.sub(
            r'(?<![\[`\w])`([A-Za-z]\w*(?:\.\w+)?)`(?![\]`])', link, s)
    parts = re.split(r'(^```.*?^```[ \t]*$|\[[^\]\n]*\]\([^)\n]*\))', text, flags=re.M | re.S)
    return ''.join(p if i % 2 else '\n'.join(map(line, p.split('\n'))) for i, p in enumerate(parts))


def relink(text):
    "Turn links to notebooks and sheets into links between pages."
    return re.sub(r'\]\(([\w./]+\.ipynb|[./]*sources/\w+\.md)(#[^)]*)?\)',
        lambda m: f"]({page_name(m[1])}.html{m[2] or ''})", text)


# the format demands an id
def markdown(text, name): return dict(cell_type='markdown', id=name, metadata={}, source=text)


def module_of(cells):
    "Name the module that a notebook exports; empty: none."
    return next((m[1] for c in cells if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', source(c),
        re.M))), '')


def stage_prose(text, page, index, heard, seen):
    "Link what a cell of prose names: pages, sheets, pull requests, papers, terms, definitions."
    pulls, papers, entries, terms = seen
    text = reader.link_sheets(relink(text), page, heard)
    text = reader.link_pulls(text, pulls)
    if page != 'glossary': text = reader.link_terms(text, terms)  # meaning first
    text = reader.link_papers(text, papers, entries)
    return link_names(text, page, index)


def stage_notebook(nb, index, entries, dates):
    """Write one processed notebook under its page name, exported cells framed and anchored; gives
    the papers that it names."""
    page, done, heard, seen = page_name(nb), load(PROC/nb), [], (set(), set(), entries, set())
    original = load(ROOT/'nbs'/nb)['cells']
    mine = {c.get('id') for c in original if exported(c)}
    reader.number_figures(done['cells'])
    line = reader.tools(Path('nbs')/nb, module_of(original), dates)
    cells, touched = [], False
    for i, cell in enumerate(done['cells']):
        if not source(cell).strip(): continue                     # a cell of directives alone
        # the file has that name
        if cell['cell_type'] == 'raw':
            cell['source'] = re.sub(r'^output-file: .*\n', '', source(cell), flags=re.M)
        if cell['cell_type'] == 'markdown':
            cell['source'] = stage_prose(source(cell), page, index, heard, seen)
        for data in (o['data'] for o in cell.get('outputs', [])
            if 'text/markdown' in o.get('data', {})):
            shown = relink(''.join(data['text/markdown']))
            data['text/markdown'] = reader.link_pulls(shown, seen[0])
        live = figures.taken_out(cell, first=not touched)
        touched = touched or bool(live)
        if cell['cell_type'] != 'code' or cell.get('id') not in mine: cells += [cell, *live]
        else: cells += framed(cell)
        if cell.get('id') == 'chapter-box': cell['source'] = boxed(source(cell))
        if i == 0: cells.append(markdown(line, 'page-tools'))
    cells = folded(cells)
    for cell in cells: cell['source'] = lines(source(cell))
    done['cells'] = cells
    (STAGE/f'{page}.ipynb').write_text(json.dumps(done), encoding='utf-8')
    return seen[1]


def framed(cell):
    "Frame an exported cell, with an anchor for each of its names."
    names, only_imports = definitions(source(cell))
    if only_imports:
        cell['source'] = '#| code-fold: true\n#| code-summary: "Imports"\n' + source(cell)
    anchors = ''.join(f'<a id="{n}" class="definition"></a>' for n in names)
    anchors = f'```{{=html}}\n{anchors}\n```\n\n' if anchors else ''
    return [markdown(anchors + '::: {.exported}', f"{cell['id']}-opens"), cell,
        markdown(':::', f"{cell['id']}-ends")]


def boxed(text):
    "Turn the quotation that opens a chapter in JupyterLab into the box of its page."
    return '::: {.chapter-box}\n' + re.sub(r'^> ?', '', text, flags=re.M) + '\n:::'


# sections that stand folded on a page: answers to exercises, and what makes a chapter work
FOLDED = r'(##+) ((?:Answers|Behind the scenes)\b[^\n]*)\n?'


def folded(cells):
    """Fold the sections that `FOLDED` names, up to the next heading of their level or above. A
    heading inside becomes a bold line with the heading's anchor."""
    done, level = [], 0
    for cell in cells:
        text = source(cell) if cell['cell_type'] == 'markdown' else ''
        heading = re.match(r'(##?#?#?) ', text)
        if level and heading and len(heading[1]) <= level:
            done.append(markdown('```{=html}\n</details>\n```', f"{cell['id']}-folded"))
            level = 0
        if opens := re.match(FOLDED, text):
            level, cell = len(opens[1]), dict(cell, source=text[opens.end():].strip())
            title = html.escape(opens[2])
            done.append(markdown(f'```{{=html}}\n<details class="folded" id="{anchor(opens[2])}">'
                f'<summary>{title}</summary>\n```', f"{cell['id']}-folds"))
        elif level and heading:
            cell = dict(cell, source=re.sub(r'^##+ (.*)$',
                lambda m: f'[**{m[1]}**]{{#{anchor(m[1])}}}', text, flags=re.M))
        if source(cell).strip(): done.append(cell)
    if level: done.append(markdown('```{=html}\n</details>\n```', 'last-folded'))
    return done


def anchor(heading):
    "How the renderers name the place of a heading."
    return re.sub(r'[^\w\s-]', '', heading.lower()).strip().replace(' ', '-')


def stage_sources(entries, used):
    "Write the appendix: sheets, bibliography, and the page for lost readers."
    for path in sorted(reader.SOURCES.glob('*.md')):
        text, named = reader.sheet_page(path, entries)
        (STAGE/f'{path.stem}.qmd').write_text(text, encoding='utf-8')
        for key in named: used.setdefault(key, []).append(path.stem)
    (STAGE/'bibliography.qmd').write_text(reader.bibliography_page(entries, used), encoding='utf-8')
    shutil.copy(reader.BIBLIOGRAPHY, STAGE)
    for path in PARTS.iterdir():
        if path.suffix in ('.html', '.js', '.qmd'):
            (STAGE/path.name).write_text(reader.fill(path.read_text(encoding='utf-8')),
                encoding='utf-8')


def stage_config(notebooks):
    "Write the renderer's configuration: pages by their names, values of settings.ini filled in."
    config = (ROOT/'_quarto.yml').read_text(encoding='utf-8')
    kept = [s for s in config.splitlines(True)
        if not (m := re.match(r'\s*- nbs/([\w/]+\.ipynb)', s)) or m[1] in notebooks]
    def flat(m):
        if not m[1]: return ''
        return page_name(m[1]) + ('.qmd' if m[2] == 'md' else '.ipynb')
    text = re.sub(r'nbs/(?:([\w/]+)\.(ipynb|md)|(?=\w))', flat, ''.join(kept))
    (STAGE/'_quarto.yml').write_text(reader.fill(text).replace('.ci/site/', ''), encoding='utf-8')


def italic(c):
    "Give the slanted form of a letter, which browsers put in for a variable of one letter."
    name = re.sub(r'(?:LATIN|GREEK) | LETTER', '', unicodedata.name(c, ''))
    try: return 'ℎ' if c == 'h' else unicodedata.lookup(f'MATHEMATICAL ITALIC {name}')
    except KeyError: return ''


def math_font(text, path):
    """Write the part of STIX Two Math that the formulas use: browsers without a mathematical font
    need it."""
    import ziamath
    from fontTools import subset
    options = subset.Options(layout_features=['*'], notdef_outline=True)
    font = subset.load_font(str(Path(ziamath.__file__).parent/'fonts'/'STIXTwoMath-Regular.ttf'),
        options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=text)
    subsetter.subset(font)
    subset.save_font(font, str(path), options)


def stage(notebooks):
    "Lay out the folder that the renderer reads."
    from nbdev.serve import proc_nbs
    proc_nbs(str(ROOT/'nbs'), force=True, n_workers=0)
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir(parents=True)
    index, entries, dates = name_index(notebooks), reader.papers(), reader.changed()
    used = {}
    for nb in notebooks:
        for key in stage_notebook(nb, index, entries, dates):
            used.setdefault(key, []).append(page_name(nb))
    stage_sources(entries, used)
    for p in (ROOT/'nbs').iterdir():
        if p.suffix in ('.css', '.svg', '.png'): shutil.copy(p, STAGE)
    reader.card(STAGE/'card.png')
    stage_config(notebooks)


# ---- maths: TeX to MathML, which browsers show natively

FUNCTIONS = set('ln log exp max min sup inf arg sin cos tan tanh det dim lim argmin argmax'.split())
# relations and operators lose their space in sub- and superscripts, as in TeX
TIGHT = set('<>=≤≥∈+−-→×,')
M = '{http://www.w3.org/1998/Math/MathML}'


# Accents as signs of their own: ASCII's ^ and ~ are too large, and combining ones stand beside
# their letter in Chromium.
ACCENTS = {'^': 'ˆ', '~': '˜', '¯': 'ˉ', '˙': '˙'}
# What a formula needs and no page says: roots, brackets of every size, accents and braces.
OPERATORS = '√()[]{}|‖⟨⟩⌊⌋⌈⌉/−+=<>×·…,.′⏞⏟⎴⎵‾^~¯' + ''.join(ACCENTS.values())
SCRIPTS = {M + t for t in 'msub msup msubsup munder mover munderover'.split()}


def settle(node):
    """Place accents over their letter, and keep a large bracket that bears a script at the height
    of its partner."""
    base = node[0]
    # \overline: the dash does not stretch, the overline does
    if node[1].text == '―': node[1].text = '‾'
    if node.tag == M + 'mover' and base.tag == M + 'mi' and node[1].text in ACCENTS:
        node[1].text = ACCENTS[node[1].text]
        node[1].set('stretchy', 'false')
        node.set('accent', 'true')
    if base.tag == M + 'mo' and 'minsize' in base.attrib:
        node[0] = ET.Element(M + 'mrow')
        node[0].append(base)


def tidy(node, script=False):
    "Give a formula TeX's spacing where MathML's defaults differ."
    if node.tag in SCRIPTS: settle(node)
    children = list(node)
    for i, child in enumerate(children):
        tidy(child, script or node.tag in SCRIPTS and i > 0)
        text = (child.text or '').strip()
        if child.tag == M + 'mo' and (text in ('|', '/') or script and text in TIGHT):
            child.set('lspace', '0')
            child.set('rspace', '0')
        if child.tag == M + 'mo' and text in ('|', '‖') and 'fence' not in child.attrib:
            child.set('stretchy', 'false')
        if text == '−' and (i == 0 or children[i-1].tag == M + 'mo'
            and children[i-1].text not in (')', ']', '|')):
            child.set('rspace', '0')
            child.set('lspace', '0')
        head = child[0] if child.tag in SCRIPTS else child
        if (head.text or '').strip() not in FUNCTIONS or node.tag in SCRIPTS: continue
        # a thin space after ln, but none before a bracket
        after = children[i+1] if i+1 < len(children) else None
        first = next((e.text.strip() for e in after.iter() if e.text and e.text.strip()),
            '') if after is not None else ')'
        if head.tag == M + 'mo': head.set('lspace', '0'); head.set('rspace', '0')
        if first not in tuple('([{)]},.|'):
            node.insert(list(node).index(child) + 1, ET.Element(M + 'mspace', width='0.1667em'))


def mathml(tex, block):
    "Turn TeX into MathML; an unknown command is an error."
    from latex2mathml.converter import convert
    tex = re.sub(r'\\operatorname\*\s*\{((?:[^{}]|\{[^{}]*\})*)\}',
        r'\\mathop{\\mathrm{\1}}', tex.strip())
    tex = re.sub(r'\\(?:text|mathrm|texttt|mathtt)\{[^{}]*\}',
        lambda m: m[0].replace(r'\_', '_'), tex)
    # latex2mathml knows \\max but not \\arg
    tex = re.sub(r'\\arg(?![A-Za-z])', r'\\mathrm{arg}\\,', tex)
    ET.register_namespace('', M[1:-1])
    tree = ET.fromstring(convert(tex, display='block' if block else 'inline'))
    tidy(tree)
    if bad := re.findall(r'\\[A-Za-z]+', ''.join(tree.itertext())):
        raise ValueError(f"{bad[0]} in {tex!r} is not TeX that the site can show")
    tree.set('alttext', tex)
    return ET.tostring(tree, encoding='unicode')


AWAY = re.compile(r'<(?:script|img|iframe|source)[^>]*\bsrc="(?:https?:)?//[^"]*"'
    r'|<link(?=[^>]*stylesheet)[^>]*href="(?:https?:)?//[^"]*"')
MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)


def finish():
    "Render the maths of every page, and check that no page would load anything from elsewhere."
    used = set('0123456789')
    for path in sorted(SITE.rglob('*.html')):
        def formula(m):
            try: out = mathml(html.unescape(m[2]), m[1] == 'display')
            except Exception as e:
                raise SystemExit(f"{path.name}: formula {html.unescape(m[2])!r}: {e}") from e
            return f'<span class="math {m[1]}">{out}</span>'
        text = MATH.sub(formula, path.read_text(encoding='utf-8'))
        text = re.sub(r'<(?:link|script)[^>]*https://cdn[^>]*katex[^>]*>(?:</script>)?', '', text)
        for m in re.findall(r'<math.*?</math>', text, re.S):
            used |= set(html.unescape(re.sub(r'<[^>]+>', '', m)))
        if away := AWAY.search(text):
            raise SystemExit(f"{path.name} loads from the network: {away[0]}")
        path.write_text(reader.head(reader.sharpen(text), path.name), encoding='utf-8')
    # themes import web fonts; styles.css names fonts that every system has
    for css in SITE.rglob('*.css'):
        css.write_text(
            re.sub(
                r'''@import\s*(?:url\(https?:[^)]*\)|(?:url\()?["']https?:[^"']*["']\)?)[^;]*;''',
                '', css.read_text(encoding='utf-8')), encoding='utf-8')
    math_font(OPERATORS + ''.join(c + italic(c) for c in sorted(used)), SITE/'math.ttf')


def add_files(notebooks):
    "Put beside the pages what they offer: notebooks, scripts, pictures, and the built-in search."
    (SITE/'notebooks').mkdir()
    for nb in notebooks: shutil.copy(ROOT/'nbs'/nb, SITE/'notebooks')
    for name in ('site.js', 'touch.js', 'card.png', 'references.bib'):
        shutil.copy(STAGE/name, SITE)
    (SITE/'vega.js').write_text(figures.library(), encoding='utf-8')
    if (SITE/'site_libs'/'fuse').exists():          # not Quarto: a search that reads whole words
        shutil.copy(STAGE/'search.js', SITE/'site_libs'/'fuse'/'fuse.min.js')
        reader.search_index(SITE)


# ---- commands

def site():
    "Build the site into _docs/, unless it stands there already for these inputs."
    state = digest()
    if STAMP.exists() and STAMP.read_text() == state: print(f"{SITE.name}/ is up to date"); return
    listed = chapters()
    notebooks = [nb for nb in listed if (ROOT/'nbs'/nb).exists()]
    for nb in listed:
        if nb not in notebooks:
            print(f"warning: _quarto.yml lists nbs/{nb}, which does not exist", file=sys.stderr)
    stage(notebooks)
    if shutil.which('quarto'):
        subprocess.run(['quarto', 'render', str(STAGE), '--no-execute', '--quiet'], check=True)
    else:
        from smalldocs.site import build
        for w in build(STAGE, quiet=True).warnings:
            if 'html-math-method' not in w: print(f"warning: {w}", file=sys.stderr)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(STAGE/'_site', SITE)
    finish()
    add_files(notebooks)
    STAMP.write_text(state)
    print(f"{len(notebooks)} pages in {SITE.name}/; to read them:"
        f" .venv/bin/python -m http.server -d {SITE.name}")


def readme_text():
    "Turn nbs/index.ipynb into Markdown for README.md: its prose and the Markdown its cells show."
    parts = []
    def below(text): return re.sub(r'\]\(([\w/]+\.(?:ipynb|svg))', r'](nbs/\1', text).strip()
    for cell in load(ROOT/'nbs'/'index.ipynb')['cells']:
        if cell['cell_type'] == 'markdown': parts.append(below(source(cell)))
        if cell['cell_type'] != 'code' or re.match(r'#\|\s*hide\b', source(cell)): continue
        if not re.search(r'^#\|\s*echo:\s*false', source(cell), re.M):
            parts.append(f'```python\n{source(cell).strip()}\n```')
        for out in cell['outputs']:
            shown = out.get('data', {})
            if 'text/markdown' in shown: parts.append(below(''.join(shown['text/markdown'])))
            elif 'text/plain' in shown:
                parts.append('```\n' + ''.join(shown['text/plain']).strip() + '\n```')
    return '\n\n'.join(parts) + '\n'


def citation_text(): return reader.fill((PARTS/'CITATION.cff').read_text(encoding='utf-8'))


def readme():
    "Write README.md, the pictures that it and the first page show, and how to cite."
    sys.path.insert(0, str(ROOT))
    from pgolf.systems.pictures import pictures
    for name, picture in pictures(ROOT/'nbs'/'results').items():
        (ROOT/'nbs'/name).write_text(picture, encoding='utf-8')
    (ROOT/'README.md').write_text(readme_text(), encoding='utf-8')
    (ROOT/'CITATION.cff').write_text(citation_text(), encoding='utf-8')


if __name__ == '__main__':
    command = dict(site=site, readme=readme).get(sys.argv[1] if len(sys.argv) == 2 else '')
    if command is None: sys.exit(__doc__)
    command()
