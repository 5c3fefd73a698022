"""Small pictures of weights and their sets, drawn with Pillow."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

# dark violet → teal → yellow, readable with colour blindness, like viridis
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)
SET_NAMES = ("reservoir", "exploring", "active")  # in the order of their tiers
# red, green, blue and opacity: grey, orange and blue, each of another lightness, and legible on white and on black
SET_COLOURS = np.array([(182, 191, 203, 255), (230, 126, 20, 255), (64, 128, 234, 255)], dtype=np.uint8)
_BARS = {name: tuple(colour[:3].tolist()) for name, colour in zip(SET_NAMES, SET_COLOURS, strict=True)}
_LINE = "#c80000"  # of the thresholds between the bars


def heatmap(columns: Sequence[Mapping[str, float]], cell: int = 14) -> Image.Image:
    """Draw values in [0, top] as an image: one named row per weight, one column per refresh, a colour scale below.

    Args:
        columns: for each refresh, weight name → value.
        cell: height of a row in pixels; if the columns exceed 1,000 pixels, they are averaged.
    """
    names = sorted({name for column in columns for name in column}, key=list(columns[-1]).index)
    values = np.array([[column.get(name, 0.0) for column in columns] for name in names])
    if values.shape[1] > 1000:
        values = np.stack([part.mean(axis=1) for part in np.array_split(values, 1000, axis=1)], axis=1)
    top = max(float(values.max()), 1e-12)
    width = max(1, min(cell * 2, 1000 // values.shape[1]))
    label_width = 8 + max(7 * len(name) for name in names)
    image = Image.new(
        "RGB", (label_width + max(values.shape[1] * width, 240) + 8, (len(names) + 2) * cell + 8), "white"
    )
    pixels = np.kron(_colour(values / top), np.ones((cell - 1, width, 1), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(names):
        strip = pixels[row * (cell - 1) : (row + 1) * (cell - 1)]
        image.paste(Image.fromarray(strip), (label_width, 4 + row * cell))
        draw.text((4, 4 + row * cell), name, fill="black")
    scale = np.broadcast_to(_colour(np.linspace(0, 1, 120)[None]), (cell - 4, 120, 3)).copy()
    base = 8 + (len(names) + 0) * cell + 6
    image.paste(Image.fromarray(scale), (label_width + 20, base))
    draw.text((label_width + 8, base), "0", fill="black")
    draw.text((label_width + 146, base), f"{top:.3g}", fill="black")
    return image


def _colour(shares: np.ndarray) -> np.ndarray:
    stops = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(shares, stops, _COLOURS[:, channel]) for channel in range(3)], axis=-1).astype(np.uint8)


def mask_picture(tiers: np.ndarray, longest: int = 512) -> Image.Image:
    """Draw the sets of one weight: outputs downwards, inputs across, kernels as small blocks with transparent gaps.

    Args:
        tiers: 0 reservoir, 1 exploring, 2 active, in the weight's shape.
        longest: the longest side of the picture in pixels. Smaller masks are enlarged; in larger masks a pixel is a
            block of entries, whose colour is stronger the more of them are updated.
    """
    shares = block_shares(torch.from_numpy(tiers), longest).numpy()
    # Blocks of many entries would all look grey, so colours are scaled to the block with the most updated entries.
    pixels = colour_shares(shares / max(float(shares.sum(axis=-1).max()), 1e-6))
    grow = max(1, longest // max(pixels.shape[:2]))
    pixels = pixels.repeat(grow, axis=0).repeat(grow, axis=1)
    if tiers.ndim > 2 and grow > 1:  # gaps between the kernels
        height, width = (grow * side for side in _kernel(tiers.shape))
        pixels[height - 1 :: height] = 0
        pixels[:, width - 1 :: width] = 0
    return Image.fromarray(pixels)


def on_white(image: Image.Image) -> Image.Image:
    """Return a picture with white gaps."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def block_shares(tiers: Tensor, longest: int) -> Tensor:
    """Return the shares of exploring and of active entries in blocks of a weight: rows × columns × 2, in float32.

    Args:
        tiers: as of `mask_picture`, on any device.
        longest: blocks along a side, at most; a weight with fewer entries along it has one block for each.
    """
    matrix = as_matrix(tiers)
    sets = torch.stack([matrix == tier for tier in (1, 2)]).float()
    block = [block_side(side, longest) for side in matrix.shape]
    return functional.avg_pool2d(sets, block, ceil_mode=True).permute(1, 2, 0)


