"""What every command says, and where: results on standard output, progress and mistakes on standard error."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from stlora_peft.errors import message
from stlora_peft.launch import is_main_process, process_count, process_index

DEBUG = "stlora.debug"  # where --debug is kept in the context of a command
RESUMABLE = ("pretrain", "adapt", "compare", "table")
WIDE = 120  # columns where the output is no terminal: a table in a file must not be cut


class Commands(TyperGroup):
    """Commands that answer a user's mistake with one paragraph and exit code 2 instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            more = " The same command goes on from what is done." if ctx.invoked_subcommand in RESUMABLE else ""
            _stderr().print(f"Interrupted.{more}")
            raise typer.Exit(130) from None
        except (ValueError, OSError, ImportError) as error:
            text = _explanation(error)
            if text is None:
                raise
            if ctx.meta.get(DEBUG):
                traceback.print_exception(error)
            else:
                _show_mistake(text)
            raise typer.Exit(2) from None


class Screen:
    """Where a command writes: for people, or as one JSON object; of several processes, the main one alone.

    Args:
        as_json: Write nothing but the JSON object on standard output.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._speaks = is_main_process()

    @property
    def width(self) -> int:
        """Columns of what is shown to a person."""
        return _stdout().width

    def say(self, content: RenderableType, *, wrap: bool = True) -> None:
        """Show something to a person.

        Args:
            content: Text with rich's markup, or a table.
            wrap: Break long lines. Paths and commands must stay whole to be copied.
        """
        if self._speaks and not self._as_json:
            _stdout().print(content, soft_wrap=not wrap)

    def note(self, content: str) -> None:
        """Say something on the way to the result, on standard error."""
        if self._speaks:
            _stderr().print(Text(content, style="dim"), soft_wrap=True)

    def drawn(self, draw: Callable[[], None]) -> bool:
        """Draw a figure, or say what to install where matplotlib is missing.

        Args:
            draw: Draws and writes it.

        Returns:
            Whether there is a figure now.
        """
        from stlora_peft.figures import require_matplotlib

        try:
            require_matplotlib()
        except ImportError as error:
            self.note(f"No figure: {str(error).rpartition('to fix:')[2].strip()}")
            return False
        draw()
        return True

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show on standard error that something without a bar of its own is under way."""
        with _stderr().status(f"{what} ...") if self._speaks else nullcontext():
            yield

    def facts(self, **facts: object) -> None:
        """Show what came out, one fact below the other; ``_`` in a name stands for a space."""
        width = max(map(len, facts)) + 2
        for name, fact in facts.items():
            self.say(Text.assemble((f"{name.replace('_', ' '):<{width}}", "dim"), str(fact)), wrap=False)

    def heading(self, place: str, what: str) -> None:
        """Begin a step of several."""
        self.say(Text.assemble(f"\n{place}  ", (what, "bold")))

    def next(self, *words: object) -> None:
        """Show the command to type next."""
        self.say("\nNext:")
        self.command(*words)

    def command(self, *words: object) -> None:
        """Show a command, in one line to be copied."""
        self.say(Text(f"  {shlex.join(str(word) for word in words)}", style="cyan"), wrap=False)

    def finish(self, result: dict[str, Any]) -> None:
        """Write the JSON object where that was asked for."""
        if self._speaks and self._as_json:
            sys.stdout.write(json.dumps(result, indent=2, allow_nan=False) + "\n")


def bold(name: str) -> str:
    """Markup for a name in bold; brackets in it stay brackets."""
    return f"[bold]{escape(name)}[/]"


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table: names in the first column, numbers in the others.

    Args:
        title: What it shows, with units.
        *columns: Headings.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def _explanation(error: Exception) -> str | None:
    """Text for the user where the error is a mistake of his, None where it is one of ours."""
    text = str(error)
    if "\n  expected: " in text and "\n  to fix:   " in text:
        return text
    if isinstance(error, OSError) and error.filename is not None:
        return message(
            f"'{error.filename}' cannot be used",
            expected="a place that can be read and written",
            got=error.strerror or type(error).__name__,
            fix="check the path and its permissions",
        )
    return None


def _show_mistake(text: str) -> None:
    """Print the four lines of an error, whole."""
    first, *rest = text.splitlines()
    # Every process says it: where one ends with an error, the launcher may end the others before they speak.
    who = "Error: " if process_count() == 1 else f"Error in process {process_index()}: "
    shown = Text.assemble((who, "bold red"), (first, "bold"), *(f"\n{line}" for line in rest))
    _stderr().print(shown, soft_wrap=True)


def _stdout() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def _stderr() -> Console:
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDE, highlight=False)
