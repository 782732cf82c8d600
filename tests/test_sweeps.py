"Edge cases of sweeps: bad input, errors before any work, the command line, whole results."

import contextlib
import io
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from shutil import copytree

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENV

from cf_guidance.guided import Conditions
from cf_guidance.lab import commands, sweeps
from cf_guidance.lab.commands import cf_sweep, sweep
from cf_guidance.lab.fashion import fashion_path
from cf_guidance.lab.store import Store
from cf_guidance.lab.sweeps import (
    cos_harness,
    create_cos_expts,
    create_expts,
    measure,
    run,
    seed_everything,
    summarise,
)
from cf_guidance.pipelines import MinimalDiffusion
from cf_guidance.transforms import (
    BaseNormGuidance,
    FullNormGuidance,
    GuidanceTfm,
    TNormGuidance,
    cfg,
)

NAN, INF = math.nan, math.inf
QUICK = dict(prompts=('a red bag', 'a blue boot'), values='0.05:0.25:2', steps=2, seeds=(0,))
QUICK['progress'] = False
EXPTS = create_expts({'g': [1.0, 2.0]}, num_steps=3)
BAG = 'a red bag'


def expt(schedule):
    return [dict(schedule=schedule, title='a')]


class NoLoad(Exception):
    "A model was loaded before the arguments were checked."


@pytest.fixture
def no_load(monkeypatch):
    def load(self):
        raise NoLoad

    monkeypatch.setattr(MinimalDiffusion, 'load', load)
    monkeypatch.setattr(sweeps, '_default_pipeline', lambda: MinimalDiffusion().load())


