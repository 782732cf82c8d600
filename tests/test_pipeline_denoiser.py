"A pipeline of each family as a denoiser: Euler's method on it ends where the stock pipeline ends, on tiny networks with random weights."

import diffusers, pytest, torch
import transformers as tf
from cf_guidance.denoisers import DiscreteDenoiser, EDMDenoiser, FlowDenoiser, abar_to_sigma
from cf_guidance.lab.fashion import fashion_path, quiet
from cf_guidance.guided import GuidedDenoiser
from cf_guidance.karras import euler, heun, sample
from cf_guidance.pipelines import FAMILIES, Family, pipeline_denoiser

quiet()
PROMPTS, W = ['a red bag', 'a boot'], 3.0


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randomized(m):
    "Random weights, larger than an initialisation's, so that every condition counts"
    g = seeded(1)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(
                torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
            )
    return m.eval().requires_grad_(False)


def tokenizer():
    return tf.CLIPTokenizer.from_pretrained(fashion_path(), subfolder='tokenizer')


def clip(cls=tf.CLIPTextModel, width=16):
    return randomized(
        cls(
            tf.CLIPTextConfig(
                vocab_size=len(tokenizer()),
                hidden_size=width,
                intermediate_size=width,
                projection_dim=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokenizer().model_max_length,
                eos_token_id=tokenizer().eos_token_id,
            )
        )
    )


def t5():
    return randomized(
        tf.T5EncoderModel(
            tf.T5Config(
                vocab_size=len(tokenizer()), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
            )
        )
    )


def vae(channels=4, **kw):
    return randomized(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=['DownEncoderBlock2D'] * 2,
            up_block_types=['UpDecoderBlock2D'] * 2,
            latent_channels=channels,
            norm_num_groups=2,
            **dict(dict(scaling_factor=0.3), **kw),
        )
    )


def unet(**kw):
    return randomized(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
            up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
            attention_head_dim=4,
            norm_num_groups=2,
            **dict(dict(cross_attention_dim=16), **kw),
        )
    )


def ddim(prediction='epsilon', **kw):
    return diffusers.DDIMScheduler(
        beta_schedule='scaled_linear',
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type=prediction,
        **kw,
    )


def euler_discrete(prediction='epsilon', **kw):
    return diffusers.EulerDiscreteScheduler.from_config(
        ddim(prediction).config, timestep_spacing='trailing', **kw
    )


