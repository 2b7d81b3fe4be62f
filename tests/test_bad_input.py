"""Bad input gets one error that says what was given and what would work, and changes nothing."""

import copy
import pickle
import threading

import pytest
import tiny
import tiny_families
import torch

import popmm


def untouched(model):
    return not any({"forward", "generate"} & set(m.__dict__) or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pruning_ratio": 1.0}, r"pruning_ratio=1\.0 is not a ratio: give a number in \[0, 1\)"),
        ({"pruning_ratio": -0.1}, r"pruning_ratio=-0\.1 is not a ratio"),
        ({"pruning_ratio": "0.4"}, r"pruning_ratio='0\.4' is not a ratio"),
        ({"pruning_ratio": float("nan")}, r"pruning_ratio=nan is not a ratio"),
        ({"ffn_ratio": 1.5}, r"ffn_ratio=1\.5 is not a ratio"),
        ({"pruning_ratio": 0.2, "ffn_ratio": 0.2}, r"pruning_ratio=0\.2 and ffn_ratio=0\.2 exclude each other"),
        ({"candidate_fraction": 2}, r"candidate_fraction=2: give a number in \[0, 1\]"),
        ({"selection": "best"}, r"selection='best': give one of 'mask', 'keep'"),
        ({"importance": "magic"}, r"importance='magic': give one of 'wanda', 'griffin', 'flock'"),
        ({"skip_layers": (-1,)}, r"skip_layers=\(-1,\): give layer indices counted from 0"),
        ({"skip_layers": 3}, r"skip_layers=3: give layer indices"),
        ({"refresh_every": -1}, r"refresh_every=-1: give a number of decode steps, or 0 for never"),
        ({"refresh_every": 2.5}, r"refresh_every=2.5: give a number of decode steps"),
        ({"selection": "keep", "gate_bits": 4}, r"gate_bits=4 belongs to selection='gate': leave it out with 'keep'"),
        ({"gate_bits": 2}, r"gate_bits=2: give 16, 8 or 4"),
        ({"selection": "gate", "gate_bits": 8, "candidate_fraction": 0.5}, r"gate_bits=8 .* no candidate_fraction"),
        ({"prior_tokens": -1}, r"prior_tokens=-1: give a number of tokens"),
    ],
)
def test_config_names_the_bad_value_and_a_good_one(settings, message):
    with pytest.raises(ValueError, match=message):
        popmm.PopConfig(**settings)


def test_config_replace_swaps_ratios():
    config = popmm.PopConfig(pruning_ratio=0.3)
    assert config.replace(ffn_ratio=0.5).pruning_ratio is None
    assert config.replace(ffn_ratio=0.5).replace(pruning_ratio=0.2).ffn_ratio is None
    assert popmm.PopConfig(selection="gate").pruning_ratio == 0.4 and popmm.PopConfig().bytes == 0.33
    assert popmm.PopConfig.paper(pruning_ratio=0.2).prefill == "pruned"


def test_ratio_that_the_model_cannot_reach(llama):
    with pytest.raises(
        ValueError, match=r"pruning_ratio=0\.9 would prune .* at most 95% .* give pruning_ratio=0\.\d+ or less"
    ):
        popmm.attach(llama, pruning_ratio=0.9)
    with pytest.raises(ValueError, match=r"ffn_ratio=0\.97 prunes more than 95%"):
        popmm.attach(llama, ffn_ratio=0.97)
    assert untouched(llama)


def test_skip_layers_beyond_the_model(llama):
    with pytest.raises(ValueError, match=r"skip_layers=\(7,\): this model has layers 0 to 1"):
        popmm.attach(llama, skip_layers=(7,))
    with pytest.raises(ValueError, match=r"skip_layers=\(0, 1\) leaves no FFN to prune"):
        popmm.attach(llama, skip_layers=(0, 1))


def test_an_ffn_of_another_form_is_named():
    model = tiny_families.build("rwkv")
    with pytest.raises(popmm.UnsupportedModelError, match=r"RwkvFeedForward\) is an FFN of another form"):
        popmm.attach(model)
    assert untouched(model)


def test_an_ffn_that_computes_something_else_stays_dense_and_is_named(llama):
    mlp = llama.model.layers[1].mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: plain(mlp, x) * 2 + 1
    with popmm.pruned(llama, ffn_ratio=0.4) as state:
        llama.generate(tiny.prompt(9), max_new_tokens=3, do_sample=False)
        assert list(state.layers) == ["model.layers.0.mlp"] and state.passes["decode"] == 2
        assert "computes something other" in state.notes()["model.layers.1.mlp"]
        assert "model.layers.1.mlp: stays dense: " in state.summary()
    del mlp.forward
    assert untouched(llama)


