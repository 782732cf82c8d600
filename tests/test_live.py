"The live model in Chromium draws what the pipeline draws in Python."

import json
import shutil
import sys

import numpy as np
import pytest
import torch
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
from conftest import ROOT
from diffusers import StableDiffusionPipeline

from cf_guidance.lab import widgets
from cf_guidance.noise import randn
from cf_guidance.pipelines import embedded_path, guided
from cf_guidance.transforms import apg, cfg, full_norm, rescale, t_norm

MODEL = "document.querySelector('[data-explorer=live]').model"
PROMPT, STEPS = 'a red sneaker on a blue background', 20
FEW = 6  # steps on the page, where each change draws eleven pictures
SETTINGS = widgets.LiveModel(steps=STEPS, seed=3).props() | dict(prompt=PROMPT)
CASES = {
    'cfg': dict(),
    'no guidance': dict(w=1.0),
    'only the negative': dict(w=0.0),
    't_norm': dict(rule='t_norm', w=0.2),
    't_norm at 0': dict(rule='t_norm', w=0.0),
    'full_norm': dict(rule='full_norm', w=0.15),
    'rescale': dict(rule='rescale', w=7.5),
    'apg': dict(rule='apg', w=5.0),
    'another seed': dict(seed=123456789),
    'negative prompt': dict(negative='a green boot'),
    'interval': dict(interval=[0.3, 5.0]),
    'apg in an interval': dict(rule='apg', w=5.0, interval=[0.3, 5.0]),
    'cosine': dict(family='get_cos_sched', w=7.5, min_val=1.0, k_decay=2.0),
    'curve': dict(family='points_sched', w=5.0, curve=[[0, 0.2], [0.4, 1], [1, 0.2]]),
    'bump in an interval': dict(family='beta_sched', a=3.0, base=1.0, interval=[0.3, 5.0]),
}
# settings of each family that are not its defaults
FAMILIES = dict(
    get_cos_sched=dict(num_cycles=1.5, num_warmup_steps=3, warmup_init_val=0.5, k_decay=2.0),
    inv_kdecay_sched=dict(min_val=0.5, k_decay=0.7),
    pcs_sched=dict(kappa=2.0, base=0.5),
    beta_sched=dict(a=3.0, b=1.5),
    points_sched=dict(curve=[[0, 0.2], [0.3, 1.5], [1, 0]], kind='pchip'),
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory, exported_model):
    "What the site has in explorers/."
    sys.path.insert(0, str(ROOT / 'tools'))
    import assets

    folder = tmp_path_factory.mktemp('live')
    assets.copy_runtime(folder / 'explorers/ort')
    shutil.copytree(exported_model, folder / 'explorers/model')
    for name in ('live_engine', 'live'):
        (folder / f'explorers/{name}.js').write_text(widgets.bundle(name), encoding='utf-8')
    (folder / 'engine.html').write_text('<!doctype html><link rel="icon" href="data:,">')
    return folder


@pytest.fixture(scope='module')
def browser(folder):
    with serve(folder) as url, chromium() as driver:
        driver.set_script_timeout(120)
        driver.get(f'{url}/engine.html')
        yield driver


@pytest.fixture(scope='module')
def drawn(browser):
    "Latents and pixels of every case, from the browser."
    script = """
    const { loadEngine, weights } = await import('./explorers/live_engine.js');
    const engine = await loadEngine(new URL('./explorers/', location.href));
    const found = {};
    for (const [name, settings] of Object.entries(args[0])) {
        const ws = weights(settings, settings.steps);
        const { latents, evaluations } = await engine.sample(settings, [ws]);
        const [image] = await engine.decode(latents);
        const pixels = [...image.data];
        found[name] = { ws, latents: [...latents[0]], evaluations, pixels };
    }
    return found;
    """
    return call(browser, script, {k: SETTINGS | v for k, v in CASES.items()})


