"Negatives that leave the network alone: limits, random streams, cut batches, bad input."

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTokenizer

from cf_guidance.denoisers import (
    CosineDenoiser,
    Denoiser,
    DiscreteDenoiser,
    FlowDenoiser,
    NetDenoiser,
    from_x0,
    to_x0,
)
from cf_guidance.guided import GuidedDenoiser, Microbatched, Queries, Query, Term
from cf_guidance.karras import _run_generators, euler, get_sigmas_karras, heun, on_sigmas, sample
from cf_guidance.lab.fashion import fashion_path, load_ddpm
from cf_guidance.negatives import (
    CADS,
    ICG,
    MG,
    MSWG,
    SG,
    SWG,
    TSG,
    Autoguidance,
    HiGS,
    PerpNeg,
    SGPrev,
    _cosines,
    _high_pass,
    draw_conditions,
    draw_gaussian,
    draw_tokens,
    interpolate,
)
from cf_guidance.noise import randn
from cf_guidance.perturb import find_time_layers
from cf_guidance.toy import GaussianMixture
from cf_guidance.transforms import _perpendicular

NAN, INF = float('nan'), float('inf')


def seeded(i):
    return torch.Generator().manual_seed(i)


def frozen(make):
    "A network with random weights that do not depend on the test."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


UNET = frozen(
    lambda: UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
)
D = DiscreteDenoiser(UNET)
OLD = copy.deepcopy(D)
for _p in OLD.parameters():
    _p.mul_(0.9)  # stands for an earlier state of the network
X, SIGMAS = 5 * randn((4, 4, 8, 8), 2), get_sigmas_karras(3, 0.1, 10.0)
TOKENIZER = CLIPTokenizer.from_pretrained(fashion_path() / 'tokenizer')


def text(n, seed):
    return dict(encoder_hidden_states=randn((n, 6, 8), seed))


def encode(ids):
    "Conditions of tokens, as a text encoder would make them."
    return dict(encoder_hidden_states=torch.sin(ids[:, :6, None] * torch.arange(1.0, 9.0)))


COND, EMPTY, BAD, DRESS, BAGS = text(4, 0), text(1, 1), text(1, 2), text(1, 3), text(4, 4)
POOL = text(16, 5)
W4 = torch.tensor([3.0, 1.0, 2.0, 4.0])


class Counted(Denoiser):
    "Notes how many rows each forward has."

    def __init__(self, inner_model):
        super().__init__(inner_model)
        self.sizes = []

    def forward(self, x, sigma, **cond):
        self.sizes.append(len(x))
        return self.inner_model(x, sigma, **cond)


def evaluate(neg, w=2.0, sigma=5.0, D=D, **kw):
    return GuidedDenoiser(D, neg, w=w, **kw)(X, sigma, **COND)


def plain(cond, sigma=5.0, x=X):
    return D(x, sigma, **{k: v.expand(len(x), -1, -1) for k, v in cond.items()})


def drawn(G, rows=slice(None), step=euler):
    "Pictures of some samples."
    return sample(G, 2 * X[rows], SIGMAS, step, {k: v[rows] for k, v in COND.items()})


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


NEGATIVES = {
    'Perp-Neg': lambda g: PerpNeg(EMPTY, [BAD, DRESS], [1.0, lambda s: s / 8]),
    'autoguidance': lambda g: Autoguidance(OLD),
    'ICG, given': lambda g: ICG(POOL, g),
    'ICG, tokens': lambda g: ICG(draw_tokens(TOKENIZER, encode), g),
    'ICG, Gaussian': lambda g: ICG(draw_gaussian(POOL), g),
    'TSG': lambda g: TSG(D, 1.0, 0.5, generator=g),
    'SG': lambda g: SG(D, 2.0),
    'SWG': lambda g: SWG(),
    'M-SWG': lambda g: MSWG(0.75),
}
FREE = {
    'MG': lambda g: MG(),
    'SG-prev': lambda g: SGPrev(),
    'HiGS': lambda g: HiGS(),
}
RANDOM = [k for k in NEGATIVES if k[:3] in ('ICG', 'TSG')]
ALL = NEGATIVES | FREE
every = pytest.mark.parametrize('make', ALL.values(), ids=ALL)
own = pytest.mark.parametrize('make', NEGATIVES.values(), ids=NEGATIVES)  # has evaluations
free = pytest.mark.parametrize('make', FREE.values(), ids=FREE)
random = pytest.mark.parametrize('make', [NEGATIVES[k] for k in RANDOM], ids=RANDOM)


# what all of them promise


@own
def test_a_negative_is_another_estimate_and_leaves_the_network_alone(make):
    before = D(X, 5.0, **COND)
    parts = GuidedDenoiser(D, make(1), w=3.0).parts(X, 5.0, **COND)
    assert (parts.neg - before).abs().max() > 1e-3
    assert torch.equal(D(X, 5.0, **COND), before)


@every
def test_a_weight_of_1_is_the_denoiser_and_costs_nothing(make):
    G = GuidedDenoiser(D, make(1), w=1.0)
    assert torch.equal(G(X, 5.0, **COND), D(X, 5.0, **COND))
    assert G.nfe == 4


@every
def test_evaluations_are_as_announced(make):
    G = GuidedDenoiser(D, make(1), w=3.0)
    G(X, 5.0, **COND)
    assert G.run.nfe_per_sample.tolist() == [1 + make(1).nfe] * 4


@every
@pytest.mark.parametrize('step', [euler, heun])
def test_a_second_run_equals_the_first(make, step):
    G = GuidedDenoiser(D, make(3), w=3.0)
    assert torch.equal(drawn(G, step=step), drawn(G, step=step))


@every
def test_copies_make_the_same_pictures(make):
    G = GuidedDenoiser(D, make(3), w=3.0)
    assert torch.equal(drawn(copy.deepcopy(G)), drawn(G))


@every
def test_a_negative_can_be_copied_with_its_denoiser(make):
    neg = make(3)
    E, new = copy.deepcopy((D, neg))
    assert torch.equal(drawn(GuidedDenoiser(E, new, w=3.0)), drawn(GuidedDenoiser(D, neg, w=3.0)))


def twice(sigma):
    return sigma / 8


@every
def test_pickles_make_the_same_pictures(make):
    neg = make(3)
    if isinstance(neg, PerpNeg):  # a lambda cannot be pickled
        neg = PerpNeg(EMPTY, [BAD, DRESS], [1.0, twice])
    G = GuidedDenoiser(D, neg, w=3.0)
    assert torch.equal(drawn(pickle.loads(pickle.dumps(G))), drawn(G))


@every
def test_a_negative_is_not_changed_by_a_run(make):
    neg = make(3)
    before = dict(vars(neg))
    drawn(GuidedDenoiser(D, neg, w=3.0))
    assert vars(neg) == before


@every
def test_threads_do_not_meet(make):
    G, out = GuidedDenoiser(D, make(3), w=3.0), {}
    want = drawn(G)

    def work(i):
        with torch.no_grad():
            out[i] = [drawn(G) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(o, want) for os in out.values() for o in os)
    assert len(out) == 3


@every
@pytest.mark.parametrize('size', [1, 3, 8])
def test_a_batch_in_pieces_makes_the_same_pictures(make, size):
    whole = drawn(GuidedDenoiser(D, make(6), w=W4))
    close(drawn(GuidedDenoiser(Microbatched(D, size), make(6), w=W4)), whole, 1e-4)