def test_gate_and_up_are_told_apart_by_what_they_compute(llama):
    class Swapped(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.down, self.a, self.b, self.act = mlp.down_proj, mlp.up_proj, mlp.gate_proj, mlp.act_fn

        def forward(self, x):
            return self.down(self.a(x) * self.act(self.b(x)))

    ids = tiny.prompt(9)
    with popmm.pruned(llama, ffn_ratio=0.5):
        expected = llama.generate(ids, max_new_tokens=6, do_sample=False)
    for layer in llama.model.layers:
        layer.mlp = Swapped(layer.mlp)
    with popmm.pruned(llama, ffn_ratio=0.5):
        assert torch.equal(llama.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_not_a_transformers_model():
    with pytest.raises(popmm.UnsupportedModelError, match="Linear is not a transformers model: give a PreTrainedModel"):
        popmm.attach(torch.nn.Linear(2, 2))


def test_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(popmm.UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        popmm.attach(T5ForConditionalGeneration(config).eval())


def test_weights_are_judged_as_they_lie(llama):
    llama.is_quantized = True  # as of a model from a GGUF file, whose weights are plain
    with popmm.pruned(llama, ffn_ratio=0.4) as state:
        assert not state.notes()
    del llama.is_quantized
    linear = llama.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with popmm.pruned(llama, ffn_ratio=0.4) as state:
        assert "up_proj.weight is stored as float8_e4m3fn" in state.notes()["model.layers.0.mlp"]
    for layer in llama.model.layers:
        layer.mlp.up_proj.weight = torch.nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    with pytest.raises(popmm.UnsupportedModelError, match="float8_e4m3fn: load the model with unquantised weights"):
        popmm.attach(llama)
    assert untouched(llama)


def test_offloaded_weights_are_refused(llama):
    llama.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(popmm.UnsupportedModelError, match=r"offloaded \(devices: 0, cpu\): load the whole model"):
        popmm.attach(llama)
    del llama.hf_device_map
    assert untouched(llama)


def test_really_offloaded_weights_are_refused(llama):
    from accelerate import cpu_offload

    cpu_offload(llama, execution_device="cpu")
    with pytest.raises(popmm.UnsupportedModelError, match="offloaded"):
        popmm.attach(llama)


def test_weights_without_data_are_refused():
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(tiny.DENSE["llama"]).eval()
    with pytest.raises(popmm.UnsupportedModelError, match=r"has no data \(meta device\): load the weights first"):
        popmm.attach(model)


def test_attach_twice(llama):
    popmm.attach(llama)
    with pytest.raises(RuntimeError, match=r"is attached already .* call popmm\.detach\(model\) first"):
        popmm.attach(llama)
    with pytest.raises(RuntimeError, match="attached already"):
        popmm.attach(llama.model)
    popmm.detach(llama)
    assert untouched(llama)


def test_detach_without_attach(llama):
    with pytest.raises(RuntimeError, match=r"is not attached: call popmm\.attach\(model, config\) first"):
        popmm.detach(llama)


def test_training_mode(llama):
    llama.train()
    with pytest.raises(ValueError, match=r"training mode: call model\.eval\(\)"):
        popmm.attach(llama)
    llama.eval()
    with popmm.pruned(llama):
        llama.train()
        with pytest.raises(
            RuntimeError, match=r"training mode: call model\.eval\(\), or popmm\.detach\(model\) to train"
        ):
            llama(tiny.prompt(4))


def test_empty_prompt(llama):
    with popmm.pruned(llama, ffn_ratio=0.4) as state:
        llama.generate(tiny.prompt(9), max_new_tokens=2)
        before = state.layers["model.layers.0.mlp"]
        with pytest.raises(ValueError, match=r"the prompt is empty: input of shape \(1, 0\)"):
            llama(torch.zeros(1, 0, dtype=torch.long))
        with pytest.raises(ValueError, match="the prompt is empty: attention_mask leaves no token"):
            llama(tiny.prompt(4), attention_mask=torch.zeros(1, 4, dtype=torch.long))
        assert state.layers["model.layers.0.mlp"] is before


def test_generate_with_an_empty_prompt(llama):
    with popmm.pruned(llama, ffn_ratio=0.4), pytest.raises(ValueError, match="prompt is empty|at least one token"):
        llama.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)


def test_second_thread_on_the_same_model(llama):
    ids = tiny.prompt(9)
    inside, may_go_on = threading.Event(), threading.Event()

    def pause(module, args):
        inside.set()
        may_go_on.wait(10)

    result = {}
    with popmm.pruned(llama, ffn_ratio=0.4):
        alone = llama.generate(ids, max_new_tokens=4, do_sample=False)
        handle = llama.model.layers[0].register_forward_pre_hook(pause)
        thread = threading.Thread(
            target=lambda: result.update(out=llama.generate(ids, max_new_tokens=4, do_sample=False))
        )
        thread.start()
        inside.wait(10)
        for call in (lambda: llama.generate(ids, max_new_tokens=4), lambda: llama(ids), lambda: popmm.detach(llama)):
            with pytest.raises(RuntimeError, match="another thread is running this model.*one after another"):
                call()
        may_go_on.set()
        thread.join()
        handle.remove()
        assert torch.equal(result["out"], alone)


def test_interrupt_in_the_middle_of_a_prompt_keeps_the_old_partition(llama):
    first, second = tiny.prompt(9, seed=1), tiny.prompt(7, seed=2)

    def interrupt(module, args):
        raise KeyboardInterrupt

    with popmm.pruned(llama, ffn_ratio=0.4) as state:
        undisturbed = llama.generate(second, max_new_tokens=4, do_sample=False)
        llama.generate(first, max_new_tokens=2)
        before = dict(state.layers)
        handle = llama.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama.generate(second, max_new_tokens=4)
        handle.remove()
        assert state.ready and dict(state.layers) == before
        assert torch.equal(llama.generate(second, max_new_tokens=4, do_sample=False), undisturbed)
    assert untouched(llama)


def test_interrupt_while_partitioning_leaves_a_dense_model(llama, monkeypatch):
    from popmm.layouts.copy import CopyLayout

    ids = tiny.prompt(9)
    dense = llama(ids).logits
    with popmm.pruned(llama, ffn_ratio=0.4, selection="keep") as state:
        expected = llama.generate(ids, max_new_tokens=4, do_sample=False)

        def interrupt(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(CopyLayout, "write", interrupt)
            llama.generate(ids, max_new_tokens=4)
        assert not state.ready
        assert torch.equal(llama.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert torch.equal(llama(ids).logits, dense)


@pytest.mark.parametrize("build", [lambda: tiny.dense("llama"), lambda: tiny.moe("mixtral")])
def test_interrupted_attach_leaves_no_trace(build, monkeypatch):
    model = build()
    former = model.config._experts_implementation
    plain = torch.nn.Module.register_forward_pre_hook
    calls = []

    def interrupt(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    ratio = 0.0 if hasattr(model.config, "num_local_experts") else 0.4
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.nn.Module, "register_forward_pre_hook", interrupt)
        popmm.attach(model, pruning_ratio=ratio)
    assert untouched(model)
    assert model.config._experts_implementation == former
    popmm.attach(model)
    popmm.detach(model)


def test_interrupted_chat_turn_is_not_counted(llama):
    with popmm.pruned(llama, ffn_ratio=0.4) as state, torch.no_grad():
        cache = llama(tiny.prompt(9)).past_key_values

        def interrupt(module, args):
            raise KeyboardInterrupt

        handle = llama.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama(tiny.prompt(3), past_key_values=cache)
        handle.remove()
        assert [int(p.tokens) for p in state.layers.values()] == [9, 9]


def test_importance_callable_of_the_wrong_shape(llama):
    with popmm.pruned(llama, ffn_ratio=0.4, importance=lambda h, norm: h.sum(0)) as state:
        with pytest.raises(ValueError, match=r"returned \(80,\): it must return a tensor of h's shape \(9, 80\)"):
            llama.generate(tiny.prompt(9), max_new_tokens=2)
        assert not state.ready


@pytest.mark.parametrize("config", [0.4, {"pruning_ratio": 0.4}])
def test_config_of_another_type(llama, config):
    with pytest.raises(TypeError, match=r"give a PopConfig, such as popmm\.PopConfig\(pruning_ratio=0\.4\)"):
        popmm.attach(llama, config)


def test_budget_checks_its_arguments(llama):
    for ratio in (-0.1, 1.5, "a"):
        with pytest.raises(ValueError, match="is not a ratio"):
            popmm.budget.ffn_ratio(llama, ratio)
    with pytest.raises(ValueError, match=r"skip_layers=\(9,\): this model has layers 0 to 1"):
        popmm.budget.ffn_ratio(llama, 0.2, skip_layers=(9,))
    with pytest.raises(ValueError, match="leaves no FFN to prune"):
        popmm.attach(llama, ffn_ratio=0.3, skip_layers=(0, 1))


def test_attached_model_refuses_to_be_copied(llama):
    with popmm.pruned(llama):
        for copier in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match=r"call popmm\.detach\(model\) before copying or pickling"):
                copier(llama)
    copy.deepcopy(llama)


def test_trace_of_two_batch_sizes_is_refused(llama):
    with popmm.pruned(llama, ffn_ratio=0.4) as state, state.trace() as trace:
        for batch in (1, 2):
            llama.generate(tiny.prompt(5, batch=batch), max_new_tokens=2)
        with pytest.raises(ValueError, match=r"batch sizes \[1, 2\]: trace one generate call at a time"):
            trace["model.layers.0.mlp"]


def test_simulated_decode_needs_a_prompt(llama):
    with popmm.pruned(llama) as state, pytest.raises(RuntimeError, match="run a prompt through the model first"):
        with state.simulated_decode():
            pass


def test_bytes_beside_bits_for_all_are_refused():
    with pytest.raises(ValueError, match=r"weight_bits=8 reads all channels alike, bytes=0.25.*give one of them"):
        popmm.PopConfig(bytes=0.25, weight_bits=8)
    config = popmm.PopConfig(bytes=0.25)
    assert (config.replace(weight_bits=6).bytes, config.replace(weight_bits=6).weight_bits) == (None, 6)
    assert popmm.PopConfig(weight_bits=8).replace(bytes=0.3).weight_bits is None
