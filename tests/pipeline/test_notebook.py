"""A class of a notebook or a script, that is of `__main__`, can be inspected there, but not run in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.miniatures import picture

# The cells of a notebook, in order: its classes are in no file from which they could be imported.
DEFINED = """
import json
from pathlib import Path
import pyarrow as pa
from datasets import Features, Image, Value
from petlbench.datasets.files.source import FileSource
from petlbench.datasets.files.declaration import Choice
from petlbench.datasets.files.reader import Part, Reader

class Listed(Reader):
    layout = "listed"

    @classmethod
    def find(cls, source, root):
        return cls(source, root)

    @classmethod
    def places(cls, source):
        return "moods.txt"

    def parts(self, task):
        return ("all",)

    def files(self, task, part):
        return [self.root / "moods.txt"]

    def read(self, task, part):
        names, moods = zip(*(line.split() for line in self.files(task, part)[0].read_text().splitlines()))
        ids = pa.array(names)
        return Part(pa.table({"sample_id": ids, "image_id": ids, "image": ids, "mood": moods}))

class Moods(FileSource):
    name, origin, readers, image_bases = "moods", "ask the cat", (Listed,), ("",)
    tasks = frozenset({"moods"})

    def features(self, task):
        texts = dict.fromkeys(("sample_id", "image_id", "mood"), Value("string"))
        return Features({**texts, "image": Image()})

    def choice(self, task, split):
        return Choice(("all",), "held out" if split == "validation" else "kept")
"""
LOOKED_AT = """
from petlbench.describe import dataset, samples
source = Moods(Moods.Config(), Path("data"))
row = source.load("moods", "train", 3)[0]
counts = {entry.name: entry.counts for entry in dataset.report_dataset("moods", "mine", source, None).entries}
sheet = samples.show_samples("moods", "mine", source, split="train", count=4, seed=0)
answer = samples.text(row)
before = source.fingerprint("moods")
(Path("data") / "moods.txt").write_text("0.png happy")
changed = Moods(Moods.Config(skip_broken=True), Path("data"))
print(json.dumps([row["image"].size, counts, str(sheet), answer, before, len(changed.load("moods", "train"))]))
"""
RUN = """
import sys
from petlbench.api.registries import DATASETS
from petlbench.commands import main
from petlbench.datasets.scenes.digits import Digits

class Mine(Digits):
    pass

DATASETS.offer("mine", Mine)
assert main.main(["data", "check", "vqa:mine", "--sample", "1"]) == 0
sys.exit(main.main(["run", "smoke", "--methods", "head_only", "--tasks", "vqa:mine", "--out", "out"]))
"""


def notebook(folder: Path, *cells: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PETLBENCH_CACHE": str(folder / "cache")}
    command, code = [sys.executable, "-"], "\n".join(cells)
    return subprocess.run(command, input=code, capture_output=True, text=True, check=False, cwd=folder, env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(40):
        picture(tmp_path / "data" / f"{number}.png", (16, 12), number)
    (tmp_path / "data" / "moods.txt").write_text("".join(f"{number}.png happy\n" for number in range(40)))
    return tmp_path


def test_a_source_of_a_notebook_is_loaded_checked_and_shown_there(folder: Path) -> None:
    done = notebook(folder, DEFINED, LOOKED_AT)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    size, counts, sheet, answer, fingerprint, rows = found
    assert (size, len(fingerprint), rows) == ([16, 12], 64, 1)
    assert counts["all"] == {"images": 40, "rows": 40}
    assert counts["train"]["rows"] + counts["validation"]["rows"] == 40
    assert (folder / sheet).is_file() and "mood: happy" in answer
    assert not (folder / "cache" / "tables").exists(), "its code has no digest that a kept table could go by"


@pytest.mark.slow
def test_a_run_refuses_what_only_the_notebook_knows_in_one_line(folder: Path) -> None:
    done = notebook(folder, RUN)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith(
        "petlbench: error: data set 'mine' is defined in a notebook or a script, where the processes"
    )
    assert not (folder / "out").exists()
