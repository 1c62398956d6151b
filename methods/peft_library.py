"""The installed peft library of Hugging Face: its types, and sizes for them that fit a backbone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FittedSizes:
    """Shapes (in, out) of all adapted projections, to which a type's default sizes are fitted."""

    shapes: Sequence[tuple[int, int]]

    @property
    def entries(self) -> int:
        """The number of entries of the smallest weight."""
        return min(d_in * d_out for d_in, d_out in self.shapes)

    def rank(self, largest: int) -> int:
        """Return `largest`, but at most a quarter of the narrowest width."""
        return min(largest, max(1, min(map(min, self.shapes)) // 4))

    def block(self, largest: int) -> int:
        """Return the largest size that divides `largest` and every width."""
        return math.gcd(largest, *(width for shape in self.shapes for width in shape))


def _spectral(largest: int, sizes: FittedSizes) -> int:
    return min(largest, max(1, sizes.entries // 64))


def _fourier(sizes: FittedSizes) -> dict[str, Any]:
    """Fit the authors' 1000 frequencies at scale 150, chosen for width 768: the update keeps its size relative to a
    weight's 1 / sqrt(width)."""
    count = _spectral(1000, sizes)
    return {"n_frequency": count, "scaling": 150 * (sizes.entries / 768**2) ** 0.75 * math.sqrt(1000 / count)}


# Options whose defaults in peft suit widths of 768 and more. AdaLoRA's schedule is off: it needs a call per step.
FITTED: Mapping[str, Callable[[FittedSizes], dict[str, Any]]] = {
    "adalora": lambda sizes: {"init_r": sizes.rank(8), "target_r": sizes.rank(8), "total_step": 1},
    "adamss": lambda sizes: {"r": sizes.rank(100)},
    "c3a": lambda sizes: {"block_size": sizes.block(256)},
    "fourierft": _fourier,
    "gralora": lambda sizes: {"r": 2 * max(1, sizes.rank(32) // 2)},
    "hira": lambda sizes: {"r": sizes.rank(32)},
    "lily": lambda sizes: {"r": sizes.rank(32)},
    "miss": lambda sizes: {"r": sizes.block(64)},
    "oft": lambda sizes: {"oft_block_size": sizes.block(32)},
    "peanut": lambda sizes: {"r": sizes.rank(32)},
    "psoft": lambda sizes: {"r": sizes.rank(32)},
    "randlora": lambda sizes: {"r": sizes.rank(32)},
    "road": lambda sizes: {"group_size": sizes.block(64)},
    "vblora": lambda sizes: {"vector_length": sizes.block(256)},
    "waveft": lambda sizes: {"n_frequency": _spectral(2592, sizes)},
}


def library(kind: str) -> tuple[Any, Any]:
    """Return peft's configuration and tuner class of a type. Raises ValueError if peft is missing or too old."""
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    except ImportError as error:
        raise ValueError(f"the library peft cannot be imported ({error}): `pip install peft`") from error
    if kind.upper() not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ValueError(f"the installed peft {peft.__version__} has no type '{kind}': upgrade it")
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind.upper()]  # type: ignore[index]
    return config, PEFT_TYPE_TO_TUNER_MAPPING[kind.upper()]  # type: ignore[index]


def quietly(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call `make` without showing peft's warnings. Raises ValueError, in one line, if peft refuses a size or value, or
    would silently change it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = make(*args, **options)
        except Exception as error:  # a library's code may raise anything
            raise ValueError(f"peft says: {' '.join(str(error).split()) or type(error).__name__}") from error
    if changed := [str(warning.message) for warning in caught if "Adjusted" in str(warning.message)]:
        raise ValueError(f"peft says: {' '.join(changed[0].split())}; give a size that divides")
    return made
