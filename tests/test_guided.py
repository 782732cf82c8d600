"Guided denoisers: weights, negatives, terms, runs, costs, and what must raise."

import copy
import inspect
import math
import pickle
import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

from cf_guidance import karras
from cf_guidance.denoisers import Denoiser, DiscreteDenoiser, FlowDenoiser, from_x0, to_x0
from cf_guidance.guided import (
    Called,
    Conditions,
    GuidedDenoiser,
    History,
    Microbatched,
    Model,
    Negative,
    Queries,
    Query,
    Term,
    Weight,
    ZeroInit,
)
from cf_guidance.karras import get_sigmas_karras, on_sigmas, sample, samples
from cf_guidance.noise import randn, split_generator
from cf_guidance.perturb import Change
from cf_guidance.toy import GaussianMixture
from cf_guidance.transforms import (
    GuidanceTfm,
    apg,
    base_norm,
    beta_cfg,
    cfg,
    epsilon_scaling,
    full_norm,
    post_rule,
    rescale,
    rule,
    t_norm,
    tcfg,
    tsr,
)

# --- a denoiser to test with: one number per sample is its condition ---


def toy(x, sigma, c):
    s2 = sigma.view(-1, *(1,) * (x.ndim - 1)) ** 2
    c = c.view(-1, *(1,) * (x.ndim - 1))
    return (x + s2 * torch.tanh(c + 0.3 * x)) / (1 + s2)


class Counted:
    "A denoiser that notes how many rows each forward has."

    def __init__(self, inner=toy):
        self.inner, self.rows = inner, []

    def __call__(self, x, sigma, **cond):
        self.rows.append(len(x))
        return self.inner(x, sigma, **cond)


def weaker(x, sigma, c):
    return 0.8 * toy(x, sigma, c)


X = randn((6, 4), 0) * 2
C = dict(c=torch.linspace(-1.1, 1.5, 6))
NONE = dict(c=torch.zeros(1))
OTHER = dict(c=torch.full((1,), -2.0))
S1 = torch.ones(6)
POS, NEG = toy(X, S1, **C), toy(X, S1, **NONE)
BAD = toy(X, S1, **OTHER)
SIGMAS = get_sigmas_karras(8, 0.1, 10.0)


def close(a, b, tol=1e-5):
    "The same shape, type and numbers."
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def rows(cond, i):
    return {k: v if len(v) == 1 else v[i] for k, v in cond.items()}


def euler_loop(G, x, sigmas, cond=C):
    "A loop of somebody else: it knows neither `start` nor `step`."
    for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = x + (x - G(x, torch.full((len(x),), a), **cond)) / a * (b - a)
    return x


def heun_loop(G, x, sigmas, cond=C):
    for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        d = (x - G(x, torch.full((len(x),), a), **cond)) / a
        y = x + d * (b - a)
        if b:
            d = (d + (y - G(y, torch.full((len(x),), b), **cond)) / b) / 2
        x = x + d * (b - a)
    return x


class Noisy(Queries):
    "Another condition at each evaluation."

    draws = True

    def __init__(self, generator=None):
        self.generator = generator

    def queries(self, x, sigma, cond, generators=None):
        c = torch.cat([torch.randn(1, generator=g) for g in generators])
        return [Query(x, sigma, dict(c=c))]


class CalledNoisy(Called):
    "The same as a function: it gets the generators of the rows that it is called for."

    draws = True

    def __init__(self, generator=None):
        self.generator = generator

    def __call__(self, D, x, sigma, cond, pos=None, rows=None, generators=None, seen=None):
        return D(x, sigma, c=torch.cat([torch.randn(1, generator=g) for g in generators]))


class Mean(Queries):
    "The mean prediction under several conditions."

    def __init__(self, *conds):
        self.conds, self.nfe = [Conditions(c) for c in conds], len(conds)

    def queries(self, x, sigma, cond, generators=None):
        return [q for c in self.conds for q in c.queries(x, sigma, cond)]

    def combine(self, outputs, x, sigma, pos):
        return sum(outputs) / len(outputs)


@rule('x0', stateful=True)
def momentum(neg, pos, w, state=None, *, beta=0.5):
    delta = pos - neg if state is None else pos - neg + beta * state
    return pos + (w - 1) * delta, delta


class Mixed(History):
    "The mean of the prediction before and its memory."

    def recall(self, memory, pred, x, sigma):
        return memory

    def remember(self, memory, pred, x, sigma):
        return pred if memory is None else (pred + memory) / 2


REMEMBERING = {
    'stop': dict(neg=NONE, w=3.0, stop=0.9),
    'apg': dict(neg=NONE, w=3.0, rule=apg),
    'every': dict(neg=NONE, w=3.0, every=3),
    'history': dict(neg=Mixed(), w=3.0),
    'draws': dict(neg=Noisy(5), w=3.0),
    'called draws': dict(neg=CalledNoisy(5), w=3.0),
}


def remembering(name, D=toy):
    kw = dict(REMEMBERING[name])
    return GuidedDenoiser(D, kw.pop('neg'), **kw)


# --- it is exact ---


def test_gaussian_of_one_covariance():
    def gaussian(x, sigma, mean):
        return mean + (x - mean) * (0.25 / (0.25 + sigma**2)).view(-1, 1)

    mean = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]).expand(6, 4)
    sigma = torch.tensor([0.1, 0.5, 2.0, 9.0, 1.0, 1.0])
    G = GuidedDenoiser(gaussian, dict(mean=torch.full((1, 4), -1.0)), w=3.0)
    close(G(X, sigma, mean=mean), gaussian(X, sigma, -1 + 3 * (mean + 1)))


def test_sampler_arrives_where_the_equation_says():
    def gaussian(x, sigma, mean):
        return mean + (x - mean) / (1 + sigma**2).view(-1, 1)

    x = 10 * randn((20, 2), 0, dtype=torch.float64)
    m, n = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[-1.0, 0.5]]).double()
    G = GuidedDenoiser(gaussian, dict(mean=n), w=3.0)
    end = n + 3 * (m - n)
    want = end + (x - end) / math.sqrt(1 + 10**2)
    got = sample(G, x, get_sigmas_karras(100, 0.01, 10.0), cond=dict(mean=m))
    close(got, want, 1e-3)


def test_every_sampler_walks_on_it():
    G = GuidedDenoiser(toy, NONE, w=2.0)
    want = sample(G, 10 * X, get_sigmas_karras(200, 0.01, 10.0), cond=C)
    for name in 'euler heun dpm2 lms dpmpp_2s dpmpp_2m'.split():
        got = sample(G, 10 * X, get_sigmas_karras(100, 0.01, 10.0), getattr(karras, name), C)
        assert (got - want).norm(dim=1).mean() < 0.1, name


def test_autoguidance_is_linear_in_the_model():
    close(GuidedDenoiser(toy, weaker, w=2.0)(X, 1.0, **C), 2 * POS - 0.8 * POS)


# --- what it costs ---


def test_rows_of_one_forward():
    D = Counted()
    GuidedDenoiser(D, NONE, w=3.0)(X, 1.0, **C)
    assert D.rows == [12]


def test_cost_of_a_run_of_heun():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    sample(G, 10 * X, SIGMAS, cond=C)
    assert G.nfe == 6 * 2 * 15
    assert G.run.nfe_per_sample.tolist() == [30] * 6


def test_cost_with_an_interval():
    G = GuidedDenoiser(toy, NONE, w=3.0, interval=(0.3, 2.0))
    sample(G, 10 * X, SIGMAS, cond=C)
    levels = [*SIGMAS[:-1].tolist(), *SIGMAS[1:-1].tolist()]
    assert G.nfe == 6 * (15 + sum(0.3 < o <= 2.0 for o in levels))


def test_weights_of_0_and_1_cost_one_evaluation():
    G = GuidedDenoiser(toy, NONE, w=torch.tensor([3.0, 1.0, 0.0, 2.0, 0.5, 1.0]))
    out = G(X, 1.0, **C)
    assert G.run.nfe_per_sample.tolist() == [2, 1, 1, 2, 2, 1]
    close(out[[1, 5]], POS[[1, 5]], 1e-6)
    close(out[2], NEG[2], 1e-6)


@pytest.mark.parametrize('w, want', [(1.0, POS), (0.0, NEG)])
def test_unguided_and_negative_alone_to_the_bit(w, want):
    G = GuidedDenoiser(toy, NONE, w=w)
    assert torch.equal(G(X, 1.0, **C), want)
    assert G.nfe == 6


def test_a_rule_that_is_not_unguided_at_1_is_evaluated():
    G = GuidedDenoiser(toy, NONE, w=1.0, rule=base_norm)
    out = G(X, 1.0, **C)
    want = to_x0(base_norm(eps(NEG), eps(POS), 1.0), X, 1.0, 'eps')
    close(out, want)
    assert G.nfe == 12


def test_a_rule_of_ones_own_says_where_it_is_unguided():
    def mine(neg, pos, w):
        return pos + (w - 1) * (pos - neg).clamp(-0.1, 0.1)

    mine.pos_at = 1.0
    G = GuidedDenoiser(toy, NONE, w=1.0, rule=mine)
    assert torch.equal(G(X, 1.0, **C), POS)
    assert G.nfe == 6


def test_parts_are_whole():
    for w in 0.0, 1.0, 3.0:
        G = GuidedDenoiser(toy, NONE, w=w)
        p = G.parts(X, 1.0, **C)
        close(p.pred, NEG + w * (POS - NEG))
        close(p.neg, NEG, 1e-6)
        close(p.pos, POS, 1e-6)
        assert G.nfe == 12
        assert len(p.negs) == 1


def test_parts_outside_the_interval():
    p = GuidedDenoiser(toy, NONE, w=3.0, interval=(0.0, 0.5)).parts(X, 1.0, **C)
    assert torch.equal(p.neg, p.pos)
    assert torch.equal(p.pred, p.pos)


def test_counts_of_runs_and_of_all():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    for _ in range(2):
        sample(G, X, [3.0, 1.0, 0.0], karras.euler, C)
        assert G.run.nfe_per_sample.tolist() == [4] * 6
    assert G.nfe == 48
    assert G.last_nfe.tolist() == [2] * 6


def test_counts_of_another_number_of_samples_are_those_of_a_new_run():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    G(X, 1.0, **C)
    G(X[:2], 1.0, c=C['c'][:2])
    assert G.run.nfe_per_sample.tolist() == [2, 2]
    assert G.nfe == 16


def test_counts_go_on_after_inference_mode():
    G = GuidedDenoiser(toy, NONE, w=torch.tensor([3.0, 1.0, 2.0, 3.0, 3.0, 3.0]))
    with torch.inference_mode():
        G(X, 2.0, **C)
    G(X, 1.0, **C)
    assert G.run.nfe_per_sample.tolist() == [4, 2, 4, 4, 4, 4]
    with torch.inference_mode():
        G.start([2.0, 1.0])
    G(X, 2.0, **C)
    assert G.run.nfe_per_sample.tolist() == [2, 1, 2, 2, 2, 2]
    assert G.nfe == 33


def test_effective_scale_of_a_run():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    sample(G, 10 * X, SIGMAS, cond=C)
    assert G.run.effective_scale() == pytest.approx(3.0, rel=1e-4)
    assert G.run.guided == [6 * 15]


def test_effective_scale_of_each_sample():
    w = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    G = GuidedDenoiser(toy, NONE, w=w)
    sample(G, 10 * X, SIGMAS, cond=C)
    scales = G.run.effective_scales()
    assert math.isnan(scales[0])  # a weight of 1 does not guide
    assert scales[1:] == pytest.approx(w[1:].tolist(), rel=1e-4)


def test_effective_scale_of_a_run_that_was_not_guided():
    G = GuidedDenoiser(toy, NONE, w=1.0)
    G(X, 1.0, **C)
    assert math.isnan(G.run.effective_scale())
    assert all(map(math.isnan, G.run.effective_scales()))
    assert G.run.guided == [0]


# --- several terms ---


def test_two_terms_add_up():
    G = GuidedDenoiser(toy, Term(NONE, 2.0), Term(OTHER, 1.5))
    close(G(X, 1.0, **C), POS + (POS - NEG) + 0.5 * (POS - BAD))
    assert G.nfe == 18


def test_terms_of_one_network_are_one_forward():
    D = Counted()
    GuidedDenoiser(D, Term(NONE, 2.0), Term(OTHER, 1.5))(X, 1.0, **C)
    assert D.rows == [18]


def test_a_term_and_another_model():
    G = GuidedDenoiser(toy, Term(NONE, 2.0), Term(weaker, 1.5))
    close(G(X, 1.0, **C), POS + (POS - NEG) + 0.5 * (POS - 0.8 * POS))
    assert G.nfe == 18


def test_a_weight_of_0_counts_when_there_are_others():
    G = GuidedDenoiser(toy, Term(NONE, 0.0), Term(OTHER, 1.0))
    close(G(X, 1.0, **C), NEG)
    assert G.nfe == 12


def test_a_negative_of_several_queries():
    D = Counted()
    G = GuidedDenoiser(D, Mean(NONE, OTHER), w=3.0)
    close(G(X, 1.0, **C), POS + 2 * (POS - (NEG + BAD) / 2))
    assert D.rows == [18]
    assert G.nfe == 18


def test_a_negative_of_several_queries_beside_another():
    w = torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 4.0])
    G = GuidedDenoiser(toy, Mean(NONE, OTHER), w=w)
    mean = (NEG + BAD) / 2
    close(G(X, 1.0, **C), mean + w[:, None] * (POS - mean))
    assert G.run.nfe_per_sample.tolist() == [3, 1, 2, 3, 1, 3]


# --- rules and their spaces ---


def eps(x0, x=X, sigma=1.0):
    return (x - x0) / sigma


