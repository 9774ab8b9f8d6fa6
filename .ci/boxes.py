"""The box at the top of every chapter: question, answer, worth, what to read before, minutes.

  python .ci/boxes.py write           write every box from nbs/findings/chapters.toml, the results
                                      and what the chapters' own cells show
  python .ci/boxes.py seconds FILE    keep the seconds that chapters took, from what
                                      `pytest tests/test_chapters.py --durations=0` printed, or
                                      from lines such as `nbs/model/19_gpt.ipynb: 34 s`

A box is a cell of plain Markdown, so that it reads alike in JupyterLab and on the site. No number
in it is typed: `techniques` and `measured` name rows of the results, `find` is a pattern over the
outputs of the chapter. A test holds every box against what this file would write.
"""
import json, math, os, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pgolf.systems.evidence import measured, read_rows, say, worth

NBS = ROOT/'nbs'
SECONDS = NBS/'findings'/'seconds.json'
BOX = 'chapter-box'          # id of the cell
WORDS, LINES = 200, 50       # that one reads in a minute: words of prose, lines of code
UNIT = 'bits per byte, 95 % intervals, below 0 is better; '
FAST = 20                    # seconds; a busy machine takes several times as long


def source(cell): return ''.join(cell['source'])
def page_name(path): return re.sub(r'^\d+[a-z]?_', '', path.stem)


def chapters():
    "Map the name of each chapter to its notebook; runs and pages made of rows are none."
    found = [p for p in sorted(NBS.rglob('*.ipynb'), key=lambda p: p.name)
        if p.parent.name not in ('runs', 'findings', '.ipynb_checkpoints') and p.stem != 'index']
    return {page_name(p): p for p in found}


# ---- what stands in a box

def outputs(cells):
    "Everything that the cells of a chapter show, as text."
    shown = [o for c in cells for o in c.get('outputs', [])]
    parts = [o.get('text', '') for o in shown]
    parts += [v for o in shown for k, v in o.get('data', {}).items() if k.startswith('text/')]
    return '\n'.join(''.join(p) for p in parts)


def found_in(row, cells):
    "Fill `shown` with what the pattern `find` finds in the outputs."
    match = re.search(row['find'], outputs(cells), re.S)
    if not match:
        raise ValueError(f"chapters.toml, {row['page']}: no output of the chapter fits"
            f" find={row['find']!r}; mend the pattern, or execute the chapter")
    plain = [f'{float(g):.4f}' if re.fullmatch(r'[\d.]+e-\d+', g) else g for g in match.groups()]
    return row['shown'].format(*plain)


def asked(row):
    "The measured differences that a row names: (label, key, whether the sign is turned)."
    techniques = {t['id']: t for t in read_rows('technique')}
    found = [(techniques[t]['name'], techniques[t]['worth'], techniques[t].get('reverse', False))
        for t in row.get('techniques', [])]
    return found + [(label, key, False) for label, *key in row.get('measured', [])]


def scores(row, folder, known):
    "What the measurements of a row say, each at its largest scale, and what is not measured yet."
    said, absent = {}, []
    for label, key, reverse in asked(row):
        if values := worth(key, folder, known):
            text, _, where = say(values[0], reverse).rpartition(' (')
            said.setdefault(where.rstrip(')'), []).append(f'{label}: {text}')
        else: absent.append(label)
    lines = [f"{'; '.join(v)} ({UNIT if i == 0 else ''}{where})"
        for i, (where, v) in enumerate(said.items())]
    parts = [f"{line[:1].upper()}{line[1:]}." for line in lines]
    return parts + ([f"Not measured yet: {', '.join(absent)}."] if absent else [])


def worth_of(row, cells, folder=None, known=None):
    "What a chapter is worth: scores, what its cells show, or why there is no number."
    parts = scores(row, folder, known)
    if 'find' in row: parts.append(found_in(row, cells))
    if 'unmeasured' in row: parts.append(row['unmeasured'])
    if not parts: raise ValueError(f"chapters.toml, {row['page']}: say what it is worth")
    return ' '.join(parts)


