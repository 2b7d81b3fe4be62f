"""What the adapters find, and how they refuse what they do not know."""

import re

import pytest
import tiny
import torch
from popmm.adapters import describe
from popmm.adapters.own_experts import own_experts, verify_caller
from torch import nn

import popmm
from popmm import zoo
from popmm.method.ffn import ffn


def test_attention_with_a_fused_projection_is_no_ffn():
    description = describe(tiny.dense("phi3"))
    assert [site.name for site in description.sites()] == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.parametrize("activation", [nn.functional.silu, nn.functional.gelu])
def test_activation_called_inline_is_found_by_the_probe(llama, activation):
    class Inline(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.w1, self.w3, self.w2 = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x):
            return self.w2(activation(self.w1(x)) * self.w3(x))

    for layer in llama.model.layers:
        layer.mlp = Inline(layer.mlp)
    mlp, seen = llama.model.layers[0].mlp, []
    with popmm.pruned(llama, ffn_ratio=0.4, candidate_fraction=0, selection="keep") as state:
        llama.generate(tiny.prompt(9), max_new_tokens=1)
        mlp.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
        llama.generate(tiny.prompt(9), max_new_tokens=2)
        on = torch.zeros(80)
        on[state.layers["model.layers.0.mlp"].retained] = 1
    x, got = seen[-1]
    assert x.shape == (1, 1, 32)
    expected = mlp.w2(activation(mlp.w1(x)) * mlp.w3(x) * on)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_an_ffn_shared_by_two_layers_is_one_ffn(llama):
    llama.model.layers[1].mlp = llama.model.layers[0].mlp
    with popmm.pruned(llama, ffn_ratio=0.4, selection="mask") as state, state.trace() as trace:
        llama.generate(tiny.prompt(9), max_new_tokens=4, do_sample=False)
        assert state.ready and list(state.layers) == ["model.layers.0.mlp"]
        assert (trace["model.layers.0.mlp"].sum(-1) == 48).all()


def test_stacked_experts_off_the_interface_are_left_out(llama):
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(2, 8, 4))
            self.down = nn.Parameter(torch.zeros(2, 4, 4))

    llama.model.layers[1].experts = Foreign()
    description = describe(llama)
    assert re.match(
        r"Foreign holds stacked experts \(gate_up, down\) outside transformers' interface, and is called in another",
        description.left_out["model.layers.1.experts"],
    )
    assert [site.name for site in description.sites()] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_an_ffn_that_computes_something_else_is_left_out_and_the_others_are_sites(llama):
    mlp = llama.model.layers[1].mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: plain(mlp, x) * 2
    description = describe(llama)
    assert [site.name for site in description.sites()] == ["model.layers.0.mlp"]
    assert list(description.left_out) == ["model.layers.1.mlp"]
    assert (
        "LlamaMLP has the layers of a gated FFN but computes something other"
        in description.left_out["model.layers.1.mlp"]
    )


def test_a_skipped_layer_is_neither_probed_nor_listed(llama):
    def forward(x):
        raise AssertionError("called")

    llama.model.layers[1].mlp.forward = forward
    description = describe(llama, skip_layers=(1,))
    assert description.left_out == {} and len(description.layers) == 2
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    assert describe(llama, skip_layers=(1,)).left_out == {}


def test_a_model_whose_every_ffn_is_of_another_form_is_refused_with_the_reason(llama):
    for layer in llama.model.layers:
        plain = type(layer.mlp).forward
        layer.mlp.forward = lambda x, mlp=layer.mlp, plain=plain: plain(mlp, x) * 2
    with pytest.raises(
        popmm.UnsupportedModelError,
        match=r"nothing in LlamaForCausalLM can be pruned: model\.layers\.0\.mlp \(LlamaMLP\) has the layers of a "
        r"gated FFN but computes something other .* \(so is model\.layers\.1\.mlp\)",
    ):
        describe(llama)


