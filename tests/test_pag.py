"PAG and SAG against diffusers' pipelines for them, on tiny networks with random weights and on the embedded model; and what diffusers' SEG guider does not do."

import inspect, diffusers, pytest, torch
from accelerate import cpu_offload, cpu_offload_with_hook
from cf_guidance.attention import (
    PAG,
    SAG,
    SEG,
    SLG,
    TPG,
    Prefix,
    blurred,
    find_layers,
    identity,
    perturbed,
)
from cf_guidance.lab.fashion import fashion_path, quiet
from cf_guidance.guided import Conditions, GuidedDenoiser, Term
from cf_guidance.karras import euler, sample
from cf_guidance.negatives import PerpNeg
from cf_guidance.pipelines import pipeline_denoiser
from test_pipeline_denoiser import (
    PROMPTS,
    PIXART,
    close,
    ddim,
    dit,
    flow,
    flux,
    ladder,
    noise_of,
    pixart,
    pixels,
    sd,
    sd3,
    seeded,
    xl,
)

quiet()
W, S = 3.0, 2.0


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def stock(cls, pipe, **kw):
    "The parts of a pipeline as another class of pipeline"
    extra = dict(requires_safety_checker=False) if 'safety_checker' in pipe.components else {}
    new = cls(
        **{k: v for k, v in pipe.components.items() if k in inspect.signature(cls).parameters},
        **extra,
        **kw,
    )
    new.set_progress_bar_config(disable=True)
    return new


def fashion():
    "With a scheduler that goes on to zero noise"
    return diffusers.StableDiffusionPipeline.from_pretrained(
        fashion_path(), safety_checker=None, scheduler=ddim()
    )


def terms(D, neg, cfg=True, s=S):
    return [Term(Conditions(D.cond()), W)] * cfg + [Term(neg, 1 + s)]


def ours(pipe, D, neg, cfg, cond, steps=3, s=S, **kw):
    sigmas, scale = ladder(pipe.scheduler)
    start = noise_of(D) * getattr(pipe.scheduler, 'init_noise_sigma', 1.0) / scale
    return sample(GuidedDenoiser(D, *terms(D, neg, cfg, s)), start, sigmas, euler, cond=cond, **kw)


def pag_agrees(pipe, cls, theirs, layers, cfg, tol=1e-4, D=None, prompts=PROMPTS, **kw):
    "Both end in the same latents; and PAG is a part of it"
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
    p.scheduler.set_timesteps(3) if 'sigmas' not in kw else None
    for s in (True, False):
        close(ours(p, D, PAG(pipe_net(pipe), layers, share=s), cfg, D.cond(prompts)), want, tol)
    assert (
        ours(p, D, PAG(pipe_net(pipe), layers), cfg, D.cond(prompts), s=0.0) - want
    ).abs().max() > 10 * tol * want.abs().max()


def pipe_net(pipe):
    return pipe.unet if hasattr(pipe, 'unet') else pipe.transformer


@pytest.mark.parametrize('cfg', [True, False])
@pytest.mark.parametrize(
    'theirs,layers',
    [
        ('mid', 'mid_block.*'),
        (['down', 'mid'], ['down_blocks.*', 'mid_block.*']),
        ('up_blocks.0', 'up_blocks.0.*'),
    ],
)
def test_pag_sd(theirs, layers, cfg):
    pag_agrees(sd(ddim()), diffusers.StableDiffusionPAGPipeline, theirs, layers, cfg)


@pytest.mark.parametrize('cfg', [True, False])
def test_pag_fashion(cfg):
    pag_agrees(
        fashion(),
        diffusers.StableDiffusionPAGPipeline,
        'mid',
        None,
        cfg,
        prompts=['a red bag on a blue background', 'a green boot on a white background'],
    )


def test_pag_xl():
    pag_agrees(xl(ddim('v_prediction')), diffusers.StableDiffusionXLPAGPipeline, 'mid', None, True)


def test_pag_not_square():
    pipe, size = sd(ddim()), dict(height=16, width=24)
    pag_agrees(
        pipe,
        diffusers.StableDiffusionPAGPipeline,
        'mid',
        None,
        True,
        D=pipeline_denoiser(pipe, **size),
        **size,
    )


