"The package as somebody gets it: modules that import quietly and cheaply, names that exist, a wheel with the models in it."

import json, subprocess, zipfile
import pytest
from conftest import CFG, MODULES, ROOT, copy_repo, python

IMPORT = """
import os, random, sys, logging
import numpy as np, torch, matplotlib as mpl
import diffusers, transformers, pandas
def state(): return dict(random=random.getstate(), numpy=[str(o) for o in np.random.get_state()], torch=torch.get_rng_state().tolist(), threads=torch.get_num_threads(),
    dtype=torch.get_default_dtype(), grad=torch.is_grad_enabled(), deterministic=torch.are_deterministic_algorithms_enabled(), rc=dict(mpl.rcParams),
    print=np.get_printoptions(), cwd=os.getcwd(), env=dict(os.environ), log=logging.root.level, pandas=pandas.get_option('display.max_rows'))
before = state()
import cf_guidance.{0}
after = state()
print([k for k in before if before[k] != after[k]])
"""
# what a module must not load, though it is installed
_HEAVY = ['diffusers', 'transformers', 'matplotlib', 'pandas', 'scipy', 'ipywidgets']
LIGHT = dict(
    transforms=_HEAVY,
    continuous=_HEAVY + ['accelerate'],
    denoisers=_HEAVY,
    karras=_HEAVY + ['torchsde'],
    toy=_HEAVY,
    guided=_HEAVY + ['accelerate', 'torchsde'],
    negatives=_HEAVY + ['accelerate', 'torchsde', 'safetensors'],
    attention=_HEAVY + ['accelerate', 'torchsde'],
    plots=['diffusers', 'transformers'],
)


@pytest.mark.parametrize('mod', MODULES)
def test_import_says_nothing(mod):
    r = python(
        '-c',
        f'import sys, cf_guidance.{mod} as m; bad = [o for o in {LIGHT.get(mod, [])} if o in sys.modules]; assert not bad, bad',
    )
    assert (r.returncode, r.stdout, r.stderr) == (0, '', '')


@pytest.mark.parametrize('mod', MODULES)
def test_import_changes_nothing(mod):
    r = python('-c', IMPORT.format(mod))
    assert r.returncode == 0, r.stderr
    assert r.stdout.splitlines()[-1] == '[]', 'importing changes a global state'


def test_models_load_in_older_transformers():
    "transformers 5 leaves out what transformers 4 needs: the prefix of the text encoder's weights (it then starts from random ones) and the vocabulary files"
    for pipe in (p.parent for p in (ROOT / 'cf_guidance/models').rglob('model_index.json')):
        with open(pipe / 'text_encoder/model.safetensors', 'rb') as f:
            head = json.loads(f.read(int.from_bytes(f.read(8), 'little')))
        assert all(k.startswith('text_model.') for k in head if k != '__metadata__'), pipe.name
        assert all(
            (pipe / 'tokenizer' / f).exists()
            for f in ('vocab.json', 'merges.txt', 'tokenizer_config.json')
        ), pipe.name


def test_schedules_needs_only_the_standard_library():
    if 'schedules' not in MODULES:
        pytest.skip('not written yet')
    r = python(
        '-I',
        '-S',
        '-c',
        f'import sys; sys.path.insert(0, {str(ROOT)!r}); import cf_guidance.schedules',
    )
    assert r.returncode == 0, r.stderr


def test_version():
    r = python('-c', 'import cf_guidance; print(cf_guidance.__version__)')
    assert r.stdout.strip() == CFG['version']
    assert f'## {CFG["version"]}' in (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')


def build(hook, cwd, out):
    "Build a wheel or an sdist of the project in `cwd`, without a network"
    r = python(
        '-c',
        f'import sys; from setuptools import build_meta as b; print(b.build_{hook}(sys.argv[1]))',
        out,
        cwd=cwd,
    )
    assert r.returncode == 0, r.stderr
    return out / r.stdout.splitlines()[-1]


def test_wheel(tmp_path):
    src, out = copy_repo(tmp_path / 'src'), tmp_path / 'out'
    sdist = build('sdist', src, out)
    subprocess.run(['tar', 'xf', sdist, '-C', tmp_path], check=True)
    whl = build('wheel', tmp_path / sdist.name.removesuffix('.tar.gz'), out)
    with zipfile.ZipFile(whl) as z:
        infos = z.infolist()
    names = {i.filename for i in infos}
    pkg = {p.relative_to(src).as_posix() for p in (src / 'cf_guidance').rglob('*') if p.is_file()}
    meta = {n for n in names if '.dist-info/' in n}
    assert names - meta == pkg, 'the wheel holds the package, all of it and nothing else'
    assert {n.split('/')[-1] for n in meta} >= {'METADATA', 'LICENSE', 'entry_points.txt'}
    models = [
        i for i in infos if i.filename.startswith(('cf_guidance/models/', 'cf_guidance/data/'))
    ]
    assert sum(i.compress_size for i in models) <= 20e6
    assert not [
        n
        for n in names
        if n.endswith(('.pkl', '.pickle', '.pt', '.pth', '.bin', '.ckpt', '.joblib'))
    ]
    run_elsewhere = f'import sys; sys.path.insert(0, {str(whl)!r}); import cf_guidance as g; assert {whl.name!r} in g.__file__, g.__file__'
    assert python('-I', '-c', run_elsewhere, cwd=tmp_path).returncode == 0