def test_a_clamp_that_ordinary_values_never_reach_is_part_of_the_combination(llama):
    class Clamped(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
                mlp.act_fn,
            )

        def forward(self, x):
            gate = self.gate_proj(x).clamp(max=7.0)
            return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    for layer in llama.model.layers:
        layer.mlp = Clamped(layer.mlp)
    for probe in (True, False):
        site = next(describe(llama, probe=probe).sites())
        gate, up = torch.tensor([3.0, 50.0]), torch.tensor([2.0, 2.0])
        torch.testing.assert_close(site.combine(gate, up), nn.functional.silu(torch.tensor([3.0, 7.0])) * 2)


def test_a_factor_of_the_output_is_part_of_the_combination(llama):
    class Scaled(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)) * self.scale

    for layer in llama.model.layers:
        layer.mlp = Scaled(layer.mlp)
    site = next(describe(llama).sites())
    llama.model.layers[0].mlp.scale.data.fill_(3.0)
    x = torch.randn(4, 32)
    torch.testing.assert_close(ffn(x, site.weights(), site.combine), site.module(x), atol=1e-5, rtol=1e-4)
    assert site.factor().item() == 3.0


def test_channels_that_depend_on_each_other_are_left_out_without_a_probe_too(llama):
    class Normed(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x):
            h = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(h / h.norm(dim=-1, keepdim=True))

    llama.model.layers[0].mlp = Normed(llama.model.layers[0].mlp)
    for probe in (True, False):
        description = describe(llama, probe=probe)
        assert "divides its channels by a norm over all of them" in description.left_out["model.layers.0.mlp"]
        assert len(list(description.sites())) == 1


def test_parameters_for_each_channel_between_the_projections_are_named_as_such(llama):
    class Weighed(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.weigh = nn.Parameter(torch.linspace(0.5, 2, 80))

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x) * self.weigh) * self.up_proj(x))

    llama.model.layers[0].mlp = Weighed(llama.model.layers[0].mlp)
    assert "Weighed treats its channels differently" in describe(llama).left_out["model.layers.0.mlp"]


def test_experts_in_a_list_are_left_out_and_a_list_of_ffns_in_a_block_is_not():
    class Routed(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.gate = nn.Linear(32, 2)
            self.experts = nn.ModuleList(experts)

        def forward(self, x):
            return sum(w.unsqueeze(-1) * e(x) for w, e in zip(self.gate(x).softmax(-1).unbind(-1), self.experts))

    model, other = tiny.dense("llama"), tiny.dense("llama")
    model.model.layers[0].mlp = Routed([model.model.layers[0].mlp, other.model.layers[0].mlp])
    description = describe(model)
    assert "ModuleList is a list of 2 experts" in description.left_out["model.layers.0.mlp.experts"]
    assert len(description.layers) == 2 and len(list(description.sites())) == 1
    layer = model.model.layers[1]
    layer.mlps = nn.ModuleList([layer.mlp, other.model.layers[1].mlp])
    del layer.mlp
    names = [site.name for site in describe(model).sites()]
    assert names == ["model.layers.1.mlps.0", "model.layers.1.mlps.1"]


def test_layers_of_several_stacks_are_numbered_through(llama):
    llama.model.blocks = nn.ModuleList([nn.ModuleDict({"stage": tiny.dense("llama").model.layers})])
    llama.model.projections = nn.ModuleList([nn.Linear(32, 32) for _ in range(9)])
    description = describe(llama)
    assert [layer.index for layer in description.layers] == [0, 1, 2, 3]
    assert [layer.name for layer in description.layers][2:] == ["model.blocks.0.stage.0", "model.blocks.0.stage.1"]
    assert [site.layer for site in description.sites()] == [0, 1, 2, 3]


def test_a_vision_tower_inside_the_decoder_is_not_the_language_models(llama):
    llama.model.visual = nn.ModuleList([*tiny.dense("llama").model.layers, *tiny.dense("llama").model.layers])
    assert [site.name for site in describe(llama).sites()] == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
)
@pytest.mark.parametrize("build", [lambda: tiny.dense("llama"), lambda: tiny.moe("mixtral")])
def test_want_of_memory_during_the_probe_is_told_as_such(build, error, monkeypatch):
    model = build()
    site = next(describe(model).sites())

    def forward(*args):
        raise error

    site.module.forward = forward
    with pytest.raises(type(error)) as raised:
        describe(model)
    assert raised.value is error


