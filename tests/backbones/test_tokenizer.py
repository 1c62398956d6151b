"""The small backbones' tokenizer encodes any English text and decodes it again."""

from __future__ import annotations

from petlbench.backbones.weights.tokenizer import SPECIAL, build_tokenizer
from tests.backbone_factory import small_tiny


def test_any_english_sentence_can_be_spelt() -> None:
    backbone = small_tiny()
    sentence = 'The Xylophone\'s owner paid $5, or 40% less: "really?" (Yes/no & more - ok!)'
    for tokenizer in (backbone.codec.tokenizer.backend_tokenizer, build_tokenizer(["red", "the"])):
        assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3]
        assert "<unk>" not in tokenizer.encode(sentence).tokens
        ids = tokenizer.encode("The red Xylophone and a quagga").ids
        assert (ids[0], ids[-1]) == (0, 2)
        assert tokenizer.decode(ids) == "the red xylophone and a quagga"
    assert build_tokenizer(["red"]).encode("red rye").tokens == ["<s>", "red", "r", "##y", "##e", "</s>"]
    texts = backbone.texts(["red", "the red circle on the left of the square"], max_length=6)
    assert texts.ids.shape == (2, 6) and texts.mask.tolist()[0] == [True] * 3 + [False] * 3
    assert texts.ids[0, 3:].tolist() == [backbone.pad_id] * 3 and texts.ids[1, -1] == backbone.eos_id
    assert backbone.text_of([0, *texts.ids[0].tolist()]) == "red"
