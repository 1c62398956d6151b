"""Format numbers for tables and axes, and read sizes in bytes."""

from __future__ import annotations

import re
from typing import Any

BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: Any) -> Any:
    """Return `4 GiB`, `800MB` or `1024` as a number of bytes; a value that is not a string passes through.

    Raises ValueError, which names a good size, for other text. pydantic.ByteSize has no such message, takes "1 bit"
    for 0 bytes, and would cost the parser of the command line an import of 40 ms or more.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if not match or match[2].upper() not in BYTE_UNITS:
        raise ValueError(f"a size such as 4 GiB or 800 MB is needed, not '{value}'")
    return int(float(match[1]) * BYTE_UNITS[match[2].upper()])


def human_count(number: float) -> str:
    """Return 12345 as `12.3k`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def human_bytes(number: float) -> str:
    """Return bytes in binary units, such as `12.3 MiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def human_seconds(number: float) -> str:
    """Return seconds as `3.2 ms`, `12.3 s`, `4 min 05 s` or `2 h 05 min`."""
    if number < 0.9995:
        return f"{number * 1000:.3g} ms"
    if number < 99.95:
        return f"{number:.3g} s"
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def score_text(value: float) -> str:
    """Return a score with three decimals (scale 0 to 1), or two from 10 on (percent)."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
