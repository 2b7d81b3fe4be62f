"""POP on a whole model by plain means: hooks on the model's own layers and popmm.method.reference's loops.

Shares no code with the library. A prompt is read densely; each later token goes through FFNs that
compute all channels and multiply by a mask.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

from popmm.method import reference


def mlps(model):
    """The FFN modules of a causal language model, or of its stack of layers."""
    return [layer.mlp for layer in getattr(model, "model", model).layers]


def weights(mlp):
    """(gate, up, down, activation) of an FFN module; fused projections hold the gate first."""
    down = mlp.down_proj.weight
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj.weight.chunk(2)
        return gate, up, down, mlp.activation_fn
    return mlp.gate_proj.weight, mlp.up_proj.weight, down, mlp.act_fn


@contextmanager
def pre_hooks(hooks):
    """Forward pre-hooks, (module, hook) pairs, for the length of a ``with`` block."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured(model):
    """Yields a list that receives h ``[batch, n_tokens, d_ff]`` of each FFN, layer by layer."""
    seen = [None] * len(mlps(model))

    def keep(index):
        def hook(module, args):
            seen[index] = args[0].detach().clone()

        return hook

    with pre_hooks((mlp.down_proj, keep(i)) for i, mlp in enumerate(mlps(model))):
        yield seen


@torch.no_grad()
def prompt_partitions(model, prompts, budget, candidate_fraction=0.1, importance="wanda"):
    """Partition of each layer from unpadded prompts (list of ``[n_tokens]``), statistics pooled."""
    pooled = [[] for _ in mlps(model)]
    for ids in prompts:
        with captured(model) as seen:
            model(ids[None])
        for rows, h in zip(pooled, seen):
            rows.append(h[0])
    result = []
    for mlp, rows in zip(mlps(model), pooled):
        scores = reference.prompt_importance(importance, torch.cat(rows), mlp.down_proj.weight)
        result.append(reference.partition(scores, budget, candidate_fraction))
    return result


@contextmanager
def masked(model, partitions, budget, importance="wanda", keep=False):
    """The model with every FFN run by the reference, one mask per token."""

    def make(mlp, regions):
        gate, up, down, act = weights(mlp)
        retained, candidate, _ = regions

        def mask_of(h):
            if keep:
                mask = torch.zeros(h.numel(), dtype=torch.bool)
                mask[retained + candidate] = True
                return mask
            return reference.decode_mask(h, down, retained, candidate, budget, importance)

        def forward(x):
            return reference.pruned_ffn(x.flatten(0, -2), gate, up, down, act, mask_of).view(x.shape)

        return forward

    for mlp, regions in zip(mlps(model), partitions):
        mlp.forward = make(mlp, regions)
    try:
        yield
    finally:
        for mlp in mlps(model):
            del mlp.forward


@torch.no_grad()
def decode_logits(model, prompt, continuation, partitions, budget, **how):
    """Logits ``[n_tokens, vocab]`` of teacher-forced steps over ``continuation`` after a dense prompt."""
    cache = model(prompt[None], use_cache=True).past_key_values
    rows = []
    with masked(model, partitions, budget, **how):
        for token in continuation:
            rows.append(model(token.view(1, 1), past_key_values=cache).logits[0, -1])
    return torch.stack(rows)


@torch.no_grad()
def steps(model, prompt, continuation):
    """The same teacher-forced steps through the model as it is."""
    cache = model(prompt[None], use_cache=True).past_key_values
    return torch.stack([model(token.view(1, 1), past_key_values=cache).logits[0, -1] for token in continuation])


def channels(partition):
    """(R, C, P) of an FFNPartition as lists."""
    return tuple(getattr(partition, name).tolist() for name in ("retained", "candidate", "pruned"))
