"""``--quantization popmm``: linear layers of FFNs whose methods read popmm's tiers for decode tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from popmm.config import PopConfig
from popmm.engines.split import SplitFFN
from popmm.engines.vllm.experts import ExpertsMethod
from popmm.engines.vllm.passes import by_rows, rows_of_pass

logger = init_logger(__name__)
SETTINGS = ("bytes", "weight_bits", "together")
GATE_UP, DOWN = ("gate_up_proj",), ("down_proj", "w2")  # names of an FFN's layers in vLLM's models
PLAIN_SHARE = 0.5  # with weight_bits, which reads its own share: any below 1


@register_quantization_config("popmm")
class PopmmConfig(QuantizationConfig):
    """Settings of a model, and which of its layers get which method.

    Args:
        settings: ``bytes``, ``weight_bits``, as of ``popmm.PopConfig``; ``together``: decode tokens of a pass choose
            together (default), or each for itself.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise ValueError(f"quantization popmm does not know {', '.join(unknown)}: give {', '.join(SETTINGS)}")
        together = settings.pop("together", True)
        if not isinstance(together, bool):
            raise ValueError(f"together={together!r}: give true or false")
        config = PopConfig(statistics="weights", selection="tiers" if settings else None, **settings)
        if config.ffn_ratio is None and config.weight_bits is None:
            raise ValueError("quantization popmm: give bytes (0.33, say) or weight_bits")
        self.weight_bits, self.together = config.weight_bits, together
        self.share = PLAIN_SHARE if config.ffn_ratio is None else 1 - config.ffn_ratio
        self.ffns: dict[str, SplitFFN] = {}

    def __repr__(self) -> str:
        return f"PopmmConfig(share={self.share:.3f}, weight_bits={self.weight_bits}, together={self.together})"

    @classmethod
    def get_name(cls) -> str:
        return "popmm"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PopmmConfig:
        return cls(**{name: value for name, value in config.items() if name != "quant_method"})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts) and self.share < 1:
            return ExpertsMethod(layer, prefix, self.share, self.weight_bits)
        if not isinstance(layer, LinearBase):
            return None
        parent, _, name = prefix.rpartition(".")
        if self.share < 1:
            if name in GATE_UP and isinstance(layer, MergedColumnParallelLinear):
                return GateUpMethod(self._ffn(parent), prefix)
            if name in DOWN and isinstance(layer, RowParallelLinear):
                return DownMethod(self._ffn(parent), prefix)
        return UnquantizedLinearMethod()

    def _ffn(self, name: str) -> SplitFFN:
        return self.ffns.setdefault(name, SplitFFN(name, self.share, self.weight_bits, self.together))


class HalfMethod(LinearMethodBase):
    """One of the two linear layers of an FFN. The weights as they came serve prompts, by vLLM's own method."""

    def __init__(self, ffn: SplitFFN, prefix: str) -> None:
        self.ffn, self.prefix, self.plain = ffn, prefix, UnquantizedLinearMethod()
        # by this name compiled code finds the layer, as it does vLLM's attention
        self.key = f"popmm.{prefix}"
        self.layers = get_current_vllm_config().compilation_config.static_forward_context

    def create_weights(self, layer: nn.Module, *sizes: Any, **how: Any) -> None:
        self.plain.create_weights(layer, *sizes, **how)
        self.layers[self.key] = layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.hold(layer)
        self.plain.process_weights_after_loading(layer)

    def hold(self, layer: nn.Module) -> None:
        """Gives the FFN the weights of this half."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.popmm.engine_linear(x, bias, self.key, sum(layer.output_partition_sizes))
        return self.run(layer, x, bias)

    def run(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer, each row as what it is."""
        ffn, rows = self.ffn, rows_of_pass()

        def dense(own: Tensor) -> Tensor:
            return self.plain.apply(layer, own, bias)

        if rows is None or not ffn.ready or x.ndim != 2:
            return self.observed(x, dense)
        return by_rows(x, rows, lambda own: self.pruned(own, bias), dense)

    def observed(self, x: Tensor, dense) -> Tensor:
        return dense(x)


@register_weight_loader_v2_supported_method
class GateUpMethod(HalfMethod):
    """Chooses each decode token's channels; the projections of the others are zero."""

    def hold(self, layer: nn.Module) -> None:
        self.ffn.hold_gate_up(layer.weight, getattr(layer, "bias", None))

    def observed(self, x: Tensor, dense) -> Tensor:
        y = dense(x)
        if not self.ffn.settled and y.ndim == 2:
            self.ffn.saw(y)
        return y

    def pruned(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.ffn.gate_up(x)


@register_weight_loader_v2_supported_method
class DownMethod(HalfMethod):
    """Reads the down columns of the channels that were chosen."""

    def hold(self, layer: nn.Module) -> None:
        self.ffn.hold_down(layer.weight)

    def observed(self, x: Tensor, dense) -> Tensor:
        if not self.ffn.settled and x.ndim == 2:
            self.ffn.tell(x)
            if self.ffn.left_dense:
                logger.warning("popmm: %s stays dense: %s", self.ffn.name, self.ffn.left_dense)
        return dense(x)

    def pruned(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = self.ffn.down(x)
        return y if bias is None else y + bias.to(y.dtype)


@torch.library.custom_op("popmm::engine_linear", mutates_args=())
def engine_linear(x: Tensor, bias: Tensor | None, key: str, n_rows: int) -> Tensor:
    """What ``torch.compile`` sees of a layer."""
    layer = get_forward_context().no_compile_layers[key]
    return layer.quant_method.run(layer, x, bias)


@engine_linear.register_fake
def _(x: Tensor, bias: Tensor | None, key: str, n_rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n_rows)
