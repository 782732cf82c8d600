"The repository is in order: generated files agree with the notebooks, notebooks are clean and small, no name is undefined."

import ast, json, re, subprocess, sys
import pytest
from conftest import ENV, NBS, ROOT, copy_repo, name, python, repo_files

CODE = ['cf_guidance', 'tools', 'tests', 'benchmarks', 'setup.py']


def ruff(*args):
    return subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise', *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_no_undefined_names():
    "Undefined and unused names and star imports in code; undefined names in notebooks, also in cells that the tests skip"
    r = ruff(
        '--select', 'F', '--ignore', 'F811', *CODE
    )  # @patch gives methods of several classes the same name
    assert r.returncode == 0, r.stdout + r.stderr
    r = ruff('--select', 'F821', 'nbs')
    assert r.returncode == 0, r.stdout + r.stderr


def test_export_and_clean_change_nothing(tmp_path):
    copy = copy_repo(tmp_path / 'repo')
    before = {p: p.read_bytes() for p in copy.rglob('*') if p.is_file()}
    for cmd in (
        'from nbdev.doclinks import nbdev_export as f',
        'from nbdev.clean import nbdev_clean as f',
    ):
        r = python('-c', f'{cmd}; f.__wrapped__()', cwd=copy, env=dict(ENV, PYTHONPATH=str(copy)))
        assert r.returncode == 0, r.stderr
    after = {
        p: p.read_bytes() for p in copy.rglob('*') if p.is_file() and '__pycache__' not in p.parts
    }
    changed = sorted(
        str(p.relative_to(copy))
        for p in before.keys() | after.keys()
        if before.get(p) != after.get(p)
    )
    assert not changed, 'run nbdev_export and nbdev_clean'


def test_readme_matches_its_notebook():
    r = python('tools/readme.py', '--check', cwd=ROOT)
    assert r.returncode == 0, r.stderr
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    links = re.findall(r'(?:\]\(|(?:src|href)=")([^)"\s#]+)', text)
    assert not [l for l in links if not re.match(r'\w+:', l) and not (ROOT / l).exists()], (
        'links of the README to files that are not there'
    )


def cells(nb):
    return json.loads(nb.read_text(encoding='utf-8'))['cells']


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook_is_clean(nb):
    assert nb.stat().st_size <= 300_000, 'more than 300 kB: make its pictures smaller'
    d = json.loads(nb.read_text(encoding='utf-8'))
    assert set(d['metadata']) <= {'kernelspec'}
    assert d['metadata']['kernelspec'] == dict(
        display_name='python3', language='python', name='python3'
    )
    code = [c for c in d['cells'] if c['cell_type'] == 'code']
    assert not [c['id'] for c in code if c['execution_count'] is not None], 'execution counts'
    assert not [c['id'] for c in d['cells'] if c['metadata']], 'metadata of cells'
    outs = [(c['id'], o) for c in code for o in c['outputs']]
    assert not [i for i, o in outs if o['output_type'] == 'error'], 'cells whose output is an error'
    assert not [i for i, o in outs if any('widget' in k for k in o.get('data', {}))], (
        'widgets, which show nothing in the docs'
    )
    assert not [i for i, o in outs if o.get('name') == 'stderr'], (
        'cells whose output has warnings or progress bars'
    )


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_notebook_has_one_title(nb):
    "A notebook opens with `# Title` and `> one line`, and no other text is a title"
    md = [
        re.sub(r'^```.*?^```', '', ''.join(c['source']), flags=re.M | re.S)
        for c in cells(nb)
        if c['cell_type'] == 'markdown'
    ]
    assert re.match(r'# \w.*\n+> \S', md[0]), md[0]
    assert [l for m in md for l in m.splitlines() if l.startswith('# ')] == md[0].splitlines()[
        :1
    ], 'text that is a title; are Markdown cells written as comments?'


def runs_in_docs(src):
    "Does nbdev run this cell as it builds the docs, though it does more than import?"
    if re.search(
        r'^#\|\s*(export|exports|exporti|exec_doc)\b|^#\|\s*eval:\s*false', src, flags=re.M
    ):
        return False
    try:
        nodes = list(ast.walk(ast.parse(src)))
    except SyntaxError:
        return False  # a magic
    has = lambda *types: any(isinstance(n, types) for n in nodes)
    return has(ast.Import, ast.ImportFrom) and has(ast.Expr, ast.Assign)


@pytest.mark.parametrize('nb', NBS, ids=name)
def test_imports_have_cells_of_their_own(nb):
    code = [''.join(c['source']) for c in cells(nb) if c['cell_type'] == 'code']
    if not any('#| default_exp' in c for c in code):
        return  # nothing to document, nothing is run
    bad = [c for c in code if runs_in_docs(c)]
    assert not bad, (
        'the docs build runs every cell that imports: give imports a cell of their own\n\n'
        + '\n\n'.join(bad)
    )


def text_of(path):
    if path.suffix != '.ipynb':
        return path.read_text(encoding='utf-8')
    drop = lambda data: {k: v for k, v in data.items() if not k.startswith('image/')}
    return json.dumps(
        [
            (c['source'], [dict(o, data=drop(o.get('data', {}))) for o in c.get('outputs', [])])
            for c in cells(path)
        ]
    )


def test_no_machine_paths():
    "Files name no folder of the machine they were written on"
    text = [
        p
        for p in repo_files()
        if p.suffix
        in {'.ipynb', '.py', '.md', '.yml', '.ini', '.toml', '.txt', '.in', '.json', '.css'}
    ]
    place = re.compile(r'(?<![\w.~}])/(?:work|home|root|Users|tmp|opt|mnt|content)/[\w.-]+')
    assert not [(name(p), m[0]) for p in text for m in place.finditer(text_of(p))]
