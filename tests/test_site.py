"What the two scripts around the site's build do to notebooks and pages."

import json
import sys

import pytest
from conftest import ROOT
from fastcore.docments import ShowDocRenderer

sys.path.insert(0, str(ROOT / 'tools'))

import assets
import finish
import prepare


def blend(
    a: int,  # first `number`
    b: tuple = (1, 2),  # a * b
    *rest,
) -> float:  # the mean
    "Blend two numbers."


def test_signature_fits_in_one_line():
    call = prepare.signature('blend', ShowDocRenderer(blend))
    assert call == 'blend(a: int, b: tuple = (1, 2), *rest) -> float'


def test_long_signature_is_wrapped():
    call = prepare.signature('blend' * 12, ShowDocRenderer(blend)).splitlines()
    assert call[1:] == ['    a: int, b: tuple = (1, 2), *rest,', ') -> float']


def test_long_default_is_left_out():
    assert prepare.spaced(f'a:str={"x" * 60!r}') == 'a: str = ...'


def test_parameters_become_a_list_in_which_stars_are_stars():
    text = prepare.explained(ShowDocRenderer(blend))
    items = ['- `a`: first `number`', r'- `b`: a \* b', '- Returns the mean']
    assert text.splitlines()[1:-1] == items


@pytest.mark.parametrize('name', ['_f', '_Loop.pack', 'Loop._pack'])
def test_private_names(name):
    assert prepare.is_private(name)


@pytest.mark.parametrize('name', ['f', 'Loop.pack', 'Loop.__call__'])
def test_public_names(name):
    assert not prepare.is_private(name)


def code(text, *outputs):
    return dict(cell_type='code', source=text, outputs=list(outputs))


FIGURE = dict(data={'image/png': ''})
SOURCE = '#| code-fold: show\n#| code-summary: "Exported source"\n'


@pytest.mark.parametrize(
    'tree, cell, fold',
    [
        ('lessons', code('x = 1'), 'true'),
        ('lessons', code('#| code-fold: false\nx = 1'), 'false'),
        ('use', code('x = 1'), 'false'),
        ('reference', code('x = 1'), 'false'),
        ('reference', code('x.plot()', FIGURE), 'true'),
        ('reference', code('assert x'), 'true'),
        ('reference', code(SOURCE + 'def f(): ...'), 'true'),
    ],
)
def test_code_is_folded_by_tree(tree, cell, fold):
    assert prepare.options(prepare.folded(cell, tree)['source'])['code-fold'] == fold


def test_sources_of_private_names_are_left_out():
    assert prepare.folded(code(SOURCE + 'def _f(): ...'), 'reference') is None


@pytest.mark.parametrize(
    ('file', 'text', 'change', 'expected'),
    [
        (
            'lessons/a.html',
            'src="https://cdn.jsdelivr.net/npm/katex@0.16.11/dist/katex.min.js"',
            finish.local_katex,
            'src="../site_libs/katex/katex.min.js"',
        ),
        (
            'site_libs/a.css',
            '@import url(https://fonts.example.org/css?w=300;400);body{}',
            finish.no_foreign_fonts,
            'body{}',
        ),
    ],
)
def test_pages_load_nothing_from_other_hosts(file, text, change, expected, tmp_path):
    page = tmp_path / file
    page.parent.mkdir()
    page.write_text(text)
    change(tmp_path)
    assert page.read_text() == expected


def test_search_finds_names_and_headings_only(tmp_path):
    entries = [dict(section='Rule', text='code'), dict(section='_Loop.pack', text='')]
    (tmp_path / 'search.json').write_text(json.dumps(entries))
    finish.short_search(tmp_path)
    found = json.loads((tmp_path / 'search.json').read_text())
    assert found == [dict(section='Rule', text='')]


def test_versions_of_npm_packages_are_exact():
    versions = json.loads((ROOT / 'tools/package.json').read_text())['dependencies'].values()
    assert all(v.replace('.', '').isdigit() for v in versions)


def test_every_explorer_is_one_module(tmp_path):
    assets.write_explorers(tmp_path)
    modules = {p.stem: p.read_text(encoding='utf-8') for p in (tmp_path / 'explorers').glob('*.js')}
    assert {'site', 'schedule', 'galaxy', 'scrubber'} <= modules.keys()
    assert not [k for k, v in modules.items() if '\nimport ' in v]