def block_side(side: int, longest: int) -> int:
    """Return how many entries along a side make a block, so that it has at most `longest` blocks."""
    return max(1, -(-side // longest))


def colour_shares(shares: np.ndarray) -> np.ndarray:
    """Return the pixels of blocks with these shares of exploring and of active entries: rows × columns × 4, uint8."""
    rest = 1 - shares.sum(axis=-1, keepdims=True)
    return (np.concatenate([rest, shares], axis=-1) @ SET_COLOURS.astype(np.float32)).round().astype(np.uint8)


def _kernel(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return height and width of a kernel from one input to one output; slices of a 3-D kernel are side by side."""
    *rest, width = shape[2:]
    return (rest[-1] if rest else 1), width * int(np.prod(rest[:-1], dtype=int))


def as_matrix(tiers: Tensor) -> Tensor:
    """Return a weight as it is drawn: outputs × inputs, each of them a kernel."""
    if tiers.ndim < 2:
        return tiers.reshape(1, -1)
    outputs, inputs = tiers.shape[:2]
    if tiers.ndim == 2:
        return tiers
    height, width = _kernel(tiers.shape)
    if tiers.ndim == 5:
        tiers = tiers.swapaxes(2, 3)  # the rows of all slices, side by side
    blocks = tiers.reshape(outputs, inputs, height, width)
    return blocks.swapaxes(1, 2).reshape(outputs * height, inputs * width)


def histogram_picture(
    groups: Mapping[str, tuple[np.ndarray, np.ndarray]], thresholds: Mapping[str, float]
) -> Image.Image:
    """Draw counts of magnitudes by set, on a logarithmic scale, and the thresholds at which the sets meet.

    Args:
        groups: set name → counts and bin edges, as returned by `np.histogram`.
        thresholds: set name → its smallest magnitude, drawn as a vertical line with a label above.
    """
    width, height, left, top = 440, 160, 8, 24
    image = Image.new("RGB", (left + width + 8, top + height + 40), "white")
    draw = ImageDraw.Draw(image)
    edge = max((float(edges[-1]) for _, edges in groups.values()), default=1.0) or 1.0
    most = max((int(counts.max()) for counts, _ in groups.values()), default=1)
    for name, (counts, edges) in groups.items():
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            if count:
                tall = height * np.log1p(count) / np.log1p(most)
                begin, end = (left + width * float(x) / edge for x in (low, high))
                draw.rectangle((begin, top + height - tall, max(begin, end - 1), top + height), fill=_BARS[name])
    for value in thresholds.values():
        x = left + width * value / edge
        draw.line((x, top - 4, x, top + height), fill=_LINE)
    said = ", ".join(f"{name} from {value:.3g}" for name, value in thresholds.items())
    draw.text((left, 2), said, fill=_LINE)
    draw.line((left, top + height, left + width, top + height), fill="black")
    draw.text((left, top + height + 4), "0", fill="black")
    draw.text((left + width, top + height + 4), f"{edge:.3g}", fill="black", anchor="ra")
    x = left
    for name in (name for name in SET_NAMES[::-1] if name in groups):
        draw.rectangle((x, top + height + 24, x + 8, top + height + 32), fill=_BARS[name])
        draw.text((x + 12, top + height + 22), name, fill="black")
        x += 24 + 7 * len(name)
    draw.text((x + 8, top + height + 22), "entries by magnitude, log scale", fill="black")
    return image
