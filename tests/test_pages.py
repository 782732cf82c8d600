"""The check of the site's pages finds each fault that it looks for.

Every broken page is the good page with one thing changed.
"""

import sys

from browser import find_chromium
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'tools'))

PICTURE = 'data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='
BADGE = f'<img alt="Open in Colab" src="{PICTURE}">'
GOOD = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A page</title>
<meta name="viewport" content="width=device-width">
<meta name="description" content="a page"><meta name="author" content="us">
<meta property="og:image" content="x.png"><link rel="icon" href="{PICTURE}">
<style>
body {{ margin: 0 }} pre {{ overflow-x: auto; font-size: 12px; width: min(900px, 100%) }}
@media (prefers-color-scheme: dark) {{ html {{ background: #111 }}
  body {{ background: #111; color: #eee }} }}
</style></head><body>
<main><h1 id="top">A page</h1><p class="date">today <span class="reading-time">1 min</span></p>
<p>{BADGE} Some text. <span class="math"><span class="katex">x</span></span></p>
<pre class="cell-code"><code>x = 1</code></pre></main></body></html>"""
WIDE = '<div style="width: 1500px; height: 9px; background: red"></div>'
TABLE = (
    '<div style="overflow-x: auto"><table><tr><td><div style="width: 3000px">x</div></table></div>'
)
SEARCH = '<nav class="navbar"><ul class="navbar-nav">{}</ul><input id="quarto-search"></nav>'

# page: the fault that the check must find, what is changed, and what it becomes
BROKEN = {
    'sideways': ('sideways', '</main>', f'{WIDE}</main>'),
    'overflow': ('overflow', '</main>', f'<div style="overflow: clip">{WIDE}</div></main>'),
    'long_line': ('long line', 'x = 1', 'x = 1' * 50),
    'narrow_code': ('narrow code', 'min(900px, 100%)', '300px'),
    'tall': ('tall', '</main>', '<p style="height: 31000px">x</p></main>'),
    'search': ('search box', '<main>', '<nav class="navbar"></nav><main>'),
    'navbar': ('navbar', '<main>', SEARCH.format('<i class="menu-text">x</i>' * 6) + '<main>'),
    'picture': ('broken picture', '</main>', '<img alt="x" src="none.png"></main>'),
    'alt': ('no alt text', '</main>', f'<img src="{PICTURE}"></main>'),
    'canvas': ('no alt text', '</main>', '<canvas></canvas></main>'),
    'formula': ('formula', '<span class="katex">x</span>', 'x'),
    'katex_error': ('formula', '</main>', '<b class="katex-error" title="no">x</b></main>'),
    'tex': ('raw TeX', 'Some text', r'The weight $w_\min$'),
    'markdown': ('raw Markdown', 'Some text', 'A [link](https://example.org)'),
    'heading': ('heading twice', '</main>', '<h2>KID</h2><h3>KID</h3></main>'),
    'private': ('private name', '</main>', '<h3>_Loop.pack</h3></main>'),
    'no_image': ('missing', '<meta property="og:image" content="x.png">', ''),
    'no_badge': ('no badge', BADGE, ''),
    'contrast': ('contrast', 'Some text', '<b style="color: #888; background: #999">text</b>'),
    'dark': ('colours', 'prefers-color-scheme: dark', 'max-width: 1px'),
    'explorer': ('explorer', '</main>', '<p data-explorer="x" data-state="failed">x</p></main>'),
    'console': ('console', '</main>', '<script>throw Error("x")</script></main>'),
    'host': ('other host', '</head>', '<script src="https://example.org/x.js"></script></head>'),
    'link': ('broken link', '</main>', '<a href="nowhere.html">x</a></main>'),
    'anchor': ('broken link', '</main>', '<a href="good.html#nowhere">x</a></main>'),
}


def test_each_fault_is_found_and_a_good_page_passes(tmp_path):
    "One test, since a browser opens all pages."
    find_chromium()
    from check_pages import check

    (tmp_path / 'good.html').write_text(GOOD.replace('</main>', f'{TABLE}</main>'), 'utf-8')
    for page, (_, old, new) in BROKEN.items():
        assert old in GOOD, page
        (tmp_path / f'{page}.html').write_text(GOOD.replace(old, new), encoding='utf-8')
    problems, facts = check(tmp_path, tmp_path / 'pictures', patience=0.1)
    assert len(list((tmp_path / 'pictures').iterdir())) == 4 * len(facts)
    kinds = {page: set() for page in facts}
    for page, _, kind, _ in problems:
        kinds[page].add(kind)
    missed = {page for page, (kind, *_) in BROKEN.items() if kind not in kinds[f'{page}.html']}
    assert not missed
    # the good page could be found wrong too early
    assert not check(tmp_path, None, ['good.html'])[0]
