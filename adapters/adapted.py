"""Linear layers with adapters on them, such as PEFT's LoRA: read unmerged, through their own forward.

Whatever an adapter adds (``B A x``, scaled; DoRA, IA3 and others that PEFT has), an adapted layer still is ``W x + b``.
Of LoRA W is the base layer's and ``B A``; of others their own forward says it, of the unit vectors. Random vectors
verify it. So adapters may be switched, scaled, turned off and trained between two prompts, and the model's own weights
stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import UnsupportedModelError
from .between import TOLERANCE
from .forms import base_of, linear_shape
from .weights import FLOATS, BeingRead, by_unit_vectors, data_of, is_machine_failure, without_bias

_ADVICE = "merge it first, merge_and_unload()"


def is_adapted(layer: nn.Module) -> bool:
    """Whether a linear layer is another one with adapters around it."""
    return base_of(layer) is not None and linear_shape(layer) is not None


def kind_of(layer: nn.Module) -> str:
    """What to call an adapted layer: the tuner's name and the layer's."""
    parts = type(layer).__module__.split(".")
    tuner = parts[parts.index("tuners") + 1] if "tuners" in parts[:-1] else parts[-1]
    return f"{tuner} {type(layer).__name__}"


@torch.no_grad()
def values_of(layer: nn.Module, name: str) -> Tensor:
    """The weights ``[out, in]`` that a layer computes with, its adapters included.

    Raises:
        UnsupportedModelError: its answers are not those of any weights.
    """
    inputs, _ = linear_shape(layer)
    like = _like(layer)
    if like is None or like.is_meta:
        raise UnsupportedModelError(f"{name} is a {kind_of(layer)} whose base layer keeps no plain weights: {_ADVICE}")
    try:
        found = _by_its_parts(layer)
        if found is None:
            found = by_unit_vectors(lambda x: without_bias(layer, _answer(layer, x)), inputs, like.dtype, like.device)
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(4, inputs, generator=generator, dtype=torch.float32, device="cpu").to(like)
        expected, nothing = (without_bias(layer, _answer(layer, own)) for own in (x, torch.zeros_like(x)))
    except Exception as error:
        if is_machine_failure(error):
            raise
        raise UnsupportedModelError(
            f"{name} is a {kind_of(layer)} that does not run on hidden states alone ({error}): {_ADVICE}"
        ) from error
    expected = expected.float()
    off = (x.float() @ found.float().mT - expected).abs().max()
    if nothing.any() or not off <= TOLERANCE[found.dtype] * expected.abs().max():
        raise UnsupportedModelError(
            f"{name} is a {kind_of(layer)} that computes something other than W x + b, an adapter that popmm cannot "
            f"read: {_ADVICE}"
        )
    return found


def _by_its_parts(layer: nn.Module) -> Tensor | None:
    """A base layer's weights and PEFT's ``B A`` of the adapters that are on; None if there is more to it."""
    base, adapters = base_of(layer), getattr(layer, "lora_A", None)
    if type(base) is not nn.Linear or adapters is None or not hasattr(layer, "get_delta_weight"):
        return None
    if getattr(layer, "lora_variant", None):  # DoRA and others
        return None
    weight = base.weight.detach()
    if layer.disable_adapters or layer.merged:
        return weight
    for name in layer.active_adapters:
        if name in adapters:
            weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


@torch.no_grad()
def answer_of(layer: nn.Module) -> bytes:
    """A layer's answer to one random vector: it changes with its weights, its adapters, and which of them are on."""
    like = _like(layer)
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(1, linear_shape(layer)[0], generator=generator, dtype=torch.float32, device="cpu").to(like)
    return _answer(layer, x).float().cpu().numpy().tobytes()


def _like(layer: nn.Module) -> Tensor | None:
    """A weight of the dtype and device of a layer's inputs."""
    while base_of(layer) is not None:
        layer = base_of(layer)
    data = data_of(getattr(layer, "weight", None))
    return data if type(data) is Tensor and data.dtype in FLOATS else None


def _answer(layer: nn.Module, x: Tensor) -> Tensor:
    """Past the layer's hooks, which are for the model's own passes, and past whatever autocast is on around them."""
    with BeingRead(), torch.autocast(x.device.type, enabled=False):
        return layer.forward(x)
