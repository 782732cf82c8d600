"Each family as a denoiser: Euler's method on it ends where the stock pipeline ends."

import diffusers
import pytest
import torch
from packaging.version import Version
from pipeline_helpers import (
    LEVELS,
    PIXART,
    PROMPTS,
    W,
    close,
    controlled,
    ddim,
    dit,
    euler_discrete,
    flow,
    flux,
    noise_of,
    pixart,
    pixels,
    randomized,
    scheduler_levels,
    sd,
    sd3,
    seeded,
    vae,
    xl,
)

from cf_guidance.denoisers import DiscreteDenoiser, EDMDenoiser, FlowDenoiser, abar_to_sigma
from cf_guidance.guided import GuidedDenoiser
from cf_guidance.karras import euler, heun, sample
from cf_guidance.pipelines import FAMILIES, Family, pipeline_denoiser


def agrees(pipe, D=None, guided=True, told=False, steps=3, tol=1e-4, **kw):
    """Euler's method on the denoiser ends where the stock pipeline does, also after decoding.

    `told`: the weight is a condition, and there is no guidance.
    """
    pipe.set_progress_bar_config(disable=True)
    D = D or pipeline_denoiser(pipe)
    packed, noise = 'Flux' in type(pipe).__name__, noise_of(D)
    args = dict(
        dict(
            guidance_scale=W if guided or told else 1.0,
            latents=pipe._pack_latents(noise, *noise.shape) if packed else noise,
            num_inference_steps=steps,
        ),
        **kw,
    )
    want, images = (pipe(PROMPTS, output_type=o, **args).images for o in ('latent', 'pt'))
    if packed:
        want = pipe._unpack_latents(want, *D.size, D.factor)
    sigmas, scale = scheduler_levels(pipe.scheduler)
    got = sample(
        GuidedDenoiser(D, D.cond(guidance=W), w=W) if guided else D,
        noise * getattr(pipe.scheduler, 'init_noise_sigma', 1.0) / scale,
        sigmas,
        euler,
        cond=D.cond(PROMPTS, guidance=W),
    )
    close(got, want, tol)
    close(D.decode(want), images)
    return D


def all_count(D, what=PROMPTS):
    "Every condition changes what the denoiser says, and belongs to its own sample"
    x, c = noise_of(D) * 2, D.cond(what)
    y = D(x, 2.0, **c)
    for k, v in c.items():
        assert len(v) == 2, k
        other = 1 - v if v.dtype == torch.long and k != 'class_labels' else v + 1
        changed = D(x, 2.0, **{**c, k: torch.cat([v[:1], other[1:]])})
        assert (changed[0] - y[0]).abs().max() < 1e-5 < 1e-4 < (changed[1] - y[1]).abs().max(), k
    return set(c)


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('make', [sd, xl])
def test_unet(make, prediction):
    for scheduler in (ddim(prediction), euler_discrete(prediction)):
        assert type(agrees(make(scheduler))) is DiscreteDenoiser


def test_sizes():
    size = dict(height=16, width=24)
    for pipe in (sd(ddim()), xl(ddim())):
        assert agrees(pipe, pipeline_denoiser(pipe, **size), **size).latent_shape == (4, 8, 12)


def test_ladders():
    "The library's own ladders, within the levels that were trained"
    for pipe in (xl(ddim()), xl(diffusers.EDMEulerScheduler()), sd3(flow())):
        D = pipeline_denoiser(pipe)
        for sigmas in (D.get_sigmas(4), D.get_sigmas_karras(4)):
            assert len(sigmas) == 5
            assert abs(sigmas[0] / D.sigma_max - 1) < 1e-5
            assert abs(sigmas[-2] / D.sigma_min - 1) < 1e-4
            assert (
                sample(
                    GuidedDenoiser(D, D.cond(), w=W),
                    noise_of(D) * D.sigma_max,
                    sigmas,
                    heun,
                    cond=D.cond(PROMPTS),
                )
                .isfinite()
                .all()
            )


