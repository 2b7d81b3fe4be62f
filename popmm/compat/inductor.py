"""What popmm knows of code that torch's compiler generates for the CPU: which kernels it calls, and how to watch it.

Inductor's Python code is a module with one function per kernel in its globals, bound from C++ with a C function of the
same arguments beside it (``kernel``). What does not look so is not watched, and then nothing is taken for known.
"""

from __future__ import annotations

import ctypes
import re
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

OWN = "popmm_native"  # the operators that note themselves
_ALLOCATES = "empty_strided_cpu"
_KERNEL = re.compile(r"^(\w+) = async_compile\.cpp_pybinding\(\[(.*?)\],", re.MULTILINE)


class Watcher(Protocol):
    """Learns what generated code does, in its order."""

    def kernel(self, function: int, arguments: Sequence[Tensor | int], written: Sequence[Tensor]) -> None:
        """It called a C function at this address."""

    def torch_call(self, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """It called an operator of torch that is no view and none of popmm's own."""

    def allocated(self, tensor: Tensor) -> None:
        """It made a tensor, which its kernels name."""

    def missed(self, reason: str) -> None:
        """It did something that cannot be told."""


@dataclass(frozen=True)
class _Kernel:
    call: Callable
    function: int  # address
    writes: tuple[bool, ...]  # by argument


def compile_graph(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """As ``torch.compile(backend="inductor")`` without options compiles a graph."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs)


def may_watch() -> bool:
    """Whether calls made now mean nothing but what they compute: no gradient, nobody who looks on."""
    return not torch.is_grad_enabled() and _get_current_dispatch_mode() is None


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside, the watcher learns what generated code does in this thread."""
    from torch._inductor.codecache import PyCodeCache

    changed: list[tuple[types.ModuleType, str, Any]] = []
    thread = threading.get_ident()

    def here() -> bool:
        return threading.get_ident() == thread

    try:
        for module in PyCodeCache.modules:
            for name, stands_in in _stand_ins(module, watcher, here).items():
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, stands_in)
        with _Operators(watcher):
            yield
    finally:
        for module, name, own in reversed(changed):
            setattr(module, name, own)


def _stand_ins(module: types.ModuleType, watcher: Watcher, here: Callable[[], bool]) -> dict[str, Callable]:
    """What takes the place of a generated module's globals while it is watched."""
    found = {}
    for name, kernel in _kernels(module).items():

        def called(*arguments, kernel: _Kernel | Callable = kernel):
            if not here():
                return getattr(kernel, "call", kernel)(*arguments)
            if not isinstance(kernel, _Kernel):
                watcher.missed("a kernel of unknown form")
                return kernel(*arguments)
            result = kernel.call(*arguments)
            known = len(arguments) == len(kernel.writes) and all(isinstance(a, (Tensor, int)) for a in arguments)
            if result is not None or not known:
                watcher.missed("a kernel of other arguments")
                return result
            written = [a for a, writes in zip(arguments, kernel.writes) if writes]
            watcher.kernel(kernel.function, arguments, written)
            return None

        found[name] = called
    allocate = getattr(module, _ALLOCATES, None)
    if allocate is not None:

        def allocated(*arguments):
            tensor = allocate(*arguments)
            if here():
                watcher.allocated(tensor)
            return tensor

        found[_ALLOCATES] = allocated
    return found


def _kernels(module: types.ModuleType) -> dict[str, _Kernel | Callable]:
    """A generated module's kernels by name; those of a form that is not known as they are."""
    try:
        source = Path(module.__file__).read_text()
    except (OSError, TypeError):
        source = ""
    types_of = {name: re.findall(r"'([^']*)'", given) for name, given in _KERNEL.findall(source)}
    found: dict[str, _Kernel | Callable] = {}
    for name, value in vars(module).items():
        home = getattr(getattr(value, "__self__", None), "__file__", None)
        if isinstance(value, types.BuiltinFunctionType) and isinstance(home, str) and name in types_of:
            function = getattr(ctypes.CDLL(home), value.__name__, None)
            address = ctypes.cast(function, ctypes.c_void_p).value if function is not None else None
            writes = tuple(kind.endswith("*") and not kind.startswith("const ") for kind in types_of[name])
            found[name] = value if address is None else _Kernel(value, address, writes)
        elif callable(value) and name.startswith(("cpp_", "triton_")):
            found[name] = value
    return found


class _Operators(TorchDispatchMode):
    """Tells a watcher of operators that are called."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace != OWN and not _is_view(func):
            self.watcher.torch_call(func, args, kwargs or {}, result)
        return result


def _is_view(func) -> bool:
    """Whether an operator only looks at its input in another way."""
    schema = func._schema
    aliases = [r.alias_info for r in schema.returns]
    return not schema.is_mutable and bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def writes_of(func, args: tuple, kwargs: dict) -> list[Tensor]:
    """Which of an operator's arguments it writes."""
    given = {a.name: value for a, value in zip(func._schema.arguments, args)} | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [value for value in map(given.get, written) if isinstance(value, Tensor)]
