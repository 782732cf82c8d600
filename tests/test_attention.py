"PAG, SEG, SLG, TPG and SAG: against diffusers' pipelines, against loops, and what they refuse."

import copy
import inspect
import math
import pickle
from functools import partial

import diffusers
import pytest
import torch
from pipeline_helpers import (
    PIXART,
    PROMPTS,
    close,
    ddim,
    dit,
    flow,
    flux,
    noise_of,
    pixart,
    pixels,
    scheduler_levels,
    sd,
    sd3,
    seeded,
    xl,
)
from tiny_networks import Case, rand, randomized
from torch import nn
from torch.nn import functional as F

from cf_guidance import perturb
from cf_guidance.attention import (
    PAG,
    SAG,
    SEG,
    SLG,
    TPG,
    Perturbation,
    blurred,
    gaussian_blur,
    identity,
    permuted,
    skip,
)
from cf_guidance.denoisers import NetDenoiser
from cf_guidance.guided import Conditions, GuidedDenoiser, Microbatched, Term
from cf_guidance.karras import euler, sample
from cf_guidance.lab.fashion import fashion_path, quiet
from cf_guidance.perturb import Change, find_layers, perturbed
from cf_guidance.pipelines import pipeline_denoiser

quiet()
W, S = 3.0, 2.0
GARMENTS = ['a red bag on a blue background', 'a green boot on a white background']


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def net_of(pipe):
    return pipe.unet if hasattr(pipe, 'unet') else pipe.transformer


def negative(neg, D, x, sigma, cond, **kw):
    return GuidedDenoiser(D, neg, w=2.0, **kw).parts(x, sigma, **cond).neg


def far(a, b):
    return (a - b).abs().max().item() / b.abs().max().item()


# against diffusers' pipelines


def stock(cls, pipe, **kw):
    "The parts of a pipeline as another class of pipeline"
    parts = inspect.signature(cls).parameters
    extra = dict(requires_safety_checker=False) if 'safety_checker' in pipe.components else {}
    new = cls(**{k: v for k, v in pipe.components.items() if k in parts}, **extra, **kw)
    new.set_progress_bar_config(disable=True)
    return new


def fashion():
    "With a scheduler that goes on to zero noise"
    return diffusers.StableDiffusionPipeline.from_pretrained(
        fashion_path(), safety_checker=None, scheduler=ddim()
    )


def ours(pipe, D, neg, cfg, cond, s=S):
    sigmas, scale = scheduler_levels(pipe.scheduler)
    start = noise_of(D) * getattr(pipe.scheduler, 'init_noise_sigma', 1.0) / scale
    terms = [Term(Conditions(D.cond()), W)] * cfg + [Term(neg, 1 + s)]
    return sample(GuidedDenoiser(D, *terms), start, sigmas, euler, cond=cond)


def pag_agrees(pipe, cls, theirs, layers, cfg, tol=1e-4, D=None, prompts=PROMPTS, **kw):
    "Both end in the same latents, and PAG is a part of it"
    D = D or pipeline_denoiser(pipe)
    p = stock(cls, pipe, pag_applied_layers=theirs)
    want = p(
        prompts,
        guidance_scale=W if cfg else 1.0,
        pag_scale=S,
        latents=noise_of(D),
        num_inference_steps=3,
        output_type='latent',
        **kw,
    ).images
    if 'sigmas' not in kw:
        p.scheduler.set_timesteps(3)
    neg = PAG(net_of(pipe), layers)
    close(ours(p, D, neg, cfg, D.cond(prompts)), want, tol)
    without = ours(p, D, neg, cfg, D.cond(prompts), s=0.0)
    assert (without - want).abs().max() > 10 * tol * want.abs().max()


LAYERS = [
    ('mid', 'mid_block.*'),
    (['down', 'mid'], ['down_blocks.*', 'mid_block.*']),
    ('up_blocks.0', 'up_blocks.0.*'),
]


@pytest.mark.parametrize('cfg', [True, False])
@pytest.mark.parametrize('theirs,layers', LAYERS)
@pytest.mark.parametrize('worth_it', [0, 10**9])
def test_pag_sd(theirs, layers, cfg, worth_it, monkeypatch):
    monkeypatch.setattr(perturb, '_MIN_POSITIONS_TO_JOIN', worth_it)
    pag_agrees(sd(ddim()), diffusers.StableDiffusionPAGPipeline, theirs, layers, cfg)


@pytest.mark.parametrize('cfg', [True, False])
def test_pag_fashion(cfg):
    cls = diffusers.StableDiffusionPAGPipeline
    pag_agrees(fashion(), cls, 'mid', None, cfg, prompts=GARMENTS)


def test_pag_xl():
    cls = diffusers.StableDiffusionXLPAGPipeline
    pag_agrees(xl(ddim('v_prediction')), cls, 'mid', None, True)


