"""A decoder's call: its arguments, and what comes of its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class Arguments:
    """Reads a decoder's call, whatever way its arguments were given."""

    def __init__(self, forward: Callable) -> None:
        parameters = inspect.signature(forward).parameters.values()
        positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        self._names = tuple(p.name for p in parameters if p.kind in positional)

    def __call__(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        # by hand, for compiled code cannot look into a signature
        return {**dict(zip(self._names, args)), **kwargs} if args else kwargs


def input_shape(arguments: dict[str, Any]) -> tuple[int, int]:
    """(batch, tokens per sequence) of a decoder's call.

    Raises:
        ValueError: neither ``input_ids`` nor ``inputs_embeds``, or of another number of dimensions.
    """
    for name, ndim in (("input_ids", 2), ("inputs_embeds", 3)):
        value = arguments.get(name)
        if value is not None:
            if value.ndim != ndim:
                raise ValueError(
                    f"the language model was called with {name} of shape {tuple(value.shape)}: popmm reads "
                    f"{ndim} dimensions, [batch, tokens{', d_model' if ndim == 3 else ''}]"
                )
            return value.shape[0], value.shape[1]
    raise ValueError("the language model was called with neither input_ids nor inputs_embeds")


def without_backward(forward: Callable, is_stale: Callable[[], bool]) -> Callable:
    """A forward whose outputs refuse gradients when the weights are no longer stored as they were in it."""

    def refuse(gradient: Tensor) -> None:
        if not is_stale():
            return
        raise RuntimeError(
            "gradients through an attached model with layout='permute': its weights are stored otherwise "
            "by now than when this pass was computed. Attach with layout='copy', or call popmm.detach(model) before it"
        )

    def watch(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.requires_grad:
                value.register_hook(refuse)
        elif isinstance(value, (tuple, list)):
            for part in value:
                watch(part)

    def watched(*args, **kwargs):
        output = forward(*args, **kwargs)
        watch(list(output.values()) if isinstance(output, Mapping) else output)
        return output

    return watched