def test_conditions():
    assert all_count(pipeline_denoiser(sd(ddim()))) == {'encoder_hidden_states'}
    assert all_count(pipeline_denoiser(sd(ddim(), time_cond_proj_dim=8))) == {
        'encoder_hidden_states',
        'timestep_cond',
    }
    assert all_count(pipeline_denoiser(xl(ddim()))) == {
        'encoder_hidden_states',
        'text_embeds',
        'time_ids',
    }
    assert all_count(pipeline_denoiser(sd3(flow()))) == {
        'encoder_hidden_states',
        'pooled_projections',
    }
    assert all_count(pipeline_denoiser(flux(flow()), height=16, width=24)) == {
        'encoder_hidden_states',
        'pooled_projections',
        'guidance',
    }
    assert all_count(pipeline_denoiser(pixart(ddim()))) == {
        'encoder_hidden_states',
        'encoder_attention_mask',
    }
    sized = pipeline_denoiser(pixart(ddim(), size=128), height=16, width=24)
    assert all_count(sized) == {
        'encoder_hidden_states',
        'encoder_attention_mask',
        'resolution',
        'aspect_ratio',
    }
    assert all_count(pipeline_denoiser(dit(ddim())), [3, 4]) == {'class_labels'}
    assert all_count(pipeline_denoiser(pixels(ddim(), num_class_embeds=6)), [3, 4]) == {
        'class_labels'
    }


def test_zero_terminal_snr():
    D = agrees(
        sd(ddim('v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing')), tol=2e-3
    )
    assert 4000 < D.sigma_max < 4100


def test_between_steps():
    pipe = sd(euler_discrete())
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing='linspace'
    )
    D = agrees(pipe, pipeline_denoiser(pipe, quantize=False), steps=5, tol=2e-3)
    t = pipe.scheduler.timesteps
    assert (t.frac() > 0).any()
    assert (D.sigma_to_t(pipe.scheduler.sigmas[:-1]) - t).abs().max() < 0.05


def test_weight_as_a_condition():
    agrees(sd(ddim(), time_cond_proj_dim=8), guided=False, told=True)
    agrees(xl(ddim(), time_cond_proj_dim=8), guided=False, told=True)
    lcm = diffusers.LatentConsistencyModelPipeline(
        **sd(diffusers.LCMScheduler(steps_offset=1), time_cond_proj_dim=8).components,
        requires_safety_checker=False,
    )
    assert all_count(pipeline_denoiser(lcm)) == {'encoder_hidden_states', 'timestep_cond'}


@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
def test_edm(kind):
    D = agrees(
        xl(
            diffusers.EDMEulerScheduler(
                sigma_data=0.7, sigma_min=0.01, sigma_max=50.0, prediction_type=kind
            )
        )
    )
    assert isinstance(D, EDMDenoiser)
    assert (D.sigma_min, D.sigma_max) == (0.01, 50.0)


def test_continuous():
    D = agrees(
        sd(
            euler_discrete(
                'v_prediction',
                timestep_type='continuous',
                sigma_min=0.01,
                sigma_max=50.0,
                use_karras_sigmas=True,
            )
        )
    )
    assert isinstance(D, EDMDenoiser)
    assert (D.sigma_min, D.sigma_max) == (0.01, 50.0)


def test_sd3():
    D = agrees(sd3(flow(shift=3.0)), **LEVELS)
    assert type(D) is FlowDenoiser
    assert abs(D.sigma_max - 999) < 1e-3
    assert abs(D.sigma_min - 1 / 999) < 1e-6
    agrees(
        sd3(flow()),
        pipeline_denoiser(sd3(flow()), height=16, width=12),
        height=16,
        width=12,
        **LEVELS,
    )


def test_flow_sigmas():
    "This scheduler cuts times to whole numbers; here the network rounds them to tens."
    pipe = sd3(
        diffusers.DPMSolverMultistepScheduler(
            prediction_type='flow_prediction', use_flow_sigmas=True, solver_order=1
        )
    )
    pipe.transformer.register_forward_pre_hook(
        lambda m, args, kw: (args, dict(kw, timestep=(kw['timestep'] / 10).round() * 10)),
        with_kwargs=True,
    )
    assert type(agrees(pipe, steps=5)) is FlowDenoiser
    assert (pipe.scheduler.timesteps - 1000 * pipe.scheduler.sigmas[:-1]).abs().max() < 1


