"""How long do the metrics take?

Both sides of every ratio are timed in one run, alternating, and the medians compared.

    python benchmarks/metrics.py         # seconds of the day, all threads
    python benchmarks/metrics.py --busy  # on a busy machine: processor time of one thread

torch-fidelity is the other side where it is installed: `pip install --no-deps torch-fidelity` is
enough, for its metrics are read as files. Without it, its rows are absent. The table is printed and
kept as JSON beside this file.
"""

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
import time
import types
from types import SimpleNamespace

import samplers
import torch
from samplers import seconds
from sweep import report

FID, KID, PRC = ('metric_fid', 'metric_kid', 'metric_prc')


def torch_fidelity():
    "`fid`, `kid` and `prc` of torch-fidelity, read as files (importing needs torchvision); or None"
    spec = importlib.util.find_spec('torch_fidelity')
    if spec is None:
        return None
    before = {k for k in sys.modules if k.split('.')[0] == 'torch_fidelity'}
    if before:
        raise RuntimeError(f'torch_fidelity: {sorted(before)} are imported already')

    def module(name, **attrs):
        m = sys.modules[name] = types.ModuleType(name)
        m.__dict__.update(attrs)

    needed = (
        'get_cacheable_input_name',
        'cache_lookup_one_recompute_on_miss',
        'extract_featuresdict_from_input_id_cached',
        'create_feature_extractor',
        'resolve_feature_extractor',
        'resolve_feature_layer_for_metric',
    )
    module('torch_fidelity', __path__=list(spec.submodule_search_locations))
    module('torch_fidelity.utils', **dict.fromkeys(needed))
    try:
        return SimpleNamespace(
            **{k[7:]: importlib.import_module(f'torch_fidelity.{k}') for k in (FID, KID, PRC)}
        )
    finally:
        for k in [k for k in sys.modules if k.split('.')[0] == 'torch_fidelity']:
            del sys.modules[k]


def their_fid(tf, x, ref):
    return tf.fid.fid_statistics_to_metric(
        *map(tf.fid.fid_features_to_statistics, (x, ref)), False
    )[tf.fid.KEY_METRIC_FID]


def their_kid(tf, x, ref, **kw):
    res = tf.kid.kid_features_to_metric(x, ref, verbose=False, **kw)
    return res[tf.kid.KEY_METRIC_KID_MEAN], res[tf.kid.KEY_METRIC_KID_STD]


def their_prc(tf, x, ref, **kw):
    res = tf.prc.prc_features_to_metric(x, ref, verbose=False, **kw)
    return res[tf.prc.KEY_METRIC_PRECISION], res[tf.prc.KEY_METRIC_RECALL]


def clouds(n, d):
    "Correlated features of two sides, float32."
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=g) / d**0.5
    return [torch.randn(n, d, generator=g) @ mix + i * 0.1 for i in (0, 1)]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--busy', action='store_true', help='processor time of one thread')
    p.add_argument('--repeats', type=int, default=3, help='of which the median is taken')
    p.add_argument('--images', type=int, default=10_000, help='on each side')
    args = p.parse_args()
    if args.busy:
        torch.set_num_threads(1)
        samplers.clock = time.process_time
    from cf_guidance.lab import metrics
    from cf_guidance.lab.fashion import load_net

    n = args.images
    tf, (x, ref), rows = torch_fidelity(), clouds(n, 512), {}
    few, subset = n // 5, n // 10
    small = [o[:few] for o in (x, ref)]

    def streamed():
        s = metrics.Stats()
        for b in x.split(500):
            s.update(b)

    def against(name, ours, theirs, goal=''):
        t = seconds(dict(ours=ours, theirs=theirs) if tf else dict(ours=ours), 1, args.repeats)
        rows[f'{name}, s'] = t['ours'], goal
        if tf:
            rows[f"  torch-fidelity's {name.split(' of ')[0]}, ratio"] = t['theirs'] / t['ours'], ''

    against(
        f'FID of {n:,} x 512', lambda: metrics.fid(x, ref), lambda: their_fid(tf, x, ref), 'goal 2'
    )
    rows[f'mean and covariance of {n:,} x 512 in batches of 500, s'] = (
        seconds(dict(f=streamed), 1, args.repeats)['f'],
        '',
    )
    against(
        f'KID of {n:,} x 512, 100 subsets of {subset:,}',
        lambda: metrics.kid(x, ref, size=subset),
        lambda: their_kid(tf, x, ref, kid_subset_size=subset),
    )
    against(
        f'precision and recall of {few:,} x 512',
        lambda: metrics.precision_recall(*small),
        lambda: their_prc(tf, *small),
    )
    rows[f'precision and recall of {n:,} x 512, s'] = (
        seconds(dict(f=lambda: metrics.precision_recall(x, ref)), 1, 1)['f'],
        '',
    )
    images, features = torch.rand(1000, 1, 32, 32) * 2 - 1, metrics._fashion_features(load_net())
    rows['FashionNet features of 1,000 grey images, s'] = (
        seconds(dict(f=lambda: metrics.get_features(images, features)), 1, args.repeats)['f'],
        '',
    )
    about = dict(
        device=f'{platform.machine()} CPU, {torch.get_num_threads()} threads',
        clock='processor time' if args.busy else 'time of the day',
        torch=torch.__version__,
        **{
            'torch-fidelity': importlib.metadata.version('torch-fidelity')
            if tf
            else 'not installed'
        },
    )
    report(rows, 'metrics', about)


if __name__ == '__main__':
    main()
