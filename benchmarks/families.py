"""What popmm does with every decoder family of transformers: docs/models.md, and the checks that it rests on.

    python benchmarks/families.py                            # all families, a line each
    python benchmarks/families.py llama gpt2                 # some of them
    python benchmarks/families.py --markdown docs/models.md  # writes the page anew; some families: their rows alone
    python benchmarks/families.py --compare docs/models.md   # exits with 1 where the page says something else

Each family is built tiny and random from its default configuration (small_families.py) and attached with tiers, gate
and mask: greedy decoding must count one prompt, every further token as pruned and none as dense; nothing pruned must
give the dense logits bit for bit; detach must give every byte back. The FFNs that are there are counted without popmm
(ffn_count.py). Two processes work through the families, with a time limit for each.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from queue import Empty, Queue

LIMIT, PER_PROCESS = 120, 25  # seconds for a family; families for a process
SETTINGS = {
    "tiers": dict(selection="tiers", bytes=0.33),
    "gate": dict(selection="gate", gate_bits=16, ffn_ratio=0.4),
    "mask": dict(selection="mask", candidate_fraction=0.2, ffn_ratio=0.4),
}
NEW_TOKENS = 4
PASSED, PARTLY, ATTACHED = "passed", "passed, some FFNs dense", "attached, not run"
REFUSED, NOT_BUILT, FAILED, DENSE = "refused", "not built", "FAILED", "attached, never pruned"


class NeverPruned(Exception):
    """Passes that are of no kind that popmm prunes."""


class CheckFailed(Exception):
    """A promise that popmm did not keep."""


def survey(family: str) -> dict:
    """One family's row."""
    from ffn_count import count_ffns
    from popmm.adapters import UnsupportedModelError, describe
    from small_families import D_MODEL, small_model

    import popmm

    row = dict(family=family, model="", kind="", sites=0, present=0, status=NOT_BUILT, reason="")
    try:
        model = small_model(family)
    except (Exception, TimeoutError) as error:
        return {**row, "reason": f"its small configuration does not build ({type(error).__name__}: {_line(error)})"}
    row |= dict(model=type(model).__name__, kind=_kind(model))
    try:
        description = describe(model)
    except UnsupportedModelError as error:
        present, _ = count_ffns(model, D_MODEL, set(), lambda name: False)
        return {**row, "present": len(present), "status": REFUSED, "reason": _line(error)}
    sites = {site.name: site for site in description.sites()}
    left_out = description.left_out
    whole = [*left_out, *(name for name, site in sites.items() if site.entry is None)]
    present, missed = count_ffns(
        model, D_MODEL, set(sites), lambda name: any(f"{name}.".startswith(f"{known}.") for known in whole)
    )
    lists = [left for left in left_out if any(name.startswith(f"{left}.") for name in present)]
    inside = [name for name in present if any(name.startswith(f"{left}.") for left in lists)]
    row |= dict(sites=len(sites), present=len(present) - len(inside) + len(lists))
    if any(site.is_experts for site in sites.values()):
        row["kind"] = row["kind"].replace("dense", "experts")
    if missed:
        return {**row, "status": FAILED, "reason": f"FFNs that popmm neither finds nor names: {', '.join(missed)}"}
    only_shared = all(site.shared for site in sites.values())
    reasons = ["shared experts alone can be pruned, by shared_experts='prune'"] if only_shared else []
    reason = "; ".join(dict.fromkeys([*reasons, *left_out.values()]))
    try:
        can_run = _check(family, model, popmm, dict(shared_experts="prune") if only_shared else {})
    except NeverPruned as error:
        return {**row, "status": DENSE, "reason": str(error)}
    except CheckFailed as error:
        return {**row, "status": FAILED, "reason": str(error)}
    if can_run:
        return {**row, "status": ATTACHED, "reason": can_run + (f"; {reason}" if reason else "")}
    return {**row, "status": PARTLY if left_out else PASSED, "reason": reason}


