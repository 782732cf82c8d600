"""What does guidance cost beside the networks that it must run?

Both sides of every ratio are timed in one run, alternating, and the medians compared.

    python benchmarks/guided.py         # the embedded model and Stable Diffusion 1.5's shape, CPU
    python benchmarks/guided.py --busy  # on a busy machine: one thread, only its own time counts

The table is printed and kept as JSON beside this file.
"""

import argparse
import copy
import itertools
import math
import time

import samplers
import torch
from samplers import BATCH, about, alternate, normal, stopwatch
from sweep import report

PROMPTS = [
    f'a {colour} {garment}'
    for colour, garment in itertools.product(
        ('red', 'blue', 'green', 'yellow'), ('sneaker', 'dress', 'shirt', 'bag')
    )
]


def embedded():
    "The embedded model as a denoiser, another of its kind, conditions of a batch, empty prompt."
    from diffusers import StableDiffusionPipeline

    from cf_guidance.denoisers import DiscreteDenoiser
    from cf_guidance.lab.fashion import fashion_path, quiet

    quiet()
    pipe = StableDiffusionPipeline.from_pretrained(fashion_path())
    emb = pipe.encode_prompt([*PROMPTS, ''], 'cpu', 1, False)[0].detach()
    return (
        *(DiscreteDenoiser(o) for o in (pipe.unet, copy.deepcopy(pipe.unet))),
        dict(encoder_hidden_states=emb[:-1]),
        dict(encoder_hidden_states=emb[-1:]),
    )


def bare(D, rows, cond):
    "The network alone, on a batch of so many rows."
    x, t = normal(rows, 4, 8, 8), torch.full((rows,), 500)
    emb = cond['encoder_hidden_states'].repeat(rows // BATCH, 1, 1)
    return lambda: D.inner_model(x, t, emb)


def steps(D, other, cond, neg, repeats, calls):
    "One guided evaluation: the time in the networks, and the time beside it."
    from cf_guidance.guided import GuidedDenoiser, Term
    from cf_guidance.karras import get_sigmas_karras
    from cf_guidance.schedules import get_cos_sched
    from cf_guidance.transforms import full_norm

    x, sigmas, rows = (
        normal(BATCH, 4, 8, 8) * 3,
        get_sigmas_karras(50, D.sigma_min, D.sigma_max),
        {},
    )
    guided = {
        'CFG': GuidedDenoiser(D, neg, w=4.0),
        'CFG, a weight a step': GuidedDenoiser(
            D, neg, w=get_cos_sched(len(sigmas) - 1), sigmas=sigmas
        ),
        'CFG, a weight a sample': GuidedDenoiser(D, neg, w=torch.linspace(1.5, 7.5, BATCH)),
        'full_norm': GuidedDenoiser(D, neg, w=0.2, rule=full_norm),
        'CFG in an interval': GuidedDenoiser(D, neg, w=4.0, interval=(0.3, 5.0)),
        'CFG + autoguidance': GuidedDenoiser(D, Term(neg, 4.0), Term(other, 1.5)),
    }
    inside = {m: stopwatch(m.forward) for m in (D.inner_model, other.inner_model)}

    def once(f):
        def _f():
            for o in inside.values():
                o.seconds = 0.0
            start = samplers.clock()
            for _ in range(calls):
                f()
            return (samplers.clock() - start) / calls, sum(
                o.seconds for o in inside.values()
            ) / calls

        return _f

    fs = {k: once(lambda G=G: G(x, 3.0, **cond)) for k, G in guided.items()} | {
        'the denoiser alone': once(lambda: D(x, 3.0, **cond))
    }
    for m, f in inside.items():
        m.forward = f
    try:
        times = alternate(fs, repeats)
    finally:
        for m in inside:
            del m.forward
    for k, (total, net) in times.items():
        rows[f'{k}: overhead over its networks'] = (
            (total - net) / net,
            'goal 0.02' if k != 'the denoiser alone' else '',
        )
        rows[f'  {k}: us beside them'] = (total - net) * 1e6, ''
    t = samplers.seconds(
        {'guided': lambda: guided['CFG'](x, 3.0, **cond), 'bare': bare(D, 2 * BATCH, cond)},
        calls,
        repeats,
    )
    rows['CFG / the bare network on as many rows'] = t['guided'] / t['bare'], 'goal 1.02'
    return rows


def interval(D, cond, neg, repeats, n):
    "Sampling with guidance in a third of the steps, against guidance in all."
    from cf_guidance import karras
    from cf_guidance.guided import GuidedDenoiser

    sigmas = karras.get_sigmas_karras(n, D.sigma_min, D.sigma_max)
    third = len(sigmas[:-1]) // 3
    lo, hi = sigmas[2 * third].item(), sigmas[third].item()
    x = normal(BATCH, 4, 8, 8) * sigmas[0]
    models = {
        'full': GuidedDenoiser(D, neg, w=4.0),
        'interval': GuidedDenoiser(D, neg, w=4.0, interval=(lo, hi)),
        'none': D,
    }

    def run(G):
        return lambda: karras.sample(G, x, sigmas, karras.euler, cond)

    t = samplers.seconds({k: run(G) for k, G in models.items()}, 1, repeats)
    nfe = {k: int(G.run.nfe_per_sample[0]) for k, G in models.items() if k != 'none'}
    return {
        f'CFG in {len(sigmas) - 1} steps, s': (t['full'], ''),
        '  in a third of the steps / in all': (t['interval'] / t['full'], 'goal 0.69'),
        '  evaluations, likewise': (nfe['interval'] / nfe['full'], ''),
        '  unguided / in all': (t['none'] / t['full'], ''),
    }


def pag_pipeline(unet):
    "diffusers' pipeline for perturbed-attention guidance in the middle of a network."
    from diffusers import DDIMScheduler, StableDiffusionPAGPipeline, StableDiffusionPipeline

    from cf_guidance.lab.fashion import fashion_path

    pipe = StableDiffusionPipeline.from_pretrained(fashion_path())
    parts = {
        **pipe.components,
        'unet': unet or pipe.unet,
        'scheduler': DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True),
    }
    p = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers='mid')
    p.set_progress_bar_config(disable=True)
    return p


