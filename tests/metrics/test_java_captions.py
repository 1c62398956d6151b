"""METEOR and SPICE: their Java programs' protocol against stand-ins, and METEOR itself where it is installed."""

from __future__ import annotations

import math
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from petlbench.core.errors import UserError
from petlbench.metrics import java_captions
from petlbench.metrics.java_captions import check_available, meteor, spice

CAPTIONS = ["a cat", "a ||| b\tc\nd <a b='|||'>", "", "..."]
REFERENCES = [["a cat"], ["a b", "c"], ["a"], [""]]

# Answers each line with its number of fields, and the evaluation with the numbers that it was given.
ECHO = """
for line in sys.stdin:
    kind, *fields = line.rstrip("\\n").split("|||")
    if kind == "SCORE ":
        print(len(fields), flush=True)
    else:
        print(*fields, 0.5, sep="\\n", flush=True)
"""

SCENES = """
import json
asked = json.load(open(sys.argv[sys.argv.index("-jar") + 2]))
scores = [{"image_id": a["image_id"], "scores": {"All": {"f": 0.25 * len(a["refs"])}}} for a in asked]
json.dump(scores[::-1], open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


def stand_in(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `java` a Python program, and pycocoevalcap a folder with the files that are looked for."""
    program = folder / "java"
    program.write_text(f"#!{sys.executable}\nimport sys\n{code}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    models = folder / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar"
    models.parent.mkdir(parents=True)
    models.touch()
    (folder / "meteor").mkdir()
    monkeypatch.setattr(java_captions, "_folder", lambda metric, name: folder / name)


@pytest.mark.skipif(not shutil.which("java") or not find_spec("pycocoevalcap"), reason="needs Java and pycocoevalcap")
def test_meteor_equals_the_toolkit() -> None:
    candidates = ["a cat sits on a mat", "", "two dogs\nrun", "café naïve", " 1 1/2 cups", "the the the", "..."]
    references = [["a cat is on the mat", "the cat"], ["a dog"], ["two dogs are running", "dogs run"]]
    references += [["café naïve", "x"], ["1 1/2 cups"], ["", "the"], ["..."]]
    official = [0.42700394217556276, 0, 0.804159445407279, 1, 1, 0.3076923076923077, 0]
    assert meteor(candidates, references).samples == pytest.approx(official, abs=1e-9)


def test_no_caption_breaks_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(ECHO, tmp_path, monkeypatch)
    scores = meteor(CAPTIONS, REFERENCES)
    assert scores.samples == [2, 3, 2, 2]  # the candidate and its references, empty ones too
    assert scores.corpus == 0.5


@pytest.mark.parametrize(
    ("code", "complaint"),
    [("", "ended early"), ("for line in sys.stdin: print('x', flush=True)", "answered 'x'")],
    ids=["ends", "babbles"],
)
def test_meteor_that_fails_is_one_line(
    code: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(code, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=complaint) as error:
        meteor(["a cat"], [["a cat"]])
    assert "\n" not in str(error.value)


def test_silent_meteor_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)",
        tmp_path,
        monkeypatch,
    )
    monkeypatch.setattr(java_captions, "REPLY_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(UserError, match="said nothing for 1 s"):
        meteor(["a cat"], [["a cat"]])
    assert time.monotonic() - start < 20
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_spice_reads_the_scores_by_image_and_averages_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(SCENES, tmp_path, monkeypatch)
    assert spice(CAPTIONS, REFERENCES) == (0.3125, [0.25, 0.5, 0.25, 0.25])


@pytest.mark.parametrize("code", ["sys.exit(3)", "open(sys.argv[-3], 'w').write('{')", "pass"])
def test_spice_that_fails_is_one_line(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(code, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="SPICE's Java program failed") as error:
        spice(CAPTIONS, REFERENCES)
    assert "\n" not in str(error.value)


def test_missing_score_is_not_a_number() -> None:
    assert math.isnan(java_captions._score(None)) and java_captions._score(1) == 1


def test_what_is_missing_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("", tmp_path, monkeypatch)
    check_available(["meteor", "spice"])
    with pytest.raises(UserError, match=r"unknown metric 'bleu'.*meteor, spice"):
        check_available(["bleu"])
    (tmp_path / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar").unlink()
    with pytest.raises(UserError, match=r"Stanford CoreNLP 3\.6\.0 in .*lib: with a network, run python -c"):
        check_available(["spice"])


def test_missing_java_and_package_are_said_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = tmp_path / "java"
    java.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(java_captions, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'petlbench\[java\]'"):
        check_available(["meteor"])
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="install a Java"):
        check_available(["meteor"])
