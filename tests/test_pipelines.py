"`guided` against the stock pipelines' own guidance, for every class and scheduler."

import copy
import inspect
import math
import pickle
import threading
import warnings

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from pipeline_helpers import (
    CONTROL,
    LEVELS,
    MADE,
    NEGS,
    OLD,
    PIC,
    PROMPTS,
    STEPS,
    TRUE,
    W,
    controlled,
    ddim,
    dit,
    euler_discrete,
    flow,
    flux,
    make,
    net_of,
    of,
    off,
    pixart,
    randomized,
    run,
    scheduler_levels,
    sd,
    sd3,
    seeded,
    xl,
)

from cf_guidance.attention import PAG, SAG
from cf_guidance.guided import GuidedDenoiser, Term
from cf_guidance.karras import euler, sample
from cf_guidance.negatives import ICG, MG, SG, Autoguidance, PerpNeg
from cf_guidance.pipelines import (
    FAMILIES,
    NegativePrompt,
    embedded_path,
    guided,
    pipeline_denoiser,
    sigmas_of,
)
from cf_guidance.transforms import apg, base_norm, cfg, cfg_zero, rescale, t_norm, tcfg

try:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
except ImportError:  # before 0.35
    from diffusers.models.attention_processor import (
        FluxIPAdapterJointAttnProcessor2_0 as FluxIPAdapterAttnProcessor,
    )

# of torchsde, and of schedulers of diffusers under newer versions of numpy
pytestmark = [
    pytest.mark.filterwarnings('ignore:Should have t:UserWarning'),
    pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning'),
    pytest.mark.filterwarnings('ignore:__array_wrap__ must accept:DeprecationWarning'),
]
BIN = dict(use_resolution_binning=False)
LATENTS = torch.randn(4, 4, 8, 8, generator=seeded(7))
V = dict(prediction_type='v_prediction')


def sd_v(**kw):
    return sd(ddim('v_prediction'), **kw)


def state_of(pipe):
    "All of a pipeline and its network that guidance could change."
    modules = [(name, *vars(m)) for name, m in net_of(pipe).named_modules()]
    return type(pipe), {k: id(v) for k, v in vars(pipe).items()}, modules


def idle(sd, **kw):
    "Run a pipeline of which a term never guides."
    with pytest.warns(UserWarning, match='never guided'):
        return run(sd, **kw)


@pytest.mark.parametrize('what', MADE)
def test_every_class(what):
    pipe, kw = make(what)
    scale = 'true_cfg_scale' if 'true_cfg_scale' in kw else 'guidance_scale'
    rows = []
    net_of(pipe).register_forward_hook(lambda m, args, out: rows.append(len(out[0])))
    own = run(pipe, **kw)
    evaluations = sum(rows)
    more, before = run(pipe, **{**kw, scale: 5.0}), state_of(pipe)
    plain = guided(pipe, NegativePrompt())
    assert off(run(plain, **kw), own) < 1e-5
    assert sum(plain.report.nfe) == evaluations
    assert plain.report.nfe == [evaluations // 2] * 2
    assert off(run(guided(pipe, w=5.0), **kw), more) < 1e-5
    assert off(own, more) > 1e-3
    both = guided(pipe, NegativePrompt(), Term(PAG(net_of(pipe)), 3.0))
    assert off(run(both, **kw), own) > 1e-4
    assert state_of(pipe) == before
    assert torch.equal(run(pipe, **kw), own)


def test_all_are_tested():
    tested = {f'{o.split()[0]}Pipeline' for o in MADE}
    consistency = {'LatentConsistencyModelPipeline', 'LatentConsistencyModelImg2ImgPipeline'}
    pixels = {'DDPMPipeline', 'DDIMPipeline'}
    others = {name for name, family in FAMILIES.items() if family.text is None}
    assert tested | consistency | pixels | others | {'KolorsPipeline'} == {*FAMILIES}


def run_lcm(pipe, **kw):
    pipe.set_progress_bar_config(disable=True)
    args = dict(num_inference_steps=4, generator=seeded(0), output_type='latent')
    return pipe(PROMPTS, **args, **kw).images


@pytest.mark.parametrize(
    'name,kw',
    [
        ('LatentConsistencyModel', {}),
        ('LatentConsistencyModelImg2Img', dict(image=PIC, strength=0.8)),
    ],
)
def test_distilled(name, kw):
    "A network that is told the weight has no negative prompt, but can have other terms."
    lcm = sd(diffusers.LCMScheduler(steps_offset=1), time_cond_proj_dim=8)
    pipe = of(name + 'Pipeline', lcm)
    own = run_lcm(pipe, **kw)
    idle = guided(pipe, PAG(pipe.unet), w=1.0)
    with pytest.warns(UserWarning, match='PAG never guided: its weight is 1'):
        assert off(run_lcm(idle, **kw), own) < 1e-5
    assert idle.report.nfe == [4, 4]
    assert off(run_lcm(guided(pipe, PAG(pipe.unet)), **kw), own) > 1e-4
    with pytest.raises(ValueError, match='NegativePrompt: this call evaluates no negative prompt'):
        run_lcm(guided(pipe), **kw)
    assert torch.equal(run_lcm(pipe, **kw), own)


def test_distilled_controlnet():
    "Some pipelines evaluate a negative prompt even for such a network."
    name, kw = 'StableDiffusionXLControlNetImg2ImgPipeline', dict(image=PIC, **CONTROL)
    same = controlled(name, xl(ddim()))
    pipe = of(name, xl(ddim(), time_cond_proj_dim=8), controlnet=same.controlnet)
    pipe.unet.load_state_dict(same.unet.state_dict(), strict=False)

    negs = text_of(same, NEGS)
    a, b = (run(guided(o, Term(negs, W)), **kw) for o in (pipe, same))
    assert torch.equal(run(pipe, **kw), run(same, **kw))
    assert off(a, b) < 1e-5


def test_pixels():
    "A pipeline without prompts, whose network has a perturbed one."
    net = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
        attention_head_dim=4,
        norm_num_groups=2,
    )
    pipe = diffusers.DDIMPipeline(randomized(net), ddim())
    pipe.set_progress_bar_config(disable=True)

    def go(pipe):
        out = pipe(2, seeded(0), num_inference_steps=3, output_type='np').images
        return torch.from_numpy(out)

    own, sd = go(pipe), guided(pipe, PAG(pipe.unet), w=1.0)
    with pytest.warns(UserWarning, match='never guided'):
        assert off(go(sd), own) < 1e-4
    assert off(go(guided(pipe, PAG(pipe.unet), w=4.0)), own) > 1e-3
    with pytest.raises(ValueError, match='evaluates no negative prompt'):
        go(guided(pipe))


