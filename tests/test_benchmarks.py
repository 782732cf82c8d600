"Each benchmark runs. How fast it is, is measured when the machine is quiet, and never a test."

import json
import math
import shutil

import pytest
from conftest import ENV, ROOT, python

SMALLEST = {
    'guided': '--steps 3 --repeats 1 --calls 1 --sd15 0',
    'pipelines': '--steps 3 --repeats 1 --calls 1 --sd15 0',
    'samplers': '--steps 3 --repeats 1',
    'continuous': '--steps 3 --repeats 1 --train 3',
    'metrics': '--repeats 1',
    'sweep': '--steps 2 --repeats 1 --values 2',
}


def test_all_are_here():
    assert set(SMALLEST) == {p.stem for p in (ROOT / 'benchmarks').glob('*.py')}


@pytest.mark.parametrize('name', SMALLEST)
def test_benchmark(name, tmp_path):
    shutil.copytree(ROOT / 'benchmarks', tmp_path / 'benchmarks')
    kept = tmp_path / 'benchmarks' / f'{name}.json'
    kept.unlink()
    r = python(f'benchmarks/{name}.py', *SMALLEST[name].split(), cwd=tmp_path, env=ENV)
    assert r.returncode == 0, r.stderr[-3000:]
    rows = json.loads(kept.read_text())['rows']
    assert rows
    assert all(math.isfinite(v) for v in rows.values())
