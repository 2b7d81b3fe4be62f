"""FFNs without a gate, in all selections, against loops over channels that hooks put into the model's own layers."""

from contextlib import contextmanager

import independent
import pytest
import tiny
import torch
import torch.nn.functional as F
from popmm.adapters import describe
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import popmm
from popmm.kernels import planes
from popmm.kernels.twin import dequantise, quantise
from popmm.method import reference


def gelu_tanh(g):
    return F.gelu(g, approximate="tanh")


# the first projection and down, and what stands between them
FFNS = {
    "gpt2": ("mlp.c_fc", "mlp.c_proj", gelu_tanh),
    "nemotron": ("mlp.up_proj", "mlp.down_proj", lambda g: F.relu(g).square()),
    "phi": ("mlp.fc1", "mlp.fc2", gelu_tanh),
    "starcoder2": ("mlp.c_fc", "mlp.c_proj", gelu_tanh),
    "gpt-neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", F.gelu),
    "falcon": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", F.gelu),
    "bloom": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", gelu_tanh),
    "opt": ("fc1", "fc2", F.relu),
}
CONFIGS = {
    "mask": dict(selection="mask", candidate_fraction=0.2, ffn_ratio=0.45),
    "keep": dict(selection="keep", candidate_fraction=0.2, ffn_ratio=0.45),
    "gate 16": dict(selection="gate", gate_bits=16, ffn_ratio=0.45),
    "gate 4": dict(selection="gate", gate_bits=4, ffn_ratio=0.6),
    "tiers": dict(bytes=0.28),
    "few bits": dict(bytes=0.2),
}
PROMPT, CONTINUATION = tiny.prompt(12)[0], tiny.prompt(5, seed=1)[0]


def layers_of(model, name):
    """(first projection, down) of each layer."""
    modules = dict(model.named_modules())
    first, down, _ = FFNS[name]
    ends = [key.removesuffix(first) for key in modules if key.endswith(f".{first}")]
    return [(modules[end + first], modules[end + down]) for end in ends]


def rows_of(layer):
    return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight


@contextmanager
def computed(pairs, ffn):
    """The model in which ``ffn(i, x)`` is the output of layer i's FFN for one token."""
    x, handles = {}, []
    for i, (first, down) in enumerate(pairs):
        handles.append(first.register_forward_pre_hook(lambda m, args, i=i: x.update({i: args[0].flatten()})))
        handles.append(down.register_forward_hook(lambda m, args, y, i=i: ffn(i, x[i]).view(y.shape)))
    yield
    for handle in handles:
        handle.remove()


def prompt_partitions(model, pairs, sizes):
    seen = [None] * len(pairs)
    hooks = [
        (down, lambda m, args, i=i: seen.__setitem__(i, args[0].flatten(0, -2))) for i, (_, down) in enumerate(pairs)
    ]
    with independent.pre_hooks(hooks):
        model(PROMPT[None])
    found = []
    for (_, down), h in zip(pairs, seen):
        order = reference.prompt_importance("wanda", h, rows_of(down))
        order = sorted(range(len(order)), key=lambda i: (-order[i], i))
        found.append((order[: sizes.retained], order[sizes.retained : sizes.read]))
    return found


def by_loops(name, config, pairs, partitions, sizes):
    """The FFN of one token, as a config says, channel by channel."""
    act = FFNS[name][2]
    coded = {}

    def read(i, part, bits):
        if (i, part, bits) not in coded:
            layer = pairs[i][part]
            rows = (rows_of(layer).T if part else rows_of(layer)).contiguous()  # down by channel
            coded[i, part, bits] = planes.decode(planes.encode(rows, sizes.base), bits)
        return coded[i, part, bits]

    def tiers(i, x):
        first, down = pairs[i]
        bias = torch.zeros(sizes.d_ff) if first.bias is None else first.bias
        score = act(read(i, 0, sizes.base) @ x + bias).abs() * rows_of(down).norm(dim=0)
        order = sorted(range(sizes.d_ff), key=lambda c: (-score[c].item(), c))
        y, start = torch.zeros_like(x) if down.bias is None else down.bias.clone(), 0
        for bits, n in sizes.tiers:
            for c in order[start : start + n]:
                y += act(read(i, 0, bits)[c] @ x + bias[c]) * read(i, 1, bits)[c]
            start += n
        return y

    def plain(i, x):
        first, down = pairs[i]
        rows, (retained, candidate) = rows_of(first), partitions[i]
        if config.selection == "gate" and config.gate_bits < 16:
            rows = dequantise(*quantise(rows.contiguous(), config.gate_bits, 32), config.gate_bits, 32)
        h = act(F.linear(x, rows, first.bias))
        on = torch.zeros(len(h), dtype=torch.bool)
        if config.selection == "keep":
            on[retained + candidate] = True
        else:
            on = reference.decode_mask(h, rows_of(down), retained, candidate, sizes.budget)
        return F.linear(h * on, rows_of(down), down.bias)

    return tiers if config.selection == "tiers" else plain


