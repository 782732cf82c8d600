"What the tests of rules share."

import torch

from cf_guidance.transforms import PostRule, cfg


def alone(rule):
    "A function of (neg, pos, w) that returns the prediction only; a post-rule corrects `cfg`."
    if isinstance(rule, PostRule):
        noise = (2.0,) if rule.takes_sigma else ()
        return lambda neg, pos, w: rule(cfg(neg, pos, w), pos, *noise)
    if rule.stateful:
        return lambda neg, pos, w: rule(neg, pos, w)[0]
    return lambda neg, pos, w: rule(neg, pos, w)


def two_steps(f, neg, pos, w):
    "One row per sample: the prediction, or two predictions and states of a stateful rule."

    def rows(x):
        return x[..., None].flatten(1)

    if not getattr(f, 'stateful', False):
        return rows(f(neg, pos, w))
    a, state = f(neg, pos, w, None)
    b, last = f(neg + pos, pos, w, state)
    return torch.cat([rows(o) for o in (a, b, state, last) if o is not None], 1)


def is_per_sample(f, neg, pos, w, tol=1e-6):
    "Is `f(batch)[i]` what `f` makes of sample `i` alone, for weights `w` (B,)?"
    rows = [slice(i, i + 1) for i in range(len(neg))]
    single = torch.cat([two_steps(f, neg[r], pos[r], w[r].item()) for r in rows])
    diff = (two_steps(f, neg, pos, w) - single).norm(dim=1)
    return bool((diff <= tol * single.norm(dim=1)).all())
