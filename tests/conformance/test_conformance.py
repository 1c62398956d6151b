"""`petlbench check`: shipped methods pass on every task, and each broken method fails exactly the right check."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from petlbench.api.method import Method
from petlbench.api.registries import METHODS
from petlbench.conformance.bench import method_class
from petlbench.conformance.check_method import check, check_all
from petlbench.conformance.checks import CHECKS
from petlbench.conformance.report import CheckResult, Report, check_table
from petlbench.core.errors import UserError
from tests import broken_methods as broken

ROOT = Path(__file__).parents[2]
TASKS = ("rec", "vqa", "captioning", "retrieval")
SHIPPED = ("full", "head_only", "bitfit", "lora", "vl_adapter")
ENCODER = "stacks.encoder.layers.0.sublayers"

# The class, the checks that fail, and what the message names.
FAULTS: list[tuple[type[Method], set[str], str]] = [
    (broken.WritesFrozenWeights, {"frozen"}, rf"frozen tensors changed.*{ENCODER}.attention.norm.weight.* more"),
    (
        broken.ForgetsBuffer,
        {"reload"},
        rf"something else; backbone.{ENCODER}.attention.sites.output.0.running_mean",
    ),
    (broken.ForgetsNumber, {"reload"}, r"\.passes.* differs: make it a trained Parameter"),
    (broken.DeadParameter, {"gradients"}, rf"no gradient ever reaches backbone.{ENCODER}.\S+.useless"),
    (broken.StaleDeclarations, {"gradients"}, r"long_gone, which no trainable.*attention\S+s gets a gradient"),
    (broken.NoIdentity, {"identity"}, r"the loss is \S+ and not the untouched.*do not claim `identity`"),
    (broken.WrongMerge, {"merge"}, r"merged outputs differ by \S+, more than 1e-09"),
    (broken.NoMerge, {"merge"}, r"NoMerge cannot be merged.*do not claim `mergeable`"),
    (broken.Unseeded, {"seed"}, r"the losses of step 1 are \S+ and \S+: draw from torch's own generator"),
    (broken.FalselyDetached, {"detached"}, rf"reaches into \d+ frozen modules, first {ENCODER}.*do not claim"),
    (broken.StartsAtNaN, {"finite"}, r"the loss before training is nan.*initial values"),
    (broken.DropsInEvaluation, {"evaluation"}, r"two evaluations differ.*when `self.training` is False"),
    (broken.TrainsInEvaluation, {"evaluation"}, r"sites.output.0 .*is in training mode after an evaluation"),
    (broken.UpdatesInEvaluation, {"evaluation"}, r"evaluation changes .*running_mean.*only when `self.training`"),
    (broken.SwitchesModes, {"evaluation"}, r"`adapt` switches stacks.vision"),
    (broken.MixesRows, {"evaluation"}, r"depend on the rows beside it"),
    (broken.LeavesHook, {"restore"}, r"forward hooks of stacks.encoder.layers.0 changed"),
    (broken.LeavesAttribute, {"restore"}, rf"attribute forward of {ENCODER}.ffn.norm changed"),
    (broken.SharesMemory, {"frozen", "saved"}, r"sites.output.0.bias.* shares its memory with a frozen tensor"),
    (broken.Refuses, {"runs"}, r"ZeroDivisionError: no room for another adapter"),
]
SOUND = (broken.Gains, broken.DeclaredDeadParameter, broken.DetachedTail)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own, and the packages of third parties where Python finds them, also in a new process."""
    folder = tmp_path_factory.mktemp("packages")
    text = (ROOT / "docs" / "extending" / "method.md").read_text(encoding="utf-8")
    example = re.search(r"`petlbench_scaling.py`:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert example
    (folder / "petlbench_scaling.py").write_text(example[1], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETLBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.syspath_prepend(str(folder))
        patch.syspath_prepend(str(ROOT / "tests" / "plugin" / "example"))
        yield folder
    for name in ("petlbench_scaling", "petlbench_plugin_example"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def shipped() -> dict[str, Report]:
    return {report.method: report for report in check_all(SHIPPED, tasks=TASKS)}


@pytest.fixture(scope="module")
def others(surroundings: Path) -> dict[str, Report]:
    """Return reports on all other methods, by class name; all share one task and one new process."""
    names = ["petlbench_scaling:Scaling", "petlbench_plugin_example:NormGains"]
    reports = check_all([*names, *SOUND, *(cls for cls, _, _ in FAULTS)], tasks=["rec"])
    return {report.method.partition(":")[2]: report for report in reports}


def outcomes(report: Report, task: str) -> dict[str, CheckResult]:
    return {finding.check: finding for finding in report.findings[task]}


def skipped(report: Report, task: str) -> set[str]:
    return {finding.check for finding in report.findings[task] if finding.outcome == "skip"}


@pytest.mark.parametrize("method", SHIPPED)
def test_every_shipped_method_passes_on_every_task(method: str, shipped: dict[str, Report]) -> None:
    report, claimant = shipped[method], METHODS.get(method)()
    assert tuple(report.findings) == TASKS
    assert list(report.failures()) == [] and report.ok
    claims = {
        "identity": claimant.identity,
        "merge": claimant.mergeable,
        "detached": claimant.no_backbone_gradient,
    }
    for task in TASKS:
        assert skipped(report, task) == {"conditional"} | {name for name, claimed in claims.items() if not claimed}


@pytest.mark.parametrize("name", ["Scaling", "NormGains", *(cls.__name__ for cls in SOUND)])
def test_a_sound_method_of_a_third_party_passes(name: str, others: dict[str, Report]) -> None:
    assert list(others[name].failures()) == []
    assert "reload" not in skipped(others[name], "rec")


# A backbone, the package it needs, and tasks that it serves with a supplied fusion or decoder, or its own head.
OTHERS = [("clip:tiny", "open_clip", ("rec", "retrieval")), ("beit3:tiny", "timm", ("rec", "captioning"))]


@pytest.mark.parametrize(("backbone", "package", "tasks"), OTHERS, ids=[backbone for backbone, *_ in OTHERS])
def test_methods_pass_with_supplied_parts_with_the_backbones_own_heads_and_with_an_idle_modality(
    backbone: str, package: str, tasks: tuple[str, ...]
) -> None:
    pytest.importorskip(package)
    report = check("lora", backbone=backbone, tasks=tasks)
    assert list(report.failures()) == [] and report.backbone == backbone
    assert all(outcomes(report, task)["merge"].outcome == "pass" for task in tasks)


def test_methods_with_modules_for_each_task_pass_on_a_task_that_nothing_lists() -> None:
    assert [list(r.failures()) for r in check_all(["vl_adapter:multiple", "hyperformer"], tasks=["pairs"])] == [[], []]


def test_parts_that_a_task_leaves_idle_excuse_no_other_parameter() -> None:
    pytest.importorskip("timm")
    report = check(broken.DeadParameter, backbone="beit3:tiny", tasks=["captioning"])
    assert [finding.check for _, finding in report.failures()] == ["gradients"]


def test_a_conditional_parameter_gets_a_gradient_on_at_least_one_task() -> None:
    on_all, on_one = (check(broken.FalselyConditional, tasks=tasks) for tasks in (None, ["rec"]))
    failures = {finding.check: finding.message for _, finding in on_all.failures()}
    assert failures.keys() == {"conditional"} and "on no task does backbone.stacks." in failures["conditional"]
    assert on_one.ok
    assert outcomes(on_one, "rec")["conditional"] == CheckResult(
        "conditional", "skip", "needs all tasks that the backbone serves"
    )


def test_a_claim_that_is_made_is_checked(others: dict[str, Report]) -> None:
    assert outcomes(others["Gains"], "rec")["identity"].outcome == "pass"
    assert outcomes(others["Gains"], "rec")["detached"] == CheckResult("detached", "skip", "not claimed")
    assert outcomes(others["DetachedTail"], "rec")["detached"].outcome == "pass"


@pytest.mark.parametrize(("cls", "checks", "message"), FAULTS, ids=[cls.__name__ for cls, _, _ in FAULTS])
def test_exactly_the_right_check_fails_and_names_the_culprit(
    cls: type[Method], checks: set[str], message: str, others: dict[str, Report]
) -> None:
    failed = {finding.check: finding.message for _, finding in others[cls.__name__].failures()}
    assert set(failed) == checks
    assert any(re.search(message, text) for text in failed.values()), failed
    assert all("\n" not in text for text in failed.values())


def test_checks_that_a_fault_makes_impossible_are_skipped_and_point_to_it(others: dict[str, Report]) -> None:
    assert "see `frozen`" in outcomes(others["WritesFrozenWeights"], "rec")["reload"].message
    assert "see `evaluation`" in outcomes(others["DropsInEvaluation"], "rec")["reload"].message
    names = {made.__name__ for made in CHECKS} | {"conditional"}
    assert skipped(others["Refuses"], "rec") == names - {"runs"}
    assert skipped(others["StartsAtNaN"], "rec") >= {"frozen", "gradients", "reload", "seed", "restore"}


def test_a_report_reads_as_a_table_and_as_plain_data(others: dict[str, Report]) -> None:
    def text(report: Report) -> str:
        console = Console(file=io.StringIO(), width=400)
        console.print(check_table(report))
        return console.file.getvalue()  # type: ignore[attr-defined]

    wrong = others["DeadParameter"]
    assert "gradients on rec: no gradient ever reaches" in text(wrong) and "1 failed" in text(wrong)
    assert "all passed" in text(others["Gains"])
    data: dict[str, Any] = wrong.as_json()
    assert data["ok"] is False and data["method"] == "tests.broken_methods:DeadParameter"
    assert [row["check"] for row in data["findings"]["rec"]] == [*(made.__name__ for made in CHECKS), "conditional"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"method": "nowhere:Method"}, "'nowhere:Method' cannot be imported"),
        ({"method": "pathlib:Path"}, "not a subclass of petlbench.api.method.Method"),
        ({"config": {"rank": 0}}, "method 'lora': config: rank: Input should be greater than 0, got 0"),
        ({"backbone": "tinny"}, "did you mean 'tiny'"),
        ({"tasks": ["vqqa"]}, "did you mean 'vqa'"),
    ],
)
def test_a_users_mistake_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check(**{"method": "lora", **options})
    assert "\n" not in str(error.value)


def test_a_method_is_found_by_module_and_class() -> None:
    assert method_class("tests.broken_methods:Gains") is broken.Gains
