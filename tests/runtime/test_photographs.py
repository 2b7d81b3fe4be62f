"""Photographs at their real size, through real processors with their published settings."""

import numpy as np
import pytest
import tiny
import tiny_vlm
import torch
from PIL import Image, ImageFilter
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

import popmm
from popmm import zoo
from popmm.conversation import Conversation
from popmm.zoo.encoding import chat_inputs

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def photograph(width=1280, height=853):
    """Smooth colours and noise, of a camera's size."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    return coarse.filter(ImageFilter.GaussianBlur(2))


def qwen2_vl():
    tokenizer = zoo.load("shapes")[1].tokenizer
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={**tiny_vlm.QWEN2_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 8192},
        vision_config={**tiny_vlm.QWEN2_VISION, "patch_size": 14},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    published = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384})
    processor = Qwen2VLProcessor(published, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    return config, processor, (853 // 28) * (1280 // 28 + 1)


def llava():
    tokenizer = zoo.load("shapes")[1].tokenizer
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config={**tiny.DENSE["llama"].to_dict(), "vocab_size": len(tokenizer), "max_position_embeddings": 8192},
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<|image_pad|>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<|image_pad|>"),
    )
    return config, processor, 24 * 24


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("make", [qwen2_vl, llava])
def test_a_photograph_at_its_real_size(make):
    config, processor, n_image = make()
    model = random_model(config)
    parts = [{"type": "image", "image": photograph()}, {"type": "text", "text": "What is unusual here?"}]
    inputs = chat_inputs(processor, [{"role": "user", "content": parts}], "cpu")
    with popmm.pruned(model, ffn_ratio=0.4) as state:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 4
        counts = next(iter(state.layers.values())).tokens_by_modality
        assert int(counts["image"]) == n_image
        assert int(counts["text"]) == inputs["input_ids"].shape[1] - n_image


@pytest.mark.parametrize("make", [qwen2_vl, llava])
def test_a_conversation_about_photographs_of_two_sizes(make):
    config, processor, n_image = make()
    model = random_model(config)
    talk = Conversation(model, processor, popmm.PopConfig(ffn_ratio=0.4), max_new_tokens=3)
    talk.show(photograph())
    assert talk.ask("What is unusual here?").read_again
    talk.show(photograph(300, 500))
    assert talk.ask("And here?").read_again
    counts = next(iter(talk.state.layers.values())).tokens_by_modality
    assert int(counts["image"]) > n_image
    talk.close()
