"Rules, post-rules and the classic transforms: formulas, edges, bad inputs."

import copy
import importlib.util
import inspect
import itertools
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from rule_helpers import alone, is_per_sample
from torch._dynamo.testing import CompileCounter

from cf_guidance import transforms
from cf_guidance.schedules import get_cos_sched
from cf_guidance.transforms import (
    APG_PRESETS,
    BaseNormGuidance,
    FullNormGuidance,
    GuidanceTfm,
    PostRule,
    Rule,
    TNormGuidance,
    _half,
    _levels,
    _perpendicular,
    _quantile,
    adg,
    apg,
    auto_cfg,
    base_norm,
    beta_cfg,
    cfg,
    cfg_zero,
    dynamic_threshold,
    ep_cfg,
    fdg,
    full_norm,
    limit_norm,
    mahiro,
    mambo,
    mimic,
    post_rule,
    rescale,
    rule,
    skimmed,
    smc,
    t_norm,
    tcfg,
    tsr,
)

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)
CLASSIC = {
    GuidanceTfm: cfg,
    BaseNormGuidance: base_norm,
    TNormGuidance: t_norm,
    FullNormGuidance: full_norm,
}
NAMED = {k: o for k, o in vars(transforms).items() if isinstance(o, Rule | PostRule)}
MORE = [
    rescale.of(phi=1.0),
    ep_cfg.of(trim=0.49),
    apg.of(radius=0.5, eta=-1.0, beta=1.0),
    apg.of(radius=0.0),
    apg.of(beta=0.0),
    adg.of(most=0.0),
    adg.of(most=math.pi),
    mambo.of(alpha=0.0),
    mambo.of(alpha=1e9),
    beta_cfg.of(gamma=0.5),
    fdg.of(shares=[0.0]),
    fdg.of(shares=(2.0, 0.0, 1.0, 0.3)),
    dynamic_threshold.of(p=0.0),
    mimic.of(p=0.5, phi=0.5, mimic=0.0),
    smc.of(lam=0.0, k=2.0),
    skimmed.of(skim=1.0),
    limit_norm.of(most=2.0),
    tsr.of(k=4.0, std=0.1),
]
RULES = [*NAMED.values(), *MORE]
every_rule = pytest.mark.parametrize('f', RULES, ids=repr)
every_name = pytest.mark.parametrize('f', NAMED.values(), ids=repr)
POSTS = [o for o in RULES if isinstance(o, PostRule)]
COMBINE = [o for o in RULES if isinstance(o, Rule)]
MOVING = 'dynamic_threshold', 'epsilon_scaling', 'tsr'  # these change the positive too
SHAPE = (3, 4, 8, 8)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(*shape, seed=0):
    return rand(2, *shape, seed=seed)


def two_sizes():
    "Two samples, the second 20 times larger."
    return pair(2, 4, 8, 8, seed=1) * torch.tensor([1.0, 20.0]).view(-1, 1, 1, 1)


def size(x):
    return x.flatten(1).norm(dim=1)


def same(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * float(b.abs().max()))


# --- what rules say of themselves


def names(test):
    return [k for k, f in NAMED.items() if test(f)]


def test_spaces():
    image = ['apg', 'adg', 'fdg', 'mimic', 'mahiro', 'skimmed', 'auto_cfg']
    image += ['ep_cfg', 'cfg_norm', 'dynamic_threshold']
    assert names(lambda f: f.space == 'any') == ['cfg']
    assert sorted(names(lambda f: f.space == 'x0')) == sorted(image)
    assert names(lambda f: f.space == 'v') == ['rescale']
    assert names(lambda f: f.space == 'flow') == ['cfg_zero', 'mambo', 'smc', 'limit_norm']


def test_facts():
    no_pos = ['base_norm', 't_norm', 'full_norm', 'beta_cfg', 'mimic', 'smc', 'auto_cfg']
    assert names(lambda f: isinstance(f, Rule) and f.pos_at is None) == no_pos
    assert names(lambda f: isinstance(f, Rule) and f.pos_at not in (None, 1)) == []
    at_neg = [
        'cfg',
        'base_norm',
        't_norm',
        'full_norm',
        'beta_cfg',
        'mahiro',
        'skimmed',
        'auto_cfg',
    ]
    assert names(lambda f: isinstance(f, Rule) and f.neg_at is not None) == at_neg
    assert names(lambda f: isinstance(f, Rule) and f.stateful) == ['apg', 'smc']
    assert names(lambda f: isinstance(f, PostRule)) == [
        'rescale',
        'ep_cfg',
        'cfg_norm',
        'limit_norm',
        'dynamic_threshold',
        'epsilon_scaling',
        'tsr',
    ]
    assert names(lambda f: getattr(f, 'takes_sigma', False)) == ['tsr']


@every_rule
def test_is_a_value(f):
    assert pickle.loads(pickle.dumps(f)) == f
    assert copy.copy(f) is f
    assert copy.deepcopy(f) is f
    assert hash(f.of()) == hash(f)
    assert f.of() == f
    assert f.__doc__ == f.of().__doc__ == f.formula.__doc__
    assert f.__name__ == f.formula.__name__
    assert [*inspect.signature(f).parameters] == [*inspect.signature(f.formula).parameters]


