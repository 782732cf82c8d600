"The search: a known optimum, limits, fronts, resuming, killed processes, and pictures."

import itertools
import os
import subprocess
import sys

import clear_errors
import numpy as np
import pytest

from cf_guidance.lab.search import (
    Found,
    KnownAnswer,
    Pictures,
    search,
    shape_of,
    steps_within,
    validate,
)
from cf_guidance.schedules import knots_sched

PROMPTS = ['a red sneaker on a blue background', 'a green bag']


def answer(sigmas):
    return knots_sched(sigmas, (0.1, 10), (1.5, 4))


@pytest.fixture(scope='module')
def known():
    return KnownAnswer(answer, evaluations=16, seeds=2)


def distance(known, ws):
    columns = known.measure(lambda s: knots_sched(s, (0.1, 10), ws, low=1), known.instances)
    return np.mean(columns['distance'])


def test_the_search_is_as_good_as_a_grid(known):
    grid = np.arange(1, 6.1, 0.5)
    best = min(itertools.product(grid, grid), key=lambda ws: distance(known, ws))
    found = search(known, minimize='distance', knots=2, high=6, trials=25)
    assert best == (1.5, 4)
    np.testing.assert_allclose(list(found.best[0].values()), best, atol=0.35)
    assert found.table.distance.min() < distance(known, (1.5, 4.5))
    assert found.weights([10]) == [found.best[0]['w2']]


def test_clearly_worse_trials_are_dropped(known):
    kinds = dict(minimize='distance', knots=2, trials=15)
    found = search(known, **kinds, batch=4)
    pruned = found.table.state == 'pruned'
    assert pruned.any() and (found.table.instances[pruned] < 12).all()
    assert not found.table.best[pruned].any()


def test_limits_and_fronts(known):
    steps = KnownAnswer(answer, seeds=2, steps=8)
    few = dict(minimize='distance', knots=3, trials=12)
    found = search(steps, **few, at_most=dict(evaluations=15))
    assert (found.table.evaluations[found.table.allowed] <= 15).all()
    assert found.table.best.sum() == 1 and found.table.allowed[found.table.best].all()
    none = search(steps, **few, at_most=dict(evaluations=1))
    assert none.best == []
    clear_errors.check(lambda: none.weights([1.0]), 'limits')
    front = search(steps, minimize=('distance', 'evaluations'), knots=3, trials=30)
    best = front.table[front.table.best].sort_values('evaluations')
    assert best.distance.is_monotonic_decreasing and best.evaluations.is_unique


def test_steps_within_counts_evaluations():
    assert steps_within(40, lambda n: 2 * n) == 20
    assert steps_within(41, lambda n: 2 * n) == 20
    assert steps_within(40, lambda n: n + min(n, 10)) == 30


def test_a_search_goes_on(known, tmp_path):
    options = dict(minimize='distance', knots=2, storage=tmp_path)
    first = search(known, **options, trials=2)
    more = search(known, **options, trials=4)
    assert more.table.iloc[:2].distance.tolist() == first.table.distance.tolist()
    assert len(more.table) == 4 and more.table.w1.is_unique
    other = search(known, 'constant', minimize='distance', trials=2, storage=tmp_path)
    assert len(other.table) == 2  # another search in the same journal


KILLED = """
import os, sys
from cf_guidance.lab import search as s
from test_search import answer
class Killed(s.KnownAnswer):
    def measure(self, weights, instances):
        print(weights([0.1, 10]), flush=True)
        os._exit(9)
problem = Killed(answer, evaluations=16, seeds=2)
s.search(problem, minimize='distance', knots=2, high=6, trials=3, storage=sys.argv[1])
"""


def test_the_schedule_of_a_killed_process_is_tried_again(known, tmp_path):
    path = os.pathsep.join(['tests', '.', os.environ.get('PYTHONPATH', '')])
    env = {**os.environ, 'PYTHONPATH': path}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, '-c', KILLED, str(tmp_path)]
    killed = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr[-2000:]
    found = search(known, minimize='distance', knots=2, high=6, trials=3, storage=tmp_path)
    assert len(found.table) == 3 and found.table.index[0] == 1  # trial 0 was killed
    again = found.shape.weights([0.1, 10], **found.table.loc[1, ['w1', 'w2']])
    assert f'{again}' == killed.stdout.strip()


def test_pictures(tmp_path):
    pictures = Pictures(PROMPTS, range(2), tmp_path, evaluations=6)
    options = dict(maximize='adherence', knots=2, trials=2)
    found = search(pictures, **options, storage=tmp_path)
    assert (found.table.evaluations <= 6).all() and found.table.adherence.between(0, 1).all()
    files = sorted(os.listdir(tmp_path))
    again = search(Pictures(PROMPTS, range(2), tmp_path, evaluations=6), **options)
    assert again.table.adherence.tolist() == found.table.adherence.tolist()
    assert sorted(os.listdir(tmp_path)) == files  # nothing was drawn twice
    half = pictures.request(lambda sigmas: [4.0 if 1 < o < 4 else 1.0 for o in sigmas])
    assert half['steps'] == 4  # two of them guided
    constant = search(pictures, 'constant', maximize='adherence', trials=1)
    both = dict(knots=found, constant=constant)
    gains = validate(both, PROMPTS, [5, 6], draws=20)
    assert list(gains.index) == [('constant', 'adherence')]
    row = gains.iloc[0]
    assert row.low <= row.gain <= row.high and row.gain == row.found - row.other
    clear_errors.check(lambda: validate(both, PROMPTS, [1, 2]), 'seeds')


def test_validation_knows_a_gain_and_none(known):
    right = search(known, minimize='distance', knots=2, high=6, trials=25)
    wrong = Found(right.table, [dict(w1=4.0, w2=2.0)], known, right.shape, right.goals)
    seeds = np.linspace(-1.5, 1.5, 5).tolist()
    found = dict(right=right, same=right, wrong=wrong)
    gains = validate(found, known.prompts, seeds, draws=100)
    assert gains.verdict.tolist() == ['none', 'gain']
    assert (gains.gain > 0).tolist() == [False, True]


@pytest.mark.parametrize(
    ('options', 'name'),
    [
        (dict(), 'maximize'),
        (dict(minimize=['distance', 'distance']), 'minimize'),
        (dict(minimize='fid', trials=1), 'fid'),
        (dict(minimize='distance', shape='line'), 'shape'),
        (dict(minimize='distance', knots=1), 'knots'),
        (dict(minimize='distance', trials=0), 'trials'),
        (dict(minimize='distance', batch=2.5), 'batch'),
        (dict(minimize='distance', high=1), 'high'),
    ],
)
def test_errors_are_clear(known, options, name):
    clear_errors.check(lambda: search(known, **options), name)
    clear_errors.check(lambda: search('fashion-sd', minimize='distance'), 'problem')
    clear_errors.check(lambda: KnownAnswer(answer, evaluations=1), 'evaluations')


def test_an_interval_is_the_same_whichever_end_comes_first():
    weights = shape_of('interval', (0.1, 10)).weights
    levels = [10.0, 3.0, 1.0, 0.1]
    assert weights(levels, w=4, end1=5, end2=0.5) == [1, 4, 4, 1]
    assert weights(levels, w=4, end1=0.5, end2=5) == [1, 4, 4, 1]


def test_a_price_below_one_step_is_refused():
    assert steps_within(7, lambda n: 3 * n) == 2
    with pytest.raises(ValueError, match='evaluations: expected at least 3 for one step, got 2'):
        steps_within(2, lambda n: 3 * n)
