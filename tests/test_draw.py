"Drawing a plan: interrupted, shared, with failures; the result is that of an undisturbed run."

import importlib.util
import os
import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, python
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from cf_guidance.guided import Conditions, GuidedDenoiser
from cf_guidance.karras import sample_dpmpp_2m
from cf_guidance.lab.commands import run_command
from cf_guidance.lab.draw import (
    Painter,
    draw,
    draw_in_processes,
    draw_with_ray,
    measure_pictures,
    shard_of_environment,
    units,
)
from cf_guidance.lab.plan import SAMPLERS, Sweep, evaluations_of, fingerprint
from cf_guidance.lab.store import Store, key_of
from cf_guidance.negatives import CADS
from cf_guidance.noise import randn
from cf_guidance.pipelines import embedded_path, guided, pipeline_denoiser

BATCH, KILLS = 10, 20  # as in killed_draws.py
BAG, COAT = 'a red bag on a blue background', 'a yellow coat on a black background'
SMALL = dict(prompt=[BAG, COAT], seed=range(3), steps=2)
QUIET = dict(progress=False)


def contents(folder):
    "All that is stored by key, but for times."
    rows = {}
    for part in sorted(folder.glob('part-*.parquet')):
        for row in pq.read_table(part).to_pylist():
            assert row['key'] not in rows, 'a picture is stored twice'
            rows[row['key']] = {k: v for k, v in row.items() if k not in ('seconds', 'written')}
    return rows


def drawn(log):
    return Counter(log.read_text().split())


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stores')
    r = python(ROOT / 'tests/killed_draws.py', folder, timeout=600)
    assert r.returncode == 0, r.stderr
    return folder


@pytest.mark.parametrize('name', ['killed', 'shards'])
def test_killed_twenty_times(stores, name):
    calm, rows = contents(stores / 'calm'), contents(stores / name)
    assert len(calm) == 600
    assert rows == calm
    assert Store(stores / name).status()['missing'] == 0
    times = drawn(stores / f'{name}.log')
    assert times.keys() == calm.keys()
    assert times.total() <= 600 + KILLS * BATCH  # only batches in flight are drawn again
    assert set(drawn(stores / 'calm.log').values()) == {1}


@pytest.mark.skipif(not importlib.util.find_spec('ray'), reason='needs the extra ray')
def test_ray_with_a_killed_actor(tmp_path):
    r = python(ROOT / 'tests/killed_draws.py', tmp_path, 'ray', timeout=600)
    assert r.returncode == 0, r.stderr
    assert (tmp_path / 'knife').exists()  # an actor was killed
    rows = contents(tmp_path / 'ray')
    assert len(rows) == 120
    assert rows == contents(tmp_path / 'calm')
    assert drawn(tmp_path / 'ray.log').total() <= 120 + BATCH


def small(**kw):
    return Sweep(**{**SMALL, **kw})


def test_units_are_those_of_the_plan():
    sweep = small(rule=['cfg', 'apg'], w=[2.0, 4.0])
    found = units(sweep.requests, 5)
    assert sorted(map(key_of, sum(found, []))) == sorted(map(key_of, sweep.requests))
    assert [len(o) for o in found] == [5, 5, 2] * 2  # a rule, then the other
    assert len({o[0]['terms'][0]['rule']['name'] for o in found[:3]}) == 1


def test_pipelines_are_loaded_once():
    found = units(small(steps=[2, 3], dtype=['float32', 'bfloat16']).requests, 6)
    assert [o[0]['dtype'] for o in found] == ['float32', 'float32', 'bfloat16', 'bfloat16']


@pytest.fixture(scope='module')
def painter():
    return Painter(lambda pixels, requests: dict(pixels=list(pixels)))


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_sampler_draws_a_picture_alone_as_in_a_batch(sampler, painter):
    requests = small(sampler=sampler, sigmas='karras', w=3.0, seed=[0, 1], steps=3).requests
    rows, (alone,) = painter(requests), painter(requests[2:3])
    assert [o['nfe'] for o in rows] == [evaluations_of(r) for r in requests]
    assert [o['effective_scale'] for o in rows] == pytest.approx([3] * 4, abs=1e-4)
    assert (alone['pixels'] - rows[2]['pixels']).abs().max() < 1e-4


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "Folders of pipelines: one for wide pictures, and one without a scheduler."
    folder = tmp_path_factory.mktemp('models')
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
    pipe.save_pretrained(folder / 'bare')
    shutil.rmtree(folder / 'bare/scheduler')
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, 'sample_size': [8, 16]})
    pipe.save_pretrained(folder / 'wide')
    return folder


