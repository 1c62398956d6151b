"""Every shipped method and variant passes its checks on every task; the seed methods on every backbone family."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from petlbench.api.registries import BACKBONES, METHODS
from petlbench.conformance.bench import cell_of
from petlbench.conformance.check_method import check_all
from petlbench.describe.backbones import service
from petlbench.pipeline.compatibility import incompatible_cells
from petlbench.pipeline.plan.variants import method_specs

pytestmark = pytest.mark.slow
TASK_NAMES = ("rec", "vqa", "captioning", "retrieval")
NEEDS = {"clip": "open_clip", "beit3": "timm", "transvg": "timm"}
FAMILIES = ("vl_bart:tiny", "vl_t5:tiny", "transvg:tiny", "beit3:tiny", "clip:tiny")
SEED_METHODS = ("m2ist", "vl_pet", "multiway_adapter", "lora", "vl_adapter")
# The towers of clip differ in width, so MultiWay-Adapter needs its shared core there.
INSTEAD = {("multiway_adapter", "clip:tiny"): "multiway_adapter:shared_core"}
SHIPPED = [name for name in METHODS.names() if METHODS.origin(name) == "petlbench"]
# A method or variant, a backbone that it does not fit, and a part of the refusal.
REFUSED = {
    ("m2ist:released", "tiny"): "only transvg with released: true",
    ("m2ist:pooled", "tiny"): "pooled",
    ("multiway_adapter", "clip:tiny"): "take shared_core as the enhancer",
    ("prompt", "clip:tiny"): "a causal text tower like CLIP's has a learned place for every token",
    ("prompt", "transvg:tiny"): "its fusion encoder has a learned place for every token, and none for prompts",
    ("compacter", "clip:tiny"): "n = 2 must divide both sides of a projection from 24 to 3",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETLBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def labels_of(method: str) -> list[str]:
    """Return the labels of the method and its variants; the default occurs once."""
    return [spec.label for spec in method_specs([f"{method}*"]) if spec.name == method]


def served(family: str) -> list[str]:
    if find_spec(NEEDS.get(family.partition(":")[0], "torch")) is None:
        pytest.skip("its library is not installed")
    cls = BACKBONES.get(family)
    return [task for task in TASK_NAMES if service(cls, cls.configured(family, {}), task).reason is None]


def failures(labels: list[str], backbone: str, tasks: list[str]) -> list[str]:
    reports = check_all(labels, backbone=backbone, tasks=tasks)
    return [
        f"{report.method} on {report.backbone}, {task}: {finding.check}: {finding.message}"
        for report in reports
        for task, finding in report.failures()
    ]


def refusals(labels: list[str], backbone: str) -> dict[str, str]:
    """Return the refusals, by the label of each method that does not fit."""
    reasons = {}
    for spec in method_specs(labels):
        cell = cell_of(spec.name, METHODS.get(spec.name), spec.config, served(backbone)[0], backbone)
        if reason := incompatible_cells([cell]).get(cell.id):
            reasons[spec.label] = reason
    return reasons


def test_there_are_enough_variants() -> None:
    own = [label for name in SHIPPED if name != "peft" for label in labels_of(name)]
    assert len(own) >= 20 and len(labels_of("peft")) >= 10


@pytest.mark.parametrize("method", SHIPPED)
def test_every_variant_passes_on_tiny(method: str) -> None:
    labels = [label for label in labels_of(method) if (label, "tiny") not in REFUSED]
    assert failures(labels, "tiny", list(TASK_NAMES)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_methods_pass_on_every_family(family: str) -> None:
    labels = [INSTEAD.get((name, family), name) for name in SEED_METHODS]
    assert failures(labels, family, served(family)) == []


@pytest.mark.parametrize("family", ("tiny", *FAMILIES))
def test_a_method_that_does_not_fit_is_refused_with_the_reason(family: str) -> None:
    labels = [label for name in SHIPPED for label in (labels_of(name) if family == "tiny" else [name])]
    refused = refusals(labels, family)
    expected = {label: reason for (label, other), reason in REFUSED.items() if other == family}
    assert refused.keys() == expected.keys()
    assert all(expected[label] in reason for label, reason in refused.items())
