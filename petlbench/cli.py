"""The command line: what can be asked. What is then done stands in commands.py."""

from __future__ import annotations

import argparse
import atexit
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from petlbench import __version__, commands
from petlbench.errors import UserError
from petlbench.registry import did_you_mean
from petlbench.units import parse_bytes

INTERRUPTED = 130  # by SIGINT; 129 and 143 by SIGHUP and SIGTERM


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 something failed, 2 a mistake of the user's, 130 interrupted."""
    try:
        try:
            args = _parsed(_checked(sys.argv[1:] if argv is None else argv))
            status: int = args.command(args)
        finally:
            sys.stdout.flush()  # so that a closed pipe shows here and not at exit
    except UserError as error:
        print(f"petlbench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("petlbench: interrupted; nothing is lost: the same command goes on from here", file=sys.stderr)
        return getattr(error, "status", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def entry() -> NoReturn:
    """The program: `main`, and out at once, for unloading torch takes seconds, which nobody should wait for."""
    status = main()
    atexit._run_exitfuncs()  # temporary folders go here
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


def _checked(argv: Sequence[str]) -> Sequence[str]:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS) or ":"
        raise UserError(f"unknown command '{argv[0]}'{hint} the commands are {', '.join(COMMANDS)}")
    return argv


class _Parser(argparse.ArgumentParser):
    """Complains in one line, and takes options by their whole names only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: `{self.prog} --help` shows the usage")


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """What is asked. A verb's own parser takes options also before positionals, which one with sub-parsers cannot."""
    found = _verb(argv)
    if found is None:  # `--help`, `--version`, or a mistake, which that parser tells of
        return _parser().parse_args(argv)
    words, add = found
    parser = _Parser(prog=" ".join(["petlbench", *words]))
    add(parser)
    args, rest = parser.parse_known_intermixed_args(argv[len(words) :])
    if rest:
        _Parser(prog="petlbench").error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _verb(argv: Sequence[str]) -> tuple[Sequence[str], Callable[[argparse.ArgumentParser], None]] | None:
    """The words that name a verb, and what adds its arguments; None where `argv` does not begin with a whole one."""
    if argv and argv[0] == "data":
        found = ADD_DATA.get(argv[1]) if len(argv) > 1 else None
        return (argv[:2], found[0]) if found else None
    return (argv[:1], ADD[argv[0]][0]) if argv and argv[0] in ADD else None


def _parser() -> argparse.ArgumentParser:
    """The parser of everything: it knows what there is, and shows it."""
    parser = _Parser(prog="petlbench", description="Parameter-efficient transfer learning, measured fairly.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(metavar="|".join(COMMANDS), required=True)

    for name, (add, text) in ADD.items():
        add(subparsers.add_parser(name, help=text))
    return parser


def _add_list(listing: argparse.ArgumentParser) -> None:
    listing.set_defaults(command=commands.list_things)
    listing.add_argument("kind", choices=[*commands.KINDS, "suites", "records"])
    listing.add_argument("pattern", nargs="?", default="*", help="shell wildcard; also 'family:size', 'method:variant'")
    listing.add_argument("--json", action="store_true", help="machine-readable")
    listing.add_argument("--check", action="store_true", help="import each; exit with 1 if any fails")
    listing.add_argument("--matrix", action="store_true", help="of `backbones`: which tasks each serves, and why not")
    listing.add_argument("--markdown", action="store_true", help="of `methods`: the table in README.md")
    listing.add_argument(
        "--results", type=Path, default=Path("runs/quick"), metavar="DIR", help="of `records` (default: %(default)s)"
    )


def _add_leaderboard(board: argparse.ArgumentParser) -> None:
    board.set_defaults(command=commands.leaderboard)
    board.add_argument("results", nargs="+", type=Path)
    board.add_argument("--csv", type=Path, metavar="FILE", help="also write it as CSV")


def _add_plot(plot: argparse.ArgumentParser) -> None:
    plot.set_defaults(command=commands.plot)
    plot.add_argument("results", nargs="+", type=Path)
    plot.add_argument("--out", type=Path, default=Path("plots"), metavar="DIR", help="default: %(default)s")


def _add_show(show: argparse.ArgumentParser) -> None:
    show.set_defaults(command=commands.show)
    show.add_argument("results", type=Path)
    show.add_argument("--out", type=Path, default=Path("pictures"), metavar="DIR", help="default: %(default)s")
    show.add_argument("--count", type=_positive, default=16, metavar="N", help="samples a sheet (default: %(default)s)")
    show.add_argument("--data-root", type=Path, metavar="DIR", help="where data sets lie (default: PETLBENCH_DATA)")


def _add_data(data: argparse.ArgumentParser) -> None:
    subparsers = data.add_subparsers(metavar="|".join(ADD_DATA), required=True)
    for name, (add, text) in ADD_DATA.items():
        add(subparsers.add_parser(name, help=text))


def _add_data_check(check: argparse.ArgumentParser) -> None:
    check.set_defaults(command=commands.data_check)
    check.add_argument("names", nargs="+", metavar="TASK:DATASET", help="or a task alone, for its default data set")
    check.add_argument(
        "--sample", type=_count, default=16, metavar="N", help="images to open of each part (default: %(default)s)"
    )
    check.add_argument("--all", action="store_true", help="open every image")
    check.add_argument("--json", action="store_true", help="machine-readable")
    _add_data_options(check)


def _add_data_show(show: argparse.ArgumentParser) -> None:
    show.set_defaults(command=commands.data_show)
    show.add_argument("name", metavar="TASK:DATASET", help="or a task alone, for its default data set")
    show.add_argument("--split", default="train", metavar="NAME", help="or an official part (default: %(default)s)")
    show.add_argument("--count", type=_positive, default=16, metavar="N", help="samples (default: %(default)s)")
    show.add_argument("--seed", type=_count, default=0, metavar="N", help="draws them (default: %(default)s)")
    show.add_argument("--out", type=Path, metavar="FILE", help="default: pictures/<task>_<dataset>_<split>.png")
    _add_data_options(show)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where data lies (default: PETLBENCH_DATA)")
    parser.add_argument("--config", metavar="JSON", help="the data set's options")


def _add_score(score: argparse.ArgumentParser) -> None:
    score.set_defaults(command=commands.score)
    score.add_argument("results", type=Path)
    score.add_argument(
        "--metrics", type=_names, default=["meteor"], metavar="A,B", help="of meteor, spice (default: meteor)"
    )
    score.add_argument("--csv", type=Path, metavar="FILE", help="also write it as CSV")
    score.add_argument("--data-root", type=Path, metavar="DIR", help="where data sets lie (default: PETLBENCH_DATA)")


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.set_defaults(command=commands.compare)
    compare.add_argument("results", type=Path)
    compare.add_argument("a", nargs="?", help="method, or method:variant; without any, all pairs")
    compare.add_argument("b", nargs="?", help="method, or method:variant")
    compare.add_argument("--csv", type=Path, metavar="FILE", help="write it as CSV instead")


def _add_profile(profile: argparse.ArgumentParser) -> None:
    profile.set_defaults(command=commands.profile)
    profile.add_argument("--methods", type=_names, required=True, metavar="A,B", help="names or wildcards")
    profile.add_argument("--backbone", default="tiny", metavar="NAME", help="default: %(default)s")
    profile.add_argument("--task", default="vqa", metavar="TASK", help="task, or task:dataset (default: %(default)s)")
    profile.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: %(default)s")
    profile.add_argument("--steps", type=_positive, default=6, metavar="N", help="timed (default: %(default)s)")
    profile.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    profile.add_argument("--threads", type=_positive, metavar="N", help="default: all cores")
    profile.add_argument("--meta", action="store_true", help="only what needs no memory: counts and planned bytes")
    profile.add_argument("--json", action="store_true", help="machine-readable")
    profile.add_argument("--data-root", type=Path, metavar="DIR", help="where data sets lie (default: PETLBENCH_DATA)")


def _add_check(check: argparse.ArgumentParser) -> None:
    check.set_defaults(command=commands.check)
    check.add_argument("method", nargs="+", help="a name, name:variant or wildcard, or module:Class")
    check.add_argument("--backbone", default="tiny", metavar="NAME", help="default: %(default)s")
    check.add_argument("--tasks", type=_names, metavar="A,B", help="default: all that the backbone can serve")
    check.add_argument("--config", metavar="JSON", help="the method's options")
    check.add_argument("--json", action="store_true", help="machine-readable")


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.set_defaults(command=commands.verify)
    verify.add_argument("figures", choices=["published"], help="published parameters, percentages, bytes and claims")
    verify.add_argument("--methods", type=_names, metavar="A,B", help="only these: names, name:variant, wildcards")
    verify.add_argument("--json", action="store_true", help="machine-readable")


def _add_repair(repair: argparse.ArgumentParser) -> None:
    repair.set_defaults(command=commands.repair)
    repair.add_argument("results", type=Path)


def _add_run(run: argparse.ArgumentParser) -> None:
    run.set_defaults(command=commands.run)
    run.add_argument("suite", nargs="?", default="quick", help="packaged suite or YAML file (default: quick)")
    run.add_argument("--methods", type=_names, metavar="A,B", help="only these: names, name:variant, wildcards")
    run.add_argument("--tasks", type=_names, metavar="A,B", help="only these: names, task:dataset, wildcards")
    run.add_argument("--backbone", metavar="NAME", help="only this one, or one that the suite lacks")
    run.add_argument("--seeds", type=_seeds, metavar="0,1", help="instead of the suite's")
    run.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: runs/<suite>)")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    run.add_argument("--jobs", type=_positive, default=1, metavar="N", help="cells at a time (default: %(default)s)")
    run.add_argument("--threads", type=_positive, metavar="N", help="threads of each cell")
    run.add_argument(
        "--workers", type=_count, metavar="N", help="threads that make batches meanwhile (default: 4 on CUDA, else 0)"
    )
    run.add_argument("--limit", type=_positive, metavar="N", help="rows used of each split")
    run.add_argument("--data-root", type=Path, metavar="DIR", help="where data sets lie (default: PETLBENCH_DATA)")
    run.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="for each cell (default: the suite's, or none)"
    )
    run.add_argument("--memory-limit", type=_bytes, metavar="SIZE", help="resident memory of each cell, such as 4GiB")
    run.add_argument(
        "--checkpoint-seconds",
        type=_seconds_or_zero,
        default=60.0,
        metavar="N",
        help="least time between two checkpoints of a cell (default: %(default)g)",
    )
    run.add_argument("--keep-stale", action="store_true", help="do not rerun cells whose code, data or weights changed")
    run.add_argument("--dry-run", action="store_true", help="say what would run")
    run.add_argument("--retry-failed", action="store_true", help="run cells again that did not end well")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("a comma-separated list of names is needed")
    return names


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"comma-separated whole numbers are needed, not '{text}'") from None
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"a seed is given more than once: {text}")
    return seeds