def test_a_rule_gets_the_space_that_it_declares():
    G = GuidedDenoiser(toy, NONE, w=0.2, rule=t_norm)
    close(eps(G(X, 1.0, **C)), t_norm(eps(NEG), eps(POS), 0.2))


@pytest.mark.parametrize('space', ['eps', 'x0', 'v', 'flow', 'any'])
def test_every_space(space):
    @rule(space)
    def doubled(neg, pos, w):
        return pos + (w - 1) * (pos - neg).abs()

    def convert(o):
        return o if space in ('any', 'x0') else from_x0(o, X, 0.7, space)

    pos, neg = toy(X, torch.full((6,), 0.7), **C), toy(X, torch.full((6,), 0.7), **NONE)
    pred = doubled(convert(neg), convert(pos), 2.0)
    want = pred if space in ('any', 'x0') else to_x0(pred, X, 0.7, space)
    close(GuidedDenoiser(toy, NONE, w=2.0, rule=doubled)(X, 0.7, **C), want)


def test_a_post_rule_corrects_the_sum():
    G = GuidedDenoiser(toy, Term(NONE, 2.0), Term(OTHER, 1.5), post=rescale)
    total = POS + (POS - NEG) + 0.5 * (POS - BAD)
    v = [from_x0(o, X, 1.0, 'v') for o in (total, POS)]
    close(G(X, 1.0, **C), to_x0(rescale(*v), X, 1.0, 'v'))


def test_post_rules_apply_in_their_order():
    @post_rule('x0')
    def halved(pred, pos):
        return pred / 2

    @post_rule('any')
    def raised(pred, pos):
        return pred + 1

    total = NEG + 3 * (POS - NEG)
    close(GuidedDenoiser(toy, NONE, w=3.0, post=[halved, raised])(X, 1.0, **C), total / 2 + 1)
    close(GuidedDenoiser(toy, NONE, w=3.0, post=[raised, halved])(X, 1.0, **C), (total + 1) / 2)


def test_a_post_rule_leaves_unguided_samples_alone():
    w = torch.tensor([3.0, 1.0, 3.0, 3.0, 1.0, 3.0])
    out = GuidedDenoiser(toy, NONE, w=w, post=rescale.of(phi=1.0))(X, 1.0, **C)
    plain = GuidedDenoiser(toy, NONE, w=w)(X, 1.0, **C)
    assert torch.equal(out[[1, 4]], plain[[1, 4]])
    assert not torch.allclose(out[0], plain[0])


def test_a_rule_is_off_outside_its_interval():
    G = GuidedDenoiser(toy, NONE, w=0.3, rule=t_norm, interval=(0.1, 1.6))
    assert torch.equal(G(X, 1.7, **C), toy(X, torch.full((6,), 1.7), **C))
    assert G.nfe == 6


def test_any_function_is_off_outside_its_interval():
    sigma = torch.tensor([0.1, 1.6, 1.7, 0.1, 1.6, 1.7])
    term = Term(NONE, 3.0, lambda neg, pos, w: 0 * pos, (0.1, 1.6))
    on = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])[:, None]
    close(GuidedDenoiser(toy, term)(X, sigma, **C), toy(X, sigma, **C) * (1 - on), 1e-6)


def test_a_post_rule_is_off_where_all_terms_are():
    G = GuidedDenoiser(toy, NONE, w=3.0, interval=(0.1, 1.6), post=rescale.of(phi=1.0))
    assert torch.equal(G(X, 1.7, **C), toy(X, torch.full((6,), 1.7), **C))


# --- rules that remember ---


def test_momentum_along_a_run():
    G, d = GuidedDenoiser(toy, NONE, w=3.0, rule=momentum), POS - NEG
    G.start()
    close(G(X, 1.0, step=0, **C), POS + 2 * d)
    close(G(X, 1.0, step=1, **C), POS + 2 * 1.5 * d)
    G.start()
    close(G(X, 1.0, step=0, **C), POS + 2 * d)


