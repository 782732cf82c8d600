"""Against k-diffusion: the same x from the same noise, its samplers on ours and ours on its.

Optional: `pip install --no-deps k-diffusion`. Only its `sampling.py` and `external.py` are read.
"""

import importlib.util
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import nn

from cf_guidance import karras
from cf_guidance.denoisers import (
    CosineDenoiser,
    Denoiser,
    DiscreteDenoiser,
    EDMDenoiser,
    FlowDenoiser,
    NetDenoiser,
    scaled_linear,
)
from cf_guidance.guided import GuidedDenoiser, Term
from cf_guidance.transforms import apg


def benchmark(name):
    "A file of benchmarks/ as a module"
    spec = importlib.util.spec_from_file_location(name, ROOT / 'benchmarks' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kd = benchmark('samplers').k_diffusion()
if kd is None:
    pytest.skip(
        'k-diffusion is not installed: pip install --no-deps k-diffusion', allow_module_level=True
    )

STOCHASTIC = [
    'euler_ancestral',
    'dpm_2_ancestral',
    'dpmpp_2s_ancestral',
    'dpmpp_sde',
    'dpmpp_2m_sde',
    'dpmpp_3m_sde',
]
CASES = [
    ('euler', {}),
    ('heun', {}),
    ('dpm_2', {}),
    ('dpmpp_2m', {}),
    *[('lms', dict(order=o)) for o in (1, 2, 3, 4)],
    *[(k, dict(eta=e)) for k in STOCHASTIC for e in (0.0, 1.0)],
    *[('dpmpp_2m_sde', dict(eta=e, solver_type='heun')) for e in (0.0, 1.0)],
    *[('dpmpp_sde', dict(eta=e, r=0.3)) for e in (0.0, 1.0)],
]
PARTLY = [(k, dict(eta=0.6, s_noise=1.1)) for k in STOCHASTIC]
FEW = [
    ('heun', {}),
    ('dpm_2', {}),
    ('lms', dict(order=4)),
    ('dpmpp_2m', {}),
    ('dpmpp_sde', dict(eta=1.0)),
    ('euler_ancestral', dict(eta=1.0)),
]


def case(o):
    return o if isinstance(o, str) else '-'.join(f'{k}={v}' for k, v in o.items())


def samplers(cases):
    return pytest.mark.parametrize('name,options', cases, ids=case)


def each(name, values):
    return pytest.mark.parametrize(name, values.values(), ids=values)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def close(got, want, tol=1e-5):
    "The same but for rounding: error relative to the largest value"
    assert (
        got.shape == want.shape
        and got.dtype == want.dtype
        and want.isfinite().all()
        and want.abs().max() > 1e-3
    )
    err = ((got - want).abs().max() / want.abs().max()).item()
    assert err < tol, err


class Mixture(nn.Module):
    "The exact denoiser of ten Gaussians; `shift` moves them, one number a sample"

    sigma_min, sigma_max = 0.03, 14.6

    def __init__(self, spread=0.3):
        super().__init__()
        self.register_buffer('centres', normal(10, 64, seed=1))
        self.spread = spread

    def forward(self, x, sigma, shift):
        s, v = sigma.view(-1, 1, 1), self.spread**2
        gap = x.reshape(len(x), 1, 64) - self.centres - shift.view(-1, 1, 1)
        near = (-gap.pow(2).sum(-1, keepdim=True) / (2 * (v + s**2))).softmax(1)
        return x - (near * gap * s**2 / (v + s**2)).sum(1).view_as(x)


def noise(x, seed=2):
    "Noise that depends on both levels it is asked for, and on nothing else"
    a, b = normal(2, *x.shape, seed=seed).to(x.dtype)

    def _noise(sigma, sigma_next):
        return a * math.cos(3 * math.log(sigma)) + b * math.sin(2 * math.log(sigma_next))

    return _noise


def walk(module, name, D, x, sigmas, cond=None, **options):
    "What `callback` saw, and the end"
    seen = []
    if 'eta' in options:
        options['noise_sampler'] = noise(x)
    x = getattr(module, f'sample_{name}')(
        D, x, sigmas, extra_args=cond, callback=seen.append, disable=True, **options
    )
    return seen, x


def same_walk(got, want, tol=1e-5):
    "The same end, and the same dicts to the callback, where rounding may be more"
    (seen, x), (wanted, x_wanted) = got, want
    close(x, x_wanted, tol)
    assert len(seen) == len(wanted)
    for a, b in zip(seen, wanted, strict=True):
        assert a.keys() == b.keys() and a['i'] == b['i']
        assert all(
            float(a[k]) == pytest.approx(float(b[k]), rel=1e-6) for k in ('sigma', 'sigma_hat')
        )
        for k in ('x', 'denoised'):
            close(a[k], b[k], 10 * tol)


def agree(name, D, x, sigmas, cond=None, other=None, tol=1e-5, **options):
    "Our sampler on `D` and k-diffusion's on `other`, or on `D`"
    same_walk(
        walk(karras, name, D, x, sigmas, cond, **options),
        walk(kd.sampling, name, other or D, x, sigmas, cond, **options),
        tol,
    )


# the same x

SCHEDULES = {f'n={n}': karras.get_sigmas_karras(n, 0.03, 14.6) for n in (3, 5, 12)} | {
    'no 0': karras.get_sigmas_karras(6, 0.03, 14.6, concat_zero=False)
}


@samplers(CASES + PARTLY)
@each('sigmas', SCHEDULES)
def test_mixture(name, options, sigmas):
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        x, shift = normal(3, 1, 8, 8) * sigmas[0], torch.tensor([0.0, 0.5, -1.0])
        agree(
            name,
            Mixture().to(dtype),
            x.to(dtype),
            sigmas.to(dtype),
            dict(shift=shift.to(dtype)),
            tol=tol,
            **options,
        )


# from one noise level to another

KEYS = {'i', 'x', 'denoised', 'sigma', 'sigma_hat'}
COUNTS = {'error', 'h', 'steps', 'nfe', 'n_accept', 'n_reject'}


def both_ways(name, *args, dtype=torch.float64, **options):
    "Ours and k-diffusion's: what they return, and what their callbacks saw."
    x, shift = (normal(3, 1, 8, 8) * 14.6).to(dtype), torch.tensor([0.0, 0.5, -1.0], dtype=dtype)
    results = []
    torch.set_default_dtype(dtype)  # its noise levels have the default type
    try:
        for module in (karras, kd.sampling):
            f, seen = getattr(module, f'sample_{name}'), []
            kw = dict(callback=seen.append, disable=True, noise_sampler=noise(x), **options)
            D, levels = Mixture().to(dtype), (0.03, 14.6)
            results.append((f(D, x, *levels, *args, extra_args=dict(shift=shift), **kw), seen))
    finally:
        torch.set_default_dtype(torch.float32)
    return results


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 6, 11, 12, 13])
@pytest.mark.parametrize('options', [{}, dict(eta=0.6, s_noise=1.1), dict(eta=1.0)], ids=case)
def test_dpm_fast(n, options):
    (x, seen), (want, wanted) = both_ways('dpm_fast', n, **options)
    close(x, want, 1e-11)
    assert len(seen) == len(wanted) == n // 3 + 1
    for a, b in zip(seen, wanted, strict=True):
        assert a.keys() == KEYS
        assert float(a['sigma_hat']) == pytest.approx(float(b['sigma_hat']), rel=1e-9)
        close(a['x'], b['x'], 1e-10)
        close(a['denoised'], b['denoised'], 1e-10)


