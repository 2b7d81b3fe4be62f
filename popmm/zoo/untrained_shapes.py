"""The bundled vision-language model before its training: processor, configuration and fresh weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from popmm.zoo import shapes

FIRST_TRAINING_SEED = 1_000_000
MOST = 7  # shapes in a picture
# backgrounds come out near zero, so that shapes stand out from the first step on
MEAN, STD = [0.92] * 3, [0.3] * 3
INIT = 0.08  # at transformers' 0.02 a model so narrow learns to look at pictures very late
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# as in Qwen2-VL, without its system message
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary_texts(seed: int) -> list[str]:
    """What is said about one picture, as the tokenizer learns it."""
    generator = random.Random(seed)
    if generator.random() < 0.03:
        return list(shapes.GREETING)
    scene = shapes.random_scene(generator, least=2, most=MOST)
    return [text for question in shapes.questions(scene, generator) for text in (question.text, question.answer)]


def build_processor(vocab_size: int) -> Qwen2VLProcessor:
    """Byte-level BPE over the conversations' text, Qwen2-VL's picture and video processors at 112 x 112."""
    seeds = range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + 2000)
    texts = [text for seed in seeds for text in vocabulary_texts(seed)]
    texts += ["user\n", "assistant\n", "system\n"] * 2000
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    bpe = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[AddedToken(token, special=True) for token in SPECIAL + VISION],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    pixels = {"shortest_edge": shapes.SIZE**2, "longest_edge": shapes.SIZE**2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, image_mean=MEAN, image_std=STD),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels, image_mean=MEAN, image_std=STD),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """The untrained model: hidden 128, d_ff 512, 4 layers, a vision tower of 3."""
    tokenizer = processor.tokenizer
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer),
        initializer_range=INIT,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # rows and columns each have fast frequencies, that tell neighbouring cells apart, and slow ones, in which what
        # a cell holds is found wherever it lies; sections take turns: time, height, width, time, ...
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [0, 1, 1, 0, 1, 1, 4, 4, 4]},
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=3,
        embed_dim=96,
        hidden_size=128,
        num_heads=4,
        mlp_ratio=4,
        patch_size=14,
        spatial_merge_size=2,
        initializer_range=INIT,
    )
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def save(model, processor, out: Path) -> None:
    """Writes weights as float16, with processor and chat template beside them."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    stored = Qwen2VLForConditionalGeneration(model.config).half()
    stored.load_state_dict(state)
    stored.generation_config.update(
        do_sample=False,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        max_new_tokens=128,
    )
    stored.save_pretrained(out)
    processor.save_pretrained(out)
