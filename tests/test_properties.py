"Properties of every rule, for predictions that hypothesis makes up: sizes, types, scales, zeros, equal and opposite samples, weights."

import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from cf_guidance import transforms
from cf_guidance.denoisers import SCALINGS, NetDenoiser, apply_rule, from_x0, to_x0
from cf_guidance.guided import GuidedDenoiser
from cf_guidance.transforms import APG, is_per_sample, rescale

RULES = {k: f for k in transforms.__all__ if hasattr(f := getattr(transforms, k), 'space')}
RULES |= {
    'apg, radius and momentum': APG['EDM2-S']['rule'],
    'apg, all parallel': RULES['apg'].of(eta=1.0, beta=0.0),
    'rescaled t_norm': rescale.of(rule=RULES['t_norm']),
    'rescaled apg': rescale.of(rule=RULES['apg'], phi=1.0),
    'fdg, three levels': RULES['fdg'].of(shares=(2.0, 1.0, 0.0)),
    'beta_cfg, root': RULES['beta_cfg'].of(gamma=0.5),
    'ep_cfg, trimmed': RULES['ep_cfg'].of(trim=0.45),
    'mimic, half': RULES['mimic'].of(phi=0.5, p=0.9),
}
NOT_SCALED = {
    'apg, radius and momentum',
    'dynamic_threshold',
    'beta_cfg',
    'beta_cfg, root',
    'rescaled t_norm',
}  # a radius, a range of pixels and a length have units; t_norm can end in mere rounding, which has no scale

settings.register_profile('here', deadline=None, derandomize=True, max_examples=25)
settings.load_profile('here')
every_rule = pytest.mark.parametrize('name', sorted(RULES))
sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
weights = st.floats(0.0, 100.0) | st.sampled_from([0.0, 1.0, 7.5])


@st.composite
def pairs(draw, dtypes=(torch.float32, torch.float64), low=-6, high=6):
    "Negatives and positives (B, C, H, W): ordinary ones, and some that are zero, equal, opposite or constant."
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
    rows = [special[draw(st.sampled_from(sorted(special)))](n, p) for n, p in zip(neg, pos)]
    return tuple(torch.stack(o).to(dtype) for o in zip(*rows))


def said(name, neg, pos, w):
    "The prediction, and that of a second step for rules that remember."
    f = RULES[name]
    if not f.stateful:
        return f(neg, pos, w)
    first, state = f(neg, pos, w)
    return torch.cat([first, f(neg, pos, w, state)[0]])


@every_rule
@given(pairs((torch.float16, torch.bfloat16, torch.float32, torch.float64), -4, 4), weights)
def test_finite_in_finite_out(name, two, w):
    neg, pos = (o.nan_to_num() for o in two)
    got = said(name, neg, pos, w)
    assert got.dtype == neg.dtype and got.shape[1:] == neg.shape[1:] and got.isfinite().all()


@every_rule
@given(pairs(), st.data())
def test_a_sample_depends_on_itself(name, two, data):
    w = torch.tensor(
        data.draw(st.lists(weights, min_size=len(two[0]), max_size=len(two[0]))), dtype=two[0].dtype
    )
    assert is_per_sample(RULES[name], *two, w, tol=1e-4)


@every_rule
@given(pairs(), weights, st.randoms(use_true_random=False))
def test_order_of_the_batch(name, two, w, random):
    order = list(range(len(two[0])))
    random.shuffle(order)
    n = len(order)

    def in_order(y):
        return torch.cat([o[order] for o in y.split(n)])

    got, want = said(name, *(o[order] for o in two), w), in_order(said(name, *two, w))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


@every_rule
@given(two=pairs((torch.float16, torch.bfloat16, torch.float32, torch.float64), -4, 4))
def test_exact_ends(name, two):
    neg, pos = (o.nan_to_num() for o in two)
    f = RULES[name]
    for at, want in (f.pos_at, pos), (f.neg_at, neg):
        if at is None:
            continue
        for w in at, torch.full((len(neg),), at, dtype=torch.float64):
            assert torch.equal(f(neg, pos, w)[0] if f.stateful else f(neg, pos, w), want)


@pytest.mark.parametrize('name', sorted({*RULES} - NOT_SCALED))
@given(pairs((torch.float64,), -2, 2), weights, st.floats(-3, 3))
def test_scales_with_its_input(name, two, w, power):
    k = 10**power
    got, want = said(name, *(k * o for o in two), w), k * said(name, *two, w)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9 * max(1.0, want.abs().max().item()))


@every_rule
@given(
    pairs((torch.float64,), -1, 1),
    weights,
    st.floats(0.05, 20.0),
    st.sampled_from(sorted(SCALINGS)),
)
def test_spaces(name, two, w, sigma, prediction):
    "The rule sees what its space says, whatever the network predicts; linear rules do not mind."
    neg, pos = two
    f, x, s = (
        RULES[name],
        torch.ones_like(neg) * sigma,
        torch.full((len(neg),), sigma, dtype=torch.float64),
    )
    plain = f if not f.stateful else (lambda n, p, w: f(n, p, w)[0])
    if f.stateful:
        plain.space = f.space
    got = apply_rule(plain, neg, pos, w, x, s)
    assert got.isfinite().all() and got.shape == neg.shape
    space = prediction if f.space == 'any' else 'x0' if f.space == 'x0' else f.space

    def to(o):
        return o if space == 'x0' else from_x0(o, x, s, space)

    want = plain(to(neg), to(pos), w)
    want = want if space == 'x0' else to_x0(want, x, s, space)
    torch.testing.assert_close(
        got,
        want,
        rtol=1e-6,
        atol=1e-8 * max(1.0, (1 + w) * max(o.abs().max().item() for o in (neg, pos, x))),
    )


@every_rule
@given(
    sizes, st.floats(0.05, 20.0), st.sampled_from(['eps', 'x0', 'v', 'flow']), st.integers(0, 99)
)
def test_unguided_is_the_denoiser(name, size, sigma, prediction, seed):
    "At the weight that is unguided a guided denoiser is the plain one, to the bit, and costs as much."
    f = RULES[name]
    D = NetDenoiser(lambda z, t, c: (z * c.view(-1, 1, 1, 1)).sin(), prediction)
    x, c = (
        torch.randn(size, generator=torch.Generator().manual_seed(seed)) * sigma,
        torch.full((size[0],), 0.3),
    )
    if f.pos_at is None:
        return
    G = GuidedDenoiser(D, dict(c=torch.tensor([-0.7])), w=f.pos_at, rule=f)
    assert torch.equal(G(x, sigma, c=c), D(x, sigma, c=c)) and G.nfe == size[0]
    G = GuidedDenoiser(D, dict(c=torch.tensor([-0.7])), w=f.pos_at + 1.5, rule=f)
    assert G(x, sigma, c=c).isfinite().all() and G.nfe == 2 * size[0]


def test_all_rules_are_here():
    papers = dict(
        cfg='any',
        cfg_paper='any',
        base_norm='eps',
        t_norm='eps',
        full_norm='eps',
        tcfg='eps',
        beta_cfg='eps',
        rescale='v',
        cfg_zero='flow',
        mambo='flow',
    )  # the others work on the image
    assert {k: f.space for k, f in RULES.items() if k.isidentifier()} == {
        k: papers.get(k, 'x0') for k in RULES if k.isidentifier()
    }
    assert len(RULES) >= 25 and {f.space for f in RULES.values()} >= {
        'any',
        'eps',
        'x0',
        'v',
        'flow',
    }
    assert all(math.isfinite(f.pos_at) for f in RULES.values() if f.pos_at is not None)