# Each bad call, and the words its error has to have.
BAD = {
    'expts nan': (create_expts, ({'g': [NAN]},), {}, "params['g']: expected finite numbers"),
    'expts text': (create_expts, ({'g': ['a']},), {}, "params['g']: expected finite numbers"),
    'expts complex': (create_expts, ({'g': [1j]},), {}, "params['g']: expected finite numbers"),
    'expts bool': (create_expts, ({'g': [True]},), {}, "params['g']: expected finite numbers"),
    'expts none': (create_expts, (None,), {}, 'params: expected a dict'),
    'expts list': (create_expts, ([1],), {}, 'params: expected a dict'),
    'expts empty': (create_expts, ({'g': []},), {}, "params['g']: expected at least one"),
    'expts no name': (create_expts, ({},), {}, 'params: expected at least one'),
    'expts twice': (create_expts, ({'g': [1, 1]},), {}, "params['g']: expected different"),
    'expts string': (create_expts, ({'g': '12'},), {}, "params['g']: expected a list"),
    'expts name 5': (create_expts, ({5: [1]},), {}, 'params: expected names'),
    'expts steps 0': (create_expts, ({'g': [1]},), dict(num_steps=0), 'num_steps: expected a who'),
    'expts steps -1': (create_expts, ({'g': [1]},), dict(num_steps=-1), 'num_steps: expected a w'),
    'expts steps 1.5': (create_expts, ({'g': [1]},), dict(num_steps=1.5), 'num_steps: expected a'),
    'expts schedule 5': (create_expts, ({'g': [1]},), dict(schedule=5), 'schedule: expected a fu'),
    'expts schedule None': (create_expts, ({'g': [1]}, lambda p: None), {}, 'schedule: expected'),
    'cos set': (create_cos_expts, ({'nope'},), {}, 'params: expected a dict'),
    'cos name': (create_cos_expts, ({'nope': [1]},), {}, "got 'nope'"),
    'cos value': (create_cos_expts, ({'k_decay': [0]},), {}, 'k_decay'),
    'harness name': (cos_harness, ({'nope': 1},), {}, 'new_params: expected one of num_steps'),
    'seed a': (seed_everything, ('a',), {}, 'seed: expected a whole number from 0'),
    'seed -1': (seed_everything, (-1,), {}, 'seed: expected a whole number from 0'),
    'seed large': (seed_everything, (2**40,), {}, 'seed: expected a whole number from 0'),
    'seed 1.5': (seed_everything, (1.5,), {}, 'seed: expected a whole number from 0'),
    'run prompt 5': (run, (5, EXPTS), {}, 'prompt: expected text'),
    'run prompt none': (run, (None, EXPTS), {}, 'prompt: expected text'),
    'run no prompt': (run, ([], EXPTS), {}, 'prompt: expected at least one'),
    'run schedules none': (run, (BAG, None), {}, 'schedules: expected dicts'),
    'run schedules empty': (run, (BAG, []), {}, 'schedules: expected at least one'),
    'run schedules {}': (run, (BAG, [{}]), {}, 'schedules: expected dicts'),
    'run schedules 5': (run, (BAG, 5), {}, 'schedules: expected dicts'),
    'run schedule texts': (run, (BAG, expt(['a'] * 3)), {}, 'schedules: expected finite numbers'),
    'run schedule 5': (run, (BAG, expt(5)), {}, 'schedules: expected a list'),
    'run lengths': (run, (BAG, expt([1.0]) + expt([1.0, 2.0])), {}, 'got lengths [1, 2]'),
    'run tfm none': (run, (BAG, EXPTS, None), {}, 'guide_tfm: expected a GuidanceTfm class'),
    'run tfm 5': (run, (BAG, EXPTS, 5), {}, 'guide_tfm: expected a GuidanceTfm class'),
    'run tfm rule': (run, (BAG, EXPTS, cfg), {}, 'guide_tfm: expected a class or a function'),
    'run pipeline 5': (run, (BAG, EXPTS), dict(pipeline=5), 'pipeline: expected a MinimalDiff'),
    'run generator -1': (run, (BAG, EXPTS), dict(generator=-1), 'generator: expected a whole'),
    'run generator twice': (run, (BAG, EXPTS), dict(generator=[0, 0]), 'generator: expected diff'),
    'run generator a': (run, (BAG, EXPTS), dict(generator='a'), 'generator: expected a whole'),
    'run negatives': (run, (BAG, EXPTS), dict(negative_prompt=['a']), 'negative_prompt: expected'),
    'measure {}': (measure, ({},), {}, 'res: expected the result of run'),
    'measure none': (measure, (None,), {}, 'res: expected the result of run'),
    'measure 5': (measure, (5,), {}, 'res: expected the result of run'),
    'summarise none': (summarise, (None,), {}, 'df: expected the table of measure'),
    'summarise other': (summarise, (pd.DataFrame({'a': [1]}),), {}, 'df: expected the table of'),
}
SWEEP = {
    'steps true': (dict(steps=True), 'steps: expected a whole number'),
    'steps 1.5': (dict(steps=1.5), 'steps: expected a whole number'),
    'steps 0': (dict(steps=0), 'steps: expected a whole number'),
    'seeds -1': (dict(seeds=(-1,)), 'seeds: expected a whole number'),
    'seeds a': (dict(seeds=('a',)), 'seeds: expected a whole number'),
    'seeds 1.5': (dict(seeds=(1.5,)), 'seeds: expected a whole number'),
    'seeds 0': (dict(seeds=0), 'seeds: expected a list'),
    'seeds large': (dict(seeds=(2**70,)), 'seeds: expected a whole number'),
    'seeds twice': (dict(seeds=(0, 0)), 'seeds: expected different'),
    'prompts 5': (dict(prompts=(5,)), 'prompts: expected printable text'),
    'prompts bidi': (dict(prompts=('a\u202e',)), 'prompts: expected printable text'),
    'prompts dragon': (dict(prompts=('dragon',)), "prompt: the embedded model does not know 'dr"),
    'prompts none': (dict(prompts=()), 'prompts: expected at least one'),
    'model nope': (dict(model='nope'), 'model: expected'),
    'model /nope': (dict(model='/nope'), 'model: expected'),
    'model 5': (dict(model=5), 'model: expected'),
    'transform': (dict(transform='x-norm'), 'transform: expected one of cfg'),
    'schedule': (dict(schedule='sine'), 'schedule: expected one of constant, cosine'),
    'param': (dict(param='h'), 'param: expected one of g'),
    'param cosine': (dict(schedule='cosine', param='g'), 'param: expected one of max_val'),
    'fixed 5': (dict(fixed=5), 'fixed: expected a dict'),
    'fixed constant': (dict(fixed={'max_val': 1}), 'fixed: expected none'),
    'fixed swept': (dict(schedule='cosine', param='max_val', fixed={'max_val': 3}), 'fixed: exp'),
    'values empty': (dict(values=''), 'values: expected'),
    'values two': (dict(values='1:2'), 'values: expected'),
    'values count 0': (dict(values='1:2:0'), 'values: count: expected a whole number'),
    'values count -3': (dict(values='1:2:-3'), 'values: count: expected a whole number'),
    'values count large': (dict(values='1:2:1000000'), 'values: count: expected a whole number'),
    'values text': (dict(values='a,b'), 'values: expected'),
    'values nan': (dict(values='1:nan:3'), 'values: expected finite numbers'),
    'values twice': (dict(values='2:2:3'), 'values: expected different'),
    'values 1,1': (dict(values='1,1'), 'values: expected different'),
    'values rounded': (dict(values='1e-11,2e-11'), 'values: expected different'),
    'values large': (dict(values='1e300'), 'values: expected finite numbers'),
    'values wide digits': (dict(values='\uff11,\uff12'), 'values: expected'),
    'values none': (dict(values=None), 'values: expected a list'),
    'out none': (dict(out=None), 'out: expected the name of a folder'),
    'out empty': (dict(out=' '), 'out: expected the name of a folder'),
    'foo': (dict(foo=1), "unexpected keyword argument 'foo'"),
    'device': (dict(device='nowhere'), 'device: expected cpu, cuda or mps'),
    'device index': (dict(device='cuda:99'), "device: 'cuda:99' is not available here"),
    'height alone': (dict(height=8), 'height, width: expected both or none'),
    'height': (dict(height=-8, width=8), 'size: expected a whole number'),
}
TEXT = {
    'seeds one': (commands._parse_seeds, 'one', 'seeds: expected whole numbers'),
    'seeds blank': (commands._parse_seeds, '1,,2', 'seeds: expected whole numbers'),
    'seeds long': (commands._parse_seeds, '9' * 30, 'seeds: expected whole numbers'),
    'seeds none': (commands._parse_seeds, None, 'seeds: expected whole numbers'),
    'fixed nan': (commands._parse_fixed, 'a=nan', 'fixed: expected'),
    'fixed no value': (commands._parse_fixed, 'max_val', 'fixed: expected'),
    'fixed none': (commands._parse_fixed, None, 'fixed: expected'),
}


