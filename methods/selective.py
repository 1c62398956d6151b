"""Methods that insert nothing and only choose which existing parameters train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from petlbench.api.backbone import Backbone
from petlbench.api.method import About, Method, train_biases


class Full(Method):
    """Full fine-tuning: every parameter trains unless the backbone keeps it fixed.

    VL-Adapter (CVPR 2022) fine-tunes CLIP-BART this way at a rate of 1e-4.
    """

    about = About(
        paper="VL-Adapter, CVPR 2022",
        trains="everything",
        verified="authors' code: whole models with gradients, counts",
    )
    identity = True
    baseline: ClassVar[bool] = True
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-4}

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.unfreeze()
        return backbone


class HeadOnly(Method):
    """The floor: only the task's head and the host's own visual projection train."""

    about = About(paper="", trains="nothing of its own", verified="authors' code: counts of host parts")
    identity = True
    floor: ClassVar[bool] = True
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        return backbone


class BitFit(Method):
    """BitFit (Ben Zaken et al., ACL 2022): every bias trains, in projections and norms, and no gain or weight does.

    The parameter's own name decides. The code of VL-Adapter and VL-PET selects by substring; on BART the two agree.
    T5 has no biases: there the authors' code trains the two tables of relative positions instead (768 parameters more
    than the host parts), and this class only the host parts, as `head_only` does. Published numbers of BitFit on T5
    (0.83 %) are Ladder Side-Tuning's, which adds biases to every projection, norm and the head; so is the rate on T5.
    """

    about = About(
        paper="Ben Zaken et al., ACL 2022; VL-Adapter",
        trains="all biases",
        verified="authors' code: a whole model with gradients, counts",
    )
    identity = True
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"vl_t5": {"lr": 3e-3}}

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        train_biases(backbone)
        return backbone