def test_an_interrupt_during_the_probe_comes_through(llama):
    def forward(x):
        raise KeyboardInterrupt

    llama.model.layers[0].mlp.forward = forward
    with pytest.raises(KeyboardInterrupt):
        describe(llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_weights_that_are_not_finite_are_named(llama, name, value):
    with torch.no_grad():
        getattr(llama.model.layers[1].mlp, name).weight[3, 2] = value
    with pytest.raises(
        popmm.UnsupportedModelError,
        match=rf"model\.layers\.1\.mlp\.{name}\.weight holds weights that are not finite .*: mend the checkpoint",
    ):
        describe(llama)


def test_an_expert_that_the_probe_does_not_reach_is_checked_for_finite_weights():
    model = tiny.moe("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = float("nan")
    with pytest.raises(popmm.UnsupportedModelError, match=r"layers\.0\.mlp\.experts\.down_proj holds weights that are"):
        describe(model)


def test_experts_that_compute_something_else_are_left_out(monkeypatch):
    model = tiny.moe("mixtral")
    experts = model.model.layers[0].mlp.experts
    plain = experts.forward
    experts.forward = lambda *args: plain(*args) + 1
    description = describe(model)
    assert "MixtralExperts computes something other" in description.left_out["model.layers.0.mlp.experts"]
    assert [site.name for site in description.sites()] == ["model.layers.1.mlp.experts"]


def test_bare_decoder_keeps_its_statistics_with_either_output_form(llama):
    decoder = llama.model
    first, second, token = tiny.prompt(9, seed=1), tiny.prompt(7, seed=2), tiny.prompt(1, seed=3)
    with popmm.pruned(decoder, ffn_ratio=0.4), torch.no_grad():
        alone = decoder(token, past_key_values=decoder(first).past_key_values)[0]
        cache = decoder(first, return_dict=False)[1]
        decoder(second, return_dict=False)
        assert torch.equal(decoder(token, past_key_values=cache)[0], alone)


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_float64_models_work(ratio):
    model = tiny.build(tiny.DENSE["llama"], dtype=torch.float64)
    with popmm.pruned(model, pruning_ratio=ratio) as state:
        model.generate(tiny.prompt(9), max_new_tokens=3)
        assert state.layers["model.layers.0.mlp"].importance.dtype == torch.float32


def test_weights_loaded_while_attached_are_ranked_by_their_own_norms(llama):
    other = tiny.build(tiny.DENSE["llama"], seed=3)
    ids = tiny.prompt(9)
    with popmm.pruned(other, ffn_ratio=0.4) as state:
        other.generate(ids, max_new_tokens=1)
        expected = state.layers["model.layers.0.mlp"].importance
    with popmm.pruned(llama, ffn_ratio=0.4) as state:
        llama.generate(ids, max_new_tokens=1)
        llama.load_state_dict(other.state_dict())
        llama.generate(ids, max_new_tokens=1)
        assert torch.equal(state.layers["model.layers.0.mlp"].importance, expected)


def test_a_model_moved_to_another_dtype_while_attached_goes_on(llama):
    with popmm.pruned(llama, ffn_ratio=0.4):
        llama.generate(tiny.prompt(9), max_new_tokens=2)
        llama.to(torch.bfloat16)
        llama.generate(tiny.prompt(9), max_new_tokens=2)


@pytest.mark.parametrize("build", [lambda: tiny.dense("llama"), lambda: tiny.moe("mixtral")])
def test_attach_under_another_default_device(build):
    model = build()
    with torch.device("meta"):
        popmm.attach(model, ffn_ratio=0.4)
    popmm.detach(model)


def test_third_parties_are_asked_first(monkeypatch, llama):
    from popmm.adapters import base, register

    asked = []

    class Adapter:
        def site(self, module, probe):
            asked.append(type(module).__name__)

    monkeypatch.setattr(base, "_REGISTRY", list(base._REGISTRY))
    register(Adapter())
    with popmm.pruned(llama, ffn_ratio=0.4) as state:
        assert len(state._ffns) == 2
    assert "LlamaMLP" in asked


def test_bundled_models_are_described_without_a_probe():
    model, _ = zoo.load("stories-moe")
    sites = list(describe(model, probe=False).sites())
    assert [(site.n_experts, site.top_k) for site in sites] == [(8, 2)] * 4


class Own(nn.Module):
    """Experts by a loop, of one's own: gate and up interleaved, weights turned, called with tokens that are routed."""

    def __init__(self, n_experts=3, d_model=8, d_ff=12):
        super().__init__()
        self.first = nn.Parameter(torch.randn(n_experts, d_model, 2 * d_ff))
        self.last = nn.Parameter(torch.randn(n_experts, d_model, d_ff))
        self.limit = None

    def forward(self, x, experts, weights):
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for e, w in zip(experts[t].tolist(), weights[t]):
                gate_up = x[t] @ self.first[e]
                gate, up = gate_up[0::2], gate_up[1::2]
                up = up if self.limit is None else up.clamp(max=self.limit)
                out[t] += w * (self.last[e] @ (torch.nn.functional.gelu(gate) * up))
        return out


def test_experts_of_a_form_that_nobody_has_named_are_read_by_what_they_compute():
    module = Own()
    site = own_experts(module, probe=True)
    w = site.weights()
    assert torch.equal(w.gate, module.first[..., 0::2].mT) and torch.equal(w.up, module.first[..., 1::2].mT)
    assert torch.equal(w.down, module.last) and site.n_experts == 3
    g, u = torch.randn(2, 5)
    torch.testing.assert_close(site.combine(g, u), torch.nn.functional.gelu(g) * u)


def test_experts_whose_gate_is_of_another_form_are_refused_however_rarely_it_shows():
    module = Own()
    module.limit = 150.0  # within what large activations reach
    with pytest.raises(popmm.UnsupportedModelError, match="Own holds .* computes something other than down"):
        own_experts(module, probe=True)
    module.limit, module.scale = None, nn.Parameter(torch.ones(8))
    with pytest.raises(popmm.UnsupportedModelError, match="scale beside them"):
        own_experts(module, probe=True)


def test_experts_that_are_not_finite_are_named():
    module = Own()
    module.last.data[1, 2, 3] = torch.nan
    with pytest.raises(popmm.UnsupportedModelError, match="last holds weights that are not finite"):
        own_experts(module, probe=True)


def test_tokens_that_come_to_all_experts_are_refused():
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 24))
            self.down_proj = nn.Parameter(torch.randn(3, 12, 8))

        def forward(self, x):
            gate, up = torch.bmm(x.view(3, -1, 8), self.gate_up_proj).chunk(2, dim=-1)
            return torch.bmm(torch.nn.functional.silu(gate) * up, self.down_proj).view(-1, 8)

    class Block(nn.Module):
        def __init__(self, soft):
            super().__init__()
            self.experts, self.router, self.soft = All(), nn.Linear(8, 3), soft

        def forward(self, x):
            x = x.reshape(-1, 8)
            scores = self.router(x).softmax(-1)
            scores = scores if self.soft else scores * (scores == scores.amax(-1, keepdim=True))
            rows = x.repeat(3, 1) * scores.mT.reshape(-1, 1)
            return self.experts(rows).view(3, -1, 8).sum(0)

    for soft in (False, True):
        block = Block(soft)
        site = own_experts(block.experts, probe=True)
        site.top_k = 1
        if soft:
            with pytest.raises(popmm.UnsupportedModelError, match="Block does not give zeros"):
                verify_caller(site, block, probe=True)
        else:
            verify_caller(site, block, probe=True)
