"The commands of sweeps: axes as text, a folder that goes on, and errors in one line."

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cf_guidance import _cli
from cf_guidance.lab import commands
from cf_guidance.lab.commands import run_command
from cf_guidance.lab.draw import draw
from cf_guidance.lab.plan import Sweep
from cf_guidance.lab.store import Store

BAG = 'a red bag on a blue background'
SMALL = ['--prompt', BAG, '--steps', '2', '--out', 'sweep']


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TQDM_DISABLE', '1')


@pytest.fixture
def sweep(capsys):
    run_command(['draw', *SMALL, '--w', '2,4', '--axis', 'seed=0:2:3'])
    capsys.readouterr()


def test_commands_are_known_to_the_parser():
    assert tuple(commands.COMMANDS) == _cli.COMMANDS


@pytest.mark.parametrize(
    ('args', 'new'),
    [
        ([], False),
        (['--values', '1,2'], False),
        (['--axis', 'w=1'], True),
        (['--axis=w=1'], True),
        (['plan.toml'], True),
        (['status', 'sweep'], True),
    ],
)
def test_which_command(args, new):
    assert _cli._is_command(args) is new


def sheet():
    with Image.open('sweep/grid.png') as image:
        return np.asarray(image.convert('RGB'))


def test_draw_and_look(sweep, capsys):
    run_command(['status', 'sweep'])
    assert 'done       6\n' in capsys.readouterr().out
    run_command(['table', 'sweep'])
    assert len(capsys.readouterr().out.splitlines()) == 7
    run_command(['table', 'sweep', '--out', 'table.csv'])
    assert sorted(set(pd.read_csv('table.csv').w)) == [2, 4]
    run_command(['grid', 'sweep'])
    assert sheet().shape[1] > 100


def test_axes_are_those_of_python(sweep):
    plan = Sweep(prompt=BAG, steps=2, w=[2.0, 4.0], seed=range(3))
    assert draw(plan, 'sweep', progress=False)['parts'] == 1


def test_plan_of_a_file(sweep, capsys):
    Sweep(prompt=BAG, steps=2, w=[2.0, 4.0], seed=range(3)).to_toml('plan.toml')
    run_command(['plan.toml', '--out', 'sweep'])
    out = capsys.readouterr().out
    assert 'no picture is missing' in out
    assert '6 of 6 pictures are in sweep' in out


def test_resume_what_a_shard_left(capsys):
    run_command(['draw', *SMALL, '--w', '2,4', '--shard', '0/2', '--batch_size', '1'])
    assert '1 of 2 pictures' in capsys.readouterr().out
    run_command(['grid', 'sweep'])  # the other picture is grey
    assert (sheet() == 128).all(-1).mean() > 0.1
    run_command(['resume', 'sweep'])
    assert '2 of 2 pictures' in capsys.readouterr().out


def test_retry_what_failed(capsys):
    run_command(['draw', *SMALL, '--w', '2,1e38'])
    assert '1 failed: cf_sweep retry sweep' in capsys.readouterr().out
    run_command(['retry', 'sweep'])
    assert '1 pictures, 4 network evaluations' in capsys.readouterr().out


def test_merge(sweep, capsys):
    run_command(['merge', 'all', 'sweep'])
    assert capsys.readouterr().out == '6 pictures added to all\n'
    assert Store('all').status()['done'] == 6


