"""Make the processed notebooks in _proc/ into the site's pages. Quarto and smalldocs run it first.

Every page gets its date, the minutes it takes to read and a local picture of the Colab badge.
Code is folded in the lessons; sources are folded in the reference. What a page says about a public
name is written anew from its docments, and private names are left out.
"""

import importlib
import inspect
import json
import math
import re
import subprocess
import sys
from functools import cache, reduce
from pathlib import Path

import yaml
from fastcore.docments import ShowDocRenderer
from nbdev.doclinks import NbdevLookup

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 96  # columns of a signature
LONG = 40  # characters of a default that a signature leaves out
LINKED_HEADING = r'^(#+ .*)\[(`[^`]+`)\]\([^)]*\)'
# nbdev links names in backticks also where they are in a link already
LINK_IN_LINK = r'\[([^][]*)\[(`[^`]+`)\]\([^)]*\)([^][]*)\]\('
WORDS, FIGURE = 220, 15  # words that one reads in a minute, words that a figure counts for


@cache
def lookup():
    return NbdevLookup()


def source(cell):
    return ''.join(cell['source'])


def options(text):
    "The options `#| key: value` at the top of a cell, as a dictionary."
    return dict(re.findall(r'^#\| *([\w-]+): *(.*)$', text, flags=re.M))


def last_changed(page):
    "The date of the last commit of a page's notebook; None outside git."
    command = ['git', 'log', '-1', '--format=%cs', '--', f'nbs/{page}']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or None


# ---- what a page says about a public name


def plain(text):
    "Text in which Markdown finds nothing but code in backticks."
    parts = re.split(r'(`[^`]*`)', text)
    return ''.join(p if p[:1] == '`' else re.sub(r'([\\*_<>$\[\]^~|#])', r'\\\1', p) for p in parts)


def spaced(param):
    "A parameter as fastcore writes it, `a:int=3`, with the spaces of the style guide."
    name, _, rest = param.partition(':')
    if not rest:
        return param
    kind, equals, default = rest.partition('=')
    kind = re.sub(r'\b(?:[a-z_]\w*\.)+(?=\w)', '', kind)  # torch.Tensor: Tensor
    default = default if len(default) <= LONG else '...'
    if kind == 'NoneType':
        return f'{name}={default}'
    return f'{name}: {kind} = {default}' if equals else f'{name}: {kind}'


def signature(name, renderer):
    "The call of a function or class, in lines of at most WIDTH columns."
    params = [spaced(p) for p, _ in renderer.dm.params]
    if inspect.isclass(renderer.sym) and params == ['*args', '**kwargs']:
        return f'class {name}'
    returns = re.match(r'\)->(.*?):', renderer.dm._ret_str)
    arrow = '' if not returns or inspect.isclass(renderer.sym) else f' -> {returns[1]}'
    line = f'{name}({", ".join(params)}){arrow}'
    if len(line) <= WIDTH:
        return line
    lines = ['']
    for p in params:
        if lines[-1] and len(lines[-1]) + len(p) + 7 > WIDTH:
            lines.append('')
        lines[-1] += f'{", " if lines[-1] else ""}{p}'
    body = ',\n'.join(f'    {line}' for line in lines)
    return f'{name}(\n{body},\n){arrow}'


def explained(renderer):
    "The parameters that have an explanation, and the result, as a list."
    told = {k: v['docment'] for k, v in renderer.dm.dm.items() if isinstance(v.get('docment'), str)}
    returns = told.pop('return', None)
    items = [f'`{k}`: {plain(" ".join(v.split()))}' for k, v in told.items()]
    if returns:
        items.append(f'Returns {plain(" ".join(returns.split()))}')
    if not items:
        return ''
    return '::: {.params}\n' + '\n'.join(f'- {item}' for item in items) + '\n:::'


def reference(symbol, name, heading):
    "The Markdown that documents `symbol`, which the page calls `name`."
    renderer = ShowDocRenderer(symbol)
    call = name if inspect.isclass(symbol) else name.rpartition('.')[2]
    parts = [f'{"#" * (4 if "." in name else 3)} {name}'] if heading else []
    url = lookup().code(renderer.fn)
    if url:
        parts.append(f'[source]({url}){{.source-link}}')
    parts.append(f'```python\n{signature(call, renderer)}\n```')
    parts += [lookup().linkify(t) for t in (renderer.docs, explained(renderer)) if t]
    return '\n\n'.join(parts)


def shown_name(cell):
    "The name that a cell documents, or None."
    found = re.search(r'^show_doc\(([\w.]+)', source(cell), flags=re.M)
    return found and found[1]


def is_private(name):
    parts = name.split('.')
    return any(p.startswith('_') and not re.fullmatch(r'__\w+__', p) for p in parts)


