"""Text to token ids and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class Codec(ABC):
    """A tokenizer with the ids that decoding needs."""

    pad_id: int
    start_id: int  # what decoding starts from
    eos_id: int

    @abstractmethod
    def __len__(self) -> int:
        """Ids run from 0 to this, exclusive."""

    @abstractmethod
    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Ids (B, N) with special tokens, truncated to `max_length`, padded to the longest; True where real (B, N)."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens dropped."""
