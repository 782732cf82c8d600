"Noise schedules, steps and the loop: special cases, what a run is told, and bad input."

import inspect
import math
import pickle
import sys
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cf_guidance import karras
from cf_guidance.denoisers import Denoiser, DiscreteDenoiser, NetDenoiser, Parts
from cf_guidance.karras import (
    SigmaSchedule,
    State,
    _feedback_range,
    _feedback_settings,
    ancestral,
    brownian_noise,
    churned,
    ddim_step,
    ddpm_step,
    deis,
    dpm2,
    dpm2_ancestral,
    dpm_adaptive,
    dpm_fast,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
    er_sde,
    euler,
    euler_ancestral,
    euler_cfg_pp,
    fbg,
    get_ancestral_step,
    get_premature_sigma_min,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    gradient_estimation,
    heun,
    heun_ancestral,
    ipndm,
    lms,
    make_quantizer,
    on_sigmas,
    rectified_cfg_pp,
    res_multistep,
    restart,
    sa_solver,
    sample,
    samples,
    unipc,
)
from cf_guidance.noise import randn
from cf_guidance.toy import GaussianMixture

nan, inf = float('nan'), math.inf
S = 0.5


def each(name, values):
    return pytest.mark.parametrize(name, values)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def exact(x, sigma, mean=0.0):
    "The best estimate for Gaussian data with standard deviation S"
    return mean + (x - mean) * (S**2 / (S**2 + sigma**2)).view(-1, *(1,) * (x.ndim - 1))


def net(x, t):
    "The best eps at the levels of Stable Diffusion"
    sigma = SD.sigmas[t].view(-1, 1, 1, 1)
    return x * sigma * (1 + sigma**2) ** 0.5 / (S**2 + sigma**2)


SD, Q, D = DiscreteDenoiser(None), DiscreteDenoiser(net), Denoiser(exact)
SIGMAS = get_sigmas_karras(20, 0.03, 14.6)
X = randn((4, 3, 8, 8), 0) * 14.6
END = X * S / (S**2 + 14.6**2) ** 0.5
MEAN = torch.full((4, 1, 1, 1), 2.0)


# noise schedules

THREE = get_sigmas_karras, get_sigmas_exponential, get_sigmas_polyexponential


def test_exponential_has_equal_ratios():
    got = get_sigmas_exponential(3, 0.01, 1.0, concat_zero=False)
    assert_close(got, torch.tensor([1.0, 0.1, 0.01]))


def test_karras_formula():
    def middle(i):
        return (14 ** (1 / 7) + i / 4 * (0.03 ** (1 / 7) - 14 ** (1 / 7))) ** 7

    want = torch.tensor([14.0, middle(1), middle(2), middle(3), 0.03, 0])
    assert_close(get_sigmas_karras(5, 0.03, 14.0), want)


def test_karras_with_large_rho_is_exponential():
    a, b = get_sigmas_karras(9, 0.1, 10.0, rho=1e6), get_sigmas_exponential(9, 0.1, 10.0)
    assert_close(a, b, rtol=1e-4, atol=0)


def test_polyexponential_formula():
    want = torch.tensor([math.e**4, math.e, 1.0, 0.0])
    assert_close(get_sigmas_polyexponential(3, 1.0, math.e**4, 2.0), want)


PUBLISHED = {1: 66.9309, 2: 55.7362, 12: 6.4637, 13: 4.9991, 14: 3.8287, 16: 2.1739, 17: 1.6086}
PUBLISHED |= {19: 0.8446, 22: 0.2830, 31: 0.0020}


@each('i', PUBLISHED)
def test_published_bounds_of_guidance_intervals(i):
    "arXiv:2404.07724"
    assert round(get_sigmas_karras(32, 0.002, 80)[i].item(), 4) == PUBLISHED[i]


def test_vp_begins_at_its_largest():
    want = math.expm1(19.9 / 2 + 0.1) ** 0.5
    assert get_sigmas_vp(10)[0].item() == pytest.approx(want, abs=1e-3)


def test_vp_decreases_to_zero():
    sigmas = get_sigmas_vp(10)
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0


@each('f', THREE)
def test_one_level(f):
    assert f(1, 0.1, 10.0).tolist() == [10.0, 0.0]


@each('f', THREE)
def test_without_zero(f):
    assert f(4, 0.1, 10.0, concat_zero=False).shape == (4,)


@each('f', THREE)
def test_ends_as_tensors(f):
    assert torch.equal(f(4, torch.tensor(0.1), torch.tensor(10.0)), f(4, 0.1, 10.0))


# those of a model


def test_even_in_time():
    steps = torch.linspace(999, 0, 10).round().long()
    assert torch.equal(SD.get_sigmas(10)[:-1], SD.sigmas[steps])


def test_all_levels():
    want = torch.cat([SD.sigmas.flip(0), torch.zeros(1)])
    assert torch.equal(SD.get_sigmas(1000), want)
    assert torch.equal(SD.get_sigmas(), want)


def test_equal_levels_are_one():
    assert len(SD.get_sigmas_karras(50)) == 50
    assert (SD.get_sigmas_karras(1000).diff() < 0).all()


def test_free_model_takes_every_level():
    got = DiscreteDenoiser(None, quantize=False).get_sigmas_karras(50)
    assert_close(got, get_sigmas_karras(50, SD.sigma_min, SD.sigma_max))


def test_time_of_its_own_is_sigma():
    got = NetDenoiser(None, sigma_min=1, sigma_max=5).get_sigmas(5)
    assert_close(got, torch.tensor([5.0, 4, 3, 2, 1, 0]))


def test_own_minimum():
    got = SD.get_sigmas_karras(7, sigma_min=0.1072)[-2]
    assert got == SD.quantize_sigma(torch.tensor(0.1072))


# one value per step

W = on_sigmas([7.0, 5.0, 1.0], [16.0, 4.0, 1.0, 0.0])


def test_nearest_in_the_logarithm():
    got = W(torch.tensor([20.0, 16.0, 8.0, 7.9, 4.0, 2.0, 1.9, 0.01]))
    assert got.tolist() == [7.0, 7.0, 7.0, 5.0, 5.0, 5.0, 1.0, 1.0]


@each('kind', [torch.float32, torch.float64])
@each('dtype', [torch.float32, torch.float64])
def test_each_level_has_its_value(kind, dtype):
    sigmas = torch.linspace(10, 0, 21, dtype=kind) ** 1.3
    got = on_sigmas(torch.arange(20.0), sigmas)(sigmas[:-1].to(dtype))
    assert torch.equal(got, torch.arange(20.0, dtype=dtype))


def test_one_value_per_sample():
    w = on_sigmas([[7.0, 1.0], [5.0, 2.0]], [4.0, 1.0, 0.0])
    assert w(torch.tensor([4.0, 1.0])).tolist() == [7.0, 2.0]
    assert w.at_step(1).tolist() == [5.0, 2.0]


def test_one_step():
    assert on_sigmas([3.0], [1.0, 0.0])(torch.tensor([2.0, 0.5])).tolist() == [3.0, 3.0]


def test_at_step():
    assert [W.at_step(i).item() for i in range(3)] == [7.0, 5.0, 1.0]


def test_schedule_knows_its_sigmas():
    assert W.sigmas == (16.0, 4.0, 1.0, 0.0)
    assert W.values.tolist() == [7.0, 5.0, 1.0]


def test_schedule_takes_a_number():
    assert W(16.0).item() == 7.0


def test_schedule_is_frozen():
    with pytest.raises(AttributeError):
        W.values = None


def test_schedule_pickles():
    again = pickle.loads(pickle.dumps(W))
    assert isinstance(again, SigmaSchedule)
    assert again.at_step(1) == 5.0


# what a run tells the denoiser


class Told:
    "Notes how it is called"

    takes_step = True

    def __init__(self):
        self.calls, self.started = [], []

    def start(self, sigmas=None):
        self.started.append(sigmas)

    def __call__(self, x, sigma, step=None):
        self.calls.append(step)
        return exact(x, sigma)

    def parts(self, x, sigma, step=None):
        return Parts(*[self(x, sigma, step)] * 3)


STEPS = {
    euler: [0, 1, 2],
    heun: [0, 0, 1, 1, 2],
    dpm2: [0, 0, 1, 1, 2],
    dpmpp_2m: [0, 1, 2],
    dpmpp_sde: [0, 0, 1, 1, 2],
    euler_cfg_pp: [0, 1, 2],
    rectified_cfg_pp: [0, 0, 1, 1, 2, 2],
    fbg: [0, 1, 2],
}


@pytest.mark.parametrize('step,want', STEPS.items(), ids=lambda o: getattr(o, '__name__', ''))
@each('wrap', [lambda D: D, Denoiser, lambda D: Denoiser(Denoiser(D))])
def test_step_is_told(step, want, wrap):
    D = Told()
    sample(wrap(D), X, [4.0, 2.0, 1.0, 0.0], step)
    assert D.calls == want


