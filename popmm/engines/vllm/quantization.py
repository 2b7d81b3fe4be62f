"""``--quantization popmm``: linear layers of FFNs whose methods read popmm's tiers for decode tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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
from popmm.engines.vllm.passes import by_rows, check, rows_of_pass

logger = init_logger(__name__)
SETTINGS = ("bytes", "weight_bits", "weights", "together")
GATE_UP, DOWN = ("gate_up_proj",), ("down_proj", "w2")  # names of an FFN's layers in vLLM's models
SHARED = "shared_expert"  # in the names of experts that see every token, which stay dense as in transformers
PLAIN_SHARE = 0.5  # with weight_bits, which reads its own share: any below 1


@register_quantization_config("popmm")
class PopmmConfig(QuantizationConfig):
    """Settings of a model, and which of its layers get which method.

    Args:
        settings: ``bytes``, ``weight_bits``, ``weights``, as of ``popmm.PopConfig``; ``together``: decode tokens of a
            pass choose together (default), or each for itself.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise ValueError(f"quantization popmm does not know {', '.join(unknown)}: give {', '.join(SETTINGS)}")
        together = settings.pop("together", True)
        if not isinstance(together, bool):
            raise ValueError(f"together={together!r}: give true or false")
        config = PopConfig(statistics="weights", **settings)
        self.weight_bits, self.together, self.weights = config.weight_bits, together, config.weights
        self.share = PLAIN_SHARE if config.ffn_ratio is None else 1 - config.ffn_ratio
        self.share_together = self.share + config.more_together
        self.ffns: dict[str, SplitFFN] = {}

    def __repr__(self) -> str:
        how = f"weight_bits={self.weight_bits}, weights={self.weights!r}, together={self.together}"
        return f"PopmmConfig(share={self.share:.3f}, {how})"

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
            if self.weights == "replace":
                logger.warning_once("popmm: weights='replace' frees no experts, whose prompts need them")
            return ExpertsMethod(layer, prefix, self.share, self.weight_bits)
        if not isinstance(layer, LinearBase):
            return None
        parent, _, name = prefix.rpartition(".")
        if self.share < 1 and SHARED not in prefix:
            if name in GATE_UP and isinstance(layer, MergedColumnParallelLinear):
                return GateUpMethod(self._ffn(parent), prefix)
            if name in DOWN and isinstance(layer, RowParallelLinear):
                return DownMethod(self._ffn(parent), prefix)
        return UnquantizedLinearMethod()

    def _ffn(self, name: str) -> SplitFFN:
        if name not in self.ffns:
            how = self.share, self.weight_bits, self.together, self.share_together, self.weights == "replace"
            self.ffns[name] = SplitFFN(name, *how)
        return self.ffns[name]


class HalfMethod(LinearMethodBase):
    """One of the two linear layers of an FFN. The weights as they came serve prompts, by vLLM's own method."""

    part: str  # as SplitFFN calls it

    def __init__(self, ffn: SplitFFN, prefix: str) -> None:
        vllm_config = get_current_vllm_config()
        check(vllm_config)
        self.ffn, self.plain = ffn, UnquantizedLinearMethod()
        # by this name compiled code finds the layer, as it does vLLM's attention
        self.key = f"popmm.{prefix}"
        self.layers = vllm_config.compilation_config.static_forward_context

    def create_weights(self, layer: nn.Module, *sizes: Any, **how: Any) -> None:
        self.plain.create_weights(layer, *sizes, **how)
        self.layers[self.key] = layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.ffn.hold(self.part, layer.weight, getattr(layer, "bias", None))
        if self.ffn.replaces:
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        else:
            self.plain.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.popmm.engine_linear(x, bias, self.key, sum(layer.output_partition_sizes))
        return self.run(layer, x, bias)

    def run(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer, each row as what it is."""
        ffn, rows = self.ffn, rows_of_pass()
        if ffn.layout is None and not ffn.left_dense:
            self._leave_dense(layer, "only one of its two linear layers was found")

        def dense(own: Tensor) -> Tensor:
            if ffn.replaces and ffn.layout is not None:
                return F.linear(own, ffn.all_of(self.part, own.dtype), bias)
            return self.plain.apply(layer, own, bias)

        if rows is not None and ffn.ready and x.ndim == 2:
            return by_rows(x, rows, lambda own: self.pruned(own, bias), dense)
        if ffn.settled or x.ndim != 2:
            return dense(x)
        return self.observed(x, dense)

    def _leave_dense(self, layer: nn.Module, reason: str) -> None:
        self.ffn.left_dense = reason
        logger.warning("popmm: %s stays dense: %s", self.ffn.name, reason)
        if self.ffn.replaces:
            layer.weight = nn.Parameter(self.ffn.held.pop(self.part)[0], requires_grad=False)
            self.plain.process_weights_after_loading(layer)

    def observed(self, x: Tensor, dense: Callable[[Tensor], Tensor]) -> Tensor:
        """A dense pass that tells the activation."""
        raise NotImplementedError

    def pruned(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Decode tokens."""
        raise NotImplementedError


@register_weight_loader_v2_supported_method
class GateUpMethod(HalfMethod):
    """Chooses each decode token's channels; the projections of the others are zero."""

    part = "gate_up"

    def observed(self, x: Tensor, dense: Callable[[Tensor], Tensor]) -> Tensor:
        y = dense(x)
        self.ffn.saw(y)
        return y

    def pruned(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.ffn.gate_up(x)


@register_weight_loader_v2_supported_method
class DownMethod(HalfMethod):
    """Reads the down columns of the channels that were chosen."""

    part = "down"

    def observed(self, x: Tensor, dense: Callable[[Tensor], Tensor]) -> Tensor:
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
