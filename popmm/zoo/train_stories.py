"""Trains the bundled story models: a tokenizer, then a small Llama or Mixtral, from one text file.

    python -m popmm.zoo.train_stories TEXT_FILE --form dense --out popmm/zoo/stories

The text holds stories separated by ``<|endoftext|>``; the last 5 % of them are held out and never seen
by the tokenizer or the model. Needs no GPU; with one it takes seconds instead of minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

SEPARATOR = "<|endoftext|>"
HELD_OUT = 0.05
CONTEXT = 512
BALANCE = 0.02  # weight of each layer's load-balancing loss


def read_stories(path: Path) -> tuple[list[str], list[str]]:
    """Stories of the file as (training, held-out); the last 5 % of the stories are held out."""
    stories = [story.strip() for story in path.read_text(encoding="utf-8").split(SEPARATOR)]
    stories = [story for story in stories if story]
    cut = len(stories) - max(1, round(HELD_OUT * len(stories)))
    return stories[:cut], stories[cut:]


def train_tokenizer(stories: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ``<s>`` before each text; ``</s>`` doubles as padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def build_model(form: str, vocab_size: int):
    """The untrained model. FFNs take most of each block, as in large models."""
    shared = dict(
        vocab_size=vocab_size,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    if form == "dense":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=768, num_hidden_layers=6, **shared))
    config = MixtralConfig(
        intermediate_size=256,
        num_hidden_layers=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
        **shared,
    )
    return MixtralForCausalLM(config)


def token_stream(tokenizer, stories: list[str]) -> torch.Tensor:
    ids = [token for story in stories for token in [*tokenizer(story)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


@torch.no_grad()
def held_out_perplexity(model, stream: torch.Tensor, batch_size: int = 8) -> float:
    """Perplexity per token over consecutive windows of ``CONTEXT`` tokens."""
    windows = stream[: stream.numel() // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = []
    for rows in windows.split(batch_size):
        logits = model(rows).logits.float()
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).mean().item())


def add_residual_dropout(model, rate: float) -> list:
    """Dropout after each attention and FFN while training; returns the hook handles."""

    def drop(module, args, output):
        if not model.training:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], rate), *output[1:])
        return F.dropout(output, rate)

    layers = model.model.layers
    return [part.register_forward_hook(drop) for layer in layers for part in (layer.self_attn, layer.mlp)]


def language_loss(model, rows: torch.Tensor) -> torch.Tensor:
    """Next-token loss; of experts, plus the load-balancing loss of each layer by itself.

    (The model's own balancing loss pools all layers, so one layer may starve experts that another feeds.)
    """
    config = model.config
    if not hasattr(config, "num_local_experts"):
        return model(rows, labels=rows).loss
    output = model.model(rows, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
    balance = [
        load_balancing_loss_func((layer,), config.num_local_experts, config.num_experts_per_tok)
        for layer in output.router_logits
    ]
    return loss + BALANCE * sum(balance)


def train(model, stream: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> float:
    """AdamW with warm-up and cosine decay on random windows; returns the held-out perplexity."""
    generator = torch.Generator("cpu").manual_seed(args.seed)
    steps = round(args.epochs * stream.numel() / (args.batch_size * CONTEXT))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))),
    )
    device = next(model.parameters()).device
    handles = add_residual_dropout(model, args.dropout)
    with Progress() as progress:
        bar = progress.add_task("training", total=steps)
        for step in range(steps):
            drawn = dict(generator=generator, dtype=torch.int64, device="cpu")
            starts = torch.randint(stream.numel() - CONTEXT, (args.batch_size,), **drawn)
            rows = torch.stack([stream[start : start + CONTEXT] for start in starts.tolist()]).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.autocast):
                loss = language_loss(model, rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 250 == 0:
                model.eval()
                perplexity = held_out_perplexity(model, held_out[: 16 * CONTEXT].to(device))
                progress.console.print(f"step {step}/{steps} loss {loss.item():.3f} held-out {perplexity:.3f}")
                model.train()
            progress.update(bar, advance=1)
    for handle in handles:
        handle.remove()
    model.eval()
    return held_out_perplexity(model, held_out.to(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="stories separated by <|endoftext|>")
    parser.add_argument("--form", choices=["dense", "moe"], default="dense")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--epochs", type=float, default=12.0)
    parser.add_argument("--batch-size", type=int, default=4, help="windows of 512 tokens per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 products")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    training, held_out = read_stories(args.text)
    tokenizer = train_tokenizer(training, args.vocab_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(args.form, len(tokenizer)).to(device).train()
    stream, held_out_stream = token_stream(tokenizer, training), token_stream(tokenizer, held_out)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.form}: {n_parameters:,} parameters, {stream.numel():,} training tokens, {len(held_out)} held out")

    start = time.monotonic()
    perplexity = train(model, stream, held_out_stream, args)
    minutes = (time.monotonic() - start) / 60

    model = model.to("cpu", torch.float16)
    model.generation_config.update(do_sample=False, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "parameters": n_parameters,
        "training_tokens": stream.numel(),
        "held_out_stories": len(held_out),
        "held_out_perplexity": round(perplexity, 3),
        "minutes": round(minutes, 1),
        **{key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
    }
    record["text"], record["out"] = args.text.name, args.out.name
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"held-out perplexity {perplexity:.3f} per token, trained in {minutes:.1f} minutes, saved to {args.out}")


if __name__ == "__main__":
    main()