def test_pag_not_square():
    pipe, size = sd(ddim()), dict(height=16, width=24)
    D = pipeline_denoiser(pipe, **size)
    pag_agrees(pipe, diffusers.StableDiffusionPAGPipeline, 'mid', None, True, D=D, **size)


def test_pag_pixart():
    pipe, cls = pixart(ddim(), diffusers.PixArtSigmaPipeline), diffusers.PixArtSigmaPAGPipeline
    pag_agrees(pipe, cls, 'blocks.0', 'transformer_blocks.0.*', True, **PIXART)


@pytest.mark.parametrize('cfg', [True, False])
def test_pag_sd3(cfg):
    "Joint attention: of the image to itself only"
    cls, sigmas = diffusers.StableDiffusion3PAGPipeline, [0.95, 0.7, 0.3]
    pag_agrees(sd3(flow()), cls, 'blocks.0', 'transformer_blocks.0.*', cfg, sigmas=sigmas)


def test_pag_adaptive():
    "diffusers' adaptive scale, `s - a*(1000-t)`, is a weight that depends on sigma"
    pipe = sd(ddim())
    D = pipeline_denoiser(pipe)
    p = stock(diffusers.StableDiffusionPAGPipeline, pipe, pag_applied_layers='mid')
    want = p(
        PROMPTS,
        guidance_scale=W,
        pag_scale=S,
        pag_adaptive_scale=0.003,
        latents=noise_of(D),
        num_inference_steps=3,
        output_type='latent',
    ).images
    sigmas, scale = scheduler_levels(p.scheduler)

    def w(sigma):
        return 1 + (S - 0.003 * (1000 - D.sigma_to_t(sigma))).clamp(min=0.0)

    G = GuidedDenoiser(D, Term(Conditions(D.cond()), W), Term(PAG(D), w))
    close(sample(G, noise_of(D) / scale, sigmas, euler, cond=D.cond(PROMPTS)), want)


@pytest.mark.parametrize('make', [lambda: sd(ddim()), fashion])
@pytest.mark.parametrize('cfg', [True, False])
def test_sag(make, cfg):
    "Theirs degrades the unconditional prediction if there is one"
    pipe = make()
    heads = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads
    assert pipe.unet.config.attention_head_dim == heads
    large = pipe.unet.config.block_out_channels[0] == 64
    D = pipeline_denoiser(pipe, height=32 if large else 16, width=48 if large else 24)
    p = stock(diffusers.StableDiffusionSAGPipeline, pipe)
    want = p(
        GARMENTS,
        height=D.size[0],
        width=D.size[1],
        guidance_scale=W if cfg else 1.0,
        sag_scale=S,
        latents=noise_of(D),
        num_inference_steps=3,
        output_type='latent',
    ).images
    cond, unconditional = D.cond(GARMENTS), SAG(D, cond=D.cond() if cfg else None)
    close(ours(p, D, unconditional, cfg, cond), want)
    without = ours(p, D, SAG(D), cfg, cond, s=0.0)
    assert (without - want).abs().max() > 1e-3 * want.abs().max()
    if cfg:
        assert (ours(p, D, SAG(D), cfg, cond) - want).abs().max() > 1e-4 * want.abs().max()


def test_seg_guider_of_diffusers():
    "Its third pass is never perturbed: the condition for its hooks cannot come true"
    guiders = pytest.importorskip('diffusers.guiders')
    from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig

    pipe = pixart(ddim())
    D, net = pipeline_denoiser(pipe), pipe.transformer
    x, cond = noise_of(D), D.cond(PROMPTS)
    config = SmoothedEnergyGuidanceConfig([0], fqn='transformer_blocks')
    guider = guiders.SmoothedEnergyGuidance(seg_guidance_config=config)
    guider.set_state(step=1, num_inference_steps=3, timestep=torch.tensor(500))
    assert guider.num_conditions == 3
    plain, seen = D(x, 2.0, **cond), []
    for _ in range(3):
        guider.prepare_models(net)
        seen.append(D(x, 2.0, **cond))
        guider.cleanup_models(net)
    assert all(torch.equal(o, plain) for o in seen)
    assert not torch.equal(negative(SEG(D), D, x, torch.full((2,), 2.0), cond), plain)


# on networks of all kinds


def case(name):
    "A denoiser, and what to ask it"
    pipe = dict(
        sd=lambda: sd(ddim()),
        xl=lambda: xl(ddim()),
        sd3=lambda: sd3(flow()),
        flux=lambda: flux(flow()),
        pixart=lambda: pixart(ddim(), size=128),
        dit=lambda: dit(ddim()),
        pixels=lambda: pixels(ddim(), num_class_embeds=6),
    )[name]()
    D = pipeline_denoiser(pipe, **(dict(height=16, width=24) if name != 'dit' else {}))
    x = torch.randn((3, *D.latent_shape), generator=seeded(0))
    labels = name in ('dit', 'pixels')
    cond = D.cond([1, 2, 3] if labels else ['a red bag', 'a boot', 'a blue coat'])
    return D, x, torch.tensor([0.5, 2.0, 4.0]), cond


