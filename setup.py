"""Installs espnet_mpq and its `mpq` command; needs torch and no ESPnet.

With a C++ compiler it builds the CPU kernels too; without one the reference runs in their place.
"""

import re
import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "espnet_mpq/__init__.py").read_text()).group(1)


class BuildKernels(build_ext):
    """Compiles the kernel library as kernels/build.py does; a failure is no failure to install."""

    def get_ext_filename(self, fullname):
        # A plain C library, opened with ctypes: the same file for every Python, and no module.
        return str(Path(*fullname.split(".")).with_suffix(".so.1"))

    def build_extension(self, ext):
        build = runpy.run_path(str(ROOT / "espnet_mpq/kernels/build.py"))
        try:
            build["compile_library"](Path(self.get_ext_fullpath(ext.name)))
        except build["BuildError"] as error:
            self.warn(f"kernels not built, the reference will run: {error}")


setup(
    name="espnet_mpq",
    version=VERSION,
    description="Mixed precision low-bit (1/2/4/8) language models for ESPnet",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    packages=find_packages(include=["espnet_mpq", "espnet_mpq.*"]),
    package_data={
        "espnet_mpq": ["packed/FORMAT.md", "recipe/*.sh", "kernels/csrc/*", "kernels/README.md"]
    },
    ext_modules=[
        Extension(
            "espnet_mpq.kernels.libmpq_kernels",
            sources=[],
            depends=sorted(str(path) for path in (ROOT / "espnet_mpq/kernels/csrc").iterdir()),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    install_requires=["torch>=1.13", "numpy", "PyYAML", "safetensors>=0.4", "scipy>=1.9"],
    extras_require={
        "espnet": ["espnet>=202402", "torchaudio", "tensorboard", "matplotlib"],
        "report": ["matplotlib"],
        "test": ["pytest", "pytest-timeout", "hypothesis", "kaldialign>=0.9", "ruff"],
    },
    entry_points={"console_scripts": ["mpq = espnet_mpq.bin.mpq:entry"]},
)