def sd(scheduler, cls=diffusers.StableDiffusionPipeline, **kw):
    return cls(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(**kw),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl(scheduler, **kw):
    net = unet(
        cross_attention_dim=32,
        addition_embed_type='text_time',
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
        **kw,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=clip(tf.CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(),
        unet=net,
        scheduler=scheduler,
        add_watermarker=False,
    )


def sd3(scheduler, cls=diffusers.StableDiffusion3Pipeline):
    net = randomized(
        diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=8,
        )
    )
    return cls(
        transformer=net,
        scheduler=scheduler,
        vae=vae(shift_factor=0.1),
        text_encoder=clip(tf.CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        text_encoder_2=clip(tf.CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux(scheduler, guidance=True, cls=diffusers.FluxPipeline):
    net = randomized(
        diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance,
        )
    )
    return cls(
        transformer=net,
        scheduler=scheduler,
        vae=vae(shift_factor=0.1),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )


def pixart(scheduler, cls=diffusers.PixArtAlphaPipeline, size=8, **kw):
    net = randomized(
        diffusers.PixArtTransformer2DModel(
            sample_size=size,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=16,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            **kw,
        )
    )
    return cls(
        tokenizer=tokenizer(), text_encoder=t5(), vae=vae(), transformer=net, scheduler=scheduler
    )


def dit(scheduler):
    net = randomized(
        diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_embeds_ada_norm=1000,
            in_channels=4,
            out_channels=8,
        )
    )
    return diffusers.DiTPipeline(transformer=net, vae=vae(), scheduler=scheduler)


def pixels(scheduler, cls=diffusers.DDIMPipeline, **kw):
    net = randomized(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
            up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
            attention_head_dim=4,
            norm_num_groups=2,
            **kw,
        )
    )
    return cls(unet=net, scheduler=scheduler)


def noise_of(D, n=2):
    return torch.randn((n, *D.latent_shape), generator=seeded(0))


def ladder(scheduler):
    "Noise levels of a scheduler that has been used, and the scale of x in it at the first and the last level"
    if isinstance(scheduler, (diffusers.DDIMScheduler, diffusers.DDPMScheduler)):
        abar = scheduler.alphas_cumprod.double().clamp(min=2**-24)[scheduler.timesteps]
        return torch.cat([abar_to_sigma(abar), torch.zeros(1)]), abar[0].sqrt().item()
    s = scheduler.sigmas.double()
    if 'FlowMatch' in type(scheduler).__name__ or scheduler.config.get('use_flow_sigmas'):
        return s / (1 - s), 1 - s[0].item()
    return s, 1.0


def close(got, want, tol=1e-4):
    assert got.shape == want.shape and got.dtype == want.dtype and want.std() > 0.02
    assert (got - want).abs().max() < tol * want.abs().max(), (
        got - want
    ).abs().max() / want.abs().max()


def agrees(pipe, D=None, guided=True, told=False, steps=3, tol=1e-4, **kw):
    "Euler's method on the denoiser ends where the stock pipeline does, before and after decoding; `told`: the weight is a condition, and there is no guidance"
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
    sigmas, scale = ladder(pipe.scheduler)
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
            assert (
                len(sigmas) == 5
                and abs(sigmas[0] / D.sigma_max - 1) < 1e-5
                and abs(sigmas[-2] / D.sigma_min - 1) < 1e-4
            )
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
    assert (t.frac() > 0).any() and (
        D.sigma_to_t(pipe.scheduler.sigmas[:-1]) - t
    ).abs().max() < 0.05


def test_weight_as_a_condition():
    agrees(sd(ddim(), time_cond_proj_dim=8), guided=False, told=True)
    agrees(xl(ddim(), time_cond_proj_dim=8), guided=False, told=True)
    lcm = diffusers.LatentConsistencyModelPipeline(
        **sd(diffusers.LCMScheduler(), time_cond_proj_dim=8).components,
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
    assert isinstance(D, EDMDenoiser) and (D.sigma_min, D.sigma_max) == (0.01, 50.0)


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
    assert isinstance(D, EDMDenoiser) and (D.sigma_min, D.sigma_max) == (0.01, 50.0)


def flow(**kw):
    return diffusers.FlowMatchEulerDiscreteScheduler(**kw)


LEVELS = dict(
    sigmas=[0.95, 0.7, 0.3]
)  # a stock pipeline starts from t = 1, where sigma is infinite


def test_sd3():
    D = agrees(sd3(flow(shift=3.0)), **LEVELS)
    assert (
        type(D) is FlowDenoiser
        and abs(D.sigma_max - 999) < 1e-3
        and abs(D.sigma_min - 1 / 999) < 1e-6
    )
    agrees(
        sd3(flow()),
        pipeline_denoiser(sd3(flow()), height=16, width=12),
        height=16,
        width=12,
        **LEVELS,
    )


def test_flow_sigmas():
    "This scheduler cuts times to whole numbers before it tells the network; here the network rounds them to tens"
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


PIXART = dict(use_resolution_binning=False, clean_caption=False)


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
    sigmas, scale = ladder(pipe.scheduler)
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
    sigmas, scale = ladder(pipe.scheduler)
    close(D.decode(sample(D, noise_of(D) / scale, sigmas, euler, cond=D.cond())), want)
    x = torch.rand(2, 3, 8, 8, generator=seeded(0))
    assert (
        torch.allclose(D.decode(D.encode(x)), x, atol=1e-6)
        and D.encode(torch.zeros(1, 3, 8, 8)).eq(-1).all()
    )


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('classes', [None, 6])
def test_ddpm(prediction, classes):
    "The estimate of DDPM's own step, with a class where there are some, and where the network also predicts a variance"
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
    with pytest.raises(ValueError, match='pipe is of class Mine: allowed are .*FluxPipeline'):
        pipeline_denoiser(mine)
    monkeypatch.setitem(FAMILIES, 'Mine', Family())
    assert all_count(pipeline_denoiser(mine), [1, 2]) == {'class_labels'}


def test_all_families_exist():
    for name in FAMILIES:
        assert issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline)


def test_negative():
    "Without a prompt: what the pipeline takes for no negative prompt, which in Stable Diffusion XL is zeros, if its configuration says so"
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
    assert len(D.cond('a red bag')['time_ids']) == 1 and torch.equal(
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
    "Scale and shift against the formula, and with statistics of the latents against Stable Diffusion XL's own"
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
    "Latents and conditions in the pipeline's type, images in float32; an autoencoder that overflows in half precision runs in single, and is as before after it"
    pipe = xl(ddim()).to(torch.bfloat16)
    D = pipeline_denoiser(pipe)
    x = noise_of(D).bfloat16() * 2
    y = D(x, 2.0, **D.cond(PROMPTS))
    assert (
        y.dtype == torch.bfloat16
        and y.isfinite().all()
        and D.decode(y).dtype == torch.float32
        and D.encode(torch.rand(1, 3, 16, 16)).dtype == torch.bfloat16
    )
    wide = D(x.float(), 2.0, **D.cond(PROMPTS))
    assert (
        wide.dtype == torch.float32
        and (wide - y).abs().max() < 0.02 * wide.abs().max()
        and (wide - wide.bfloat16()).any()
    )  # in and out in single precision
    with pytest.raises(ValueError, match='x is torch.float64'):
        D(x.double(), 2.0, **D.cond(PROMPTS))
    pipe, seen = xl(ddim()).to(torch.float16), []
    assert pipe.vae.config.force_upcast
    pipe.vae.decoder.register_forward_pre_hook(lambda m, a: seen.append(a[0].dtype))
    before = {k: v.clone() for k, v in pipe.vae.state_dict().items()}
    pipeline_denoiser(pipe).decode(noise_of(D).half())
    assert seen == [torch.float32] and all(
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
    assert (
        all(torch.equal(v, state[k]) for k, v in pipe.unet.state_dict().items())
        and dict(pipe.scheduler.config) == config
        and torch.equal(seed, torch.get_rng_state())
    )
    assert (
        D.net is pipe.unet
        and D.pipe is pipe
        and {id(p) for p in D.parameters() if p.numel()} == {id(p) for p in pipe.unet.parameters()}
    )


def test_loss_trains():
    pipe = pixart(ddim('v_prediction'))
    pipe.transformer.requires_grad_(True)
    D = pipeline_denoiser(pipe)
    loss = D.loss(noise_of(D), noise_of(D).flip(0), torch.tensor([0.5, 2.0]), **D.cond(PROMPTS))
    loss.sum().backward()
    assert loss.shape == (2,) and pipe.transformer.proj_out.weight.grad.abs().sum() > 0


BAD = {  # what is done -> what the error says
    'a function': (
        lambda: pipeline_denoiser(print),
        'pipe is of class builtin_function_or_method: allowed are',
    ),
    'inpainting': (
        lambda: pipeline_denoiser(sd(ddim(), in_channels=9)),
        'takes 9 channels, but there are 4',
    ),
    'no autoencoder': (lambda: pipeline_denoiser(without_vae()), 'its vae is None'),
    'scheduler': (
        lambda: pipeline_denoiser(sd3(diffusers.ScoreSdeVeScheduler())),
        'scheduler is ScoreSdeVeScheduler .*allowed are those with alphas_cumprod',
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
        'height=18: allowed are positive multiples of 4',
    ),
    'width': (
        lambda: pipeline_denoiser(flux(flow()), width=-4),
        'width=-4: allowed are positive multiples of 4',
    ),
    'size': (lambda: pipeline_denoiser(pixels(ddim()), width=0), 'width=0'),
    'prompt': (lambda: pipeline_denoiser(sd(ddim())).cond(3), 'what=3: allowed are a prompt'),
    'prompts': (
        lambda: pipeline_denoiser(sd(ddim())).cond(['a bag', None]),
        'allowed are a prompt',
    ),
    'class': (
        lambda: pipeline_denoiser(dit(ddim())).cond([3, 1001]),
        'allowed are classes 0 ... 1000',
    ),
    'a word for a class': (
        lambda: pipeline_denoiser(pixels(ddim(), num_class_embeds=6)).cond('bag'),
        "what='bag': allowed are classes 0 ... 5",
    ),
    'no class': (
        lambda: pipeline_denoiser(pixels(ddim(), num_class_embeds=6)).cond(),
        'what=None: allowed are classes 0 ... 5',
    ),
    'no classes': (
        lambda: pipeline_denoiser(pixels(ddim())).cond(1),
        'what=1: allowed are no classes',
    ),
    'no conditions': (
        lambda: call_without(pipeline_denoiser(xl(ddim()))),
        'conditions: encoder_hidden_states, text_embeds not given',
    ),
}


def without_vae():
    pipe = sd(ddim())
    pipe.vae = None
    return pipe


def call_without(D):
    return D(noise_of(D), 1.0)


@pytest.mark.parametrize('what', BAD)
def test_bad_input(what):
    f, says = BAD[what]
    with pytest.raises((ValueError, TypeError), match=says):
        f()
