"Each notebook is a test: its cells run, except those with a flag of `tst_flags` in settings.ini."

import json
import re

import pytest
from conftest import CFG, ENV, NBS, ROOT, name, python

RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
nb, skip, force, root = sys.argv[1:]
ok, _ = test_nb(Path(nb), skip_flags=skip.split(), force_flags=force.split(), basepath=root)
sys.exit(not ok)
"""


def failed_cell(nb, err):
    "The source of the cell that the traceback names."
    found = re.search(r'While Executing Cell #(\d+)', err)
    if not found:
        return ''
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    return ''.join(cells[int(found[1]) - 1]['source'])


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook(nb, request):
    flags = request.config.getoption('--flags')
    env = dict(ENV, HF_HUB_OFFLINE='0') if 'net' in flags.split() else ENV
    r = python('-c', RUN, nb, CFG['tst_flags'], flags, ROOT, cwd=nb.parent, env=env)
    if r.returncode:
        where = f'{name(nb)}, in this cell:\n\n{failed_cell(nb, r.stderr)}'
        pytest.fail(f'{where}\n\n{r.stderr[-6000:]}{r.stdout[-1000:]}', pytrace=False)
