"""Only what pyproject.toml cannot say: popmm-lm-eval.pth goes to the root of site-packages, see popmm_lm_eval.py."""

import os
import sys
import sysconfig

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

PTH = "popmm-lm-eval.pth"


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
data = [(site_packages, [PTH])] if "editable_wheel" in sys.argv else []
setup(distclass=WithData, cmdclass={"build_py": WithPth}, data_files=data)
