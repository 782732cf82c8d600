"""Build the site into _docs/ without Quarto and check it: each notebook has its page, no link or picture is missing.

nbdev processes the notebooks as it does for Quarto, then smalldocs reads the same _quarto.yml.
"""

import json, os, re, shutil, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / '_docs'


def page_names(cache):
    "Take `output-file` out of the processed notebooks, which smalldocs does not read: {'00_schedules': 'schedules', ...}"
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
    "Give the pages the names that Quarto gives them, in files and in links; make nbdev's links to `url` relative"
    old = re.compile(r'\b(' + '|'.join(map(re.escape, names)) + r')\.html\b')
    for f in [
        f
        for f in site.rglob('*')
        if f.suffix in ('.html', '.json', '.xml') and 'site_libs' not in f.parts
    ]:
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


def build():
    "Build the site, give back the problems that smalldocs reports"
    from smalldocs.site import build as render

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    refresh_quarto_yml()
    cache = proc_nbs(force=True, n_workers=2)
    names = page_names(cache)
    problems = render(cache, quiet=True).warnings
    cfg = get_config()
    finish(cache / DOCS.name, names, cfg.doc_host + cfg.doc_baseurl)
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(cache / DOCS.name, DOCS)
    return problems


class Page(HTMLParser):
    "The ids and the links of a page, pictures included, and what its main part says"

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


def check(site):
    "Problems of a built site: links to files or ids that are not there, pages without content, notebooks without a page"
    pages = {p: Page(p) for p in site.rglob('*.html') if 'site_libs' not in p.parts}
    problems = []
    for p, page in pages.items():
        name = p.relative_to(site)
        if len(page.text.strip()) < 100:
            problems.append(f'{name}: the page is empty')
        for link in set(page.links):
            u = urlsplit(link)
            if u.scheme or u.netloc:
                continue
            path = unquote(u.path)
            f = (
                p
                if not path
                else site / path.lstrip('/')
                if path.startswith('/')
                else p.parent / path
            )
            f = Path(os.path.normpath(f / 'index.html' if f.is_dir() else f))
            if not f.exists():
                problems.append(f'{name}: {link} is not there')
            elif u.fragment and f in pages and unquote(u.fragment) not in pages[f].ids:
                problems.append(f'{name}: {link}: no such place on the page')
    home = set(pages[site / 'index.html'].links)
    for nb in (ROOT / 'nbs').rglob('[!_.]*.ipynb'):
        if '.ipynb_checkpoints' in nb.parts:
            continue
        rel = (
            nb.relative_to(ROOT / 'nbs')
            .with_stem(re.sub(r'^\d+[a-z]?_', '', nb.stem))
            .with_suffix('.html')
        )
        if rel.as_posix() not in home:
            problems.append(f'{rel}: the page of {nb.name} is not in the sidebar of _quarto.yml')
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