def check_error(words, f, *args, **kwargs):
    with pytest.raises((ValueError, TypeError)) as e:
        f(*args, **kwargs)
    says = str(e.value)
    assert words in says
    assert len(says) < 160
    assert '\n' not in says


@pytest.mark.parametrize('call', BAD)
def test_bad_input(call, no_load):
    f, args, kwargs, words = BAD[call]
    check_error(words, f, *args, **kwargs)


@pytest.mark.parametrize('call', SWEEP)
def test_bad_settings(call, no_load, tmp_path):
    kwargs, words = SWEEP[call]
    check_error(words, sweep, **{**QUICK, 'out': tmp_path / 'new' / 'folder', **kwargs})
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('call', TEXT)
def test_bad_text(call):
    f, text, words = TEXT[call]
    check_error(words, f, text)


def test_fixed_needs_a_name(no_load, tmp_path):
    cosine = dict(schedule='cosine', param='max_val', fixed=commands._parse_fixed('=5'))
    check_error('fixed: expected one of', sweep, **{**QUICK, **cosine, 'out': tmp_path / 'a'})


@pytest.mark.parametrize('bad', [dict(scheduler='Nope'), dict(height=30, width=30)])
def test_failed_load_leaves_no_folder(bad, tmp_path):
    with pytest.raises(ValueError, match=next(iter(bad))):
        sweep(**{**QUICK, 'out': tmp_path / 'new', **bad})
    assert not (tmp_path / 'new').exists()


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match="prompt: .*'hat'"):
        run('a red hat', EXPTS)
    with pytest.raises(ValueError, match="negative_prompt: .*'dragon'"):
        run(BAG, EXPTS, negative_prompt='dragon')


def test_guidance_of_another_kind_is_refused():
    with pytest.raises((TypeError, ValueError)):
        run(BAG, EXPTS, Conditions)


def test_two_parameters():
    both = run(BAG, create_expts({'a': [1.0], 'b': [1.0]}, num_steps=2))
    assert summarise(measure(both)).n.tolist() == [1, 1]


