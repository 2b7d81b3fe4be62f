"""What is packed, and that the installed package is the one imported."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # an older torch brings it; pip builds with its own
    pytest.skip("setuptools 77 reads pyproject.toml's licence", allow_module_level=True)

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(build_meta.{}(sys.argv[1]))"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what git holds or would add, in a folder that is called popmm."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    folder = tmp_path_factory.mktemp("work") / "popmm"
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("shared/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(clone, what, out):
    out.mkdir()
    command = [sys.executable, "-c", BUILD.format(what), str(out)]
    run = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return out / run.stdout.splitlines()[-1]


def files_below(*folders):
    command = ["git", "-C", str(ROOT), "ls-files", *folders]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def test_the_source_archive_holds_all_that_make_test_needs(clone, tmp_path):
    archive = build(clone, "build_sdist", tmp_path / "dist")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {name for name in files_below("tests", "docs", "examples", "popmm", "adapters") if (ROOT / name).exists()}
    alone = {"Makefile", "constraints.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    alone |= {"popmm-lm-eval.pth", "popmm-editable.pth", "popmm_lm_eval.py", "popmm/kernels/rows.c"}
    assert (wanted | alone) - names == set()
    assert not [name for name in names if "__pycache__" in name]


def imported_from(folder, *, site=None):
    code = "import popmm, popmm.adapters; print(popmm.__file__); print(popmm.adapters.__file__)"
    if site is not None:  # as the interpreter does with its own site-packages
        code = f"import site, sys; site.addsitedir({str(site)!r})\n" + code
    arguments = ["-S", "-c", code] if site is not None else ["-c", code]
    environment = {**os.environ, "PYTHONPATH": ""}
    run = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return [Path(line) for line in run.stdout.splitlines()]


def test_an_editable_install_is_found_beside_a_clone_that_is_called_popmm(clone, tmp_path):
    wheel = build(clone, "build_editable", tmp_path / "dist")
    site = tmp_path / "site-packages"
    shutil.unpack_archive(wheel, site, "zip")
    for data in site.glob("popmm-*.data/data/**/*.pth"):  # where an installer puts data files
        shutil.move(data, site / data.name)
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (site / "zz.pth").write_text("\n".join(dependencies))  # paths alone: their own .pth files are not read
    expected = [clone / "popmm" / "__init__.py", clone / "adapters" / "__init__.py"]
    assert imported_from(clone.parent, site=site) == expected
    assert imported_from(tmp_path, site=site) == expected
