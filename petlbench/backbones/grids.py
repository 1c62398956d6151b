"""Where things stand: an image on a larger canvas, and the tokens of an image that is cut into a grid of cells."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """How an image lies on a square canvas; by default as large as it can be, and in the middle.

    `across` and `down` are shares, in [0, 1], of the room that is left: drawn uniformly, they make every whole pixel
    equally likely, and 0.5 is the middle, rounded towards the upper left.
    """

    long_side: float = 1.0  # of the image, as a share of the canvas's side; in (0, 1]
    across: float = 0.5
    down: float = 0.5

    def ratio(self, size: tuple[int, int], canvas: int) -> float:
        """What an image of `size` (width, height) is enlarged by on a canvas of so many pixels a side."""
        return canvas * self.long_side / max(size)

    def corner(self, size: tuple[int, int], canvas: int) -> tuple[int, int]:
        """(left, top) in pixels of the canvas, for an image that is `size` (width, height) large there."""
        left, top = (
            max(0, math.ceil(share * (canvas - length + 1)) - 1)
            for share, length in zip((self.across, self.down), size, strict=True)
        )
        return left, top


def cell_centres(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """(rows * columns, 2): the centres (x, y) of cells of side one, row by row from the upper left."""
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5


def whole_and_cells(rows: int, columns: int, whole: int = 1, device: torch.device | None = None) -> Tensor:
    """(whole + rows * columns, 2) in units of the sides: `whole` tokens that stand for the image, then its cells."""
    cells = cell_centres(rows, columns, device)
    middle = cells.new_full((whole, 2), 0.5)
    return torch.cat([middle, cells / torch.tensor([columns, rows], device=device)])
