"The galaxy explorer: its numbers are those of Python, and its page works."

from pathlib import Path

import browser
import pytest
import torch
from torch.testing import assert_close

from cf_guidance import karras, transforms
from cf_guidance.guided import GuidedDenoiser
from cf_guidance.karras import get_sigmas_karras, samples
from cf_guidance.lab import widgets
from cf_guidance.toy import galaxy

SOURCES = Path(widgets.__file__).parent / 'explorers'
STARS = galaxy()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


@pytest.fixture(scope='module')
def driver():
    with browser.chromium() as driver:
        yield driver


@pytest.fixture(scope='module')
def maths(driver, tmp_path_factory):
    "Calls a function body with the module as `m`."
    folder = tmp_path_factory.mktemp('sources')
    page = '<!doctype html><title>maths</title><link rel="icon" href="data:,">'
    (folder / 'index.html').write_text(page, encoding='utf-8')
    for path in SOURCES.glob('*.js'):
        (folder / path.name).write_text(path.read_text(encoding='utf-8'), encoding='utf-8')
    with browser.serve(folder) as url:

        def evaluate(body, *args):
            driver.get(f'{url}/index.html')
            return browser.call(
                driver, f"const m = await import('./galaxy_math.js'); {body}", *args
            )

        yield evaluate


# the mixture


def random_cases(n=200):
    g = seeded(3)
    for i in range(n):
        sigma = 10 ** (torch.rand((), generator=g).item() * 5 - 3)  # 0.001 to 100
        x = (1 + sigma) * torch.randn(8, 2, generator=g, dtype=torch.float64)
        yield dict(sigma=sigma, blur=(0.0, 0.15, 0.3)[i % 3], label=i % 4 - 1, x=x)


def as_json(case):
    return case | dict(x=case['x'].flatten().tolist())


def test_denoiser_and_density(maths):
    body = """
      return args[0].map(({ sigma, blur, label, x }) => {
        const level = m.atLevel(m.galaxy({ blur }), sigma, label), points = Float64Array.from(x);
        return [[...m.denoise(level, points)], [...m.logDensity(level, points)]];
      });"""
    cases = list(random_cases())
    for case, (x0, logp) in zip(cases, maths(body, [as_json(c) for c in cases]), strict=True):
        D, label = galaxy(blur=case['blur']), torch.tensor(case['label'])
        expected = D(case['x'], case['sigma'], labels=label)
        assert_close(torch.tensor(x0).double().view(-1, 2), expected, rtol=1e-5, atol=1e-5)
        expected = D.logp(case['x'], case['sigma'], case['label'])
        assert_close(torch.tensor(logp).double(), expected, rtol=1e-5, atol=1e-5)


def test_noise_levels(maths):
    sigmas = maths('return [2, 7, 24, 64].map((n) => m.karrasSigmas(n));')
    for n, levels in zip((2, 7, 24, 64), sigmas, strict=True):
        assert_close(torch.tensor(levels), get_sigmas_karras(n, 0.01, 10.0))


# whole runs

RUNS = [
    dict(sampler='euler', w=3.0),
    dict(sampler='heun', w=4.0, label=2),
    dict(sampler='heun', w=1.0, label=1),
    dict(sampler='heun', w=0.0, interval=[0.3, 2.0]),
    dict(sampler='dpmpp_2m', w=3.0, interval=[0.3, 2.0]),
    dict(sampler='dpmpp_2m', w=2.5, negative='blurred', blur=0.25),
    dict(sampler='heun', w=0.0, negative='blurred', blur=0.1),
    dict(sampler='euler', w=1.3, negative='other', other=2, steps=50),
    dict(sampler='heun', w=2.0, rule='base_norm'),
    # at low noise the two predictions agree, and these rules lengthen the rounding error
    dict(sampler='euler', w=0.2, rule='t_norm', interval=[0.5, 10.0]),
    dict(sampler='dpmpp_2m', w=0.15, rule='full_norm', interval=[0.5, 4.0]),
    dict(sampler='dpmpp_2m', w=6.0, rule='apg'),
    dict(sampler='heun', w=4.0, rule='apg', interval=[0.2, 3.0]),
    dict(sampler='heun', w=3.0, rule='adg'),
    dict(sampler='euler_ancestral', w=2.0),
]


