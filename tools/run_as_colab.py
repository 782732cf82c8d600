"""Run notebooks as Colab runs them, one after the other, and say how long each took.

Each starts in an empty folder, all cells run whatever their flags, `google.colab` is there, and
`%pip` only prints what it would install: run this in an environment that has just that. Needs
nbclient and ipykernel, which Colab has. The exit code is 1 if a notebook fails or takes longer
than Colab's readers should wait.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

LIMIT = 180  # seconds
STARTUP = """
import google.colab
from IPython import get_ipython


def pip(line):
    print('pip', line)


get_ipython().register_magic_function(pip, 'line')
"""


def run(path, folder):
    "Run one notebook in an empty folder. Return what went wrong, or an empty text."
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(nb, timeout=LIMIT, resources={'metadata': {'path': str(folder)}})
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as e:
        return re.sub(r'\x1b\[[\d;]*m', '', str(e))[-3000:]
    return '' if any('pip install' in str(c.get('outputs')) for c in nb.cells) else 'no install'


def main(paths):
    failed = 0
    with tempfile.TemporaryDirectory() as tmp:
        profile = Path(tmp, 'ipython/profile_default/startup')
        profile.mkdir(parents=True)
        (profile / 'colab.py').write_text(STARTUP, encoding='utf-8')
        stub = Path(tmp, 'stub/google/colab/__init__.py')
        stub.parent.mkdir(parents=True)
        stub.touch()
        path = os.pathsep.join([f'{tmp}/stub', *filter(None, [os.environ.get('PYTHONPATH')])])
        os.environ.update(
            IPYTHONDIR=f'{tmp}/ipython',
            PYTHONPATH=path,
            HF_HUB_OFFLINE='1',
            CUDA_VISIBLE_DEVICES='',
        )
        for path in paths:
            folder, start = Path(tmp, 'work'), time.time()
            folder.mkdir()
            problem = run(path, folder)
            seconds = time.time() - start
            problem = problem or (f'more than {LIMIT} s' if seconds > LIMIT else '')
            failed += bool(problem)
            print(f'{path}: {seconds:.0f} s {problem or "ok"}', flush=True)
            shutil.rmtree(folder)
    print(f'{len(paths) - failed} of {len(paths)} notebooks run as in Colab')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
