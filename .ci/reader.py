"""What a reader finds around a chapter: sources that open, papers, captions, where the notebook is.

docs.py calls these while it lays out the pages (text in, text out) and once more on the finished
HTML. The sheets of the systems are nbs/sources/*.md, the papers nbs/references.bib; the address of
the repository stands in settings.ini alone.
"""
import base64, configparser, functools, html, json, re, struct, subprocess, tomllib
from html.parser import HTMLParser
from pathlib import Path

import figures

ROOT = Path(__file__).resolve().parent.parent
SOURCES, BIBLIOGRAPHY = ROOT/'nbs'/'sources', ROOT/'nbs'/'references.bib'
GLOSSARY = ROOT/'nbs'/'findings'/'glossary.toml'


def settings():
    "Read settings.ini: the version, the repository, the address of the site."
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    found = dict(ini['DEFAULT'])
    found['site_url'] = found['doc_host'] + found['doc_baseurl']
    return found


def fill(text):
    "Put the values of settings.ini where a text says @name@."
    known = settings()
    return re.sub(r'@(\w+)@', lambda m: known.get(m[1], m[0]), text)


# ---- prose: what may be linked; code, headings, divs, links, formulas, addresses stay as they are

KEPT = (r'^```.*?^```[ \t]*$|^#[^\n]*$|^:::[^\n]*$|`[^`]*`|!?\[[^\]]*\]\([^)\n]*\)'
    r'|\$\$.*?\$\$|\$[^$\n]+\$|<[^>\n]+>|https?://\S+')


def replace(text, pattern, change):
    "Change what matches in prose; code, headings, links and formulas stay."
    return re.sub(f'({KEPT})|{pattern}', lambda m: m[0] if m[1] else change(m), text,
        flags=re.M | re.S)


PULLS = 'https://github.com/openai/parameter-golf'


def link_pulls(text, seen):
    "Link pull requests and issues of the challenge where the page first names them."
    state = dict(end=-1, kind='pull')
    def link(m):
        first = not (m['word'] is None
            and re.fullmatch(r',? (?:and )?|/', text[state['end']:m.start()]))
        if first: state['kind'] = 'issues' if (m['word'] or '').startswith('issue') else 'pull'
        state['end'] = m.end()
        if m['n'] in seen: return m[0]
        seen.add(m['n'])
        address = f"{PULLS}/{state['kind']}/{m['n']}"
        return f"[{m[0]}]({address})" if m['word'] in ('PR ', 'issue ') else (
            f"{m['word'] or ''}[#{m['n']}]({address})")
    return replace(text, r'(?P<word>\b(?:PRs?|issues?)\s)?(?<!\w)#(?P<n>\d{2,4})\b', link)


# ---- sheets: facts about the systems, section by section

NUMBER = r'\d+(?:\.\d+)*'
SHEET = (rf"(?:[Ss]ections?\s+(?P<first>{NUMBER})(?:\s+and\s+{NUMBER})?\s+of\s+)?"
    r"(?:(?:[Tt]he|[Ii]ts|[Tt]heir|PR\s+#(?P<own>\d+)'s)\s+)?(?:five\s+)?"
    r"(?:(?P<name>challenge|frontier|fact)\s+)?\b(?P<sheet>sheets?)\b"
    r"(?:\s+of\s+(?P<list>(?:the\s+)?PRs?\s+#\d+(?:(?:,\s+|\s+and\s+)(?:PR\s+)?#\d+)*))?"
    rf"(?:,?\s+section\s+(?P<after>{NUMBER})|\s+(?P<point>\d+\.\d+))?")


def sections(name):
    "List the numbers of a sheet's sections; None: there is no such sheet."
    path = SOURCES/f'{name}.md'
    if not path.exists(): return None
    return re.findall(rf'^##+ ({NUMBER})\.? ', path.read_text(encoding='utf-8'), re.M)


