"""BERT (Devlin et al., 2019), built from transformers' modules: a text encoder with sites."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from petlbench.api.sites import Layer, Pass, Projection, Stack, SubLayer
from petlbench.backbones.parts.transformers_parts import FeedForward


class BertAttention(nn.Module):
    """The library's self-attention, then its output projection."""

    def __init__(self, attention: nn.Module, dense: nn.Linear) -> None:
        super().__init__()
        self.attention, self.dense = attention, dense

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        return self.dense(self.attention(x, attention_mask=context.bias)[0])


class TwiceNormed(SubLayer):
    """A sub-layer that applies residual addition and norm twice: with t the ordinary result, y = norm(t + x).

    M2IST's released BERT does this after attention, in the layers that it pairs with layers of the image encoder. Taps
    are those of the first application.
    """

    norm_twice = True

    def forward(self, x: Tensor, context: Pass, tap: frozenset[str] = frozenset()) -> tuple[Tensor, dict[str, Tensor]]:
        t, taps = super().forward(x, context, tap)
        return self.norm(t + x), taps


def bert_layer(layer: BertLayer, *, twice: bool = False) -> Layer:
    """Build a post-norm layer: attention, ffn. `twice`: attention adds and norms twice, see `TwiceNormed`."""
    mixing, output, cls = layer.attention.self, layer.attention.output, TwiceNormed if twice else SubLayer
    core = BertAttention(mixing, output.dense)
    projections = {role: Projection(mixing, name) for role, name in (("q", "query"), ("k", "key"), ("v", "value"))}
    projections["o"] = Projection(core, "dense")
    width = output.dense.out_features
    attention = cls(core, output.LayerNorm, output.dropout, width=width, pre_norm=False, projections=projections)
    feed = FeedForward(layer.intermediate.dense, layer.output.dense, layer.intermediate.intermediate_act_fn, 0.0)
    linear = {"in": Projection(feed, "fc1"), "out": Projection(feed, "fc2")}
    norm, drop = layer.output.LayerNorm, layer.output.dropout
    return Layer(
        attention=attention,
        ffn=SubLayer(feed, norm, drop, width=width, pre_norm=False, projections=linear),
    )


class BertWords(nn.Module):
    """Sum words, positions and, if `types` is given, the first token type: the input of the embedding norm.

    BLIP's BERT has no token types.
    """

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
    """The embedding before BERT's layers, and the pooler after them, which is counted but never used."""

    def __init__(self, words: BertWords, drop: nn.Module, pooler: nn.Linear | None) -> None:
        super().__init__()
        self.words, self.drop, self.pooler = words, drop, pooler

    def forward(self, ids: Tensor, norm: nn.Module) -> Tensor:
        """Map ids (B, N) to the input (B, N, width) of the first layer."""
        states: Tensor = self.drop(norm(self.words(ids)))
        return states


def build_bert(config: BertConfig, *, released: bool, paired: int) -> tuple[Bert, Stack]:
    """Split a library BERT into the modules around its layers, and the layers.

    `released`: M2IST's variant, without token types and pooler, whose first `paired` layers apply the norm twice.
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
    """Return the configuration of a BERT of these sizes.

    Its GELU is not fused, as in the first implementation of BERT, which TransVG trains: it saves three tensors of the
    FFN's width for backward where the fused one saves one, and the published memory figures include them.
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
    """Rename a library BERT's tensors to those of `Bert` at `tower` and of its layers at `stack`.

    Leave out pre-training heads and what the `released` variant lacks; keep a name that is unknown.
    """
    renamed: dict[str, Tensor] = {}
    left_out = ("cls.", "embeddings.position_ids") + (
        ("pooler.", "embeddings.token_type_embeddings.") if released else ()
    )
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.")
        if not name.startswith(left_out):
            renamed[_own_name(name, tower, stack)] = tensor
    return renamed


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
