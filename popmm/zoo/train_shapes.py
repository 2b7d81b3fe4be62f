"""Trains the bundled vision-language model: a small Qwen2-VL that answers questions about coloured shapes.

    python -m popmm.zoo.train_shapes --out popmm/zoo/shapes

Pictures and conversations come from ``popmm.zoo.shapes``; none of them is stored. Training uses seeds from
1,000,000 on, so smaller seeds are held out. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from rich.progress import Progress
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from popmm.zoo import shapes

FIRST_TRAINING_SEED = 1_000_000
MOST = 7  # shapes in a picture
# backgrounds come out near zero, so that shapes stand out from the first step on
MEAN, STD = [0.92] * 3, [0.3] * 3
INIT = 0.08  # at transformers' 0.02 a model so narrow learns to look at pictures very late
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# as in Qwen2-VL, without its system message
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(
    seed: int, n_questions: int, most: int = MOST, short: float = 0.0
) -> tuple[list[dict], shapes.Scene | None]:
    """Messages of a conversation about one picture, whose image part is a placeholder.

    Later answers may be read off earlier ones, so few questions teach more. Descriptions are long:
    ``short`` is the share of conversations that ask for one last.
    """
    generator = random.Random(seed)
    if generator.random() < 0.03:
        question, answer = shapes.GREETING
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None
    scene = shapes.random_scene(generator, least=min(2, most), most=most)
    messages = []
    asked = shapes.questions(scene, generator)
    if generator.random() < short:
        asked.sort(key=lambda question: question.kind == "describe")
    for i, question in enumerate(asked[:n_questions]):
        text = {"type": "text", "text": question.text}
        messages.append({"role": "user", "content": [{"type": "image"}, text] if i == 0 else [text]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    return messages, scene


def build_processor(vocab_size: int) -> Qwen2VLProcessor:
    """Byte-level BPE over the conversations' text, Qwen2-VL's picture and video processors at 112 x 112."""
    texts = [
        part if isinstance(part, str) else part["text"]
        for seed in range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + 2000)
        for message in conversation(seed, 5)[0]
        for part in ([message["content"]] if isinstance(message["content"], str) else message["content"])
        if isinstance(part, str) or "text" in part
    ]
    texts += ["user\n", "assistant\n", "system\n"] * 2000
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    bpe = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[AddedToken(token, special=True) for token in SPECIAL + VISION],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    pixels = {"shortest_edge": shapes.SIZE**2, "longest_edge": shapes.SIZE**2}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, image_mean=MEAN, image_std=STD),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=pixels, image_mean=MEAN, image_std=STD),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """The untrained model: hidden 128, d_ff 512, 4 layers, a vision tower of 3."""
    tokenizer = processor.tokenizer
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer),
        initializer_range=INIT,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # so that neighbouring cells differ: columns have the slow frequencies
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 5, 9]},
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=3,
        embed_dim=96,
        hidden_size=128,
        num_heads=4,
        mlp_ratio=4,
        patch_size=14,
        spatial_merge_size=2,
        initializer_range=INIT,
    )
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def make_batch(processor, first_seed: int, batch_size: int, **how) -> dict[str, torch.Tensor]:
    """Inputs and labels of conversations; only the assistants' words are learned."""
    drawn = [conversation(seed, **how) for seed in range(first_seed, first_seed + batch_size)]
    pictures = [shapes.draw(scene) for _, scene in drawn if scene is not None]
    texts = [processor.apply_chat_template(messages, tokenize=False) for messages, _ in drawn]
    inputs = processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    ids = inputs["input_ids"]
    start, end = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assistant = processor.tokenizer("assistant\n")["input_ids"]
    learned = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(ids.tolist()):
        position = 0
        while position < len(tokens):
            if tokens[position] == start and tokens[position + 1 : position + 1 + len(assistant)] == assistant:
                position += 1 + len(assistant)
                stop = tokens.index(end, position) + 1
                learned[row, position:stop] = True
                position = stop
            position += 1
    return {**inputs, "labels": ids.masked_fill(~learned, -100)}


def train(model, processor, args: argparse.Namespace) -> float:
    """AdamW with warm-up and cosine decay; returns the loss of held-out conversations."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 200, 0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps))),
    )
    seed = FIRST_TRAINING_SEED + 10_000 * args.seed
    held_out = make_batch(processor, 0, 64, n_questions=2)
    with Progress() as progress:
        bar = progress.add_task("training", total=args.steps)
        for step in range(args.steps):
            # few shapes first: what they are is learned before where
            most = min(MOST, 1 + step // args.steps_per_shape)
            how = dict(n_questions=args.questions, most=most, short=args.short)
            batch = make_batch(processor, seed, args.batch_size, **how)
            seed += args.batch_size
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.autocast):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 100 == 0 or step + 1 == args.steps:
                model.eval()
                with torch.no_grad():
                    held_out_loss = model(**held_out).loss.item()
                model.train()
                progress.console.print(f"step {step}/{args.steps} loss {loss.item():.4f} held-out {held_out_loss:.4f}")
                if step:
                    save(model, processor, args.out)
            progress.update(bar, advance=1)
    return held_out_loss


def save(model, processor, out: Path) -> None:
    """Writes weights as float16, with processor and chat template beside them."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    stored = Qwen2VLForConditionalGeneration(model.config).half()
    stored.load_state_dict(state)
    stored.generation_config.update(
        do_sample=False,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        max_new_tokens=128,
    )
    stored.save_pretrained(out)
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from the model in this folder")
    parser.add_argument("--questions", type=int, default=2, help="per conversation (%(default)s)")
    parser.add_argument("--short", type=float, default=0.0, help="share of conversations that describe last, if at all")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--steps-per-shape", type=int, default=70, help="until pictures may hold one shape more")
    parser.add_argument("--vocab-size", type=int, default=420)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 products")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    processor = build_processor(args.vocab_size)
    model = build_model(processor)
    if args.start is not None:
        model.load_state_dict(Qwen2VLForConditionalGeneration.from_pretrained(args.start).float().state_dict())
    model.train()
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, vocabulary {len(processor.tokenizer)}")

    start = time.monotonic()
    loss = train(model, processor, args)
    minutes = (time.monotonic() - start) / 60
    save(model.eval(), processor, args.out)
    AutoProcessor.from_pretrained(args.out)  # it must load as users will load it
    shapes.draw(shapes.bundled_scene()).save(args.out / "picture.png")
    record = {
        "parameters": n_parameters,
        "training_pictures": args.steps * args.batch_size,
        "held_out_loss": round(loss, 4),
        "minutes": round(minutes, 1),
        **{key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "out": args.out.name,
        "start": None if args.start is None else json.loads((args.start / "training.json").read_text()),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"held-out loss {loss:.4f} per answer token, trained in {minutes:.1f} minutes, saved to {args.out}")


if __name__ == "__main__":
    main()