@each('wrap', [lambda D: D, Denoiser])
def test_start_gets_the_sigmas_once(wrap):
    D, sigmas = Told(), [4.0, 2.0, 1.0, 0.0]
    sample(wrap(D), X, sigmas)
    assert D.started == [sigmas]


def test_shells_start_a_run():
    D = Told()
    karras.sample_euler(D, X, SIGMAS, disable=True)
    assert len(D.started) == 1
    assert D.calls == list(range(20))


def test_no_step_for_others():
    seen = []
    sample(lambda x, sigma, **kw: seen.append(kw) or exact(x, sigma), X, [4.0, 0.0])
    assert seen == [{}]


def test_errors_of_start_come_through():
    class Refuses(Denoiser):
        def start(self, sigmas):
            raise ValueError(f'{len(sigmas)} levels')

    with pytest.raises(ValueError, match='21 levels'):
        sample(Refuses(exact), X, SIGMAS)


# the loop


def off(got, want):
    return ((got - want).norm() / want.norm()).item()


@each('step', [heun, dpm2, dpmpp_2s, dpmpp_2m])
def test_second_order_is_near(step):
    assert off(sample(D, X, SIGMAS, step), END) < 0.02


def test_euler_is_farther():
    assert 0.02 < off(sample(D, X, SIGMAS, euler), END) < 0.1


def test_ddim_is_euler():
    assert torch.equal(sample(D, X, SIGMAS, ddim_step), sample(D, X, SIGMAS, euler))


def test_the_condition_reaches_the_model():
    got = sample(D, X + 2, SIGMAS, heun, dict(mean=MEAN))
    assert_close(got, sample(D, X, SIGMAS) + 2, atol=1e-4, rtol=1e-4)


def test_one_yield_per_step():
    assert len(list(samples(D, X, SIGMAS))) == 20


def test_first_estimate():
    _, x0 = next(samples(D, X, SIGMAS, euler))
    assert_close(x0, exact(X, torch.full((4,), 14.6)))


@each('dtype,tol', [(torch.float64, 1e-5), (torch.float16, 5e-3)])
def test_types(dtype, tol):
    got = sample(D, X.to(dtype), SIGMAS)
    assert got.dtype == dtype
    assert_close(got.float(), sample(D, X, SIGMAS), atol=tol, rtol=tol)


@each('step', [euler, heun, dpm2, lms, dpmpp_2m, dpmpp_3m_sde])
def test_x_is_left_alone(step):
    x = X.clone()
    sample(D, x, SIGMAS, step)
    assert torch.equal(x, X)


def test_no_gradients():
    conv = torch.nn.Conv2d(3, 3, 1)
    assert not sample(lambda x, sigma: conv(x), X, SIGMAS).requires_grad


def test_an_empty_batch():
    assert sample(D, X[:0], SIGMAS, dpmpp_sde).shape == (0, 3, 8, 8)


def test_a_step_of_ones_own():
    def halve(D, x, sigma, sigma_next, state, share=0.5):
        state = state.evaluate(D, x, sigma)
        return x * share, state

    assert torch.equal(sample(D, X, [2.0, 1.0], halve, share=0.25), X / 4)


def test_progress_bar(capsys):
    sample(D, X, [2.0, 1.0], progress=True)
    assert '1/1' in capsys.readouterr().err


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tqdm.auto', None)
    assert torch.equal(karras.sample_euler(D, X, SIGMAS), sample(D, X, SIGMAS, euler))


def test_a_bar_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tqdm.auto', None)
    with pytest.raises(ImportError, match='progress bar needs tqdm'):
        sample(D, X, SIGMAS, progress=True)


# steps


@each(
    'step,other',
    [
        (lms, euler),
        (dpmpp_2m_sde, dpmpp_2m),
        (euler_ancestral, euler),
        (heun_ancestral, heun),
        (dpm2_ancestral, dpm2),
        (dpmpp_2s_ancestral, dpmpp_2s),
    ],
)
def test_the_same_without_its_own(step, other):
    options = dict(order=1) if step is lms else dict(eta=0.0)
    a, b = sample(D, X, SIGMAS, step, **options), sample(D, X, SIGMAS, other)
    assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_ddpm_is_ancestral_euler():
    a, b = (sample(D, X, SIGMAS, f, generator=seeded(3)) for f in (ddpm_step, euler_ancestral))
    assert torch.equal(a, b)


@each('power', range(4))
def test_lms_integrates_cubics_exactly(power):
    levels = [3.0, 2.5, 1.7, 1.2]
    coefficients = karras._lms_coefficients(levels, 1.2, 0.4)
    got = sum(c * o**power for c, o in zip(coefficients, levels, strict=True))
    assert got == pytest.approx((0.4 ** (power + 1) - 1.2 ** (power + 1)) / (power + 1), abs=1e-12)


LONG, MANY = get_sigmas_karras(80, 0.01, 14.6), randn((64, 3, 8, 8), 1, dtype=torch.float64) * 14.6


@pytest.fixture(scope='module')
def long_error():
    end = MANY * S / (S**2 + 14.6**2) ** 0.5

    def error(step, **options):
        return off(sample(D, MANY, LONG, step, generator=seeded(2), **options), end)

    return error


def test_third_order(long_error):
    assert long_error(dpmpp_3m_sde, eta=0.0) < long_error(dpmpp_2m) / 2


def test_sde_without_noise(long_error):
    assert long_error(dpmpp_sde, eta=0.0) < long_error(dpmpp_2m)


def test_heun_form_of_the_sde(long_error):
    assert long_error(dpmpp_2m_sde, eta=0.0, solver_type='heun') < 2 * long_error(dpmpp_2m)


SPREAD = {
    ddpm_step: 0.08,
    euler_ancestral: 0.08,
    heun_ancestral: 0.03,
    dpm2_ancestral: 0.03,
    dpmpp_2s_ancestral: 0.03,
    dpmpp_sde: 0.03,
    dpmpp_2m_sde: 0.03,
    dpmpp_3m_sde: 0.03,
    er_sde: 0.03,
    sa_solver: 0.03,
    restart: 0.03,
    dpm_fast: 0.03,
}


@each('step', SPREAD)
def test_spread_of_the_data(step):
    got = sample(D, MANY, LONG, step, generator=seeded(2)).std() / S
    assert abs(got - 1) < SPREAD[step]


class Counter(Denoiser):
    n = 0

    def forward(self, x, sigma, **cond):
        self.n += 1
        return self.inner_model(x, sigma, **cond)


ONE = euler, lms, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, ddim_step, ddpm_step, euler_ancestral
ONE += er_sde, deis, ipndm, gradient_estimation, res_multistep, unipc, sa_solver
TWO = heun, dpm2, dpmpp_2s, dpmpp_sde, heun_ancestral, dpm2_ancestral, dpmpp_2s_ancestral


@each('step', ONE + TWO)
def test_evaluations(step):
    C = Counter(exact)
    sample(C, X, get_sigmas_karras(10, 0.03, 14.6), step)
    assert C.n == (10 if step in ONE else 19)


# multistep methods

ORDERS = [
    *((deis, 2), (deis, 3), (ipndm, 2), (ipndm, 4), (unipc, 1), (unipc, 2), (unipc, 3)),
    *((res_multistep, None), (gradient_estimation, None)),
]
HIGHER = [
    (sa_solver, dict(tau=0.0, order=1, corrector=0), 1),
    (sa_solver, dict(tau=0.0), 2),
    (sa_solver, dict(tau=0.0, corrector=0), 2),
    (sa_solver, dict(tau=0.0, order=3, corrector=3), 2),
    (dpm_fast, {}, 2),
    (restart, dict(restart_times=0), 2),
]


def gaussian_error(step, n, **options):
    "Error at the end for Gaussian data, whose exact path is known."
    sigmas = torch.linspace(math.log(10), math.log(0.1), n + 1, dtype=torch.float64).exp()
    x = torch.full((1, 1), 10.0, dtype=torch.float64)
    x = sample(lambda x, sigma: x * S**2 / (S**2 + sigma[0] ** 2), x, sigmas, step, **options)
    return abs(x.item() - 10 * ((S**2 + 0.01) / (S**2 + 100)) ** 0.5)


@each('step,order', ORDERS)
def test_order_of_convergence(step, order):
    options = {} if order is None else dict(order=order)
    coarse, fine = (gaussian_error(step, n, **options) for n in (160, 320))
    want = 1 if step is gradient_estimation else 2
    assert math.log2(coarse / fine) == pytest.approx(want, abs=0.1)


@each('step,options,order', HIGHER)
def test_order_of_convergence_of_more_samplers(step, options, order):
    coarse, fine = (gaussian_error(step, n, **options) for n in (160, 320))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_dpm_fast_that_ends_with_two_evaluations_has_order_3():
    coarse, fine = (gaussian_error(dpm_fast, n, nfe=3 * n - 1) for n in (80, 160))
    assert math.log2(coarse / fine) == pytest.approx(3, abs=0.1)


