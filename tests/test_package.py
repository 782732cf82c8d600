"The installed package: imports are quiet, cheap and need only their extra; the wheel is complete."

import importlib
import json
import subprocess
import zipfile

import pytest
from conftest import CFG, MODULES, ROOT, copy_repo, python

# The extra that each module needs at its import; all others need none.
EXTRA = dict.fromkeys(['families', 'guiders', 'pipelines'], 'diffusers')
EXTRA |= {f'{lab}{m}': 'lab' for m in ('plots', 'sweeps') for lab in ('', 'lab.')}
EXTRA |= {
    f'lab.{m}': 'lab'
    for m in (
        *('backends', 'commands', 'compare', 'draw', 'export'),
        *('gallery', 'leaderboard', 'plan', 'search', 'store', 'widgets'),
    )
}

# Import a module while every package that its extra does not install is hidden.
HIDDEN = """
import importlib, sys
from importlib.metadata import packages_distributions, requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

module, requirements = sys.argv[1], sys.argv[2:]

def closure(requirements, seen):
    for line in requirements:
        r = Requirement(line)
        name = canonicalize_name(r.name)
        if name not in seen and (r.marker is None or r.marker.evaluate({'extra': ''})):
            seen.add(name)
            try:
                closure(requires(r.name) or [], seen)
            except importlib.metadata.PackageNotFoundError:
                pass
    return seen

installed = closure(requirements, set())
hidden = {
    package
    for package, dists in packages_distributions().items()
    if package != 'cf_guidance' and not {canonicalize_name(d) for d in dists} & installed
}

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in hidden:
            return self.finder.find_spec(name, path, target)

for name in [o for o in sys.modules if o.partition('.')[0] in hidden]:
    del sys.modules[name]
sys.meta_path[:] = map(Hiding, sys.meta_path)
importlib.import_module(f'cf_guidance.{module}')
"""

STATE = """
import importlib, logging, os, random, sys
import diffusers, matplotlib as mpl, numpy as np, pandas, torch, transformers

def state():
    return dict(
        random=random.getstate(),
        numpy=[str(o) for o in np.random.get_state()],
        torch=torch.get_rng_state().tolist(),
        threads=torch.get_num_threads(),
        dtype=torch.get_default_dtype(),
        grad=torch.is_grad_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        rc=dict(mpl.rcParams),
        print=np.get_printoptions(),
        cwd=os.getcwd(),
        env=dict(os.environ),
        log=logging.root.level,
        pandas=pandas.get_option('display.max_rows'),
    )

before = state()
for module in sys.argv[1:]:
    importlib.import_module(f'cf_guidance.{module}')
    after = state()
    changed = [k for k in before if before[k] != after[k]]
    assert not changed, f'{module} changes {changed}'
"""

# Packages that a module does not load at its import, though they are installed.
_HEAVY = ['diffusers', 'transformers', 'accelerate', 'torchsde', 'matplotlib', 'pandas', 'scipy']
NOT_LOADED = {m: _HEAVY for m in MODULES if m not in EXTRA and not m.startswith('lab.')}
NOT_LOADED['lab.plots'] = NOT_LOADED['plots'] = ['diffusers', 'transformers']


def installed_by(extra):
    "The requirements that pip installs for `cf_guidance[extra]`."
    names = {None: [], 'lab': ['diffusers', 'sde', 'lab']}.get(extra, [extra])
    return [r for n in ('', *names) for r in CFG[f'{n}_requirements'.lstrip('_')].split()]


@pytest.mark.parametrize('mod', MODULES)
def test_import_is_quiet_and_light(mod):
    code = f'import sys, cf_guidance.{mod}; print({NOT_LOADED.get(mod, [])} & sys.modules.keys())'
    r = python('-W', 'error::DeprecationWarning:cf_guidance', '-c', code.replace('{[', '{*['))
    assert r.stderr == ''
    assert r.stdout == 'set()\n'


@pytest.mark.parametrize('mod', MODULES)
def test_module_needs_only_its_extra(mod):
    r = python('-c', HIDDEN, mod, *installed_by(EXTRA.get(mod)))
    assert r.returncode == 0, r.stderr
    assert r.stdout + r.stderr == ''


@pytest.mark.parametrize('mod', EXTRA)
def test_missing_extra_is_named(mod):
    r = python('-c', HIDDEN, mod, *installed_by(None))
    assert r.returncode == 1
    last = r.stderr.splitlines()[-1]
    assert last.startswith('ImportError: cf_guidance.')
    assert last.endswith(f'pip install "cf_guidance[{EXTRA[mod]}]"')


def test_imports_change_no_global_state():
    r = python('-c', STATE, *MODULES)
    assert r.returncode == 0, r.stderr


