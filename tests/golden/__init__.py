"""Reference values of the official evaluations, and checks that compare our metrics with them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from petlbench.metrics.captions import caption_scores, tokenize_pairs
from petlbench.metrics.vqa import vqa_accuracy

FOLDER = Path(__file__).parent
TOLERANCE = 1e-6


class Comparison(NamedTuple):
    """One value of ours and the official one; tokenised captions are strings, other values are numbers."""

    quantity: str
    where: str
    ours: float | str
    official: float | str

    @property
    def difference(self) -> float:
        if isinstance(self.ours, str) or isinstance(self.official, str):
            return float(self.ours != self.official)
        return abs(self.ours - self.official)

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE  # false for NaN too


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def compare(data: dict[str, Any]) -> Iterator[Comparison]:
    """Compare every value in a golden file of captions or of questions. Raises KeyError if it holds neither."""
    return compare_captions(data) if "corpus_cider_d" in data else compare_vqa(data)


def compare_captions(data: dict[str, Any]) -> Iterator[Comparison]:
    cases = data["cases"]
    candidates, references = [case["candidate"] for case in cases], [case["references"] for case in cases]
    # All captions together, as in the toolkit: the caption that follows decides the last period of some captions.
    for case, candidate, own in zip(cases, *tokenize_pairs(candidates, references), strict=True):
        captions = [*case["references"], case["candidate"]]
        official = [*case["tokenized_references"], case["tokenized_candidate"]]
        for caption, tokens, tokenized in zip(captions, [*own, candidate], official, strict=True):
            yield Comparison("tokens", f"case {case['id']}, {caption!r}", " ".join(tokens), tokenized)
    corpus, samples = caption_scores(candidates, references)
    rows = [(f"case {case['id']}", "", case, ours) for case, ours in zip(cases, samples, strict=True)]
    for where, prefix, official, ours in [*rows, ("corpus", "corpus_", data, corpus)]:
        for name in ("cider_d", "rouge_l"):
            yield Comparison(prefix + name, where, ours[name], official[prefix + name])
        for order, value in enumerate(official[prefix + "bleu"], start=1):
            yield Comparison(f"{prefix}bleu_{order}", where, ours[f"bleu_{order}"], value)


def compare_vqa(data: dict[str, Any]) -> Iterator[Comparison]:
    groups: dict[str, dict[str, list[float]]] = {"answer_type": defaultdict(list), "question_type": defaultdict(list)}
    everything = []
    for case in data["cases"]:
        percent = 100 * vqa_accuracy(case["prediction"], case["answers"])
        yield Comparison("accuracy_percent", f"question {case['question_id']}", percent, case["accuracy_percent"])
        everything.append(percent)
        for kind, members in groups.items():
            members[case[kind]].append(percent)
    yield Comparison("overall", "all questions", fmean(everything), data["overall"])
    for kind, members in groups.items():
        for name, official in data[f"per_{kind}"].items():
            yield Comparison(f"per_{kind}", name, fmean(members[name]), official)


def report(path: Path, say: Callable[[str], None] = print, shown: int = 5) -> bool:
    """Print the number of cases, each quantity's worst difference and the first few mistakes; true if there is none."""
    data = load(path)
    worst: dict[str, float] = {}
    wrong = []
    for comparison in compare(data):
        # NaN counts as the worst difference; a plain maximum would lose it.
        difference = comparison.difference if comparison.difference >= 0 else float("inf")
        worst[comparison.quantity] = max(worst.get(comparison.quantity, 0.0), difference)
        if not comparison.agrees:
            wrong.append(comparison)
    say(f"{path}: {len(data['cases'])} cases, {len(wrong)} values differ by more than {TOLERANCE:g}")
    for quantity, difference in worst.items():
        text = f"{difference:.3g}" if quantity != "tokens" else "differ" if difference else "same"
        say(f"  {quantity:<18} {text}")
    for item in wrong[:shown]:
        say(f"  {item.quantity}, {item.where}: ours {item.ours!r}, official {item.official!r}")
    return not wrong