def place(sheet, section=''):
    "Address a section of a sheet; what does not exist is an error."
    known = sections(sheet)
    if known is None or section and section not in known:
        raise ValueError(f"section {section or '-'} of {sheet} does not exist in nbs/sources/")
    return f'{sheet}.html' + (f"#section-{section.replace('.', '-')}" if section else '')


def link_sheets(text, page, heard):
    """Link each mention of a sheet to the section it names. `heard` is a list: its last entry is
    the pull request that "its sheet" means."""
    def link(m):
        if m['pr']:
            if sections(f"sheet_pr{m['pr']}") is not None: heard.append(m['pr'])
            return m[0]
        section = m['first'] or m['after'] or m['point'] or ''
        if m['list']:
            head, pulls = m[0].split(m['list'])[0], m['list']
            return head + re.sub(r'(PR\s+)?#(\d+)',
                lambda n: f"[{n[0]}]({place('sheet_pr' + n[2], section)})", pulls)
        own = m['own'] or (heard[-1] if heard else page.removeprefix('pr'))
        if m['name'] in ('challenge', 'frontier'): sheet = f"sheet_{m['name']}"
        elif m['own'] or m['sheet'] == 'sheet' and sections(f'sheet_pr{own}'):
            sheet = f'sheet_pr{own}'
        else: sheet = 'sheets'
        return f'[{m[0]}]({place(sheet, section)})'
    return replace(text, rf"{SHEET}|(?:PRs?\s+)?(?<!\w)#(?P<pr>\d+)", link)


def link_own_sections(text, sheet):
    "Link `section 7.1` on a sheet to that section of the same sheet."
    known = sections(sheet) or []
    return replace(text, rf'\b(?P<word>[Ss]ections?\s+)(?P<n>{NUMBER})(?!\s+of\b)',
        lambda m: f"[{m[0]}](#section-{m['n'].replace('.', '-')})" if m['n'] in known else m[0])


def literal(text):
    "Keep signs of a sheet that Markdown would take for its own: x^2, ~3, W^, <name>, a*b."
    signs = r'(?P<sign>[\^~$@]|<(?=[A-Za-z/!])|(?<=\w)\*(?=\w)|\\(?=[A-Za-z]))'
    return re.sub(rf'(^```.*?^```[ \t]*$|`[^`]*`|\]\([^)\n]*\))|{signs}',
        lambda m: m[0] if m[1] else '\\' + m[0], text, flags=re.M | re.S)


def sheet_page(path, papers):
    """Make the page of one sheet: numbered sections get their anchors, every mention its link.
    Gives the papers that it names, too."""
    parts = re.match(r'# ([^\n]*)\n\n> ([^\n]*)\n\n(.*)', path.read_text(encoding='utf-8'), re.S)
    title, summary, text = parts.groups()
    text, heard, seen = literal(text), [path.stem.removeprefix('sheet_pr')], set()
    text = re.sub(rf'^(##+ ({NUMBER})\.? .*)$',
        lambda m: f"{m[1]} {{#section-{m[2].replace('.', '-')}}}", text, flags=re.M)
    text = re.sub(r'\]\((\w+)\.md(#[^)]*)?\)', r'](\1.html\2)', text)
    text = link_own_sections(link_sheets(text, path.stem, heard), path.stem)
    parts = re.split(r'(?m)^(?=## )', text)        # a long page: links anew in each section
    text = ''.join(link_papers(link_pulls(part, set()), seen, papers) for part in parts)
    return front(title, summary) + tools(path.relative_to(ROOT)) + text, seen


def front(title, summary='', **more):
    "Write the head of a page."
    rows = dict(title=title, **({'description': summary} if summary else {}), **more)
    lines = [f'{k}: {json.dumps(v, ensure_ascii=False)}\n' for k, v in rows.items()]
    return '---\n' + ''.join(lines) + '---\n\n'


# ---- papers

def papers():
    "Read references.bib: one dict an entry, one field a line."
    entries = re.findall(r'^@(\w+)\{(\w+),\n(.*?)^\}', BIBLIOGRAPHY.read_text(encoding='utf-8'),
        re.M | re.S)
    fields = r'^\s+(\w+) = \{(.*)\},?$'
    return [dict(re.findall(fields, body, re.M), kind=kind, key=key) for kind, key, body in entries]


