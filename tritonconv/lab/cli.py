"""The command line: one module of :mod:`tritonconv.lab.commands` per command.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a result was wrong or could not be had,
2 bad usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from tritonconv.errors import ArgumentError, ResultsError, StoreError, shortened
from tritonconv.lab.commands import bench, campaign, compare, explain, inspect, profile, report, tune
from tritonconv.lab.commands import compile as compile_
from tritonconv.lab.commands import list as list_
from tritonconv.lab.commands.common import INTERRUPTED, USAGE

COMMANDS = {
    "bench": bench,
    "tune": tune,
    "campaign": campaign,
    "compare": compare,
    "report": report,
    "explain": explain,
    "inspect": inspect,
    "profile": profile,
    "list": list_,
    "compile": compile_,
}
# Commands of the release before, and what does their work now.
GONE = {
    "plot": "report DIR",
    "model": "report DIR --model",
    "overhead": "bench --overhead",
    "roofs": "bench --roofs",
    "accesses": "inspect --accesses",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):  # of a narrow encoding, as C or cp1252: what it lacks is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in GONE:
        print(f"tritonconv {given[0]}: `tritonconv {GONE[given[0]]}` took its place", file=sys.stderr)
        return USAGE
    parser = _parser()
    try:
        options = parser.parse_args(given)
    except SystemExit as stop:  # argparse printed its message; --help ends with 0
        return stop.code if isinstance(stop.code, int) else USAGE
    options.given, options.command = given, ("tritonconv", *given)
    try:
        return COMMANDS[options.name].run(options)
    except (ArgumentError, ResultsError, StoreError) as error:
        print(f"tritonconv {options.name}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"tritonconv {options.name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what Python would still flush at exit has no reader
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"tritonconv {options.name}: {shortened(str(error))}", file=sys.stderr)
        return USAGE


class _Parser(argparse.ArgumentParser):
    """argparse's, whose messages are no longer than ours."""

    def error(self, message: str) -> NoReturn:
        super().error(shortened(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tritonconv",
        description="Measures and tunes 3-D transposed convolution on the layers of real models.",
        epilog="exit codes: 0 done; 1 a result was wrong or could not be had; 2 bad usage or input; 130 interrupted",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, command in COMMANDS.items():
        text = {"help": command.HELP, "description": command.DESCRIPTION, "epilog": f"example: {command.EXAMPLE}"}
        command.add(commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **text))
    return parser


if __name__ == "__main__":
    sys.exit(main())
