"Tiny networks of diffusers with random weights, each with a way to ask it about any batch."

import diffusers
import torch


def seeded(i=0):
    return torch.Generator().manual_seed(i)


def randomized(net):
    "Weights of which every part of the network makes use."
    g = seeded(1)
    for p in net.parameters():
        scale = 0.3 if p.ndim == 1 else p[0].numel() ** -0.5
        p.data = torch.randn(p.shape, generator=g) * scale
    return net.eval().requires_grad_(False)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def sd_unet(**kw):
    return diffusers.UNet2DConditionModel(
        **{
            **dict(
                sample_size=8,
                block_out_channels=(16, 32),
                down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
                up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
                cross_attention_dim=16,
                attention_head_dim=2,
                norm_num_groups=4,
                layers_per_block=1,
            ),
            **kw,
        }
    )


def pixel_unet(**kw):
    return diffusers.UNet2DModel(
        **{
            **dict(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                block_out_channels=(16, 32),
                down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
                up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
                norm_num_groups=4,
                layers_per_block=1,
                attention_head_dim=8,
                num_class_embeds=6,
            ),
            **kw,
        }
    )


def sd3(**kw):
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
        **kw,
    )


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        patch_size=2,
        sample_size=8,
        num_embeds_ada_norm=6,
        norm_num_groups=4,
    )


def pixart():
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=16,
        patch_size=2,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
        norm_num_groups=4,
    )


def ids(h, w, text=0, axes=3):
    "Positions of text and image tokens, as Flux has them."
    image = torch.zeros(h, w, axes)
    image[..., 1] += torch.arange(h)[:, None]
    image[..., 2] += torch.arange(w)[None]
    return torch.cat([torch.zeros(text, axes), image.reshape(-1, axes)])


class Case:
    "A network as `case(rows)`: what it says about these samples of a batch of 6."

    def __init__(self, name):
        self.name = name
        self.net = randomized(MAKE[name]())
        self.inputs = INPUTS[name]()

    def kwargs(self, rows=slice(None)):
        rows = torch.arange(6)[rows]
        return {
            k: v[rows] if torch.is_tensor(v) and not k.endswith('_ids') else v
            for k, v in self.inputs.items()
        }

    def __call__(self, rows=slice(None), net=None):
        return (self.net if net is None else net)(**self.kwargs(rows)).sample


def unet_inputs(**kw):
    t = torch.tensor([10, 200, 500, 10, 700, 900])
    return dict(sample=rand(6, 4, 8, 12), timestep=t, encoder_hidden_states=rand(6, 5, 16), **kw)


def joint_inputs(image):
    return dict(
        hidden_states=image,
        encoder_hidden_states=rand(6, 5, 16, seed=2),
        pooled_projections=rand(6, 16, seed=3),
        timestep=torch.linspace(0.1, 0.9, 6),
    )


MAKE = dict(sd=sd_unet, pixels=pixel_unet, sd3=sd3, flux=flux, dit=dit, pixart=pixart)
LABELS = torch.arange(6) % 5
INPUTS = dict(
    sd=unet_inputs,
    pixels=lambda: dict(
        sample=rand(6, 4, 8, 12), timestep=torch.arange(6) * 100, class_labels=LABELS
    ),
    sd3=lambda: joint_inputs(rand(6, 4, 8, 12)),
    flux=lambda: dict(**joint_inputs(rand(6, 24, 4)), img_ids=ids(4, 6), txt_ids=torch.zeros(5, 3)),
    dit=lambda: dict(
        hidden_states=rand(6, 4, 8, 8), timestep=torch.arange(6) * 100, class_labels=LABELS
    ),
    pixart=lambda: dict(
        hidden_states=rand(6, 4, 8, 12),
        encoder_hidden_states=rand(6, 5, 16),
        timestep=torch.arange(6) * 100,
        added_cond_kwargs={},
    ),
)