@each('order', [2, 3])
def test_the_error_of_dpm_adaptive_falls_with_its_tolerance(order):
    def error(tolerance):
        def D(x, sigma):
            return x * S**2 / (S**2 + sigma[0].double() ** 2)

        start = torch.full((1, 1), 10.0, dtype=torch.float64)
        options = dict(order=order, rtol=tolerance, atol=tolerance)
        x = sample(D, start, [10.0, 0.1], dpm_adaptive, **options)
        return abs(x.item() - 10 * ((S**2 + 0.01) / (S**2 + 100)) ** 0.5)

    errors = [error(o) for o in (1e-3, 1e-4, 1e-5, 1e-6)]
    assert all(b < a / 3 for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-4


def test_what_more_slopes_and_a_correction_gain():
    simple = gaussian_error(dpmpp_2m, 80)
    assert gaussian_error(deis, 80) < simple / 20
    assert gaussian_error(unipc, 80) < simple / 2


def test_relatives_of_multistep_methods():
    def same(a, b):
        assert_close(sample(D, X, SIGMAS, *a[:1], **a[1]), sample(D, X, SIGMAS, *b[:1], **b[1]))

    for step in deis, ipndm:
        same((step, dict(order=1)), (euler, {}))
    same((gradient_estimation, dict(gamma=1)), (euler, {}))
    same((gradient_estimation, dict(gamma=1.5)), (ipndm, dict(order=2)))
    same((res_multistep, {}), (dpmpp_2m_sde, dict(eta=0.0, solver_type='heun')))


@each('order', [1, 2, 3])
def test_er_sde_without_noise(order, monkeypatch):
    monkeypatch.setattr(karras, '_er_scale', lambda sigma: sigma)
    coarse, fine = (gaussian_error(er_sde, n, order=order) for n in (160, 320))
    assert math.log2(coarse / fine) == pytest.approx(min(order, 2), abs=0.15)
    if order == 1:
        assert_close(sample(D, X, SIGMAS, er_sde, order=1), sample(D, X, SIGMAS, euler))


@each('order', [2, 3])
def test_er_sde_integrates_a_line_exactly(order):
    past = tuple((s, torch.tensor([[s]], dtype=torch.float64)) for s in (4.0, 5.0))
    x = torch.full((1, 1), 7.0, dtype=torch.float64)
    state = State(9, 2, lambda *o: torch.zeros_like(x), past=past)
    got, _ = er_sde(torch.full_like, x, 3.0, 2.0, state, order=order)
    s = torch.linspace(2.0, 3.0, 100001, dtype=torch.float64)
    scale = s * (torch.exp(s**0.3) + 10)
    # x' = scale'/scale x + scale' * integral of estimate d(1/scale)
    parts = (s[1:] + s[:-1]) / 2 * (1 / scale[:-1] - 1 / scale[1:])
    want = scale[0] / scale[-1] * 7 + scale[0] * parts.sum()
    assert got.item() == pytest.approx(want.item(), rel=1e-8)


def weighted_mean(k, h):
    "Mean of at^k for `at` from 0 to 1, weighted by exp((at - 1)*h), by partial integration."
    total, mean = -math.expm1(-h) / h, 1.0
    for i in range(1, k + 1):
        mean = (1 / total - i * mean) / h
    return mean


@each('h', [0.5, 1.0, 2.5, 6.0])
def test_moments_of_unipc_by_partial_integration(h):
    want = [weighted_mean(k, h) for k in (1, 2, 3)]
    assert karras._unipc_moments(3, h) == pytest.approx(want, abs=1e-12)


@each('h', [1e-12, 1e-7, 1e-4])
def test_weights_of_unipc_at_a_tiny_step_are_those_of_polynomials(h):
    want = torch.linalg.solve(double([[1, 1, 1], [-2, -1, 1], [4, 1, 1]]), double(THIRDS))
    assert karras._unipc_weights([-2, -1, 1], h) == pytest.approx(want.tolist(), abs=2 * h + 1e-12)


THIRDS = [1 / 2, 1 / 3, 1 / 4]


def double(o):
    return torch.tensor(o, dtype=torch.float64)


def test_unipc_with_tiny_steps_of_a_rough_network_goes_no_farther_than_its_slopes():
    sigmas = 5 - 1e-6 * torch.arange(7.0, dtype=torch.float64)
    start, rough = double([[5.0]]), iter([1.0, -1.0, 0.5, 0.0, -1.0, 1.0])
    end = sample(lambda x, s: torch.full_like(x, next(rough)), start, sigmas, unipc)
    slope = 6 / 5  # at most: the estimate is within 1 of 0
    assert abs(end - start).item() < 5 * slope * 6e-6


@each('order', [4, 9])
def test_er_sde_of_higher_order_is_refused(order):
    with pytest.raises(ValueError, match=f'order: .* 1 to 3 for er_sde, got {order}'):
        sample(D, X, SIGMAS, er_sde, order=order)


SOLVERS = [
    (unipc, UniPCMultistepScheduler, 1),
    (unipc, UniPCMultistepScheduler, 2),
    (unipc, UniPCMultistepScheduler, 3),
    (deis, DEISMultistepScheduler, 1),
    (deis, DEISMultistepScheduler, 2),
    (deis, DEISMultistepScheduler, 3),
]


@each('step,cls,order', SOLVERS)
def test_multistep_methods_of_diffusers(step, cls, order):
    def estimate(x, sigma):
        return torch.tanh(x / (0.3 + sigma.view(-1, 1) ** 2))

    sched = cls(solver_order=order, prediction_type='sample', beta_schedule='scaled_linear')
    sched.set_timesteps(16)
    sigmas = sched.sigmas.double()
    x = randn((5, 3), 0, dtype=torch.float64) * sigmas[0]
    z = x / (1 + sigmas[0] ** 2) ** 0.5
    for t, sigma in zip(sched.timesteps, sigmas, strict=False):
        x0 = estimate(z * (1 + sigma**2) ** 0.5, sigma)
        z = sched.step(x0, t, z).prev_sample
    z = z * (1 + sigmas[-1] ** 2) ** 0.5
    assert_close(sample(estimate, x, sigmas, step, order=order), z, atol=2e-5, rtol=2e-5)


@each('name', ['unipc', 'er_sde', 'deis', 'ipndm', 'lms'])
def test_docs_tell_the_range_of_an_order(name):
    (line,) = [o for o in shell_of(name).__doc__.split('\n') if o.startswith('order: ')]
    assert ('estimates' in line) == (name in ('unipc', 'er_sde'))
    assert line.endswith('1, 2 or 3' if name == 'er_sde' else 'up')


# SA-Solver


def diffusers_sa(order, corrector, tau, noise):
    "The end of diffusers' run and of ours, with the same noise at each step."

    def estimate(x, sigma):
        return torch.tanh(x / (0.3 + sigma.view(-1, 1) ** 2))

    options = dict(prediction_type='sample', beta_schedule='scaled_linear')
    sched = SASolverScheduler(
        predictor_order=order, corrector_order=corrector, tau_func=lambda t: tau, **options
    )
    sched.set_timesteps(16)
    sigmas = sched.sigmas = sched.sigmas.double()
    x = randn((5, 3), 0, dtype=torch.float64) * sigmas[0]
    z, draws = x / (1 + sigmas[0] ** 2) ** 0.5, iter(noise)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            'diffusers.schedulers.scheduling_sasolver.randn_tensor', lambda *a, **kw: next(draws)
        )
        for t, sigma in zip(sched.timesteps, sigmas, strict=False):
            x0 = estimate(z * (1 + sigma**2) ** 0.5, sigma)
            z = sched.step(x0, t, z).prev_sample
    draws, options = iter(noise), dict(tau=tau, order=order, corrector=corrector)
    ours = sample(estimate, x, sigmas, sa_solver, noise=lambda a, b: next(draws), **options)
    return ours, z * (1 + sigmas[-1] ** 2) ** 0.5


@each('tau', [0.0, 0.4, 1.0])
@each('order,corrector', [(1, 1), (1, 2), (2, 2), (3, 3), (3, 4), (4, 2)])
def test_sa_solver_of_diffusers(order, corrector, tau):
    noise = torch.randn(40, 5, 3, generator=seeded(1), dtype=torch.float64)
    ours, theirs = diffusers_sa(order, corrector, tau, noise)
    assert ours.isfinite().all()
    assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_sa_solver_without_noise_or_correction_is_euler():
    got = sample(D, X, SIGMAS, sa_solver, tau=0.0, order=1, corrector=0)
    assert_close(got, sample(D, X, SIGMAS, euler), atol=1e-5, rtol=1e-5)


def test_a_step_of_sa_solver_has_the_noise_of_dpmpp_sde():
    noise = randn(X.shape, 9)
    got, want = (
        sample(D, X, [4.0, 2.0], step, noise=lambda a, b: noise, **options)
        for step, options in ((sa_solver, dict(tau=0.5)), (dpmpp_2m_sde, dict(eta=0.25)))
    )
    assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_noise_of_sa_solver_only_where_it_was_asked_for():
    levels = []

    def noise(a, b):
        levels.append(a)
        return torch.zeros_like(X)

    sample(D, X, SIGMAS, sa_solver, noise=noise, s_tmin=0.5, s_tmax=5.0)
    want = [o for o in SIGMAS.tolist() if 0.5 <= o <= 5.0]
    assert levels == want


