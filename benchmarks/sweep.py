"""How fast is a sweep? Both sides of every ratio are timed in one run, alternating; medians count.

    python benchmarks/sweep.py          # the embedded model on the CPU
    python benchmarks/sweep.py --sd15   # Stable Diffusion 1.5's size, random weights, on a GPU

The table is printed and kept as JSON beside this file.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from cf_guidance.lab.fashion import quiet
from cf_guidance.lab.sweeps import create_expts, run
from cf_guidance.pipelines import MinimalDiffusion, embedded_path

HERE = Path(__file__).parent
PROMPT = 'a red sneaker on a blue background'
ENV = {**os.environ, 'PYTHONPATH': str(HERE.parent.resolve())}


def clock(f, device):
    "Seconds that `f` takes."
    start = time.perf_counter()
    f()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(fs, repeats, device):
    "Median seconds of each of `fs`, called in turn."
    for f in fs.values():
        f()
    times = {k: [] for k in fs}
    for _ in range(repeats):
        for k, f in fs.items():
            times[k].append(clock(f, device))
    return {k: statistics.median(v) for k, v in times.items()}


def embedded():
    "The embedded checkpoint."
    return StableDiffusionPipeline.from_pretrained(embedded_path())


def sd15(size=64):
    "Networks of Stable Diffusion 1.5's shape with random weights."
    pipe = embedded()
    pipe.tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    unet = UNet2DConditionModel(sample_size=size, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=size * 8,
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=pipe.tokenizer,
        unet=unet,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to('cuda', torch.float16)


def sweep_times(ours, stock, values, steps, repeats, device):
    "One batch, a loop over the same code, and as many calls of diffusers' pipeline."
    stock.set_progress_bar_config(disable=True)
    expts = create_expts({'g': values}, num_steps=steps)

    def batch():
        run(PROMPT, expts, generator=0, pipeline=ours)

    def loop():
        for e in expts:
            run(PROMPT, [e], generator=0, pipeline=ours)

    def one_call_each():
        for v in values:
            g = torch.Generator().manual_seed(0)
            stock(PROMPT, guidance_scale=v, num_inference_steps=steps, generator=g)

    times = dict(batch=batch, loop=loop, diffusers=one_call_each)
    return batch, alternate(times, repeats, device)


def outside(pipe, f, device):
    "Share of the time of `f` that is not spent in the U-Net, the autoencoder and the text encoder."
    inside = 0.0

    def timed(g):
        def timed_call(*args, **kwargs):
            nonlocal inside
            out = None

            def call():
                nonlocal out
                out = g(*args, **kwargs)

            if device == 'cuda':
                torch.cuda.synchronize()
            inside += clock(call, device)
            return out

        return timed_call

    spots = [(pipe.unet, 'forward'), (pipe.vae, 'decode'), (pipe.text_encoder, 'forward')]
    for m, k in spots:
        setattr(m, k, timed(getattr(m, k)))
    try:
        total = clock(f, device)
    finally:
        for m, k in spots:
            delattr(m, k)
    return 1 - inside / total


def fresh(code):
    "Run `code` in a fresh Python."
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, env=ENV)


def import_seconds(repeats):
    "Seconds that importing the package adds to importing torch and diffusers."
    base = 'import torch, diffusers'
    code = dict(base=base, ours=f'{base}, cf_guidance.lab.sweeps')
    t = alternate({k: lambda v=v: fresh(v) for k, v in code.items()}, repeats, 'cpu')
    return t['ours'] - t['base']


def cold_start():
    "Seconds and peak megabytes of the default `cf_sweep` in a fresh process."
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as d:
        start = time.perf_counter()
        command = [sys.executable, '-m', 'cf_guidance._cli']
        subprocess.run(command, cwd=d, check=True, env=ENV, **silent)
        seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def report(rows, name, about):
    "Print the table and keep it."
    for k, v in about.items():
        print(f'{k}: {v}')
    for k, (v, goal) in rows.items():
        print(f'  {k:58} {v:8.3f}   {goal}')
    kept = dict(about, rows={k: v for k, (v, _) in rows.items()})
    (HERE / f'{name}.json').write_text(json.dumps(kept, indent=1) + '\n')


def parsed():
    "The arguments of the command line."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--sd15', action='store_true', help="Stable Diffusion 1.5's size on a GPU")
    p.add_argument('--values', type=int, default=12, help='guidance values in the sweep')
    p.add_argument('--steps', type=int, default=50, help='sampling steps')
    p.add_argument('--repeats', type=int, default=3, help='of which the median is taken')
    args = p.parse_args()
    if args.sd15 and not torch.cuda.is_available():
        p.error('--sd15 needs a GPU')
    return args


def measure_sweep(args, rows, device):
    "The rows on one batch of values."
    pipe = sd15() if args.sd15 else embedded()
    dtype = torch.float16 if args.sd15 else torch.float32
    ours = MinimalDiffusion(pipe, device, dtype, progress=False).load()
    values = torch.linspace(1.5, 7.5, args.values).tolist()
    batch, t = sweep_times(ours, pipe, values, args.steps, args.repeats, device)
    rows[f'{args.values} values x {args.steps} steps in one batch, s'] = t['batch'], ''
    rows['  the loop over the same code, s'] = t['loop'], ''
    rows["  diffusers' pipeline, one call per value, s"] = t['diffusers'], ''
    rows['loop / batch'] = t['loop'] / t['batch'], 'goal 3'
    rows['diffusers / batch'] = t['diffusers'] / t['batch'], 'goal 3'
    rows['share of time outside the networks'] = outside(pipe, batch, device), 'goal 0.05'


def main():
    args = parsed()
    quiet()
    device = 'cuda' if args.sd15 else 'cpu'
    where = f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    rows = {}
    if not args.sd15:
        seconds, megabytes = cold_start()
        rows['default cf_sweep from a cold start, s'] = seconds, 'goal 30'
        rows['  its peak memory, MB'] = megabytes, 'goal 1500'
        added = import_seconds(args.repeats)
        rows['import of the package over torch and diffusers, s'] = added, 'goal 0.3'
    measure_sweep(args, rows, device)
    if args.sd15:
        rows['peak GPU memory, MB'] = torch.cuda.max_memory_allocated() / 2**20, ''
    about = dict(
        device=torch.cuda.get_device_name() if args.sd15 else where,
        values=args.values,
        steps=args.steps,
        repeats=args.repeats,
        **{m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
    )
    report(rows, 'sweep-sd15' if args.sd15 else 'sweep', about)


if __name__ == '__main__':
    main()
