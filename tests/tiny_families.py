"""Tiny random models of the families whose FFNs are not all of one plain form, and what must be found in them.

Families that the installed transformers does not know are left out.
"""

from __future__ import annotations

import tiny
from transformers import CONFIG_MAPPING

SMALL = {k: v for k, v in tiny.COMMON.items() if k != "intermediate_size"}
MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)

# family: settings of its configuration
SETTINGS = {
    "hrm_text": dict(
        {k: v for k, v in SMALL.items() if k not in ("num_hidden_layers", "num_key_value_heads")},
        intermediate_size=48,
        num_layers_per_stack=2,
        H_cycles=1,
        L_cycles=1,
        head_dim=8,
    ),
    "minimax_m3_vl_text": dict(
        SMALL,
        intermediate_size=48,
        dense_intermediate_size=64,
        shared_intermediate_size=16,  # as wide as two of them, so its first projection is square
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        mlp_layer_types=["dense", "sparse"],
        layer_types=["full_attention", "full_attention"],
    ),
    "inkling_text": dict(
        SMALL,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_shared_experts=2,
        num_experts_per_tok=2,
        head_dim=8,
        mlp_layer_types=["dense", "sparse"],
    ),
    "gemma3n_text": dict(
        SMALL,
        vocab_size_per_layer_input=tiny.VOCAB,
        intermediate_size=[48, 48],
        hidden_size_per_layer_input=8,
        head_dim=8,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.95, 0.0],
        layer_types=["full_attention", "full_attention"],
        laurel_rank=4,
    ),
    "recurrent_gemma": dict(SMALL, intermediate_size=96, lru_width=32, block_types=["recurrent", "attention"]),
    "zamba2": dict(
        SMALL,
        intermediate_size=48,
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=4,
        mamba_ngroups=1,
        num_mem_blocks=1,
        adapter_rank=4,
        attention_head_dim=16,
        layers_block_type=["mamba", "hybrid"],
        use_mem_rope=False,
    ),
    "nemotron_h": dict(
        SMALL,
        intermediate_size=64,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=48,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        layers_block_type=["moe", "attention"],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
    ),
    "llama4_text": dict(
        SMALL,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        moe_layers=[0, 1],
    ),
    "longcat_flash": dict(
        {k: v for k, v in SMALL.items() if k not in ("num_hidden_layers", "num_key_value_heads")},
        num_layers=1,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=24,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=1,
        head_dim=8,
        **MLA,
    ),
    "bitnet": tiny.COMMON,
    "lfm2": dict(tiny.COMMON, layer_types=["conv", "full_attention"]),
    "falcon_h1": dict(tiny.COMMON, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    "mamba": dict(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4, pad_token_id=0),
    "rwkv": dict(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, intermediate_size=64, context_length=32),
    "jetmoe": dict(SMALL, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    "gpt2": dict(vocab_size=tiny.VOCAB, n_embd=32, n_layer=3, n_head=4),
    "opt": dict(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        pad_token_id=0,
    ),
    "falcon": dict(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
    "phi": dict(tiny.COMMON, intermediate_size=64),
    "gpt_neox": dict(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    ),
    "starcoder2": tiny.COMMON,
    "nanochat": tiny.COMMON,
    "xlstm": dict(vocab_size=tiny.VOCAB, hidden_size=64, num_hidden_layers=1, num_heads=4, pad_token_id=0),
}
KNOWN = [name for name in SETTINGS if name in CONFIG_MAPPING]


def build(name: str, **changes):
    """A tiny random model of a family, in eval mode."""
    return tiny.from_name(name, **{**SETTINGS[name], **changes})