SOLVERS = {  # of Stable Diffusion -> settings
    'DDIM': [
        dict(clip_sample=False),
        dict(prediction_type='sample', timestep_spacing='linspace'),
        dict(V, rescale_betas_zero_snr=True, timestep_spacing='trailing'),
    ],
    'DDPM': [V],
    'DDIMParallel': [V],
    'DDPMParallel': [V],
    'EulerDiscrete': [
        {},
        V,
        dict(V, use_karras_sigmas=True),
        dict(V, rescale_betas_zero_snr=True, timestep_spacing='trailing'),
        dict(V, interpolation_type='log_linear'),
        dict(
            V,
            timestep_type='continuous',
            sigma_min=0.01,
            sigma_max=50.0,
            use_karras_sigmas=True,
        ),
    ],
    'EulerAncestralDiscrete': [{}, V],
    'LMSDiscrete': [V],
    'PNDM': [dict(V, skip_prk_steps=True)],
    'DPMSolverMultistep': [
        {},
        dict(V, algorithm_type='sde-dpmsolver++', use_karras_sigmas=True),
        dict(V, use_lu_lambdas=True),
        dict(solver_order=3, prediction_type='sample'),
        dict(V, algorithm_type='dpmsolver', final_sigmas_type='sigma_min'),
    ],
    'DPMSolverSinglestep': [V],
    'DPMSolverSDE': [V],
    'UniPCMultistep': [V, dict(V, use_karras_sigmas=True)],
    'DEISMultistep': [V],
    'HeunDiscrete': [V],
    'KDPM2Discrete': [V],
    'KDPM2AncestralDiscrete': [V],
    'LCM': [V],
    'TCD': [V],
    'SASolver': [V],
    'EDMEuler': [{}, V],
    'EDMDPMSolverMultistep': [V],
}
SHIFTED = dict(prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0)
FLOWS = {
    'FlowMatchEulerDiscrete': [
        {},
        dict(use_karras_sigmas=True),
        dict(stochastic_sampling=True),
        dict(num_train_timesteps=500),
    ],
    'FlowMatchHeunDiscrete': [{}],
    'FlowMatchLCM': [{}],
    **{o: [SHIFTED] for o in ('DPMSolverMultistep', 'UniPCMultistep', 'DEISMultistep')},
}
STEP_OF = dict(  # the step of each evaluation, where a step has several
    HeunDiscrete=[0, 0, 1, 1, 2],
    FlowMatchHeunDiscrete=[0, 0, 1, 1, 2],
    PNDM=[0, 0, 1, 2],
    KDPM2Discrete=[0, 0, 1, 1, 2],
    KDPM2AncestralDiscrete=[0, 0, 1, 1, 2],
    DPMSolverSDE=[0, 0, 1, 1, 2],
)


def listed(solvers):
    return [(name, kw) for name, kws in solvers.items() for kw in kws]


def solver(name, kw):
    cls = getattr(diffusers, name + 'Scheduler', None)
    if cls is None or 'stochastic_sampling' in kw and OLD:
        pytest.skip('not in this diffusers')
    trained = ('beta_start', 'beta_end', 'beta_schedule', 'steps_offset')
    trained = {k: ddim().config[k] for k in trained if k in inspect.signature(cls).parameters}
    return cls(**{**({} if name.startswith(('EDM', 'Flow')) else trained), **kw})


def scheduled(pipe, ws, **kw):
    "What a pipeline ends with that has these weights, one per evaluation, from a callback."

    def step(pipe, i, t, o):
        pipe._guidance_scale = ws[min(i + 1, len(ws) - 1)]
        return o

    return run(pipe, guidance_scale=ws[0], callback_on_step_end=step, **kw)


@pytest.fixture(scope='module')
def two():
    return {True: sd3(flow()), False: sd(ddim())}


@pytest.mark.parametrize('name,kw', [*listed(SOLVERS), *listed(FLOWS)])
def test_every_scheduler(name, kw, two):
    "With a weight that a callback changes, and with one value per step, which is the same."
    if name == 'DPMSolverSDE':
        pytest.importorskip('torchsde')
    pipe, ws = two[(name, kw) in listed(FLOWS)], [2.0, 5.0, 3.0]
    pipe.scheduler = solver(name, kw)
    each = [ws[i] for i in STEP_OF.get(name, range(3))]
    own, flat = scheduled(pipe, each), run(pipe, guidance_scale=2.0)
    assert len(pipe.scheduler.timesteps) == len(each)
    for got in (scheduled(guided(pipe), each), run(guided(pipe, w=ws))):
        assert off(got, own) < (1e-4 if 'Heun' in name else 2e-5)
        assert (got - own).abs().max() < 0.01 * (own - flat).abs().max()


@pytest.mark.parametrize('name', ['HeunDiscrete', 'KDPM2Discrete', 'PNDM', 'FlowMatchHeunDiscrete'])
def test_both_evaluations_of_a_step(name, two):
    pipe = two['Flow' in name]
    pipe.scheduler = solver(name, dict(skip_prk_steps=True) if name == 'PNDM' else {})
    seen = []

    def spy(neg, pos, w):
        seen.append(w)
        return cfg(neg, pos, w)

    run(guided(pipe, w=[2.0, 3.0, 4.0], rule=spy))
    assert seen == [[2.0, 3.0, 4.0][i] for i in STEP_OF[name]]


SMALL = dict(num_train_timesteps=30, beta_start=0.02, beta_end=0.4)


