"""``popmm serve``: an OpenAI-compatible server of one model."""

from __future__ import annotations

import argparse
import warnings

from popmm.cli.arguments import config_from
from popmm.evaluation.progress import for_people


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, loads the model and serves it until it is told to stop."""
    from popmm.serving import check_installed
    from popmm.serving.limits import Limits

    check_installed()
    config = config_from(args)
    limits = Limits(
        running=args.max_running,
        waiting=args.max_waiting,
        megabytes=args.max_megabytes,
        seconds=args.max_seconds,
        new_tokens=args.new_tokens,
        cache_tokens=args.cache_tokens,
        grace=args.grace,
    )
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: give a number up to 65535")
    together = args.continuous_batching
    if args.statistics == "prompt":  # which many sequences do not share
        if together:
            raise ValueError("--continuous-batching: --statistics prompt is of one prompt; leave it out")
        together = False
    from popmm.report import human_bytes
    from popmm.serving.server import Server
    from popmm.zoo.loading import load_model

    with for_people().status(f"loading {args.model}"):
        server = Server(
            args.model,
            lambda: load_model(args.model, args.dtype, args.device),
            config,
            limits,
            host=args.host,
            port=args.port,
            together=together,
            share_prefixes=args.share_prefixes,
        )
    read, dense = server.state.bytes_per_token()
    many = f"up to {limits.running} sequences at once" if server.engine.batches else "one request after the other"

    if args.host not in ("127.0.0.1", "localhost", "::1"):
        warnings.warn(f"{args.host}: whoever can reach it may use it, there is no key", stacklevel=2)

    def started() -> None:
        for_people().print(
            f"{args.model} at http://{args.host}:{server.port}/v1, {many}, reading {human_bytes(read)} of "
            f"{human_bytes(dense)} FFN weights per token ({read / dense:.1%}); Ctrl-C stops it",
            style="dim",
            soft_wrap=True,
            markup=False,
        )

    server.run(started)
