"""Judge a method by its observations. A check returns the fault and its remedy, or an empty text; or raises Skip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeVar

from petlbench.conformance.bench import distance
from petlbench.conformance.module_snapshot import differing, first_few
from petlbench.conformance.observation import Observations
from petlbench.conformance.report import CheckResult

T = TypeVar("T")
Check = Callable[[Observations], str]
IDENTITY = 1e-6
REGROUPING = 1e-3  # batches of another size add numbers in another order


class Skip(Exception):
    """The reason why a check does not apply, or could not be made."""


def runs(seen: Observations) -> str:
    """Check that the method adapts, trains, predicts and is removed without an exception."""
    return f"{seen.error}: fix this first" if seen.error else ""


def finite(seen: Observations) -> str:
    """Check that losses and predictions are finite, before, during and after training."""
    start = _needed(seen.start)
    if not start.finite:
        return f"the loss before training is {start.loss}, or a prediction is not finite: look at the initial values"
    if seen.diverged:
        return f"{seen.diverged}: look at the initial values and at the recipe's rate"
    return "" if _needed(seen.trained).finite else "predictions after ten steps are not finite: lower the rate"


def identity(seen: Observations) -> str:
    """If the method claims `identity`, check that before training its outputs are those of the untouched backbone."""
    if not seen.claims.identity:
        raise Skip("not claimed")
    _repeating(seen)
    start, untouched = _needed(seen.start), _needed(seen.untouched)
    if not start.finite:
        raise Skip("outputs are not finite: see `finite`")
    if (gap := start.distance(untouched)) <= IDENTITY:
        return ""
    return (
        f"before training, the loss is {start.loss:.7g} and not the untouched backbone's {untouched.loss:.7g} (largest "
        f"difference {gap:.2g}): start inserted modules at zero, or do not claim `identity`"
    )


def frozen(seen: Observations) -> str:
    """Check that frozen tensors keep every bit through ten steps."""
    changed = _needed(seen.frozen_changed)
    if not changed:
        return ""
    return (
        f"{_counted(changed, 'frozen tensor')} changed in training: {first_few(changed)}; let it require gradient, or "
        "do not write to it"
    )


def gradients(seen: Observations) -> str:
    """Check that trainable parameters get a gradient, are declared unused, or cannot be reached on this task."""
    alive = _needed(seen.alive)
    if seen.trained is None:
        raise Skip("training did not end")
    faults = []
    for pattern, _ in seen.claims.unused_parameters.items():
        matches = [name for name in seen.trainable if fnmatchcase(name, pattern)]
        if not matches:
            faults.append(f"`unused_parameters` names {pattern}, which no trainable tensor matches: remove it")
        elif living := [name for name in matches if name in alive]:
            faults.append(
                f"`unused_parameters` names {pattern}, but {first_few(living)} gets a gradient: remove or narrow it"
            )
    no_gradient = [name for name in seen.trainable if name not in alive and name not in seen.idle]
    declared = [*seen.claims.unused_parameters, *seen.claims.conditional]
    if unused := [name for name in no_gradient if not any(fnmatchcase(name, pattern) for pattern in declared)]:
        faults.append(
            f"no gradient ever reaches {first_few(unused)}: use it, freeze it, or declare it in `unused_parameters`"
        )
    return "; ".join(faults)


def conditional(tasks: Mapping[str, Observations], everything: bool) -> str:
    """Check that each parameter declared `conditional` gets a gradient on at least one task, if `tasks` are all."""
    claims = next(iter(tasks.values())).claims
    if not claims.conditional:
        raise Skip("not claimed")
    if not everything:
        raise Skip("needs all tasks that the backbone serves")
    # A parameter that some task cannot reach is exempt: a decoder's module for a task without text is never used.
    alive = {_plain(name) for seen in tasks.values() for name in _needed(seen.alive) | seen.idle}
    for pattern in claims.conditional:
        named = [name for seen in tasks.values() for name in seen.trainable if fnmatchcase(name, pattern)]
        named = [name for name in named if not any(fnmatchcase(name, other) for other in claims.unused_parameters)]
        if never := [name for name in dict.fromkeys(map(_plain, named)) if name not in alive]:
            return f"`conditional` names {pattern}, but on no task does {first_few(never)} get a gradient: freeze it"
    return ""


def _plain(name: str) -> str:
    """Return the name that the parameter has if the suite adds no parts to the backbone."""
    return name.replace("backbone.inner.", "backbone.", 1)


def detached(seen: Observations) -> str:
    """If claimed, check that no gradient enters the frozen backbone and that it saves nothing for backward."""
    if not seen.claims.no_backbone_gradient:
        raise Skip("not claimed")
    if not (reached := _needed(seen.reached)):
        return ""
    return (
        f"autograd reaches into {_counted(reached, 'frozen module')}, first {first_few(reached)}: detach what "
        "enters, freeze what trains below (host parts too), or do not claim `no_backbone_gradient`"
    )


def evaluation(seen: Observations) -> str:
    """Check that in evaluation mode predictions repeat, change nothing, and do not depend on the rest of the batch."""
    trained, repeated = _needed(seen.trained), _needed(seen.repeated)
    if seen.moved_modes:
        return f"`adapt` switches {first_few(seen.moved_modes)} between training and evaluation: leave modes alone"
    if seen.awake:
        return f"{first_few(seen.awake)} is in training mode after an evaluation: do not call train() in a forward pass"
    if seen.touched:
        return f"evaluation changes {first_few(seen.touched)}: update only when `self.training`"
    if trained.bits != repeated.bits:
        return (
            f"two evaluations differ (losses {trained.loss:.7g} and {repeated.loss:.7g}): draw nothing and keep no "
            "state when `self.training` is False; only registered modules get the mode"
        )
    alone = _numeric(trained.predictions) and not seen.claims.mixes_rows
    if alone and distance(trained.predictions, seen.regrouped) > REGROUPING:
        return "predictions of a row depend on the rows beside it: use no statistics over the batch"
    return ""


def saved(seen: Observations) -> str:
    """Check that the adapter file holds all trainable tensors and no frozen ones."""
    _needed(seen.trained)
    if seen.sharing:
        return f"{first_few(seen.sharing)} shares its memory with a frozen tensor: clone it"
    if seen.unsaved:
        names = first_few(seen.unsaved)
        return f"{names} differs between the adapter file and the trainable parameters: keep names and shapes fixed"
    return ""


def reload(seen: Observations) -> str:
    """Check that a new process that reads the adapter file predicts the same, to the bit."""
    trained = _needed(seen.trained)
    _repeating(seen)
    if seen.reloaded is None:
        raise Skip("a new process can import only classes at the top of a module")
    if error := seen.reloaded.get("error"):
        return f"a new process fails: {error}"
    if seen.reloaded["bits"] == trained.bits:
        return ""
    lost = differing(seen.values, seen.reloaded["values"])
    if seen.frozen_changed:
        raise Skip("frozen tensors changed: see `frozen`")
    blame = f"{first_few(lost)} differs: make it a trained Parameter" if lost else "no tensor or number differs"
    return f"a new process that loads the adapter predicts something else; {blame}, or derive it from the seed"


def seed(seen: Observations) -> str:
    """Check that two trainings from the same seed give the same losses and predictions, to the bit."""
    trained, again = _needed(seen.trained), _needed(seen.again)
    for (step, first), (_, second) in zip(seen.losses, seen.again_losses, strict=True):
        if first != second:
            return (
                f"with the same seed, the losses of step {step} are {first:.9g} and {second:.9g}: draw from torch's "
                "own generator only, and keep nothing between two trainings"
            )
    return "" if trained.bits == again.bits else "with the same seed, predictions differ: keep no state between runs"


def merge(seen: Observations) -> str:
    """If the method claims `mergeable`, check that `merge` keeps the outputs."""
    if not seen.claims.mergeable:
        raise Skip("not claimed")
    unmerged = _needed(seen.unmerged)
    _repeating(seen)
    if seen.merge_error:
        return f"`merge` fails: {seen.merge_error}; fix it, or do not claim `mergeable`"
    gap = unmerged.distance(_needed(seen.merged))
    if gap <= seen.tolerance:
        return ""
    return f"merged outputs differ by {gap:.2g}, more than {seen.tolerance:g}: `merge` must fold exactly what runs"


def restore(seen: Observations) -> str:
    """Check that removing the method restores the backbone to the bit, and leaves nothing behind."""
    left, restored, original = _needed(seen.left), _needed(seen.restored), _needed(seen.original)
    if left:
        return f"restoring the backbone leaves {first_few(left)} changed: insert modules, and change nothing else"
    return (
        "" if restored.bits == original.bits else "the restored backbone predicts otherwise: keep no state outside it"
    )


CHECKS: tuple[Check, ...] = (
    runs,
    finite,
    identity,
    frozen,
    gradients,
    detached,
    evaluation,
    saved,
    reload,
    seed,
    merge,
    restore,
)


def judge(seen: Observations) -> list[CheckResult]:
    """Make every check; return the results, always in the same order."""
    return [_result(check.__name__, partial(check, seen)) for check in CHECKS]


def judge_together(tasks: Mapping[str, Observations], *, everything: bool) -> CheckResult:
    """Make the check that needs several tasks. `everything`: `tasks` are all that the backbone serves."""
    return _result("conditional", lambda: conditional(tasks, everything))


def _result(name: str, look: Callable[[], str]) -> CheckResult:
    try:
        message = look()
    except Skip as reason:
        return CheckResult(name, "skip", str(reason))
    return CheckResult(name, "fail" if message else "pass", message)


def _needed(value: T | None) -> T:
    if value is None:
        raise Skip("not reached")
    return value


def _repeating(seen: Observations) -> None:
    """Raise Skip if evaluation does not repeat within one process: then no other comparison makes sense."""
    if seen.trained is not None and evaluation(seen):
        raise Skip("evaluation does not repeat: see `evaluation`")


def _numeric(value: object) -> bool:
    return all(map(_numeric, value)) if isinstance(value, list) else isinstance(value, float)


def _counted(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"
