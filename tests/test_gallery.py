"The page of a gallery: what is written, and what it does in Chromium, opened from the disk."

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from browser import call, chromium, console_errors, resize, set_dark, sideways_scroll
from PIL import Image
from selenium.webdriver import ActionChains, Keys

from cf_guidance.lab import gallery as module
from cf_guidance.lab.gallery import gallery, repeat_line
from cf_guidance.lab.plan import Sweep
from cf_guidance.lab.store import Store

EVIL = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"> </script>'


def request_of(prompt='a red sneaker', seed=0, w=7.5, **changes):
    "A request as a plan has it."
    term = dict(
        negative=dict(name='prompt', prompt=''),
        rule=dict(name='cfg'),
        weights=[w] * 4,
        interval=None,
        stop=None,
    )
    return {
        'model': dict(name='fashion-sd', fingerprint='0123'),
        'prompt': prompt,
        'seed': seed,
        'terms': [{**term, **changes.pop('term', {})}],
        'post': [],
        'scheduler': dict(name='DDIMScheduler'),
        'sigmas': [9.0, 3.0, 1.0, 0.3, 0.0],
        'steps': 4,
        'eta': 0.0,
        'size': None,
        'dtype': 'float32',
        'device': 'cpu',
        'backend': 'torch',
        'code': 1,
        **changes,
    }


