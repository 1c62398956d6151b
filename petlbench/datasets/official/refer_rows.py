"""Rows of referring expressions: separate the usable ones, and count the others by reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from petlbench.datasets.files.reader import Part, Skips

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FAULTS = (
    "reference without a sentence",
    "empty sentence",
    "box on another image",
    "box that is not finite",
    "box without area",
    "box outside of the image",
)


def cast_boxes(boxes: np.ndarray[Any, Any], *, whole: bool) -> np.ndarray[Any, Any]:
    """Return boxes (n, 4) in the schema's single precision; `whole` truncates them, as TransVG's loader does."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        return (np.trunc(boxes) if whole else boxes).astype(np.float32)


def box_faults(boxes: np.ndarray[Any, Any], extents: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return each box's index in FAULTS, or -1, from x, y, width, height (n, 4) and images' width, height (n, 2)."""
    import numpy as np

    start, side = boxes[:, :2], boxes[:, 2:]
    with np.errstate(over="ignore", invalid="ignore"):
        outside = ((start + side <= 0) | (start >= extents)).any(1)
    conditions = {
        "box that is not finite": ~np.isfinite(boxes).all(1),
        "box without area": (side <= 0).any(1),
        "box outside of the image": outside,
    }
    return np.select(list(conditions.values()), [FAULTS.index(name) for name in conditions], -1)


def rec_table(
    boxes: np.ndarray[Any, Any], faults: np.ndarray[Any, Any], expression: pa.Array, **columns: pa.Array
) -> pa.Table:
    """Return the columns of the schema and `fault`, the index in FAULTS, or -1."""
    import pyarrow as pa
    import pyarrow.compute as pc

    blank = pc.equal(pc.utf8_trim_whitespace(expression), "").fill_null(False).to_numpy(zero_copy_only=False)
    faults[blank] = FAULTS.index("empty sentence")
    faults[expression.is_null().to_numpy(zero_copy_only=False)] = FAULTS.index("reference without a sentence")
    box = pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), 4)
    return pa.table({**columns, "expression": expression, "box": box, "fault": pa.array(faults)})


def usable_references(table: pa.Table) -> Part:
    """Return the rows without a fault, and count the others."""
    import pyarrow.compute as pc

    skips = Skips()
    for code, fault in enumerate(FAULTS):
        faulty = table.filter(pc.equal(table["fault"], code))
        if faulty.num_rows:
            skips.add(fault, faulty["sample_id"][0].as_py(), faulty.num_rows)
    return Part(table.filter(pc.equal(table["fault"], -1)).drop_columns("fault"), skips)