CASES = ['sd', 'xl', 'sd3', 'flux', 'pixart', 'dit', 'pixels']
NEGS = dict(
    pag=PAG,
    seg=lambda D: SEG(D, 0.7),
    slg=SLG,
    tpg=lambda D: TPG(D, generator=[5, 6, 7]),
    sag=SAG,
)
PAIRS = [(a, b) for a in CASES for b in NEGS if not (a == 'pixels' and b in ('slg', 'tpg'))]


def state(net):
    return {m: dict(m.__dict__) for m in net.modules()}


@pytest.mark.parametrize('name,neg', PAIRS)
def test_negative(name, neg):
    "It differs in every sample, leaves no trace, costs nothing at w = 1, and keeps samples apart"
    D, x, sigma, cond = case(name)
    net, pos = net_of(D.inner_model.pipe), D(x, sigma, **cond)
    weights, own = {k: v.clone() for k, v in net.state_dict().items()}, state(net)
    G = GuidedDenoiser(D, NEGS[neg](D), w=3.0)
    parts = G.parts(x, sigma, **cond)
    assert G.nfe == 6
    assert far(parts.pos, pos) < 1e-5
    assert all((a - b).abs().max() > 1e-5 for a, b in zip(parts.neg, pos, strict=True))
    assert far(parts.pred, pos + 2 * (pos - parts.neg)) < 1e-5
    assert torch.equal(D(x, sigma, **cond), pos)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert state(net) == own
    G = GuidedDenoiser(D, NEGS[neg](D), w=torch.tensor([3.0, 1.0, 3.0]))
    y = G(x, sigma, **cond)
    assert far(y[1], pos[1]) < 1e-5
    assert far(y[[0, 2]], parts.pred[[0, 2]]) < 1e-4
    assert G.run.nfe_per_sample.tolist() == [2, 1, 2]
    if neg != 'tpg':
        for i in range(3):
            one = {k: v[i : i + 1] for k, v in cond.items()}
            G = GuidedDenoiser(D, NEGS[neg](D), w=3.0)
            assert far(G(x[i : i + 1], sigma[i : i + 1], **one), parts.pred[i : i + 1]) < 1e-4


@pytest.mark.parametrize('name,neg', PAIRS)
def test_late_rows_are_full_rows(name, neg, monkeypatch):
    "Alone and beside the negative prompt"
    D, x, sigma, cond = case(name)
    other = D.cond() if name != 'pixels' else D.cond(0)
    for terms in ([], [Term(Conditions(other), 2.0)]):
        got = []
        for worth_it in (0, 10**9):
            monkeypatch.setattr(perturb, '_MIN_POSITIONS_TO_JOIN', worth_it)
            G = GuidedDenoiser(D, *terms, Term(NEGS[neg](D), 3.0))
            got.append(G.parts(x, sigma, **cond))
        assert far(got[0].pred, got[1].pred) < 1e-5
        assert not torch.equal(got[0].negs[-1], got[0].pos)


def test_late_rows_to_the_last_bit(monkeypatch):
    "On the embedded network, where they pay"
    pipe = fashion()
    D = pipeline_denoiser(pipe)
    x, cond = torch.randn(16, *D.latent_shape, generator=seeded(0)), D.cond(GARMENTS * 8)
    got = []
    for worth_it in (perturb._MIN_POSITIONS_TO_JOIN, 10**9):
        monkeypatch.setattr(perturb, '_MIN_POSITIONS_TO_JOIN', worth_it)
        G = GuidedDenoiser(D, Term(Conditions(D.cond()), 3.0), Term(PAG(D), 2.0))
        got.append(G(x, 2.0, **cond))
        assert G.run.perturbed[1].joins.startswith('all rows' if worth_it > 10**6 else 'rows join')
    assert torch.equal(*got)


@pytest.mark.parametrize('max_batch', [None, 6, 2])
def test_beside_several_questions(max_batch):
    from cf_guidance.negatives import PerpNeg

    D, x, sigma, cond = case('sd')
    w, M = torch.tensor([1.0, 2.0, 3.0]), D if max_batch is None else Microbatched(D, max_batch)
    negs = [D.cond('a coat'), D.cond('a dress')]
    perp = Term(PerpNeg(D.cond(), negs, [0.5, 1.5]), w)
    pag = Term(PAG(D), w.flip(0))
    a, b, both = (GuidedDenoiser(M, *terms) for terms in ([perp], [pag], [perp, pag]))
    pos = D(x, sigma, **cond)
    close(both(x, sigma, **cond), a(x, sigma, **cond) + b(x, sigma, **cond) - pos)
    assert both.run.nfe_per_sample.tolist() == [2, 5, 4]


def test_terms_add_up():
    D, x, sigma, cond = case('sd')
    pag, cfg = Term(PAG(D), 3.0), Term(D.cond(), 3.0)
    alone, both, only = (
        GuidedDenoiser(D, *t)(x, sigma, **cond) for t in ((pag,), (cfg, pag), (cfg,))
    )
    assert far(both - only, alone - D(x, sigma, **cond)) < 1e-3