def _check(family: str, model, popmm, more: dict) -> str:
    """Keeps popmm's promises on a model.

    Returns:
        Why the model itself generates nothing; empty if it does.

    Raises:
        CheckFailed: a promise that was not kept.
    """
    import torch
    from small_families import inputs as inputs_of

    inputs = inputs_of(family, torch.randint(4, 90, (1, 9), generator=torch.Generator().manual_seed(0)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    why = ""
    try:
        tokens, logits = _generate(model, inputs)
    except Exception as error:
        why = f"its tiny model generates nothing ({type(error).__name__}: {_line(error)})"
    for name, settings in SETTINGS.items():
        with popmm.pruned(model, **settings, **more) as state:
            if not why:
                _generate(model, inputs)
                counted = dict(state.passes)
                expected = dict(prompt=1, decode=NEW_TOKENS - 1, dense=0)
                reasons = f" ({'; '.join(state.passes.reasons)})" if state.passes.reasons else ""
                if not counted["decode"]:
                    what = f"passes {counted}{reasons}"
                    raise NeverPruned(f"generate gives it no pass of one new token that can be pruned: {what}")
                if counted != expected:
                    raise CheckFailed(f"{name}: passes {counted}{reasons}, expected {expected}")
        for key, value in model.state_dict().items():
            if not torch.equal(value, before[key]):
                raise CheckFailed(f"{name}: detach gave {key} back changed")
    if not why:
        with popmm.pruned(model, selection="gate", gate_bits=16, ffn_ratio=0.0, **more):
            again, theirs = _generate(model, inputs)
        if not torch.equal(again, tokens) or not torch.equal(theirs, logits):
            raise CheckFailed("with nothing pruned the logits are not the dense model's")
    return why


def _generate(model, inputs: dict):
    import torch

    how = dict(do_sample=False, output_logits=True, return_dict_in_generate=True)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **how)
    logits = output.logits if isinstance(output.logits[0], torch.Tensor) else [step[0] for step in output.logits]
    return output.sequences, torch.stack(list(logits))


def _kind(model) -> str:
    """Of which kind a model is: experts or dense, and what it reads beside text."""
    config, names = model.config, [name for name, _ in model.named_modules()]
    experts = any(p.ndim == 3 and "expert" in name for name, p in model.named_parameters())
    experts = experts or any(name.rsplit(".", 1)[-1] == "experts" for name in names)
    parts = ["experts" if experts else "dense"]
    parts += ["encoder-decoder"] if getattr(config, "is_encoder_decoder", False) else []
    parts += ["pictures"] if any("vision" in name or "visual" in name for name in names) else []
    parts += ["sound"] if any("audio" in name for name in names) else []
    return ", ".join(parts)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text.rpartition("Class validation error for validator ")[2].partition(": ValueError: ")[2] or text


def _work() -> None:
    """A child process: families on stdin, a row of JSON each on stdout."""
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")

    def too_slow(*_) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    signal.signal(signal.SIGALRM, too_slow)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        family = line.strip()
        signal.alarm(LIMIT)
        try:
            row = survey(family)
        except Exception as error:
            where = error.__traceback__
            while where.tb_next is not None:
                where = where.tb_next
            at = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
            row = dict(family=family, model="", kind="", sites=0, present=0, status=FAILED)
            row["reason"] = f"{type(error).__name__}: {_line(error)} ({at})"
        signal.alarm(0)
        print(json.dumps(row), file=answers, flush=True)


def survey_all(names: list[str], processes: int = 2, told=lambda row: None) -> list[dict]:
    """Rows of families, each surveyed in a process of its own, in the order of their names."""
    queue: Queue[str] = Queue()
    for name in names:
        queue.put(name)
    rows: dict[str, dict] = {}

    def serve() -> None:
        child, served = None, 0
        while True:
            try:
                family = queue.get_nowait()
            except Empty:
                break
            if child is None or served % PER_PROCESS == 0:
                _end(child)
                child = subprocess.Popen(
                    [sys.executable, __file__, "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, text=True,
                )  # fmt: skip
            served += 1
            child.stdin.write(f"{family}\n")
            child.stdin.flush()
            answer = child.stdout.readline()
            if not answer:
                row = dict(family=family, model="", kind="", sites=0, present=0, status=FAILED)
                rows[family] = {**row, "reason": f"the process ended with {child.wait()}"}
                child = None
            else:
                rows[family] = json.loads(answer)
            told(rows[family])
        _end(child)

    threads = [threading.Thread(target=serve) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rows[name] for name in sorted(names)]


def _end(child: subprocess.Popen | None) -> None:
    if child is not None:
        child.stdin.close()
        child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        _work()
        return
    from families_page import differences, read, write
    from small_families import families

    start, every = time.perf_counter(), sorted(families())
    wrong = [name for name in args.families if name not in every]
    if wrong:
        parser.error(f"{', '.join(wrong)}: not in transformers' mappings of decoders")

    def tell(row: dict) -> None:
        print(f"{row['family']}: {row['status']}, {row['sites']} of {row['present']}: {row['reason']}", flush=True)

    rows = survey_all(args.families or every, args.processes, tell)
    counts = Counter(row["status"] for row in rows)
    print(f"\n{len(rows)} families in {time.perf_counter() - start:.0f} s: {dict(counts)}")
    if args.markdown is not None:
        others = read(args.markdown) if args.families and args.markdown.is_file() else []
        mine = {row["family"] for row in rows}
        write(
            args.markdown, sorted([*rows, *(o for o in others if o["family"] not in mine)], key=lambda r: r["family"])
        )
    if args.compare is not None:
        found = differences(read(args.compare), rows)
        print("\n".join(found) or f"{args.compare} says the same")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
