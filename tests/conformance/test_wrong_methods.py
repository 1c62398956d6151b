"""A user's mistake about a method gives one line and exit status 2, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from petlbench.methods.lora import LoRA
from petlbench.methods.vl_adapter import VLAdapter

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method
from petlbench.api.registries import METHODS
from petlbench.commands import main
from tests.core.test_registry import install

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"name": "vl_pet", "config": {"rank": 6, "heads": 4}}, "tiny", "4 heads do not divide the rank 6"),
    ({"name": "compacter", "config": {"n": 5}}, "tiny", "must divide"),
    ({"name": "lst", "config": {"reduction": 7}}, "tiny", "7"),
    ({"name": "multiway_adapter", "config": {"bottleneck": 0}}, "tiny", "bottleneck: Input should be greater than 0"),
    ({"name": "houlsby", "config": {"rank": 0}}, "tiny", "rank: Input should be greater than 0"),
    ({"name": "m2ist", "config": {"reduction": 0}}, "tiny", "reduction: Input should be greater than 0"),
    ({"name": "m2ist", "config": {"pairs": 9}}, "tiny", "pairs"),
    ({"name": "vl_pet:lrge"}, "tiny", "method 'vl_pet' has no variant 'lrge': did you mean 'large'?"),
    ({"name": "peft:prompt_tuning"}, "tiny", "method 'peft:prompt_tuning' cannot be run: "),
    ({"name": "peft:ia4"}, "tiny", "method 'peft' has no variant 'ia4': did you mean 'ia3'?"),
    ({"name": "peft:lora", "config": {"options": {"rank": 4}}}, "tiny", "rank"),
    ({"name": "m2ist:released"}, "tiny", "only transvg with released: true"),
    ({"name": "prompt"}, "clip:tiny", "does not fit backbone 'clip:tiny'"),
    ({"name": "lora", "config": {"stacks": ["fusion"]}}, "tiny", "no stack 'fusion' in this backbone"),
    ({"name": "both"}, "tiny", "another method is in this backbone already, and this one would freeze it"),
]


class Both(Method):
    """Apply one method after another."""

    def adapt(self, backbone: Backbone) -> Backbone:
        return VLAdapter().adapt(LoRA().adapt(backbone))


@pytest.fixture(autouse=True)
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "site").mkdir()
    install(folder, "both", {"both": f"{__name__}:Both"}, {}, METHODS.group)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("method", "backbone", "message"), WRONG, ids=[str(m["name"]) for m, *_ in WRONG])
def test_a_mistake_is_one_line(
    method: dict[str, Any], backbone: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if backbone.startswith("clip"):
        pytest.importorskip("open_clip")
    suite = {"name": "wrong", "methods": [method], "tasks": ["retrieval"], "backbones": [backbone]}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(suite))
    out = tmp_path / "out"
    assert main.main(["run", str(tmp_path / "wrong.yaml"), "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not out.exists()


def test_a_method_of_a_wildcard_that_does_not_fit_is_left_out_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "smoke", "--methods", "m2ist*", "--tasks", "rec", "--dry-run", "--out", str(tmp_path / "out")]
    assert main.main(command) == 0
    printed = capsys.readouterr()
    assert "left out: method 'm2ist:released' does not fit backbone 'tiny'" in printed.err
    assert "m2ist:relaxed on rec" in printed.out and "m2ist:released" not in printed.out