def test_flux():
    size = dict(height=16, width=24)

    def D(pipe):
        return pipeline_denoiser(pipe, **size)

    dev, schnell = flux(flow(shift=2.0, use_dynamic_shifting=True)), flux(flow(), guidance=False)
    agrees(dev, D(dev), guided=False, told=True, **size, **LEVELS)
    agrees(schnell, D(schnell), guided=False, **size, **LEVELS)
    agrees(dev, D(dev), true_cfg_scale=W, negative_prompt=[''] * 2, **size, **LEVELS)


@pytest.mark.parametrize('cls', [diffusers.PixArtAlphaPipeline, diffusers.PixArtSigmaPipeline])
def test_pixart(cls):
    for s in (ddim(), ddim('v_prediction')):
        agrees(pixart(s, cls), **PIXART)


def test_pixart_sizes():
    pipe = pixart(ddim(), size=128)
    agrees(pipe, pipeline_denoiser(pipe, height=16, width=24), height=16, width=24, **PIXART)


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
def test_dit(prediction):
    pipe = dit(ddim(prediction))
    pipe.set_progress_bar_config(disable=True)
    D = pipeline_denoiser(pipe)
    want = torch.from_numpy(
        pipe(
            [3, 7], guidance_scale=W, num_inference_steps=3, generator=seeded(0), output_type='np'
        ).images
    ).permute(0, 3, 1, 2)
    sigmas, scale = scheduler_levels(pipe.scheduler)
    close(
        D.decode(
            sample(
                GuidedDenoiser(D, D.cond(), w=W),
                noise_of(D) / scale,
                sigmas,
                euler,
                cond=D.cond([3, 7]),
            )
        ),
        want,
    )


def test_pixels():
    pipe = pixels(ddim())
    pipe.set_progress_bar_config(disable=True)
    D = pipeline_denoiser(pipe)
    want = torch.from_numpy(
        pipe(batch_size=2, num_inference_steps=3, generator=seeded(0), output_type='np').images
    ).permute(0, 3, 1, 2)
    sigmas, scale = scheduler_levels(pipe.scheduler)
    close(D.decode(sample(D, noise_of(D) / scale, sigmas, euler, cond=D.cond())), want)
    x = torch.rand(2, 3, 8, 8, generator=seeded(0))
    assert torch.allclose(D.decode(D.encode(x)), x, atol=1e-6)
    assert D.encode(torch.zeros(1, 3, 8, 8)).eq(-1).all()


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('classes', [None, 6])
def test_ddpm(prediction, classes):
    "The estimate of DDPM's own step, also with a class and with a network that has a variance."
    s = diffusers.DDPMScheduler(
        prediction_type=prediction, clip_sample=False, beta_schedule='squaredcos_cap_v2'
    )
    pipe = pixels(s, diffusers.DDPMPipeline, num_class_embeds=classes, out_channels=6)
    D, t = pipeline_denoiser(pipe), torch.tensor(400)
    c = D.cond([3, 5]) if classes else D.cond()
    x = noise_of(D)
    want = s.step(pipe.unet(x, t, **c).sample[:, :3], t, x).pred_original_sample
    abar = s.alphas_cumprod[t]
    close(D(x / abar.sqrt(), abar_to_sigma(abar), **c), want)


def test_other_classes_of_a_family():
    for pipe, cls in (
        (sd(ddim()), diffusers.StableDiffusionImg2ImgPipeline),
        (sd3(flow()), diffusers.StableDiffusion3Img2ImgPipeline),
        (flux(flow()), diffusers.FluxImg2ImgPipeline),
    ):
        extra = dict(requires_safety_checker=False) if 'safety_checker' in pipe.components else {}
        a, b = (
            pipeline_denoiser(p, height=16, width=16)
            for p in (pipe, cls(**pipe.components, **extra))
        )
        x = noise_of(a)
        assert torch.equal(a(x, 1.0, **a.cond(PROMPTS)), b(x, 1.0, **b.cond(PROMPTS)))


