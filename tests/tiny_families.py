"Tiny pipelines of the newer families with random weights, and how to call them: with embeddings."

import inspect
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import diffusers
import pytest
import torch
from packaging.version import Version
from pipeline_helpers import randomized, seeded, vae

from cf_guidance.pipelines import FAMILIES as LISTED

N, W, STEPS = 2, 3.0, 4  # samples, guidance weight and steps of a call


def kolors_pipeline():
    "diffusers imports it only where sentencepiece is installed, which the tokenizer needs."
    missing = find_spec('sentencepiece') is None
    if missing:
        sys.modules['sentencepiece'] = ModuleType('sentencepiece')
        sys.modules['sentencepiece'].SentencePieceProcessor = object
    try:
        return import_module('diffusers.pipelines.kolors.pipeline_kolors').KolorsPipeline
    finally:
        if missing:
            del sys.modules['sentencepiece']


def embeddings(seed, *shape):
    return torch.randn(shape, generator=seeded(seed))


def texts(names, *shape, n=N):
    "Embeddings for the prompt, and others for the negative prompt, by the names of arguments."
    out = {}
    for i, name in enumerate(names):
        out[name] = embeddings(10 + i, n, *shape)
        out[f'negative_{name}'] = embeddings(20 + i, n, *shape)
    return out


def masks(name, length, n=N):
    "All tokens of the first prompt count; the last tokens of the others do not."
    mask = torch.ones(n, length, dtype=torch.bool)
    mask[1:, -2:] = False
    return {name: mask, f'negative_{name}': mask.flip(0)}


def flow(**kw):
    return diffusers.FlowMatchEulerDiscreteScheduler(**kw)