def test_a_sample_that_is_off_keeps_its_memory():
    w = torch.tensor([3.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    G, d = GuidedDenoiser(toy, NONE, w=w, rule=momentum), POS - NEG
    on = (w != 1).float()[:, None]
    for step, factor in enumerate((1.0, 1.5, 1.75)):
        close(G(X, 1.0, step=step, **C), POS + 2 * factor * d * on)


def test_memory_is_per_sample():
    def walk(i):
        G = GuidedDenoiser(toy, NONE, w=3.0, rule=momentum)
        return [G(X[i], s, c=C['c'][i]) for s in (2.0, 1.0, 0.5)][-1]

    whole = walk(slice(0, 6))
    for i in range(6):
        close(walk(slice(i, i + 1)), whole[i : i + 1])


def test_each_term_has_a_memory_of_its_own():
    G = GuidedDenoiser(toy, Term(NONE, 3.0, momentum), Term(OTHER, 2.0, momentum))
    G(X, 1.0, step=0, **C)
    close(G(X, 1.0, step=1, **C), POS + 3 * (POS - NEG) + 1.5 * (POS - BAD))


def test_a_rule_is_called_once_for_all_micro_batches():
    calls = []

    @rule('x0', stateful=True)
    def spied(neg, pos, w, state=None):
        calls.append(len(pos))
        return momentum(neg, pos, w, state)

    G = GuidedDenoiser(Microbatched(toy, 4), NONE, w=3.0, rule=spied)
    for s in (2.0, 1.0, 0.5):
        G(X, s, **C)
    assert calls == [6] * 3


def test_memory_after_inference_mode():
    G, d = GuidedDenoiser(toy, NONE, w=3.0, rule=momentum), POS - NEG
    with torch.inference_mode():
        G(X, 1.0, step=0, **C)
    close(G(X, 1.0, step=1, **C), POS + 3 * d)


def test_gradients_pass_a_rule_that_remembers():
    G = GuidedDenoiser(toy, NONE, w=3.0, rule=momentum)
    x = X.clone().requires_grad_()
    G(x, 1.0, step=0, **C)
    G(x, 1.0, step=1, **C).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('kw', [dict(rule=momentum), dict(stop=0.9)])
def test_memory_is_refused_inside(kw):
    inner = GuidedDenoiser(toy, NONE, w=2.0, **kw)
    with pytest.raises(ValueError, match='outermost'):
        GuidedDenoiser(inner, NONE, w=2.0)
    with pytest.raises(ValueError, match='outermost'):
        GuidedDenoiser(toy, inner, w=2.0)
    with pytest.raises(ValueError, match='outermost'):
        GuidedDenoiser(Denoiser(inner), NONE, w=2.0)


# --- once they agree ---


def test_stop_saves_evaluations():
    full, A = GuidedDenoiser(toy, NONE, w=3.0), GuidedDenoiser(toy, NONE, w=3.0, stop=0.99)
    a, b = (sample(G, 10 * X, SIGMAS, cond=C) for G in (full, A))
    assert A.nfe < 0.8 * full.nfe
    assert (a - b).norm(dim=1).mean() < 5.0


def test_a_sample_stops_by_its_own_cosine():
    cosine = torch.cosine_similarity(X - POS, X - NEG)
    half = cosine.median().item()
    agree = cosine > half
    G, d = GuidedDenoiser(toy, NONE, w=3.0, stop=half), POS - NEG
    close(G(X, 1.0, step=0, **C), POS + 2 * d)
    close(G(X, 1.0, step=1, **C), POS + 2 * d * (~agree).float()[:, None])
    assert agree.sum() == 3
    assert G.run.nfe_per_sample.tolist() == [3 if o else 4 for o in agree]


def test_stop_lasts_for_one_run():
    G, d = GuidedDenoiser(toy, NONE, w=3.0, stop=-1.0), POS - NEG
    G(X, 1.0, step=0, **C)
    assert torch.equal(G(X, 1.0, step=1, **C), POS)
    G.start([1.0, 0.0])
    close(G(X, 1.0, step=0, **C), POS + 2 * d)


def test_stop_of_one_term_leaves_the_other():
    G = GuidedDenoiser(toy, Term(NONE, 3.0, stop=-1.0), Term(OTHER, 2.0))
    G(X, 1.0, step=0, **C)
    close(G(X, 1.0, step=1, **C), 2 * POS - BAD)
    assert G.nfe == 6 * 5


def test_parts_of_stopped_samples():
    G = GuidedDenoiser(toy, NONE, w=3.0, stop=-1.0)
    G(X, 1.0, step=0, **C)
    p = G.parts(X, 1.0, step=1, **C)
    assert torch.equal(p.neg, p.pos)


def test_what_is_not_evaluated_does_not_stop():
    G = GuidedDenoiser(toy, NONE, w=3.0, stop=-1.0, interval=(0.0, 1.0))
    G(X, 2.0, step=0, **C)
    assert 0 not in G.run.stopped


# --- reuse of the negative ---


def flow_model():
    def net(z, t, c=None):
        return z - torch.tanh(z / 2 + (0 if c is None else c[:, None]))

    return FlowDenoiser(net)


@pytest.mark.parametrize('every, want', [(1, 16), (2, 12), (3, 11), (4, 10), (99, 9)])
def test_reuse_is_counted(every, want):
    D = Counted()
    G = GuidedDenoiser(D, NONE, w=3.0, every=every)
    sample(G, 10 * X, SIGMAS, karras.euler, C)
    assert G.run.nfe_per_sample.tolist() == [want] * 6
    assert sum(D.rows) == 6 * want


def test_reuse_keeps_the_difference_of_noise_predictions():
    G = GuidedDenoiser(toy, NONE, w=3.0, every=2)
    close(G(X, 1.0, step=0, **C), cfg(NEG, POS, 3.0))
    p = G.parts(2 * X, 2.0, step=1, **C)
    pos = toy(2 * X, 2 * S1, **C)
    assert torch.equal(p.pos, pos)
    close(p.neg, pos - 2 * (POS - NEG))
    close(p.pred, pos + 2 * 2 * (POS - NEG))
    close(G(X, 1.0, step=2, **C), cfg(NEG, POS, 3.0))


def test_a_difference_that_does_not_change_makes_reuse_exact():
    def shifted(x, sigma, c):
        return x / 2 - sigma[:, None] * c[:, None]

    def run(**kw):
        G = GuidedDenoiser(shifted, dict(c=torch.zeros(1)), w=3.0, **kw)
        return sample(G, 10 * X, SIGMAS, karras.euler, C)

    close(run(every=4), run())


def test_a_flow_model_keeps_the_difference_of_velocities():
    D = flow_model()
    G = GuidedDenoiser(D, NONE, w=3.0, every=2)
    first = G.parts(X, 1e4, step=0, **C)
    delta = from_x0(first.pos, X, 1e4, 'flow') - from_x0(first.neg, X, 1e4, 'flow')
    p = G.parts(X, 1.0, step=1, **C)
    got = from_x0(p.pos, X, 1.0, 'flow') - from_x0(p.neg, X, 1.0, 'flow')
    close(got, delta, 1e-3)
    assert delta.abs().max() > 0.5


def test_reuse_of_one_term_leaves_the_other():
    G = GuidedDenoiser(toy, Term(NONE, 3.0, every=2), Term(OTHER, 2.0))
    for step in range(3):
        close(G(X, 1.0, step=step, **C), 4 * POS - 2 * NEG - BAD)
    assert G.run.nfe_per_sample.tolist() == [3 + 2 + 3] * 6


def test_reuse_per_sample():
    w = on_sigmas([[3.0] * 6, [1.0] * 3 + [3.0] * 3, [3.0] * 6], [4.0, 2.0, 1.0, 0.0])
    G, seen = GuidedDenoiser(toy, NONE, w=w, every=2), []
    for step, sigma in enumerate([4.0, 2.0, 1.0]):
        G(X, sigma, step=step, **C)
        seen.append(G.last_nfe.tolist())
    assert seen == [[2] * 6, [1] * 6, [2] * 6]
    alone = GuidedDenoiser(toy, NONE, w=3.0, every=2)
    for step, sigma in enumerate([4.0, 2.0]):
        got = alone(X[3:], sigma, step=step, c=C['c'][3:])
    again = GuidedDenoiser(toy, NONE, w=w, every=2)
    for step, sigma in enumerate([4.0, 2.0]):
        out = again(X, sigma, step=step, **C)
    assert torch.equal(out[3:], got)
    assert torch.equal(out[:3], toy(X, 2 * S1, **C)[:3])


def test_an_interval_begins_with_an_evaluation():
    G = GuidedDenoiser(toy, NONE, w=3.0, every=2, interval=(0.0, 2.0))
    G(X, 4.0, step=0, **C)
    out = G(X, 1.0, step=1, **C)
    close(out, cfg(NEG, POS, 3.0))
    assert G.run.nfe_per_sample.tolist() == [3] * 6


def test_what_the_caller_knows_is_reused():
    G = GuidedDenoiser(toy, NONE, w=3.0, every=2)
    G(X, 1.0, step=0, known={0: BAD}, **C)
    close(G(X, 1.0, step=1, **C), 3 * POS - 2 * BAD)


MEAN = Mean(dict(c=torch.zeros(1)), dict(c=torch.ones(1)))


def euler(G, x=10 * X, cond=C):
    return sample(G, x, SIGMAS, karras.euler, cond)


@pytest.mark.parametrize('neg', [weaker, Noisy(5), MEAN])
def test_any_negative_can_be_reused(neg):
    G = GuidedDenoiser(toy, neg, w=3.0, every=5)
    got = euler(G)
    assert G.run.nfe_per_sample.tolist() == [8 + 2 * G.terms[0].neg.nfe] * 6
    assert not torch.allclose(got, euler(GuidedDenoiser(toy, neg, w=3.0)))


def test_reuse_in_pieces_and_in_another_loop():
    want = euler(GuidedDenoiser(toy, NONE, w=3.0, every=3))
    G = GuidedDenoiser(Microbatched(toy, 5), NONE, w=3.0, every=3)
    close(euler(G), want)
    close(euler_loop(G, 10 * X, SIGMAS, C), want)
    for i in (0, 2, 4):
        G = GuidedDenoiser(toy, NONE, w=3.0, every=3)
        close(euler(G, 10 * X[i : i + 2], dict(c=C['c'][i : i + 2])), want[i : i + 2])


@pytest.mark.parametrize('bad', [0, -1, 1.5, True, '2'])
def test_bad_every(bad):
    with pytest.raises((TypeError, ValueError), match='every'):
        Term(NONE, every=bad)


# --- post-rules that know the noise level ---


def test_tsr_samples_at_another_temperature():
    "For Gaussian data of variance 4 it is the model of variance 4/k; the delta here is 0."
    wide, narrow = (GaussianMixture([[0.0, 0.0]], v, sigma_max=20.0) for v in (4.0, 1.0))
    x = 20 * randn((16, 2), 0, dtype=torch.float64)
    G = GuidedDenoiser(wide, Model(lambda x, sigma: wide(x, sigma)), post=tsr.of(k=4.0, std=2.0))
    got, want = (sample(D, x, get_sigmas_karras(8, 0.1, 20.0), karras.euler) for D in (G, narrow))
    close(got, want)


def test_noise_is_scaled_only_where_the_model_knows_it():
    class Known(Denoiser):
        sigma_min, sigma_max = 0.1, 1.5

    G = GuidedDenoiser(Known(toy), Term(NONE, 3.0), post=epsilon_scaling.of(divisor=2.0))
    plain = GuidedDenoiser(Known(toy), Term(NONE, 3.0))
    sigma = torch.tensor([1.0, 2.0]).repeat(3)
    got, want = G(X, sigma, **C), plain(X, sigma, **C)
    close(got[::2], (X + want)[::2] / 2)
    assert torch.equal(got[1::2], want[1::2])


# --- a history ---


def test_a_history_costs_nothing():
    D = Counted()
    G = GuidedDenoiser(D, Mixed(), w=1.5)
    euler(G)
    assert D.rows == [6] * 8
    assert G.run.nfe_per_sample.tolist() == [8] * 6
    G = GuidedDenoiser(D, Term(NONE, 3.0), Term(Mixed(), 1.5))
    euler(G)
    assert G.run.nfe_per_sample.tolist() == [16] * 6


def test_at_weight_0_a_history_moves_the_negative_alone():
    D, free = Counted(), Term(Mixed(), 1.5)
    G = GuidedDenoiser(D, Term(NONE, 0.0), free)
    alone = GuidedDenoiser(toy, Mixed(), w=1.5)
    close(euler(G), euler(alone, cond=dict(c=torch.zeros(6))))
    assert D.rows == [6] * 8
    with G.watch() as first, G.watch(1) as second:
        for i, sigma in enumerate((2.0, 1.0)):
            G(X, sigma, step=i, **C)
    assert first[1].scale.isnan().all()
    close(second[1].scale, torch.full((6,), 1.5))


def test_a_history_by_hand():
    G, first = GuidedDenoiser(toy, Mixed(), w=1.5), toy(X, 2 * S1, **C)
    assert torch.equal(G(X, 2.0, step=0, **C), first)
    close(G(X, 1.0, step=1, **C), first + 1.5 * (POS - first))
    memory, third = (first + POS) / 2, toy(X, 0.5 * S1, **C)
    close(G(X, 0.5, step=2, **C), memory + 1.5 * (third - memory))


def test_a_history_moves_the_sum_of_the_others():
    terms = [Term(Mixed(), 1.5), Term(NONE, 3.0), Term(OTHER, 2.0)]
    G, plain = (GuidedDenoiser(toy, *o) for o in (terms, terms[1:]))
    first = plain(X, 2.0, step=0, **C)
    assert torch.equal(G(X, 2.0, step=0, **C), first)
    p, now = G.parts(X, 1.0, step=1, **C), plain(X, 1.0, step=1, **C)
    close(p.pred, first + 1.5 * (now - first))
    close(p.neg, first)
    close(p.negs[1], NEG)


def test_a_history_around_a_guided_denoiser_is_the_same():
    G = GuidedDenoiser(toy, Term(NONE, 3.0), Term(Mixed(), 1.5))
    H = GuidedDenoiser(GuidedDenoiser(toy, NONE, w=3.0), Mixed(), w=1.5)
    close(euler(G), euler(H))


def test_a_history_of_predictions_that_do_not_change():
    def constant(x, sigma, c):
        return c[:, None].expand_as(x)

    out = [euler(GuidedDenoiser(constant, Mixed(), w=w)) for w in (1.0, 4.0)]
    assert torch.equal(*out)


def test_a_history_at_weight_1_and_outside_its_interval():
    plain = GuidedDenoiser(toy, NONE, w=1.0)
    for kw in (dict(w=1.0), dict(w=3.0, interval=(1e3, 2e3))):
        assert torch.equal(euler(GuidedDenoiser(toy, Mixed(), **kw)), euler(plain))
    G, first = GuidedDenoiser(toy, Mixed(), w=3.0, interval=(0.0, 1.0)), toy(X, 2 * S1, **C)
    assert torch.equal(G(X, 2.0, step=0, **C), first)
    close(G(X, 1.0, step=1, **C), first + 3 * (POS - first))


def test_a_history_per_sample():
    w = torch.tensor([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    mixed, one, three = (euler(GuidedDenoiser(toy, Mixed(), w=v)) for v in (w, 1.0, 3.0))
    close(mixed, torch.cat([one[:3], three[3:]]))


@pytest.mark.parametrize('i', [0, 2, 4])
def test_a_history_is_the_same_in_a_smaller_batch(i):
    want = euler(GuidedDenoiser(toy, Mixed(), w=3.0))[i : i + 2]
    got = euler(GuidedDenoiser(toy, Mixed(), w=3.0), 10 * X[i : i + 2], dict(c=C['c'][i : i + 2]))
    close(got, want)


def test_a_history_knows_its_scale():
    G = GuidedDenoiser(toy, Term(NONE, 3.0), Term(Mixed(), 1.5))
    euler(G)
    assert G.run.effective_scale(1) == pytest.approx(1.5)


def test_posts_see_what_a_history_does():
    got = euler(GuidedDenoiser(toy, Mixed(), w=3.0, post=rescale))
    assert not torch.allclose(got, euler(GuidedDenoiser(toy, Mixed(), w=3.0)))


@pytest.mark.parametrize('kw', [dict(stop=0.9), dict(every=2)])
def test_a_history_has_no_evaluation_to_save(kw):
    with pytest.raises(ValueError, match=f'{next(iter(kw))}: Mixed costs no evaluation to save'):
        Term(Mixed(), **kw)


# --- zero velocity at the start ---


LEVELS = get_sigmas_karras(8, 0.1, 10.0)


def zero_init(steps=2):
    return ZeroInit(GuidedDenoiser(flow_model(), NONE, w=2.0), LEVELS, steps)


def test_zero_init_stands_still():
    F = zero_init()
    path = [10 * X, *(o[0] for o in samples(F, 10 * X, LEVELS, karras.euler, C))]
    z = [o / (1 + s) for o, s in zip(path, LEVELS, strict=True)]
    close(z[0], z[1])
    close(z[0], z[2])
    assert not torch.allclose(z[2], z[3])
    assert F.nfe == 2 * 6 * (8 - 2)


def test_zero_init_of_no_step():
    F = zero_init(0)
    assert torch.equal(F(X, LEVELS[0], **C), F.inner_model(X, LEVELS[0], **C))


def test_zero_init_of_a_mixed_batch():
    F = zero_init()
    out = F(X, torch.tensor([9.0] * 3 + [1.0] * 3), **C)
    close(out[:3], X[:3] / 10)
    close(out[3:], F.inner_model(X, 1.0, **C)[3:])


def test_zero_init_has_parts():
    F = zero_init()
    p = F.parts(X, LEVELS[0], **C)
    close(p.neg, X / (1 + LEVELS[0]))
    close(p.pred, p.pos)
    p, q = F.parts(X, 1.0, **C), F.inner_model.parts(X, 1.0, **C)
    close(p.pred, q.pred)
    close(p.neg, q.neg)


def test_zero_init_as_a_negative_counts_what_it_evaluates():
    outer = GuidedDenoiser(flow_model(), zero_init(), w=2.0)
    for s in LEVELS[:4]:
        outer(X, s, **C)
    assert outer.run.nfe_per_sample.tolist() == [4 + 2 * 2] * 6


def test_zero_init_gets_the_step():
    F = ZeroInit(GuidedDenoiser(flow_model(), NONE, w=[2.0] * 4 + [5.0] * 4), LEVELS, 2)
    with F.watch() as traces:
        sample(F, 10 * X, LEVELS, karras.heun, C)
    assert len(traces) == 1 + 2 * 5 + 1


# --- weights along the way ---


def weights_seen(G, step=karras.euler, sigmas=SIGMAS):
    with G.watch() as traces:
        sample(G, 10 * X, sigmas, step, C)
    return [round(o.scale.nanmedian().item(), 2) for o in traces]


def test_one_weight_per_step():
    G = GuidedDenoiser(toy, NONE, w=[1.5 + i for i in range(8)])
    assert weights_seen(G) == [1.5 + i for i in range(8)]


@pytest.mark.parametrize('step', [karras.heun, karras.dpm2, karras.dpmpp_2s])
def test_both_evaluations_of_a_step_have_its_weight(step):
    w = [1.5 + i for i in range(8)]
    assert weights_seen(GuidedDenoiser(toy, NONE, w=w), step) == [o for o in w for _ in '12'][:-1]


def test_weights_in_a_loop_that_says_no_step():
    G = GuidedDenoiser(toy, NONE, w=[1.5 + i for i in range(8)], sigmas=SIGMAS)
    with G.watch() as traces:
        euler_loop(G, 10 * X, SIGMAS)
    assert [round(o.scale.nanmedian().item(), 2) for o in traces] == [1.5 + i for i in range(8)]


def test_a_level_between_two_has_the_weight_of_the_nearest():
    w = Weight.of([2.0, 3.0]).bind((10.0, 1.0, 0.0))
    assert w(torch.tensor([10.0, 4.0, 3.0, 1.0, 0.5, 20.0])).tolist() == [2, 2, 3, 3, 3, 2]


def test_weights_of_part_of_the_sigmas():
    G = GuidedDenoiser(toy, NONE, w=[1.5 + i for i in range(8)], sigmas=SIGMAS)
    assert weights_seen(G, sigmas=SIGMAS[3:]) == [4.5 + i for i in range(5)]
    assert weights_seen(G, sigmas=SIGMAS[2:6]) == [3.5 + i for i in range(3)]


def test_one_weight_per_step_and_sample():
    w = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) + 2
    G = GuidedDenoiser(toy, NONE, w=w)
    with G.watch() as traces:
        sample(G, 10 * X, SIGMAS, karras.euler, C)
    torch.testing.assert_close(traces[3].scale, w[3], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(traces[5].scale, w[5], atol=1e-2, rtol=1e-2)


def test_forms_of_a_weight():
    sigma = torch.tensor([3.0, 1.0])
    assert Weight.of(3)(sigma).tolist() == [3, 3]
    assert Weight.of(torch.tensor(3.0))(sigma).tolist() == [3, 3]
    assert Weight.of(torch.tensor([3.0, 1.0]))(sigma).tolist() == [3, 1]
    assert Weight.of(np.float32(3))(sigma).tolist() == [3, 3]
    assert Weight.of(np.array([3.0, 2.0]))(sigma, 1).tolist() == [2, 2]
    assert Weight.of([3.0, 2.0])(sigma, 0).tolist() == [3, 3]
    assert Weight.of((3.0, 2.0))(sigma, 1).tolist() == [2, 2]
    assert Weight.of([[3.0, 2.0], [5.0, 4.0]])(sigma, 1).tolist() == [5, 4]
    assert Weight.of(torch.tensor([[3.0, 2.0], [5.0, 4.0]]))(sigma, 1).tolist() == [5, 4]
    assert Weight.of(lambda s: 1 + s)(sigma).tolist() == [4, 2]
    assert Weight.of(lambda s: 2)(sigma).tolist() == [2, 2]
    assert Weight.of(on_sigmas([3.0, 2.0], [3.0, 1.0, 0.0]))(sigma).tolist() == [3, 2]
    assert Weight.of(Weight.of(3.0))(sigma).tolist() == [3, 3]
    assert Weight.of(3.0)(sigma).dtype == torch.float64


def test_a_weight_of_no_sample():
    assert Weight.of(3.0)(torch.zeros(0)).shape == (0,)
    assert Weight.of([3.0, 2.0])(torch.zeros(0), 1).shape == (0,)


def test_the_usual_weight():
    assert Term(NONE).w(torch.ones(1)).item() == 7.5
    assert Term(lambda x, sigma, c: x).w(torch.ones(1)).item() == 2.0


OTHER_SIGMAS = [
    get_sigmas_karras(20, 0.1, 10.0),
    get_sigmas_karras(8, 0.1, 9.9),
    SIGMAS[:-1] * 1.01,
    SIGMAS[[0, 2, 3, 4]],
]


@pytest.mark.parametrize('sigmas', OTHER_SIGMAS)
def test_weights_of_other_sigmas_are_refused(sigmas):
    D = Counted()
    w = [7.5] * 8
    bound = GuidedDenoiser(D, NONE, w=w, sigmas=SIGMAS)
    scheduled = GuidedDenoiser(D, NONE, w=on_sigmas(w, SIGMAS))
    for G in bound, Denoiser(bound), GuidedDenoiser(bound, NONE), scheduled:
        with pytest.raises(ValueError, match='w belongs to 8 steps'):
            next(samples(G, X, sigmas, cond=C))
    assert D.rows == []


def test_weights_of_another_number_of_steps_are_refused():
    G = GuidedDenoiser(toy, NONE, w=[7.5] * 9)
    with pytest.raises(ValueError, match='expected one value per step, 8, got 9'):
        next(samples(G, X, SIGMAS, cond=C))


def test_a_nested_weight_of_other_sigmas_is_refused():
    weak = GuidedDenoiser(toy, NONE, w=[2.0] * 3, sigmas=[3.0, 1.0, 0.5, 0.0])
    G = GuidedDenoiser(Denoiser(toy), weak, w=2.0)
    with pytest.raises(ValueError, match='w belongs to 3 steps'):
        next(samples(G, X, [4.0, 2.0, 1.0], cond=C))


def test_weights_per_step_need_sigmas_or_a_step():
    G = GuidedDenoiser(toy, NONE, w=[3.0, 2.0])
    with pytest.raises(ValueError, match='start'):
        G(X, 1.0, **C)
    close(G(X, 1.0, step=1, **C), 2 * POS - NEG)


# --- runs ---


LOOPS = {
    'cfg++': lambda G: sample(G, X, SIGMAS, karras.euler_cfg_pp, C),
    'fbg': lambda G: sample(G, X, SIGMAS, karras.fbg, C, generator=0),
    'rectified': lambda G: sample(G, X, SIGMAS, karras.rectified_cfg_pp, C),
    'euler': lambda G: sample(G, 10 * X, SIGMAS, karras.euler, C),
    'heun': lambda G: sample(G, 10 * X, SIGMAS, karras.heun, C),
    'churn': lambda G: sample(G, 10 * X, SIGMAS, karras.heun, C, generator=1, s_churn=4.0),
    'ancestral': lambda G: karras.sample_euler_ancestral(
        G, 10 * X, SIGMAS, extra_args=C, disable=True, generator=1
    ),
    'euler loop': lambda G: euler_loop(G, 10 * X, SIGMAS),
    'heun loop': lambda G: heun_loop(G, 10 * X, SIGMAS),
    'short euler loop': lambda G: euler_loop(G, 10 * X, torch.tensor([1.0, 0.8, 0.7])),
    'short heun loop': lambda G: heun_loop(G, 10 * X, torch.tensor([1.0, 0.8, 0.7])),
}


@pytest.mark.parametrize('loop', LOOPS)
@pytest.mark.parametrize('name', REMEMBERING)
def test_a_second_run_equals_the_first(name, loop):
    G = remembering(name)
    first = LOOPS[loop](G)
    cost = G.nfe
    assert torch.equal(LOOPS[loop](G), first)
    assert G.nfe == 2 * cost


@pytest.mark.parametrize('loop', ['euler', 'heun', 'euler loop', 'heun loop'])
@pytest.mark.parametrize('name', REMEMBERING)
def test_it_does_remember(name, loop):
    "Else the tests above show nothing."
    plain = GuidedDenoiser(toy, NONE, w=3.0)
    assert not torch.equal(LOOPS[loop](remembering(name)), LOOPS[loop](plain))


def test_a_run_begins_when_sigma_rises():
    G = GuidedDenoiser(toy, NONE, w=3.0, stop=-1.0)
    G(X, 3.0, **C)
    first = G.run
    G(X, 1.0, **C)
    assert G.run is first
    G(X, 3.0, **C)
    assert G.run is not first
    assert G.run.nfe_per_sample.tolist() == [2] * 6


def test_a_run_does_not_begin_when_churn_raises_sigma():
    G = GuidedDenoiser(toy, NONE, w=3.0, rule=momentum)
    first = G.start()
    sigma = 3.0
    for _ in range(5):
        G(X, sigma * math.sqrt(2), **C)
        sigma *= 0.9
        G(X, sigma, **C)
    assert G.run is first
    assert first.evaluations == 10


def test_a_run_begins_when_the_step_falls():
    G = GuidedDenoiser(toy, NONE, w=3.0, rule=momentum)
    G(X, 1.0, step=0, **C)
    G(X, 1.1, step=1, **C)
    first = G.run
    G(X, 1.0, step=0, **C)
    assert G.run is not first


def test_start_gives_the_run():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    run = G.start(SIGMAS)
    assert G.run is run
    assert run.sigmas == tuple(SIGMAS.tolist())
    assert run.n is None


@pytest.mark.parametrize('name', ['stop', 'apg'])
def test_a_check_changes_nothing(name):
    def walk(peek):
        G, x = remembering(name), 10 * X
        for a, b in zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True):
            if peek:
                G.parts(x, a, **C)
            x = x + (x - G(x, a, **C)) / a * (b - a)
        return x

    close(walk(True), walk(False), 1e-4)


def test_a_draw_is_not_repeated_by_chance():
    G = remembering('draws')
    G(X, 1.0, **C)
    with pytest.raises(ValueError, match='a negative that draws'):
        G(X, 1.0, **C)


@pytest.mark.parametrize('name', REMEMBERING)
def test_what_remembers_refuses_a_preview_of_some(name):
    G = remembering(name)
    G(X, 1.0, **C)
    with pytest.raises(ValueError, match=r'remembers, \(6, 4\), got \(1, 4\): call start'):
        G(X[:1], 1.0, c=C['c'][:1])


class FailsOnce:
    "The toy, which fails in its second forward."

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma, **cond):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return toy(x, sigma, **cond)


def failed(x=X):
    "A guided denoiser with momentum after a step at sigma 3 and a failed one at 2."
    G = GuidedDenoiser(FailsOnce(), NONE, w=3.0, rule=apg.of(beta=0.5))
    G(x, 3.0, **C)
    with pytest.raises(KeyboardInterrupt):
        G(x, 2.0, **C)
    return G


def test_a_failed_evaluation_can_be_tried_again():
    G, H = failed(), GuidedDenoiser(toy, NONE, w=3.0, rule=apg.of(beta=0.5))
    run = G.run
    H(X, 3.0, **C)
    close(G(X, 2.0, **C), H(X, 2.0, **C))
    assert G.run is run


def test_other_samples_after_a_failed_evaluation_begin_a_run():
    G, H = failed(), GuidedDenoiser(toy, NONE, w=3.0, rule=apg.of(beta=0.5))
    close(G(-X, 1.0, **C), H(-X, 1.0, **C))
    assert G.run.evaluations == 1


def test_a_first_evaluation_that_failed_leaves_no_trace():
    G = GuidedDenoiser(FailsOnce(), NONE, w=3.0)
    G.inner_model.calls = 1
    with pytest.raises(KeyboardInterrupt):
        G(X, 2.0, **C)
    G(X[:2], 2.0, c=C['c'][:2])
    assert G.run.nfe_per_sample.tolist() == [2, 2]


def test_what_remembers_refuses_samples_of_another_shape():
    G = GuidedDenoiser(toy, NONE, w=3.0, rule=apg)
    G(X, 3.0, **C)
    with pytest.raises(ValueError, match=r'remembers, \(6, 4\), got \(6, 3\): call start'):
        G(X[:, :3], 2.0, **C)


def test_terms_that_are_off_in_a_call():
    G = GuidedDenoiser(toy, Term(NONE, 3.0, apg.of(beta=0.5)), Term(OTHER, 2.0))
    H = GuidedDenoiser(toy, Term(OTHER, 2.0))
    close(G(X, 3.0, off=(0,), **C), H(X, 3.0, **C))
    assert G.run.nfe_per_sample.tolist() == [2] * 6
    assert G.run.states == {}
    close(G(X, 2.0, off=(0, 1), **C), toy(X, torch.full((6,), 2.0), **C))


def test_two_formulas_are_two_models():
    "Denoisers with no network inside are not the same because of that."
    broad, narrow = (GaussianMixture(torch.zeros(1, 2), std) for std in (2.0, 1.0))
    x = randn((3, 2), 0)
    GuidedDenoiser(broad, narrow, w=2.0)(x, 1.0)


def test_a_rule_gets_at_least_its_axes():
    G = GuidedDenoiser(toy, NONE, w=3.0, rule=rule('any', axes=3)(lambda neg, pos, w: pos))
    with pytest.raises(ValueError, match=r'x: expected at least 3 axes, got shape \(6, 4\)'):
        G(X, 1.0, **C)


def test_what_does_not_remember_shows_a_preview():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    G(X, 1.0, **C)
    close(G(X[:1], 1.0, c=C['c'][:1]), (NEG + 3 * (POS - NEG))[:1])


@pytest.mark.parametrize('name', REMEMBERING)
def test_what_remembers_begins_a_run_of_another_size(name):
    G = remembering(name)
    euler_loop(G, 10 * X, SIGMAS)
    few = rows(C, slice(0, 2))
    got = euler_loop(G, 10 * X[:2], SIGMAS, few)
    assert torch.equal(got, euler_loop(remembering(name), 10 * X[:2], SIGMAS, few))


def cut(G):
    "Somebody else's micro-batches, around what is guided."

    def D(x, sigma, **cond):
        halves = [(x[s], sigma[s], rows(cond, s)) for s in (slice(0, 3), slice(3, 6))]
        return torch.cat([G(a, s, **c) for a, s, c in halves])

    return D


@pytest.mark.parametrize('loop', ['euler loop', 'heun loop', 'euler', 'heun'])
@pytest.mark.parametrize('name', REMEMBERING)
def test_a_cut_batch_raises(name, loop):
    with pytest.raises(ValueError, match='samples'):
        LOOPS[loop](cut(remembering(name)))


@pytest.mark.parametrize('scale', [0.3, 0.01])
@pytest.mark.parametrize('name', REMEMBERING)
def test_a_cut_batch_of_pictures_that_are_alike_raises(name, scale):
    x = 5 + scale * X
    sigmas = torch.tensor([scale, scale / 2, scale / 4, 0.0])
    with pytest.raises(ValueError, match='samples'):
        euler_loop(cut(remembering(name)), x, sigmas)


@pytest.mark.parametrize('name', ['stop', 'apg'])
def test_identical_halves_give_the_same_pictures(name):
    x, c = X[:3].repeat(2, 1), dict(c=C['c'][:3].repeat(2))
    close(
        euler_loop(cut(remembering(name)), 10 * x, SIGMAS, c),
        euler_loop(remembering(name), 10 * x, SIGMAS, c),
        1e-4,
    )


@pytest.mark.parametrize('name', REMEMBERING)
def test_a_cut_batch_of_the_same_noise_raises(name):
    "As in a sweep of conditions: all samples begin alike, and only their conditions differ."
    x = 10 * X[:1].repeat(6, 1)
    with pytest.raises(ValueError, match='samples'):
        euler_loop(cut(remembering(name)), x, SIGMAS)


def test_a_batch_without_memory_may_be_cut():
    G = GuidedDenoiser(toy, NONE, w=3.0, interval=(0.3, 5.0))
    close(euler_loop(cut(G), 10 * X, SIGMAS), euler_loop(G, 10 * X, SIGMAS), 1e-4)


def test_a_loop_that_changes_x_in_place():
    "A corrector at one noise level: the memory goes on."
    G, H = (GuidedDenoiser(toy, NONE, w=3.0, rule=momentum) for _ in range(2))
    x = X.clone()
    G(x, 2.0, **C)
    G(x, 1.0, **C)
    x.mul_(1.01)
    got = G(x, 1.0, **C)
    for o, s in (X, 2.0), (X, 1.0):
        H(o, s, **C)
    close(got, H(X * 1.01, 1.0, **C))


def test_reading_the_run_begins_it_once():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    run = G.run
    G(X, 1.0, **C)
    assert G.run is run
    assert G.nfe == 12


def test_nothing_is_kept_alive_by_a_run():
    G = GuidedDenoiser(toy, NONE, w=3.0, rule=momentum)
    x = X.clone().requires_grad_()
    G(x, 1.0, **C)
    assert not G.run.last.x.requires_grad
    assert not any(torch.is_tensor(o) and o.requires_grad for o in G.run.scale_sums[0])


# --- what draws ---


def drawn(generator, w=3.0, i=slice(0, 6), D=toy, kind=Noisy):
    G = GuidedDenoiser(D, kind(generator), w=w)
    return torch.stack([G(X[i], s, **rows(C, i)) for s in (3.0, 1.0, 0.5)])


def test_a_seed_repeats_and_a_generator_goes_on():
    def twice(generator):
        G = GuidedDenoiser(toy, Noisy(generator), w=2.0)
        return torch.equal(*(sample(G, X, SIGMAS, karras.euler, C) for _ in range(2)))

    assert twice(5)
    assert twice([1, 2, 3, 4, 5, 6])
    assert not twice(torch.Generator().manual_seed(5))
    assert not twice([torch.Generator().manual_seed(i) for i in range(6)])
    assert not twice(None)


def test_draws_are_new_at_each_evaluation():
    seen = []

    class Spied(Noisy):
        def queries(self, x, sigma, cond, generators=None):
            (q,) = super().queries(x, sigma, cond, generators)
            seen.append(q.cond['c'])
            return [q]

    GuidedDenoiser(toy, Spied(5), w=2.0)(X, 2.0, **C)
    G = GuidedDenoiser(toy, Spied(5), w=2.0)
    seen.clear()
    sample(G, X, SIGMAS, karras.euler, C)
    assert len({tuple(o.tolist()) for o in seen}) == len(seen) == 8


def test_draws_of_a_sample_do_not_depend_on_the_batch():
    whole = drawn(5)
    close(drawn(5, i=slice(0, 2)), whole[:, :2])
    many = drawn(list(range(6)))
    close(drawn([4, 5], i=slice(4, 6)), many[:, 4:])


@pytest.mark.parametrize('kind', [Noisy, CalledNoisy])
def test_draws_of_a_sample_do_not_depend_on_which_are_guided(kind):
    w = torch.tensor([2.0, 1.0, 3.0, 2.0, 1.0, 3.0])
    mixed = drawn(5, w, kind=kind)[:, [0, 2, 3, 5]]
    full = drawn(5, w + (w == 1), kind=Noisy)[:, [0, 2, 3, 5]]
    close(mixed, full)


@pytest.mark.parametrize('size', [1, 2, 5])
def test_draws_do_not_depend_on_micro_batches(size):
    close(drawn(5, D=Microbatched(toy, size)), drawn(5))


def test_terms_and_the_sampler_draw_other_numbers():
    seen = []

    class Spied(Noisy):
        def queries(self, x, sigma, cond, generators=None):
            (q,) = super().queries(x, sigma, cond, generators)
            seen.append(q.cond['c'])
            return [q]

    GuidedDenoiser(toy, Term(Spied(5), 2.0), Term(Spied(5), 2.0))(X, 2.0, **C)
    fresh = torch.cat([torch.randn(1, generator=g) for g in split_generator(5, 6)])
    noise = []

    def spied_step(D, x, sigma, sigma_next, state):
        noise.append(state.noise(sigma, sigma_next)[:, 0])
        return x, state.evaluate(D, x, sigma)

    sample(toy, X[:, :1], [3.0, 1.0], spied_step, C, generator=5)
    for a, b in (seen[0], seen[1]), (seen[0], fresh), (seen[1], fresh), (seen[0], noise[0]):
        assert not (a == b).any()


def test_a_nested_guided_denoiser_that_draws_is_refused():
    inner = GuidedDenoiser(toy, Noisy(5), w=2.0)
    with pytest.raises(ValueError, match='outermost'):
        GuidedDenoiser(Denoiser(toy), inner, w=2.0)


# --- threads ---


@pytest.mark.parametrize('name', [*REMEMBERING, 'nothing'])
def test_threads_share_a_denoiser(name):
    G = GuidedDenoiser(toy, NONE, w=3.0) if name == 'nothing' else remembering(name)
    xs = [10 * randn((6, 4), i) for i in range(6)]
    want = [sample(G, x, SIGMAS, karras.heun, C) for x in xs]
    cost = G.run.nfe_per_sample
    got, counts = {}, {}
    barrier = threading.Barrier(len(xs))

    def work(i):
        barrier.wait()
        got[i] = sample(G, xs[i], SIGMAS, karras.heun, C)
        counts[i] = G.run.nfe_per_sample

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, o in enumerate(want):
        assert torch.equal(got[i], o)
    assert torch.equal(counts[5], cost)


def test_a_thread_watches_its_own_evaluations():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    with G.watch() as traces:
        thread = threading.Thread(target=lambda: G(X, 1.0, **C))
        thread.start()
        thread.join()
        G(X, 1.0, **C)
    assert len(traces) == 1


# --- intervals ---


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('lo, hi', [(2, 6), (3, 4), (0, 8)])
def test_intervals_of_a_samplers_own_levels(lo, hi, dtype):
    sigmas = get_sigmas_karras(9, 0.1, 10.0)
    interval = (sigmas[hi].item(), sigmas[lo].item())
    G = GuidedDenoiser(toy, NONE, w=3.0, interval=interval)
    guided_steps = []
    for i, s in enumerate(sigmas[:-1].to(dtype)):
        G(X.to(dtype), s, c=C['c'].to(dtype))
        guided_steps += [i] * (G.last_nfe[0].item() == 2)
    assert guided_steps == list(range(lo, hi))


@pytest.mark.parametrize('digits', [4, 5, 6])
def test_interval_bounds_that_were_printed(digits):
    sigmas = get_sigmas_karras(9, 0.1, 10.0)
    lo, hi = (float(f'{sigmas[i].item():.{digits + 1}g}') for i in (6, 2))
    G = GuidedDenoiser(toy, NONE, w=3.0, interval=(lo, hi))
    on = []
    for s in sigmas[:-1]:
        G(X, s, **C)
        on.append(G.last_nfe[0].item() == 2)
    assert on == [False, False, True, True, True, True, False, False, False]


def test_intervals_of_tensors():
    G = GuidedDenoiser(toy, NONE, w=3.0, interval=(SIGMAS[6], SIGMAS[2]))
    assert G.terms[0].interval == (SIGMAS[6].item(), SIGMAS[2].item())


def test_an_interval_is_half_open_and_per_sample():
    G = GuidedDenoiser(toy, NONE, w=3.0, interval=(0.1, 1.6))
    G(X, torch.tensor([0.1, 1.6, 1.7, 0.2, 5.0, 0.05]), **C)
    assert G.run.nfe_per_sample.tolist() == [1, 2, 1, 2, 1, 1]


def test_an_interval_in_time_steps_is_refused():
    G = GuidedDenoiser(DiscreteDenoiser(lambda x, t: x), NONE, w=3.0, interval=(200, 800))
    with pytest.raises(ValueError, match='interval: expected noise levels between 0.02'):
        G.start()


# --- where eps says nothing ---


EPS_RULES = [base_norm, t_norm, full_norm, beta_cfg, tcfg]


@pytest.mark.parametrize('r', EPS_RULES)
def test_eps_rules_are_left_out_beyond_the_models_range(r):
    D = flow_model()
    for sigma in 1.1 * D.sigma_max, 1e4, 1e5, 1e6, 1e20:
        G = GuidedDenoiser(D, NONE, w=3.0, rule=r)
        x = X * sigma
        assert torch.equal(G(x, sigma, **C), D(x, sigma, **C))
        assert G.nfe == 6


@pytest.mark.parametrize('r', EPS_RULES)
def test_eps_rules_act_at_the_end_of_the_models_range(r):
    D = flow_model()
    G = GuidedDenoiser(D, NONE, w=3.0, rule=r)
    G(X * D.sigma_max, D.sigma_max, **C)
    assert G.nfe == 12


@pytest.mark.parametrize('r', EPS_RULES)
def test_no_result_depends_on_how_large_the_first_sigma_is(r):
    "A flow model whose sampler begins at t = 1, for which a finite stand-in is taken."
    G = GuidedDenoiser(flow_model(), NONE, w=0.2 if r in (t_norm, full_norm) else 1.5, rule=r)
    noise, ends = randn((6, 4), 1), []
    for first in 1e5, 1e6, 1e7:
        sigmas = [first, *get_sigmas_karras(8, 0.05, 20.0).tolist()]
        ends.append(sample(G, noise * first, sigmas, karras.euler, C))
    close(ends[0], ends[2], 1e-2)
    close(ends[1], ends[2], 1e-3)
    assert ends[2].abs().max() < 100


@pytest.mark.parametrize('r', EPS_RULES)
def test_eps_rules_on_a_model_of_zero_terminal_snr(r):
    abar = torch.linspace(0.999, 0.0, 50)

    def net(x, t, c):
        return torch.tanh(x + c[:, None])

    D = DiscreteDenoiser(net, abar, 'v')
    G = GuidedDenoiser(D, NONE, w=3.0, rule=r)
    out = G(X * 1e6, 1e6, **C)
    assert torch.equal(out, D(X * 1e6, 1e6, **C))


def test_eps_rules_are_left_out_at_the_stand_in_for_zero_terminal_snr():
    abar = torch.linspace(0.999, 0.0, 50)
    D = DiscreteDenoiser(lambda x, t, c: torch.tanh(x + c[:, None]), abar, 'v')
    for sigma, n in (D.sigmas[-1].item(), 6), (D.sigmas[-2].item(), 12):
        G = GuidedDenoiser(D, NONE, w=3.0, rule=base_norm)
        G(X * sigma, sigma, **C)
        assert G.nfe == n


def test_no_sample_stops_where_noise_predictions_say_nothing():
    G = GuidedDenoiser(flow_model(), NONE, w=3.0, stop=0.9)
    with G.watch() as traces:
        G(X * 1e6, 1e6, step=0, **C)
    assert not G.run.stopped[0].any()
    assert traces[0].cosine.isnan().all()
    assert traces[0].ratio.isnan().all()
    assert (traces[0].scale - 3).abs().max() < 1e-3
    G(X * 900.0, 900.0, step=1, **C)
    assert G.run.stopped[0].any()


def test_rules_of_other_spaces_act_at_any_level():
    G = GuidedDenoiser(flow_model(), NONE, w=3.0, rule=apg)
    G(X * 1e6, 1e6, **C)
    assert G.nfe == 12


def test_infinite_noise_is_refused_by_name():
    with pytest.raises(ValueError, match='sigma: expected finite numbers'):
        GuidedDenoiser(flow_model(), NONE, w=3.0, rule=t_norm)(X, torch.full((6,), math.inf), **C)


# --- not finite ---


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_raises_with_step_and_sigma(value):
    def broken(x, sigma, c):
        return torch.where(c[:, None] > 1, value, x)

    with pytest.raises(FloatingPointError, match='not finite at sigma=2, step 3'):
        GuidedDenoiser(broken, NONE, w=3.0)(X, 2.0, step=3, **C)


def test_a_network_that_is_not_finite_raises_with_step_and_sigma():
    D = DiscreteDenoiser(lambda x, t, c: x * math.nan)
    for G in (GuidedDenoiser(D, NONE, w=3.0), GuidedDenoiser(GuidedDenoiser(D, NONE), NONE)):
        with pytest.raises(FloatingPointError) as e:
            G(X, 2.0, step=3, **C)
        assert str(e.value) == 'the estimate is not finite at sigma=2, step 3'


def test_images_that_are_not_finite():
    x = X.clone()
    x[2, 1] = math.nan
    with pytest.raises(FloatingPointError, match='not finite at sigma=2'):
        GuidedDenoiser(toy, NONE, w=3.0)(x, 2.0, **C)


def test_conditions_that_are_not_finite():
    with pytest.raises(FloatingPointError, match='not finite'):
        GuidedDenoiser(toy, dict(c=torch.full((1,), math.nan)), w=3.0)(X, 2.0, **C)


def test_noise_levels_that_are_not_finite():
    with pytest.raises(ValueError, match='sigma: expected finite'):
        GuidedDenoiser(toy, NONE, w=3.0)(X, torch.full((6,), math.nan), **C)


def test_large_finite_values_are_not_refused():
    def large(x, sigma, c):
        return torch.full_like(x, 3e38)

    assert GuidedDenoiser(large, NONE, w=1.0)(X, 2.0, **C).isfinite().all()


# --- micro-batches ---


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 7, 12, 100])
def test_no_forward_has_more_rows(size):
    D = Counted()
    G = GuidedDenoiser(Microbatched(D, size), Term(NONE, 2.0), Term(OTHER, 1.5))
    close(G(X, 1.0, **C), POS + (POS - NEG) + 0.5 * (POS - BAD), 1e-5)
    assert max(D.rows) <= size
    assert sum(D.rows) == G.nfe == 18


