"""Check every family of pipelines on tiny networks, and write the table of the documentation.

The table is `cf_guidance/data/families.json`: per family the largest differences between runs that
must agree, or the sentence that says why it cannot have a property.
"""

import json
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tests'))


def main():
    import diffusers
    from tiny_families import FAMILIES as made

    from cf_guidance.families import check_family
    from cf_guidance.pipelines import FAMILIES

    warnings.simplefilter('ignore')
    found = dict(diffusers=diffusers.__version__, families={}, pipelines={})
    for name, (cls, make) in made.items():
        found['families'][name] = {
            k: v if isinstance(v, str) else float(f'{v:.0e}')
            for k, v in check_family(*make(), steps=3).items()
        }
        found['pipelines'][name] = [cls, FAMILIES[cls].since]
        print(name)
    text = json.dumps(found, indent=1)
    (ROOT / 'cf_guidance/data/families.json').write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