def test_any_saved_pipeline_is_drawn(saved, tmp_path):
    wide = str(saved / 'wide')
    settings = dict(model=wide, negative=['prompt', 'pag', 'icg'], seed=0)
    draw(small(**settings), tmp_path, **QUIET)
    draw(small(**settings, sampler='euler', prompt='any words'), tmp_path, **QUIET)
    store = Store(tmp_path)
    table = store.table()
    assert table.error.isna().all() and len(table) == 9
    assert {store.picture(k).size for k in table.index} == {(64, 32)}
    (request,) = small(model=wide, prompt=BAG, seed=0).requests
    assert request['model'] == dict(name=wide, fingerprint=fingerprint(wide))
    run_command(['grid', str(tmp_path)])
    assert (tmp_path / 'grid.png').exists()


def test_a_pipeline_without_scheduler_needs_one_by_name(saved, painter):
    bare = dict(model=str(saved / 'bare'), prompt=BAG, seed=0)
    with pytest.raises(ValueError, match='scheduler: expected a name'):
        small(**bare)
    config = StableDiffusionPipeline.from_pretrained(embedded_path()).scheduler.config
    own = {k: config[k] for k in config if not k.startswith('_')}
    for more in ({}, dict(sampler='dpmpp_2m')):
        requests = small(**bare, scheduler=dict(name='DDIMScheduler', **own), **more).requests
        (row,), (embedded,) = painter(requests), painter(small(prompt=BAG, seed=0, **more).requests)
        assert torch.equal(row['pixels'], embedded['pixels'])


def test_a_sampler_is_that_of_a_loop(painter):
    (request,) = small(
        prompt=BAG, seed=5, steps=4, sampler='dpmpp_2m', sigmas=[9, 3, 1, 0.3]
    ).requests
    (row,) = painter([request])
    D = pipeline_denoiser(painter.pipeline.pipe, False)
    G = GuidedDenoiser(D, Conditions(D.cond('')))
    x = 9 * randn((1, *D.latent_shape), [5])
    x = sample_dpmpp_2m(G, x, torch.tensor([9, 3, 1, 0.3, 0]), D.cond(BAG))
    assert (D.decode(x)[0] - row['pixels']).abs().max() < 1e-5


ARRAY = dict(SLURM_ARRAY_TASK_ID='7', SLURM_ARRAY_TASK_MIN='3', SLURM_ARRAY_TASK_COUNT='4')
SHARDS = [
    ({}, (0, 1)),
    (dict(RANK='1', WORLD_SIZE='4'), (1, 4)),
    (dict(ARRAY, SLURM_ARRAY_TASK_STEP='2'), (2, 4)),
    (dict(ARRAY, SLURM_ARRAY_TASK_ID='5', RANK='1', WORLD_SIZE='2'), (5, 8)),
]


@pytest.fixture
def no_shard(monkeypatch):
    for name in [o for o in os.environ if o.startswith(('SLURM_', 'RANK', 'WORLD_SIZE'))]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(('env', 'shard'), SHARDS)
def test_shard_of_environment(env, shard, no_shard, monkeypatch):
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    assert shard_of_environment() == shard


def test_an_array_with_gaps_is_refused(no_shard, monkeypatch):
    for k, v in dict(ARRAY, SLURM_ARRAY_TASK_ID='9').items():
        monkeypatch.setenv(k, v)
    with pytest.raises(ValueError, match='shard: expected'):
        shard_of_environment()


