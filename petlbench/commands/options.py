"""Parse and check the values of options; each error says what is needed."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from petlbench.core.units import parse_bytes


def names(text: str) -> list[str]:
    values = [name.strip() for name in text.split(",") if name.strip()]
    if not values:
        raise argparse.ArgumentTypeError("a comma-separated list of names is needed")
    return values


def seeds(text: str) -> list[int]:
    try:
        values = [int(part) for part in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"comma-separated whole numbers are needed, not '{text}'") from None
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"a seed is given more than once: {text}")
    return values


def seconds_or_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a number of seconds is needed, not '{text}'")
    return value


def seconds(text: str) -> float:
    value = seconds_or_zero(text)
    if value == 0:
        raise argparse.ArgumentTypeError("a cell needs more than zero seconds; leave it out for no limit")
    return value


def byte_count(text: str) -> int:
    try:
        value = int(parse_bytes(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value == 0:
        raise argparse.ArgumentTypeError("a cell needs more than zero bytes; leave it out for the default")
    return value


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number is needed, not '{text}'")
    return int(text)


def positive_number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a positive whole number is needed, not '{text}'")
    return int(text)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add --data-root and --config, which say where data is and how to read it."""
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of data sets (default: PETLBENCH_DATA)")
    parser.add_argument("--config", metavar="JSON", help="the data set's options")