def pag(unet, n, batch, repeats):
    """PAG alone, weight 4 (their scale is 3), against diffusers' pipeline.

    The same latents at the end, and the time to get there.
    """
    from cf_guidance import karras
    from cf_guidance.attention import PAG
    from cf_guidance.denoisers import DiscreteDenoiser
    from cf_guidance.guided import GuidedDenoiser

    p = pag_pipeline(unet)
    unet, D = p.unet, DiscreteDenoiser(p.unet, p.scheduler.alphas_cumprod)
    emb, x = (
        normal(batch, 12, unet.config.cross_attention_dim),
        normal(batch, unet.config.in_channels, *(unet.config.sample_size,) * 2),
    )
    p.scheduler.set_timesteps(n)
    sigmas = torch.cat([D.t_to_sigma(p.scheduler.timesteps.float()), torch.zeros(1)])
    start = x * (1 + sigmas[0] ** 2).sqrt()
    G, cond = GuidedDenoiser(D, PAG(unet), w=4.0), dict(encoder_hidden_states=emb)
    fs = dict(ours=lambda: karras.sample(G, start, sigmas, karras.euler, cond))
    fs['theirs'] = lambda: (
        p(
            prompt_embeds=emb,
            guidance_scale=1.0,
            pag_scale=3.0,
            latents=x,
            num_inference_steps=n,
            output_type='latent',
        ).images
    )
    ends = {k: f() for k, f in fs.items()}
    assert all(
        torch.allclose(o, ends['theirs'], atol=1e-3 * ends['theirs'].abs().max().item())
        for o in ends.values()
    ), 'the latents differ'
    t = samplers.seconds(fs, 1, repeats)
    size = f'{sum(o.numel() for o in unet.parameters()) / 1e6:.0f} M parameters'
    name = f'PAG, {size}, latents of {unet.config.sample_size}, steps {n}'
    return {
        f'{name}: theirs, s': (t['theirs'], ''),
        f'  {name}: theirs / ours': (t['theirs'] / t['ours'], 'goal 1.15'),
    }