@every
def test_samples_do_not_depend_on_the_batch(make):
    whole = drawn(GuidedDenoiser(D, make(6), w=W4))
    first = slice(0, 2)
    close(drawn(GuidedDenoiser(D, make(6), w=W4[first]), first), whole[first], 1e-4)


@every
def test_a_list_gives_each_sample_its_own_generator(make):
    whole = drawn(GuidedDenoiser(D, make([4, 5, 6, 7]), w=W4))
    third = slice(2, 3)
    close(drawn(GuidedDenoiser(D, make([6]), w=W4[third]), third), whole[third], 1e-4)


@every
def test_a_sample_with_weight_1_is_unguided(make):
    assert torch.equal(drawn(GuidedDenoiser(D, make(6), w=W4))[1], drawn(D)[1])


@every
@pytest.mark.parametrize('w', [-1.0, NAN])
def test_bad_weights_are_refused(make, w):
    with pytest.raises(ValueError, match='^w: expected'):
        GuidedDenoiser(D, make(1), w=w)


@every
def test_weights_for_other_steps_are_refused(make):
    G = GuidedDenoiser(D, make(1), w=[2.0] * 4)
    with pytest.raises(ValueError, match='^w: expected one value per step, 3, got 4'):
        drawn(G)


# history


@free
def test_history_acts_and_costs_nothing(make):
    C, G = Counted(D), GuidedDenoiser(Counted(D), make(1))
    got, want = drawn(G), drawn(C)
    assert (got - want).abs().max() > 1e-2
    assert G.inner_model.sizes == C.sizes == [4] * 3
    assert G.run.nfe_per_sample.tolist() == [3] * 4


@free
@pytest.mark.parametrize('other', [[], [Term(EMPTY, 3.0)], [Term(EMPTY, 3.0), Term(BAD, 2.0)]])
def test_the_first_evaluation_has_no_history(make, other):
    want = GuidedDenoiser(D, *(other or [Term(EMPTY, 1.0)]))(X, 5.0, **COND)
    assert torch.equal(GuidedDenoiser(D, Term(make(1)), *other)(X, 5.0, **COND), want)


@free
def test_history_moves_the_guided_prediction(make):
    "As in the papers: it is the same around a guided denoiser and beside its terms."
    G = GuidedDenoiser(D, Term(EMPTY, 3.0), Term(make(1)))
    H = GuidedDenoiser(GuidedDenoiser(D, EMPTY, w=3.0), make(1))
    close(drawn(G), drawn(H))
    assert G.nfe == 4 * 3 * 2
    assert (drawn(G) - drawn(GuidedDenoiser(D, EMPTY, w=3.0))).abs().max() > 1e-2


@pytest.mark.parametrize('space', ['flow', 'eps', 'v', 'x0'])
@pytest.mark.parametrize('beta', [0.0, 0.6])
def test_the_equations_of_momentum_guidance(space, beta):
    G = GuidedDenoiser(D, MG(beta, space), w=1.5)
    average = None
    for sigma in (5.0, 3.0, 2.0, 1.0):
        v = from_x0(D(X, sigma, **COND), X, sigma, space)
        if average is None:
            average = v
        want = v + 0.5 * (v - average)
        close(from_x0(G(X, sigma, **COND), X, sigma, space), want, 1e-4)
        average = (1 - beta) * v + beta * average


def test_a_velocity_that_does_not_change_is_not_guided():
    def straight(x, sigma):
        return to_x0(torch.ones_like(x), x, sigma, 'flow')

    args = 10 * X, SIGMAS, euler
    close(sample(GuidedDenoiser(straight, MG(), w=4.0), *args), sample(straight, *args))


def test_sg_prev_is_momentum_guidance_without_momentum():
    want = drawn(GuidedDenoiser(D, MG(0.0, 'eps'), w=1.5))
    assert torch.equal(drawn(GuidedDenoiser(D, SGPrev())), want)


def test_the_equation_of_higs():
    G = GuidedDenoiser(D, HiGS(0.75, 0.25, 0.2, 0.3, 0.9), w=2.0)
    average = 0
    for sigma in (20.0, 5.0, 3.0, 2.0, 0.1):
        now, t = D(X, sigma, **COND), sigma / (1 + sigma)
        delta = now - average
        perp = _perpendicular(delta, now)
        fine = _high_pass(perp + 0.25 * (delta - perp), 0.2)
        strength = ((t - 0.3) / 0.6) ** 0.5 if 0.3 < t <= 0.9 else 0
        want = now + strength * fine if sigma < 20 else now
        close(G(X, sigma, **COND), want, 1e-4)
        average = 0.75 * now + 0.25 * average


def test_higs_leaves_an_estimate_that_does_not_change():
    def constant(x, sigma):
        return P8.expand_as(x)

    P8 = randn((1, 4, 8, 8), 3)
    args = 10 * X, SIGMAS, euler
    close(sample(GuidedDenoiser(constant, HiGS()), *args), sample(constant, *args))


@pytest.mark.parametrize('n', [1, 2, 7, 8])
def test_the_cosine_transform(n):
    m = _cosines(n, torch.zeros((), dtype=torch.float64))
    close(m @ m.T, torch.eye(n, dtype=torch.float64), 1e-12)
    dct = pytest.importorskip('scipy.fft').dct
    close(m, torch.tensor(dct(torch.eye(n).double().numpy(), axis=0, norm='ortho')), 1e-12)


@pytest.mark.parametrize(
    'make, exc, match',
    [
        (lambda: MG(1.0), ValueError, 'beta: expected'),
        (lambda: MG(-0.1), ValueError, 'beta: expected'),
        (lambda: MG(space='latent'), ValueError, 'space: expected'),
        (lambda: SGPrev(space=1), ValueError, 'space: expected'),
        (lambda: HiGS(alpha=0), ValueError, 'alpha: expected'),
        (lambda: HiGS(t_min=1), ValueError, 't_min: expected'),
        (lambda: HiGS(t_min=0.5, t_max=0.5), ValueError, 't_max: expected'),
        (lambda: SG(UNET), TypeError, 'net: expected a denoiser with scalings'),
        (lambda: SG(D, 0.9), ValueError, 'noisier: expected'),
    ],
)
def test_bad_settings_of_history_and_self_guidance(make, exc, match):
    with pytest.raises(exc, match=match):
        make()


def test_higs_needs_images():
    with pytest.raises(ValueError, match='x: HiGS expects images'):
        GuidedDenoiser(lambda x, sigma: x, HiGS())(torch.ones(2, 3), 1.0)


# self-guidance


def test_the_network_gets_the_same_input_and_another_time():
    seen = []

    class Net(nn.Module):
        def forward(self, z, t, **cond):
            seen.append((z, t))
            return z * t.view(-1, 1, 1, 1)

    E = CosineDenoiser(Net())
    sigma = torch.tensor([5.0, 1.0, 0.1, E.sigma_max])
    p = GuidedDenoiser(E, SG(E, 2.0), w=3.0).parts(X, sigma)
    ((z, t),) = seen
    close(z[4:], z[:4])
    close(t[4:], E.sigma_to_t((2 * sigma).clamp(max=E.sigma_max)))
    eps = [from_x0(o, X, sigma, E.prediction) for o in (p.neg, p.pos)]
    close(eps[0], z[:4] * t[4:].view(-1, 1, 1, 1), 1e-4)
    close(p.neg[3], p.pos[3], 1e-3)


