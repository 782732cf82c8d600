"Schedules: edges, bad inputs, and the same values from other libraries."

import importlib.util
import logging
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cf_guidance.schedules import (
    INTERVALS,
    _in_interval,
    beta_sched,
    clamp_sched,
    cosine_sched,
    cycle_sched,
    exp_sched,
    get_cos_sched,
    interval_of_fractions,
    interval_of_steps,
    interval_sched,
    inv_kdecay_sched,
    invlinear_sched,
    linear_sched,
    make_sched,
    pcs_sched,
    points_sched,
    sine_sched,
    tent_sched,
    v_sched,
    warmup_sched,
)

NAN, INF = math.nan, math.inf
SHAPED = [
    linear_sched,
    invlinear_sched,
    cosine_sched,
    sine_sched,
    tent_sched,
    v_sched,
    pcs_sched,
    beta_sched,
    exp_sched,
]
HAND = [(0, 1), (0.2, 1.5), (0.4, 9), (0.7, 8), (1, 1)]


def close(a, b, eps=1e-12):
    assert len(a) == len(b)
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= eps


def edm_sigmas(n):
    a, b = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return [(a + i / (n - 1) * (b - a)) ** 7 for i in range(n)] + [0] if n > 1 else [1, 0]


# --- get_cos_sched


def test_edges_of_the_cosine():
    assert get_cos_sched(1) == [7.5]
    assert get_cos_sched(4, 8, num_warmup_steps=4) == [0, 2, 4, 6]
    assert get_cos_sched(cycle_limit=0, num_warmup_steps=2) == [0, 3.75] + [0.15] * 48
    whole = get_cos_sched(3, 8, 1, num_warmup_steps=1, warmup_init_val=0, cycle_limit=0)
    assert {type(w) for w in whole} == {float}


def test_numbers_that_are_not_python():
    got = get_cos_sched(np.int64(50), np.float64(7.5), k_decay=np.array(3))
    assert got == get_cos_sched(k_decay=3)
    assert get_cos_sched(torch.tensor(50), torch.tensor(7.5)) == get_cos_sched()


KEPT = {  # values of cf_guidance 0.0.3
    ((), 2): '0x1.de253779e63b1p+2',
    ((), 25): '0x1.e999999999999p+1',
    ((), 49): '0x1.420d37b314bb7p-3',
    ((('num_steps', 7), ('max_val', 9.0), ('min_val', 6.0)), 5): '0x1.a4251d585c369p+2',
    ((('num_warmup_steps', 5), ('warmup_init_val', 0.15)), 3): '0x1.23d70a3d70a3dp+2',
    ((('k_decay', 0.3), ('max_val', 0.3)), 4): '0x1.dbdce2dd947c0p-3',
    ((('k_decay', 2.5), ('num_warmup_steps', 7)), 40): '0x1.d2073717af3b7p+1',
    ((('num_cycles', 1.7), ('max_val', 9.0)), 34): '0x1.c281d631a3121p+2',
    ((('k_decay', 12), ('cycle_mul', 2.0)), 47): '0x1.069358f9c989ap+2',
    ((('k_decay', 12),), 47): '0x1.069358f9c9899p+2',
}


@pytest.mark.parametrize('kw, i', KEPT)
def test_bits_of_the_original(kw, i):
    w, want = get_cos_sched(**dict(kw))[i], KEPT[kw, i]
    assert abs(w - float.fromhex(want)) < 1e-14
    if sys.platform == 'linux':  # elsewhere the mathematical library may round another way
        assert w.hex() == want


def random_settings(rng):
    n = rng.choice([1, 2, 3, 10, 50, rng.randint(1, 200)])
    kw = dict(
        num_steps=n,
        max_val=rng.uniform(-9, 9),
        min_val=rng.uniform(-9, 9),
        num_cycles=rng.choice([0.5, 1, 2, rng.uniform(-3, 3)]),
        num_warmup_steps=rng.randint(0, n),
        warmup_init_val=rng.uniform(-9, 9),
        k_decay=rng.choice([1.0, 2, 7, 0.5, rng.uniform(0.01, 6)]),
        cycle_mul=rng.choice([1, 1.0, 2, 0.5, rng.uniform(0.01, 5)]),
        cycle_decay=rng.uniform(-2, 2),
        cycle_limit=rng.choice([-1, 0, 1, 2.5]),
    )
    kw = {k: v for k, v in kw.items() if rng.random() < 0.6}
    if kw.get('num_warmup_steps', 0) > kw.get('num_steps', 50):
        del kw['num_warmup_steps']
    return kw