def test_family_of_ones_own(monkeypatch):
    class Mine(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

    mine = Mine(pixels(ddim(), num_class_embeds=6).unet, ddim())
    with pytest.raises(TypeError, match='pipe: expected a pipeline of a known family.* got Mine'):
        pipeline_denoiser(mine)
    monkeypatch.setitem(FAMILIES, 'Mine', Family({}))
    assert all_count(pipeline_denoiser(mine), [1, 2]) == {'class_labels'}


def test_all_families_exist():
    "By the names that diffusers lists: importing them can need packages that are not installed."
    names = dir(diffusers)
    for name, family in FAMILIES.items():
        there = Version(diffusers.__version__) >= Version(family.since)
        # 0.37 has LTX-2 with one scale for both parts, which is no family
        assert (name in names) == there or family.parts and not there


def test_negative():
    "No prompt: what the pipeline takes without a negative prompt, in Stable Diffusion XL zeros."
    for pipe in (xl(ddim()), sd(ddim())):
        D = pipeline_denoiser(pipe)
        assert torch.equal(
            D.cond()['encoder_hidden_states'], D.cond('')['encoder_hidden_states']
        ) == (type(pipe) is not diffusers.StableDiffusionXLPipeline)
    pipe = xl(ddim())
    assert not pipeline_denoiser(pipe).cond()['text_embeds'].any()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    D = agrees(pipe)
    assert torch.equal(D.cond()['text_embeds'], D.cond('')['text_embeds'])
    assert len(D.cond('a red bag')['time_ids']) == 1
    assert torch.equal(
        D.cond(['a boot'] * 2)['time_ids'], torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)
    )


def test_arguments_of_encode_prompt():
    D, given = pipeline_denoiser(sd(ddim())), torch.rand(2, 3, 16, generator=seeded(0))
    assert torch.equal(D.cond(PROMPTS, prompt_embeds=given)['encoder_hidden_states'], given)
    D = pipeline_denoiser(flux(flow()))
    assert (
        D.cond(PROMPTS, max_sequence_length=10)['encoder_hidden_states'].shape[1]
        < D.cond(PROMPTS)['encoder_hidden_states'].shape[1]
    )


@pytest.mark.parametrize(
    'config',
    [
        dict(scaling_factor=0.2),
        dict(scaling_factor=2.0, shift_factor=0.3),
        dict(
            scaling_factor=0.4, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 3.0]
        ),
    ],
)
def test_latents(config):
    "Scale and shift against the formula, and with statistics of the latents against SDXL's own."
    pipe = (sd3 if 'shift_factor' in config else xl)(
        ddim() if 'shift_factor' not in config else flow()
    )
    pipe.vae = vae(**config)
    if 'shift_factor' not in config:
        agrees(pipe)
    D, x = pipeline_denoiser(pipe), torch.rand(2, 3, 16, 16, generator=seeded(0))
    z = pipe.vae.encode(2 * x - 1).latent_dist.mean
    mean, std = (
        torch.tensor(config.get(k, o)).view(1, -1, 1, 1)
        for k, o in (('latents_mean', [config.get('shift_factor', 0.0)]), ('latents_std', [1.0]))
    )
    close(D.encode(x), (z - mean) / std * config['scaling_factor'])
    close(D.decode(D.encode(x)), (pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1))
    assert D.encode(x).shape == (2, *D.latent_shape)


def test_tiny_autoencoder():
    pipe = sd(ddim())
    pipe.vae = randomized(
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    )
    D = pipeline_denoiser(pipe)
    x = torch.rand(1, 3, *D.size, generator=seeded(0))
    close(D.encode(x), pipe.vae.encode(2 * x - 1).latents)


