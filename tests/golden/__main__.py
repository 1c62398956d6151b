"""`python -m tests.golden FILE...`: hold petlbench against golden files, which hold what authors' own code computed.

Files of arrays (.npz: inputs, weights, outputs, gradients of methods and backbones) are recognised by their names, as
in `tests/golden/arrays.py`: prints the largest |a - b| / max(1, largest |b|) of each output and gradient. Files of
metrics (.json: captions, answers) are recognised by their content: prints the worst difference of each quantity.

Exit status 1 when an array is off by more than 1e-9 (1e-4 where the original computed in single precision), a metric by
more than 1e-6, or a caption is tokenised differently; 2 when a file cannot be used. Without arguments the files of
metrics in this folder are checked.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from tests.golden import FOLDER, arrays, report


def agrees(path: Path) -> bool:
    """Whether everything in the file agrees; says what was compared."""
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
