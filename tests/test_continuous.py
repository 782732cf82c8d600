"The lesson on continuous time: limits, dtypes, randomness, other implementations, bad input."

import math
import subprocess
import sys
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import clear_errors
import pytest
import torch
from conftest import ENV
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn
from torch.testing import assert_close

from cf_guidance import continuous, karras
from cf_guidance.continuous import (
    ContinuousDDPM,
    _legs,
    _mix,
    _to_images,
    abar,
    aesthetics,
    ddim,
    ddim_noisify,
    ddpm,
    denoisify,
    fashion_unet,
    noisify,
    show_images,
    times,
    ᾱ,
)
from cf_guidance.denoisers import CosineDenoiser
from cf_guidance.lab.fashion import fashion_mnist
from cf_guidance.noise import randn

nan, inf = math.nan, math.inf
GREY, LABELS = fashion_mnist()
X_0 = _to_images(GREY)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def one(x_t, t, v=0.25):
    "The best estimate of the noise for data of mean 0 and variance `v`."
    a, s = _legs(t, x_t)
    return s * x_t / (a**2 * v + s**2)


class Classes(nn.Module):
    "Three classes of mean -1, 0 and 1, and 'any' of mean 0, all of variance 1/100."

    def forward(self, x_t, t, class_labels):
        a, s = _legs(t / 1000, x_t)
        m = torch.tensor([-1.0, 0.0, 1.0, 0.0])[class_labels].view_as(a)
        return s * (x_t - a * m) / (a**2 / 100 + s**2)


class Listens(nn.Linear):
    "A network that returns its input and notes what it was told."

    def __init__(self):
        super().__init__(1, 1)
        self.told = []

    def forward(self, x, t, class_labels=None):
        self.told.append((x.dtype, t, class_labels))
        return x


CLASSES = ContinuousDDPM(Classes(), n_classes=3)


# one function of time


def test_legs_go_with_images():
    x, t = torch.zeros(3, 2, 2, 2), torch.tensor([0.001, 0.4, 0.999])
    assert [o.shape for o in _legs(t, x)] == [(3, 1, 1, 1)] * 2
    assert_close(_legs(t, x)[0] ** 2, abar(t))


def test_legs_keep_the_digits_that_a_root_loses():
    t = torch.tensor([0.001])
    exact = torch.tensor([math.sin(0.001 * math.pi / 2)])
    assert_close(_legs(t, torch.zeros(1, 1))[1].flatten(), exact, rtol=1e-6, atol=0)
    assert ((1 - abar(t)).sqrt().flatten() / exact - 1).abs() > 1e-3


