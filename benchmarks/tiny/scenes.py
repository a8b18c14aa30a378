"""Seeded scenes for flashvlm-tiny: objects with words and numbers beside them, and questions with one-word answers.

A scene is a function of one integer, and so are its questions. Splits are disjoint ranges of these integers.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 336
PATCH = 14
GRID = SIDE // PATCH
# In patch_owners: 1 + i is the i-th object of the scene, TEXT_OWNER + i the text beside it.
TEXT_OWNER = 32

SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
PLURALS = ["circles", "squares", "triangles", "stars", "crosses", "rings"]
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
RGB = [(214, 30, 36), (32, 150, 50), (30, 80, 220), (245, 220, 40), (140, 40, 170), (245, 130, 20)]
RGB += [(246, 246, 246), (16, 16, 16)]
WORDS = ["cat", "dog", "sun", "cup", "bus", "tree", "fish", "milk", "stop", "exit", "open", "taxi"]
WORDS += ["bank", "cafe", "park", "shop", "hotel", "pizza", "news", "sale", "gate", "zoo", "book", "king"]
NUMBERS = [str(number) for number in range(10, 100)]
GLYPHS = sorted({glyph for value in WORDS + NUMBERS for glyph in value.upper()})
COUNTS = ["one", "two", "three", "four"]
PLACES = ["at the top left", "at the top", "at the top right", "at the left", "in the middle", "at the right"]
PLACES += ["at the bottom left", "at the bottom", "at the bottom right"]
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
KINDS = ["colour", "shape", "existence", "counting", "relation", "reading", "place"]
ANSWERS = {
    "colour": COLOURS,
    "shape": SHAPES,
    "existence": ["yes", "no"],
    "counting": COUNTS,
    "relation": ["yes", "no"],
    "reading": WORDS + NUMBERS,
    "place": ["left", "right", "top", "bottom"],
}
SPLITS = {"train": (0, 10_000_000), "dev": (10_000_000, 11_000_000), "test": (11_000_000, 12_000_000)}

_PHOTOGRAPHS = ["astronaut.png", "chelsea.png", "coffee.png", "color.png", "motorcycle_left.png", "rocket.jpg"]
_PHOTOGRAPHS += ["brick.png", "grass.png", "gravel.png", "camera.png", "coins.png", "hubble_deep_field.jpg", "ihc.png"]


@dataclass(frozen=True)
class Text:
    """A word or a number; ``box`` is left, top, right, bottom in pixels, the end exclusive."""

    value: str
    box: tuple[int, int, int, int]
    size: int
    style: int


@dataclass(frozen=True)
class Thing:
    """An object; ``x``, ``y`` (its centre) and ``radius`` (half its side) are in pixels."""

    shape: int
    colour: int
    x: int
    y: int
    radius: int
    text: Text | None = None

    @property
    def name(self) -> str:
        """Unique in its scene."""
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels, the end exclusive."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Scene:
    """What is to be drawn, and the seed for how."""

    seed: int
    things: list[Thing]

    def name(self, index: int) -> str:
        """Colour and shape; every other time the shape alone, where no other object has it."""
        thing = self.things[index]
        alone = sum(other.shape == thing.shape for other in self.things) == 1
        return SHAPES[thing.shape] if alone and (self.seed + index) % 2 else thing.name


@dataclass(frozen=True)
class Question:
    """``mentions``: (number of words up to and including the name's last word, index of the thing named).

    ``total``: the same number of words and how many there are, for counting.
    """

    kind: str
    text: str
    answer: str
    mentions: list[tuple[int, int]] = field(default_factory=list)
    total: tuple[int, int] | None = None


# --- scenes -----------------------------------------------------------------------------------------------------------


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@functools.cache
def _extent(value: str, size: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = _font(size).getbbox(value.upper())
    return int(left), int(top), math.ceil(right), math.ceil(bottom)


def _free(box: tuple[int, int, int, int], taken: list[tuple[int, int, int, int]], gap: int) -> bool:
    if box[0] < 2 or box[1] < 2 or box[2] > SIDE - 2 or box[3] > SIDE - 2:
        return False
    return all(
        box[2] + gap <= other[0] or other[2] + gap <= box[0] or box[3] + gap <= other[1] or other[3] + gap <= box[1]
        for other in taken
    )


def _skewed(rng: np.random.Generator, count: int) -> np.ndarray:
    """Probabilities of which a few are large, so that some shapes and colours repeat in a scene."""
    weights = np.exp(1.1 * rng.standard_normal(count))
    return weights / weights.sum()


def make_scene(seed: int) -> Scene:
    """Four to eight objects, no two of the same colour and shape; two to four have a word or a number beside them."""
    rng = np.random.default_rng([seed, 1])
    shapes, colours = _skewed(rng, len(SHAPES)), _skewed(rng, len(COLOURS))
    wanted, texts = int(rng.integers(4, 9)), int(rng.integers(2, 5))
    things: list[Thing] = []
    taken: list[tuple[int, int, int, int]] = []
    for _ in range(60):
        if len(things) == wanted:
            break
        radius = int(rng.integers(13, 21) if rng.random() < 0.55 else rng.integers(24, 40))
        x, y = (int(value) for value in rng.integers(radius + 3, SIDE - radius - 3, 2))
        shape, colour = int(rng.choice(len(SHAPES), p=shapes)), int(rng.choice(len(COLOURS), p=colours))
        thing = Thing(shape, colour, x, y, radius)
        if any(other.shape == shape and other.colour == colour for other in things) or not _free(thing.box, taken, 6):
            continue
        taken.append(thing.box)
        if texts:
            text = _text_beside(thing, taken, rng)
            if text is not None:
                texts -= 1
                taken.append(text.box)
                thing = Thing(shape, colour, x, y, radius, text)
        things.append(thing)
    return Scene(seed, things)


def _text_beside(thing: Thing, taken: list[tuple[int, int, int, int]], rng: np.random.Generator) -> Text | None:
    value = str(rng.choice(WORDS)) if rng.random() < 0.5 else str(rng.choice(NUMBERS))
    size = int(rng.choice([20, 22, 24, 26]))
    left, top, right, bottom = _extent(value, size)
    width, height = right - left + 6, bottom - top + 6
    left, top, right, bottom = thing.box
    for side in rng.permutation(4):
        slide = int(rng.integers(-6, 7))
        across, down = thing.x - width // 2 + slide, thing.y - height // 2 + slide
        x, y = [(across, bottom + 2), (across, top - 2 - height), (right + 2, down), (left - 2 - width, down)][side]
        box = (x, y, x + width, y + height)
        # Its own object is two pixels away, everything else at least twelve.
        if _free(box, [other for other in taken if other != thing.box], 12):
            return Text(value, box, size, int(rng.integers(4)))
    return None


# --- pictures ---------------------------------------------------------------------------------------------------------


@functools.cache
def _photographs() -> list[Image.Image]:
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the photographs in the background come with scikit-image: pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    pictures = [Image.open(folder / name).convert("RGB") for name in _PHOTOGRAPHS]
    for picture in pictures:
        picture.thumbnail((800, 800))
    return pictures


def _background(rng: np.random.Generator) -> Image.Image:
    style = rng.random()
    if style < 0.45:
        photographs = _photographs()
        picture = photographs[int(rng.integers(len(photographs)))]
        side = int(rng.integers(min(160, min(picture.size) - 1), min(picture.size)))
        x, y = int(rng.integers(picture.width - side + 1)), int(rng.integers(picture.height - side + 1))
        canvas = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
        if rng.random() < 0.4:
            canvas = canvas.filter(ImageFilter.BoxBlur(int(rng.integers(1, 4))))
        plain = Image.new("RGB", canvas.size, tuple(int(value) for value in rng.integers(60, 200, 3)))
        return Image.blend(canvas, plain, float(rng.uniform(0.15, 0.55)))
    base = rng.integers(90, 190, 3)
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in base))
    if style < 0.9:
        draw = ImageDraw.Draw(canvas)
        for _ in range(int(rng.integers(10, 60))):
            colour = tuple(int(value) for value in np.clip(base + rng.integers(-60, 61, 3), 40, 220))
            x, y, width, height = (int(value) for value in rng.integers((-40, -40, 6, 6), (SIDE, SIDE, 130, 130)))
            figure = int(rng.integers(4))
            if figure == 0:
                draw.line((x, y, x + width, y + height - 60), fill=colour, width=int(rng.integers(1, 6)))
            elif figure == 1:
                draw.rectangle((x, y, x + width, y + height), fill=colour)
            elif figure == 2:
                draw.arc((x, y, x + width, y + height), 0, int(rng.integers(90, 360)), fill=colour, width=3)
            else:
                draw.polygon([(x, y), (x + width, y + 9), (x + 5, y + height)], fill=colour)
    return canvas


@functools.cache
def _mask(shape: int, radius: int) -> Image.Image:
    side = 2 * radius
    scale = 4
    mask = Image.new("L", (side * scale, side * scale))
    draw = ImageDraw.Draw(mask)
    end = side * scale - 1
    name = SHAPES[shape]
    if name in ("circle", "ring"):
        draw.ellipse((0, 0, end, end), fill=255)
        if name == "ring":
            inner = round(0.27 * end)
            draw.ellipse((inner, inner, end - inner, end - inner), fill=0)
    elif name == "square":
        inset = round(0.06 * end)
        draw.rectangle((inset, inset, end - inset, end - inset), fill=255)
    elif name == "triangle":
        draw.polygon([(end / 2, 0), (end, 0.93 * end), (0, 0.93 * end)], fill=255)
    elif name == "cross":
        low, high = 0.34 * end, 0.66 * end
        draw.rectangle((low, 0, high, end), fill=255)
        draw.rectangle((0, low, end, high), fill=255)
    else:
        points = []
        for corner in range(10):
            reach, angle = end / 2 * (1 if corner % 2 == 0 else 0.42), math.pi * (corner / 5 - 0.5)
            points.append((end / 2 + reach * math.cos(angle), 0.52 * end + reach * math.sin(angle)))
        draw.polygon(points, fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of 336 x 336 pixels."""
    rng = np.random.default_rng([scene.seed, 2])
    canvas = _background(rng)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        left, top, _, _ = thing.box
        mask = _mask(thing.shape, thing.radius)
        colour = np.clip(np.array(RGB[thing.colour]) + rng.integers(-12, 13, 3), 0, 255)
        rim = (245, 245, 245) if COLOURS[thing.colour] in ("black", "blue", "purple") else (20, 20, 20)
        if rng.random() < 0.7:
            canvas.paste(rim, (left - 1, top - 1), mask)
            canvas.paste(rim, (left + 1, top + 1), mask)
        canvas.paste(tuple(int(value) for value in colour), (left, top), mask)
        if thing.text is not None:
            text = thing.text
            dark, light = (15, 15, 15), (245, 245, 245)
            ink, ground = (dark, light) if text.style % 2 else (light, dark)
            x0, y0, _, _ = _extent(text.value, text.size)
            if text.style < 2:
                draw.rectangle((text.box[0], text.box[1], text.box[2] - 1, text.box[3] - 1), fill=ground)
            draw.text(
                (text.box[0] + 3 - x0, text.box[1] + 3 - y0),
                text.value.upper(),
                font=_font(text.size),
                fill=ink,
                stroke_width=0 if text.style < 2 else 2,
                stroke_fill=ground,
            )
    noise = rng.standard_normal((SIDE // 2, SIDE // 2, 1), dtype=np.float32) * float(rng.uniform(0, 8))
    noise = noise.astype(np.int16).repeat(2, 0).repeat(2, 1)
    return Image.fromarray(np.clip(np.asarray(canvas, np.int16) + noise, 0, 255).astype(np.uint8))


def patch_owners(scene: Scene) -> np.ndarray:
    """``[24, 24]`` int8: 0 background, 1 + i the i-th object, 32 + i the text beside it.

    A patch belongs to an object that covers an eighth of it or holds its centre, and to a text whose box covers a
    quarter of it.
    """
    owners = np.zeros((GRID, GRID), np.int8)
    best = np.zeros((GRID, GRID), np.float32)
    for index, thing in enumerate(scene.things):
        _claim(owners, best, 1 + index, thing.box, np.asarray(_mask(thing.shape, thing.radius)) > 127, 1 / 8)
        if thing.text is not None:
            left, top, right, bottom = thing.text.box
            full = np.ones((bottom - top, right - left), bool)
            _claim(owners, best, TEXT_OWNER + index, thing.text.box, full, 1 / 4)
        row, column = thing.y // PATCH, thing.x // PATCH
        owners[row, column], best[row, column] = 1 + index, 2
    return owners


def glyph_columns(text: Text) -> np.ndarray:
    """``[24]`` int8: the glyph that covers most of each column of patches, as its place in ``GLYPHS``, or -1."""
    value = text.value.upper()
    start = text.box[0] + 3 - _extent(text.value, text.size)[0]
    edges = start + np.array([_font(text.size).getlength(value[:end]) for end in range(len(value) + 1)])
    left = np.arange(GRID)[:, None] * PATCH
    covered = np.minimum(left + PATCH, edges[1:]) - np.maximum(left, edges[:-1])
    glyphs = np.array([GLYPHS.index(glyph) for glyph in value], np.int8)
    return np.where(covered.max(1) > 0, glyphs[covered.argmax(1)], -1).astype(np.int8)


def _claim(
    owners: np.ndarray, best: np.ndarray, owner: int, box: tuple[int, int, int, int], mask: np.ndarray, share: float
) -> None:
    left, top, right, bottom = box
    rows = slice(top // PATCH, -(-bottom // PATCH))
    columns = slice(left // PATCH, -(-right // PATCH))
    height, width = rows.stop - rows.start, columns.stop - columns.start
    layer = np.zeros((height * PATCH, width * PATCH), np.float32)
    y, x = top - rows.start * PATCH, left - columns.start * PATCH
    layer[y : y + bottom - top, x : x + right - left] = mask
    covered = layer.reshape(height, PATCH, width, PATCH).mean((1, 3))
    wins = (covered >= share) & (covered > best[rows, columns])
    owners[rows, columns][wins] = owner
    best[rows, columns][wins] = covered[wins]


# --- questions --------------------------------------------------------------------------------------------------------


def _cell(position: int) -> int | None:
    """Third of the side, or None within ten pixels of a border between thirds."""
    third = SIDE / 3
    near = min(abs(position - third), abs(position - 2 * third))
    return None if near < 10 else int(position // third)


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def candidates(scene: Scene, kind: str) -> list[Question]:
    """Every question of ``kind`` that has one clear answer in ``scene``."""
    things = scene.things
    shapes = [thing.shape for thing in things]
    colours = [thing.colour for thing in things]
    found: list[Question] = []
    if kind == "colour":
        for index, thing in enumerate(things):
            if shapes.count(thing.shape) == 1:
                text = f"What colour is the {SHAPES[thing.shape]}?"
                found.append(Question(kind, text, COLOURS[thing.colour], [(5, index)]))
    elif kind == "shape":
        cells = [(_cell(thing.y), _cell(thing.x)) for thing in things]
        for place, words in enumerate(PLACES):
            row, column = divmod(place, 3)
            # An object on a border might count as being here too.
            maybe = [i for i, (y, x) in enumerate(cells) if y in (row, None) and x in (column, None)]
            if len(maybe) == 1 and cells[maybe[0]] == (row, column):
                text = f"Which shape is {words}?"
                found.append(Question(kind, text, SHAPES[shapes[maybe[0]]], [(3 + len(words.split()), maybe[0])]))
    elif kind == "existence":
        pairs = {(thing.colour, thing.shape) for thing in things}
        for colour, first in enumerate(COLOURS):
            for shape, second in enumerate(SHAPES):
                text = f"Is there {_a(f'{first} {second}')}?"
                if (colour, shape) in pairs:
                    index = next(i for i, thing in enumerate(things) if (thing.colour, thing.shape) == (colour, shape))
                    found.append(Question(kind, text, "yes", [(5, index)]))
                else:
                    found.append(Question(kind, text, "no"))
    elif kind == "counting":
        for shape in set(shapes):
            if shapes.count(shape) <= len(COUNTS):
                text = f"How many {PLURALS[shape]} are there?"
                count = shapes.count(shape)
                found.append(Question(kind, text, COUNTS[count - 1], total=(3, count)))
        for colour in set(colours):
            if colours.count(colour) <= len(COUNTS):
                text = f"How many {COLOURS[colour]} objects are there?"
                count = colours.count(colour)
                found.append(Question(kind, text, COUNTS[count - 1], total=(4, count)))
    elif kind == "relation":
        for i, j in itertools.permutations(range(len(things)), 2):
            for words, (across, down) in RELATIONS.items():
                gap = across * (things[i].x - things[j].x) + down * (things[i].y - things[j].y)
                if abs(gap) >= 48:
                    parts = f"Is the {scene.name(i)}", f" {words} the {scene.name(j)}"
                    mentions = [(len(parts[0].split()), i), (len("".join(parts).split()), j)]
                    found.append(Question(kind, "".join(parts) + "?", "yes" if gap > 0 else "no", mentions))
    elif kind == "reading":
        for index, thing in enumerate(things):
            if thing.text is not None:
                what = "number" if thing.text.value.isdigit() else "word"
                text = f"What {what} is beside the {scene.name(index)}"
                found.append(Question(kind, text + "?", thing.text.value, [(len(text.split()), index)]))
    elif kind == "place":
        for index, thing in enumerate(things):
            text = f"Is the {scene.name(index)}"
            mentions = [(len(text.split()), index)]
            if abs(thing.x - SIDE // 2) >= 24:
                answer = "left" if thing.x < SIDE // 2 else "right"
                found.append(Question(kind, text + " on the left or on the right?", answer, mentions))
            if abs(thing.y - SIDE // 2) >= 24:
                answer = "top" if thing.y < SIDE // 2 else "bottom"
                found.append(Question(kind, text + " at the top or at the bottom?", answer, mentions))
    return found


def _closest(no: list[Question], scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Half of the time, objects that are absent though their colour and their shape are both present."""
    if rng.random() < 0.5:
        return no
    shapes = {SHAPES[thing.shape] for thing in scene.things}
    colours = {COLOURS[thing.colour] for thing in scene.things}
    near = [q for q in no if q.text[:-1].split()[-1] in shapes and q.text[:-1].split()[-2] in colours]
    return near or no


def draw_question(scene: Scene, kind: str, rng: np.random.Generator, answer: str | None = None) -> Question | None:
    """A question of ``kind``, its answer drawn evenly from those that the scene allows (or as given), or None."""
    found = candidates(scene, kind)
    allowed = sorted({question.answer for question in found})
    if answer is None:
        if not allowed:
            return None
        weights = np.array([_WEIGHTS.get((kind, value), 1.0) for value in allowed])
        answer = str(rng.choice(allowed, p=weights / weights.sum()))
    found = [question for question in found if question.answer == answer]
    if kind == "existence" and answer == "no":
        found = _closest(found, scene, rng)
    return found[int(rng.integers(len(found)))] if found else None


# High counts are rare in scenes; these weights make the four answers about equally frequent in training.
_WEIGHTS = {("counting", "one"): 0.25, ("counting", "two"): 0.5, ("counting", "three"): 1.6, ("counting", "four"): 4.0}


def held_out(split: str, count: int) -> list[tuple[int, Question]]:
    """``count`` questions as (seed of the scene, question): kinds in turn, answers even within each kind."""
    rng = np.random.default_rng([SPLITS[split][0], 3])
    seed = SPLITS[split][0]
    decks: dict[str, list[str]] = {kind: [] for kind in KINDS}
    chosen: list[tuple[int, Question]] = []
    while len(chosen) < count:
        kind = KINDS[len(chosen) % len(KINDS)]
        if not decks[kind]:
            decks[kind] = [str(answer) for answer in rng.permutation(ANSWERS[kind])]
        answer = decks[kind].pop()
        question = None
        while question is None:
            seed += 1
            question = draw_question(make_scene(seed), kind, rng, answer)
        chosen.append((seed, question))
    return chosen
