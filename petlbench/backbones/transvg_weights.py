"""Load the weights of `transvg`: from published encoders, or from whole backbones in the authors' names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from petlbench.api.backbone import BackboneConfig
from petlbench.backbones.parts.bert import from_bert
from petlbench.backbones.parts.detr import from_detr, from_layers
from petlbench.backbones.weights.library_models import model_location, quiet, readable
from petlbench.backbones.weights.tensors import read_tensors
from petlbench.core.errors import UserError

# Our option -> the library's name.
DETR_SIZES = {
    "width": "d_model",
    "vision_layers": "encoder_layers",
    "heads": "encoder_attention_heads",
    "ffn": "encoder_ffn_dim",
}
BERT_SIZES = {
    "bert_width": "hidden_size",
    "bert_layers": "num_hidden_layers",
    "bert_heads": "num_attention_heads",
    "bert_ffn": "intermediate_size",
    "vocabulary": "vocab_size",
    "max_positions": "max_position_embeddings",
}


def encoder_tensors(cls: Any, source: str, config: BackboneConfig, sizes: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of an encoder `cls`: from a file, or by the library's loader, given a hub name or folder.

    `sizes`: our option -> the library's name. Raise UserError if the source is missing or has other sizes.
    """
    if Path(source).expanduser().is_file():
        return read_tensors(Path(source).expanduser())
    place, what = model_location(source), f"a {cls.__name__}"
    with quiet(), readable(source, what), torch.device("cpu"):
        theirs = PretrainedConfig.get_config_dict(place)[0]
        published = cls.config_class.from_dict(theirs)
    model_type = theirs.get("model_type")
    if model_type != published.model_type:
        reason = f"a model of type '{model_type}'" if model_type else "not a model: no config.json names its type"
        raise UserError(f"'{source}' is {reason}; give one of type '{published.model_type}'")
    wrong = [f"{o}={getattr(published, t)}" for o, t in sizes.items() if getattr(published, t) != getattr(config, o)]
    if wrong:
        raise UserError(f"'{source}' has other sizes than this configuration: set {', '.join(wrong)}")
    with quiet(), readable(source, what), torch.device("cpu"):
        model, report = cls.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    absent = set(report["missing_keys"])
    return {name: tensor for name, tensor in model.state_dict().items() if name not in absent}


def from_transvg(tensors: Mapping[str, Tensor], *, released: bool) -> dict[str, Tensor]:
    """Rename the tensors of a whole backbone from the authors' names to ours; return our own names unchanged."""
    if not any(name.startswith("visumodel.") for name in tensors):
        return dict(tensors)
    whole = {
        "visu_proj.": "image_projection.",
        "text_proj.": "text_projection.",
        "vl_pos_embed.weight": "positions",
        "reg_token.weight": "reg",
        "bbox_embed.": "own_heads.rec.",
    }
    renamed = from_layers(tensors, "vl_transformer.encoder.layers.", "stacks.fusion")
    renamed |= from_detr(_under(tensors, "visumodel."), "resnet", "input_projection", "stacks.vision")
    renamed |= from_bert(_under(tensors, "textmodel."), "bert", "stacks.text", released=released)
    for theirs, ours in whole.items():
        renamed |= {ours + name: tensor for name, tensor in _under(tensors, theirs).items()}
    return renamed


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