def test_a_sample_stays_in_one_piece_if_it_fits():
    D = Counted()
    GuidedDenoiser(Microbatched(D, 7), Term(NONE, 2.0), Term(OTHER, 1.5))(X, 1.0, **C)
    assert D.rows == [6, 6, 6]


def test_micro_batches_of_a_denoiser_alone():
    D = Counted()
    close(Microbatched(D, 4)(X, 1.0, **C), POS, 1e-6)
    assert D.rows == [4, 2]


def test_micro_batches_of_parts_and_mixed_weights():
    w = torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 4.0])
    for size in 1, 2, 3, 5:
        G, H = GuidedDenoiser(Microbatched(toy, size), NONE, w=w), GuidedDenoiser(toy, NONE, w=w)
        close(G(X, 1.0, **C), H(X, 1.0, **C))
        assert torch.equal(G.run.nfe_per_sample, H.run.nfe_per_sample)
        for a, b in zip(G.parts(X, 1.0, **C)[:3], H.parts(X, 1.0, **C)[:3], strict=True):
            close(a, b)


class Full:
    "A denoiser that is out of memory at some calls."

    def __init__(self, fail):
        self.fail, self.calls, self.rows = fail, 0, []

    def __call__(self, x, sigma, c):
        self.calls += 1
        if self.fail(self.calls, len(x)):
            raise torch.OutOfMemoryError('simulated')
        self.rows.append(len(x))
        return toy(x, sigma, c)