@pytest.fixture(scope='module')
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected_weights(s):
    "What the designer's Python makes of the same settings."
    names = widgets.ScheduleDesigner.settings().keys() & s.keys()
    points = [[tau, share * s['w']] for tau, share in s['curve']]
    own = dict(num_steps=s['steps'], max_val=s['w'], points=points)
    return widgets.ScheduleDesigner(**{k: s[k] for k in names} | own).ws


def expected(pipe, s):
    "Latents, pixels and network evaluations of the same picture in Python."
    ws = expected_weights(s)
    rules = dict(cfg=cfg, rescale=cfg, apg=apg, t_norm=t_norm, full_norm=full_norm)
    post = rescale if s['rule'] == 'rescale' else None
    interval = s['interval'] and tuple(s['interval'])
    sd = guided(pipe, w=ws, rule=rules[s['rule']], post=post, interval=interval)
    options = dict(negative_prompt=s['negative'], num_inference_steps=s['steps'])
    options |= dict(latents=randn((1, 4, 8, 8), s['seed']), output_type='latent')
    latents = sd(s['prompt'], **options).images
    with torch.no_grad():
        x = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0)
    return latents[0], pixels, int(sum(sd.report.nfe))


@pytest.mark.filterwarnings('ignore:NegativePrompt never guided')
@pytest.mark.parametrize('case', CASES)
def test_pictures_are_pythons(drawn, pipe, case):
    latents, pixels, nfe = expected(pipe, SETTINGS | CASES[case])
    found = drawn[case]
    torch.testing.assert_close(
        torch.tensor(found['latents']).reshape(latents.shape), latents, atol=1e-3, rtol=0
    )
    there = torch.tensor(found['pixels'], dtype=torch.float32).reshape(32, 32, 4)[..., :3]
    assert (there - pixels).abs().max() <= 1
    assert found['evaluations'] == nfe


FAKE_GPU = """
const adapter = { info: {}, features: new Set(), limits: {} };
const gpu = { requestAdapter: async () => adapter, getPreferredCanvasFormat: () => 'rgba8unorm' };
Object.defineProperty(navigator, 'gpu', { value: gpu, configurable: true });
"""
# tests run without a GPU
NO_GPU = "Object.defineProperty(navigator, 'gpu', { value: undefined, configurable: true });"


@pytest.mark.parametrize('gpu', [FAKE_GPU, NO_GPU], ids=['broken', 'none'])
def test_without_a_good_gpu_it_stays_on_the_cpu(browser, gpu):
    script = """
    const { loadEngine, weights } = await import('./explorers/live_engine.js');
    const engine = await loadEngine(new URL('./explorers/', location.href));
    const before = await engine.sample(args[0], [weights(args[0], 2)]);
    const moved = await engine.useGpu();
    const after = await engine.sample(args[0], [weights(args[0], 2)]);
    const same = before.latents[0].every((v, i) => v === after.latents[0][i]);
    const names = performance.getEntriesByType('resource').map((o) => o.name);
    return [moved, engine.isOnGpu, same, names.some((name) => name.includes('jspi'))];
    """
    browser.refresh()
    moved, on_gpu, same, loaded = call(browser, gpu + script, SETTINGS | dict(steps=2))
    assert (moved, on_gpu, same) == (False, False, True)
    assert loaded == (gpu is FAKE_GPU)  # without a GPU its runtime is not loaded


@pytest.mark.parametrize('family', widgets.LiveModel.family.values)
def test_weights_are_pythons(browser, family):
    s = SETTINGS | dict(family=family, w=5.0) | FAMILIES.get(family, {})
    script = "return (await import('./explorers/live_engine.js')).weights(...args)"
    assert call(browser, script, s, STEPS) == pytest.approx(expected_weights(s), abs=1e-6)
    peak = call(browser, script, s, STEPS, 2.0)
    assert peak == pytest.approx(expected_weights(s | dict(w=2.0)), abs=1e-6)


