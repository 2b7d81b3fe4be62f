"""Prompts and conversations as a model's tokenizer or processor encodes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def tokenizer_of(processor):
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def takes_pictures(processor) -> bool:
    return getattr(processor, "image_processor", None) is not None


def check_chats(processor) -> None:
    """Refuses a processor or tokenizer without a chat template."""
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            "this model has no chat template: give an instruction-tuned model, such as Qwen/Qwen2.5-VL-3B-Instruct or "
            "the bundled zoo:shapes, or have popmm generate go on with a text"
        )


def chat_inputs(processor, messages: list[dict], device) -> dict[str, Tensor]:
    """Inputs of ``generate`` for messages in chat form, whose image parts hold pictures (``PIL.Image``)."""
    pictures = [part["image"] for m in messages for part in m["content"] if part["type"] == "image"]
    if pictures and not takes_pictures(processor):
        raise ValueError("this model reads text alone: give a vision-language model for questions about pictures")
    check_chats(processor)
    if not takes_pictures(processor):
        messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in messages]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if not takes_pictures(processor):
        encoded = processor(text, add_special_tokens=False, return_tensors="pt")
        return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
    if pictures and type(processor).__name__.startswith("Qwen"):
        pictures = _resized_for_qwen(processor, messages)
    begins = getattr(tokenizer_of(processor), "bos_token", None)
    own_begin = begins is not None and text.startswith(begins)
    settings = {"add_special_tokens": False} if own_begin else {}
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt", **settings)
    return inputs.to(device)


def _resized_for_qwen(processor, messages: list[dict]) -> list[Image]:
    """Pictures at the sizes that Qwen-VL's own utilities choose."""
    try:
        from qwen_vl_utils import process_vision_info
    except ImportError as error:
        raise RuntimeError("Qwen-VL needs qwen-vl-utils: pip install 'popmm[vision]'") from error
    pictures, _ = process_vision_info(messages, image_patch_size=processor.image_processor.patch_size)
    return pictures


def has_template(processor) -> bool:
    """Whether a tokenizer or processor has a chat template."""
    return getattr(processor, "chat_template", None) is not None


def encode(processor, prompt: str, device, chat: bool | None = None) -> dict[str, torch.Tensor]:
    """A prompt as ``generate`` takes it.

    Args:
        chat: whether as a question in the chat template; None = where there is one.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty: give at least one word")
    if chat and not has_template(processor):
        raise ValueError("this tokenizer has no chat template: leave --chat out")
    if has_template(processor) if chat is None else chat:
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        return dict(chat_inputs(processor, messages, device))
    encoded = tokenizer_of(processor)(prompt, return_tensors="pt")
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


def context_length(model) -> int | None:
    """Tokens that a model reads at most; None if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_length(model, prompt: int, new: int) -> None:
    """Refuses a prompt of ``prompt`` tokens that leaves no room for ``new`` ones."""
    most = context_length(model)
    if most is not None and prompt + new > most:
        room = f"--max-new-tokens {most - prompt} or less" if prompt < most else f"a prompt below {most} tokens"
        raise ValueError(
            f"a prompt of {prompt} tokens and {new} new ones are more than the model's {most}: give {room}"
        )