@pytest.mark.parametrize("layout", ["copy", "permute"])
@pytest.mark.parametrize("selection", CONFIGS)
@pytest.mark.parametrize("name", FFNS)
@torch.no_grad()
def test_decode_is_what_loops_over_channels_give(name, selection, layout, monkeypatch):
    # which round what rows are multiplied with, and have tests of their own
    monkeypatch.setattr("popmm.kernels.native.serves_planes", lambda rows: False)
    model = tiny.dense(name)
    config = popmm.PopConfig(layout=layout, **CONFIGS[selection])
    with popmm.pruned(model, config) as state:
        found = independent.steps(model, PROMPT, CONTINUATION)
        layers = dict(state.layers)
    pairs = layers_of(model, name)
    sizes = next(iter(layers.values())).sizes
    partitions = prompt_partitions(model, pairs, sizes)
    assert [independent.channels(p)[:2] for p in layers.values()] == partitions or config.selection == "tiers"
    dense = independent.steps(model, PROMPT, CONTINUATION)
    cache = model(PROMPT[None], use_cache=True).past_key_values
    with computed(pairs, by_loops(name, config, pairs, partitions, sizes)):
        expected = torch.stack([model(t.view(1, 1), past_key_values=cache).logits[0, -1] for t in CONTINUATION])
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert (found - dense).norm() > 2e-3 * dense.norm()


def test_bytes_are_those_of_two_matrices():
    model = tiny.dense("starcoder2")
    row = 32 * 4
    expected = {"mask": 52 + 48, "keep": 2 * 52, "gate": 62 + 34}
    for selection, n_rows in expected.items():
        how = dict(gate_bits=16) if selection == "gate" else dict(candidate_fraction=0.1)
        with popmm.pruned(model, popmm.PopConfig(selection=selection, ffn_ratio=0.4, **how)) as state:
            assert state.bytes_per_token() == (2 * n_rows * row, 2 * 2 * 80 * row)
    with popmm.pruned(model.to(torch.bfloat16), bytes=0.28) as state:
        read, dense = state.bytes_per_token()
        tiers = state._ffns[0].sizes.tiers
        assert read == 2 * round((80 * 4.5 + sum(n * (b - 4 + b + 0.5) for b, n in tiers)) * 32 / 8)
        assert dense == 2 * 2 * 80 * 32 * 2 and read / dense == pytest.approx(0.28, abs=0.01)


def test_tiers_need_nothing_of_a_prompt():
    model, found = tiny.dense("gpt2"), []
    for statistics in ("prompt", "weights"):
        with popmm.pruned(model, bytes=0.28, statistics=statistics):
            found.append(independent.steps(model, PROMPT, CONTINUATION))
    assert torch.equal(*found)


def test_an_ffn_whose_module_does_more_is_taken_by_its_two_layers():
    model = tiny.dense("gpt2")
    for layer in model.transformer.h:
        own = type(layer.mlp).forward
        layer.mlp.forward = lambda x, mlp=layer.mlp, own=own: 2 * own(mlp, x) + x
    before = independent.steps(model, PROMPT, CONTINUATION)
    sites = list(describe(model).sites())
    assert [site.name for site in sites] == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert all(site.entry is not None for site in sites)
    with popmm.pruned(model, popmm.PopConfig(selection="gate", gate_bits=8, ffn_ratio=0.4)):
        found = independent.steps(model, PROMPT, CONTINUATION)
    assert 0 < (found - before).norm() < 0.05 * before.norm()
    assert torch.equal(independent.steps(model, PROMPT, CONTINUATION), before)


def test_a_layer_replaced_while_attached_is_named():
    model = tiny.dense("opt")
    with popmm.pruned(model, bytes=0.3):
        model(PROMPT[None])
        layer = model.model.decoder.layers[0]
        own, layer.fc1 = layer.fc1, nn.Linear(32, 80)
        with pytest.raises(RuntimeError, match=r"decoder\.layers\.0\.fc1 was replaced"):
            model(PROMPT[None])
        layer.fc1 = own
        model(PROMPT[None])


def test_a_norm_between_the_projections_is_refused():
    model = tiny.dense("opt")
    for layer in model.model.decoder.layers:
        layer.activation_fn = nn.LayerNorm(80)
    with pytest.raises(
        popmm.UnsupportedModelError, match=r"layers\.0: an FFN without a gate \(fc1 and fc2\) has something other"
    ):
        popmm.attach(model)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_computes_something_else_is_refused():
    model = tiny.dense("falcon")
    for layer in model.transformer.h:
        layer.mlp.dense_h_to_4h.__class__ = Twice
    with pytest.raises(popmm.UnsupportedModelError, match="dense_h_to_4h is a Twice, which computes by"):
        popmm.attach(model)


def test_activations_with_numbers_of_their_own_are_called_as_they_are():
    settings = {k: v for k, v in tiny.COMMON.items() if k != "max_position_embeddings"}
    model = tiny.build(AutoConfig.for_model("apertus", **settings))
    with popmm.pruned(model, popmm.PopConfig(selection="gate", gate_bits=8, ffn_ratio=0.4)) as state:
        found = independent.steps(model, PROMPT, CONTINUATION)
        assert len(state.layers) == 2
        model.model.layers[0].mlp.act_fn.alpha_p.data += 2  # and so are followed
        changed = independent.steps(model, PROMPT, CONTINUATION)
    dense = independent.steps(model, PROMPT, CONTINUATION)
    assert (changed - dense).norm() < 0.05 * dense.norm() < (found - dense).norm()


@pytest.mark.parametrize("model_type", ["apertus", "gpt2", "opt", "bloom"])
def test_a_configuration_is_enough_for_the_ratio(model_type):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=64)).eval()
    ratios = [popmm.budget.ffn_ratio(m, 0.2) for m in (model, model.config)]
    assert ratios[0] == ratios[1] and 0.25 < ratios[0] < 0.5
