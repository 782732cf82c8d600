"""What do the rules cost, and what does guidance in a stock pipeline?

Both sides of every ratio are timed in one run, alternating, and the medians compared.

    python benchmarks/pipelines.py         # the embedded model, and one in the shape of SD 1.5
    python benchmarks/pipelines.py --busy  # on a busy machine: processor time of one thread
    python benchmarks/pipelines.py --device cuda  # all of it on a GPU

The table is printed and kept as JSON beside this file.
"""

import argparse
import time

import samplers
import torch
from guided import sd15
from samplers import BATCH, about, normal
from sweep import report


def rules():
    "Every rule and post-rule, with its usual settings."
    from cf_guidance import transforms as T

    return {k: f for k, f in vars(T).items() if isinstance(f, T.Rule | T.PostRule)}


def own_time(device, batch, size, share_of, repeats, calls):
    "Seconds of each rule for a batch of latents, and its share of a guided call of the network."
    from cf_guidance.transforms import PostRule

    (neg, pos), states = pair(batch, size, device), {}

    def run(k, f):
        if isinstance(f, PostRule):
            sigma = (torch.ones(batch, device=device),) if f.takes_sigma else ()
            return lambda: f(neg, pos, *sigma)  # the prediction to correct is like a negative
        if not f.stateful:
            return lambda: f(neg, pos, 5.0)

        def remembering():
            states[k] = f(neg, pos, 5.0, states.get(k))[1]

        return remembering

    t = samplers.seconds({k: synced(run(k, f), device) for k, f in rules().items()}, calls, repeats)
    rows = {}
    for k, s in t.items():
        rows |= {
            f'{k}, {batch} latents of {size}x{size}x4, us': (s * 1e6, ''),
            f'  {k}: millionths of the network': (
                s / share_of * 1e6,
                'goal ' + ('10000' if device == 'cuda' else '1000'),
            ),
        }
    return rows


def pair(batch, size, device):
    "A negative and a positive prediction that differ by a tenth."
    neg, other = normal(2, batch, 4, size, size).to(device)
    return neg, neg + 0.1 * other


def synced(f, device):
    def _f():
        f()
        if device == 'cuda':
            torch.cuda.synchronize()

    return _f


def network(device, batch, size, repeats):
    "Seconds of a network in the shape of SD 1.5 on prompts and negatives, measured on two rows."
    net = sd15(size).to(device)
    x, emb = normal(2, 4, size, size).to(device), normal(2, 77, 768).to(device)
    return (
        samplers.seconds({'net': synced(lambda: net(x, 500, emb), device)}, 1, repeats)['net']
        * batch
    )


def tcfg_or_svd(device, repeats):
    "TCFG by the 2 x 2 Gram matrix, against the singular vectors of the flattened predictions."
    from cf_guidance.transforms import tcfg

    neg, pos = pair(8, 128, device)

    def svd(neg, pos):
        both = torch.stack([neg.flatten(1), pos.flatten(1)], 1)
        first = torch.linalg.svd(both, full_matrices=False).Vh[:, :1]
        tangent = ((neg.flatten(1)[:, None] * first).sum(-1, keepdim=True) * first)[:, 0].view_as(
            neg
        )
        return tangent + 5.0 * (pos - tangent)

    assert torch.allclose(
        svd(neg.double(), pos.double()).float(), tcfg(neg, pos, 5.0), atol=1e-4
    ), 'the two differ'
    t = samplers.seconds(
        {
            'svd': synced(lambda: svd(neg, pos), device),
            'gram': synced(lambda: tcfg(neg, pos, 5.0), device),
        },
        5,
        repeats,
    )
    return {
        'TCFG by SVD, 8 latents of 128x128x4, ms': (t['svd'] * 1e3, ''),
        '  SVD / Gram matrix': (t['svd'] / t['gram'], 'goal 10'),
    }


def pipeline(unet, device):
    "A stock pipeline, with the embedded network or another one."
    from diffusers import StableDiffusionPipeline

    from cf_guidance.lab.fashion import quiet
    from cf_guidance.pipelines import embedded_path

    quiet()
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path()).to(device)
    if unet is not None:
        pipe.unet = unet.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(unet, n, batch, repeats, device, thirds=True):
    "A guided pipeline against the pipeline's own guidance, and guidance in a third of the steps."
    from cf_guidance.pipelines import guided, sigmas_of
    from cf_guidance.schedules import interval_of_fractions

    pipe = pipeline(unet, device)
    unet, emb = pipe.unet, normal(batch, 12, pipe.unet.config.cross_attention_dim).to(device)
    x = normal(batch, 4, *(unet.config.sample_size,) * 2).to(device)

    def run(pipe):
        return pipe(
            prompt_embeds=emb,
            negative_prompt_embeds=0 * emb,
            latents=x,
            num_inference_steps=n,
            output_type='latent',
        ).images

    pipes = dict(theirs=pipe, ours=guided(pipe))
    if thirds:
        pipes['third'] = guided(
            pipe, interval=interval_of_fractions(sigmas_of(pipe, n), 1 / 3, 2 / 3)
        )
    theirs, ours = run(pipe), run(pipes['ours'])
    assert (theirs - ours).abs().max() < 1e-3 * theirs.abs().max(), 'the latents differ'
    fs = {k: synced(lambda p=p: run(p), device) for k, p in pipes.items()}
    t = samplers.seconds(fs, 1, repeats)
    size = sum(o.numel() for o in unet.parameters()) / 1e6
    name = f'{size:.0f} M, latents of {unet.config.sample_size}, {batch} prompts, {n} steps'
    rows = {
        f"{name}: the pipeline's own CFG, s": (t['theirs'], ''),
        f'  {name}: guided(pipe) / own': (t['ours'] / t['theirs'], 'goal 1.02'),
    }
    if thirds:
        share = t['third'] / t['theirs']
        rows[f'  {name}: a third of the steps guided / own'] = share, 'goal 0.69'
    return rows


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--device', default='cpu')
    p.add_argument('--steps', type=int, default=30, help='sampling steps')
    p.add_argument('--calls', type=int, default=5, help='calls of a rule that are timed together')
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
    with torch.no_grad():
        rows = {
            **tcfg_or_svd(args.device, args.repeats),
            **stock(None, args.steps, BATCH, args.repeats, args.device),
        }
        if args.sd15:
            net = network(args.device, 16, args.sd15, 1)
            rows |= {'Stable Diffusion 1.5 in shape, 16 rows, s': (net, '')}
            rows |= own_time(args.device, 8, args.sd15, net, args.repeats, args.calls)
            rows |= stock(sd15(args.sd15 // 2), 2, 1, 3, args.device, thirds=False)
            rows |= stock(sd15(args.sd15 // 4), 3, BATCH, 1, args.device)
    report(rows, 'pipelines', about(args, calls=args.calls))


if __name__ == '__main__':
    main()
