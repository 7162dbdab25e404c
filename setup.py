"Installs mammo_nb; everything it says stands in settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
names = lambda key: cfg.get(key, '').split()
scripts = [s.strip() for s in cfg.get('console_scripts', '').splitlines() if s.strip()]

setup(
    name=cfg['lib_name'], version=cfg['version'], license='Apache-2.0', license_files=['LICENSE'],
    description=cfg['description'], long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'], url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    classifiers=['Intended Audience :: Science/Research', 'Intended Audience :: Education', 'Development Status :: 3 - Alpha',
                 'Topic :: Scientific/Engineering :: Medical Science Apps.', 'Programming Language :: Python :: 3'],
    packages=find_packages(include=['mammo_nb', 'mammo_nb.*']), include_package_data=True, zip_safe=False,
    python_requires='>=' + cfg['min_python'], install_requires=names('requirements'),
    extras_require={k.removesuffix('_requirements'): names(k) for k in cfg if k.endswith('_requirements')},
    entry_points={'console_scripts': scripts, 'nbdev': [f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d']})
