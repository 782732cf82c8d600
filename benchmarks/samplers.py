"""What do samplers cost beside the network?

Both sides of every ratio are timed in one run, alternating, and the medians compared.

    python benchmarks/samplers.py         # the embedded model on the CPU
    python benchmarks/samplers.py --busy  # on a busy machine: one thread, only its own time counts

k-diffusion is the other side if it is installed: `pip install --no-deps k-diffusion` is enough,
since only its `sampling.py` and `external.py` are read. Without it, its rows are absent.
The table is printed and kept as JSON beside this file.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import platform
import statistics
import sys
import time
import types
import warnings
import weakref
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cf_guidance import denoisers, karras

SAMPLERS = dict(
    euler=0,
    heun=0,
    dpm_2=0,
    dpmpp_2m=2,
    lms=4,
    euler_ancestral=0,
    dpm_2_ancestral=0,
    dpmpp_2s_ancestral=0,
    dpmpp_sde=0,
    dpmpp_2m_sde=2,
    dpmpp_3m_sde=3,
)  # order of multistep methods
EMBEDDED = ['euler', 'heun', 'dpmpp_2m', 'euler_ancestral', 'dpmpp_2m_sde']
BATCH = 16
clock = time.perf_counter


def k_diffusion():
    """k-diffusion's `sampling` and `external`, read as files; None if it is not installed.

    Its package imports much that these two do not need.
    """
    spec = importlib.util.find_spec('k_diffusion')
    if spec is None:
        return None

    def module(name, **attrs):
        m = sys.modules[name] = types.ModuleType(name)
        m.__dict__.update(attrs)
        return m

    def append_dims(x, n):
        return x[(...,) + (None,) * (n - x.ndim)]

    stub = importlib.util.find_spec('torchdiffeq') is None
    if stub:
        module('torchdiffeq', odeint=None)
    utils = module('k_diffusion_files.utils', append_dims=append_dims)
    pkg = module('k_diffusion_files', __path__=list(spec.submodule_search_locations), utils=utils)
    for name in ('sampling', 'external'):
        importlib.import_module(f'{pkg.__name__}.{name}')
    if stub:
        del sys.modules['torchdiffeq']
    return pkg


def alternate(fs, repeats):
    "Medians of what each of `fs` gives, a tuple of numbers, called in turn."
    for f in fs.values():
        f()
    runs = {k: [] for k in fs}
    for _ in range(repeats):
        for k, f in fs.items():
            runs[k].append(f())
    return {k: [statistics.median(o) for o in zip(*v, strict=True)] for k, v in runs.items()}


def seconds(fs, calls, repeats):
    "Median seconds of one call of each of `fs`."

    def timed(f):
        def _f():
            start = clock()
            for _ in range(calls):
                f()
            return ((clock() - start) / calls,)

        return _f

    return {k: v for k, (v,) in alternate({k: timed(f) for k, f in fs.items()}, repeats).items()}


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sigmas_of(n):
    return karras.get_sigmas_karras(n, 0.0292, 14.6146)


def sides():
    return dict(ours=karras, theirs=kd.sampling) if kd else dict(ours=karras)


def run(side, name, model, x, sigmas, **kw):
    return getattr(side, f'sample_{name}')(model, x, sigmas, disable=True, **kw)


def matrix(sigmas):
    "Rounding through a matrix of all distances, as k-diffusion does it, if that is not installed."
    logs = sigmas.log()

    def quantize(sigma):
        t = (sigma.log() - logs[:, None]).abs().argmin(dim=0).view(sigma.shape).float()
        lo, hi, w = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - w) * logs[lo] + w * logs[hi]).exp()

    return quantize


def quantizing(repeats):
    "Rounding 1,000 noise levels to those of Stable Diffusion."
    D, sigma = denoisers.DiscreteDenoiser(None), (normal(1000) * 2).exp()
    theirs = (
        kd.external.DiscreteEpsDDPMDenoiser(None, denoisers.scaled_linear(), True).float()
        if kd
        else None
    )
    by_distances = matrix(D.sigmas)
    fs = dict(
        ours=lambda: D.quantize_sigma(sigma),
        there_and_back=lambda: D.t_to_sigma(D.sigma_to_t(sigma)),
        matrix=lambda: by_distances(sigma),
    )
    if kd:
        fs['matrix'] = lambda: theirs.t_to_sigma(theirs.sigma_to_t(sigma))
    assert all(torch.allclose(f(), D.quantize_sigma(sigma), rtol=1e-5) for f in fs.values())
    t = seconds(fs, 100, repeats)
    return {
        'quantize_sigma of 1,000 levels, us': (t['ours'] * 1e6, ''),
        "  t_to_sigma(sigma_to_t()), k-diffusion's, ratio": (t['matrix'] / t['ours'], 'goal 5'),
        '  t_to_sigma(sigma_to_t()), ours, ratio': (t['there_and_back'] / t['ours'], ''),
    }


def stopwatch(f):
    "`f`, which notes the seconds spent in it under `.seconds`."

    def _f(*args, **kwargs):
        start = clock()
        try:
            return f(*args, **kwargs)
        finally:
            _f.seconds += clock() - start

    _f.seconds = 0.0
    return _f


def guided(net, neg, w):
    "The network under guidance, as one writes it for k-diffusion."
    D = kd.external.DiscreteEpsDDPMDenoiser(net, denoisers.scaled_linear(), True).float()
    D.get_eps = lambda *args, **cond: net(*args, **cond).sample

    def model(x, sigma, encoder_hidden_states):
        both = torch.cat([neg.expand_as(encoder_hidden_states), encoder_hidden_states])
        u, c = D(torch.cat([x] * 2), torch.cat([sigma] * 2), encoder_hidden_states=both).chunk(2)
        return u + (c - u) * w

    return model


def embedded(repeats, steps):
    "Share of the time outside the network, and that time per step, with the guided model."
    from diffusers import StableDiffusionPipeline

    from cf_guidance.guided import GuidedDenoiser
    from cf_guidance.lab.fashion import fashion_path

    m = StableDiffusionPipeline.from_pretrained(fashion_path())
    emb = m.encode_prompt(['a red sneaker on a blue background', ''], 'cpu', 1, False)[0].detach()
    x, sigmas = normal(BATCH, 4, 8, 8) * 14.6146, sigmas_of(steps)
    cond, neg = dict(encoder_hidden_states=emb[:1].expand(BATCH, -1, -1)), emb[1:]
    D = denoisers.DiscreteDenoiser(m.unet)
    models = dict(ours=GuidedDenoiser(D, dict(encoder_hidden_states=neg), w=4.0))
    if kd:
        models['theirs'] = guided(m.unet, neg, 4.0)
    m.unet.forward = inside = stopwatch(m.unet.forward)

    def once(name, side):
        inside.seconds, start = 0.0, clock()
        run(sides()[side], name, models[side], x, sigmas, extra_args=cond)
        total = clock() - start
        return 1 - inside.seconds / total, (total - inside.seconds) / steps

    t, rows = (
        alternate({k: partial(once, *k) for k in itertools.product(EMBEDDED, models)}, repeats),
        {},
    )
    for name in EMBEDDED:
        share, outside = t[name, 'ours']
        (
            rows[f'{name}: share of time outside the network'],
            rows[f'  {name}: ms a step outside it'],
        ) = (share, 'goal 0.03'), (outside * 1e3, '')
        if kd:
            rows[f"  {name}: k-diffusion's share"], rows[f'  {name}: ms outside, ours / theirs'] = (
                (t[name, 'theirs'][0], ''),
                (outside / t[name, 'theirs'][1], 'goal 1'),
            )
    return rows


def free(repeats, steps):
    "The loop alone: a model that returns a tensor it has, and noise that is ready."
    x, x0, sigmas = normal(BATCH, 4, 8, 8) * 14.6146, normal(BATCH, 4, 8, 8) / 2, sigmas_of(steps)

    def model(x, sigma):
        return x0

    def ready(sigma, sigma_next):
        return x0

    rows = {}
    for name in SAMPLERS:
        kw = dict(noise_sampler=ready) if name.endswith(('ancestral', 'sde')) else {}
        t = seconds(
            {k: partial(run, s, name, model, x, sigmas, **kw) for k, s in sides().items()},
            10,
            repeats,
        )
        rows[f'{name}: loop alone, us a step'] = t['ours'] / steps * 1e6, ''
        if kd:
            rows[f'  {name}: ours / theirs'] = t['ours'] / t['theirs'], 'goal 1'
    return rows


def noises(repeats, steps):
    "Noise for all steps, one seed per sample."
    return {k: v for size in (8, 64) for k, v in noises_of(size, repeats, steps).items()}


def noises_of(size, repeats, steps):
    x, sigmas = normal(BATCH, 4, size, size), sigmas_of(steps)

    def gens():
        return [torch.Generator().manual_seed(i) for i in range(BATCH)]

    def draw(noise):
        for a, b in itertools.pairwise(sigmas[:-1]):
            noise(a, b)

    def fresh():
        gs = gens()
        draw(lambda a, b: karras.randn(x.shape, gs))

    fs = {
        'fresh noise': fresh,
        'Brownian interval': lambda: draw(karras.brownian_noise(x, sigmas, gens())),
        'Brownian tree': lambda: draw(karras.brownian_noise(x, sigmas, gens(), tree=True)),
    }
    if kd:
        tree, seeds = kd.sampling.BrownianTreeNoiseSampler, list(range(BATCH))
        fs["Brownian tree, k-diffusion's"] = lambda: draw(tree(x, sigmas[-2], sigmas[0], seeds))
    t, of = seconds(fs, 1, max(3, repeats // 3)), f'{BATCH} x 4 x {size} x {size}, ms a step'
    return {f'{k}, {of}': (v / (steps - 1) * 1e3, '') for k, v in t.items()}


class Alive(TorchDispatchMode):
    "Bytes alive in tensors made inside, now and at most."

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def free(self, key, n):
        self.known.discard(key)
        self.now -= n

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for o in {t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)}:
            if o._cdata in self.known:
                continue
            self.known.add(o._cdata)
            self.now += o.nbytes()
            weakref.finalize(o, self.free, o._cdata, o.nbytes())
        self.most = max(self.most, self.now)
        return out


def copies(side, name):
    """Tensors of the size of x that are alive, beyond the caller's; evaluations per step.

    First those while the model runs, beyond the model's input, then those at any time.
    """
    x, sigmas, kept = normal(2, 4, 128, 128) * 14.6146, sigmas_of(8), []

    def model(z, sigma):
        kept.append(alive.now / x.nbytes - (z is not x))
        return z.clone()

    kw = (
        dict(noise_sampler=lambda a, b: torch.ones_like(x))
        if name.endswith(('ancestral', 'sde'))
        else {}
    )
    with Alive() as alive:
        run(side, name, model, x, sigmas, **kw)
    return round(max(kept), 1), round(alive.most / x.nbytes, 1), len(kept) / 8


def memory():
    "Memory and evaluations."
    rows = {}
    for name, order in SAMPLERS.items():
        (kept, most, nfe), *other = (copies(s, name) for s in sides().values())
        rows[f'{name}: copies of x while the model runs'] = kept, f'goal {order + 3}'
        (
            rows[f'  {name}: at any time, with what the model gave'],
            rows[f'  {name}: evaluations a step, 8 steps'],
        ) = (most, ''), (nfe, '')
        for kept, most, _ in other:
            (
                rows[f"  {name}: k-diffusion's copies while the model runs"],
                rows[f"  {name}: k-diffusion's at any time"],
            ) = (kept, ''), (most, '')
    return rows


def about(args, **more):
    "What the rows were measured on and with, for the JSON file."
    device = getattr(args, 'device', 'CPU')
    return dict(
        device=f'{platform.machine()} {device}, {torch.get_num_threads()} threads',
        clock=clock.__name__,
        batch=BATCH,
        steps=args.steps,
        repeats=args.repeats,
        torch=torch.__version__,
        **more,
    )


def main():
    from sweep import report

    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--steps', type=int, default=10, help='sampling steps')
    p.add_argument('--repeats', type=int, default=9, help='of which the median is taken')
    p.add_argument(
        '--busy',
        action='store_true',
        help='one thread, and its own time: other programs on the machine do not count',
    )
    args = p.parse_args()
    global clock
    if args.busy:
        clock = time.thread_time
        torch.set_num_threads(1)
    warnings.filterwarnings(
        'ignore', 'Should have t[ab]', module='torchsde'
    )  # k-diffusion asks a little beyond the ends of its paths
    rows = {
        **quantizing(args.repeats),
        **embedded(args.repeats, args.steps),
        **free(args.repeats, args.steps),
        **noises(args.repeats, args.steps),
        **memory(),
    }
    version = importlib.metadata.version('k-diffusion') if kd else 'not installed: no rows'
    report(rows, 'samplers', about(args, k_diffusion=version))


if __name__ == '__main__':
    kd = k_diffusion()
    main()
