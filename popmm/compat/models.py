"""Experts, attention and where weights lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import masking_utils as _masking
from transformers import modeling_utils as _modeling
from transformers.integrations import moe as _moe

ALL_EXPERTS_FUNCTIONS = _moe.ALL_EXPERTS_FUNCTIONS
default_apply_gate = _moe._default_apply_gate
grouped_mm = _moe._grouped_mm


def experts_implementation(config) -> str | None:
    """Name of the experts implementation that a configuration asks for, None if it has none."""
    return getattr(config, "_experts_implementation", None)


def set_back_experts(config, name: str | None) -> None:
    """Undoes ``model.set_experts_implementation`` exactly, without its checks."""
    config._experts_implementation_internal = name


def is_expert_parallel(module: nn.Module) -> bool:
    """Whether each device holds some of the experts only."""
    return bool(getattr(module, "_is_expert_parallel", False))


ATTENTION = "_attn_implementation_internal"  # where a configuration keeps the name of its attention


def attention_of(config) -> str | None:
    """Name of the attention that a configuration asks for."""
    return getattr(config, ATTENTION, None)


def register_attention(name: str, forward: Callable, like: str) -> Callable:
    """Adds an attention to transformers' own, with the masks of another; returns the forward of that other."""
    _modeling.ALL_ATTENTION_FUNCTIONS.register(name, forward)
    _masking.ALL_MASK_ATTENTION_FUNCTIONS.register(name, _masking.ALL_MASK_ATTENTION_FUNCTIONS[like])
    return _modeling.ALL_ATTENTION_FUNCTIONS[like]


def device_map(model: nn.Module) -> set[str]:
    """Devices over which accelerate has spread a model, as text; empty if it has not."""
    return {str(device) for device in getattr(model, "hf_device_map", {}).values()}


def decompress(model: nn.Module) -> None:
    """Unpacks a model whose weights compressed-tensors would unpack, for good, at its first forward."""
    for module in list(model.modules()):
        handle = getattr(module, "ct_decompress_hook", None)
        if handle is not None:
            module._forward_pre_hooks[handle.id](module, ())


def load_again(model: nn.Module) -> nn.Module:
    """The same model, read once more from the files that it came from, on the CPU.

    Raises:
        Whatever ``from_pretrained`` raises; ValueError: the model does not say where it came from.
    """
    source = getattr(model, "name_or_path", "")
    if not source or not hasattr(type(model), "from_pretrained"):
        raise ValueError("it was not loaded with from_pretrained")
    return type(model).from_pretrained(source, dtype=model.dtype)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings a module's weights for each call."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def forward_below_hooks(module: nn.Module) -> Callable | None:
    """The forward that accelerate's hooks on a module call, None without hooks."""
    return module.__dict__.get("_old_forward")


def hook_of(module: nn.Module) -> str:
    """What accelerate has put on a module, empty if nothing."""
    hook = getattr(module, "_hf_hook", None)
    return "" if hook is None else f"accelerate's {type(hook).__name__} is on it"


def is_exporting() -> bool:
    """Whether the call is being traced to be run elsewhere, by ``torch.export`` or ``torch.jit``."""
    # torch 2.11's compiler takes is_exporting() for true in whatever it compiles, but reads the flag behind it
    exporting = getattr(torch.compiler, "_is_exporting_flag", None)
    return (torch.compiler.is_exporting() if exporting is None else exporting) or torch.jit.is_tracing()


def rope_limit(config) -> int | None:
    """Tokens up to which positions turn the same way in every pass; None = always.

    Beyond it "dynamic" and "longrope" embeddings turn all positions of a pass by its furthest one.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters, *(own for own in parameters.values() if isinstance(own, dict))]
    turning = [own for own in kinds if own.get("rope_type") in ("dynamic", "longrope")]
    names = ("original_max_position_embeddings", "max_position_embeddings")
    found = [value for own in turning for name in names for value in (own.get(name), getattr(text, name, None))]
    return min((value for value in found if value), default=None)
