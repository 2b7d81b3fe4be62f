"""Small trained models that come with popmm: real enough to see pruning, loaded offline in a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

_ROOM = Path(__file__).parent


def names() -> list[str]:
    """Names that ``load`` takes."""
    return sorted(path.parent.name for path in _ROOM.glob("*/config.json"))


def path(name: str) -> Path:
    """Folder of a bundled model, in Hugging Face format."""
    if name not in names():
        raise ValueError(f"no bundled model is called {name!r}: there are {', '.join(map(repr, names()))}")
    return _ROOM / name


def load(name: str, dtype: torch.dtype = torch.float32):
    """A bundled model.

    Args:
        name: one of ``names()``, such as ``"stories"``.
        dtype: of the weights (stored as float16).

    Returns:
        ``(model, tokenizer)``, of ``"shapes"`` ``(model, processor)``; the model in eval mode on the CPU.
    """
    folder = path(name)
    model_class, processor_class = auto_classes(AutoConfig.from_pretrained(folder))
    with _quiet():
        model = model_class.from_pretrained(folder, dtype=dtype).eval()
    return model, processor_class.from_pretrained(folder)


def picture() -> Path:
    """The bundled picture of coloured shapes, for questions to ``"shapes"``."""
    return _ROOM / "shapes" / "picture.png"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for a load that takes no time."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def auto_classes(config):
    """(model class, processor class) that load a configuration's model: with pictures, if it reads any."""
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText, AutoProcessor
    return AutoModelForCausalLM, AutoTokenizer
