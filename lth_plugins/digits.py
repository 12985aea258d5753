"""Real handwritten digits, and small scenes drawn with them.

The scans are the 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships ("Optical
Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
1998). One fixed split serves pre-training (`DigitDataset`) and transfer (`render_scene`), so
nothing seen in training is ever tested on. Writing scenes to disk in COCO and mmseg layout is
`tools/make_digit_scenes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from lth_plugins.errors import ConfigError, unknown

SPLITS = ("train", "test")
CLASSES = tuple("0123456789")

MIN_SCENE_SIDE, MAX_SCENE_SIDE = 64, 2048
"""Sides, in pixels, that `render_scene` accepts."""

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Look:
    """How scenes, and digits to pre-train on, are drawn.

    Attributes:
        digits: the fewest and the most digits that a scene is to hold.
        sizes: smallest and largest height, in pixels, that the 8 rows of a scan are drawn to
            (log-uniform; never more than half the scene's shorter side).
        overlap: the most that two boxes may share, as a fraction of the smaller one.
        grounds: ranges of the background's mean luminance, 0 to 1; one is drawn.
        texture: how strong the background's gradient, noise and lines are.
        contrast: the least difference in luminance between ink and the ground below it.
    """

    digits: tuple[int, int]
    sizes: tuple[float, float]
    overlap: float
    grounds: tuple[tuple[float, float], ...]
    texture: float
    contrast: float


BUSY, CALM = "busy", "calm"
LOOKS = {
    BUSY: Look((2, 6), (20.0, 64.0), 0.35, ((0.1, 0.9),), texture=1.0, contrast=0.4),
    CALM: Look((1, 3), (32.0, 48.0), 0.0, ((0.1, 0.25), (0.75, 0.9)), texture=0.3, contrast=0.55),
}
"""Looks by name. A network learns calm scenes in a minute or two on a CPU, busy ones do not."""

_MIN_VISIBLE = 0.6  # of a digit's ink

_TEST_EVERY = 5
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@cache
def load_scans(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The scans of one split, in the order of `sklearn.datasets.load_digits`.

    Of each class, counted in that order, every fifth scan (the 5th, 10th, ...) is test and the
    others are train: 355 and 1,442 scans, stratified, the same everywhere. No scan occurs
    twice, but the source does not say who wrote what: the splits share its 13 writers.

    Args:
        split: `'train'` or `'test'`.

    Returns:
        `(images, labels)`, both read-only: images uint8 [N, 8, 8], 0 paper to 255 ink (the 17 grey
        levels of the source, spread out); labels int64 [N], 0 to 9.

    Raises:
        ConfigError: for any other split.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    source = load_digits()
    labels = source.target.astype(np.int64)
    is_test = np.zeros(len(labels), bool)
    for digit in range(len(CLASSES)):
        is_test[np.flatnonzero(labels == digit)[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    chosen = is_test if split == "test" else ~is_test
    images = np.rint(source.images[chosen] * (255 / 16)).astype(np.uint8)
    labels = labels[chosen]
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


class DigitDataset(Dataset[tuple[Any, int]]):
    """The scans of one split, as images to pre-train on: `(image, label)` pairs.

    Images are PIL RGB of `size` x `size` pixels, so torchvision's and lightly's transforms apply as
    they do to ImageNet; labels are ints 0 to 9, also in `targets`. Plain, an image is the scan
    up-sampled (bicubic), light ink on black, and always the same. With `augment`, it is drawn anew
    each time the way `render_scene` draws a digit: turned, sheared, moved, in any colours, on a
    textured background. That randomness comes from torch's global generator, as in torchvision's
    transforms, so `torch.manual_seed` and the seeds of `DataLoader` workers govern it.

    Args:
        split: `'train'` or `'test'`, as in `load_scans`.
        size: side of the images in pixels, at least 8.
        augment: draw each image anew.
        transform: applied last, to the PIL image; `None` returns the PIL image itself.
        look: a name in `LOOKS`: the background and the ink of images that are drawn.

    Raises:
        ConfigError: for an unknown split or look, or a size below 8.
    """

    classes = CLASSES

    def __init__(
        self,
        split: str,
        size: int = 32,
        augment: bool = False,
        transform: Callable[[Image.Image], Any] | None = None,
        look: str = BUSY,
    ) -> None:
        if size < 8:
            raise ConfigError(f"size is {size}, but the scans are 8 pixels wide: give 8 or more")
        self.scans, labels = load_scans(split)
        self.targets: list[int] = labels.tolist()
        self.split = split
        self.size = size
        self.augment = augment
        self.transform = transform
        self.look = look_named(look)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._drawn(index) if self.augment else self._plain(index)
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def _plain(self, index: int) -> Image.Image:
        scan = Image.fromarray(self.scans[index])
        return scan.resize((self.size, self.size), Image.Resampling.BICUBIC).convert("RGB")

    def _drawn(self, index: int) -> Image.Image:
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        canvas = _background(rng, self.size, self.size, self.look)
        ink = _ink(rng, self.scans[index], self.size * rng.uniform(0.35, 0.9))
        ink = _middle(ink, self.size)
        height, width = ink.shape
        top = int(rng.integers(self.size - height + 1))
        left = int(rng.integers(self.size - width + 1))
        colour = _ink_colour(rng, canvas, [], self.look)
        _stain(canvas[top : top + height, left : left + width], ink, colour)
        return Image.fromarray(_to_uint8(canvas))


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with N digits in it, and the truth about it. Arrays, pixel units, N >= 1."""

    image: NDArray[np.uint8]
    """[H, W, 3], RGB."""
    boxes: NDArray[np.int64]
    """[N, 4]: x, y, width, height (as COCO) of the smallest box around each visible mask."""
    labels: NDArray[np.int64]
    """[N], 0 to 9."""
    masks: NDArray[np.bool_]
    """[N, H, W]: the ink of each digit that no later digit covers; disjoint, never empty."""
    label_map: NDArray[np.uint8]
    """[H, W]: 0 background, digit d is d + 1."""
    scans: NDArray[np.int64]
    """[N]: which scan of `load_scans(split)` each digit was drawn from."""


def render_scene(
    rng: np.random.Generator,
    split: str,
    *,
    min_size: int = 96,
    max_size: int = 160,
    look: str = BUSY,
) -> Scene:
    """Draw one scene: real digits of many sizes, colours and slants on a textured background.

    Digits are drawn one over the other. Ink is what a digit's mask holds, not its box, so a digit
    that covers another removes pixels from it. A digit that finds no place where every digit under
    it stays at least `_MIN_VISIBLE` visible is left out altogether, so no scene holds ink that is
    not annotated, and a crowded scene may hold fewer digits than its look wants (never none).

    Args:
        rng: all randomness comes from here; the same state gives the same scene.
        split: whose scans to use, as in `load_scans`.
        min_size: smallest side of the scene, pixels. Height and width are drawn separately.
        max_size: largest side, inclusive.
        look: a name in `LOOKS`.

    Raises:
        ConfigError: for an unknown split or look, or sides that are out of range or in the wrong
            order.
    """
    check_scene_sides(min_size, max_size)
    style = look_named(look)
    images, labels = load_scans(split)
    height, width = (int(n) for n in rng.integers(min_size, max_size + 1, size=2))
    canvas = _background(rng, height, width, style)
    placed: list[_Placed] = []
    smallest, largest = style.sizes
    largest = min(largest, min(height, width) / 2)
    for _ in range(rng.integers(style.digits[0], style.digits[1] + 1)):
        scan = int(rng.integers(len(images)))
        size = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
        ink = _ink(rng, images[scan], size)
        spot = _find_spot(rng, ink, placed, (height, width), style.overlap)
        if spot is None:
            continue
        under = [p for p in placed if _shared(spot.box, p.box) > 0]
        x, y, w, h = spot.box
        region = canvas[y : y + h, x : x + w]
        colour = _ink_colour(rng, region, [p.colour for p in under], style)
        _stain(region, ink, colour)
        for p in under:
            p.mask &= ~spot.mask
        placed.append(_Placed(scan, spot.mask, spot.box, spot.area, colour))

    masks = np.stack([p.mask for p in placed])
    scans = np.array([p.scan for p in placed], np.int64)
    label_map = np.zeros((height, width), np.uint8)
    for mask, label in zip(masks, labels[scans], strict=True):
        label_map[mask] = label + 1
    return Scene(
        image=_to_uint8(canvas),
        boxes=np.array([_tight_box(mask) for mask in masks], np.int64),
        labels=labels[scans],
        masks=masks,
        label_map=label_map,
        scans=scans,
    )


def check_scene_sides(min_size: int, max_size: int) -> None:
    """Raise `ConfigError` unless `render_scene` can draw scenes with such sides, in pixels."""
    if not MIN_SCENE_SIDE <= min_size <= max_size <= MAX_SCENE_SIDE:
        raise ConfigError(
            f"scene sides from {min_size} to {max_size} px: expected "
            f"{MIN_SCENE_SIDE} <= smallest <= largest <= {MAX_SCENE_SIDE}"
        )


def look_named(name: str) -> Look:
    """The look of a name in `LOOKS`, or `ConfigError`."""
    if name not in LOOKS:
        raise unknown("look", name, LOOKS)
    return LOOKS[name]


Box = tuple[int, int, int, int]  # x, y, width, height


@dataclass
class _Spot:
    """Where a digit may go. `box` is the patch of ink, soft edges included; `mask` is [H, W]."""

    mask: NDArray[np.bool_]
    box: Box
    area: int


@dataclass
class _Placed:
    """A digit on the canvas; `mask` loses what later digits cover, `area` is what it began with."""

    scan: int
    mask: NDArray[np.bool_]
    box: Box
    area: int
    colour: FloatArray


def _find_spot(
    rng: np.random.Generator,
    ink: FloatArray,
    placed: list[_Placed],
    shape: tuple[int, int],
    overlap: float,
) -> _Spot | None:
    h, w = ink.shape
    for _ in range(25):  # tries
        x, y = int(rng.integers(shape[1] - w + 1)), int(rng.integers(shape[0] - h + 1))
        box = (x, y, w, h)
        if any(_shared(box, p.box) > overlap * min(w * h, p.box[2] * p.box[3]) for p in placed):
            continue
        mask = np.zeros(shape, bool)
        mask[y : y + h, x : x + w] = ink >= 0.5
        if all((p.mask & ~mask).sum() >= _MIN_VISIBLE * p.area for p in placed):
            return _Spot(mask, box, int(mask.sum()))
    return None


def _shared(a: Box, b: Box) -> int:
    """Area two boxes share, in pixels."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _tight_box(mask: NDArray[np.bool_]) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _ink(rng: np.random.Generator, scan: NDArray[np.uint8], size: float) -> FloatArray:
    """Opacity [h, w], 0 to 1, of a scan drawn `size` px high, a little turned, sheared, stretched.

    Cut to its ink, which is at most 1.7 times `size` either way.
    """
    angle, shear = rng.uniform(-0.25, 0.25, size=2)
    stretch = rng.uniform(0.85, 1.15)
    cos, sin = math.cos(angle), math.sin(angle)
    side = math.ceil(size * 1.7)
    padded = np.pad(scan.astype(np.float32) / 255, 2)
    # From image to scan, the inverse of: stretch and shear, then turn, then scale.
    scale = 8 / size
    a, b = scale * (cos + shear * sin) / stretch, scale * (sin - shear * cos) / stretch
    d, e = -scale * sin, scale * cos
    middle, centre = side / 2, padded.shape[0] / 2
    patch = Image.fromarray(padded).transform(
        (side, side),
        Image.Transform.AFFINE,
        (a, b, centre - (a + b) * middle, d, e, centre - (d + e) * middle),
        Image.Resampling.BICUBIC,
    )
    # Interpolated 8 x 8 scans are a blur; a steeper ramp around half ink gives back pen strokes.
    opacity = ((np.asarray(patch, np.float32) - 0.25) / 0.4).clip(0, 1)
    x, y, w, h = _tight_box(opacity > 0)
    return opacity[y : y + h, x : x + w]


def _middle(ink: FloatArray, side: int) -> FloatArray:
    """The middle of a patch, at most `side` px either way."""
    top, left = (max(n - side, 0) // 2 for n in ink.shape)
    return ink[top : top + side, left : left + side]


def _stain(region: FloatArray, ink: FloatArray, colour: FloatArray) -> None:
    """Put ink [h, w] of one colour on a region [h, w, 3], in place."""
    region += ink[..., None] * (colour - region)


def _ink_colour(
    rng: np.random.Generator, region: FloatArray, neighbours: list[FloatArray], look: Look
) -> FloatArray:
    """A colour [3] that stands out from a region [h, w, 3] and from the ink it overlaps."""
    ground = float(region.mean(axis=(0, 1)) @ _LUMINANCE)
    candidates = []
    for _ in range(8 if neighbours else 1):
        room = [side for side in (-ground, 1 - ground) if abs(side) >= look.contrast + 0.05]
        side = room[rng.integers(len(room))]
        luminance = ground + side * rng.uniform(look.contrast / abs(side), 1)
        candidates.append(_colour(rng, luminance))
    return max(
        candidates, key=lambda c: min((float(np.abs(c - n).max()) for n in neighbours), default=0)
    )


def _colour(rng: np.random.Generator, luminance: float) -> FloatArray:
    """An RGB colour [3], 0 to 1, of about this luminance and any hue."""
    hue = rng.uniform(-0.3, 0.3, size=3).astype(np.float32)
    return np.clip(luminance + hue - hue @ _LUMINANCE, 0, 1).astype(np.float32)


def _background(rng: np.random.Generator, height: int, width: int, look: Look) -> FloatArray:
    """A textured ground, float32 [height, width, 3], about 0 to 1: colour, gradient, noise, lines.

    Textures stay well under the contrast of the ink, so digits stay legible.
    """
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.2)
    down = np.linspace(-0.5, 0.5, height, dtype=np.float32) * np.float32(slope * math.sin(angle))
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32) * np.float32(slope * math.cos(angle))
    texture: FloatArray = down[:, None] + across
    texture += _noise(rng, height, width, 0.03)
    for grain in (4, 16):
        coarse = Image.fromarray(_noise(rng, height // grain + 2, width // grain + 2, 0.06))
        texture += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))

    lines = Image.new("F", (width, height))
    pen = ImageDraw.Draw(lines)
    for _ in range(rng.integers(6)):
        ends = rng.uniform(0, 1, size=(2, 2)) * (width, height)
        thickness = int(rng.integers(1, 3))
        pen.line(ends.ravel().tolist(), fill=rng.uniform(-0.15, 0.15), width=thickness)
    texture += np.asarray(lines)

    tint = rng.uniform(0.5, 1.5, size=3).astype(np.float32)
    texture *= np.float32(look.texture)
    grounds = look.grounds
    darkest, lightest = grounds[rng.integers(len(grounds))]
    return _colour(rng, rng.uniform(darkest, lightest)) + texture[..., None] * tint


def _noise(rng: np.random.Generator, height: int, width: int, strongest: float) -> FloatArray:
    """Normal noise [height, width] of a random strength (standard deviation) up to `strongest`."""
    strength = np.float32(rng.uniform(0, strongest))
    return strength * rng.standard_normal((height, width), dtype=np.float32)


def _to_uint8(canvas: FloatArray) -> NDArray[np.uint8]:
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