FAILS = {
    'above 5 rows': lambda i, b: b > 5,
    'above 1 row': lambda i, b: b > 1,
    'second call': lambda i, b: i == 2,
    'fourth call': lambda i, b: i == 4,
    'late': lambda i, b: i == 9 and b > 2,
}


@pytest.mark.parametrize('fail', FAILS)
@pytest.mark.parametrize('name', [*REMEMBERING, 'two terms'])
def test_out_of_memory_changes_nothing(name, fail):
    def make(D):
        if name == 'two terms':
            return GuidedDenoiser(D, Term(NONE, 2.0), Term(Noisy(3), 1.5))
        return remembering(name, D)

    D = Full(FAILS[fail])
    G, H = make(Microbatched(D, 100)), make(toy)
    if name == 'called draws':
        G, H = (make_called(o) for o in (Microbatched(D, 100), toy))
    got, want = (sample(o, 10 * X, SIGMAS, karras.heun, C) for o in (G, H))
    close(got, want, 1e-4)
    assert torch.equal(G.run.nfe_per_sample, H.run.nfe_per_sample)
    assert sum(D.rows) == G.nfe


def make_called(D):
    return GuidedDenoiser(D, CalledNoisy(5), w=3.0)


def test_micro_batches_shrink_and_recover_in_the_next_run():
    D = Full(lambda i, b: b > 5)
    M = Microbatched(D, 100)
    G = GuidedDenoiser(M, NONE, w=3.0)
    G.start()
    G(X, 2.0, **C)
    small = M.fitting
    assert small <= 5
    G(X, 1.0, **C)
    assert M.fitting == small
    D.fail = lambda i, b: False
    G.start()
    D.rows.clear()
    G(X, 2.0, **C)
    assert D.rows == [12]


def test_out_of_memory_for_one_row_raises():
    M = Microbatched(Full(lambda i, b: True), 100)
    with pytest.raises(torch.OutOfMemoryError):
        GuidedDenoiser(M, NONE, w=3.0)(X, 1.0, **C)