@each('tau', [0.3, 0.7, 1.0])
def test_one_step_of_sa_solver_by_the_exact_solution_of_its_equation(tau):
    "For a constant estimate the mean and the variance after a step are known."
    state = State(9, 0, lambda a, b: torch.ones(1, 1, dtype=torch.float64))
    x = torch.full((1, 1), 7.0, dtype=torch.float64)
    got, _ = sa_solver(lambda x, s: torch.full_like(x, 2.0), x, 3.0, 1.5, state, tau=tau)
    keep = 0.5 ** (1 + tau**2)
    noise = 1.5 * (1 - 0.5 ** (2 * tau**2)) ** 0.5
    assert got.item() == pytest.approx(2 + 5 * keep + noise, abs=1e-12)


# restart


def test_restart_goes_up_once_and_down_again():
    V, ups = Seen(exact), []

    def noise(a, b):
        ups.append((a, b))
        return torch.zeros_like(X)

    sigmas = [4.0, 1.0, 0.09, 0.05, 0.0]
    sample(V, X, sigmas, restart, noise=noise, restart_steps=2, restart_times=3)
    (level,) = {a for a, _ in ups}
    assert level == pytest.approx(0.09, rel=1e-6)
    assert [b for _, b in ups] == [2.0] * 3
    told = [o for _, o in V.seen]
    middle = get_sigmas_karras(3, 0.09, 2.0)[1].item()
    once = [2.0, middle, middle, 0.09]
    want = [4.0, 1.0, 1.0, 0.09, *once * 3, 0.09, 0.05, 0.05]
    assert told == pytest.approx(want, rel=1e-6)


@each('options', [dict(restart_times=0), dict(restart_times=2, restart_steps=4), {}])
def test_evaluations_of_restart(options):
    C = Counter(exact)
    sample(C, X, get_sigmas_karras(10, 0.03, 14.6), restart, **options)
    extra = 2 * options.get('restart_steps', 9) * options.get('restart_times', 1)
    assert C.n == 19 + extra


def test_a_restart_adds_the_noise_that_is_missing():
    seen, z = Seen(lambda x, sigma: torch.zeros_like(x)), randn(X.shape, 9)
    sample(seen, X, [4.0, 0.05, 0.0], restart, noise=lambda a, b: z, restart_steps=1)
    (x,) = [x for x, sigma in seen.seen if sigma == 2.0]
    assert_close(x, X * 0.05 / 4 + z * (4 - 0.05**2) ** 0.5, atol=1e-5, rtol=1e-5)


def test_restarts_without_an_interval_are_heun():
    got = sample(D, X, [4.0, 2.0, 0.0], restart, restart_times=0)
    assert torch.equal(got, sample(D, X, [4.0, 2.0, 0.0], heun))


def test_a_restart_rounds_to_levels_of_the_model():
    V, sigmas = Seen(Q), Q.get_sigmas_karras(7)
    sample(V, X, sigmas, restart, generator=seeded(0))
    assert all(o in SD.sigmas.tolist() for _, o in V.seen)


# DPM-Solver, fast and adaptive


@each('n', [1, 2, 3, 4, 7, 8, 9, 12])
def test_evaluations_of_dpm_fast(n):
    C = Counter(exact)
    karras.sample_dpm_fast(C, X, 0.03, 14.6, n, disable=True)
    assert C.n == n


def test_dpm_fast_to_zero_ends_with_two_and_one():
    C = Counter(exact)
    sample(C, X, get_sigmas_karras(10, 0.03, 14.6), dpm_fast)
    assert C.n == 27


@each('order', [2, 3])
def test_evaluations_of_dpm_adaptive(order):
    C, seen = Counter(exact), []
    options = dict(order=order, rtol=0.01, h_init=3.0, report=seen.append)
    sample(C, X, [14.6, 1.0, 0.03], dpm_adaptive, **options)
    starts = [i for i, o in enumerate(seen) if o['n_accept'] + o['n_reject'] == 1]
    ends = [seen[i - 1] for i in (*starts[1:], len(seen))]
    assert len(ends) == 2
    assert C.n == sum(o['nfe'] for o in ends)
    assert sum(o['n_reject'] for o in ends) > 0


def test_dpm_adaptive_of_one_interval_is_the_shell():
    got = sample(D, X, [14.6, 0.03], dpm_adaptive, rtol=0.01)
    assert torch.equal(got, karras.sample_dpm_adaptive(D, X, 0.03, 14.6, rtol=0.01, disable=True))


def test_dpm_adaptive_ends_in_a_step_of_euler():
    a, b = (sample(D, X, o, dpm_adaptive) for o in ([14.6, 0.03], [14.6, 0.03, 0.0]))
    assert_close(b, exact(a, torch.full((4,), 0.03)))


def test_dpm_adaptive_of_nothing():
    assert sample(D, X[:0], [14.6, 0.03], dpm_adaptive).shape == (0, 3, 8, 8)


def test_dpm_adaptive_of_zeros_needs_no_atol():
    got = sample(lambda x, s: x * 0, X * 0, [14.6, 0.03], dpm_adaptive, atol=0.0)
    assert torch.equal(got, X * 0)


def test_tolerances_that_cannot_be_met():
    rough = torch.Generator().manual_seed(0)
    D = Denoiser(lambda x, sigma: torch.randn(x.shape, generator=rough))
    with pytest.raises(FloatingPointError, match='rtol, atol: no step from sigma=14.6 is good'):
        sample(D, X, [14.6, 0.03], dpm_adaptive, rtol=0.0, atol=1e-12)


# DDIM and DDPM of diffusers


