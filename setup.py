"""Installs espnet_mpq and its `mpq` command; needs torch, no compiler and no ESPnet."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "espnet_mpq/__init__.py").read_text()).group(1)

setup(
    name="espnet_mpq",
    version=VERSION,
    description="Mixed precision low-bit (1/2/4/8) language models for ESPnet",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    packages=find_packages(include=["espnet_mpq", "espnet_mpq.*"]),
    package_data={"espnet_mpq": ["packed/FORMAT.md", "recipe/mpq.sh"]},
    install_requires=["torch>=1.13", "numpy", "PyYAML", "safetensors>=0.4", "scipy>=1.9"],
    extras_require={
        "espnet": ["espnet>=202402", "torchaudio", "tensorboard", "matplotlib"],
        "evaluate": ["kaldialign>=0.9"],
        "report": ["matplotlib"],
        "test": ["pytest", "pytest-timeout", "hypothesis", "kaldialign>=0.9", "ruff"],
    },
    entry_points={"console_scripts": ["mpq = espnet_mpq.bin.mpq:entry"]},
)
