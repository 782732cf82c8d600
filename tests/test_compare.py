"Comparisons: closed forms, small simulations with a known truth, and clear errors."

import numpy as np
import pandas as pd
import pytest
import torch

from cf_guidance.lab.compare import (
    _studentised,
    cfg_twin,
    cfg_with_evaluations,
    diversity,
    intervals,
    paired_difference,
    paired_differences,
    pareto,
    set_measures,
    verdict,
    verdict_table,
)
from cf_guidance.lab.draw import draw
from cf_guidance.lab.fashion import photographs
from cf_guidance.lab.metrics import fid, mmd2, precision_recall
from cf_guidance.lab.plan import Sweep, evaluations_of
from cf_guidance.lab.plots import plot_pareto
from cf_guidance.lab.store import Store

PROMPTS, SEEDS = 30, 8
BAG = 'a red bag on a blue background'


def grid(prompts=PROMPTS, seeds=SEEDS, **columns):
    "A table with one row per prompt and seed."
    names = np.repeat([f'p{i:02}' for i in range(prompts)], seeds)
    return pd.DataFrame(dict(prompt=names, seed=np.tile(np.arange(seeds), prompts), **columns))


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def normal(seed=0, shift=0.0):
    "A table whose values share an effect of the prompt."
    common = np.repeat(noise(99, PROMPTS), SEEDS)
    return grid(v=shift + common + 0.1 * noise(seed, PROMPTS * SEEDS))


# ---- differences


def test_a_difference_is_paired():
    a, b = normal(1, 0.1), normal(2)
    e = paired_difference(a, b, 'v', draws=500)
    assert e.mean == pytest.approx((a.v - b.v).mean())
    assert e.low < 0.1 < e.high
    assert e.high - e.low < 0.1  # the effects of the prompts are of size 1
    assert e.p < 0.05 and e.word == 'better'
    assert paired_difference(b.sample(frac=1, random_state=0), a, 'v').word == 'worse'
    assert paired_difference(a, b, 'v', lower=True).word == 'worse'
    assert paired_difference(normal(1), b, 'v').word == 'cannot be told apart'


def test_independent_pictures_have_the_interval_of_student():
    d = noise(0, 40 * 20)
    e = paired_difference(grid(40, 20, v=d), grid(40, 20, v=0 * d), 'v')
    assert (e.high - e.low) / 2 == pytest.approx(1.96 * d.std() / len(d) ** 0.5, rel=0.25)


def test_equal_settings_and_constant_differences():
    a = grid(v=0.1)
    assert paired_difference(a, a, 'v')[:4] == (0, 0, 0, 1)
    e = paired_difference(a, grid(v=0.3), 'v')
    assert e.low == e.mean == e.high == pytest.approx(-0.2)
    assert e.word == 'worse'


def found_different(d):
    "Which of several comparisons (K, prompts, seeds) leave out 0, together and each by itself."
    mean, error, t = _studentised(d, 200, 0)
    seen = np.abs(mean) / error
    return seen > np.quantile(t.max(1), 0.95), seen > np.quantile(t, 0.95, 0)


def test_intervals_hold_the_truth_one_by_one_and_all_at_once():
    rng, alone, family, n = np.random.default_rng(0), 0, 0, 100
    for _ in range(n):
        d = rng.normal(size=(10, 20, 1)) + rng.normal(size=(10, 1, 6)) / 2
        d = d + rng.normal(size=(10, 20, 6)) - rng.normal(size=(20, 6))  # minus one baseline
        together, each = found_different(d)
        alone, family = alone + each.mean(), family + together.any()
    assert 0.01 < alone / n < 0.09
    assert 0.01 <= family / n < 0.1  # of intervals by themselves, 3 of 10 families have one


def test_more_comparisons_mean_wider_intervals():
    pairs = {i: (normal(i, 0.1), normal(9)) for i in range(5)}
    many, one = paired_differences(pairs, 'v'), paired_difference(*pairs[0], 'v')
    row = many.loc[(0, 'v')]
    assert row['mean'] == pytest.approx(one.mean)
    assert row.low < one.low < one.high < row.high
    assert many.index.names == ['name', 'value']


