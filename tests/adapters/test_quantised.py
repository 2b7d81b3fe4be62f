"""Models that arrive quantised: by torchao, by packed layers of any library, and by what cannot be read."""

import pytest
import tiny
import torch
from matrix import generate
from popmm.adapters import describe
from torch import nn

import popmm

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class QuantLinear(nn.Module):
    """As GPTQ and AWQ pack weights: 4 bits of unsigned codes, zero points and scales by groups of inputs."""

    def __init__(self, linear, group=16):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        w = linear.weight.detach().view(self.out_features, -1, group)
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        scale = (high - low) / 15
        zero = (-low / scale).round()
        codes = ((w / scale).round() + zero).clamp(0, 15).to(torch.int32)
        for name, tensor in (("qweight", codes), ("scales", scale), ("qzeros", zero)):
            self.register_buffer(name, tensor)
        self.bias = linear.bias

    def unpacked(self):
        return ((self.qweight - self.qzeros) * self.scales).flatten(1)

    def forward(self, x):
        return nn.functional.linear(x, self.unpacked().to(x.dtype), self.bias)


class QBytesTensor(torch.Tensor):
    """Stands for the packed tensors of quantisation libraries."""


def packed(model, make):
    for layer in model.model.layers:
        for name in PROJECTIONS:
            setattr(layer.mlp, name, make(getattr(layer.mlp, name)))
    return model


def by_torchao(config):
    torchao = pytest.importorskip("torchao.quantization")

    def quantise(model):
        torchao.quantize_(model, getattr(torchao, config)(), filter_fn=lambda m, name: name.endswith(PROJECTIONS))
        return model

    return quantise


FORMATS = {
    "int8": lambda model: by_torchao("Int8WeightOnlyConfig")(model),
    "int8 of both": lambda model: by_torchao("Int8DynamicActivationInt8WeightConfig")(model),
    "packed": lambda model: packed(model, QuantLinear),
}


def dequantised(model):
    """A copy with plain layers of the same weights: what each layer answers to unit vectors."""
    plain = tiny.dense("llama")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "mlp" not in k}, strict=False)
    with torch.no_grad():
        for layer, own in zip(model.model.layers, plain.model.layers):
            for name in PROJECTIONS:
                linear = getattr(own.mlp, name)
                linear.weight.copy_(getattr(layer.mlp, name)(torch.eye(linear.in_features)).T)
    return plain


@pytest.mark.parametrize("kind", FORMATS)
def test_tiers_of_quantised_weights_are_those_of_the_dequantised_ones(kind, llama):
    model = FORMATS[kind](llama)
    plain, inputs = dequantised(model), {"input_ids": tiny.prompt(9)}
    with popmm.pruned(plain, bytes=0.3) as state:
        expected, _ = generate(plain, inputs)
        ours = [ffn.layout.gate for ffn in state._ffns]
    with popmm.pruned(model, bytes=0.3) as state:
        found, logits = generate(model, inputs)
        assert state.passes["decode"] == 3 and torch.isfinite(logits).all()
        for own, ffn in zip(ours, state._ffns):
            for a, b in zip(own, ffn.layout.gate):
                # a layer that rounds its inputs answers a little beside its weights
                assert torch.equal(a, b) or kind == "int8 of both"
        notes = state.notes()
        assert len(notes) == 2 and all("rounding it again moves weights by" in note for note in notes.values())
        assert state.bytes_per_token()[1] == sum(ffn.site.packed.bytes() for ffn in state._ffns)
    if kind != "int8 of both":
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_pruned_is_the_quantised_model_itself(kind, llama):
    model, inputs = FORMATS[kind](llama), {"input_ids": tiny.prompt(9)}
    before = generate(model, inputs)[1]
    with popmm.pruned(model, bytes=1.0) as state:
        assert torch.equal(generate(model, inputs)[1], before)
        pruned, dense = state.bytes_per_token()
        assert pruned == dense
    assert torch.equal(generate(model, inputs)[1], before)


@pytest.mark.parametrize("selection", ["gate", "mask", "keep"])
def test_other_selections_are_refused_by_name(selection, llama):
    model = FORMATS["packed"](llama)
    with pytest.raises(popmm.UnsupportedModelError, match=r"QuantLinear.*selection='tiers'"):
        popmm.attach(model, selection=selection, ffn_ratio=0.3)
    assert "forward" not in model.model.layers[0].mlp.__dict__


def test_packed_weights_that_are_written_are_read_again(llama):
    model, inputs = FORMATS["packed"](llama), {"input_ids": tiny.prompt(9)}
    with popmm.pruned(model, bytes=0.3) as state:
        generate(model, inputs)
        before = state._ffns[0].layout.gate.scale.clone()
        model.model.layers[0].mlp.gate_proj.scales.mul_(2)
        generate(model, inputs)
        torch.testing.assert_close(state._ffns[0].layout.gate.scale, 2 * before)


def test_a_layer_that_does_not_run_or_answers_otherwise_is_refused(llama):
    class Broken(QuantLinear):
        def forward(self, x):
            raise NotImplementedError("needs a GPU")

    class Other(QuantLinear):
        def forward(self, x):
            return super().forward(x.abs() ** 0.5)

    mlp = llama.model.layers[0].mlp
    own = mlp.up_proj
    mlp.up_proj = Broken(own)
    assert "up_proj is a Broken that does not run here (NotImplementedError: needs a GPU)" in _reason(llama)
    mlp.up_proj = Other(own)
    assert "up_proj is a Other, whose answers are not those of the weights" in _reason(llama)


def _reason(model):
    description = describe(model)
    assert [site.name for site in description.sites()] == ["model.layers.1.mlp"]
    return description.left_out["model.layers.0.mlp"]


def test_a_subclass_of_tensor_that_says_nothing_is_read_by_its_layer(llama):
    linear = llama.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(QBytesTensor), requires_grad=False)
    site = next(iter(describe(llama).sites()))
    assert site.packed is not None and torch.allclose(site.read().up, linear.weight.detach().as_subclass(torch.Tensor))


def test_replacing_quantised_weights_is_refused(llama):
    with pytest.raises(ValueError, match="weights='replace'.*quantised"):
        popmm.attach(FORMATS["packed"](llama), bytes=0.3, weights="replace")