def address(paper):
    "Where a paper can be read."
    if 'eprint' in paper: return f"https://arxiv.org/abs/{paper['eprint']}"
    return paper.get('url') or f"https://doi.org/{paper['doi']}"


def link_papers(text, seen, entries):
    """Link the name of a method or its authors to the bibliography, once a page for each paper, and
    once more where a line lists `Papers:`."""
    names = {n.strip(): p['key'] for p in entries for n in p['names'].split(';')}
    longest = '|'.join(map(re.escape, sorted(names, key=len, reverse=True)))
    pattern = rf"(?<![\w#*-])(?P<name>{longest})(?![\w-])"
    def link(m, done):
        key = names[m['name']]
        if key in done: return m[0]
        done.add(key)
        return f"[{m['name']}](bibliography.html#{key})"
    def listed(m):
        done = set()
        line = replace(m[0], pattern, lambda n: link(n, done))
        seen.update(done)
        return line
    text = re.sub(r'^(?:- )?Papers: [^\n]*$', listed, text, flags=re.M)
    return replace(text, pattern, lambda m: link(m, seen))


def people(authors):
    "Family names as they are read: A, B and C."
    names = [a.split(',')[0].strip('{} ') for a in authors.split(' and ')]
    if len(names) > 4: return f'{names[0]} et al.'
    return ' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))


def called(page):
    "How a page is called in a list of pages."
    return re.sub(r'^sheet_(pr|after)?(\w+)', lambda m: f'sheet of PR #{m[2]}' if m[1] == 'pr'
        else f'sheet of what came after PR #{m[2]}' if m[1] else f'{m[2]} sheet', page)


def bibliography_page(entries, used):
    "List the papers with their addresses and the pages that name them."
    def row(p):
        where = ', '.join(f'[{called(page)}]({page}.html)' for page in used.get(p['key'], []))
        venue = f" {p['journal']}," if 'journal' in p else ''
        title = p['title'].replace('``', '“').replace("''", '”')
        said = f"{people(p['author'])}: [{title}]({address(p)}).{venue} {p['year']}."
        return f"[]{{#{p['key']}}} {said}" + (f"<br>Named in {where}." if where else '')
    order = sorted(entries, key=lambda p: (people(p['author']), p['year']))
    return front('Bibliography', 'Papers and notes that the book builds on, and where it does') + (
        'As BibTeX: [references.bib](references.bib).\n\n' + '\n\n'.join(map(row, order)) + '\n')


# ---- terms

@functools.cache
def glossary():
    "The terms, and one pattern with a group for each."
    terms = tomllib.loads(GLOSSARY.read_text(encoding='utf-8'))['term']
    def form(t):
        term, first = t['term'], t['term'][0]
        start = f'[{first.upper()}{first}]' if first.islower() else first
        return '(' + t.get('match', start + re.escape(term[1:])) + ')'
    return [t['term'] for t in terms], rf'(?<![\w/.-])(?:{"|".join(map(form, terms))})(?![\w/-])'


def link_terms(text, seen):
    "Link a term of the glossary where the page first uses it."
    terms, words = glossary()
    def link(m):
        term = terms[m.lastindex - 2]           # the first group is what keeps its words
        if term in seen: return m[0]
        seen.add(term)
        place = re.sub(r'[^a-z0-9]+', '-', term.lower()).strip('-')
        return f'[{m[0]}](glossary.html#term-{place})'
    return replace(text, words, link)


# ---- figures

def options(code):
    "Split a cell into its options and its code; Quarto's options are lines of YAML."
    import yaml
    head = re.match(r'(?:#\|.*\n)*', code)[0]
    found = {}
    for line in head.splitlines():
        option = yaml.safe_load(line[2:])
        if isinstance(option, dict): found |= option
    return found