@pytest.mark.parametrize(
    'name,kw,steps',
    [
        ('DPMSolverMultistep', dict(V, use_karras_sigmas=True, **SMALL), 20),
        ('DPMSolverMultistep', dict(use_exponential_sigmas=True), 20),
        ('PNDM', dict(V, skip_prk_steps=False), 20),
    ],
)
def test_steps_at_one_time(name, kw, steps, two):
    "Some schedulers round their times, and take several steps at one; each has its own weight."
    pipe, ws = two[False], [9.0 if i % 2 else 1.5 + i / steps for i in range(steps)]
    pipe.scheduler = solver(name, kw)
    each = ws
    if name == 'PNDM':
        each = [ws[i // 4] for i in range(12)] + ws[3:]
    own = scheduled(pipe, each, steps=steps)
    times = pipe.scheduler.timesteps.tolist()
    assert len({*times}) < len(times)
    assert off(scheduled(guided(pipe), each, steps=steps), own) < 1e-5
    assert off(run(guided(pipe, w=ws), steps=steps), own) < 1e-5


def test_image_to_image_walks_the_last_steps():
    for what in ('StableDiffusionImg2Img', 'StableDiffusion3Img2Img'):
        pipe, kw = make(what)
        ws, half = [9.0, 9.0, 2.0, 4.0], dict(kw, strength=0.5, steps=4)
        own, sd = scheduled(pipe, ws[2:], **half), guided(pipe, w=ws)
        assert off(run(sd, **half), own) < 1e-5
        assert sd.report.nfe == [4, 4]
        assert len(sd.report.sigmas) == 2
        assert off(own, run(pipe, **half, guidance_scale=2.0)) > 1e-4


@pytest.mark.parametrize(
    'make',
    [
        sd_v,
        lambda: xl(ddim('v_prediction')),
        lambda: sd3(flow()),
        lambda: pixart(ddim('v_prediction')),
    ],
)
def test_prompts_of_their_own(make):
    "Weights and conditions per prompt, with two images each, are those of each prompt alone."
    pipe = make()
    if OLD and 'Diffusion3' in type(pipe).__name__:
        pytest.skip('this diffusers mixes up the pooled embeddings of several prompts')
    kw = BIN if 'PixArt' in type(pipe).__name__ else {}
    alone = [
        dict(prompt=p, negative_prompt=n, guidance_scale=w, latents=LATENTS[2 * i : 2 * i + 2])
        for i, (p, n, w) in enumerate(zip(PROMPTS, NEGS, (2.0, 5.0), strict=True))
    ]
    own = torch.cat([run(pipe, num_images_per_prompt=2, **o, **kw) for o in alone])

    def go(pipe, **more):
        return run(pipe, num_images_per_prompt=2, latents=LATENTS, **{**kw, **more})

    w = torch.tensor([2.0, 5.0])
    assert off(own, go(pipe, guidance_scale=2.0)) > 1e-3
    assert off(go(guided(pipe, w=w)), own) < 1e-5
    assert off(go(guided(pipe, w=[[2.0, 5.0]] * STEPS)), own) < 1e-5
    none = dict(guidance_scale=1.0, negative_prompt=None)
    sd = guided(pipe, Term(text_of(pipe, NEGS), w))
    assert off(go(sd, **none), own) < 1e-5
    assert off(go(sd, negative_prompt=['', '']), own) < 1e-5
    if 'XL' not in type(pipe).__name__:
        nothing = text_of(pipe, None)
        assert all(len(v) == 1 for v in nothing.values())
        want = go(pipe, guidance_scale=2.0, negative_prompt=['', ''])
        assert off(go(guided(pipe, Term(nothing, 2.0)), **none), want) < 1e-5


def text_of(pipe, prompts):
    "The conditions of a prompt that are text."
    D = pipeline_denoiser(pipe)
    return {k: v for k, v in D.cond(prompts).items() if k in D.family.text}


def other_net(pipe):
    parts = [o for o in ('unet', 'transformer') if hasattr(pipe, o)]
    return of(type(pipe).__name__, pipe, **{o: other_weights(getattr(pipe, o)) for o in parts})


def other_weights(net):
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.8)
    return net


WAYS = {  # of guiding -> terms of a pipeline, given its denoiser, and arguments
    'two prompts and PAG': lambda D: (
        [Term(D.cond(NEGS), 3.0), Term(D.cond('a dress'), 2.0), Term(PAG(D), 2.0)],
        {},
    ),
    'interval': lambda D: ([Term(D.cond(NEGS), 3.0, interval=(0.5, 5.0))], {}),
    'PerpNeg': lambda D: (
        [PerpNeg(D.cond(), [D.cond('a dress'), D.cond(NEGS)], [1.0, torch.tensor([0.5, 1.5])])],
        {},
    ),
    'ICG': lambda D: ([Term(ICG(D.cond(['a', 'b c', 'd']), generator=3), 3.0)], {}),
    'SAG': lambda D: ([SAG(D)], {}),
    'rescale': lambda D: ([Term(D.cond(NEGS), 5.0)], dict(post=rescale.of(phi=0.7))),
    'PAG and rescale': lambda D: ([Term(D.cond(NEGS), 5.0), PAG(D)], dict(post=[rescale])),
    'base_norm': lambda D: ([Term(D.cond(NEGS), 5.0, base_norm)], {}),
    'APG': lambda D: ([Term(D.cond(NEGS), 5.0, apg.of(beta=-0.75, radius=2.0))], {}),
    'TCFG': lambda D: ([Term(D.cond(NEGS), 5.0, tcfg)], {}),
    'zero': lambda D: ([Term(D.cond(NEGS), 5.0, cfg_zero)], {}),
    'stop': lambda D: ([Term(D.cond(NEGS), 5.0, stop=-1.0)], {}),
    'MG': lambda D: ([Term(D.cond(NEGS), 5.0), MG()], {}),
    'SG': lambda D: ([Term(SG(D, 1.5), 3.0)], {}),
    'every': lambda D: ([Term(D.cond(NEGS), 5.0, every=3)], {}),
    'weaker': lambda D: ([Term(Autoguidance(pipeline_denoiser(other_net(D.pipe))), 2.0)], {}),
}


@pytest.mark.parametrize('make', [sd_v, lambda: sd3(flow())])
@pytest.mark.parametrize('way', WAYS)
def test_ways(make, way):
    "As the denoiser of the pipeline, guided, under Euler's method; and a second call is the same."
    pipe = make()
    D, x = pipeline_denoiser(pipe), LATENTS[:2]
    terms, kw = WAYS[way](D)
    levels = LEVELS if 'StableDiffusion3' in type(pipe).__name__ else {}
    plain = run(pipe, latents=x, guidance_scale=1.0, **levels)
    sd = guided(pipe, *terms, **kw)
    got, again = (run(sd, latents=x, **levels) for _ in range(2))
    sigmas, scale = scheduler_levels(pipe.scheduler)
    terms, kw = WAYS[way](D)
    G = GuidedDenoiser(D, *terms, **kw)
    want = sample(G, x / scale, sigmas, euler, cond=D.cond(PROMPTS))
    assert off(got, want) < 1e-4
    assert off(plain, want) > 1e-3
    assert torch.equal(got, again)
    assert sd.report.nfe == G.run.nfe_per_sample.tolist()


def test_max_batch():
    pipe = sd_v()
    terms = NegativePrompt(), Term(PAG(pipe.unet), 2.0)
    whole, rows = run(guided(pipe, *terms)), []
    pipe.unet.register_forward_hook(lambda m, args, out: rows.append(len(out[0])))
    sd = guided(pipe, *terms, max_batch=3)
    assert off(run(sd), whole) < 1e-5
    assert max(rows) == 3
    assert sd.report.nfe == [9, 9]


def test_cost():
    pipe = sd_v()

    def nfe(*terms, steps=4, warns=False, **kw):
        sd = guided(pipe, *terms, **kw)
        (idle if warns else run)(sd, steps=steps)
        return sd.report.nfe

    assert nfe(NegativePrompt()) == [8, 8]
    assert nfe(w=1.0, warns=True) == [4, 4]
    assert nfe(w=0.0) == [4, 4]
    assert nfe(w=[1.0, 2.0, 2.0, 1.0]) == [6, 6]
    assert nfe(w=torch.tensor([1.0, 2.0])) == [4, 8]
    assert nfe(NegativePrompt(), PAG(pipe.unet)) == [12, 12]
    assert nfe(PAG(pipe.unet)) == [8, 8]
    assert nfe(stop=-1.0) == [5, 5]
    assert nfe(every=3) == [6, 6]
    assert nfe(MG()) == [4, 4]
    rows, levels = [], sigmas_of(pipe, 4).tolist()
    pipe.unet.register_forward_hook(lambda m, args, out: rows.append(len(out[0])))
    assert nfe(NegativePrompt(), max_batch=2) == [8, 8]
    assert rows == [2] * 8
    assert nfe(interval=(levels[2], levels[0])) == [6, 6]
    assert nfe(interval=(levels[1] * 0.99, levels[1])) == [5, 5]


@pytest.mark.parametrize(
    'make',
    [
        lambda: sd(ddim()),
        lambda: xl(euler_discrete()),
        lambda: sd3(flow(shift=3.0)),
        lambda: xl(diffusers.EDMEulerScheduler()),
    ],
)
def test_sigmas_of(make):
    "The levels at which the denoiser is asked, and the scheduler's own."
    pipe = make()
    sd = guided(pipe, w=4.0)
    with sd.watch() as traces:
        run(sd)
    run(pipe)
    levels = sigmas_of(pipe, STEPS)
    own = scheduler_levels(pipe.scheduler)[0].float()
    assert torch.allclose(levels[:-1], torch.stack([o.sigma[0] for o in traces]))
    assert sd.report.sigmas == pytest.approx(levels[:-1].tolist())
    assert levels[-1] == 0
    assert torch.allclose(levels.clamp(max=1e8), own.clamp(max=1e8), rtol=2e-3)
    assert all((o.scale - 4.0).abs().max() < 0.02 for o in traces)
    assert len(traces) == STEPS


@pytest.mark.parametrize('name', ['StableDiffusion', 'StableDiffusion3', 'Flux'])
def test_sigmas_of_a_call(name):
    pipe, kw = make(name)
    sd = guided(pipe, NegativePrompt())
    run(sd, **kw)
    assert sigmas_of(pipe, STEPS)[:-1].tolist() == pytest.approx(sd.report.sigmas, rel=1e-5)


def test_sigmas_of_times():
    "With times of one's own, such as Align Your Steps."
    pipe = sd(euler_discrete())
    times = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    sd_ = guided(pipe, w=[4.0] * 10)
    run(sd_, steps=10, timesteps=times)
    for n in (10, None):
        levels = sigmas_of(pipe, n, timesteps=times)
        assert levels[:-1].tolist() == pytest.approx(sd_.report.sigmas)
    run(sd_, steps=10, timesteps=times)
    with pytest.raises(ValueError, match='does not support'):
        sigmas_of(sd(ddim()), timesteps=times)


def test_interval_of_own_levels():
    "A bound that is one of the scheduler's own levels falls on the right side."
    pipe = sd(euler_discrete())
    levels = sigmas_of(pipe, 8).tolist()
    for i in range(7):
        sd_ = guided(pipe, w=4.0, interval=(levels[i + 1], levels[i]))
        run(sd_, steps=8)
        assert sd_.report.nfe == [9, 9]


@pytest.mark.parametrize('what', ['StableDiffusion3', 'Flux'])
def test_zero_init(what):
    "As if the network predicted 0 in the first step."
    (pipe, kw), calls = make(what), []

    def still(m, args, out):
        calls.append(out)
        return (out[0] * (len(calls) > (2 if what == 'Flux' else 1)),)

    hook = net_of(pipe).register_forward_hook(still)
    own = run(pipe, **kw)
    hook.remove()
    sd = guided(pipe, NegativePrompt(), zero_init=1)
    assert off(run(sd, **kw), own) < 1e-5
    assert sd.report.nfe == [4, 4]
    assert off(run(pipe, **kw), own) > 1e-3


@pytest.mark.parametrize(
    'what',
    ['StableDiffusion', 'StableDiffusionXL', 'StableDiffusion3', 'Flux', 'PixArtAlpha']
    + ['StableDiffusionInpaint 9'],
)
def test_half_precision(what):
    "The network is asked in its own type."
    pipe, kw = make(what)
    exact = run(pipe, **kw)
    pipe.to(torch.bfloat16)
    seen, own = [], run(pipe, **kw)
    net_of(pipe).register_forward_hook(lambda m, args, out: seen.append(out[0].dtype))
    for terms in ([NegativePrompt()], [NegativePrompt(), Term(PAG(net_of(pipe)), 1.0)]):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PAG with w = 1 never guides
            got = run(guided(pipe, *terms), **kw)
        assert got.dtype == own.dtype
        assert off(got.float(), exact) < 2 * off(own.float(), exact) + 1e-3
        assert {*seen} == {torch.bfloat16}


def pictured(pipe):
    "With an IP-adapter: its pictures are conditions like the words."
    net, proj = net_of(pipe), ImageProjection(8, 16, 4)
    net.encoder_hid_proj = MultiIPAdapterImageProjection([randomized(proj)])
    net.register_to_config(encoder_hid_dim_type='ip_image_proj')
    new = net.attn_processors
    flux = 'Flux' in type(pipe).__name__
    cls = FluxIPAdapterAttnProcessor if flux else IPAdapterAttnProcessor2_0
    for k, m in net.named_modules():
        cross = 'attn2' in k or getattr(m, 'add_q_proj', None) is not None
        if f'{k}.processor' in new and cross:
            new[f'{k}.processor'] = randomized(cls(m.to_q.out_features, 16))
    net.set_attn_processor(new)
    return pipe


def shown(n, seed):
    return torch.randn(n, 1, 8, generator=seeded(seed))


def strong(pipe):
    "With attention that has an argument of its own."

    class Strong(AttnProcessor2_0):
        def __call__(self, *args, strength=1.0, **kwargs):
            return super().__call__(*args, **kwargs) * strength

    pipe.unet.set_attn_processor(Strong())
    return pipe


def xl_v():
    return xl(ddim('v_prediction'))


CALLS = {  # what a call is given -> a pipeline, and how it is called
    'clip_skip': (xl_v, dict(clip_skip=1)),
    'attention': (lambda: strong(sd_v()), dict(cross_attention_kwargs=dict(strength=0.5))),
    'embeddings': (
        sd_v,
        dict(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=torch.randn(2, 7, 16, generator=seeded(1)),
            negative_prompt_embeds=torch.randn(2, 7, 16, generator=seeded(2)),
        ),
    ),
    'no negative prompt': (sd_v, dict(negative_prompt=None)),
    'one prompt': (
        sd_v,
        dict(prompt='a boot', negative_prompt=None, num_images_per_prompt=3),
    ),
    'random': (sd_v, dict(eta=0.5)),
    'times': (lambda: sd(euler_discrete('v_prediction')), dict(timesteps=[900, 500, 100])),
    'end': (xl_v, dict(denoising_end=0.6, steps=5)),
    'sizes': (
        xl_v,
        dict(
            original_size=(32, 32),
            negative_original_size=(8, 8),
            negative_crops_coords_top_left=(4, 4),
            height=24,
            width=16,
        ),
    ),
    'sigmas': (lambda: sd3(flow()), dict(sigmas=[1.0, 0.6, 0.2])),
    'pictures': (lambda: pictured(sd_v()), dict(ip_adapter_image_embeds=[shown(2, 3)])),
    'pictures of Flux': (
        lambda: pictured(flux(flow())),
        dict(
            TRUE,
            ip_adapter_image_embeds=[shown(1, 3)],
            negative_ip_adapter_image_embeds=[shown(1, 4)],
        ),
    ),
    'packed': (
        lambda: flux(flow(shift=2.0, use_dynamic_shifting=True)),
        dict(TRUE, height=24, num_images_per_prompt=2),
    ),
    'one negative for Flux': (lambda: flux(flow()), dict(TRUE, negative_prompt='dark')),
    'one negative for schnell': (
        lambda: flux(flow(), guidance=False),
        dict(TRUE, negative_prompt='dark'),
    ),
}


@pytest.mark.parametrize('what', CALLS)
def test_calls(what):
    make, kw = CALLS[what]
    pipe = make()
    own = run(pipe, **kw)
    assert off(run(guided(pipe), **kw), own) < 1e-5
    assert off(idle(guided(pipe, w=1.0), **kw), own) > 1e-4


def test_texts_of_other_lengths():
    "Prompts in more tokens than the pipeline's; Flux has a table with a row per token."
    if OLD:
        pytest.skip('this diffusers has one such table for prompt and negative prompt')
    pipe, kw = make('Flux')
    negs = pipeline_denoiser(pipe, height=16, width=16).cond(NEGS, max_sequence_length=24)
    given = dict(
        kw,
        negative_prompt=None,
        negative_prompt_embeds=negs['encoder_hidden_states'],
        negative_pooled_prompt_embeds=negs['pooled_projections'],
    )
    own = run(pipe, **given)
    assert off(run(guided(pipe), **given), own) < 1e-5
    assert off(run(guided(pipe, Term(negs, W)), negative_prompt=None), own) < 1e-5
    assert off(run(pipe, **kw), own) > 1e-4


def test_cutoff():
    "After it there is no negative prompt."
    pipe, one = sd_v(), dict(prompt='a boot', negative_prompt='dark', steps=4)
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    cut = dict(one, callback_on_step_end=cutoff)
    own, sd = run(pipe, **cut), guided(pipe)
    assert off(run(sd, **cut), own) < 1e-5
    assert sd.report.nfe == [7]
    sd = guided(pipe, w=W)
    with sd.watch() as traces:
        assert off(run(sd, **cut), run(pipe, **cut, guidance_scale=W)) < 1e-5
    assert sd.report.nfe == [7]
    assert traces[-1].scale.tolist() == [1.0]


def test_off_and_on():
    "A callback switches guidance off after the first step, and on again for some."
    pipe, on = sd(ddim()), [1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]

    def call(pipe):
        kept = {}

        def toggle(pipe, i, t, kw):
            both = kept.setdefault('both', kw['prompt_embeds'])
            pipe._guidance_scale, kw['prompt_embeds'] = (
                (6.0, both) if on[i + 1] else (1.0, both[1:])
            )
            return kw

        return run(
            pipe,
            prompt='a boot',
            negative_prompt='dark',
            guidance_scale=6.0,
            steps=10,
            callback_on_step_end=toggle,
            callback_on_step_end_tensor_inputs=['latents', 'prompt_embeds'],
        )

    own, sd_ = call(pipe), guided(pipe)
    assert off(call(sd_), own) < 1e-5
    assert sd_.report.nfe == [15]
    assert sd_.report.terms[0].guided == 5
    both = guided(pipe, NegativePrompt(), Term(PAG(pipe.unet), 2.0))
    call(both)
    assert both.report.terms[1].guided == 10


def test_stopped_by_a_callback():
    "Latents are changed, and the pipeline stops."
    pipe = sd_v()

    def stop(pipe, i, t, o):
        pipe._interrupt = i == 1
        return dict(latents=o['latents'] * 0.9)

    own, sd = run(pipe, callback_on_step_end=stop), guided(pipe)
    assert off(run(sd, callback_on_step_end=stop), own) < 1e-5
    assert sd.report.nfe == [4, 4]


def test_stopped_from_outside():
    "Such as by the button of an app, which only knows the guided pipeline."
    pipe = sd_v()
    sd_ = guided(pipe)

    def press(pipe, i, t, o):
        sd_._interrupt = True
        return o

    run(sd_, callback_on_step_end=press)
    assert sd_.report.nfe == [2, 2]
    run(sd_)
    assert sd_.report.nfe == [2 * STEPS] * 2


def test_rising_noise():
    "DDIM inversion: from image to noise, with a rule that is not linear."
    pipe = sd(ddim())
    s = pipe.scheduler = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
    x, sd_ = LATENTS[:1], guided(pipe, post=rescale)
    got = run(sd_, prompt='a boot', negative_prompt='dark', latents=x, steps=5)
    s.set_timesteps(5)
    e = torch.cat(pipe.encode_prompt('a boot', 'cpu', 1, True, 'dark')[::-1])
    for a, t in zip(s.alphas_cumprod[s.timesteps], s.timesteps, strict=True):  # by hand
        noises = pipe.unet(torch.cat([x, x]), t, e).sample.chunk(2)
        neg, pos = (
            a.sqrt() * n - (1 - a).sqrt() * (x - (1 - a).sqrt() * n) / a.sqrt() for n in noises
        )
        v = rescale(neg + W * (pos - neg), pos)
        x = s.step(a.sqrt() * v + (1 - a).sqrt() * x, t, x).prev_sample
    assert off(got, x) < 1e-4
    assert sd_.report.sigmas == sorted(sd_.report.sigmas)
    assert (
        off(
            run(guided(pipe, w=[W] * 5), latents=LATENTS[:2], steps=5),
            run(pipe, latents=LATENTS[:2], steps=5),
        )
        < 1e-5
    )


def test_rules_on_noise_at_infinity():
    "Where there is only noise, rules on noise are left out, and nothing depends on a cap."
    from cf_guidance import pipelines

    pipe, results = sd3(flow(shift=3.0)), {}
    for largest in (1e7, 1e8, 1e9):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(pipelines, '_INFINITE', largest)
            for name, kw in {
                'base_norm': dict(w=7.5, rule=base_norm),
                't_norm': dict(w=0.2, rule=t_norm),
                'tcfg': dict(w=3.0, rule=tcfg),
                'rescale': dict(w=3.0, post=rescale),
                'cfg': dict(w=3.0),
            }.items():
                results.setdefault(name, []).append(run(guided(pipe, **kw), steps=8))
    for name, (a, b, c) in results.items():
        assert off(a, b) < 1e-4, name
        assert off(c, b) < 1e-4, name
    own = run(pipe, steps=8)
    assert off(results['cfg'][1], own) < 1e-5
    assert results['t_norm'][1].abs().max() < 5 * own.abs().max()


def test_a_weight_at_infinity():
    "A function of sigma is told the true level, and a weight that is not finite there is refused."
    seen = []
    pipe = sd3(flow(shift=3.0))

    def w(sigma):
        seen.append(sigma[0].item())
        return torch.where(sigma < 5, 3.0, 1.0)

    sd = guided(pipe, w=w)
    run(sd, steps=8)
    assert seen[0] == math.inf
    assert all(s < 1e3 for s in seen[1:])
    with pytest.raises(ValueError, match='w: its function: expected finite values'):
        run(guided(pipe, w=lambda sigma: 1 + sigma), steps=8)


def test_stop_where_there_is_only_noise():
    sd = guided(sd3(flow(shift=3.0)), w=3.0, stop=-1.0)
    run(sd, steps=4)
    assert sd.report.terms[0].guided == 2  # not beyond the model's range, then once and stopped


def test_noise_predictions_of_pure_noise():
    betas = dict(rescale_betas_zero_snr=True, timestep_spacing='trailing')
    pipe = sd(ddim(**betas))
    with pytest.raises(ValueError, match='zero terminal SNR.* sigma=inf, step 0'):
        run(guided(pipe))
    pipe.scheduler = euler_discrete(rescale_betas_zero_snr=True)
    assert run(guided(pipe)).isfinite().all()


def test_not_finite():
    pipe = sd_v()

    def nan(m, args, out):
        return (out[0] * float('nan'),)

    pipe.unet.register_forward_hook(nan)
    with pytest.raises(FloatingPointError, match='not finite at sigma=.*, step 0'):
        run(guided(pipe))


def test_hooks():
    "The network is asked as the pipeline asks it, and hooks see each evaluation once."
    for what in ('StableDiffusion', 'StableDiffusion3', 'Flux'):
        (pipe, kw), seen = make(what), []
        net_of(pipe).register_forward_pre_hook(
            lambda m, args, kws, seen=seen: seen.append((len(args), {*kws})), with_kwargs=True
        )
        run(pipe, **kw)
        own, n = seen[0], len(seen)
        run(guided(pipe), **kw)
        assert seen[n:] == [own] * STEPS


def test_weights_changed_later():
    "The network is shared, not copied."
    pipe = sd_v()
    sd = guided(pipe)
    before = run(sd)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.2)
    pipe.unet.register_forward_hook(lambda m, a, out: (out[0] * 0.9,))
    assert off(run(pipe), run(sd)) < 1e-5
    assert off(before, run(sd)) > 1e-3


