"Tiny pipelines of every family with random weights, for the tests."

import inspect

import diffusers
import torch
import transformers as tf
from packaging.version import Version

from cf_guidance.denoisers import abar_to_sigma
from cf_guidance.pipelines import embedded_path

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
tf.utils.logging.disable_progress_bar()
tf.utils.logging.set_verbosity_error()

PROMPTS, W = ['a red bag', 'a boot'], 3.0


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randomized(m, seed=1):
    "Random weights, larger than an initialisation's, so that every condition counts"
    g = seeded(seed)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(
                torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
            )
    return m.eval().requires_grad_(False)


def tokenizer():
    return tf.CLIPTokenizer.from_pretrained(embedded_path(), subfolder='tokenizer')


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


def t5(width=16):
    sizes = dict(d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return randomized(tf.T5EncoderModel(tf.T5Config(vocab_size=len(tokenizer()), **sizes)))


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


def flow(**kw):
    return diffusers.FlowMatchEulerDiscreteScheduler(**kw)


# a stock pipeline starts from t = 1, where sigma is infinite
LEVELS = dict(sigmas=[0.95, 0.7, 0.3])
PIXART = dict(use_resolution_binning=False, clean_caption=False)


def noise_of(D, n=2):
    return torch.randn((n, *D.latent_shape), generator=seeded(0))


def scheduler_levels(scheduler):
    "Noise levels of a scheduler that has been used, and the scale of x in it at the first one."
    if isinstance(scheduler, (diffusers.DDIMScheduler, diffusers.DDPMScheduler)):
        abar = scheduler.alphas_cumprod.double().clamp(min=2**-24)[scheduler.timesteps]
        return torch.cat([abar_to_sigma(abar), torch.zeros(1)]), abar[0].sqrt().item()
    s = scheduler.sigmas.double()
    if 'FlowMatch' in type(scheduler).__name__ or scheduler.config.get('use_flow_sigmas'):
        return s / (1 - s), 1 - s[0].item()
    return s, 1.0


def close(got, want, tol=1e-4):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert want.std() > 0.02
    assert (got - want).abs().max() < tol * want.abs().max(), (
        got - want
    ).abs().max() / want.abs().max()


OLD = Version(diffusers.__version__) < Version('0.35')

NEGS, W, STEPS = ['dark', 'a blue hat'], 3.0, 3
PIC, MASK = (
    torch.rand(2, 3, 16, 16, generator=seeded(5)),
    torch.ones(2, 1, 16, 16).index_fill(3, torch.arange(8), 0.0),
)


def of(name, pipe, **parts):
    "A pipeline of another class with the same parts, and others"
    cls, free = getattr(diffusers, name), 'requires_safety_checker'
    return cls(
        **{
            **{k: v for k, v in pipe.components.items() if k in inspect.signature(cls).parameters},
            **parts,
        },
        **({free: False} if free in inspect.signature(cls).parameters else {}),
    )


def net_of(pipe):
    return getattr(pipe, 'unet', None) or pipe.transformer


def controlnet(pipe):
    return randomized(
        diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    )


def controlled(name, pipe):
    return of(name, pipe, controlnet=controlnet(pipe))


def adapted(name, pipe):
    "The adapter has a feature for each block, added before it makes the picture smaller."
    net = randomized(
        diffusers.UNet2DConditionModel.from_config(
            {**pipe.unet.config, 'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D')}
        )
    )
    return of(
        name,
        pipe,
        unet=net,
        adapter=randomized(diffusers.T2IAdapter(3, [8, 16], 1, 2, 'full_adapter')),
    )


def sd3_controlled(name, more=0):
    pipe = sd3(flow(shift=3.0))
    net = diffusers.SD3ControlNetModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        extra_conditioning_channels=more,
    )
    return of(name, pipe, controlnet=randomized(net))


def sd3_inpaint(name):
    "This pipeline knows latents of 16 channels only"
    pipe = sd3(flow(shift=3.0))
    net = diffusers.SD3Transformer2DModel.from_config(
        {**pipe.transformer.config, 'in_channels': 16, 'out_channels': 16}
    )
    return of(name, pipe, transformer=randomized(net), vae=vae(16, shift_factor=0.1))


def flux_controlled(name):
    pipe = flux(flow(), guidance=False)
    return of(
        name,
        pipe,
        controlnet=randomized(
            diffusers.FluxControlNetModel.from_transformer(
                pipe.transformer,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
            )
        ),
    )


