"The explorers' JavaScript: its form, its numbers, and what it does in Chromium."

import json
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch
import traitlets
from browser import (
    call,
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


@pytest.fixture(scope='module')
def sources(driver):
    "Call a function of the sources: sources('schedule_math', 'getCosSched', {...})."
    with serve(SOURCES[0].parent) as url:

        def run(file, function, calls):
            "The result of the function for each list of arguments; numbers beyond JSON as text."
            driver.get(f'{url}/site.js')  # any page of this server
            script = """
              const [file, name, calls] = args;
              const module = await import(file);
              const plain = (k, v) => (typeof v === 'number' && !isFinite(v) ? String(v) : v);
              return JSON.stringify(calls.map((o) => module[name](...o)), plain);
            """
            return json.loads(call(driver, script, f'{url}/{file}.js', function, calls))

        yield run


def random_number(rng, trait):
    low, high, step = trait.metadata['range']
    if rng.random() < 0.3:
        return rng.choice([low, high, min(max(1, low), high), trait.default_value])
    return rng.randint(low, high) if step == 1 else round(rng.uniform(low, high), 3)


def random_settings(seed):
    "Settings of the designer, corner cases among them."
    rng = random.Random(seed)
    values = {}
    for k, trait in widgets.ScheduleDesigner.settings().items():
        if isinstance(trait, traitlets.Enum):
            values[k] = rng.choice(trait.values)
        elif isinstance(trait, traitlets.Bool):
            values[k] = rng.random() < 0.3
        elif k != 'points':
            values[k] = random_number(rng, trait)
    taus = rng.sample([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], rng.randint(1, 7))
    values['points'] = [[tau, rng.choice([0, 1, 5, round(rng.uniform(-5, 20), 3)])] for tau in taus]
    values['cycles'] = rng.choice([1, 1, 1, 2, 3])
    values['low'], values['high'] = sorted((values['low'], values['high']))
    values['lo'], values['hi'] = sorted((values['lo'], values['lo'] + values['hi']))
    return {k: type(v)(v) for k, v in values.items()}


SETTINGS = [random_settings(seed) for seed in range(200)]


def test_designer_equals_python(sources):
    results = sources('schedule_design', 'designed', [[s] for s in SETTINGS])
    for s, js in zip(SETTINGS, results, strict=True):
        designer = widgets.ScheduleDesigner(**s)
        assert js['ws'] == pytest.approx(designer.ws, rel=1e-9, abs=1e-6), s
        levels = designer.noise_levels(len(designer.ws))
        assert js['sigmas'] == pytest.approx(levels, rel=1e-6), s
        assert js['nfe'] == designer.nfe, s


def test_designers_python_gives_its_weights(sources):
    results = sources('schedule_design', 'designed', [[s] for s in SETTINGS])
    codes = sources('schedule_design', 'pythonCode', [[s] for s in SETTINGS])
    for code, js in zip(codes, results, strict=True):
        names = {}
        exec(code, names)
        assert names['ws'] == pytest.approx(js['ws'], rel=1e-9, abs=1e-6), code
        assert max(map(len, code.splitlines())) <= 100, code
