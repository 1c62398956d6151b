"""A plug-in that was written before a renaming still works, and is told."""

from __future__ import annotations

import pytest
from torch import nn

from petlbench.api import method
from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, SizeOption
from petlbench.api.snapshot import inserted


def test_a_method_may_claim_by_former_names_for_a_version() -> None:
    with pytest.warns(DeprecationWarning, match=r"`Old.knob` is called `size_option` now"):

        class Old(Method):
            knob = SizeOption("rank", (1, 2))

            def __init__(self) -> None:
                super().__init__()
                self.dead = {"*.spare": "kept for later"}

            def adapt(self, backbone: Backbone) -> Backbone:
                return backbone

    assert Old.size_option == SizeOption("rank", (1, 2)) and Method.size_option is None
    with pytest.warns(DeprecationWarning, match=r"`Old.dead` is called `unused_parameters` now"):
        assert Old().unused_parameters == {"*.spare": "kept for later"}


def test_a_former_class_and_a_former_mark_are_known_too() -> None:
    with pytest.warns(DeprecationWarning, match="`Knob` is called `SizeOption`"):
        assert method.Knob is SizeOption
    with pytest.raises(AttributeError, match="no attribute 'Nob'"):
        method.Nob  # noqa: B018
    side = nn.Linear(1, 1)
    side.brought = True  # type: ignore[assignment]
    with pytest.warns(DeprecationWarning, match=r"`Linear.brought` is called `is_side_module`"):
        assert list(inserted(nn.Sequential(side))) == [side]