TRUE, BIN = dict(true_cfg_scale=W), dict(use_resolution_binning=False)
PAINT, CONTROL = dict(image=PIC, mask_image=MASK), dict(control_image=PIC)
MADE = {  # name of a pipeline, and what else is special -> how it is made, and called
    'StableDiffusion': (lambda n: sd(ddim()), {}),
    'StableDiffusionImg2Img': (lambda n: of(n, sd(ddim())), dict(image=PIC, strength=0.7)),
    'StableDiffusionInpaint': (lambda n: of(n, sd(ddim())), PAINT),
    'StableDiffusionInpaint 9': (lambda n: of(n, sd(ddim(), in_channels=9)), PAINT),
    'StableDiffusionControlNet': (lambda n: controlled(n, sd(ddim())), dict(image=PIC)),
    'StableDiffusionControlNet guess': (
        lambda n: controlled(n, sd(ddim())),
        dict(image=PIC, guess_mode=True),
    ),
    'StableDiffusionControlNetImg2Img': (
        lambda n: controlled(n, sd(ddim())),
        dict(image=PIC, **CONTROL),
    ),
    'StableDiffusionControlNetInpaint': (
        lambda n: controlled(n, sd(ddim())),
        dict(PAINT, **CONTROL),
    ),
    'StableDiffusionAdapter': (lambda n: adapted(n, sd(ddim())), dict(image=PIC)),
    'StableDiffusionXL': (lambda n: xl(euler_discrete()), {}),
    'StableDiffusionXLImg2Img': (lambda n: of(n, xl(ddim())), dict(image=PIC, strength=0.7)),
    'StableDiffusionXLInpaint': (lambda n: of(n, xl(ddim())), PAINT),
    'StableDiffusionXLInpaint 9': (lambda n: of(n, xl(ddim(), in_channels=9)), PAINT),
    'StableDiffusionXLControlNet': (lambda n: controlled(n, xl(ddim())), dict(image=PIC)),
    'StableDiffusionXLControlNetImg2Img': (
        lambda n: controlled(n, xl(ddim())),
        dict(image=PIC, **CONTROL),
    ),
    'StableDiffusionXLControlNetInpaint': (
        lambda n: controlled(n, xl(ddim())),
        dict(PAINT, **CONTROL),
    ),
    'StableDiffusionXLAdapter': (lambda n: adapted(n, xl(ddim())), dict(image=PIC)),
    'StableDiffusion3': (lambda n: sd3(flow(shift=3.0)), {}),
    'StableDiffusion3Img2Img': (
        lambda n: of(n, sd3(flow(shift=3.0))),
        dict(image=PIC, strength=0.7),
    ),
    'StableDiffusion3Inpaint': (sd3_inpaint, PAINT),
    'StableDiffusion3ControlNet': (sd3_controlled, CONTROL),
    'StableDiffusion3ControlNetInpainting': (
        lambda n: sd3_controlled(n, 1),
        dict(control_image=PIC, control_mask=MASK),
    ),
    'PixArtAlpha': (lambda n: pixart(ddim()), BIN),
    'PixArtSigma': (lambda n: pixart(ddim(), diffusers.PixArtSigmaPipeline), BIN),
    'PixArtAlpha sizes': (lambda n: pixart(ddim(), size=128), dict(BIN, height=16, width=24)),
    'Flux': (lambda n: flux(flow()), TRUE),
    'FluxImg2Img': (
        lambda n: of(n, flux(flow(), guidance=False)),
        dict(TRUE, image=PIC, strength=0.7),
    ),
    'FluxInpaint': (lambda n: of(n, flux(flow(), guidance=False)), dict(TRUE, **PAINT)),
    'FluxControlNet': (flux_controlled, dict(TRUE, **CONTROL)),
    'DiT': (lambda n: dit(ddim()), {}),
}


def make(what):
    name, (f, kw) = f'{what.split()[0]}Pipeline', MADE[what]
    pipe = f(name)
    assert type(pipe).__name__ == name
    return pipe, kw


def run(pipe, steps=STEPS, seed=0, **kw):
    "Latents that a pipeline ends with (pictures, for DiT)"
    pipe.set_progress_bar_config(disable=True)
    args = dict(prompt=PROMPTS, negative_prompt=NEGS, output_type='latent')
    if 'DiT' in type(pipe).__name__:
        args = dict(class_labels=[1, 2], output_type='np')
    if 'Flux' in type(pipe).__name__:
        args.update(max_sequence_length=16, height=16, width=16)
    else:
        args['guidance_scale'] = W
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # which some ControlNets draw with
        return torch.as_tensor(
            pipe(num_inference_steps=steps, generator=seeded(seed), **{**args, **kw}).images
        )


def off(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert a.isfinite().all()
    assert a.std() > 0.02
    return ((a - b).abs().max() / b.abs().max()).item()