def by_hand(D, batch, cond, empty):
    "The same step as somebody would write it: a copy of the network, changed for its last rows."
    net = copy.deepcopy(D.inner_model)

    class LastThird:
        "Attention as the values of each position alone, in the last third of the rows."

        def __call__(self, attn, hidden_states, **_):
            q, k, v = (o(hidden_states) for o in (attn.to_q, attn.to_k, attn.to_v))
            n = 2 * batch
            heads = [o[:n].unflatten(2, (attn.heads, -1)).transpose(1, 2) for o in (q, k, v)]
            y = torch.nn.functional.scaled_dot_product_attention(*heads)
            return attn.to_out[0](torch.cat([y.transpose(1, 2).flatten(2), v[n:]]))

    for name, m in net.mid_block.named_modules():
        if name.endswith('attn1'):
            m.processor = LastThird()
    text = torch.cat([empty.expand_as(cond), cond, cond])

    def f(x, sigma):
        t = D.sigma_to_t(torch.full((3 * batch,), sigma))
        eps = net(x.repeat(3, 1, 1, 1) / math.sqrt(1 + sigma**2), t, text).sample
        neg, pos, pag = eps.chunk(3)
        return x - sigma * (pos + 3 * (pos - neg) + (pos - pag))

    return f


def cfg_pag(D, batch, repeats, goal):
    """One step of CFG and PAG in the middle, in one forward.

    With rows that join late, with all rows from the start, as the library decides, written by
    hand, and against the bare network on three rows per sample.
    """
    from cf_guidance import perturb
    from cf_guidance.attention import PAG
    from cf_guidance.guided import GuidedDenoiser, Term

    net, own = D.inner_model, perturb._MIN_POSITIONS_TO_JOIN
    size, width = net.config.sample_size, net.config.cross_attention_dim
    x, emb = normal(batch, net.config.in_channels, size, size), normal(batch, 12, width)
    cond, empty = dict(encoder_hidden_states=emb), dict(encoder_hidden_states=emb[:1] * 0)
    rows, three = torch.cat([x] * 3), torch.cat([emb] * 3)

    def step(worth_it):
        G = GuidedDenoiser(D, Term(empty, 4.0), Term(PAG(D), 2.0))

        def f():
            perturb._MIN_POSITIONS_TO_JOIN = worth_it
            try:
                return G(x, 3.0, **cond)
            finally:
                perturb._MIN_POSITIONS_TO_JOIN = own

        return f

    hand = by_hand(D, batch, emb, emb[:1] * 0)
    fs = {'decided': step(own), 'late rows': step(0), 'full rows': step(math.inf)}
    fs['by hand'] = lambda: hand(x, 3.0)
    for k in ('late rows', 'by hand'):
        assert torch.allclose(fs[k](), fs['full rows'](), atol=1e-4), f'{k}: the result differs'
    fs['three bare rows'] = lambda: net(rows, torch.full((3 * batch,), 500), three)
    t = samplers.seconds(fs, 1, repeats)
    name = f'CFG + PAG, latents of {size}, batch {batch}'
    fastest = min(t[k] for k in ('late rows', 'full rows', 'by hand'))
    return {f'{name}: {k}, ms': (v * 1e3, '') for k, v in t.items()} | {
        f'  {name}: ours / the fastest of three': (t['decided'] / fastest, 'goal 1.05'),
        f'  {name}: ours / three bare rows': (t['decided'] / t['three bare rows'], goal),
    }


def sd15(size):
    "A network in the shape of Stable Diffusion 1.5, untrained, for latents of `size`."
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(cross_attention_dim=768, sample_size=size).eval()


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--steps', type=int, default=30, help='sampling steps')
    p.add_argument('--calls', type=int, default=10, help='calls that are timed together')
    p.add_argument('--repeats', type=int, default=9, help='of which the median is taken')
    p.add_argument(
        '--sd15',
        type=int,
        default=64,
        help='size of latents for the large network (4 GB, minutes); 0: without it',
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
    from cf_guidance.denoisers import DiscreteDenoiser

    D, other, cond, neg = embedded()
    with torch.no_grad():
        rows = {
            **steps(D, other, cond, neg, args.repeats, args.calls),
            **interval(D, cond, neg, args.repeats, args.steps),
            **pag(None, args.steps, BATCH, args.repeats),
        }
        for batch in (1, 4, 16):
            rows |= cfg_pag(D, batch, 5 * args.repeats, '')
        if args.sd15:
            large = sd15(args.sd15)
            rows |= pag(large, 1, 1, 1)
            rows |= cfg_pag(DiscreteDenoiser(large), 1, 3, 'goal 0.907')
    report(rows, 'guided', about(args, calls=args.calls))


if __name__ == '__main__':
    main()
