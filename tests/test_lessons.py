"Rows that the lessons show, measured again: some that take seconds, chosen at random."

import json
import os
import random

import pytest
from conftest import ROOT
from lesson_helpers import part_of

from cf_guidance.lab.fashion import fashion_mnist
from cf_guidance.lab.store import stored_rows


@pytest.fixture(scope='module')
def photographs():
    "All of Fashion-MNIST is here, or can be downloaded."
    try:
        fashion_mnist('test')
    except FileNotFoundError as e:
        if os.environ.get('CI'):
            raise
        pytest.skip(str(e))


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


def test_rules_are_repeated(photographs):
    # two decimals are stored
    repeated('pipelines', 'rules', lambda o: o['w'] is None, dict(fid=0.01, fid_sd=0.01))


def test_photographs_of_continuous_time_are_repeated(photographs):
    tolerance = dict(fid=2e-3, kid=2e-4, precision=2e-3, recall=2e-3, accuracy=2e-3)
    repeated('continuous', 'continuous', lambda o: o['row'] == 'photographs', tolerance)


def test_noise_on_prompts_is_repeated():
    part = part_of('lessons/leaderboard', 'cads_request', 'measure_cads')
    one = [part['cads_request'](3, random.choice([0.25, 0.5, 1.0]), 'choosing')]
    (new,), old = part['measure_cads'](one), stored_rows('cads', one).iloc[0]
    for k, tol in dict(right=0.01, recall=0.02, diversity=0.02).items():
        assert new[k] == pytest.approx(old[k], abs=tol), (k, one)


def test_feedback_is_repeated():
    part = part_of('lessons/methods', 'CHOICES', 'means_of')
    one = [random.choice([o for o in part['CHOICES'] if o['step'] == 'fbg'])]
    (new,), old = part['means_of'](one), stored_rows('fbg', one).iloc[0]
    assert new['nfe'] == old['nfe'] == 32
    for k, tol in dict(right=0.01, recall=0.02, diversity=0.02).items():
        assert new[k] == pytest.approx(old[k], abs=tol), (k, one)


def test_part5_is_repeated():
    part = part_of('lessons/part5', 'requests', 'SWEEPS', 'run', 'measure', 'pipeline')
    o = random.choice([o for o in part['requests'] if o['before'] is not None])
    rule, expts = part['SWEEPS'][o['sweep']]
    two = [e for e in expts if e['val'] in (o['before'], o['value'])]
    res = part['run'](o['prompt'], two, rule, generator=o['seed'], pipeline=part['pipeline'])
    new, old = part['measure'](res).iloc[-1], stored_rows('part5', [o]).iloc[0]
    for k in ('step', 'saturation'):
        assert new[k] == pytest.approx(old[k], abs=2e-3), (k, o)


def test_schedules_are_repeated():
    "Distances need a thousand steps; whether a picture is right does not."
    part = part_of('lessons/karras', 'requests', 'drawn', 'many', 'free', 'adherence')
    o = random.choice([o for o in part['requests'] if o['table'] in ('7 steps', '13 evaluations')])
    prompts, noise = part['many'](48)
    z, evaluations = part['drawn'](o, (prompts, noise))
    right = part['adherence'](part['free'].decode(z).cpu(), prompts).amin(1)
    old = stored_rows('karras', [o]).iloc[0]
    assert old['evaluations'] == evaluations, o
    assert right.mean().item() == pytest.approx(old['right'], abs=0.015), o


def test_negatives_are_repeated():
    "A row of the searches: how many of the pictures are right, and what they cost."
    part = part_of('lessons/negatives', 'sweep_requests', 'pictures', 'D', 'adherence', 'torch')
    o = random.choice(part['sweep_requests'])
    with part['torch'].no_grad():
        z, prompts, nfe = part['pictures'](o['way'], *o['seeds'], o['n'], **o['settings'])
        right = part['adherence'](part['D'].decode(z).float().cpu(), prompts).amin(1)
    old = stored_rows('negatives', [o]).iloc[0]
    assert old['evaluations'] == nfe.float().mean().item(), o
    assert right.mean().item() == pytest.approx(old['adherence'], abs=0.011), o


def test_claims_are_current():
    "The page of claims shows what the stored rows say. If not: run it again."
    names = 'shapes', 'combined', 'others', 'evaluation'
    part = part_of('lessons/claims', *names, 'table')
    nb = json.loads((ROOT / 'nbs/lessons/claims.ipynb').read_text(encoding='utf-8'))
    outputs = [o for c in nb['cells'] for o in c.get('outputs', [])]
    page = '\n'.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs)
    for name in names:
        for line in part['table'](part[name]).data.splitlines():
            assert line in page