@pytest.mark.parametrize('seed', [0, 1, 2**31, 2**32 - 1])
def test_noise_is_pythons(browser, seed):
    script = "return [...(await import('./explorers/live_engine.js')).noise(...args)]"
    found = torch.tensor(call(browser, script, seed, 256))
    torch.testing.assert_close(found, randn((1, 256), seed)[0], atol=1e-5, rtol=1e-5)


def test_unknown_words_are_named(browser, exported_model):
    table = json.loads((exported_model / 'model.json').read_text())['tokens']
    script = "return (await import('./explorers/live_engine.js')).tokenize(...args).unknown"
    assert call(browser, script, table, 'a PINK  t-shirt, please') == ['pink', 't-shirt,', 'please']


@pytest.fixture(scope='module')
def page(folder):
    "The explorer on a page of its own, after its model has been loaded by a click."
    write_page(folder, widgets.LiveModel(w=2.0, steps=FEW), widgets.ScheduleDesigner())
    with serve(folder) as url, chromium() as driver:
        driver.get(f'{url}/index.html')
        wait_for_explorers(driver)
        driver.find_element('css selector', '.explorer button').click()
        wait_until_drawn(driver)
        yield driver


def wait_until_drawn(driver, seconds=120):
    from selenium.webdriver.support.ui import WebDriverWait

    state = "return { ...document.querySelector('.explorer').dataset }"

    def drawn(driver):
        found = driver.execute_script(state)
        return found.get('live') == 'true' and found.get('busy') == 'false'

    WebDriverWait(driver, seconds).until(drawn)


def set_model(driver, which='live', **values):
    "Set values of an explorer, as Python does in a notebook."
    script = """
    const { model } = document.querySelector(`[data-explorer=${args[1]}]`);
    for (const [name, value] of Object.entries(args[0])) model.set(name, value);
    await new Promise((f) => requestAnimationFrame(() => requestAnimationFrame(f)));
    """
    call(driver, script, values, which)
    wait_until_drawn(driver)


def shown(driver):
    "The large picture as the page shows it, (32, 32, 4)."
    script = """
    const copy = new OffscreenCanvas(32, 32).getContext('2d', { willReadFrequently: true });
    copy.drawImage(document.querySelector('.explorer canvas'), 0, 0);
    return [...copy.getImageData(0, 0, 32, 32).data];
    """
    return torch.tensor(call(driver, script), dtype=torch.float32).reshape(32, 32, 4)


def text_of(driver):
    return driver.find_element('css selector', '.explorer').text


def test_page_draws_what_python_draws(page, pipe):
    set_model(page, rule='t_norm', w=0.2, seed=5)
    _, pixels, nfe = expected(pipe, SETTINGS | dict(rule='t_norm', w=0.2, seed=5, steps=FEW))
    assert (shown(page)[..., :3] - pixels).abs().max() <= 1
    assert f'{FEW} steps, {nfe} evaluations' in text_of(page)


def test_page_has_ten_weights(page):
    set_model(page, rule='cfg', w=3.0)
    labels = [o.text for o in page.find_elements('css selector', '.explorer [role=group] > button')]
    assert labels == [f'w = {w}' for w in (0, 0.5, 1, 1.5, 2, 3, 5, 7.5, 10, 15)]


def test_tile_takes_its_weight(page):
    set_model(page, rule='cfg', w=3.0)
    page.find_elements('css selector', '.explorer [role=group] > button')[8].click()
    assert call(page, "return document.querySelector('.explorer').model.get('w')") == 10
    wait_until_drawn(page)


def test_slider_redraws(page):
    set_model(page, rule='cfg', w=3.0, seed=3)
    before = shown(page)
    slider = page.find_element('css selector', '.explorer input[type=range]')
    slider.send_keys('\ue011')  # the Home key: w = 0
    call(page, 'await new Promise((f) => setTimeout(f, 100))')
    wait_until_drawn(page)
    assert (shown(page) - before).abs().max() > 50