@pytest.mark.skipif('CF_GUIDANCE_003' not in os.environ, reason='needs the 0.0.3 wheel, unpacked')
def test_random_settings_of_the_original():
    path = Path(os.environ['CF_GUIDANCE_003']) / 'cf_guidance' / 'schedules.py'
    spec = importlib.util.spec_from_file_location('original_schedules', path)
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    rng = random.Random(0)
    for kw in (random_settings(rng) for _ in range(500)):
        want = [float(o).hex() for o in original.get_cos_sched(**kw)]
        assert [o.hex() for o in get_cos_sched(**kw)] == want


def test_random_settings_are_finite():
    rng = random.Random(1)
    for kw in (random_settings(rng) for _ in range(200)):
        ws = get_cos_sched(**kw)
        assert len(ws) == kw.get('num_steps', 50)
        assert all(math.isfinite(w) for w in ws)


# --- shapes


@pytest.mark.parametrize('s', SHAPED)
def test_lengths_and_types(s):
    assert [len(s(n)) for n in (1, 2, 50)] == [1, 2, 50]
    assert {type(w) for n in (1, 2, 50) for w in s(n, 3)} == {float}


@pytest.mark.parametrize('base', [0, 1])
@pytest.mark.parametrize('s', [linear_sched, invlinear_sched, cosine_sched, sine_sched])
def test_means_are_exact(s, base):
    close([sum(s(50, 7.5, base)) / 50], [7.5])


@pytest.mark.parametrize('s', [tent_sched, v_sched])
def test_means_miss_only_the_corner(s):
    close([sum(s(1000, 7.5)) / 1000], [7.5], 7.5 / 999)


@pytest.mark.parametrize('s', [linear_sched, cosine_sched])
def test_shapes_start_at_their_base(s):
    close(s(50, 7.5, base=1)[:1], [1])


@pytest.mark.parametrize('rate', [-2, 0, 0.2, 1])
def test_exponential_grows_by_one_factor(rate):
    ws = exp_sched(9, 3.0, rate)
    close([b / a for a, b in zip(ws, ws[1:], strict=False)], [math.exp(rate / 8)] * 8)
    close(exp_sched(9, 3.0, rate, base=1), [1 + w * 2 / 3 for w in ws])
    assert ws[0] == 3


@pytest.mark.parametrize('v', [101, -101, NAN, True, '1'])
def test_bad_rate(v):
    raises('rate: expected', exp_sched, rate=v)


@pytest.mark.parametrize('n', [1, 2, 17])
@pytest.mark.parametrize('a, b', [(2, 3), (1, 1), (1, 4), (5, 1), (2.5, 1.7), (60, 90)])
def test_beta_density(n, a, b):
    stats = pytest.importorskip('scipy.stats')
    taus = [i / (n - 1) for i in range(n)] if n > 1 else [0.5]
    close(beta_sched(n, 1, a, b), stats.beta.pdf(taus, a, b), 1e-9)


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('m', [2, 3, 4, 9])
def test_points_against_scipy(m, seed):
    interpolate = pytest.importorskip('scipy.interpolate')
    rng, xs = random.Random(100 * m + seed), np.linspace(0, 1, 101)
    inner = {rng.random(): rng.choice([0.0, 5.0, rng.uniform(-9, 9)]) for _ in range(m - 2)}
    points = sorted({0: rng.uniform(-9, 9), 1: rng.choice([0.0, 5.0]), **inner}.items())
    px, py = zip(*points, strict=True)
    shuffled = rng.sample(points, len(points))
    ws = points_sched(shuffled, 101, 'pchip')
    close(ws, interpolate.PchipInterpolator(px, py)(xs), 1e-10)
    close(points_sched(shuffled, 101), np.interp(xs, px, py), 1e-10)
    assert max(ws) <= max(py) + 1e-12
    assert min(ws) >= min(py) - 1e-12


