"""Figures that can be touched, on the site: the still picture that a notebook holds, its caption,
and what a script needs to bring it to life.

The scripts are two files beside the pages, which only pages with such figures load: vega.js is the
library as vl-convert packs it, touch.js is ours. Without scripts the still picture stays.
"""
import base64, html, json

FIGURE = 'application/vnd.vegalite.v5+json'   # as pgolf.touch stores it
SCRIPTS = ('<script src="vega.js" defer></script>\n<script src="touch.js" defer></script>\n')


def touchable(output): return FIGURE in output.get('data', {})


def library():
    "The drawing library in one file, as it works without a network."
    from vl_convert import javascript_bundle
    code = 'window.vegaEmbed = vegaEmbed;'
    return javascript_bundle(snippet=code, vl_version='5.20')


def figure_html(output, caption, name):
    "A figure: still picture, place for the live one, what a screen reader says, description."
    spec, still = output['data'][FIGURE], ''.join(output['data'].get('image/svg+xml', ''))
    if not still:
        raise ValueError(f'{name}: no still picture; install vl-convert-python and run the cell')
    alt = html.escape(spec['description'])
    picture = base64.b64encode(still.encode()).decode()
    described = json.dumps(spec, ensure_ascii=False).replace('</', '<\\/')
    return (f'<figure class="touch" id="{name}">\n'
        f'<img class="touch-still" alt="{alt}" src="data:image/svg+xml;base64,{picture}">\n'
        '<div class="touch-live" hidden></div>\n'
        '<p class="touch-says" aria-live="polite"></p>\n'
        f'<script type="application/json">{described}</script>\n'
        f'<figcaption>{html.escape(caption)}</figcaption>\n</figure>')


def taken_out(cell, first):
    "Take such figures out of a cell; gives the cell of prose that shows them, or nothing."
    found = [o for o in cell.get('outputs', []) if touchable(o)]
    if not found: return []
    cell['outputs'] = [o for o in cell['outputs'] if not touchable(o)]
    names = [f"touch-{cell['id']}{i or ''}" for i in range(len(found))]
    shown = '\n'.join(figure_html(o, o['metadata'].pop('caption'), n)
        for o, n in zip(found, names, strict=True))
    text = f'```{{=html}}\n{SCRIPTS if first else ""}{shown}\n```\n'
    return [dict(cell_type='markdown', id=names[0], metadata={}, source=text)]
