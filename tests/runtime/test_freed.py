"""weights="replace": the planes are all there is of the FFNs, until detach reads the files again."""

import pytest
import tiny
import torch
from matrix import MODELS, generate

import popmm
from popmm.kernels import planes

FORMS = ["llama", "llama-bias", "phi3", "gpt2", "opt", "mixtral", "gpt-oss", "llava (pictures)"]


def saved(name, folder):
    """A model that knows the files that it came from."""
    model = MODELS[name].build()
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def ffn_weights(model):
    return {name: p for name, p in model.named_parameters() if ".mlp." in name and "bias" not in name}


@pytest.mark.parametrize("name", FORMS)
def test_prompts_are_read_from_the_planes_and_detach_reads_the_files(name, tmp_path):
    case, model = MODELS[name], saved(name, tmp_path)
    inputs, before = case.prompt(model), {k: v.clone() for k, v in model.state_dict().items()}
    with popmm.pruned(model, bytes=0.3) as state:
        _, kept = generate(model, inputs)
        of_keep = state.buffer_bytes()
        sites = [ffn.site for ffn in state._ffns]
    assert state.freed_bytes() == 0
    with popmm.pruned(model, bytes=0.3, weights="replace") as state:
        _, logits = generate(model, inputs)
        assert state.buffer_bytes() == of_keep
        dense = sum(w.numel() * w.element_size() for site in sites for w in site.weights().matrices)
        assert state.freed_bytes() == dense
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        assert sum(held.values()) < sum(v.numel() * 4 for v in before.values()) - 0.9 * dense
        assert "of the model's own" in state.summary()
    assert (logits[0] - kept[0]).norm() < 0.05 * kept[0].norm() and not torch.equal(logits[0], kept[0])
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(generate(model, inputs)[1], generate(saved(name, tmp_path), inputs)[1])


def test_the_prompt_is_that_of_weights_in_eight_bits(tmp_path):
    model, ids = saved("llama", tmp_path), tiny.prompt(9)
    with popmm.pruned(model, bytes=0.3, weights="replace"), torch.no_grad():
        found = model(ids).logits
    for name, p in ffn_weights(model).items():
        rows = p.data.mT.contiguous() if "down" in name else p.data  # down by channel
        rows = planes.decode(planes.encode(rows), 8)
        p.data.copy_(rows.mT if "down" in name else rows)
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("call", ["state_dict", "save_pretrained", "half", "to"])
def test_what_would_take_freed_weights_is_refused(call, tmp_path):
    model = saved("llama", tmp_path)
    arguments = {"save_pretrained": (tmp_path / "other",), "to": (torch.bfloat16,)}.get(call, ())
    with popmm.pruned(model, bytes=0.3, weights="replace"):
        with pytest.raises(RuntimeError, match="weights='replace'.*popmm.detach"):
            getattr(model, call)(*arguments)
        for part in (model.model, model.model.layers, model.model.layers[0], model.model.layers[0].mlp):
            with pytest.raises(RuntimeError, match="weights='replace'"):
                part.to(torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        generate(model, {"input_ids": tiny.prompt(9)})
    getattr(model, call)(*arguments)


def test_weights_that_cannot_be_read_again_leave_the_model_attached():
    model = MODELS["llama"].build()
    state = popmm.attach(model, bytes=0.3, weights="replace")
    with pytest.raises(RuntimeError, match="could not be read again.*stays attached"):
        popmm.detach(model)
    generate(model, {"input_ids": tiny.prompt(9)})
    assert state.passes["decode"] == 3


def test_files_that_hold_other_weights_are_noticed(tmp_path):
    model = saved("llama", tmp_path)
    for p in ffn_weights(model).values():
        p.data.mul_(1.5)
    popmm.attach(model, bytes=0.3, weights="replace")
    with pytest.raises(RuntimeError, match="is not what was attached"):
        popmm.detach(model)
    generate(model, {"input_ids": tiny.prompt(9)})


def test_replacing_belongs_to_tiers():
    with pytest.raises(ValueError, match="weights='replace'.*selection='tiers'"):
        popmm.PopConfig(selection="gate", weights="replace")
    with pytest.raises(ValueError, match="weights='drop'"):
        popmm.PopConfig(bytes=0.3, weights="drop")
    assert popmm.PopConfig(bytes=0.3, weights="replace").replace(selection="mask", ffn_ratio=0.3).weights == "keep"


def test_shared_weights_are_not_freed():
    model = MODELS["llama"].build()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="shares up_proj.weight"):
        popmm.attach(model, bytes=0.3, weights="replace")
    assert torch.isfinite(model.model.layers[0].mlp.up_proj.weight).all()