@pytest.mark.parametrize('kind', ['linear', 'pchip'])
def test_edges_of_points(kind):
    assert points_sched([(0.3, 4)], 3, kind) == [4, 4, 4]
    assert points_sched([(0.5, 4), (0.25, 2)], 5, kind) == [2, 2, 4, 4, 4]
    assert [len(points_sched(HAND, n, kind)) for n in (1, 2)] == [1, 2]
    assert points_sched(HAND, 2, kind) == [1, 1]


def test_points_of_an_array():
    assert points_sched(np.array(HAND)) == points_sched(HAND)


def test_formulas_of_builtins_and_tensors():
    assert make_sched(abs, 3) == [0, 0.5, 1]
    assert make_sched(lambda tau, k=2: k * tau, 3) == [0, 1, 2]
    assert make_sched(lambda tau: torch.tensor(tau), 3) == [0, 0.5, 1]


# --- schedules from schedules

ROWS = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def test_rows_of_samples():
    assert clamp_sched(ROWS, [2, 2, 2], [[4, 5]] * 3) == [[2, 2], [3, 4], [4, 5]]
    assert warmup_sched(ROWS, 2, start=0) == [[0, 0], [0.5, 1]] + ROWS.tolist()
    assert cycle_sched(ROWS, 2, 0.5)[3:] == [[1, 1.5], [2, 2.5], [3, 3.5]]
    assert clamp_sched(torch.tensor(ROWS)) == ROWS.tolist()


def test_one_step():
    assert clamp_sched(range(1, 2)) == [1]
    assert warmup_sched([2], 1) == [1, 2]
    assert cycle_sched((2,), 1) == [2]


def test_exact_where_nothing_is_done():
    rng = random.Random(0)
    ws = [rng.uniform(-9, 9) for _ in range(99)]
    assert clamp_sched(ws) == ws
    assert warmup_sched(ws, 0) == ws
    for base in (0, 1, 0.3):
        assert cycle_sched(ws, 2, base=base) == ws * 2
    all_of_them = clamp_sched([1, 2], 3, 4) + warmup_sched([1, 2], 3, 0) + cycle_sched([1, 2])
    assert {type(w) for w in all_of_them} == {float}


# --- intervals


@pytest.mark.parametrize(
    'levels',
    [edm_sigmas(32), np.float32(edm_sigmas(32)), [3.0, 1.0], [3.0, 2.0, 0.5]],
    ids=['edm', 'single', 'one step', 'two steps'],
)
def test_every_interval_of_steps(levels):
    "Neighbours share no step and leave none out."
    n = len(levels) - 1
    for i in range(n):
        for j in range(i + 1, n + 1):
            lo, hi = interval_of_steps(levels, i, j)
            guided = [k for k, s in enumerate(levels[:n]) if _in_interval(s, lo, hi)]
            assert guided == list(range(i, j))
    assert interval_of_steps(levels) == (float(levels[-1]), float(levels[0]))
    assert interval_of_fractions(levels) == interval_of_steps(levels)


@pytest.mark.parametrize('off', [-1e-7, 0, 1e-7, 1e-5])
def test_levels_that_are_rounded_keep_their_side(off):
    sigmas = edm_sigmas(32)
    lo, hi = interval_of_steps(sigmas, 10, 20)
    rounded = [s * (1 + off) for s in sigmas[:-1]]
    guided = [i for i, s in enumerate(rounded) if _in_interval(s, lo, hi)]
    assert guided == list(range(10, 20))


def test_intervals_of_tensors_and_ends():
    x = torch.tensor([0.5, 1.0, 2.0, 3.0])
    assert _in_interval(x, 1.0, 2.0).tolist() == [False, False, True, False]
    assert _in_interval(INF, 1.0, INF)
    assert not _in_interval(0.0, 0.0, 1.0)
    assert interval_sched([1, 5], 2, INF, w=3) == [1, 3]
    assert interval_sched([1, 5], -INF, 2, w=3) == [3, 1]
    assert interval_sched(torch.tensor([1.0, 5.0]), 2, 9, w=3) == [1, 3]


