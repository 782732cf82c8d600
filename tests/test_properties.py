"""Properties of every rule and post-rule, for predictions that hypothesis makes up.

Sizes, dtypes, scales, weights, and samples that are zero, equal, opposite or constant.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_helpers import alone, is_per_sample

from cf_guidance import transforms
from cf_guidance.denoisers import NetDenoiser, from_x0, to_x0
from cf_guidance.guided import GuidedDenoiser
from cf_guidance.transforms import APG_PRESETS, PostRule, Rule, cfg

RULES = {k: f for k, f in vars(transforms).items() if isinstance(f, Rule | PostRule)}
RULES |= {
    'apg, radius and momentum': APG_PRESETS['EDM2-S']['rule'],
    'apg, all parallel': RULES['apg'].of(eta=1.0, beta=0.0),
    'rescale, all': RULES['rescale'].of(phi=1.0),
    'fdg, three levels': RULES['fdg'].of(shares=(2.0, 1.0, 0.0)),
    'beta_cfg, root': RULES['beta_cfg'].of(gamma=0.5),
    'ep_cfg, trimmed': RULES['ep_cfg'].of(trim=0.45),
    'mimic, half': RULES['mimic'].of(phi=0.5, p=0.9),
}
COMBINE = sorted(k for k, f in RULES.items() if isinstance(f, Rule))
# a radius, a range of pixels and a length have units
NOT_SCALED = {
    'smc',
    'auto_cfg',
    'apg, radius and momentum',
    'dynamic_threshold',
    'beta_cfg',
    'beta_cfg, root',
}

settings.register_profile('here', deadline=None, derandomize=True, max_examples=25)
settings.load_profile('here')
every_rule = pytest.mark.parametrize('name', sorted(RULES))
every_combine_rule = pytest.mark.parametrize('name', COMBINE)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
weights = st.floats(0.0, 100.0) | st.sampled_from([0.0, 1.0, 7.5])


@st.composite
def pairs(draw, dtypes=(torch.float32, torch.float64), low=-6, high=6):
    "Negatives and positives (B, C, H, W), some of them zero, equal, opposite or constant."
    size, dtype = draw(sizes), draw(st.sampled_from(dtypes))
    neg, pos = torch.randn(
        2,
        *size,
        generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
        dtype=torch.float64,
    ) * 10 ** draw(st.floats(low, high))
    special = dict(
        ordinary=lambda n, p: (n, p),
        equal=lambda n, p: (n, n),
        near=lambda n, p: (n, n * (1 + 1e-3)),
        opposite=lambda n, p: (n, -n),
        no_neg=lambda n, p: (0 * n, p),
        no_pos=lambda n, p: (n, 0 * p),
        none=lambda n, p: (0 * n, 0 * p),
        constant=lambda n, p: (0 * n + n.flatten()[0], 0 * p + p.flatten()[0]),
    )
    kinds = [draw(st.sampled_from(sorted(special))) for _ in neg]
    rows = [special[k](n, p) for k, n, p in zip(kinds, neg, pos, strict=True)]
    return tuple(torch.stack(o).to(dtype) for o in zip(*rows, strict=True))


def outputs(name, neg, pos, w):
    "The prediction, and that of a second step for rules that remember."
    f = RULES[name]
    if not getattr(f, 'stateful', False):
        return alone(f)(neg, pos, w)
    first, state = f(neg, pos, w)
    return torch.cat([first, f(neg, pos, w, state)[0]])


@every_rule
@given(pairs((torch.float16, torch.bfloat16, torch.float32, torch.float64), -4, 4), weights)
def test_finite_in_finite_out(name, two, w):
    neg, pos = (o.nan_to_num() for o in two)
    got = outputs(name, neg, pos, w)
    assert got.dtype == neg.dtype
    assert got.shape[1:] == neg.shape[1:]
    assert got.isfinite().all()


@every_rule
@given(pairs(), st.data())
def test_a_sample_depends_on_itself(name, two, data):
    w = torch.tensor(
        data.draw(st.lists(weights, min_size=len(two[0]), max_size=len(two[0]))), dtype=two[0].dtype
    )
    f = RULES[name]
    assert is_per_sample(f if isinstance(f, Rule) else alone(f), *two, w, tol=1e-4)


@every_rule
@given(pairs(), weights, st.randoms(use_true_random=False))
def test_order_of_the_batch(name, two, w, random):
    order = list(range(len(two[0])))
    random.shuffle(order)
    n = len(order)

    def in_order(y):
        return torch.cat([o[order] for o in y.split(n)])

    got, want = outputs(name, *(o[order] for o in two), w), in_order(outputs(name, *two, w))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


@every_combine_rule
@given(two=pairs((torch.float16, torch.bfloat16, torch.float32, torch.float64), -4, 4))
def test_exact_ends(name, two):
    neg, pos = (o.nan_to_num() for o in two)
    f = RULES[name]
    for at, want in (f.pos_at, pos), (f.neg_at, neg):
        if at is None:
            continue
        for w in at, torch.full((len(neg),), at, dtype=torch.float64):
            assert torch.equal(alone(f)(neg, pos, w), want)


@pytest.mark.parametrize('name', sorted({*RULES} - NOT_SCALED))
@given(pairs((torch.float64,), -2, 2), weights, st.floats(-3, 3))
def test_scales_with_its_input(name, two, w, power):
    k = 10**power
    got, want = outputs(name, *(k * o for o in two), w), k * outputs(name, *two, w)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9 * max(1.0, want.abs().max().item()))


@every_rule
@given(
    pairs((torch.float64,), -1, 1),
    weights,
    st.floats(0.05, 20.0),
    st.sampled_from(['eps', 'v', 'flow', 'x0']),
)
def test_spaces(name, two, w, sigma, prediction):
    "A guided denoiser converts to the space of a rule, whatever its network predicts."
    neg, pos = two
    f, x, n = RULES[name], torch.ones_like(neg) * sigma, len(neg)
    f = f.of(k=0.0) if name == 'smc' else f  # the sign of a rounding error can be either
    s = torch.full((n,), sigma, dtype=torch.float64)
    D = NetDenoiser(lambda z, t, c: c, prediction)
    kw = dict(post=f) if isinstance(f, PostRule) else dict(rule=f)
    net_neg, net_pos = (from_net(o, x, s, prediction) for o in (neg, pos))
    neg, pos = D(x, s, c=net_neg), D(x, s, c=net_pos)  # with the rounding of the network's space
    got = GuidedDenoiser(D, dict(c=net_neg), w=w, **kw)(x, s, c=net_pos)
    assert got.shape == neg.shape
    assert got.isfinite().all()
    want = in_space(f, neg, pos, w, x, s)
    size = max(o.abs().max().item() for o in (neg, pos, x))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7 * max(1.0, (1 + w) * size))


def from_net(x0, x, sigma, prediction):
    return x0 if prediction == 'x0' else from_x0(x0, x, sigma, prediction)


def in_space(f, neg, pos, w, x, sigma):
    "Convert, apply, convert back; a post-rule after `cfg`, where that guides."
    if isinstance(f, PostRule) and w == 1:
        return pos
    neg = cfg(neg, pos, w) if isinstance(f, PostRule) else neg
    space = 'x0' if f.space == 'any' else f.space
    a, b = (from_net(o, x, sigma, space) for o in (neg, pos))
    noise = (sigma,) if getattr(f, 'takes_sigma', False) else ()
    out = f(a, b, *noise) if isinstance(f, PostRule) else alone(f)(a, b, w)
    return out if space == 'x0' else to_x0(out, x, sigma, space)


@every_combine_rule
@given(
    sizes, st.floats(0.05, 20.0), st.sampled_from(['eps', 'x0', 'v', 'flow']), st.integers(0, 99)
)
def test_unguided_is_the_denoiser(name, size, sigma, prediction, seed):
    "At the unguided weight a guided denoiser is the plain one, to the bit, and costs as much."
    f = RULES[name]
    if f.pos_at is None:
        return
    D = NetDenoiser(lambda z, t, c: (z * c.view(-1, 1, 1, 1)).sin(), prediction)
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * sigma
    c, negative = torch.full((size[0],), 0.3), dict(c=torch.tensor([-0.7]))
    G = GuidedDenoiser(D, negative, w=f.pos_at, rule=f)
    assert torch.equal(G(x, sigma, c=c), D(x, sigma, c=c))
    assert G.nfe == size[0]
    G = GuidedDenoiser(D, negative, w=f.pos_at + 1.5, rule=f)
    assert G(x, sigma, c=c).isfinite().all()
    assert G.nfe == 2 * size[0]


def test_all_rules_are_here():
    spaces = dict(cfg='any', rescale='v')
    spaces |= dict.fromkeys(('cfg_zero', 'mambo', 'smc', 'limit_norm'), 'flow')
    spaces |= dict.fromkeys(('base_norm', 't_norm', 'full_norm', 'tcfg', 'beta_cfg'), 'eps')
    spaces |= dict.fromkeys(('epsilon_scaling', 'tsr'), 'eps')
    named = {k: f.space for k, f in RULES.items() if k.isidentifier()}
    assert named == {k: spaces.get(k, 'x0') for k in named}  # the others work on the image
    assert len(named) == 23
    assert all(math.isfinite(RULES[k].pos_at) for k in COMBINE if RULES[k].pos_at is not None)
