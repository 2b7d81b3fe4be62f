"""Imports run one way through the rooms, and in no circle; those for type checkers count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import popmm
from popmm.layouts.base import LayoutContract

HOME = Path(popmm.__file__).parent
ADAPTERS = Path(popmm.adapters.__file__).parent
# from the top: a room may import from those below it, and from itself
ORDER = [
    "cli",
    "evaluation serving",
    "surface",
    "engines",
    "runtime",
    "layouts",
    "adapters",
    "method",
    "kernels",
    "base",
]
SURFACE = ("popmm", "popmm.attach", "popmm.state", "popmm.report", "popmm.budget", "popmm.conversation")
BASE = (
    "popmm.config",
    "popmm.checks",
    "popmm.compat",
    "popmm.compat.caches",
    "popmm.compat.generation",
    "popmm.compat.inductor",
    "popmm.compat.models",
    "popmm.compat.serving",
    "popmm.compat.serving.app",
    "popmm.compat.serving.batched",
    "popmm.compat.serving.engine",
    "popmm.compat.serving.plain",
    "popmm.compat.serving.sampling",
    "popmm.act",
)  # what every room may know; zoo knows no room and serves the upper ones


def _modules() -> dict[str, Path]:
    files = {file: f"popmm.{'.'.join(file.relative_to(HOME).with_suffix('').parts)}" for file in HOME.rglob("*.py")}
    files |= {file: f"popmm.adapters.{file.stem}" for file in ADAPTERS.glob("*.py")}
    return {name.removesuffix(".__init__"): file for file, name in files.items()}


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """Modules of popmm that a module imports, anywhere in it."""
    found = set()
    package = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([package, node.module or ""]).strip(".") if node.level else node.module
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return {other for other in found if other in MODULES and other != name}


def _room(name: str) -> str:
    if name in SURFACE:
        return "surface"
    return "base" if name in BASE else name.split(".")[1]


def _rank(name: str) -> int:
    return next((i for i, rooms in enumerate(ORDER) if _room(name) in rooms.split()), -1)


def test_every_module_has_a_room():
    homeless = [name for name in MODULES if _rank(name) < 0 and _room(name) != "zoo"]
    assert not homeless


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name):
    room, rank = _room(name), _rank(name)
    for other in _imports(name):
        theirs = _room(other)
        if other == "popmm" or theirs == room:
            continue
        if room == "zoo" or theirs == "zoo":
            assert theirs in ("zoo", "base") and (room == "zoo" or rank <= ORDER.index("surface")), f"{name} -> {other}"
        else:
            assert _rank(other) > rank, f"{name} ({room}) imports {other} ({theirs})"


def test_no_two_modules_import_each_other_by_any_way_round():
    graph = {name: _imports(name) for name in MODULES if name != "popmm"}
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if not other.startswith(f"{name}.") and not name.startswith(f"{other}."):  # a room and what is in it
                    walk(other, [*way, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])


LONGEST, MOST_METHODS = 300, 15
# what a caller of one object may ask of it all: these grow with the library's surface and hold no other work
GREAT_CLASSES = {"PartitionState": "everything that a user can ask of an attached model, a few lines each"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_classes_stay_readable(name):
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= LONGEST, f"{name} is long: give what it does besides a file of its own"
    contract = {"__init__", *(name for name in vars(LayoutContract) if not name.startswith("_"))}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name not in GREAT_CLASSES:
            methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)} - contract
            assert len(methods) <= MOST_METHODS, f"{node.name} has {len(methods)} methods beside its contract's"