def test_no_more_noise_is_the_positive():
    p = GuidedDenoiser(D, SG(D, 1.0), w=3.0).parts(X, 5.0, **COND)
    close(p.neg, p.pos, 1e-4)


def zero(z, t):
    return torch.zeros_like(z)


@pytest.mark.parametrize('kind', ['eps', 'v', 'flow'])
def test_self_guidance_of_a_network_that_says_zero(kind):
    E = FlowDenoiser(zero, kind) if kind == 'flow' else CosineDenoiser(zero, kind)
    sigma = torch.tensor([5.0, 1.0, 0.1, E.sigma_max])
    close(GuidedDenoiser(E, SG(E, 2.0), w=3.0)(X, sigma), E(X, sigma))


@pytest.mark.parametrize('kind', ['eps', 'v'])
def test_self_guidance_without_noise_is_the_positive(kind):
    E = CosineDenoiser(zero, kind)
    sigma = torch.tensor([0.0, 1.0, 0.0, 5.0])
    got = GuidedDenoiser(E, SG(E, 2.0), w=3.0)(X, sigma)
    close(got, E(X, sigma))


@pytest.mark.parametrize(
    'guided',
    [
        CosineDenoiser(zero, 'v'),
        FlowDenoiser(zero),
        CosineDenoiser(zero, t_max=0.9),
        Denoiser(lambda x, sigma: x),
        lambda x, sigma: x,
    ],
    ids=['v', 'flow', 'less noise', 'without scalings', 'a function'],
)
def test_self_guidance_made_for_another_denoiser_is_refused(guided):
    with pytest.raises(ValueError, match='neg: SG was made for a denoiser with other scalings'):
        GuidedDenoiser(guided, SG(CosineDenoiser(zero)), w=3.0)(X, 1.0)


def test_self_guidance_takes_the_guided_denoiser_in_a_wrapper():
    E = CosineDenoiser(zero)
    want = E(X, 1.0)
    close(GuidedDenoiser(Microbatched(E, 2), SG(E), w=3.0)(X, 1.0), want)
    close(GuidedDenoiser(E, SG(CosineDenoiser(zero)), w=3.0)(X, 1.0), want)


# sliding windows


@pytest.mark.parametrize('share', [0.5, 0.51, 0.6, 0.625, 0.7, 0.99])
def test_windows_show_each_pixel_of_any_picture(share):
    for h, w in ((2, 3), (5, 7), (9, 8), (13, 31), (64, 65)):
        count = SWG(share)._count(torch.zeros(1, 1, h, w))
        assert count.shape == (h, w)
        assert count.min() == 1


def test_windows_are_rounded_up():
    def sides(share, n):
        return {q.x.shape[2:] for q in SWG(share).queries(torch.zeros(1, 1, n, n), 1.0, {})}

    assert sides(0.5, 7) == {(4, 4)}
    assert sides(0.625, 9) == {(6, 6)}
    assert 0.56 * 25 > 14
    assert sides(0.56, 25) == {(14, 14)}
    assert sides(0.99, 5) == {(4, 4)}


def test_windows_of_a_picture_that_they_do_not_divide():
    x = randn((2, 4, 9, 7), 3)
    for neg in (SWG(0.5), MSWG(0.5), SWG()):
        close(GuidedDenoiser(lambda x, sigma: 0.5 * x, neg, w=3.0)(x, 5.0), 0.5 * x)


def test_windows_that_a_model_cannot_tell_from_the_picture():
    def local(x, sigma):
        return 0.5 * x

    for neg in (SWG(), MSWG(), SWG(0.5)):
        parts = GuidedDenoiser(local, neg, w=3.0).parts(X, 5.0)
        close(parts.neg, parts.pos)


def test_windows_are_averaged_where_they_overlap():
    def mean(x, sigma):
        return x.mean((2, 3), keepdim=True).expand_as(x)

    def window(rows, cols):
        return X[..., rows, cols].mean((2, 3))

    first, last = slice(0, 5), slice(3, 8)
    parts = GuidedDenoiser(mean, SWG(), w=3.0).parts(X, 5.0)
    close(parts.neg[..., 0, 0], window(first, first))
    close(parts.neg[..., 7, 4], (window(last, first) + window(last, last)) / 2)
    close(parts.neg[..., 3, 3], sum(window(a, b) for a in (first, last) for b in (first, last)) / 4)
    masked = GuidedDenoiser(mean, MSWG(), w=3.0).parts(X, 5.0)
    close(masked.neg[..., :3, :3], masked.pos[..., :3, :3])
    close(masked.neg[..., 3:5, :], parts.neg[..., 3:5, :])


def test_bad_windows_are_refused():
    for share in (0.4, 1.0, NAN):
        with pytest.raises(ValueError, match='share: expected'):
            SWG(share)
    with pytest.raises(ValueError, match='x: SWG expects images'):
        GuidedDenoiser(lambda x, sigma: x, SWG())(torch.ones(2, 3), 1.0)


# noise on the condition


def shown(C, sigma, rows=slice(None)):
    "The condition that the denoiser inside gets."
    C.inner_model = Denoiser(lambda x, sigma, encoder_hidden_states: encoder_hidden_states)
    return C(X[rows], sigma, **{k: v[rows] for k, v in COND.items()})


def by_share(sigma):
    return sigma / 10


def cads(**settings):
    return CADS(D, time=by_share, **settings)


def test_the_equation_of_cads():
    y = COND['encoder_hidden_states']
    assert torch.equal(shown(cads(), 5.9), y)
    noise = shown(cads(s=1.0, psi=0.0), 9.5)  # only noise at this time
    assert abs(noise.std() - 1) < 0.1
    half = shown(cads(s=0.5, psi=0.0, tau1=0.9, tau2=1.0), 9.5)  # at this noise level gamma is 0.5
    close(half, 0.5**0.5 * (y + 0.5 * noise), 1e-4)
    own = half.std((1, 2), correction=0, keepdim=True), half.mean((1, 2), keepdim=True)
    std, mean = y.std((1, 2), correction=0, keepdim=True), y.mean((1, 2), keepdim=True)
    like_y = (half - own[1]) / own[0] * std + mean
    for psi in (1.0, 0.5):
        got = shown(cads(s=0.5, psi=psi, tau1=0.9, tau2=1.0), 9.5)
        close(got, psi * like_y + (1 - psi) * half, 1e-4)


def test_cads_leaves_the_negative_alone_and_costs_nothing():
    G = GuidedDenoiser(D, EMPTY, w=3.0)
    C = CADS(G, time=by_share)
    close(C.parts(X, 9.0, **COND).neg, G.parts(X, 9.0, **COND).neg)
    got = drawn(C)
    assert G.run.nfe_per_sample.tolist() == [6] * 4
    assert torch.equal(drawn(C), got)
    assert (got - drawn(G)).abs().max() > 1e-3