def test_settings():
    assert rescale.settings == dict(phi=0.7)
    assert fdg.of(shares=[1.0, 2.0]).settings == dict(shares=(1.0, 2.0))
    assert cfg.of().settings == {}
    assert apg.of(beta=0.0).of(eta=0.5).settings == dict(eta=0.5, radius=math.inf, beta=0.0)
    assert apg.of(beta=0.0) != apg
    assert apg.of(radius=math.inf, beta=1, eta=-3).settings == dict(radius=math.inf, beta=1, eta=-3)
    assert repr(apg.of(beta=0.0)) == 'apg.of(eta=0.0, radius=inf, beta=0.0)'
    assert repr(cfg) == 'cfg'
    with pytest.raises(TypeError):
        apg.settings['beta'] = 0.0
    with pytest.raises(AttributeError):
        apg.space = 'eps'


def test_presets():
    assert {k: o['w'] for k, o in APG_PRESETS.items()} == {
        'SDXL': 15,
        'SD2.1': 10,
        'DiT-XL/2': 4,
        'EDM2-S': 4,
    }
    assert all(o['rule'].formula is apg.formula for o in APG_PRESETS.values())


def test_a_rule_in_a_function_is_pickled_by_its_fields():
    one = Rule(_third, space='x0', settings=dict(share=2.0))
    assert pickle.loads(pickle.dumps(one)) == one
    assert pickle.loads(pickle.dumps(one)).settings == dict(share=2.0)


def _third(neg, pos, w, *, share=1.0):
    return neg + share * (pos - neg)


# --- formulas against literal transcriptions


def slow_apg(neg, pos, w, before, eta, radius, beta):
    out = []
    for u, c, b in zip(neg.double(), pos.double(), before.double(), strict=True):
        g = c - u + beta * b
        g = g * min(1.0, radius / g.norm().item())
        axis = c / c.norm()
        par = (g * axis).sum() * axis
        out.append(c + (w - 1) * (g - par + eta * par))
    return torch.stack(out).float()


@pytest.mark.parametrize(
    'eta, radius, beta', [(0.0, 3.0, -0.5), (0.3, 100.0, 0.7), (1.0, 0.1, -0.75)]
)
def test_apg(eta, radius, beta):
    neg, pos = two_sizes()
    before = 3 * pos - neg
    got = apg.of(eta=eta, radius=radius, beta=beta)(neg, pos, 4.0, before)[0]
    same(got, slow_apg(neg, pos, 4.0, before, eta, radius, beta))


def test_apg_remembers():
    neg, pos = two_sizes()
    first, state = apg(neg, pos, 3.0, None)
    second, _ = apg(neg + 1, pos, 3.0, state)
    fresh = apg(neg + 1, pos, 3.0)[0]
    assert torch.equal(state, pos - neg)
    assert not torch.allclose(second, fresh)
    mixed = state.clone()
    mixed[0] = 0  # a row of zeros remembers nothing
    out = apg(neg + 1, pos, 3.0, mixed)[0]
    same(out[0], fresh[0])
    same(out[1], second[1])
    same(apg.of(radius=1.0)(neg, pos, 3.0)[1], pos - neg)
    assert apg.of(beta=0.0)(neg, pos, 3.0, None)[1] is None
    assert apg(neg.half(), pos.half(), 3.0)[1].dtype == torch.float32
    for f in (apg, apg.of(radius=1.0)):
        zeros = torch.zeros_like(neg)
        assert torch.equal(f(neg, pos, 3.0, zeros)[0], f(neg, pos, 3.0, None)[0])


def turn(deg):
    return torch.tensor([[math.cos(math.radians(deg)), math.sin(math.radians(deg))]])


@pytest.mark.parametrize('a, b, w', [(10, 30, 2.0), (30, 10, 1.5), (0, 100, 1.2), (-20, 5, 0.4)])
def test_adg_turns(a, b, w):
    same(adg(3 * turn(a), 2 * turn(b), w), 2 * turn(b + (w - 1) * (b - a)))


def test_adg_edges():
    same(adg(turn(0), turn(20), 7.0), turn(50))
    same(adg(turn(0), turn(20), 7.0, most=1e-9), turn(20))
    u = rand(1, 500)
    v = _perpendicular(rand(1, 500, seed=1), u)
    v = v * size(u) / size(v)
    for o in (u, -u, 3 * u, -0.1 * u, 0 * u):  # no plane, no turn
        assert torch.equal(adg(o, u, 9.0), u)
    for e, tol in ((1e-2, 0.05), (1e-3, 0.05), (1e-5, 0.1)):  # small angles
        got = adg(u, u + e * v, 5.0) - (u + e * v)
        assert size(got - 4 * e * v) / size(4 * e * v) < tol


def svd_tcfg(neg, pos, w):
    both = torch.stack([neg, pos], 1).flatten(2).double()
    v = torch.linalg.svd(both, full_matrices=False).Vh[:, 0]
    clean = ((neg.flatten(1).double() * v).sum(1, keepdim=True) * v).view_as(neg)
    return cfg(clean, pos.double(), w).float()


