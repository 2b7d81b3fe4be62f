"""One call of compiled code as a program, with the inputs that it was recorded with.

Inputs that come anew (token ids, positions, masks) are copied to where the recorded call found them; weights, and what
the call writes (the cache, its lengths), must lie where they lay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from popmm.compat import inductor
from popmm.kernels.program import Program

COPIED = 256 << 10  # bytes of an input that is copied at each call, at most
HELD = 256 << 20  # bytes of tensors that a program holds, and of those that a check copies, at most


def record(compiled: Callable, args: tuple, stay: set[int]) -> tuple[Recorded, Any]:
    """A call of compiled code, recorded, and what it returns.

    Args:
        stay: places of small inputs that are not copied, for the code writes them.
    """
    recorded, drawn = Recorded(args, stay), torch.get_rng_state()
    with recorded.program.recording(), inductor.watching(recorded):
        results = compiled(*recorded.inputs)
    if not torch.equal(drawn, torch.get_rng_state()):
        recorded.lost = "it draws random numbers"
    return recorded, recorded.finish(args, results)


class Recorded:
    """A program, and what it reads and writes. While it is recorded, the watcher of ``inductor.watching``."""

    def __init__(self, args: tuple, stay: set[int]) -> None:
        self.program = Program()
        self.lost = ""  # why the call cannot be replayed
        self.written_copies: set[int] = set()  # places of inputs that were copied and ought to have stayed
        self._kept: list[Tensor] = []
        self._written: set[int] = set()  # storages, by address
        self._held = 0
        storages = [_storage(a) if _plain(a) else None for a in args]
        if not all(isinstance(a, int) or s is not None for a, s in zip(args, storages)):
            self.lost = "not all inputs are plain tensors on the CPU"
        copies = [
            i
            for i, (a, storage) in enumerate(zip(args, storages))
            if storage is not None
            and not isinstance(a, nn.Parameter)
            and a.numel() * a.element_size() <= COPIED
            and i not in stay
            and storages.count(storage) == 1
        ]
        self.inputs = list(args)
        self._copies = {}  # where the inputs at these places are written to
        for i in copies:
            self.inputs[i] = torch.empty_strided(args[i].shape, args[i].stride(), dtype=args[i].dtype, device="cpu")
            self._copies[i] = _once(self.inputs[i])
            self._copies[i].copy_(_once(args[i]))
        self._stay = [i for i, a in enumerate(args) if isinstance(a, Tensor) and i not in self._copies]
        self._places = [args[i].data_ptr() for i in self._stay]
        self._numbers = {i: a for i, a in enumerate(args) if not isinstance(a, Tensor)}

    # ---- as a watcher

    def kernel(self, function: int, arguments: Sequence[Tensor | int], written: Sequence[Tensor]) -> None:
        self._written |= {_storage(t) for t in written}
        if not self.program.append(function, arguments):
            self.lost = f"a kernel takes {len(arguments)} arguments"

    def torch_call(self, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        results = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, (tuple, list)) else []
        if not all(isinstance(r, Tensor) for r in results):
            self.lost = f"it calls {function}"
        written = inductor.writes_of(function, args, kwargs)
        self._written |= {_storage(t) for t in written}
        if not written and not results:
            self.lost = f"it calls {function}"
        for made in () if written else results:
            self.allocated(made)
        # by tensors of its own: a cache whose own ones are held is not handed out again
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        if written:
            self.program.append_torch(lambda: function(*args, **kwargs))
        else:

            def again() -> None:
                found = function(*args, **kwargs)
                for to, new in zip(results, [found] if isinstance(found, Tensor) else found):
                    to.copy_(new)

            self.program.append_torch(again)

    def allocated(self, tensor: Tensor) -> None:
        self._kept.append(tensor)
        self._held += tensor.untyped_storage().nbytes()

    def missed(self, reason: str) -> None:
        self.lost = reason

    def finish(self, args: tuple, results: Any) -> Any:
        """What the recorded call is to return, given what its code returned for the copied inputs."""
        copies = {_storage(self.inputs[i]): i for i in self._copies}
        self.written_copies = {i for storage, i in copies.items() if storage in self._written}
        for i in self.written_copies:
            _once(args[i]).copy_(self._copies[i])
        staying = {i: _storage(args[i]) for i in self._stay}
        self._state = [i for i, storage in staying.items() if storage in self._written]
        if self._held > HELD or sum(args[i].untyped_storage().nbytes() for i in self._state) > HELD:
            self.lost = "it holds too much memory"
        if not self.program.calls:
            self.lost = "nothing that it calls was seen"
        self._results: list[tuple[str, Any]] = []
        places = {id(a): i for i, a in enumerate(self.inputs) if isinstance(a, Tensor)}
        for own in results if isinstance(results, (tuple, list)) else ():
            if not isinstance(own, Tensor):
                self._results.append(("value", own))
            elif id(own) in places:
                self._results.append(("input", places[id(own)]))
            elif _storage(own) in staying.values():
                self._results.append(("value", own))
            else:
                self._results.append(("made", own))
                if _storage(own) in copies:
                    self.lost = "it returns part of an input"
        if not isinstance(results, (tuple, list)):
            self.lost = "it returns no list"
            return results
        self._kind = type(results)
        for i in self._stay:
            self.inputs[i] = None
        return self._returned(args)

    # ---- once recorded

    def fits(self, args: tuple) -> bool:
        """Whether all that is not copied lies where it lay, and numbers are the same."""
        return [args[i].data_ptr() for i in self._stay] == self._places and self.counts_as(args)

    def counts_as(self, args: tuple) -> bool:
        """Whether numbers among the inputs are those that it was recorded with."""
        return all(args[i] == number for i, number in self._numbers.items())

    def __call__(self, args: tuple) -> Any:
        for i, to in self._copies.items():
            to.copy_(_once(args[i]))
        self.program.run()
        return self._returned(args)

    def state(self, args: tuple) -> list[Tensor]:
        """Copies of the inputs that a call writes."""
        return [_memory(args[i]).clone() for i in self._state]

    def set_state(self, args: tuple, state: list[Tensor]) -> None:
        for i, own in zip(self._state, state):
            _memory(args[i]).copy_(own)

    def _returned(self, args: tuple) -> Any:
        return self._kind(
            args[own] if kind == "input" else own.clone() if kind == "made" else own for kind, own in self._results
        )


def equal(results: Sequence, others: Sequence) -> bool:
    """Whether tensors are the same bit for bit, and all else too."""
    return len(results) == len(others) and all(
        torch.equal(_bytes(a), _bytes(b)) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(results, others)
    )


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def _plain(a: Any) -> bool:
    kind = type(a) in (Tensor, nn.Parameter, nn.Buffer)
    return kind and a.device.type == "cpu" and a.layout is torch.strided and not (a.is_conj() or a.is_neg())


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _once(t: Tensor) -> Tensor:
    """A tensor without the repetitions of an expanded one."""
    repeated = [size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride())]
    return t[tuple(slice(0, 1) if own else slice(None) for own in repeated)] if any(repeated) else t


def _memory(t: Tensor) -> Tensor:
    """All that a tensor's storage holds, uint8."""
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(t.untyped_storage())
