"""Help texts: usage, arguments, commands, and options in panels, each with its default."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

_ARGUMENTS, _OPTIONS, _COMMANDS = "Arguments", "Options", "Commands"
# Width of the column of names, which holds those of all settings; a longer one is folded.
_NAMES = 28
_NAME_STYLE, _VALUE_STYLE, _DEFAULT_STYLE = "bold cyan", "yellow", "dim"


class HelpCommand(TyperCommand):
    """Command with a help of two columns, in which a switch and its opposite are one name."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Print the help on stdout, in the width of the terminal."""
        print_help(self, ctx)


def print_help(command: Any, ctx: Any, commands: Mapping[str, str] | None = None) -> None:
    """Print the help of a command or a group on stdout, in the width of the terminal.

    Args:
        command: of typer.
        ctx: its context.
        commands: those of a group, with a sentence on each; None for a command.
    """
    console, params = Console(), list[Any](command.get_params(ctx))
    arguments = [_metavar(param) for param in params if _is_argument(param)]
    words = [ctx.command_path, "[OPTIONS]", *arguments, *([] if commands is None else ["COMMAND", "..."])]
    console.print(Text.assemble("Usage: ", (" ".join(words), "bold")))
    console.print(Text(f"\n{inspect.cleandoc(command.help or '')}\n"))
    panels: dict[str, list[tuple[Text, Text]]] = {}
    if commands is not None:
        panels[_COMMANDS] = [(Text(name, _NAME_STYLE), Text(sentence)) for name, sentence in commands.items()]
    for param in params:
        if not getattr(param, "hidden", False):
            panels.setdefault(_panel_of(param), []).append((_names(param), _description(param)))
    # What every command has, such as --help, is looked for last.
    for title in sorted(panels, key=lambda title: (title == _OPTIONS, title != _ARGUMENTS)):
        console.print(_panel(title, panels[title]))


def _panel(title: str, rows: list[tuple[Text, Text]]) -> Panel:
    table = Table.grid(padding=(0, 2), expand=True)
    width = min(max(len(name) for name, _ in rows), _NAMES) if title == _COMMANDS else _NAMES
    table.add_column(width=width, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return Panel(table, title=title, title_align="left", border_style="dim")


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _is_flag(param: Any) -> bool:
    return bool(getattr(param, "is_flag", False))


def _metavar(argument: Any) -> str:
    return argument.metavar if argument.required else f"[{argument.metavar}]"


def _panel_of(param: Any) -> str:
    # In some releases of typer the option --help is one of click, which knows no panels.
    return getattr(param, "rich_help_panel", None) or (_ARGUMENTS if _is_argument(param) else _OPTIONS)


def _names(param: Any) -> Text:
    """Return `--name METAVAR`, `--[no-]name` for a switch, and the metavar alone for an argument."""
    if _is_argument(param):
        return Text(param.metavar, _NAME_STYLE)
    name = f"--[no-]{param.opts[0].removeprefix('--')}" if param.secondary_opts else ", ".join(param.opts)
    value = Text() if _is_flag(param) else Text.assemble(" ", (param.metavar or "TEXT", _VALUE_STYLE))
    return Text(name, _NAME_STYLE) + value


def _description(param: Any) -> Text:
    """Return the description with the default, which descriptions of settings hold already."""
    text = Text(param.help or "")
    if param.required:
        text.append(" (required)")
    elif "(default: " not in text.plain and not _is_flag(param) and param.show_default and param.default is not None:
        text.append(f" (default: {param.default})")
    text.highlight_regex(r"\((default: .*|required)\)$", _DEFAULT_STYLE)
    return text
