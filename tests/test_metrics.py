"Metrics: closed forms, scipy, direct sums, invariances, wrong ranges, bad input."

import math
import warnings

import clear_errors
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from cf_guidance.lab.fashion import colourise, fashion_mnist, load_net, random_colours
from cf_guidance.lab.metrics import (
    ImageEval,
    Stats,
    _class_accuracy,
    _fashion_features,
    _white_on_black,
    fid,
    fid_infinity,
    frechet,
    get_features,
    kid,
    mmd2,
    precision_recall,
    saturation,
    step_distance,
)

nan, inf = math.nan, math.inf
GREY, KIND = fashion_mnist()
REAL = F.pad(GREY[:, None].float() / 127.5 - 1, (2, 2, 2, 2), value=-1)
NET = load_net()
FEATURES = get_features(REAL, _fashion_features(NET))
ONE = Stats(FEATURES)
ORDER = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
X, Y = REAL[ORDER[:1000]], KIND[ORDER[:1000]]
EVALUATE = ImageEval(REAL[ORDER[1000:]])


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


def quietly(f, *args):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args)


def warned(f, *args):
    "What it returns, and its warnings."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        value = f(*args)
    return value, [str(w.message) for w in seen]


def same(a, b, rtol=1e-10):
    assert (a.n, a.cov.dtype) == (b.n, torch.float64)
    assert torch.allclose(a.mean, b.mean, rtol=rtol, atol=0)
    assert (a.cov - b.cov).norm() < rtol * b.cov.norm()


# statistics


def test_statistics_of_a_mean_far_away():
    far = FEATURES.double() + 1e6
    s = Stats(far[:1]) + Stats(far[1:900]).update(far[900:])
    assert (s.cov - ONE.cov).norm() < 1e-6 * ONE.cov.norm()


def test_a_sum_changes_neither_side():
    a, b = Stats(FEATURES[:900]), Stats(FEATURES[900:])
    same(a + b, ONE)
    same(b + a, ONE)
    same(a, Stats(FEATURES[:900]))
    same(b, Stats(FEATURES[900:]))
    assert (Stats() + Stats()).n == 0


# FID


def test_fid_with_the_root_of_scipy():
    a = Stats(randn(400, 12, seed=1) @ randn(12, 12, seed=2))
    b = Stats(randn(500, 12, seed=3) @ randn(12, 12, seed=4) + 1)
    root = scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy()).real
    traces = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()
    want = traces.item() - 2 * np.trace(root)
    assert fid(a, b) == pytest.approx(want, rel=1e-8)
    assert fid(b, a) == pytest.approx(want, rel=1e-8)
    assert type(fid(a, b)) is float
    q = torch.linalg.qr(randn(12, 12))[0]
    turned = frechet(q @ a.mean + 5, q @ a.cov @ q.T, q @ b.mean + 5, q @ b.cov @ q.T)
    assert turned == pytest.approx(want, rel=1e-8)
    scaled = frechet(3 * a.mean, 9 * a.cov, 3 * b.mean, 9 * b.cov)
    assert scaled == pytest.approx(9 * want, rel=1e-8)
    point = frechet(a.mean, torch.zeros(12, 12), a.mean, b.cov)
    assert point == pytest.approx(b.cov.trace().item(), abs=1e-6)


def test_fid_of_the_same():
    assert fid(FEATURES, FEATURES) < 1e-6
    assert 0 <= quietly(fid, FEATURES[:20], FEATURES[:20]) < 1e-5
    assert fid(FEATURES.numpy(), FEATURES.double()) < 1e-6


def test_singular_covariances():
    "20 images of 128 features: the trace of the root from the images instead of the features."
    a, b = Stats(FEATURES[:20]), Stats(FEATURES[20:40])
    c, d = (o.double() - o.double().mean(0) for o in (FEATURES[:20], FEATURES[20:40]))
    cross = torch.linalg.svdvals(c @ d.T).sum().item() / 19
    traces = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()
    assert quietly(fid, a, b) == pytest.approx(traces.item() - 2 * cross, abs=1e-5)


def test_fid_far_away():
    far = FEATURES.double() + 1e5
    want = fid(FEATURES[:1000], FEATURES[1000:])
    assert fid(far[:1000], far[1000:]) == pytest.approx(want, abs=1e-6)


