"""Trains the language model of the bundled vision-language model, which answers questions about coloured shapes.

    python -m popmm.zoo.train_shapes --start popmm/zoo/shapes --out FOLDER

The vision tower stays as it is: a linear layer reads shape and colour of each cell off its features without an error,
so pictures are drawn once and asked about several times. Pictures and conversations come from ``popmm.zoo.shapes``;
none of them is stored. Training uses seeds from 1,000,000 on, so smaller seeds are held out. Needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from popmm.zoo import shapes
from popmm.zoo.packing import Packer, Row
from popmm.zoo.untrained_shapes import FIRST_TRAINING_SEED, MOST, build_model, build_processor, save

HELD_OUT_SEED = 500_100  # the evaluation's sixth set, so other pictures than its usual three
DRAWN, REUSED = 64, 4  # pictures drawn at a time; how often each is asked about, on average
LENGTH = 144  # tokens of a row
ROWS = 40  # rows of a batch


def talks_about(scene: shapes.Scene, generator: random.Random, more: tuple[str, ...] = ()) -> list[list[dict]]:
    """Conversations about a picture, one question of each kind and one of each of ``more``, most of them alone.

    Later answers may be read off earlier ones, so questions that stand alone teach more.
    """
    conversations: list[list[dict]] = []
    for question in shapes.questions(scene, generator, (*shapes.KINDS, *more)):
        if not conversations or generator.random() < 0.85:
            conversations.append([])
        conversations[-1] += talk(question, shown=not conversations[-1])
    if generator.random() < 0.03:
        question, answer = shapes.GREETING
        conversations.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return conversations


def talk(question: shapes.Question, shown: bool = True) -> list[dict]:
    """A question, with the picture's place before it if it is ``shown``, and its answer, in chat form."""
    asked = [{"type": "image"}] * shown + [{"type": "text", "text": question.text}]
    answer = [{"type": "text", "text": question.answer}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def features_of(model, packer: Packer, scenes: list[shapes.Scene]) -> list[torch.Tensor]:
    """What the vision tower makes of each scene's picture, [tokens, hidden]."""
    pictures = packer.processor.image_processor(images=[shapes.draw(scene) for scene in scenes], return_tensors="pt")
    with torch.no_grad():
        return list(model.model.get_image_features(**pictures, return_dict=True).pooler_output)


def training_rows(model, packer: Packer, seed: int, more: tuple[str, ...]) -> Iterator[tuple[Row, torch.Tensor]]:
    """Rows and their pictures' features without end, each picture drawn once and asked about a few times."""
    generator, pool = random.Random(seed), []
    first = FIRST_TRAINING_SEED + 1_000_000 * seed
    for at in itertools.count(first, DRAWN):
        scenes = [shapes.random_scene(random.Random(i), least=2, most=MOST) for i in range(at, at + DRAWN)]
        pool += zip(scenes, features_of(model, packer, scenes), strict=True)
        for scene, features in generator.choices(pool, k=DRAWN * REUSED):
            for row in packer.rows(talks_about(scene, generator, more), LENGTH):
                yield row, features


class HeldOut:
    """Questions of ``popmm eval --task shapes`` about pictures that are not learned."""

    def __init__(self, model, packer: Packer, n_pictures: int):
        self.rows: list[tuple[Row, torch.Tensor]] = []
        self.kinds: list[list[str]] = []
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + n_pictures):
            generator = random.Random(seed)
            scene = shapes.random_scene(generator, least=4, most=MOST)
            [features] = features_of(model, packer, [scene])
            for question in shapes.questions(scene, generator):
                [row] = packer.rows([talk(question)], LENGTH)
                self.rows.append((row, features))
                self.kinds.append(question.kind)
        self.packer = packer

    @torch.no_grad()
    def judge(self, model) -> tuple[float, dict[str, float]]:
        """Loss per token of the answers, and the share of exact answers by kind and of ``"all"``."""
        losses, right = [], []
        for at in range(0, len(self.rows), ROWS):
            rows = self.rows[at : at + ROWS]
            own, wrong = token_losses(model, self.packer, rows)
            losses += own.tolist()
            right += [not bad.any() for bad in wrong.split([sum(row.learned) for row, _ in rows])]
        judged = list(zip(self.kinds, right, strict=True))
        exact = {kind: statistics.mean(ok for own, ok in judged if own == kind) for kind in shapes.KINDS}
        return statistics.mean(losses), {**exact, "all": statistics.mean(right)}


