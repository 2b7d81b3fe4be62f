"""Run by test_tensor_parallel.py in each of two processes: what a spread model gives, printed by the first as JSON."""

import json
import sys

import tiny
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import popmm

HOW = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)


def texts(model, ids, settings: dict) -> dict:
    with popmm.pruned(model, **settings) as state:
        text = model.generate(ids, **HOW)[:, ids.shape[1] :].tolist()
        partition, ratio = next(iter(state.layers.values())), state.ffn_ratio
        passes = dict(decode=state.passes["decode"], dense=state.passes["dense"])
        return {"text": text, "passes": passes, "d_ff": partition.d_ff, "ratio": ratio}


def main(folder: str, settings: list[dict]) -> None:
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")
    ).eval()
    ids = tiny.prompt(9, batch=2)
    found = {"dense": model.generate(ids, **HOW)[:, 9:].tolist(), "pruned": [], "refused": []}
    for own in settings:
        try:
            found["pruned"].append(texts(model, ids, own))
        except ValueError as error:
            found["refused"].append(str(error))
    found["after"] = model.generate(ids, **HOW)[:, 9:].tolist()
    every = [None, None]
    dist.all_gather_object(every, found)
    found["agree"] = every[0] == every[1] or [every[0], every[1]]
    if dist.get_rank() == 0:
        print("FOUND", json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