@pytest.mark.parametrize('n', [1, 7, 32, 100])
@pytest.mark.parametrize(
    'a, b', [(0, 1), (0.1, 0.7), (0.29, 0.57), (1 / 3, 2 / 3), (0.55, 1), (0.07, 0.58)]
)
def test_fractions_against_diffusers(n, a, b):
    guiders = pytest.importorskip('diffusers.guiders')
    logging.getLogger('diffusers').setLevel(logging.ERROR)  # guiders are experimental there
    g = guiders.ClassifierFreeGuidance(start=a, stop=b)
    g._num_inference_steps = n

    def enabled(i):
        g._step = i
        return g._is_cfg_enabled()

    theirs = [i for i in range(n) if enabled(i)]
    levels = edm_sigmas(n)
    if not theirs:
        raises('at least one', interval_of_fractions, levels, a, b)
    else:
        lo, hi = interval_of_fractions(levels, a, b)
        assert [i for i, s in enumerate(levels[:n]) if _in_interval(s, lo, hi)] == theirs


def guided_steps(name):
    return [
        i
        for i, s in enumerate(edm_sigmas(32)[:-1])
        if _in_interval(s, *INTERVALS[name]['interval'])
    ]


def test_presets():
    for v in INTERVALS.values():
        assert set(v) == {'interval', 'w'}
        assert 0 < v['interval'][0] < v['interval'][1]
        assert v['w'] > 1
    assert guided_steps('EDM2-XXL FID') == list(range(17, 23))
    assert guided_steps('EDM2-XXL FD-DINOv2') == list(range(13, 20))
    by_sigma = interval_sched(edm_sigmas(32)[:-1], 0.283, 1.609, w=2)
    assert by_sigma == interval_sched(range(32), 16, 22, w=2)


# --- bad inputs: one clear sentence that names the argument


def raises(contains, f, *args, **kwargs):
    with pytest.raises((ValueError, TypeError)) as e:
        f(*args, **kwargs)
    text = str(e.value)
    assert contains in text
    assert 'expected' in text
    assert 'got' in text
    assert len(text) < 160
    assert '\n' not in text


COSINE = [
    'max_val',
    'min_val',
    'num_cycles',
    'num_warmup_steps',
    'warmup_init_val',
    'k_decay',
    'cycle_mul',
    'cycle_decay',
    'cycle_limit',
    'num_steps',
]


@pytest.mark.parametrize('v', [NAN, INF, -INF, 1e101, '1', None, 1j, True, [1.0], np.ones(2)])
@pytest.mark.parametrize('k', COSINE)
def test_bad_numbers_of_the_cosine(k, v):
    raises(f'{k}: expected', get_cos_sched, **{k: v})


BAD_COSINES = dict(
    num_steps=[0, -1, 2.5, 50.0, 10**9],
    num_warmup_steps=[-1, 51, -0.5, 2.5],
    k_decay=[0, -1, -0.5, 1000],
    cycle_mul=[0, -1, 1 + 1e-9, 1 - 1e-16 * 3],
)


@pytest.mark.parametrize('k, v', [(k, v) for k, vs in BAD_COSINES.items() for v in vs])
def test_bad_ranges_of_the_cosine(k, v):
    raises(f'{k}: expected', get_cos_sched, **{k: v})


@pytest.mark.parametrize('s', SHAPED)
def test_bad_shapes(s):
    for v in (NAN, INF, 'a', None, True):
        raises('w: expected', s, w=v)
        raises('base: expected', s, base=v)
    for v in (0, 1.5, NAN, True, '5', 10**9):
        raises('num_steps: expected', s, v)


@pytest.mark.parametrize('k, v', [(k, v) for k in 'ab' for v in (0.9, -1, NAN, 1e6, '2', True)])
def test_bad_beta(k, v):
    raises(f'{k}: expected', beta_sched, **{k: v})


@pytest.mark.parametrize('v', [0, -1, NAN, True])
def test_bad_kappa(v):
    raises('kappa: expected', pcs_sched, kappa=v)


def test_bad_inverse():
    raises('max_val: expected', inv_kdecay_sched, max_val=True)
    raises('k_decay: expected', inv_kdecay_sched, k_decay=0)


def test_bad_formulas():
    raises('f: expected a function', make_sched, None)
    raises('f: expected a function', make_sched, [1, 2])
    raises('f: expected a function of one number', make_sched, lambda: 1)
    raises('f: expected a function of one number', make_sched, lambda a, b: 1)
    raises('f(0): expected a finite number', make_sched, lambda tau: NAN)
    raises('f(0.5): expected', make_sched, lambda tau: 'a', 1)
    raises('f(0): expected', make_sched, lambda tau: True, 5)
    raises('f(0): expected', make_sched, lambda tau: None)