def _seconds_or_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a number of seconds is needed, not '{text}'")
    return value


def _seconds(text: str) -> float:
    value = _seconds_or_zero(text)
    if value == 0:
        raise argparse.ArgumentTypeError("a cell needs more than zero seconds; leave it out for no limit")
    return value


def _bytes(text: str) -> int:
    try:
        value = int(parse_bytes(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value == 0:
        raise argparse.ArgumentTypeError("a cell needs more than zero bytes; leave it out for the default")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number is needed, not '{text}'")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a positive whole number is needed, not '{text}'")
    return int(text)


ADD_DATA = {
    "check": (_add_data_check, "count what is there, open images, compare with the published sizes"),
    "show": (_add_data_show, "a contact sheet of samples, as PNG"),
}
ADD = {
    "list": (_add_list, "what is installed, built-in or plugged in; what has been run"),
    "run": (_add_run, "run a suite; cells that are done are not run again"),
    "leaderboard": (_add_leaderboard, "the table of one or several results folders"),
    "plot": (_add_plot, "plots of one or several results folders"),
    "show": (_add_show, "contact sheets of predictions: boxes, answers, captions"),
    "data": (_add_data, "data sets: what of them is there (`data check`), and what it looks like (`data show`)"),
    "score": (_add_score, "METEOR and SPICE of kept captions, by their Java programs"),
    "compare": (_add_compare, "methods against each other, sample by sample and seed by seed"),
    "profile": (_add_profile, "what methods cost, without training"),
    "check": (_add_check, "hold a method to what every method must do, and to its own claims"),
    "verify": (_add_verify, "published figures beside ours; exit with 1 if one differs"),
    "repair": (_add_repair, "set aside what a results folder cannot hold; nothing is deleted"),
}
COMMANDS = tuple(ADD)
