"""Write the package from the notebooks: `nbdev_export`, then `ruff format`.

nbdev puts one empty line between cells, the formatter wants two before a function. So the modules
are formatted after each export, and the notebooks stay the only place to edit.
"""

import subprocess
import sys
from pathlib import Path

from nbdev.doclinks import nbdev_export

ROOT = Path(__file__).resolve().parents[1]


def main():
    nbdev_export.__wrapped__()
    package = ROOT / 'cf_guidance'
    subprocess.run([sys.executable, '-m', 'ruff', 'format', '--quiet', package], check=True)


if __name__ == '__main__':
    main()