def test_prompts_that_leave_a_value_open_are_left_out():
    a, b = normal(1, 0.1), normal(2)
    for table in (a, b):
        table.loc[table.prompt == 'p03', 'v'] = np.nan
    keep = a.prompt != 'p03'
    e = paired_difference(a, b, 'v')
    assert e.mean == pytest.approx((a.v - b.v)[keep].mean())
    assert e[:4] == pytest.approx(paired_difference(a[keep], b[keep], 'v')[:4], rel=0.1)


def test_intervals_of_settings():
    table = pd.concat([normal(1).assign(w=1.0), normal(2, 5.0).assign(w=2.0)])
    out = intervals(table, 'v', 'w', draws=300)
    assert out.v.to_dict() == table.groupby('w').v.mean().to_dict()
    assert (out.v_low < out.v).all() and (out.v < out.v_high).all()
    assert intervals(table.assign(rule='cfg'), 'v', ['rule', 'w'], draws=300).index.names == [
        'rule',
        'w',
    ]


@pytest.mark.parametrize(
    'a, b, error',
    [
        (normal(), normal()[1:], 'b: expected the prompts and seeds of a, got 1 pairs'),
        (normal().drop(columns='v'), normal(), 'table: expected a column'),
        (normal()[1:], normal()[1:], 'v: expected each prompt with each seed, got 1 without'),
        (pd.concat([normal()] * 2), normal(), 'expected one setting'),
        (grid(1, 8, v=1.0), grid(1, 8, v=1.0), 'at least 2 prompts and 2 seeds'),
        (grid(8, 1, v=1.0), grid(8, 1, v=1.0), 'at least 2 prompts and 2 seeds'),
    ],
)
def test_wrong_tables(a, b, error):
    with pytest.raises(ValueError, match=error):
        paired_difference(a, b, 'v')


@pytest.mark.parametrize(
    'options, error',
    [
        (dict(pairs={}), 'pairs: expected a dict'),
        (dict(pairs={'x': normal()}), 'pairs: expected .a, b. for'),
        (dict(values=[]), 'values: expected at least one column'),
        (dict(lower='fid'), 'lower: expected some of v, got'),
        (dict(level=95), 'level: expected a number between 0 and 1, got 95'),
        (dict(draws=10), 'draws: expected a whole number from 100'),
        (dict(seed=-1), 'seed: expected a whole number from 0'),
    ],
)
def test_wrong_options(options, error):
    with pytest.raises(ValueError, match=error):
        paired_differences(**{'pairs': {'x': (normal(), normal())}, 'values': 'v', **options})


def test_texts_are_no_measurements():
    with pytest.raises(TypeError, match='v: expected a column of numbers'):
        paired_difference(grid(v='a'), grid(v='b'), 'v')


def test_verdicts():
    pairs = {'new': (normal(1, 0.1), normal(2)), 'same': (normal(3), normal(2))}
    pairs = {k: [o.assign(nfe=24) for o in pair] for k, pair in pairs.items()}
    found = paired_differences(pairs, ['v', 'nfe'], lower='v')
    said = verdict(found.loc[('new', 'v')], 'new', 'cfg', 'v')
    assert said.startswith('new is worse than cfg: its v is 0.') and said.endswith('higher.')
    assert 'new and cfg cannot be told apart in nfe' in verdict(
        found.loc[('new', 'nfe')], 'new', 'cfg', 'nfe'
    )
    assert verdict(paired_difference(*pairs['new'], 'v'), 'a', 'b', 'v').startswith('a is better')
    table = verdict_table(found)
    assert list(table) == ['v', 'nfe'] and list(table.index) == ['new', 'same']
    assert table.v['new'].endswith('worse') and table.nfe['same'].startswith('+0.000 (+0.000')


# ---- measurements of a set


