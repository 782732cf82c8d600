"Each benchmark runs. How fast it is, is measured when the machine is quiet, and never a test."

import json
import math
import shutil

import pytest
import torch
from conftest import ENV, ROOT, python

SMALLEST = {
    'guided': '--steps 3 --repeats 1 --calls 1 --sd15 0',
    'pipelines': '--steps 3 --repeats 1 --calls 1 --sd15 0',
    'samplers': '--steps 3 --repeats 1',
    'continuous': '--steps 3 --repeats 1 --train 3',
    'metrics': '--repeats 1 --images 500',
    'sweep': '--steps 2 --repeats 1 --values 2 --batches 1 2 --warm',
    'gpu': '--steps 2 --repeats 1 --no-compile',
}


def test_all_are_here():
    assert set(SMALLEST) == {p.stem for p in (ROOT / 'benchmarks').glob('*.py')}


@pytest.mark.parametrize('name', SMALLEST)
def test_benchmark(name, tmp_path):
    shutil.copytree(ROOT / 'benchmarks', tmp_path / 'benchmarks')
    # without a GPU its benchmark is a dry run
    written = 'gpu-dry-run' if name == 'gpu' and not torch.cuda.is_available() else name
    kept = tmp_path / 'benchmarks' / f'{written}.json'
    kept.unlink(missing_ok=True)
    r = python(f'benchmarks/{name}.py', *SMALLEST[name].split(), cwd=tmp_path, env=ENV)
    assert r.returncode == 0, r.stderr[-3000:]
    rows = json.loads(kept.read_text())['rows']
    assert rows
    assert all(math.isfinite(v) for v in rows.values())


def test_each_rule_has_its_time():
    code = "import pipelines as p; print(len(p.own_time('cpu', 2, 8, 1.0, 1, 1)), len(p.rules()))"
    r = python('-c', code, cwd=ROOT / 'benchmarks', env=ENV)
    assert r.returncode == 0, r.stderr[-3000:]
    rows, rules = map(int, r.stdout.split())
    assert rows == 2 * rules > 40
