"""The cost of loading a Karpathy file beyond parsing it: `python -m tests.benchmarks.bench_karpathy`.

Uses a generated file of COCO's published size, tokens included. `json.load` of it and the loading of all three splits,
from an empty cache, take turns, so that a machine's drift affects both; separate processes measure peaks of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter
from typing import Any

import datasets  # noqa: F401 -- imported here, so that neither its time nor its memory counts
import psutil
import pyarrow.parquet

from petlbench.api.source import SPLITS
from petlbench.datasets.files.coco import image_name
from petlbench.datasets.files.declaration import FilesConfig
from petlbench.datasets.official.karpathy import COCO
from tests.benchmarks import holds, sized

LIMIT = 1.5  # highest allowed value of both ratios
ROUNDS = sized(3, 1)
IMAGES, CAPTIONS = sized((123_287, 616_767), (123, 616))
VAL2014 = sized(40_504, 40)  # images; they come first in the real file
HELD_OUT = sized(5000, 5)  # images of val, and of test
WORDS = "a man riding two small dogs with red umbrellas stands near the street while people watch kites in blue sky"
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of `ru_maxrss`


def generate(root: Path, images: int = IMAGES, captions: int = CAPTIONS) -> Path:
    """Write the file, and an empty file for each image, piece by piece, since this process must stay small."""
    rng, words, sentid = random.Random(0), WORDS.split(), 0
    path = root / "dataset_coco.json"
    for folder in ("train2014", "val2014"):
        (root / folder).mkdir()
    with path.open("w", encoding="utf-8") as file:
        file.write('{"images": [')
        for rank in range(images):
            count = captions // images + (rank < captions % images)
            entry = _entry(rank, [rng.choices(words, k=rng.randint(8, 13)) for _ in range(count)], sentid)
            sentid += count
            (root / entry["filepath"] / entry["filename"]).touch()
            file.write(f"{', ' if rank else ''}{json.dumps(entry)}")
        file.write('], "dataset": "coco"}')
    return path


def _entry(rank: int, tokens: Sequence[list[str]], sentid: int) -> dict[str, Any]:
    folder = "val2014" if rank < VAL2014 else "train2014"
    split = "train" if rank >= VAL2014 else {0: "val", 1: "test"}.get(rank // HELD_OUT, "restval")
    sentences = [
        {"tokens": words, "raw": " ".join(words).capitalize() + ".", "imgid": rank, "sentid": sentid + number}
        for number, words in enumerate(tokens)
    ]
    return {
        "filepath": folder,
        "sentids": [sentence["sentid"] for sentence in sentences],
        "filename": image_name(folder, rank).rpartition("/")[2],
        "imgid": rank,
        "split": split,
        "sentences": sentences,
        "cocoid": rank,
    }


def parse(path: Path) -> object:
    """Parse with the standard library alone."""
    with path.open(encoding="utf-8") as file:
        return json.load(file)


def load(path: Path) -> object:
    """Load all splits of a new source with an empty cache."""
    os.utime(path)  # the cache remembers an unchanged file's digest
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PETLBENCH_CACHE"] = cache
        source = COCO(FilesConfig(), path.parent)
        return [source.load("retrieval", split) for split in SPLITS]


WAYS: Mapping[str, Callable[[Path], object]] = {"json.load": parse, "COCO.load": load}


def seconds(way: str, path: Path) -> float:
    started = perf_counter()
    kept = WAYS[way](path)
    taken = perf_counter() - started
    del kept  # the time does not include freeing it
    return taken


def peak(way: str, path: Path) -> int:
    """Return the peak in bytes above what the process held before, at least 1."""
    before = psutil.Process().memory_info().rss
    kept = WAYS[way](path)
    del kept
    return max(1, getrusage(RUSAGE_SELF).ru_maxrss * UNIT - before)


def apart(measure: Callable[[str, Path], int], way: str, path: Path) -> int:
    """Measure in a separate process, since a child must not inherit the peak of a large parent."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (way, path))


def main(argv: Sequence[str] | None = None) -> int:
    """Print both ratios; the exit status is 1 if one is above LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(argv)
    pyarrow.set_cpu_count(1)  # the standard library uses one core as well
    with tempfile.TemporaryDirectory() as folder:
        path = generate(Path(folder), args.images, args.captions)
        theirs, ours = (apart(peak, way, path) for way in WAYS)
        rounds = [[seconds(way, path) for way in WAYS] for _ in range(args.rounds)]
    time_ratio, memory_ratio = median(b / a for a, b in rounds), ours / theirs
    print(f"json.load  {median(a for a, _ in rounds):.2f} s, peak {theirs / 2**20:.0f} MiB")
    print(f"COCO.load  {median(b for _, b in rounds):.2f} s, peak {ours / 2**20:.0f} MiB")
    print(f"ratios     time {time_ratio:.2f}, memory {memory_ratio:.2f} (limit {LIMIT})")
    return int(not holds(LIMIT, time_ratio, memory_ratio))


if __name__ == "__main__":
    sys.exit(main())
