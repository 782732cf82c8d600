"""Is sampling and training as fast as the network allows?

Both sides of every ratio are timed in one run, alternating, and the medians compared.

    python benchmarks/continuous.py         # the embedded model's network, on the CPU
    python benchmarks/continuous.py --busy  # on a busy machine: processor time of one thread

The networks are untrained, which makes no difference to their speed. The table is printed and kept
as JSON beside this file.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from functools import partial

import samplers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler
from samplers import BATCH, about, alternate, stopwatch
from sweep import report

from cf_guidance import continuous
from cf_guidance.lab import training as lab


def generator():
    return torch.Generator().manual_seed(0)


def share(sample, net):
    "Seconds of a call, and the share of them inside the network."

    def once():
        net.forward.seconds, start = 0.0, samplers.clock()
        sample()
        total = samplers.clock() - start
        return total, net.forward.seconds / total

    return once


def sampling(repeats, steps):
    "DDIM with the small network, with and without guidance."
    net = continuous.fashion_unet(10, small=True).eval()
    net.forward = stopwatch(net.forward)
    model, labels = continuous.ContinuousDDPM(net, 'v', n_classes=10), torch.arange(BATCH) % 10
    runs = {
        k: share(
            partial(continuous.ddim, m, (BATCH, 1, 32, 32), n_steps=steps, generator=generator()),
            net,
        )
        for k, m in {'ddim': model, 'ddim, guided': model.guided(labels, 2.0)}.items()
    }
    rows = {}
    for k, (t, inside) in alternate(runs, repeats).items():
        rows[f'{k}: share of time inside the network'], rows[f'  {k}: images a second'] = (
            (inside, 'goal 0.9'),
            (BATCH / t, ''),
        )
    return rows


def pipeline(repeats, steps, small):
    "Against diffusers' pipeline with the same network and the same noise on the way."
    net = continuous.fashion_unet(small=small).eval()
    pipe = DDIMPipeline(net, DDIMScheduler(clip_sample=True))
    pipe.set_progress_bar_config(disable=True)
    model = continuous.ContinuousDDPM(net)

    def timed(f):
        def once():
            start = samplers.clock()
            f()
            return (samplers.clock() - start,)

        return once

    t = alternate(
        dict(
            ours=timed(
                lambda: continuous.ddim(
                    model, (BATCH, 1, 32, 32), n_steps=steps, generator=generator()
                )
            ),
            theirs=timed(
                lambda: pipe(
                    BATCH, generator(), eta=1.0, num_inference_steps=steps, output_type='np'
                )
            ),
        ),
        repeats,
    )
    name = 'small network' if small else "lesson's network"
    return {
        f'{name}: images a second': (BATCH / t['ours'][0], ''),
        f"  {name}: ours / DDIMPipeline's": (t['theirs'][0] / t['ours'][0], 'goal 1'),
    }


class Stop(Exception):
    pass


class Ticking(continuous.ContinuousDDPM):
    "Notes the time at each batch, and stops after enough of them."

    def batch(self, *args):
        self.ticks.append(samplers.clock())
        if len(self.ticks) > self.enough:
            raise Stop
        return super().batch(*args)


def plain(model, data, batch):
    "The loop as one writes it without a library, with the same optimiser and the same precision."
    (grey, labels), net = data, model.net
    opt = torch.optim.AdamW(net.parameters(), 1e-3, (0.9, 0.99), fused=True)
    while True:
        model.ticks.append(samplers.clock())
        if len(model.ticks) > model.enough:
            raise Stop
        i = torch.randint(len(grey), (batch,))
        x_0, y = (
            F.pad(grey[i], (2, 2, 2, 2))[:, None].float() / 127.5 - 1,
            torch.where(torch.rand(batch) < 0.15, 10, labels[i]),
        )
        t, eps = torch.rand(batch), torch.randn(batch, 1, 32, 32)
        a, s = ((f(t * torch.pi / 2))[:, None, None, None] for f in (torch.cos, torch.sin))
        loss = F.mse_loss(
            net(a * x_0 + s * eps, 1000 * t, class_labels=y).sample, a * eps - s * x_0
        )
        loss.backward()
        opt.step()
        opt.zero_grad()


def ours(model, data, batch):
    "`train`, far from the steps at which it keeps a snapshot."
    with tempfile.TemporaryDirectory() as d:
        lab.train(model, data, d, 100_000, batch, accelerator=Accelerator(cpu=True), progress=False)


def training(repeats, steps, batch=64):
    "Images a second of `train` and of a plain loop, the small network in single precision."
    data, net = (
        (torch.randint(256, (2000, 28, 28), dtype=torch.uint8), torch.arange(2000) % 10),
        continuous.fashion_unet(10, small=True),
    )

    def once(loop):
        model = Ticking(net, 'v', n_classes=10)
        model.ticks, model.enough = [], steps + 1
        with contextlib.suppress(Stop):
            loop(model, data, batch)
        return (
            statistics.mean(b - a for a, b in itertools.pairwise(model.ticks[1:])),
        )  # the first step makes the optimiser's state

    t = alternate({f.__name__: partial(once, f) for f in (ours, plain)}, repeats)
    speed = t['plain'][0] / t['ours'][0] * (1 - saving(net) / 60)
    return {
        'training: images a second': (batch / t['ours'][0], ''),
        '  training: ours, with its saves / plain loop': (speed, 'goal 0.97'),
    }


def saving(net):
    "Seconds to save the state and the weights, which is done once a minute."
    seconds, save = [], lab._Run.save

    def timed(run):
        start = samplers.clock()
        save(run)
        seconds.append(samplers.clock() - start)

    model, data = (
        continuous.ContinuousDDPM(net, 'v', n_classes=10),
        (torch.zeros(64, 28, 28, dtype=torch.uint8), torch.arange(64) % 10),
    )
    lab._Run.save = timed
    try:
        with tempfile.TemporaryDirectory() as d:
            lab.train(model, data, d, 1, accelerator=Accelerator(cpu=True), progress=False)
    finally:
        lab._Run.save = save
    return seconds[0]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--steps', type=int, default=100, help='sampling steps')
    p.add_argument('--train', type=int, default=24, help='training steps')
    p.add_argument('--repeats', type=int, default=3, help='of which the median is taken')
    p.add_argument(
        '--lesson', action='store_true', help="the lesson's network of 15.9 million parameters, too"
    )
    p.add_argument(
        '--busy',
        action='store_true',
        help='one thread, and its own time: other programs on the machine do not count',
    )
    args = p.parse_args()
    if args.busy:
        samplers.clock = time.thread_time
        torch.set_num_threads(1)
    rows = {
        **sampling(args.repeats, args.steps),
        **pipeline(args.repeats, args.steps, True),
        **(pipeline(args.repeats, args.steps, False) if args.lesson else {}),
        **training(args.repeats, args.train),
    }
    report(rows, 'continuous', about(args))


if __name__ == '__main__':
    main()