@pytest.mark.parametrize('name', ['sd3', 'flux'])
def test_joint_attention_by_loops(name):
    "Text sees all as before; the image sees the text as before, and itself as the change says"
    where = {
        'sd3': [('transformer_blocks.0.attn', 0)],
        'flux': [('transformer_blocks.0.attn', -1), ('single_transformer_blocks.0.attn', -1)],
    }
    net = Case(name)
    for layers, first in where[name]:
        for fn in (identity, blurred(0.7)):
            got = []

            def spy(q, k, v, site, fn=fn, first=first, got=got):
                n, (h, w) = q.shape[-2], site.grid(q.shape[-2])
                start = 0 if first == 0 else n - h * w
                assert (h, w) == (4, 6)
                assert site.image(n) == slice(start, start + h * w)
                logits = joint_logits(q, k, site.scale, start, h, w, fn is identity)
                out = fn(q, k, v, site)
                got.append(far(out, logits.softmax(-1) @ v))
                return out

            net(slice(0, 1), perturbed(net.net, Change(layers, spy)))
            assert len(got) == 1
            assert got[0] < 1e-5


def joint_logits(q, k, scale, start, h, w, alone):
    "One query and one key at a time"
    soft = q.clone()
    for i in range(h * w if not alone else 0):
        soft[..., start + i, :] = blur_by_loops(q[..., start : start + h * w, :], i, h, w)
    out = torch.zeros(*q.shape[:-1], k.shape[-2])
    for i in range(q.shape[-2]):
        for j in range(k.shape[-2]):
            both = start <= i < start + h * w and start <= j < start + h * w
            out[..., i, j] = scale * ((soft if both else q)[..., i, :] * k[..., j, :]).sum(-1)
            if both and alone and i != j:
                out[..., i, j] = -math.inf
    return out


