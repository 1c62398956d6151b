"""Parameters, energy and the environment, against cases small enough to work out by hand."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from petlbench.measure import environment
from petlbench.measure.energy import energy_counter
from petlbench.measure.environment import describe, source_tree
from petlbench.measure.parameters import count, inference_extra

# Parameters


def backbone() -> nn.ModuleDict:
    """A frozen base of 6 scalars, a method's 8, a host's 3, and the host's again under a second name."""
    base = nn.Linear(2, 3, bias=False).requires_grad_(False)
    host = nn.Linear(3, 1, bias=False)
    return nn.ModuleDict({"base": base, "adapter": nn.Linear(3, 2), "host": host, "alias": host})


def test_trainable_scalars_are_split_by_owner_and_shared_ones_count_once() -> None:
    found = count(backbone(), nn.Linear(2, 2), {"alias.weight"})
    assert (found.method, found.head, found.host, found.trainable, found.total) == (8, 6, 3, 17, 23)
    assert found.percent == pytest.approx(100 * 17 / 23)
    assert found.stored_bytes is None


def test_a_frozen_host_part_counts_only_in_the_total() -> None:
    model = backbone()
    model["host"].requires_grad_(False)
    found = count(model, None, {"host.weight"})
    assert (found.method, found.host, found.head, found.total) == (8, 0, 0, 17)


def test_a_parameter_that_head_and_backbone_share_is_the_heads_and_counts_once() -> None:
    model, head = backbone(), nn.Linear(3, 2)
    head.weight = model["adapter"].weight
    found = count(model, head, set())
    assert (found.method, found.head, found.total) == (2 + 3, 6 + 2, 6 + 8 + 3 + 2)


def test_a_host_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"gone\.weight"):
        count(backbone(), None, {"gone.weight", "host.weight"})


def test_what_inference_needs_beyond_the_untouched_backbone_counts_shared_scalars_once() -> None:
    model = backbone()
    assert inference_extra(model, untouched_parameters=6 + 3) == 8
    del model["adapter"]  # as merging does
    assert inference_extra(model, untouched_parameters=6 + 3) == 0


# Energy


class NVMLError(Exception):
    """Stands for pynvml's."""


def nvml(energy: Callable[[str], int]) -> SimpleNamespace:
    """A stand-in for the module pynvml on a machine with the one device GPU-b."""

    def handle(uuid: str) -> str:
        if uuid != "GPU-b":
            raise NVMLError("not found")
        return f"handle of {uuid}"

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )


@pytest.fixture
def uuids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch was shown two devices; NVML knows the second only."""
    known = {"cuda:0": SimpleNamespace(uuid="a"), "cuda:1": SimpleNamespace(uuid="b")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known[str(device)])


def test_energy_is_read_in_joules_from_the_device_that_torch_means(
    uuids: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = {"handle of GPU-b": iter([0, 1500, 4000])}  # millijoules; the first shows that there is a reading
    monkeypatch.setitem(sys.modules, "pynvml", nvml(lambda handle: next(readings[handle])))
    joules = energy_counter("cuda:1")
    assert joules is not None
    assert (joules(), joules()) == (1.5, 4.0)
    assert energy_counter("cuda:0") is None, "a device that NVML does not know"


def test_there_is_no_energy_off_cuda_without_nvml_or_without_its_support(
    uuids: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(handle: str) -> int:
        raise NVMLError("not supported")

    monkeypatch.setitem(sys.modules, "pynvml", nvml(unsupported))
    assert energy_counter("cuda:1") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter("cuda:1") is None
    monkeypatch.setitem(sys.modules, "pynvml", nvml(lambda handle: 1))
    assert energy_counter("cpu") is None


# Environment


def git(root: Path, *command: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *identity, *command], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    try:
        git(tmp_path, "init")
    except FileNotFoundError:
        pytest.skip("needs git")
    (tmp_path / "petlbench").mkdir()
    (tmp_path / "petlbench" / "__init__.py").touch()
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_a_checkout_is_named_by_its_commit_and_clean_until_code_changes(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("not code")
    clean = source_tree(checkout)
    assert len(clean["git_commit"]) == 40
    assert clean["git_dirty"] is False
    (checkout / "methods").mkdir()
    (checkout / "methods" / "new.py").touch()
    assert source_tree(checkout) == {**clean, "git_dirty": True}


def installed_below_a_repository(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (checkout / "site" / "petlbench").mkdir(parents=True)
    (checkout / "site" / "petlbench" / "__init__.py").touch()
    return checkout / "site"


def git_is_absent(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", "")
    return checkout


@pytest.mark.parametrize("case", [installed_below_a_repository, git_is_absent])
def test_without_a_checkout_or_git_there_is_no_commit(
    case: Callable[[Path, pytest.MonkeyPatch], Path], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source_tree(case(checkout, monkeypatch)) == {"git_commit": None, "git_dirty": None}


def test_the_description_is_json_with_versions_and_without_paths_or_host_name() -> None:
    found = describe("cpu", threads=3)
    assert json.loads(json.dumps(found)) == found
    assert (found["torch"], found["python"], found["threads"]) == (torch.__version__, platform.python_version(), 3)
    assert found["device_name"] == found["cpu"]
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["cuda_driver"] is None
    assert platform.node() not in found.values()
    assert not any(str(value).startswith(("/", "~")) for value in found.values())
    assert str(Path(environment.__file__).parents[2]) not in json.dumps(found)


def test_the_description_says_whether_algorithms_are_deterministic() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for wanted in (True, False):
            torch.use_deterministic_algorithms(wanted)
            assert describe("cpu", threads=1)["deterministic"] is wanted
    finally:
        torch.use_deterministic_algorithms(before)