def test_stopped_by_ctrl_c(monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt('stopped: the same call goes on')

    monkeypatch.setattr(commands, 'draw', stop)
    with pytest.raises(SystemExit) as e:
        run_command(['draw', *SMALL])
    assert e.value.code == 130
    assert capsys.readouterr().err == 'cf_sweep: stopped: the same call goes on\n'


BAD = {
    'axis without values': (['draw', *SMALL, '--axis', 'w'], 'axis: expected'),
    'unknown axis': (['draw', *SMALL, '--axis', 'g=1'], 'g: expected an axis among model'),
    'axis twice': (['draw', *SMALL, '--w', '1', '--axis', 'w=2'], 'axis: w is given twice'),
    'unknown rule': (['draw', *SMALL, '--rule', 'cfgg'], 'rule: expected one of'),
    'file and options': (['draw', 'plan.toml', *SMALL], 'plan: expected a file or options'),
    'no file': (['draw', 'plan.toml'], 'plan: cannot read'),
    'no folder': (['resume', 'nothing'], 'folder: expected the folder of a sweep'),
    'no plan': (['resume', '.'], 'store: nothing is planned'),
    'shard': (['draw', *SMALL, '--shard', '2/2'], 'shard: expected'),
    'merge nothing': (['merge', 'all', 'nothing'], 'folder: expected the folder'),
}


@pytest.mark.parametrize('name', BAD)
def test_errors_are_one_line(name, capsys, monkeypatch):
    monkeypatch.setattr('cf_guidance.pipelines.MinimalDiffusion.load', None)  # no model is loaded
    args, message = BAD[name]
    with pytest.raises(SystemExit) as e:
        run_command(args)
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert err.count('\n') == 1
    assert err.startswith(f'cf_sweep: {message}')


def test_grid_of_an_unknown_axis(sweep, capsys):
    with pytest.raises(SystemExit):
        run_command(['grid', 'sweep', '--columns', 'rule'])
    assert 'columns: expected one of prompt, w, seed' in capsys.readouterr().err


def test_table_of_an_unknown_kind(sweep, capsys):
    with pytest.raises(SystemExit):
        run_command(['table', 'sweep', '--out', 'table.xls'])
    assert "ends in .csv or .parquet, got 'table.xls'" in capsys.readouterr().err


def test_without_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_command(['--prompt', BAG, '--steps', '2', '--seed', '0:2:3', '--no-pictures'])
    run_command(['status', 'sweep'])
    assert 'no pictures are kept' in capsys.readouterr().out
    for name in ('grid', 'gallery'):
        with pytest.raises(SystemExit):
            run_command([name, 'sweep'])
        assert 'has no picture' in capsys.readouterr().err


def test_samplers_and_whole_numbers_on_the_command_line():
    options = '--prompt --sampler --sigmas --every'.split()
    values = ['a red bag', 'heun(s_churn=2, s_noise=1),unipc', 'karras,linear', '1,2']
    words = [o for pair in zip(options, values, strict=True) for o in pair]
    args = commands._parser().parse_args(['draw', '--steps', '3', *words])
    sweep = commands._sweep_of(args)
    assert len(sweep) == 8
    assert sweep.labels[-1]['sampler'] == 'unipc'
    assert sweep.requests[0]['sampler']['s_churn'] == 2


@pytest.mark.parametrize('option', ['--axis', '--cads'])
def test_cads_on_the_command_line(option):
    values = 'none,0.1,cads(s=0.5, tau1=0.3)'
    words = [option, f'cads={values}' if option == '--axis' else values]
    args = commands._parser().parse_args(['draw', '--prompt', BAG, '--steps', '3', *words])
    requests = commands._sweep_of(args).requests
    assert [r['cads']['s'] if 'cads' in r else None for r in requests] == [None, 0.1, 0.5]
    assert requests[2]['cads']['tau1'] == 0.3


def test_a_mistake_in_cads_is_found_before_any_work(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(['--prompt', BAG, '--axis', 'cads=cads(s=-1)', '--out', str(tmp_path / 'a')])
    assert 'cads: s: expected a finite number from 0' in capsys.readouterr().err
    assert not (tmp_path / 'a').exists()


def test_an_axis_of_no_values_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(['draw', '--w', '1:2:0', '--prompt', 'a red bag', '--out', str(tmp_path / 'a')])
    assert 'w: expected a count from 1 in from:to:count' in capsys.readouterr().err


def test_an_error_of_the_work_is_not_called_a_lock(tmp_path):
    with pytest.raises(BlockingIOError), commands._locked(tmp_path):
        raise BlockingIOError
    with (
        commands._locked(tmp_path),
        pytest.raises(ValueError, match='out: another sweep is writing'),
        commands._locked(tmp_path),
    ):
        pass


def test_a_sheet_of_one_parameter_may_fix_the_highest_weight():
    settings = dict(schedule='cosine', param='min_val', values=[0.1, 0.2], fixed=dict(max_val=0.25))
    axis = commands._guidance_axis(settings)['schedule']
    assert [o['max_val'] for o in axis] == [0.25, 0.25]
    assert [o['min_val'] for o in axis] == [0.1, 0.2]
