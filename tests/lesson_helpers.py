"A part of a lesson, to run by itself."

import ast
import dis
import json

from conftest import ROOT


def part_of(lesson, *names):
    "Run what some names of a lesson rest on, and no more; return all that it defined."
    cells = json.loads((ROOT / f'nbs/{lesson}.ipynb').read_text(encoding='utf-8'))['cells']
    code = [''.join(o['source']) for o in cells if o['cell_type'] == 'code']
    body = [s for o in code if 'google.colab' not in o for s in ast.parse(o).body]
    uses = [names_of(o) for o in body]
    needed, before = set(names), None
    while needed != before:
        before = set(needed)
        for made, used in uses:
            if made & needed:
                needed |= used
    kept = [s for s, (made, _) in zip(body, uses, strict=True) if made & needed]
    found = {}
    exec(compile(ast.Module(kept, []), lesson, 'exec'), found)
    return found


def names_of(statement):
    "The global names that a statement makes or changes, and those that it uses."
    made, used = set(), set()
    codes = [compile(ast.Module([statement], []), 'lesson', 'exec')]
    for code in codes:
        codes += [o for o in code.co_consts if hasattr(o, 'co_code')]
        for o in dis.get_instructions(code):
            if o.opname in ('STORE_NAME', 'STORE_GLOBAL') and code is codes[0]:
                made.add(o.argval)
            elif o.opname in ('LOAD_NAME', 'LOAD_GLOBAL'):
                used.add(o.argval)
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    changed = [o.value for o in targets if isinstance(o, ast.Attribute)]
    return made | {o.id for o in changed if isinstance(o, ast.Name)}, used