def blur_by_loops(q, i, h, w, sigma=0.7):
    "The query of token `i`, blurred: ceil(6*.7) = 5 tokens along each axis, mirrored"
    out = torch.zeros_like(q[..., 0, :])
    weight = [math.exp(-0.5 * (j / sigma) ** 2) for j in range(-2, 3)]
    for a, wa in zip(range(-2, 3), weight, strict=True):
        for b, wb in zip(range(-2, 3), weight, strict=True):
            y, x = mirrored(i // w + a, h), mirrored(i % w + b, w)
            out += wa * wb / sum(weight) ** 2 * q[..., y * w + x, :]
    return out


def mirrored(i, n):
    return -i if i < 0 else 2 * (n - 1) - i if i >= n else i


# a small network by loops


class SmallAttention(nn.Module):
    def __init__(self, dim=8, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        split = [o.unflatten(-1, (self.heads, -1)) for o in self.qkv(x).chunk(3, -1)]
        y = F.scaled_dot_product_attention(*(o.transpose(1, 2) for o in split))
        return self.out(y.transpose(1, 2).flatten(2))


class SmallBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.ff = SmallAttention(), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.ff(x).tanh()


class Small(nn.Module):
    def __init__(self, n=3):
        super().__init__()
        self.proj, self.last = nn.Linear(3, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([SmallBlock() for _ in range(n)])

    def forward(self, x, t, y=0.0):
        h = self.proj(x.flatten(2).mT) + (t + y).view(-1, 1, 1)
        for b in self.blocks:
            h = b(h)
        return self.last(h).mT.reshape(x.shape)


SMALL = randomized(Small())
D = NetDenoiser(SMALL)
XS, SIGMAS = rand(2, 3, 3, 5), torch.tensor([0.5, 2.0])


def attention_by_loops(m, h, blur=None, alone=False):
    "(N, dim) from the (N, dim) tokens of one sample, and the probabilities (heads, N, N)"
    q, k, v = m.qkv(h).chunk(3, -1)
    n, d = len(h), h.shape[1] // m.heads
    out, probs = torch.zeros_like(h), torch.zeros(m.heads, n, n)
    for a in range(m.heads):
        s = slice(a * d, (a + 1) * d)
        asked = q[:, s] if blur is None else torch.stack([blur(c) for c in q[:, s].T], 1)
        for i in range(n):
            e = torch.tensor([float(asked[i] @ k[j, s]) / math.sqrt(d) for j in range(n)]).exp()
            probs[a, i] = torch.eye(n)[i] if alone else e / e.sum()
            out[i, s] = sum(probs[a, i, j] * v[j, s] for j in range(n))
    return m.out(out), probs


def by_loops(x, t, skipped=False, order=None, **kw):
    "The output of the network, and the probabilities in the middle"
    places = [(i, j) for i in range(x.shape[1]) for j in range(x.shape[2])]
    h, seen = torch.stack([SMALL.proj(x[:, i, j]) + t for i, j in places]), None
    for n, b in enumerate(SMALL.blocks):
        if n == 1 and skipped:
            continue
        if n == 1 and order is not None:
            h = h[order]
        y, probs = attention_by_loops(b.attn, h, **(kw if n == 1 else {}))
        seen = probs if n == 1 else seen
        h = h + y
        h = h + b.ff(h).tanh()
    return SMALL.last(h).T.reshape(x.shape), seen


def estimate(x, s, **kw):
    return x - s * by_loops(x / math.sqrt(1 + s**2), s, **kw)[0]


def each(f):
    return torch.stack([f(a, b.item()) for a, b in zip(XS, SIGMAS, strict=True)])


def same(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def blur_of(shape, sigma, k):
    return lambda q: slow_blur(q.reshape(shape), sigma, k).flatten()


def slow_blur(x, sigma, k):
    "By the definition: one pixel, one neighbour at a time"
    ks = [min(k, s + 1 - s % 2) for s in x.shape]
    ws = [[math.exp(-0.5 * ((j - n // 2) / sigma) ** 2) for j in range(n)] for n in ks]
    out = torch.zeros_like(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            for a, wa in enumerate(ws[0]):
                for b, wb in enumerate(ws[1]):
                    y = mirrored(i + a - ks[0] // 2, x.shape[0])
                    z = mirrored(j + b - ks[1] // 2, x.shape[1])
                    out[i, j] += wa * wb / sum(ws[0]) / sum(ws[1]) * x[y, z]
    return out


def test_plain_by_loops():
    same(D(XS, SIGMAS), each(estimate))


@pytest.mark.parametrize(
    'make,kw',
    [
        (PAG, dict(alone=True)),
        (SLG, dict(skipped=True)),
        (partial(SEG, sigma=0.4), dict(blur=blur_of((3, 5), 0.4, 3))),
        (SEG, dict(blur=lambda q: q.mean().expand_as(q))),
    ],
)
def test_by_loops(make, kw):
    assert list(make(D).layers) == ['blocks.1' if make is SLG else 'blocks.1.attn']
    same(negative(make(D), D, XS, SIGMAS, {}), each(partial(estimate, **kw)))


def seeds_of(seeds):
    return [torch.randint(2**62, (), generator=seeded(i)).item() for i in seeds]


def test_tpg_by_loops():
    query = TPG(D).queries(XS, SIGMAS, {}, [seeded(3), seeded(4)])[0]
    out = perturbed(D, query.change)(XS, SIGMAS)
    orders = [torch.randperm(15, generator=seeded(s)) for s in seeds_of([3, 4])]
    want = [estimate(a, b.item(), order=o) for a, b, o in zip(XS, SIGMAS, orders, strict=True)]
    same(out, torch.stack(want))


def sag_by_loops(x, s):
    eps, probs = by_loops(x / math.sqrt(1 + s**2), s)
    x0, mask = x - s * eps, torch.zeros(3, 5)
    for j in range(15):
        mask[j // 5, j % 5] = probs[:, :, j].sum() / 2 > 1
    moved = [mask * slow_blur(c, 1.0, 9) + (1 - mask) * c for c in x0]
    moved = torch.stack(moved) + s * eps
    return x - s * by_loops(moved / math.sqrt(1 + s**2), s)[0]


def test_sag_by_loops():
    want = each(sag_by_loops)
    same(negative(SAG(D), D, XS, SIGMAS, {}), want)
    same(SAG(D)(D, XS, SIGMAS, {}), want)


def test_sag_without_blur_or_mask():
    pos = D(XS, SIGMAS)
    same(negative(SAG(D, sigma=0.0), D, XS, SIGMAS, {}), pos)
    assert torch.equal(negative(SAG(D, threshold=1e9), D, XS, SIGMAS, {}), pos)


@pytest.mark.parametrize('make', [PAG, SEG, SLG, SAG])
def test_some_samples(make):
    full = GuidedDenoiser(D, make(D), w=3.0)(XS, SIGMAS)
    some = GuidedDenoiser(D, make(D), w=torch.tensor([1.0, 3.0]))(XS, SIGMAS)
    same(some[0], D(XS, SIGMAS)[0])
    same(some[1], full[1])


@pytest.mark.parametrize('make', [PAG, SEG, SLG, SAG])
def test_one_negative_in_two_terms(make):
    neg = make(D)
    one = GuidedDenoiser(D, neg, w=4.0)(XS, SIGMAS)
    same(GuidedDenoiser(D, Term(neg, 3.0), Term(neg, 2.0))(XS, SIGMAS), one)


@pytest.mark.parametrize('make', [PAG, SEG, SLG, TPG, SAG])
def test_negatives_are_not_changed_by_use(make):
    neg = make(D)
    before = dict(vars(neg))
    GuidedDenoiser(D, neg, w=3.0)(XS, SIGMAS)
    assert vars(neg) == before


@pytest.mark.parametrize('make', [PAG, SEG, SLG, partial(TPG, generator=[1, 2]), SAG])
def test_copies_and_pickles(make):
    want = GuidedDenoiser(D, make(D), w=3.0)(XS, SIGMAS)
    for again in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        G = again(GuidedDenoiser(D, make(D), w=3.0))
        assert torch.equal(G(XS, SIGMAS), want)


@pytest.mark.parametrize('make', [PAG, SEG, SLG, TPG, SAG])
def test_global_random_state(make):
    before = torch.get_rng_state()
    GuidedDenoiser(D, make(D), w=3.0)(XS, SIGMAS)
    assert torch.equal(torch.get_rng_state(), before)


# draws of TPG

ALL = partial(TPG, D, 'blocks.*')


def test_same_order_for_a_sample_in_any_batch():
    two = negative(ALL(generator=[3, 4]), D, XS, SIGMAS, {})
    one = negative(ALL(generator=[4]), D, XS[1:], SIGMAS[1:], {})
    same(two[1:], one)


def test_another_order_at_each_evaluation_and_the_same_in_each_run():
    G, generators = GuidedDenoiser(D, ALL(generator=[3, 4]), w=3.0), [seeded(3), seeded(4)]
    changes = [ALL().queries(XS, SIGMAS, {}, generators)[0].change for _ in range(2)]
    assert changes[0].fn != changes[1].fn
    one = G(XS, SIGMAS)
    G.start()
    assert torch.equal(G(XS, SIGMAS), one)


def test_orders_do_not_depend_on_how_a_batch_is_cut():
    one = GuidedDenoiser(D, ALL(generator=[3, 4]), w=3.0)(XS, SIGMAS)
    same(GuidedDenoiser(Microbatched(D, 1), ALL(generator=[3, 4]), w=3.0)(XS, SIGMAS), one)
    some = GuidedDenoiser(D, ALL(generator=[3, 4]), w=torch.tensor([1.0, 3.0]))(XS, SIGMAS)
    same(some[1], one[1])


def test_another_order_in_each_layer():
    seen = []

    def look(x, run, site):
        return permuted([1, 2])(x, lambda y: seen.append(y - x) or run(y), site)

    perturbed(D, Change('blocks.[01]', look, 'block'))(XS, SIGMAS)
    assert not torch.allclose(*seen)


def test_one_token_has_one_order():
    tiny = rand(2, 3, 1, 1)
    net = perturbed(SMALL, Change('blocks.*', permuted([0, 1])))
    assert torch.equal(net(tiny, SIGMAS), SMALL(tiny, SIGMAS))


def test_only_the_image_is_shuffled():
    tokens = lambda n: (slice(7, n), (2, 4))  # noqa: E731
    seen = []

    def look(x, run, site):
        def see(y):
            seen.append((x, y))
            return run(y)

        return permuted([1, 2])(x, see, site)

    perturbed(SMALL, Change('blocks.1', look, 'block', tokens))(XS, SIGMAS)
    ((x, y),) = seen
    assert torch.equal(y[:, :7], x[:, :7])
    assert not torch.equal(y, x)
    same(y.sort(1)[0], x.sort(1)[0])


# blur


@pytest.mark.parametrize(
    'h,w,s,kernel',
    [
        (4, 4, 1.0, None),
        (3, 6, 0.7, None),
        (5, 2, 10.0, None),
        (1, 4, 0.5, None),
        (8, 7, 1.0, 9),
        (6, 6, 2.0, 4),
    ],
)
def test_blur_by_loops(h, w, s, kernel):
    x, k = rand(h, w), kernel or math.ceil(6 * s)
    same(gaussian_blur(x, s, kernel), slow_blur(x, s, k + 1 - k % 2))


def test_number_of_weights():
    dot = torch.zeros(1, 65)
    dot[0, 32] = 1
    counts = [int((gaussian_blur(dot, s, dims=[-1]) > 0).sum()) for s in (1, 2, 9)]
    assert counts == [7, 13, 55]


def test_blur():
    x = rand(2, 4, 6)
    same(gaussian_blur(torch.full((3, 5, 8), 2.0), 3.0), torch.full((3, 5, 8), 2.0))
    same(gaussian_blur(x, math.inf), x.mean((-2, -1), keepdim=True).expand_as(x))
    moved = gaussian_blur(x.movedim(0, -1), 1.0, dims=(-3, -2)).movedim(-1, 0)
    same(moved, gaussian_blur(x, 1.0))
    assert gaussian_blur(x.half(), 1.0).dtype == torch.float16
    assert gaussian_blur(x, 0.0) is x


def test_no_and_infinite_blur_of_queries():
    def mean_query(q, k, v, site):
        return site.attend(q.mean(-2, keepdim=True).expand_as(q), k, v)

    def out(fn):
        return perturbed(D, Change(None, fn))(XS, SIGMAS)

    assert torch.equal(out(blurred(0)), D(XS, SIGMAS))
    same(out(blurred(math.inf)), out(mean_query))


@pytest.mark.parametrize('fn', [identity, blurred(1.0), blurred(math.inf), skip, permuted([1, 2])])
def test_half_precision(fn):
    net = copy.deepcopy(SMALL).bfloat16()
    out = perturbed(net, Change(None, fn))(XS.bfloat16(), SIGMAS.bfloat16())
    assert out.dtype == torch.bfloat16


def test_grouped_queries():
    "Fewer heads of keys and values than of queries"
    q, k = rand(2, 4, 15, 4), rand(2, 2, 15, 4, seed=1)

    class GroupedAttention(SmallAttention):
        def forward(self, x):
            y = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
            return x + y.mean()

    net = Small()
    net.blocks[1].attn = GroupedAttention()
    got = []
    look = Change(None, lambda *args: got.append(identity(*args)))
    perturbed(net, look)(XS, SIGMAS)
    assert torch.equal(got[0], k.repeat_interleave(2, 1))


def test_gradients():
    want = []
    for worth_it in (True, False):
        with torch.enable_grad():
            x = XS.clone().requires_grad_()
            G = GuidedDenoiser(D, PAG(D), w=3.0)
            y = (
                G(x, SIGMAS)
                if worth_it
                else 3 * D(x, SIGMAS) - 2 * negative(PAG(D), D, x, SIGMAS, {})
            )
            want.append(torch.autograd.grad(y.pow(2).sum(), x)[0])
    same(*want, 1e-4)


@pytest.mark.parametrize('make', [PAG, SAG])
def test_gradient_checkpointing(make):
    den, x, sigma, cond = case('sd')
    den.inner_model.net.enable_gradient_checkpointing()
    G = GuidedDenoiser(den, make(den), w=3.0)
    with torch.enable_grad(), pytest.raises(RuntimeError, match='gradient checkpointing'):
        G(x.requires_grad_(), sigma, **cond)
    assert G.nfe == 0
    assert G(x, sigma, **cond).shape == x.shape


def test_caches():
    "A cached positive would silence the negative"
    den, x, sigma, cond = case('flux')
    at = dict(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    den.inner_model.net.enable_cache(diffusers.PyramidAttentionBroadcastConfig(**at))
    G = GuidedDenoiser(den, SLG(den, 'transformer_blocks.0'), w=3.0)
    with pytest.raises(RuntimeError, match='PyramidAttentionBroadcast is on'):
        G(x, sigma, **cond)
    assert G.nfe == 0


def test_compiled():
    torch._dynamo.reset()
    den, x, sigma, cond = case('dit')
    want = GuidedDenoiser(den, PAG(den), w=3.0)(x, sigma, **cond)
    runs = []

    def backend(gm, inputs):
        return lambda *args: runs.append(1) or gm.forward(*args)

    den.inner_model.net = torch.compile(den.inner_model.net, backend=backend)
    G = GuidedDenoiser(den, PAG(den), w=3.0)
    assert far(G(x, sigma, **cond), want) < 1e-4
    assert runs


@pytest.mark.parametrize('negative', [PAG, SLG, SAG])
def test_a_compiled_guided_denoiser_is_refused_before_it_is_traced(negative):
    torch._dynamo.reset()
    den, x, sigma, cond = case('dit')
    G, graphs = GuidedDenoiser(den, negative(den), w=3.0), []
    compiled = torch.compile(G, backend=lambda gm, inputs: graphs.append(gm) or gm.forward)
    with pytest.raises(RuntimeError, match='compile the network, not what guides'):
        compiled(x, sigma, **cond)
    assert not graphs
    assert G.nfe == 0


def test_own_function():
    "A perturbation of one's own"

    def half(q, k, v, site):
        return site.attend(q, k, v, scale=site.scale / 2)

    neg = Perturbation(D, half, 'blocks.*')
    assert list(neg.layers) == [f'blocks.{i}.attn' for i in range(3)]
    assert far(GuidedDenoiser(D, neg, w=2.0)(XS, SIGMAS), D(XS, SIGMAS)) > 1e-3


def test_default_layers():
    unet, tall = Case('sd').net, [f'transformer_blocks.{i}' for i in range(12)]
    assert list(SLG(unet).layers) == ['mid_block.attentions.0.transformer_blocks.0']
    assert list(TPG(unet).layers) == ['down_blocks.0.attentions.0.transformer_blocks.0']
    big = Case('sd3').net
    big.transformer_blocks = nn.ModuleList([big.transformer_blocks[0] for _ in range(12)])
    assert set(SLG(big).layers) <= set(tall)
    assert repr(PAG(unet)) == 'PAG in\nmid_block.attentions.0.transformer_blocks.0.attn1: Attention'


# bad input


def ask(neg, n=2, **cond):
    den = NetDenoiser(SMALL)
    return GuidedDenoiser(den, neg, w=2.0)(XS[:n], SIGMAS[:n], **cond)


def is_attn2(n, m):
    return n == 'mid_block.attentions.0.transformer_blocks.0.attn2'


UNET = Case('sd').net
BAD = {
    'no layer': (lambda: PAG(UNET, 'mid'), "'mid' matches nothing in UNet2DConditionModel"),
    'empty': (lambda: SEG(UNET, 1.0, []), 'at least one layer'),
    'sigma': (lambda: SEG(UNET, -1.0), 'sigma: expected .* 0 or more, got -1'),
    'nan': (lambda: SEG(UNET, math.nan), 'sigma: expected .* got nan'),
    'sigma text': (lambda: SEG(UNET, 'a'), "sigma: expected .* got 'a'"),
    'sigma bool': (lambda: SEG(UNET, True), 'sigma: expected .* got True'),
    'blurred': (lambda: blurred(-1), 'sigma: expected'),
    'two for SAG': (lambda: SAG(UNET, '*.attn1'), 'expected one self-attention, got 4'),
    'function': (lambda: PAG(lambda x, t: x), 'net: expected an nn.Module'),
    'no attention': (lambda: PAG(nn.Linear(2, 2)), 'it has no attentions'),
    'other network': (lambda: ask(PAG(UNET)), 'PAG: its layers belong to another network'),
    'other network for SAG': (lambda: ask(SAG(UNET)), 'SAG: its layers belong to another'),
    'cross-attention': (lambda: PAG(UNET, is_attn2), 'got cross-attention .*attn2'),
    'cross-attention for SEG': (lambda: SEG(UNET, 1.0, is_attn2), 'got cross-attention'),
    'cross-attention for SAG': (lambda: SAG(UNET, is_attn2), 'got cross-attention'),
    'kind': (lambda: SLG(UNET, find_layers(UNET)), "expected layers of kind 'block'"),
    'not tokens': (
        lambda: Case('sd')(
            net=perturbed(UNET, Change(lambda n, m: n == 'conv_in', permuted([0] * 6)))
        ),
        'conv_in: expected tokens',
    ),
    'blur': (lambda: SAG(UNET, sigma=-1), 'sigma: expected'),
    'kernel': (lambda: SAG(UNET, kernel=-3), 'kernel: expected'),
    'kernel zero': (lambda: SAG(UNET, kernel=0), 'kernel: expected'),
    'kernel float': (lambda: SAG(UNET, kernel=2.5), 'kernel: expected'),
    'threshold': (lambda: SAG(UNET, threshold=math.nan), 'threshold: expected'),
    'cond': (lambda: SAG(UNET, cond=7), 'cond: expected a dict'),
    'names': (lambda: ask(SAG(D, cond=dict(z=torch.zeros(1))), y=torch.zeros(2)), "'z'"),
    'batch': (lambda: ask(SAG(D, cond=dict(y=torch.zeros(3))), y=torch.zeros(2)), 'y: expected'),
    'not a picture': (
        lambda: GuidedDenoiser(D, SAG(D), w=2.0)(XS[:, 0], SIGMAS),
        r'SAG: expected images x \(B, C, H, W\)',
    ),
    'generator': (lambda: TPG(D, generator='a'), "generator: expected .* got 'a'"),
    'generator float': (lambda: TPG(D, generator=1.5), 'generator: expected .* got 1.5'),
    'generator in a list': (lambda: TPG(D, generator=[1, 'a']), "generator: expected .* got 'a'"),
    'generators': (lambda: ask(TPG(D, generator=[1])), 'a list of 2'),
    'seeds': (
        lambda: perturbed(SMALL, Change(None, permuted([1])))(XS, SIGMAS),
        'seeds: expected one per sample, got 1',
    ),
    'seeds type': (lambda: permuted(3), 'seeds: expected a list'),
    'tokens': (lambda: PAG(D, tokens=5), 'tokens: expected a function'),
    'tokens of SAG': (lambda: SAG(D, tokens=5), 'tokens: expected a function'),
    'blur text': (lambda: gaussian_blur(XS, 'a'), "sigma: expected .* got 'a'"),
    'blur none': (lambda: gaussian_blur(XS, None), 'sigma: expected .* got None'),
    'blur kernel': (lambda: gaussian_blur(XS, 1.0, 0), 'kernel: expected'),
    'blur kernel float': (lambda: gaussian_blur(XS, 1.0, 1.5), 'kernel: expected'),
    'blur kernel text': (lambda: gaussian_blur(XS, 1.0, 'a'), 'kernel: expected'),
    'blur 1-d': (lambda: gaussian_blur(XS[0, 0, 0], 1.0), r'x: expected .* got .*\(5,\)'),
    'blur int': (lambda: gaussian_blur(XS.long(), 1.0), 'x: expected floating-point'),
    'own function': (lambda: Perturbation(D, None), 'fn: expected a function'),
    'negative of nothing': (lambda: PAG(None), 'net: expected an nn.Module'),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_input(what):
    f, says = BAD[what]
    with pytest.raises((ValueError, TypeError), match=says) as e:
        f()
    assert len(str(e.value)) < 200