@pytest.mark.parametrize('how', ['around', 'in place'])
def test_compiled(how):
    pipe = sd_v()
    own, pag = run(pipe), run(guided(pipe, PAG(pipe.unet)))
    if how == 'around':
        pipe.unet = torch.compile(pipe.unet, backend='eager')
    else:
        pipe.unet.compile(backend='eager')
    net, inside = pipe.unet, vars(pipe.unet).copy()
    assert off(run(guided(pipe)), own) < 1e-5
    assert off(run(guided(pipe, PAG(pipe.unet))), pag) < 1e-5
    assert pipe.unet is net
    assert vars(net) == inside


def test_sequential_offload():
    "Weights come when they are needed."
    accelerate = pytest.importorskip('accelerate')
    pipe = sd_v()
    own = run(pipe)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device('cpu'))
    assert next(pipe.unet.parameters()).device.type == 'meta'
    assert off(run(guided(pipe)), own) < 1e-5


def test_model_offload():
    "The pipeline looks through its parts when it is done, and finds the real network."
    pytest.importorskip('accelerate')
    pipe = sd_v()
    own, sd = run(pipe), guided(pipe)
    sd.enable_model_cpu_offload(device='cpu')
    net, seen = sd.unet, []
    net.register_forward_hook(lambda *o: seen.append(1))
    for _ in range(2):
        assert off(run(sd), own) < 1e-5
    assert sd.unet is net
    assert pipe.unet is net
    assert len(seen) == 2 * STEPS
    assert [o.model for o in sd._all_hooks if 'UNet' in type(o.model).__name__] == [net]
    assert torch.equal(run(pipe), own)


