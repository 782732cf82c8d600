"""Finish the built site. Quarto and smalldocs run it last.

Pages load KaTeX from the site and no fonts from foreign hosts; the search finds names and
headings.
"""

import json
import os
import re
from pathlib import Path

from assets import write_assets

KATEX = re.compile(r'https://cdn\.jsdelivr\.net/npm/katex@[^/"]+/dist/')


def local_katex(site):
    "Let each page load KaTeX from the site's own copy."
    for page in site.rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        up = '../' * (len(page.relative_to(site).parts) - 1)
        page.write_text(KATEX.sub(f'{up}site_libs/katex/', text), encoding='utf-8')


def no_foreign_fonts(site):
    "Leave out the fonts that the themes would load from a foreign host."
    for style in (site / 'site_libs').rglob('*.css'):
        text = style.read_text(encoding='utf-8')
        own = re.sub(r'@import url\("?https?:[^)]*\);', '', text)
        if own != text:
            style.write_text(own, encoding='utf-8')


def short_search(site):
    "Keep pages, headings and public names in the search index, and no running text."
    path = site / 'search.json'
    entries = json.loads(path.read_text(encoding='utf-8'))
    entries = [dict(e, text='') for e in entries if not re.match(r'_\w', e['section'])]
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding='utf-8')


def main():
    site = Path(os.environ['QUARTO_PROJECT_OUTPUT_DIR'])
    local_katex(site)
    no_foreign_fonts(site)
    short_search(site)
    write_assets(site)


if __name__ == '__main__':
    main()
