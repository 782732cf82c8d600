"""What a sweep and guidance cost on a GPU, beside the network and the limit of the machine.

    python benchmarks/gpu.py             # under ten minutes on a GPU; float16
    python benchmarks/gpu.py --dtype bfloat16

The network has the shape of Stable Diffusion 1.5 and random weights, so nothing is downloaded.
Without a GPU the script runs on a tiny network on the CPU, to show that it works.
The table is printed and kept as JSON beside this file.
"""

import argparse
import os
import statistics
import warnings

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPAGPipeline, UNet2DConditionModel
from guided import sd15
from sweep import matmul, operations, ratio, report, sweep_rows, turns
from transformers import CLIPTextConfig, CLIPTextModel

from cf_guidance import perturb
from cf_guidance.attention import PAG
from cf_guidance.guided import Conditions, GuidedDenoiser, Term
from cf_guidance.lab.backends import with_backend
from cf_guidance.lab.fashion import quiet
from cf_guidance.pipelines import (
    MinimalDiffusion,
    NegativePrompt,
    embedded_path,
    guided,
    pipeline_denoiser,
)


def tiny():
    "A U-Net that a CPU runs in no time."
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
        layers_per_block=1,
        cross_attention_dim=32,
    ).eval()


def pipeline(net, large, device, dtype):
    "A pipeline with this U-Net; all other weights are random as well."
    stock = diffusers.StableDiffusionPipeline.from_pretrained(embedded_path())
    width = net.config.cross_attention_dim
    heads = max(1, width // 64)
    text = CLIPTextConfig(
        vocab_size=len(stock.tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12 if large else 1,
        num_attention_heads=heads,
        eos_token_id=stock.tokenizer.eos_token_id,
    )
    channels = (128, 256, 512, 512) if large else (32, 32)
    vae = AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=2 if large else 1,
        down_block_types=('DownEncoderBlock2D',) * len(channels),
        up_block_types=('UpDecoderBlock2D',) * len(channels),
    )
    stock.tokenizer.model_max_length = 77
    parts = dict(unet=net, vae=vae, text_encoder=CLIPTextModel(text), scheduler=stock.scheduler)
    pipe = diffusers.StableDiffusionPipeline(
        **{**stock.components, **parts}, requires_safety_checker=False
    ).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(net, rows):
    "Latents, times and text."
    g, size = torch.Generator().manual_seed(0), net.config.sample_size
    x = torch.randn(rows, 4, size, size, generator=g).to(net.device)
    text = torch.randn(rows, 77, net.config.cross_attention_dim, generator=g)
    times = torch.full((rows,), 500, device=net.device)
    return x.to(net.dtype), times, text.to(net.device, net.dtype)


@torch.no_grad()
def limit(net, batches, repeats, side):
    "Evaluations per second of the bare network, and its share of a product of large matrices."
    device, rows = net.device.type, {}
    flops = operations(net, inputs(net, 1))
    rows['operations of one evaluation, billions'] = flops / 1e9, ''
    product, work = matmul(side, net.dtype, net.device)
    for n in batches:
        given = inputs(net, n)
        fs = {'limit': product, 'net': lambda given=given: net(*given)}
        t = turns(fs, repeats, device)
        rate = n / statistics.median(t['net'])
        share = ratio(t, 'limit', 'net') * n * flops / work
        rows[f'batch {n}: evaluations/s'] = rate, ''
        rows[f'  batch {n}: share of the limit'] = share, ''
    rows['limit (matrix product), TFLOP/s'] = work / statistics.median(t['limit']) / 1e12, ''
    return rows


@torch.no_grad()
def steps(pipe, batches, repeats):
    "One guided evaluation against the bare network on as many rows."
    net, D, rows = pipe.unet, pipeline_denoiser(pipe), {}
    for n in batches:
        x, times, text = inputs(net, n)
        G = GuidedDenoiser(D, Conditions(dict(encoder_hidden_states=0 * text)), w=4.0)
        both = torch.cat([x, x]), torch.cat([times, times]), torch.cat([0 * text, text])
        sigma = torch.full((n,), 3.0, device=net.device)
        fs = {
            'bare': lambda both=both: net(*both),
            'guided': lambda G=G, x=x, s=sigma, e=text: G(x.float(), s, encoder_hidden_states=e),
        }
        t = turns(fs, repeats, net.device.type)
        rows[f'CFG, batch {n}: guided step, ms'] = statistics.median(t['guided']) * 1e3, ''
        share = ratio(t, 'guided', 'bare')
        rows[f'  CFG, batch {n}: guided step / bare network'] = share, 'goal 1.03'
    return rows


def pag(pipe, n, repeats):
    "CFG and PAG together: rows that join late, all rows from the start, and diffusers' pipeline."
    device, own = pipe.unet.device.type, perturb._MIN_POSITIONS_TO_JOIN
    theirs = StableDiffusionPAGPipeline(
        **pipe.components, requires_safety_checker=False, pag_applied_layers='mid'
    )
    theirs.set_progress_bar_config(disable=True)
    ours = guided(pipe, Term(NegativePrompt(), 7.5), Term(PAG(pipe.unet), 4.0))
    x, _, text = inputs(pipe.unet, 2)
    common = dict(
        prompt_embeds=text,
        negative_prompt_embeds=0 * text,
        guidance_scale=7.5,
        latents=x,
        num_inference_steps=n,
        output_type='latent',
    )

    def run(positions):
        perturb._MIN_POSITIONS_TO_JOIN = positions
        try:
            return ours(**common).images
        finally:
            perturb._MIN_POSITIONS_TO_JOIN = own

    fs = {'late': lambda: run(0), 'full': lambda: run(10**9)}
    # their pipeline replaces the attention of the shared network for the time of a call
    fs['theirs'] = lambda: theirs(**common, pag_scale=3.0).images
    ends = {k: f().float() for k, f in fs.items()}
    scale = ends['theirs'].abs().max()
    t, name = turns(fs, repeats, device), f'CFG + PAG, batch 2, {n} steps'
    rows = {f'{name}: {k}, s': (statistics.median(t[k]), '') for k in fs}
    rows[f'  {name}: theirs / late rows'] = ratio(t, 'theirs', 'late'), 'goal 1.15'
    rows[f'  {name}: full rows / late rows'] = ratio(t, 'full', 'late'), ''
    for k in ('late', 'full'):
        apart = ((ends[k] - ends['theirs']).abs().max() / scale).item()
        rows[f'  {name}: largest difference to theirs, {k}'] = apart, ''
    return rows


def compiled(pipe, n, repeats):
    "A compiled network: how fast, and does another weight, rule or interval compile again?"
    from torch._dynamo.utils import counters

    fast, device = with_backend(pipe, 'compile'), pipe.unet.device.type
    x, _, text = inputs(pipe.unet, 2)

    def run(pipe, **kw):
        more = dict(prompt_embeds=text, negative_prompt_embeds=0 * text, output_type='latent')
        guided(pipe, **kw)(latents=x, num_inference_steps=n, **more)

    fs = {'eager': lambda: run(pipe, w=4.0), 'compiled': lambda: run(fast, w=4.0)}
    t, before = turns(fs, repeats, device), counters['stats']['unique_graphs']
    for kw in (dict(w=7.0), dict(w=[1.0 + i for i in range(n)]), dict(w=3.0, interval=(0.3, 5.0))):
        run(fast, **kw)
    again = counters['stats']['unique_graphs'] - before
    return {
        f'{n} guided steps, batch 2: eager, s': (statistics.median(t['eager']), ''),
        f'{n} guided steps, batch 2: compiled, s': (statistics.median(t['compiled']), ''),
        '  eager / compiled': (ratio(t, 'eager', 'compiled'), ''),
        '  graphs compiled again by other guidance': (float(again), 'goal 1'),
    }


def parsed():
    "The arguments of the command line."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--dtype', choices=['float16', 'bfloat16'], default='float16')
    p.add_argument('--steps', type=int, default=20, help='sampling steps')
    p.add_argument('--repeats', type=int, default=3, help='turns, of which the median is taken')
    p.add_argument('--no-compile', action='store_true', help='leave torch.compile out')
    return p.parse_args()


def main():
    args, large = parsed(), torch.cuda.is_available()
    quiet()
    warnings.filterwarnings('ignore', 'compile: PyTorch runs')
    device, dtype = ('cuda', getattr(torch, args.dtype)) if large else ('cpu', torch.float32)
    pipe = pipeline(sd15(64) if large else tiny(), large, device, dtype)
    net, batches = pipe.unet, (1, 2, 8, 24) if large else (1, 2)
    rows = limit(net, batches, 5 * args.repeats, 8192 if large else 256)
    rows |= steps(pipe, batches[:3], 5 * args.repeats)
    rows |= pag(pipe, args.steps, args.repeats)
    ours = MinimalDiffusion(pipe, progress=False).load()
    values = 12 if large else 2
    rows |= sweep_rows(ours, pipe, values, args.steps, args.repeats, device)
    if not args.no_compile:
        rows |= compiled(pipe, args.steps, args.repeats)
    if large:
        rows['peak GPU memory, MB'] = torch.cuda.max_memory_allocated() / 2**20, ''
    about = dict(
        device=torch.cuda.get_device_name() if large else f'CPU (dry run), {os.cpu_count()} cores',
        dtype=str(dtype),
        steps=args.steps,
        repeats=args.repeats,
        **{m.__name__: m.__version__ for m in (torch, diffusers)},
    )
    report(rows, 'gpu' if large else 'gpu-dry-run', about)


if __name__ == '__main__':
    main()