def test_tcfg():
    neg, pos = two_sizes()
    hard = ((neg, pos), (1e-3 * neg, pos), (pos + 0.01 * neg, pos), (-pos + 0.1 * neg, pos))
    for a, b in (*hard, (100 * neg, pos)):
        same(tcfg(a, b, 3.0), svd_tcfg(a, b, 3.0), 1e-4)
    a = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]])
    b = torch.tensor([[0.0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert tcfg(a, b, 2.0).tolist() == [[-1, 2, 0], [0, 2, 0], [0, 0, 0], [-1, 0, 0]]


@pytest.mark.parametrize('n', [1, 2, 7, 100])
@pytest.mark.parametrize('q', [0, 0.1, 0.5, 0.995, 1])
def test_quantile(n, q):
    x = rand(3, n)
    torch.testing.assert_close(_quantile(x, q), x.quantile(q, dim=1))


def slow_mimic(neg, pos, w, mimic, p):
    g, m = (neg.double() + o * (pos.double() - neg.double()) for o in (w, mimic))
    out = torch.empty_like(g)
    for i, j in itertools.product(range(g.shape[0]), range(g.shape[1])):
        a, b = (o[i, j] - o[i, j].mean() for o in (g, m))
        top = max(b.abs().max(), a.abs().flatten().quantile(p))
        out[i, j] = a.clamp(-top, top) / top * b.abs().max() + g[i, j].mean()
    return out.float()


@pytest.mark.parametrize(
    'w, m, p', [(15.0, 7.0, 1.0), (15.0, 7.0, 0.9), (5.0, 7.0, 0.9), (9.0, 1.0, 0.5)]
)
def test_mimic(w, m, p):
    neg, pos = two_sizes()
    same(mimic(neg, pos, w, mimic=m, p=p), slow_mimic(neg, pos, w, m, p))


def test_auto_cfg_by_hand():
    "A row of 8 values: a quarter are 2. At weight 8 they are 7 and 5, and -5 and -3."
    pos = torch.tensor([7.0, 0, 5, 1, 0, -5, 0, -3]).view(1, 1, 1, 8) / 8
    reach = ((7 + 5) / 2 + (5 + 3) / 2) / 2
    same(auto_cfg(0 * pos, pos, 4.0), 0.4 / reach * 8 * pos)


def test_auto_cfg_gives_each_channel_its_reach():
    neg, pos = two_sizes()
    got = auto_cfg(0 * neg, pos, torch.tensor([4.0, 12.0]))
    high, low = got.topk(2, -1).values, got.topk(2, -1, largest=False).values
    reach = (high.mean((2, 3)) + low.abs().mean((2, 3))) / 2
    same(reach, torch.tensor([[0.4], [1.2]]).expand(2, 4))


def test_the_delta_of_auto_cfg_has_no_scale():
    neg, pos = two_sizes()
    same(auto_cfg(9 * neg, 9 * pos, 5.0) - 9 * neg, auto_cfg(neg, pos, 5.0) - neg)


def test_auto_cfg_of_equal_predictions_is_both():
    neg, _ = two_sizes()
    same(auto_cfg(neg, neg, 5.0), neg)


def test_fdg():
    neg, pos = two_sizes()
    x = rand(1, 1, 6, 9)
    down, up = _half(9, x)
    k = torch.tensor([1, 4, 6, 4, 1.0]) / 16
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode='replicate')
    blur = torch.nn.functional.conv2d(padded, torch.outer(k, k)[None, None])[..., ::2, ::2]
    same(_half(6, x)[0] @ x @ down.T, blur)
    same(up.sum(1), torch.ones(9))
    assert tuple(down.shape) == (5, 9)
    assert tuple(_half(1, x)[0].shape) == (1, 1)
    video = rand(2, 2, 3, 4, 8, 7)  # a video has a height and a width too
    frame = fdg(video[0][:, :, 1], video[1][:, :, 1], 5.0)
    same(fdg(*video, 5.0)[:, :, 1], frame)
    same(fdg(neg, pos, 9.0), pos + 8 * _levels(pos - neg, (1.0, 0.5)))
    wave = torch.cos(math.pi * torch.arange(16.0)).expand(1, 1, 16, 16)
    finest = _levels(wave, (1.0, 0.0))
    same(finest[..., 4:-4], wave[..., 4:-4])  # the finest wave is all in the finest level


def test_limits_of_the_papers():
    neg, pos = two_sizes()
    zero = 0 * neg
    same(mambo(neg, pos, 10.0, alpha=1e9), pos)
    same(cfg_zero(zero, pos, 2.0), 2 * pos)
    assert torch.equal(rescale(zero, 0 * pos), zero)
    constant = torch.ones_like(neg)
    assert torch.equal(rescale(constant, pos, phi=1.0), constant)  # nothing that varies
    shifted = cfg(neg + 5, pos + 5, 3.0)
    same(rescale(shifted, pos + 5, phi=1.0).flatten(1).std(1), pos.flatten(1).std(1))
    same(size(ep_cfg(shifted, pos + 5)), size(pos + 5))
    middle = slice(64, -64)

    def trimmed(x):
        return size(x.flatten(1).abs().sort(1).values[:, middle])

    same(trimmed(ep_cfg(cfg(neg, pos, 7.5), pos, trim=0.25)), trimmed(pos))


# --- both ends, all dtypes, hard numbers


def wide_range(dtype):
    "Predictions with values of very different size."
    scale = torch.rand(5, generator=torch.Generator().manual_seed(3)) ** 9
    a, b = (1000 * pair(3, 4, 6, 5) * scale).to(dtype)
    b[0, 0, 0, 0] = -0.0
    return a, b


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('f', COMBINE, ids=repr)
def test_exact_ends(f, dtype):
    a, b = wide_range(dtype)
    for at, end in ((f.pos_at, b), (f.neg_at, a)):
        if at is None:
            continue
        for w in (at, torch.tensor(at), [at] * 3):
            got = alone(f)(a, b, w)
            assert got.dtype == dtype
            assert torch.equal(got, end)
            assert torch.equal(got.signbit(), end.signbit())
            assert got.data_ptr() != end.data_ptr()
        mixed = alone(f)(a, b, torch.tensor([at, 3.3, at]))
        assert torch.equal(mixed[::2], end[::2])
        assert f not in NAMED.values() or f is mambo or not torch.equal(mixed[1], end[1])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_exact_ends_of_cfg(dtype):
    scale = torch.rand(3000, generator=torch.Generator().manual_seed(4)) ** 9
    a, b = (1000 * pair(2, 3000) * scale).to(dtype)
    for w in (1, 1.0, torch.tensor([1.0, 1.0])):
        assert torch.equal(cfg(a, b, w), b)
    for w in (0, 0.0, torch.tensor(0.0)):
        assert torch.equal(cfg(a, b, w), a)


@pytest.mark.parametrize('f', [o for o in COMBINE if o.pos_at is not None], ids=repr)
def test_no_jump_near_the_positive(f):
    neg, pos = two_sizes()
    got = alone(f)(neg, pos, f.pos_at + 1e-4)
    assert (size(got - pos) <= 0.01 * size(pos)).all()


@pytest.mark.parametrize('f', [o for o in POSTS if o.__name__ not in MOVING], ids=repr)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_post_rules_keep_the_positive(f, dtype):
    _, pos = wide_range(dtype)
    assert torch.equal(f(pos, pos), pos)


def hard_numbers(dtype):
    "Zeros, constants, equal and opposite values, the largest and the smallest numbers of a dtype."
    largest = torch.finfo(dtype).max if dtype.itemsize == 2 else 1e15
    tiny, shape = torch.finfo(dtype).tiny, (3, 4, 6, 5)
    r, zero = rand(*shape), torch.zeros(shape)
    sign = r.sign()
    negs = (zero, zero + 1, sign * largest, r.clamp(-1, 1) * largest, sign * tiny, r)
    poss = (zero, zero - 1, sign * largest, -sign * largest, largest + zero, sign * tiny, r)
    return [(a.to(dtype), b.to(dtype)) for a, b in itertools.product(negs, poss)]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32], ids=str)
