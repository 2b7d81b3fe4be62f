"""What popmm finds in every model type of transformers' causal and image-text-to-text mappings, without weights.

Each type is built from its default configuration on the meta device and described. Beside it stands what an independent
rule sees: modules with two or three linear layers that widen and narrow again, and parameters of three dimensions.

    python benchmarks/families.py [model_type ...]
"""

from __future__ import annotations

import sys
import time

import torch
import transformers
from popmm.adapters import UnsupportedModelError, describe
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

# what defaults leave open
SETTINGS = {
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "reformer": {"is_decoder": True},
    "deepseek_v2": {"num_experts_per_tok": 6},
}


def independent(decoder: nn.Module) -> list[str]:
    """Names of FFN-like modules, by shapes alone."""
    found = []
    for name, module in decoder.named_modules():
        linears = [m for m in module.children() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
        sizes = [tuple(m.weight.shape) for m in linears]
        wide = [a for a in sizes for b in sizes if a[0] > a[1] and b[0] == a[1] and b[1] in (a[0], a[0] / 2)]
        threes = [key for key, p in module.named_parameters(recurse=False) if p.ndim == 3]
        if (wide and len(sizes) in (2, 3)) or (len(threes) > 1 and not isinstance(module, nn.modules.conv._ConvNd)):
            found.append(f"{name} ({type(module).__name__})")
    return found


def build(auto, model_type: str) -> nn.Module:
    config = CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))
    with torch.device("meta"):
        return auto.from_config(config).eval()


def survey(auto, model_type: str) -> str:
    """One family's findings, and which kind of outcome they are."""
    try:
        model = build(auto, model_type)
    except Exception as error:
        print(f"{model_type}: not built from its defaults ({type(error).__name__})")
        return "not built"
    try:
        description = describe(model, probe=False)
    except UnsupportedModelError as error:
        print(f"{model_type}: REFUSED {error}")
        return "refused"
    except Exception as error:
        print(f"{model_type}: CRASH {type(error).__name__}: {error}")
        return "crash"
    sites = {site.name: site for site in description.sites()}
    prefix = f"{description.decoder_name}." if description.decoder_name else ""
    known = {*sites, *description.left_out}
    seen = [name for name in independent(description.decoder) if prefix + name.split(" ")[0] not in known]
    kinds = sorted({type(site.module).__name__ for site in sites.values()})
    print(f"{model_type}: {len(description.layers)} layers, {len(sites)} sites ({', '.join(kinds)})")
    for reason in dict.fromkeys(description.left_out.values()):
        names = [name for name, other in description.left_out.items() if other == reason]
        print(f"    left out: {len(names)}, such as {names[0]}: {reason}")
    for kind in dict.fromkeys(name.split(" ")[1] for name in seen):
        names = [name for name in seen if name.endswith(kind)]
        print(f"    FFN-like by shape alone: {len(names)}, such as {names[0]}")
    return "some left out" if description.left_out else "all found"


def main() -> None:
    transformers.logging.set_verbosity_error()
    families = [(AutoModelForCausalLM, name) for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES] + [
        (AutoModelForImageTextToText, name)
        for name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        if name not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]
    counts: dict[str, int] = {}
    start = time.perf_counter()
    for auto, name in families:
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            outcome = survey(auto, name)
            counts[outcome] = counts.get(outcome, 0) + 1
    print(f"\n{sum(counts.values())} model types in {time.perf_counter() - start:.0f} s: {counts}")


if __name__ == "__main__":
    main()