def test_micro_batches_of_a_guided_denoiser_are_refused():
    with pytest.raises(ValueError, match='GuidedDenoiser'):
        Microbatched(GuidedDenoiser(toy, NONE), 2)


# --- what others have evaluated ---


def test_known_predictions_are_not_evaluated():
    D = Counted()
    G = GuidedDenoiser(D, NONE, w=3.0)
    close(G(X, 1.0, known={'pos': POS}, **C), NEG + 3 * (POS - NEG))
    assert D.rows == [6]
    close(G(X, 1.0, known={'pos': POS, 0: NEG}, **C), NEG + 3 * (POS - NEG))
    assert D.rows == [6]
    assert G.nfe == 24  # somebody has evaluated them


def test_a_known_prediction_of_another_model():
    def weak(x, sigma, c):
        raise AssertionError('not evaluated')

    close(GuidedDenoiser(toy, weak, w=3.0)(X, 1.0, known={0: NEG}, **C), NEG + 3 * (POS - NEG))


# --- conditions ---


def words(x, sigma, tokens):
    return x / (1 + sigma[:, None]) + torch.tanh(tokens).mean((1, 2))[:, None]


TEXT = dict(tokens=randn((6, 5, 4), 7))
EMPTY, SHORT = dict(tokens=randn((1, 5, 4), 8)), dict(tokens=randn((1, 2, 4), 9))


def test_conditions_of_other_lengths_have_a_forward_of_their_own():
    D = Counted(words)
    G = GuidedDenoiser(D, Term(SHORT, 3.0), Term(EMPTY, 2.0))
    pos, short, empty = (words(X, S1, **o) for o in (TEXT, SHORT, EMPTY))
    close(G(X, 1.0, **TEXT), pos + 2 * (pos - short) + (pos - empty))
    assert D.rows == [12, 6]
    assert G.nfe == 18


def test_conditions_with_one_row_per_sample():
    many = dict(c=torch.linspace(-2.0, 2.0, 6))
    close(GuidedDenoiser(toy, many, w=3.0)(X, 1.0, **C), toy(X, S1, **many) * -2 + 3 * POS)


def test_names_that_are_not_given_are_as_in_the_positive():
    def two(x, sigma, c, d):
        return toy(x, sigma, c) + d[:, None]

    G = GuidedDenoiser(two, NONE, w=3.0)
    close(G(X, 1.0, d=S1 * 5, **C), NEG + 3 * (POS - NEG) + 5)


def test_one_row_for_the_positive():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    close(G(X, 1.0, c=torch.ones(1)), 3 * toy(X, S1, S1) - 2 * NEG)


# --- copies and pickles ---


def copies(o):
    return copy.copy(o), copy.deepcopy(o), pickle.loads(pickle.dumps(o))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(1, 4)
        for i, p in enumerate(self.parameters()):
            p.data = randn(p.shape, i) / 2

    def forward(self, x, t, c):
        return self.a(x) + torch.tanh(self.b(c[:, None].to(x.dtype)))


@pytest.mark.parametrize('kw', [dict(stop=0.9), dict(rule=apg), dict(post=rescale), dict()])
def test_copies_of_a_guided_denoiser(kw):
    G = GuidedDenoiser(DiscreteDenoiser(Net()), NONE, w=[3.0, 2.0], sigmas=[3.0, 1.0, 0.0], **kw)
    want = sample(G, X, [3.0, 1.0, 0.0], karras.euler, C)
    for o in copies(G):
        assert torch.equal(sample(o, X, [3.0, 1.0, 0.0], karras.euler, C), want)


@pytest.mark.parametrize('name', ['stop', 'apg', 'draws'])
def test_a_copy_has_runs_of_its_own(name):
    G = remembering(name)
    G(X, 3.0, **C)
    run = G.run
    for o in copies(G):
        assert o.run is not run
        o(X[:2], 1.0, c=C['c'][:2])
    assert G.run is run
    G(X, 1.0, **C)
    assert run.evaluations == 2


def test_a_copy_is_not_watched():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    with G.watch() as traces:
        for o in copies(G):
            o(X, 1.0, **C)
    assert traces == []


@pytest.mark.parametrize(
    'w', [3.0, [3.0, 2.0], torch.ones(2, 6), torch.ones(6), on_sigmas([3.0, 2.0], [3.0, 1.0, 0.0])]
)
def test_copies_of_weights_and_terms(w):
    for o in copies(Weight.of(w)):
        assert torch.equal(o(S1, 1), Weight.of(w)(S1, 1))
    for o in copies(Term(NONE, w, apg, (0.1, 2.0), 0.9)):
        assert torch.equal(o.w(S1, 1), Weight.of(w)(S1, 1))
        assert (o.rule, o.interval, o.stop) == (apg, (0.1, 2.0), 0.9)


@pytest.mark.parametrize('neg', [Conditions(NONE), Model(weaker), Noisy(5), Mean(NONE, OTHER)])
def test_copies_of_negatives(neg):
    want = GuidedDenoiser(toy, neg, w=3.0)(X, 1.0, **C)
    for o in copies(neg):
        assert torch.equal(GuidedDenoiser(toy, o, w=3.0)(X, 1.0, **C), want)


@pytest.mark.parametrize('name', REMEMBERING)
def test_copies_of_a_run(name):
    G = remembering(name)
    sample(G, X, SIGMAS, karras.euler, C)
    for o in copies(G.run):
        assert o.nfe_per_sample.tolist() == G.run.nfe_per_sample.tolist()
        assert o.effective_scale() == G.run.effective_scale()


def test_copies_of_the_others():
    for o in (*copies(Microbatched(toy, 4)), *copies(Microbatched(Microbatched(toy, 8), 4))):
        close(o(X, 1.0, **C), POS)
    F = ZeroInit(FlowDenoiser(Net()), LEVELS)
    for o in copies(F):
        assert torch.equal(o(X, 1.0, **C), F(X, 1.0, **C))


def test_state_dict_is_that_of_the_model():
    D = DiscreteDenoiser(Net())
    G = GuidedDenoiser(D, NONE, w=3.0)
    G(X, 2.0, **C)
    assert set(G.state_dict()) == {f'inner_model.{k}' for k in D.state_dict()}


def test_a_guided_denoiser_shows_what_the_model_has():
    D = DiscreteDenoiser(Net())
    G = GuidedDenoiser(D, NONE)
    assert G.sigma_max == D.sigma_max
    assert G.sigmas is D.sigmas
    assert G.takes_step


# --- compiled, inference mode, half precision, no samples, nested ---


def test_a_compiled_network_inside():
    net = Net().requires_grad_(False)
    want = GuidedDenoiser(DiscreteDenoiser(net), NONE, w=3.0)(X, 2.0, **C)
    net = torch.compile(net, backend='eager')
    close(GuidedDenoiser(DiscreteDenoiser(net), NONE, w=3.0)(X, 2.0, **C), want)


@pytest.mark.parametrize('kw', [dict(w=3.0), dict(w=3.0, rule=apg), dict(w=3.0, stop=0.99)])
def test_a_compiled_guided_denoiser(kw):
    D = DiscreteDenoiser(Net().requires_grad_(False))
    G = GuidedDenoiser(D, NONE, **kw)
    want = sample(G, 10 * X, SIGMAS, karras.euler, C)
    close(sample(torch.compile(G, backend='eager'), 10 * X, SIGMAS, karras.euler, C), want)


@pytest.mark.parametrize('name', REMEMBERING)
def test_inference_mode(name):
    want = sample(remembering(name), 10 * X, SIGMAS, karras.heun, C)
    with torch.inference_mode():
        got = sample(remembering(name), 10 * X, SIGMAS, karras.heun, C)
    assert torch.equal(got, want)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    D = DiscreteDenoiser(Net().requires_grad_(False).to(dtype))
    half = {k: v.to(dtype) for k, v in C.items()}
    G = GuidedDenoiser(D, NONE | {'c': NONE['c'].to(dtype)}, w=4.0, rule=full_norm)
    p = G.parts(X.to(dtype), 2.0, **half)
    noise = [from_x0(o.float(), X.to(dtype).float(), 2.0, 'eps') for o in (p.neg, p.pos)]
    want = to_x0(full_norm(*noise, 4.0), X.to(dtype).float(), 2.0, 'eps')
    assert torch.equal(p.pred, want.to(dtype))
    assert G(X.to(dtype), 2.0, **half).dtype == dtype


@pytest.mark.parametrize('name', [*REMEMBERING, 'nothing'])
def test_no_samples(name):
    G = GuidedDenoiser(toy, NONE) if name == 'nothing' else remembering(name)
    out = sample(G, X[:0], SIGMAS, karras.heun, dict(c=C['c'][:0]))
    assert out.shape == (0, 4)
    assert G.nfe == 0


def test_no_samples_in_micro_batches():
    G = GuidedDenoiser(Microbatched(toy, 2), NONE)
    assert G(X[:0], 1.0, c=C['c'][:0]).shape == (0, 4)


def test_one_guided_denoiser_inside_another():
    inner = GuidedDenoiser(toy, NONE, w=2.0)
    outer = GuidedDenoiser(inner, OTHER, w=3.0)
    want = 3 * (2 * POS - NEG) - 2 * (2 * BAD - NEG)
    close(outer(X, 1.0, **C), want, 1e-4)
    assert inner.nfe == 24


def test_a_guided_denoiser_as_the_negative():
    weak = GuidedDenoiser(toy, OTHER, w=2.0)
    G = GuidedDenoiser(toy, weak, w=3.0)
    close(G(X, 1.0, **C), 3 * POS - 2 * (2 * POS - BAD), 1e-4)
    assert G.run.nfe_per_sample.tolist() == [3] * 6


@pytest.mark.parametrize('wrap', [lambda o: o, Denoiser])
def test_runs_of_a_guided_negative(wrap):
    weak = GuidedDenoiser(toy, NONE, w=torch.tensor([2.0, 1.0, 3.0, 1.0, 1.0, 1.0]))
    G = GuidedDenoiser(Denoiser(toy), wrap(weak), w=2.0)
    a, b = (sample(G, X, [3.0, 1.0, 0.5, 0.0], karras.euler, C) for _ in range(2))
    assert torch.equal(a, b)
    assert G.run.nfe_per_sample.tolist() == [9, 6, 9, 6, 6, 6]
    assert weak.nfe == 48


def test_the_step_reaches_a_guided_denoiser_inside():
    w = [1.5 + i for i in range(8)]
    outer = GuidedDenoiser(GuidedDenoiser(toy, NONE, w=w), OTHER, w=2.0)
    with outer.inner_model.watch() as traces:
        sample(outer, 10 * X, SIGMAS, karras.heun, C)
    assert [round(o.scale.nanmedian().item(), 2) for o in traces] == [o for o in w for _ in '12'][
        :-1
    ]


@pytest.mark.parametrize('a, b', [(toy, toy), (Denoiser(toy), Denoiser(toy))])
def test_the_same_model_is_no_negative(a, b):
    with pytest.raises(ValueError, match='neg: the negative model is the guided one'):
        GuidedDenoiser(a, b, w=2.0)(X, 1.0, **C)


def test_an_error_leaves_it_usable():
    class Broken(Called):
        def __call__(self, *args, **kwargs):
            raise RuntimeError('in the middle')

    G = GuidedDenoiser(toy, Term(Broken(), 3.0), Term(NONE, 2.0))
    with pytest.raises(RuntimeError, match='in the middle'):
        G(X, 1.0, **C)
    with pytest.raises(RuntimeError, match='in the middle'):
        G(X, 1.0, **C)


# --- negatives of one's own ---


def test_a_called_negative_gets_the_rows_that_need_it():
    seen = []

    class Spy(Called):
        needs_pos = True

        def __call__(self, D, x, sigma, cond, pos=None, rows=None, generators=None, seen_=None):
            seen.append((x, cond['c'], pos, rows, generators))
            return 0 * x

    w = torch.tensor([0.0, 1.0, 2.0, 1.0, 3.0, 1.0])
    G = GuidedDenoiser(toy, Spy(), w=w)
    close(G(X, 1.0, **C), w[:, None] * POS)
    x, c, pos, at, generators = seen[0]
    assert at.tolist() == [0, 2, 4]
    assert torch.equal(x, X[at])
    assert torch.equal(c, C['c'][at])
    assert torch.equal(pos, POS[at])
    assert generators is None
    assert G.run.nfe_per_sample.tolist() == [2, 1, 2, 1, 2, 1]


def test_a_negative_of_queries_that_needs_the_positive():
    class Between(Queries):
        needs_pos = True

        def queries(self, x, sigma, cond, generators=None):
            return [Query(x, sigma, {**cond, 'c': 0 * cond['c']})]

        def combine(self, outputs, x, sigma, pos):
            return (outputs[0] + pos) / 2

    w = torch.tensor([0.0, 1.0, 2.0, 1.0, 3.0, 1.0])
    G = GuidedDenoiser(toy, Between(), w=w)
    neg = (NEG + POS) / 2
    close(G(X, 1.0, **C), neg + w[:, None] * (POS - neg))
    assert G.run.nfe_per_sample.tolist() == [2, 1, 2, 1, 2, 1]


def test_a_called_negative_of_two_evaluations():
    class Two(Called):
        nfe = 2

        def __call__(self, D, x, sigma, cond, **kw):
            return D(D(x, sigma, **cond), sigma, **cond)

    G = GuidedDenoiser(toy, Two(), w=3.0)
    G(X, 1.0, **C)
    assert G.nfe == 18


def test_a_query_at_another_noise_level():
    class Higher(Queries):
        def queries(self, x, sigma, cond, generators=None):
            return [Query(x, 2 * sigma, cond)]

    D = Counted()
    G = GuidedDenoiser(D, Higher(), w=3.0)
    close(G(X, 1.0, **C), 3 * POS - 2 * toy(X, 2 * S1, **C))
    assert D.rows == [12]


# --- watching ---


