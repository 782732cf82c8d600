"Rows that the lessons show, measured again: some that take seconds, chosen at random."

import random

import pytest
from lesson_helpers import part_of

from cf_guidance.lab.store import stored_rows


def repeated(lesson, name, cheap, tolerance):
    "One of the cheap rows is what is stored, up to a tolerance for each number."
    part = part_of(f'lessons/{lesson}', 'requests', 'measure')
    one = [random.choice([o for o in part['requests'] if cheap(o)])]
    (new,), old = part['measure'](one), stored_rows(name, one).iloc[0]
    for k, tol in tolerance.items():
        assert float(new[k]) == pytest.approx(old[k], abs=tol), (k, one)


def test_guidance_is_repeated():
    tolerance = dict(right=0.026, apart=1e-3, colour_error=1e-3, saturation=1e-3)
    repeated('guidance', 'guidance', lambda o: True, tolerance)


def test_rules_are_repeated():
    # two decimals are stored
    repeated('pipelines', 'rules', lambda o: o['w'] is None, dict(fid=0.01, fid_sd=0.01))


def test_part5_is_repeated():
    part = part_of('lessons/part5', 'requests', 'SWEEPS', 'run', 'measure', 'pipeline')
    o = random.choice([o for o in part['requests'] if o['before'] is not None])
    rule, expts = part['SWEEPS'][o['sweep']]
    two = [e for e in expts if e['val'] in (o['before'], o['value'])]
    res = part['run'](o['prompt'], two, rule, generator=o['seed'], pipeline=part['pipeline'])
    new, old = part['measure'](res).iloc[-1], stored_rows('part5', [o]).iloc[0]
    for k in ('step', 'saturation'):
        assert new[k] == pytest.approx(old[k], abs=2e-3), (k, o)
