"""Hold the results of the checks, and show them as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

CheckOutcome = Literal["pass", "fail", "skip"]
STYLES: dict[CheckOutcome, str] = {"pass": "green", "fail": "bold red", "skip": "dim"}


@dataclass(frozen=True)
class CheckResult:
    """One check on one task. `message` says what to fix (fail) or why nothing was checked (skip)."""

    check: str
    outcome: CheckOutcome
    message: str = ""


@dataclass(frozen=True)
class Report:
    """All check results of one method, by task; every task has the same checks in the same order."""

    method: str
    backbone: str
    findings: dict[str, list[CheckResult]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not any(self.failures())

    def failures(self) -> Iterator[tuple[str, CheckResult]]:
        """Yield (task, result) of every check that failed."""
        for task, findings in self.findings.items():
            yield from ((task, finding) for finding in findings if finding.outcome == "fail")

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "ok": self.ok}


def check_table(report: Report) -> Group:
    """Return a table of checks by tasks, and below it the failures with their remedies."""
    table = Table("check", *report.findings, title=f"{report.method} on {report.backbone}")
    for row in zip(*report.findings.values(), strict=True):
        table.add_row(row[0].check, *(Text(finding.outcome, STYLES[finding.outcome]) for finding in row))
    failures = list(report.failures())
    messages = [
        Text.assemble((f"{finding.check} on {task}: ", "bold red"), finding.message) for task, finding in failures
    ]
    verdict = Text(f"{len(failures)} failed", "bold red") if failures else Text("all passed", "bold green")
    return Group(table, *messages, verdict)
