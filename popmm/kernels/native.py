"""The C kernels of ``rows.c``, compiled on first use; without a compiler the torch twins serve."""

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
from torch import Tensor

logger = logging.getLogger("popmm")

_SOURCE = Path(__file__).with_name("rows.c")
_FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
PARTS = 16  # partial sums of gather_sum, whatever the number of threads


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None. ``POPMM_NATIVE=0`` in the environment turns them off."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if os.environ.get("POPMM_NATIVE") == "0" or compiler is None or platform.system() != "Linux":
        return None
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join([compiler, *_FLAGS, _processor()]).encode()).hexdigest()[:16]
    try:
        file = _cache_folder() / f"rows-{key}.so"
        if not file.exists():
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                built = Path(folder) / "rows.so"
                subprocess.run(
                    [compiler, *_FLAGS, "-o", str(built), str(_SOURCE)], check=True, capture_output=True, timeout=120
                )
                os.replace(built, file)  # another process may have been first
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", b"") or str(error).encode()
        logger.warning("the C kernels could not be built, torch serves instead: %s", detail.decode()[:300])
        return None


def serves(*tensors: Tensor) -> bool:
    """Whether the C kernels can read these tensors' rows."""
    plain = all(t.device.type == "cpu" and t.dtype in _KINDS and t.stride(-1) == 1 for t in tensors)
    return plain and library() is not None


def gather_dot(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    index, x = index.contiguous(), x.float().contiguous()
    out = torch.empty(index.shape, device="cpu")
    library().gather_dot(*_rows(rows), _p(index), *map(ctypes.c_int64, index.shape), _p(x), _p(out))
    return out


def gather_sum(rows: Tensor, index: Tensor, h: Tensor) -> Tensor:
    index, h = index.contiguous(), h.float().contiguous()
    parts = torch.empty(PARTS, len(index), rows.shape[1], device="cpu")
    sizes = map(ctypes.c_int64, index.shape)
    library().gather_sum(*_rows(rows), _p(index), *sizes, _p(h), ctypes.c_int64(PARTS), _p(parts))
    return parts.sum(0)


def quantised_dot(codes: Tensor, scale: Tensor, x: Tensor, bits: int, group: int, block: Tensor, n_rows: int) -> Tensor:
    x, block = x.float().contiguous(), block.contiguous()
    out = torch.empty(len(x), n_rows, device="cpu")
    sizes = [ctypes.c_int64(n) for n in (n_rows, x.shape[1], group)]
    library().quantised_dot(_p(codes), _p(scale), bits, *sizes, _p(x), _p(block), ctypes.c_int64(len(x)), _p(out))
    return out


def block_dot(matrices: Tensor, x: Tensor, block: Tensor) -> Tensor:
    x, block = x.float().contiguous(), block.contiguous()
    _, n_rows, d = matrices.shape
    out = torch.empty(len(x), n_rows, device="cpu")
    sizes = map(ctypes.c_int64, (*matrices.stride()[:2], n_rows, d))
    library().block_dot(_p(matrices), _KINDS[matrices.dtype], *sizes, _p(block), ctypes.c_int64(len(x)), _p(x), _p(out))
    return out


def choose(score: Tensor, k: int) -> Tensor:
    score = score.contiguous()
    index = torch.empty(len(score), k, dtype=torch.int64, device="cpu")
    work = torch.empty(score.shape[1], dtype=torch.int32, device="cpu")
    sizes = [ctypes.c_int64(n) for n in (*score.shape, k)]
    library().choose(_p(score), *sizes, _p(work), _p(index))
    return index


def _p(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def _rows(rows: Tensor) -> tuple:
    stride, d = rows.stride(0), rows.shape[1]
    return _p(rows), _KINDS[rows.dtype], ctypes.c_int64(stride), ctypes.c_int64(d)


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
