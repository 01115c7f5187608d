"""The command line: arguments in, a call of the front door, the result printed. No logic.

Every command returns a :class:`~postlude.cli._output.Result` and prints nothing itself. With ``--json``
the standard output carries exactly one JSON object, also when the command fails on its input:
``{"error": {"type": ..., "message": ...}}``. Exit codes: 0, 2 for anything wrong with the input, 130 when
interrupted; an unexpected exception keeps its traceback and ends with 1.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
import typer.main

from postlude.cli import (
    attribute,
    demo,
    evaluate,
    explain,
    export,
    generate,
    inspect,
    methods,
    quantize,
    recipe,
    report,
    sample,
    signals,
    tune,
)
from postlude.cli._group import PLAIN, OrderedGroup
from postlude.cli._output import Result, plain, to_json
from postlude.errors import PostludeError, RankError, SettingsError
from postlude.runs.ranks import alone, rank, ranks

__all__ = ["app", "invoke", "main", "run"]

app = typer.Typer(
    name="postlude",
    cls=OrderedGroup,
    help="Everything that happens to a model after pretraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from postlude import __version__

        typer.echo(f"postlude {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Everything that happens to a model after pretraining."""


app.add_typer(inspect.app, name="inspect")
app.add_typer(tune.app, name="tune")
app.command("quantize")(quantize.quantize)
app.add_typer(sample.app, name="sample")
app.add_typer(attribute.app, name="attribute")
app.add_typer(evaluate.app, name="evaluate")
app.command("explain")(explain.explain)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("fit")(signals.fit)
app.command("render")(signals.render)
app.command("run")(recipe.run)
app.command("report")(report.report)
app.command("methods")(methods.methods)
app.command("demo")(demo.demo)


def main() -> None:
    """Entry point of the command ``postlude``."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`postlude methods | head`); keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


@functools.cache
def _command() -> Any:
    """What reads a command line; made once, since a signature a command is looked at for it."""
    return typer.main.get_command(app)


def _executed(arguments: Sequence[str]) -> Any:
    """Run a command, on all ranks of torchrun where there are several and the command is for them."""
    if ranks() == 1:
        return _command()(list(arguments), prog_name="postlude", standalone_mode=False)
    from postlude.runs.processes import Processes

    def execute() -> Any:
        return _command()(list(arguments), prog_name="postlude", standalone_mode=False)

    def execute_alone() -> Any:
        with alone():
            return execute()

    # Entered here, so that what goes wrong on one rank before it does its share is told to the others.
    with Processes() as processes:
        if _for_ranks(arguments):
            return execute()
        if processes.is_first:
            print(
                f"postlude: one process does this; the other {processes.size - 1} of torchrun wait.",
                file=sys.stderr,
            )
        return processes.first(execute_alone, lambda: None)


# Commands whose work ranks share.
_FOR_RANKS = ("tune", "quantize", "attribute build", "evaluate", "run")


def _for_ranks(arguments: Sequence[str]) -> bool:
    words = list(arguments[:2])
    group = _command().commands.get(words[0]) if words else None
    nested = getattr(group, "commands", {})
    if words[1:] and (words[1] not in nested or words[1] == PLAIN):
        del words[1:]
    return " ".join(words) in _FOR_RANKS and "--dry-run" not in arguments


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    as_json = "--json" in arguments
    stdout = sys.stdout
    # A library that prints must not get between the reader and the one JSON object.
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with quiet:
            outcome = _executed(arguments)
    except RankError as error:
        # The rank that stopped says why itself.
        if rank() and error.told:
            return error.exit_code
        return _fail(type(error).__name__, str(error), error.exit_code, as_json)
    except PostludeError as error:
        return _fail(type(error).__name__, str(error), error.exit_code, as_json)
    except typer.TyperException as error:
        if as_json:
            return _fail("UsageError", error.format_message(), error.exit_code, as_json)
        _show_usage(error)
        return error.exit_code
    except typer.Abort:
        return _fail("Abort", "Aborted.", 1, as_json)
    if isinstance(outcome, Result):
        # Of the processes that torchrun starts, one prints.
        if rank():
            return 0
        if as_json:
            print(to_json(outcome.value), file=stdout)
        else:
            from rich.console import Console

            if stdout.isatty():
                outcome.show(Console(file=stdout, highlight=False))
                return 0
            # What a file or another program reads is not folded and no path in it cut off, unless COLUMNS asks for it.
            whole = io.StringIO()
            width = None if "COLUMNS" in os.environ else 2_000
            outcome.show(Console(file=whole, highlight=False, width=width, soft_wrap=True))
            for line in whole.getvalue().splitlines():
                print(line.rstrip(), file=stdout)
        return 0
    if outcome == 130:
        print("Interrupted.", file=sys.stderr)
    return outcome if isinstance(outcome, int) else 0


def invoke(arguments: Sequence[str]) -> Any:
    """Run one command line and return what it would print as JSON.

    Raises:
        PostludeError: what the command refuses; words that are no command line are a ``SettingsError``.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            outcome = _executed(arguments)
    except typer.TyperException as error:
        raise SettingsError(f"postlude {' '.join(arguments)}: {error.format_message()}") from error
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    return plain(outcome.value) if isinstance(outcome, Result) else None


def _fail(kind: str, message: str, code: int, as_json: bool) -> int:
    number = f" (rank {rank()})" if rank() else ""
    print(f"postlude{number}: {message}", file=sys.stderr)
    if as_json and not rank():
        print(to_json({"error": {"type": kind, "message": message}}))
    return code


def _show_usage(error: typer.TyperException) -> None:
    """Usage, hint and message of a command line that could not be parsed."""
    show = getattr(error, "show", None)
    if show is not None:
        show()
    else:
        print(f"postlude: {error.format_message()}", file=sys.stderr)
