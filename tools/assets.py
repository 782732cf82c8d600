"""Copy into a built site what its pages load: KaTeX, ONNX Runtime, the explorers and their model.

npm installs the packages of tools/package.json into a cache outside the repository.
"""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPLORERS = ROOT / 'cf_guidance/lab/explorers'
RUNTIME = ('ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm')
# for a browser with a GPU
GPU_RUNTIME = (
    *('ort.jspi.min.mjs', 'ort-wasm-simd-threaded.jspi.mjs'),
    'ort-wasm-simd-threaded.jspi.wasm',
)


def node_modules():
    "The folder of the npm packages named in tools/package.json; npm installs them once."
    package = ROOT / 'tools/package.json'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'cf_guidance'
    folder = cache / f'npm-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}'
    if not (folder / 'complete').exists():
        npm = shutil.which('npm')
        if not npm:
            raise SystemExit('npm is missing: the site needs Node.js and npm')
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(package, folder)
        quiet = ['--no-audit', '--no-fund', '--ignore-scripts', '--loglevel', 'error']
        subprocess.run([npm, 'install', '--prefix', folder, *quiet], check=True)
        (folder / 'complete').touch()
    return folder / 'node_modules'


def copy_katex(site):
    "Copy KaTeX's style, scripts and fonts to site_libs/katex."
    dist, to = node_modules() / 'katex/dist', site / 'site_libs/katex'
    (to / 'contrib').mkdir(parents=True, exist_ok=True)
    (to / 'fonts').mkdir(exist_ok=True)
    for name in ('katex.min.css', 'katex.min.js', 'contrib/auto-render.min.js'):
        shutil.copy(dist / name, to / name)
    for font in (dist / 'fonts').glob('*.woff2'):
        shutil.copy(font, to / 'fonts')


def write_explorers(site):
    "Write each explorer as one module to explorers/, beside their loader site.js."
    loader = EXPLORERS / 'site.js'
    if not loader.exists():
        return
    sys.path.insert(0, str(ROOT))
    widgets = importlib.import_module('cf_guidance.lab.widgets')
    to = site / 'explorers'
    to.mkdir(exist_ok=True)
    shutil.copy(loader, to)
    for source in EXPLORERS.glob('*.js'):
        if source != loader and 'export default' in source.read_text(encoding='utf-8'):
            text = widgets.bundle(source.stem)
            (to / source.name).write_text(text, encoding='utf-8')
    for picture in (ROOT / 'cf_guidance/data/results').glob('*.webp'):
        shutil.copy(picture, to)


def copy_runtime(folder):
    "Copy ONNX Runtime for browsers, which the live model runs in, to `folder`."
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUNTIME + GPU_RUNTIME:
        shutil.copy(node_modules() / 'onnxruntime-web/dist' / name, folder)


def write_model(folder):
    "Write the embedded model as the live page loads it."
    sys.path.insert(0, str(ROOT))
    importlib.import_module('cf_guidance.lab.export').export_onnx(folder=folder)


def write_assets(site):
    copy_katex(site)
    write_explorers(site)
    copy_runtime(site / 'explorers/ort')
    write_model(site / 'explorers/model')


if __name__ == '__main__':
    write_assets(Path(sys.argv[1]))
