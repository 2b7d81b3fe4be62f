"""Where a language model's layers are: all of its lists of blocks, and no other lists."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from torch import nn

from popmm.compat import CACHE_NAMES

from .forms import is_block, is_ffn, is_mixer, outside_mixers, ungated

_OTHER_MODALITY = re.compile(r"vision|visual|image|audio|speech")


def find_layers(decoder: nn.Module) -> list[nn.Module]:
    """The blocks of all layer stacks of a language model, in their order.

    A list is a stack if its elements hold FFNs; a list of stages, each with a list of blocks, counts as the blocks
    of its stages. Lists inside a block (experts, adapters) belong to the block. If no list holds an FFN, the longest
    one whose elements are more than single layers is given.
    """
    layers: list[nn.Module] = []
    others: list[nn.Module] = []
    seen: set[int] = set()

    def walk(module: nn.Module) -> None:
        for name, child in module.named_children():
            if id(child) in seen or _is_of_other_modality(name, child):
                continue
            seen.add(id(child))
            elements = list(child.children())
            if isinstance(child, nn.ModuleList) or (isinstance(child, (nn.Sequential, nn.ModuleDict)) and elements):
                stages = [element for element in elements if _holds_blocks(element)]
                if stages:
                    walk(child)
                    continue
                blocks = isinstance(child, nn.ModuleList) or all(map(is_block, elements))
                if blocks and any(map(_holds_ffn, elements)):
                    # an element may stand in a list several times
                    layers.extend(child if isinstance(child, (nn.ModuleList, nn.Sequential)) else elements)
                    continue
                if any(True for element in elements for _ in element.children()):
                    others.append(child)
            walk(child)

    walk(decoder)
    return layers or list(max(others, key=len, default=nn.ModuleList()).children())


def beside(model: nn.Module, decoder: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """FFNs of a model's other decoders, stacks of blocks with a cache of their own, each with its decoder."""
    inside = {id(part) for part in decoder.modules()}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or _OTHER_MODALITY.search(name) or not _takes_cache(module):
            continue
        for child in module.children():
            blocks = child if isinstance(child, nn.ModuleList) and id(child) not in inside else ()
            for part in (part for block in blocks for part in block.modules() if is_ffn(part)):
                if id(part) not in seen:
                    seen.add(id(part))
                    yield part, module


def _takes_cache(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters
    return any(name in parameters for name in CACHE_NAMES)


def _holds_ffn(module: nn.Module) -> bool:
    if any(is_ffn(part) for part in module.modules()):
        return True
    return any(is_mixer(part) for part in module.modules()) and ungated(outside_mixers(module)) is not None


def _holds_blocks(element: nn.Module) -> bool:
    """Whether there is a stack of blocks inside of an element."""
    lists = [part for part in element.modules() if isinstance(part, nn.ModuleList)]
    return any(is_block(block) and _holds_ffn(block) for inner in lists for block in inner)


def _is_of_other_modality(name: str, module: nn.Module) -> bool:
    """Whether a part of the decoder reads pictures or sounds: its FFNs are not the language model's."""
    reads = getattr(module, "main_input_name", "input_ids")
    return reads not in ("input_ids", "inputs_embeds") or bool(_OTHER_MODALITY.search(name))
