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
    set_dark,
    sideways_scroll,
    wait_for_explorers,
    write_page,
)
from conftest import NBS
from selenium.webdriver import ActionChains, Keys

from cf_guidance import schedules, transforms
from cf_guidance.guided import Conditions, GuidedDenoiser
from cf_guidance.karras import on_sigmas
from cf_guidance.lab import widgets
from cf_guidance.toy import galaxy

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


def scrubber(**settings):
    tiles = torch.linspace(0, 1, 3 * 5).view(3, 5, 1, 1, 1).expand(3, 5, 3, 8, 8)
    curves = {'share right': [0, 0.2, 0.5, 0.9, 1]}
    marks = [[i > row for i in range(5)] for row in range(3)]
    return widgets.Scrubber(tiles, range(5), curves, marks=marks, labels=list('abc'), **settings)


def explorers():
    "One of each kind, by name."
    return {
        'schedule': widgets.ScheduleDesigner(),
        'drawn': widgets.ScheduleDesigner(family='points_sched', use_interval=True),
        'rules': widgets.RuleGeometry(),
        'scrubber': scrubber(),
    }


NAMES = list(explorers())


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    for name, widget in explorers().items():
        for theme in ('light', 'dark'):
            write_page(folder, widget, theme=f'quarto-{theme}', name=f'{name}_{theme}.html')
    with serve(folder) as url:
        yield url


@pytest.fixture(scope='module')
def driver():
    with chromium() as driver:
        yield driver


@pytest.fixture
def opened(driver, site):
    "Open the page of an explorer."

    def open_page(name, theme='light', width=1280):
        resize(driver, width)
        driver.get(f'{site}/{name}_{theme}.html')
        wait_for_explorers(driver)
        settle(driver)
        return driver

    return open_page


def settle(driver):
    "Two frames later, when everything is drawn."
    frame = 'await new Promise(requestAnimationFrame);'
    call(driver, frame * 3)


def value(driver, name):
    return driver.execute_script(
        "return document.querySelector('.explorer').model.get(arguments[0])", name
    )


def put(driver, **values):
    "Set values as the kernel does, which changes the model from outside."
    script = """
      const { model } = document.querySelector('.explorer');
      for (const [name, value] of Object.entries(args[0])) model.set(name, value);
    """
    call(driver, script, values)
    settle(driver)


def count_saves(driver):
    script = """
      window.saves = 0;
      document.querySelector('.explorer').model.on('saved', () => window.saves++);
    """
    driver.execute_script(script)
    return lambda: driver.execute_script('return window.saves')


def find(driver, css):
    return driver.find_element('css selector', css)


def drag(driver, css, dx, dy):
    ActionChains(driver).drag_and_drop_by_offset(find(driver, css), dx, dy).perform()
    settle(driver)


def press(driver, css, *keys):
    driver.execute_script('document.querySelector(arguments[0]).focus()', css)
    ActionChains(driver).send_keys(*keys).perform()
    settle(driver)


# What a reader sees and what assistive technology reads.
UNNAMED = """
  const named = (o) => o.getAttribute('aria-label') || o.labels?.length || o.textContent.trim();
  const all = document.querySelectorAll('.explorer :is(input, select, button, [tabindex])');
  return [...all].filter((o) => !named(o)).map((o) => o.outerHTML);
"""
OUTSIDE = """
  const frame = document.querySelector('.explorer').getBoundingClientRect();
  const scrolls = (o) => o.closest('.scroll, pre');
  const wide = (o) => o.getBoundingClientRect().right > frame.right + 1;
  const shown = [...document.querySelectorAll('.explorer *')].filter((o) => !scrolls(o));
  return shown.filter((o) => !o.closest('[clip-path], defs') && wide(o)).map((o) => o.outerHTML);
"""
SMALL_TEXT = """
  const all = [...document.querySelectorAll('.explorer *')].filter((o) => o.textContent.trim());
  return all.filter((o) => parseFloat(getComputedStyle(o).fontSize) < 11).map((o) => o.outerHTML);
"""


@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('name', NAMES)
def test_page_without_a_kernel(opened, name, theme, width):
    driver = opened(name, theme, width)
    assert not console_errors(driver)
    assert sideways_scroll(driver) <= 0
    for script in (UNNAMED, OUTSIDE, SMALL_TEXT):
        assert not driver.execute_script(script)
    dark = driver.execute_script("return !!document.querySelector('.explorer-dark')")
    assert dark == (theme == 'dark')


def test_theme_follows_the_page(opened):
    driver = opened('rules')
    driver.execute_script("document.body.className = 'quarto-dark'")
    settle(driver)
    assert find(driver, '.explorer-dark')


def test_theme_follows_the_system_where_the_page_says_nothing(opened):
    driver = opened('rules')
    driver.execute_script("document.body.className = ''")
    try:
        set_dark(driver, True)
        settle(driver)
        assert find(driver, '.explorer-dark')
    finally:
        set_dark(driver, False)


