"""BEiT-3's tokenizer returns the ids of the original (see tests/golden/multiway_adapter)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

from petlbench.backbones.weights.sentencepiece_codec import PIECES, SentencePieceCodec
from petlbench.core.errors import UserError
from tests.beit3_factory import golden_json


def field(number: int, kind: int, payload: bytes) -> bytes:
    """Return one protobuf field: with its length before `payload` (kind 2), or without."""
    return bytes([number << 3 | kind]) + (varint(len(payload)) if kind == 2 else b"") + payload


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and payload of the fields of a message whose fields are messages."""
    at = 0
    while at < len(data):
        number, length, shift = data[at] >> 3, 0, 0
        at += 1
        while True:
            length |= (data[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 128:
                break
        yield number, data[at : at + length]
        at += length


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceCodec:
    """A model of 64,000 pieces with the golden ones where beit3.spm has them, and its normaliser."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("a dog runs\nthe dog sleeps\ntwo dogs\n" * 9, encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "small"), vocab_size=24, model_type="unigram",
        normalization_rule_name="nmt_nfkc", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    rest = [(number, payload) for number, payload in messages((folder / "small.model").read_bytes()) if number != 1]
    cases = golden_json("g10_tokenizer")
    known = {i - 1: piece for case in cases for i, piece in zip(case["ids"], case["pieces"], strict=True)}
    special = {0: ("<unk>", 2), 1: ("<s>", 3), 2: ("</s>", 3)}
    pieces = []
    for index in range(PIECES):
        text, kind = special.get(index, (known.get(index, f"\N{LOWER ONE EIGHTH BLOCK}filler{index}"), 1))
        score = np.float32(-1.0 if index in known else -50.0).tobytes()
        piece = field(1, 2, text.encode()) + field(2, 5, score) + field(3, 0, varint(kind))
        pieces.append(field(1, 2, piece))
    path = folder / "beit3.spm"
    path.write_bytes(b"".join([*pieces, *(field(number, 2, payload) for number, payload in rest)]))
    return SentencePieceCodec(lambda: path)


def test_ids_are_those_of_the_original(codec: SentencePieceCodec) -> None:
    for case in golden_json("g10_tokenizer"):
        assert codec.ids(case["text"]) == case["ids"], case["text"]


def test_rows_begin_end_are_cut_and_padded_as_in_the_original(codec: SentencePieceCodec) -> None:
    segments = golden_json("g9_index")["segments"]
    assert len(segments) == 3
    for case in segments:
        text = codec.decode(case["input"])
        assert codec.ids(text) == case["input"]
        ids, mask = codec.encode([text], case["max_len"])
        assert ids[0].tolist() == case["tokens"][: case["n"]] and mask.all() and mask.shape == (1, case["n"])
    longest = max(segments, key=lambda case: case["n"])
    ids, mask = codec.encode([codec.decode(case["input"]) for case in segments], 8)
    assert ids.shape == (3, longest["n"])
    assert ids.tolist() == [case["tokens"] for case in segments]
    assert (~mask).long().tolist() == [case["padding_mask"] for case in segments]


def test_what_no_piece_covers_is_unknown_and_specials_have_no_text(codec: SentencePieceCodec) -> None:
    assert codec.ids("a \N{SNOWMAN}") == [10, 190, 3]
    assert codec.decode([0, 10, 1152, 3, 2, 1, 64_001, 64_009]) == "a dog"
    assert codec.encode([""], 8)[0].tolist() == [[0, 2]]
    assert (codec.pad_id, codec.start_id, codec.eos_id) == (1, 0, 2) and len(codec) == 64_002


def test_a_file_that_is_not_the_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("a dog runs\nthe dog sleeps\n" * 9, encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "small"),
        vocab_size=24,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"has \d+ pieces, not 64000"):
        SentencePieceCodec(lambda: tmp_path / "small.model").ids("a dog")
    with pytest.raises(UserError, match=r"corpus\.txt is not a SentencePiece model") as caught:
        SentencePieceCodec(lambda: tmp_path / "corpus.txt").ids("a dog")
    assert "\n" not in str(caught.value)