def number_figures(cells):
    "Give each figure of a page its number and a caption: what `fig-cap` says, or `fig-alt`."
    count = 0
    for cell in cells:
        for touched in filter(figures.touchable, cell.get('outputs', [])):
            count += 1
            said = touched['data'][figures.FIGURE]['description']
            touched['metadata']['caption'] = f'Figure {count}. {said}'
        pictures = [o for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
        if not pictures: continue
        code = ''.join(cell['source'])
        known = options(code)
        said = known.get('fig-cap') or known.get('fig-alt') or ''
        said = said if isinstance(said, list) else [said]*len(pictures)
        said = [text[:1].upper() + text[1:].rstrip('.') + '.' if text else '' for text in said]
        captions = [f'Figure {count + i + 1}. {text}'.strip() for i, text in enumerate(said)]
        count += len(pictures)
        code = re.sub(r'^#\|\s*fig-cap:.*\n', '', code, flags=re.M)
        shown = captions if len(captions) > 1 else captions[0]
        cell['source'] = f'#| fig-cap: {json.dumps(shown, ensure_ascii=False)}\n{code}'


def drawn_width(png):
    "How wide a picture means to be, in pixels of the page; one drawn denser is not wider."
    width = struct.unpack('>I', png[16:20])[0]
    at = png.find(b'pHYs')
    dots = struct.unpack('>I', png[at+4:at+8])[0]*.0254 if at > 0 else 100
    return round(width*100/dots) if dots > 120 else width


def sharpen(page):
    "Show pictures of double density at the size they were drawn for."
    def sized(m):
        head = base64.b64decode(m[2][:400])
        return m[0].replace('<img ', f'<img width="{drawn_width(head)}" ', 1)
    picture = r'<img (?![^>]*width=)([^>]*)src="data:image/png;base64,([^"]*)"[^>]*>'
    return re.sub(picture, sized, page)


def differences():
    "Mean and half width of the 95 % interval of every measured change, in bits per byte."
    from scipy.stats import t
    found = []
    for path in sorted((ROOT/'nbs'/'results').glob('effects-*-pocket.json')):
        rows = json.loads(path.read_text(encoding='utf-8'))
        base = rows[0]['stages']['sliding']
        for row in rows[1:]:
            moved = [b - a for a, b in zip(base, row['stages'].get('sliding') or base, strict=True)]
            n, mean = len(moved), sum(moved)/len(moved)
            spread = (sum((m - mean)**2 for m in moved)/max(n - 1, 1))**.5
            found.append((mean, t.ppf(.975, max(n - 1, 1))*spread/n**.5))
    return sorted(found)


def card(path):
    "Draw the picture that other sites show beside a link: what the measured differences are worth."
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    known, found = settings(), differences()
    fig = Figure(figsize=(12, 6.3), dpi=100, facecolor='white')
    fig.text(.06, .83, known['title'], size=54, weight='bold', color='#173f24')
    fig.text(.06, .74, known['description'].split(': ')[0], size=26, color='#333333')
    axes = fig.add_axes([.06, .14, .88, .52])
    for i, (mean, half) in enumerate(found):
        sure = abs(mean) > half
        axes.plot([mean - half, mean + half], [i, i], color='#2f7d4f' if sure else '#bbbbbb', lw=2)
        axes.plot(mean, i, 'o', color='#2f7d4f' if sure else '#888888', ms=5)
    axes.axvline(0, color='#333333', lw=1)
    axes.set(yticks=[])
    axes.set_xlabel('what ran against what was described, bits per byte, 95 % intervals', size=16)
    axes.tick_params(labelsize=13)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    FigureCanvasAgg(fig).print_png(path)


# ---- the line under the title

def changed():
    "Map each file to the date of its last commit; nothing outside a repository."
    log = subprocess.run(['git', 'log', '--format=@%cs', '--name-only', '--', 'nbs'], cwd=ROOT,
        capture_output=True, text=True).stdout
    dates, day = {}, ''
    for line in log.splitlines():
        if line.startswith('@'): day = line[1:]
        elif line: dates.setdefault(line, day)
    return dates


def tools(path, module='', dates=None):
    "Write the line under a title: module, source, ways to run it, version and date."
    known, notebook = settings(), path.suffix == '.ipynb'
    blob = f"{known['git_url']}/blob/{known['branch']}/{path}"
    colab = blob.replace('https://github.com/', 'https://colab.research.google.com/github/')
    links = [f'<a href="{blob}">View source</a>']
    if notebook:
        links += [f'<a href="notebooks/{path.name}" download>Download the notebook</a>',
            f'<a href="{colab}">Open in Colab</a>',
            '<details><summary>Open in JupyterLab</summary><p>In a copy of the repository: '
            f'<code>.venv/bin/jupyter lab {path}</code>. In Colab, first: '
            f"<code>%pip install git+{known['git_url']}</code></p></details>"]
    if module: links.insert(0, f"<code>{known['lib_name']}.{module}</code>")
    day = (dates or {}).get(str(path), '')
    links.append(f"<span>version {known['version']}{', ' + day if day else ''}</span>")
    return f'```{{=html}}\n<div class="page-tools">{" ".join(links)}</div>\n```\n\n'


# ---- the finished pages

class Sections(HTMLParser):
    "Collect what stands under each heading of a page, prose apart from code."
    SKIPPED = {'script', 'style', 'nav', 'svg', 'math'}
    APART = {'br', 'p', 'li', 'td', 'th', 'tr', 'div'}
    EMPTY = {'meta', 'link', 'img', 'br', 'input', 'hr', 'source', 'wbr', 'col'}

    def __init__(self):
        super().__init__()
        self.parts, self.inside, self.title, self.heading = [], [], '', ''
        self.new('')

    def new(self, anchor): self.parts.append(dict(id=anchor, section='', text=[], code=[]))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in self.APART: self.handle_data(' ')
        if tag in self.EMPTY: return
        role = 'nav' if 'page-tools' in (attrs.get('class') or '').split() else tag
        self.inside.append((tag, role))
        if tag in ('h2', 'h3', 'h4') and self.within('main'):
            self.new(attrs.get('data-anchor-id') or attrs.get('id') or '')

    def handle_endtag(self, tag):
        open_tags = [t for t, _ in self.inside]
        if tag in open_tags: del self.inside[len(open_tags) - 1 - open_tags[::-1].index(tag):]

    def within(self, *roles): return any(role in roles for _, role in self.inside)

    def handle_data(self, data):
        if not self.within('main') or self.within(*self.SKIPPED): return
        part = self.parts[-1]
        if self.within('h1'): self.title += data
        elif self.within('h2', 'h3', 'h4'): part['section'] += data
        else: part['code' if self.within('pre') else 'text'].append(data)


def search_index(site):
    "List every section of every page for the built-in search, prose apart from code."
    entries = []
    for path in sorted(site.glob('*.html')):
        page = Sections()
        page.feed(path.read_text(encoding='utf-8'))
        for part in page.parts:
            text, code = (' '.join(''.join(part[k]).split()) for k in ('text', 'code'))
            if not (text or code or part['section']) or path.name == '404.html': continue
            href = path.name + (f"#{part['id']}" if part['id'] else '')
            entries.append(dict(objectID=href, href=href, title=page.title.strip(),
                section=part['section'].strip(), text=text or code[:400], code=code))
    (site/'search.json').write_text(json.dumps(entries, ensure_ascii=False), encoding='utf-8')


def head(page, name):
    """Name the address under which a page is meant to be found; the page for lost readers is shown
    under any, so its links start from the address of the site."""
    known = settings()
    if name == '404.html':
        return page.replace('<head>', f'<head><base href="{known["doc_baseurl"]}/">', 1)
    if 'rel="canonical"' in page: return page
    address = f"{known['site_url']}/{'' if name == 'index.html' else name}"
    return page.replace('</head>',
        f'<link rel="canonical" href="{html.escape(address)}"></head>', 1)
