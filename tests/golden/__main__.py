"""`python -m tests.golden FILE...`: compare petlbench with golden files, the results of the authors' own code.

The name of a file of arrays (.npz: inputs, weights, outputs, gradients of methods and backbones) selects its check in
`tests/golden/arrays.py`, which prints the largest |a - b| / max(1, largest |b|) of each output and gradient. The
content of a file of metrics (.json: captions, answers) selects its check, which prints each quantity's worst
difference.

The exit status is 1 if an array is off by more than 1e-9 (1e-4 if the original computed in single precision), a metric
by more than 1e-6, or a caption's tokens differ; it is 2 if a file cannot be used. Without arguments the command checks
the files of metrics in this folder.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from tests.golden import FOLDER, arrays, report


def agrees(path: Path) -> bool:
    """Print the comparison of a file; return whether everything in it agrees."""
    return arrays.report(path) if path.suffix == ".npz" else report(path)


def main(arguments: list[str]) -> int:
    paths = [Path(argument) for argument in arguments] or sorted((FOLDER / "metrics").glob("*.json"))
    agree = True
    for path in paths:
        try:
            agree = agrees(path) and agree
        except OSError as error:
            print(f"{path}: cannot be read ({error.strerror}); give a golden file", file=sys.stderr)
            return 2
        except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            print(f"{path}: not a golden file that can be checked ({type(error).__name__}: {error})", file=sys.stderr)
            return 2
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
