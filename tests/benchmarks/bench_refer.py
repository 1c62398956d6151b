"""The cost of loading a refer data set of the published size beyond parsing its two files with the standard library.

`python -m tests.benchmarks.bench_refer` prints the ratios. Each measurement runs in a separate process, and compared
measurements take turns, so that a machine's drift affects both.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import psutil
from pytest_benchmark.fixture import BenchmarkFixture

from tests.benchmarks import holds, sized

LIMIT = 1.5  # highest allowed value of each ratio
SCALE, ROUNDS = sized((1.0, 3), (0.001, 1))
REFERENCES, IMAGES, ANNOTATIONS = 50_000, 20_000, 200_000
WORDS = ("the", "man", "woman", "left", "right", "blue", "red", "shirt", "dog", "chair", "front", "girl", "umbrella")


class Python2(pickle._Pickler):  # type: ignore[name-defined,misc]  # only the pickler in Python can be extended
    """Writes text as Python 2 wrote its strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_str(self, text: str) -> None:
        encoded = text.encode()
        self.write(b"U" + bytes([len(encoded)]) + encoded if self.proto else b"S" + repr(text).encode() + b"\n")
        self.memoize(text)

    dispatch[str] = save_str


def references(count: int, images: int, annotations: int) -> list[dict[str, Any]]:
    """Draw references in the toolkit's format, 2.85 sentences each on average."""
    rng = np.random.default_rng(0)
    splits = rng.choice(["train", "val", "testA", "testB"], count, p=[0.85, 0.07, 0.04, 0.04]).tolist()
    made, sent_id = [], 0
    for number, split in enumerate(splits):
        sentences = []
        for _ in range(int(rng.choice([2, 3, 4], p=[0.25, 0.65, 0.1]))):
            text = " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(1, 7)))
            sentences.append({"tokens": text.split(), "raw": text.title(), "sent_id": sent_id, "sent": text})
            sent_id += 1
        annotation = number * annotations // count
        made.append(
            {
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "file_name": f"COCO_train2014_{annotation % images:012d}_{number}.jpg",
                "ann_id": annotation,
                "ref_id": number,
                "image_id": annotation % images,
                "split": split,
                "sentences": sentences,
                "category_id": number % 80 + 1,
            }
        )
    return made


def write_instances(path: Path, images: int, annotations: int) -> None:
    """Write instances.json, with polygons of COCO's usual length."""
    rng = np.random.default_rng(1)
    polygons = [json.dumps(rng.uniform(0, 600, (1, 2 * n)).round(2).tolist()) for n in rng.integers(8, 60, 500)]
    head = {"info": {"year": 2014}, "licenses": [], "categories": [{"id": i, "name": f"c{i}"} for i in range(1, 81)]}
    pictures = [
        {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "width": 640, "height": 480, "license": 1}
        for i in range(images)
    ]
    with path.open("w") as file:
        file.write(json.dumps({**head, "images": pictures})[:-1] + ', "annotations": [')
        for i in range(annotations):
            one = {"id": i, "image_id": i % images, "category_id": 1, "iscrowd": 0, "area": 999.5 + i}
            box = {"bbox": [round(i % 500 + 0.37, 2), 20.5, 99.25, 60.01]}
            entry = f'{json.dumps(one | box)[:-1]}, "segmentation": {polygons[i % len(polygons)]}}}'
            file.write(f"{', ' if i else ''}{entry}")
        file.write("]}")


def generate(root: Path, protocol: int, scale: float = SCALE) -> None:
    """Write `refcoco` below `root`; the pictures are empty files, which loading does not open."""
    images, annotations = int(IMAGES * scale), int(ANNOTATIONS * scale)
    folder, pictures = root / "refcoco", root / "train2014"
    folder.mkdir()
    pictures.mkdir()
    buffer = io.BytesIO()
    Python2(buffer, protocol).dump(references(int(REFERENCES * scale), images, annotations))
    (folder / "refs(unc).p").write_bytes(buffer.getvalue())
    write_instances(folder / "instances.json", images, annotations)
    for i in range(images):
        (pictures / f"COCO_train2014_{i:012d}.jpg").touch()


def by_standard_library(folder: Path) -> Any:
    with (folder / "refs(unc).p").open("rb") as references, (folder / "instances.json").open() as instances:
        return pickle.load(references, encoding="latin-1"), json.load(instances)


