"""Every golden file of arrays: our outputs and gradients equal those of the authors' own code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden import FOLDER
from tests.golden.__main__ import main
from tests.golden.arrays import difference, differences

FILES = sorted(FOLDER.glob("*/*.npz"))


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.stem}" for path in FILES])
def test_ours_are_the_authors_numbers(path: Path) -> None:
    compared = differences(path)
    assert compared, "nothing was compared"
    assert [f"{item.name} {item.gap:.3g}" for item in compared if not item.agrees] == []


def test_one_command_checks_any_file_and_says_how_far_off_each_array_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = FOLDER / "vl_pet_family" / "vladapter_single_adapter.npz"
    assert main([str(original)]) == 0
    assert "0 differ" in capsys.readouterr().out
    with np.load(original, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    output = next(key for key in arrays if key.startswith("out/"))
    arrays[output] = arrays[output] + 1e-6
    wrong = tmp_path / original.name
    np.savez(wrong, **arrays)
    assert main([str(original), str(wrong)]) == 1
    assert f"{output}  DIFFERS (allowed 1e-09)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nobody_knows.npz", "vlpet_broken.npz"])
def test_a_file_that_cannot_be_checked_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(b"no archive")
    assert main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"{path}: ") and captured.err.count("\n") == 1


def test_a_difference_is_relative_to_large_values_alone_and_sees_shapes_and_integers() -> None:
    theirs = torch.tensor([100.0, 0.0], dtype=torch.float64)
    assert difference("x", theirs + 1e-7, theirs).gap == pytest.approx(1e-9)
    assert not difference("x", theirs[:1], theirs).agrees
    assert not difference("x", None, theirs).agrees
    assert not difference("x", theirs * torch.nan, theirs).agrees
    assert not difference("ids", torch.tensor([1, 2]), torch.tensor([1, 3]), 10.0).agrees
    assert difference("ids", [1, 3], torch.tensor([1, 3])).agrees
