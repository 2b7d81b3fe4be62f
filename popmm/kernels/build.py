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

logger = logging.getLogger("popmm")

_SOURCES = [Path(__file__).with_name(name) for name in ("rows.c", "planes.c", "tiers.c")]
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
    "tiers_ffn": "aaassssaaaaisaaasaaai",
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None. ``POPMM_NATIVE=0`` in the environment turns them off."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if os.environ.get("POPMM_NATIVE") == "0" or compiler is None or platform.system() != "Linux":
        return None
    text = b"".join(file.read_bytes() for file in _READ) + " ".join([compiler, *_FLAGS, _processor()]).encode()
    key = hashlib.sha256(text).hexdigest()[:16]
    try:
        file = _cache_folder() / f"rows-{key}.so"
        if not file.exists():
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                built = Path(folder) / "rows.so"
                command = [compiler, *_FLAGS, "-o", str(built), *map(str, _SOURCES)]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                os.replace(built, file)  # another process may have been first
        return _declared(ctypes.CDLL(str(file)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", b"") or str(error).encode()
        logger.warning("the C kernels could not be built, torch serves instead: %s", detail.decode()[:300])
        return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = [_LETTERS[letter] for letter in arguments]
        function.restype = None if name in ("choose", "planes_decode") else ctypes.c_int64
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