def test_type():
    """Latents and conditions in the pipeline's type, images in float32.

    An autoencoder that overflows in half precision runs in single, and is as before after it.
    """
    pipe = xl(ddim()).to(torch.bfloat16)
    D = pipeline_denoiser(pipe)
    x = noise_of(D).bfloat16() * 2
    y = D(x, 2.0, **D.cond(PROMPTS))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert D.decode(y).dtype == torch.float32
    assert D.encode(torch.rand(1, 3, 16, 16)).dtype == torch.bfloat16
    wide = D(x.float(), 2.0, **D.cond(PROMPTS))
    assert wide.dtype == torch.float32
    assert (wide - y).abs().max() < 0.02 * wide.abs().max()
    assert (wide - wide.bfloat16()).any()
    with pytest.raises(ValueError, match='torch.float64'):
        D(x.double(), 2.0, **D.cond(PROMPTS))
    pipe, seen = xl(ddim()).to(torch.float16), []
    assert pipe.vae.config.force_upcast
    pipe.vae.decoder.register_forward_pre_hook(lambda m, a: seen.append(a[0].dtype))
    before = {k: v.clone() for k, v in pipe.vae.state_dict().items()}
    pipeline_denoiser(pipe).decode(noise_of(D).half())
    assert seen == [torch.float32]
    assert all(
        v.dtype == torch.float16 and torch.equal(v, before[k])
        for k, v in pipe.vae.state_dict().items()
    )


def test_each_sample_for_itself():
    D = pipeline_denoiser(sd3(flow()))
    G, x = GuidedDenoiser(D, D.cond(), w=W), noise_of(D)
    sigma = torch.tensor([0.5, 3.0])
    both = G(x, sigma, **D.cond(PROMPTS))
    for i in range(2):
        close(both[i : i + 1], G(x[i : i + 1], sigma[i], **D.cond(PROMPTS[i])), 1e-5)
    assert torch.equal(
        GuidedDenoiser(D, D.cond(), w=1.0)(x, 1.0, **D.cond(PROMPTS)), D(x, 1.0, **D.cond(PROMPTS))
    )


def test_nothing_changes():
    pipe = xl(ddim())
    state, config, seed = (
        {k: v.clone() for k, v in pipe.unet.state_dict().items()},
        dict(pipe.scheduler.config),
        torch.get_rng_state(),
    )
    D = pipeline_denoiser(pipe)
    D.decode(D(D.encode(torch.rand(2, 3, 16, 16, generator=seeded(0))), 1.0, **D.cond(PROMPTS)))
    assert all(torch.equal(v, state[k]) for k, v in pipe.unet.state_dict().items())
    assert dict(pipe.scheduler.config) == config
    assert torch.equal(seed, torch.get_rng_state())
    assert D.net is pipe.unet
    assert D.pipe is pipe
    assert {id(p) for p in D.parameters() if p.numel()} == {id(p) for p in pipe.unet.parameters()}


def test_loss_trains():
    pipe = pixart(ddim('v_prediction'))
    pipe.transformer.requires_grad_(True)
    D = pipeline_denoiser(pipe)
    loss = D.loss(noise_of(D), noise_of(D).flip(0), torch.tensor([0.5, 2.0]), **D.cond(PROMPTS))
    loss.sum().backward()
    assert loss.shape == (2,)
    assert pipe.transformer.proj_out.weight.grad.abs().sum() > 0


def test_only_conditions():
    "A pipeline that evaluates more than its network gives conditions, and no denoiser."
    D = pipeline_denoiser(controlled('StableDiffusionControlNetPipeline', sd(ddim())))
    cond = D.cond(PROMPTS)
    assert cond.keys() == {'encoder_hidden_states'}
    with pytest.raises(ValueError, match='only the pipeline itself can evaluate its controlnet'):
        D(noise_of(D), 1.0, **cond)