@every_rule
def test_finite_in_finite_out(f, dtype):
    for (a, b), w in itertools.product(hard_numbers(dtype), (0.3, torch.tensor([0.0, 7.5, 40.0]))):
        got = alone(f)(a, b, w)
        assert got.dtype == dtype
        assert got.shape == a.shape
        assert got.isfinite().all()


@every_rule
def test_zero_and_equal_predictions(f):
    _, pos = two_sizes()
    zero = torch.zeros(3, 4, 6, 5)
    assert torch.equal(alone(f)(zero, zero, 3.0), zero)
    if f.__name__ not in ('base_norm', 'full_norm', *MOVING):
        same(alone(f)(pos, pos, 3.0), pos)


def test_zero_predictions_of_the_norm_rules():
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    for f in (cfg, base_norm, t_norm, full_norm):
        assert f(one, one, 0.3).tolist() == one.tolist()
    assert t_norm(zero, one, 0.3).tolist() == zero.tolist()
    assert base_norm(one, -one, 0.5).tolist() == zero.tolist()
    assert t_norm(torch.tensor([2.0, -4.0]), torch.tensor([3.0, -9.0]), 0.5).tolist() == [3, -6]


@pytest.mark.parametrize('dtype, tol', [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str)
@every_rule
def test_half_precision_is_rounded_once(f, dtype, tol):
    a, b = (o.to(dtype) for o in pair(3, 4, 6, 5))
    got, exact = alone(f)(a, b, 2.5), alone(f)(a.double(), b.double(), 2.5)
    tol = 3 * tol if isinstance(f, PostRule) else tol  # the prediction itself was rounded
    assert (got.double() - exact).norm() <= tol * exact.norm()


@pytest.mark.parametrize('f', [cfg, base_norm, t_norm, full_norm], ids=repr)
def test_norms_beyond_half_precision(f):
    big = 625 * rand(2, 4, 64, 64)
    near = big + 30 * rand(2, 4, 64, 64, seed=1)
    for dtype, tol in zip(DTYPES, (1e-3, 8e-3, 1e-5, 1e-12), strict=True):
        a, b = big.to(dtype), near.to(dtype)
        out, exact = f(a, b, 0.2), f(a.double(), b.double(), 0.2)
        assert out.dtype == dtype
        assert (out.double() - exact).norm() <= tol * exact.norm()
    a, b = big.half(), near.half()
    both = torch.tensor([0.2, 0.2])
    assert torch.equal(f(a, b, 0.2), f(a.float(), b.float(), both).half())
    a, b = big.bfloat16(), near.bfloat16()
    assert torch.equal(f(a, b, 0.2), f(a.double(), b.double(), 0.2).bfloat16())


def test_tiny_half_precision_differences_keep_their_direction():
    a = torch.full((1, 64), 1.0, dtype=torch.float16)
    b = a.clone()
    b[0, 0] += 2**-10
    got = t_norm(a, b, 0.5)[0, :2]
    torch.testing.assert_close(got, torch.tensor([5.0, 1.0], dtype=torch.float16))


# --- batches, shapes, layouts, gradients, compiled graphs


@pytest.mark.parametrize('shape', [(5, 4, 8, 8), (3, 4, 9, 7)])
@every_rule
def test_per_sample(f, shape):
    a, b = pair(*shape) * torch.logspace(-5, 5, shape[0]).view(-1, 1, 1, 1)
    w = 5 * torch.rand(shape[0], generator=torch.Generator().manual_seed(5))
    assert is_per_sample(f if isinstance(f, Rule) else alone(f), a, b, w, 1e-5)


@pytest.mark.parametrize('shape', [(4, 7), (5, 4, 8, 8), (3, 4, 33, 17)])
@pytest.mark.parametrize('f', [cfg, base_norm, t_norm, full_norm], ids=repr)
def test_norm_rules_per_sample(f, shape):
    scale = torch.logspace(-6, 6, shape[0]).view(-1, *(1,) * (len(shape) - 1))
    a, b = pair(*shape) * scale
    w = 3 * torch.rand(shape[0], generator=torch.Generator().manual_seed(5))
    assert is_per_sample(f, a, b, w)


def test_the_test_of_samples_sees_leaks():
    a, b = pair(2, 4, 8, 8)
    w = torch.tensor([0.2, 3.0])

    @rule('any', stateful=True)
    def leaky(neg, pos, w, state):
        return pos, (pos if state is None else pos + state.mean(0))

    assert not is_per_sample(leaky, a, b, w)
    assert not is_per_sample(lambda neg, pos, w: pos * (neg / neg.norm()).mean(), a, b, w)


@every_rule
def test_order_of_samples(f):
    a, b = pair(*SHAPE)
    w, order = torch.tensor([0.5, 2.0, 4.0]), torch.tensor([2, 0, 1])
    same(alone(f)(a[order], b[order], w[order]), alone(f)(a, b, w)[order])


@pytest.mark.parametrize(
    'shape',
    [(0, 4, 8, 8), (1, 4, 8, 8), (2, 4, 0, 3), (1, 1, 1, 1), (2, 3, 1, 2), (2, 2, 3, 4, 5)],
)
@every_rule
def test_shapes_and_kinds_of_weights(f, shape):
    a, b = pair(*shape)
    n = shape[0]
    for w in (0.3, 2, torch.tensor(2.0), torch.full((n,), 2.0), [2.0] * n):
        got = alone(f)(a, b, w)
        assert got.shape == a.shape
        assert got.isfinite().all()
    if a.numel():
        same(alone(f)(a, b, 2.0), alone(f)(a, b, [2.0] * n))


@pytest.mark.parametrize('shape', [(5,), (1, 5), (3, 5), (3, 0), (0, 5), (0,), (2, 4, 2, 8, 8)])
@pytest.mark.parametrize('f', [cfg, base_norm, t_norm, full_norm], ids=repr)
def test_any_number_of_axes(f, shape):
    a, b = pair(*shape)
    for w in (0.3, 1, torch.tensor(0.3), torch.full(shape[:1], 0.3), [0.3] * shape[0]):
        assert f(a, b, w).shape == a.shape
    torch.testing.assert_close(f(a, b, 0.3), f(a, b, [0.3] * shape[0]))


@pytest.mark.parametrize('shape', [(3,), (3, 5)])
@every_rule
def test_too_few_axes(f, shape):
    a, b = pair(*shape)
    if len(shape) < f.axes:
        with pytest.raises(ValueError, match=f'at least {f.axes} axes'):
            alone(f)(a, b, 2.0)
    else:
        assert alone(f)(a, b, 2.0).shape == shape
        assert alone(f)(a, b, 2.0).isfinite().all()


@every_rule
def test_layouts_and_inputs(f):
    a, b = pair(*SHAPE)
    a0, b0 = a.clone(), b.clone()
    want = alone(f)(a, b, 2.0)
    same(alone(f)(a.to(memory_format=torch.channels_last), b, 2.0), want)
    assert torch.equal(a, a0)
    assert torch.equal(b, b0)
    assert alone(f)(a.half(), b, 2.0).dtype == torch.float32
    nan = a.clone()
    nan[1, 0, 0, 0] = math.nan
    got = alone(f)(nan, b, 2.0)  # it stays in its sample
    assert not got[::2].isnan().any()
    same(got[::2], want[::2])


@pytest.mark.parametrize('f', [base_norm, full_norm], ids=repr)
def test_nan_spreads_over_its_sample(f):
    a, b = pair(*SHAPE)
    b[1, 0, 0, 0] = math.nan
    assert f(a, b, 0.3)[1].isnan().all()


@pytest.mark.parametrize('f', [cfg, base_norm, t_norm, full_norm], ids=repr)
def test_nan_stays_in_its_sample(f):
    a, b = pair(*SHAPE)
    a[1, 0, 0, 0] = math.nan
    assert f(a, b, 0.3).isnan().flatten(1).any(1).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize('f', [cfg, base_norm, t_norm, full_norm], ids=repr)
def test_transposed(f):
    a, b = pair(3, 4, 8, 6)
    torch.testing.assert_close(f(a.mT, b.mT, 0.3).mT, f(a, b, 0.3))


@every_rule
def test_gradients_are_finite(f):
    a = torch.zeros(2, 1, 2, 3, requires_grad=True)
    b = torch.tensor([[0.0, 0, 0, 0, 0, 0], [1, 2, 3, -1, 0, 4]]).view(2, 1, 2, 3).requires_grad_()
    alone(f)(a, b, 1.5).sum().backward()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


@every_name
def test_compiled(f):
    "One graph without a break, and not one for each weight."
    a, b = pair(*SHAPE)
    torch._dynamo.reset()
    count = CompileCounter()
    g = torch.compile(alone(f), backend=count, fullgraph=True)
    for w in (1.5, 2.5, 3.5, 4.5, torch.tensor([1.0, 2.0, 3.0])):
        torch.testing.assert_close(g(a, b, w), alone(f)(a, b, w))
    assert count.frame_count <= 3


# --- rules of other programs


def test_smc_without_a_correction_is_cfg():
    neg, pos = two_sizes()
    pred, state = smc(neg, pos, 3.0, k=0.0)
    same(pred, cfg(neg, pos, 3.0))
    same(state, pos - neg)
    with pytest.raises(ValueError, match='state: expected the shape'):
        smc(neg, pos, 3.0, state[..., :2])


def test_smc_at_an_exponential_decay_corrects_nothing():
    "e_i = (1 - lam) e_(i-1) is where s is 0."
    neg, pos = torch.zeros(1, 4), torch.tensor([[4.0, -2.0, 1.0, 8.0]])
    pred, state = smc(neg, pos, 2.0, 2 * pos, lam=0.5)
    assert torch.equal(state, pos)
    assert torch.equal(pred, 2 * pos)


def test_mahiro_is_the_node_for_one_picture():
    "In the order of ComfyUI's formula; there the cosine is averaged over the batch too."
    neg, pos = pair(1, 4, 8, 8)
    leap, guided = 5.0 * pos, neg + 5.0 * (pos - neg)
    roots = [o.sign() * o.abs().sqrt() for o in (5.0 * neg, (leap + guided) / 2)]
    share = 2 * (torch.cosine_similarity(*roots).mean() + 1)
    same(mahiro(neg, pos, 5.0), (share * guided + (4 - share) * leap) / 4)


def test_skimmed_by_hand_also_where_only_the_negative_changes():
    neg, pos = torch.ones(1, 3), torch.tensor([[2.0, -1.0, 0.5]])
    same(skimmed(neg, pos, 10.0, skim=4.0), torch.tensor([[5.0, -3.4, -1.3]]))


def test_skimmed_lowers_the_weight_where_values_only_grow():
    neg, pos = pair(2, 4, 8, 8).abs()
    neg, pos = torch.minimum(neg, pos), torch.maximum(neg, pos)  # the positive is farther out
    w = torch.tensor([3.0, 12.0])
    same(skimmed(neg, pos, w), cfg(neg, pos, w.clamp(max=7.0)))
    same(skimmed(-neg, -pos, w), -cfg(neg, pos, w.clamp(max=7.0)))


def test_limit_norm():
    pred, pos = two_sizes()
    got = limit_norm(pred, pos, most=0.5)
    same(size(got), torch.minimum(size(pred), 0.5 * size(pos)))
    same(limit_norm(pred, 1e3 * pred), pred)


def test_tsr_knows_the_noise_of_each_sample():
    pred, _ = two_sizes()
    got = tsr(pred, pred, torch.tensor([0.5, 2.0]), k=4.0, std=1.0)
    want = [pred[i] * (1 + s**2) / (0.25 + s**2) for i, s in enumerate((0.5, 2.0))]
    same(got, torch.stack(want))
    assert torch.equal(tsr(pred, pred, 1.0, k=1.0), pred)
    assert torch.equal(tsr(pred, pred, 0.0, k=2.0), 2 * pred)
    with pytest.raises(TypeError, match='sigma: tsr expected the noise level'):
        tsr(pred, pred)
    with pytest.raises(ValueError, match='sigma: expected a finite number, or 2 of them'):
        tsr(pred, pred, torch.ones(3))


# --- the classic transforms


@pytest.mark.parametrize('T', CLASSIC)
def test_classic_names_and_rules(T):
    u, t = pair(1, 4, 8, 8)
    torch.testing.assert_close(T({'g': [0.3, 0.2]})(u, t, 1), CLASSIC[T](u, t, 0.2))
    assert T.name == ('CFGuidance' if T is GuidanceTfm else T.__name__)


@pytest.mark.parametrize('dtype', HALVES, ids=str)
@pytest.mark.parametrize('T', CLASSIC)
def test_classic_in_half_precision(T, dtype):
    big = 625 * rand(2, 4, 64, 64)
    near = big + 30 * rand(2, 4, 64, 64, seed=1)
    out = T({'g': [0.2]})(big.to(dtype), near.to(dtype), 0)
    exact = CLASSIC[T](big.to(dtype).double(), near.to(dtype).double(), 0.2)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize('T', CLASSIC)
def test_classic_compiled(T):
    a, b = pair(*SHAPE)
    torch._dynamo.reset()
    tfm = T({'g': torch.tensor([[0.2, 0.3, 0.4]] * 4)})
    compiled = torch.compile(tfm, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(a, b, 2), tfm(a, b, 2), rtol=1e-5, atol=1e-5)


class Old(GuidanceTfm):
    "A subclass as people wrote it for 0.0.3: own norms, own schedules, extra arguments."

    name = 'Old'

    def __init__(self, schedules, *args, **kwargs):
        super().__init__(schedules, *args, **kwargs)
        self.extra = kwargs.get('extra', 0)

    def pre_proc(self, u, t, idx=None):
        self.seen = idx

    def guide(self, u, t, idx=None):
        self.pred = u + self.scheduler('h', idx) * (t - u) / torch.linalg.norm(t - u)

    def post_proc(self, u, t, idx=None):
        self.pred = self.pred + self.extra


def test_old_subclasses():
    old = Old({'h': [1.0, 2.0]}, 3, extra=5)
    got = old.encode(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), 1)
    torch.testing.assert_close(got, torch.tensor([[6.2, 6.6]]))
    assert old.seen == 1
    assert old.schedules == {'h': [1.0, 2.0]}
    assert old.args == (3,)
    assert old.kwargs == {'extra': 5}