def test_warning_about_pictures_that_are_alike():
    value, (message,) = warned(fid, FEATURES[:1].repeat(1000, 1), FEATURES)
    want = (FEATURES[0].double() - ONE.mean).square().sum() + ONE.cov.trace()
    assert value == pytest.approx(want.item(), abs=1e-6)
    assert 'are constant' in message


def test_warning_about_a_constant_feature():
    g = FEATURES.clone()
    g[:, 7] = 1 / 3
    value, (message,) = warned(fid, g, FEATURES)
    assert '1 of 128' in message
    assert '(number 7)' in message
    assert value > 0
    assert len(warned(fid, g, g)[1]) == 2


def test_warning_about_few_images():
    f = FEATURES
    assert warned(fid, f, f[:1000])[1] == []
    assert [m.split(':')[0] for m in warned(fid, f[:128], f[:100])[1]] == ['x', 'ref']
    assert warned(fid, f[:129], f)[1] == []
    assert 'about' in warned(fid, f[:128], f)[1][0]


# KID, precision and recall


def test_kid_has_a_seed():
    a, b = FEATURES[:300], FEATURES[300:600]
    first = kid(a, b, subsets=3)
    assert kid(a, b, gen(0), subsets=3) == kid(a, b, 0, subsets=3) == first
    assert kid(a, b, gen(1), subsets=3) != first


LINE = torch.linspace(0, 10, 11, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    'x, ref, k, want',
    [
        ((LINE[:6] + 0.5).tolist(), LINE[:6], 1, 1),
        ([[-1.01], [-0.99], [5.5], [10.99], [11.01]], LINE, 1, 3 / 5),
        ([[-1.01], [-1.99], [-2.01]], LINE, 2, 2 / 3),
        ([[-1.0], [11.0], [11.5]], LINE, 1, 2 / 3),  # the surface belongs to the ball
    ],
)
def test_precision_on_a_line(x, ref, k, want):
    assert precision_recall(x, ref, k=k).precision == want


def test_precision_and_recall_are_invariant():
    a, b = randn(200, 5, seed=7), 1.2 * randn(300, 5, seed=8)
    turn, pr = torch.linalg.qr(randn(5, 5))[0], precision_recall(a, b)
    assert pr == precision_recall(b, a)[::-1]
    assert pr == precision_recall(3 * a @ turn + 7, 3 * b @ turn + 7)
    assert pr == precision_recall(a.flip(0), b.flip(0))


def test_balls_without_size():
    point, many = torch.full((50, 3), 1 / 3), randn(100, 128).repeat(6, 1)
    assert precision_recall(point, point) == (1, 1)
    assert {precision_recall(many[:n], many).precision for n in range(4, 20)} == {1}
    assert precision_recall(many + 1e-3, many).precision == 0


def test_precision_and_recall_by_hand():
    def direct(a, b, k):
        radii = torch.cdist(b, b).sort(1).values[:, k]
        return (torch.cdist(a, b) <= radii).any(1).double().mean().item()

    big, other = randn(1300, 5, seed=9), randn(1100, 5, seed=10) + 0.5
    want = direct(big, other, 4), direct(other, big, 4)
    assert precision_recall(big, other, k=4) == pytest.approx(want, abs=1e-12)


# images


def test_grey_values_beyond_the_range_are_clipped():
    assert torch.equal(_white_on_black(3 * REAL[:9]), _white_on_black((3 * REAL[:9]).clamp(-1, 1)))


def test_image_eval_takes_features_too():
    row = EVALUATE(X, Y)
    assert EVALUATE(EVALUATE.get_features(X), Y) == pytest.approx(row, rel=1e-9)
    assert EVALUATE.kid(X, generator=gen(0)) == EVALUATE.kid(X)
    got, want = EVALUATE.fid_infinity(X), fid_infinity(EVALUATE.get_features(X), EVALUATE.real)
    assert got.sizes == want.sizes
    assert [got.value, got.slope] == pytest.approx([want.value, want.slope], rel=1e-9)
    assert got.fids == pytest.approx(want.fids, rel=1e-9)  # a last bit may differ


