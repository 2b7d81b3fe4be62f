"""A tiny random model of every decoder family of transformers: its default configuration with every size made small.

Sizes are told by the names of configuration fields. FFN widths are such that no other part of a model has them.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

KINDS = ("CausalLM", "ImageTextToText", "MultimodalLM")  # of auto classes; older versions of transformers lack some
VOCAB, D_MODEL, HEADS, HEAD_DIM, LAYERS, EXPERTS = 160, 32, 4, 8, 2, 4
D_FF, D_FF_EXPERT, D_FF_SHARED = 80, 48, 112

# field names, whole, without a part before them: what an integer of that name becomes, at most
RULES = [(re.compile(rf"(.*_)?({'|'.join(names.split())})"), size) for names, size in [
    ("vocab_size vocab_size_per_layer_input n_vocab", VOCAB),
    ("codebook_size", 128),
    ("rotary_dim hidden_size_per_layer_input", HEAD_DIM),
    ("moe_ffn_dim moe_intermediate_size moe_intermediate_dim", D_FF_EXPERT),
    ("expert_intermediate_size expert_ffn_hidden_size", D_FF_EXPERT),
    ("shared_intermediate_size shared_expert_intermediate_size", D_FF_SHARED),
    ("shared_experts_intermediate_size share_expert_dim", D_FF_SHARED),
    ("intermediate_size intermediate_dim intermediate_size_mlp ffn_dim ffn_hidden_size ffn_hidden_dim mlp_dim", D_FF),
    ("mlp_hidden_size ff_dim n_inner d_ff d_inner ffn_hidden inner_dim", D_FF),
    ("rank lowrank low_rank_dim", 16),
    ("qk_rope_head_dim qk_nope_head_dim v_head_dim qk_head_dim head_dim d_head", HEAD_DIM),
    ("kv_channels head_size headdim d_kv qkv_dim", HEAD_DIM),
    ("num_key_value_heads num_kv_heads kv_heads n_kv_heads kv_n_heads multi_query_group_num n_head_kv", 2),
    ("heads n_head head head_num", HEADS),
    ("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_blocks layers", LAYERS),
    ("num_experts n_experts num_local_experts n_routed_experts", EXPERTS),
    ("index_topk", 16),
    ("num_experts_per_tok experts_per_token num_selected_experts moe_topk moe_k top_k_experts moe_top_k topk", 2),
    ("n_group topk_group num_expert_group n_shared_experts num_shared_experts", 1),
    ("time_step_rank dt_rank n_groups ngroups num_groups", 1),
    ("hidden_size hidden_dim hidden_dims d_model n_embd dim embedding_size lru_width embed_dims d_ssm width", D_MODEL),
    ("hidden_channels", D_MODEL),
    ("d_state state_size", 8),
    ("chunk_size chunk_length window_size sliding_window", 16),
    ("max_position_embeddings n_positions max_sequence_length n_ctx context_length max_seq_len", 256),
    ("max_source_positions max_length", 256),
    ("image_size", 28),
    ("patch_size", 14),
    ("query_tokens num_queries num_latents resampler_n_latents", 4),
]]  # fmt: skip

# what the rules leave open
MROPE = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
}
HALF_MROPE = {
    "text_config": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 0, 0],
        }
    }
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
IMAGE = 100  # the token that stands for a picture
SPECIAL = {"vision_start_token_id": 10, "vision_end_token_id": 11, "audio_start_token_id": 12}
DOTS3 = {"head_dim": 2 * HEAD_DIM, "num_key_value_heads": HEADS}
SMALL_CONV = {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "out_hidden_size": D_MODEL}
GEMMA4_EXPERTS = {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": D_FF_EXPERT}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
COMPASS = {
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        for kind in ("full_attention", "sliding_attention")
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{family: MROPE for family in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl")},
    **{family: HALF_MROPE for family in ("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga")},
    **{family: {"head_dim": HEAD_DIM} for family in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "nemotron": {"num_key_value_heads": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "xmod": {"default_language": "en_XX"},
    "ministral3": {"rope_parameters": YARN},
    "glm5_next": {"num_key_value_heads": HEADS},
    "gemma4_assistant": {"start": {"text_config": {"hidden_size_per_layer_input": 0}}},
    "mamba2": {"num_heads": 8},
    "zamba2": {"attention_head_dim": 16, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": EXPERTS},
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 1, "L_cycles": 1, "num_hidden_layers": 4, "head_dim": HEAD_DIM},
    "step3p7": {"text_config": {"sliding_window": 16}},
    **{family: SPECIAL for family in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
    "nemo_speechlm": {"chunk_right_context": 2, "chunk_left_context": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "dots3_note_text": DOTS3,
    "dots3_note": {"text_config": DOTS3, "audio_config": {"adapter_input_size": D_MODEL}},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2},
    "muse_spark": {"text_config": {"moe_hidden_size": D_MODEL}, "audio_config": SMALL_CONV},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [D_FF_EXPERT, D_FF_EXPERT], "moe_num_experts": EXPERTS}
    },
    "hunyuan_vl": {
        "text_config": {
            "head_dim": HEAD_DIM,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]},
        }
    },
    "mistral4": {"rope_parameters": {**YARN, "partial_rotary_factor": 1.0}, "head_dim": HEAD_DIM},
    "longcat_flash": {"head_dim": HEAD_DIM, "qk_head_dim": 2 * HEAD_DIM, "zero_expert_num": 2},
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0, "num_heads": 2},
    **{family: {"image_token_index": IMAGE} for family in ("blip-2", "instructblip")},
    "instructblipvideo": {"video_token_index": IMAGE},
    "diffusion_gemma": {"text_config": GEMMA4_EXPERTS},
    "qwen2_5_omni_thinker": {**SPECIAL, **MROPE},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "1/2", "spatial_target_layers": [0, 1]},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]}},
    "janus": {"vq_config": {"base_channels": 32, "latent_channels": 32, "num_embeddings": 64}},
    "apertus1p5": {
        "text_config": {"vocab_size": 320},
        "image_token_offset": 20,
        "audio_token_offset": 148,
        "vision_config": {"base_channels": 32, "channel_multiplier": [1, 1]},
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1, 2, 3]}},
    "mpt": {"use_cache": True},
    "qwen4_exp_text": QWEN4,
    "qwen4_exp": {"text_config": QWEN4},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "cohere_compass_text": COMPASS,
    "cohere_compass": {"text_config": COMPASS},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}


def families() -> dict[str, type]:
    """The auto class of every model type in the decoders' mappings."""
    found: dict[str, type] = {}
    for kind in KINDS:
        mapping = "_".join(re.findall("[A-Z][a-z]+|[A-Z]+", kind)).upper()
        for name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", ()):
            found.setdefault(name, getattr(modeling_auto, f"AutoModelFor{kind}"))
    return found


