"""The command line: one module per command; `main` turns errors into messages and exit codes.

A command is a module in `COMMANDS`. The docstring of the module is the help of the command. The module's
function `add_arguments(parser)` adds the arguments of the command, and its function `main(args)` executes the
command and returns an exit code, or None for 0. A command with actions has no `main`; instead, it passes one
function per action to `add_actions`. `--help` imports the modules of all commands, so no module may import
torch, transformers or mlflow at its top.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import weighted_mtp_core
from weighted_mtp_core.cli import (
    check,
    compare,
    data,
    doctor,
    evaluate,
    export,
    generate,
    plugins,
    recipe,
    report,
    run,
    storage,
    track,
    verify,
)
from weighted_mtp_core.errors import Terminated, WmtpError
from weighted_mtp_core.exit_codes import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_PIPE_CLOSED,
    EXIT_RUN_FAILED,
    EXIT_TERMINATED,
)
from weighted_mtp_core.identifiers import expand_home
from weighted_mtp_core.messages import did_you_mean, quoted, reason
from weighted_mtp_core.redaction import redact
from weighted_mtp_core.runtime.interrupts import raise_on_termination

COMMANDS = (
    *(run, check, compare, evaluate, generate, export, report, plugins, recipe),
    *(doctor, track, data, storage, verify),
)
PROGRAM = "python -m weighted_mtp_core"

_DESCRIPTION = """\
Train language models with weighted multi-token prediction. A recipe (a TOML file) names a data
source, a weighting and, if the weighting needs one, a critic; plugins provide these components. A
run trains the policy, evaluates the policy and records the results."""
_EPILOG = f"""\
examples:
  {PROGRAM} plugins list                      list the installed plugins
  {PROGRAM} check configs/baseline.toml       check a recipe, in less than a second
  {PROGRAM} run configs/baseline.toml         train, evaluate and record
  {PROGRAM} run --help                        show the options of a command

exit codes:
  0    done
  1    the command failed although its input was valid
  2    the input is wrong: a recipe, a plugin, data or an argument
  130  interrupted by SIGINT (Ctrl-C)
  141  the program that reads the output has ended (a closed pipe)
  143  terminated by SIGTERM or SIGHUP"""


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code; errors go to stderr after `error:`, hints after `hint:`.

    `--help` and `--version` print their text and raise SystemExit.
    """
    # `--traceback` is removed before parsing, so that it may precede or follow the command.
    arguments = [each for each in argv if each != "--traceback"]
    want_traceback = len(arguments) < len(argv)
    try:
        with raise_on_termination():
            code = _main(arguments, want_traceback=want_traceback)
    except (BrokenPipeError, SystemExit):  # argparse exits after `--help`
        if _discard_unread_output():
            return EXIT_PIPE_CLOSED
        raise
    return EXIT_PIPE_CLOSED if _discard_unread_output() else code


def _main(arguments: Sequence[str], *, want_traceback: bool) -> int:
    try:
        return _command(arguments)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the process ends here
        if isinstance(error, BrokenPipeError) and _discard_unread_output():
            return EXIT_PIPE_CLOSED
        message, hint, code = _describe(error)
        if want_traceback:
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
        print(f"error: {redact(message)}", file=sys.stderr)
        if hint:
            print(f"hint: {redact(hint)}", file=sys.stderr)
        return code


def _describe(error: BaseException) -> tuple[str, str | None, int]:
    """Return the message, the hint and the exit code of an error."""
    if isinstance(error, WmtpError):
        return str(error), error.hint, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        is_sigterm = isinstance(error, Terminated)
        return (
            ("terminated", None, EXIT_TERMINATED) if is_sigterm else ("interrupted", None, EXIT_INTERRUPTED)
        )
    return reason(error), "add --traceback to see where it happened", EXIT_RUN_FAILED


def _command(arguments: Sequence[str]) -> int:
    parser, names = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return EXIT_BAD_INPUT
    if not arguments[0].startswith("-") and arguments[0] not in names:
        hint = did_you_mean(arguments[0], names) or f"see: {PROGRAM} --help"
        raise WmtpError(f"there is no command `{arguments[0]}`; commands: {quoted(names)}", hint=hint)
    args = parser.parse_args(arguments)
    code: int | None = args.main(args)
    return EXIT_DONE if code is None else code


class Parser(argparse.ArgumentParser):
    """Raises a `WmtpError` for wrong usage, and keeps the line breaks of descriptions and examples.

    Attributes:
        intermixed: Whether positional arguments may follow options in any order; argparse by default refuses
            some orders.
    """

    intermixed = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type] # passed through
        # because a shell expands `--out ~/x` but not `--out=~/x`
        self.register("type", Path, lambda text: Path(expand_home(text)))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; if `intermixed` is set, positional arguments and options may have any order."""
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # parse_known_intermixed_args calls this method
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True

    def error(self, message: str) -> NoReturn:
        """Raise a `WmtpError`; argparse would print the usage and exit."""
        raise WmtpError(message, hint=f"see: {self.prog} --help")


def _parser() -> tuple[Parser, list[str]]:
    parser = Parser(prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "--version", action="version", version=f"weighted-mtp-core {weighted_mtp_core.__version__}"
    )
    parser.add_argument("--traceback", action="store_true", help="also show the Python traceback of an error")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        description, _, examples = str(module.__doc__).partition("examples:\n")
        command = subparsers.add_parser(
            module.__name__.rpartition(".")[2],
            help=description.partition(".\n")[0],
            description=description,
            epilog=f"examples:\n{examples}",
        )
        module.add_arguments(command)
        command.set_defaults(main=getattr(module, "main", None))  # an action sets its own `main`
    return parser, list(subparsers.choices)


def _discard_unread_output() -> bool:
    """Return whether the reader has closed the output, as `head` does; if so, discard all further output."""
    closed = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # there is no stream, or the stream is in memory
            events = select.poll()
            events.register(stream.fileno(), 0)
            with suppress(BrokenPipeError):
                stream.flush()
            if events.poll(0):
                closed = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return closed
