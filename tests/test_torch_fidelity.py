"""Against torch-fidelity: its FID, KID, precision and recall, and ours, of the same features.

Optional: `pip install --no-deps torch-fidelity`. Of it, the files of the metrics are read.
"""

import importlib
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from cf_guidance.lab.fashion import fashion_mnist, load_net
from cf_guidance.lab.metrics import ImageEval, Stats, fid, kid, mmd2, precision_recall

sys.path.append(str(ROOT / 'benchmarks'))
bench = importlib.import_module('metrics')
clouds, their_fid, their_kid = bench.clouds, bench.their_fid, bench.their_kid

tf = bench.torch_fidelity()
if tf is None:
    pytest.skip(
        'torch-fidelity is not installed: pip install --no-deps torch-fidelity',
        allow_module_level=True,
    )


def photographs():
    "FashionNet features of images that were spoilt by noise, and of others that were not"
    grey = fashion_mnist()[0][torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    x = torch.nn.functional.pad(grey[:, None].float() / 127.5 - 1, (2, 2, 2, 2), value=-1)
    ie = ImageEval(x[1000:])
    return ie.get_features(
        x[:1000] + 0.1 * torch.randn(1000, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    ), ie.real


@pytest.fixture(scope='module', params=['photographs', 'wide', 'shifted', 'uneven'])
def sides(request):
    if request.param == 'photographs':
        return photographs()
    x, ref = clouds(1500, 256 if request.param == 'wide' else 48)
    if request.param == 'uneven':
        return x[:700], ref
    return (x, ref) if request.param == 'wide' else (x + 3, 1.5 * ref)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=0)


def test_fid(sides):
    theirs = their_fid(tf, *(o.double() for o in sides))
    assert theirs > 0.01
    close(fid(*sides), theirs)
    close(fid(*(Stats(o) for o in sides)), theirs)


def test_statistics(sides):
    for o in sides:
        want, got = tf.fid.fid_features_to_statistics(o.double()), Stats(o)
        close(got.mean, want['mu'])
        np.testing.assert_allclose(got.cov, want['sigma'], rtol=1e-8, atol=1e-12)


def test_kid_of_the_same_subsets(sides):
    "Its default is 100 subsets of 1,000; these are 20 of 500, chosen as it chooses them"
    x, ref = (o.double() for o in sides)
    rng = np.random.RandomState(2020)
    each = [mmd2(*(o[rng.choice(len(o), 500, replace=False)] for o in (x, ref))) for _ in range(20)]
    mean, std = their_kid(tf, x, ref, kid_subsets=20, kid_subset_size=500, rng_seed=2020)
    close((np.mean(each), np.std(each)), (mean, std))


def test_kid(sides):
    "Other subsets: the means agree to their standard errors, and the spreads are alike"
    x, ref = (o.double() for o in sides)
    ours, theirs = (
        kid(x, ref, size=300),
        their_kid(tf, x, ref, kid_subsets=100, kid_subset_size=300),
    )
    assert abs(ours.mean - theirs[0]) < 4 * (ours.std**2 + theirs[1] ** 2) ** 0.5 / 10
    assert 0.7 < ours.std / theirs[1] < 1.4


def test_kid_of_everything(sides):
    n = min(map(len, sides))
    x, ref = (o[:n].double() for o in sides)
    theirs = their_kid(tf, x, ref, kid_subsets=1, kid_subset_size=n)[0]
    close(mmd2(x, ref), theirs)
    close(kid(x, ref, size=n, subsets=2).mean, theirs)


@pytest.mark.parametrize('k', [1, 3, 5])
def test_precision_and_recall(sides, k):
    x, ref = (o.double() for o in sides)
    theirs = bench.their_prc(tf, x, ref, prc_neighborhood=k, save_cpu_ram=k == 5)
    close(precision_recall(x, ref, k), theirs)


def test_precision_and_recall_are_between_0_and_1_somewhere():
    p, r = precision_recall(*photographs())
    assert 0.1 < p < 0.95 and 0.1 < r < 0.95


def test_the_classifier_is_the_embedded_net():
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(ImageEval(x).real, load_net().features(x))
