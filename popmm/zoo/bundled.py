"""Small trained models that come with popmm: real enough to see pruning, loaded offline in a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from popmm.zoo.fetched import MODELS, folder_of, is_there

_ROOM = Path(__file__).parent


def names() -> list[str]:
    """Names of the bundled models."""
    return sorted(path.parent.name for path in _ROOM.glob("*/config.json"))


def path(name: str) -> Path:
    """Folder of a bundled model, or of one that ``popmm zoo get`` has made, in Hugging Face format."""
    if name in MODELS:
        if not is_there(name):
            raise ValueError(f"{name} is not in {folder_of(name).parent} yet: popmm zoo get {name} makes it")
        return folder_of(name)
    if name not in names():
        others = ", ".join(map(repr, MODELS))
        raise ValueError(
            f"no bundled model is called {name!r}: there are {', '.join(map(repr, names()))}, and {others} by popmm "
            "zoo get"
        )
    return _ROOM / name


def load(name: str, dtype: torch.dtype | None = None):
    """A bundled model, or one that ``popmm zoo get`` has made.

    Args:
        name: one of ``names()``, such as ``"stories"``, or of ``fetched.MODELS``, such as ``"smollm2-135m"``.
        dtype: of the weights; None = float32 for bundled models (stored as float16), bfloat16, as they are stored, for
            the others.

    Returns:
        ``(model, tokenizer)``, of ``"shapes"`` ``(model, processor)``; the model in eval mode on the CPU.
    """
    folder = path(name)
    if dtype is None:
        dtype = torch.bfloat16 if name in MODELS else torch.float32
    model_class, processor_class = auto_classes(AutoConfig.from_pretrained(folder))
    with quiet():
        model = model_class.from_pretrained(folder, dtype=dtype).eval()
    return model, processor_class.from_pretrained(folder)


def picture() -> Path:
    """The bundled picture of coloured shapes, for questions to ``"shapes"``."""
    return _ROOM / "shapes" / "picture.png"


@contextmanager
def quiet() -> Iterator[None]:
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
