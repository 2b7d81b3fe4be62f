"""What might select better at equal bytes, tried on trained models. The findings stand in docs/quality.md.

python benchmarks/selection_study.py width|recency|layers|experts|refresh --text FILE [--model PATH ...]

Each row: KL to dense per token, mean and spread over 3 disjoint subsets of texts; bfloat16 weights.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import track

import popmm
from popmm.cli.compare import decode_along
from popmm.compat import cache_of
from popmm.evaluation.evaluate import decode_logits
from popmm.evaluation.methods import METHODS, Method, fit
from popmm.evaluation.texts import own_samples, text_cases
from popmm.state import PartitionState
from popmm.zoo.loading import load_model

SHARES = (0.7, 0.5)
BASE = popmm.PopConfig()


class Study:
    """A model, its texts, and the dense distribution over them."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.name = name
        self.model, self.tokenizer = load_model(name, "bfloat16", "cpu")
        self.subsets, _ = text_cases(self.model, self.tokenizer, args.text, 0.95, 96, 96, 3, args.texts, 0)
        self.dense = [
            [decode_logits(self.model, c.inputs, c.tokens, torch.no_grad).log_softmax(-1) for c in cases]
            for cases in self.subsets
        ]

    def kl(self, config: popmm.PopConfig, prepare: Callable[[PartitionState], None] | None = None) -> str:
        with popmm.pruned(self.model, config) as state:
            if prepare is not None:
                prepare(state)
            means = []
            for cases, dense in zip(self.subsets, self.dense):
                found = []
                for case, reference in zip(cases, dense):
                    own = decode_logits(self.model, case.inputs, case.tokens, state.simulated_decode).log_softmax(-1)
                    found.append((reference.exp() * (reference - own)).sum(-1)[1:])
                means.append(torch.cat(found).mean().item())
        return f"{statistics.mean(means):.4f} ± {statistics.stdev(means):.4f}"

    def at(self, share: float, method: str = "gate", **settings) -> popmm.PopConfig | None:
        """A method's config at a share of the bytes; None if it cannot read so little."""
        own = Method(lambda c: METHODS[method].config(c).replace(**settings))
        ratio = fit(self.model, own, BASE, share)
        return None if ratio is None else own.config(BASE.replace(ffn_ratio=ratio))

    def row(self, label: str, share: float, config: popmm.PopConfig | None, prepare=None) -> None:
        found = "-" if config is None else self.kl(config, prepare)
        print(f"| {Path(self.name).name} | {label} | {share:.2f} | {found} |", flush=True)


def width(study: Study) -> None:
    """U, the share of gate rows that ``gate`` reads at 16 bits."""
    for share in (0.85, 0.7, 0.6, 0.5, 0.4):
        study.row("U chosen", share, study.at(share, "gate, 16 bit"))
        for u in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
            study.row(f"U = {u}", share, study.at(share, "gate, 16 bit", candidate_fraction=u))


def recency(study: Study) -> None:
    """Prompt tokens that weigh half as much every so many tokens further back."""

    def halving(half: float) -> Callable[[PartitionState], None]:
        def prepare(state: PartitionState) -> None:
            for ffn in state._ffns:
                plain = ffn.measured

                def measured(h, up=None, plain=plain, **more):
                    age = torch.arange(len(h) - 1, -1, -1)
                    w = (0.5 ** (age / half))[:, None].to(h.dtype)
                    return plain(h * w, up=None if up is None else up * w, **more)

                ffn.measured = measured

        return prepare

    for method in ("mask", "gate, 16 bit", "gate"):
        for share in SHARES:
            study.row(f"{method}, all tokens alike", share, study.at(share, method))
            for half in (64, 32, 16):
                study.row(f"{method}, half-life {half}", share, study.at(share, method), halving(half))


