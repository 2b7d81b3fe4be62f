"""Tiny random vision-language models, and inputs with pictures for them, without processors."""

from __future__ import annotations

import tiny
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
)

PAD, IMAGE, VIDEO, VISION_START, VISION_END = 0, 3, 62, 60, 61
TEXT = {k: v for k, v in tiny.COMMON.items() if k != "bos_token_id"}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_TOKENS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END
)
CLIP = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
QWEN2_VISION = dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4)
QWEN25_VISION = dict(
    depth=2,
    hidden_size=16,
    out_hidden_size=32,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    window_size=16,
    fullatt_block_indexes=[1],
)
QWEN3_VISION = dict(
    depth=2,
    hidden_size=16,
    out_hidden_size=32,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0],
)
SIGLIP = dict(
    model_type="siglip_vision_model",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=7,
    vision_use_head=False,
)
QWEN2_TEXT = {**TEXT, "rope_parameters": MROPE}
QWEN3_TEXT = {**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}

VLMS = {
    "llava": LlavaConfig(vision_config=CLIP, text_config=tiny.DENSE["llama"], image_token_index=IMAGE),
    "llava-next": LlavaNextConfig(
        vision_config=CLIP,
        text_config=tiny.DENSE["mistral-sliding"],
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28]],
    ),
    "llava-onevision": LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=tiny.DENSE["qwen2"],
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[28, 56], [56, 28]],
    ),
    "qwen2-vl": Qwen2VLConfig(text_config=QWEN2_TEXT, vision_config=QWEN2_VISION, **QWEN_TOKENS),
    "qwen2.5-vl": Qwen2_5_VLConfig(text_config=QWEN2_TEXT, vision_config=QWEN25_VISION, **QWEN_TOKENS),
    "qwen3-vl": Qwen3VLConfig(text_config=QWEN3_TEXT, vision_config=QWEN3_VISION, **QWEN_TOKENS),
    "qwen3-vl-moe": Qwen3VLMoeConfig(
        text_config={
            **QWEN3_TEXT,
            "moe_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
        },
        vision_config=QWEN3_VISION,
        **QWEN_TOKENS,
    ),
    "gemma3": Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 8},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    ),
    "internvl": InternVLConfig(
        vision_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[28, 28],
            patch_size=[7, 7],
        ),
        text_config=tiny.DENSE["qwen2"],
        image_token_id=IMAGE,
        image_seq_length=4,
    ),
    "idefics3": Idefics3Config(
        vision_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        ),
        text_config={**TEXT, "model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
    ),
}
VLMS["smolvlm"] = SmolVLMConfig(**{k: v for k, v in VLMS["idefics3"].to_dict().items() if k != "model_type"})


def build(name: str, seed: int = 0):
    """A random vision-language model in eval mode."""
    torch.manual_seed(seed)
    config = type(VLMS[name]).from_dict(VLMS[name].to_dict())
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
            elif "bias" in parameter_name:
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    return model


def picture(name: str, seed: int, wide: bool = False) -> dict[str, torch.Tensor]:
    """What a processor makes of one picture; ``wide`` ones have more tokens where the model allows it."""
    generator = torch.Generator().manual_seed(seed)
    if name.startswith("qwen"):
        grid = (1, 4, 8 if wide else 4)
        pixels = torch.randn(grid[1] * grid[2], 3 * 2 * 4 * 4, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}
    size = (1, 3, 28, 28)
    if name in ("llava-next", "llava-onevision"):
        pixels = torch.randn(1, 3, *size[1:], generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[20, 56] if wide else [28, 56]])}
    pixels = torch.randn(size, generator=generator)
    return {"pixel_values": pixels[None] if name in ("idefics3", "smolvlm") else pixels}


@torch.no_grad()
def n_image_tokens(model, image: dict[str, torch.Tensor]) -> int:
    features = model.model.get_image_features(**image).pooler_output
    parts = features if isinstance(features, (tuple, list)) else [features]
    return sum(part.flatten(0, -2).shape[0] for part in parts)


def inputs(model, name: str, image_seeds: list[int | None], n_text: int = 7, wide: bool = False) -> dict:
    """A batch, one prompt for each seed (None = no picture), left-padded to one length."""
    rows, images = [], []
    for i, seed in enumerate(image_seeds):
        text = tiny.prompt(n_text + i, seed=10 + i)[0].clamp(4, 59)
        if seed is None:
            rows.append(text)
            continue
        image = picture(name, seed, wide and i % 2 == 1)
        images.append(image)
        marks = [torch.tensor([VISION_START]), torch.full((n_image_tokens(model, image),), IMAGE)]
        rows.append(torch.cat([text[:2], *marks, torch.tensor([VISION_END]), text[2:]]))
    length = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=PAD) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if name.startswith(("qwen", "gemma")):
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    if name == "gemma3":
        batch["token_type_ids"] = batch.pop("mm_token_type_ids")
    for key in images[0] if images else ():
        batch[key] = torch.cat([image[key] for image in images])
    return batch
