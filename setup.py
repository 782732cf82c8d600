"The package as settings.ini describes it; nbdev reads the same file."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
repo = cfg['git_url']


def web_links(md):
    "Give the README's relative links and pictures the address of the repository, for PyPI."
    md = re.sub(r'(!\[[^]]*\]\()(?![\w]+:|#)', rf'\1{repo}/raw/{cfg["branch"]}/', md)
    return re.sub(r'(\]\()(?![\w]+:|#)', rf'\1{repo}/blob/{cfg["branch"]}/', md)


def requirements(*names):
    "The requirements that settings.ini lists for some extras, each of them once."
    return sorted({o for name in names for o in cfg[f'{name}_requirements'].split()})


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    long_description=web_links((root / 'README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='Apache-2.0',
    url=repo,
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Natural Language :: English',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    packages=find_packages(include=['cf_guidance', 'cf_guidance.*']),
    package_data={'cf_guidance': ['models/**/*', 'data/**/*', 'lab/explorers/*.js', 'py.typed']},
    zip_safe=False,
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={
        'diffusers': requirements('diffusers'),
        'sde': requirements('sde'),
        'lab': requirements('diffusers', 'sde', 'lab'),
        'ray': requirements('diffusers', 'sde', 'lab', 'ray'),
        'dev': requirements('diffusers', 'sde', 'lab', 'ray', 'dev'),
    },
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': ['cf_guidance=cf_guidance._modidx:d'],
    },
)
