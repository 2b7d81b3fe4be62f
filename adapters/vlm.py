"""Vision-language models, recognised by their structure: a language model inside, placeholder tokens in the config.

LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL to Qwen3-VL, Gemma 3, InternVL, SmolVLM and Idefics 3, and
whatever else keeps ``image_token_id`` (or ``video_``, ``audio_``) in its configuration and puts the
picture's features in those tokens' places. FFNs of the language model are found as in any other model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import UnsupportedModelError, find_decoder
from .forms import is_linear

_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(?:id|index)")


@dataclass(frozen=True)
class Surroundings:
    """The module around a language model, which puts pictures into its input.

    ``module(input_ids=..., inputs_embeds=..., pixel_values=...)`` calls the decoder with embeddings alone.
    """

    module: nn.Module
    placeholders: dict[str, int]  # modality to token id

    def modalities(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Which tokens of a call stand for pictures, bool ``[batch, n_tokens]`` by modality."""
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        found = {}
        for name, token in self.placeholders.items():
            if ids is not None:
                found[name] = ids == token
            elif embeds is not None:
                embed = self.module.get_input_embeddings()
                row = embed(torch.full((), token, dtype=torch.long, device=embed.weight.device))
                found[name] = (embeds == row.to(embeds)).all(-1)
        return found


def find_surroundings(model: nn.Module) -> Surroundings | None:
    """The innermost module around the model's decoder whose input can hold pictures; None for text models."""
    decoder = find_decoder(model)
    around = [m for m in model.modules() if m is not decoder and any(part is decoder for part in m.modules())]
    for module in reversed(around):
        placeholders = _placeholders(getattr(module, "config", None))
        if placeholders:
            return Surroundings(module, placeholders)
    return None


def _placeholders(config) -> dict[str, int]:
    placeholders = {}
    for name in dir(type(config)) + list(vars(config)):
        match = _PLACEHOLDER.fullmatch(name)
        token = getattr(config, name, None) if match else None
        if isinstance(token, int) and not isinstance(token, bool):
            placeholders[match[1]] = token
    return placeholders


@dataclass
class TowerFFN:
    """An FFN of a vision tower, gated or not: its last projection's input is h ``[..., d_ff]``."""

    name: str
    down: nn.Linear
    weights: int  # linear weights of the FFN
    block_weights: int  # of the block it stands in


def tower_ffns(model: nn.Module) -> list[TowerFFN]:
    """FFNs of all blocks outside the language model.

    Raises:
        UnsupportedModelError: the model has no vision tower, or one whose FFNs are of no known form.
    """
    decoder = find_decoder(model)
    inside = {id(module) for module in decoder.modules()}
    names = {id(module): name for name, module in model.named_modules()}
    ffns: dict[str, TowerFFN] = {}  # stacks may be nested
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and id(m) not in inside]
    for stack in stacks if find_surroundings(model) is not None else []:
        if "audio" in names[id(stack)]:
            continue
        for block in stack:
            block_weights = sum(m.weight.numel() for m in block.modules() if is_linear(m))
            for module, down in _pairs(block):
                weights = sum(m.weight.numel() for m in module.children() if is_linear(m))
                name = names[id(module)]
                ffns[name] = TowerFFN(name, down, weights, block_weights)
    if not ffns:
        raise UnsupportedModelError(
            f"vision='prune': this {type(model).__name__} has no vision tower with FFNs of a known form (two linear "
            "layers, or three); give vision='dense'"
        )
    return list(ffns.values())


def _pairs(block: nn.Module) -> Iterator[tuple[nn.Module, nn.Linear]]:
    """(FFN, its down projection): children that widen d_model to d_ff, and one that narrows it back."""
    for module in block.modules():
        linears = [child for child in module.children() if isinstance(child, nn.Linear)]
        for down in linears:
            shape = (down.in_features, down.out_features)
            wide = [other for other in linears if (other.out_features, other.in_features) == shape]
            if wide and down.in_features > down.out_features:
                yield module, down
