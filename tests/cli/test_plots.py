"""What the figures of ``popmm inspect`` show: their arrays against computations by hand, and what is drawn of them."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import popmm
from popmm import zoo
from popmm.cli import channels, main, plots
from popmm.cli.images import open_image
from popmm.evaluation.baselines import rank_by_modality
from popmm.method.budget import RegionSizes
from popmm.method.partition import split
from popmm.zoo.encoding import chat_inputs

SETTINGS = dict(do_sample=False, max_new_tokens=12, min_new_tokens=12)


def partition(importance, retained, candidate, budget):
    importance = torch.tensor(importance)
    sizes = RegionSizes(importance.shape[-1], budget, retained, candidate)
    return split(importance, sizes, {"text": torch.ones(importance.shape[:-1], dtype=torch.int64)})


def traced(model, inputs, **config):
    with popmm.pruned(model, **config) as state:
        with state.trace() as trace:
            model.generate(**inputs, **SETTINGS)
        layers = dict(state.layers)
        return layers, trace, state.channels_skipped()


def text_inputs(seed=0, n=12):
    ids = tiny.prompt(n, seed=seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pictures_of(figure):
    """Arrays of all heat maps of a figure, by axes title."""
    return {axis.get_title(): [image.get_array() for image in axis.images] for axis in figure.axes if axis.images}


# arrays ---------------------------------------------------------------------------------------------------------------


def test_rates_are_shares_of_the_tokens_that_chose_a_channel():
    masks = torch.zeros(4, 1, 3, dtype=torch.bool)
    masks[:, 0, 0], masks[:2, 0, 1] = True, True
    rates = channels.chosen_rates({"a": partition([3.0, 2.0, 1.0], 1, 1, 2)}, {"a": masks})["a"]
    assert rates.tolist() == [1.0, 0.5, 0.0]
    assert channels.usage(rates).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_rates_of_an_expert_are_of_the_tokens_sent_to_it():
    masks = torch.zeros(4, 1, 3, 2, dtype=torch.bool)
    masks[:, 0, 0] = torch.tensor([True, False])  # every token, channel 0
    masks[1, 0, 1] = torch.tensor([True, True])  # one token, both channels; expert 2 gets none
    layers = {"a": partition([[2.0, 1.0]] * 3, 0, 2, 1)}
    rates = channels.chosen_rates(layers, {"a": masks})["a"]
    assert rates[0].tolist() == [1.0, 0.0] and rates[1].tolist() == [1.0, 1.0] and rates[2].isnan().all()
    assert channels.routed_rates(layers, {"a": masks})["a"].tolist() == [1.0, 0.25, 0.0]
    assert channels.usage(rates)[2].isnan().all()


def test_rates_without_a_decode_step_are_unknown(llama):
    layers = {"a": partition([3.0, 2.0, 1.0], 0, 3, 2)}
    rates = channels.chosen_rates(layers, {"a": torch.zeros(0, 0, 3, dtype=torch.bool)})
    assert rates["a"].isnan().all()
    assert np.isnan(channels.grid([rates["a"]])).all()


def test_reading_order_is_retained_candidates_pruned():
    p = partition([1.0, 9.0, 5.0, 7.0], 1, 2, 2)
    assert channels.in_reading_order(p, torch.tensor([0.1, 0.9, 0.5, 0.7])).tolist() == pytest.approx(
        [0.9, 0.7, 0.5, 0.1]
    )


def test_heat_maps_average_where_channels_outnumber_cells(monkeypatch):
    assert channels.grid([torch.tensor([1.0, 0.5, 0.0])]).tolist() == [[1.0, 0.5, 0.0]]
    assert channels.grid([torch.arange(4.0), torch.tensor([1.0, 3.0])]).tolist() == [[0, 1, 2, 3], [1, 1, 3, 3]]
    monkeypatch.setattr(channels, "COLUMNS", 2)
    assert channels.grid([torch.tensor([1.0, 0.0, 0.5, 0.25])]).tolist() == [[0.5, 0.375]]
    np.testing.assert_allclose(channels.grid([torch.tensor([1.0, 4.0, 7.0])]), [[2.0, 6.0]])


def test_common_choice_is_one_for_the_same_channels_and_chance_for_random_ones():
    fixed = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert channels.common_choice(fixed, fixed) == 1
    assert channels.common_choice(fixed, 1 - fixed) == 0
    assert channels.common_choice(torch.full((8,), 0.75), torch.full((8,), 0.75)) == 0.75


def test_common_choice_is_the_mean_over_pairs_of_steps():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(5, 20, generator=generator).topk(8)[1] for _ in range(2))
    pairs = [len(set(x.tolist()) & set(y.tolist())) / 8 for x in a for y in b]
    rates = [torch.zeros(5, 20).scatter_(1, steps, 1.0).mean(0) for steps in (a, b)]
    assert channels.common_choice(*rates).item() == pytest.approx(sum(pairs) / len(pairs))


def test_experts_are_compared_by_what_is_retained_or_else_chosen():
    first = {"a": partition([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [4.0, 2.0, 3.0, 1.0]], 2, 0, 2)}
    second = {"a": partition([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]], 2, 0, 2)}
    unused = {"a": torch.full((3, 4), torch.nan)}
    between, prompts = channels.expert_grids(first, second, unused, unused)
    np.testing.assert_allclose(between, [[0.25, 0.25, 0.5]])  # experts retain 01, 23, 02
    np.testing.assert_allclose(prompts, [[1.0, 0.0, 0.5]])
    gate = {"a": partition(first["a"].importance.tolist(), 0, 4, 2)}
    rates = {"a": torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [torch.nan] * 4])}
    between, prompts = channels.expert_grids(gate, gate, rates, rates)
    np.testing.assert_allclose(between, [[0.0, 0.0, np.nan]])
    np.testing.assert_allclose(prompts, [[1.0, 1.0, np.nan]])


def modalities(retained, candidate, budget):
    ranked = {"text": [4.0, 3.0, 2.0, 1.0], "image": [4.0, 2.0, 3.0, 1.0], "both": [4.0, 3.0, 2.0, 1.0]}
    return {kind: {"a": partition(scores, retained, candidate, budget)} for kind, scores in ranked.items()}


@pytest.mark.parametrize("sizes", [(0, 4, 2), (2, 1, 3), (0, 4, 4)])  # gate; mask; gate that skips nothing
def test_modalities_are_compared_by_their_most_important_channels(sizes):
    layers = modalities(*sizes)
    assert channels.compared_channels(layers["both"]["a"]) == 2
    np.testing.assert_allclose(channels.modality_overlaps(layers), [[0.5, 0.5, 1.0]])
    rates = {"a": torch.tensor([1.0, 0.75, 0.5, 0.0])}  # matter to both, to text, to images, to neither
    np.testing.assert_allclose(channels.modality_rates(layers, rates), [[1.0, 0.5, 0.75, 0.0]])


# figures --------------------------------------------------------------------------------------------------------------


def test_the_gate_figure_shows_how_often_each_channel_was_chosen(llama):
    layers, trace, skipped = traced(llama, text_inputs(), ffn_ratio=0.5)
    figure = plots.channels_figure(layers, channels.chosen_rates(layers, trace), 11, skipped)
    heat, bars = figure.axes[:2]
    drawn = heat.images[0].get_array()
    for line, (name, mask) in zip(drawn, trace.items()):
        by_hand = sorted((mask[:, 0, i].float().mean().item() for i in range(80)), reverse=True)
        np.testing.assert_allclose(line, by_hand, atol=1e-6)
        assert line.mean() == pytest.approx(layers[name].budget / 80, abs=1e-6)
        assert line.min() > 0 or line.max() > line.min()  # not one colour
    assert [label.get_text() for label in heat.get_yticklabels()] == [f"{i}.mlp" for i in range(len(layers))]
    budgets = heat.lines[0].get_xdata()
    assert list(budgets) == [p.budget - 0.5 for p in layers.values()]
    widths = [[bar.get_width() for bar in container] for container in bars.containers]
    np.testing.assert_allclose(np.sum(widths, 0), 1, atol=1e-6)
    assert [text.get_text() for text in bars.get_legend().get_texts()] == ["always", "at times", "never"]
    assert "11 decode steps" in figure.get_suptitle() and f"{skipped:.1%}" in figure.get_suptitle()
    assert any("share of decoded tokens" in axis.get_ylabel() for axis in figure.axes)  # the colour bar


@pytest.mark.parametrize("selection", ["mask", "keep"])
def test_the_regions_figure_shows_regions_and_how_often_candidates_passed(llama, selection):
    how = dict(ffn_ratio=0.5, selection=selection, candidate_fraction=0.3)
    layers, trace, skipped = traced(llama, text_inputs(), **how)
    figure = plots.channels_figure(layers, channels.chosen_rates(layers, trace), 11, skipped)
    regions, rates = (image.get_array() for image in figure.axes[0].images)
    for row, (name, p) in enumerate(layers.items()):
        s = p.sizes
        assert regions[row].tolist() == [0.0] * s.retained + [1.0] * s.candidate + [2.0] * s.pruned
        assert rates.mask[row].tolist() == [True] * s.retained + [False] * s.candidate + [True] * s.pruned
        passed = trace[name][:, 0].float().mean(0)[p.candidate]
        np.testing.assert_allclose(rates[row].compressed(), passed, atol=1e-6)
        assert (passed == 1).all() == (selection == "keep")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["retained: always computed", "pruned: never"]


@pytest.mark.parametrize("selection", ["gate", "mask"])
def test_the_experts_figure_shows_each_expert(selection):
    model = tiny.moe("mixtral")
    layers, trace, _ = traced(model, text_inputs(), ffn_ratio=0.5, selection=selection)
    others, other_trace, _ = traced(model, text_inputs(seed=1), ffn_ratio=0.5, selection=selection)
    rates, other_rates = channels.chosen_rates(layers, trace), channels.chosen_rates(others, other_trace)
    figure = plots.experts_figure(layers, others, rates, other_rates, trace)
    drawn = pictures_of(figure)
    routed, between, prompts, each = drawn.values()
    experts = len(next(iter(layers.values())).importance)
    for row, (name, mask) in enumerate(trace.items()):
        np.testing.assert_allclose(routed[0][row], mask[:, 0].any(-1).float().mean(0), atol=1e-6)
        for e in range(experts):
            line = each[-1][row * experts + e]
            if not mask[:, 0, e].any():
                assert line.mask.all()
            elif selection == "gate":
                own = mask[:, 0, e][mask[:, 0, e].any(-1)].float().mean(0)
                np.testing.assert_allclose(line, own.sort(descending=True)[0], atol=1e-6)
            if selection == "mask":
                shared = torch.isin(layers[name].retained[e], others[name].retained[e]).float().mean()
                assert prompts[0][row, e] == pytest.approx(shared.item(), abs=1e-6)
    assert routed[0].sum() == pytest.approx(2 * len(layers))  # each token goes to two
    assert len(drawn) == 4 and "second prompt" in list(drawn)[2]
    what = "chosen" if selection == "gate" else "retained"
    assert all(f"{what} channels shared" in title for title in list(drawn)[1:3])
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == [f"{value:.2f}" for value in routed[0].flatten()]
    assert not between[0].mask.all()


@pytest.mark.parametrize("selection", ["gate", "mask"])
def test_the_modalities_figure_shows_overlaps_and_rates(selection):
    model, processor = zoo.load("shapes")
    picture = open_image(zoo.picture())[0]
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the picture."}]
    inputs = chat_inputs(processor, [{"role": "user", "content": parts}], "cpu")
    with popmm.pruned(model, pruning_ratio=0.4, selection=selection) as state:
        with state.trace() as trace:
            model.generate(**inputs, **SETTINGS)
        layers = {"both": dict(state.layers)}
        rates = channels.chosen_rates(layers["both"], trace)
        for kind in ("text", "image"):
            rank_by_modality(state, kind)
            state.repartition()
            layers[kind] = dict(state.layers)
    figure = plots.modalities_figure(layers, rates)
    overlaps, chosen, each = (image[0] for image in pictures_of(figure).values())
    for row, name in zip(each, layers["both"]):
        assert row.tolist() == pytest.approx(sorted(rates[name].tolist(), reverse=True), abs=1e-6)
    for row, name in enumerate(layers["both"]):
        sizes = layers["both"][name].sizes
        n = sizes.retained if selection == "mask" else sizes.budget
        image, text = (set(layers[k][name].importance.topk(n)[1].tolist()) for k in ("image", "text"))
        assert overlaps[row, 0] == pytest.approx(len(image & text) / n)
        alone = sorted(image - text)
        assert chosen[row, 1] == pytest.approx(rates[name][alone].mean().item(), abs=1e-6)
        assert chosen[row, 0] > chosen[row, 3]  # what matters to both is chosen more often than what matters to none
    assert 0.3 < overlaps[:, 0].mean() < 1
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == ["image and text", "image and both", "text and both"]


def many_layers(n, experts=None):
    shape = (32,) if experts is None else (experts, 32)
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for i in range(n):
        scores = torch.rand(shape, generator=generator).tolist()
        layers[f"model.layers.{i}.mlp"] = partition(scores, 0, 32, 16)
    masks = {name: torch.rand(3, 1, *shape, generator=generator) < 0.5 for name in layers}
    return layers, masks


@pytest.mark.parametrize("experts", [None, 24])
def test_figures_of_many_layers_stay_readable(tmp_path, experts):
    layers, masks = many_layers(80, experts)
    rates = channels.chosen_rates(layers, masks)
    if experts:
        figure = plots.experts_figure(layers, layers, rates, rates, masks)
    else:
        figure = plots.channels_figure(layers, rates, 3, 0.5)
    shown = [label.get_text() for axis in figure.axes[:1] for label in axis.get_yticklabels()]
    assert shown[:2] == ["0.mlp", "2.mlp"] and len(shown) == 40
    plots.save(figure, tmp_path / "many.png")
    image = Image.open(tmp_path / "many.png")
    assert image.height <= 1600 and image.width <= 2000


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--selection", "mask"],
        ["--model", "zoo:stories-moe"],
        ["--model", "zoo:shapes", "--image", str(zoo.picture())],
    ],
)
def test_no_picture_of_inspect_is_blank(arguments, tmp_path, capsys):
    file = tmp_path / "picture.png"
    assert main(["inspect", *arguments, "--out", str(file), "--max-new-tokens", "12"]) == 0
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    ink = pixels[(pixels.max(1) - pixels.min(1)) > 30]  # coloured ones
    colours, counts = np.unique(ink, axis=0, return_counts=True)
    assert len(ink) > 0.2 * len(pixels) and len(colours) > 20
    assert counts.max() < 0.9 * len(ink)
