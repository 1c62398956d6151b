"""Small BEiT-3 models, and the golden vectors of MultiWay-Adapter's original modules."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from petlbench.backbones.beit3 import BEiT3
from tests.backbone_factory import randomise
from tests.golden import FOLDER

Named = dict[str, Tensor]
GOLDEN = FOLDER / "multiway_adapter"


def golden(name: str) -> Named:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def golden_json(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1))


def tiny(**options: Any) -> BEiT3:
    return BEiT3(BEiT3.configured("beit3:tiny", options)).eval()


def random_tiny(seed: int = 0, **options: Any) -> BEiT3:
    backbone = tiny(**options)
    randomise(backbone, seed, 0.2)
    return backbone
