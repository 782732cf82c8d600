"S2-guidance, in-situ autoguidance and STG: against networks that were changed by hand."

import copy

import diffusers
import pytest
import torch
from pipeline_helpers import PROMPTS, ddim, flow, run, sd, sd3, seeded
from tiny_networks import rand, randomized
from torch import nn

from cf_guidance.attention import PAG, SLG
from cf_guidance.guided import GuidedDenoiser, Microbatched, Term
from cf_guidance.lab.fashion import fashion_path, quiet
from cf_guidance.perturb import perturbed
from cf_guidance.pipelines import guided, pipeline_denoiser
from cf_guidance.weak import S2, InSitu

quiet()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope='module')
def pipe():
    return diffusers.StableDiffusionPipeline.from_pretrained(fashion_path(), safety_checker=None)


def case(pipe, n=2):
    D = pipeline_denoiser(pipe)
    x = 3 * torch.randn((n, *D.latent_shape), generator=seeded(0))
    prompts = ['a red bag on a blue background', 'a green boot on a white background'] * n
    return D, (x, torch.linspace(2.0, 4.0, n)), D.cond(prompts[:n])


def negative_of(D, neg, args, cond):
    return GuidedDenoiser(D, neg, w=2.0).parts(*args, **cond).neg


def off(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


class Nothing(nn.Module):
    def forward(self, x, *args, **kwargs):
        return x


def without(pipe, names):
    "The denoiser of a copy of the network in which some blocks do nothing."
    new = copy.copy(pipe)
    new.unet = copy.deepcopy(pipe.unet)
    for name in names:
        parent, _, last = name.rpartition('.')
        new.unet.get_submodule(parent)[int(last)] = Nothing()
    return pipeline_denoiser(new)


def drawn(neg, args, cond, generators):
    "What a negative leaves out, for each sample."
    (query,) = neg.queries(*args, cond, generators)
    return query.change.fn.names


@pytest.mark.parametrize('share', [0.1, 0.4])
def test_s2_leaves_out_blocks(pipe, share):
    D, args, cond = case(pipe)
    s2 = S2(D, share)
    names = drawn(s2, args, cond, [seeded(1), seeded(2)])
    assert {len(o) for o in names} == {1 if share == 0.1 else 3}  # of 7 blocks
    (query,) = s2.queries(*args, cond, [seeded(1), seeded(2)])
    got = perturbed(D, query.change)(*args, **cond)
    for i, left_out in enumerate(names):
        want = without(pipe, left_out)(*args, **cond)
        assert off(got[i], want[i]) < 1e-5
        assert off(got[i], D(*args, **cond)[i]) > 1e-3


def test_the_first_block_stays(pipe):
    D, args, cond = case(pipe)
    seen = {n for i in range(60) for o in drawn(S2(D), args, cond, [seeded(i)]) for n in o}
    assert len(seen) == 6
    assert not any(n.startswith('down_blocks.0') for n in seen)


def test_each_evaluation_draws_anew_and_a_run_repeats(pipe):
    D, (x, _), cond = case(pipe)
    G = GuidedDenoiser(D, S2(D, generator=[3, 4]), w=2.0)

    def three():
        G.start([4.0, 3.0, 2.0, 0.0])
        sigmas = (torch.full((2,), s) for s in (4.0, 3.0, 2.0))
        return [G.parts(x, s, step=i, **cond).neg for i, s in enumerate(sigmas)]

    first, again = three(), three()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = GuidedDenoiser(D, S2(D, generator=[5, 6]), w=2.0)
    other.start([4.0, 0.0])
    assert off(other.parts(x, torch.full((2,), 4.0), step=0, **cond).neg, first[0]) > 1e-3


@pytest.mark.parametrize(
    'make', [lambda D, g: S2(D, 0.3, generator=g), lambda D, g: InSitu(D, 0.2, generator=g)]
)
def test_a_sample_does_not_depend_on_its_neighbours(pipe, make):
    D, args, cond = case(pipe, 3)
    together = GuidedDenoiser(D, make(D, [7, 8, 9]), w=2.0)(*args, **cond)
    for i in range(3):
        one = slice(i, i + 1)
        alone = GuidedDenoiser(D, make(D, [7 + i]), w=2.0)
        got = alone(*(o[one] for o in args), **{k: v[one] for k, v in cond.items()})
        assert off(got, together[one]) < 1e-5


@pytest.mark.parametrize(
    'make', [lambda D: S2(D, generator=0), lambda D: InSitu(D, 0.2, generator=0)]
)
def test_a_weight_of_1_is_plain_and_others_cost_one_evaluation(pipe, make):
    D, args, cond = case(pipe)
    G = GuidedDenoiser(D, make(D), w=1.0)
    assert torch.equal(G(*args, **cond), D(*args, **cond))
    assert G.nfe == 2
    G = GuidedDenoiser(D, make(D))
    assert off(G(*args, **cond), D(*args, **cond)) > 1e-3
    assert G.nfe == 4


def test_s2_beside_cfg_is_the_equation_of_the_paper(pipe):
    D, args, cond = case(pipe)
    full, empty = D(*args, **cond), D(*args, **D.cond([''] * 2))
    weak = negative_of(D, S2(D, generator=[1, 2]), args, cond)
    lam, omega = 4.0, 0.3
    want = empty + lam * (full - empty) - omega * (weak - full)
    terms = Term(S2(D, generator=[1, 2]), 1 + omega), Term(D.cond(), lam)
    assert off(GuidedDenoiser(D, *terms)(*args, **cond), want) < 1e-5


def test_s2_leaves_out_joint_blocks_of_some_samples():
    pipe = sd3(flow())
    D = pipeline_denoiser(pipe)
    x = torch.randn((2, *D.latent_shape), generator=seeded(0))
    args, cond = (x, torch.ones(2)), D.cond(PROMPTS)
    s2 = S2(D, layers='*')
    (query,) = s2.queries(*args, cond, [seeded(0), seeded(1)])
    names = query.change.fn.names
    assert names[0] != names[1]
    got = perturbed(D, query.change)(*args, **cond)
    for i, left_out in enumerate(names):
        want = perturbed(D, SLG(D, list(left_out)).change)(*args, **cond)
        assert off(got[i], want[i]) < 1e-5


def test_microbatches_draw_the_same(pipe):
    D, args, cond = case(pipe, 3)
    for make in (
        lambda: S2(D, 0.3, generator=[1, 2, 3]),
        lambda: InSitu(D, 0.2, generator=[1, 2, 3]),
    ):
        want = GuidedDenoiser(D, make(), w=2.0)(*args, **cond)
        assert off(GuidedDenoiser(Microbatched(D, 2), make(), w=2.0)(*args, **cond), want) < 1e-5


# in-situ autoguidance


class Masked(nn.Module):
    "Dropout whose zeros come from given generators, one per sample."

    def __init__(self, p, generators):
        super().__init__()
        self.p, self.generators = p, generators

    def forward(self, x):
        rows = [torch.rand(x.shape[1:], generator=g) for g in self.generators]
        return torch.where(torch.stack(rows) < self.p, 0.0, x / (1 - self.p))


def masked(net, p, seeds):
    "A copy of a network with dropout by hand."
    net, generators = copy.deepcopy(net), [seeded(s) for s in seeds]
    for name, m in list(net.named_modules()):
        if isinstance(m, nn.Dropout):
            parent, _, last = name.rpartition('.')
            setattr(net.get_submodule(parent), last, Masked(m.p if p is None else p, generators))
    return net


@pytest.mark.parametrize('p', [0.1, 0.5])
def test_in_situ_is_the_network_with_dropout(pipe, p):
    D, args, cond = case(pipe)
    (query,) = InSitu(D, p).queries(*args, cond, [seeded(1), seeded(2)])
    got = perturbed(D, query.change)(*args, **cond)
    new = copy.copy(pipe)
    new.unet = masked(pipe.unet, p, query.change.fn.seeds)
    want = pipeline_denoiser(new)(*args, **cond)
    assert off(got, want) < 1e-5
    assert off(got, D(*args, **cond)) > 1e-2


class WithDropout(nn.Module):
    def __init__(self, p=0.25):
        super().__init__()
        self.drop, self.lin = nn.Dropout(p), nn.Linear(400, 400, bias=False)
        self.lin.weight.data = torch.eye(400)

    def forward(self, x, t):
        return self.drop(self.lin(x))


def test_the_probability_is_that_of_the_network():
    net, x, t = WithDropout().eval(), torch.ones(3, 400), torch.ones(3)
    (query,) = InSitu(net).queries(x, t, {}, [seeded(i) for i in range(3)])
    neg = perturbed(net, query.change)(x, t)
    shares = (neg == 0).float().mean(1)
    assert (shares - 0.25).abs().max() < 0.08
    assert torch.equal(neg[neg != 0], torch.full_like(neg[neg != 0], 4 / 3))
    assert not torch.equal(neg[0], neg[1])


def test_dropout_with_probability_0_is_plain(pipe):
    D, args, cond = case(pipe)
    assert off(negative_of(D, InSitu(D, 0.0), args, cond), D(*args, **cond)) < 1e-5


# in pipelines


def test_they_guide_a_pipeline():
    pipe = sd(ddim())
    for neg in (S2(pipe.unet, generator=0), InSitu(pipe.unet, 0.3, generator=0)):
        g = guided(pipe, neg, w=2.0)
        got = run(g, guidance_scale=1.0)
        assert g.report.nfe == [6, 6]
        assert off(got, run(pipe, guidance_scale=1.0)) > 1e-3


# what is refused


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ('make', 'match'),
    [
        (lambda net: S2(net, 0), 'share: expected a number above 0, below 1, got 0'),
        (lambda net: S2(net, layers='nothing'), "layers='nothing' matches nothing"),
        (lambda net: S2(net, 0.5, layers='mid_block*'), 'layers: expected 4 blocks or more'),
        (lambda net: S2(Blocks()), 'it has no block'),
        (lambda net: InSitu(Blocks()), 'expected a network with dropout, got Blocks'),
        (lambda net: InSitu(net), 'p: expected a number, since UNet2DConditionModel was'),
        (lambda net: InSitu(net, 1.0), 'p: expected a number from 0, below 1, got 1'),
        (lambda net: InSitu(net, 0.1, 'conv_in'), 'layers: expected nn.Dropout, got conv_in'),
    ],
)
def test_mistakes(pipe, make, match):
    with pytest.raises(ValueError, match=match):
        make(pipe.unet)


