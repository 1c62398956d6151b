"""The data that a backbone and a task exchange: images, texts and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from petlbench.api.sites import TEXT, Pass, Segments, mean_of_real


@dataclass(frozen=True)
class Tokens:
    """States (B, N, d) with mask (B, N) (True: real), types (B, N) and, for image tokens, grid positions (B, N, 2).

    Positions are token centres as (x, y) in units of the backbone's image side; zero for text. `segments` gives the
    types again, as runs that all rows share. `mark` (B,) is the index of the token that represents the whole, if any.
    """

    states: Tensor
    mask: Tensor
    types: Tensor
    positions: Tensor
    segments: Segments = ()
    mark: Tensor | None = None

    def of_type(self, kind: int) -> Tokens:
        """Mask all tokens except the real ones of one type; heads select by type, never by position."""
        return replace(self, mask=self.mask & (self.types == kind))

    def mean(self) -> Tensor:
        """(B, d): the mean over real tokens."""
        return mean_of_real(self.states, self.mask)

    def rows(self, index: Tensor) -> Self:
        """Return the rows at `index` (B',) of every tensor, including those of subclasses."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        picked: dict[str, Any] = {name: value[index] for name, value in tensors.items()}
        return replace(self, **picked)

    def context(self, **more: Any) -> Pass:
        """A pass over these tokens; `more` are its other fields."""
        return Pass(types=self.types, mask=self.mask, segments=self.segments, **more)

    def pooled(self) -> Tensor:
        """(B, d): the marked token, or the mean over real tokens where none is marked."""
        if self.mark is None:
            return self.mean()
        return self.states[torch.arange(len(self.states), device=self.states.device), self.mark]


def plain_tokens(states: Tensor, mask: Tensor, kind: int, **more: Any) -> Tokens:
    """Tokens of one type; without a place, unless `positions` are given."""
    types = torch.full_like(mask, kind, dtype=torch.long)
    positions = more.pop("positions", None)
    positions = states.new_zeros(*mask.shape, 2) if positions is None else positions
    return Tokens(states, mask, types, positions, ((kind, mask.shape[1]),), **more)


def decoding_pass(ids: Tensor, memory: Tokens, **more: Any) -> Pass:
    """A pass over decoded `ids` (B, T), which look at `memory` too; `more` are its other fields."""
    types, segments = torch.full_like(ids, TEXT), ((TEXT, ids.shape[1]),)
    return Pass(types=types, segments=segments, memory=memory.states, memory_mask=memory.mask, **more)


def join(parts: Sequence[Tokens]) -> Tokens:
    """One sequence of all parts, in their order; marks are dropped."""
    states, mask, types, positions = (
        torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("states", "mask", "types", "positions")
    )
    return Tokens(states, mask, types, positions, tuple(segment for part in parts for segment in part.segments))


def halves(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Tokens of 2B images -> those of the first and of the second images, B rows each."""
    rows = torch.arange(len(tokens.states), device=tokens.states.device)
    first, second = rows.chunk(2)
    return tokens.rows(first), tokens.rows(second)


@dataclass(frozen=True)
class Images:
    """Pixels (B, 3, H, W) on a padded canvas, the mask (B, H, W) of real ones, and where each image lies.

    A point (x, y) in pixels of the stored image, times `scale` (B, 2) plus `offset` (B, 2), is a point in units of the
    backbone's image side. `features` replaces the pixels if a backbone has computed features in advance.
    """

    pixels: Tensor
    mask: Tensor
    scale: Tensor
    offset: Tensor
    features: Tensor | None = None

    def to(self, device: torch.device) -> Images:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Images:
        return self._each(lambda tensor: tensor.pin_memory())

    def to_dtype(self, dtype: torch.dtype) -> Images:
        """Real numbers in another precision."""
        return self._each(lambda tensor: tensor if tensor.dtype == torch.bool else tensor.to(dtype))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Images:
        return replace(self, **{name: change(tensor) for name, tensor in vars(self).items() if tensor is not None})

    def place(self, boxes: Tensor) -> Tensor:
        """(B, 4) cx, cy, w, h in pixels of the stored images -> the same in units of the backbone's image side."""
        centre, size = boxes.split(2, dim=-1)
        return torch.cat([centre * self.scale + self.offset, size * self.scale], dim=-1)

    def unplace(self, boxes: Tensor) -> Tensor:
        """The inverse of `place`."""
        centre, size = boxes.split(2, dim=-1)
        return torch.cat([(centre - self.offset) / self.scale, size / self.scale], dim=-1)


@dataclass(frozen=True)
class Texts:
    """Token ids (B, N), padded, and their mask (True: real)."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Texts:
        return Texts(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))

    def pinned(self) -> Texts:
        return Texts(self.ids.pin_memory(), self.mask.pin_memory())


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
        """Return the scale of an image of `size` (width, height) on a canvas of `canvas` pixels a side."""
        return canvas * self.long_side / max(size)

    def corner(self, size: tuple[int, int], canvas: int) -> tuple[int, int]:
        """(left, top) in pixels of the canvas, for an image that is `size` (width, height) large there."""
        left, top = (
            max(0, math.ceil(share * (canvas - length + 1)) - 1)
            for share, length in zip((self.across, self.down), size, strict=True)
        )
        return left, top
