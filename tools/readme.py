"""Make README.md from nbs/index.ipynb. With --check, compare them: exit code 1 if they differ.

It does what `nbdev_readme` does, without Quarto: hidden cells are left out, outputs are text, and
links that are relative to nbs/ become relative to the root. Pictures are files in nbs/images,
named in Markdown cells. The badges are added here, because the site has no pictures from other
hosts.
"""

import posixpath
import re
import sys
from pathlib import Path

from nbdev.process import NBProcessor
from nbdev.processors import hide_line, rm_export, strip_ansi

ROOT = Path(__file__).resolve().parents[1]
INDEX, README = ROOT / 'nbs/index.ipynb', ROOT / 'README.md'
REPO = 'https://github.com/cf-guidance/cf_guidance'
SITE = 'https://cf-guidance.github.io/cf_guidance'
SHIELD = 'https://img.shields.io/badge'
BADGES = (
    f'[![CI]({REPO}/actions/workflows/test.yml/badge.svg)]({REPO}/actions/workflows/test.yml)',
    f'[![Docs]({SHIELD}/docs-lessons_and_reference-blue)]({SITE})',
    f'[![Licence: Apache 2.0]({SHIELD}/licence-Apache_2.0-green)]({REPO}/blob/main/LICENSE)',
)
NOTE = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook, not this file. -->'


def fence(s, lang):
    s = s.strip('\n').rstrip()
    return f'```{lang}\n{s}\n```'


def _from_root(m):
    path = m[2] if re.match(r'\w+:|#', m[2]) else posixpath.normpath('nbs/' + m[2])
    return m[1] + path


def relink(md):
    "Links of `md`, outside its code blocks, as seen from the root."
    parts = re.split(r'(^```.*?^```)', md, flags=re.M | re.S)
    return ''.join(
        p if p.startswith('```') else re.sub(r'(\]\(|(?:src|href)=")([^)"\s]+)', _from_root, p)
        for p in parts
    )


def output(o):
    "One output of a cell as Markdown."
    if o.output_type == 'stream':
        return fence(''.join(o.text), 'text')
    data = o.get('data', {})
    picture = re.search(r'<img src="([^"]+)" alt="([^"]+)">', ''.join(data.get('text/html', '')))
    if picture:  # what stands in for an explorer, which needs the site
        return relink(f'![{picture[2]}]({picture[1]})')
    if 'text/markdown' in data:
        return relink(''.join(data['text/markdown']).strip())
    if any(k.startswith('image/') for k in data):
        advice = 'save it in nbs/images and show it from a Markdown cell'
        raise SystemExit(f'{INDEX.name}: a cell has a picture as output: {advice}')
    return fence(''.join(data['text/plain']), 'text')


def cell(c):
    "The Markdown pieces of one cell."
    if c.cell_type == 'raw':
        return []
    if c.cell_type != 'code':
        return [relink(c.source.strip())]
    off = {k.rstrip(':') for k, v in c.directives_.items() if v == ['false']}
    code = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
    src = [fence(code, 'python')] if code and not off & {'echo', 'include'} else []
    return src + ([] if off & {'output', 'include'} else [output(o) for o in c.outputs])


def readme():
    "The text of README.md."
    cells = NBProcessor(INDEX, procs=[strip_ansi, hide_line, rm_export], process=True).nb.cells
    parts = [p for c in cells if c.get('source') for p in cell(c) if p]
    title, colab, *rest = parts
    return '\n\n'.join([title, NOTE, '\n'.join([*BADGES, colab]), *rest]) + '\n'


if __name__ == '__main__':
    new, old = readme(), README.read_text(encoding='utf-8') if README.exists() else ''
    if '--check' not in sys.argv:
        README.write_text(new, encoding='utf-8')
    elif new != old:
        raise SystemExit('README.md differs from nbs/index.ipynb: run `python tools/readme.py`')