def test_a_picture_with_cads_does_not_depend_on_its_batch():
    seeds = [3, 1, 4, 1]
    for step in (euler, heun):
        C = CADS(GuidedDenoiser(D, EMPTY, w=3.0), time=by_share, seed=seeds)
        one = CADS(GuidedDenoiser(D, EMPTY, w=3.0), time=by_share, seed=seeds[2:3])
        close(drawn(one, slice(2, 3), step), drawn(C, step=step)[2:3], 1e-4)
    assert torch.equal(shown(cads(seed=7), 9.0, slice(2)), shown(cads(seed=7), 9.0)[:2])
    other = shown(cads(seed=8), 9.0)
    assert (other - shown(cads(seed=7), 9.0)).abs().max() > 0.1
    assert (other - shown(cads(seed=8), 9.5)).abs().max() > 0.1


def test_the_noise_of_cads_is_the_same_on_processors_that_round_differently():
    for sigma in (6.1, 7.5, 8.7):
        here = torch.tensor([sigma])
        there = torch.nextafter(torch.nextafter(here, here + 1), here + 1)
        close(shown(cads(), there.item()), shown(cads(), sigma), 1e-5)


@pytest.mark.parametrize(
    'settings, match',
    [
        (dict(tau1=0.9), 'tau2: expected'),
        (dict(tau1=-0.1), 'tau1: expected'),
        (dict(s=-1.0), 's: expected'),
        (dict(psi=2.0), 'psi: expected'),
        (dict(seed=-1), 'seed: expected'),
    ],
)
def test_bad_settings_of_cads(settings, match):
    with pytest.raises(ValueError, match=match):
        cads(**settings)


@pytest.mark.parametrize('labels', [torch.arange(4), torch.arange(4.0)], ids=['whole', 'real'])
def test_cads_leaves_one_number_per_sample_alone(labels):
    seen = {}

    def inside(x, sigma, labels, y):
        seen.update(labels=labels, y=y)
        return x

    y = COND['encoder_hidden_states']
    CADS(Denoiser(inside), time=by_share)(X, 9.5, labels=labels, y=y)
    assert torch.equal(seen['labels'], labels)
    assert (seen['y'] - y).abs().max() > 0.1


@pytest.mark.parametrize('labels', [torch.arange(4), torch.arange(4.0)], ids=['whole', 'real'])
def test_cads_needs_an_embedding(labels):
    with pytest.raises(ValueError, match=r'cond: CADS expects an embedding .* labels \(4,\) of'):
        cads()(X, 5.0, labels=labels)


# random numbers


@random
def test_each_evaluation_draws_anew(make):
    G = GuidedDenoiser(D, make(3), w=3.0)
    a = G.parts(X, 5.0, **COND).neg
    b = G.parts(X, 4.999, **COND).neg
    assert not torch.allclose(a, b, atol=1e-3)


@random
def test_no_seed_is_other_numbers_each_run(make):
    G = GuidedDenoiser(D, make(None), w=3.0)
    assert not torch.equal(drawn(G), drawn(G))


@random
def test_other_seeds_are_other_numbers(make):
    one, two = (drawn(GuidedDenoiser(D, make(i), w=3.0)) for i in (1, 2))
    assert not torch.allclose(one, two, atol=1e-3)


@random
def test_a_generator_goes_on(make):
    G = GuidedDenoiser(D, make(seeded(1)), w=3.0)
    first = drawn(G)
    assert not torch.equal(drawn(G), first)
    assert torch.equal(drawn(GuidedDenoiser(D, make(seeded(1)), w=3.0)), first)


@random
def test_the_global_generator_is_left_alone(make):
    before = torch.get_rng_state()
    evaluate(make(None))
    assert torch.equal(torch.get_rng_state(), before)


class Scarce(Denoiser):
    "A network with memory for two rows."

    def forward(self, x, sigma, **cond):
        if len(x) > 2:
            raise torch.OutOfMemoryError('out of memory')
        return self.inner_model(x, sigma, **cond)


@every
def test_after_out_of_memory_nothing_is_drawn_again(make):
    G = GuidedDenoiser(Microbatched(Scarce(D), 64), make(6), w=3.0)
    whole = GuidedDenoiser(D, make(6), w=3.0)
    close(drawn(G), drawn(whole), 1e-4)
    assert G.nfe == whole.nfe


def test_a_function_draws_once_when_memory_runs_out():
    calls = []

    def draw(generators):
        calls.append(len(generators))
        return draw_conditions(POOL)(generators)

    G = GuidedDenoiser(Microbatched(Scarce(D), 64), ICG(draw, 6), w=3.0)
    G(X, 5.0, **COND)
    assert calls == [2, 4]  # the check of two samples, then one draw


@pytest.mark.parametrize(
    'f', [draw_conditions(POOL), draw_tokens(TOKENIZER, encode), draw_gaussian(POOL)]
)
def test_each_sample_draws_from_its_own_generator(f):
    two, one = (f([seeded(i) for i in o])['encoder_hidden_states'] for o in ([5, 6], [6]))
    close(two[1:], one)
    assert not torch.allclose(two[0], two[1], atol=1e-3)


def numbers(seen):
    def draw(generators):
        seen.append(torch.stack([torch.randn(3, generator=g) for g in generators]))
        return dict(labels=torch.arange(len(generators)) % 2)

    return draw


def test_one_seed_means_other_streams_in_another_term_and_in_the_sampler():
    seen, z = [], randn((3, 2), 0, dtype=torch.float64)
    pair = GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], 1.0, sigma_max=20.0)
    draw = numbers(seen)
    G = GuidedDenoiser(pair, Term(ICG(draw, 5), 2.0), Term(ICG(draw, 5), 2.0))
    G(z, 2.0, labels=torch.zeros(3).long())
    one, two = seen[-2:]
    own = torch.stack([torch.randn(3, generator=g) for g in _run_generators(z, 5)])
    assert not torch.equal(one, two)
    assert not torch.equal(one, own)
    assert not torch.equal(two, own)


def test_one_negative_may_stand_in_two_terms():
    neg = ICG(POOL, 9)
    shared = GuidedDenoiser(D, Term(neg, 2.0), Term(neg, 2.0))
    own = GuidedDenoiser(D, Term(ICG(POOL, 9), 2.0), Term(ICG(POOL, 9), 2.0))
    assert torch.equal(shared(X, 5.0, **COND), own(X, 5.0, **COND))


def test_streams_stay_as_measured():
    "Stored results rest on this: the last of two seeds drawn from the sample's generator."
    seen = []
    GuidedDenoiser(D, ICG(lambda gs: numbers(seen)(gs) and POOL_ROWS(gs), 5), w=2.0)(X, 5.0, **COND)
    seeds = [torch.randint(2**62, (), generator=g).item() for g in [seeded(5)] for _ in range(4)]
    want = []
    for s in seeds:
        g = seeded(s)
        inner = [torch.randint(2**62, (), generator=g).item() for _ in range(2)][-1]
        want.append(torch.randn(3, generator=seeded(inner)))
    assert torch.equal(seen[-1], torch.stack(want))


def POOL_ROWS(generators):
    return {k: v[: len(generators)] for k, v in POOL.items()}


# Perp-Neg


def told(x, sigma, say):
    "A denoiser that says what it is told."
    return say.expand_as(x).to(x.dtype)


E1, E2 = torch.eye(4)[:2]
U = torch.full((1, 4), 0.5)
P = U + 3 * E1


def perp(neg, pos=P, w=3.0, dtype=torch.float32, **kw):
    G = GuidedDenoiser(told, PerpNeg(dict(say=U), dict(say=neg), **kw), w=w)
    return G(torch.zeros(1, 4, dtype=dtype), 1.0, say=pos)


