"""METEOR and SPICE as COCO's caption evaluation computes them, by its own Java programs.

They come with the package pycocoevalcap, which is optional (`pip install petlbench[java]`), and need `java`. As in
that package, both programs get captions tokenised as for the other metrics. METEOR 1.5
(Denkowski and Lavie, 2014) with `-l en -norm`; SPICE 1.0 (Anderson et al., 2016), mean of the F-scores.
"""

from __future__ import annotations

import json
import math
import queue
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from petlbench.core.errors import UserError
from petlbench.metrics.bleu import check_pairs
from petlbench.metrics.captions import tokenize_pairs
from petlbench.metrics.cider import CiderScores

REPLY_SECONDS = 120.0  # METEOR answers within milliseconds, after some seconds of loading its paraphrases
SPICE_SECONDS = 6 * 3600.0
_FETCH = "python -c 'from pycocoevalcap.spice import get_stanford_models as m; m.get_stanford_models()'"


def _java(metric: str) -> str:
    java = shutil.which("java")
    if java is None:
        raise UserError(f"{metric} needs Java, and there is no program `java`: install a Java runtime (8 or later)")
    return java


def _folder(metric: str, name: str) -> Path:
    """Return the folder `name` of pycocoevalcap."""
    spec = find_spec("pycocoevalcap")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / name).is_dir():
            return Path(place) / name
    raise UserError(f"{metric} needs the package pycocoevalcap: pip install 'petlbench[java]'")


def check_available(metrics: Sequence[str]) -> None:
    """Raise a UserError that says what to install, if one of `metrics` cannot be computed here."""
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}': the Java metrics are {', '.join(METRICS)}")
        _command(name)


def _command(metric: str) -> tuple[list[str], Path]:
    """Return the command that starts the metric's program, and the folder to start it in."""
    # Otherwise Java before version 18 reads accents by the locale.
    java = [_java(metric), "-Dfile.encoding=UTF-8", f"-Xmx{'2' if metric == 'meteor' else '8'}G", "-jar"]
    folder = _folder(metric, metric)
    if metric == "spice" and not (folder / "lib" / "stanford-corenlp-3.6.0-models.jar").exists():
        raise UserError(f"spice needs Stanford CoreNLP 3.6.0 in {folder / 'lib'}: with a network, run {_FETCH}")
    jar = "meteor-1.5.jar" if metric == "meteor" else "spice-1.0.jar"
    return [*java, jar], folder


class _Meteor:
    """METEOR's program, which answers each line with a line. Leaving the block kills it."""

    def __enter__(self) -> _Meteor:
        command, folder = _command("meteor")
        self._process = subprocess.Popen(
            [*command, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # nobody reads it, and a full pipe would stop the program
            encoding="utf-8",
            errors="replace",
        )
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._replies.put(line.strip())
        self._replies.put("")

    def say(self, *parts: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(" ||| ".join(parts) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise UserError(f"METEOR's Java program ended early ({error}): does `java -version` work?") from error

    def hear(self) -> str:
        try:
            reply = self._replies.get(timeout=REPLY_SECONDS)
        except queue.Empty:
            raise UserError(f"METEOR's Java program said nothing for {REPLY_SECONDS:g} s: run it again") from None
        if not reply:
            raise UserError("METEOR's Java program ended early: does `java -version` work, with 2 GB of memory free?")
        return reply

    def number(self) -> float:
        reply = self.hear()
        try:
            return float(reply)
        except ValueError:
            raise UserError(
                f"METEOR's Java program answered {reply!r} instead of a score: is pycocoevalcap 1.2?"
            ) from None


def _line(tokens: Sequence[str]) -> str:
    """Tokens as one field of METEOR's protocol, whose separator and line breaks cannot stand in it."""
    return re.sub(r"[ \t\r\n]+", " ", " ".join(tokens).replace("|||", " ")).strip(" ")


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CiderScores:
    """METEOR of captions as written (N) against `references` (N, one or more each), in [0, 1].

    The corpus score is from pooled statistics, not the samples' mean. A candidate without any word scores 0. Raises
    UserError when Java or its program cannot be used, ValueError as `caption_scores`.
    """
    check_pairs(candidates, references)
    tokens, reference_tokens = tokenize_pairs(candidates, references)
    with _Meteor() as program:
        statistics = []
        for words, own in zip(tokens, reference_tokens, strict=True):
            program.say("SCORE", *(_line(reference) for reference in own), _line(words))
            statistics.append(program.hear())
        program.say("EVAL", *statistics)
        samples = [program.number() for _ in statistics]
        return CiderScores(program.number(), samples)


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CiderScores:
    """SPICE (F-score over scene graphs) of captions as written (N) against `references` (N, one or more each).

    In [0, 1]; NaN where the program gives no score. Raises as `meteor`.
    """
    check_pairs(candidates, references)
    tokens, reference_tokens = tokenize_pairs(candidates, references)
    command, folder = _command("spice")
    asked = [
        {"image_id": index, "test": " ".join(words), "refs": [" ".join(reference) for reference in own]}
        for index, (words, own) in enumerate(zip(tokens, reference_tokens, strict=True))
    ]
    with tempfile.TemporaryDirectory() as place:
        question, answer = Path(place) / "captions.json", Path(place) / "scores.json"
        question.write_text(json.dumps(asked), encoding="utf-8")
        arguments = [*command, str(question), "-out", str(answer), "-subset", "-silent"]
        try:
            subprocess.run(arguments, cwd=folder, check=True, capture_output=True, timeout=SPICE_SECONDS)
            found = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(answer.read_bytes())}
        except (subprocess.SubprocessError, OSError, ValueError, LookupError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"SPICE's Java program failed ({reason}): it needs Java 8 and 8 GB of memory") from error
    samples = [_score(found.get(index)) for index in range(len(asked))]
    return CiderScores(sum(samples) / len(samples), samples)


def _score(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], CiderScores]] = {"meteor": meteor, "spice": spice}