def test_slider_and_model_move_each_other(opened):
    driver = opened('schedule')
    saves = count_saves(driver)
    put(driver, max_val=3.5)
    assert find(driver, '[data-number=max_val] [type=number]').get_property('value') == '3.5'
    assert 'max_val=3.5' in find(driver, 'pre').text
    assert saves() == 0  # what the kernel sets is not sent back
    press(driver, '[data-number=max_val] [type=range]', Keys.ARROW_RIGHT)
    assert value(driver, 'max_val') == pytest.approx(3.55)
    assert saves() == 1


def test_typed_number_may_be_beyond_the_slider(opened):
    driver = opened('schedule')
    css = '[data-number=max_val] [type=number]'
    driver.execute_script('document.querySelector(arguments[0]).select()', css)
    press(driver, css, '35', Keys.TAB)
    assert value(driver, 'max_val') == 35
    assert 'max_val=35' in find(driver, 'pre').text


def test_points_are_dragged_moved_by_keys_added_and_removed(opened):
    driver = opened('drawn')
    before = value(driver, 'points')
    saves = count_saves(driver)
    drag(driver, 'svg .handle:nth-child(2)', 20, -15)
    moved = value(driver, 'points')
    assert moved[1][0] > before[1][0] and moved[1][1] > before[1][1]
    assert [moved[i] for i in (0, 2, 3)] == [before[i] for i in (0, 2, 3)]
    assert saves() > 0
    press(driver, 'svg .handle:nth-child(2)', Keys.ARROW_DOWN)
    assert value(driver, 'points')[1][1] == pytest.approx(moved[1][1] - 0.1, abs=0.011)
    driver.find_element('xpath', '//button[text()="Add a point"]').click()
    settle(driver)
    assert len(value(driver, 'points')) == 5
    press(driver, 'svg .handle:nth-child(2)', Keys.DELETE)
    assert len(value(driver, 'points')) == 4
    assert len(driver.find_elements('css selector', 'svg .handle[aria-label^=point]')) == 4


def test_curve_of_a_family_becomes_points(opened):
    driver = opened('schedule')
    find(driver, 'button').click()
    settle(driver)
    assert value(driver, 'family') == 'points_sched'
    assert value(driver, 'points')[0] == [0, 7.5]


def test_interval_is_dragged(opened):
    driver = opened('drawn')
    lo, hi = value(driver, 'lo'), value(driver, 'hi')
    drag(driver, '[aria-label^="lower end"]', -40, 0)
    assert lo < value(driver, 'lo') < hi == value(driver, 'hi')
    press(driver, '[aria-label^="upper end"]', Keys.ARROW_UP)
    assert value(driver, 'hi') > hi


def test_arrow_of_a_prediction_is_dragged(opened):
    driver = opened('rules')
    drag(driver, '[aria-label="positive prediction"]', -30, -20)
    x, y = value(driver, 'pos')
    assert x < 1.3 and y > 0.9
    press(driver, '[aria-label="negative prediction"]', Keys.ARROW_UP)
    assert value(driver, 'neg') == pytest.approx([1.5, -0.35])
    find(driver, 'td input').click()
    assert 'cfg' not in value(driver, 'rules')


def test_pictures_flip_with_the_value(opened):
    driver = opened('scrubber')
    tile = find(driver, '.tile')
    before = tile.value_of_css_property('background-position')
    press(driver, 'input[type=range]', Keys.ARROW_LEFT)
    assert value(driver, 'index') == 1
    assert tile.value_of_css_property('background-position') != before
    assert '1 of 3 right' in find(driver, '.explorer').text
    drag(driver, 'svg .handle', 200, 0)
    assert value(driver, 'index') > 1
    put(driver, index=4)
    assert 'G = 4' in find(driver, '.now').text


def test_explorer_cleans_up(opened):
    driver = opened('rules')
    script = """
      const { localModel } = await import(new URL('explorers/site.js', location));
      const { default: explorer } = await import(new URL('explorers/rules.js', location));
      const model = localModel({});
      let listening = 0;
      const { on, off } = model;
      model.on = (...o) => { listening++; on(...o); };
      model.off = (...o) => { listening--; off(...o); };
      const el = document.createElement('div');
      document.body.append(el);
      const cleanup = explorer.render({ model, el });
      const during = listening;
      cleanup();
      return [during > 5, listening];
    """
    assert call(driver, script) == [True, 0]


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


def test_defaults_equal_python(sources, driver):
    for file, cls in (
        ('schedule_design', widgets.ScheduleDesigner),
        ('rule_plane', widgets.RuleGeometry),
    ):
        with serve(SOURCES[0].parent) as url:
            driver.get(f'{url}/site.js')
            defaults = call(driver, 'return (await import(args[0])).DEFAULTS', f'{url}/{file}.js')
        assert defaults == cls().props()


def test_intervals_equal_python(driver):
    with serve(SOURCES[0].parent) as url:
        driver.get(f'{url}/site.js')
        script = 'return (await import(args[0])).INTERVALS'
        intervals = call(driver, script, f'{url}/schedule_math.js')
    expected = {k: (*v['interval'], v['w']) for k, v in schedules.INTERVALS.items()}
    assert {k: (v['lo'], v['hi'], v['w']) for k, v in intervals.items()} == expected