def test_is_a_pipeline(tmp_path):
    pipe = sd_v()
    own, plain, sd_ = run(pipe), run(pipe, guidance_scale=1.0), guided(pipe, w=1.0)
    assert isinstance(sd_, diffusers.StableDiffusionPipeline)
    assert type(sd_).__name__ == 'StableDiffusionPipeline'
    assert sd_.components.keys() == pipe.components.keys()
    assert sd_.unet is pipe.unet
    assert sd_.scheduler is not pipe.scheduler
    assert sd_.to('cpu') is sd_
    assert inspect.signature(sd_.__call__) == inspect.signature(pipe.__call__)
    sd_.save_pretrained(tmp_path)
    saved = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(saved) is diffusers.StableDiffusionPipeline
    assert torch.equal(run(saved), own)
    other = diffusers.AutoPipelineForImage2Image.from_pipe(sd_)
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline
    assert other.unet is pipe.unet
    assert type(type(sd_)(**sd_.components, requires_safety_checker=False)) is type(pipe)
    assert off(idle(sd_), plain) < 1e-5


@pytest.mark.parametrize('how', ['copy', 'deepcopy', 'pickle'])
def test_copies(how):
    pipe = sd_v()
    sd_ = guided(pipe, NegativePrompt(), Term(PAG(pipe.unet), 2.0))
    want = run(sd_)
    copied = dict(
        copy=copy.copy, deepcopy=copy.deepcopy, pickle=lambda o: pickle.loads(pickle.dumps(o))
    )[how](sd_)
    assert type(copied) is type(sd_)
    assert copied.report is None
    assert off(run(copied), want) < 1e-5
    assert (copied.unet is pipe.unet) == (how == 'copy')
    assert torch.equal(run(sd_), want)