def token_losses(model, packer: Packer, rows: list[tuple[Row, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each learned token, and whether another is likelier; both [n]."""
    batch = packer.batch([row for row, _ in rows], LENGTH)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    pictures = torch.cat([features for _, features in rows]).to(embedded.dtype)
    embedded = embedded.masked_scatter((batch["input_ids"] == packer.image)[..., None], pictures)
    mask = torch.zeros(batch["attention_mask"].shape, dtype=torch.bfloat16, device="cpu")
    mask = mask.masked_fill(~batch["attention_mask"], -1e9)
    labels = batch["labels"][:, 1:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(
            inputs_embeds=embedded, position_ids=batch["position_ids"], attention_mask=mask, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][labels != -100]).float()
    labels = labels[labels != -100]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) != labels


def optimizers_of(model, lr: float, matrix_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the language model's matrices between embeddings and logits, AdamW for what else it has."""
    matrices, others = [], []
    for name, parameter in model.model.language_model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def train(model, packer: Packer, args: argparse.Namespace, record: Callable[[list[dict]], None]) -> None:
    """Warms up, goes on at one rate, and lets it fall to zero; ``record`` gets the curve so far now and then."""
    optimizers = optimizers_of(model, args.lr, args.matrix_lr)
    falls = max(1, round(args.falling * args.steps))

    def rate(step: int) -> float:
        return min((step + 1) / args.warm_up, 1.0, (args.steps - step) / falls)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    held_out, curve, losses = HeldOut(model, packer, 60), [], []
    rows = training_rows(model, packer, args.seed, tuple(args.more.split(",")))
    for step in range(1, args.steps + 1):
        loss = token_losses(model, packer, list(itertools.islice(rows, ROWS)))[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
        if step % args.every == 0 or step == args.steps:
            held_out_loss, exact = held_out.judge(model.eval())
            model.train()
            shares = {kind: round(share, 3) for kind, share in exact.items()}
            point = {"step": step, "loss": statistics.mean(losses), "held_out_loss": held_out_loss}
            curve.append({**{k: round(v, 4) for k, v in point.items()}, "exact": shares})
            losses.clear()
            print(curve[-1], flush=True)
            record(curve)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="go on from the model in this folder")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=2e-3, help="of embeddings, biases and norms")
    parser.add_argument("--matrix-lr", type=float, default=4e-3)
    parser.add_argument("--falling", type=float, default=0.4, help="share of the steps in which the rate falls to zero")
    parser.add_argument("--warm-up", type=int, default=100, help="steps")
    parser.add_argument("--more", default="count,next", help="kinds of which a picture has one question more")
    parser.add_argument("--every", type=int, default=250, help="steps between looks at held-out pictures")
    parser.add_argument("--vocab-size", type=int, default=420)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curve", type=Path, help="JSON file for loss and exact answers, all stages")
    args = parser.parse_args()

    earlier = json.loads(args.curve.read_text()) if args.curve is not None and args.curve.exists() else []
    torch.manual_seed(args.seed)
    processor = build_processor(args.vocab_size)
    model = build_model(processor)
    model.load_state_dict(Qwen2VLForConditionalGeneration.from_pretrained(args.start).float().state_dict())
    model.train()
    # fused eager attention is faster on a CPU than the built-in one, whose backward is slow
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, vocabulary {len(processor.tokenizer)}")

    packer = Packer(processor, shapes.GRID)
    before = json.loads((args.start / "training.json").read_text())
    began = time.monotonic()

    def record(curve: list[dict]) -> None:
        save(model, processor, args.out)
        training = {
            "parameters": n_parameters,
            "rows": ROWS,
            **curve[-1],
            "minutes": round((time.monotonic() - began) / 60, 1),
            **{name: value for name, value in vars(args).items() if not isinstance(value, Path)},
            "curve": None if args.curve is None else args.curve.name,
            "start": before,
        }
        (args.out / "training.json").write_text(json.dumps(training, indent=1) + "\n")
        if args.curve is not None:
            stages = [{**training, "start": None, "points": curve}]
            args.curve.write_text(json.dumps(earlier + stages, indent=1) + "\n")

    train(model, packer, args, record)
    AutoProcessor.from_pretrained(args.out)  # it must load as users will load it
    shapes.draw(shapes.bundled_scene()).save(args.out / "picture.png")


if __name__ == "__main__":
    main()