def test_needs_names_the_extra():
    from cf_guidance._extras import needs

    with pytest.raises(
        ImportError, match=r'^plots needs pandas: pip install "cf_guidance\[lab\]"$'
    ):
        with needs('lab', 'plots'):
            raise ModuleNotFoundError("No module named 'pandas'", name='pandas')


def test_outer_needs_names_its_own_extra():
    from cf_guidance._extras import needs

    with pytest.raises(ImportError, match=r'^sweeps needs diffusers: .*\[lab\]"$'):
        with needs('lab', 'sweeps'):
            with needs('diffusers', 'pipelines'):
                raise ModuleNotFoundError("No module named 'diffusers'", name='diffusers')


def test_needs_leaves_other_errors_alone():
    from cf_guidance._extras import needs

    with pytest.raises(ModuleNotFoundError, match='not_of_ours'):
        with needs('lab', 'plots'):
            importlib.import_module('not_of_ours')


def test_core_needs_four_packages():
    names = [r.partition('>')[0] for r in CFG['requirements'].split()]
    assert names == ['torch', 'numpy', 'safetensors', 'fastcore']


def test_models_load_in_older_transformers():
    "transformers 4 needs prefixed weights and vocabulary files, which 5 does not write."
    for pipe in (p.parent for p in (ROOT / 'cf_guidance/models').rglob('model_index.json')):
        with open(pipe / 'text_encoder/model.safetensors', 'rb') as f:
            head = json.loads(f.read(int.from_bytes(f.read(8), 'little')))
        assert all(k.startswith('text_model.') for k in head if k != '__metadata__'), pipe.name
        for file in ('vocab.json', 'merges.txt', 'tokenizer_config.json'):
            assert (pipe / 'tokenizer' / file).exists(), pipe.name


def test_schedules_needs_only_the_standard_library():
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import cf_guidance.schedules'
    r = python('-I', '-S', '-c', code)
    assert r.returncode == 0, r.stderr


def test_version():
    r = python('-c', 'import cf_guidance; print(cf_guidance.__version__)')
    assert r.stdout.strip() == CFG['version']
    assert f'## {CFG["version"]}' in (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert f'\nversion: {CFG["version"]}\n' in (ROOT / 'CITATION.cff').read_text(encoding='utf-8')


def build(hook, cwd, out):
    "Build a wheel or an sdist of the project in `cwd`, without a network."
    code = f'import sys; from setuptools import build_meta as b; print(b.build_{hook}(sys.argv[1]))'
    r = python('-c', code, out, cwd=cwd)
    assert r.returncode == 0, r.stderr
    return out / r.stdout.splitlines()[-1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel that is built from the sdist, and the sources of both."
    tmp = tmp_path_factory.mktemp('wheel')
    src, out = copy_repo(tmp / 'src'), tmp / 'out'
    sdist = build('sdist', src, out)
    subprocess.run(['tar', 'xf', sdist, '-C', tmp], check=True)
    return build('wheel', tmp / sdist.name.removesuffix('.tar.gz'), out), src


def test_wheel_holds_the_package(wheel):
    file, src = wheel
    with zipfile.ZipFile(file) as z:
        names = set(z.namelist())
    package = {p.relative_to(src).as_posix() for p in src.glob('cf_guidance/**/*') if p.is_file()}
    meta = {n for n in names if '.dist-info/' in n}
    assert names - meta == package
    assert {n.split('/')[-1] for n in meta} >= {'METADATA', 'LICENSE', 'entry_points.txt'}


def test_wheel_is_small_and_safe(wheel):
    with zipfile.ZipFile(wheel[0]) as z:
        infos = z.infolist()
    data = ('cf_guidance/models/', 'cf_guidance/data/')
    assert sum(i.compress_size for i in infos if i.filename.startswith(data)) <= 30e6
    pickles = ('.pkl', '.pickle', '.pt', '.pth', '.bin', '.ckpt', '.joblib')
    assert not [i.filename for i in infos if i.filename.endswith(pickles)]


def test_wheel_names_its_extras(wheel):
    with zipfile.ZipFile(wheel[0]) as z:
        (name,) = [n for n in z.namelist() if n.endswith('.dist-info/METADATA')]
        meta = z.read(name).decode()
    lines = [o for o in meta.splitlines() if o.startswith('Requires-Dist: ')]
    assert len([o for o in lines if 'extra ==' not in o]) == 4
    assert 'Requires-Dist: torch>=2.6' in lines
    for extra in ('diffusers', 'sde', 'lab', 'dev'):
        assert f'Provides-Extra: {extra}' in meta.splitlines()


def test_wheel_works_elsewhere(wheel):
    file = wheel[0]
    code = f'import sys; sys.path.insert(0, {str(file)!r}); import cf_guidance; print(cf_guidance)'
    r = python('-I', '-c', code, cwd=file.parent)
    assert r.returncode == 0, r.stderr
    assert file.name in r.stdout
