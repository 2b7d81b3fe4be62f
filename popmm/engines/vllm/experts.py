"""Fused experts under vLLM: decode tokens through popmm's tiers, prompts through vLLM's own kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from popmm.engines.split import laid_out, sizes_of
from popmm.engines.vllm.passes import by_rows, check, rows_of_pass
from popmm.layouts.tiers import TiersLayout
from popmm.method.activations import ACTIVATIONS, activate
from popmm.method.expert_linear import mixed
from popmm.method.ffn import FFNWeights

logger = init_logger(__name__)


class ExpertsMethod(UnquantizedFusedMoEMethod):
    """The experts of one layer; each token chooses its own channels of each of its experts.

    Args:
        share, weight_bits: as of ``SplitFFN``.
    """

    def __init__(self, layer: RoutedExperts, prefix: str, share: float, weight_bits: int | None) -> None:
        super().__init__(layer.moe_config)
        self.prefix, self.share, self.weight_bits = prefix, share, weight_bits
        self.layout: TiersLayout | None = None
        self.key = f"popmm.{prefix}"  # by which compiled code finds the layer
        vllm_config = get_current_vllm_config()
        check(vllm_config)
        self.layers = vllm_config.compilation_config.static_forward_context

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        return False  # vLLM's kernel, which would call them, does not run for decode tokens

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        reason = self._why_dense(layer)
        if reason:
            logger.warning("popmm: the experts of %s stay dense: %s", self.prefix, reason)
        else:
            gate, up = (half.contiguous() for half in layer.w13_weight.detach().chunk(2, dim=1))
            source = FFNWeights(gate, up, layer.w2_weight.detach())
            sizes = sizes_of(self.prefix, source.d_ff, source.d_model, self.share, self.weight_bits)
            self._combine = partial(activate, ACTIVATIONS[layer.activation.value])
            self.layout = laid_out(self.prefix, sizes, {}, source, self._combine)
        super().process_weights_after_loading(layer)

    def _why_dense(self, layer: RoutedExperts) -> str:
        parallel = self.moe.moe_parallel_config
        if layer.activation.value not in ACTIVATIONS:
            return f"their activation {layer.activation.value} is none of {', '.join(ACTIVATIONS)}"
        if self.moe.has_bias:
            return "their projections have biases"
        if layer.apply_router_weight_on_input:
            return "the router's weight is applied to their input"
        if self.is_monolithic:
            return "the kernel that vLLM has chosen routes tokens itself (apply_monolithic)"
        if parallel.use_ep or parallel.dp_size > 1:
            return "expert and data parallelism are left to vLLM's kernels"
        return ""

    def create_weights(self, layer: RoutedExperts, *sizes: Any, **how: Any) -> None:
        super().create_weights(layer, *sizes, **how)
        self.layers[self.key] = layer

    def apply(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **named: Any
    ) -> Tensor:
        """Shared experts are called by vLLM's runner, see ``mk_can_overlap_shared_experts``."""
        if torch.compiler.is_compiling():  # on the CPU vLLM has no operator of its own around experts
            return torch.ops.popmm.engine_experts(x, topk_weights, topk_ids, self.key)
        return self.run(layer, x, topk_weights, topk_ids)

    def run(self, layer: RoutedExperts, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        """Tokens x ``[n, d_model]`` through the experts ``index`` with ``weight``, ``[n, k]`` each."""

        def dense(own: Tensor, weight: Tensor, index: Tensor) -> Tensor:
            return super(ExpertsMethod, self).apply(layer, own, weight, index, None, None)

        rows = None if self.layout is None else rows_of_pass()
        return dense(x, weight, index) if rows is None else by_rows(x, rows, self._pruned, dense, weight, index)

    def _pruned(self, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        layout, experts = self.layout, index.flatten().long()
        pairs = x.repeat_interleave(index.shape[1], dim=0)
        y = layout.step(pairs, self._combine, experts)
        if y is None:
            y = layout.decode(pairs, self._combine, experts)[0]
        return mixed(y, weight, x)


@torch.library.custom_op("popmm::engine_experts", mutates_args=())
def engine_experts(x: Tensor, weight: Tensor, index: Tensor, key: str) -> Tensor:
    """What ``torch.compile`` sees of a layer's experts."""
    layer = get_forward_context().no_compile_layers[key]
    return layer.quant_method.run(layer, x, weight, index)


@engine_experts.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor, key: str) -> Tensor:
    return torch.empty_like(x)
