"""How fast is a sweep, and how far from the limit of the machine?

The limit is a product of large matrices, timed in the same run. All that is compared is timed in
turn. A ratio is the median of the ratios of single turns, so it holds on a busy machine too.

    python benchmarks/sweep.py            # the embedded model on the CPU
    python benchmarks/sweep.py --compile  # torch.compile as well: a minute, and a C++ compiler
    python benchmarks/sweep.py --job      # the pictures of `cf_sweep` without arguments, no more

The table is printed and, without `--job`, kept as JSON beside this file. `gpu.py` is for a GPU.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from copy import copy, deepcopy
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

from cf_guidance.lab.backends import with_backend
from cf_guidance.lab.commands import _PROMPTS
from cf_guidance.lab.fashion import quiet
from cf_guidance.lab.sweeps import create_expts, run
from cf_guidance.pipelines import MinimalDiffusion, embedded_path
from cf_guidance.transforms import TNormGuidance

HERE = Path(__file__).parent
PROMPT = 'a red sneaker on a blue background'
ENV = {**os.environ, 'PYTHONPATH': str(HERE.parent.resolve())}


def clock(f, device='cpu'):
    "Seconds that `f` takes."
    start = time.perf_counter()
    f()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def turns(fs, repeats, device='cpu'):
    "Seconds of each of `fs` in each turn; the first turn does not count."
    for f in fs.values():
        f()
    rounds = [{k: clock(f, device) for k, f in fs.items()} for _ in range(repeats)]
    return {k: [o[k] for o in rounds] for k in fs}


def ratio(times, slow, fast):
    "How many times as fast, in the median turn."
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def matmul(n=1024, dtype=torch.float32, device='cpu', calls=4):
    "A product of large matrices, and the operations in it."
    a = torch.randn(n, n, device=device).to(dtype)

    def products():
        for _ in range(calls):
            a @ a

    return products, calls * 2 * n**3


def operations(net, inputs):
    "Floating-point operations in one row of a forward."
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*inputs)
    return counter.get_total_flops() / len(inputs[0])


def rows_of(net, n):
    "Inputs of a U-Net."
    size, width = net.config.sample_size, net.config.cross_attention_dim
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, net.config.in_channels, size, size, generator=g)
    text = torch.randn(n, 12, width, generator=g)
    like = dict(device=net.device, dtype=net.dtype)
    return x.to(**like), torch.linspace(1, 900, n, device=net.device), text.to(**like)


def networks(pipe, compiled):
    "The U-Net, run in different ways."
    last = deepcopy(pipe.unet).to(memory_format=torch.channels_last)
    out = dict(torch=pipe.unet, channels_last=last)
    for name in ['bf16', 'onnx'] + ['compile'] * compiled:
        out[name] = with_backend(pipe, name).unet
    return out


@torch.no_grad()
def evaluations(nets, batches, repeats):
    "Evaluations per second of a bare network, and the share of the limit that they reach."
    rows, flops = {}, operations(nets['torch'], rows_of(nets['torch'], 1))
    rows['operations of one evaluation, millions'] = flops / 1e6, ''
    for n in batches:
        inputs, calls = rows_of(nets['torch'], n), max(1, 16 // n)

        def several(net, inputs=inputs, calls=calls):
            for _ in range(calls):
                net(*inputs)

        product, work = matmul()
        fs = {k: lambda net=net, f=several: f(net) for k, net in nets.items()}
        t = turns({'limit': product, **fs}, repeats)
        limit = work / statistics.median(t['limit'])
        rows[f'batch {n}: limit (matrix product), GFLOP/s'] = limit / 1e9, ''
        for k in nets:
            rate = n * calls / statistics.median(t[k])
            share = ratio(t, 'limit', k) * n * calls * flops / work
            rows[f'  batch {n}: {k}, evaluations/s'] = rate, ''
            rows[f'  batch {n}: {k}, share of the limit'] = share, ''
        for k in list(nets)[1:]:
            goal = {('onnx', 2): 'goal 2.5'}.get((k, n), '')
            rows[f'  batch {n}: torch / {k}'] = ratio(t, 'torch', k), goal
    return rows


def default_job(pipe, steps, values, repeats):
    "The pictures that `cf_sweep` draws without arguments, without start and measurements."
    expts = create_expts({'g': torch.linspace(0.01, 0.3, values).tolist()}, num_steps=steps)
    seen = {}

    def job(name):
        seen[name] = run(_PROMPTS, expts, TNormGuidance, [0, 1], pipeline=ways[name])

    ways = {k: with_backend(pipe, k) for k in ('torch', 'onnx', 'bf16')}
    product, work = matmul()
    t = turns({'limit': product, **{k: lambda k=k: job(k) for k in ways}}, repeats)
    flops = operations(pipe.unet, rows_of(pipe.unet, 1)) * int(seen['torch']['nfe'].sum())
    apart = (seen['torch']['pixels'] - seen['onnx']['pixels']).abs().max().item()
    rows = {f'default job: {k}, s': (statistics.median(t[k]), '') for k in ways}
    for k in ways:
        share = ratio(t, 'limit', k) * flops / work
        rows[f'  default job: {k}, share of the limit'] = share, ''
    rows['  default job: torch / onnx'] = ratio(t, 'torch', 'onnx'), 'goal 1.4'
    rows['  default job: torch / bf16'] = ratio(t, 'torch', 'bf16'), ''
    rows['  default job: largest difference of a pixel, onnx'] = apart, 'goal 0.0001'
    return rows


def sweep_rows(ours, stock, values, steps, repeats, device='cpu', fast=None):
    "One batch, a loop over the same code, and as many calls of diffusers' pipeline."
    stock = copy(stock)
    stock.set_progress_bar_config(disable=True)
    values = torch.linspace(1.5, 7.5, values).tolist()
    expts = create_expts({'g': values}, num_steps=steps)

    def batch(pipe):
        run(PROMPT, expts, generator=0, pipeline=pipe)

    def loop(pipe):
        for e in expts:
            run(PROMPT, [e], generator=0, pipeline=pipe)

    def one_call_each():
        for v in values:
            g = torch.Generator().manual_seed(0)
            stock(PROMPT, guidance_scale=v, num_inference_steps=steps, generator=g)

    fs = dict(batch=lambda: batch(ours), loop=lambda: loop(ours), diffusers=one_call_each)
    if fast:
        faster = with_backend(ours, fast)
        fs |= {'fast batch': lambda: batch(faster), 'fast loop': lambda: loop(faster)}
    t, name = turns(fs, repeats, device), f'{len(values)} values x {steps} steps'
    s = {k: (statistics.median(v), '') for k, v in t.items()}
    rows = {
        f'{name} in one batch, s': s['batch'],
        '  the loop over the same code, s': s['loop'],
        "  diffusers' pipeline, one call per value, s": s['diffusers'],
        'loop / batch': (ratio(t, 'loop', 'batch'), 'goal 3'),
        'diffusers / batch': (ratio(t, 'diffusers', 'batch'), 'goal 3'),
    }
    if fast:
        rows |= {
            f'{name} in one batch by {fast}, s': s['fast batch'],
            f'  the loop by {fast}, s': s['fast loop'],
            f'batch / batch by {fast}': (ratio(t, 'batch', 'fast batch'), 'goal 1.4'),
            f'diffusers / batch by {fast}': (ratio(t, 'diffusers', 'fast batch'), ''),
        }
    return rows


def outside(pipe, f, device='cpu'):
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
    t = turns({k: lambda v=v: fresh(v) for k, v in code.items()}, repeats)
    return statistics.median(b - a for a, b in zip(t['base'], t['ours'], strict=True))


def cold_start():
    "Seconds and peak megabytes of the default `cf_sweep` in a fresh process."
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as d:
        start = time.perf_counter()
        command = [sys.executable, '-m', 'cf_guidance._cli']
        subprocess.run(command, cwd=d, check=True, env=ENV, **silent)
        seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def show(rows):
    for k, (v, goal) in rows.items():
        print(f'  {k:58} {v:8.4f}   {goal}')


def report(rows, name, about):
    "Print the table and keep it."
    for k, v in about.items():
        print(f'{k}: {v}')
    show(rows)
    kept = dict(about, rows={k: v for k, (v, _) in rows.items()})
    (HERE / f'{name}.json').write_text(json.dumps(kept, indent=1) + '\n')


def parsed():
    "The arguments of the command line."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--values', type=int, default=12, help='guidance values in the sweep')
    p.add_argument('--steps', type=int, default=50, help='sampling steps')
    p.add_argument('--batches', type=int, nargs='+', default=[1, 2, 16, 96], help='rows at once')
    p.add_argument('--repeats', type=int, default=5, help='turns, of which the median is taken')
    p.add_argument('--threads', type=int, help="of PyTorch and ONNX Runtime; default: PyTorch's")
    p.add_argument('--job', action='store_true', help='the default job only; nothing is kept')
    p.add_argument('--warm', action='store_true', help='without the cold start of cf_sweep')
    p.add_argument('--compile', action='store_true', help='torch.compile as well')
    return p.parse_args()


def main():
    args = parsed()
    quiet()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
    ours = MinimalDiffusion(pipe, progress=False).load()
    if args.job:
        return show(default_job(ours, args.steps, min(args.values, 10), args.repeats))
    load = os.getloadavg()[0]
    rows = evaluations(networks(pipe, args.compile), args.batches, 3 * args.repeats)
    rows |= default_job(ours, args.steps, min(args.values, 10), args.repeats)
    rows |= sweep_rows(ours, pipe, args.values, args.steps, args.repeats, fast='onnx')
    expts = create_expts({'g': [1.5, 7.5]}, num_steps=args.steps)
    share = outside(pipe, lambda: run(PROMPT, expts, generator=0, pipeline=ours))
    rows['share of time outside the networks'] = share, 'goal 0.05'
    if not args.warm:
        seconds, megabytes = cold_start()
        rows['default cf_sweep from a cold start, s'] = seconds, 'goal 30'
        rows['  its peak memory, MB'] = megabytes, 'goal 1500'
    added = import_seconds(args.repeats)
    rows['import of the package over torch and diffusers, s'] = added, 'goal 0.3'
    about = dict(
        device=f'{platform.machine()} CPU, {torch.get_num_threads()} threads',
        load=f'{load:.1f} to {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores',
        values=args.values,
        steps=args.steps,
        repeats=args.repeats,
        **{m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
        onnxruntime=importlib.metadata.version('onnxruntime'),
    )
    report(rows, 'sweep', about)


if __name__ == '__main__':
    main()