ADAPTIVE = [
    {},
    dict(order=2),
    dict(order=2, rtol=0.01, h_init=0.5, accept_safety=0.95),
    dict(rtol=1e-3, atol=1e-3),
    dict(pcoeff=0.2, icoeff=0.5, dcoeff=0.1),
    dict(eta=1.0),
    dict(order=2, eta=0.6, s_noise=1.1),
    dict(h_init=3.0),
]


@pytest.mark.parametrize('options', ADAPTIVE, ids=case)
def test_dpm_adaptive(options):
    ((x, info), seen), ((want, theirs), wanted) = both_ways(
        'dpm_adaptive', return_info=True, **options
    )
    close(x, want, 1e-6)  # the noise to the last level: a root of its rounding error
    counts = ['steps', 'n_accept', 'n_reject']
    assert [info[k] for k in counts] == [theirs[k] for k in counts]
    assert info['nfe'] == theirs['nfe'] - theirs['n_reject']
    assert len(seen) == len(wanted) == info['steps']
    for a, b in zip(seen, wanted, strict=True):
        assert a.keys() == KEYS | COUNTS
        assert [a[k] for k in ('i', *counts)] == [b[k] for k in ('i', *counts)]
        for k in ('sigma', 'sigma_hat', 'error', 'h'):
            assert float(a[k]) == pytest.approx(float(b[k]), rel=1e-5)
        close(a['x'], b['x'], 1e-6)
        close(a['denoised'], b['denoised'], 1e-6)