def test_pag_pixart():
    pag_agrees(
        pixart(ddim(), diffusers.PixArtSigmaPipeline),
        diffusers.PixArtSigmaPAGPipeline,
        'blocks.0',
        'transformer_blocks.0.*',
        True,
        **PIXART,
    )


@pytest.mark.parametrize('cfg', [True, False])
def test_pag_sd3(cfg):
    "Joint attention: of the image to itself only"
    pipe = sd3(flow())
    pag_agrees(
        pipe,
        diffusers.StableDiffusion3PAGPipeline,
        'blocks.0',
        'transformer_blocks.0.*',
        cfg,
        sigmas=[0.95, 0.7, 0.3],
    )


def test_pag_adaptive():
    "diffusers' adaptive scale, `s - a*(1000-t)`, is a weight that depends on sigma"
    pipe = sd(ddim())
    D, p = (
        pipeline_denoiser(pipe),
        stock(diffusers.StableDiffusionPAGPipeline, pipe, pag_applied_layers='mid'),
    )
    want = p(
        PROMPTS,
        guidance_scale=W,
        pag_scale=S,
        pag_adaptive_scale=0.003,
        latents=noise_of(D),
        num_inference_steps=3,
        output_type='latent',
    ).images
    sigmas, scale = ladder(p.scheduler)
    w = lambda sigma: 1 + (S - 0.003 * (1000 - D.sigma_to_t(sigma))).clamp(min=0.0)
    G = GuidedDenoiser(D, Term(Conditions(D.cond()), W), Term(PAG(D), w))
    close(sample(G, noise_of(D) / scale, sigmas, euler, cond=D.cond(PROMPTS)), want)


def sag_pipe(pipe):
    from diffusers import StableDiffusionSAGPipeline

    heads = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads
    assert pipe.unet.config.attention_head_dim == heads
    return stock(StableDiffusionSAGPipeline, pipe)


@pytest.mark.parametrize('make', [lambda: sd(ddim()), fashion])
@pytest.mark.parametrize('cfg', [True, False])
def test_sag(make, cfg):
    "Theirs degrades the unconditional estimate if there is one"
    pipe = make()
    D = (
        pipeline_denoiser(pipe, height=32, width=48)
        if pipe.unet.config.block_out_channels[0] == 64
        else pipeline_denoiser(pipe, height=16, width=24)
    )
    prompts = ['a red bag on a blue background', 'a green boot on a white background']
    p = sag_pipe(pipe)
    want = p(
        prompts,
        height=D.size[0],
        width=D.size[1],
        guidance_scale=W if cfg else 1.0,
        sag_scale=S,
        latents=noise_of(D),
        num_inference_steps=3,
        output_type='latent',
    ).images
    close(ours(p, D, SAG(D, cond=D.cond() if cfg else None), cfg, D.cond(prompts)), want)
    assert (
        ours(p, D, SAG(D), cfg, D.cond(prompts), s=0.0) - want
    ).abs().max() > 1e-3 * want.abs().max()
    if cfg:
        assert (
            ours(p, D, SAG(D), cfg, D.cond(prompts)) - want
        ).abs().max() > 1e-4 * want.abs().max()


def test_seg_guider_of_diffusers():
    "Its third pass is never perturbed: the condition under which it puts its hooks in place cannot come true"
    SmoothedEnergyGuidance = pytest.importorskip('diffusers.guiders').SmoothedEnergyGuidance
    from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig

    pipe = pixart(ddim())
    D, net = pipeline_denoiser(pipe), pipe.transformer
    x, cond = noise_of(D), D.cond(PROMPTS)
    guider = SmoothedEnergyGuidance(
        seg_guidance_config=SmoothedEnergyGuidanceConfig([0], fqn='transformer_blocks')
    )
    guider.set_state(step=1, num_inference_steps=3, timestep=torch.tensor(500))
    assert guider.num_conditions == 3
    plain, seen = D(x, 2.0, **cond), []
    for _ in range(3):
        guider.prepare_models(net)
        seen.append(D(x, 2.0, **cond))
        guider.cleanup_models(net)
    assert all(torch.equal(o, plain) for o in seen)
    assert not torch.equal(SEG(D)(D, x, torch.full((2,), 2.0), cond), plain)


