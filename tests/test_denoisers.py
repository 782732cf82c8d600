"Denoisers: what they take and give, and what they refuse."

import copy
import math
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from cf_guidance.denoisers import (
    CosineDenoiser,
    Denoiser,
    DiscreteDenoiser,
    EDMDenoiser,
    FlowDenoiser,
    NetDenoiser,
    Parts,
    abar_to_sigma,
    from_x0,
    make_quantizer,
    scaled_linear,
    scalings,
    to_x0,
)

S = 0.5
nan, inf = float('nan'), math.inf


def gaussian(x, sigma):
    return x * (S**2 / (S**2 + sigma**2)).view(-1, *(1,) * (x.ndim - 1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, **kw):
    return torch.randn(shape, generator=seeded(seed), **kw)


def perfect(prediction, path):
    "A network for Gaussian data; `path(t)` gives `a` and `b` of `x_t = a x0 + b n`."

    def net(x, t):
        a, b = (o.view(-1, 1) for o in path(t))
        x0, n = a * S**2 * x / (a**2 * S**2 + b**2), b * x / (a**2 * S**2 + b**2)
        return dict(eps=n, x0=x0, v=a * n - b * x0, flow=n - x0)[prediction]

    return net


def vp(sigma):
    return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5


def cosine(t):
    return (t * math.pi / 2).cos(), (t * math.pi / 2).sin()


X, SIGMA = normal(9, 5, dtype=torch.float64), torch.logspace(-2, 2, 9, dtype=torch.float64)


# the wrapper


class Model:
    sigma_min, sigma_max, name, takes_step = 0.1, 10, 'model', True

    def __init__(self):
        self.started = []

    def __call__(self, x, sigma, scale=1.0):
        return scale * gaussian(x, sigma)

    def quantize_sigma(self, sigma):
        return sigma.round()

    def encode(self, x):
        return 2 * x

    def start(self, sigmas=None):
        self.started.append(sigmas)


@pytest.fixture
def wrapped():
    return Denoiser(Denoiser(Model()))


def test_attributes_of_the_model(wrapped):
    assert (wrapped.name, wrapped.sigma_min, wrapped.sigma_max) == ('model', 0.1, 10.0)


def test_dir_has_both(wrapped):
    assert {'name', 'forward'} <= set(dir(wrapped))


def test_start_and_takes_step_are_found_through_wrappers(wrapped):
    wrapped.start([3.0, 0.0])
    assert wrapped.takes_step
    assert wrapped.inner_model.inner_model.started == [[3.0, 0.0]]


def test_quantize_of_the_model(wrapped):
    assert torch.equal(wrapped.quantize_sigma(torch.tensor([0.2, 1.7])), torch.tensor([0.0, 2.0]))


def test_encode_of_the_model(wrapped):
    assert wrapped.encode(3) == 6


def test_decode_is_the_identity(wrapped):
    assert wrapped.decode(3) == 3


def test_conditions_reach_the_model(wrapped):
    assert_close(wrapped(torch.ones(2, 3), 1.0, scale=2.0), torch.full((2, 3), 0.5 / 1.25))


def test_a_missing_attribute_is_named(wrapped):
    with pytest.raises(AttributeError, match='no_such'):
        print(wrapped.no_such)


def test_loss():
    n, x0 = normal(2, 4, 1, 3)
    want = ((x0 + 2 * n) * 0.25 / 4.25 - x0).pow(2).mean((1, 2))
    assert_close(Denoiser(gaussian).loss(x0, n, torch.full((4,), 2.0)), want)


def test_deepcopy():
    assert copy.deepcopy(Denoiser(nn.Linear(2, 2))).inner_model.weight.shape == (2, 2)


def test_pickle():
    assert pickle.loads(pickle.dumps(Denoiser(nn.Linear(2, 2)))).in_features == 2


@pytest.mark.parametrize(
    'sigma', [1, 1.0, torch.tensor(1.0), torch.tensor(1.0).double(), [1.0] * 2]
)
def test_one_sigma_for_all(sigma):
    assert_close(Denoiser(gaussian)(torch.ones(2, 3), sigma), torch.full((2, 3), 0.2))


def test_sigma_zero_is_no_noise():
    x = torch.ones(2, 3)
    assert torch.equal(NetDenoiser(perfect('eps', vp))(x, 0.0), x)


# predictions


def test_loss_is_that_of_the_prediction():
    D = NetDenoiser(perfect('v', vp), 'v')
    (x0, n), sigma = normal(2, 3, 5), torch.tensor([0.1, 1.0, 9.0])
    a, b = (o[:, None] for o in vp(sigma))
    want = (D.predict(x0 + sigma[:, None] * n, sigma) - (a * n - b * x0)).pow(2).mean(1)
    assert_close(D.loss(x0, n, sigma), want)


@pytest.mark.parametrize('prediction', ['eps', 'x0', 'v'])
def test_prediction_of_inverts(prediction):
    D = NetDenoiser(lambda z, t: z.sin(), prediction)
    x, sigma = 3 * normal(3, 5, dtype=torch.float64), torch.tensor([0.1, 1.0, 9.0]).double()
    assert_close(D.prediction_of(D(x, sigma), x, sigma), D.predict(x, sigma))


class Out(NamedTuple):
    sample: torch.Tensor


def test_sample_attribute_and_a_variance():
    x = normal(3, 5)
    D = NetDenoiser(lambda x, t: Out(torch.cat([x, 0 * x], 1)), 'x0')
    assert_close(D(x, 1.0), x / 2**0.5)


def test_a_tuple():
    x = normal(3, 5)
    assert_close(NetDenoiser(lambda x, t: (x, 'more'), 'x0')(x, 1.0), x / 2**0.5)


def test_half_precision():
    x = normal(3, 5)
    y = NetDenoiser(perfect('eps', vp))(x.half(), 2.0)
    assert y.dtype == torch.float16
    assert_close(y.float(), gaussian(x, torch.full((3,), 2.0)), atol=2e-3, rtol=2e-3)


class Passes(nn.Sequential):
    def forward(self, x, t):
        return x


def test_a_model_of_mixed_types():
    net = Passes(nn.LayerNorm(5), nn.Linear(5, 5).half())
    assert NetDenoiser(net)(normal(3, 5).half(), 1.0).dtype == torch.float16


class Offloaded(nn.Linear):
    _hf_hook = True

    def forward(self, x, t):
        return x


def test_a_model_that_moves_its_weights():
    assert NetDenoiser(Offloaded(5, 5))(normal(3, 5).to('meta'), 1.0).device.type == 'meta'


def test_one_end_of_the_range():
    assert NetDenoiser(gaussian, sigma_min=0.1).sigma_min == 0.1


# continuous time


@pytest.mark.parametrize('kind', [CosineDenoiser, FlowDenoiser])
@pytest.mark.parametrize('scale', [1.0, 1000.0])
def test_time_there_and_back(kind, scale):
    t, D = torch.linspace(0.01, 0.99, 9, dtype=torch.float64), kind(None, scale=scale)
    assert_close(D.sigma_to_t(D.t_to_sigma(scale * t)), scale * t)
    assert torch.equal(D.t_to_sigma(torch.zeros(2)), torch.zeros(2))


@pytest.mark.parametrize('prediction', ['eps', 'x0'])
def test_other_predictions_on_the_straight_path(prediction):
    D = FlowDenoiser(perfect(prediction, lambda t: (1 - t, t)), prediction)
    assert_close(D(X, SIGMA), gaussian(X, SIGMA))


def test_cosine_is_variance_preserving():
    want = NetDenoiser(perfect('v', vp), 'v')(X, SIGMA)
    assert_close(CosineDenoiser(perfect('v', cosine), 'v')(X, SIGMA), want)


def test_edm_target_has_variance_one():
    D, (x0, n) = EDMDenoiser(lambda x, t: 0 * x, sigma_data=S), normal(2, 9, 20000)
    assert (D.loss(S * x0, n, SIGMA.float()) - 1).abs().max() < 5 * (2 / 20000) ** 0.5


def test_edm_time_there_and_back():
    D = EDMDenoiser(None)
    assert_close(D.t_to_sigma(D.sigma_to_t(SIGMA)), SIGMA)


def test_edm_range():
    assert (EDMDenoiser(None).sigma_min, EDMDenoiser(None).sigma_max) == (0.002, 80.0)


# quantising

QUANTIZE = make_quantizer([1.0, 4.0, 16.0])
LEVELS = abar_to_sigma(scaled_linear())


def test_beyond_the_ends():
    got = QUANTIZE(torch.tensor([[0.0, 0.1], [99.0, inf]]))
    assert torch.equal(got, torch.tensor([[0.0, 1.0], [16.0, 16.0]]))


@pytest.mark.parametrize('sigma', [3.0, 3])
def test_quantize_a_number(sigma):
    assert QUANTIZE(sigma).item() == 4.0


def test_quantize_nan():
    assert QUANTIZE(torch.tensor(nan)).isnan()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantize_types(dtype):
    got = QUANTIZE(torch.tensor([3.0, 0.0], dtype=dtype))
    assert torch.equal(got, torch.tensor([4.0, 0.0], dtype=dtype))


def test_quantize_nothing():
    assert QUANTIZE(torch.empty(0, 3)).shape == (0, 3)


def test_quantize_to_one_level():
    assert make_quantizer([2.0])(torch.tensor([1.0, 5.0])).tolist() == [2.0, 2.0]


def test_quantize_any_order():
    assert make_quantizer([16.0, 1.0, 4.0])(3.0).item() == 4.0


def test_quantize_is_the_nearest_of_all():
    many = torch.rand(500, generator=seeded(), dtype=torch.float64) * 8 - 4
    want = LEVELS[(many[:, None] - LEVELS.log()).abs().argmin(1)]
    assert torch.equal(make_quantizer(LEVELS)(many.exp()), want)


# discrete time steps

FREE = DiscreteDenoiser(None, quantize=False)
ROUNDED = DiscreteDenoiser(None)
SOME = torch.tensor([0.0292, 0.035, 1.0, 14.6])


def test_rounded_as_a_quantizer_does():
    assert torch.equal(ROUNDED.quantize_sigma(SOME), make_quantizer(LEVELS)(SOME))


def test_free_takes_every_level():
    assert FREE.quantize_sigma(SOME) is SOME


def test_steps_are_whole_numbers():
    assert ROUNDED.sigma_to_t(SOME).dtype == torch.int64


@pytest.mark.parametrize('D', [FREE, ROUNDED], ids=['free', 'rounded'])
def test_steps_of_the_levels(D):
    assert D.sigma_to_t(ROUNDED.sigmas).tolist() == list(range(1000))


def test_levels_of_the_steps():
    assert torch.equal(FREE.t_to_sigma(torch.arange(1000)), ROUNDED.sigmas)


def test_steps_beyond_the_ends():
    assert torch.equal(ROUNDED.t_to_sigma(torch.tensor([-3.0, 2000.0])), ROUNDED.sigmas[[0, -1]])


def test_levels_beyond_the_ends():
    assert FREE.sigma_to_t(torch.tensor([1e-5, 1e5])).tolist() == [0.0, 999.0]


def test_steps_keep_the_shape():
    assert FREE.sigma_to_t(torch.rand(2, 3, 1)).shape == (2, 3, 1)


def test_levels_stay_in_float32():
    D = DiscreteDenoiser(nn.Linear(2, 2)).half()
    assert (D.sigmas.dtype, D.weight.dtype) == (torch.float32, torch.float16)


def test_levels_follow_the_device():
    assert DiscreteDenoiser(nn.Linear(2, 2)).to('meta').sigmas.device.type == 'meta'


def test_zero_snr():
    D = DiscreteDenoiser(None, torch.tensor([0.9, 0.5, 0.0]), 'v')
    assert D.sigma_max == 4096 * (1 - 2**-24) ** 0.5


def test_zero_snr_has_a_last_level_at_which_noise_predictions_say_something():
    D = DiscreteDenoiser(None, torch.tensor([0.9, 0.5, 0.0]), 'v')
    assert D.sigma_max_eps == 1.0
    assert ROUNDED.sigma_max_eps == ROUNDED.sigma_max


def test_one_time_step():
    D = DiscreteDenoiser(None, torch.tensor([0.5]))
    assert (D.sigma_to_t(torch.tensor([0.1, 9.0])).tolist(), D.sigma_max) == ([0, 0], 1.0)


def test_wrapped_levels():
    assert torch.equal(Denoiser(ROUNDED).quantize_sigma(SOME), ROUNDED.quantize_sigma(SOME))


def test_wrapped_range():
    assert Denoiser(ROUNDED).sigma_min == ROUNDED.sigma_min


def test_wrapped_time():
    assert Denoiser(ROUNDED).sigma_to_t(SOME).dtype == torch.int64


def test_parts_without_further_negatives():
    assert Parts(1, 1, 0).negs == ()


# bad input


def net(x, t):
    return x


T = torch.ones(2, 3)
BAD = {
    'sigma nan': (lambda: NetDenoiser(net)(T, nan), ValueError, 'sigma: .* got nan'),
    'sigma negative': (lambda: NetDenoiser(net)(T, -1.0), ValueError, 'sigma: .* got -1'),
    'sigma inf': (lambda: NetDenoiser(net)(T, inf), ValueError, 'sigma: .* got inf'),
    'sigma nan tensor': (
        lambda: NetDenoiser(net)(T, torch.tensor([1.0, nan])),
        ValueError,
        'sigma',
    ),
    'sigma neg tensor': (lambda: Denoiser(net)(T, -torch.ones(2)), ValueError, 'sigma: .*got -1'),
    'sigma inf 0-d': (lambda: Denoiser(net)(T, torch.tensor(inf)), ValueError, 'sigma: .* inf'),
    'sigma None': (lambda: Denoiser(net)(T, None), TypeError, 'sigma: .* got None'),
    'sigma text': (lambda: Denoiser(net)(T, 'a'), TypeError, "sigma: .* got 'a'"),
    'sigma bool': (lambda: Denoiser(net)(T, True), TypeError, 'sigma: .* got True'),
    'sigma shape': (lambda: Denoiser(net)(T, torch.ones(3)), ValueError, r'sigma: .* shape \(3,\)'),
    'x list': (lambda: Denoiser(net)([1.0], 1.0), TypeError, 'x: expected a tensor'),
    'x number': (lambda: Denoiser(net)(torch.tensor(1.0), 1.0), TypeError, 'x: expected a tensor'),
    'x whole': (lambda: NetDenoiser(nn.Linear(3, 3))(T.long(), 1.0), TypeError, 'x: .*int64'),
    'no model': (lambda: Denoiser(None)(T, 1.0), TypeError, 'inner_model: .* got None'),
    'no net': (lambda: NetDenoiser(None)(T, 1.0), TypeError, 'inner_model: .* got None'),
    'prediction': (lambda: NetDenoiser(net, 'noise'), ValueError, "prediction: .* got 'noise'"),
    'path': (lambda: scalings('eps', T, 'zzz'), ValueError, "path: .* got 'zzz'"),
    'v on flow': (lambda: FlowDenoiser(net, 'v'), ValueError, "prediction: .* got 'v'"),
    'flow on vp': (lambda: CosineDenoiser(net, 'flow'), ValueError, "prediction: .* got 'flow'"),
    't_max': (lambda: CosineDenoiser(net, t_max=1.0), ValueError, 't_max: .* got 1'),
    't_min': (lambda: FlowDenoiser(net, t_min='a'), TypeError, "t_min: .* got 'a'"),
    't order': (lambda: FlowDenoiser(net, t_min=0.5, t_max=0.2), ValueError, 't_max: .*t_min=0.5'),
    'scale 0': (lambda: FlowDenoiser(net, scale=0), ValueError, 'scale: .* got 0'),
    'scale negative': (lambda: FlowDenoiser(net, scale=-1), ValueError, 'scale: .* got -1'),
    'scale text': (lambda: FlowDenoiser(net, scale='a'), TypeError, "scale: .* got 'a'"),
    'sigma_data 0': (lambda: EDMDenoiser(net, sigma_data=0), ValueError, 'sigma_data: .* got 0'),
    'sigma_data -1': (lambda: EDMDenoiser(net, -1), ValueError, 'sigma_data: .* got -1'),
    'sigma_data nan': (lambda: EDMDenoiser(net, nan), ValueError, 'sigma_data: .* got nan'),
    'sigma_data text': (lambda: EDMDenoiser(net, 'a'), TypeError, "sigma_data: .* got 'a'"),
    'sigma_max nan': (lambda: EDMDenoiser(net, sigma_max=nan), ValueError, 'sigma_max: .* nan'),
    'sigma_min 0': (lambda: NetDenoiser(net, sigma_min=0), ValueError, 'sigma_min: .* got 0'),
    'range order': (lambda: EDMDenoiser(net, 0.5, 9, 2), ValueError, 'sigma_max: .*=9, got 2'),
    'n 0': (lambda: scaled_linear(0), ValueError, 'n: .* got 0'),
    'n text': (lambda: scaled_linear('a'), TypeError, "n: .* got 'a'"),
    'start': (lambda: scaled_linear(10, -1), ValueError, 'start: .* got -1'),
    'start above 1': (lambda: scaled_linear(10, 2, 3), ValueError, 'start: .* got 2'),
    'end': (lambda: scaled_linear(10, 0.1, 0.05), ValueError, 'end: .* got 0.05'),
    'quantizer text': (lambda: make_quantizer('abc'), TypeError, "sigmas: .* got 'abc'"),
    'quantizer empty': (lambda: make_quantizer([]), ValueError, 'sigmas: '),
    'quantizer zero': (lambda: make_quantizer([0.0, 1.0]), ValueError, 'sigmas: '),
    'quantizer negative': (lambda: make_quantizer([-1.0, 1.0]), ValueError, 'sigmas: '),
    'quantizer nan': (lambda: make_quantizer([1.0, nan]), ValueError, 'sigmas: '),
    'quantize text': (lambda: QUANTIZE('a'), TypeError, 'sigma: .* got str'),
    'net None': (lambda: NetDenoiser(lambda x, t: None)(T, 1.0), TypeError, 'net: .* NoneType'),
    'net ()': (lambda: NetDenoiser(lambda x, t: ())(T, 1.0), TypeError, 'net: .* tuple'),
    'net shape': (
        lambda: NetDenoiser(lambda x, t: x[:, :2])(T, 1.0),
        ValueError,
        r'net: .* got \(2, 2\)',
    ),
    'net dtype': (
        lambda: NetDenoiser(nn.Bilinear(3, 1, 3))(T.double(), 1.0),
        ValueError,
        'x is torch.float64 but the model torch.float32',
    ),
    'model dtype': (lambda: Denoiser(nn.Linear(3, 3))(T.double(), 1.0), ValueError, 'x is torch'),
    'device': (
        lambda: NetDenoiser(nn.Linear(3, 3))(T.to('meta'), 1.0),
        ValueError,
        'x is on meta but the model on cpu',
    ),
    'no range': (lambda: Denoiser(net).sigma_min, NotImplementedError, 'smallest noise level'),
    'no maximum': (
        lambda: NetDenoiser(net, sigma_min=0.1).sigma_max,
        NotImplementedError,
        'largest noise level',
    ),
    'from_x0 at 0': (lambda: from_x0(T, T, 0.0, 'eps'), ValueError, 'sigma: .* got 0'),
    'to_x0': (lambda: to_x0(T, T, 1.0, 'epsilon'), ValueError, 'prediction: '),
    'abar rising': (
        lambda: DiscreteDenoiser(net, torch.tensor([0.1, 0.5])),
        ValueError,
        'alphas_cumprod: ',
    ),
    'abar 1': (lambda: DiscreteDenoiser(net, [1.0, 0.5]), ValueError, 'alphas_cumprod: '),
    'abar matrix': (lambda: DiscreteDenoiser(net, [[0.5]]), ValueError, 'alphas_cumprod: '),
    'abar nan': (lambda: DiscreteDenoiser(net, [0.5, nan]), ValueError, 'alphas_cumprod: '),
    'abar empty': (lambda: DiscreteDenoiser(net, []), ValueError, 'alphas_cumprod: '),
    'abar text': (lambda: DiscreteDenoiser(net, 'v'), TypeError, 'alphas_cumprod: .*prediction='),
    'time of text': (lambda: ROUNDED.sigma_to_t('a'), TypeError, 'sigma: .* got str'),
}


@pytest.mark.parametrize('sigma', [-1.0, math.inf, nan])
def test_a_number_is_checked_on_any_device(sigma):
    "A tensor on a GPU is not read, since the CPU would wait for it; a number costs nothing."
    with pytest.raises(ValueError, match='sigma: expected a finite number from 0 up, got '):
        Denoiser(lambda x, sigma: x)(torch.empty(2, 3, device='meta'), sigma)


@pytest.mark.parametrize('call,error,message', BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as e:
        call()
    assert len(str(e.value)) < 160


# a result that is not finite


@pytest.mark.parametrize('value', [nan, inf])
def test_an_estimate_that_is_not_finite(value):
    D = NetDenoiser(lambda x, t: x.new_full(x.shape, value))
    with pytest.raises(FloatingPointError, match='the estimate is not finite at sigma=2$'):
        D(normal(3, 4), 2.0)


def test_finite_estimates_whose_sum_overflows():
    x = torch.full((1, 4), 6e4, dtype=torch.float16)
    assert NetDenoiser(lambda x, t: torch.zeros_like(x))(x, 2.0).isfinite().all()