def run_in_python(s, x, noise):
    "Points before each step and at the end, and evaluations per sample."
    negative = dict(
        all=dict(labels=torch.tensor([-1])),
        other=dict(labels=torch.tensor([s['other']])),
        blurred=galaxy(blur=s['blur']),
    )[s['negative']]
    rule, step = getattr(transforms, s['rule']), getattr(karras, s['sampler'])
    G = GuidedDenoiser(STARS, negative, w=s['w'], rule=rule, interval=s['interval'])
    cond, sigmas = (
        dict(labels=torch.tensor([s['label']])),
        get_sigmas_karras(s['steps'], 0.01, 10.0),
    )
    draws = iter(noise)
    run = samples(G, x, sigmas, step, cond, noise=lambda *_: next(draws))
    path = torch.stack([x, *(o for o, _ in run)])
    return path, G.nfe / len(x)


@pytest.mark.parametrize('settings', RUNS, ids=lambda s: '-'.join(map(str, s.values())))
def test_whole_run(maths, settings):
    s = dict(label=0, negative='all', other=1, blur=0.15, rule='cfg', interval=None, steps=24)
    s |= settings
    x, noise = 10 * normal(30, 2), normal(s['steps'], 30, 2, seed=1)
    body = """
      const [s, x, noise] = args, draws = noise.map((o) => Float64Array.from(o));
      const run = m.sample(s, Float64Array.from(x), () => draws.shift());
      return [run.path.map((o) => [...o]), run.evaluations];"""
    flat = noise.flatten(1).tolist()
    path, evaluations = maths(body, s, x.flatten().tolist(), flat)
    expected, nfe = run_in_python(s, x, noise)
    assert_close(torch.tensor(path).double().view(-1, 30, 2), expected, rtol=1e-4, atol=1e-4)
    assert evaluations == nfe


def test_quality(maths):
    body = """
      const [x, truth, label] = args, level = m.atLevel(m.galaxy(), 0, label);
      return m.quality(level, Float64Array.from(x), Float64Array.from(truth));"""
    true = STARS.sample(300, seeded(0), 1)
    x = STARS.sample(200, seeded(1), 1) + 0.05 * normal(200, 2)
    found = maths(body, x.flatten().tolist(), true.flatten().tolist(), 1)
    expected = STARS.quality(x, true, 1)
    assert found['density'] == pytest.approx(expected.logp)
    assert (found['outside'], found['covered']) == pytest.approx(expected[1:])
    assert 0 < found['outside'] < found['covered'] < 1


def test_its_own_samples_are_true(maths):
    body = """
      const stars = m.galaxy();
      return [0, 1, -1].map((k) => [...m.trueSamples(stars, k, 4000, m.normals(5))]);"""
    for label, x in zip((0, 1, -1), maths(body), strict=True):
        x, true = torch.tensor(x).double().view(-1, 2), STARS.sample(4000, seeded(2), label)
        assert ((x.mean(0) - true.mean(0)).abs() < 4 * (2 / 4000) ** 0.5 * true.std(0)).all()
        assert STARS.quality(x, true, label).outside == pytest.approx(0.01, abs=0.007)


def test_its_noise_is_normal(maths):
    first, again, other = maths('return [0, 0, 1].map((seed) => [...m.normals(seed).fill(20000)]);')
    x = torch.tensor(first)
    assert first == again != other
    assert x.mean().abs() < 0.03
    assert (x.std() - 1).abs() < 0.02
    assert (x.abs() > 1.96).float().mean() == pytest.approx(0.05, abs=0.006)


# the page

NEXT_FRAMES = 'await new Promise((f) => requestAnimationFrame(() => requestAnimationFrame(f)));'


@pytest.fixture
def page(driver, tmp_path):
    browser.write_page(tmp_path, widgets.Galaxy())
    with browser.serve(tmp_path) as url:
        browser.resize(driver, 1280)
        driver.get(f'{url}/index.html')
        browser.wait_for_explorers(driver)
        browser.call(driver, NEXT_FRAMES)
        yield driver