def layers(study: Study) -> None:
    """Ratios that rise or fall from the first layer to the last, the mean staying as it is."""

    @contextmanager
    def sloped(slope: float):
        module = importlib.import_module("popmm.attach")  # popmm.attach is its function
        plain, n = module.sizes_for, study.model.config.get_text_config().num_hidden_layers

        def sizes_for(site, ratio, config, rule):
            place = site.layer / (n - 1) - 0.5
            return plain(site, min(max(ratio * (1 + slope * 2 * place), 0.0), 0.95), config, rule)

        module.sizes_for = sizes_for
        try:
            yield
        finally:
            module.sizes_for = plain

    for method in ("mask", "gate"):
        for share in SHARES:
            for slope in (0.0, 0.1, 0.2, -0.1, -0.2):
                with sloped(slope):
                    study.row(f"{method}, ratio {slope:+.0%} to the last layer", share, study.at(share, method))


def experts(study: Study) -> None:
    """The prior's n0, scores times the router's weight, and leaving out an expert of low weight."""

    def skipping(level: float, skipped: list) -> Callable[[PartitionState], None]:
        def prepare(state: PartitionState) -> None:
            for ffn in state._ffns:
                plain = ffn.decode

                def decode(x, index, weight, plain=plain):
                    keep = weight >= level * weight.amax(-1, keepdim=True)
                    skipped.append(1 - keep.float().mean().item())
                    return plain(x, index, weight * keep)

                ffn.decode = decode

        return prepare

    for method in ("mask", "gate"):
        for share in SHARES:
            for n0 in (0.0, 8.0, 32.0, 128.0):
                study.row(f"{method}, n0 = {n0:.0f}", share, study.at(share, method, prior_tokens=n0))
            study.row(f"{method}, router-weighted", share, study.at(share, method, importance="routed"))
    for level in (0.1, 0.2, 0.3):
        skipped: list[float] = []
        for wider in (0.55, 0.6):
            skipped.clear()
            found = study.kl(study.at(wider), skipping(level, skipped))
            share = wider * (1 - statistics.mean(skipped))
            print(f"| {Path(study.name).name} | gate at {wider}, second expert below {level} | {share:.3f} | {found} |")


@torch.no_grad()
def refresh(study: Study, tokens: int = 500, prompt: int = 64, texts: int = 12) -> None:
    """KL of pruned steps along the dense model's own long texts, by hundreds of tokens, with and without refreshes."""
    model = study.model
    samples = own_samples(model, study.tokenizer, texts, prompt + tokens + 1)
    dense = [model(ids[None]).logits[0, prompt:-1].float().log_softmax(-1) for ids in samples]
    for method in ("mask", "gate, 16 bit", "gate"):
        for share in SHARES:
            for every in (0, 64, 16):
                config = study.at(share, method).replace(refresh_every=every)
                by_place = torch.zeros(tokens)
                with popmm.pruned(model, config) as state:
                    for ids, reference in zip(track(samples, transient=True), dense):
                        cache = cache_of(model(ids[None, :prompt], use_cache=True))
                        own = decode_along(model, state, ids[prompt:-1], cache).float().log_softmax(-1)
                        by_place += (reference.exp() * (reference - own)).sum(-1) / len(samples)
                pruned = torch.ones(tokens, dtype=torch.bool)
                if every:
                    pruned[every :: every + 1] = False
                hundreds = zip(by_place.split(100), pruned.split(100))
                parts = " / ".join(f"{kl[steps].mean():.4f}" for kl, steps in hundreds)
                label = f"{method}, refresh_every={every}"
                print(f"| {Path(study.name).name} | {label} | {share:.2f} | {parts} |", flush=True)


def main() -> None:
    studies = {f.__name__: f for f in (width, recency, layers, experts, refresh)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=studies)
    parser.add_argument("--model", nargs="+", default=["zoo:stories"])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--texts", type=int, default=15, help="per subset (%(default)s)")
    args = parser.parse_args()
    print("| model | what | share of FFN bytes | KL to dense |\n|---|---|---|---|")
    for name in args.model:
        studies[args.study](Study(args, name))


if __name__ == "__main__":
    main()