def made(name, net, scheduler, **parts):
    "A pipeline without text encoders, and without an autoencoder unless one is given."
    cls = kolors_pipeline() if name == 'KolorsPipeline' else getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    needed = [k for k, p in known.items() if p.default is p.empty and k != 'self']
    own = dict(scheduler=scheduler, unet=net, transformer=net, requires_safety_checker=False)
    args = dict.fromkeys(needed) | own | parts
    pipe = cls(**{k: v for k, v in args.items() if k in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network(name, seed=1, **kw):
    return randomized(getattr(diffusers, name)(**kw), seed)


def qwen_image(**kw):
    net = network(
        'QwenImageTransformer2DModel',
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    mask = masks('prompt_embeds_mask', 7) if kw.pop('masked', True) else {}
    pipe = made('QwenImagePipeline', net, flow(), **kw)
    call = dict(true_cfg_scale=W, height=64, width=96, **texts(['prompt_embeds'], 7, 12), **mask)
    return pipe, call


def z_image():
    net = network(
        'ZImageTransformer2DModel',
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )
    net.x_pad_token.data.normal_(generator=seeded(5))
    net.cap_pad_token.data.normal_(generator=seeded(6))
    lengths = dict(prompt_embeds=(5, 8), negative_prompt_embeds=(6, 3))
    call = {k: [embeddings(i, i, 12) for i in v] for k, v in lengths.items()}
    return made('ZImagePipeline', net, flow()), dict(
        guidance_scale=W - 1, height=64, width=96, **call
    )


def wan_network(seed=1):
    return network(
        'WanTransformer3DModel',
        seed,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )


def unipc(**kw):
    return diffusers.UniPCMultistepScheduler(
        prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0, **kw
    )


VIDEO = dict(num_frames=5, height=32, width=48)


def wan(scheduler=None, **kw):
    pipe = made('WanPipeline', wan_network(), scheduler or unipc(), **kw)
    return pipe, dict(guidance_scale=W, **VIDEO, **texts(['prompt_embeds'], 7, 12))


def wan_experts():
    pipe, call = wan(transformer_2=wan_network(2), boundary_ratio=0.8)
    return pipe, dict(call, guidance_scale_2=2.0)


def flux2_network(guidance):
    return network(
        'Flux2Transformer2DModel',
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )


def flux2_vae():
    return randomized(
        diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=['DownEncoderBlock2D'] * 2,
            up_block_types=['UpDecoderBlock2D'] * 2,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        )
    )


def flux2():
    pipe = made('Flux2Pipeline', flux2_network(True), flow(), vae=flux2_vae())
    text = embeddings(10, N, 7, 12)
    return pipe, dict(guidance_scale=W, height=16, width=24, prompt_embeds=text)


def flux2_klein():
    pipe = made('Flux2KleinPipeline', flux2_network(False), flow(), vae=flux2_vae())
    return pipe, dict(guidance_scale=W, height=16, width=24, **texts(['prompt_embeds'], 7, 12))


def chroma():
    net = network(
        'ChromaTransformer2DModel',
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = made('ChromaPipeline', net, flow())
    text = texts(['prompt_embeds'], 7, 12) | masks('prompt_attention_mask', 7)
    return pipe, dict(guidance_scale=W, height=64, width=96, **text)


def ltx():
    net = network(
        'LTXVideoTransformer3DModel',
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
    )
    text = texts(['prompt_embeds'], 7, 12) | masks('prompt_attention_mask', 7)
    video = dict(num_frames=9, height=64, width=96)
    return made('LTXPipeline', net, flow()), dict(guidance_scale=W, **video, **text)


def ltx2(name='LTX2Pipeline'):
    "Pictures and sound, each of another width; both autoencoders are needed for their statistics."
    net = network(
        'LTX2VideoTransformer3DModel',
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
        gated_attn=True,
        cross_attn_mod=True,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        use_prompt_embeddings=False,
        perturbed_attn=True,
    )
    sound = network(
        'AutoencoderKLLTX2Audio',
        base_channels=8,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=16,
    )
    sizes = {f'{o}_connector_{k}': v for o in ('video', 'audio') for k, v in _CONNECTOR.items()}
    connectors = import_module('diffusers.pipelines.ltx2.connectors').LTX2TextConnectors(
        caption_channels=12,
        text_proj_in_factor=1,
        per_modality_projections=True,
        video_hidden_dim=16,
        audio_hidden_dim=16,
        **sizes,
    )
    parts = dict(vae=ltx2_vae(), audio_vae=sound, connectors=randomized(connectors, 3))
    text = texts(['prompt_embeds'], 8, 12) | masks('prompt_attention_mask', 8)
    call = dict(guidance_scale=W, num_frames=9, height=64, width=96, **text, **ALONE)
    if 'Image' in name:
        latents = embeddings(30, N, 4, 2, 2, 3)  # only the first frame is given
        image = torch.zeros(N, 3, 64, 96)
        call |= dict(image=image, latents=latents, noise_scale=1.0)
        if 'image_crf' in inspect.signature(getattr(diffusers, name).__call__).parameters:
            call['image_crf'] = 0
    return made(name, net, flow(), **parts), call


_CONNECTOR = dict(
    num_attention_heads=2, attention_head_dim=8, num_layers=1, num_learnable_registers=4
)
# without what LTX-2 does besides plain guidance, and which is on by default
ALONE = dict(audio_guidance_scale=2.0, spatio_temporal_guidance_blocks=[1])
for _part in ('', 'audio_'):
    ALONE |= {f'{_part}stg_scale': 0.0, f'{_part}modality_scale': 1.0}
    ALONE |= {f'{_part}guidance_rescale': 0.0}


def lumina2():
    net = network(
        'Lumina2Transformer2DModel',
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 16, 16),
        cap_feat_dim=12,
    )
    text = texts(['prompt_embeds'], 7, 12) | masks('prompt_attention_mask', 7)
    pipe = made('Lumina2Pipeline', net, flow())
    return pipe, dict(guidance_scale=W, height=64, width=96, **text)


def sana():
    net = network(
        'SanaTransformer2DModel',
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0
    )
    text = texts(['prompt_embeds'], 7, 12) | masks('prompt_attention_mask', 7)
    call = dict(guidance_scale=W, height=128, width=192, use_resolution_binning=False)
    call['negative_prompt'] = None
    return made('SanaPipeline', net, scheduler), dict(call, **text)


def cogvideox(dpm=False):
    net = network(
        'CogVideoXTransformer3DModel',
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=2,
        sample_width=6,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=7,
    )
    cls = diffusers.CogVideoXDPMScheduler if dpm else diffusers.CogVideoXDDIMScheduler
    scheduler = cls(
        prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing'
    )
    text = texts(['prompt_embeds'], 7, 12)
    return made('CogVideoXPipeline', net, scheduler), dict(guidance_scale=W, **VIDEO, **text)


def hunyuan_video():
    net = network(
        'HunyuanVideoTransformer3DModel',
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    text = texts(['prompt_embeds'], 7, 12) | texts(['pooled_prompt_embeds'], 8)
    text |= masks('prompt_attention_mask', 7)
    pipe = made('HunyuanVideoPipeline', net, flow(shift=7.0))
    return pipe, dict(true_cfg_scale=W, **VIDEO, **text)


def aura_flow():
    net = network(
        'AuraFlowTransformer2DModel',
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=256,
    )
    text = texts(['prompt_embeds'], 7, 12) | masks('prompt_attention_mask', 7)
    pipe = made('AuraFlowPipeline', net, flow(shift=1.7))
    return pipe, dict(guidance_scale=W, height=64, width=96, **text)


def cogview4():
    net = network(
        'CogView4Transformer2DModel',
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    pipe = made('CogView4Pipeline', net, flow(use_dynamic_shifting=True, time_shift_type='linear'))
    return pipe, dict(guidance_scale=W, height=64, width=96, **texts(['prompt_embeds'], 16, 12))


def kolors():
    net = network(
        'UNet2DConditionModel',
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        attention_head_dim=4,
        norm_num_groups=2,
        cross_attention_dim=12,
        addition_embed_type='text_time',
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.014, num_train_timesteps=1100
    )
    text = texts(['prompt_embeds'], 7, 12) | texts(['pooled_prompt_embeds'], 8)
    pipe = made('KolorsPipeline', net, scheduler, vae=vae())
    return pipe, dict(guidance_scale=W, height=16, width=24, **text)


def hunyuan_dit():
    net = network(
        'HunyuanDiT2DModel',
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=7,
        text_len_t5=9,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_schedule='scaled_linear', prediction_type='v_prediction', steps_offset=1
    )
    text = texts(['prompt_embeds'], 7, 12) | texts(['prompt_embeds_2'], 9, 16)
    text |= masks('prompt_attention_mask', 7) | masks('prompt_attention_mask_2', 9)
    pipe = made('HunyuanDiTPipeline', net, scheduler)
    call = dict(guidance_scale=W, height=64, width=96, use_resolution_binning=False)
    return pipe, dict(call, **text)


def mochi():
    net = network(
        'MochiTransformer3DModel',
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=7,
    )
    text = texts(['prompt_embeds'], 7, 16) | masks('prompt_attention_mask', 7)
    pipe = made('MochiPipeline', net, flow(invert_sigmas=True))
    return pipe, dict(guidance_scale=W, num_frames=7, height=32, width=48, **text)


def skyreels():
    net = network(
        'SkyReelsV2Transformer3DModel',
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )
    pipe = made('SkyReelsV2Pipeline', net, unipc())
    return pipe, dict(guidance_scale=W, **VIDEO, **texts(['prompt_embeds'], 7, 12))


def krea2():
    net = network(
        'Krea2Transformer2DModel',
        in_channels=16,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=12,
        num_text_layers=2,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 4),
    )
    pipe = made('Krea2Pipeline', net, flow())
    text = texts(['prompt_embeds'], 7, 2, 12) | masks('prompt_embeds_mask', 7)
    return pipe, dict(guidance_scale=W - 1, height=64, width=96, **text)


def hidream():
    net = network(
        'HiDreamImageTransformer2DModel',
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[12, 12],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    pipe = made('HiDreamImagePipeline', net, flow())
    pipe.default_sample_size = 8
    text = texts(['prompt_embeds_t5'], 7, 12) | texts(['pooled_prompt_embeds'], 8)
    llama = {k: v.movedim(1, 0) for k, v in texts(['prompt_embeds_llama3'], 2, 7, 12).items()}
    return pipe, dict(guidance_scale=W, height=64, width=64, **text, **llama)


def ideogram4(vae=None):
    "Two networks. A call has prompts, so in place of a text encoder there are embeddings."
    net = partial(
        network,
        'Ideogram4Transformer2DModel',
        in_channels=16,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        intermediate_size=16,
        adaln_dim=8,
        llm_features_dim=12,
        mrope_section=(2, 2, 2),
    )
    parts = dict(unconditional_transformer=net(seed=2), vae=vae)
    pipe, text = made('Ideogram4Pipeline', net(seed=1), flow(), **parts), embeddings(10, N, 7, 12)
    lengths = [5, 7]

    def encode_prompt(prompt, grid_h, grid_w, max_sequence_length, device):
        n = [lengths[i] for i, _ in enumerate(prompt)]
        ids = type(pipe)._prepare_ids(n, grid_h, grid_w, max_sequence_length, device)
        none = torch.zeros(len(n), grid_h * grid_w, 12)
        return torch.cat([text[: len(n)], none], 1), *ids

    pipe.encode_prompt = encode_prompt
    call = dict(prompt=['', ''], max_sequence_length=7, height=64, width=96)
    return pipe, dict(call, guidance_scale=W, guidance_schedule=None)


# name -> class of the pipeline, and how it is made
FAMILIES = {
    'Qwen-Image': ('QwenImagePipeline', qwen_image),
    'Z-Image': ('ZImagePipeline', z_image),
    'Wan': ('WanPipeline', wan),
    'Wan, two experts': ('WanPipeline', wan_experts),
    'Flux.2': ('Flux2Pipeline', flux2),
    'Flux.2 Klein': ('Flux2KleinPipeline', flux2_klein),
    'Chroma': ('ChromaPipeline', chroma),
    'LTX': ('LTXPipeline', ltx),
    'LTX-2': ('LTX2Pipeline', ltx2),
    'Lumina 2': ('Lumina2Pipeline', lumina2),
    'Sana': ('SanaPipeline', sana),
    'CogVideoX': ('CogVideoXPipeline', cogvideox),
    'HunyuanVideo': ('HunyuanVideoPipeline', hunyuan_video),
    'AuraFlow': ('AuraFlowPipeline', aura_flow),
    'CogView 4': ('CogView4Pipeline', cogview4),
    'Kolors': ('KolorsPipeline', kolors),
    'HunyuanDiT': ('HunyuanDiTPipeline', hunyuan_dit),
    'Mochi': ('MochiPipeline', mochi),
    'SkyReels V2': ('SkyReelsV2Pipeline', skyreels),
    'HiDream': ('HiDreamImagePipeline', hidream),
    'Krea 2': ('Krea2Pipeline', krea2),
    'Ideogram 4': ('Ideogram4Pipeline', ideogram4),
}


def make(what):
    "A pipeline and a call of it; skipped where this diffusers does not have it."
    cls, made = FAMILIES[what]
    since = '0.35' if 'experts' in what else LISTED[cls].since
    if Version(diffusers.__version__) < Version(since):
        pytest.skip(f'needs diffusers {since}')
    try:
        return made()
    except RuntimeError as e:
        if 'ftfy' not in str(e):
            raise
        pytest.skip('diffusers 0.33 and 0.34 import Wan only where ftfy is installed')


def kl():
    return vae(shift_factor=0.1)


def deep_kl():
    "Pixels per latent: 8, which the pipeline of HunyuanDiT takes for granted."
    return network(
        'AutoencoderKL',
        block_out_channels=(4, 4, 4, 4),
        down_block_types=['DownEncoderBlock2D'] * 4,
        up_block_types=['UpDecoderBlock2D'] * 4,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.3,
    )


def dc():
    return network(
        'AutoencoderDC',
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    )


def video_vae(name):
    "With statistics of the latents per channel."
    stats = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 3.0])
    sizes = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return network(name, **sizes, **stats)


def ltx_vae():
    pair = (True, False)
    net = network(
        'AutoencoderKLLTXVideo',
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=('LTXVideoDownBlock3D',) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=pair,
        decoder_spatio_temporal_scaling=pair,
        decoder_inject_noise=(False,) * 3,
        downsample_type=('conv',) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1, 1),
        scaling_factor=0.5,
    )
    net.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    net.latents_std.copy_(torch.tensor([1.0, 2.0, 0.5, 3.0]))
    return net


def ltx2_vae():
    pair = (True, True)
    return network(
        'AutoencoderKLLTX2Video',
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=('LTX2VideoDownBlock3D',) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=pair,
        decoder_spatio_temporal_scaling=pair,
        decoder_inject_noise=(False,) * 3,
        downsample_type=('spatial', 'temporal'),
        upsample_type=('spatiotemporal',) * 2,
        upsample_residual=pair,
        upsample_factor=(1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )


def cogvideox_vae():
    return network(
        'AutoencoderKLCogVideoX',
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    )


def hunyuan_video_vae():
    return network(
        'AutoencoderKLHunyuanVideo',
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.5,
    )


# name -> an autoencoder, and the sizes that fit it
SMALL = dict(height=32, width=48)
VAES = {
    'Sana': (dc, dict(height=32, width=64)),
    'AuraFlow': (kl, SMALL),
    'CogView 4': (kl, SMALL),
    'Lumina 2': (kl, SMALL),
    'Z-Image': (kl, SMALL),
    'Qwen-Image': (partial(video_vae, 'AutoencoderKLQwenImage'), dict(height=64, width=96)),
    'Flux.2': (flux2_vae, {}),
    'Flux.2 Klein': (flux2_vae, {}),
    'Chroma': (kl, SMALL),
    'Krea 2': (partial(video_vae, 'AutoencoderKLQwenImage'), dict(height=64, width=96)),
    'HunyuanDiT': (deep_kl, {}),
    'HiDream': (kl, dict(height=16, width=16)),
    'Wan': (partial(video_vae, 'AutoencoderKLWan'), {}),
    'LTX': (ltx_vae, {}),
    'CogVideoX': (cogvideox_vae, {}),
    'HunyuanVideo': (hunyuan_video_vae, {}),
    'SkyReels V2': (partial(video_vae, 'AutoencoderKLWan'), {}),
}


def with_vae(what):
    "A pipeline with an autoencoder, and a call of it."
    (pipe, call), (make_vae, size) = FAMILIES[what][1](), VAES[what]
    known = inspect.signature(type(pipe).__init__).parameters
    parts = {k: v for k, v in pipe.components.items() if k in known} | dict(vae=make_vae())
    if 'requires_safety_checker' in known:
        parts['requires_safety_checker'] = False
    new = type(pipe)(**parts)
    new.set_progress_bar_config(disable=True)
    if what == 'HiDream':
        new.default_sample_size = pipe.default_sample_size
    return new, call | size


def run(pipe, call, **kw):
    "The latents of a call."
    args = dict(num_inference_steps=STEPS, generator=seeded(0), output_type='latent')
    return pipe(**{**call, **args, **kw}, return_dict=False)[0]