SET = """
  const [label, value] = args, el = document.querySelector('.explorer');
  const input = el.querySelector(`[aria-label^="${label}"]`);
  input.value = value;
  input.dispatchEvent(new Event(input.tagName === 'SELECT' ? 'change' : 'input'));
"""
READ = """
  const el = document.querySelector('.explorer');
  const cells = [...el.querySelectorAll('[data-row="guided"] td')].map((o) => o.textContent);
  return { cells, code: el.querySelector('pre').textContent, ms: Number(el.dataset.ms) };
"""


def set_and_read(page, label, value):
    browser.call(page, SET + NEXT_FRAMES, label, value)
    return browser.call(page, NEXT_FRAMES + READ)


def covered(state):
    return float(state['cells'][3].split()[0])


def test_coverage_falls_with_the_weight(page):
    high, low = (covered(set_and_read(page, 'Guidance weight', w)) for w in (6, 1))
    assert high < 50 < 95 < low
    assert not browser.console_errors(page)


def test_every_choice_draws(page):
    for label, values in dict(
        Negative=('other', 'blurred', 'all'),
        Class=('1', '2', '0'),
        Rule=('base_norm', 't_norm', 'full_norm', 'apg', 'adg', 'cfg'),
        Sampler=('euler', 'dpmpp_2m', 'euler_ancestral', 'heun'),
        Steps=(2, 64, 24),
        Samples=(100, 1000, 500),
    ).items():
        for value in values:
            assert 0 <= covered(set_and_read(page, label, value)) <= 100
    assert not browser.console_errors(page)


def test_keyboard_moves_the_interval(page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    upper = page.find_element(By.CSS_SELECTOR, '[aria-label^="upper end"]')
    upper.send_keys(Keys.ARROW_RIGHT * 20)
    state = browser.call(page, NEXT_FRAMES + READ)
    assert 'interval=(0.0, 3.' in state['code']
    assert float(upper.get_attribute('aria-valuenow')) == pytest.approx(10 / 1.05**20, rel=0.02)


def test_python_code_runs(page):
    set_and_read(page, 'Negative', 'blurred')
    set_and_read(page, 'Rule', 't_norm')
    code = set_and_read(page, 'Samples', 100)['code']
    names = vars(transforms) | vars(karras) | dict(torch=torch, galaxy=galaxy)
    names['GuidedDenoiser'] = GuidedDenoiser
    exec(code, names)
    assert names['x'].shape == (100, 2)
    assert names['G'].terms[0].rule is transforms.t_norm


def test_phone_and_dark(page):
    for dark in (True, False):
        browser.set_dark(page, dark)
        for width in (390, 1280):
            browser.resize(page, width)
            browser.call(page, NEXT_FRAMES)
            assert browser.sideways_scroll(page) <= 0
    assert not browser.console_errors(page)


def test_play_walks_through_the_steps(page):
    from selenium.webdriver.common.by import By

    play = page.find_element(By.XPATH, '//button[text()="Play"]')
    play.click()
    step = page.find_element(By.CSS_SELECTOR, '[aria-label="Step of the sampler"]')
    assert play.text == 'Stop'
    assert int(step.get_property('value')) < 24
    play.click()
    assert play.text == 'Play'


def test_redraw_is_fast(page):
    "About 30 ms on a quiet machine; the bound leaves room for a busy one."
    times = [set_and_read(page, 'Guidance weight', 1 + k / 4)['ms'] for k in range(20)]
    assert sorted(times)[10] < 300, times
    print(f'median redraw {sorted(times)[10]} ms')


# the Python side


def test_traits():
    from traitlets import TraitError

    g = widgets.Galaxy(w=2.0, interval=[0.3, 2.0], negative='blurred')
    assert g.props()['interval'] == [0.3, 2.0]
    assert widgets.Galaxy().interval is None
    assert 'data-explorer="galaxy"' in g.to_html()
    for name, value in dict(rule='none', interval=[1.0], w=-1, steps=0, label=3).items():
        with pytest.raises(TraitError):
            widgets.Galaxy(**{name: value})


def test_controls_are_linked():
    g = widgets.Galaxy()
    row = g.controls('w').children[0]
    row.value = 5.0
    assert g.w == 5.0