def test_dragged_curve_is_used(page):
    set_model(page, rule='cfg', w=3.0, family='constant')
    handle = page.find_elements('css selector', '.explorer .handle')[2]
    handle.send_keys('\ue015' * 10)  # arrow down
    wait_until_drawn(page)
    get = "return document.querySelector('.explorer').model.get(args[0])"
    assert call(page, get, 'family') == 'points_sched'
    assert call(page, get, 'curve')[2] == [0.5, 0.8]
    set_model(page, family='constant')


def test_unknown_word_is_shown(page):
    set_model(page, negative='a pink boot')
    assert 'Not known to this model: pink' in text_of(page)
    set_model(page, negative='')


def test_python_code_draws_the_picture(page, pipe):
    settings = dict(rule='apg', w=5.0, min_val=1.0, k_decay=2.0, interval=[0.3, 5.0])
    set_model(page, **settings, family='get_cos_sched', negative='a green boot', seed=7)
    code = page.find_element('css selector', '.explorer pre').get_attribute('textContent')
    exec(code, scope := {})
    image = torch.tensor(np.array(scope['image'], dtype=np.float32))
    assert (shown(page)[..., :3] - image).abs().max() <= 1
    set_model(page, rule='cfg', family='constant', interval=None, negative='')


DESIGNS = {
    'family': (
        dict(family='pcs_sched', w=4.0, kappa=2.0, num_steps=12, use_interval=True, lo=0.3, hi=5.0),
        dict(family='pcs_sched', w=4.0, kappa=2.0, steps=12, interval=[0.3, 5.0]),
    ),
    'points': (
        dict(family='points_sched', points=[[0, 1], [1, 4]], num_steps=10),
        dict(family='points_sched', curve=[[0, 0.25], [1, 1]], w=4, kind='pchip', steps=10),
    ),
    'warm-up and clamp': (
        dict(family='constant', w=8.0, num_steps=3, warmup=1, warmup_start=2.0),
        dict(family='points_sched', curve=[[0, 0.25], [1 / 3, 1], [2 / 3, 1], [1, 1]], w=8),
    ),
}


@pytest.mark.parametrize('case', DESIGNS)
def test_designer_sends_its_schedule(page, case):
    design, found = DESIGNS[case]
    design = widgets.ScheduleDesigner().props() | design
    set_model(page, which='schedule', **design)
    page.find_element('xpath', '//button[text()="Use in the live model"]').click()
    call(page, 'await new Promise((f) => setTimeout(f, 100))')
    wait_until_drawn(page)
    for name, value in found.items():
        assert call(page, f'return {MODEL}.get(args[0])', name) == value, name
    ws = widgets.ScheduleDesigner(**design | dict(use_interval=False)).ws
    script = f"return (await import('./explorers/live_engine.js')).weights(args[0], {len(ws)})"
    names = list(SETTINGS)
    settings = call(
        page, f'return Object.fromEntries(args[0].map((o) => [o, {MODEL}.get(o)]))', names
    )
    assert call(page, script, settings) == pytest.approx(ws, abs=1e-6)
    set_model(page, **{k: v for k, v in SETTINGS.items() if k != 'prompt'} | dict(steps=FEW))


def test_page_answers_while_it_draws(page):
    script = """
    const { model } = document.querySelector('.explorer');
    const frame = document.querySelector('.explorer').dataset;
    model.set('seed', 11);
    let [gap, last] = [0, performance.now()];
    do {
        await new Promise((f) => setTimeout(f, 0));
        gap = Math.max(gap, performance.now() - last);
        last = performance.now();
    } while (frame.busy === 'true');
    return gap;
    """
    assert call(page, script) < 300  # milliseconds; the ten weights of a step take longer


@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1280])
def test_page_fits(page, width, theme):
    resize(page, width)
    call(page, f"document.body.className = 'quarto-{theme}'")
    call(page, 'await new Promise((f) => setTimeout(f, 100))')
    assert sideways_scroll(page) <= 0
    errors = console_errors(page)
    assert not [o for o in errors if 'No available adapters' not in o]  # of the GPU
