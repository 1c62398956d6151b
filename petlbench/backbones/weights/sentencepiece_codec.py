"""BEiT-3's tokenizer: a SentencePiece model with the id numbers of XLM-RoBERTa."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from petlbench.api.codec import Codec
from petlbench.core.errors import UserError

PIECES = 64_000
START, PAD, END, UNKNOWN, MASK = 0, 1, 2, 3, PIECES + 1


class SentencePieceCodec(Codec):
    """Id = index of the piece + 1, except <s> 0, <pad> 1, </s> 2, <unk> 3 (piece 0) and <mask> 64001.

    `locate` returns the model file, and is called only for the first text: counting parameters needs no file.
    """

    pad_id, start_id, eos_id = PAD, START, END

    def __init__(self, locate: Callable[[], Path]) -> None:
        self._locate = locate

    def __len__(self) -> int:
        return MASK + 1

    @cached_property
    def _model(self) -> SentencePieceProcessor:
        """Load the model. Raise UserError if the file is not a SentencePiece model or has another number of pieces."""
        path = self._locate()
        try:
            model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            message = " ".join(str(error).split())[:120]
            raise UserError(
                f"tokenizer {path} is not a SentencePiece model ({message}): fetch beit3.spm again"
            ) from error
        if len(model) != PIECES:
            raise UserError(f"tokenizer {path} has {len(model)} pieces, not {PIECES}: it is not beit3.spm; fetch that")
        return model

    def ids(self, text: str) -> list[int]:
        """Return ids without special tokens, not truncated."""
        return [piece + 1 if piece else UNKNOWN for piece in self._model.encode(text)]

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        rows = [[START, *self.ids(text)[: max_length - 2], END] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(longest) < lengths[:, None]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; drop special ids and ids without a piece: BEiT-3's table has more rows than pieces."""
        text: str = self._model.decode([i - 1 for i in map(int, ids) if UNKNOWN < i <= PIECES])
        return text.strip()
