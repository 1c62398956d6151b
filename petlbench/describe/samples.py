"""Draw samples of a data set as one picture: images with boxes, questions and captions (`petlbench data show`)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from petlbench.api.source import SPLITS
from petlbench.core.drawing import beside, contact_sheet, draw_boxes, fitted
from petlbench.core.errors import UserError
from petlbench.core.files import make_folder, write_atomic
from petlbench.core.messages import did_you_mean, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from petlbench.api.source import Source

COLUMNS = 4
MAX_SAMPLES = 400  # of one sheet: its pixels must fit into memory
SIDE = 320  # largest width and height of an image, in pixels
MAX_CHARACTERS = 800  # of a sample's text
# `text` and `picture` format these columns; any other becomes a line `name: value`.
FORMATTED = ("sample_id", "expression", "question", "answers", "captions", "box")
HIDDEN = ("image_id", "answer_type", "subset")


def show_samples(
    task: str, dataset: str, source: Source, *, split: str, count: int, seed: int, out: Path | None = None
) -> Path:
    """Draw `count` rows with `seed`, write their sheet and return its path. Raise UserError if there are no rows."""
    out = out or Path("pictures") / f"{task}_{dataset}_{split}.png"
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: a contact sheet is a PNG file: let its name end in .png")
    if count > MAX_SAMPLES:
        raise UserError(
            f"--count {count}: a sheet holds at most {MAX_SAMPLES} samples: draw others with another --seed"
        )
    rows = source.load(task, _checked_split(source, task, split))
    if not len(rows):
        raise UserError(f"{dataset} has no rows for {task}, {split}")
    drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])
    samples = [_sample(rows, int(i)) for i in drawn]
    data = io.BytesIO()
    contact_sheet([image for image, _ in samples], [text for _, text in samples], COLUMNS).save(data, "PNG")
    make_folder(out.parent)
    write_atomic(out, data.getvalue())
    return out


def _checked_split(source: Source, task: str, split: str) -> str:
    """Return `split`. Raise UserError, with the closest name and all names, if the source does not have it."""
    names = list(dict.fromkeys([*SPLITS, *source.parts(task)]))
    if split not in names:
        hint = did_you_mean(split, names) or ":"
        raise UserError(f"there is no split '{split}' for {task}{hint} there are {', '.join(names)}")
    return split


def _sample(rows: Any, number: int) -> tuple[Image, str]:
    try:
        row = rows[number]
    except UserError:
        raise
    except Exception as error:  # on a damaged stream a decoder may raise any exception
        raise UserError(f"row {number} cannot be opened ({one_line(error)}): get its image again") from None
    return picture(row), text(row)


def picture(row: Mapping[str, Any]) -> Image:
    """Return the row's images side by side, scaled to fit a sheet; the box is drawn on the first."""
    images = [fitted(value, SIDE) for value in row.values() if _is_image(value)]
    if "box" in row:
        image, (across, down) = images[0]
        x, y, width, height = row["box"]
        box = (x * across, y * down, width * across, height * down)
        images[0] = draw_boxes(image, [(box, "", "lime")], outline_pixels=2), (across, down)
    return beside([image for image, _ in images])


def text(row: Mapping[str, Any]) -> str:
    """Return the row's text: a first line with its name, then its expression, question, answers and captions."""
    lines = [row["sample_id"]]
    lines += [row[name] for name in ("expression", "question") if name in row]
    if "answers" in row:
        lines.append("→ " + (_answer_counts(row["answers"]) or "(its answers are not public)"))
    lines += [f"• {caption}" for caption in row.get("captions", ())]
    lines += [f"{name}: {value}" for name, value in row.items() if not (name in FORMATTED + HIDDEN or _is_image(value))]
    full = "\n".join(" ".join(str(line).split()) for line in lines)
    return full if len(full) <= MAX_CHARACTERS else f"{full[:MAX_CHARACTERS]}…"


def _is_image(value: Any) -> bool:
    from PIL.Image import Image

    return isinstance(value, Image)


def _answer_counts(answers: list[str]) -> str:
    """List each answer once with its count, the most frequent first."""
    return ", ".join(f"{answer} ×{n}" if n > 1 else answer for answer, n in Counter(answers).most_common())
