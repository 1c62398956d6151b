"""Text to token ids and back: one interface over the libraries' tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from petlbench.api.codec import Codec
from petlbench.core.errors import UserError


class LibraryCodec(Codec):
    """A tokenizer of transformers. `start_id`: the default is the end token, from which BART decodes."""

    def __init__(self, tokenizer: Any, *, start_id: int | None = None, eos_id: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.pad_id = int(tokenizer.pad_token_id)
        self.eos_id = int(tokenizer.eos_token_id) if eos_id is None else eos_id
        self.start_id = self.eos_id if start_id is None else start_id

    def __len__(self) -> int:
        return len(self.tokenizer)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def file_codec(path: Path) -> LibraryCodec:
    """Load a `tokenizers` JSON file with BART's special tokens, such as the packaged one of the small backbones."""
    try:
        json.loads(path.read_text(encoding="utf-8"))  # a broken file fails here, with its position
    except ValueError as error:
        raise UserError(f"tokenizer {path} is not a JSON file ({error}): fetch or make it again") from error
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return LibraryCodec(tokenizer)
