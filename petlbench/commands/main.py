"""The command line: find the verb, let its own module parse the rest, and end in one line whatever happens."""

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
VERBS = {  # each has a module of its name, which is imported when it is asked for; a verb of two words, with _
    "list": "what is installed, built-in or plugged in; what has been run",
    "run": "run a suite; cells that are done are not run again",
    "leaderboard": "the table of one or several results folders",
    "plot": "plots of one or several results folders",
    "show": "contact sheets of predictions: boxes, answers, captions",
    "data check": "count what is there, open images, compare with the published sizes",
    "data show": "a contact sheet of samples, as PNG",
    "score": "METEOR and SPICE of kept captions, by their Java programs",
    "compare": "methods against each other, sample by sample and seed by seed",
    "profile": "what methods cost, without training",
    "check": "hold a method to what every method must do, and to its own claims",
    "verify": "published figures beside ours; exit with 1 if one differs",
    "repair": "set aside what a results folder cannot hold; nothing is deleted",
}
GROUPS = {"data": "data sets: what of them is there (`data check`), and what it looks like (`data show`)"}
COMMANDS = tuple(dict.fromkeys(verb.split()[0] for verb in VERBS))


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
    verb = next((" ".join(argv[:n]) for n in (1, 2) if " ".join(argv[:n]) in VERBS), None)
    if verb is None:  # `--help`, `--version`, or a mistake, which that parser tells of
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
    """The module that parses and carries out a verb: `add_arguments(parser)` and `command(args) -> exit status`."""
    return import_module(f"{__package__}.{verb.replace(' ', '_')}")


def _parser() -> argparse.ArgumentParser:
    """The parser of everything: it knows what there is, and shows it."""
    parser = _Parser(prog="petlbench", description="Parameter-efficient transfer learning, measured fairly.")
    parser.add_argument("--version", action="version", version=__version__)
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
