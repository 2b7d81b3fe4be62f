"""Which layout an FFN's weights get."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from popmm.adapters import UnsupportedModelError
from popmm.layouts.copy import CopyLayout
from popmm.layouts.gate import GateLayout
from popmm.layouts.permute import PermuteLayout
from popmm.layouts.tiers import TiersLayout
from popmm.method.budget import RegionSizes

if TYPE_CHECKING:
    from popmm.adapters import FFNSite
    from popmm.config import PopConfig

logger = logging.getLogger("popmm")
Layout = CopyLayout | PermuteLayout | GateLayout | TiersLayout


def choose_layout(
    site: FFNSite, sizes: RegionSizes, several: dict[int, RegionSizes], config: PopConfig, in_place: str
) -> Layout:
    """The layout that a config asks for; ``auto`` takes the measured faster one of those that are safe.

    Args:
        several: sizes for tokens that choose together, by how many they are at the least.
        in_place: why this site's weights cannot be reordered in place; empty if they can.

    Raises:
        ValueError: ``layout="permute"`` where it is not safe; says why.
    """
    fill_mean = config.fill == "mean"
    weight = site.weights().down
    adapted = site.packed is not None and site.packed.exact
    if adapted and config.selection == "gate" and not sizes.is_dense:
        raise UnsupportedModelError(
            f"{site.name} has adapters ({site.packed.kind}), and selection='gate' reads rows of weights as they lie: "
            "give selection='tiers' (bytes=0.25, say) or 'mask', or merge the adapters, merge_and_unload()"
        )
    if site.packed is not None and not adapted and config.selection != "tiers" and not sizes.is_dense:
        raise UnsupportedModelError(
            f"{site.name} is quantised ({site.packed.kind}), and selection={config.selection!r} reads rows of weights "
            "as they lie: give selection='tiers' (bytes=0.25, say), or load the model with unquantised weights"
        )
    if config.selection == "tiers" or (site.packed is not None and not adapted):
        return TiersLayout(sizes, several, site.combine, site.name)
    if adapted:
        in_place = "has adapters"
    if config.layout == "permute" and in_place:
        raise ValueError(f"layout='permute': {site.name} {in_place}; give layout='copy' or 'auto'")
    # on the CPU products read column slices at less bandwidth, 16-bit ones at half
    slow = weight.device.type == "cpu"
    copied = config.layout == "copy" or (config.layout == "auto" and (in_place != "" or slow))
    if config.selection == "gate":
        if not copied and not _lies_alone(weight):
            logger.warning(
                "layout='permute': the memory of %s's down projection is shared with other tensors or processes, so "
                "its columns are copied instead",
                site.name,
            )
            copied = True
        return GateLayout(sizes, fill_mean, config.gate_bits, not copied, site.name)
    if copied:
        return CopyLayout(sizes, fill_mean)
    return PermuteLayout(sizes, fill_mean, site.module, site.weights)


def _lies_alone(weight: Tensor) -> bool:
    """Whether nobody else has a weight's memory: no larger buffer that it is a part of, no other process."""
    data = weight.detach()
    whole = data.untyped_storage().nbytes() == data.numel() * data.element_size()
    return whole and not (data.device.type == "cpu" and data.is_shared())


def why_not_in_place(module: nn.Module, shared: set[int]) -> str:
    """Why a module's weights cannot be reordered in place, empty if they can.

    Args:
        shared: ids of parameters that several modules of the model hold.
    """
    for name, parameter in module.named_parameters():
        if id(parameter) in shared:
            return f"shares {name} with another module"
        if parameter.is_inference():
            return f"was loaded in inference mode, so {name} cannot be written"
        if type(parameter) is not nn.Parameter or parameter.layout != torch.strided:
            return f"keeps {name} as {type(parameter).__name__}"
        if parameter.data.untyped_storage().nbytes() < parameter.numel() * parameter.element_size():
            return f"keeps {name} in overlapping memory"
    return ""


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that stand in several places of a model (tied weights)."""
    seen: set[int] = set()
    return {id(p) for _, p in model.named_parameters(remove_duplicate=False) if id(p) in seen or seen.add(id(p))}
