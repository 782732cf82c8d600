"Each notebook is a test: all its cells run, but those with a flag of `tst_flags` in settings.ini."

import json, re
import pytest
from conftest import CFG, ENV, NBS, ROOT, name, python

RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
nb, skip, force, root = sys.argv[1:]
sys.exit(not test_nb(Path(nb), skip_flags=skip.split(), force_flags=force.split(), basepath=root)[0])
"""


def failed_cell(nb, err):
    "The source of the cell that the traceback names"
    m = re.search(r'While Executing Cell #(\d+)', err)
    return (
        ''.join(json.loads(nb.read_text(encoding='utf-8'))['cells'][int(m[1]) - 1]['source'])
        if m
        else ''
    )


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook(nb, request):
    flags = request.config.getoption('--flags')
    env = dict(ENV, HF_HUB_OFFLINE='0') if 'net' in flags.split() else ENV
    r = python('-c', RUN, nb, CFG['tst_flags'], flags, ROOT, cwd=nb.parent, env=env)
    if r.returncode:
        pytest.fail(
            f'{name(nb)}, in this cell:\n\n{failed_cell(nb, r.stderr)}\n\n{r.stderr[-6000:]}{r.stdout[-1000:]}',
            pytrace=False,
        )
