"""Chats about a picture with 30 % of each block's weights pruned online.

python examples/chat_image.py                                  # bundled model and picture, no download
python examples/chat_image.py photo.jpg "What is unusual here?" --model Qwen/Qwen2.5-VL-3B-Instruct
python examples/chat_image.py photo.jpg --model llava-hf/llava-1.5-7b-hf      # asks for questions
"""

import argparse
import sys

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextStreamer

import popmm
from popmm.cli.chat import chat
from popmm.cli.images import open_image

BUNDLED_QUESTIONS = ("Describe the picture.", "How many shapes are there?")


def load(name):
    """The bundled model, or any vision-language model of the hub or a folder."""
    if name == "shapes":
        return popmm.zoo.load("shapes")
    if type(AutoConfig.from_pretrained(name)) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(f"--model {name} reads text alone: give a vision-language model")
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto").eval()
    return model, AutoProcessor.from_pretrained(name)


def prepare(model, processor, picture, question):
    """Model inputs for one question about one picture."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures = [picture]
    if "qwen" in model.config.model_type:
        from qwen_vl_utils import process_vision_info

        pictures, _ = process_vision_info(messages, image_patch_size=processor.image_processor.patch_size)
    return processor(text=[text], images=pictures, return_tensors="pt").to(model.device, model.dtype)


def answer(model, processor, picture, question, max_new_tokens):
    """Streams the answer to the terminal."""
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = prepare(model, processor, picture, question)
    model.generate(**inputs, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", help="file or address; the bundled picture if left out")
    parser.add_argument("question", nargs="?", help="asked for in the terminal if left out")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--pruning-ratio", type=float, default=0.3)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()

    try:
        config = popmm.PopConfig(pruning_ratio=args.pruning_ratio)
        picture, _ = open_image(args.image or popmm.zoo.picture())
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    try:
        model, processor = load(args.model)
        with popmm.pruned(model, config):
            pass
    except (OSError, ValueError) as error:  # no such model, or a ratio that it cannot reach
        parser.error(str(error))
    if args.image is None:  # a tour: dense and pruned, one after the other
        print(f"Picture: {popmm.zoo.picture()}")
        for question in BUNDLED_QUESTIONS:
            print(f"\n{question}\n  dense:  ", end="")
            answer(model, processor, picture, question, args.max_new_tokens)
            with popmm.pruned(model, config):
                print("  pruned: ", end="")
                answer(model, processor, picture, question, args.max_new_tokens)
    if args.question is not None:
        with popmm.pruned(model, config) as state:
            answer(model, processor, picture, args.question, args.max_new_tokens)
            print(state.summary())
    elif args.image is not None or sys.stdin.isatty():
        chat(model, processor, config, [str(args.image or popmm.zoo.picture())], max_new_tokens=args.max_new_tokens)


if __name__ == "__main__":
    main()