@pytest.mark.parametrize('tfm', [BaseNormGuidance, TNormGuidance, FullNormGuidance])
def test_batch_equals_single_runs(tfm):
    values = [0.0, 1.0, 3.0] if tfm is BaseNormGuidance else [0.0, 0.1, 0.25]
    expts = create_expts({'g': values}, num_steps=10)
    prompts = ['a green bag on a white background', 'a black boot on a yellow background']
    many = run(prompts, expts, tfm, generator=[3, 4])
    for j in (0, 4, 11):
        one = run(many['prompts'][j], [expts[j % 3]], tfm, generator=many['seeds'][j])
        assert (one['pixels'][0] - many['pixels'][j]).abs().max() <= 1e-4


def test_weights_differ():
    res = run(BAG, create_expts({'g': [1.0, 7.5]}, num_steps=10))
    assert (res['pixels'][0] - res['pixels'][1]).abs().max() > 0.05


def test_generator_is_as_good_as_its_seed():
    g = torch.Generator().manual_seed(5)
    a = run(BAG, EXPTS, TNormGuidance, generator=g)
    assert torch.equal(a['pixels'], run(BAG, EXPTS, TNormGuidance, generator=5)['pixels'])
    assert torch.equal(a['pixels'], run(BAG, EXPTS, TNormGuidance, generator=g)['pixels'])
    assert a['seeds'] == [5, 5]


def test_own_transform():
    "Written for one number per step, it gives the same pictures in a batch as wide as the latents."

    class Blog(GuidanceTfm):
        def guide(self, u, t, idx=None):
            self.pred = u + self.scheduler('g', idx) * (t - u)

    expts = create_expts({'g': [float(i) for i in range(1, 9)]}, num_steps=5)
    diff = run(BAG, expts, Blog)['pixels'] - run(BAG, expts)['pixels']
    assert diff.abs().max() < 1e-4


def test_nfe():
    expts = create_expts({'g': [0.0, 1.0, 2.0]}, num_steps=10)
    assert run(BAG, expts)['nfe'].tolist() == [10, 10, 20]
    assert run(BAG, expts, TNormGuidance)['nfe'].tolist() == [10, 20, 20]


def test_threads_have_their_own_nfe():
    "Counts come with the result, so that threads that share a pipeline cannot mix them up."
    pipe = MinimalDiffusion(progress=False).load()
    bad = []

    def work(w, want):
        for _ in range(5):
            res = run(BAG, create_expts({'g': [w]}, num_steps=3), pipeline=pipe)
            if res['nfe'].tolist() != [want]:
                bad.append(res['nfe'])

    threads = [threading.Thread(target=work, args=o) for o in ((1.0, 3), (2.0, 6))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not bad


def test_seed_everything():
    g = seed_everything(7)
    a, b = torch.rand(2), np.random.rand(2)
    other = seed_everything(7)
    assert torch.equal(torch.rand(2), a)
    assert (np.random.rand(2) == b).all()
    assert torch.equal(torch.rand(2, generator=g), torch.rand(2, generator=other))


def test_test_run_draws_the_first():
    res = run(BAG, EXPTS, test_run=True)
    assert res['titles'] == ['g = 1']


def test_nan_is_an_error(monkeypatch):
    res = run(BAG, EXPTS)
    res['pixels'][0, 0, 0, 0] = NAN
    check_error('res: expected finite pictures', measure, res)
    nan = res['pixels'], [3, 6]
    monkeypatch.setattr(MinimalDiffusion, 'sample', lambda *args, **kwargs: nan)
    with pytest.raises(FloatingPointError, match='1 of 2 pictures are not finite'):
        run(BAG, EXPTS)


def test_same_settings_may_run_again(tmp_path):
    a = sweep(**QUICK, out=tmp_path)
    b = sweep(**QUICK, out=tmp_path)
    pd.testing.assert_frame_equal(a.drop(columns='seconds'), b.drop(columns='seconds'))


def test_other_settings_are_refused(tmp_path):
    sweep(**QUICK, out=tmp_path)
    other = {**QUICK, 'steps': 3, 'out': tmp_path}
    check_error('has results of other settings (steps); use another', sweep, **other)
    sweep(**other, overwrite=True)
    assert pd.read_parquet(tmp_path / 'results.parquet').steps.unique().tolist() == [3]


def test_unreadable_results_are_named(tmp_path):
    (tmp_path / 'results.parquet').write_text('not a table')
    with pytest.raises(ValueError, match='results.parquet that cannot be read'):
        sweep(**QUICK, out=tmp_path)


def test_out_is_a_file(tmp_path, no_load):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='^out: cannot write to'):
        sweep(**QUICK, out=tmp_path / 'file')


