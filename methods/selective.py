"""Methods that insert nothing and only choose which existing parameters train."""

from __future__ import annotations

from typing import Any, ClassVar

from petlbench.backbones.base import Backbone
from petlbench.method import Method, train_biases


class Full(Method):
    """Full fine-tuning: every parameter trains that the backbone does not keep fixed.

    VL-Adapter (CVPR 2022) trains CLIP-BART so with a rate of 1e-4.
    """

    identity = True
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-4}

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.unfreeze()
        return backbone


class HeadOnly(Method):
    """The floor: the task's head and the host's own visual projection train, nothing else."""

    identity = True
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        return backbone


class BitFit(Method):
    """BitFit (Ben Zaken et al., ACL 2022): every bias trains, of projections and of norms, and no gain or weight.

    Selected by the parameter's own name. The code of VL-Adapter and VL-PET selects by substring, which on T5 finds
    relative-position tables instead; on BART the two agree.
    """

    identity = True
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        train_biases(backbone)
        return backbone
