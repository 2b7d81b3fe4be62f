"""The tiny models and the settings that every promise is tested on: selection x layout x dtype x form of FFN."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import small_families
import tiny
import tiny_vlm
import torch
from transformers import masking_utils

import popmm


@dataclass(frozen=True)
class Case:
    """A tiny model; those of pictures get one in every prompt."""

    name: str
    make: Callable
    pictures: bool = False

    def build(self, dtype: torch.dtype = torch.float32):
        return self.make(self.name).to(dtype)

    def prompt(self, model, seed: int = 0, n_tokens: int = 9) -> dict[str, torch.Tensor]:
        """Inputs of one sequence."""
        if not self.pictures:
            ids = tiny.prompt(n_tokens, seed=seed)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = tiny_vlm.inputs(model, self.name, [seed], n_text=n_tokens)
        dtype = next(model.parameters()).dtype
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}


# experts outside transformers' interface: below each other in one matrix, with their router, given all tokens each
OWN_EXPERTS = [name for name in ("dbrx", "jetmoe", "llama4_text") if small_families.has(name)]
# Llama 4's own: not in transformers 5.17
CHUNKS_IN_STATIC_CACHES = "block_sequence_ids" in inspect.signature(masking_utils.create_chunked_causal_mask).parameters
if not CHUNKS_IN_STATIC_CACHES:
    OWN_EXPERTS.remove("llama4_text")
MODELS = {
    **{name: Case(name, tiny.dense) for name in tiny.DENSE},
    **{name: Case(name, tiny.dense) for name in tiny.UNGATED},
    **{name: Case(name, tiny.moe) for name in tiny.MOE},
    **{name: Case(name, small_families.small_model) for name in OWN_EXPERTS},
    **{f"{name} (pictures)": Case(name, tiny_vlm.build, pictures=True) for name in tiny_vlm.VLMS},
}
# one of each form: plain, with biases, fused, without a gate and transposed with biases, without a module, experts,
# with shared ones, transposed with biases, run by their module, with pictures
FORMS = [
    "llama",
    "llama-bias",
    "phi3",
    "gpt2",
    "opt",
    "mixtral",
    "qwen2-moe",
    "gpt-oss",
    *OWN_EXPERTS[1:2],
    "llava (pictures)",
    "qwen3-vl-moe (pictures)",
]

TIES = ["nemotron", "opt"]  # relu leaves channels at exactly 0, of which any may pass: they add nothing but means

SELECTIONS = {
    "mask": dict(selection="mask", candidate_fraction=0.2),
    "keep": dict(selection="keep", candidate_fraction=0.2),
    "gate": dict(selection="gate", gate_bits=16),
    "gate of some rows": dict(selection="gate", candidate_fraction=0.6),
    "gate 8": dict(selection="gate", gate_bits=8),
    "gate 4": dict(selection="gate", gate_bits=4),
    "tiers": dict(selection="tiers", ffn_ratio=0.72),
    "few bits": dict(selection="tiers", ffn_ratio=0.8),
    "all at 6 bits": dict(selection="tiers", weight_bits=6),
    "without a prompt": dict(selection="tiers", ffn_ratio=0.72, statistics="weights"),
    "mask, means": dict(selection="mask", fill="mean", prefill="pruned"),
    "gate, means": dict(selection="gate", gate_bits=16, fill="mean", prefill="pruned"),
    "routed": dict(selection="mask", importance="routed", shared_experts="prune"),
}
LAYOUTS = ["copy", "permute"]
DTYPES = [torch.float32, torch.bfloat16]


def config(selection: str, **more) -> popmm.PopConfig:
    return popmm.PopConfig(**{"ffn_ratio": 0.4, **SELECTIONS[selection], **more})


def each_model(others: tuple[str, ...] = ("mask",), selections: tuple[str, ...] = tuple(SELECTIONS)):
    """One model of each form by all selections, and the others by some."""
    pairs = [(m, s) for m in MODELS for s in (selections if m in FORMS else others)]
    return pytest.mark.parametrize("case, selection", [pytest.param(MODELS[m], s, id=f"{m}-{s}") for m, s in pairs])


each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def generate(model, inputs: dict, new: int = 4, **settings):
    """Tokens and logits of greedy decoding."""
    how = dict(do_sample=False, output_logits=True, return_dict_in_generate=True)
    output = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, **how, **settings)
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits)