def test_a_parallel_prompt_is_ignored():
    close(perp(U + 2 * E1), U + 3 * (P - U))


def test_an_opposite_prompt_is_ignored():
    close(perp(U - 5 * E1), U + 3 * (P - U))


def test_of_an_orthogonal_prompt_nothing_is_lost():
    close(perp(U + 2 * E2), U + 2 * E2 + 3 * (P - U - 2 * E2))


def test_of_others_the_perpendicular_part_counts():
    close(perp(U + 2 * E1 + 4 * E2), U + 4 * E2 + 3 * (P - U - 4 * E2))


@pytest.mark.parametrize('beta', [0.25, 0.0, torch.tensor(0.25), lambda s: s / 4])
def test_the_weight_of_a_prompt(beta):
    left = 4 * E2 * (beta(torch.ones(1)).item() if callable(beta) else float(beta))
    close(perp(U + 4 * E2, weights=beta), U + left + 3 * (P - U - left))


def test_a_positive_like_the_empty_prompt_has_no_direction():
    close(perp(U + E2, pos=U, w=2.0), U + E2 + 2 * (U - U - E2))


def test_the_type_of_the_images_stays():
    assert perp(U + 2 * E2, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_weight_of_0_is_the_empty_prompt():
    none = evaluate(PerpNeg(EMPTY, BAD, 0.0), 3.0)
    assert torch.equal(none, evaluate(PerpNeg(EMPTY, EMPTY), 3.0))
    close(none, evaluate(EMPTY, 3.0), 1e-4)


def test_a_function_is_evaluated_at_the_noise_level():
    f = PerpNeg(EMPTY, [BAD, EMPTY], [lambda s: s / 10, 1.0])
    close(evaluate(f), evaluate(PerpNeg(EMPTY, BAD, 0.5)))


def test_two_prompts_are_the_formula():
    un, pos, *negs = (plain(o).flatten(1).double() for o in (EMPTY, COND, BAD, DRESS))
    perps = []
    for n in negs:
        a, c = n - un, pos - un
        perps.append(a - (a * c).sum(1, keepdim=True) / (c * c).sum(1, keepdim=True) * c)
    neg = un + 0.5 * perps[0] + 1.5 * perps[1]
    want = (neg + 4 * (pos - neg)).view_as(X).float()
    close(evaluate(PerpNeg(EMPTY, [BAD, DRESS], [0.5, 1.5]), 4.0), want, 1e-4)


LEVELS = torch.tensor([8.0, 5.0, 2.0, 0.5])
TWO = PerpNeg(EMPTY, [BAD, BAGS], [torch.tensor([0.5, 1.0, 0.0, 2.0]), lambda s: s / 8])


def two_apart():
    "Positive and negative, with one forward each."
    un, bad, bag, pos = (plain(o, LEVELS) for o in (EMPTY, BAD, BAGS, COND))
    first, second = (
        w[:, None, None, None] * _perpendicular(o - un, pos - un)
        for w, o in ((TWO.weights[0](LEVELS).float(), bad), (LEVELS / 8, bag))
    )
    return pos, un + first + second


@pytest.mark.parametrize('size', [None, 16, 8, 3, 1])
def test_samples_of_several_noise_levels_and_weights(size):
    pos, neg = two_apart()
    G = GuidedDenoiser(D if size is None else Microbatched(D, size), TWO, w=W4)
    close(G(X, LEVELS, **COND), neg + W4[:, None, None, None] * (pos - neg), 1e-4)
    assert G.run.nfe_per_sample.tolist() == [4, 1, 4, 4]


def test_all_rows_are_one_forward():
    C = Counted(D)
    evaluate(TWO, W4, LEVELS, D=C)
    assert C.sizes == [4 + 3 * 3]


def test_in_pieces_a_sample_keeps_its_rows_together():
    C = Counted(D)
    evaluate(TWO, W4, LEVELS, D=Microbatched(C, 8))
    assert C.sizes == [2 + 3, 2 + 3 * 2]


def test_the_positive_is_needed_at_a_weight_of_0():
    _, neg = two_apart()
    G = GuidedDenoiser(D, TWO, w=torch.tensor([0.0, 1.0, 0.0, 2.0]))
    out = G(X, LEVELS, **COND)
    close(out[[0, 2]], neg[[0, 2]], 1e-4)
    assert torch.equal(out[1], plain(COND, LEVELS)[1])
    assert G.run.nfe_per_sample.tolist() == [4, 1, 4, 4]


def test_a_longer_text_is_a_negative_too():
    longer = dict(encoder_hidden_states=torch.cat([BAD['encoder_hidden_states']] * 2, 1))
    assert evaluate(PerpNeg(EMPTY, longer)).isfinite().all()


STEPS = get_sigmas_karras(4, 0.5, 8.0)
TABLE = torch.arange(1.0, 17.0).view(4, 4) / 8  # one weight per step and sample


def stepped(rows, w, size=None):
    neg = PerpNeg(EMPTY, BAD, on_sigmas(TABLE[:, rows], STEPS))
    G = GuidedDenoiser(D if size is None else Microbatched(D, size), neg, w=w[rows])
    return G(X[rows], STEPS[1].item(), **{k: v[rows] for k, v in COND.items()})


@pytest.mark.parametrize('w', [torch.full((4,), 3.0), W4], ids=['one weight', 'four weights'])
@pytest.mark.parametrize('size', [None, 3])
@pytest.mark.parametrize('rows', [slice(0, 4), slice(0, 1), slice(1, 3), slice(3, 4)])
def test_one_weight_per_step_and_sample(w, size, rows):
    want = evaluate(PerpNeg(EMPTY, BAD, TABLE[1]), w, STEPS[1].item())
    close(stepped(rows, w, size), want[rows], 1e-4)


def test_weights_bound_to_the_sampler_run():
    neg = PerpNeg(EMPTY, BAD, on_sigmas(TABLE, STEPS))
    assert sample(GuidedDenoiser(D, neg, w=2.0), X, STEPS, euler, COND).isfinite().all()


@pytest.mark.parametrize('values', [[1.0] * 4, TABLE], ids=['per step', 'per step and sample'])
def test_weights_bound_to_other_noise_levels_are_refused(values):
    neg = PerpNeg(EMPTY, BAD, on_sigmas(values, STEPS))
    C = Counted(D)
    with pytest.raises(ValueError, match='^weights belongs to 4 steps'):
        sample(GuidedDenoiser(C, neg, w=2.0), X, get_sigmas_karras(7, 0.1, 5.0), euler, COND)
    assert C.sizes == []


# interpolation


def parameters(o):
    return list(o.state_dict().values())


@pytest.mark.parametrize('share, end', [(0, D), (1, OLD)])
def test_ends_are_exact(share, end):
    pairs = zip(parameters(interpolate(D, OLD, share)), parameters(end), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_between_and_beyond():
    half, far = (interpolate(D, OLD, o).inner_model.conv_in.weight for o in (0.5, -2.0))
    close(half, 0.95 * UNET.conv_in.weight)
    close(far, 1.2 * UNET.conv_in.weight)


def test_nothing_is_shared():
    new = interpolate(D, OLD, -2.0).inner_model.conv_in.weight
    assert new.data_ptr() != UNET.conv_in.weight.data_ptr()


def test_a_network_and_a_denoiser_may_meet():
    one, two = (interpolate(D, o, 0.5) for o in (OLD, OLD.inner_model))
    pairs = zip(parameters(one), parameters(two), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_counters_stay_and_statistics_are_interpolated():
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    b.num_batches_tracked += 7
    b.running_mean += 4
    m = interpolate(a, b, 0.5)
    assert m.num_batches_tracked.item() == 0
    close(m.running_mean, torch.full((3,), 2.0))
    assert m.weight.requires_grad


def test_the_type_of_the_weights_stays():
    half = interpolate(nn.Linear(2, 2).half(), nn.Linear(2, 2), 0.3)
    assert half.weight.dtype == torch.float16


# random conditions


def test_one_condition_with_probability_1_is_that_negative():
    pair = GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], 1.0, sigma_max=20.0)
    z, c = randn((64, 2), 0, dtype=torch.float64), dict(labels=torch.zeros(64).long())
    sure = ICG(lambda gs: dict(labels=torch.ones(len(gs)).long()))
    one = GuidedDenoiser(pair, dict(labels=torch.tensor([1])), w=3.0)
    assert torch.equal(GuidedDenoiser(pair, sure, w=3.0)(z, 2.0, **c), one(z, 2.0, **c))


def test_names_of_a_condition_are_drawn_together():
    rows = draw_conditions(dict(labels=torch.arange(3), size=torch.arange(3) * 10.0))(
        [seeded(i) for i in range(3000)]
    )
    assert torch.equal(rows['labels'] * 10.0, rows['size'])
    assert (rows['labels'].bincount() / 3000 - 1 / 3).abs().max() < 0.03


def test_only_what_is_drawn_is_replaced():
    calls = []

    def see(x, sigma, labels, size):
        calls.append((labels, size))
        return x * 0

    G = GuidedDenoiser(see, ICG(dict(labels=torch.arange(50)), 1), w=2.0)
    cond = dict(labels=torch.full((64,), 99), size=torch.arange(64.0))
    for sigma in 2.0, 1.0:
        G(torch.ones(64, 2), sigma, **cond)
    (a, size), (b, _) = calls
    assert (a[:64] == 99).all()
    assert (a[64:] < 50).all()
    assert torch.equal(size[64:], cond['size'])
    assert not torch.equal(a, b)
    assert len(a[64:].unique()) > 20


def test_random_tokens_are_all_but_the_special_ones():
    seen = []
    draw_tokens(TOKENIZER, lambda ids: seen.append(ids), 7)([seeded(i) for i in range(500)])
    (ids,) = seen
    assert tuple(ids.shape) == (500, 7)
    assert ids[:, 0].unique().tolist() == [TOKENIZER.bos_token_id]
    assert ids[:, -1].unique().tolist() == [TOKENIZER.eos_token_id]
    words = {*range(len(TOKENIZER))} - {*TOKENIZER.all_special_ids}
    assert {*ids[:, 1:-1].flatten().tolist()} == words


def test_gaussian_noise_has_the_statistics_of_the_embeddings():
    like = 3 + 2 * randn((64, 12, 64), 0)
    many = draw_gaussian(dict(a=like))([seeded(i) for i in range(300)])['a']
    assert abs(many.mean() - like.mean()) < 0.01
    assert abs(many.std() / like.std() - 1) < 0.01


def test_a_drawn_text_may_have_another_length():
    longer = ICG(lambda gs: dict(encoder_hidden_states=torch.zeros(len(gs), 7, 8)))
    assert evaluate(longer).isfinite().all()


def test_half_precision():
    H = DiscreteDenoiser(copy.deepcopy(UNET).bfloat16())
    G = GuidedDenoiser(H, Term(ICG(POOL, 1), 2.0), Term(TSG(H), 2.0))
    cond = {k: v.bfloat16() for k, v in COND.items()}
    assert G(X.bfloat16(), 5.0, **cond).dtype == torch.bfloat16


# noise on the time


class Adds(nn.Module):
    "Adds a linear function of its time embedding."

    def __init__(self):
        super().__init__()
        self.time_embed, self.out = nn.Linear(1, 6), nn.Linear(6, 4)

    def forward(self, x, t):
        return x + self.out(self.time_embed(t[:, None]))


ADDS = NetDenoiser(frozen(Adds), 'x0', 0.1, 10.0)
Y, YSIGMA = randn((3, 4), 1), torch.tensor([10.0, 5.0, 1.0])


def timed(*args, D=ADDS, **kw):
    "The negative of TSG, and the noise that it adds to the output."
    parts = GuidedDenoiser(D, TSG(D, *args, **dict(dict(generator=3), **kw)), w=2.0).parts(
        Y, YSIGMA
    )
    return parts.neg, parts.neg - parts.pos


def test_the_noise_is_that_of_the_seeds():
    gens = [seeded(i) for i in range(3)]
    T = TSG(ADDS, s=2.0, alpha=0.5)
    (q,) = T.queries(Y, YSIGMA, {}, gens)
    seeds = [torch.randint(2**62, (), generator=seeded(i)).item() for i in range(3)]
    noise = torch.stack([torch.randn(6, generator=seeded(s)) for s in seeds])
    site = type('Site', (), dict(samples=torch.tensor([2, 0])))
    out = torch.zeros(2, 6)
    close(q.change.fn(out, site), (2 * (YSIGMA / 10).sqrt()[:, None] * noise)[[2, 0]])


def test_a_query_of_tsg_is_the_positive_itself():
    (q,) = TSG(ADDS).queries(Y, YSIGMA, cond := {}, [seeded(i) for i in range(3)])
    assert q.x is Y
    assert q.sigma is YSIGMA
    assert q.cond is cond


def test_no_noise_is_the_positive():
    parts = GuidedDenoiser(D, TSG(D, 0.0), w=2.0).parts(X, 5.0, **COND)
    close(parts.neg, parts.pos)


def test_at_time_0_there_is_no_noise():
    close(timed(time=lambda s: 0 * s)[1], torch.zeros(3, 4))


def test_noise_is_proportional_to_s():
    close(timed(s=2.0)[1], 2 * timed(s=1.0)[1])


def test_noise_falls_with_a_power_of_time():
    close(timed(alpha=0.0)[1] * (YSIGMA / 10)[:, None] ** 1.5, timed(alpha=1.5)[1])


def test_time_may_be_given():
    close(timed(time=lambda s: s / 5)[1], 2 * timed()[1])
    close(timed(time=lambda s: 1.0)[1], timed(alpha=0.0)[1])


def test_a_network_will_do_if_time_is_given():
    share = TSG(UNET, 1.0, 0.5, generator=1, time=lambda s: D.sigma_to_t(s) / 999)
    assert torch.equal(evaluate(share), evaluate(TSG(D, 1.0, 0.5, generator=1)))


def test_layers_of_another_network_are_refused():
    C = Counted(D)
    refused(lambda: evaluate(TSG(copy.deepcopy(D)), D=C), ValueError, 'got those of another one')
    assert C.sizes == []


def test_an_error_in_the_network_leaves_no_trace():
    class Boom(Denoiser):
        def forward(self, x, sigma, **cond):
            self.inner_model(x, sigma, **cond)
            raise RuntimeError('in the middle')

    before = D(X, 5.0, **COND)
    with pytest.raises(RuntimeError, match='in the middle'):
        evaluate(TSG(D), D=Boom(D))
    assert torch.equal(D(X, 5.0, **COND), before)


@pytest.mark.parametrize(
    'layers',
    ['time_embedding', ['*time_embedding'], lambda n, m: n == 'time_embedding'],
    ids=['name', 'list', 'function'],
)
def test_layers_may_be_named(layers):
    assert torch.equal(evaluate(TSG(D, layers=layers, generator=1)), evaluate(TSG(D, generator=1)))


def test_the_embedded_ddpm():
    ddpm = load_ddpm()
    M = CosineDenoiser(ddpm.net, ddpm.prediction, scale=1000)
    x, c = 3 * randn((4, 1, 32, 32), 0), dict(class_labels=torch.arange(4))
    before = M(x, 3.0, **c)
    parts = GuidedDenoiser(M, TSG(M, 0.5, generator=1), w=2.0).parts(x, 3.0, **c)
    assert (parts.neg - before).abs().max() > 0.01
    assert torch.equal(M(x, 3.0, **c), before)


@pytest.mark.parametrize('how', ['function', 'method'])
def test_a_compiled_network_gives_the_same_numbers(how):
    net = copy.deepcopy(ADDS.inner_model)
    net = torch.compile(net, backend='eager') if how == 'function' else net
    if how == 'method':
        net.compile(backend='eager')
    C = NetDenoiser(net, 'x0', 0.1, 10.0)
    close(C(Y, YSIGMA), ADDS(Y, YSIGMA))
    close(timed(D=C)[0], timed()[0])
    close(C(Y, YSIGMA), ADDS(Y, YSIGMA))
    torch._dynamo.reset()


SMALL = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2)


