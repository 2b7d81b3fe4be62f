"""``popmm zoo list | get``: the models that ``zoo:NAME`` stands for."""

from __future__ import annotations

import argparse

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from popmm.cli.terminal import print_json
from popmm.evaluation.progress import for_people
from popmm.zoo import bundled, fetched


def zoo(args: argparse.Namespace) -> None:
    (_list if args.action == "list" else _get)(args)


def _list(args: argparse.Namespace) -> None:
    rows = [
        dict(name=name, folder=str(bundled.path(name)), there=True, download=0, licence="Apache-2.0, bundled")
        for name in bundled.names()
    ]
    rows += [
        dict(
            name=name,
            folder=str(fetched.folder_of(name, args.folder)),
            there=fetched.is_there(name, args.folder),
            download=model.bytes,
            licence=model.licence,
        )
        for name, model in fetched.MODELS.items()
    ]
    if args.json:
        print_json(rows)
        return
    for row in rows:
        missing = f"not yet here: popmm zoo get {row['name']} downloads {row['download'] / 1e6:.0f} MB"
        print(f"zoo:{row['name']:18} {row['folder'] if row['there'] else missing} ({row['licence']})")


def _get(args: argparse.Namespace) -> None:
    names, made = args.names or list(fetched.SMALL), []
    models = {name: fetched.known(name) for name in names}  # a wrong name before any download
    from popmm.zoo.making import get

    console = for_people()
    for name, model in models.items():
        console.print(
            f"{name}: {model.title}, from its {model.quantised} file ({model.origin})\nlicence: {model.licence}",
            soft_wrap=True,
        )
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(name, total=None)

            def show(what: str, done: int, of: int, bar=bar, task=task, name=name) -> None:
                bar.update(task, description=f"{name}: {what}", completed=done, total=of)
                if what != "downloading":  # transformers draws a bar of its own
                    bar.stop()

            folder = get(name, args.folder, show)
        made.append(dict(name=name, folder=str(folder), licence=model.licence))
        if not args.json:
            print(folder)
    if args.json:
        print_json(made)
    if args.folder is not None:
        console.print(
            f"give the folder as --model, or set {fetched.FOLDER_VARIABLE}={args.folder} for zoo:NAME", soft_wrap=True
        )