def scheduler(cls, t, t_next, **kw):
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
    sched = cls(clip_sample=False, prediction_type='sample', **betas, **kw)
    if cls is DDPMScheduler:
        sched.set_timesteps(timesteps=[t, t_next])
    else:
        sched.set_timesteps(1000 // (t - t_next))
    return sched


@pytest.fixture(params=[(900, 800), (500, 400), (150, 50)], ids=str)
def vp(request):
    "A step between two times: latents of variance 1, the estimate, noise, and our step's result"
    t, t_next = request.param
    z, x0 = torch.randn(2, 2, 3, 4, 4, generator=seeded(0), dtype=torch.float64)
    a, b = (SD.sigmas[o].double().item() for o in (t, t_next))

    def ours(step, noise, **options):
        x, state = z * (1 + a**2) ** 0.5, State(1, 0, lambda a, b: noise)
        return step(lambda x, s: x0, x, a, b, state, **options)[0] / (1 + b**2) ** 0.5

    return t, t_next, z, x0, ours


@each('eta', [0.0, 0.5, 1.0])
def test_ddim_of_diffusers(vp, eta):
    t, t_next, z, x0, ours = vp
    noise = randn(z.shape, seeded(4), dtype=torch.float64)
    sched = scheduler(DDIMScheduler, t, t_next, set_alpha_to_one=False)
    want = sched.step(x0, t, z, eta=eta, variance_noise=noise).prev_sample
    assert_close(ours(ddim_step, noise, eta=eta), want, atol=1e-5, rtol=1e-5)


@each('variance', ['fixed_small', 'fixed_large'])
def test_ddpm_of_diffusers(vp, variance):
    t, t_next, z, x0, ours = vp
    noise = torch.randn(z.shape, generator=seeded(4), dtype=torch.float64)
    sched = scheduler(DDPMScheduler, t, t_next, variance_type=variance)
    want = sched.step(x0, t, z, generator=seeded(4)).prev_sample
    assert_close(ours(ddpm_step, noise, variance=variance), want, atol=2e-5, rtol=2e-5)


# noise

NOISY = {
    'churn': (heun, dict(s_churn=8)),
    'ancestral': (euler_ancestral, {}),
    'sde': (dpmpp_sde, {}),
    '3m sde': (dpmpp_3m_sde, {}),
    'er sde': (er_sde, {}),
    'sa solver': (sa_solver, {}),
    'restart': (restart, {}),
    'dpm fast': (dpm_fast, dict(eta=1.0)),
}
noisy = pytest.mark.parametrize('step,options', NOISY.values(), ids=NOISY)


def run(x, step, options, seed=5):
    return sample(D, x, SIGMAS, step, generator=seeded(seed), **options)


@noisy
def test_a_sample_does_not_depend_on_the_batch(step, options):
    assert torch.equal(run(X, step, options)[:2], run(X[:2], step, options))


@noisy
def test_a_batch_in_pieces(step, options):
    g = seeded(5)
    pieces = [sample(D, o, SIGMAS, step, generator=g, **options) for o in X.split([1, 3])]
    assert torch.equal(torch.cat(pieces), run(X, step, options))


@noisy
def test_seeds_matter(step, options):
    assert not torch.equal(run(X, step, options), run(X, step, options, seed=6))


@noisy
def test_the_global_generator_is_left_alone(step, options):
    before = torch.get_rng_state()
    run(X, step, options)
    assert torch.equal(before, torch.get_rng_state())


def test_a_list_of_generators():
    together = sample(D, X, SIGMAS, euler_ancestral, generator=[seeded(i) for i in range(4)])
    alone = sample(D, X[2:3], SIGMAS, euler_ancestral, generator=[seeded(2)])
    assert torch.equal(together[2:3], alone)


def test_a_generator_that_is_not_needed_is_not_used():
    g = seeded(0)
    before = g.get_state()
    sample(D, X, SIGMAS, heun, generator=g)
    assert torch.equal(before, g.get_state())


def test_fresh_noise_without_a_generator():
    a, b = (sample(D, X, SIGMAS, euler_ancestral) for _ in range(2))
    assert not torch.equal(a, b)


@each(
    'generator',
    [3, list(range(500))],
)
@each(
    'step,options',
    [(euler_ancestral, {}), (ddpm_step, {}), (dpmpp_sde, {}), (heun, dict(s_churn=1))],
)
def test_noise_of_a_run_is_not_that_of_its_start(step, options, generator):
    z = randn((500, 9), generator) * 14.6
    got = sample(D, z, [14.6, 7.0], step, generator=generator, **options).std()
    assert abs(got / (0.25 + 49) ** 0.5 - 1) < 0.06


# churn


class Seen(Denoiser):
    "Notes x and sigma of each call"

    def __init__(self, D):
        super().__init__(D)
        self.seen = []

    def forward(self, x, sigma):
        self.seen.append((x.clone(), sigma[0].item()))
        return self.inner_model(x, sigma)


def test_churned_levels_are_those_of_the_model():
    V, sigmas, z = Seen(Q), Q.get_sigmas_karras(7), randn(X.shape, 9)
    ends = [y for y, _ in samples(V, X, sigmas, euler, noise=lambda a, b: z, s_churn=2.0)]
    for (y, hat), sigma, x in zip(V.seen, sigmas.tolist(), [X, *ends], strict=False):
        assert hat in SD.sigmas.tolist()
        assert hat > sigma or sigma == sigmas[0]
        assert_close(y, x + z * (hat**2 - sigma**2) ** 0.5, atol=1e-5, rtol=1e-5)


def test_churned_is_public():
    step = churned(lambda D, x, sigma, sigma_next, state: (x, state.evaluate(D, x, sigma)))
    assert torch.equal(sample(D, X, [2.0, 1.0], step), X)


def test_where_to_round():
    def rounded_at(quantize, s_churn):
        kw = dict(generator=seeded(0), s_churn=s_churn, quantize=quantize)
        return sample(Q, X, Q.get_sigmas_karras(7), heun, **kw)

    assert torch.equal(rounded_at(None, 0.0), rounded_at(lambda o: o, 0.0))
    assert (rounded_at(None, 2.0) - rounded_at(lambda o: o, 2.0)).abs().max() > 1e-3


# Brownian paths

BLANK, FOUR = torch.zeros(2000, 2), [4.0, 2.0, 1.0, 0.0]


@pytest.fixture(scope='module')
def path():
    noise = brownian_noise(BLANK, FOUR, seeded(0))
    return noise, noise(4.0, 1.0), noise(4.0, 2.0), noise(2.0, 1.0)


def test_path_has_variance_one(path):
    assert abs(path[1].var() - 1) < 4 * (2 / 4000) ** 0.5
    assert abs(path[2].var() - 1) < 4 * (2 / 4000) ** 0.5


def test_increments_are_independent(path):
    assert abs((path[2] * path[3]).mean()) < 4 / 4000**0.5


def test_increments_add_up(path):
    _, whole, a, b = path
    assert_close(whole * 3**0.5, a * 2**0.5 + b, atol=1e-5, rtol=1e-5)


def test_the_way_back(path):
    assert_close(path[0](1.0, 4.0), -path[1])


def test_a_path_repeats(path):
    assert torch.equal(path[0](4.0, 2.0), path[2])


def test_a_path_does_not_depend_on_the_batch(path):
    few = brownian_noise(BLANK[:3], FOUR, seeded(0))
    assert torch.equal(few(4.0, 1.0), path[1][:3])
    assert torch.equal(few(4.0, 2.0), path[2][:3])
    assert torch.equal(few(2.0, 1.0), path[3][:3])


def test_a_tree_is_the_same_for_all_schedules():
    few, more = [4.0, 1.0, 0.0], [4.0, 3.0, 2.0, 1.0, 0.0]
    coarse, fine = (brownian_noise(BLANK[:3], o, seeded(0), tree=True) for o in (few, more))
    parts = fine(4.0, 3.0) + fine(3.0, 2.0) + fine(2.0, 1.0)
    assert_close(coarse(4.0, 1.0) * 3**0.5, parts, atol=1e-4, rtol=1e-4)


def test_without_torchsde(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchsde', None)
    with pytest.raises(ImportError, match=r'brownian_noise needs torchsde: pip install'):
        brownian_noise(BLANK, FOUR)


# CFG++


class Guided(Denoiser):
    def __init__(self, D, neg, w):
        super().__init__(D)
        self.neg, self.w = neg, w

    def parts(self, x, sigma, mean):
        neg, pos = (self.inner_model(x, sigma, mean=o) for o in (self.neg, mean))
        return Parts(neg + self.w * (pos - neg), pos, neg)

    def forward(self, x, sigma, mean):
        return self.parts(x, sigma, mean).pred


GUIDED, POS = Guided(D, torch.full((4, 1, 1, 1), -1.0), 0.6), dict(mean=torch.ones(4, 1, 1, 1))
TEN = get_sigmas_karras(10, 0.0292, 14.6146)


def flow_velocity(z, t, mean):
    "The velocity of a flow model whose estimates are those of `D`."
    return (z - D(z / (1 - t), t / (1 - t), mean=mean)) / t


@each('w', [1.0, 2.5, 6.0])
def test_rectified_cfg_pp_is_that_of_the_paper_in_velocities(w):
    neg, pos = GUIDED.neg, POS['mean']
    times = (TEN / (1 + TEN)).tolist()
    z = X * (1 - times[0])
    for t, end in pairwise(times):
        middle, v = (t + end) / 2, flow_velocity(z, t, pos)
        half = z + (middle - t) * v
        apart = flow_velocity(half, middle, pos) - flow_velocity(half, middle, neg)
        z = z + (end - t) * (v + (w - 1) * apart)
    got = sample(Guided(D, neg, w), X, TEN, rectified_cfg_pp, POS)
    assert_close(got, z, atol=1e-3, rtol=1e-4)


def test_rectified_cfg_pp_without_guidance_is_euler():
    got = sample(Guided(D, GUIDED.neg, 1.0), X, TEN, rectified_cfg_pp, POS)
    assert_close(got, sample(D, X, TEN, euler, POS), atol=1e-4, rtol=1e-5)


def test_rectified_cfg_pp_ends_where_plain_guidance_does():
    fine = get_sigmas_karras(2000, 0.0292, 14.6146)
    G = Guided(D, GUIDED.neg, 2.0)
    got, want = (sample(G, X, fine, step, POS) for step in (rectified_cfg_pp, heun))
    assert (got - want).abs().max() < 5e-3 * want.abs().max()


# feedback guidance


def run_fbg(w=1.0, **options):
    return sample(Guided(D, GUIDED.neg, w), X, TEN, fbg, POS, generator=0, **options)


@each('pi', [0.2, 0.5])
def test_fbg_without_feedback_is_plain_guidance(pi):
    got = run_fbg(pi=pi, temperature=0, offset=0)
    plain = Guided(D, GUIDED.neg, 1 / pi)
    want = sample(plain, X, TEN, euler_ancestral, POS, generator=0)
    assert_close(got, want, atol=1e-4, rtol=1e-4)


@each('options', [{}, dict(temperature=1, offset=-50)])
def test_fbg_of_a_perfect_network_is_unguided(options):
    want = sample(D, X, TEN, euler_ancestral, POS, generator=0)
    assert_close(run_fbg(pi=1, **options), want, atol=1e-4, rtol=1e-4)


def test_fbg_adds_to_the_weight():
    got = run_fbg(3.0, pi=0.5, temperature=0, offset=0)
    plain = Guided(D, GUIDED.neg, 4.0)
    want = sample(plain, X, TEN, euler_ancestral, POS, generator=0)
    assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_fbg_goes_no_higher_than_most():
    "From the second step on the scale is `most`."
    state = State(
        2, 1, None, past=((9.0, torch.full((4,), -99.0).clamp(*_feedback_range(0.9, 5))),)
    )
    x, pred, pos, neg = X, 3 * X, 3 * X, X
    bound = SimpleNamespace(parts=lambda x, sigma: (pred, pos, neg))
    _, state = fbg(bound, x, 2.0, 0.0, state, pi=0.9, most=5.0)
    assert_close(state.x0, neg + 5 * (pos - neg), atol=1e-4, rtol=1e-4)


def test_fbg_without_noise_is_euler():
    got = run_fbg(pi=0.5, temperature=0, offset=0, eta=0.0)
    want = sample(Guided(D, GUIDED.neg, 2.0), X, TEN, euler, POS)
    assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_the_times_of_fbg():
    "By hand: the offset alone brings the scale to 3 at `t0`."
    _, offset = _feedback_settings(TEN.tolist(), 0.95, 0.5, 0.4)
    ratio = math.exp(offset * 5)
    assert ratio / (ratio - 0.05) == pytest.approx(3)
    temperature, offset = _feedback_settings([4.0, 2.0, 1.0, 0.0], 0.95, 0.5, 1 / 3)
    assert temperature == pytest.approx((4 - 1) * 0.25 * abs(offset) / 5)


@each('name,value', [('pi', 0), ('pi', 2), ('most', 1), ('t0', 1), ('t1', -1), ('temperature', -1)])
def test_bad_options_of_fbg(name, value):
    with pytest.raises(ValueError, match=f'{name}: expected'):
        run_fbg(**{name: value})


def test_fbg_needs_a_pi_for_its_times():
    with pytest.raises(ValueError, match='pi: expected more than 1/3, or an offset, got 0.3'):
        run_fbg(pi=0.3)


DATA = GaussianMixture([[-2.0], [2.0]], [0.04, 0.25], [0.3, 0.7])


class Damaged(Denoiser):
    "It ignores the class 0 for 40 % of its conditional predictions; all densities are known."

    def __init__(self):
        super().__init__(None)

    def densities(self, x, sigma):
        "Logarithms: of the class with the right share, and of all it mixes with."
        return DATA.logp(x, sigma, 0) + math.log(0.6), DATA.logp(x, sigma) + math.log(0.4)

    def parts(self, x, sigma):
        right, wrong = self.densities(x, sigma)
        neg, share = DATA(x, sigma), (right - wrong).sigmoid()[:, None]
        pos = share * DATA(x, sigma, 0) + (1 - share) * neg
        return Parts(pos, pos, neg)

    def forward(self, x, sigma):
        return self.parts(x, sigma).pred


NOISE = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)).double()