def test_image_eval_with_another_network():
    def tiny(x):
        return F.avg_pool2d(x, 8).flatten(1)

    other = ImageEval(REAL[ORDER[1000:]], tiny, batch_size=77)
    assert other.real.shape == (1000, 16)
    assert list(other(X)) == ['n', 'fid', 'kid', 'kid_std', 'precision', 'recall']
    want = fid(tiny(X), tiny(REAL[ORDER[1000:]]))
    assert other.fid(X) == pytest.approx(want, abs=1e-9)
    clear_errors.check(lambda: other.accuracy(X, Y), 'head')


@torch.no_grad()
def test_accuracy():
    right = (NET(_white_on_black(X))[0].argmax(1) == Y).double().mean().item()
    assert EVALUATE.accuracy(X, Y)[0] == pytest.approx(right, abs=1e-9)


def test_coloured_and_grey_images_have_the_same_features():
    got, want = ImageEval(_white_on_black(REAL[:600])).real, FEATURES[:600]
    assert (got - want).abs().max() < 1e-4


def test_no_random_number_is_used_up():
    before = torch.random.get_rng_state()
    EVALUATE(X)
    assert torch.equal(before, torch.random.get_rng_state())


def test_step_distance_in_features():
    x = torch.randn(2, 3, 3, 4, 4, generator=gen())
    assert step_distance(x, lambda x: x.flatten(1)[:, :7]).shape == (2, 3)


# wrong ranges

PICTURES = colourise(GREY[:1000], *random_colours(1000, 0))
COLOURED = ImageEval(PICTURES)


@pytest.mark.parametrize('x', [X, PICTURES])
def test_pictures_in_0_255_are_refused(x):
    clear_errors.check(lambda: COLOURED.fid(x * 127.5 + 127.5), 'x: expected images in [-1, 1]')
    clear_errors.check(lambda: ImageEval(x * 127.5 + 127.5), 'x: expected images in [-1, 1]')


@pytest.mark.parametrize('x', [X, PICTURES, PICTURES[:3]])
def test_pictures_in_0_1_get_a_warning(x):
    assert 'no value below 0' in warned(COLOURED.get_features, x / 2 + 0.5)[1][0]


@pytest.mark.parametrize('i', range(0, 1000, 97))
def test_no_warning_for_a_single_right_picture(i):
    assert warned(COLOURED.get_features, PICTURES[i : i + 1])[1] == []


def test_noisy_pictures_are_fine():
    assert warned(EVALUATE.get_features, X + 0.5 * torch.randn(X.shape, generator=gen()))[1] == []


def test_nan_is_never_scored():
    x = X.clone()
    x[3, 0, 5, 5] = nan
    clear_errors.check(lambda: EVALUATE(x), 'x: expected finite images, got NaN or infinity in 1')
    clear_errors.check(lambda: EVALUATE.accuracy(x, Y), 'x: expected finite images')
    clear_errors.check(lambda: ImageEval(x), 'x: expected finite images')


# bad input