def test_lora():
    pytest.importorskip('peft')
    pipe = sd_v()
    sd_ = guided(pipe)
    before = run(sd_)
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=['to_q', 'to_v'], init_lora_weights=False)
    sd_.unet.add_adapter(config)
    assert off(run(sd_), before) > 1e-4
    assert off(run(sd_), run(pipe)) < 1e-5


def test_scheduler_of_its_own():
    pipe = sd_v()
    sd_ = guided(pipe)
    sd_.scheduler = euler_discrete('v_prediction')
    got = run(sd_)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    pipe.scheduler = euler_discrete('v_prediction')
    assert off(got, run(pipe)) < 1e-5


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    'what,where',
    [
        ('StableDiffusion', 'callback'),
        ('StableDiffusion', 'network'),
        ('StableDiffusion', 'layer'),
        ('Flux', 'network'),
        ('Flux', 'callback'),
    ],
)
def test_exception(what, where, error):
    "In the middle of a call; afterwards all is as before."
    (pipe, kw), calls = make(what), []
    own, before = run(pipe, **kw), state_of(pipe)

    def fail(*args):
        calls.append(1)
        if len(calls) == 2:
            raise error('in the middle')
        return args[-1] if where == 'callback' else None

    layer = [m for m in net_of(pipe).modules() if isinstance(m, torch.nn.Linear)][-1]
    hook = {'callback': None, 'network': net_of(pipe), 'layer': layer}[where]
    hook = hook and hook.register_forward_hook(fail)
    more = dict(callback_on_step_end=fail) if where == 'callback' else {}
    sd = guided(pipe, NegativePrompt(), PAG(net_of(pipe)))
    inside = vars(sd).copy()
    with pytest.raises(error, match='in the middle'):
        run(sd, **kw, **more)
    if hook:
        hook.remove()
    del inside['_progress_bar_config']
    assert all(vars(sd)[k] is v for k, v in inside.items())
    fresh = guided(pipe, NegativePrompt(), PAG(net_of(pipe)))
    assert off(run(sd, **kw), run(fresh, **kw)) < 1e-5
    assert state_of(pipe) == before
    assert torch.equal(run(pipe, **kw), own)


