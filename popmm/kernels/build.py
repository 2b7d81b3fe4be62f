"""Compiles the C kernels on first use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger("popmm")

_SOURCES = [Path(__file__).with_name(name) for name in ("rows.c", "planes.c", "tiers.c", "attention.c", "few.c")]
_READ = [*_SOURCES, *sorted(Path(__file__).parent.glob("*.h"))]
_FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]

# arguments of each function of the C files: an address, a size (int64) or an int
_LETTERS = {"a": ctypes.c_void_p, "s": ctypes.c_int64, "i": ctypes.c_int}
_ARGUMENTS = {
    "gather_dot": "aisssassaai",
    "gather_sum": "aisssassasai",
    "block_dot": "aisssssasaai",
    "quantised_dot": "aaissssaasai",
    "choose": "asssaa",
    "planes_dot": "aaaasssiassaai",
    "planes_add": "aaaasssiassaai",
    "planes_decode": "aaaasssiiai",
    "tiers_ffn": "aaassssaaaaisaaaasaaai",
}
_OPERATORS = {
    "new_linear": "asssia",
    "free_linear": "s",
    "new_ffn": "aaassssaaaaisaa",
    "free_ffn": "s",
    "new_program": "",
    "free_program": "a",
    "record": "a",
    "append_call": "aaas",
    "run_program": "a",
}
_RESULTS = {
    **dict.fromkeys(("choose", "planes_decode", "free_linear", "free_ffn", "free_program", "record")),
    "new_program": ctypes.c_void_p,
    "run_program": ctypes.c_char_p,
}  # of the others an int64


@functools.cache
def _file() -> Path | None:
    """The compiled kernels' file, or None."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if os.environ.get("POPMM_NATIVE") == "0" or compiler is None or platform.system() != "Linux":
        return None
    command = [compiler, *_FLAGS, *os.environ.get("POPMM_CFLAGS", "").split()]
    return _built("rows", command, _SOURCES, _READ, "the C kernels could not be built, torch serves instead")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None.

    In the environment ``POPMM_NATIVE=0`` turns them off, and ``POPMM_CFLAGS`` adds to the compiler's options.
    """
    return None if _file() is None else _declared(ctypes.CDLL(str(_file())), _ARGUMENTS)


@functools.cache
def operators() -> ctypes.CDLL | None:
    """The same as operators of torch's dispatcher, or None. ``POPMM_OPERATORS=0`` turns them off."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if _file() is None or compiler is None or os.environ.get("POPMM_OPERATORS") == "0":
        return None
    home = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-O2", "-march=native", "-shared", "-fPIC", f"-I{home / 'include'}"]
    command += [f"-L{home / 'lib'}", "-ltorch_cpu", f"-DTORCH={torch.__version__}", f"-Wl,-rpath,{_file().parent}"]
    source, header = (Path(__file__).with_name(name) for name in ("operators.cpp", "program.hpp"))
    instead = "the native operators could not be built, calls through Python serve instead"
    file = _built("operators", command, [source, _file()], [source, header, _file()], instead)
    if file is None:
        return None
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        logger.warning("%s: %s", instead, str(error)[:300])
        return None
    return _declared(ctypes.CDLL(str(file)), _OPERATORS)


def _built(name: str, command: list[str], sources: list[Path], read: list[Path], instead: str) -> Path | None:
    """The shared library that a compiler makes of some files, from the cache if it has made it before."""
    text = b"".join(file.read_bytes() for file in read) + " ".join([*command, _processor()]).encode()
    key = hashlib.sha256(text).hexdigest()[:16]
    try:
        file = _cache_folder() / f"{name}-{key}.so"
        if not file.exists():
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                built = Path(folder) / "built.so"
                command = [command[0], "-o", str(built), *map(str, sources), *command[1:]]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                os.replace(built, file)  # another process may have been first
        return file
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", b"") or str(error).encode()
        logger.warning("%s: %s", instead, detail.decode()[:300])
        return None


def _declared(library: ctypes.CDLL, functions: dict[str, str]) -> ctypes.CDLL:
    for name, arguments in functions.items():
        function = getattr(library, name)
        function.argtypes = [_LETTERS[letter] for letter in arguments]
        function.restype = _RESULTS.get(name, ctypes.c_int64)
    return library


def _processor() -> str:
    """What ``-march=native`` depends on: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "popmm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="popmm-"))
