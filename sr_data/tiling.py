"""Where a large image is cut into sub-images, so that HR and LR tiles of every scale cover the same scene."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sr_data.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Squares of `tile_px` on HR, `step_px` apart; smaller steps overlap."""

    tile_px: int
    step_px: int

    def check(self, scales: Sequence[int]) -> None:
        """DataError if a tile's corner could fall between two LR pixels at one of these scales."""
        unit = math.lcm(*scales)
        for flag, value in (("--tile-px", self.tile_px), ("--tile-step-px", self.step_px)):
            if value < 1 or value % unit:
                below, above = value // unit * unit, (value // unit + 1) * unit
                raise DataError(f"{flag}={value} is not a multiple of {unit}, which the scales "
                                f"{', '.join(map(str, scales))} need; use {above} or {max(below, unit)}")  # fmt: skip
        if self.step_px > self.tile_px:
            raise DataError(f"--tile-step-px={self.step_px} is more than --tile-px={self.tile_px}: "
                            "parts of the images would be lost")  # fmt: skip

    def boxes(self, height: int, width: int, scales: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
        """(top, left, height, width) of each tile on an HR image, all multiples of every scale.

        The last row and column of tiles are moved back to the image's edge rather than left out; an image smaller than
        a tile is one smaller tile. At most `lcm(scales) - 1` pixels at the bottom and right are lost.
        """
        unit = math.lcm(*scales)
        height, width = height - height % unit, width - width % unit
        for top in self._starts(height):
            for left in self._starts(width):
                yield top, left, min(self.tile_px, height), min(self.tile_px, width)

    def _starts(self, length: int) -> list[int]:
        if length < 1:
            return []
        starts = list(range(0, max(length - self.tile_px, 0) + 1, self.step_px))
        last = max(length - self.tile_px, 0)
        return starts if starts[-1] == last else [*starts, last]