def reading(cells):
    "Minutes to read a chapter, in steps of five."
    prose = sum(len(source(c).split()) for c in cells
        if c['cell_type'] == 'markdown' and c.get('id') != BOX)
    code = [source(c) for c in cells if c['cell_type'] == 'code']
    lines = sum(s.count('\n') + 1 for s in code if not re.match(r'#\|\s*hide\b', s))
    return 5*math.ceil((prose/WORDS + lines/LINES)/5)


def running(seconds):
    "How long a chapter takes to run, with room for a slower machine."
    if seconds is None: return 'to run: not timed yet'
    if seconds <= FAST: return 'less than a minute to run'
    n = math.ceil(1.5*seconds/60)
    return f"{n} minute{'s' if n > 1 else ''} to run"


def link(name, path):
    "A link from a chapter to another."
    target = chapters()[name]
    return f"[{name}]({Path(os.path.relpath(target, path.parent)).as_posix()})"


def box(row, path, folder=None, known=None):
    "Write the box of a chapter."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    before = ', '.join(link(n, path) for n in row['before']) or 'nothing'
    seconds = json.loads(SECONDS.read_text(encoding='utf-8')).get(row['page'])
    parts = [f"**Question.** {row['question']}", f"**Answer.** {row['answer']}",
        f"**Worth.** {worth_of(row, cells, folder, known)}",
        f"**Read before:** {before}. **Time:** {reading(cells)} minutes to read,"
        f" {running(seconds)}."]
    return '\n>\n'.join(f'> {p}' for p in parts)


# ---- commands

def without_opening(cells):
    "Take out the paragraph that opened a chapter before there were boxes."
    kept = []
    for cell in cells:
        text = source(cell)
        if cell['cell_type'] == 'markdown' and '**Question**' in text:
            text = re.sub(r'(?s)\*\*Question\*\*.*?(\n\n|\Z)', '', text).strip()
            if not text: continue
            cell = dict(cell, source=text.splitlines(True))
        kept.append(cell)
    return kept


def put(path, text):
    "Put the box below the title, or renew it."
    nb = json.loads(path.read_text(encoding='utf-8'))
    cells = without_opening([c for c in nb['cells'] if c.get('id') != BOX])
    cells.insert(1, dict(cell_type='markdown', id=BOX, metadata={}, source=text.splitlines(True)))
    if cells == nb['cells']: return False
    nb['cells'] = cells
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return True


def write():
    "Write all boxes; chapters without a row are named."
    rows, pages, known = {r['page']: r for r in read_rows('chapter')}, chapters(), measured()
    done = sum(put(path, box(rows[n], path, None, known)) for n, path in pages.items() if n in rows)
    print(f"{done} boxes written, {len(pages)} chapters")
    if missing := [n for n in pages if n not in rows]:
        raise SystemExit(f"no row in nbs/findings/chapters.toml: {', '.join(missing)}")


def durations(text):
    "Read seconds of chapters from what was printed; of several the shortest."
    said = re.findall(r'([\d.]+)s call\s+\S*test_chapters\.py::test_chapter\[(\w+)\]', text)
    said += [(s, n) for n, s in re.findall(r'nbs/(?:\w+/)?(\w+)\.ipynb: (\d+) s$', text, re.M)]
    found = {}
    for s, name in said:
        page = re.sub(r'^\d+[a-z]?_', '', name)
        found[page] = min(round(float(s)), found.get(page, 10**6))
    return found


def seconds(path):
    "Keep the seconds that pytest measured; chapters that it did not run keep theirs."
    found = durations(Path(path).read_text(encoding='utf-8'))
    if not found: raise SystemExit(f"{path}: no durations of test_chapters; add --durations=0")
    old = json.loads(SECONDS.read_text(encoding='utf-8')) if SECONDS.exists() else {}
    kept = {n: s for n, s in (old | found).items() if n in chapters()}
    SECONDS.write_text(json.dumps(kept, indent=1, sort_keys=True) + '\n', encoding='utf-8')
    print(f"{len(found)} chapters timed")


if __name__ == '__main__':
    if sys.argv[1:] == ['write']: write()
    elif len(sys.argv) == 3 and sys.argv[1] == 'seconds': seconds(sys.argv[2])
    else: sys.exit(__doc__)
