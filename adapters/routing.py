"""How modules that run stacked experts by themselves are called: which of their arguments say what goes where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn


class Routing(Protocol):
    """One way of calling experts."""

    all_experts: bool  # whether each token goes to every expert

    def read(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the module's arguments: tokens ``[n, d_model]``, their experts int64 ``[n, k]``, weights ``[n, k]``."""

    def give(self, y: Tensor, *args: Tensor) -> Tensor:
        """From the experts' outputs, summed for each token by weight, ``[n, d_model]``, to what the module returns."""

    def trial(self, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Arguments for a trial, of tokens ``[n, d_model]`` that go to these experts if the caller chooses them."""


class Given:
    """``module(x, experts, weights)``: the caller has routed the tokens.

    Numbers from ``n_experts`` on stand for experts that hand their input on (LongCat's zero-computation experts).
    """

    all_experts = False

    def __init__(self, n_experts: int, handing_on: int, ndim: int) -> None:
        self._n_experts, self._handing_on, self._ndim = n_experts, handing_on, ndim

    def read(self, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.ndim != self._ndim:
            raise RuntimeError(
                f"these experts were verified with x of {self._ndim} dimensions, and are given {x.shape}"
            )
        flat = x.reshape(-1, x.shape[-1])
        if not self._handing_on:
            return flat, index, weight
        real = index < self._n_experts
        return flat, torch.where(real, index, 0), torch.where(real, weight, 0)

    def give(self, y: Tensor, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        y = y.view(x.shape)
        if not self._handing_on:
            return y
        own = torch.where(index < self._n_experts, 0, weight).sum(-1).view(*x.shape[:-1], 1)
        return y + (x * own).to(x.dtype)

    def trial(self, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return x if self._ndim == 2 else x[None], index, weight


class RoutesItself:
    """``module(x)``, whose router gives its (token, choice) pairs in the order of their experts.

    Beside their order int64 ``[n * k]`` it returns their weights in that order and how many each expert has (JetMoE).
    """

    all_experts = False

    def __init__(self, router: nn.Module, bias: Callable[[], Tensor] | None) -> None:
        self._router, self._bias = router, bias

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        order, weights, counts = _sorted_pairs(self._router(flat))
        counts = torch.as_tensor(counts, dtype=torch.int64, device=order.device)
        experts = torch.arange(len(counts), dtype=torch.int64, device=order.device)
        experts = experts.repeat_interleave(counts, output_size=len(order))
        index, weight = torch.empty_like(order), torch.empty_like(weights)
        index[order], weight[order] = experts, weights
        return flat, index.view(len(flat), -1), weight.view(len(flat), -1)

    def give(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.view(x.shape)
        return y if self._bias is None else y + self._bias()

    def trial(self, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (x[None],)


def _sorted_pairs(found: tuple) -> tuple[Tensor, Tensor, list[int] | Tensor]:
    """Order, weights and counts among what such a router returns.

    Raises:
        TypeError: it returns something else.
    """
    vectors = [t for t in found if isinstance(t, Tensor) and t.ndim == 1]
    weights = next((t for t in vectors if t.is_floating_point()), None)
    pairs = -1 if weights is None else len(weights)
    whole = [t for t in vectors if not t.is_floating_point() and len(t) == pairs]
    # token numbers end earlier, unless each token has one expert only: then they are the order
    order = next((t for t in whole if int(t.max()) == pairs - 1), None)
    counts = next((c for c in found if isinstance(c, list) and sum(c) == pairs), None)
    if order is None or counts is None:
        raise TypeError("the router gives no order of its pairs with weights and counts")
    return order, weights, counts


class EachGetsAll:
    """``module(x)`` with all tokens once for each expert, ``[E * n, d_model]``, zeros where it is not chosen (Llama 4).

    For one expert a token: a row of zeros comes out as zeros.
    """

    all_experts = False

    def __init__(self, n_experts: int) -> None:
        self._n_experts = n_experts

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.view(self._n_experts, -1, x.shape[-1])
        index = rows.abs().amax(-1).argmax(0)[:, None]
        own = rows.gather(0, index.mT[..., None].expand(1, *rows.shape[1:]))[0]
        return own, index, torch.ones_like(own[:, :1])

    def give(self, y: Tensor, x: Tensor) -> Tensor:
        _, index, _ = self.read(x)
        rows = torch.zeros_like(x).view(self._n_experts, -1, x.shape[-1])
        return rows.scatter_(0, index.mT[..., None].expand(1, *y.shape), y[None]).view(x.shape)

    def trial(self, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        rows = x.new_zeros(self._n_experts, *x.shape)
        return (rows.scatter_(0, index[:, :1].mT[..., None].expand(1, *x.shape), x[None]).flatten(0, 1),)


class AllWeighted:
    """``module(x, weights)``: every token goes to all experts (Inkling's shared ones)."""

    all_experts = True

    def __init__(self, n_experts: int) -> None:
        self._n_experts = n_experts

    def read(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        every = torch.arange(self._n_experts, dtype=torch.int64, device=x.device)
        return flat, every.expand(len(flat), -1), weight.reshape(len(flat), self._n_experts)

    def give(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return y.view(x.shape)

    def trial(self, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        each = torch.arange(self._n_experts, dtype=x.dtype, device=x.device) + 1
        return x[None], weight[:, :1] * each