def test_what_a_trace_says():
    G = GuidedDenoiser(toy, NONE, w=torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 4.0]))
    with G.watch() as traces:
        G(X, 1.0, **C)
    (t,) = traces
    close(t.scale, torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 4.0]), 1e-3)
    assert t.cosine.isnan().tolist() == [False, True, True, False, True, False]
    assert t.ratio.isnan().tolist() == [False, True, True, False, True, False]
    assert torch.equal(t.sigma, S1)
    close(t.cosine[0], torch.cosine_similarity(eps(POS), eps(NEG))[0])
    close(t.ratio[0], (eps(POS) - eps(NEG))[0].norm() / eps(NEG)[0].norm())


def test_two_terms_are_watched_at_once():
    G = GuidedDenoiser(toy, Term(NONE, 3.0), Term(OTHER, 2.0))
    with G.watch() as a, G.watch(1) as b:
        G(X, 1.0, **C)
        G(X, 0.9, **C)
    G(X, 0.8, **C)
    assert len(a) == len(b) == 2
    d = POS - BAD
    want = ((2 * (POS - NEG) + (POS - BAD) + d) * d).sum(1) / (d * d).sum(1)
    close(b[0].scale, want, 1e-4)


def test_a_term_that_is_off_while_others_act_has_no_scale():
    G = GuidedDenoiser(toy, Term(NONE, 3.0, interval=(4.0, 5.0)), Term(OTHER, 2.0))
    with G.watch() as traces:
        G(X, 1.0, **C)
    assert traces[0].scale.isnan().all()


def test_a_term_that_is_off_as_all_are_has_scale_1():
    G = GuidedDenoiser(toy, Term(NONE, 3.0, interval=(4.0, 5.0)), Term(OTHER, 1.0))
    with G.watch() as traces:
        G(X, 1.0, **C)
    assert traces[0].scale.tolist() == [1.0] * 6


def test_equal_predictions_have_no_scale():
    G = GuidedDenoiser(toy, dict(c=C['c']), w=3.0)
    with G.watch() as traces:
        G(X, 1.0, **C)
    assert traces[0].scale.isnan().all()


def test_watching_ends_with_an_error():
    G = GuidedDenoiser(toy, NONE)
    with pytest.raises(KeyError), G.watch() as traces:
        raise KeyError
    G(X, 1.0, **C)
    assert traces == []


# --- errors: one short sentence that names the argument, before the network is asked ---


D = DiscreteDenoiser(Net())


def never(x, sigma, **cond):
    raise AssertionError('the network was asked')


def g(neg=NONE, D=never, **kw):
    return GuidedDenoiser(D, neg, **kw)


def ask(neg=NONE, x=X, sigma=1.0, cond=C, step=None, known=None, D=never, **kw):
    return g(neg, D, **kw)(x, sigma, step=step, known=known, **cond)


class Sized:
    def __init__(self, *shape):
        self.latent_shape = shape

    def __call__(self, x, sigma, **cond):
        raise AssertionError('the network was asked')


class Conv(nn.Module):
    "A network as diffusers has them: its configuration says its channels."

    def __init__(self, channels):
        super().__init__()
        self.config = type('config', (), dict(in_channels=channels))

    def forward(self, x, t, **cond):
        raise AssertionError('the network was asked')


class TwoOfOne(Queries):
    def queries(self, x, sigma, cond, generators=None):
        return [Query(x, sigma, cond)] * 2


def flat(x, sigma, **cond):
    return x[:, :1]


nan, inf = math.nan, math.inf
ERRORS = [
    # weights
    *[(lambda w=w: Term(NONE, w), ValueError, 'w:') for w in (-1, -0.1, nan, inf)],
    *[
        (lambda w=w: Term(NONE, torch.tensor(w)), ValueError, 'w:')
        for w in (-1.0, [1.0, nan, 2.0], [1.0, -2.0])
    ],
    *[(lambda w=w: Term(NONE, w), ValueError, 'w:') for w in ([1.0, nan], [[1.0], [-1.0]], [])],
    *[
        (lambda w=w: Term(NONE, w), TypeError, 'w:')
        for w in ('7.5', True, {}, object(), [1.0, None], ['a'], [[1.0, 2.0], [3.0]], b'1')
    ],
    (lambda: Term(NONE, torch.ones(2, 3, 1)), ValueError, 'w:'),
    (lambda: Term(NONE, torch.tensor([1j])), TypeError, 'w:'),
    (lambda: Term(NONE, torch.tensor([True])), TypeError, 'w:'),
    (lambda: Term(NONE, [True, False]), TypeError, 'w:'),
    (lambda: Term(NONE, np.array(True)), TypeError, 'w:'),
    (lambda: ask(w=lambda s: [1.0] * 3), (TypeError, ValueError), 'w'),
    (lambda: ask(w=lambda s: s * nan), ValueError, 'w: its function'),
    (lambda: ask(w=lambda s: nan), ValueError, 'w: its function'),
    (lambda: ask(w=lambda s: None), TypeError, 'w: its function'),
    (lambda: ask(w=torch.ones(2)), ValueError, 'w: expected one value, or 6'),
    (lambda: ask(w=torch.ones(8, 2), step=0), ValueError, 'w:'),
    (lambda: ask(w=[7.5] * 10), ValueError, 'w has one value per step'),
    (lambda: ask(w=[7.5] * 10, step=10), ValueError, 'w has 10 values, one per step'),
    (lambda: ask(w=[7.5] * 10, step=-1), ValueError, 'w has 10 values, one per step'),
    (lambda: g(w=[7.5] * 9, sigmas=SIGMAS), ValueError, 'w:'),
    (lambda: g(w=on_sigmas([3.0] * 8, SIGMAS), sigmas=[3.0, 1.0]), ValueError, 'w belongs to'),
    # intervals and stop
    *[
        (lambda i=i: Term(NONE, interval=i), ValueError, 'interval:')
        for i in (
            (2.0, 0.3),
            (1.0, 1.0),
            (nan, 1.0),
            (1.0,),
            1.0,
            ('a', 'b'),
            (True, 5),
            (0, True),
            (None, 1.0),
            'ab',
            (1.0, 2.0, 3.0),
            (torch.ones(2), 3.0),
            (-1.0, 3.0),
            (inf, inf),
        )
    ],
    *[(lambda s=s: Term(NONE, stop=s), ValueError, 'stop:') for s in (2.0, '1', True, nan, -1.1)],
    (lambda: g(D=D, interval=(200, 800)).start(), ValueError, 'interval:'),
    (lambda: ask(D=D, interval=(1e-9, 1e-8)), ValueError, 'interval:'),
    # rules
    *[
        (lambda r=r: Term(NONE, rule=r), TypeError, 'rule:')
        for r in ('cfg', dict, 3, GuidanceTfm({'g': [1.0]}), rescale, GuidanceTfm)
    ],
    (lambda: Term(NONE, rule=partial(apg, beta=0.1)), TypeError, 'rule:'),
    (lambda: ask(D=toy, rule=lambda neg, pos, w: None), ValueError, 'rule:'),
    (lambda: ask(D=toy, rule=in_eps(lambda neg, pos, w: None)), ValueError, 'rule:'),
    (lambda: ask(D=toy, rule=lambda neg, pos, w: pos[:1]), ValueError, 'rule:'),
    (lambda: ask(D=toy, rule=in_eps(lambda neg, pos, w: pos[:1])), ValueError, 'rule:'),
    *[(lambda p=p: g(post=p), TypeError, 'post:') for p in ('rescale', cfg, [cfg], 3, len)],
    # negatives
    *[
        (lambda o=o: GuidedDenoiser(never, o), TypeError, 'neg:')
        for o in (7.5, None, 'a', Negative, [NONE], True)
    ],
    *[(lambda o=o: Conditions(o), TypeError, 'cond:') for o in (None, 3, 'a', [NONE])],
    *[(lambda o=o: Model(o), TypeError, 'model:') for o in (None, 3, nn.Linear, Conv(4))],
    (lambda: ask({}), ValueError, 'negative conditions:'),
    (lambda: ask(dict(d=torch.ones(1))), ValueError, 'negative conditions:'),
    *[
        (lambda o=o: ask(dict(c=o)), ValueError, 'c:')
        for o in (None, 3.0, torch.ones(2), torch.tensor(1.0), 'a')
    ],
    (lambda: ask(dict(c=torch.ones(1, 3, 5))), ValueError, 'negative c:'),
    (
        lambda: ask(dict(tokens=torch.ones(1, 5, 3)), cond=dict(tokens=torch.ones(6, 5, 4))),
        ValueError,
        'negative tokens:',
    ),
    (lambda: ask(TwoOfOne()), ValueError, 'TwoOfOne.queries'),
    (lambda: ask(Queries()), NotImplementedError, 'Queries.queries'),
    (lambda: ask(Called(), D=toy), NotImplementedError, 'Called.__call__'),
    (lambda: ask(never, D=never), ValueError, 'neg:'),
    (lambda: ask(Sized(4, 16, 16), D=Sized(4, 8, 8)), ValueError, 'neg:'),
    (
        lambda: ask(DiscreteDenoiser(Conv(3)), D=DiscreteDenoiser(Conv(4)), cond={}),
        ValueError,
        'neg:',
    ),
    (lambda: ask(flat, D=toy), ValueError, 'neg:'),
    (lambda: ask(D=toy, neg=Noisy([1, 2])), ValueError, 'generator:'),
    (lambda: ask(D=toy, neg=Noisy('a')), TypeError, 'generator:'),
    # the denoiser
    (lambda: GuidedDenoiser(never), TypeError, 'terms:'),
    (lambda: GuidedDenoiser(never, NONE, 7.5), TypeError, 'neg:'),
    (lambda: GuidedDenoiser(never, Term(NONE), w=3.0), TypeError, 'w:'),
    (lambda: GuidedDenoiser(never, NONE, OTHER, interval=(1, 2)), TypeError, 'interval:'),
    *[(lambda o=o: g(D=o), TypeError, 'inner_model:') for o in (None, 3, nn.Linear, Conv(4))],
    (lambda: ask(D=flat), ValueError, 'inner_model:'),
    (lambda: ask(D=lambda x, sigma, c: None), ValueError, 'inner_model:'),
    *[
        (lambda s=s: g(sigmas=s), (TypeError, ValueError), 'sigmas:')
        for s in (3, 'a', [1.0], [1.0, 2.0], [nan, 1.0])
    ],
    *[
        (lambda s=s: g().start(s), (TypeError, ValueError), 'sigmas:')
        for s in (3, 'a', [1.0], [1.0, 2.0], [nan, 1.0])
    ],
    # one call
    *[
        (lambda o=o: ask(x=o), TypeError, 'x:')
        for o in (None, 3.0, 'a', torch.tensor(1.0), torch.ones(6, 4).long())
    ],
    *[
        (lambda o=o: ask(sigma=o), (TypeError, ValueError), 'sigma:')
        for o in (None, 'a', -1.0, nan, torch.ones(2), torch.full((6,), nan), True)
    ],
    *[
        (lambda o=o: ask(cond=dict(c=o)), ValueError, 'c:')
        for o in (None, 3.0, torch.ones(2), torch.tensor(1.0), 'a')
    ],
    (lambda: ask(cond={}), ValueError, 'negative conditions:'),
    *[(lambda o=o: ask(step=o), TypeError, 'step:') for o in ('a', 1.5, torch.ones(2))],
    *[
        (lambda o=o: ask(known=o), ValueError, 'known')
        for o in (3, 'pos', {'neg': X}, {1: X}, {'pos': X[:1]}, {0: X[:1]}, {0: None})
    ],
    (lambda: ask(D=Sized(4, 8, 8), x=torch.ones(6, 3, 8, 8)), ValueError, 'x: expected 4 channels'),
    *[(lambda t=t: enter(g().watch(t)), TypeError, 'term:') for t in ('a', None, 1.0, True)],
    *[(lambda t=t: enter(g().watch(t)), IndexError, 'term:') for t in (1, -1)],
    # the wrappers
    *[(lambda n=n: Microbatched(never, n), ValueError, 'size:') for n in (0, -1)],
    *[(lambda n=n: Microbatched(never, n), TypeError, 'size:') for n in (1.5, True, None)],
    (lambda: Microbatched(None, 2), TypeError, 'inner_model:'),
    *[
        (lambda n=n: ZeroInit(flow_model(), LEVELS, n), ValueError, 'steps:')
        for n in (-1, 9, 1.5, True, None)
    ],
    (lambda: ZeroInit(toy, LEVELS), ValueError, 'inner_model:'),
    (lambda: ZeroInit(D, LEVELS), ValueError, 'inner_model:'),
    (lambda: ZeroInit(flow_model(), 'a'), TypeError, 'sigmas:'),
]


def in_eps(f):
    f.space = 'eps'
    return f


def enter(context):
    with context:
        pass


@pytest.mark.parametrize('i', range(len(ERRORS)))
def test_errors_are_clear(i):
    f, kind, begin = ERRORS[i]
    with pytest.raises(kind) as e:
        f()
    text = str(e.value)
    assert text.startswith(begin)
    assert len(text) < 200
    assert '\n' not in text
    assert 'allowed are' not in text


# --- properties ---