@pytest.mark.parametrize(
    'g',
    [
        torch.linspace(1, 3, 3),
        [torch.tensor([2.0] * 3)] * 2,
        [[2, 2, 2], [2, 2, 2]],
        [1, 2, 3],
        (1, 2),
    ],
)
def test_kinds_of_schedules(g):
    a, b = pair(*SHAPE)
    torch.testing.assert_close(GuidanceTfm({'g': g})(a, b, 1), cfg(a, b, 2))


def test_index_may_be_a_tensor():
    assert GuidanceTfm({'g': (2.0,)}).scheduler('g', torch.tensor(0)) == 2.0


@pytest.mark.skipif('CF_GUIDANCE_003' not in os.environ, reason='needs the 0.0.3 wheel, unpacked')
@pytest.mark.parametrize('T', CLASSIC)
def test_agrees_with_the_original(T):
    path = Path(os.environ['CF_GUIDANCE_003']) / 'cf_guidance' / 'transforms.py'
    spec = importlib.util.spec_from_file_location('original_transforms', path)
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    o = getattr(original, T.__name__)
    assert T.name == o.name
    high = 0.3 if T in (TNormGuidance, FullNormGuidance) else 7.5
    g = {'g': get_cos_sched(50, high, 0.1)}
    for i in range(50):
        a, b = pair(1, 4, 32, 32, seed=i) * 10 ** (i / 10 - 3)
        want = o(g)(a, b, i)
        assert (T(g)(a, b, i) - want).norm() <= 1e-6 * want.norm()


