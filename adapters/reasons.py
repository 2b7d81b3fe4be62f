"""Why nothing in a model can be pruned, said in one true sentence."""

from __future__ import annotations

import inspect
from typing import get_args

from torch import nn

from popmm.compat import CACHE_NAMES, OTHER_STATES, Cache

from .base import DecoderLayer
from .forms import linear_weights, mixes_tokens

_OWN_CACHES = ("mems", "past_buckets_states")
_OTHER_FORM = "register an adapter for this form (entry-point group 'popmm.adapters')"


def why_never_decoding(model: nn.Module, decoder: nn.Module) -> str:
    """Why a model does not decode token by token; empty if it does."""
    kind = type(model).__name__
    reads = getattr(model, "main_input_name", "input_ids")
    parameters = inspect.signature(type(decoder).forward).parameters
    own = [name for name in _OWN_CACHES if name in parameters and not any(n in parameters for n in CACHE_NAMES)]
    own += _own_cache_classes(parameters)
    if own:
        return (
            f"{kind} keeps what it has read in {own[0]}, a form of its own: popmm prunes models that decode on a cache "
            "of transformers' Cache classes"
        )
    takes_cache = any(name in parameters for name in (*CACHE_NAMES, *OTHER_STATES))
    generates = _takes_anything(parameters) and _can_generate(model)
    if generates and not takes_cache and not any(map(_takes_a_cache, decoder.modules())):
        return (
            f"{kind} takes no cache: it reads the whole text again for each token and never decodes token by token, so "
            "there is nothing to prune online"
        )
    if not takes_cache and not generates:
        what = "is an encoder" if reads == "input_ids" else f"reads {reads}"
        return (
            f"{kind} {what}: its {type(decoder).__name__} takes no cache, so it never decodes token by token and there "
            "is nothing to prune online; popmm prunes decoders, such as AutoModelForCausalLM loads"
        )
    causal = [m.is_causal for m in decoder.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if getattr(decoder.config, "is_decoder", True) is False and causal and not any(causal):
        return (
            f"{kind} is an encoder (is_decoder=False in its {type(decoder.config).__name__}): it reads whole texts at "
            "once and never decodes token by token; popmm prunes decoders, such as AutoModelForCausalLM loads"
        )
    return ""


def _own_cache_classes(parameters) -> list[str]:
    """Names of cache classes that a forward's annotations ask for and that are none of transformers' Cache classes."""
    asked = [parameters[name].annotation for name in (*CACHE_NAMES, *OTHER_STATES) if name in parameters]
    kinds = [kind for annotation in asked for kind in (get_args(annotation) or (annotation,)) if isinstance(kind, type)]
    found = [kind for kind in kinds if kind.__name__.endswith("Cache")]
    return [] if any(issubclass(kind, Cache) for kind in found) else [kind.__name__ for kind in found]


def _takes_a_cache(module: nn.Module) -> bool:
    try:
        parameters = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):  # compiled code has none
        return True
    return any(name in parameters for name in (*CACHE_NAMES, *OTHER_STATES))


def _takes_anything(parameters) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _can_generate(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def why_nothing(model: nn.Module, layers: list[DecoderLayer], reasons: dict[str, str], types: dict[str, str]) -> str:
    """Why none of a model's layers has an FFN site.

    Args:
        reasons: of the FFNs that were found, by module name.
        types: their classes' names.
    """
    kind = type(model).__name__
    if not layers:
        return f"{kind} has no list of decoder layers in which FFNs could be looked for: {_OTHER_FORM}"
    if reasons:
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).append(name)
        return f"nothing in {kind} can be pruned: " + "; ".join(
            f"{_named(names[0], types[names[0]], reason)}{_and_others(names)}" for reason, names in by_reason.items()
        )
    layer = max(layers, key=lambda layer: linear_weights(layer.module))
    parts = {name: child for name, child in layer.module.named_children() if any(True for _ in child.parameters())}
    heavy = {name: child for name, child in parts.items() if linear_weights(child)} or parts
    held = ", ".join(f"{name} ({type(child).__name__})" for name, child in heavy.items())
    where = f"{layer.name} ({type(layer.module).__name__})"
    if heavy and all(any(mixes_tokens(part) for part in child.modules()) for child in heavy.values()):
        return (
            f"{kind} has no FFNs: its layers hold nothing but mixers over tokens, such as {held} in {where}; popmm "
            "prunes FFNs"
        )
    return (
        f"{where} holds no FFN of a known form; it has {held or 'no weights'}. popmm prunes FFNs (projections up "
        f"and down, with a gate or without) of plain linear layers: {_OTHER_FORM}"
    )


def _named(name: str, kind: str, reason: str) -> str:
    """The reason with the module's name before its class: "layers.0.mlp (GPT2MLP) is an FFN ..."."""
    return f"{name} ({kind}){reason.removeprefix(kind)}" if reason.startswith(kind) else f"{name}: {reason}"


def _and_others(names: list[str]) -> str:
    if len(names) == 1:
        return ""
    return f" (so are {len(names) - 1} more, to {names[-1]})" if len(names) > 2 else f" (so is {names[1]})"
