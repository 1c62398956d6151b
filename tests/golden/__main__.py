"""`python -m tests.golden FILE...`: hold the metrics against golden files (captions_*.json, vqa_*.json).

Such files hold values of the official evaluations. Prints the worst difference of each quantity per file. Exit status 1
when a value is off by more than 1e-6 or a caption is tokenised differently, 2 when a file cannot be used.
Without arguments the files of this folder are checked.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import FOLDER, report


def main(arguments: list[str]) -> int:
    paths = [Path(argument) for argument in arguments] or sorted((FOLDER / "metrics").glob("*.json"))
    agree = True
    for path in paths:
        try:
            agree = report(path) and agree
        except OSError as error:
            print(f"{path}: cannot be read ({error.strerror}); give a golden JSON file", file=sys.stderr)
            return 2
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(
                f"{path}: not a golden file of captions or answers ({type(error).__name__}: {error})", file=sys.stderr
            )
            return 2
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