BAD = {
    'shard 2/2': dict(shard=(2, 2)),
    'shard text': dict(shard='1 of 2'),
    'shard 5': dict(shard=5),
    'batch_size 0': dict(batch_size=0),
    'batch_size a': dict(batch_size='a'),
    'measure 5': dict(measure=5),
    'plan 5': dict(plan=5),
    'store: nothing is planned': dict(plan=None),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_arguments(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Painter, 'load', None)  # nothing is loaded
    plan = BAD[name].get('plan', small())
    more = {k: v for k, v in BAD[name].items() if k != 'plan'}
    with pytest.raises((TypeError, ValueError), match=f'^{name.split()[0]}'):
        draw(plan, tmp_path, **more)


def test_draw_what_is_missing(tmp_path, capsys):
    counts = draw(small(), tmp_path, batch_size=4)
    out = capsys.readouterr()
    assert '6 pictures, 24 network evaluations' in out.out
    assert 'for the other 2 pictures' in out.out
    assert '6/6' in out.err
    assert (counts['planned'], counts['done'], counts['missing'], counts['parts']) == (6, 6, 0, 2)
    draw(small(), tmp_path)
    assert 'no picture is missing' in capsys.readouterr().out
    draw(None, tmp_path, **QUIET)
    assert capsys.readouterr().out == ''
    counts = draw(small(seed=range(4)), tmp_path, **QUIET)
    assert (counts['done'], counts['parts']) == (8, 3)


def test_a_row(tmp_path):
    draw(small(w=[1.0, 3.0]), tmp_path, **QUIET)
    table = Store(tmp_path).table().set_index('w')
    assert table.effective_scale[3.0].to_numpy() == pytest.approx(3, rel=1e-3)
    assert table.effective_scale[1.0].isna().all()  # a weight of 1 does not guide
    assert set(table.nfe[1.0]) == {2}
    assert set(table.nfe[3.0]) == {4}
    assert set(table.network) == {'torch'}
    assert table.garment.isin([0, 1]).all()
    assert sum(o.n for o in Store(tmp_path).stats().values()) == 12


@pytest.mark.parametrize('negative', ['prompt', 'pag'])
def test_a_fast_network(tmp_path, monkeypatch, negative):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    options = dict(prompt=BAG, negative=negative, w=3.0)
    draw(small(**options, backend=['torch', 'onnx']), tmp_path / 'store', **QUIET)
    table = Store(tmp_path / 'store').table()
    assert set(table.network) == {'torch', 'onnx'}
    assert np.ptp(table.pivot(index='seed', columns='backend', values='saturation'), 1).max() < 1e-3


def test_a_picture_does_not_depend_on_its_batch(tmp_path):
    sweep = small(w=[2.0, 4.0])
    draw(sweep, tmp_path / 'a', **QUIET)
    draw(sweep, tmp_path / 'b', batch_size=1, **QUIET)
    a, b = (Store(tmp_path / o) for o in 'ab')
    for key in map(key_of, sweep.requests):
        pair = [np.asarray(o.picture(key), dtype=int) for o in (a, b)]
        assert abs(pair[0] - pair[1]).max() <= 1


def test_two_pictures_of_six_are_not_finite(tmp_path):
    sweep = small(prompt=BAG, w=[2.0, 4.0, 1e38])
    counts = draw(sweep, tmp_path, **QUIET)
    assert (counts['done'], counts['failed'], counts['missing']) == (6, 3, 0)
    table = Store(tmp_path).table()
    assert set(table.w[table.error.notna()]) == {1e38}
    assert table.error.dropna().str.contains('FloatingPointError: .* not finite').all()
    assert draw(sweep, tmp_path, **QUIET)['parts'] == 1
    assert draw(sweep, tmp_path, retry=True, **QUIET)['parts'] == 2


@pytest.fixture
def short_of_memory(monkeypatch):
    "The network has memory for `most[0]` rows."
    most, load = [4], Painter.load

    def short(self, request):
        load(self, request)
        net = self.pipeline.unet
        forward = type(net).forward

        def limited(x, *args, **kwargs):
            if len(x) > most[0]:
                raise torch.OutOfMemoryError('out of memory')
            return forward(net, x, *args, **kwargs)

        net.forward = limited

    monkeypatch.setattr(Painter, 'load', short)
    return most


def test_out_of_memory_halves_the_rows(tmp_path, short_of_memory):
    sweep = small(w=[3.0])
    counts = draw(sweep, tmp_path / 'short', **QUIET)
    assert (counts['done'], counts['failed'], counts['parts']) == (6, 0, 1)
    assert set(Store(tmp_path / 'short').table().nfe) == {4}  # each evaluation counts once


def test_no_memory_for_a_single_row(tmp_path, short_of_memory):
    short_of_memory[0] = 0
    counts = draw(small(), tmp_path, **QUIET)
    assert (counts['done'], counts['failed']) == (0, 6)
    assert set(Store(tmp_path).table().error) == {'OutOfMemoryError: out of memory'}
    short_of_memory[0] = 4
    assert draw(small(), tmp_path, retry=True, **QUIET)['done'] == 6


def stopped(pixels, requests, calls=[]):  # noqa: B006
    calls.append(1)
    if len(calls) == 2:
        raise KeyboardInterrupt
    return {}


def test_stopped_by_ctrl_c(tmp_path):
    words = 'stopped: 2 of 6 pictures .* the same call goes on'
    with pytest.raises(KeyboardInterrupt, match=words):
        draw(small(), tmp_path, batch_size=2, measure=stopped, **QUIET)
    assert draw(None, tmp_path, batch_size=2, **QUIET)['done'] == 6


def test_other_errors_are_not_rows(tmp_path):
    def broken(pixels, requests):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw(small(), tmp_path, measure=broken, **QUIET)
    assert Store(tmp_path).status()['parts'] == 0


def test_another_model_of_the_same_name(tmp_path):
    requests = small().requests
    for r in requests:
        r['model'] = {**r['model'], 'fingerprint': 'old'}
    with pytest.raises(ValueError, match='model: fashion-sd has changed'):
        draw(requests, tmp_path, **QUIET)


def test_measures_of_another_model():
    requests = [{'model': {'name': 'other'}, 'prompt': BAG}] * 2
    columns = measure_pictures(torch.rand(2, 3, 64, 64), requests)
    assert set(columns) == {'saturation'}


def test_several_processes_draw_only_what_they_are_given(tmp_path):
    store, requests = Store(tmp_path), small().requests
    store.plan(requests)
    draw_in_processes(requests[:2], store, 2, batch_size=1, **QUIET)
    assert store.missing() == requests[2:]


def test_processes(tmp_path):
    counts = draw_in_processes(small(), tmp_path, 2, batch_size=2, **QUIET)
    assert (counts['done'], counts['parts']) == (6, 3)
    with pytest.raises(ValueError, match='processes: expected a whole number from 1'):
        draw_in_processes(small(), tmp_path, 0)


@pytest.mark.parametrize('actors', [0, (2, 1), 'a'])
def test_bad_actors(tmp_path, actors):
    with pytest.raises((TypeError, ValueError), match='^actors: expected a whole number'):
        draw_with_ray(small(), tmp_path, actors)


@pytest.mark.skipif(importlib.util.find_spec('ray'), reason='ray is installed')
def test_ray_is_missing(tmp_path):
    with pytest.raises(ImportError, match=r'cf_guidance\[ray\]'):
        draw_with_ray(small(), tmp_path)


def test_without_pictures(tmp_path):
    assert draw(small(), tmp_path, keep_pictures=False, **QUIET)['done'] == 6
    store = Store(tmp_path)
    table = store.table()
    assert table.garment.notna().all()
    with pytest.raises(ValueError, match='has no picture: drawn with keep_pictures=False'):
        store.picture(table.index[0])


def painted(**settings):
    "Pictures of a sweep as numbers, all in one batch, and the evaluations of each."
    requests = Sweep(prompt=[BAG, COAT], seed=[3, 4], w=3.0, steps=3, **settings).requests
    seen = []
    rows = Painter(lambda pixels, requests: seen.append(pixels) or {})(requests)
    assert [o['error'] for o in rows] == [None] * 4
    return seen[0], [o['nfe'] for o in rows], requests


def test_a_scheduler_with_cads_draws_what_the_guided_pipeline_draws():
    got, nfe, requests = painted(cads=0.5, scheduler='DDIMScheduler')
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path('fashion-sd'))
    pipe.set_progress_bar_config(disable=True)
    sd = guided(pipe, w=3.0, cads=dict(s=0.5, seed=[r['seed'] for r in requests]))
    noise = [torch.Generator().manual_seed(r['seed']) for r in requests]
    prompts = [r['prompt'] for r in requests]
    want = sd(prompts, generator=noise, num_inference_steps=3, output_type='pt').images
    plain, _, _ = painted(scheduler='DDIMScheduler')
    assert (got - want).abs().max() < 1e-4
    assert (got - plain).abs().max() > 0.1
    assert nfe == [evaluations_of(r) for r in requests] == [6] * 4