def by_source(folder: Path) -> Any:
    from petlbench.datasets.official.refer import RefCOCO

    return RefCOCO(RefCOCO.Config(), folder.parent).load("rec", "train")


def pickle_by_standard_library(folder: Path) -> Any:
    with (folder / "refs(unc).p").open("rb") as references:
        return pickle.load(references, encoding="latin-1")


def pickle_by_ours(folder: Path) -> Any:
    from petlbench.datasets.files.pickles import load_pickle

    return load_pickle(folder / "refs(unc).p")


WAYS: dict[str, Callable[[Path], Any]] = {
    way.__name__: way for way in (by_standard_library, by_source, pickle_by_standard_library, pickle_by_ours)
}


def child(way: str, folder: Path) -> None:
    """Print seconds, and the peak in bytes above what was resident before, at least 1."""
    import datasets  # noqa: F401 -- every user of either imports it anyway
    import pyarrow.compute
    import pyarrow.parquet  # noqa: F401

    import petlbench.datasets.official.refer  # noqa: F401

    before = psutil.Process().memory_info().rss
    started = perf_counter()
    kept = WAYS[way](folder)
    seconds = perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert len(kept) > 0
    print(json.dumps([seconds, max(1, peak - before)]), flush=True)
    os._exit(0)  # the time does not include freeing objects, which takes long


def measure_once(way: str, folder: Path) -> tuple[float, float]:
    """Measure once in a fresh process with an empty cache."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_refer", "--child", way, "--folder", str(folder)]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(command, env={**os.environ, "PETLBENCH_CACHE": cache}, capture_output=True, check=True)
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


@dataclass(frozen=True)
class Ratio:
    """The ratio of our median to the standard library's."""

    time: float
    memory: float
    seconds: tuple[float, float]
    peak_bytes: tuple[float, float]


def compare(ours: str, theirs: str, folder: Path, rounds: int) -> Ratio:
    found = [(measure_once(ours, folder), measure_once(theirs, folder)) for _ in range(rounds)]
    seconds = median(a[0] for a, _ in found), median(b[0] for _, b in found)
    peaks = median(a[1] for a, _ in found), median(b[1] for _, b in found)
    return Ratio(seconds[0] / seconds[1], peaks[0] / peaks[1], seconds, peaks)


def measure(protocol: int = 0, scale: float = SCALE, rounds: int = ROUNDS) -> dict[str, Ratio]:
    """Measure the whole data set, and its pickle alone."""
    with tempfile.TemporaryDirectory() as place:
        # A separate process generates: on Linux, a child counts its parent's peak as its own.
        maker = multiprocessing.get_context("spawn").Process(target=generate, args=(Path(place), protocol, scale))
        maker.start()
        maker.join()
        folder = Path(place) / "refcoco"
        return {
            "RefCOCO.load": compare("by_source", "by_standard_library", folder, rounds),
            "load_pickle": compare("pickle_by_ours", "pickle_by_standard_library", folder, rounds),
        }


def test_loading_against_the_standard_library(benchmark: BenchmarkFixture) -> None:
    found = benchmark.pedantic(measure, rounds=1)
    for name, ratio in found.items():
        benchmark.extra_info[name] = vars(ratio)
        assert holds(LIMIT, ratio.time, ratio.memory), name


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ratios; the exit status is 1 if one is above LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--protocol", type=int, default=0, help="of the pickle: 0 (as published) to 2")
    parser.add_argument("--scale", type=float, default=SCALE)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child, args.folder)
    found = measure(args.protocol, args.scale, args.rounds)
    for name, ratio in found.items():
        seconds = f"{ratio.seconds[0]:.2f} s / {ratio.seconds[1]:.2f} s = {ratio.time:.2f}"
        peaks = f"{ratio.peak_bytes[0] / 2**20:.0f} MiB / {ratio.peak_bytes[1] / 2**20:.0f} MiB = {ratio.memory:.2f}"
        print(f"{name:12}  {seconds}   {peaks}   (limit {LIMIT})")
    return int(not all(holds(LIMIT, ratio.time, ratio.memory) for ratio in found.values()))


if __name__ == "__main__":
    sys.exit(main())