def features(seed, d=4, scale=1.0, shift=0.0, prompts=None):
    "Features whose prompts share an effect."
    common = noise(98, PROMPTS, 1, d) if prompts is None else prompts
    return shift + scale * (common + noise(seed, PROMPTS, SEEDS, d)).reshape(-1, d)


def measured(x, ref, **options):
    return set_measures(grid(w=1), x, ref, 'w', **options)


def test_means_of_pseudo_values_are_the_measurements():
    x, ref = features(0, shift=0.3), features(1)
    m = measured(x, ref).mean(numeric_only=True)
    assert (m.precision, m.recall) == pytest.approx(precision_recall(x, ref))
    assert m.kid == pytest.approx(mmd2(x, ref))
    assert m.diversity == pytest.approx(diversity(x, grid().prompt.tolist()))
    assert abs(m.fid - fid(x, ref)) < 0.1


def test_fid_without_one_seed_each():
    x, ref, seeds = features(0, shift=0.3), features(1), grid().seed
    left = [fid(x[seeds != i], ref) for i in range(SEEDS)]
    want = SEEDS * fid(x, ref) - (SEEDS - 1) * np.mean(left)
    assert measured(x, ref).fid.mean() == pytest.approx(want)


def test_pseudo_values_of_recall_leave_one_out():
    x, ref = torch.tensor(features(0, shift=0.3)), features(1)
    n, full = len(x), precision_recall(x, ref).recall
    left = [precision_recall(x[torch.arange(n) != i], ref).recall for i in range(n)]
    want = full - (n - 1) * (np.array(left) - np.mean(left))
    assert measured(x, ref).recall.to_numpy() == pytest.approx(want)


def test_a_perfect_model_has_an_fid_of_0_with_the_prompts_of_the_photographs():
    found = []
    for i in range(8):
        common = noise(i, PROMPTS, 1, 8)
        ref = (common + noise(100 + i, PROMPTS, 40, 8)).reshape(-1, 8)
        x = features(200 + i, 8, prompts=common)
        found.append((measured(x, ref).fid.mean(), fid(x, ref)))
    corrected, plain = np.mean(found, 0)
    assert plain > 0.04 and abs(corrected) < 0.02


def test_a_known_difference_of_fid():
    ref = torch.tensor(noise(0, 1000, 4))
    ref = (ref - ref.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(ref.T.cov())).T
    hits, means = 0, []
    for i in range(10):
        common = noise(i, PROMPTS, SEEDS, 4)
        a, b = (o.reshape(-1, 4) for o in (1.2 * common + 0.2, common))
        e = paired_difference(*(measured(o, ref) for o in (a, b)), 'fid', draws=200)
        hits += e.low <= 4 * (0.2**2 + 0.2**2) <= e.high
        means.append(e.mean)
    assert hits >= 8 and np.mean(means) == pytest.approx(0.32, abs=0.1)


def test_columns_keep_to_their_rows():
    x, ref = features(0), features(1)
    table = pd.concat([grid(w=1), grid(w=2)])
    both = set_measures(table, np.concatenate([x, x + 1]), ref, 'w')
    order = np.random.default_rng(0).permutation(len(table))
    mixed = set_measures(table.iloc[order], np.concatenate([x, x + 1])[order], ref, 'w')
    assert np.allclose(mixed.fid, both.fid.to_numpy()[order])
    assert list(mixed.index) == list(table.index[order])


@pytest.mark.parametrize(
    'table, x, k, error',
    [
        (grid(w=1), features(0)[1:], 3, 'features: expected 240, one per row, got 239'),
        (grid(w=[1] * 120 + [2] * 120)[40:], features(0)[40:], 3, 'as many pictures'),
        (grid(2, 4, w=1), features(0)[:8], 3, 'expected more than 8 pictures of each setting'),
        (grid(w=1)[1:], features(0)[1:], 3, 'each prompt with each seed'),
        (grid(), features(0), 3, 'by: expected one of'),
        (grid(w=1), features(0), 239, 'k: expected a whole number from 1 to 238, got 239'),
    ],
)
def test_wrong_sets(table, x, k, error):
    with pytest.raises(ValueError, match=error):
        set_measures(table, x, features(1), 'w', k)


