"Shared by the tests. `pytest --flags 'slow net'` also runs the notebook cells with these flags."

import os
import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from shutil import copy2

import pytest

ROOT = Path(__file__).resolve().parents[1]
INI = ConfigParser(delimiters=['='], interpolation=None)
INI.read(ROOT / 'settings.ini', encoding='utf-8')
CFG = INI['DEFAULT']
NBS = [
    p for p in sorted((ROOT / 'nbs').rglob('[!_.]*.ipynb')) if '.ipynb_checkpoints' not in p.parts
]
PACKAGE = ROOT / 'cf_guidance'
MODULES = sorted(
    '.'.join(p.relative_to(PACKAGE).with_suffix('').parts) for p in PACKAGE.rglob('[!_]*.py')
)

# A background job of a shell ignores Ctrl-C, and so would each process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread per process, one process per core. No network: cells that need it have the flag `net`.
ENV = dict(
    os.environ,
    OMP_NUM_THREADS='1',
    MKL_NUM_THREADS='1',
    HF_HUB_OFFLINE='1',
    PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]),
)


def pytest_addoption(parser):
    parser.addoption(
        '--flags',
        default='',
        help='flags of notebook cells to run although settings.ini skips them, such as "slow net"',
    )


@pytest.fixture(scope='session')
def exported_model(tmp_path_factory):
    "A folder with the embedded model as the live page loads it."
    from cf_guidance.lab.export import export_onnx

    folder = tmp_path_factory.mktemp('model')
    export_onnx(folder=folder)
    return folder


def name(path):
    return path.relative_to(ROOT).as_posix()


def python(*args, **kw):
    "Run a fresh Python and return the finished process."
    return subprocess.run(
        [sys.executable, *map(str, args)],
        **dict(dict(env=ENV, capture_output=True, text=True), **kw),
    )


def repo_files():
    "The files of the repository, tracked or not yet."
    r = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '-z'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / f for f in r.stdout.split('\0') if f and (ROOT / f).is_file()]


def copy_repo(dest):
    "Copy the repository's files, for tests that write into it."
    for f in repo_files():
        to = dest / f.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        copy2(f, to)
    return dest
