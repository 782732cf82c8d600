"The repository is in order: generated files agree with the notebooks, and all files have one form."

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ENV, NBS, ROOT, copy_repo, name, python, repo_files

WORKFLOWS = sorted((ROOT / '.github/workflows').glob('*.yml'))


def ruff(*args):
    r = subprocess.run(
        [sys.executable, '-m', 'ruff', *args], cwd=ROOT, capture_output=True, text=True
    )
    return r.returncode, r.stdout + r.stderr


def test_ruff_check():
    code, says = ruff('check', '--no-cache', '--output-format', 'concise')
    assert code == 0, says


def test_ruff_format():
    code, says = ruff('format', '--no-cache', '--check', '--output-format', 'concise')
    assert code == 0, says


def test_ruff_has_no_exceptions():
    config = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['tool']['ruff']
    keys = {*config, *config['lint'], *config['format']}
    assert not [k for k in keys if 'exclude' in k or 'ignore' in k]


def test_export_and_clean_change_nothing(tmp_path):
    copy = copy_repo(tmp_path / 'repo')
    before = {p: p.read_bytes() for p in copy.rglob('*') if p.is_file()}
    env = dict(ENV, PYTHONPATH=str(copy), RUFF_NO_CACHE='true')
    clean = 'from nbdev.clean import nbdev_clean as f; f.__wrapped__()'
    for args in (['tools/export.py'], ['-c', clean]):
        r = python(*args, cwd=copy, env=env)
        assert r.returncode == 0, r.stderr
    after = {
        p: p.read_bytes() for p in copy.rglob('*') if p.is_file() and '__pycache__' not in p.parts
    }
    changed = [
        name(ROOT / p.relative_to(copy))
        for p in sorted(before.keys() | after.keys())
        if before.get(p) != after.get(p)
    ]
    assert not changed, 'run `python tools/export.py` and `nbdev_clean`'


def test_readme_matches_its_notebook():
    r = python('tools/readme.py', '--check', cwd=ROOT)
    assert r.returncode == 0, r.stderr


def test_every_notebook_has_its_badge_and_install_cell():
    r = python('tools/colab.py', '--check', cwd=ROOT)
    assert r.returncode == 0, r.stdout


def test_readme_links_exist():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    links = re.findall(r'(?:\]\(|(?:src|href)=")([^)"\s#]+)', text)
    local = [link for link in links if not re.match(r'\w+:', link)]
    assert not [link for link in local if not (ROOT / link).exists()]


def cells(nb):
    return json.loads(nb.read_text(encoding='utf-8'))['cells']


def source(cell):
    return ''.join(cell['source'])


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook_is_clean(nb):
    d = json.loads(nb.read_text(encoding='utf-8'))
    kernel = dict(display_name='python3', language='python', name='python3')
    assert d['metadata'].get('kernelspec') == kernel
    assert set(d['metadata']) == {'kernelspec'}
    code = [c for c in d['cells'] if c['cell_type'] == 'code']
    assert not [c['id'] for c in code if c['execution_count'] is not None], 'execution counts'
    assert not [c['id'] for c in d['cells'] if c['metadata']], 'metadata of cells'


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook_is_small(nb):
    assert nb.stat().st_size <= 300_000, 'more than 300 kB: make its pictures smaller'


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook_outputs_are_results(nb):
    outs = [(c['id'], o) for c in cells(nb) for o in c.get('outputs', [])]
    assert not [i for i, o in outs if o['output_type'] == 'error'], 'cells that end in an error'
    widgets = [i for i, o in outs if any('widget' in k for k in o.get('data', {}))]
    assert not widgets, 'widgets, which show nothing in the docs'
    noisy = [i for i, o in outs if o.get('name') == 'stderr']
    assert not noisy, 'cells whose output has warnings or progress bars'


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook_has_one_title(nb):
    "A notebook opens with `# Title` and `> one line`, and no other text is a title."
    md = [
        re.sub(r'^```.*?^```', '', source(c), flags=re.M | re.S)
        for c in cells(nb)
        if c['cell_type'] == 'markdown'
    ]
    assert re.match(r'# \w.*\n+> \S', md[0]), md[0]
    titles = [line for m in md for line in m.splitlines() if line.startswith('# ')]
    assert len(titles) == 1, 'text that is a title; are Markdown cells written as comments?'


