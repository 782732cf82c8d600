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
    "Links and pictures of the README are relative to the repository; on PyPI they need its address"
    md = re.sub(r'(!\[[^]]*\]\()(?![\w]+:|#)', rf'\1{repo}/raw/{cfg["branch"]}/', md)
    return re.sub(r'(\]\()(?![\w]+:|#)', rf'\1{repo}/blob/{cfg["branch"]}/', md)


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
    ],
    packages=find_packages(include=['cf_guidance', 'cf_guidance.*']),
    package_data={'cf_guidance': ['models/**/*', 'data/**/*']},
    zip_safe=False,
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': ['cf_guidance=cf_guidance._modidx:d'],
    },
)
