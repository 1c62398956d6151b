"""The cost of loading VQAv2's files beyond parsing them: `python -m tests.benchmarks.bench_vqa_files`.

Draws files of the published size: 650,000 questions with ten answers each. `VQAv2.load` of all of them, with a cold
cache, and `json.load` of the same files take turns in separate processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from petlbench.datasets.files.coco import image_name
from petlbench.datasets.official.vqav2 import OfficialFiles, VQAv2, VQAv2Config
from tests.benchmarks import holds, sized

LIMIT = 1.5  # highest allowed value of both ratios
QUESTIONS, PER_IMAGE = sized(650_000, 650), 5
PART = "train2014"
COMMON = ["yes", "no", "1", "2", "white", "red", "don't know", "on the left", "tennis racket", "frisbee"]


@dataclass(frozen=True)
class Cost:
    """Seconds, and the peak of resident bytes above the imports' own, at least 1."""

    seconds: float
    peak_bytes: int


def generate(root: Path, questions: int) -> None:
    """Write both files in the official format, and an empty file for each image."""
    draw = random.Random(0)
    answers = [json.dumps(a) for a in COMMON] + [f'"answer {n}"' for n in range(30_000)]
    head = f'{{"info": {{"version": "2.0"}}, "data_type": "mscoco", "data_subtype": "{PART}", "license": {{}}, '
    (root / PART).mkdir(parents=True)
    asked, annotated = root / f"v2_OpenEnded_mscoco_{PART}_questions.json", root / f"v2_mscoco_{PART}_annotations.json"
    with asked.open("w") as left, annotated.open("w") as right:
        left.write(f'{head}"questions": [')
        right.write(f'{head}"annotations": [')
        for n in range(questions):
            image_id = n // PER_IMAGE + 9
            if n % PER_IMAGE == 0:
                (root / image_name(PART, image_id)).touch()
            ids = f'"image_id": {image_id}, "question_id": {image_id * 1000 + n % PER_IMAGE}'
            comma = ", " if n else ""
            left.write(f'{comma}{{{ids}, "question": "What is the thing of kind {n % 9973} doing here?"}}')
            # Annotators mostly agree, and a few answers are far more frequent than the rest.
            chosen = [answers[int(len(answers) * draw.random() ** 12)] for _ in range(3)]
            ten = ", ".join(
                f'{{"answer": {chosen[k % 3 if k < 4 else 0]}, "answer_confidence": "yes", "answer_id": {k + 1}}}'
                for k in range(10)
            )
            kinds = f'"question_type": "what is the", "answer_type": "other", "multiple_choice_answer": {chosen[0]}'
            right.write(f'{comma}{{{kinds}, "answers": [{ten}], {ids}}}')
        left.write("]}")
        right.write("]}")


def by_load(root: Path) -> int:
    """Load all rows as a cell does."""
    return len(VQAv2(VQAv2Config(split="official", layout=OfficialFiles.layout), root).load("vqa", PART))


def by_json(root: Path) -> int:
    """Parse both files and free each before the next, which needs less than joining them."""
    found = 0
    for path in sorted(root.glob("*.json")):
        with path.open() as file:
            found += len(json.load(file))
    return found


WAYS: Mapping[str, Callable[[Path], int]] = {"load": by_load, "json": by_json}


def measured(way: str, root: Path) -> Cost:
    """Measure in a separate process."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", __spec__.name, "--way", way, "--root", str(root)]
        environment = {**os.environ, "PETLBENCH_CACHE": cache}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(way: str, root: Path) -> Cost:
    """Measure in this process, after the imports."""
    import datasets
    import pyarrow.compute
    import pyarrow.parquet

    assert datasets and pyarrow.compute and pyarrow.parquet
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = perf_counter()
    WAYS[way](root)
    seconds = perf_counter() - begun
    return Cost(seconds, max(1, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def main(argv: Sequence[str] | None = None) -> int:
    """Print medians and ratios; the exit status is 1 if one is above LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.way:
        found = measure_here(args.way, args.root)
        print(json.dumps({"seconds": found.seconds, "peak_bytes": found.peak_bytes}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "vqa"
        generate(root, args.questions)
        size = sum(path.stat().st_size for path in root.glob("*.json"))
        print(f"{args.questions:,} questions, {size / 2**20:.0f} MiB of JSON")
        costs = [{way: measured(way, root) for way in WAYS} for _ in range(args.rounds)]
    for way in WAYS:
        seconds, peak = (median(getattr(cost[way], name) for cost in costs) for name in ("seconds", "peak_bytes"))
        print(f"{way:5} {seconds:7.2f} s   {peak / 2**20:7.0f} MiB")
    ratios = {
        name: median(getattr(cost["load"], name) / getattr(cost["json"], name) for cost in costs)
        for name in ("seconds", "peak_bytes")
    }
    print(f"ratio time {ratios['seconds']:.2f}, memory {ratios['peak_bytes']:.2f} (limit {LIMIT})")
    return int(not holds(LIMIT, *ratios.values()))


if __name__ == "__main__":
    sys.exit(main())
