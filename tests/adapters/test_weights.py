"""Which weights can be read as they lie, and what is said of those that cannot."""

import pytest
import tiny
import torch
from popmm.adapters import describe, why_not_readable
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from transformers.pytorch_utils import Conv1D


class QBytesTensor(torch.Tensor):
    """Stands for the packed tensors of quantisation libraries, which refuse most operations."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        allowed = ("detach", "requires_grad_", "__get__", "_make_subclass")
        if getattr(func, "__name__", "") not in allowed:
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def reason(model):
    """Why the first FFN is left out; the second must be a site."""
    for probe in (True, False):
        description = describe(model, probe=probe)
        assert [site.name for site in description.sites()] == ["model.layers.1.mlp"]
    return description.left_out["model.layers.0.mlp"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_plain_floating_weights_are_readable(dtype):
    assert why_not_readable(nn.Parameter(torch.ones(2, 2, dtype=dtype))) == ""


@pytest.mark.parametrize(
    "weight, message",
    [
        (
            torch.ones(2, 2).to(torch.float8_e4m3fn),
            "is stored as float8_e4m3fn: load the model with unquantised weights",
        ),
        (torch.ones(2, 2, dtype=torch.int32), "is stored as int32: load the model with unquantised weights"),
        (torch.ones(2, 2, device="meta"), "has no data (meta device): load the weights first"),
        (torch.ones(2, 2).to_sparse(), "is stored as torch.sparse_coo: convert it"),
        (torch.ones(2, 2).as_subclass(QBytesTensor), "is a QBytesTensor: load the model with unquantised weights"),
    ],
)
def test_other_weights_are_named_with_what_would_work(weight, message):
    assert why_not_readable(weight).startswith(message)
    assert why_not_readable(nn.Parameter(weight, requires_grad=False)).startswith(message)


def test_weights_spread_over_devices_are_named():
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)))
        assert why_not_readable(weight).startswith("is a DTensor: weights spread over devices")
    finally:
        distributed.destroy_process_group()


def test_flags_of_a_quantiser_say_nothing_about_plain_weights(llama):
    llama.is_quantized, llama.hf_quantizer = True, object()
    assert len(list(describe(llama).sites())) == 2


def test_eight_bit_floats_are_named(llama):
    linear = llama.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert "up_proj.weight is stored as float8_e4m3fn" in reason(llama)


def test_a_linear_layer_with_a_forward_of_its_own_is_named(llama):
    class QLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x.round())

    old = llama.model.layers[0].mlp.up_proj
    new = QLinear(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    llama.model.layers[0].mlp.up_proj = new
    assert "up_proj is a QLinear, which computes by a forward of its own" in reason(llama)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, weight_norm])
def test_weights_that_are_computed_anew_at_each_call_are_named(llama, normalise):
    normalise(llama.model.layers[0].mlp.up_proj)
    assert "up_proj computes its weight" in reason(llama)


def test_transposed_projections_are_read_as_they_lie(llama):
    mlp = llama.model.layers[0].mlp
    for name, linear in list(mlp.named_children()):
        if isinstance(linear, nn.Linear):
            setattr(mlp, name, Conv1D(linear.out_features, linear.in_features))
    site = next(describe(llama).sites())
    assert site.name == "model.layers.0.mlp" and torch.equal(site.weights().up, mlp.up_proj.weight.T)


def test_experts_of_eight_bit_floats_are_named():
    model = tiny.moe("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert (
        "MixtralExperts has experts that cannot be read: down_proj is stored as float8_e4m3fn"
        in describe(model).left_out["model.layers.0.mlp.experts"]
    )
