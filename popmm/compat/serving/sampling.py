"""Sampling in continuous batching: of each request by its own settings, whatever the others in its pass ask for.

transformers takes one ``GenerationConfig`` for all. Here it says greedy, so that tokens are the argmax of what these
processors leave of the logits, and they add Gumbel noise to the rows of sampled requests: others have no part in it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)

SAMPLED = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
}  # each request has its own


def sample_by_request(processors: ContinuousBatchingLogitsProcessorList) -> None:
    """Has a manager that was not started yet process logits by each request's settings (``sampling``)."""
    own = [Temperature(), TopK(), TopP(), Noise()]
    processors.logits_processor = LogitsProcessorList(own)
    processors.tensors_required, processors.do_processing = len(own), True
    processors._retrieve_processors_kwargs()


def sampling(config: GenerationConfig) -> dict[str, Any]:
    """A request's own settings, as the processors below take them."""
    if not config.do_sample:
        return {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "noise": 0}
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    top_p = 1.0 if config.top_p is None else float(config.top_p)
    return {"temperature": temperature, "top_k": config.top_k or 0, "top_p": top_p, "noise": 1}


def _nobody(asked: Tensor) -> bool:
    """Whether no row asks for it: on a CPU, where looking costs nothing and sorting a vocabulary much."""
    return asked.device.type == "cpu" and not bool(asked.any())


class Temperature(ContinuousBatchingTemperatureLogitsWarper):
    def __init__(self) -> None:
        super().__init__(TemperatureLogitsWarper(1.0))


class TopK(ContinuousBatchingTopKLogitsWarper):
    """The best k; 0 = all."""

    def __init__(self) -> None:
        super().__init__(TopKLogitsWarper(1))
        self.top_k = self.min_tokens_to_keep = 0

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        k = tensor_arg[: scores.size(0)]
        if _nobody(k > 0):
            return scores
        return super().__call__(scores, torch.where(k > 0, k, scores.size(-1)))


class TopP(ContinuousBatchingTopPLogitsWarper):
    """The best whose probabilities sum to p."""

    def __init__(self) -> None:
        super().__init__(TopPLogitsWarper(1.0))

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        p = tensor_arg[: scores.size(0)].view(dtype=torch.float32)
        return scores if _nobody(p < 1) else super().__call__(scores, tensor_arg)


class Noise(ContinuousBatchingLogitsProcessor):
    """Gumbel noise for rows that are sampled: the argmax is then a sample of the softmax."""

    supported_kwargs: ClassVar = {"noise": int}
    ignored_kwargs: ClassVar = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token) -> Tensor:
        asked = [request.state.logit_processor_kwargs.get("noise", 0) for request in requests_with_new_token]
        return torch.tensor(asked, dtype=torch.int32, device="cpu")

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        asked = tensor_arg[: scores.size(0)] > 0
        if _nobody(asked):
            return scores
        noise = -torch.empty_like(scores).exponential_().log()
        return torch.where(asked.unsqueeze(-1), scores + noise, scores)
