"""What loading a Karpathy file costs beyond parsing it: `python -m tests.benchmarks.bench_karpathy`.

A generated file of COCO's published size, tokens included. `json.load` of it and the loading of all three splits, from
an empty cache, take turns, so that a machine's drift hits both; peaks of memory are taken in processes of their own.
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

import datasets  # noqa: F401 -- imported here, so that neither time nor memory of it counts
import psutil
import pyarrow.parquet

from petlbench.api.source import SPLITS
from petlbench.datasets.files.coco import image_name
from petlbench.datasets.files.declaration import FilesConfig
from petlbench.datasets.official.karpathy import COCO
from tests.benchmarks import holds, sized

LIMIT = 1.5  # of both ratios
ROUNDS = sized(3, 1)
IMAGES, CAPTIONS = sized((123_287, 616_767), (123, 616))
VAL2014 = sized(40_504, 40)  # images; they stand first in the real file
HELD_OUT = sized(5000, 5)  # images of val, and of test
WORDS = "a man riding two small dogs with red umbrellas stands near the street while people watch kites in blue sky"
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of what `ru_maxrss` counts


def generate(root: Path, images: int = IMAGES, captions: int = CAPTIONS) -> Path:
    """The file, and an empty file for each image. Written as it is made: this process must stay small."""
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
        {"tokens": said, "raw": " ".join(said).capitalize() + ".", "imgid": rank, "sentid": sentid + number}
        for number, said in enumerate(tokens)
    ]
    return {
        "filepath": folder,
        "sentids": [said["sentid"] for said in sentences],
        "filename": image_name(folder, rank).rpartition("/")[2],
        "imgid": rank,
        "split": split,
        "sentences": sentences,
        "cocoid": rank,
    }


def parse(path: Path) -> object:
    """What the standard library alone does."""
    with path.open(encoding="utf-8") as file:
        return json.load(file)


def load(path: Path) -> object:
    """All splits of a new source, nothing kept from before."""
    os.utime(path)  # the digest of a file that has not changed is remembered
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PETLBENCH_CACHE"] = cache
        source = COCO(FilesConfig(), path.parent)
        return [source.load("retrieval", split) for split in SPLITS]


WAYS: Mapping[str, Callable[[Path], object]] = {"json.load": parse, "COCO.load": load}


def seconds(way: str, path: Path) -> float:
    started = perf_counter()
    kept = WAYS[way](path)
    taken = perf_counter() - started
    del kept  # freeing it is not part of it
    return taken


def peak(way: str, path: Path) -> int:
    """Bytes above what the process held before, at most; one where that was enough."""
    before = psutil.Process().memory_info().rss
    kept = WAYS[way](path)
    del kept
    return max(1, getrusage(RUSAGE_SELF).ru_maxrss * UNIT - before)


def apart(measure: Callable[[str, Path], int], way: str, path: Path) -> int:
    """The measure in a process of its own, which must not begin with the peak of a large parent."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (way, path))


def main(argv: Sequence[str] | None = None) -> int:
    """Print both ratios; exit status 1 where one is above LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(argv)
    pyarrow.set_cpu_count(1)  # the standard library has one core as well
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
