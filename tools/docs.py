"""Build the site into _docs/ without Quarto, and check its pages, links and pictures.

nbdev processes the notebooks as it does for Quarto, then smalldocs reads the same _quarto.yml.
"""

import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / '_docs'
FOR_QUARTO = (
    'grid is ignored',
    'html-math-method is ignored',
)  # keys that smalldocs has no use for


def page_names(cache):
    """Names of the pages, {'00_schedules': 'schedules', ...}, from the notebooks' `output-file`.

    smalldocs does not know that option, so it is taken out of the processed notebooks.
    """
    names = {}
    for nb in cache.rglob('*.ipynb'):
        d = json.loads(nb.read_text(encoding='utf-8'))
        head = ''.join(d['cells'][0]['source'])
        found = re.search(r'^output-file: (.*)\.html\n', head, flags=re.M)
        if not found:
            continue
        names[nb.stem] = found[1]
        d['cells'][0]['source'] = head.replace(found[0], '')
        nb.write_text(json.dumps(d), encoding='utf-8')
    return {k: v for k, v in names.items() if k != v}


def finish(site, names, url):
    "Name the pages as Quarto does, in files and links; make nbdev's links to `url` relative."
    old = re.compile(r'\b(' + '|'.join(map(re.escape, names)) + r')\.html\b')
    files = [f for f in site.rglob('*') if f.suffix in ('.html', '.json', '.xml')]
    for f in [f for f in files if 'site_libs' not in f.parts]:
        text = f.read_text(encoding='utf-8')
        if names:
            text = old.sub(lambda m: names[m[1]] + '.html', text)
        if f.suffix == '.html':
            text = text.replace(
                f'href="{url}/', 'href="' + '../' * (len(f.relative_to(site).parts) - 1)
            )
        f.write_text(text, encoding='utf-8')
        if f.suffix == '.html' and f.stem in names:
            f.rename(f.with_stem(names[f.stem]))


def unlink_hidden(site):
    "Take away links of nbdev to symbols that their page does not show, such as helpers."
    pages = {p: p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    ids = {p: Page(p).ids for p in pages}
    link = re.compile(r'<a href="([^"#]*)#([^"]+)" target="_blank">(<code>[^<]*</code>)</a>')
    for p, text in pages.items():

        def keep(m, p=p):
            f = target(site, p, m[1])
            return m[0] if unquote(m[2]) in ids.get(f, [unquote(m[2])]) else m[3]

        p.write_text(link.sub(keep, text), encoding='utf-8')


def build():
    "Build the site and return the problems that smalldocs reports."
    from smalldocs.site import build as render

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    refresh_quarto_yml()
    cache = proc_nbs(force=True, n_workers=2)
    names = page_names(cache)
    problems = [w for w in render(cache, quiet=True).warnings if not w.endswith(FOR_QUARTO)]
    cfg = get_config()
    finish(cache / DOCS.name, names, cfg.doc_host + cfg.doc_baseurl)
    unlink_hidden(cache / DOCS.name)
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(cache / DOCS.name, DOCS)
    return problems


class Page(HTMLParser):
    "The ids of a page, its links and pictures, and the text of its main part."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.text = set(), [], ''
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]
        if tag == 'main':
            self.text = ''

    def handle_data(self, data):
        self.text += data


def target(site, page, path):
    "The file that the link `path` on `page` leads to."
    if not path:
        return page
    f = site / path.lstrip('/') if path.startswith('/') else page.parent / path
    return Path(os.path.normpath(f / 'index.html' if f.is_dir() else f))


def bad_links(site, pages):
    "Links to files or ids that do not exist."
    for p, page in pages.items():
        for link in sorted(set(page.links)):
            u = urlsplit(link)
            if u.scheme or u.netloc:
                continue
            f = target(site, p, unquote(u.path))
            if not f.exists():
                yield f'{p.relative_to(site)}: {link} does not exist'
            elif u.fragment and f in pages and unquote(u.fragment) not in pages[f].ids:
                yield f'{p.relative_to(site)}: {link}: the page has no such section'


def missing_pages(home):
    "Notebooks whose page is not in the sidebar, which the page `home` shows."
    nbs = ROOT / 'nbs'
    for nb in nbs.rglob('[!_.]*.ipynb'):
        if '.ipynb_checkpoints' not in nb.parts:
            stem = re.sub(r'^\d+[a-z]?_', '', nb.stem)
            page = nb.relative_to(nbs).with_name(f'{stem}.html').as_posix()
            if page not in home.links:
                yield f'{page}: the page of {nb.name} is not in the sidebar of _quarto.yml'


def check(site):
    "The number of pages of a built site, and its problems."
    pages = {p: Page(p) for p in site.rglob('*.html') if 'site_libs' not in p.parts}
    empty = [p for p, page in pages.items() if len(page.text.strip()) < 100]
    problems = [f'{p.relative_to(site)}: the page is empty' for p in empty]
    problems += [*bad_links(site, pages), *missing_pages(pages[site / 'index.html'])]
    return len(pages), problems


def main():
    problems = build()
    n, more = check(DOCS)
    problems = sorted(set(problems + more))
    print(*problems, sep='\n') if problems else None
    print(f'{n} pages in {DOCS.name}/, {len(problems)} problems')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