def dit():
    return DiTTransformer2DModel(**SMALL, sample_size=8, num_embeds_ada_norm=10)


def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        **SMALL,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )


def pixart():
    return PixArtTransformer2DModel(
        **SMALL,
        out_channels=8,
        cross_attention_dim=16,
        sample_size=128,
        caption_channels=16,
        use_additional_conditions=True,
    )


def flux():
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


@pytest.mark.parametrize(
    'make, names',
    [
        (sd3, ['time_text_embed.timestep_embedder']),
        (pixart, ['adaln_single.emb.timestep_embedder']),
        (flux, ['time_text_embed.timestep_embedder']),
    ],
)
def test_where_transformers_embed_the_time(make, names):
    assert list(find_time_layers(frozen(make))) == names


def test_every_block_of_a_dit_gets_the_noise():
    T = DiscreteDenoiser(frozen(dit))
    labels = dict(class_labels=torch.arange(4))
    assert len(find_time_layers(T)) == 2
    before = T(X, 5.0, **labels)
    parts = GuidedDenoiser(T, TSG(T, 1.0, generator=2), w=2.0).parts(X, 5.0, **labels)
    assert (parts.neg - before).abs().max() > 1e-3
    assert torch.equal(T(X, 5.0, **labels), before)


def test_the_noise_reaches_sd3():
    net = frozen(sd3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, states, pooled):
            return self.net(x, states, pooled, t).sample

    M = NetDenoiser(Net(), 'x0', 0.1, 10.0)
    cond = dict(states=randn((4, 5, 16), 1), pooled=randn((4, 16), 2))
    parts = GuidedDenoiser(M, TSG(M, 1.0, 0.0, generator=2), w=2.0).parts(X, 5.0, **cond)
    assert (parts.neg - parts.pos).abs().max() > 1e-3


