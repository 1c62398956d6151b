"""Positions of the tokens of an image that is cut into a grid of cells."""

from __future__ import annotations

import torch
from torch import Tensor


def cell_centres(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Return the centres (rows * columns, 2), as (x, y), of cells of side one, row by row from the upper left."""
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5


def whole_and_cells(rows: int, columns: int, whole: int = 1, device: torch.device | None = None) -> Tensor:
    """Return centres (whole + rows * columns, 2) in units of the sides: `whole` tokens for the image, then cells."""
    cells = cell_centres(rows, columns, device)
    middle = cells.new_full((whole, 2), 0.5)
    return torch.cat([middle, cells / torch.tensor([columns, rows], device=device)])
