"Edge cases of the plots: bad input, plain text, exact pixels, no global state."

import math
from io import BytesIO
from statistics import mean, stdev

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from cf_guidance.guided import Trace
from cf_guidance.lab import plots
from cf_guidance.lab.plots import (
    image_grid,
    plot_axis,
    plot_grid,
    plot_pareto,
    plot_schedules,
    plot_sweep,
    plot_trace,
    show_image,
)

NAN, INF = math.nan, math.inf


def tile(i, n=10, size=32):
    "A picture that no other number has: its number as a colour, and a mark in a corner."
    a = np.full((size, size, 3), (i % 256, 40 + 200 * i // n, i // 256), np.uint8)
    a[0, 0] = 255
    return Image.fromarray(a)


TILES = [tile(i) for i in range(10)]
BATCH = torch.stack([torch.from_numpy(np.array(o)).permute(2, 0, 1) for o in TILES])


def drawn(fig):
    return np.array(Image.open(BytesIO(fig._repr_png_())).convert('RGB'))


def enlarged(image, k):
    return np.array(image).repeat(k, 0).repeat(k, 1)


def texts(fig):
    return [t.get_text().replace('\n', ' ') for t in fig.texts]


def cosine(top, n=50):
    return [top * (1 + math.cos(math.pi * i / n)) / 2 for i in range(n)]


# Each bad call, and the words its error has to have.
BAD = {
    'images is one picture': (image_grid, (TILES[0],), {}, 'images: expected a list'),
    'images none': (image_grid, (None,), {}, 'images: expected a list'),
    'images a number': (image_grid, (5,), {}, 'images: expected a list'),
    'images text': (image_grid, ('ab',), {}, 'images: expected a list'),
    'images empty': (image_grid, ([],), {}, 'images: expected at least one'),
    'sizes': (image_grid, ([tile(0), tile(1, size=16)],), {}, 'images: expected pictures of one'),
    'range': (image_grid, (BATCH / 127.5 - 1,), {}, 'images[0]: expected floats in [0, 1]'),
    'room': (image_grid, (TILES,), dict(rows=2, cols=3), 'rows=2 and cols=3: expected room for 10'),
    'rows 0': (image_grid, (TILES,), dict(rows=0), 'rows: expected a whole number'),
    'rows true': (image_grid, (TILES,), dict(rows=True), 'rows: expected a whole number'),
    'cols 2.5': (image_grid, (TILES,), dict(cols=2.5), 'cols: expected a whole number'),
    'cols nan': (image_grid, (TILES,), dict(cols=NAN), 'cols: expected a whole number'),
    'gap -1': (image_grid, (TILES,), dict(gap=-1), 'gap: expected a whole number'),
    'gap text': (image_grid, (TILES,), dict(gap='a'), 'gap: expected a whole number'),
    'gap huge': (image_grid, (TILES,), dict(gap=1000000), 'at most 65500 pixels a side'),
    'scale nan': (image_grid, (TILES,), dict(scale=NAN), 'scale: expected a finite number'),
    'width 0': (image_grid, (TILES,), dict(width=0), 'width: expected a whole number'),
    'width text': (image_grid, (TILES,), dict(width='a'), 'width: expected a whole number'),
    'title 5': (image_grid, (TILES,), dict(title=5), 'title: expected a list of 10 texts'),
    'title one': (image_grid, (TILES,), dict(title=['one']), 'title: expected one per picture'),
    'show scale 0': (show_image, (TILES[0],), dict(scale=0), 'scale: expected a finite number'),
    'show scale a': (show_image, (TILES[0],), dict(scale='a'), 'scale: expected a finite number'),
    'show scale inf': (show_image, (TILES[0],), dict(scale=INF), 'scale: expected a finite number'),
    'show scale huge': (show_image, (TILES[0],), dict(scale=1e6), 'at most 65500 pixels a side'),
    'show nan': (show_image, (np.full((4, 4), NAN),), {}, 'image: expected values in [0, 1]'),
    'show int64': (show_image, (np.zeros((4, 4), int),), {}, 'image: expected uint8'),
    'show 2 channels': (show_image, (np.zeros((4, 4, 2)),), {}, 'got shape (4, 4, 2)'),
    'show text': (show_image, ('a',), {}, 'image: expected a PIL image'),
    'grid one picture': (plot_grid, (TILES[0],), {}, 'images: expected a list'),
    'grid none': (plot_grid, (None,), {}, 'images: expected a list'),
    'grid empty': (plot_grid, ([],), {}, 'images: expected at least one'),
    'grid empty picture': (plot_grid, ([[]],), {}, 'images[0]: expected a PIL image'),
    'grid empty curve': (plot_grid, ([[1, 2], []],), {}, 'images: expected one finite number per'),
    'grid nan curve': (plot_grid, ([[1, NAN]],), {}, 'images: expected one finite number per'),
    'grid empty run': (plot_grid, (dict(images=[], titles=[]),), {}, 'images: expected at least'),
    'grid no images': (plot_grid, ({'pictures': TILES},), {}, "a dict with a key 'images'"),
    'grid rows 0': (plot_grid, (TILES,), dict(rows=0), 'rows: expected a whole number'),
    'grid text': (plot_grid, (['a'],), {}, 'images[0]: expected a PIL image'),
    'grid row_labels': (plot_grid, (TILES,), dict(row_labels=['a'], rows=2), 'row_labels: expect'),
    'grid more rows': (plot_grid, (TILES[:2],), dict(row_labels='abc'), 'row_labels: expected'),
    'grid more labels': (plot_grid, (TILES[:2],), dict(row_labels=['a', 'b', 'c']), 'row_labels:'),
    'grid col_labels': (plot_grid, (TILES,), dict(cols=3, col_labels=[1, 2]), 'col_labels: expec'),
    'grid col_labels 5': (plot_grid, (TILES,), dict(col_labels=5), 'col_labels: expected a list'),
    'grid room': (plot_grid, (TILES,), dict(col_labels=[1, 2], rows=2), 'expected room for 10'),
    'grid xlabel 5': (plot_grid, (TILES,), dict(xlabel=5), 'xlabel: expected text or None'),
    'grid xlabel bidi': (plot_grid, (TILES,), dict(xlabel='\u202e'), 'xlabel: expected printable'),
    'grid surrogate': (plot_grid, (TILES[:1],), dict(titles=['\ud800']), 'titles: expected print'),
    'grid width': (plot_grid, (TILES,), dict(width='a'), 'width: expected a whole number'),
    'schedules none': (plot_schedules, (None,), {}, 'schedules: expected a list'),
    'schedules 5': (plot_schedules, (5,), {}, 'schedules: expected a list'),
    'schedules empty': (plot_schedules, ([],), {}, 'schedules: expected at least one'),
    'schedules inf': (plot_schedules, ([[INF, 1.0]],), {}, 'schedules: expected one finite'),
    'schedules nan': (plot_schedules, ([[NAN, NAN]],), {}, 'schedules: expected one finite'),
    'schedules text': (plot_schedules, ([['a']],), {}, 'schedules: expected one finite'),
    'schedules labels': (plot_schedules, ([[1, 2]], ['x', 'y']), {}, 'labels: expected 1, got 2'),
    'schedules figsize': (plot_schedules, ([[1]],), dict(figsize=(NAN, 1)), 'figsize: expected'),
    'schedules figsize ab': (plot_schedules, ([[1]],), dict(figsize='ab'), 'figsize: expected'),
    'schedules unguided': (plot_schedules, ([[1]],), dict(unguided='a'), 'unguided: expected'),
    'schedules title': (plot_schedules, ([[1]],), dict(title=5), 'title: expected text or None'),
    'sweep x nan': (plot_sweep, ([NAN, 1], [[1, 2]]), {}, 'x: expected one finite number'),
    'sweep x a': (plot_sweep, ('a', [[1, 2]]), {}, 'x: expected one finite number'),
    'sweep series a': (plot_sweep, ([1, 2], 'a'), {}, "series '': expected numbers"),
    'sweep series shape': (plot_sweep, ([1, 2, 3], {'q': np.ones((4, 5))}), {}, "series 'q': exp"),
    'sweep series inf': (plot_sweep, ([1, 2], [[INF, 1]]), {}, "series '': expected finite"),
    'sweep series nan': (plot_sweep, ([1, 2], [[NAN, NAN]]), {}, "series '': expected finite"),
    'sweep series empty': (plot_sweep, ([1, 2], {}), {}, 'series: expected at least one'),
    'sweep cols 0': (plot_sweep, ([1, 2], [[1, 2]]), dict(cols=0), 'cols: expected a whole number'),
    'sweep refs p': (plot_sweep, ([1, 2], {'q': [[1, 2]]}), dict(refs={'p': 1}), 'refs: expected'),
    'sweep refs a': (plot_sweep, ([1, 2], [[1, 2]]), dict(refs={'': 'a'}), 'refs: expected'),
    'sweep refs 5': (plot_sweep, ([1, 2], [[1, 2]]), dict(refs=5), 'refs: expected a dict'),
    'sweep size': (plot_sweep, ([1, 2], [[1, 2]]), dict(size=(0, 0)), 'size: expected'),
}
BAD |= {
    'trace none': (plot_trace, (None,), {}, 'traces: expected a list of Trace'),
    'trace empty': (plot_trace, ([],), {}, 'traces: expected at least one'),
    'trace numbers': (plot_trace, ([1, 2],), {}, 'traces: expected a list of Trace'),
}


TABLE = pd.DataFrame(
    dict(w=[1, 1, 2, 2, 4], rule=list('abaab'), q=[1.0, 3, 5, NAN, 2], cost=[1, 1, 2, 2, 4])
)
BAD |= {
    'axis no table': (plot_axis, (None, 'w', 'q'), {}, "table: expected a column 'q'"),
    'axis no column': (
        plot_axis,
        (TABLE, 'w', 'p'),
        {},
        "table: expected a column 'p', got w, rule",
    ),
    'axis texts': (plot_axis, (TABLE, 'w', 'rule'), {}, 'rule: expected a column of numbers'),
    'axis none': (plot_axis, (TABLE, 'w', []), {}, 'y: expected at least one'),
    'axis no rows': (plot_axis, (TABLE[3:4], 'w', 'q'), {}, 'table: expected at least one row'),
    'pareto lower': (plot_pareto, (TABLE, 'w', 'q', 'rule', 'p'), {}, "lower: expected 'w' or 'q'"),
    'pareto by': (plot_pareto, (TABLE, 'w', 'q', []), {}, 'by: expected at least one'),
}


@pytest.mark.parametrize('call', BAD)
def test_bad_input(call):
    f, args, kwargs, words = BAD[call]
    with pytest.raises((ValueError, TypeError)) as e:
        f(*args, **kwargs)
    says = str(e.value)
    assert words in says
    assert len(says) < 160
    assert '\n' not in says


@pytest.mark.parametrize('text', ['$\\bad$', '$\\frac{', '$5 and $', 'a_b$^$', '_hidden', '$_$'])
def test_labels_are_text(text):
    grid = dict(titles=[text] * 4, row_labels=[text] * 2, col_labels=[text] * 2)
    drawn(plot_grid(TILES[:4], **grid, xlabel=text, ylabel=text))
    drawn(plot_grid([[1, 2]], titles=[text]))
    f = plot_schedules({text: [1, 2]}, xlabel=text, ylabel=text, title=text)
    drawn(f)
    assert f.legends[0].get_texts()[0].get_text() == text
    f = plot_sweep([1, 2], {text: {text: [[1, 2], [2, 2]]}}, xlabel=text, refs={text: 1})
    drawn(f)
    assert f.axes[0].get_legend().get_texts()[0].get_text() == text


@pytest.mark.parametrize(
    'label', ['x' * 4000, 'x y ' * 2000, 'a very long prompt about ' * 4 + '$^$', 'a\nb\n' * 99]
)
def test_long_labels_stay_on_the_sheet(label):
    labels = dict(titles=[label] * 2, row_labels=[label, 'b'], col_labels=[label])
    f = plot_grid(TILES[:2], **labels, xlabel='G', ylabel='prompt')
    drawn(f)
    assert max(f.bbox.size) < 1500
    for t in f.texts:
        b = t.get_window_extent()
        assert b.x0 >= 0
        assert b.y0 >= 0
        assert b.x1 <= f.bbox.x1
        assert b.y1 <= f.bbox.y1


def test_labels_do_not_overlap():
    long = ['a photograph of an astronaut riding a horse on the moon, very detailed, seed 0'] * 4
    cols = [v / 3 for v in range(10)]
    f = plot_grid([tile(i, 40) for i in range(40)], row_labels=long, col_labels=cols, width=64)
    drawn(f)
    rows, cols = [[t.get_window_extent() for t in o] for o in (f.texts[:4], f.texts[4:14])]
    for a, b in zip(rows, rows[1:], strict=False):
        assert a.y0 >= b.y1
    for a, b in zip(cols, cols[1:], strict=False):
        assert a.x1 < b.x0


def test_titles_are_between_pictures():
    f = plot_grid(TILES, [f'Param: "max_val", val={i}' for i in range(10)], rows=5, width=96)
    pixels = drawn(f)
    white = (pixels == 255).all(-1)
    for t in f.texts:
        b = t.get_window_extent()
        y0, y1 = len(pixels) - math.floor(b.y1) - 1, len(pixels) - math.ceil(b.y0) + 1
        rows = np.r_[white[y0, :], white[y1, :]]
        x = slice(math.floor(b.x0), math.ceil(b.x1))
        assert y0 >= 0
        assert rows.reshape(2, -1)[:, x].all()


@pytest.mark.parametrize(
    'n, cols, k',
    [(1, None, 6), (2, None, 6), (7, 4, 6), (10, None, 3), (23, None, 3), (200, 20, 2)],
)
def test_pictures_are_exact(n, cols, k):
    tiles = [tile(i, n) for i in range(n)]
    f = plot_grid(tiles, titles=range(n), cols=cols)
    pixels = drawn(f)
    assert pixels.shape[:2] == tuple(f.bbox.size[::-1].round())
    for i in (0, n - 1):
        colour = np.array(tiles[i])[1, 1]
        places = np.argwhere((pixels == colour).all(-1))
        (y0, x0), (y1, x1) = places.min(0), places.max(0) + 1
        assert (pixels[y0:y1, x0:x1] == enlarged(tiles[i], k)).all()
    assert texts(f) == [str(i) for i in range(n)]


def test_all_pictures_are_one_image():
    f = plot_grid([tile(i, 2000) for i in range(2000)], cols=50)
    assert len(f.axes) == 1


def test_sheets_have_whole_pixels():
    assert [n / plots._DPI * plots._DPI for n in range(1, 4000)] == list(range(1, 4000))


def test_large_pictures_are_reduced():
    pixels = drawn(plot_grid([tile(0, size=512)] * 10))
    assert pixels.shape[1] == 10 * 96 + 9 * 4 + 12


def test_width_limits_pictures():
    f = plot_grid(TILES[:2], width=512, height=512)
    pixels = drawn(f)
    places = np.argwhere((pixels == np.array(TILES[1])[1, 1]).all(-1))
    assert tuple(places.max(0) - places.min(0) + 1) == (512, 512)


def test_all_kinds_of_pictures_give_one_sheet():
    res = dict(images=TILES, titles=range(10))
    sheet = drawn(plot_grid(res))
    assert (drawn(plot_grid(TILES, range(10))) == sheet).all()
    assert (drawn(plot_grid(BATCH, range(10))) == sheet).all()
    assert (drawn(plot_grid(BATCH / 255, titles=range(10))) == sheet).all()


def test_titles_given_win():
    res = dict(images=TILES, titles=range(10))
    assert texts(plot_grid(res, titles='frame'))[3] == 'frame: 3'


def test_no_titles_take_no_room():
    assert drawn(plot_grid(TILES)).shape != drawn(plot_grid(TILES, range(10))).shape


def test_image_modes():
    a = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    f = show_image(Image.fromarray(a), scale=1, plot=False)
    assert (np.array(f)[..., 0] == (a * 255).round()).all()
    assert show_image(Image.new('RGBA', (4, 4)), plot=False).mode == 'RGB'


def test_nan_is_a_gap_in_a_sweep():
    f = plot_sweep([1, 2, 3], [[NAN, 2, 3], [NAN, 4, 5]])
    y = f.axes[0].lines[0].get_ydata()
    assert math.isnan(y[0])
    assert list(y[1:]) == [3, 4]
    drawn(f)


def test_between_neighbours():
    f = plot_sweep([1, 2, 4], [[5.0, 6.0]], xlabel='G')
    assert list(f.axes[0].lines[0].get_xdata()) == [1.5, 3]
    assert len(f.axes[0].collections) == 0
    assert f.axes[0].get_xlabel() == 'G'


def test_schedules_of_several_lengths():
    assert len(plot_schedules([[1, 2, 3], [1, 2]]).axes[0].lines) == 3
    assert len(plot_schedules([1, 2, 3], unguided=None).axes[0].lines) == 1
    assert len(plot_schedules(np.ones((4, 9)), unguided=None).axes[0].lines) == 4


def test_axis_labels():
    ax = plot_schedules([1, 2]).axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('step', 'w')


def test_no_global_state():
    settings, figures = dict(matplotlib.rcParams), plt.get_fignums()
    backend = matplotlib.get_backend()
    for _ in range(3):
        drawn(plot_schedules([1, 2]))
        drawn(plot_sweep([1, 2], [[1, 2], [2, 3]]))
        drawn(plot_grid(TILES[:2]))
        image_grid(TILES[:2], title=['a', 'b'])
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == figures
    assert matplotlib.get_backend() == backend
    assert TILES[0].size == (32, 32)


def test_classic_calls():
    "The calls of 2022 run as they stand."
    res = dict(images=TILES, titles=[f'Param: "max_val", val={i}' for i in range(10)])
    show_image(TILES[0], scale=1, plot=False)
    images, names = ([o[0], o[3]] for o in (res['images'], res['titles']))
    g = image_grid(images, title=names, rows=1, width=512, height=512)
    assert g.width == 1024
    assert (np.array(g)[-512:, 512:] == enlarged(TILES[3], 16)).all()
    f = plot_grid([cosine(7.5), cosine(5)], rows=1, width=256, height=256, titles=['a', 'b'])
    assert list(f.axes[1].lines[0].get_ydata()) == cosine(5)
    assert f.axes[1].get_title() == 'b'


def test_figure_has_one_png():
    formats = DisplayFormatter().format(plot_grid(TILES[:2]))[0]
    assert [k for k in formats if k.startswith('image')] == ['image/png']


def test_shown_picture_is_not_shown_twice(monkeypatch):
    "Not as the value of the same cell, but as that of another."

    class Shell:
        execution_count = 1

    shell = Shell()
    shown = []
    import IPython

    monkeypatch.setattr(IPython, 'get_ipython', lambda: shell)
    monkeypatch.setattr(IPython.display, 'display', shown.append)
    im = show_image(TILES[0])
    assert shown == [im]
    assert im._ipython_display_() is None
    shell.execution_count = 2
    with pytest.raises(NotImplementedError):
        im._ipython_display_()


def test_trace_has_gaps_where_nothing_was_seen():
    one, nan = torch.ones(2), torch.full((2,), NAN)
    f = plot_trace([Trace(2 * one, one, nan, nan), Trace(one, 3 * one, one, one)])
    assert list(f.axes[0].lines[0].get_ydata()) == [1, 3]
    assert math.isnan(f.axes[1].lines[0].get_ydata()[0])
    drawn(f)


def test_names_of_2022():
    import cf_guidance.plots as old

    assert old.plot_grid is plot_grid
    assert {*old.__all__, 'plot_trace', 'plot_axis', 'plot_pareto'} == {*plots.__all__}


def test_grey_pictures_of_any_kind():
    grey = np.arange(0, 256, 8, dtype=np.uint8)[None].repeat(32, 0)
    tensor = torch.from_numpy(grey)
    for o in (Image.fromarray(grey), grey, tensor, tensor[None] / 255):
        assert (np.array(plots._to_pil(o)) == np.stack([grey] * 3, -1)).all()


def test_scale_that_fits():
    assert plots._fit((32, 32), 256, 256) == 8
    assert plots._fit((32, 32), 100, None) == 3
    assert plots._fit((512, 256), 256, 256) == 0.5


def test_grid_shape():
    assert plots._grid_shape(10, None, None) == (1, 10)
    assert plots._grid_shape(10, 3, None) == (3, 4)
    assert plots._grid_shape(10, None, 4) == (3, 4)
    assert plots._grid_shape(23, None, None, most=10) == (3, 10)


def test_titles_are_wrapped_and_numbers_short():
    titles = ['Param: "max_val", val=0.01', 0.1 + 0.2, np.float32(0.1)]
    wrapped = ['Param:\n"max_val",\nval=0.01', '0.3', '0.1']
    assert plots._titles('title', titles, 3, 96) == wrapped
    assert plots._titles('title', 'Frame', 2, 96) == ['Frame: 0', 'Frame: 1']


def test_schedules_are_drawn_as_given():
    f = plot_schedules({'a': [3.0, 2.0, 1.0], 'b': torch.tensor([1.0, 1.0, 4.0])})
    a, b, one = f.axes[0].lines
    assert [t.get_text() for t in f.legends[0].get_texts()] == ['a', 'b', 'w = 1: unguided']
    assert list(a.get_xdata()) == [0, 1, 2]
    assert list(a.get_ydata()) == [3, 2, 1]
    assert list(b.get_ydata()) == [1, 1, 4]
    assert list(one.get_ydata()) == [1, 1]


def test_band_is_mean_and_deviation_as_of_statistics():
    columns = [[1, 3, 5], [2, 2, 2], [3, 7, 2]]
    f = plot_sweep([1, 2, 4], {'q': np.array(columns, dtype=float).T})
    (ax,) = f.axes
    assert np.allclose(ax.lines[0].get_ydata(), [mean(v) for v in columns])
    edge = ax.collections[0].get_paths()[0].vertices
    for x, v in zip([1, 2, 4], columns, strict=True):
        ys = edge[edge[:, 0] == x, 1]
        assert np.allclose([ys.min(), ys.max()], [mean(v) - stdev(v), mean(v) + stdev(v)])


def test_axis_has_mean_and_spread():
    f = plot_axis(TABLE, 'w', ['q', 'cost'])
    drawn(f)
    ax = f.axes[0]
    assert list(ax.lines[0].get_xdata()) == [1, 2, 4]
    assert list(ax.lines[0].get_ydata()) == [2, 5, 2]
    edge = ax.collections[0].get_paths()[0].vertices
    ys = edge[edge[:, 0] == 1, 1]
    assert np.allclose([ys.min(), ys.max()], [2 - stdev([1, 3]), 2 + stdev([1, 3])])
    assert [o.get_title() for o in f.axes] == ['q', 'cost']


def test_axis_of_texts_and_lines_by_another():
    f = plot_axis(TABLE, 'rule', 'q')
    drawn(f)
    assert [t.get_text() for t in f.axes[0].get_xticklabels()] == ['a', 'b']
    f = plot_axis(TABLE, 'w', 'q', by='rule')
    assert [t.get_text() for t in f.axes[0].get_legend().get_texts()] == ['rule a', 'rule b']


def test_pareto_front():
    points = pd.DataFrame(dict(s=list('abcde'), cost=[1, 2, 3, 4, 1], good=[1, 3, 2, 3, 1]))
    f = plot_pareto(points, 'cost', 'good', 's', lower='cost')
    drawn(f)
    others, front = f.axes[0].lines
    assert list(front.get_xdata()) == [1, 1, 2]
    assert list(others.get_ydata()) == [2, 3]
    assert [t.get_text() for t in f.axes[0].texts] == ['s a\ns e', 's b', 's c', 's d']
    assert f.axes[0].get_xlabel() == 'cost (lower is better)'
    front = plot_pareto(points, 'cost', 'good', ['s']).axes[0].lines[1]
    assert list(front.get_xdata()) == [4]