def test_abar():
    assert ᾱ is abar
    assert abar(0.0) == 1
    assert abar(torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float64


def test_abar_is_that_of_the_denoiser():
    t = torch.linspace(0, 1, 9)
    sigma = CosineDenoiser(lambda x, t: x).t_to_sigma(t)
    assert_close(abar(t, False), sigma.pow(2).add(1).reciprocal(), atol=1e-6, rtol=0)


# images


def test_border_is_black():
    assert torch.equal(X_0[0, 0, 2:-2, 2:-2], GREY[0] / 127.5 - 1)
    assert X_0[:, :, :2].unique().tolist() == [-1.0]


def test_colours_of_the_picture():
    x = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 4, 6)
    picture = show_images(x, ncols=3)
    assert (picture.mode, picture.size) == ('RGB', (3 * 14, 2 * 10))
    places = [(14 * (i % 3) + 11, 10 * (i // 3) + 7) for i in range(6)]
    assert [picture.getpixel(o)[0] for o in places] == [0, 64, 128, 191, 255, 255]
    assert picture.getpixel((12, 7))[0] == 255  # between the images


def test_titles_and_clipping():
    picture = show_images(torch.full((3, 1, 8, 8), -3.0), ncols=2, titles=['a'], scale=3)
    picture = picture.convert('RGB')
    assert picture.size == (52, 66)
    assert picture.getpixel((0, 14)) == picture.getpixel((0, 40)) == (0, 0, 0)
    assert min(picture.crop((0, 0, 26, 14)).tobytes()) < 100


def test_picture_shows_the_pixels():
    cut = show_images(X_0[:4]).convert('L').crop((4, 4, 60, 60)).resize((28, 28), 0)
    shown = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8)
    assert (shown.int() - GREY[0].flatten().int()).abs().max() <= 2


# noise


def test_drawn_times_and_noise_have_their_moments():
    (_, t), eps = noisify(X_0[:500], generator=0)
    assert abs(t.mean() - 0.5) < 4 * 0.2887 / 500**0.5
    assert 0.001 <= t.min() < 0.02
    assert 0.98 < t.max() <= 0.999
    assert abs(eps.std() - 1) < 4 * (2 * eps.numel()) ** -0.5
    assert abs(eps.mean()) < 4 * eps.numel() ** -0.5


def parts(out):
    (x, t), eps = out
    return x, t, eps


def test_noise_belongs_to_its_image():
    many, few = parts(noisify(X_0[:5], generator=seeded(1))), noisify(X_0[:3], generator=seeded(1))
    for a, b in zip(many, parts(few), strict=True):
        assert torch.equal(a[:3], b)
    last, all_ = noisify(X_0[2:3], generator=[2]), noisify(X_0[:3], generator=[0, 1, 2])
    for a, b in zip(parts(all_), parts(last), strict=True):
        assert torch.equal(a[2:], b)


def test_noise_is_new_without_a_generator():
    state = torch.get_rng_state()
    assert not torch.equal(noisify(X_0[:2])[1], noisify(X_0[:2])[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noisify(X_0[:2], generator=1)[1], noisify(X_0[:2], generator=2)[1])


def test_noise_is_that_of_the_samplers():
    assert torch.equal(randn((3, 4), seeded(5)), karras.randn((3, 4), seeded(5)))
    assert torch.equal(randn((3, 4), 7), randn((3, 4), seeded(7)))


def test_ends_of_time():
    assert torch.equal(noisify(X_0[:2], 0.0)[0][0], X_0[:2])
    (x, t), eps = noisify(X_0[:2], 1.0)
    assert_close(x, eps, atol=1e-6, rtol=0)
    assert torch.equal(t, torch.ones(2))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x, t, eps = parts(noisify(X_0[:2].to(dtype), torch.tensor([0.3, 0.4])))
    assert x.dtype == eps.dtype == dtype
    assert t.dtype == torch.promote_types(dtype, torch.float32)
    assert denoisify(x, eps, 0.5).dtype == dtype


def test_any_shape():
    assert noisify(torch.zeros(4, 7), 0.5)[0][0].shape == (4, 7)
    assert denoisify(torch.zeros(3, 5), torch.ones(3, 5), torch.rand(3)).shape == (3, 5)


@pytest.mark.parametrize('t', [0.0, 0.001, 0.5, 0.9])
def test_denoisify_inverts(t):
    x, eps = randn((4, 1, 8, 8), 0), randn((4, 1, 8, 8), 1)
    back = denoisify(_mix(x, eps, torch.tensor(t)), eps, t)
    assert_close(back, x, atol=1e-5, rtol=1e-5)


# samplers


def variance(n, eta, v=0.25):
    "Of the samples: the mean of x' given x_0 and x, averaged over x_0 given x, step by step."
    out, ts = 1.0, [0.999 * (1 - i / n) * math.pi / 2 for i in range(n + 1)]
    for p, q in pairwise(ts):
        known = math.cos(p) * v / (math.cos(p) ** 2 * v + math.sin(p) ** 2)  # E[x_0 | x] = known*x
        eps = (1 - math.cos(p) * known) / math.sin(p)
        fresh = eta**2 * math.sin(q) ** 2 * math.sin(p - q) * math.sin(p + q)
        fresh /= math.sin(p) ** 2 * math.cos(q) ** 2
        out = out * (math.cos(q) * known + math.sqrt(math.sin(q) ** 2 - fresh) * eps) ** 2 + fresh
    return out


@pytest.mark.parametrize('n', [10, 200])
@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_variance_of_samples(n, eta):
    x = ddim(one, (64, 1, 32, 32), n_steps=n, eta=eta, generator=seeded(4), clip=None)
    assert abs(x.var() / variance(n, eta) - 1) < 5 * (2 / 65536) ** 0.5


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_variance_tends_to_that_of_the_data(eta):
    assert abs(variance(2000, eta) - 0.25) < 0.002


def test_variance_of_ddpm():
    x = ddpm(one, (64, 1, 32, 32), n_steps=200, generator=seeded(4), clip=None)
    assert abs(x.var() / variance(200, 1.0) - 1) < 5 * (2 / 65536) ** 0.5


def betas(n):
    ts = times(n).flip(0)
    return (1 - abar(ts[1:]) / abar(ts[:-1])).flatten().tolist()


@pytest.mark.parametrize('eta', [0.0, 0.3, 0.7])
def test_ddim_of_diffusers(eta):
    n, generators = 20, [seeded(i) for i in range(4)]
    scheduler = DDIMScheduler(n, trained_betas=betas(n), clip_sample=False)
    scheduler.set_timesteps(n)
    x, ts = randn((4, 1, 32, 32), generators), times(n).flip(0)
    for i in scheduler.timesteps:
        noise = one(x, ts[i + 1].float().expand(4))
        x = scheduler.step(noise, i, x, eta=eta, generator=generators).prev_sample
    ours = ddim(one, (4, 1, 32, 32), n_steps=n, eta=eta, generator=[0, 1, 2, 3], clip=None)
    assert_close(ours, x, atol=2e-3, rtol=0)


def test_fresh_noise_has_the_variance_of_ddpm():
    scheduler, z = DDPMScheduler(10, trained_betas=betas(10)), torch.zeros(1, 1, 64, 64)
    for i, (t, t_next) in enumerate(pairwise(times(10).tolist()[:-1])):
        x = ddim_noisify(1.0, z, z, t, t_next, seeded(i))
        got = x.square().mean() / randn(z.shape, seeded(i)).square().mean()
        assert abs(got / scheduler._get_variance(9 - i) - 1) < 1e-4


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_right_estimates_get_the_right_noise(eta):
    eps = randn((50, 1, 32, 32), 1)
    x = ddim_noisify(eta, X_0[:50], eps, 0.6, 0.5, seeded(2)) - math.cos(0.25 * math.pi) * X_0[:50]
    assert abs(x.std() - math.sin(0.25 * math.pi)) < 0.01


def test_nothing_is_put_back_at_the_end():
    assert torch.equal(ddim_noisify(1.0, X_0[:2], X_0[:2], 0.1, 0.0), X_0[:2])


def test_close_times_keep_their_digits():
    p, q = (torch.tensor(o * math.pi / 2, dtype=torch.float64) for o in (0.01, 0.0099))
    z = torch.zeros(1, 1, 64, 64)
    got = ddim_noisify(1.0, z, z, 0.01, 0.0099, seeded(1)).std() / randn(z.shape, seeded(1)).std()
    want = q.sin() / p.sin() * (1 - (p.cos() / q.cos()) ** 2).sqrt()
    assert abs(got.item() - want.item()) < 1e-7


SAMPLERS = pytest.mark.parametrize('sampler', [ddpm, ddim])


@SAMPLERS
def test_image_alone_or_in_company(sampler):
    four, two = (sampler(one, (n, 1, 32, 32), n_steps=5, generator=seeded(1)) for n in (4, 2))
    assert_close(four[:2], two, atol=1e-4, rtol=0)
    alone = sampler(one, (1, 1, 32, 32), n_steps=5, generator=[2])
    three = sampler(one, (3, 1, 32, 32), n_steps=5, generator=[0, 1, 2])
    assert_close(alone, three[2:], atol=1e-4, rtol=0)


@SAMPLERS
def test_clip(sampler):
    def wide(x, t):
        return one(x, t, v=4.0)

    assert sampler(wide, (4, 1, 32, 32), n_steps=10, generator=0).abs().max() <= 1
    assert sampler(wide, (4, 1, 32, 32), n_steps=10, generator=0, clip=None).min() < -1


@SAMPLERS
def test_output(sampler):
    x = sampler(one, (3, 7), n_steps=2, generator=seeded(1))
    assert (x.shape, x.dtype, x.requires_grad) == ((3, 7), torch.float32, False)
    assert not torch.equal(x, sampler(one, (3, 7), n_steps=2, generator=seeded(2)))
    assert sampler(one, (0, 1, 8, 8), n_steps=2).shape == (0, 1, 8, 8)


@SAMPLERS
def test_network_of_diffusers_as_it_is(sampler):
    unet = fashion_unet(small=True).eval()
    wrapped = sampler(ContinuousDDPM(unet), (2, 1, 32, 32), n_steps=3, generator=0)
    assert torch.equal(sampler(unet, sz=(2, 1, 32, 32), n_steps=3, generator=0), wrapped)


@SAMPLERS
def test_any_network_with_a_sample(sampler):
    seen = []

    class Net(nn.Module):
        def forward(self, x, t):
            seen.append(t.max().item())
            return SimpleNamespace(sample=one(x, t / 1000))

    x = sampler(Net(), sz=(2, 1, 8, 8), n_steps=3, generator=0)
    assert_close(x, sampler(one, (2, 1, 8, 8), n_steps=3, generator=0), atol=1e-4, rtol=0)
    assert seen[1:] == pytest.approx([999, 666, 333], abs=0.1)  # the first tells what it is


def test_network_that_needs_labels():
    unet = fashion_unet(10, small=True)
    clear_errors.check(lambda: ddpm(unet, (1, 1, 32, 32), n_steps=1), 'n_classes=10')


@SAMPLERS
@pytest.mark.parametrize('value', [nan, inf])
def test_noise_that_is_not_finite(sampler, value):
    def bad(x, t):
        return x * (value if t[0] < 0.4 else 1)

    with pytest.raises(FloatingPointError, match=r'model: .* step 3, time 0.2497'):
        sampler(bad, (2, 1, 8, 8), n_steps=4)


# the network


def test_sizes():
    assert sum(p.numel() for p in fashion_unet(10, small=True).parameters()) == 2_537_441


def test_batch():
    model = ContinuousDDPM(Classes(), n_classes=10, drop=0.2)
    (x_t, t, y), target = model.batch(X_0, LABELS, seeded(1))
    assert abs((y == 10).float().mean() - 0.2) < 4 * (0.16 / 2000) ** 0.5
    assert torch.equal(y[y != 10], LABELS[y != 10])
    assert (x_t.shape, t.shape, target.shape) == (X_0.shape, (2000,), X_0.shape)
    parts = ((t - 0.001) / 0.998 * 2000).floor()
    assert parts.eq(torch.arange(2000)).float().mean() > 0.99
    a, s = _legs(t, x_t)
    assert_close(a * X_0 + s * target, x_t)
    assert abs(target.std() - 1) < 0.01


def test_target_v():
    kwargs = dict(n_classes=10)
    (x_t, t, _), eps = ContinuousDDPM(Classes(), **kwargs).batch(X_0[:50], LABELS[:50], seeded(1))
    _, v = ContinuousDDPM(Classes(), 'v', **kwargs).batch(X_0[:50], LABELS[:50], seeded(1))
    a, s = _legs(t, x_t)
    assert_close(a * x_t - s * v, X_0[:50], atol=1e-5, rtol=1e-5)
    assert_close(s * x_t + a * v, eps, atol=1e-5, rtol=1e-5)


def test_batch_belongs_to_its_generator():
    model, x = ContinuousDDPM(Classes(), n_classes=10), X_0[:8]
    state = torch.get_rng_state()
    first = model.batch(x, LABELS[:8], seeded(1))[1]
    assert torch.equal(model.batch(x, LABELS[:8], seeded(1))[1], first)
    assert torch.equal(model.batch(x, LABELS[:8], 1)[1], first)
    assert not torch.equal(model.batch(x, LABELS[:8], seeded(2))[1], first)
    assert not torch.equal(model.batch(x, LABELS[:8])[1], model.batch(x, LABELS[:8])[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('drop, n', [(0.0, 0), (1.0, 2000)])
def test_drop(drop, n):
    model = ContinuousDDPM(Classes(), n_classes=10, drop=drop)
    assert (model.batch(X_0, LABELS)[0][2] == 10).sum() == n


def test_batch_without_classes():
    assert ContinuousDDPM(Listens()).batch(X_0[:4])[0][2] is None


def test_what_the_network_is_told():
    net = Listens().half()
    model = ContinuousDDPM(net, n_classes=10)
    out = model(X_0[:3], torch.tensor([0.001, 0.5, 0.999]))
    assert (out.dtype, net.told[-1][0]) == (torch.float32, torch.float16)
    assert_close(net.told[-1][1], torch.tensor([1.0, 500.0, 999.0]))
    assert net.told[-1][2].tolist() == [10] * 3
    model(X_0[:3], torch.ones(3), 4)
    assert net.told[-1][2].tolist() == [4] * 3
    model(X_0[:3], torch.ones(3), torch.tensor([1, 2, 10]))
    assert net.told[-1][2].tolist() == [1, 2, 10]


def test_network_without_classes_gets_no_labels():
    net = Listens()
    ContinuousDDPM(net)(X_0[:2], torch.ones(2))
    assert net.told[-1][2] is None


@torch.no_grad()
def test_same_network_as_a_denoiser():
    net = fashion_unet(10, small=True).eval()
    x, t, y = randn((2, 1, 32, 32), 0), torch.tensor([0.3, 0.8]), torch.tensor([3, 10])
    a, s = _legs(t, x)
    ours = denoisify(x, ContinuousDDPM(net, 'v', 10)(x, t, y), t)
    D = CosineDenoiser(net, 'v', scale=1000)
    assert_close(ours, D(x / a, (s / a).flatten(), class_labels=y), atol=1e-5, rtol=1e-4)


# guidance

ONE_OF_EACH = [(1, 1), (1.0, 1), (0.0, 1), (2.0, 2), (torch.ones(4), 2)]


@pytest.mark.parametrize('w, evaluations', ONE_OF_EACH)
def test_evaluations(w, evaluations):
    CLASSES.nfe = 0
    ddpm(CLASSES.guided([0, 2, 2, 2], w), (4, 1, 8, 8), n_steps=3)
    assert CLASSES.nfe == evaluations * 3 * 4


@pytest.mark.parametrize('w', [0.0, 1.0, torch.ones(4)])
def test_weights_0_and_1(w):
    labels = torch.tensor([0, 2, 2, 2])
    sample = partial(ddpm, sz=(4, 1, 8, 8), n_steps=3, generator=1)
    told = labels if torch.is_tensor(w) or w else None
    assert_close(sample(CLASSES.guided(labels, w)), sample(lambda x, t: CLASSES(x, t, told)))


def test_guided_image_alone_or_in_company():
    model = CLASSES.guided(2, 2.0)
    four, two = (ddpm(model, (n, 1, 8, 8), n_steps=3, generator=0) for n in (4, 2))
    assert_close(four[:2], two)


def test_weight_as_a_tensor_of_one_number_counts_as_one():
    CLASSES.nfe = 0
    ddim(CLASSES.guided(1, torch.tensor(1.0)), (4, 1, 8, 8), n_steps=3)
    assert CLASSES.nfe == 12


# names, and what importing does


def test_names_of_the_lesson_that_live_in_the_lab():
    from cf_guidance.continuous import ImageEval, train
    from cf_guidance.lab import metrics, training

    assert ImageEval is metrics.ImageEval
    assert train is training.train
    assert not hasattr(continuous, 'nothing')


def test_import_changes_nothing():
    code = """
import matplotlib, sys, warnings
warnings.simplefilter('error')
rc = dict(matplotlib.rcParams)
import cf_guidance.continuous as c
assert dict(matplotlib.rcParams) == rc
assert not {'diffusers', 'accelerate'} & {*sys.modules}
c.aesthetics(**{'font.size': 5})
assert matplotlib.rcParams['font.size'] == 5
assert matplotlib.rcParams['image.cmap'] == 'gray'
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV)
    assert (r.returncode, r.stdout, r.stderr) == (0, '', '')


# bad input


def zeros(x, t):
    return torch.zeros_like(x)


MODEL = ContinuousDDPM(Classes(), n_classes=3)
SMALL = (2, 1, 8, 8)
IMAGES = torch.zeros(2, 1, 8, 8)
BAD = [
    (lambda: abar(None), 't'),
    (lambda: abar(2.0), 't'),
    (lambda: abar(nan), 't'),
    (lambda: abar('a'), 't'),
    (lambda: abar(True), 't'),
    (lambda: aesthetics(foo=1), 'foo'),
    (lambda: show_images([[1]]), 'x'),
    (lambda: show_images(torch.zeros(2, 2)), '(2, 2)'),
    (lambda: show_images(IMAGES * nan), 'x'),
    (lambda: show_images(IMAGES.byte()), 'uint8'),
    (lambda: show_images(IMAGES, titles=['a'] * 3), 'titles'),
    (lambda: show_images(IMAGES, titles=[1, 2]), 'titles'),
    (lambda: show_images(IMAGES, titles=5), 'titles'),
    (lambda: show_images(IMAGES, titles='ab'), 'titles'),
    (lambda: noisify(GREY[:2], 0.5), 'uint8'),
    (lambda: noisify(GREY[:2].numpy(), 0.5), 'ndarray'),
    (lambda: noisify(X_0[:2], 1.5), 'got 1.5'),
    (lambda: noisify(X_0[:2], 'a'), 't'),
    (lambda: noisify(X_0[:2], torch.rand(3)), '(3,)'),
    (lambda: noisify(X_0[:2], generator=[0]), 'generator'),
    (lambda: denoisify(X_0[:2], X_0[:2], 1.0), 't: expected times below 1'),
    (lambda: denoisify(X_0[:2], X_0[:2], torch.tensor([0.1, nan])), 'got nan'),
    (lambda: denoisify(X_0[:2], X_0[:1], 0.5), 'noise'),
    (lambda: denoisify(X_0[:2], None, 0.5), 'noise'),
    (lambda: denoisify(X_0[:2], X_0[:2], torch.rand(3)), '(3,)'),
    (lambda: ddim_noisify(2.0, X_0[:2], X_0[:2], 0.5, 0.4), 'eta'),
    (lambda: ddim_noisify(1.0, X_0[:2], X_0[:2], 0.4, 0.5), 't_next'),
    (lambda: ddim_noisify(1.0, X_0[:2], X_0[:2], 0.0, 0.0), 't_next'),
    (lambda: ddim_noisify(1.0, X_0[:2], X_0[:2], 0.5, 'a'), 't_next'),
    (lambda: ddim_noisify(1.0, X_0[:2], X_0[:2], 0.5, torch.zeros(2)), 't_next'),
    (lambda: ddim_noisify(1.0, X_0[:2], X_0[:1], 0.5, 0.4), 'noise_pred'),
    (lambda: ddim_noisify(1.0, X_0[:2], None, 0.5, 0.4), 'noise_pred'),
    (lambda: _to_images(torch.zeros(2, 28, 28)), 'float32'),
    (lambda: fashion_unet('a'), 'n_classes'),
    (lambda: fashion_unet(1.5), 'n_classes'),
    (lambda: fashion_unet(0), 'n_classes'),
    (lambda: ContinuousDDPM(None), 'net'),
    (lambda: ContinuousDDPM(Classes(), 'x'), 'prediction'),
    (lambda: ContinuousDDPM(Classes(), drop=1.5), 'drop'),
    (lambda: ContinuousDDPM(Classes(), drop=True), 'drop'),
    (lambda: MODEL.batch(X_0[:2], [0, -1]), 'labels'),
    (lambda: MODEL.batch(GREY[:2], [0, 1]), 'x_0'),
    (lambda: MODEL(X_0[:2], torch.tensor([500.0, 2.0])), 'got 500'),
    (lambda: MODEL(X_0[:2].tolist(), 0.5), 'x_t'),
    (lambda: MODEL(X_0[:2], 0.5, 7), 'labels'),
    (lambda: MODEL(X_0[:2], 0.5, [0] * 3), '(3,)'),
    (lambda: ContinuousDDPM(Listens())(X_0[:2], 0.5, 3), 'labels'),
    (lambda: ContinuousDDPM(Listens()).guided(1), 'classes'),
    (lambda: ddim(MODEL.guided([1, 2]), (3, 1, 8, 8)), 'labels'),
    *[(lambda o=o: MODEL.guided(o), 'labels') for o in (4, -1, [1.5, 2.0], [True], ['boot'], None)],
    *[(lambda o=o: MODEL.guided(1, o), 'w') for o in (nan, inf, None, 'a', True, [[1.0]])],
    (lambda: MODEL.guided([1, 2], torch.ones(3)), 'w'),
    *[(lambda o=o: show_images(IMAGES, ncols=o), 'ncols') for o in (-1, 0, 1.5, 'a', True)],
    *[(lambda o=o: show_images(IMAGES, scale=o), 'scale') for o in (0, -1, 1.5, 10**5)],
    *[(lambda o=o: times(o), 'n_steps') for o in (0, -1, 1.5, '2', True, None, 10**12)],
    *[
        (lambda o=o: ContinuousDDPM(Classes(), n_classes=o), 'n_classes')
        for o in (-1, 0, 1.5, True)
    ],
]
ETAS = [-0.1, 1.1, nan, True, 'a', None, torch.ones(2)]
BAD += [(lambda o=o: ddim(zeros, SMALL, eta=o), 'eta') for o in ETAS]
BAD += [(lambda o=o: ddim(zeros, SMALL, noisify=o), 'noisify') for o in (5, None)]
for f in (ddpm, ddim):
    BAD += [(lambda f=f, o=o: f(o, SMALL), 'model') for o in (None, 5, 'a')]
    BAD += [
        (lambda f=f, o=o: f(zeros, o), 'sz') for o in ((), None, 'ab', 5, (2, 1, -1, 8), (2, 1.5))
    ]
    BAD += [(lambda f=f, o=o: f(zeros, SMALL, device=o), 'device') for o in ('foo', 1.5)]
    BAD += [(lambda f=f, o=o: f(zeros, SMALL, n_steps=o), 'n_steps') for o in (0, 1.5, True)]
    BAD += [
        (lambda f=f, o=o: f(zeros, SMALL, clip=o), 'clip') for o in (nan, 0, -1, inf, True, 'a')
    ]
    BAD += [
        (lambda f=f, o=o: f(zeros, SMALL, generator=o), 'generator') for o in (0.3, 'a', [1], True)
    ]
    BAD += [
        (lambda f=f: f(lambda x, t: x[:, :0], SMALL), 'model: expected noise of shape'),
        (lambda f=f: f(lambda x, t: None, SMALL), 'NoneType'),
    ]


@pytest.mark.parametrize('call, argument', BAD)
def test_bad_input(call, argument):
    clear_errors.check(call, argument)