def runs_in_docs(src):
    "Does nbdev run this cell when it builds the docs, although it does more than import?"
    never = r'^#\|\s*(export|exports|exporti|exec_doc)\b|^#\|\s*eval:\s*false'
    if re.search(never, src, flags=re.M):
        return False
    try:
        nodes = list(ast.walk(ast.parse(src)))
    except SyntaxError:
        return False  # a magic

    def has(*types):
        return any(isinstance(n, types) for n in nodes)

    return has(ast.Import, ast.ImportFrom) and has(ast.Expr, ast.Assign)


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_imports_have_cells_of_their_own(nb):
    code = [source(c) for c in cells(nb) if c['cell_type'] == 'code']
    if not any('#| default_exp' in c for c in code):
        return  # nothing to document, nothing is run
    bad = [c for c in code if runs_in_docs(c)]
    assert not bad, 'give these imports a cell of their own\n\n' + '\n\n'.join(bad)


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_cells_are_short(nb):
    code = [source(c) for c in cells(nb) if c['cell_type'] == 'code']
    for c in code:
        limit = 60 if re.search(r'^class ', c, flags=re.M) else 40
        assert len(c.splitlines()) <= limit, f'a cell of more than {limit} lines:\n\n{c}'


def test_public_names_have_one_meaning():
    syms = ast.literal_eval(
        (ROOT / 'cf_guidance/_modidx.py').read_text(encoding='utf-8').partition('d = ')[2]
    )['syms']
    places = {}
    for module, names in syms.items():
        for full in names:
            own = full.removeprefix(module + '.')
            if '.' not in own and not own.startswith('_'):
                places.setdefault(own, []).append(module)
    assert not {k: v for k, v in places.items() if len(v) > 1}


def imported(nb):
    "The modules of cf_guidance that the exported cells of a notebook import."
    for c in cells(nb):
        if re.match(r'#\| exports?\n', source(c)):
            yield from re.findall(r'^\s*from cf_guidance\.(\S+) import', source(c), flags=re.M)


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook_imports_only_lower_numbers(nb):
    def place(path):
        found = re.match(r'nbs/(lab/)?(\d+)_', path)
        return found and (bool(found[1]), int(found[2]))

    numbers = {}
    for other in NBS:
        module = re.search(r'#\| default_exp (\S+)', '\n'.join(map(source, cells(other))))
        if module:
            numbers[module[1]] = place(name(other))
    own = place(name(nb))
    if own:
        high = [m for m in imported(nb) if m in numbers and numbers[m] >= own]
        assert not high, f'{name(nb)} imports {high}'


@pytest.mark.parametrize('workflow', WORKFLOWS, ids=name)
def test_workflow_pins_its_actions(workflow):
    text = workflow.read_text(encoding='utf-8')
    uses = [u for u in re.findall(r'uses: (.*)', text) if not u.startswith('./')]
    assert not [u for u in uses if not re.fullmatch(r'[\w./-]+@[0-9a-f]{40} # v[\d.]+', u)]


@pytest.mark.parametrize('workflow', WORKFLOWS, ids=name)
def test_workflow_has_least_permissions(workflow):
    d = yaml.safe_load(workflow.read_text(encoding='utf-8'))
    assert d['permissions'] == {'contents': 'read'}
    for job in d['jobs'].values():
        writes = [k for k, v in job.get('permissions', {}).items() if v == 'write']
        assert set(writes) <= {'pages', 'id-token'}
        if writes:  # such a job only sends what another job has built
            assert not [s for s in job['steps'] if 'run' in s or 'checkout' in s['uses']]


def text_of(path):
    "The text of a file; of a notebook its sources and outputs, without pictures."
    if path.suffix != '.ipynb':
        return path.read_text(encoding='utf-8')

    def drop(data):
        return {k: v for k, v in data.items() if not k.startswith('image/')}

    outputs = [
        (c['source'], [dict(o, data=drop(o.get('data', {}))) for o in c.get('outputs', [])])
        for c in cells(path)
    ]
    return json.dumps(outputs)


def test_no_machine_paths():
    "Files name no folder of the machine they were written on. Colab's own folder is none."
    kinds = {'.ipynb', '.py', '.md', '.yml', '.ini', '.toml', '.txt', '.in', '.json', '.css'}
    place = re.compile(
        r'(?<![\w.~}])/(?:work|home|root|Users|tmp|opt|mnt|content(?!/drive))/[\w.-]+'
    )
    texts = {name(p): text_of(p) for p in repo_files() if p.suffix in kinds}
    assert not [(k, m[0]) for k, text in texts.items() for m in place.finditer(text)]
