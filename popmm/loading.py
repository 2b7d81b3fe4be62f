"""Models by name: bundled ones as ``zoo:NAME``, others by path or hub id."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from popmm import zoo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ZOO_PREFIX = "zoo:"


def load_model(name: str, dtype: str | None = None, device: str | None = None):
    """``(model, tokenizer)``, of vision-language models ``(model, processor)``; the model in eval mode.

    Args:
        name: ``zoo:stories``, a folder, or a hub id.
        dtype: a key of ``DTYPES``; None = float32 on the CPU, bfloat16 elsewhere.
        device: a torch device; None = cuda where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: give one of {', '.join(DTYPES)}")
    torch_dtype = DTYPES[dtype]
    if name.startswith(ZOO_PREFIX):
        model, tokenizer = zoo.load(name.removeprefix(ZOO_PREFIX), dtype=torch_dtype)
        return model.to(device), tokenizer
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"--model {name}: there is no such folder")
    model_class, processor_class = auto_classes(AutoConfig.from_pretrained(name))
    processor = processor_class.from_pretrained(name)
    return model_class.from_pretrained(name, dtype=torch_dtype).to(device).eval(), processor


def auto_classes(config):
    """(model class, processor class) that load a configuration's model: with pictures, if it reads any."""
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText, AutoProcessor
    return AutoModelForCausalLM, AutoTokenizer


def encode(tokenizer, prompt: str, device, chat: bool = False) -> dict[str, torch.Tensor]:
    """A prompt as ``generate`` takes it, with the tokenizer's chat template if ``chat``."""
    if not prompt.strip():
        raise ValueError("the prompt is empty: give at least one word")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError("this tokenizer has no chat template: leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
