"""Pictures of coloured shapes on a grid, and questions about them with exact answers.

    from popmm.zoo.shapes import draw, questions, random_scene
    scene = random_scene(random.Random(0))
    draw(scene).save("picture.png")
    [(q.kind, q.text, q.answer) for q in questions(scene, random.Random(0))]

What a picture shows is drawn from the seed alone, so training and held-out pictures differ by their seeds.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

from PIL import Image, ImageDraw

GRID = 4
SIZE = 112  # pixels
CELL = SIZE // GRID
_FINE = 4  # drawn so much larger, then shrunk

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (31, 90, 200),
    "yellow": (235, 195, 20),
    "purple": (140, 70, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
BACKGROUNDS = ((255, 255, 255), (240, 236, 225), (225, 235, 245), (235, 235, 235))
KINDS = ("count", "where", "what", "next", "describe")
GREETING = ("Hello.", "Hello. Show me a picture of shapes and ask me about it.")


@dataclass(frozen=True)
class Thing:
    """A shape in a cell of the grid; rows and columns count from 0."""

    row: int
    column: int
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and how it is drawn."""

    things: tuple[Thing, ...]  # in reading order
    background: tuple[int, int, int]
    drawing: int  # seed of sizes and offsets

    def at(self, row: int, column: int) -> Thing | None:
        return next((thing for thing in self.things if (thing.row, thing.column) == (row, column)), None)


@dataclass(frozen=True)
class Question:
    kind: str  # of KINDS
    text: str
    answer: str


def random_scene(generator: random.Random, least: int = 2, most: int = 7) -> Scene:
    """``least`` to ``most`` shapes in different cells."""
    cells = generator.sample(range(GRID * GRID), generator.randint(least, most))
    things = [
        Thing(*divmod(cell, GRID), generator.choice(list(COLOURS)), generator.choice(SHAPES)) for cell in sorted(cells)
    ]
    return Scene(tuple(things), generator.choice(BACKGROUNDS), generator.randrange(1 << 30))


def bundled_scene() -> Scene:
    """What the bundled picture shows (``popmm.zoo.picture()``)."""
    return random_scene(random.Random(36), least=4, most=4)


def draw(scene: Scene) -> Image.Image:
    """The picture, ``SIZE`` x ``SIZE`` RGB."""
    generator = random.Random(scene.drawing)
    image = Image.new("RGB", (SIZE * _FINE, SIZE * _FINE), scene.background)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        radius = generator.uniform(0.4, 0.46) * CELL * _FINE
        room = CELL * _FINE / 2 - radius
        x = (thing.column + 0.5) * CELL * _FINE + generator.uniform(-room, room)
        y = (thing.row + 0.5) * CELL * _FINE + generator.uniform(-room, room)
        _draw_shape(canvas, thing.shape, x, y, radius, COLOURS[thing.colour])
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple) -> None:
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        canvas.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif shape == "cross":
        for wide, high in ((r, 0.32 * r), (0.32 * r, r)):
            canvas.rectangle((x - wide, y - high, x + wide, y + high), fill=colour)
    else:
        corners = {"triangle": (1.0,) * 3, "diamond": (1.0, 0.75) * 2, "star": (1.0, 0.4) * 5}[shape]
        angles = [2 * math.pi * i / len(corners) for i in range(len(corners))]
        canvas.polygon([(x + k * r * math.sin(a), y - k * r * math.cos(a)) for k, a in zip(corners, angles)], colour)


def questions(scene: Scene, generator: random.Random, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """One question of each kind, in random order; kinds that the scene allows none of are left out."""
    asked = [_ASK[kind](scene, generator) for kind in kinds]
    asked = [question for question in asked if question is not None]
    generator.shuffle(asked)
    return asked


def _place(row: int, column: int) -> str:
    return f"row {NUMBERS[row + 1]}, column {NUMBERS[column + 1]}"


def _unique(scene: Scene) -> list[Thing]:
    """Things that colour and shape name without doubt."""
    seen = Counter(map(str, scene.things))
    return [thing for thing in scene.things if seen[str(thing)] == 1]


def _with_article(noun: str) -> str:
    return f"a {noun}"


def _count(scene: Scene, generator: random.Random) -> Question:
    thing = generator.choice(scene.things)
    colour, shape = thing.colour, thing.shape
    if generator.random() < 0.2:  # of which there may be none
        colour, shape = generator.choice([*COLOURS]), generator.choice(SHAPES)
    form = generator.choice(("all", "colour", "shape", "shape"))
    wanted = {"all": None, "colour": colour, "shape": shape}[form]
    counted = [t for t in scene.things if wanted in (None, t.colour, t.shape)]
    one, many = {
        "all": ("shape", "shapes"),
        "colour": (f"{colour} shape", f"{colour} shapes"),
        "shape": (shape, "crosses" if shape == "cross" else f"{shape}s"),
    }[form]
    text = generator.choice(("How many {} are there?", "How many {} are in the picture?", "Count the {}.")).format(many)
    n = len(counted)
    return Question("count", text, f"There is one {one}." if n == 1 else f"There are {NUMBERS[n]} {many}.")


def _where(scene: Scene, generator: random.Random) -> Question | None:
    if not _unique(scene):
        return None
    thing = generator.choice(_unique(scene))
    text = generator.choice(("Where is the {}?", "In which row and column is the {}?")).format(thing)
    return Question("where", text, f"The {thing} is in {_place(thing.row, thing.column)}.")


def _what(scene: Scene, generator: random.Random) -> Question:
    empty = [divmod(i, GRID) for i in range(GRID * GRID) if scene.at(*divmod(i, GRID)) is None]
    thing = generator.choice(scene.things)
    row, column = generator.choice(empty) if generator.random() < 0.2 else (thing.row, thing.column)
    thing = scene.at(row, column)
    text = generator.choice(("What is in {}?", "Which shape is in {}?")).format(_place(row, column))
    found = "nothing" if thing is None else _with_article(str(thing))
    return Question("what", text, f"In {_place(row, column)} there is {found}.")


def _next(scene: Scene, generator: random.Random) -> Question | None:
    """What lies beside a thing: two steps, finding it and looking beside it."""
    steps = {"right of": (0, 1), "left of": (0, -1), "above": (-1, 0), "below": (1, 0)}
    options = []
    for thing in _unique(scene):
        for words, (down, right) in steps.items():
            if 0 <= thing.row + down < GRID and 0 <= thing.column + right < GRID:
                options.append((thing, words, scene.at(thing.row + down, thing.column + right)))
    if not options:
        return None
    occupied = [option for option in options if option[2] is not None]
    thing, words, found = generator.choice(occupied if occupied and generator.random() < 0.8 else options)
    answer = "nothing" if found is None else _with_article(str(found))
    text = generator.choice(("What is just {} the {}?", "Which shape is just {} the {}?")).format(words, thing)
    return Question("next", text, f"Just {words} the {thing} there is {answer}.")


def _describe(scene: Scene, generator: random.Random) -> Question:
    text = generator.choice(("Describe the picture.", "What do you see?", "What is in the picture?"))
    rows = []
    for row in range(GRID):
        things = [thing for thing in scene.things if thing.row == row]
        if things:
            listed = ", ".join(f"{_with_article(str(t))} in column {NUMBERS[t.column + 1]}" for t in things)
            rows.append(f"Row {NUMBERS[row + 1]}: {listed}.")
    return Question("describe", text, " ".join(rows))


_ASK = {"count": _count, "where": _where, "what": _what, "next": _next, "describe": _describe}
