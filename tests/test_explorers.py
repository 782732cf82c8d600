"The explorers' JavaScript: its form, its numbers, and what it does in Chromium."

import re
import subprocess
from pathlib import Path

import pytest
import torch
from browser import (
    chromium,
    console_errors,
    resize,
    serve,
    sideways_scroll,
    wait_for_explorers,
    write_page,
)

from cf_guidance.lab import widgets

SOURCES = sorted((Path(widgets.__file__).parent / 'explorers').glob('*.js'))


def name(path):
    return path.stem


@pytest.mark.parametrize('path', SOURCES, ids=name)
def test_source_has_one_form(path):
    text = path.read_text(encoding='utf-8')
    lines = text.splitlines()
    assert 'console.log' not in text
    assert not [line for line in lines if len(line) > 100]
    assert not [line for line in lines if line != line.rstrip() or '\t' in line]
    assert text.startswith('//'), 'the first line says what the file is for'
    imports = [line for line in lines if re.match(r'import\b', line)]
    one_line = re.compile(r"import \{ [\w, ]+ \} from '\./\w+\.js';")
    assert not [line for line in imports if not one_line.fullmatch(line)]


@pytest.mark.parametrize('path', SOURCES, ids=name)
def test_bundle_is_a_module(path):
    check = ['node', '--input-type=module', '--check']
    r = subprocess.run(check, input=widgets.bundle(path.stem), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def scrubber():
    tiles = torch.linspace(0, 1, 3 * 5).view(3, 5, 1, 1, 1).expand(3, 5, 3, 8, 8)
    return widgets.Scrubber(tiles, range(5), {'share right': [0, 0.2, 0.5, 0.9, 1]})


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    write_page(folder, scrubber())
    with serve(folder) as url:
        yield url


@pytest.fixture(scope='module')
def driver():
    with chromium() as driver:
        yield driver


def test_page_without_a_kernel(driver, site):
    driver.get(f'{site}/index.html')
    wait_for_explorers(driver)
    assert not console_errors(driver)
    for width in (390, 1280):
        resize(driver, width)
        assert sideways_scroll(driver) <= 0