def unet2d():
    return pixels(ddim(), num_class_embeds=6)


def case(name):
    "A denoiser, and what to ask it"
    pipe = dict(
        sd=lambda: sd(ddim()),
        xl=lambda: xl(ddim()),
        sd3=lambda: sd3(flow()),
        flux=lambda: flux(flow()),
        pixart=lambda: pixart(ddim(), size=128),
        dit=lambda: dit(ddim()),
        pixels=unet2d,
    )[name]()
    D = pipeline_denoiser(pipe, height=16, width=24) if name != 'dit' else pipeline_denoiser(pipe)
    x = torch.randn((3, *D.latent_shape), generator=seeded(0))
    return (
        D,
        x,
        torch.tensor([0.5, 2.0, 4.0]),
        D.cond([1, 2, 3] if name in ('dit', 'pixels') else ['a red bag', 'a boot', 'a blue coat']),
    )


CASES = ['sd', 'xl', 'sd3', 'flux', 'pixart', 'dit', 'pixels']
NEGS = dict(
    pag=PAG,
    seg=lambda D, **kw: SEG(D, 0.7, **kw),
    slg=SLG,
    tpg=lambda D, **kw: TPG(D, generator=[5, 6, 7], **kw),
    sag=SAG,
)


def usable(name, neg):
    return not (name == 'pixels' and neg in ('slg', 'tpg'))  # its attention is not in a block


@pytest.mark.parametrize('neg', NEGS)
@pytest.mark.parametrize('name', CASES)
def test_negative(name, neg):
    "It differs from the positive in every sample, leaves no trace, costs nothing at w = 1, and no sample depends on another"
    if not usable(name, neg):
        with pytest.raises(ValueError, match='there are no blocks'):
            NEGS[neg](case(name)[0])
        return
    D, x, sigma, cond = case(name)
    net, pos = pipe_net(D.inner_model.pipe), D(x, sigma, **cond)
    state, own = (
        {k: v.clone() for k, v in net.state_dict().items()},
        {m: dict(m.__dict__) for m in net.modules()},
    )
    G = GuidedDenoiser(D, NEGS[neg](D), w=3.0)
    parts = G.parts(x, sigma, **cond)
    assert G.nfe == 6 and torch.equal(parts.pos, pos)
    assert all((a - b).abs().max() > 1e-5 for a, b in zip(parts.neg, pos)) and torch.allclose(
        parts.pred, pos + 2 * (pos - parts.neg), atol=1e-5
    )
    assert (
        torch.equal(D(x, sigma, **cond), pos)
        and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        and {m: dict(m.__dict__) for m in net.modules()} == own
    )
    G = GuidedDenoiser(D, NEGS[neg](D), w=torch.tensor([3.0, 1.0, 3.0]))
    y = G(x, sigma, **cond)
    assert (
        torch.equal(y[1], pos[1])
        and (y - parts.pred)[[0, 2]].abs().max() < 1e-4 * y.abs().max()
        and G.nfe_per_sample.tolist() == [2, 1, 2]
    )
    if neg == 'tpg':
        return
    for i in range(3):
        one = GuidedDenoiser(D, NEGS[neg](D), w=3.0)(
            x[i : i + 1], sigma[i : i + 1], **{k: v[i : i + 1] for k, v in cond.items()}
        )
        assert (one - parts.pred[i : i + 1]).abs().max() < 1e-4 * one.abs().max()


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('kind', ['pag', 'seg', 'slg', 'tpg'])
def test_shared_prefix(name, kind):
    "To the bit what a full pass says; and with the negative prompt in the same batch, up to rounding"
    if not usable(name, kind):
        return
    D, x, sigma, cond = case(name)
    a, b = (
        GuidedDenoiser(D, NEGS[kind](D, share=s), w=3.0).parts(x, sigma, **cond)
        for s in (True, False)
    )
    assert torch.equal(a.neg, b.neg) and torch.equal(a.pos, b.pos)
    other = D.cond() if name != 'pixels' else D.cond(0)
    a, b = (
        GuidedDenoiser(D, Term(Conditions(other), 2.0), Term(NEGS[kind](D, share=s), 3.0)).parts(
            x, sigma, **cond
        )
        for s in (True, False)
    )
    assert (a.pred - b.pred).abs().max() < 1e-5 * b.pred.abs().max() and not torch.equal(
        a.negs[1], a.pos
    )