def test_some_adaptive_steps_are_rejected():
    "Else the cases above would not show what a rejection does."
    infos = [both_ways('dpm_adaptive', return_info=True, **o)[0][0][1] for o in ADAPTIVE]
    assert sum(o['n_reject'] > 0 for o in infos) >= 3


@pytest.mark.parametrize('name,args', [('dpm_fast', (12,)), ('dpm_adaptive', ())])
def test_between_two_levels_in_float32(name, args):
    (x, _), (want, _) = both_ways(name, *args, dtype=torch.float32)
    close(x, want, 1e-4)


@pytest.fixture(scope='module')
def fashion():
    "The network of fashion-sd, what it is conditioned on, and x"
    from diffusers import StableDiffusionPipeline

    from cf_guidance.lab.fashion import fashion_path

    pipe = StableDiffusionPipeline.from_pretrained(fashion_path())
    prompts = ['a red sneaker on a blue background', 'a green bag on a white background', '']
    emb = pipe.encode_prompt(prompts, 'cpu', 1, False)[0].detach()
    return (
        pipe.unet,
        dict(encoder_hidden_states=emb[:2]),
        dict(encoder_hidden_states=emb[2:]),
        normal(2, 4, 8, 8) * 14.6,
    )


@samplers(CASES)
def test_fashion(name, options, fashion):
    net, cond, _, x = fashion
    D = DiscreteDenoiser(net, quantize=False)
    agree(name, D, x, D.get_sigmas_karras(7), cond, **options)


# any of its samplers on any of our denoisers, and the other way round


def net(x, t, shift):
    "A network that looks at all it is given"
    return (x + (t.log1p().cos() + shift).view(-1, 1, 1, 1)).tanh() + 0.1 * x


ABAR = scaled_linear()
OURS = {
    'eps': DiscreteDenoiser(net),
    'eps between steps': DiscreteDenoiser(net, quantize=False),
    'v': DiscreteDenoiser(net, prediction='v', quantize=False),
    'cosine': CosineDenoiser(net),
    'cosine v': CosineDenoiser(net, 'v'),
    'flow': FlowDenoiser(net, scale=1000.0),
    'edm': EDMDenoiser(net),
    'x0': NetDenoiser(net, 'x0', 0.03, 14.6),
    'wrapped': Denoiser(Mixture()),
    'guided': GuidedDenoiser(CosineDenoiser(net), dict(shift=torch.zeros(1)), w=3.0),
}
THEIRS = {
    'eps': kd.external.DiscreteEpsDDPMDenoiser(net, ABAR, True).float(),
    'eps between steps': kd.external.DiscreteEpsDDPMDenoiser(net, ABAR, False).float(),
    'v': kd.external.DiscreteVDDPMDenoiser(net, ABAR, False).float(),
    'cosine v': kd.external.VDenoiser(net),
}
X, SHIFT = normal(3, 1, 8, 8, seed=3), torch.tensor([0.0, 0.5, -1.0])


@samplers(FEW)
@each('D', OURS)
def test_its_samplers_on_ours(name, options, D):
    agree(name, D, X * 10, karras.get_sigmas_karras(6, 0.05, 10.0), dict(shift=SHIFT), **options)


@samplers(FEW)
@each('kind', {k: k for k in THEIRS})
def test_our_samplers_on_its(name, options, kind):
    args = name, THEIRS[kind], X * 10, karras.get_sigmas_karras(6, 0.05, 10.0), dict(shift=SHIFT)
    agree(*args, **options)
    same_walk(walk(karras, *args, **options), walk(karras, name, OURS[kind], *args[2:], **options))


@pytest.mark.parametrize('name', ['heun', 'dpmpp_2m'])
def test_guided_fashion(name, fashion):
    "Guidance as one writes it for k-diffusion, around its own denoiser"
    net, cond, neg, x = fashion
    D, theirs = (
        f(net, ABAR, quantize=True) for f in (DiscreteDenoiser, kd.external.DiscreteEpsDDPMDenoiser)
    )
    theirs.float().get_eps = lambda *a, **c: net(*a, **c).sample

    def guided(x, sigma, encoder_hidden_states):
        u, c = theirs(
            torch.cat([x] * 2),
            torch.cat([sigma] * 2),
            encoder_hidden_states=torch.cat(
                [
                    neg['encoder_hidden_states'].expand_as(encoder_hidden_states),
                    encoder_hidden_states,
                ]
            ),
        ).chunk(2)
        return u + (c - u) * 4.0

    agree(name, GuidedDenoiser(D, neg, w=4.0), x, D.get_sigmas_karras(6), cond, guided)


# guided, in its loops: what remembers begins anew with each run