def test_cost_is_what_a_guided_denoiser_counts():
    designer = widgets.ScheduleDesigner(num_steps=12, family='linear_sched', use_interval=True)
    designer.set_trait('w', 5.0)
    sigmas = designer.noise_levels(12) + [0.0]
    every_class = Conditions(dict(labels=torch.tensor([-1])))
    guided = GuidedDenoiser(galaxy(), every_class, w=on_sigmas(designer.ws, sigmas))
    for sigma in sigmas[:-1]:
        guided(torch.zeros(1, 2), torch.tensor([sigma]), labels=torch.tensor([0]))
    assert guided.nfe == designer.nfe < 24


# Pairs of predictions, random ones and those where something is zero, equal or parallel.
def vector(rng, n=2):
    return [round(rng.gauss(0, 2), 3) for _ in range(n)]


def pairs(n):
    rng = random.Random(n)
    a, b = vector(rng, n), vector(rng, n)
    zero, minus = [0.0] * n, [-v for v in a]
    special = [(zero, a), (a, zero), (zero, zero), (a, a), (a, minus), (a, [2 * v for v in a])]
    return [(a, b), *special, *((vector(rng, n), vector(rng, n)) for _ in range(40))]


WEIGHTS = [-1, 0, 0.3, 1, 2, 7.5, 15]
RULES = {
    'cfg': 'cfg',
    'base_norm': 'baseNorm',
    't_norm': 'tNorm',
    'full_norm': 'fullNorm',
    'adg': 'adg',
}


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('n', [2, 5])
def test_rule_equals_python(sources, rule, n):
    cases = [(neg, pos, w) for neg, pos in pairs(n) for w in WEIGHTS]
    results = sources('rule_math', RULES[rule], cases)
    for (neg, pos, w), js in zip(cases, results, strict=True):
        pred = getattr(transforms, rule)(*torch.tensor([[neg], [pos]], dtype=torch.float64), w)
        assert js == pytest.approx(pred[0].tolist(), abs=1e-6), (neg, pos, w)


@pytest.mark.parametrize('settings', [{}, dict(eta=0.5, radius=1.5, beta=-0.75), dict(beta=0)])
def test_apg_equals_python_over_two_steps(sources, settings):
    cases = [(neg, pos, w) for neg, pos in pairs(2) for w in WEIGHTS]
    first = sources('rule_math', 'apg', [[*case, None, settings] for case in cases])
    states = [state for _, state in first]
    more = [[pos, neg, w, s, settings] for (neg, pos, w), s in zip(cases, states, strict=True)]
    second = sources('rule_math', 'apg', more)
    for (neg, pos, w), (one, _), (two, _) in zip(cases, first, second, strict=True):
        neg, pos = torch.tensor([[neg], [pos]], dtype=torch.float64)
        pred, state = transforms.apg(neg, pos, w, **settings)
        assert one == pytest.approx(pred[0].tolist(), abs=1e-6), (neg, pos, w)
        pred, state = transforms.apg(pos, neg, w, state, **settings)
        assert two == pytest.approx(pred[0].tolist(), abs=1e-6), (neg, pos, w)


@pytest.mark.parametrize('n', [2, 5])
def test_rescale_equals_python(sources, n):
    cases = [(pred, pos, phi) for pred, pos in pairs(n) for phi in (0, 0.7, 1)]
    cases.append(([1.0] * n, [2.0, 1.0, 0.0, 0.0, 0.0][:n], 0.7))  # no contrast
    results = sources('rule_math', 'rescale', cases)
    for (pred, pos, phi), js in zip(cases, results, strict=True):
        out = transforms.rescale(*torch.tensor([[pred], [pos]], dtype=torch.float64), phi=phi)
        assert js == pytest.approx(out[0].tolist(), abs=1e-6), (pred, pos, phi)


def test_geometry_equals_python(sources):
    cases = []
    for i, (neg, pos) in enumerate(pairs(2)):
        rng = random.Random(i)
        numbers = dict(w=rng.choice(WEIGHTS), w_t=rng.uniform(0, 2), phi=rng.random())
        numbers |= dict(eta=rng.random(), radius=rng.choice([0, 1.0]), most=rng.uniform(0, 3))
        cases.append(dict(neg=neg, pos=pos, **{k: float(v) for k, v in numbers.items()}))
    results = sources('rule_plane', 'predictions', [[c] for c in cases])
    for case, js in zip(cases, results, strict=True):
        expected = widgets.RuleGeometry(**case).predictions()
        for k in expected:
            assert js[k] == pytest.approx(expected[k], abs=1e-6), (k, case)


@pytest.mark.parametrize('nb', NBS, ids=lambda path: path.stem)
def test_stored_outputs_hold_only_settings(nb):
    "An explorer's HTML in a notebook has its settings, and not the program."
    text = nb.read_text(encoding='utf-8')
    assert '_esm&quot;' not in text, 'run the notebook again'
