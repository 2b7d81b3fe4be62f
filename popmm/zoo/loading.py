"""Models by name: those of the zoo as ``zoo:NAME``, others by folder, GGUF file or hub id."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoConfig

from popmm import zoo
from popmm.zoo.bundled import auto_classes
from popmm.zoo.fetched import MODELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ZOO_PREFIX = "zoo:"
GGUF = ".gguf"
_FILES = (GGUF, ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".onnx")
_ADVICE = "give a folder, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or zoo:NAME"


def load_model(name: str, dtype: str | None = None, device: str | None = None):
    """``(model, tokenizer)``, of vision-language models ``(model, processor)``; the model in eval mode.

    Args:
        name: ``zoo:stories``, ``zoo:smollm2-135m``, a folder, a GGUF file, or a hub id.
        dtype: a key of ``DTYPES``; None = the checkpoint's own, of bundled models and GGUF files float32 on the CPU and
            bfloat16 elsewhere.
        device: a torch device; None = cuda where there is one.

    Raises:
        ValueError: there is no such model; nothing that looks like a path is asked of the hub.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: give one of {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    by_device = DTYPES[dtype or ("float32" if str(device) == "cpu" else "bfloat16")]
    if name.startswith(ZOO_PREFIX):
        short = name.removeprefix(ZOO_PREFIX)
        own = dtype is None and short in MODELS  # as it is stored
        model, tokenizer = zoo.load(short, dtype=None if own else by_device)
        return model.to(device), tokenizer
    path = local_path(name)
    if path is not None and path.suffix == GGUF:
        if importlib.util.find_spec("gguf") is None:
            raise RuntimeError(f"--model {name}: GGUF files need the package gguf: pip install gguf")
        where, how, torch_dtype = path.parent, {"gguf_file": path.name}, by_device
    else:
        where, how, torch_dtype = path or name, {}, DTYPES[dtype] if dtype else "auto"
    try:
        model_class, processor_class = auto_classes(AutoConfig.from_pretrained(where, **how))
    except OSError as error:
        raise ValueError(_not_found(name, path, error)) from None
    processor = processor_class.from_pretrained(where, **how)
    if how:
        _complete(processor, path)
    model, info = model_class.from_pretrained(where, dtype=torch_dtype, output_loading_info=True, **how)
    missing = sorted(info["missing_keys"])
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(
            f"--model {name}: transformers finds no weights for {missing[0]}{others} in this file or folder"
        )
    return model.to(device).eval(), processor


def _complete(tokenizer, file: Path) -> None:
    """Chat template and special tokens of a GGUF file, where transformers' reader leaves them out."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    if getattr(tokenizer, "chat_template", None) is None and "tokenizer.chat_template" in fields:
        tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    for name in ("bos", "eos"):
        field = fields.get(f"tokenizer.ggml.{name}_token_id")
        if field is not None and getattr(tokenizer, f"{name}_token", None) is None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(field.contents())))


def local_path(name: str) -> Path | None:
    """The folder or GGUF file of that name; None for a hub id.

    Raises:
        ValueError: it is written as a path, and there is nothing there that can be loaded.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob(f"*{GGUF}"))
            hint = f"give one of its files: {', '.join(files[:5])}" if files else "give the folder of a saved model"
            raise ValueError(f"--model {name}: this folder holds no config.json; {hint}")
        return path
    if path.is_file():
        if path.suffix != GGUF:
            raise ValueError(f"--model {name}: this file is no {GGUF} file; {_ADVICE}")
        return path
    beside = "/" in name and path.parent.is_dir()
    if beside or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or path.suffix in _FILES:
        there = sorted(other.name for other in path.parent.iterdir() if other.is_dir()) if path.parent.is_dir() else []
        hint = f"; folders there: {', '.join(there[:5])}" if there else ""
        raise ValueError(f"--model {name}: there is no such folder or file{hint}; {_ADVICE}")
    return None


def _not_found(name: str, path: Path | None, error: OSError) -> str:
    if path is not None:
        return f"--model {name}: {' '.join(str(error).split())}"
    bundled = f"; did you mean {ZOO_PREFIX}{name}?" if name in (*zoo.names(), *MODELS) else ""
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return f"--model {name}: no folder here, and not to be had from the hub ({reason}){bundled or '; ' + _ADVICE}"