@each('sigma', [0.5, 2.0, 10.0])
def test_the_scale_of_fbg_is_exact_where_the_ratio_is_known(sigma):
    net, x = Damaged(), DATA.sample(200, 0, 0, sigma)
    pos, neg = net.parts(x, sigma)[1:3]
    ratio = (torch.logaddexp(*net.densities(x, sigma)) - DATA.logp(x, sigma)).exp()[:, None]
    got = neg + ratio / (ratio - 0.4) * (pos - neg)
    assert_close(got, DATA(x, sigma, 0), atol=1e-8, rtol=1e-6)


def test_fbg_finds_the_ratio_on_its_way():
    net, sigmas = Damaged(), get_sigmas_karras(400, 0.5, 40.0, concat_zero=False)
    options = dict(pi=0.6, most=50.0, temperature=1.0, offset=0.0)
    *_, (x, state) = karras._run_steps(net, 40 * NOISE, sigmas, fbg, None, 0, None, options)
    ratio = torch.logaddexp(*net.densities(x, 0.5)) - DATA.logp(x, 0.5)
    found, sure = state.past[0][1], x[:, 0] < 0
    assert (found - ratio)[sure].abs().median() < 0.1


def test_fbg_draws_the_class_from_a_network_that_ignores_it():
    net, sigmas = Damaged(), get_sigmas_karras(100, 0.01, 40.0)
    options = dict(pi=0.6, most=50.0, temperature=1.0, offset=0.0)
    plain = sample(net, 40 * NOISE, sigmas, euler_ancestral, generator=0)
    x = sample(net, 40 * NOISE, sigmas, fbg, generator=0, **options)
    assert (plain > 0).double().mean() == pytest.approx(0.4 * 0.7, abs=0.03)
    assert (x > 0).double().mean() < 0.03
    assert x[x < 0].mean() == pytest.approx(-2.0, abs=0.02)
    assert x[x < 0].std() == pytest.approx(0.2, abs=0.02)


def test_weights_of_cfg_pp_on_karras():
    "Computed independently"
    want = [1.591, 1.507, 1.423, 1.340, 1.257, 1.174, 1.092, 1.012, 0.932, 0.600]
    assert (0.6 * TEN[:-1] / (TEN[:-1] - TEN[1:]) - torch.tensor(want)).abs().max() < 1e-3


def test_ancestral_cfg_pp():
    a = sample(GUIDED, X, TEN, ancestral(euler_cfg_pp), POS, eta=0.0)
    assert_close(a, sample(GUIDED, X, TEN, euler_cfg_pp, POS), atol=1e-5, rtol=1e-5)


# as in k-diffusion

SHELLS = {
    'euler': euler,
    'heun': heun,
    'dpm_2': dpm2,
    'euler_ancestral': euler_ancestral,
    'heun_ancestral': heun_ancestral,
    'dpm_2_ancestral': dpm2_ancestral,
    'dpmpp_2s_ancestral': dpmpp_2s_ancestral,
    'lms': lms,
    'dpmpp_2m': dpmpp_2m,
    'dpmpp_sde': dpmpp_sde,
    'dpmpp_2m_sde': dpmpp_2m_sde,
    'dpmpp_3m_sde': dpmpp_3m_sde,
    'ddim': ddim_step,
    'ddpm': ddpm_step,
    'deis': deis,
    'er_sde': er_sde,
    'ipndm': ipndm,
    'unipc': unipc,
    'gradient_estimation': gradient_estimation,
    'res_multistep': res_multistep,
    'sa_solver': sa_solver,
    'restart': restart,
}
CHURN = ['s_churn', 's_tmin', 's_tmax', 's_noise', 'decorate_sigma_hat', 'generator']
ANCESTRAL = ['eta', 's_noise', 'noise_sampler', 'generator']
OPTIONS = {
    **{k: CHURN for k in ('euler', 'heun', 'dpm_2')},
    **{k: ANCESTRAL for k in SHELLS if k.endswith('ancestral')},
    **{k: ['order'] for k in ('lms', 'deis', 'ipndm', 'unipc')},
    'gradient_estimation': ['gamma'],
    'er_sde': ['s_noise', 'noise_sampler', 'order', 'generator'],
    'res_multistep': [],
    'sa_solver': [
        *('tau', 's_tmin', 's_tmax', 's_noise', 'noise_sampler', 'order', 'corrector', 'generator')
    ],
    'restart': [
        *('restart_min', 'restart_max', 'restart_steps', 'restart_times'),
        *('s_noise', 'noise_sampler', 'generator'),
    ],
    'dpmpp_2m': [],
    'dpmpp_sde': ['eta', 's_noise', 'noise_sampler', 'r', 'generator'],
    'dpmpp_2m_sde': ['eta', 's_noise', 'noise_sampler', 'solver_type', 'generator'],
    'dpmpp_3m_sde': ANCESTRAL,
    'ddim': ['eta', 'noise_sampler', 'generator'],
    'ddpm': ['variance', 's_noise', 'noise_sampler', 'generator'],
    'euler_cfg_pp': [],
    'rectified_cfg_pp': [],
    'fbg': ['pi', 'most', 't0', 't1', 'temperature', 'offset', *ANCESTRAL],
}


def shell_of(name):
    return getattr(karras, f'sample_{name}')


@each('name', OPTIONS)
def test_signature(name):
    shared = ['model', 'x', 'sigmas', 'extra_args', 'callback', 'disable']
    assert list(inspect.signature(shell_of(name)).parameters) == shared + OPTIONS[name]


@each('name', OPTIONS)
def test_docs_name_each_parameter(name):
    f = shell_of(name)
    assert all(f'\n{k}: ' in f.__doc__ for k in inspect.signature(f).parameters)


@each('name', OPTIONS)
def test_shells_pickle(name):
    f = shell_of(name)
    assert pickle.loads(pickle.dumps(f)) is f


@each('name', SHELLS)
def test_a_shell_is_its_step(name):
    draws = 'generator' in inspect.signature(shell_of(name)).parameters
    kw = dict(generator=seeded(0)) if draws else {}
    got = shell_of(name)(D, X, SIGMAS, {'mean': MEAN}, disable=True, **kw)
    want = sample(D, X, SIGMAS, SHELLS[name], {'mean': MEAN}, seeded(0))
    assert torch.equal(got, want)


@each('step', [euler_cfg_pp, rectified_cfg_pp])
def test_shell_of_cfg_pp(step):
    got = shell_of(step.__name__)(GUIDED, X, TEN, POS, disable=True)
    assert torch.equal(got, sample(GUIDED, X, TEN, step, POS))


def test_positional_as_in_k_diffusion():
    got = karras.sample_heun(D, X, SIGMAS, None, None, True, 0.0, 0.0, inf, 1.0)
    assert torch.equal(got, sample(D, X, SIGMAS))