BAD = {  # what is done -> what the error says
    'uint8': (
        lambda: pipeline_denoiser(sd(ddim())).encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)),
        'images: expected floating-point pixels',
    ),
    'range': (
        lambda: pipeline_denoiser(sd(ddim())).encode(torch.full((1, 3, 16, 16), -1.0)),
        'images: expected pixels from 0 to 1, got -1 to -1',
    ),
    'latents': (
        lambda: pipeline_denoiser(sd(ddim())).decode(torch.zeros(1, 3, 8, 8)),
        r'x: expected latents \(B, 4, h, w\)',
    ),
    'latents that are not finite': (
        lambda: pipeline_denoiser(sd(ddim())).decode(torch.full((1, 4, 8, 8), float('nan'))),
        'x: expected finite latents, got NaN',
    ),
    'no prompts': (
        lambda: pipeline_denoiser(sd(ddim())).cond([]),
        'what: expected at least one string',
    ),
    'a set': (
        lambda: pipeline_denoiser(sd(ddim())).cond({'a bag'}),
        'what: expected a string or a list of strings, got set',
    ),
    'argument': (
        lambda: pipeline_denoiser(sd(ddim())).cond('a bag', foo=1),
        'foo: not an argument of StableDiffusionPipeline.encode_prompt',
    ),
    'a PAG pipeline': (
        lambda: pipeline_denoiser(pag_pipeline()),
        'got StableDiffusionPAGPipeline: use the pipeline without PAG',
    ),
    'a function': (
        lambda: pipeline_denoiser(print),
        'pipe: expected a pipeline .* got builtin_function_or_method',
    ),
    'inpainting': (
        lambda: pipeline_denoiser(sd(ddim(), in_channels=9)),
        'pipe: expected a network of 4 channels .* got 9',
    ),
    'no autoencoder': (
        lambda: pipeline_denoiser(without_vae()),
        'pipe: expected a pipeline with an autoencoder',
    ),
    'scheduler': (
        lambda: pipeline_denoiser(sd3(diffusers.ScoreSdeVeScheduler())),
        'scheduler: expected .*alphas_cumprod.* got ScoreSdeVeScheduler',
    ),
    'prediction': (
        lambda: pipeline_denoiser(sd3(diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True))),
        "prediction_type='epsilon'",
    ),
    'inverted': (
        lambda: pipeline_denoiser(sd3(flow(invert_sigmas=True))),
        'FlowMatchEulerDiscreteScheduler',
    ),
    'height': (
        lambda: pipeline_denoiser(sd3(flow()), height=18),
        'height: expected a multiple of 4 pixels, got 18',
    ),
    'width': (
        lambda: pipeline_denoiser(flux(flow()), width=-4),
        'width: expected a whole number from 1, got -4',
    ),
    'size': (
        lambda: pipeline_denoiser(pixels(ddim()), width=0),
        'width: expected a whole number from 1, got 0',
    ),
    'prompt': (
        lambda: pipeline_denoiser(sd(ddim())).cond(3),
        'what: expected a string or a list of strings, got int',
    ),
    'prompts': (
        lambda: pipeline_denoiser(sd(ddim())).cond(['a bag', None]),
        'what: expected strings in the list, got NoneType',
    ),
    'class': (
        lambda: pipeline_denoiser(dit(ddim())).cond([3, 1001]),
        'what: expected classes 0 to 1000',
    ),
    'a word for a class': (
        lambda: pipeline_denoiser(pixels(ddim(), num_class_embeds=6)).cond('bag'),
        "what: expected classes 0 to 5, got 'bag'",
    ),
    'no class': (
        lambda: pipeline_denoiser(pixels(ddim(), num_class_embeds=6)).cond(),
        'what: expected classes 0 to 5, got None',
    ),
    'no classes': (
        lambda: pipeline_denoiser(pixels(ddim())).cond(1),
        'what: expected None .* knows no classes',
    ),
    'no conditions': (
        lambda: call_without(pipeline_denoiser(xl(ddim()))),
        'conditions: expected encoder_hidden_states, text_embeds',
    ),
}


def without_vae():
    pipe = sd(ddim())
    pipe.vae = None
    return pipe


def pag_pipeline():
    parts = sd(ddim()).components
    return diffusers.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False)


def call_without(D):
    return D(noise_of(D), 1.0)


@pytest.mark.parametrize('what', BAD)
def test_bad_input(what):
    f, says = BAD[what]
    with pytest.raises((ValueError, TypeError), match=says) as e:
        f()
    assert len(str(e.value)) < 160
