"""What tasks ask of a head, whether it is their own or one that a backbone was published with."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from petlbench.api.tokens import Tokens


class Aligner(nn.Module, ABC):
    """Puts images and texts into one space, to be compared by cosine times a scale."""

    @abstractmethod
    def of_image(self, tokens: Tokens) -> Tensor:
        """(B, N, d) image tokens after their unimodal pass -> unit vectors (B, e)."""

    @abstractmethod
    def of_text(self, tokens: Tokens) -> Tensor:
        """(B, N, d) text tokens after their unimodal pass -> unit vectors (B, e)."""

    @abstractmethod
    def scale(self) -> Tensor:
        """What similarities are multiplied by, a scalar."""

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """(I, e), (C, e) unit vectors -> (I, C) logits."""
        return self.scale() * image @ text.T


class Grounder(nn.Module, ABC):
    """Finds the one box that fused tokens speak of, on a canvas that is the unit square."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tensor:
        """(B, N, d) fused tokens -> (B, 4) boxes (cx, cy, w, h) in units of the backbone's image side."""