def test_diversity():
    assert diversity([[0.0], [1.0], [0.0], [3.0]], ['a', 'a', 'b', 'b']) == 2
    with pytest.raises(ValueError, match="2 pictures or more of each, got 1 of 'b'"):
        diversity([[0.0], [1.0], [0.0]], ['a', 'a', 'b'])
    with pytest.raises(ValueError, match='prompts: expected 2, one per picture, got 1'):
        diversity([[0.0], [1.0]], ['a'])


def test_photographs():
    images, prompts = photographs([BAG, 'a coat'], 3)
    assert images.shape == (6, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    assert prompts == [BAG] * 3 + ['a coat'] * 3
    corner = images[:3, :, 0, 0]  # of the background, which is blue
    assert (corner.argmax(1) == 2).all()
    assert torch.equal(photographs([BAG], 3, seed=1)[0], photographs([BAG], 3, seed=1)[0])
    with pytest.raises(ValueError, match='each: expected a whole number to'):
        photographs([BAG], 10**6)


# ---- the front


def test_states_of_settings():
    places = dict(best=(1, 1), worse=(0, 0), other=(2, 0.5), near=(0.999, 1))
    tables = []
    for i, (name, (x, y)) in enumerate(places.items()):
        x, y = (o + 0.1 * noise(2 * i + j, PROMPTS * SEEDS) for j, o in enumerate((x, y)))
        tables.append(grid(x=x - x.mean() + places[name][0], y=y, s=name))
    table = pd.concat(tables)
    table.loc[table.s == 'near', 'y'] -= 0.01
    out = pareto(table, 'x', 'y', 's')
    assert out.state.to_dict() == dict(best='front', near='open', other='front', worse='beaten')
    assert pareto(table.assign(x=-table.x), 'x', 'y', 's', lower='x').state.equals(out.state)
    names = [o.get_text() for o in plot_pareto(table, 'x', 'y', 's', intervals=out).axes[0].texts]
    assert sorted(names) == ['s best', 's near', 's other']  # what is beaten has no name
    assert list(pareto(table[table.s == 'best'], 'x', 'y', 's').state) == ['front']
    with pytest.raises(ValueError, match='lower: expected some of x, y'):
        pareto(table, 'x', 'y', 's', lower='z')
    with pytest.raises(ValueError, match='intervals: expected one row for each of 4 settings'):
        plot_pareto(table, 'x', 'y', 's', intervals=out[1:])


# ---- the opponents


def request(**axes):
    return Sweep(prompt=BAG, seed=0, **{'steps': 10, **axes}).requests[0]


def test_the_twin_of_plain_guidance_is_itself():
    plain = request(w=4.0)
    assert cfg_twin(plain, 4.0) == plain
    assert cfg_twin(request(w=4.0, sampler='euler'), 4.0) == request(w=4.0, sampler='euler')
    twin = cfg_twin(request(w=4.0, rule='apg', post='rescale', negative_prompt='a coat'), 2.5)
    assert twin == request(w=2.5, negative_prompt='a coat')


def test_opponents_have_no_cads():
    assert cfg_twin(request(w=4.0, cads=0.5), 4.0) == request(w=4.0)
    assert cfg_with_evaluations(request(w=4.0, cads=0.5), 20) == request(w=4.0)


def test_evaluations_without_guidance_count_as_1():
    some = request(w=4.0, interval=(1.0, 5.0))
    share = evaluations_of(some) / 10 - 1
    assert 0 < share < 1
    assert cfg_twin(some, 4.0) == request(w=round(4 * share + 1 - share, 4))
    half = request(schedule=[1.0] * 5 + [3.0] * 5)
    assert cfg_twin(half, 3.0) == request(w=2.0)
    assert cfg_twin(some, 4.0, guided=0.5) == request(w=2.5)
    assert cfg_twin(request(w=4.0, every=3), 4.0) == request(w=4.0)  # reused is guided


def test_the_scale_of_stored_rows_is_that_of_guided_evaluations(tmp_path):
    plan = Sweep(prompt=BAG, seed=range(2), steps=6, cases=[dict(w=4.0, interval=(1.0, 5.0))])
    draw(plan, Store(tmp_path), progress=False, keep_pictures=False)
    row = Store(tmp_path).table().mean(numeric_only=True)
    assert row.effective_scale == pytest.approx(4, rel=1e-3)
    share = row.nfe / 6 - 1
    twin = cfg_twin(plan.requests[0], round(row.effective_scale, 2))
    assert twin['terms'][0]['weights'] == [pytest.approx(1 + 3 * share, abs=1e-3)] * 6


def test_what_has_no_twin():
    with pytest.raises(ValueError, match='guided: expected the share .* since stop= decides'):
        cfg_twin(request(w=4.0, stop=0.9), 4.0)
    terms = [dict(w=3.0, interval=(1.0, 5.0)), dict(negative='pag', w=2.0)]
    with pytest.raises(ValueError, match='since the terms guide different ones'):
        cfg_twin(request(guidance=terms), 4.0)
    with pytest.raises(ValueError, match='request: expected one with guidance'):
        cfg_twin(request(negative='none'), 4.0)
    for scale in (float('nan'), -1, 'a'):
        with pytest.raises(ValueError, match='scale: expected a finite number from 0'):
            cfg_twin(request(w=4.0), scale)
    with pytest.raises(ValueError, match='guided: expected a share from 0 to 1, got 2'):
        cfg_twin(request(w=4.0), 4.0, guided=2)
    assert cfg_twin(request(w=4.0, stop=0.9), 4.0, guided=0.5) == request(w=2.5)


def test_plain_guidance_at_the_same_cost():
    pag = request(guidance=[dict(w=3.0), dict(negative='pag', w=2.0)])
    rich = cfg_with_evaluations(request(w=3.0), evaluations_of(pag))
    assert rich == request(w=3.0, steps=15) and evaluations_of(rich) == 30
    assert cfg_with_evaluations(request(w=3.0), 15)['steps'] == 8  # never fewer evaluations
    with pytest.raises(ValueError, match='expected one term with the same weight'):
        cfg_with_evaluations(pag, 30)
    with pytest.raises(ValueError, match='request: expected a scheduler, since a sampler'):
        cfg_with_evaluations(request(w=3.0, sampler='dpmpp_2m'), 30)
    with pytest.raises(ValueError, match='n: expected a whole number from 1'):
        cfg_with_evaluations(request(w=3.0), 0)


def test_intervals_of_many_differences_hold_at_once_and_so_are_wider():
    "Thirty settings that differ by chance alone cannot be told apart from a thirty-first."
    base = grid(value=noise(0, PROMPTS * SEEDS))
    pairs = {i: (grid(value=noise(i, PROMPTS * SEEDS)), base) for i in range(1, 31)}
    together = paired_differences(pairs, 'value')
    alone = [paired_difference(*o, 'value') for o in pairs.values()]
    widths = np.array([o.high - o.low for o in alone])
    assert ((together.high - together.low).to_numpy() > 1.2 * widths).all()
    assert set(together.word) == {'cannot be told apart'}


def test_a_tie_whose_interval_is_wide_beats_nobody():
    x, y = noise(0, PROMPTS * SEEDS).argsort() % 2, noise(1, PROMPTS * SEEDS)
    a = grid(x=x, y=y + 3, setting='a')
    b = grid(x=np.roll(x, 1), y=y, setting='b')
    assert a.x.mean() == b.x.mean()
    states = pareto(pd.concat([a, b]), 'x', 'y', 'setting').state
    assert states.to_dict() == {'a': 'front', 'b': 'open'}
    same = pareto(pd.concat([a, b.assign(x=a.x)]), 'x', 'y', 'setting').state
    assert same['b'] == 'beaten'
