"""Only what pyproject.toml cannot say: where ``popmm-lm-eval.pth`` goes, see popmm_lm_eval.py."""

import os
import sysconfig

from setuptools import Distribution, setup


class WithData(Distribution):
    """Editable installs ask for ``has_data`` before they install data files, and setuptools calls it otherwise."""

    has_data = Distribution.has_data_files


site_packages = os.path.relpath(sysconfig.get_path("purelib"), sysconfig.get_path("data"))
setup(distclass=WithData, data_files=[(site_packages, ["popmm-lm-eval.pth"])])