# STG: skipped layers of a transformer for video


@pytest.fixture(scope='module')
def video():
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        num_layers=3,
        caption_channels=8,
    )
    return randomized(net)


def ltx(net):
    "Two videos of 2 x 3 x 4 tokens."
    given = dict(encoder_hidden_states=rand(2, 5, 8, seed=1), timestep=torch.full((2,), 500.0))
    given |= dict(encoder_attention_mask=torch.ones(2, 5), num_frames=2, height=3, width=4)
    return net(rand(2, 24, 4), **given, return_dict=False)[0]


def test_stg_that_skips_a_block(video):
    got = ltx(perturbed(video, SLG(video, 'transformer_blocks.1').change))
    fewer = copy.deepcopy(video)
    del fewer.transformer_blocks[1]
    assert off(got, ltx(fewer)) < 1e-5
    assert off(got, ltx(video)) > 1e-3


class Values:
    "A processor whose attention returns the values."

    _attention_backend = _parallel_config = None

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))


def test_stg_that_skips_attention(video):
    got = ltx(perturbed(video, PAG(video, 'transformer_blocks.1.attn1').change))
    by_hand = copy.deepcopy(video)
    by_hand.transformer_blocks[1].attn1.processor = Values()
    assert off(got, ltx(by_hand)) < 1e-5
    assert off(got, ltx(video)) > 1e-3
