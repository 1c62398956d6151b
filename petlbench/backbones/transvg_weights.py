"""Where the values of `transvg` come from: published encoders, and whole backbones in the authors' names."""

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

# Our options, and what the library calls them.
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


def encoder_tensors(kind: Any, source: str, config: BackboneConfig, sizes: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a published encoder: from a file, or through the library's loader by hub name or from a folder.

    Raises UserError when it is not there, or of other sizes than `config`'s; `sizes`: theirs by our option.
    """
    if Path(source).expanduser().is_file():
        return read_tensors(Path(source).expanduser())
    place, what = model_location(source), f"a {kind.__name__}"
    with quiet(), readable(source, what), torch.device("cpu"):
        theirs = PretrainedConfig.get_config_dict(place)[0]
        known = kind.config_class.from_dict(theirs)
    found = theirs.get("model_type")
    if found != known.model_type:
        said = f"a model of type '{found}'" if found else "no model, for it has no config.json that names a type"
        raise UserError(f"'{source}' is {said}; give one of type '{known.model_type}'")
    wrong = [f"{o}={getattr(known, t)}" for o, t in sizes.items() if getattr(known, t) != getattr(config, o)]
    if wrong:
        raise UserError(f"'{source}' is of other sizes than this configuration: set {', '.join(wrong)}")
    with quiet(), readable(source, what), torch.device("cpu"):
        model, report = kind.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    absent = set(report["missing_keys"])
    return {name: tensor for name, tensor in model.state_dict().items() if name not in absent}


def from_transvg(tensors: Mapping[str, Tensor], *, released: bool) -> dict[str, Tensor]:
    """The tensors of a whole backbone in the authors' names under ours; in our own names as they are."""
    if not any(name.startswith("visumodel.") for name in tensors):
        return dict(tensors)
    whole = {
        "visu_proj.": "image_projection.",
        "text_proj.": "text_projection.",
        "vl_pos_embed.weight": "positions",
        "reg_token.weight": "reg",
        "bbox_embed.": "own_heads.rec.",
    }
    found = from_layers(tensors, "vl_transformer.encoder.layers.", "stacks.fusion")
    found |= from_detr(_under(tensors, "visumodel."), "resnet", "input_projection", "stacks.vision")
    found |= from_bert(_under(tensors, "textmodel."), "bert", "stacks.text", released=released)
    for theirs, ours in whole.items():
        found |= {ours + name: tensor for name, tensor in _under(tensors, theirs).items()}
    return found


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
