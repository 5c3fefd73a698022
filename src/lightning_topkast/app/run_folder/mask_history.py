"""`masks.json`: the masks of a few weights over a run, coarse, which the report steps through."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Base64UrlBytes, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lightning_topkast.app.errors import AppError
from lightning_topkast.app.run_folder.result import Count, Name
from lightning_topkast.errors import TopKastError
from lightning_topkast.files import atomic_file, read_file

FILE = "masks.json"
MOST_MOMENTS, MOST_WEIGHTS, MOST_BLOCKS = 32, 6, 64  # blocks along a side

_MOST_BYTES = 1 << 23  # all of that takes 2 MiB, and names and shapes beside it
_SETS = 2  # exploring and active


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class DrawnWeight(_Part):
    """A weight: its name and shape, the sides of its picture in entries, and their number of blocks."""

    name: Name
    shape: Annotated[list[Count], Field(max_length=16)]
    height: Annotated[int, Field(ge=1, lt=1 << 63)]
    width: Annotated[int, Field(ge=1, lt=1 << 63)]
    rows: Annotated[int, Field(ge=1, le=MOST_BLOCKS)]
    columns: Annotated[int, Field(ge=1, le=MOST_BLOCKS)]


class Shares(_Part):
    """Shares of exploring and active entries in the blocks of a weight: bytes, of which 255 stands for `top`."""

    top: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    blocks: Annotated[Base64UrlBytes, Field(max_length=_SETS * MOST_BLOCKS**2)]


class Moment(_Part):
    """The masks of all drawn weights, from this step and refresh on."""

    step: Count
    refresh: Count
    masks: Annotated[list[Shares], Field(max_length=MOST_WEIGHTS)]


class MaskHistory(_Part):
    """The masks over a run: those at the start, at `every` so many refreshes, and at the end."""

    format: Literal[1] = 1
    every: Annotated[int, Field(ge=1, lt=1 << 63)]
    weights: Annotated[list[DrawnWeight], Field(max_length=MOST_WEIGHTS)]
    moments: Annotated[list[Moment], Field(max_length=MOST_MOMENTS)]

    @model_validator(mode="after")
    def _fits(self) -> MaskHistory:
        sizes = [_SETS * weight.rows * weight.columns for weight in self.weights]
        if any([len(mask.blocks) for mask in moment.masks] != sizes for moment in self.moments):
            raise ValueError("a mask has another size than its weight")
        steps = [moment.step for moment in self.moments]
        if steps != sorted(steps):
            raise ValueError("its steps do not increase")
        refreshes = [moment.refresh for moment in self.moments]
        if refreshes != sorted(set(refreshes)):
            raise ValueError("its refreshes do not increase")
        return self

    def shares(self, number: int) -> np.ndarray:
        """Return the shares of a weight: moments × rows × columns × (exploring, active), float32 in [0, 1]."""
        weight, masks = self.weights[number], [moment.masks[number] for moment in self.moments]
        blocks = np.array([np.frombuffer(mask.blocks, dtype=np.uint8) for mask in masks], dtype=np.float32)
        tops = np.array([mask.top for mask in masks], dtype=np.float32)
        return (blocks / 255).reshape(len(masks), weight.rows, weight.columns, _SETS) * tops[:, None, None, None]


def as_bytes(shares: np.ndarray) -> Shares:
    """Return the shares of one weight at one moment, rounded."""
    top = float(shares.max())
    blocks = (shares * (255 / (top or 1))).round().astype(np.uint8).tobytes()
    return Shares.model_construct(top=min(top, 1.0), blocks=blocks)


def write_mask_history(folder: Path, history: MaskHistory) -> None:
    """Write `masks.json` atomically."""
    with atomic_file(folder / FILE) as partial:
        partial.write_text(history.model_dump_json(), encoding="utf-8")


def read_mask_history(folder: Path) -> MaskHistory | None:
    """Return the masks over the run in `folder`, or None if there are none.

    Raises:
        AppError: The file is damaged, not of this version, or no file.
        OSError: The file cannot be read.
    """
    path = folder / FILE
    try:
        return MaskHistory.model_validate_json(read_file(path, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except TopKastError as error:
        raise AppError(str(error)) from error
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) + ": " if first["loc"] else ""
        raise AppError(f"{path} is damaged ({where}{first['msg'].removeprefix('Value error, ')})") from error