F300, EYE = FEATURES[:300], torch.eye(2)
NOT_POSITIVE = [[1.0, 2.0], [2.0, 1.0]]
SKEW = [[1.0, 0.5], [0.0, 1.0]]
Z2 = [0.0, 0.0]
BAD_FEATURES = ['abc', None, ['a'], torch.zeros(3), torch.zeros(0, 4), F300 * nan, F300 > 0]
BAD = [
    (lambda: frechet([0.0], [[1.0]], Z2, EYE), 'mean_b'),
    (lambda: frechet([0.0], EYE, [0.0], [[1.0]]), 'mean_a, cov_a'),
    (lambda: frechet(Z2, SKEW, Z2, EYE), 'cov_a'),
    (lambda: frechet(Z2, EYE, Z2, SKEW), 'cov_b'),
    (lambda: frechet(Z2, NOT_POSITIVE, Z2, EYE), 'cov_a'),
    (lambda: frechet(Z2, EYE, Z2, NOT_POSITIVE), 'cov_b'),
    (lambda: frechet(Z2, EYE, Z2, -EYE), 'cov_b'),
    (lambda: frechet([nan], [[1.0]], [0.0], [[1.0]]), 'mean_a'),
    (lambda: frechet('a', [[1.0]], [0.0], [[1.0]]), 'mean_a'),
    (lambda: Stats.from_moments(Z2, NOT_POSITIVE, 9), 'cov'),
    (lambda: Stats().cov, 'at least 2 images, got 0'),
    (lambda: Stats(FEATURES[:1]).cov, 'at least 2 images, got 1'),
    (lambda: Stats(FEATURES).update(FEATURES[:, :5]), 'x: expected 128 features'),
    (lambda: fid(F300[:1], F300), 'x: expected at least 2 images'),
    (lambda: fid(F300[:, :64], F300), 'x: expected 128 features'),
    (lambda: fid(REAL, F300), '(2000, 1, 32, 32)'),
    (lambda: fid_infinity(F300, F300), 'x: expected at least 512 images'),
    (lambda: fid_infinity(FEATURES, F300, sizes=[500]), 'sizes'),
    (lambda: fid_infinity(FEATURES, F300, sizes=[500, 2001]), 'sizes'),
    (lambda: fid_infinity(FEATURES, F300, sizes=5), 'sizes'),
    (lambda: fid_infinity(FEATURES, F300, sizes=[2.5, 9]), 'sizes'),
    (lambda: fid_infinity(FEATURES, F300, generator='a'), 'generator'),
    (lambda: kid(F300, F300, generator=1.5), 'generator'),
    (lambda: kid(F300[:3], F300), 'x: expected at least 4 images'),
    (lambda: get_features(X[:0], F.relu), 'x'),
    (lambda: get_features(None, F.relu), 'x'),
    (lambda: get_features(X, 5), 'features'),
    (lambda: ImageEval(None), 'real'),
    (lambda: ImageEval([1]), 'real'),
    (lambda: ImageEval(X[:9], head=5), 'head'),
    (lambda: kid(F300, F300, subsets=10**9), 'subsets'),
    (lambda: EVALUATE.fid(None), 'x'),
    (lambda: EVALUATE.fid(X[:, :, :28]), '(1000, 1, 28, 32)'),
    (lambda: EVALUATE.fid(GREY[:, None]), 'uint8'),
    (lambda: EVALUATE.accuracy(X[:3], [0, 1]), 'labels'),
    (lambda: EVALUATE.accuracy(X[:3], 'abc'), 'labels'),
    (lambda: EVALUATE.accuracy(X[:3], [0.0, 1.0, 2.0]), 'labels'),
    (lambda: _class_accuracy(torch.zeros(3, 10), [0, 1, 10]), 'labels'),
    (lambda: saturation(REAL / 2 + 0.5), 'x: expected images (N, 3, H, W)'),
    (lambda: saturation(PICTURES), 'x: expected images in [0, 1]'),
    (lambda: saturation(PICTURES * nan), 'x: expected finite'),
    (lambda: saturation([1]), 'x'),
    (lambda: step_distance(REAL), 'x'),
    (lambda: step_distance(PICTURES[None] * nan), 'x'),
]
for o in BAD_FEATURES:
    BAD += [(lambda f=f, o=o: f(o, F300), 'x') for f in (fid, mmd2, precision_recall, kid)]
    BAD += [(lambda f=f, o=o: f(F300, o), 'ref') for f in (fid, mmd2, precision_recall, kid)]
for o in (0, -1, 1.5, True, 'a', None):
    BAD += [
        (lambda o=o: precision_recall(F300, F300, k=o), 'k'),
        (lambda o=o: kid(F300, F300, subsets=o), 'subsets'),
        (lambda o=o: get_features(X, F.relu, o), 'batch_size'),
        (lambda o=o: Stats.from_moments(Z2, EYE, o), 'n'),
    ]
BAD += [(lambda o=o: kid(F300, F300, size=o), 'size') for o in (0, 1, -1, 2.5, True, 'a', 301)]
BAD += [(lambda: precision_recall(F300[:3], F300, k=3), 'k: expected a whole number from 1 to 2')]
BAD += [(lambda o=o: Stats.from_moments(Z2, EYE, o), 'n') for o in (nan, 1)]


@pytest.mark.parametrize('call, argument', BAD)
def test_bad_input(call, argument):
    clear_errors.check(call, argument)