def test_call_in_a_call():
    "A callback gets the pipeline of the call, and may call it, or the guided one."
    pipe = sd_v()
    sd_, inner = guided(pipe), []
    own = run(sd_)

    def again(pipe, i, t, o):
        assert isinstance(pipe, diffusers.StableDiffusionPipeline)
        assert pipe.components['unet'] is sd_.unet
        inner.append(run(sd_))
        inner.append(run(pipe))
        return o

    assert torch.equal(run(sd_, callback_on_step_end=again), own)
    assert len(inner) == 2 * STEPS
    assert all(torch.equal(o, own) for o in inner)


def in_threads(jobs):
    got = {}
    threads = [
        threading.Thread(target=lambda i=i, f=f: got.update({i: f()})) for i, f in enumerate(jobs)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return [got[i] for i in range(len(jobs))]


def test_threads_share_a_network():
    "Two pipelines with one network, one of them guided, or both, with changes inside the network."
    first = sd_v()
    second = of('StableDiffusionPipeline', first, scheduler=ddim('v_prediction'))
    run(first)
    before = state_of(first)
    ours = [guided(p, NegativePrompt(), PAG(p.unet)) for p in (first, second)]
    for pipes in ((ours[0], second), ours):
        jobs = [lambda p=p, i=i: run(p, seed=i, steps=8) for i, p in enumerate(pipes)]
        alone = [f() for f in jobs]
        for _ in range(3):
            got = in_threads(jobs)
            assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))
    assert state_of(first) == before


def test_threads_share_a_guided_pipeline():
    "Each thread has its own run, memory and report."
    pipe = sd_v()
    sd = guided(pipe, w=[9.0, 1.0, 4.0], rule=apg.of(beta=-0.5))
    run(sd)

    def job(i):
        def go():
            out = run(sd, seed=i, prompt=PROMPTS[: 1 + i % 2], negative_prompt=NEGS[: 1 + i % 2])
            return out, sd.report.nfe

        return go

    jobs = [job(i) for i in range(4)]
    alone = [f() for f in jobs]
    for _ in range(3):
        for (x, nfe), (want, count) in zip(in_threads(jobs), alone, strict=True):
            assert torch.equal(x, want)
            assert nfe == count


def test_report():
    pipe = sd_v()
    sd = guided(pipe, NegativePrompt(), Term(PAG(pipe.unet), 2.0, interval=(0.5, 20.0)))
    assert sd.report is None
    run(sd, steps=4)
    first, second = sd.report.terms
    assert first.negative == 'NegativePrompt'
    assert first.guided == 4
    assert 0 < second.guided < 4
    assert second.scale > 0
    assert 'guided 4 of 4' in repr(sd.report)
    alone = guided(pipe, w=5.0)
    run(alone)
    assert alone.report.terms[0].scale == pytest.approx(5.0, rel=1e-3)


def test_idle_terms():
    pipe = sd_v()
    levels = sigmas_of(pipe, STEPS).tolist()
    between = (levels[1] * 1.1, levels[0] * 0.9)
    with pytest.warns(UserWarning, match='NegativePrompt never guided: its interval .* holds none'):
        run(guided(pipe, interval=between))
    with pytest.warns(UserWarning, match='NegativePrompt never guided: its weight is 1'):
        run(guided(pipe, w=1.0))


def test_watch():
    pipe = sd_v()
    sd = guided(pipe, NegativePrompt(), Term(PAG(pipe.unet), 2.0))
    with sd.watch() as first, sd.watch(1) as second:
        run(sd)
    assert len(first) == len(second) == STEPS
    run(sd)
    assert len(first) == STEPS
    with pytest.raises(IndexError, match='term: expected 0 to 1, got 2'), sd.watch(2):
        pass


def test_rounded_times():
    "Times that a pipeline rounds to bfloat16 are those of their own steps."
    pipe, kw = make('Flux')
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.5)
    pipe.to(torch.bfloat16)
    sd = guided(pipe, w=[1.0 + i for i in range(50)])
    with sd.watch() as traces:
        run(sd, steps=50, **kw)
    levels = [o.sigma[0].item() for o in traces]
    assert len({*levels}) == 50
    assert levels == sorted(levels, reverse=True)
    assert traces[25].scale[0].item() == pytest.approx(26.0, rel=0.1)


@pytest.mark.skipif(OLD, reason='this diffusers has no caches')
def test_caches():
    "A cache would answer for other rows than it is asked about."
    pipe, kw = make('Flux')
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises((RuntimeError, ValueError), match='(?i)cache'):
        run(guided(pipe), **kw)
    pipe.transformer.disable_cache()
    assert run(guided(pipe), **kw).isfinite().all()


def test_fashion():
    "The embedded models, as their users load them."
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(embedded_path())
    weak = diffusers.UNet2DConditionModel.from_pretrained(embedded_path('fashion-sd-weak'))
    weak = of('StableDiffusionPipeline', pipe, unet=weak)
    kw = dict(prompt=['a red sneaker', 'a black bag'], negative_prompt=None)
    own = run(pipe, **kw)
    assert off(run(guided(pipe), **kw), own) < 1e-5
    auto = Term(Autoguidance(pipeline_denoiser(weak)), 2.0)
    sd_ = guided(pipe, auto)
    got = run(sd_, **kw)
    assert sd_.report.nfe == [6, 6]
    assert off(got, own) > 1e-2
    config = dict(set_alpha_to_one=True, clip_sample=False)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **config)
    D, own = pipeline_denoiser(pipe), run(pipe, **kw)
    noise = torch.randn(2, *D.latent_shape, generator=seeded(0))
    got = run(guided(pipe, auto), **kw, latents=noise)
    sigmas, scale = scheduler_levels(pipe.scheduler)
    want = sample(GuidedDenoiser(D, auto), noise / scale, sigmas, euler, cond=D.cond(kw['prompt']))
    assert off(got, want) < 1e-4
    assert torch.equal(run(pipe, **kw), own)


