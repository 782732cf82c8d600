"The Gaussian mixture against torch's distributions, closed forms and scipy; bad input."

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from closed_forms import autoguided_ode, cfg_ode, gaussian_ode, guided_gaussian, solve
from torch.testing import assert_close

from cf_guidance import karras
from cf_guidance.karras import get_sigmas_karras
from cf_guidance.toy import GaussianMixture, galaxy, plot_density
from cf_guidance.transforms import cfg

nan, inf = float('nan'), math.inf
close, same = partial(assert_close, rtol=1e-8, atol=1e-8), partial(assert_close, rtol=0, atol=0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


COVS = [[[0.5, 0.3], [0.3, 0.4]], [[0.1, 0], [0, 0.4]], [[0.3, -0.1], [-0.1, 0.1]]]
GM = GaussianMixture([[-1.0, 0], [1, 0], [0, 2]], COVS, [0.5, 0.2, 0.3], classes=[0, 0, 1])
STARS = galaxy()
X = torch.randn(4, 2, generator=seeded(7))


# in three dimensions, where a mistake in the axes cannot hide

A = normal(2, 3, 3)
COVS3, CENTRES = A @ A.mT + 0.1 * torch.eye(3), normal(2, 3, seed=1)
SOLID = GaussianMixture(CENTRES, COVS3, [0.3, 0.7])
X3 = SOLID.sample(6, 2, sigma=0.5)


def reference(x):
    normals = torch.distributions.MultivariateNormal(CENTRES, COVS3 + 0.5**2 * torch.eye(3))
    return (SOLID.log_weights + normals.log_prob(x[:, None])).logsumexp(1)


def test_density_of_torch():
    assert_close(SOLID.logp(X3, 0.5), reference(X3))


def test_score_is_its_gradient():
    x = X3.clone().requires_grad_()
    assert_close(SOLID.score(X3, 0.5), torch.autograd.grad(reference(x).sum(), x)[0])


def test_tweedie():
    assert_close(SOLID(X3, 0.5), X3 + 0.5**2 * SOLID.score(X3, 0.5))


def test_covariance_of_samples():
    n, true = 100_000, COVS3[0]
    error = ((true**2 + true.diag()[:, None] * true.diag()) / n).sqrt()
    assert ((SOLID.sample(n, 3, 0).T.cov() - true).abs() < 3 * error).all()


def test_share_of_components():
    def below(z):
        return torch.special.ndtr(torch.tensor(z, dtype=torch.float64))

    parts = (0.5, 0, 0.4), (0.2, 0, 0.4), (0.3, 2, 0.1)
    p, n = sum(w * below((m - 1.4) / v**0.5) for w, m, v in parts), 100_000
    share = (GM.sample(n, 1)[:, 1] > 1.4).double().mean()
    assert abs(share - p) < 3 * (p * (1 - p) / n) ** 0.5


# samples


def test_samples_repeat():
    labels = torch.tensor([0, 1, 1, -1, 0])
    same(GM.sample(5, 3, labels), GM.sample(5, seeded(3), labels))


def test_samples_without_a_seed_are_new():
    assert not torch.equal(GM.sample(5), GM.sample(5))


def test_no_samples():
    assert GM.sample(0, 0).shape == (0, 2)


# labels, levels, shapes and types


@pytest.mark.parametrize('label', [0, 1])
def test_one_label_for_all(label):
    same(GM(X, 0.5, labels=label), GM(X, 0.5, labels=torch.full((4,), label)))


def test_all_classes():
    same(GM(X, 0.5, labels=-1), GM(X, 0.5))


def test_a_sample_depends_on_itself():
    mixed = GM(X, torch.tensor([0.1, 1, 3, 9]), torch.tensor([0, 1, -1, 0]))
    assert_close(mixed[2:3], GM(X[2:3], 3.0))


def test_an_empty_batch():
    assert GM(X[:0], 1.0).shape == (0, 2)


def test_prior_of_labels():
    want = torch.tensor([[5 / 7, 2 / 7, 0], [0, 0, 1], [0.5, 0.2, 0.3]], dtype=torch.float64)
    assert_close(GM._log_prior(torch.tensor([0, 1, -1]), 3).exp(), want)


@pytest.mark.parametrize('f', [lambda x: GM(x, 1.0), GM.score, GM.logp], ids=['D', 'score', 'logp'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_types(f, dtype):
    assert f(X.to(dtype)).dtype == dtype


def test_float32_is_rounded_float64():
    same(GM(X, 1.0), GM(X.double(), 1.0).float())


def test_a_mixture_in_float32():
    low = copy.deepcopy(GM).float()
    assert low.means.dtype == torch.float32
    assert_close(low(X, 1.0), GM(X, 1.0))


@pytest.mark.parametrize('again', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(again):
    same(again(GM)(X, 1.0), GM(X, 1.0))


def test_a_missing_attribute_is_named():
    with pytest.raises(AttributeError, match="'GaussianMixture' object has no attribute 'no_such'"):
        print(GM.no_such)


def test_range():
    assert (GM.sigma_min, GM.sigma_max, STARS.sigma_max) == (0.002, 80.0, 10.0)


def test_schedule():
    assert len(GM.get_sigmas_karras(5)) == 6


def test_every_level_is_allowed():
    assert GM.sigma_to_t(X) is X
    assert GM.quantize_sigma(X) is X


FLAT = GaussianMixture(torch.zeros(2, 48), [0.5, 2.0], classes=[0, 1])
IMAGES = normal(3, 3, 4, 4)


@pytest.mark.parametrize('name', ['score', 'forward', 'logp'])
def test_one_variance_is_a_multiple_of_the_identity(name):
    covs = torch.eye(48) * torch.tensor([0.5, 2.0])[:, None, None]
    full = GaussianMixture(torch.zeros(2, 48), covs, classes=[0, 1])
    assert_close(getattr(FLAT, name)(IMAGES, 1.0), getattr(full, name)(IMAGES, 1.0))


def test_images():
    assert_close(FLAT(IMAGES, 2.0, labels=0), IMAGES * 0.5 / 4.5)


def test_density_of_images():
    wide = torch.distributions.Normal(0.0, torch.tensor(4.5).double().sqrt())
    assert_close(FLAT.logp(IMAGES, 2.0, 0), wide.log_prob(IMAGES).flatten(1).sum(1))


def test_numbers():
    assert_close(GaussianMixture([[0.0]])(torch.ones(4), 1.0), torch.full((4,), 0.5))


def test_loss_is_the_posterior_variance():
    x0, noise, want = FLAT.sample(20_000, 4, 0), normal(20_000, 48, seed=5), 0.5 * 4 / 4.5
    got = FLAT.loss(x0, noise, torch.full((20_000,), 2.0), labels=0).mean()
    assert abs(got - want) < 3 * want * (2 / 48 / 20_000) ** 0.5


FAR = torch.tensor([[1e12, 0.0], [-1e12, 1e3], [0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize('sigma', [0.0, 1e-12, 1e-3, 1e6, 1e12])
@pytest.mark.parametrize('f', [GM.logp, GM.score, GM], ids=['logp', 'score', 'D'])
def test_far_away(f, sigma):
    assert f(FAR, sigma).isfinite().all()


def test_much_noise_leaves_the_mean():
    assert_close(GM(FAR[2:], 1e9), (GM.log_weights.exp() @ GM.means)[None])


def test_hardly_any_noise_leaves_x():
    assert ((GM(FAR, 1e-12) - FAR).norm(dim=1) < 1e-15 * FAR.norm(dim=1) + 1e-15).all()


def test_score_far_away():
    assert GM.score(FAR, 1e3)[0, 0].item() == pytest.approx(-1e12 / (1e6 + 0.44), rel=1e-6)


# exact paths

MU = torch.tensor([[1.0, -1], [0.2, 0.5]], dtype=torch.float64)
C = torch.tensor(COVS[0], dtype=torch.float64)
START = 9 * normal(5, 2, seed=2)


def guided(pos, neg, w):
    return lambda x, s: w * pos.score(x, s) + (1 - w) * neg.score(x, s)


@pytest.mark.parametrize('a,b', [(9.0, 0.0), (0.1, 9.0)])
def test_gaussian_ode(a, b):
    D = GaussianMixture(MU[:1], C)
    close(gaussian_ode(START, a, b, MU[0], C), solve(D.score, START, a, b))


def test_gaussian_ode_in_three_dimensions():
    x, score = 9 * normal(5, 3, seed=3), partial(SOLID.score, labels=0)
    close(gaussian_ode(x, 9.0, 0.0, CENTRES[0], COVS3[0]), solve(score, x, 9.0, 0.0))


@pytest.mark.parametrize('w', [0.0, 1.0, 3.0])
def test_cfg_ode(w):
    pos, neg = GaussianMixture(MU[:1], C), GaussianMixture(MU[1:], C)
    close(cfg_ode(START, 9.0, 0.0, *MU, C, w), solve(guided(pos, neg, w), START, 9.0, 0.0))


@pytest.mark.parametrize('w', [0.0, 1.0, 3.0])
def test_autoguided_ode(w):
    pos, neg = GaussianMixture(MU[:1], 0.3), GaussianMixture(MU[:1], 0.7)
    got = autoguided_ode(START, 9.0, 0.0, MU[0], 0.3, 0.7, w)
    close(got, solve(guided(pos, neg, w), START, 9.0, 0.0))


def test_guided_gaussian():
    wide = C + torch.tensor([[0.4, -0.1], [-0.1, 0.4]])
    m, cov = guided_gaussian(MU[0], C, MU[1], wide, 2.5, sigma=0.3)
    both = guided(GaussianMixture(MU[:1], C), GaussianMixture(MU[1:], wide), 2.5)
    close(GaussianMixture(m[None], cov).score(START), both(START, 0.3))


def test_guided_gaussian_in_three_dimensions():
    x, (pos, neg) = normal(5, 3, seed=3), (COVS3[0], 2 * COVS3[0])
    m, cov = guided_gaussian(CENTRES[0], pos, CENTRES[1], neg, 2.5, sigma=0.3)
    other = GaussianMixture(CENTRES[1:], neg).score(x, 0.3)
    close(GaussianMixture(m[None], cov).score(x), 2.5 * SOLID.score(x, 0.3, 0) - 1.5 * other)


# samplers find them


def schedule(n, lo=0.1, hi=10.0):
    return get_sigmas_karras(n + 1, lo, hi, concat_zero=False)


def test_samplers_find_cfg():
    two = GaussianMixture(MU, C)
    x = two.sample(50, 0, sigma=10.0)
    got = karras.sample(lambda x, s: cfg(two(x, s, 1), two(x, s, 0), 3.0), x, schedule(200))
    assert_close(got, cfg_ode(x, 10.0, 0.1, *MU, C, 3.0), rtol=0, atol=1e-3)


def test_samplers_find_autoguidance():
    sharp, blurred = GaussianMixture(MU[:1], 0.3), GaussianMixture(MU[:1], 0.7)
    x = sharp.sample(50, 0, sigma=10.0)
    got = karras.sample(lambda x, s: cfg(blurred(x, s), sharp(x, s), 3.0), x, schedule(200))
    assert_close(got, autoguided_ode(x, 10.0, 0.1, MU[0], 0.3, 0.7, 3.0), rtol=0, atol=1e-3)


def test_error_of_the_last_step_is_quadratic():
    x = GM.sample(64, 0, sigma=10.0)
    end = solve(GM.score, x, 10.0, 0.0)
    errors = [
        (karras.sample(GM, x, get_sigmas_karras(256, lo, 10.0)) - end).pow(2).mean().sqrt()
        for lo in (0.1, 0.05)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize('step,options', [('ddpm_step', {}), ('ddim_step', dict(eta=1.0))])
def test_ddpm_is_the_ancestral_sampler(step, options):
    x = GM.sample(8, 0, sigma=10.0)
    want = karras.sample(GM, x, schedule(20), karras.euler_ancestral, generator=1)
    got = karras.sample(GM, x, schedule(20), getattr(karras, step), generator=1, **options)
    close(got, want)


def test_paths_end_in_the_galaxy():
    x = STARS.sample(60, 5, sigma=1.5)
    ode = karras.sample(STARS, x, get_sigmas_karras(60, 0.01, 1.5))
    assert (STARS.logp(ode, 0.01) > -5).all()


def test_guidance_of_the_galaxy():
    "What the page says of CFG and autoguidance, in mean log density"
    weak, label = galaxy(blur=0.15), torch.zeros(300, dtype=torch.long)
    x, sigmas = 10 * normal(300, 2), get_sigmas_karras(24, 0.01, 10.0)

    def density(neg, w):
        def D(x, s):
            return cfg(neg(x, s), STARS(x, s, label), w)

        return STARS.logp(karras.sample(D, x, sigmas), 0.0, 0).mean()

    def of_class(x, s):
        return weak(x, s, label)

    assert density(STARS, 4.0) < density(STARS, 2.0) < density(STARS, 1.0)
    assert density(of_class, 1.0) < density(of_class, 2.0) < density(of_class, 4.0)


# quality


def test_quality_of_true_samples():
    q = STARS.quality(STARS.sample(2000, 3, 0), STARS.sample(2000, 4, 0), 0)
    assert q.logp == pytest.approx(0.33, abs=0.1)
    assert q.outside == pytest.approx(0.01, abs=0.008)
    assert q.covered > 0.98


def test_quality_by_hand():
    gm = GaussianMixture(torch.zeros(1, 2))
    true = torch.tensor([[0.0, 0], [1, 0], [0, 2], [3, 0]])
    q = gm.quality(torch.tensor([[0.0, 0.05], [9, 9]]), true)
    assert q[1:] == (0.5, 0.25)
    assert gm.quality(true, true, radius=1.5).covered == 1.0


# pictures


def image(**kw):
    return plot_density(STARS, **kw).images[0]


def test_picture():
    assert image().get_array().shape == (121, 121)
    assert tuple(image().get_extent()) == (-2, 2, -2, 2)


@pytest.mark.parametrize('kw,name', [({}, 'Greys'), (dict(cmap='Reds'), 'Reds')])
def test_colours(kw, name):
    assert image(**kw).get_cmap().name == name


def test_the_right_way_up():
    p = plot_density(GaussianMixture([[1.0, -0.5]], 0.01)).images[0].get_array()
    assert np.unravel_index(p.argmax(), p.shape) == (45, 90)  # row: y from below, column: x


# bad input


def of(f, *args, **kw):
    return lambda: f(*args, **kw)


ONE, PAIR, POINTS = [[0.0, 0]], [[0.0, 0], [1, 1]], torch.zeros(3, 2)
BAD = {
    'means text': (of(GaussianMixture, 'a'), TypeError, "means: .* got 'a'"),
    'means shape': (of(GaussianMixture, [0.0, 0]), ValueError, r'means: .* got \(2,\)'),
    'means empty': (of(GaussianMixture, torch.zeros(0, 2)), ValueError, r'means: .* got \(0, 2\)'),
    'means nan': (of(GaussianMixture, [[0.0, nan]]), ValueError, 'means: .* got nan'),
    'covs text': (of(GaussianMixture, ONE, 'a'), TypeError, "covs: .* got 'a'"),
    'covs shape': (of(GaussianMixture, ONE, [1.0, 2, 3]), ValueError, r'covs: .* got \(3,\)'),
    'covs 0': (of(GaussianMixture, ONE, 0.0), ValueError, 'covs: .* got 0'),
    'covs negative': (of(GaussianMixture, PAIR, [1.0, -2.0]), ValueError, 'covs: .* got -2'),
    'covs nan': (of(GaussianMixture, ONE, nan), ValueError, 'covs: .* got nan'),
    'covs lopsided': (
        of(GaussianMixture, ONE, [[1.0, 0.5], [0, 1]]),
        ValueError,
        'covs: expected symmetric matrices, got entries 0.5 apart',
    ),
    'covs singular': (of(GaussianMixture, ONE, [[1.0, 1], [1, 1]]), ValueError, 'covs: .*positive'),
    'weights text': (of(GaussianMixture, PAIR, weights='ab'), TypeError, "weights: .* got 'ab'"),
    'weights 0': (of(GaussianMixture, PAIR, weights=[1.0, 0.0]), ValueError, 'weights: .*sum 1'),
    'weights sum': (of(GaussianMixture, PAIR, weights=[0.5, 0.6]), ValueError, 'weights: .*sum 1'),
    'weights many': (of(GaussianMixture, ONE, weights=[0.5, 0.5]), ValueError, 'weights: '),
    'classes': (of(GaussianMixture, ONE, classes=[0.5]), ValueError, r'classes: .* got \[0.5\]'),
    'classes negative': (of(GaussianMixture, ONE, classes=[-1]), ValueError, r'classes: .*\[-1\]'),
    'classes text': (of(GaussianMixture, ONE, classes='a'), TypeError, "classes: .* got 'a'"),
    'sigma_min': (of(GaussianMixture, ONE, sigma_min='a'), TypeError, "sigma_min: .* got 'a'"),
    'sigma_max': (of(GaussianMixture, ONE, sigma_max=inf), ValueError, 'sigma_max: .* got inf'),
    'range': (of(GaussianMixture, ONE, sigma_min=2, sigma_max=1), ValueError, 'sigma_max: .*=2'),
    'x shape': (of(GM, torch.zeros(3, 5), 1.0), ValueError, r'x: .* got shape \(3, 5\)'),
    'x number': (of(GM.logp, torch.tensor(1.0)), TypeError, 'x: '),
    'x nan': (of(GM, torch.full((3, 2), nan), 1.0), ValueError, 'x: .*NaN'),
    'sigma shape': (of(GM, POINTS, torch.ones(2)), ValueError, r'sigma: .* got shape \(2,\)'),
    'sigma nan': (of(GM.score, POINTS, nan), ValueError, 'sigma: .* got nan'),
    'sigma negative': (of(GM, POINTS, -1.0), ValueError, 'sigma: .* got -1'),
    'sigma text': (of(GM, POINTS, 'a'), TypeError, "sigma: .* got 'a'"),
    'sigma None': (of(GM, POINTS, None), TypeError, 'sigma: .* got None'),
    'labels shape': (of(GM.logp, POINTS, 1.0, torch.zeros(2)), ValueError, 'labels: .* shape'),
    'labels unknown': (
        of(GM, POINTS, 1.0, labels=torch.tensor([0, 1, 7])),
        ValueError,
        r'labels: expected one of \[0, 1\], or -1 for all, got 7',
    ),
    'labels text': (of(GM, POINTS, 1.0, 'a'), TypeError, "labels: .* got 'a'"),
    'sample labels': (of(GM.sample, 3, 0, labels=5), ValueError, 'labels: .* got 5'),
    'sample text': (of(GM.sample, 'a', 0), TypeError, "n: .* got 'a'"),
    'sample float': (of(GM.sample, 1.5, 0), TypeError, 'n: .* got 1.5'),
    'sample negative': (of(GM.sample, -1, 0), ValueError, 'n: .* got -1'),
    'sample generator': (of(GM.sample, 3, 'a'), TypeError, "generator: .* got 'a'"),
    'sample sigma': (of(GM.sample, 2, 0, sigma=-1), ValueError, 'sigma: .* got -1'),
    'no samples': (of(GM.quality, POINTS[:0], POINTS), ValueError, 'x and true: .* each'),
    'arms 0': (of(galaxy, arms=0), ValueError, 'arms: .* got 0'),
    'arms float': (of(galaxy, arms=2.5), TypeError, 'arms: .* got 2.5'),
    'arms text': (of(galaxy, arms='a'), TypeError, "arms: .* got 'a'"),
    'knots': (of(galaxy, knots=1), ValueError, 'knots: .* got 1'),
    'turn': (of(galaxy, turn=inf), ValueError, 'turn: .* got inf'),
    'blur nan': (of(galaxy, blur=nan), ValueError, 'blur: .* got nan'),
    'blur text': (of(galaxy, blur='a'), TypeError, "blur: .* got 'a'"),
    'plot 1-d': (of(plot_density, GaussianMixture([[0.0]])), ValueError, 'gm: .*two dimensions'),
    'plot None': (of(plot_density, None), ValueError, 'gm: .* got None'),
    'extent 0': (of(plot_density, STARS, extent=0), ValueError, 'extent: .* got 0'),
    'extent -2': (of(plot_density, STARS, extent=-2), ValueError, 'extent: .* got -2'),
    'extent text': (of(plot_density, STARS, extent='a'), TypeError, "extent: .* got 'a'"),
}


@pytest.mark.parametrize('call,error,message', BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as e:
        call()
    assert len(str(e.value)) < 160
