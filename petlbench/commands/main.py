"""The command line: find the verb, let its module parse the rest, and report every user error in one line."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean
from petlbench.core.version import __version__

INTERRUPTED = 130  # by SIGINT; 129 and 143 by SIGHUP and SIGTERM
VERBS = {  # each has a module of its name (`data check`: data_check), which is imported on use
    "list": "list what is installed, built-in or plugged in, and what has been run",
    "run": "run a suite; finished cells are not run again",
    "leaderboard": "print the table of one or several results folders",
    "plot": "draw the plots of one or several results folders",
    "show": "draw contact sheets of predictions: boxes, answers, captions",
    "data check": "count rows, open images, compare with the published sizes",
    "data show": "draw a contact sheet of samples, as PNG",
    "score": "score kept captions with the Java programs METEOR and SPICE",
    "compare": "compare methods sample by sample and seed by seed",
    "profile": "measure what methods cost, without training them",
    "check": "test a method against the rules for all methods and its own claims",
    "verify": "compare published figures with ours; exit with 1 if one differs",
    "repair": "set aside damaged or misplaced records of a results folder; none is deleted",
}
GROUPS = {"data": "data sets: check them (`data check`) or draw samples (`data show`)"}
COMMANDS = tuple(dict.fromkeys(verb.split()[0] for verb in VERBS))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 something failed, 2 the user's mistake, 130 interrupted."""
    try:
        try:
            args = _parsed(_checked(sys.argv[1:] if argv is None else argv))
            status: int = args.command(args)
        finally:
            sys.stdout.flush()  # so that a closed pipe raises here and not at exit
    except UserError as error:
        print(f"petlbench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("petlbench: interrupted; nothing is lost: run the same command to continue", file=sys.stderr)
        return getattr(error, "status", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def entry() -> NoReturn:
    """Run the program, and leave at once: to tear down an interpreter with torch loaded takes 3 seconds."""
    status = 1

    def leave() -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            with suppress(BrokenPipeError):
                stream.flush()
        os._exit(status)

    atexit.register(leave)  # the first to be registered runs last: after what removes temporary folders
    status = main()
    sys.exit(status)


def _checked(argv: Sequence[str]) -> Sequence[str]:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS) or ":"
        raise UserError(f"unknown command '{argv[0]}'{hint} the commands are {', '.join(COMMANDS)}")
    return argv


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line and accepts no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: `{self.prog} --help` shows the usage")


class _Version(argparse.Action):
    """Prints the version; git is asked for the commit only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(version_line())
        parser.exit()


def version_line() -> str:
    """The version, with the commit where petlbench runs from a checkout: `0.1.0 (commit 1a2b3c4d5e6f, modified)`."""
    from petlbench.measure.environment import source_tree

    tree = source_tree()
    if not tree["git_commit"]:
        return __version__
    return f"{__version__} (commit {tree['git_commit'][:12]}{', modified' if tree['git_dirty'] else ''})"


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Parse with the verb's own parser: it accepts options before positionals, which sub-parsers do not."""
    verb = next((" ".join(argv[:n]) for n in (1, 2) if " ".join(argv[:n]) in VERBS), None)
    if verb is None:  # `--help`, `--version`, or a mistake, which this parser reports
        return _parser().parse_args(argv)
    parser = _Parser(prog=f"petlbench {verb}")
    _add_verb(parser, verb)
    args, rest = parser.parse_known_intermixed_args(argv[len(verb.split()) :])
    if rest:
        _Parser(prog="petlbench").error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _add_verb(parser: argparse.ArgumentParser, verb: str) -> None:
    module = verb_module(verb)
    module.add_arguments(parser)
    parser.set_defaults(command=module.command)


def verb_module(verb: str) -> ModuleType:
    """Import the module of a verb: it has `add_arguments(parser)` and `command(args) -> exit status`."""
    return import_module(f"{__package__}.{verb.replace(' ', '_')}")


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs, which prints the overview."""
    parser = _Parser(prog="petlbench", description="Parameter-efficient transfer learning, measured fairly.")
    parser.add_argument("--version", action=_Version, nargs=0, help="the version, and the commit of a checkout")
    subparsers = parser.add_subparsers(metavar="|".join(COMMANDS), required=True)
    for command in COMMANDS:
        if command in GROUPS:
            tails = {verb.split()[1]: verb for verb in VERBS if verb.startswith(f"{command} ")}
            group = subparsers.add_parser(command, help=GROUPS[command])
            inner = group.add_subparsers(metavar="|".join(tails), required=True)
            for tail, verb in tails.items():
                _add_verb(inner.add_parser(tail, help=VERBS[verb]), verb)
        else:
            _add_verb(subparsers.add_parser(command, help=VERBS[command]), command)
    return parser
