"""What rounding quantised weights again costs, and what their own codes are worth. Figures in docs/quantised.md.

python benchmarks/quantised_formats.py weights --model PATH
python benchmarks/quantised_formats.py kl --model PATH --text FILE [--texts 6] [--bytes 0.2,0.25,0.3] [--nested]

``weights``: one layer's gate rows in int8, one scale a row: relative error of planes that are made of them, and of such
that keep the row's scale. ``kl``: torchao rounds the FFNs to symmetric 4 bits in groups of 64 of their inputs, as GPTQ
and compressed-tensors store them; KL to that model, per token, with gate and up in one plane, or (``--nested``) from
its dequantised weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import popmm
from popmm.evaluation.evaluate import decode_logits
from popmm.evaluation.texts import text_cases
from popmm.kernels import planes
from popmm.layouts.traffic import bytes_read
from popmm.zoo.loading import load_model

GROUP = 64


def weights(args: argparse.Namespace) -> None:
    model, _ = load_model(args.model, "float32", "cpu")
    layer = next(m for name, m in model.named_modules() if name.endswith("gate_proj"))
    own = layer.weight.data
    scale = own.abs().amax(1, keepdim=True) / 127
    code = (own / scale).round()
    came = code * scale

    def off(found: Tensor) -> str:
        return f"{float((found - came).norm() / came.norm()):.4f}"

    again, base = planes.encode(came), (code / 16).round().clamp(-8, 7)
    print("| bits read | rounded again, a scale per 64 weights | 16 times the row's scale |\n|---|---|---|")
    for bits, cells in ((4, 1), (6, 4), (8, 16)):
        cell = ((code / 16 - base + 0.5) * cells).floor().clamp(0, cells - 1)
        kept = (base + (cell + 0.5) / cells - 0.5) * 16 * scale
        print(f"| {bits} | {off(planes.decode(again, bits))} | {off(kept)} |")


@torch.no_grad()
def kl(args: argparse.Namespace) -> None:
    model, tokenizer = load_model(args.model, "bfloat16", "cpu")
    layers = [layer for name, layer in model.named_modules() if ".mlp." in name and type(layer) is nn.Linear]
    how = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    quantize_(model, how, filter_fn=lambda layer, _: layer in layers)
    subsets, _ = text_cases(model, tokenizer, args.text, 0.95, 160, 48, 1, args.texts, 0)
    cases = subsets[0][: args.texts]
    own = [decode_logits(model, c.inputs, c.tokens, torch.no_grad).log_softmax(-1) for c in cases]
    for layer in layers if args.nested else []:
        layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    print("| setting | share of the 16-bit bytes | KL | top-1 |\n|---|---|---|---|")
    shares = [float(share) for share in args.bytes.split(",")]
    for settings in (*(dict(weight_bits=bits) for bits in (8, 6, 4)), *(dict(bytes=share) for share in shares)):
        with popmm.pruned(model, selection="tiers", **settings) as state:
            found = [decode_logits(model, c.inputs, c.tokens, state.simulated_decode).log_softmax(-1) for c in cases]
            sites = [(ffn, ffn.site.weights()) for ffn in state._ffns]
            read = sum(bytes_read(ffn.site, ffn.sizes, state.config) for ffn, _ in sites)
            share = read / sum(6 * w.d_model * w.d_ff for _, w in sites)
        off = torch.cat([(a.exp() * (a - b)).sum(-1)[1:] for a, b in zip(own, found)])
        same = torch.cat([(a.argmax(-1) == b.argmax(-1))[1:].float() for a, b in zip(own, found)])
        print(f"| {settings} | {share:.3f} | {off.mean():.4f} | {same.mean():.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (weights, kl):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("--model", required=True)
        if run is kl:
            command.add_argument("--text", type=Path, required=True)
            command.add_argument("--texts", type=int, default=6)
            command.add_argument("--bytes", default="0.2,0.25,0.3")
            command.add_argument("--nested", action="store_true", help="as if the codes were not known")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
