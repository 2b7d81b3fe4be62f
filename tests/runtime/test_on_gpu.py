"""What only a GPU can show: the same checks as on the CPU, on CUDA, and CUDA graphs that are not recorded again."""

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

import popmm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODELS = {"llama": tiny.dense, "phi3": tiny.dense, "mixtral": tiny.moe, "qwen2-moe": tiny.moe, "gpt-oss": tiny.moe}
CONFIG = popmm.PopConfig(ffn_ratio=0.4, candidate_fraction=0.2)


@pytest.mark.parametrize("selection", ["mask", "keep", "gate"])
@pytest.mark.parametrize("name", MODELS)
def test_partitions_and_logits_equal_those_of_the_cpu(name, selection):
    model = MODELS[name](name)
    ids, continuation = tiny.prompt(20), tiny.prompt(3, seed=1)[0]

    @torch.no_grad()
    def run(device):
        with popmm.pruned(model.to(device), CONFIG.replace(selection=selection)) as state:
            cache = model(ids.to(device)).past_key_values
            steps = [model(t.view(1, 1).to(device), past_key_values=cache).logits[0, -1].cpu() for t in continuation]
            return torch.stack(steps), {k: p.retained.cpu() for k, p in state.layers.items()}

    (expected, partitions), (found, theirs) = run("cpu"), run("cuda")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(partitions[k].sort(-1)[0], theirs[k].sort(-1)[0]) for k in partitions)


@pytest.mark.parametrize("selection", ["mask", "keep", "gate"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_exact_after_detach(name, selection):
    model = MODELS[name](name).cuda()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with popmm.pruned(model, CONFIG.replace(selection=selection)) as state:
        assert "layout=permute" in state.summary()
        for seed in range(10):
            model.generate(tiny.prompt(9, seed=seed).cuda(), max_new_tokens=3, do_sample=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_compiled_decode_records_once(name):
    model = MODELS[name](name).cuda()
    torch._dynamo.reset()
    graphs = []
    with popmm.pruned(model, CONFIG):
        for n in range(5, 15):
            ids = tiny.prompt(n, seed=n).cuda()
            how = dict(max_new_tokens=6, do_sample=False, cache_implementation="static")
            eager = model.generate(ids, **how, disable_compile=True)
            assert torch.equal(model.generate(ids, **how), eager)
            graphs.append(
                (counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_recorded_non_static_inputs"])
            )
    assert graphs[2:] == [graphs[2]] * 8