def test_a_sampler_with_cads_draws_what_a_denoiser_with_cads_draws():
    got, nfe, requests = painted(cads=dict(s=0.5, tau1=0.3), sampler='dpmpp_2m')
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path('fashion-sd'))
    D, seeds, first = pipeline_denoiser(pipe, False), [r['seed'] for r in requests], requests[0]
    G = GuidedDenoiser(D, Conditions(D.cond('')), w=3.0)
    C = CADS(G, tau1=0.3, s=0.5, seed=seeds, names=['encoder_hidden_states'])
    x = randn((4, *D.latent_shape), seeds) * first['sigmas'][0]
    with torch.no_grad():
        x = sample_dpmpp_2m(C, x, first['sigmas'], D.cond([r['prompt'] for r in requests]))
        want = D.decode(x)
    plain, _, _ = painted(sampler='dpmpp_2m')
    assert (got - want).abs().max() < 1e-4
    assert (got - plain).abs().max() > 0.1
    assert nfe == [evaluations_of(r) for r in requests] == [6] * 4


@pytest.mark.parametrize('how', [{}, dict(sampler='euler_cfg_pp'), dict(negative='nag')], ids=str)
def test_a_picture_with_cads_does_not_depend_on_its_batch(how):
    together, _, requests = painted(cads=0.5, **how)
    seen = []
    Painter(lambda pixels, requests: seen.append(pixels) or {})(requests[2:3])
    assert (seen[0][0] - together[2]).abs().max() < 1e-4
