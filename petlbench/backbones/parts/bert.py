"""BERT (Devlin et al., 2019) from transformers' modules, as a text encoder with sites."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from petlbench.api.sites import Layer, Pass, Projection, Stack, SubLayer
from petlbench.backbones.parts.transformers_parts import FeedForward


class BertAttention(nn.Module):
    """A library self-attention with its output projection."""

    def __init__(self, attention: nn.Module, dense: nn.Linear) -> None:
        super().__init__()
        self.attention, self.dense = attention, dense

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        return self.dense(self.attention(x, attention_mask=context.bias)[0])


class TwiceNormed(SubLayer):
    """Residual addition and norm applied twice: with t the ordinary result, y = norm(t + x).

    So M2IST's released BERT does after the attention of the layers that it pairs with the image encoder's. Its taps are
    those of the first time.
    """

    norm_twice = True

    def forward(self, x: Tensor, context: Pass, tap: frozenset[str] = frozenset()) -> tuple[Tensor, dict[str, Tensor]]:
        t, taps = super().forward(x, context, tap)
        return self.norm(t + x), taps


def bert_layer(layer: BertLayer, *, twice: bool = False) -> Layer:
    """Post-norm: attention, ffn. `twice`: the attention's residual and norm are applied twice, see `TwiceNormed`."""
    mixing, output, kind = layer.attention.self, layer.attention.output, TwiceNormed if twice else SubLayer
    core = BertAttention(mixing, output.dense)
    projections = {role: Projection(mixing, name) for role, name in (("q", "query"), ("k", "key"), ("v", "value"))}
    projections["o"] = Projection(core, "dense")
    width = output.dense.out_features
    attention = kind(core, output.LayerNorm, output.dropout, width=width, pre_norm=False, projections=projections)
    feed = FeedForward(layer.intermediate.dense, layer.output.dense, layer.intermediate.intermediate_act_fn, 0.0)
    linear = {"in": Projection(feed, "fc1"), "out": Projection(feed, "fc2")}
    norm, drop = layer.output.LayerNorm, layer.output.dropout
    return Layer(
        attention=attention,
        ffn=SubLayer(feed, norm, drop, width=width, pre_norm=False, projections=linear),
    )


class BertWords(nn.Module):
    """Words, positions and, but for BLIP's kind of BERT, the first token type: what the embedding norm is given."""

    def __init__(self, words: nn.Embedding, positions: nn.Embedding, types: nn.Embedding | None) -> None:
        super().__init__()
        self.words, self.positions, self.types = words, positions, types

    def forward(self, ids: Tensor) -> Tensor:
        """(B, N) -> (B, N, width)."""
        x = self.words(ids)
        if self.types is not None:
            x = x + self.types.weight[0]
        return x + self.positions.weight[: ids.shape[1]]


class Bert(nn.Module):
    """What stands before BERT's layers, and after them the pooler, which is counted and never read."""

    def __init__(self, words: BertWords, drop: nn.Module, pooler: nn.Linear | None) -> None:
        super().__init__()
        self.words, self.drop, self.pooler = words, drop, pooler

    def forward(self, ids: Tensor, norm: nn.Module) -> Tensor:
        """(B, N) -> (B, N, width): what enters the first layer."""
        states: Tensor = self.drop(norm(self.words(ids)))
        return states


def build_bert(config: BertConfig, *, released: bool, paired: int) -> tuple[Bert, Stack]:
    """A library BERT taken apart into what stands around its layers, and the layers.

    `released`: M2IST's variant, without token types and pooler, and with the first `paired` layers normed twice.
    """
    library = BertModel(config, add_pooling_layer=not released)
    table = library.embeddings
    types = None if released else table.token_type_embeddings
    words = BertWords(table.word_embeddings, table.position_embeddings, types)
    layers = [bert_layer(layer, twice=released and i < paired) for i, layer in enumerate(library.encoder.layer)]
    stack = Stack(layers, width=config.hidden_size, embedding_norm=table.LayerNorm)
    return Bert(words, table.dropout, None if released else library.pooler.dense), stack


def bert_config(
    *, vocabulary: int, width: int, layers: int, heads: int, ffn: int, positions: int, dropout: float
) -> BertConfig:
    """BERT of these sizes.

    Its GELU is written out, as in the first implementation of BERT, which TransVG trains: for backward it keeps three
    tensors of the FFN's width where the library's fused one keeps one, and that is part of the published memory.
    """
    return BertConfig(
        hidden_act="gelu_python",
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
    )


_EDGES = {
    "embeddings.word_embeddings.": "words.words.",
    "embeddings.position_embeddings.": "words.positions.",
    "embeddings.token_type_embeddings.": "words.types.",
    "pooler.dense.": "pooler.",
}
_LAYER = {
    "attention.self.": "attention.core.attention.",
    "attention.output.dense.": "attention.core.dense.",
    "attention.output.LayerNorm.": "attention.norm.",
    "intermediate.dense.": "ffn.core.fc1.",
    "output.dense.": "ffn.core.fc2.",
    "output.LayerNorm.": "ffn.norm.",
}


def from_bert(tensors: Mapping[str, Tensor], tower: str, stack: str, *, released: bool) -> dict[str, Tensor]:
    """A library BERT's tensors under the names of `Bert` at `tower` and of its layers at `stack`.

    Heads of its pre-training and what the `released` variant lacks are left out; a name that is unknown stays as it is.
    """
    found: dict[str, Tensor] = {}
    left_out = ("cls.", "embeddings.position_ids") + (
        ("pooler.", "embeddings.token_type_embeddings.") if released else ()
    )
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.")
        if not name.startswith(left_out):
            found[_own_name(name, tower, stack)] = tensor
    return found


def _own_name(name: str, tower: str, stack: str) -> str:
    if name.startswith("embeddings.LayerNorm."):
        return f"{stack}.embedding_norm.{name.rpartition('.')[2]}"
    for theirs, ours in _EDGES.items():
        if name.startswith(theirs):
            return f"{tower}.{ours}{name.removeprefix(theirs)}"
    if name.startswith("encoder.layer."):
        index, rest = name.removeprefix("encoder.layer.").split(".", 1)
        for theirs, ours in _LAYER.items():
            if rest.startswith(theirs):
                return f"{stack}.layers.{index}.sublayers.{ours}{rest.removeprefix(theirs)}"
    return name