@each('options', [dict(eta=0.5, s_noise=0.9, r=0.4), dict(eta=0.0, r=0.4)])
def test_options_of_sde(options):
    got = karras.sample_dpmpp_sde(D, X, SIGMAS, disable=True, generator=seeded(0), **options)
    want = sample(D, X, SIGMAS, dpmpp_sde, generator=seeded(0), **options)
    assert torch.equal(got, want)


def test_options_of_2m_sde():
    kw = dict(solver_type='heun', generator=0)
    got = karras.sample_dpmpp_2m_sde(D, X, SIGMAS, disable=True, **kw)
    assert torch.equal(got, sample(D, X, SIGMAS, dpmpp_2m_sde, **kw))


def test_own_noise():
    def own(a, b):
        return torch.ones_like(X)

    got = karras.sample_euler_ancestral(D, X, SIGMAS, disable=True, noise_sampler=own)
    assert torch.equal(got, sample(D, X, SIGMAS, euler_ancestral, noise=own))


def test_the_call_of_the_discussion():
    quantizer, sigmas = make_quantizer(Q.sigmas), get_sigmas_karras(7, 0.1072, 14.6146)
    kw = dict(s_churn=0.3, decorate_sigma_hat=quantizer, disable=True, generator=seeded(1))
    got = karras.sample_heun(Q, X, quantizer(sigmas), extra_args={}, **kw)
    want = sample(Q, X, quantizer(sigmas), heun, generator=seeded(1), s_churn=0.3)
    assert torch.equal(got, want)


def test_levels_that_rounding_made_equal():
    sigmas = SD.quantize_sigma(get_sigmas_karras(50, SD.sigma_min, SD.sigma_max))
    assert len(sigmas.unique()) < len(sigmas)
    got = karras.sample_heun(Q, X, sigmas, disable=True)
    assert torch.equal(got, sample(Q, X, sigmas.unique_consecutive()))


@pytest.fixture(scope='module')
def called():
    seen = []
    karras.sample_euler(D, X, SIGMAS, callback=seen.append, disable=True, s_churn=4.0)
    return seen


def test_callback_counts(called):
    assert [o['i'] for o in called] == list(range(20))


def test_callback_keys(called):
    assert sorted(called[0]) == ['denoised', 'i', 'sigma', 'sigma_hat', 'x']


def test_callback_sigma(called):
    assert called[3]['sigma'] == SIGMAS[3]


def test_callback_sigma_hat(called):
    assert all(o['sigma_hat'] / o['sigma'].item() == pytest.approx(1.2, abs=1e-5) for o in called)


def test_callback_denoised(called):
    for o in called:
        assert_close(o['denoised'], exact(o['x'], torch.full((4,), o['sigma_hat'].item())))


def test_callback_x_has_its_churn(called):
    assert called[0]['x'].std() > X.std()


# memory


class Alive(TorchDispatchMode):
    "Bytes that are alive among tensors made inside"

    def __init__(self):
        super().__init__()
        self.now, self.seen = 0, set()

    def _free(self, key, n):
        self.seen.discard(key)
        self.now -= n

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for st in {t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)}:
            if st._cdata in self.seen:
                continue
            self.seen.add(st._cdata)
            self.now += st.nbytes()
            weakref.finalize(st, self._free, st._cdata, st.nbytes())
        return out


def copies(step, **options):
    "Most tensors of the size of x alive while the model runs, beyond its input and the caller's"
    big, seen = randn((2, 4, 128, 128), 0) * 14.6, []

    def model(x, sigma):
        seen.append(alive.now / big.nbytes - (x is not big))
        return x.clone()

    sigmas = get_sigmas_karras(8, 0.03, 14.6)
    with Alive() as alive:
        sample(model, big, sigmas, step, noise=lambda a, b: torch.zeros_like(big), **options)
    return round(max(seen), 1)


REMEMBERS = {dpmpp_2m: 2, dpmpp_2m_sde: 2, dpmpp_3m_sde: 3, lms: 4, sa_solver: 2, restart: 1}


@each('step', [*ONE, *TWO, restart, dpm_fast])
def test_memory(step):
    assert copies(step) <= 3 + REMEMBERS.get(step, 0)


def test_memory_of_lms():
    assert copies(lms) == 3.0


def test_memory_of_churn():
    assert copies(heun, s_churn=4.0) <= 3


# bad input


def broken(x, sigma):
    return x / (sigma > 1).view(-1, 1, 1, 1) * 0 + x


def run_with(step=heun, **kw):
    return lambda: sample(D, X, SIGMAS, step, **kw)


def of(f, *args, **kw):
    return lambda: f(*args, **kw)


BAD_SIGMAS = {
    'none': [],
    'one': [1.0],
    'matrix': [[1.0, 0.0]],
    'rising': [1.0, 2.0, 0.0],
    'nan first': [nan, 1.0],
    'nan': [2.0, nan, 0.0],
    'zero inside': [2.0, 0.0, 0.0],
    'negative': [2.0, -1.0],
    'infinite': [inf, 1.0],
    'zeros': [0.0, 0.0],
    'repeated': [2.0, 1.0, 1.0, 0.0],
}


@pytest.mark.parametrize('sigmas', BAD_SIGMAS.values(), ids=BAD_SIGMAS)
@each('f', [lambda o: sample(D, X, o), lambda o: brownian_noise(X, o), lambda o: on_sigmas([1], o)])
def test_bad_sigmas(sigmas, f):
    with pytest.raises(ValueError, match='^sigmas: '):
        f(sigmas)


@each('f', [lambda o: sample(D, X, o), lambda o: karras.sample_euler(D, X, o, disable=True)])
@each('sigmas', [None, 'a', ['a'], [1j, 0.0]])
def test_sigmas_of_a_wrong_kind(f, sigmas):
    with pytest.raises(TypeError, match='^sigmas: '):
        f(sigmas)


@each('f', THREE)
@each(
    'lo,hi', [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0), (nan, 1.0), (0.1, nan), (0.1, inf)]
)
def test_bad_ends(f, lo, hi):
    with pytest.raises(ValueError, match='sigma_m'):
        f(5, lo, hi)


@each('n', [0, -1])
def test_bad_n(n):
    with pytest.raises(ValueError, match=f'^n: .* got {n}'):
        get_sigmas_karras(n, 0.1, 1.0)


@each('n', [1.5, nan, inf, '5', None, True])
def test_n_of_a_wrong_kind(n):
    with pytest.raises(TypeError, match='^n: '):
        get_sigmas_karras(n, 0.1, 1.0)


@each('rho', [0.0, -7.0, nan, 1e-9, 1e9])
@each('f', [get_sigmas_karras, get_sigmas_polyexponential])
def test_bad_rho(f, rho):
    with pytest.raises(ValueError, match='^rho: '):
        f(5, 0.1, 1.0, rho)


