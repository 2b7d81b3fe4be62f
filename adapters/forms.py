"""What a module looks like: its linear layers, whether it mixes tokens, whether it is an FFN of some kind."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from itertools import combinations, permutations

from torch import nn

# a forward that takes one of these sees tokens beside the one that it computes
_OF_MIXERS = re.compile(
    r"(attention|attn|causal)_mask.*|.*cache.*|past_key.*|position_(ids|embeddings|bias)|rotary.*|cu_seqlens.*|freqs_cis|"
    r"alibi|layer_past|mems"
)


def is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer with a transposed weight
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, also of one that is wrapped, packed or quantised; None for other modules."""
    if isinstance(module, nn.Embedding):
        return None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nx"):
        return module.nx, module.nf
    shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(n, int) for n in shape):
        return None
    # an FFN may tell its width by the same names
    inner = any(linear_shape(child) for child in module.children())
    return shape if not inner or base_of(module) is not None or isinstance(module, nn.Linear) else None


def base_of(module: nn.Module) -> nn.Module | None:
    """The module that another one, an adapter of PEFT, stands around; None of others."""
    found = (module._modules.get(name) for name in ("base_layer", "original_module"))
    return next((base for base in found if base is not None), None)


def projections(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that are a module's direct children, by name."""
    return {name: child for name, child in module.named_children() if linear_shape(child)}


def linear_weights(module: nn.Module) -> int:
    """Weights (elements) of all linear layers in a module."""
    shape = linear_shape(module)
    own = shape[0] * shape[1] if shape else 0
    if shape and not isinstance(module, nn.Linear) and any(linear_shape(child) for child in module.children()):
        own = 0  # a wrapper's layers are its children
    return own + sum(linear_weights(child) for child in module.children())


def mixes_tokens(module: nn.Module) -> bool:
    """Whether a module's forward sees tokens beside the one that it computes: mixers do, and blocks around them."""
    if any(isinstance(child, nn.modules.conv._ConvNd) for child in module.children()):
        return True
    return any(_OF_MIXERS.fullmatch(name) for name in _parameters_of_forward(module))


def is_mixer(module: nn.Module) -> bool:
    """Whether a module is attention, a recurrence or a convolution over tokens, and so holds no FFN."""
    if not mixes_tokens(module):
        return False
    if len(projections(module)) > 1 or any(hasattr(module, name) for name in ("head_dim", "is_causal")):
        return True
    return not any(mixes_tokens(part) for child in module.children() for part in child.modules())


def is_block(module: nn.Module) -> bool:
    """Whether a module holds a mixer, and so is more than one FFN or one mixer."""
    return not is_mixer(module) and any(is_mixer(part) for child in module.children() for part in child.modules())


def takes_hidden_states_alone(module: nn.Module) -> bool:
    """Whether ``module(x)`` is a call: attention has two or three linear layers too, but needs more."""
    return arguments_needed(module) == 1


def arguments_needed(module: nn.Module) -> int:
    """How many arguments a call of a module has at the least."""
    parameters = _parameters_of_forward(module).values()
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.default is p.empty and p.kind in kinds for p in parameters)


def _parameters_of_forward(module: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        parameters = dict(inspect.signature(type(module).forward).parameters)
    except (TypeError, ValueError):  # compiled code has none
        return {}
    parameters.pop("self", None)
    return parameters


def gated(layers: dict[str, nn.Module]) -> Iterator[tuple[str, ...]]:
    """Readings of a module's linear layers as those of a gated FFN, by shape: (gate, up, down) or (fused, down)."""
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    if len(layers) == 3:
        for gate, up, down in permutations(layers):
            if shapes[gate] == shapes[up] == shapes[down][::-1]:
                yield gate, up, down
    elif len(layers) == 2:
        for fused, down in permutations(layers):
            d_ff, d_model = shapes[down]
            if shapes[fused] == (d_model, 2 * d_ff):
                yield fused, down


def ungated(layers: dict[str, nn.Module]) -> tuple[str, str] | None:
    """Names of two linear layers, in this order, that widen d_model to d_ff and narrow it back."""
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    for up, down in combinations(shapes, 2):
        if shapes[down] == shapes[up][::-1] and shapes[up][1] > shapes[up][0]:
            return up, down
    return None


def is_ffn(module: nn.Module) -> bool:
    """Whether a module has the linear layers, or the stacked weights, of an FFN or of experts, of whatever form."""
    if linear_shape(module) or mixes_tokens(module):
        return False
    layers = projections(module)
    pair = len(layers) <= 3 and ungated(layers) is not None
    return pair or any(True for _ in gated(layers)) or bool(stacked(module))


def outside_mixers(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """All linear layers of a block that are not in its mixers, by name, in their order."""
    found = {}
    for name, child in module.named_children():
        if linear_shape(child):
            found[prefix + name] = child
        elif not is_mixer(child):
            found |= outside_mixers(child, f"{prefix}{name}.")
    return found


def stacked(module: nn.Module) -> list[str]:
    """Names of the parameters in which a module keeps the weights of several experts; empty if it does not."""
    if mixes_tokens(module) or isinstance(module, (nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)):
        return []
    own = dict(module.named_parameters(recurse=False))
    for name, child in module.named_children():  # a layer per projection that holds it for all experts
        weights = {f"{name}.{key}": p for key, p in child.named_parameters(recurse=False) if p.ndim == 3}
        own |= weights if len(weights) == 1 and not isinstance(child, nn.modules.conv._ConvNd) else {}
    shapes = {name: tuple(p.shape) for name, p in own.items() if p.ndim == 3}
    narrowing = any(_widens_and_narrows(a[1:], b[1:]) for a, b in permutations(shapes.values(), 2))
    if len(shapes) >= 2 and narrowing:
        return list(shapes)
    flat = {name: tuple(p.shape) for name, p in own.items() if p.ndim == 2 and min(p.shape) > 1}
    return list(flat) if len(flat) >= 3 and len(set(flat.values())) == 1 and not projections(module) else []


def _widens_and_narrows(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether weights of these shapes are an expert's up and down, or its gate and up in one and its down."""
    if min(*a, *b) == 1:
        return False
    sizes = {a, a[::-1]}
    fused = any(size in sizes for size in ((2 * b[0], b[1]), (2 * b[1], b[0])))
    return fused or (a != a[::-1] and b in sizes)