REMEMBERING = {
    'stop': dict(stop=0.999, w=4.0),
    'momentum': dict(rule=apg.of(beta=-0.5)),
    'interval': dict(interval=(0.5, 5.0)),
    'weights': dict(w=[5.0 - i / 3 for i in range(12)]),
}


IN_ITS_LOOP = pytest.mark.parametrize('name', ['euler', 'heun', 'dpm_2', 'dpmpp_2m'])


def remembering(settings):
    "A guided mixture, noise levels, and what to call a sampler with"
    sigmas = karras.get_sigmas_karras(12, 0.05, 10.0)
    kw = dict(sigmas=sigmas) if isinstance(settings.get('w'), list) else {}
    term = Term(dict(shift=torch.zeros(1)), **{'w': 2.0, **settings})
    return GuidedDenoiser(Mixture(), term, **kw), X * 10, sigmas, dict(shift=SHIFT)


@IN_ITS_LOOP
@each('settings', REMEMBERING)
def test_a_second_run_equals_the_first(name, settings):
    args = remembering(settings)
    first, second = (walk(kd.sampling, name, *args) for _ in range(2))
    assert torch.equal(first[1], second[1])
    assert apart(first, walk(kd.sampling, name, Mixture(), *args[1:])) > 1e-3


@IN_ITS_LOOP
@each('settings', REMEMBERING)
def test_a_run_in_its_loop_equals_ours(name, settings):
    if name == 'heun' and isinstance(settings.get('w'), list):
        pytest.skip('our loop names the step, and both evaluations of a step have one weight')
    agree(name, *remembering(settings), tol=1e-4)


# the same denoisers, the same noise schedules


@each('kind', {k: k for k in THEIRS})
def test_denoisers(kind):
    ours, theirs = OURS[kind], THEIRS[kind]
    for sigma in (torch.tensor([0.03, 1.0, 14.0]), torch.tensor([0.2, 5.0, 0.0301])):
        x = X + normal(*X.shape, seed=4) * sigma.view(-1, 1, 1, 1)
        close(ours(x, sigma, shift=SHIFT), theirs(x, sigma, shift=SHIFT))
        close(*(D.loss(X, normal(*X.shape, seed=4), sigma, shift=SHIFT) for D in (ours, theirs)))


@each('quantize', dict(quantized=True, between=False))
def test_discrete_times(quantize):
    D, theirs = (
        f(net, ABAR, quantize=quantize)
        for f in (DiscreteDenoiser, kd.external.DiscreteEpsDDPMDenoiser)
    )
    theirs.float()
    close(D.sigmas, theirs.sigmas, 1e-6)
    assert (D.sigma_min, D.sigma_max) == pytest.approx(
        (theirs.sigma_min.item(), theirs.sigma_max.item()), rel=1e-6
    )
    sigma = torch.cat([D.sigmas, torch.tensor([0.0, 0.001, 20.0, 100.0]), (normal(1000) * 2).exp()])
    for q in (None, True, False):
        t, want = D.sigma_to_t(sigma, q), theirs.sigma_to_t(sigma, q)
        if t.dtype == torch.int64:
            assert t.dtype == want.dtype and torch.equal(t, want)
        else:
            close(t, want, 1e-6)
    t = torch.cat([torch.arange(1000.0), torch.rand(1000, generator=seeded(0)) * 999])
    assert torch.allclose(D.t_to_sigma(t), theirs.t_to_sigma(t), rtol=2e-6, atol=0)
    some = sigma[sigma > 0]
    if quantize:
        assert torch.allclose(
            D.quantize_sigma(some), theirs.t_to_sigma(theirs.sigma_to_t(some)), rtol=1e-6, atol=0
        )
    for n in (1, 8, 50, 1000):
        want = theirs.get_sigmas(n)
        if quantize:
            want[:-1] = theirs.t_to_sigma(theirs.sigma_to_t(want[:-1]))
        assert torch.allclose(D.get_sigmas(n), want, rtol=3e-6, atol=0)


@each(
    'schedule',
    dict(
        karras=('karras', 0.03, 14.6),
        rho=('karras', 0.002, 80.0, 5.0),
        exponential=('exponential', 0.03, 14.6),
        polyexponential=('polyexponential', 0.03, 14.6, 2.0),
        vp=('vp',),
        vp_more=('vp', 15.0, 0.2, 1e-4),
    ),
)
def test_schedules(schedule):
    kind, *args = schedule
    for n in (1, 2, 7, 50):
        got = getattr(karras, f'get_sigmas_{kind}')(n, *args)
        torch.set_default_dtype(torch.float64)
        try:
            want = getattr(kd.sampling, f'get_sigmas_{kind}')(n, *args)
        finally:
            torch.set_default_dtype(torch.float32)
        assert got.dtype == torch.float32 and torch.allclose(got.double(), want, rtol=1e-6, atol=0)