def defined(code):
    "The names that a cell defines at its left edge; for a patched method `_Class.method`."
    names = re.findall(r'^(?:async )?(?:def|class) (\w+)', code, flags=re.M)
    names += re.findall(r'^([A-Za-z_]\w*)(?:, [A-Za-z_]\w*)*(?::[^=\n]*)? = ', code, flags=re.M)
    patched = re.findall(r'^def \w+\(self: ?\(?(\w+)', code, flags=re.M)
    return patched or names


def documented(cell, module, headings):
    "The cell that documents a public name, or None for a private one."
    name = shown_name(cell)
    if is_private(name):
        return None
    symbol = reduce(getattr, name.split('.'), module)
    text = reference(symbol, name, heading=name not in headings)
    return dict(cell, outputs=[dict(cell['outputs'][0], data={'text/markdown': text})])


# ---- pages


def folded(cell, tree):
    """A code cell that says whether its code is folded: in lessons it is; in the reference only
    sources, tests and what draws figures."""
    text = source(cell)
    if 'code-summary: "Exported source"' in text:
        if all(n.startswith('_') for n in defined(text)):
            return None
        text = text.replace('code-fold: show', 'code-fold: true').replace(
            'Exported source', 'Source'
        )
        return dict(cell, source=text)
    if 'code-fold' in options(text) or options(text).get('echo') == 'false':
        return cell
    shown = [kind for o in cell['outputs'] for kind in o.get('data', ['text'])]
    head = ''
    if tree == 'reference' and not shown and re.search(r'\bassert|\btest_|testing\.', text):
        head = '#| code-summary: "Test"\n'
    fold = tree == 'lessons' or head or (tree == 'reference' and 'image/png' in shown)
    return dict(cell, source=f'#| code-fold: {str(bool(fold)).lower()}\n{head}{text}')


def minutes(cells):
    "The minutes it takes to read the text and to look at the figures."
    text = ' '.join(source(c) for c in cells if c['cell_type'] == 'markdown')
    shown = [o for c in cells for o in c.get('outputs', [])]
    figures = sum('image/png' in o.get('data', {}) for o in shown)
    return max(1, math.ceil((len(text.split()) + FIGURE * figures) / WORDS))


def headline(text, n):
    "The line with the badge, beside the minutes that the page takes."
    local = re.sub(r'(!\[Open in Colab\])\([^)]*\)', r'\1(/images/colab-badge.svg)', text)
    return f'::: {{.page-facts}}\n[{n} min read]{{.reading-time}} {local}\n:::'


def module_of(page):
    "The module that a reference page documents; None for other pages."
    nb = json.loads((ROOT / 'nbs' / page).read_text(encoding='utf-8'))
    text = '\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'code')
    found = re.search(r'^#\| default_exp (\S+)', text, flags=re.M)
    return found and importlib.import_module(f'cf_guidance.{found[1]}')


def with_front_matter(cell, **more):
    "The cell with the page's front matter, with further keys."
    front = yaml.safe_load(source(cell).strip().strip('-')) or {}
    text = yaml.safe_dump({**front, **more}, allow_unicode=True, width=10**6)
    return dict(cell, source=f'---\n{text}---\n')


def prepare(nb, page):
    "The notebook of a page with its cells as the site shows them."
    first, *rest = nb['cells']
    date = last_changed(page)
    cells = [with_front_matter(first, **({'date': date} if date else {}))]
    module, headings, n = module_of(page), set(), minutes(rest)
    tree = 'reference' if module else page.partition('/')[0]
    for cell in rest:
        text = source(cell)
        if text.startswith('[![Open in Colab]'):
            cell = dict(cell, source=headline(text, n))
        elif cell['cell_type'] == 'markdown':
            text = re.sub(LINKED_HEADING, r'\1\2', text, flags=re.M)
            text = re.sub(LINK_IN_LINK, r'[\1\2\3](', text)
            headings |= set(re.findall(r'^#+ `?(.*?)`?(?: \{.*)?$', text, flags=re.M))
            cell = dict(cell, source=text)
        elif shown_name(cell):
            cell = documented(cell, module, headings)
        elif cell['cell_type'] == 'code':
            cell = folded(cell, tree)
        if cell:
            cells.append(cell)
    return dict(nb, cells=cells)


def main(folder):
    "Prepare each notebook of `folder` once."
    sys.path.insert(0, str(ROOT))
    for path in sorted(folder.rglob('*.ipynb')):
        nb = json.loads(path.read_text(encoding='utf-8'))
        if nb['metadata'].get('prepared'):
            continue
        page = path.relative_to(folder).as_posix()
        nb = prepare(nb, page)
        nb['metadata']['prepared'] = True
        path.write_text(json.dumps(nb), encoding='utf-8')


if __name__ == '__main__':
    main(Path.cwd())