@pytest.mark.parametrize('f', [clamp_sched, warmup_sched, cycle_sched])
@pytest.mark.parametrize(
    'v',
    [[], 3, 'abc', None, {}, [NAN], ['1'], [1, None], [True], [[1, 2], 3], [[1, 2], [3]], [[]]],
    ids=repr,
)
def test_bad_schedules(f, v):
    raises('ws: expected', f, v)


def test_bad_clamps():
    raises('low: expected a number or 2 of them, got 3', clamp_sched, [1, 2], [1, 2, 3])
    raises('high: expected a number or 2 of them, got 1', clamp_sched, [1, 2], None, [1])
    for low, high in ((3, 2), ([1, 3], 2), (2, [3, 1])):
        raises('expected low <= high', clamp_sched, [1, 2], low, high)
    for v in (NAN, 'a', True):
        raises('low: expected', clamp_sched, [1, 2], low=v)
        raises('high: expected', clamp_sched, [1, 2], high=v)


def test_bad_warmups_and_cycles():
    for v in (-1, 1.5, NAN, True, '2'):
        raises('num_warmup_steps: expected', warmup_sched, [1], v)
    raises('start: expected', warmup_sched, [1], 2, INF)
    for v in (0, 1.5, NAN, True):
        raises('num_cycles: expected', cycle_sched, [1], v)
    for v in (-0.1, 1.1, NAN, True):
        raises('cycle_decay: expected', cycle_sched, [1], 2, v)
    raises('base: expected', cycle_sched, [1], base=NAN)


def test_bad_points():
    for v in ([], 3, [1, 2], [(0, 1, 2)], {0: 1}, None):
        raises('points: expected', points_sched, v)
    for v in (-0.1, 1.1, NAN, '0', None, True):
        raises('progress: expected', points_sched, [(v, 1)])
    for v in (NAN, INF, 'a', True):
        raises('w: expected', points_sched, [(0, v)])
    raises('got 1 twice', points_sched, [(1, 0), (0, 1), (1, 0)])
    raises("kind: expected 'linear' or 'pchip'", points_sched, HAND, 5, 'cubic')
    raises('kind: expected', points_sched, HAND, 5, None)


def test_bad_intervals():
    raises('xs: expected', interval_sched, [], 0, 1)
    raises('xs: expected', interval_sched, [NAN], 0, 1)
    raises('xs: expected', interval_sched, 5, 0, 1)
    raises('xs: expected', interval_sched, [[1, 2]], 0, 1)
    for v in (None, NAN, 'a', True):
        raises('lo: expected', interval_sched, [1], v, 1)
        raises('hi: expected', interval_sched, [1], 0, v)
    raises('lo: expected a number below hi', interval_sched, [1], 2, 1)
    raises('w: expected', interval_sched, [1], 0, 1, w=NAN)
    raises('outside: expected', interval_sched, [1], 0, 1, outside=True)


BAD_SIGMAS = [
    [1, 2, 3],
    [3, 2, 2],
    [3, 1, -1],
    [3, NAN],
    [3],
    3,
    [],
    [[3, 2], [1, 0]],
    [3, [2], 0],
    None,
    'abc',
    [3, True],
]


@pytest.mark.parametrize('v', BAD_SIGMAS, ids=repr)
@pytest.mark.parametrize('f', [interval_of_steps, interval_of_fractions])
def test_bad_sigmas(f, v):
    raises('sigmas: expected', f, v)


def test_bad_steps_and_fractions():
    levels = [3, 2, 1, 0]
    for v in (-1, 3, 1.5, NAN, True):
        raises('start: expected', interval_of_steps, levels, v)
    for v in (1, 0, 4, 2.5):
        raises('stop: expected', interval_of_steps, levels, 1, v)
    for v in (-0.1, 1.1, NAN, 'a', True):
        raises('start: expected', interval_of_fractions, levels, start=v)
        raises('stop: expected', interval_of_fractions, levels, stop=v)
    for a, b in ((0.5, 0.5), (0.7, 0.2), (1, 1), (0, 0.3)):
        raises('at least one of 3 steps', interval_of_fractions, levels, a, b)