def tile(i, size=(8, 8)):
    "A picture that no other number has."
    a = np.full((size[1], size[0], 3), (i % 256, i // 256 % 256, 90), np.uint8)
    a[0, 0] = 255
    return Image.fromarray(a)


def fill(folder, prompts, seeds, ws, failed=(), size=(8, 8)):
    "A store with one picture for each prompt, seed and weight; some have failed."
    store, rows, labels = Store(folder), [], []
    for i, (p, s, w) in enumerate((p, s, w) for p in prompts for s in seeds for w in ws):
        labels.append(dict(prompt=p, seed=s, w=w))
        row = dict(request=request_of(p, s, w), nfe=8, seconds=0.1, quality=i % 7 / 7 + i)
        bad = dict(error='out of memory: <b>8 GB</b>') if i in failed else {}
        rows.append(row | (bad or dict(picture=tile(i, size))))
    store.plan([o['request'] for o in rows], labels)
    store.add(rows)
    return store


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A gallery of 2 prompts, one of which would like to be HTML, 3 seeds and 4 weights."
    folder = tmp_path_factory.mktemp('small')
    store = fill(folder / 'store', ['a red sneaker', EVIL], range(3), [1.0, 2.5, 5.0, 7.5], {13})
    return gallery(store, folder / 'page', title=EVIL)


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    "A gallery of 10,000 pictures."
    folder = tmp_path_factory.mktemp('large')
    prompts = [f'prompt {i} of fifty' for i in range(50)]
    store = fill(folder / 'store', prompts, range(20), [1 + i / 2 for i in range(10)])
    return gallery(store, folder / 'page')


@pytest.fixture(scope='module')
def driver():
    with chromium() as driver:
        yield driver


@pytest.fixture
def opened(driver):
    def open_page(page, width=1280, dark=False):
        resize(driver, width)
        set_dark(driver, dark)
        driver.get(Path(page).as_uri())
        settle(driver)
        return driver

    return open_page


def settle(driver):
    call(driver, 'await new Promise(requestAnimationFrame);' * 3)


def data_of(page):
    text = page.with_name('data.js').read_text(encoding='utf-8')
    return json.loads(text.removeprefix('window.galleryData = ').removesuffix(';\n'))


def shown(driver):
    "The labels of the pictures in the page, row by row."
    script = """
      const cells = [...document.querySelectorAll('.cell')];
      cells.sort((a, b) => a.dataset.at - b.dataset.at);
      return cells.map((o) => o.getAttribute('aria-label'));
    """
    return driver.execute_script(script)


def choose(driver, label, text):
    "Choose an option of a select by its text."
    script = """
      const named = `select[aria-label="${args[0]}"]`;
      const list = document.querySelector(named);
      list.selectedIndex = [...list.options].findIndex((o) => o.text === args[1]);
      list.dispatchEvent(new Event('change'));
    """
    call(driver, script, label, text)
    settle(driver)


def click(driver, css, text=None):
    script = """
      const all = [...document.querySelectorAll(args[0])];
      all.find((o) => args[1] === null || o.textContent.includes(args[1])).click();
    """
    call(driver, script, css, text)
    settle(driver)


def press(driver, *keys):
    for key in keys:
        ActionChains(driver).send_keys(key).perform()
    settle(driver)


def text_of(driver, css):
    return driver.find_element('css selector', css).text


# ---------------------------------------------------------------------------- what is written


def test_tiles_are_exact(small):
    data = data_of(small)
    with Image.open(small.parent / 'sheets/0.webp') as picture:
        sheet = np.array(picture)
    for i, k in enumerate(data['place']):
        y, x = (8 * o for o in divmod(k, data['tile']['across']))
        assert k == -1 or (sheet[y : y + 8, x : x + 8] == np.array(tile(i))).all()
    assert data['place'].count(-1) == 1
    assert data['errors'] == {'13': 'out of memory: <b>8 GB</b>'}


def test_data(small):
    data = data_of(small)
    axes = {o['name']: o for o in data['axes']}
    assert list(axes) == ['prompt', 'seed', 'w', 'result']
    assert axes['w']['values'] == ['1', '2.5', '5', '7.5']
    assert axes['w']['of'][:5] == [0, 1, 2, 3, 0]
    assert axes['result']['values'] == ['drawn', 'failed']
    assert {'nfe', 'quality', 'seconds'} <= {o['name'] for o in data['measurements']}
    fields = {o['name']: o for o in data['request']}
    assert len(fields['sigmas']['values']) == 1
    assert len(fields['terms']['values']) == 4


def test_large_pictures_have_files_of_their_own(tmp_path):
    store = fill(tmp_path / 'store', ['a'], [0], [1.0, 2.0], size=(300, 150))
    page = gallery(store, tmp_path / 'page')
    data = data_of(page)
    assert (data['tile']['width'], data['tile']['height']) == (128, 64)
    assert data['full'] == [1, 1]
    with Image.open(tmp_path / 'page/pictures/1.webp') as picture:
        assert picture.size == (300, 150)


def test_pictures_of_several_sizes(tmp_path):
    store = Store(tmp_path / 'store')
    store.add([dict(request=request_of(seed=s), picture=tile(1, (s, s))) for s in (8, 24)])
    data = data_of(gallery(store, tmp_path / 'page'))
    assert data['full'] == [0, 1]
    assert data['axes'] == []


def test_earlier_gallery_is_replaced(tmp_path):
    store = fill(tmp_path / 'store', ['a'], [0], [1.0])
    gallery(store, tmp_path / 'page', title='one')
    page = gallery(tmp_path / 'store', tmp_path / 'page', title='two')
    assert data_of(page)['title'] == 'two'
    assert {o.name for o in tmp_path.iterdir()} == {'store', 'page'}


def test_other_files_are_left_alone(tmp_path):
    store = fill(tmp_path / 'store', ['a'], [0], [1.0])
    (tmp_path / 'page').mkdir()
    (tmp_path / 'page/thesis.tex').write_text('mine')
    with pytest.raises(ValueError, match='folder: expected a new one or an earlier gallery'):
        gallery(store, tmp_path / 'page')
    with pytest.raises(ValueError, match='folder: expected a new one'):
        gallery(store, tmp_path / 'page/thesis.tex')
    assert (tmp_path / 'page/thesis.tex').read_text() == 'mine'


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    store = fill(tmp_path / 'store', ['a'], [0], [1.0])
    page = gallery(store, tmp_path / 'page', title='one')

    def full(*args, **settings):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(module, '_save', full)
    with pytest.raises(OSError, match='No space left'):
        gallery(store, tmp_path / 'page', title='two')
    assert data_of(page)['title'] == 'one'
    assert {o.name for o in tmp_path.iterdir()} == {'store', 'page'}


def test_store_that_is_empty_or_not_there(tmp_path):
    with pytest.raises(ValueError, match='store: expected at least one result, got none'):
        gallery(Store(tmp_path / 'store'), tmp_path / 'page')
    with pytest.raises(ValueError, match='store: expected a Store or the folder of one'):
        gallery(tmp_path / 'nowhere', tmp_path / 'page')
    assert {o.name for o in tmp_path.iterdir()} == {'store'}


def test_only_failures(tmp_path):
    page = gallery(fill(tmp_path / 'store', ['a'], [0], [1.0], {0}), tmp_path / 'page')
    assert data_of(page)['place'] == [-1]


def test_script_stays_in_its_place(small):
    text = small.read_text(encoding='utf-8')
    assert text.count('</script>') == 2
    assert '<script>window' not in text


@pytest.mark.parametrize(
    'settings',
    [
        dict(w=7.5),
        dict(negative='none'),
        dict(sampler='heun(s_churn=3)', sigmas='karras', scheduler='EulerDiscreteScheduler'),
        dict(every=3, negative="perpneg(prompts=['a blue bag', 'a boot'], weights=[1, 0.5])"),
        dict(schedule='cosine', rule='apg', interval=(0.3, 5.0), stop=0.99),
        dict(negative='pag', w=3.0, post='rescale(phi=0.7)', size=(64, 32)),
        dict(negative_prompt='a blue bag', w=2.0, scheduler='EulerDiscreteScheduler'),
        dict(w=2.0, cads='cads(s=0.5, tau1=0.3)'),
        dict(guidance=[dict(w=2.0), dict(negative='seg(sigma=inf)', w=1.5)], eta=0.5),
        dict(negative=dict(name='autoguidance'), dtype='bfloat16', device='cuda', backend='auto'),
    ],
    ids=str,
)
def test_line_gives_the_request_again(settings):
    (request,) = Sweep(**dict(prompt='a red bag', seed=3, steps=4) | settings).requests
    drawn = []
    line = repeat_line(json.loads(json.dumps(request)))
    eval(line, dict(Sweep=Sweep, draw=lambda sweep, store: drawn.extend(sweep.requests)))
    assert drawn == [request]


# ---------------------------------------------------------------------------- in Chromium


def test_opens_from_the_disk(opened, small):
    driver = opened(small)
    labels = shown(driver)
    assert len(labels) == 24
    assert labels[0] == 'a red sneaker, seed 0, w 1'
    assert '24 pictures' in text_of(driver, '.top')
    assert not console_errors(driver)


def test_prompts_are_text(opened, small):
    driver = opened(small)
    click(driver, '.cell:last-of-type')
    assert driver.execute_script('return window.hacked') is None
    assert EVIL in driver.execute_script("return document.querySelector('h1').textContent")
    assert driver.title == ' '.join(EVIL.split())
    assert not driver.find_elements('css selector', 'img')


@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('dark', [False, True])
def test_fits_the_window(opened, small, width, dark):
    driver = opened(small, width, dark)
    assert sideways_scroll(driver) <= 0
    colour = driver.execute_script('return getComputedStyle(document.body).backgroundColor')
    assert (colour == 'rgb(27, 32, 40)') == dark
    click(driver, '.cell')
    assert sideways_scroll(driver) <= 0
    box = driver.execute_script(
        "const o = document.querySelector('dialog'); return [o.scrollWidth, o.clientWidth]"
    )
    assert box[0] <= box[1]
    assert not console_errors(driver)


def test_axes_have_places(opened, small):
    driver = opened(small)
    choose(driver, 'columns', 'seed')
    choose(driver, 'rows', 'w')
    choose(driver, 'tabs', 'prompt')
    labels = shown(driver)
    assert len(labels) == 12
    assert [o.split(', ')[1:] for o in labels[:4]] == [
        ['seed 0', 'w 1'],
        ['seed 1', 'w 1'],
        ['seed 2', 'w 1'],
        ['seed 0', 'w 2.5'],
    ]
    click(driver, '[role=tab]:last-of-type')
    assert all(EVIL in o for o in shown(driver))
    choose(driver, 'columns', 'w')
    picked = "return document.querySelector('select[aria-label=rows]').value"
    assert driver.execute_script(picked) == ''


def test_sort_and_captions(opened, small):
    driver = opened(small)
    choose(driver, 'below each picture', 'quality')
    choose(driver, 'sort', 'quality, highest first')
    by_column = [float(o.rpartition(' ')[2].replace('–', '-1')) for o in shown(driver)]
    for c in range(4):
        assert by_column[c::4] == sorted(by_column[c::4], reverse=True)


def test_filters(opened, small):
    driver = opened(small)
    click(driver, '.filters .check', 'failed')
    assert len(shown(driver)) == 23
    assert '23 of 24' in text_of(driver, '.top')
    click(driver, '.filters button', 'None')
    assert shown(driver) == []
    assert '0 of 24' in text_of(driver, '.top')
    click(driver, '.filters .check', '<script>')
    assert all(EVIL in o for o in shown(driver))


def test_failed_picture(opened, small):
    driver = opened(small)
    (cell,) = driver.find_elements('css selector', '.cell:has(.failed)')
    assert cell.get_attribute('title') == 'out of memory: <b>8 GB</b>'
    cell.click()
    settle(driver)
    assert 'out of memory: <b>8 GB</b>' in text_of(driver, 'dialog')


def test_details(opened, small):
    driver = opened(small)
    click(driver, '.cell')
    line = text_of(driver, 'pre.line')
    assert line == repeat_line(request_of('a red sneaker', 0, 1.0))
    click(driver, 'dialog summary')
    request = json.loads(text_of(driver, 'pre.request'))
    assert request == json.loads(json.dumps(request_of('a red sneaker', 0, 1.0)))
    click(driver, 'dialog button', 'Copy')
    assert text_of(driver, 'dialog p button') in ('Copied', 'Not copied: select the text')


def test_keyboard(opened, small):
    driver = opened(small)
    driver.execute_script('document.querySelector(\'.cell[tabindex="0"]\').focus()')
    press(driver, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ENTER)
    assert text_of(driver, 'dialog h2').startswith('a red sneaker, seed 1, w 2.5')
    press(driver, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert text_of(driver, 'dialog h2').startswith('a red sneaker, seed 1, w 7.5')
    driver.execute_script("document.querySelector('dialog button').focus()")
    press(driver, Keys.ENTER, Keys.ENTER, Keys.ARROW_RIGHT)
    assert text_of(driver, 'dialog h2').startswith('a red sneaker, seed 1, w 5')
    press(driver, Keys.ESCAPE)
    active = "return document.activeElement.getAttribute('aria-label')"
    assert driver.execute_script(active).startswith('a red sneaker, seed 1, w 5')


SWAP = """
  const over = document.querySelector('.over');
  const before = over.className;
  [...document.querySelectorAll('.view button')].find((o) => o.textContent === 'Swap').click();
  return over.className !== before;
"""


def test_compare(opened, small):
    driver = opened(small)
    click(driver, '.cell')
    click(driver, 'dialog button', 'Compare with')
    assert 'Choose a picture to compare with a red sneaker, seed 0, w 1' in text_of(driver, '.held')
    click(driver, '.cell[data-at="3"]')
    split = "return getComputedStyle(document.querySelector('.over')).getPropertyValue('--split')"
    assert driver.execute_script(split) == '50%'
    assert len(driver.find_elements('css selector', '.over > *')) == 2
    assert len(driver.find_elements('css selector', 'td.other')) == 4  # w and quality
    choose(driver, 'compare by', 'flicker')
    assert driver.execute_script(SWAP)
    choose(driver, 'compare by', 'side by side')
    assert len(driver.find_elements('css selector', '.pair > *')) == 2
    click(driver, 'dialog button', 'End comparison')
    assert not driver.find_elements('css selector', '.pair')
    assert not console_errors(driver)


def test_link(opened, small):
    "A link shows the same axes, tab, filters, order and picture; what it cannot know is left out."
    driver = opened(small)
    choose(driver, 'columns', 'w')
    choose(driver, 'tabs', 'prompt')
    click(driver, '[role=tab]:last-of-type')
    click(driver, '.filters .check', '7.5')
    choose(driver, 'sort', 'quality, lowest first')
    choose(driver, 'below each picture', 'quality')
    click(driver, '.cell[data-at="4"]')
    before = shown(driver), text_of(driver, 'dialog h2'), text_of(driver, '.filters')
    link = driver.current_url
    driver.get('about:blank')
    driver.get(link)
    settle(driver)
    assert (shown(driver), text_of(driver, 'dialog h2'), text_of(driver, '.filters')) == before
    assert driver.current_url == link
    click(driver, 'dialog button', 'Close')
    assert 'picture=' not in driver.current_url
    assert not console_errors(driver)


@pytest.mark.parametrize(
    'link', ['columns=nope&tabs=seed&tab=9', 'only+seed={&picture=99', 'only+seed="1"&below=<b>']
)
def test_odd_links(opened, small, link):
    driver = opened(small)
    driver.get(f'{small.as_uri()}?{len(link)}#{link}')
    settle(driver)
    assert len(shown(driver)) >= 6
    assert not driver.find_elements('css selector', 'dialog[open]')
    assert not console_errors(driver)


def test_typed_filter_in_a_link(opened, large):
    driver = opened(large)
    driver.get(f'{large.as_uri()}?1#only+prompt=%22prompt+7+of%22')
    settle(driver)
    assert '1,000 of 10,000' in text_of(driver, '.top')
    named = "return document.querySelector('input[aria-label=prompt]').value"
    assert driver.execute_script(named) == 'prompt 7 of'


COUNT = "return document.querySelectorAll('*').length"
RELAY = """
  const list = document.querySelector('select[aria-label="columns"]');
  const start = performance.now();
  list.value = args[0];
  list.dispatchEvent(new Event('change'));
  await new Promise(requestAnimationFrame);
  await new Promise(requestAnimationFrame);
  return performance.now() - start;
"""


def test_ten_thousand_pictures(opened, large):
    driver = opened(large)
    assert '10,000 pictures' in text_of(driver, '.top')
    counts, times = [driver.execute_script(COUNT)], []
    for name in ('seed', 'prompt', '', 'w'):
        times.append(call(driver, RELAY, name))
        counts.append(driver.execute_script(COUNT))
    driver.execute_script("document.querySelector('.stage').scrollTop = 40000")
    settle(driver)
    counts.append(driver.execute_script(COUNT))
    assert 0 < len(shown(driver)) < 400
    assert max(counts) < 1500
    assert len(list((large.parent / 'sheets').iterdir())) == 1
    print('nodes', counts, 'ms of a re-layout', [round(t) for t in times])


def test_table_functions():
    "Numbers and ranges, words; copies of one setting; order with unknown values."
    script = """
      import { matching, arranged, ordered } from './gallery_table.js';
      const w = { name: 'w', values: ['1', '7.5', '–'], numbers: [1, 7.5, null] };
      const p = { name: 'p', values: ['a Red bag', 'a blue bag'], numbers: null };
      const axis = { ...p, of: [0, 1, 1], varies: true };
      const data = { axes: [axis], measurements: [{ name: 'q', of: [null, 2, 1] }] };
      const grid = arranged(data, [0, 1, 2], { columns: 'p', rows: null, tabs: null }, 9);
      console.log(JSON.stringify([
        [...matching(w, '0-3')], [...matching(w, '7.5, 1')], [...matching(w, '')],
        [...matching(p, 'red')], [...matching(p, 'bag a')],
        grid.columns, grid.rows, [...grid.at],
        ordered(data, [0, 1, 2], { name: 'q', falling: false }),
      ]));
    """
    folder = Path(module.__file__).parent / 'explorers'
    args = ['node', '--input-type=module', '-e', script]
    r = subprocess.run(args, capture_output=True, text=True, cwd=folder)
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout) == [
        *([0], [0, 1], [0, 1, 2], [0], [0, 1]),
        *(['p a Red bag', 'p a blue bag'], ['', 'copy 2'], [0, 1, -1, 2]),
        [2, 1, 0],
    ]