def small_config(model_type: str):
    """A small configuration of a family."""
    kind = CONFIG_MAPPING[model_type]
    given = SETTINGS.get(model_type, {})
    values = shrink(kind(**given.get("start", {})).to_dict())
    if values.get("is_decoder") is False and not values.get("is_encoder_decoder"):
        values["is_decoder"] = True  # encoders that can decode
    _update(values, given)
    values.pop("start", None)
    return kind.from_dict(values)


@functools.cache
def has(model_type: str) -> bool:
    """Whether this version has a family whose configuration it can make again (DBRX's refuses its own in 5.17)."""
    try:
        return model_type in families() and small_config(model_type) is not None
    except (ValueError, TypeError):
        return False


def _update(values: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict) and not key.startswith("rope"):
            _update(values[key], value)
        else:
            values[key] = value


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values with every size made small, its sub-configurations too."""
    values = copy.deepcopy(values)
    layers = next(
        (values[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(values.get(key), int)), 0
    )
    lists = {k: v for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == layers and layers > 1}
    kept = _one_of_each(list(lists.values())) if lists else []
    for key, value in values.items():
        if not isinstance(key, str):
            continue
        if key in lists:
            values[key] = [value[i] for i in kept]
            if isinstance(value[0], int) and not isinstance(value[0], bool):
                values[key] = [_small(key, n) for n in values[key]]
        elif key == "per_layer_config" and isinstance(value, dict):
            own = {int(i): changes for i, changes in value.items()}
            values[key] = {str(new): shrink(own[old]) for new, old in enumerate(kept) if old in own}
        elif isinstance(value, dict):
            values[key] = _small_rope(value) if key in ("rope_parameters", "rope_scaling") else shrink(value)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif re.fullmatch(r".*token_(id|index)|.*_token|.*token_ids", key) and value >= VOCAB:
            values[key] = 100 + value % 50
        else:
            values[key] = _small(key, value)
    if lists:
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if key in values:
                values[key] = len(kept)
    if isinstance(values.get("kv_lora_rank"), int):  # latent attention has as many
        values.update({key: HEADS for key in ("num_key_value_heads",) if key in values})
    if isinstance(values.get("first_k_dense_replace"), int):
        values["first_k_dense_replace"] = min(values["first_k_dense_replace"], 1)
    return values


def _small(key: str, value: int) -> int:
    if re.fullmatch("(.*_)?num_key_value_heads", key) and value == 1:
        return 1
    return next((min(value, size) for pattern, size in RULES if pattern.fullmatch(key)), value)


def _one_of_each(lists: list) -> list[int]:
    """Layers, two at least, among which is one of each kind."""
    seen, kept = set(), []
    for i, kinds in enumerate(zip(*lists)):
        if repr(kinds) not in seen and len(kept) < 4:
            seen.add(repr(kinds))
            kept.append(i)
    return kept if len(kept) > 1 else [*kept, *(i for i in range(len(lists[0])) if i not in kept)][:2]


def _small_rope(values: dict[str, Any]) -> dict[str, Any]:
    if any(isinstance(value, dict) for value in values.values()):  # by layer type
        return {key: _small_rope(value) if isinstance(value, dict) else value for key, value in values.items()}
    kept = {key: values[key] for key in ("rope_theta", "partial_rotary_factor", "mrope_interleaved") if key in values}
    kept["rope_type"] = "default"
    if "mrope_section" in values:
        kept["mrope_section"] = [1, 1, 2]
    return kept


def inputs(model_type: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a family's ``generate`` is given for token ids ``[1, n]``: some take no text without a picture."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    frames = {"blip": (), "blip-2": (), "instructblip": (), "instructblipvideo": (2,), "idefics": (1,)}.get(model_type)
    if frames is None:
        return given
    pixels = torch.randn(1, *frames, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    if model_type == "idefics":
        seen = torch.ones(*ids.shape, 1, dtype=torch.int64)
        return {**given, "pixel_values": pixels, "image_attention_mask": seen}
    if model_type != "blip":  # a token for each of what the picture becomes
        own = torch.full((1, 4 * (frames or (1,))[0]), IMAGE)
        both = torch.cat([own, ids], dim=1)
        given = {"input_ids": both, "attention_mask": torch.ones_like(both)}
    questions = {"qformer_input_ids": ids} if model_type.startswith("instructblip") else {}
    return {**given, **questions, "pixel_values": pixels}


@torch.no_grad()
def small_model(model_type: str) -> nn.Module:
    """A tiny random model of a family, in eval mode, on the CPU."""
    torch.manual_seed(0)
    config = small_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in families()[model_type].from_config(config).parameters())
    if size > 60e6:
        raise MemoryError(f"{size / 1e6:.0f} M parameters: not all sizes were made small")
    model = families()[model_type].from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=0.15)
        elif "bias" in name:
            parameter.normal_(std=0.1)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return model
