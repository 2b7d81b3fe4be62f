"""Only what pyproject.toml cannot say: files for the root of site-packages.

popmm-lm-eval.pth: see popmm_lm_eval.py. popmm-editable.pth, of editable installs alone: has Python ask setuptools'
finder before it looks into the current folder, where a clone of this repository that is called popmm would be taken for
the package.
"""

import os
import sys
import sysconfig

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

PTH, EDITABLE_PTH = "popmm-lm-eval.pth", "popmm-editable.pth"


class WithPth(build_py):
    """Wheels hold the file beside the packages."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(PTH, self.build_lib)

    def get_outputs(self, include_bytecode=True):
        own = [] if self.editable_mode else [os.path.join(self.build_lib, PTH)]
        return super().get_outputs(include_bytecode) + own


class WithData(Distribution):
    """Editable installs ask for ``has_data`` before they install data files, and setuptools calls it otherwise."""

    has_data = Distribution.has_data_files


# editable ones have no such place for it, but install data files into the environment
site_packages = os.path.relpath(sysconfig.get_path("purelib"), sysconfig.get_path("data"))
data = [(site_packages, [PTH, EDITABLE_PTH])] if "editable_wheel" in sys.argv else []
setup(distclass=WithData, cmdclass={"build_py": WithPth}, data_files=data)