def test_small_pictures_are_not_classified(tmp_path):
    df = sweep(**QUICK, out=tmp_path, height=16, width=16)
    assert 'garment' not in df
    assert df.height.unique().tolist() == ['16']


def test_one_prompt_may_be_text(tmp_path):
    df = sweep(**{**QUICK, 'prompts': BAG, 'values': [0.1]}, out=tmp_path)
    assert df.prompt.tolist() == [BAG]


def test_second_sweep_in_a_folder_is_refused(tmp_path):
    with commands._results_folder(tmp_path, {}, False):
        check_error('out: another sweep is writing', sweep, **QUICK, out=tmp_path)
    sweep(**QUICK, out=tmp_path)


def command(**kwargs):
    "What the command prints on stdout and stderr, and its exit code, in this process."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cf_sweep(**kwargs)
            code = 0
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def lines(err):
    "The lines of stderr, without progress bars."
    return [o for o in err.splitlines() if o.strip() and '%|' not in o]


CLI = {
    'transform': (dict(transform='x-norm'), 'transform: expected one of cfg'),
    'prompt': (dict(prompt='a red hat'), "prompt: the embedded model does not know 'hat'"),
    'prompt empty': (dict(prompt=';'), 'prompts: expected different'),
    'values': (dict(values='1:2:0'), 'values: count: expected a whole number'),
    'values large': (dict(values='1e300'), 'values: expected finite numbers'),
    'values overflow': (dict(values='1e30', transform='cfg', steps=3), ''),
    'dtype': (dict(dtype='int4'), 'dtype: expected one of float32'),
    'device': (dict(device='cuda:99'), "device: 'cuda:99' is not available"),
    'scheduler': (dict(scheduler='Nope'), 'scheduler'),
    'seeds': (dict(seeds='1,,2'), 'seeds: expected whole numbers'),
    'seeds twice': (dict(seeds='0,0'), 'seeds: expected different'),
    'model': (dict(model='no/such-model'), 'model'),
}


@pytest.mark.parametrize('case', CLI)
def test_command_says_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kwargs, words = CLI[case]
    code, out, err = command(**kwargs)
    assert code == 2
    assert 'results.parquet' not in out
    assert lines(err)[0].startswith('cf_sweep: ')
    assert len(lines(err)) == 1
    assert words in err
    failed = {'part', 'requests'} if case == 'values overflow' else set()
    assert {o.name.partition('-')[0] for o in tmp_path.rglob('*.*')} == failed
    assert bool(os.listdir(tmp_path)) == bool(failed)


def spoilt(tmp_path, spoil):
    "A copy of the embedded model whose text encoder is spoilt."
    folder = Path(copytree(fashion_path(), tmp_path / 'model'))
    spoil(folder / 'text_encoder' / 'model.safetensors')
    return str(folder)


def truncate(file):
    file.write_bytes(file.read_bytes()[:1000])


def pickled(file):
    file.unlink()
    file.with_name('pytorch_model.bin').write_bytes(pickle.dumps({'a': 1}))