@pytest.mark.parametrize('max_batch', [None, 6, 2])
def test_beside_several_questions(max_batch):
    "What is kept is the positive's, also where another term asks several things in the same batch, and of some samples only"
    D, x, sigma, cond = case('sd')
    perp, w = (
        lambda: PerpNeg(D.cond(), [D.cond('a coat'), D.cond('a dress')], [0.5, 1.5]),
        torch.tensor([1.0, 2.0, 3.0]),
    )
    a, b, both = (
        GuidedDenoiser(D, *t, max_batch=max_batch)
        for t in (
            [Term(perp(), w)],
            [Term(PAG(D, share=False), w.flip(0))],
            [Term(perp(), w), Term(PAG(D), w.flip(0))],
        )
    )
    close(both(x, sigma, **cond), a(x, sigma, **cond) + b(x, sigma, **cond) - D(x, sigma, **cond))
    assert both.nfe_per_sample.tolist() == [2, 5, 4]


@pytest.mark.parametrize('name', CASES)
def test_exception_in_the_middle(name):
    D, x, sigma, cond = case(name)
    net, pos = pipe_net(D.inner_model.pipe), D(x, sigma, **cond)
    own = {m: dict(m.__dict__) for m in net.modules()}

    def breaks(q, k, v, site):
        raise KeyError('in the middle')

    with pytest.raises(KeyError), perturbed(D, None, breaks):
        D(x, sigma, **cond)
    p = Prefix(find_layers(D))
    with pytest.raises(KeyError), p.record(), perturbed(D, None, breaks):
        D(x, sigma, **cond)
    assert (
        p.kept is None
        and torch.equal(D(x, sigma, **cond), pos)
        and {m: dict(m.__dict__) for m in net.modules()} == own
    )


def loops(q, k, v, scale, logit, first, count):
    "Attention by its definition, one query and one key at a time; `logit(i, j)` says what the image's token i makes of its token j"
    B, H, N, d = q.shape
    out = torch.zeros(B, H, N, v.shape[-1])
    for b in range(B):
        for h in range(H):
            for i in range(N):
                both = lambda j: first <= i < first + count and first <= j < first + count
                e = torch.stack(
                    [
                        scale * logit(b, h, i - first, j - first)
                        if both(j)
                        else scale * q[b, h, i] @ k[b, h, j]
                        for j in range(N)
                    ]
                )
                out[b, h, i] = e.softmax(0) @ v[b, h]
    return out


