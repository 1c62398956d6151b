"""The tokenizer of small backbones: whole words of a closed vocabulary, and letters for all other words."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # BART's ids 0 to 3
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'\"-/()&:;%$#+*"


def build_tokenizer(words: Iterable[str]) -> Tokenizer:
    """Build a lower-case WordPiece over `words` and single characters, so that it can spell any English text."""
    pieces = [*SPECIAL, *sorted(set(words)), *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