# --- bad inputs: one clear sentence that names the argument

A, B = pair(*SHAPE)


def raises(contains, f, *args, **kwargs):
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)) as e:
        f(*args, **kwargs)
    text = str(e.value).strip('"')
    assert contains in text
    assert 'expected' in text
    assert len(text) < 160
    assert '\n' not in text


NAN, INF = math.nan, math.inf
BAD_WEIGHTS = [
    NAN,
    INF,
    -INF,
    True,
    None,
    'a',
    {},
    [1.0, NAN, 2.0],
    torch.tensor(NAN),
    torch.tensor([1.0, INF, 1.0]),
    torch.tensor([True, False, True]),
    [True] * 3,
    1j,
    10**400,
    torch.ones(2),
    torch.ones(3, 4),
    [1.0, 2.0],
    pytest.param(object(), id='object'),
]


@pytest.mark.parametrize('w', BAD_WEIGHTS, ids=lambda o: repr(o)[:30])
@pytest.mark.parametrize('f', [cfg, apg, base_norm, fdg], ids=repr)
def test_bad_weights(f, w):
    raises('w: expected', f, A, B, w)


def test_numpy_weights():
    import numpy as np

    assert torch.equal(cfg(A, B, np.float64(2.0)), cfg(A, B, 2.0))
    assert torch.equal(cfg(A, B, np.array([2.0] * 3)), cfg(A, B, 2.0))
    raises('w: expected', cfg, A, B, np.array(['a']))
    raises('w: expected', cfg, A, B, np.bool_(True))