@pytest.mark.parametrize('name', ['sd3', 'flux'])
def test_joint_attention_by_loops(name):
    "Text sees all as before; the image sees the text as before, and itself as the change says"
    D, x, sigma, cond = case(name)
    x, sigma, cond = (
        x[:1],
        sigma[:1],
        {k: v[:1, :5] if k == 'encoder_hidden_states' else v[:1] for k, v in cond.items()},
    )
    for layers, first in {
        'sd3': [('transformer_blocks.0.attn', 0)],
        'flux': [('transformer_blocks.0.attn', -1), ('single_transformer_blocks.0.attn', -1)],
    }[name]:
        for change in (identity, blurred(0.7)):
            got = []

            def spy(q, k, v, site):
                n, (h, w) = q.shape[-2], site.grid(q.shape[-2])
                start = 0 if first == 0 else n - h * w
                assert (h, w) == (4, 6) and site.image(n) == slice(start, start + h * w)
                K = {o: torch.zeros(n_, n_) for o, n_ in (('h', h), ('w', w))}
                for o, M in K.items():
                    for i in range(len(M)):
                        r = (
                            min(7, len(M) + 1 - len(M) % 2) // 2
                        )  # ceil(6*.7) = 5, but at most what can be mirrored
                        r = min(2, r)
                        ws = [
                            torch.exp(torch.tensor(-0.5 * (j / 0.7) ** 2)) for j in range(-r, r + 1)
                        ]
                        for j, wt in zip(range(-r, r + 1), ws):
                            at = i + j
                            at = -at if at < 0 else 2 * (len(M) - 1) - at if at >= len(M) else at
                            M[i, at] += wt / sum(ws)
                blur = torch.kron(K['h'], K['w'])
                soft = torch.einsum('ij,bhjd->bhid', blur, q[:, :, start : start + h * w])
                logit = (
                    (lambda b, hd, i, j: soft[b, hd, i] @ k[b, hd, start + j])
                    if change is not identity
                    else (
                        lambda b, hd, i, j: (
                            q[b, hd, start + i] @ k[b, hd, start + j]
                            if i == j
                            else torch.tensor(-torch.inf)
                        )
                    )
                )
                out = change(q, k, v, site)
                got.append(
                    (out - loops(q, k, v, site.scale, logit, start, h * w)).abs().max()
                    / out.abs().max()
                )
                return out

            with perturbed(D, layers, spy):
                D(x, sigma, **cond)
            assert len(got) == 1 and got[0] < 1e-5


@pytest.mark.parametrize(
    'offload', [lambda net: cpu_offload(net, 'cpu'), lambda net: cpu_offload_with_hook(net, 'cpu')]
)
def test_offload_hooks(offload):
    "Hooks of accelerate, one for the network or one for each module, stay in place and do their work"
    D, x, sigma, cond = case('sd')
    net = D.inner_model.net
    want = GuidedDenoiser(D, PAG(D), w=3.0)(x, sigma, **cond)
    offload(net)
    own = {m: dict(m.__dict__) for m in net.modules()}
    for share in (True, False):
        assert torch.equal(GuidedDenoiser(D, PAG(D, share=share), w=3.0)(x, sigma, **cond), want)
        assert {m: m.__dict__.get('forward') for m in net.modules()} == {
            m: o.get('forward') for m, o in own.items()
        }


@pytest.mark.parametrize('how', ['in place', 'wrapped', 'its blocks'])
def test_compiled(how):
    "A compiled network is changed as any other, and is compiled as before afterwards"
    D, x, sigma, cond = case('dit')
    pipe = D.inner_model.pipe
    neg, plain = (GuidedDenoiser(D, PAG(D), w=w)(x, sigma, **cond) for w in (3.0, 1.0))
    runs = []

    def backend(gm, inputs):
        return lambda *args: runs.append(1) or gm.forward(*args)

    if how == 'in place':
        pipe.transformer.compile(backend=backend)
    elif how == 'wrapped':
        D.inner_model.net = torch.compile(pipe.transformer, backend=backend)
    else:
        for b in pipe.transformer.transformer_blocks:
            b.compile(backend=backend)
    assert torch.allclose(D(x, sigma, **cond), plain, atol=1e-5) and runs
    G = GuidedDenoiser(D, PAG(D), w=3.0)
    assert torch.allclose(G(x, sigma, **cond), neg, atol=1e-4) and torch.allclose(
        G(x, sigma, **cond), neg, atol=1e-4
    )
    n = len(runs)
    assert torch.allclose(D(x, sigma, **cond), plain, atol=1e-5) and len(runs) > n
    n = len(runs)
    assert torch.allclose(G(x, sigma, **cond), neg, atol=1e-4) and len(runs) == n
    G = GuidedDenoiser(D, PAG(D, share=False), w=3.0)
    assert (
        torch.allclose(G(x, sigma, **cond), neg, atol=1e-4) and len(runs) > n
    )  # without sharing the positive stays compiled


def test_compiled_from_outside():
    "What guides cannot be compiled; the error says so, before the first evaluation"
    D, x, sigma, cond = case('dit')
    G = GuidedDenoiser(D, PAG(D), w=3.0)
    with pytest.raises(RuntimeError, match='allowed is to compile the network'):
        torch.compile(G, backend='eager')(x, sigma, **cond)
    assert G.nfe == 0 and torch.equal(
        G(x, sigma, **cond), GuidedDenoiser(D, PAG(D), w=3.0)(x, sigma, **cond)
    )