# bad input: said before the first evaluation


def refused(call, exc, match):
    with pytest.raises(exc, match=match) as e:
        call()
    assert len(str(e.value)) < 200
    assert '\n' not in str(e.value)


class Config(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.config = type('C', (), dict(in_channels=n))


class Sized(Denoiser):
    latent_shape = 4, 16, 16


def draws(*shape, dtype=torch.float32):
    "Conditions of this shape; None is the number of samples."
    return ICG(
        lambda gs: dict(
            encoder_hidden_states=torch.zeros([len(gs) if s is None else s for s in shape]).to(
                dtype
            )
        )
    )


THREE = {k: v[:3] for k, v in COND.items()}
AT_THE_FIRST_EVALUATION = {
    'empty prompt with 3 rows': (lambda: PerpNeg(THREE, BAD), 'encoder_hidden_states: expected a'),
    'negative prompt with 3 rows': (lambda: PerpNeg(EMPTY, THREE), 'encoder_hidden_states: exp'),
    'conditions with 3 rows': (lambda: THREE, 'encoder_hidden_states: expected a tensor with 1 or'),
    'another name': (lambda: PerpNeg(EMPTY, dict(labels=torch.zeros(1))), 'expected names among'),
    '3 weights': (lambda: PerpNeg(EMPTY, BAD, torch.ones(3)), 'weights: expected one value, or 4'),
    '3 weights per step': (
        lambda: PerpNeg(EMPTY, BAD, on_sigmas(TABLE[:, :3], STEPS)),
        'weights: expected one value, or 4',
    ),
    'channels': (lambda: Autoguidance(Denoiser(Config(3))), 'expected a network with 4 input chan'),
    'ICG, another name': (lambda: ICG(dict(labels=torch.arange(3))), 'conds: expected draws of co'),
    'ICG, nothing': (lambda: ICG(lambda gs: {}), 'conds: expected draws of conditions'),
    'ICG, None': (lambda: ICG(lambda gs: None), 'conds: expected draws of conditions.*NoneType'),
    'ICG, one row': (lambda: draws(1, 6, 8), 'conds: expected draws of encoder_hidden_states'),
    'ICG, no text': (lambda: draws(None, 8), 'conds: expected draws of encoder_hidden_states'),
    'ICG, width': (lambda: draws(None, 6, 4), 'conds: expected draws of encoder_hidden_states'),
    'ICG, axes': (lambda: draws(None, 1, 6, 8), 'conds: expected draws of encoder_hidden_states'),
    'ICG, whole numbers': (
        lambda: draws(None, 6, 8, dtype=torch.long),
        'conds: expected draws of encoder_hidden_states',
    ),
    'ICG, list': (
        lambda: ICG(lambda gs: dict(encoder_hidden_states=[0] * len(gs))),
        'conds: expected draws of encoder_hidden_states.*got list',
    ),
}


@pytest.mark.parametrize('case', AT_THE_FIRST_EVALUATION)
def test_what_does_not_fit_is_said_before_anything_is_evaluated(case):
    make, match = AT_THE_FIRST_EVALUATION[case]
    C = Counted(D)
    refused(lambda: evaluate(make(), D=C), ValueError, match)
    assert C.sizes == []


def test_a_model_for_other_latents_is_refused():
    C = copy.copy(D)
    C.latent_shape = 4, 8, 8
    refused(lambda: evaluate(Autoguidance(Sized(D)), D=C), ValueError, r'latents of shape \(4, 8')


@pytest.mark.parametrize('wrap', [lambda o: o, Denoiser])
def test_the_guided_model_is_not_its_own_negative(wrap):
    call = partial(evaluate, Autoguidance(wrap(D)), D=wrap(D))
    refused(call, ValueError, 'the negative model is the guided one')


AT_CONSTRUCTION = {
    'negs None': (lambda: PerpNeg(EMPTY, None), TypeError, '^negs: expected a dict'),
    'negs a number': (lambda: PerpNeg(EMPTY, 5), TypeError, '^negs: expected a dict'),
    'negs text': (lambda: PerpNeg(EMPTY, 'a bag'), TypeError, '^negs: expected a dict'),
    'negs none': (lambda: PerpNeg(EMPTY, []), TypeError, '^negs: expected a dict'),
    'negs of numbers': (lambda: PerpNeg(EMPTY, [5]), TypeError, '^negs: expected a dict'),
    'empty None': (lambda: PerpNeg(None, BAD), TypeError, '^empty: expected a dict'),
    **{
        f'weights {w}': (lambda w=w: PerpNeg(EMPTY, BAD, w), ValueError, '^weights: expected')
        for w in (-1.0, NAN, INF, torch.tensor([1.0, NAN]), [1.0, 1.0], [], [[1.0, 2.0]])
    },
    'weights per step': (
        lambda: PerpNeg(EMPTY, BAD, torch.ones(2, 2)),
        ValueError,
        r'^weights: expected.*on_sigmas\(values, sigmas\)',
    ),
    **{
        f'weights {w!r}': (lambda w=w: PerpNeg(EMPTY, BAD, w), TypeError, '^weights: expected')
        for w in ('a', None, True)
    },
    **{
        f'share {s!r}': (lambda s=s: interpolate(D, OLD, s), exc, '^share: expected')
        for s, exc in (
            (NAN, ValueError),
            (INF, ValueError),
            (None, TypeError),
            ('a', TypeError),
            (True, TypeError),
        )
    },
    'net a function': (lambda: interpolate(len, D, 0.5), TypeError, '^net: expected a network'),
    'weak a function': (lambda: interpolate(D, len, 0.5), TypeError, '^weak: expected a network'),
    'weak of other shape': (
        lambda: interpolate(nn.Linear(2, 3), nn.Linear(2, 4), 0.5),
        ValueError,
        r'^weak: expected.*weight: \(3, 2\), got \(4, 2\)',
    ),
    'weak another network': (lambda: interpolate(D, nn.Linear(2, 3), 0.5), ValueError, '^weak: '),
    **{
        f'{f.__name__}({o!r})': (lambda f=f, o=o: f(o), TypeError, '^conds: expected a dict')
        for f in (ICG, draw_conditions, draw_gaussian)
        for o in (None, 5, 'a', {}, [1.0])
    },
    **{
        f'{f.__name__}, rows {o!r}': (lambda f=f, o=o: f(dict(y=o)), ValueError, '^conds: expected')
        for f in (ICG, draw_conditions, draw_gaussian)
        for o in ([1, 2], torch.zeros(0).long(), torch.tensor(1), None)
    },
    'one condition': (lambda: ICG(dict(a=torch.zeros(1, 3))), ValueError, 'two different'),
    'equal conditions': (lambda: ICG(dict(a=torch.ones(5, 3))), ValueError, 'two different'),
    'other rows': (
        lambda: draw_conditions(dict(a=torch.zeros(2), b=torch.zeros(3))),
        ValueError,
        '^conds: expected the same number of rows',
    ),
    'tokenizer None': (lambda: draw_tokens(None, encode), TypeError, '^tokenizer: expected'),
    'encode None': (lambda: draw_tokens(TOKENIZER, None), TypeError, '^encode: expected'),
    **{
        f'length {n!r}': (lambda n=n: draw_tokens(TOKENIZER, encode, n), exc, '^length: expected')
        for n, exc in (
            (2, ValueError),
            (0, ValueError),
            (-1, ValueError),
            (1_000_000, ValueError),
            (2.5, TypeError),
            (True, TypeError),
            ('a', TypeError),
        )
    },
    'embeddings alike': (
        lambda: draw_gaussian(dict(a=torch.ones(2, 3))),
        ValueError,
        '^conds: expected a with a standard deviation above 0',
    ),
    'embeddings NaN': (
        lambda: draw_gaussian(dict(a=torch.tensor([NAN, 1.0]))),
        ValueError,
        '^conds: expected a with a standard deviation above 0',
    ),
    'whole numbers': (
        lambda: draw_gaussian(dict(labels=torch.arange(4))),
        ValueError,
        'for whole numbers use draw_conditions',
    ),
    **{
        f'{cls.__name__}, generator {g!r}': (
            lambda make=make, g=g: make(g),
            (TypeError, ValueError),
            '^generator: expected',
        )
        for cls, make in ((ICG, lambda g: ICG(POOL, g)), (TSG, lambda g: TSG(D, generator=g)))
        for g in ('a', 1.5, True, -1, [1, None], [1, 'a'])
    },
    **{
        f'{k} {v!r}': (lambda k=k, v=v: TSG(D, **{k: v}), exc, f'^{k}: expected')
        for k in ('s', 'alpha')
        for v, exc in (
            (-1.0, ValueError),
            (NAN, ValueError),
            (INF, ValueError),
            (None, TypeError),
            (True, TypeError),
            ('a', TypeError),
        )
    },
    'no such layer': (
        lambda: TSG(D, layers='clock'),
        ValueError,
        '^layers=.clock. matches nothing',
    ),
    'layers a number': (lambda: TSG(D, layers=5), TypeError, '^layers: expected'),
    'TSG, net a function': (lambda: TSG(len), TypeError, '^net: expected'),
    'net a network': (lambda: TSG(UNET), ValueError, '^time: UNet2DConditionModel does not know'),
    'no highest level': (lambda: TSG(Denoiser(UNET)), ValueError, '^time: Denoiser does not know'),
    'negative time': (
        lambda: TSG(D, time=lambda s: s.log() / 4),
        ValueError,
        '^time: expected values from 0, got -1.7',
    ),
    'time NaN': (lambda: TSG(D, time=lambda s: s * NAN), ValueError, '^time: expected values'),
    'time a number': (lambda: TSG(D, time=0.5), TypeError, '^time: expected a function'),
    'time of other shape': (
        lambda: TSG(D, time=lambda s: torch.ones(3)),
        ValueError,
        '^time: expected one value per sample',
    ),
}


@pytest.mark.parametrize('case', AT_CONSTRUCTION)
def test_bad_settings_are_refused(case):
    call, exc, match = AT_CONSTRUCTION[case]
    refused(call, exc, match)


def test_the_wrong_number_of_queries_is_said():
    class Wrong(Queries):
        nfe = 3

        def queries(self, x, sigma, cond, generators=None):
            return [Query(x, sigma, cond)] * 2

    refused(lambda: evaluate(Wrong()), ValueError, 'returned 2 queries but nfe is 3')


def test_a_function_with_negative_weights_is_refused():
    refused(lambda: evaluate(PerpNeg(EMPTY, BAD, lambda s: -s)), ValueError, '^weights')


def test_cads_takes_a_list_of_names():
    with pytest.raises(TypeError, match='names: expected a list of names'):
        CADS(Denoiser(lambda x, sigma: x), names='text_embeds')


def test_cads_refuses_names_that_are_not_there():
    C = CADS(Denoiser(lambda x, sigma, **cond: x), names=['text', 'txet'], time=by_share)
    with pytest.raises(ValueError, match=r"names: expected some of \['text'\], got 'txet'"):
        C(torch.zeros(1, 4), 9.5, text=torch.ones(1, 3))
