"The package metadata of settings.ini, which nbdev reads too, handed to setuptools."
import configparser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class WithNotebooks(build_py):
    "The wheel carries the run notebooks as pgolf/notebooks, where the package looks for them without a checkout."
    def run(self):
        super().run()
        if self.editable_mode: return
        target = Path(self.build_lib)/cfg['lib_path']/'notebooks'
        target.mkdir(parents=True, exist_ok=True)
        for p in sorted((Path(cfg['nbs_path'])/'runs').glob('*.ipynb')): self.copy_file(str(p), str(target/p.name))



parser = configparser.ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
# dev_requirements, hub_requirements, ... become the extras dev, hub, ...
extras = {k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'], license='Apache-2.0',
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require=extras,
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), include_package_data=True,
    cmdclass=dict(build_py=WithNotebooks),
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]),
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Natural Language :: English',
                 'Programming Language :: Python :: 3.11', 'Programming Language :: Python :: 3.12', 'Programming Language :: Python :: 3.13'],
    zip_safe=False)
