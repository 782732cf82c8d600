"""How fast is a sweep? Both sides of every ratio are timed in one run, alternating, and the medians compared.

    python benchmarks/sweep.py            # the embedded model on the CPU
    python benchmarks/sweep.py --sd15     # a U-Net of Stable Diffusion 1.5's size with random weights, on a GPU in half precision

The table is printed and kept as JSON beside this file.
"""

import argparse, json, os, platform, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import torch

HERE = Path(__file__).parent
PROMPT = 'a red sneaker on a blue background'


def clock(f, device):
    "Seconds that `f` takes."
    t = time.perf_counter()
    f()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - t


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
    "The embedded checkpoint, in our pipeline and in diffusers' own."
    from diffusers import StableDiffusionPipeline
    from cf_guidance.lab.fashion import fashion_path
    from cf_guidance.pipelines import MinimalDiffusion

    return MinimalDiffusion(progress=False).load(), StableDiffusionPipeline.from_pretrained(
        fashion_path()
    )


def sd15(size=64):
    "Networks of Stable Diffusion 1.5's shape with random weights, in both pipelines."
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    ours, _ = embedded()
    ours.device, ours.dtype, ours.embedded, ours.tokenizer.model_max_length = (
        'cuda',
        torch.float16,
        False,
        77,
    )
    ours.text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
    )
    ours.unet = UNet2DConditionModel(
        sample_size=size, cross_attention_dim=768, attention_head_dim=8
    )
    ours.vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=size * 8,
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
    )
    for k in ('text_encoder', 'unet', 'vae'):
        setattr(ours, k, getattr(ours, k).to('cuda', torch.float16).eval())
    ours.factor = 8
    return ours, StableDiffusionPipeline(
        vae=ours.vae,
        text_encoder=ours.text_encoder,
        tokenizer=ours.tokenizer,
        unet=ours.unet,
        scheduler=ours.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sweep_times(ours, stock, values, steps, repeats):
    "One batch, the loop over the same code, and as many calls of diffusers' pipeline."
    from cf_guidance.lab.sweeps import create_expts, run

    stock.set_progress_bar_config(disable=True)
    expts = create_expts({'g': values}, num_steps=steps)

    def batch():
        run(PROMPT, expts, generator=0, pipeline=ours)

    def loop():
        for e in expts:
            run(PROMPT, [e], generator=0, pipeline=ours)

    def diffusers():
        for v in values:
            stock(
                PROMPT,
                guidance_scale=v,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0),
            )

    return batch, alternate(dict(batch=batch, loop=loop, diffusers=diffusers), repeats, ours.device)


def outside(ours, f):
    "Share of the time of `f` that is not spent in the U-Net, the autoencoder and the text encoder."
    inside = 0.0

    def timed(g):
        def _f(*args, **kwargs):
            nonlocal inside
            if ours.device == 'cuda':
                torch.cuda.synchronize()
            t = time.perf_counter()
            out = g(*args, **kwargs)
            if ours.device == 'cuda':
                torch.cuda.synchronize()
            inside += time.perf_counter() - t
            return out

        return _f

    spots = [(ours.unet, 'forward'), (ours.vae, 'decode'), (ours.text_encoder, 'forward')]
    for m, k in spots:
        setattr(m, k, timed(getattr(m, k)))
    try:
        total = clock(f, ours.device)
    finally:
        for m, k in spots:
            delattr(m, k)
    return 1 - inside / total


ENV = {**os.environ, 'PYTHONPATH': str(HERE.parent.resolve())}


def fresh(code):
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, env=ENV)


def import_seconds(repeats):
    "Seconds that importing the package adds to importing torch and diffusers."
    base = 'import torch, diffusers'
    t = alternate(
        dict(base=lambda: fresh(base), ours=lambda: fresh(f'{base}, cf_guidance.lab.sweeps')),
        repeats,
        'cpu',
    )
    return t['ours'] - t['base']


def cold_start():
    "Seconds and peak megabytes of the default `cf_sweep` in a fresh process."
    with tempfile.TemporaryDirectory() as d:
        t = time.perf_counter()
        subprocess.run(
            [sys.executable, '-m', 'cf_guidance.lab.sweeps'],
            cwd=d,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENV,
        )
        seconds = time.perf_counter() - t
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def report(rows, name, about):
    "Print the table and keep it."
    for k, v in about.items():
        print(f'{k}: {v}')
    for k, (v, goal) in rows.items():
        print(f'  {k:58} {v:8.3f}   {goal}')
    (HERE / f'{name}.json').write_text(
        json.dumps(dict(about, rows={k: v for k, (v, _) in rows.items()}), indent=1) + '\n'
    )


def main():
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
    from cf_guidance.lab.fashion import quiet

    quiet()
    import diffusers, transformers

    device = (
        torch.cuda.get_device_name()
        if args.sd15
        else f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    )
    rows = {}
    if not args.sd15:
        rows['default cf_sweep from a cold start, s'], rows['  its peak memory, MB'] = zip(
            cold_start(), ('goal 30', 'goal 1500')
        )
        rows['import of the package over torch and diffusers, s'] = (
            import_seconds(args.repeats),
            'goal 0.3',
        )
    ours, stock = sd15() if args.sd15 else embedded()
    values = torch.linspace(1.5, 7.5, args.values).tolist()
    batch, t = sweep_times(ours, stock, values, args.steps, args.repeats)
    rows[f'{args.values} values x {args.steps} steps in one batch, s'] = t['batch'], ''
    rows['  the loop over the same code, s'], rows["  diffusers' pipeline, one call a value, s"] = (
        (t['loop'], ''),
        (t['diffusers'], ''),
    )
    rows['loop / batch'], rows['diffusers / batch'] = (
        (t['loop'] / t['batch'], 'goal 3'),
        (t['diffusers'] / t['batch'], 'goal 3'),
    )
    rows['share of time outside the networks'] = outside(ours, batch), 'goal 0.05'
    if args.sd15:
        rows['peak GPU memory, MB'] = torch.cuda.max_memory_allocated() / 2**20, ''
    report(
        rows,
        'sweep-sd15' if args.sd15 else 'sweep',
        dict(
            device=device,
            values=args.values,
            steps=args.steps,
            repeats=args.repeats,
            **{m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
        ),
    )


if __name__ == '__main__':
    main()