@pytest.mark.parametrize('f', COMBINE, ids=repr)
def test_bad_predictions(f):
    raises('neg (3, 4, 8, 8) and pos (2, 4, 8, 8)', f, A, B[:2], 2.0)
    raises('pos: expected a tensor', f, A, 1.0, 2.0)
    raises('neg: expected a tensor', f, [1.0], B, 2.0)
    raises('int64', f, A.long(), B.long(), 2.0)
    raises('neg on meta and pos on cpu', f, A.to('meta'), B, 2.0)
    raises("got 'nothing'", f.of, nothing=1)
    raises('axes', f, torch.tensor(1.0), torch.tensor(2.0), 1)


@pytest.mark.parametrize('f', POSTS, ids=repr)
def test_bad_predictions_of_post_rules(f):
    raises('pred (3, 4, 8, 8) and pos (2, 4, 8, 8)', f, A, B[:2])
    raises('pos: expected a tensor', f, A, 1.0)
    raises('pred: expected a tensor', f, 1.0, B)
    raises('int64', f, A.long(), B.long())
    raises("got 'nothing'", f.of, nothing=1)


@pytest.mark.parametrize('f', COMBINE, ids=repr)
def test_bad_states(f):
    if f.stateful:
        raises('state: expected 3 rows', f, A, B, 2.0, A[:2])
        raises('state: expected None or a tensor', f, A, B, 2.0, 1.0)
        raises('state: expected the shape', f, A, B, 2.0, A[:, :2])
    else:
        raises('has no state', f, A, B, 2.0, A)