def test_ancestral_step():
    sigmas = torch.tensor([14.6, 3.0, 0.5, 0.03, 0.0], dtype=torch.float64)
    for eta in (0.0, 0.5, 1.0, 2.0):
        for a, b in pairwise(sigmas):
            assert karras.get_ancestral_step(a.item(), b.item(), eta) == pytest.approx(
                [float(o) for o in kd.sampling.get_ancestral_step(a, b, eta)], rel=1e-9
            )


def test_brownian_tree():
    "The same paths from the same seeds"
    sigmas, gs = karras.get_sigmas_karras(6, 0.03, 14.6), [seeded(i) for i in range(2)]
    theirs = kd.sampling.BrownianTreeNoiseSampler(
        X[:2],
        0.03 * (1 - 1e-4),
        14.6 * (1 + 1e-4),
        [torch.randint(2**62, (), generator=seeded(i)).item() for i in range(2)],
    )
    ours = karras.brownian_noise(X[:2], sigmas, gs, tree=True)
    for a, b in pairwise(sigmas[:-1]):
        close(ours(a, b), theirs(a, b), 1e-4)


# churn

CHURN = ['euler', 'heun', 'dpm_2']


@pytest.fixture
def churned(monkeypatch):
    "Our walk and k-diffusion's, which draw the same noise"

    def _churned(name, D, sigmas, other=None, dtype=torch.float32, **options):
        def gens():
            return [seeded(i) for i in range(len(X))]

        gs = karras._run_generators(X, gens())
        monkeypatch.setattr(
            kd.sampling,
            'torch',
            SimpleNamespace(randn_like=lambda x: karras.randn(x.shape, gs, x.device, x.dtype)),
        )
        args = (X * sigmas[0]).to(dtype), sigmas.to(dtype), dict(shift=SHIFT.to(dtype))
        return walk(karras, name, D, *args, generator=gens(), **options), walk(
            kd.sampling, name, other or D, *args, **options
        )

    return _churned


@pytest.mark.parametrize('name', CHURN)
@each(
    'options',
    dict(
        some=dict(s_churn=1.0),
        most=dict(s_churn=40.0),
        louder=dict(s_churn=2.0, s_noise=1.1),
        early=dict(s_churn=4.0, s_tmin=2.0),
    ),
)
def test_churn(name, options, churned):
    D, sigmas = Mixture().double(), karras.get_sigmas_karras(6, 0.05, 10.0)
    ours, theirs = churned(name, D, sigmas, dtype=torch.float64, **options)
    same_walk(ours, theirs, 1e-11)
    assert apart(ours, churned(name, D, sigmas, dtype=torch.float64)[0]) > 0.01


def apart(a, b):
    return ((a[1] - b[1]).abs().max() / b[1].abs().max()).item()


def hats(walk):
    return torch.tensor([float(o['sigma_hat']) for o in walk[0]])


@pytest.mark.parametrize('name', CHURN)
def test_quantized_at_ingress(name, churned):
    """k-diffusion's `quantize=True` rounds what the network is told, ours before x gets its noise.

    Not the same x, unless there is nothing to round.
    """
    D, other = OURS['eps'], THEIRS['eps']
    sigmas = D.get_sigmas_karras(6)
    same_walk(*churned(name, D, sigmas, other))
    ours, theirs = churned(name, D, sigmas, other, s_churn=2.0)
    same_walk(theirs, churned(name, D, sigmas, s_churn=2.0)[1])
    assert apart(ours, theirs) > 1e-3
    assert (
        torch.equal(hats(ours), D.quantize_sigma(hats(ours)))
        and (hats(theirs) / D.quantize_sigma(hats(theirs)) - 1).abs().max() > 1e-3
    )


@pytest.mark.parametrize('name', CHURN)
def test_churn_to_a_level(name, churned):
    "Rounding is all the difference: none if the churned level is one of the network's"
    D, other = OURS['eps'], THEIRS['eps']
    sigmas = torch.stack([D.sigmas[400], D.sigmas[100], torch.zeros(())])
    s_churn = 2 * ((D.sigmas[440] / D.sigmas[400]).item() - 1)
    ours, theirs = churned(name, D, sigmas, other, s_churn=s_churn, s_tmin=sigmas[0].item())
    assert hats(ours)[0] == D.sigmas[440]
    same_walk(ours, theirs)