BAD = {
    'sigma_min text': (of(get_sigmas_karras, 5, 'a', 10), TypeError, "sigma_min: .* got 'a'"),
    'sigma_max text': (of(get_sigmas_karras, 5, 0.1, 'b'), TypeError, "sigma_max: .* got 'b'"),
    'sigma_min None': (of(get_sigmas_karras, 5, None, 10), TypeError, 'sigma_min: .* got None'),
    'device': (of(get_sigmas_karras, 5, 0.1, 1.0, device='foo'), ValueError, "device: .* 'foo'"),
    'beta_d': (of(get_sigmas_vp, 5, beta_d=nan), ValueError, 'beta_d: .* got nan'),
    'beta_d large': (of(get_sigmas_vp, 5, beta_d=1e9), ValueError, 'beta_d: .* got 1e'),
    'beta_min': (of(get_sigmas_vp, 5, beta_min='a'), TypeError, "beta_min: .* got 'a'"),
    'eps_s': (of(get_sigmas_vp, 5, eps_s=0.0), ValueError, 'eps_s: .* got 0'),
    'steps': (of(get_premature_sigma_min, 1, 14.0, 0.03), ValueError, 'steps: .* got 1'),
    'no range': (
        of(Denoiser(exact).get_sigmas_karras, 5),
        NotImplementedError,
        'get_sigmas_karras',
    ),
    'no list': (of(NetDenoiser(len, 'eps', 1, 5).get_sigmas), ValueError, 'n: .* got 0'),
    'n of a model': (of(SD.get_sigmas, 'a'), TypeError, "n: .* got 'a'"),
    'values few': (of(on_sigmas, [1.0] * 2, FOUR), ValueError, r'values: .* got shape \(2,\)'),
    'values many': (of(on_sigmas, [1.0] * 4, FOUR), ValueError, r'values: .* got shape \(4,\)'),
    'values text': (of(on_sigmas, ['a'], [1.0, 0.0]), TypeError, 'values: '),
    'values bool': (of(on_sigmas, [True], [1.0, 0.0]), TypeError, 'values: '),
    'values nan': (of(on_sigmas, [nan], [1.0, 0.0]), ValueError, 'values: .* NaN'),
    'at_step': (of(W.at_step, 3), IndexError, 'step: expected 0 to 2, got 3'),
    'at_step negative': (of(W.at_step, -1), IndexError, 'step: .* got -1'),
    'step text': (run_with('euler'), TypeError, "step: .* got 'euler'"),
    'step print': (run_with(lambda *a: None), TypeError, 'step: .* got None'),
    'D None': (of(sample, None, X, SIGMAS), TypeError, 'D: .* got None'),
    'x None': (of(sample, D, None, SIGMAS), TypeError, 'x: .* got None'),
    'step': (of(sample, D, X, SIGMAS, dict), TypeError, 'step: expected a step such as euler'),
    'x 0-d': (of(sample, D, torch.tensor(1.0), SIGMAS), TypeError, 'x: '),
    'x nan': (of(sample, D, X * nan, SIGMAS), ValueError, 'x: .*NaN'),
    'cond': (run_with(cond=['a']), TypeError, 'cond: .* got list'),
    'option': (run_with(foo=1), TypeError, 'foo: not an option of heun'),
    'option of another': (run_with(euler, eta=1.0), TypeError, 'eta: not an option of euler'),
    'no options': (run_with(dpmpp_2m, eta=1.0), TypeError, 'are: none'),
    'generator': (run_with(generator='a'), TypeError, "generator: .* got 'a'"),
    'generator list': (run_with(generator=[1, 2, 3]), ValueError, 'generator: .* list of 3'),
    'generator None': (run_with(generator=[None] * 4), TypeError, 'generator: .* got None'),
    'noise': (run_with(euler_ancestral, noise=5), TypeError, 'noise: .* got 5'),
    'noise nan': (
        run_with(euler_ancestral, noise=lambda a, b: X * nan),
        FloatingPointError,
        'noise: not finite',
    ),
    'noise shape': (
        run_with(euler_ancestral, noise=lambda a, b: X[:1]),
        ValueError,
        r'noise: expected it to return \(4, 3, 8, 8\)',
    ),
    's_churn': (run_with(s_churn=-1.0), ValueError, 's_churn: .* got -1'),
    's_churn nan': (run_with(s_churn=nan), ValueError, 's_churn: .* got nan'),
    's_churn text': (run_with(s_churn='a'), TypeError, "s_churn: .* got 'a'"),
    's_tmin nan': (run_with(s_churn=1, s_tmin=nan), ValueError, 's_tmin: .* got nan'),
    's_noise nan': (run_with(s_noise=nan), ValueError, 's_noise: .* got nan'),
    's_noise ancestral': (run_with(euler_ancestral, s_noise=nan), ValueError, 's_noise: '),
    'quantize': (run_with(quantize=5), TypeError, 'quantize: .* got 5'),
    'eta inf': (run_with(euler_ancestral, eta=inf), ValueError, 'eta: .* got inf'),
    'eta text': (run_with(euler_ancestral, eta='a'), TypeError, "eta: .* got 'a'"),
    'eta ancestral': (run_with(euler_ancestral, eta=-0.5), ValueError, 'eta: .* got -0.5'),
    'eta 2m': (run_with(dpmpp_2m_sde, eta=-0.5), ValueError, 'eta: .* got -0.5'),
    'eta 3m': (run_with(dpmpp_3m_sde, eta=-0.5), ValueError, 'eta: .* got -0.5'),
    'eta ddim': (run_with(ddim_step, eta=-0.5), ValueError, 'eta: .* got -0.5'),
    'variance': (run_with(ddpm_step, variance='learned'), ValueError, "variance: .* got 'learned'"),
    'solver': (run_with(dpmpp_2m_sde, solver_type='x'), ValueError, "solver_type: .* got 'x'"),
    'r': (run_with(dpmpp_sde, r=0.0), ValueError, 'r: .* got 0'),
    'r text': (run_with(dpmpp_sde, r='a'), TypeError, "r: .* got 'a'"),
    'order': (run_with(lms, order=0), ValueError, 'order: .* got 0'),
    'orders': (run_with(dpm_adaptive, order=4), ValueError, 'order: .* 2 to 3 for dpm_adaptive'),
    'order low': (run_with(dpm_adaptive, order=1), ValueError, 'order: .* got 1'),
    'rtol': (run_with(dpm_adaptive, rtol=-1.0), ValueError, 'rtol: .* got -1'),
    'h_init': (run_with(dpm_adaptive, h_init=0.0), ValueError, 'h_init: .* got 0'),
    'safety': (run_with(dpm_adaptive, accept_safety=2.0), ValueError, 'accept_safety: .* got 2'),
    'report': (run_with(dpm_adaptive, report=5), TypeError, 'report: .* got 5'),
    'tau': (run_with(sa_solver, tau=-1.0), ValueError, 'tau: .* got -1'),
    'corrector': (run_with(sa_solver, corrector=-1), ValueError, 'corrector: .* got -1'),
    'corrector float': (run_with(sa_solver, corrector=1.5), TypeError, 'corrector: .* got 1.5'),
    'restart_steps': (run_with(restart, restart_steps=0), ValueError, 'restart_steps: .* got 0'),
    'restart_min': (run_with(restart, restart_min=0.01), ValueError, 'restart_min: .* got 0.01'),
    'restart_min high': (run_with(restart, restart_min=15.0), ValueError, 'restart_min: .* got 15'),
    'restart_max': (run_with(restart, restart_max=0.05), ValueError, 'restart_max: .* got 0.05'),
    'restart_max high': (run_with(restart, restart_max=80.0), ValueError, 'restart_max: .*got 80'),
    'nfe low': (run_with(dpm_fast, nfe=56), ValueError, 'nfe: expected 57 to 59 for 20 steps.*56'),
    'nfe': (run_with(dpm_fast, nfe=60), ValueError, 'nfe: expected 57 to 59 for 20 .* got 60'),
    'nfe float': (run_with(dpm_fast, nfe=57.5), TypeError, 'nfe: .* got 57.5'),
    'n': (of(karras.sample_dpm_fast, D, X, 0.03, 14.6, 0), ValueError, 'n: .* got 0'),
    'the wrong way': (of(karras.sample_dpm_fast, D, X, 9.0, 1.0, 5), ValueError, 'sigma_max: '),
    'to 0': (of(karras.sample_dpm_adaptive, D, X, 0.0, 1.0), ValueError, 'sigma_min: .* got 0'),
    'adaptive callback': (
        of(karras.sample_dpm_adaptive, D, X, 0.1, 1.0, callback=5),
        TypeError,
        'callback: .* got 5',
    ),
    'order float': (run_with(lms, order=2.5), TypeError, 'order: .* got 2.5'),
    'ancestral twice': (of(ancestral, euler_ancestral), ValueError, 'got euler_ancestral'),
    'ancestral sde': (of(ancestral, dpmpp_sde), ValueError, 'got dpmpp_sde'),
    'ancestral number': (of(ancestral, 5), TypeError, 'step: .* got 5'),
    'churned number': (of(churned, 5), TypeError, 'step: .* got 5'),
    'upwards': (of(get_ancestral_step, 1, 2), ValueError, 'sigma_to: .* got 2'),
    'from 0': (of(get_ancestral_step, 0, 0), ValueError, 'sigma_from: .* got 0'),
    'own eta': (of(get_ancestral_step, 2, 1, -1), ValueError, 'eta: .* got -1'),
    'no parts': (run_with(euler_cfg_pp), TypeError, 'guided denoiser'),
    'beyond the path': (of(brownian_noise(X, FOUR), 4.0, 0.5), ValueError, 'sigma_next: '),
    'estimate shape': (of(sample, lambda x, s: x[:1], X, SIGMAS), ValueError, r'shape \(1, 3'),
    'estimate None': (of(sample, lambda x, s: None, X, SIGMAS), TypeError, 'returned NoneType'),
    'model': (of(karras.sample_euler, None, X, SIGMAS), TypeError, 'model: .* got None'),
    'extra_args': (of(karras.sample_euler, D, X, SIGMAS, [1]), TypeError, 'extra_args: .* list'),
    'callback': (of(karras.sample_euler, D, X, SIGMAS, None, 5), TypeError, 'callback: .* got 5'),
    'noise_sampler': (
        of(karras.sample_euler_ancestral, D, X, SIGMAS, noise_sampler=5),
        TypeError,
        'noise_sampler: .* got 5',
    ),
}


@pytest.mark.parametrize('call,error,message', BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as e:
        call()
    assert len(str(e.value)) < 160


def test_not_finite_names_step_and_sigma():
    step = int((SIGMAS > 1).sum()) - 1
    with pytest.raises(FloatingPointError, match=rf'at step {step} \(sigma='):
        sample(broken, X, SIGMAS)


def test_a_network_that_is_not_finite_names_step_and_sigma():
    D = DiscreteDenoiser(lambda x, t: x.where(t[0] > 600, nan))
    with pytest.raises(FloatingPointError, match=r'not finite at sigma=[0-9.]+, step [1-9]'):
        sample(D, X * SIGMAS[0], SIGMAS)