BAD_SETTINGS = {
    rescale: dict(phi=(-0.1, 1.1, NAN, 'a', None, True, [0.5])),
    ep_cfg: dict(trim=(-0.1, 0.5)),
    apg: dict(eta=(INF, 'a'), radius=(-1.0, NAN, None), beta=(1.1, -2)),
    adg: dict(most=(-0.1, 4)),
    mambo: dict(alpha=(-1, INF)),
    beta_cfg: dict(gamma=(-0.1, 1.1)),
    fdg: dict(shares=((), 1.0, (1.0, -1.0), ('a',), (1.0, INF), None, 'ab', (1.0,) * 100)),
    dynamic_threshold: dict(p=(-0.1, 1.1)),
    mimic: dict(mimic=(-1, INF), p=(2,), phi=(2,)),
    auto_cfg: dict(reference=(-1, INF), top=(-0.1, 0.6)),
}
CASES = [(f, k, v) for f, kw in BAD_SETTINGS.items() for k, vs in kw.items() for v in vs]


@pytest.mark.parametrize('f, k, v', CASES, ids=lambda o: repr(o)[:30])
def test_bad_settings(f, k, v):
    raises(f'{k}: expected', f.of, **{k: v})
    args = (A, B) if isinstance(f, PostRule) else (A, B, 2.0)
    raises(f'{k}: expected', f, *args, **{k: v})


@pytest.mark.parametrize('make', [rule, post_rule])
def test_bad_decorators(make):
    raises('space: expected one of', make, 'nonsense')
    raises('space: expected one of', make, 5)
    raises('axes: expected', make, 'any', axes=0)
    raises('axes: expected', make, 'any', axes=True)
    raises('expected a function of', make('any'), 5)
    raises('expected a function of', make('any'), dict)
    raises('expected a function of', make('any'), lambda: 1)
    raises('phi: expected limits', make, 'any', phi=3)


def test_bad_rules():
    raises("got 'phi'", rule('any', phi=(0, 1)), lambda neg, pos, w: neg)
    raises('expected a function of (neg, pos, w, state)', rule('any', stateful=True), cfg.formula)
    raises('pos_at: expected', rule('any', pos_at=NAN), cfg.formula)
    raises('neg_at: expected', rule('any', neg_at='a'), cfg.formula)


def call(schedules, idx=0, T=GuidanceTfm):
    return T(schedules)(A, B, idx)


@pytest.mark.parametrize('T', CLASSIC)
def test_bad_schedules(T):
    raises('schedules: expected a dict', T, [7.5])
    raises("schedules: expected a key 'g'", call, {'w': [1]}, T=T)
    raises("schedules['g']: expected a list", call, {'g': 7.5}, T=T)
    raises("schedules['g']: expected a list", call, {'g': 'abc'}, T=T)
    for v in (NAN, INF, None, 'a', True):
        raises("schedules['g'][0]: expected a finite number", call, {'g': [v]}, T=T)
    raises('w: expected', call, {'g': [[1, 2]]}, T=T)
    raises('w: expected', call, {'g': torch.tensor([NAN])}, T=T)


def test_bad_indices():
    g = {'g': [7.5] * 50}
    raises('0 to 49, got 50', call, g, 50)
    raises('0 to 49, got -1', call, g, -1)
    raises('idx: expected the number of the step, got None', call, g, None)
    raises('idx: expected the number of the step, got 1.5', call, g, 1.5)
    with pytest.raises(IndexError):
        call(g, 50)
    with pytest.raises(KeyError):
        call({})
