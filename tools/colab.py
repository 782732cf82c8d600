"""Give every notebook its Colab badge and its install cell. With --check, change nothing: exit
code 1 if one is missing or old.

Both cells follow the title. The install cell does nothing outside Colab, and the site hides it.
"""

import json
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BADGE = '[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
INSTALL = """#| hide
# In Colab this cell installs the library. Elsewhere it does nothing.
import sys

if 'google.colab' in sys.modules:
    %pip install -q "cf_guidance[lab] @ git+{git_url}"
"""


def badge(path, cfg):
    "The badge of the notebook `path`, which opens that notebook in Colab."
    place = cfg['git_url'].replace('https://github.com', 'https://colab.research.google.com/github')
    return f'{BADGE}({place}/blob/{cfg["branch"]}/{path.relative_to(ROOT).as_posix()})'


def without_badge(cell):
    "The cell without its badge; None if nothing is left of it."
    text = ''.join(cell['source'])
    if not text.startswith(BADGE):
        return cell
    text = text.partition('\n')[2].lstrip()
    return {**cell, 'source': text.splitlines(keepends=True)} if text else None


def is_install(cell):
    src = ''.join(cell['source'])
    return cell['cell_type'] == 'code' and '%pip install' in src and 'cf_guidance' in src


def opened(nb, path, cfg):
    "The cells of a notebook, with its badge and its install cell after the title."
    title, *rest = nb['cells']
    rest = [without_badge(c) for c in rest if not is_install(c)]
    show = dict(cell_type='markdown', id='colab-badge', metadata={}, source=[badge(path, cfg)])
    source = INSTALL.format(git_url=cfg['git_url']).rstrip().splitlines(keepends=True)
    install = dict(
        cell_type='code',
        execution_count=None,
        id='colab-install',
        metadata={},
        outputs=[],
        source=source,
    )
    return [title, show, install, *filter(None, rest)]


def main(check):
    ini, old = ConfigParser(delimiters=['='], interpolation=None), []
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    for path in sorted((ROOT / 'nbs').rglob('[!_.]*.ipynb')):
        if '.ipynb_checkpoints' in path.parts:
            continue
        nb = json.loads(path.read_text(encoding='utf-8'))
        cells = opened(nb, path, ini['DEFAULT'])
        if cells == nb['cells']:
            continue
        old.append(path.relative_to(ROOT).as_posix())
        if not check:
            text = json.dumps({**nb, 'cells': cells}, ensure_ascii=False, indent=1, sort_keys=True)
            path.write_text(text + '\n', encoding='utf-8')
    if check and old:
        print(f'run `python tools/colab.py`: {", ".join(old)}')
    return 1 if check and old else 0


if __name__ == '__main__':
    sys.exit(main('--check' in sys.argv[1:]))
