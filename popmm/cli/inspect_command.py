"""``popmm inspect``: a prompt's partition and what decode steps chose, as a table, a picture and JSON."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from popmm.cli.arguments import (
    DEMO_PROMPT,
    PICTURE_PROMPT,
    SECOND_PROMPT,
    check_pictures,
    config_from,
    generation_settings,
    prompt_from,
)
from popmm.cli.commands import load_from
from popmm.cli.terminal import print_json
from popmm.config import PopConfig
from popmm.evaluation.progress import for_people


def run(args: argparse.Namespace) -> None:
    """Checks the arguments and runs what they ask for."""
    # regions of channels are what there is to see
    config, settings, prompt = config_from(args).without_default(), generation_settings(args), prompt_from(args)
    check_pictures(args.out)
    if args.image:
        return _pictures(args, config, settings, prompt)
    from popmm.zoo.encoding import check_length, encode

    model, processor = load_from(args)
    inputs = encode(processor, prompt, model.device, args.chat)
    check_length(model, inputs["input_ids"].shape[1], settings["max_new_tokens"])
    if args.dynamics:
        return _dynamics(args, model, inputs)
    second = encode(processor, args.second_prompt or SECOND_PROMPT, model.device, args.chat)
    _partition(args, model, inputs, second, config, settings)


def _traced(args: argparse.Namespace, model, state, inputs: dict, settings: dict):
    """(partitions, rates, trace) of a prompt and the tokens decoded after it."""
    import torch

    from popmm.cli.channels import chosen_rates

    torch.manual_seed(args.seed)
    with for_people().status("generating"), state.trace() as trace:
        model.generate(**inputs, **settings)
    if not any(mask.shape[0] for mask in trace.values()):
        raise ValueError(
            "nothing was decoded after the prompt, so no choice can be shown: give --max-new-tokens 2 or more, and to "
            "an instruction-tuned model its chat template (leave --no-chat out)"
        )
    layers = dict(state.layers)
    return layers, chosen_rates(layers, trace), trace


def _partition(args: argparse.Namespace, model, inputs: dict, second: dict, config: PopConfig, settings: dict) -> None:
    from popmm.attach import pruned
    from popmm.cli.channels import is_of_experts
    from popmm.cli.plots import channels_figure, experts_figure, save

    files = []
    with pruned(model, config) as state:
        layers, rates, trace = _traced(args, model, state, inputs, settings)
        _say(args, state.summary())
        about = _about(args, state, layers, rates)
        of_experts = [is_of_experts(partition) for partition in layers.values()]
        if not all(of_experts):
            steps = max(mask.shape[0] for mask in trace.values())
            file = args.out.with_stem(f"{args.out.stem}-dense") if any(of_experts) else args.out
            save(channels_figure(layers, rates, steps, state.channels_skipped()), file)
            files.append(file)
        if args.second_prompt and not any(of_experts):
            for_people().print("--second-prompt compares experts' choices, and this model has none: left out")
        if any(of_experts):
            others, other_rates, _ = _traced(args, model, state, second, settings)
            save(experts_figure(layers, others, rates, other_rates, trace), args.out)
            files.insert(0, args.out)
    _finish(args, about, files)


def _pictures(args: argparse.Namespace, config: PopConfig, settings: dict, prompt: str) -> None:
    from popmm.attach import pruned
    from popmm.cli.images import open_image
    from popmm.cli.plots import modalities_figure, save
    from popmm.evaluation.baselines import rank_by_modality
    from popmm.zoo.encoding import chat_inputs, check_length

    pictures = [open_image(source)[0] for source in args.image]
    model, processor = load_from(args)
    prompt = PICTURE_PROMPT if prompt == DEMO_PROMPT else prompt
    parts = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": prompt}]
    inputs = chat_inputs(processor, [{"role": "user", "content": parts}], model.device)
    check_length(model, inputs["input_ids"].shape[1], settings["max_new_tokens"])
    with pruned(model, config) as state:
        both, rates, _ = _traced(args, model, state, inputs, settings)
        _say(args, state.summary())
        about = _about(args, state, both, rates)
        layers = {"both": both}
        for name in ("text", "image"):
            rank_by_modality(state, name)
            state.repartition()
            layers[name] = dict(state.layers)
        _add_modalities(about, layers, rates)
        save(modalities_figure(layers, rates), args.out)
    _finish(args, about, [args.out])


def _dynamics(args: argparse.Namespace, model, inputs: dict) -> None:
    from popmm.evaluation.dynamics import record
    from popmm.evaluation.quality_plots import dynamics_figure

    with for_people().status("decoding"):
        layers = record(model, inputs, args.max_new_tokens)
    about = {"model": args.model, "layers": {}}
    for name, dynamics in layers.items():
        mean, least = dynamics.overlap.mean().item(), dynamics.overlap.min().item()
        about["layers"][name] = {"top_half_in_prompts": mean, "least": least}
        _say(args, f"{name}: {mean:.1%} of a step's top half is in the prompt's, {least:.1%} at least")
    dynamics_figure(layers, args.out)
    _finish(args, about, [args.out])


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text)


def _finish(args: argparse.Namespace, about: dict, files: list) -> None:
    if args.json:
        return print_json({**about, "pictures": [str(file) for file in files]})
    for file in files:
        for_people().print(f"picture: {file}", soft_wrap=True, markup=False)


def _about(args: argparse.Namespace, state, layers: Mapping, rates: Mapping) -> dict:
    """What the table and the picture tell, as plain data."""
    from popmm.cli.channels import is_of_experts, usage

    read, dense = state.bytes_per_token()
    found = {}
    for name, partition in layers.items():
        sizes, shares = partition.sizes, usage(rates[name])
        found[name] = {
            "d_ff": sizes.d_ff,
            "retained": sizes.retained,
            "candidate": sizes.candidate,
            "pruned": sizes.pruned,
            "budget": sizes.budget,
            "prompt_tokens": {kind: tokens.tolist() for kind, tokens in partition.tokens_by_modality.items()},
            "chosen_always_at_times_never": shares.tolist(),
        }
        if is_of_experts(partition):
            found[name]["experts"] = len(partition.importance)
    return {
        "model": args.model,
        "selection": state.config.selection,
        "ffn_bytes_per_token": read,
        "dense_ffn_bytes_per_token": dense,
        "channels_skipped": state.channels_skipped(),
        "passes": dict(state.passes),
        "layers": found,
    }


def _add_modalities(about: dict, layers: Mapping, rates: Mapping) -> None:
    from popmm.cli.channels import MODALITY_GROUPS, MODALITY_PAIRS, modality_overlaps, modality_rates

    pairs = [f"{a} and {b}" for a, b in MODALITY_PAIRS]
    for name, shared, chosen in zip(layers["both"], modality_overlaps(layers), modality_rates(layers, rates)):
        about["layers"][name]["most_important_in_common"] = dict(zip(pairs, shared.tolist()))
        about["layers"][name]["chosen_rate_of_most_important_to"] = dict(zip(MODALITY_GROUPS, chosen.tolist()))
