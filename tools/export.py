"""Write the package from the notebooks: `nbdev_export`, then `ruff format`.

nbdev puts one empty line between cells, the formatter wants two before a function, and imports in
brackets stay absolute. So the modules are formatted after each export, and the notebooks stay the
only place to edit.
"""

import re
import subprocess
import sys
from pathlib import Path

from nbdev.doclinks import nbdev_export

ROOT = Path(__file__).resolve().parents[1]


def main():
    nbdev_export.__wrapped__()
    package = ROOT / 'cf_guidance'
    ruff = [sys.executable, '-m', 'ruff']
    for path in package.rglob('*.py'):
        dots = '.' * len(path.relative_to(package).parts)
        text = path.read_text(encoding='utf-8')
        relative = re.sub(r'^from cf_guidance\.(?=\S+ import \()', f'from {dots}', text, flags=re.M)
        if relative != text:
            path.write_text(relative, encoding='utf-8')
    subprocess.run([*ruff, 'check', '--select', 'I', '--fix', '--quiet', package], check=False)
    subprocess.run([*ruff, 'format', '--quiet', package], check=True)


if __name__ == '__main__':
    main()
