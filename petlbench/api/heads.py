"""Interfaces of heads: a task's own, or one published with a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from petlbench.api.tokens import Tokens


class Aligner(nn.Module, ABC):
    """A head that maps images and texts into one space and compares them by cosine times a scale."""

    @abstractmethod
    def of_image(self, tokens: Tokens) -> Tensor:
        """(B, N, d) image tokens after their unimodal pass -> unit vectors (B, e)."""

    @abstractmethod
    def of_text(self, tokens: Tokens) -> Tensor:
        """(B, N, d) text tokens after their unimodal pass -> unit vectors (B, e)."""

    @abstractmethod
    def scale(self) -> Tensor:
        """Return the scalar that multiplies similarities."""

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """(I, e), (C, e) unit vectors -> (I, C) logits."""
        return self.scale() * image @ text.T


class Grounder(nn.Module, ABC):
    """A head that finds the one box that fused tokens describe, on the unit square as canvas."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tensor:
        """(B, N, d) fused tokens -> (B, 4) boxes (cx, cy, w, h) in units of the backbone's image side."""