@st.composite
def batches(draw):
    "A batch with weights, noise levels, conditions, intervals, rules and terms as they come."
    n = draw(st.integers(1, 5))
    weight = st.sampled_from([0.0, 0.2, 1.0, 2.0, 7.5])
    level = st.sampled_from([0.05, 0.3, 1.0, 2.5, 9.0])
    per_sample = st.lists(weight, min_size=n, max_size=n).map(torch.tensor)
    terms = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(['one', 'many', 'model', 'mean', 'draws', 'called draws']))
        many = dict(c=torch.tensor(draw(st.lists(st.floats(-2, 2), min_size=n, max_size=n))))
        r = draw(st.sampled_from([cfg, base_norm, t_norm, momentum, apg.of(radius=1.0)]))
        interval = draw(st.sampled_from([None, (0.1, 2.5), (0.3, 1.0), (1.0, 20.0)]))
        stop = draw(st.sampled_from([None, 0.5, 0.99]))
        terms.append((kind, many, draw(per_sample), r, interval, stop))
    sigma = torch.tensor(draw(st.lists(level, min_size=n, max_size=n)))
    size = draw(st.sampled_from([None, 1, 2, 3]))
    post = draw(st.sampled_from([None, rescale]))
    x = randn((n, 4), draw(st.integers(0, 99))) * 3
    c = torch.tensor(draw(st.lists(st.floats(-2, 2), min_size=n, max_size=n)))
    return x, sigma, c, terms, size, post


def of_batch(terms, size, post, rows):
    "The guided denoiser for some rows of the batch."

    def negative(kind, many):
        return {
            'one': OTHER,
            'many': dict(c=many['c'][rows]),
            'model': weaker,
            'mean': Mean(NONE, dict(c=many['c'][rows])),
            'draws': Noisy([*range(len(many['c']))][rows]),
            'called draws': CalledNoisy([*range(len(many['c']))][rows]),
        }[kind]

    D = toy if size is None else Microbatched(toy, size)
    made = [Term(negative(kind, m), w[rows], *kw) for kind, m, w, *kw in terms]
    return GuidedDenoiser(D, *made, post=post)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches())
def test_a_sample_does_not_depend_on_its_batch(batch):
    x, sigma, c, terms, size, post = batch
    n, whole = len(x), slice(0, len(x))
    G = of_batch(terms, size, post, whole)
    outs = [G(x * (1 + 0.1 * k), sigma * 0.8**k, step=k, c=c) for k in range(3)]
    for i in range(n):
        s = slice(i, i + 1)
        H = of_batch(terms, None, post, s)
        for k in range(3):
            one = H(x[s] * (1 + 0.1 * k), sigma[s] * 0.8**k, step=k, c=c[s])
            close(one, outs[k][s], 1e-3)
        assert H.nfe == G.run.nfe_per_sample[i]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches())
def test_parts_agree_with_the_prediction(batch):
    x, sigma, c, terms, size, post = batch
    terms = [t for t in terms if 'draws' not in t[0]] or [('one', {'c': c}, torch.ones(len(x)))]
    G, H = (of_batch(terms, size, post, slice(0, len(x))) for _ in range(2))
    p, out = G.parts(x, sigma, c=c), H(x, sigma, c=c)
    if post is None:
        close(p.pred, out, 1e-3)
    close(p.pos, toy(x, sigma, c))
    assert len(p.negs) == len(terms)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=8, max_size=8), st.integers(1, 9))
def test_the_count_is_what_was_asked(w, size):
    D = Counted()
    G = GuidedDenoiser(Microbatched(D, size), NONE, w=w)
    sample(G, 10 * X, SIGMAS, karras.euler, C)
    assert sum(D.rows) == G.nfe == 6 * sum(2 if o == 3 else 1 for o in w)
    assert max(D.rows) <= size


# --- perturbed networks and micro-batches ---


class Doubled(Queries):
    "The same network with the output of its first layer doubled."

    def queries(self, x, sigma, cond, generators=None):
        change = Change('a', lambda out, site: 2 * out, kind='output')
        return [Query(x, sigma, cond, change)]


class DoubledNet(Net):
    def forward(self, x, t, c):
        return 2 * self.a(x) + torch.tanh(self.b(c[:, None].to(x.dtype)))


@pytest.mark.parametrize('size', [None, 1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize('w', [3.0, torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, 2.0])])
def test_perturbed_rows_in_micro_batches(w, size):
    D = DiscreteDenoiser(Net().requires_grad_(False))
    changed = DiscreteDenoiser(DoubledNet().requires_grad_(False))
    terms = Term(NONE, 2.0), Term(Doubled(), w)
    inner = D if size is None else Microbatched(D, size)
    G = GuidedDenoiser(inner, *terms)
    pos, neg = D(X, 2.0, **C), D(X, 2.0, c=torch.zeros(6))
    w = torch.as_tensor(w).expand(6)[:, None]
    want = pos + (pos - neg) + (w - 1) * (pos - changed(X, 2.0, **C))
    close(G(X, 2.0, **C), want, 1e-4)
    assert G.run.nfe_per_sample.tolist() == [3 if o != 1 else 2 for o in w]
    assert torch.equal(D(X, 2.0, **C), pos)


def test_out_of_memory_in_a_perturbed_network():
    class Tight(Net):
        def forward(self, x, t, c):
            if len(x) > 2:
                raise torch.OutOfMemoryError('simulated')
            return super().forward(x, t, c)

    terms = Term(NONE, 2.0), Term(Doubled(), 3.0), Term(Noisy(5), 2.0)
    D, tight = (DiscreteDenoiser(o().requires_grad_(False)) for o in (Net, Tight))
    G, H = GuidedDenoiser(Microbatched(tight, 100), *terms), GuidedDenoiser(D, *terms)
    close(*(sample(o, X, SIGMAS, karras.heun, C) for o in (G, H)), 1e-4)
    assert torch.equal(G.run.nfe_per_sample, H.run.nfe_per_sample)


# --- weights that are elsewhere ---


def test_offloaded_networks():
    hooks = pytest.importorskip('accelerate.hooks')
    from accelerate import cpu_offload

    net = Net().requires_grad_(False)
    want = GuidedDenoiser(DiscreteDenoiser(net), NONE, w=4.0)(X, 2.0, **C)
    cpu_offload(net, 'cpu')
    assert {p.device.type for p in net.parameters()} == {'meta'}
    close(GuidedDenoiser(DiscreteDenoiser(net), NONE, w=4.0)(X, 2.0, **C), want)
    other = DiscreteDenoiser(cpu_offload(Net(), 'cpu'))
    G = GuidedDenoiser(Denoiser(DiscreteDenoiser(net)), Term(NONE, 4.0), Term(other, 2.0))
    close(G(X, 2.0, **C), want)  # a copy of the same weights: no difference
    hooks.remove_hook_from_module(net, recurse=True)


# --- what a called negative wants to see of the positive's forward ---


class Seeing(Called):
    "The mean of the positive's first layer, per sample."

    def observe(self, sigma, cond):
        seen = {}

        def look(out, site):
            for sample_, o in zip(site.samples.tolist(), out, strict=True):
                seen[sample_] = o.mean()
            return out

        return Change('a', look, kind='output'), seen

    def __call__(self, D, x, sigma, cond, pos=None, rows=None, generators=None, seen=None):
        return torch.stack([seen[i] for i in rows.tolist()])[:, None].expand(x.shape)


@pytest.mark.parametrize('size', [None, 1, 2, 5])
@pytest.mark.parametrize('w', [3.0, torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, 2.0])])
def test_a_called_negative_sees_the_positive(w, size):
    net = Net().requires_grad_(False)
    D = DiscreteDenoiser(net)
    G = GuidedDenoiser(D if size is None else Microbatched(D, size), Term(Seeing(), w))
    pos, w = D(X, 2.0, **C), torch.as_tensor(w).expand(6)[:, None]
    neg = net.a(X / (1 + 2.0**2) ** 0.5).mean(1, keepdim=True).expand(6, 4)
    close(G(X, 2.0, **C), torch.where(w == 1, pos, neg + w * (pos - neg)), 1e-3)


# --- every sampler, other conditions in a run, compiled once ---


SHELLS = [k for k in dir(karras) if k.startswith('sample_')]


@pytest.mark.parametrize('name', SHELLS)
def test_samplers_with_the_names_of_k_diffusion(name):
    f = getattr(karras, name)
    kw = dict(generator=1) if 'generator' in inspect.signature(f).parameters else {}
    G = GuidedDenoiser(toy, NONE, w=0.6 if 'cfg_pp' in name else 2.0)
    levels = [get_sigmas_karras(20, 0.01, 10.0)]
    if 'sigmas' not in inspect.signature(f).parameters:
        levels = [0.01, 10.0, *([60] if name == 'sample_dpm_fast' else [])]
    out = f(G, 10 * X, *levels, extra_args=C, disable=True, **kw)
    assert out.isfinite().all()
    assert G.nfe >= 2 * 6 * 20


def gaussian(x, sigma, c):
    "The exact denoiser of Gaussians with means `c`; guidance moves the mean."
    c = c.view(-1, 1)
    return c + (x - c) * 0.25 / (0.25 + sigma.view(-1, 1) ** 2)


FREE = [
    (karras.sa_solver, SIGMAS, {}),
    (karras.restart, SIGMAS, dict(restart_steps=3)),
    (karras.dpm_fast, SIGMAS, dict(eta=1.0)),
    (karras.dpm_adaptive, SIGMAS[[0, -2, -1]], dict(h_init=3.0, rtol=0.01)),
]
each_sampler = pytest.mark.parametrize(
    'step,sigmas,options', FREE, ids=[o[0].__name__ for o in FREE]
)


@each_sampler
def test_guidance_of_gaussians_is_a_shift_for_more_samplers(step, sigmas, options):
    G = GuidedDenoiser(gaussian, dict(c=torch.full((1,), -1.0)), w=3.0)
    got = sample(G, 10 * X, sigmas, step, C, generator=1, **options)
    shifted = dict(c=-1 + 3 * (C['c'] + 1))
    close(got, sample(gaussian, 10 * X, sigmas, step, shifted, generator=1, **options), 1e-4)


@each_sampler
def test_more_samplers_tell_the_step_between_the_levels_of_the_run(step, sigmas, options):
    values = [1.5 + 0.5 * i for i in range(len(sigmas) - 1)]
    told = []

    class Told(GuidedDenoiser):
        def forward(self, x, sigma, *, step=None, **cond):
            told.append((step, float(sigma[0])))
            return super().forward(x, sigma, step=step, **cond)

    G, own = Told(toy, NONE, w=values), on_sigmas(values, sigmas)
    sample(G, 10 * X, sigmas, step, C, generator=1, **options)
    steps = [i for i, _ in told]
    assert steps == sorted(steps)
    assert set(steps) == set(range(len(values)))
    firsts = [next(s for i, s in told if i == k) for k in range(len(values))]
    assert firsts == pytest.approx(sigmas[:-1].tolist(), rel=2e-5)
    a, b = (GuidedDenoiser(toy, NONE, w=w) for w in (values, own))
    a, b = (sample(o, 10 * X, sigmas, step, C, generator=1, **options) for o in (a, b))
    assert torch.equal(a, b)


WITH_MEMORY = {
    'momentum': Term(NONE, 3.0, apg.of(beta=-0.5)),
    'stop': Term(NONE, 3.0, stop=0.99),
    'every': Term(NONE, 3.0, every=2),
    'interval': Term(NONE, 3.0, interval=(0.3, 5.0)),
}


@each_sampler
@pytest.mark.parametrize('kind', [*WITH_MEMORY, 'draws', 'history'])
def test_more_samplers_work_with_what_remembers(step, sigmas, options, kind):
    if kind in WITH_MEMORY:
        term = WITH_MEMORY[kind]
    else:
        term = Term(Noisy(3) if kind == 'draws' else Mixed(), 1.5)
    G = GuidedDenoiser(toy, term)
    first, second = (sample(G, 10 * X, sigmas, step, C, generator=1, **options) for _ in range(2))
    assert first.isfinite().all()
    assert torch.equal(first, second)
    plain = sample(toy, 10 * X, sigmas, step, C, generator=1, **options)
    assert (first - plain).abs().max() > 1e-3


def test_weights_per_step_are_refused_where_a_sampler_chooses_its_steps():
    run = partial(karras.sample_dpm_adaptive, x=10 * X, sigma_min=0.1, sigma_max=10.0)
    run = partial(run, extra_args=C, disable=True)
    with pytest.raises(ValueError, match='^w: expected one value per step, 1, got 8'):
        run(GuidedDenoiser(toy, NONE, w=[2.0] * 8))
    with pytest.raises(ValueError, match='^w belongs to 8 steps'):
        run(GuidedDenoiser(toy, NONE, w=on_sigmas([2.0] * 8, SIGMAS)))
    want = run(GuidedDenoiser(toy, NONE, w=2.0))
    assert torch.equal(run(GuidedDenoiser(toy, NONE, w=lambda sigma: 2.0)), want)
    assert torch.equal(run(GuidedDenoiser(toy, NONE, w=[2.0])), want)


def test_other_conditions_are_checked_within_a_run():
    G = GuidedDenoiser(toy, NONE, w=2.0)
    G(X, 2.0, **C)
    with pytest.raises(ValueError, match='negative conditions: expected names among'):
        G(X, 1.0, words=C['c'])
    G(X, 1.0, **C)
    assert G.run.nfe_per_sample.tolist() == [4] * 6


def test_a_compiled_network_is_not_compiled_at_each_step():
    torch._dynamo.reset()
    count = CompileCounter()
    net = torch.compile(Net().requires_grad_(False), backend=count)
    G = GuidedDenoiser(DiscreteDenoiser(net), NONE, w=[2.0 + i for i in range(8)])
    counts = [count.frame_count for _ in samples(G, 10 * X, SIGMAS, karras.euler, C)]
    assert 0 < counts[0] == counts[-1]


@pytest.mark.parametrize('off', [(1,), ['a'], [None]])
def test_what_is_off_must_be_a_term(off):
    with pytest.raises(ValueError, match=r'off: expected numbers of terms, of \(0,\), got'):
        GuidedDenoiser(toy, NONE, w=3.0)(X, 1.0, off=off, **C)


def test_rectified_cfg_pp_asks_the_positive_alone_first():
    G = GuidedDenoiser(toy, NONE, w=3.0)
    sample(G, X, SIGMAS, karras.rectified_cfg_pp, C)
    assert G.nfe == 3 * (len(SIGMAS) - 1) * len(X)