@pytest.mark.parametrize('neg', [PAG, lambda D: PAG(D, share=False), SAG])
def test_gradient_checkpointing(neg):
    "It would run layers again that are no longer changed"
    D, x, sigma, cond = case('sd')
    D.inner_model.net.enable_gradient_checkpointing()
    G = GuidedDenoiser(D, neg(D), w=3.0)
    with torch.enable_grad(), pytest.raises(RuntimeError, match='gradient checkpointing'):
        G(x.requires_grad_(), sigma, **cond)
    assert G.nfe == 0 and G(x, sigma, **cond).shape == x.shape


def attn2(n, m):
    return n == 'mid_block.attentions.0.transformer_blocks.0.attn2'


def test_attention_that_cannot_be_changed():
    from diffusers.models.attention_processor import AttnProcessor

    D, x, sigma, cond = case('sd')
    pos = D(x, sigma, **cond)
    D.inner_model.net.set_attn_processor(AttnProcessor())
    with pytest.raises(
        RuntimeError, match='AttnProcessor does not call scaled_dot_product_attention'
    ):
        GuidedDenoiser(D, PAG(D), w=3.0)(x, sigma, **cond)
    assert torch.allclose(D(x, sigma, **cond), pos, atol=1e-5)


BAD = {  # what is done -> what the error says
    'no layer': (
        lambda D: PAG(D, 'mid'),
        "layers='mid': nothing in UNet2DConditionModel matches; there are down_blocks",
    ),
    'empty': (lambda D: SEG(D, 1.0, []), 'at least one layer'),
    'sigma': (lambda D: SEG(D, -1.0), 'sigma=-1'),
    'nan': (lambda D: SEG(D, float('nan')), 'sigma=nan'),
    'two for SAG': (lambda D: SAG(D, '*.attn1'), '4 match'),
    'function': (lambda D: PAG(lambda x, t: x), 'there is a function inside'),
    'no attention': (lambda D: PAG(torch.nn.Linear(2, 2)), 'there are no attentions'),
    'other network': (
        lambda D: GuidedDenoiser(D, PAG(case('sd')[0]), w=2.0)(noise_of(D), 1.0, **D.cond(PROMPTS)),
        'its layers are of another network',
    ),
    'cross-attention': (lambda D: PAG(D, attn2), 'attn2: cross-attention'),
    'cross-attention for SEG': (lambda D: SEG(D, 1.0, attn2), 'attn2: cross-attention'),
    'cross-attention for SAG': (lambda D: SAG(D, attn2), 'attn2: cross-attention'),
    'kind': (lambda D: SLG(D, find_layers(D)), "layers are of kind 'attention'"),
    'not tokens': (
        lambda D: TPG(D, lambda n, m: n == 'conv_in', generator=0)(
            D, noise_of(D), torch.ones(2), D.cond(PROMPTS)
        ),
        'conv_in: it is given',
    ),
    'blur': (lambda D: SAG(D, sigma=-1), 'sigma=-1'),
    'names': (
        lambda D: GuidedDenoiser(D, SAG(D, cond=dict(y=torch.zeros(1))), w=2.0)(
            noise_of(D), 1.0, **D.cond(PROMPTS)
        ),
        'conditions are',
    ),
    'batch': (
        lambda D: GuidedDenoiser(D, SAG(D, cond=D.cond(['a'] * 3)), w=2.0)(
            noise_of(D), 1.0, **D.cond(PROMPTS)
        ),
        'one a sample, 2',
    ),
    'generators': (
        lambda D: GuidedDenoiser(D, TPG(D, generator=[1]), w=2.0)(
            noise_of(D), 1.0, **D.cond(PROMPTS)
        ),
        '1 were given for 2',
    ),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_input(what):
    f, says = BAD[what]
    with pytest.raises(ValueError, match=says):
        f(case('sd')[0])