def test_class_of_ones_own():
    "A class that passes on what it takes."

    class Mine(diffusers.StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe = sd_v()
    own, mine = run(pipe), Mine(**pipe.components, requires_safety_checker=False)
    sd_ = guided(mine)
    assert off(run(sd_), own) < 1e-5
    assert isinstance(sd_, Mine)


def refused(f, **kw):
    "A call that is refused before its network is asked."

    def go():
        pipe, asked = sd_v(), []
        pipe.unet.register_forward_hook(lambda *_: asked.append(1))
        try:
            run(f(pipe), **kw)
        finally:
            assert not asked

    return go


def text(pipe, what):
    return pipeline_denoiser(pipe).cond(what)


def plain(pipe):
    return guided(pipe)


BAD = {  # what is done -> what the error says
    'PAG pipeline': (
        lambda: guided(of('StableDiffusionPAGPipeline', sd_v())),
        r'got StableDiffusionPAGPipeline: use .* the term PAG\(pipe.unet\)',
    ),
    'no pipeline': (lambda: guided(print), 'pipe: expected a pipeline of a known family'),
    'a network': (lambda: guided(sd_v().unet, w=3.0), 'pipe: .* got UNet2DConditionModel'),
    'guided twice': (lambda: guided(guided(sd_v())), 'pipe: expected a plain pipeline'),
    'no guidance': (
        refused(plain, guidance_scale=1.0),
        r'evaluates no negative prompt; it needs guidance_scale above 1 \(got 1.0\)',
    ),
    'guidance_rescale': (
        refused(plain, guidance_rescale=0.7),
        r'guidance_rescale=0.7: use guided\(pipe, post=rescale',
    ),
    'w': (refused(lambda p: guided(p, w=torch.ones(3) * 2)), r'w: expected one value, or 2 '),
    'w of images': (
        refused(lambda p: guided(p, w=torch.ones(3) * 2), num_images_per_prompt=2),
        r'w: expected one value, or 4 ',
    ),
    'steps': (
        refused(lambda p: guided(p, w=[2.0, 3.0])),
        'w: expected one value per step, 3, got 2',
    ),
    'prompts as steps': (
        refused(lambda p: guided(p, w=[3.0, 6.0])),
        'w: expected one value per step',
    ),
    'interval': (
        refused(lambda p: guided(p, interval=(200, 800))),
        'interval: expected noise levels between',
    ),
    'parts': (
        refused(lambda p: guided(p, interval=(1e-5, 1e-3))),
        'interval: expected noise levels between',
    ),
    'negative w': (lambda: guided(sd_v(), w=-1.0), 'w: expected finite values from 0'),
    'w=True': (lambda: guided(sd_v(), w=True), 'w: expected a number'),
    'two terms': (
        lambda: guided(sd_v(), NegativePrompt(), NegativePrompt(), w=3.0),
        '^w: expected',
    ),
    'a number': (lambda: guided(sd_v(), 3.0), 'neg: expected a Negative, .* got float'),
    'post': (lambda: guided(sd_v(), post=3.0), 'post: expected a post-rule such as rescale'),
    'a rule': (lambda: guided(sd_v(), rule='cfg'), 'rule: expected a rule such as cfg, got str'),
    'max_batch': (lambda: guided(sd_v(), max_batch=0), 'max_batch: expected a whole number from 1'),
    'max_batch=True': (
        lambda: guided(sd_v(), max_batch=True),
        'max_batch: expected a whole number',
    ),
    'zero_init': (
        refused(lambda p: guided(p, zero_init=1)),
        "zero_init: expected a flow model, got prediction 'v'",
    ),
    'zero_init=-1': (
        lambda: guided(sd_v(), zero_init=-1),
        'zero_init: expected a whole number from 0',
    ),
    'conditions': (
        refused(lambda p: guided(p, text(p, ['a', 'b', 'c']))),
        'encoder_hidden_states: expected a tensor with 1 or 2 rows',
    ),
    'conditions of images': (
        refused(lambda p: guided(p, text(p, ['a', 'b', 'c'])), num_images_per_prompt=2),
        'encoder_hidden_states: expected a tensor with 1 or 4 rows',
    ),
    'other network': (refused(lambda p: guided(p, PAG(sd_v().unet))), 'layers'),
    'no such argument': (refused(plain, foo=1), 'foo: not an argument of StableDiffusionPipeline'),
    'no steps': (refused(plain, steps=0), 'num_inference_steps: expected a whole number from 1'),
    'steps=-1': (refused(plain, steps=-1), 'num_inference_steps: expected a whole number from 1'),
    'steps as text': (refused(plain, steps='a'), 'num_inference_steps: expected a whole number'),
    'eta': (refused(plain, eta=float('nan')), 'eta: expected a finite number, got nan'),
    'scale as text': (
        refused(plain, guidance_scale='a'),
        'guidance_scale: expected a finite number',
    ),
    'scale None': (refused(plain, guidance_scale=None), 'guidance_scale: expected a finite number'),
    'scale inf': (
        refused(plain, guidance_scale=float('inf')),
        'guidance_scale: expected a finite number, got inf',
    ),
    'a number as prompt': (refused(plain, prompt=5), 'prompt: expected a string or a list'),
    'no prompts': (refused(plain, prompt=[]), 'prompt: expected at least one string'),
    'a number as negative prompt': (
        refused(plain, negative_prompt=5),
        'negative_prompt: expected a string or a list',
    ),
    'a seed': (
        lambda: guided(sd_v())(PROMPTS, generator=0),
        'generator: expected a torch.Generator or a list',
    ),
    'latents as text': (refused(plain, latents='a'), 'latents: expected a tensor, got str'),
    'height': (refused(plain, height=1.5), 'height: expected a whole number from 1, got 1.5'),
    'steps None': (
        refused(plain, steps=None),
        'num_inference_steps: expected a whole number, got None',
    ),
    'no images': (
        refused(plain, num_images_per_prompt=0),
        'num_images_per_prompt: expected a whole number from 1',
    ),
    'sigmas_of a number': (lambda: sigmas_of(5, 10), 'pipe: expected a pipeline'),
    'sigmas_of 0': (lambda: sigmas_of(sd_v(), 0), 'num_steps: expected a whole number from 1'),
    'sigmas_of -1': (lambda: sigmas_of(sd_v(), -1), 'num_steps: expected a whole number from 1'),
    'sigmas_of 1.5': (lambda: sigmas_of(sd_v(), 1.5), 'num_steps: expected a whole number'),
    'sigmas_of nothing': (lambda: sigmas_of(sd_v()), 'num_steps: expected a whole number, or'),
    'sigmas_of too many': (lambda: sigmas_of(sd_v(), 100000), 'num_steps: expected at most 1000'),
    'sigmas_of a shift': (
        lambda: sigmas_of(flux(flow(use_dynamic_shifting=True)), 4),
        'mu: expected a number',
    ),
    'classes': (lambda: guided(dit(ddim()), text(dit(ddim()), 'a boot')), 'what: expected classes'),
    'alone': (
        lambda: GuidedDenoiser(pipeline_denoiser(sd_v()), NegativePrompt(), w=2.0)(
            torch.zeros(1, 4, 8, 8), 1.0, **text(sd_v(), 'a boot')
        ),
        'NegativePrompt: expected a guided pipeline',
    ),
    'embedded model': (lambda: embedded_path('nope'), 'name: expected one of .*fashion-sd'),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_input(what):
    f, says = BAD[what]
    with pytest.raises((ValueError, TypeError), match=says) as e:
        f()
    assert len(str(e.value)) < 160


def test_bad_input_of_flux():
    pipe, kw = make('Flux')
    with pytest.raises(
        ValueError, match=r'true_cfg_scale above 1 \(got 3.0\) and a negative prompt'
    ):
        run(guided(pipe), **dict(kw, negative_prompt=None))
    with pytest.raises(ValueError, match=r'true_cfg_scale above 1 \(got 1.0\)'):
        run(guided(pipe))
    with pytest.raises(ValueError, match='skip_guidance_layers: use the term SLG'):
        run(guided(sd3(flow())), skip_guidance_layers=[1])