@pytest.mark.parametrize('spoil', [truncate, pickled])
def test_command_with_a_spoilt_model(spoil, tmp_path):
    model = spoilt(tmp_path, spoil)
    out = str(tmp_path / 'out')
    code, _, err = command(model=model, prompt='x', values='1', steps=1, seeds='0', out=out)
    assert code == 2
    assert len(lines(err)) == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'error, code, words',
    [
        (MemoryError(), 2, 'out of memory'),
        (KeyboardInterrupt(), 130, 'stopped'),
        (AttributeError("'int' object has no attribute 'x'"), 2, 'AttributeError'),
        (FloatingPointError('step 3: NaN'), 2, 'cf_sweep: step 3: NaN'),
        (ImportError('cf_sweep needs pandas'), 2, 'cf_sweep: cf_sweep needs pandas'),
    ],
)
def test_command_survives_any_error(error, code, words, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(commands, 'sweep', fail)
    got, _, err = command()
    assert got == code
    assert len(lines(err)) == 1
    assert words in err


def test_command_knows_an_interrupt_in_disguise(monkeypatch):
    def fail(*args, **kwargs):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as e:
            raise ImportError('a package in C') from e

    monkeypatch.setattr(commands, 'sweep', fail)
    assert command()[0] == 130


def test_debug_shows_the_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise AttributeError('bug')

    monkeypatch.setattr(commands, 'sweep', fail)
    with pytest.raises(AttributeError, match='bug'):
        cf_sweep(debug=True)


def start(*args, cwd, **kw):
    code = 'print("ready", flush=True); from cf_guidance._cli import cf_sweep; cf_sweep()'
    return subprocess.Popen(
        [sys.executable, '-c', code, *args],
        cwd=cwd,
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
        **kw,
    )


def test_closed_pipe(tmp_path):
    args = ['--prompt', BAG, '--values', '1', '--steps', '1', '--seeds', '0']
    process = start(*args, cwd=tmp_path, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(timeout=120) == 2
    assert len(lines(err)) == 1


@pytest.mark.parametrize('seconds', [0.1, 0.3, 0.8, 2, 6])
def test_ctrl_c(seconds, tmp_path):
    "While packages are imported, and while the sweep runs."
    process = start('--steps', '900', cwd=tmp_path, stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert len(lines(err)) == 1
    assert not os.listdir(tmp_path)


def test_names_of_2022():
    import cf_guidance.sweeps as old

    names_of_2022 = {'run', 'create_expts', 'create_cos_expts', 'cos_harness', 'cf_sweep'}
    assert names_of_2022 <= set(old.__all__)
    assert {name: getattr(old, name) for name in old.__all__} == {
        name: getattr(commands if name in old._LATE else sweeps, name) for name in old.__all__
    }


def test_values_from_text_and_lists():
    assert commands._values('0.01:0.3:3') == [0.01, 0.155, 0.3]
    assert commands._values('1,2.5') == [1, 2.5]
    assert commands._values([1, 2.5]) == [1, 2.5]


def weights(**settings):
    "The weights of the pictures of a sheet."
    usual = dict(prompts=[BAG], seeds=[0], transform='cfg', device='cpu', dtype='torch.float32')
    more = dict(model='fashion-sd', fixed={}, scheduler=None)
    plan = commands._plan_of({**usual, **more, **settings}, None, None)
    return [r['terms'][0]['weights'] for r in plan.requests]


def test_weights_of_a_sheet():
    constant = dict(schedule='constant', param='g', values=[0.1, 0.2], steps=3)
    assert weights(**constant) == [[0.1] * 3, [0.2] * 3]
    cosine = dict(schedule='cosine', param='max_val', values=[0.1], steps=50)
    params = dict(max_val=0.1, min_val=0.05)
    (got,) = weights(**cosine, fixed={'min_val': 0.05})  # a plan has twelve digits of it
    assert got == pytest.approx(cos_harness(params), rel=1e-11)
    usual = dict(cosine, param='min_val', values=[0.05])
    (got,) = weights(**usual)
    assert got == pytest.approx(cos_harness(dict(min_val=0.05)), rel=1e-11)


@pytest.mark.parametrize('transform', ['cfg', 'base-norm', 't-norm', 'full-norm'])
def test_a_sheet_has_the_pictures_of_run(transform, tmp_path):
    values = [0.0, 0.1, 0.3] if 't' in transform or 'full' in transform else [0.0, 1.0, 3.0]
    settings = dict(prompts=[BAG], seeds=[3], steps=5, progress=False, out=tmp_path)
    df = sweep(transform=transform, values=values, **settings)
    expts = create_expts({'g': values}, num_steps=5)
    res = run(BAG, expts, sweeps._TRANSFORMS[transform], 3)
    store = Store(tmp_path)
    for ours, picture in zip(res['images'], store.pictures(store.requests().index), strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(picture, int)).max() <= 1
    old = measure(res)
    assert df.nfe.tolist() == old.nfe.tolist()
    assert np.allclose(df.saturation, old.saturation, atol=1e-4)
    assert np.allclose(df.step, old.step, atol=2e-3, equal_nan=True)


def test_seeds_and_fixed_from_text():
    assert commands._parse_seeds('0, 3') == (0, 3)
    fixed = commands._parse_fixed('max_val=0.25,num_warmup_steps=5')
    assert fixed == dict(max_val=0.25, num_warmup_steps=5)


def test_written_table_is_the_returned_one(tmp_path):
    df = sweep(out=tmp_path, **QUICK)
    saved = pd.read_parquet(tmp_path / 'results.parquet')
    pd.testing.assert_frame_equal(saved, df)
    assert saved.attrs['settings']['values'] == [0.05, 0.25]
    assert len(saved) == 2 * 1 * 2
