"""Models by name: folders, GGUF files, names of the hub and of the zoo, in the precision that they have."""

import importlib.util
import json

import pytest
import torch

from popmm import zoo
from popmm.cli import main
from popmm.zoo.loading import load_model

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a saved bfloat16 model."""
    folder = tmp_path_factory.mktemp("models") / "instruct"
    model, tokenizer = zoo.load("stories")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_weights_are_loaded_as_the_checkpoint_has_them(saved):
    assert load_model(str(saved))[0].dtype == torch.bfloat16
    assert load_model(str(saved), dtype="float32")[0].dtype == torch.float32
    assert load_model("zoo:stories", device="cpu")[0].dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["models/nothing", "./nothing", "../nothing", "~/nothing", "a/b/c", "model.gguf", "x/y.gguf"]
)
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "models" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("popmm.zoo.loading.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="there is no such folder or file") as error:
        load_model(name)
    assert ("folders there: other" in str(error.value)) == name.startswith("models/")


def test_names_of_the_hub_are_left_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def refuse(name, **_):
        asked.append(name)
        raise OSError("we could not connect\nand so on")

    monkeypatch.setattr("popmm.zoo.loading.AutoConfig.from_pretrained", refuse)
    for name in ("owner/Model-0.5B", "gpt2"):
        with pytest.raises(ValueError, match=f"--model {name}: no folder here, .*could not connect"):
            load_model(name)
    with pytest.raises(ValueError, match=r"did you mean zoo:stories\?"):
        load_model("stories")
    assert asked == ["owner/Model-0.5B", "gpt2", "stories"]


def test_a_folder_is_a_folder_whatever_its_name(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    for name in ("instruct", "./instruct"):
        assert load_model(name)[0].dtype == torch.bfloat16
    (saved.parent / "empty").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="--model empty: this folder holds no config.json"):
        load_model("empty")


def write_gguf(file, ending=".weight"):
    """The bundled stories model as a GGUF file of 32-bit weights, whose names have the given ending."""
    import gguf

    model, tokenizer = zoo.load("stories")
    config, bpe = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([1] * len(bpe["vocab"]))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for part, n in heads.items():
            if part in name:  # GGUF pairs the halves of a head
                weight = weight.view(n, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ending, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf")
    file = tmp_path_factory.mktemp("gguf") / "stories.gguf"
    write_gguf(file)
    return file


@torch.no_grad()
def test_a_gguf_file_is_the_model_that_was_written_to_it(gguf_file):
    model, tokenizer = load_model(str(gguf_file))
    expected, own_tokenizer = zoo.load("stories")
    text = "Once upon a time there was a cat."
    ids = torch.tensor([own_tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[0].tolist()
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-4, rtol=0)


def test_a_gguf_file_whose_weights_are_not_all_known_is_refused(tmp_path):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "other.gguf", ending=".values")
    with pytest.raises(ValueError, match=r"other\.gguf: transformers finds no weights for .* in this file"):
        load_model(str(tmp_path / "other.gguf"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt", "Once upon a time", "--max-new-tokens", "4"],
        ["inspect", "--max-new-tokens", "4"],
        ["eval", "--ratios", "0.2", "--methods", "gate", "--context", "8", "--continuation", "8"],
        ["bench", "--prompt-tokens", "8", "--new-tokens", "8", "--rounds", "1", "--selections", "gate"],
    ],
)
def test_commands_take_a_gguf_file(gguf_file, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = ["--texts-per-subset", "1", "--subsets", "1"] if arguments[0] == "eval" else []
    assert main([*arguments, *more, "--model", str(gguf_file)]) == 0
    assert "gate" in capsys.readouterr().out or arguments[0] == "generate"


def test_a_gguf_file_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").touch()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    with pytest.raises(RuntimeError, match=r"x\.gguf: GGUF files need the package gguf: pip install gguf"):
        load_model(str(tmp_path / "x.gguf"))
