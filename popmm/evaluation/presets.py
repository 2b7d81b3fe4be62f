"""The paper's protocol: tasks, ratios, batches and settings of its section 4."""

from __future__ import annotations

from dataclasses import dataclass, field

from popmm.config import PopConfig

RATIOS = (0.2, 0.4)  # of the blocks' weights


@dataclass(frozen=True)
class Preset:
    """Tasks as the paper ran them (section 4): both ratios, ten prompts that share a partition."""

    tasks: tuple[str, ...]
    scoring: str = "prompt"
    batch: int = 10
    ratios: tuple[float, ...] = RATIOS
    config: PopConfig = field(default_factory=PopConfig.paper)


PRESETS = {
    "paper-qa": Preset(("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")),
    "paper-generation": Preset(("coqa", "mbpp", "humaneval", "nq_open", "gsm8k")),
    "paper-wikitext": Preset(("wikitext",)),
}


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: give one of {', '.join(PRESETS)}")
    return PRESETS[name]
