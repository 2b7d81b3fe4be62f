"""Ratios and sizes, against the published numbers and the definitions."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModel,
    LlamaConfig,
    OPTConfig,
    Qwen2_5_VLConfig,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import popmm
from popmm.method.budget import region_sizes


def llama(d_model, d_ff, heads, kv_heads, layers):
    return LlamaConfig(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
    )


def qwen3(d_model, d_ff, heads, kv_heads):
    return Qwen3Config(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        num_hidden_layers=2,
    )


def qwen_vl(kind):
    text = dict(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=2
    )
    return kind(text_config=text)


# model: (configuration, FFN ratio in percent at 20 % and at 40 %), from the paper's table 8
TABLE_8 = {
    "Llama2-7B": (llama(4096, 11008, 32, 32, 2), 29.9, 59.8),
    "Llama2-13B": (llama(5120, 13824, 40, 40, 2), 29.9, 59.8),
    "Llama2-70B": (llama(8192, 28672, 64, 8, 2), 24.3, 48.6),
    "Llama3.1-8B": (llama(4096, 14336, 32, 8, 2), 24.8, 49.5),
    "Llama3.1-70B": (llama(8192, 28672, 64, 8, 2), 24.3, 48.6),
    "Qwen3-8B": (qwen3(4096, 12288, 32, 8), 25.6, 51.1),
    "Qwen3-32B": (qwen3(5120, 25600, 64, 8), 24.8, 49.6),
    "Qwen1.5-MoE-A2.7B": (
        Qwen2MoeConfig(
            hidden_size=2048,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            num_experts=60,
            num_experts_per_tok=4,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_hidden_layers=2,
        ),
        29.7,
        59.4,
    ),
    "Qwen2-57B-A14B": (
        Qwen2MoeConfig(
            hidden_size=3584,
            moe_intermediate_size=2560,
            shared_expert_intermediate_size=20480,
            num_experts=64,
            num_experts_per_tok=8,
            num_attention_heads=28,
            num_key_value_heads=4,
            num_hidden_layers=2,
        ),
        22.7,
        45.3,
    ),
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig(
            hidden_size=2048,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_hidden_layers=2,
        ),
        30.0,
        60.0,
    ),
    "Qwen2-VL-7B": (qwen_vl(Qwen2VLConfig), 22.9, 45.8),
    "Qwen2.5-VL-7B": (qwen_vl(Qwen2_5_VLConfig), 22.9, 45.8),
}


@pytest.mark.parametrize("name", TABLE_8)
def test_ffn_ratio_reproduces_the_papers_table_8(name):
    config, at_20, at_40 = TABLE_8[name]
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    # the table prints one decimal, and rounds 24.75 to 24.8 but 49.49 to 49.5
    assert popmm.budget.ffn_ratio(model, 0.2) * 100 == pytest.approx(at_20, abs=0.06)
    assert popmm.budget.ffn_ratio(model, 0.4) * 100 == pytest.approx(at_40, abs=0.06)


def test_ffn_ratio_takes_a_configuration():
    config, at_20, _ = TABLE_8["Llama2-7B"]
    assert popmm.budget.ffn_ratio(config, 0.2) * 100 == pytest.approx(at_20, abs=0.06)


def test_skipped_layers_hand_their_share_to_the_others(llama):
    every = popmm.budget.ffn_ratio(llama, 0.2)
    assert popmm.budget.ffn_ratio(llama, 0.2, skip_layers=(0,)) == pytest.approx(2 * every)


def test_ratio_beyond_95_percent_is_refused_with_the_largest_that_works(llama):
    with pytest.raises(
        ValueError, match=r"pruning_ratio=0\.8 would prune .* give pruning_ratio=(0\.\d+) or less"
    ) as error:
        popmm.budget.ffn_ratio(llama, 0.8)
    largest = float(str(error.value).split("give pruning_ratio=")[1].split()[0])
    assert 0.94 < popmm.budget.ffn_ratio(llama, largest) <= 0.95


def test_ffns_without_a_gate_count_two_matrices():
    config = OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32)
    assert popmm.budget.ffn_ratio(config, 0.2) == pytest.approx(0.2 * (2 * 64 + 4 * 32) / (2 * 64))


@given(
    d_ff=st.integers(1, 2000),
    ratio=st.floats(0, 0.95),
    fraction=st.floats(0, 1),
)
def test_region_sizes_follow_their_definition(d_ff, ratio, fraction):
    s = region_sizes(d_ff, ratio, fraction)
    assert s.budget == max(1, round((1 - ratio) * d_ff))
    assert s.candidate == min(round(fraction * d_ff), 2 * min(s.budget, d_ff - s.budget))
    assert s.retained == s.budget - s.candidate // 2
    assert min(s.retained, s.candidate, s.pruned) >= 0
    assert s.retained + s.candidate + s.pruned == d_ff
    assert s.retained <= s.budget <= s.read


def test_no_candidates_at_ratio_zero():
    s = region_sizes(100, 0.0, 0.1)
    assert (s.retained, s.candidate, s.pruned) == (100, 0, 0)


def test_tiny_models_of_the_tests_are_what_they_say():
    assert tiny.dense("llama").config.intermediate_size == 80
