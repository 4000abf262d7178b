"""Generator of docs/reference/command-line.md, from the commands: `python tests/helpers/command_line_page.py`."""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from alps.cli.main import COMMANDS, import_command
from alps.cli.settings_page import CONFIGS
from alps.core.settings import describe_fields

_INTRODUCTION = """\
# Command line

`alps COMMAND --help` prints what is here, with the settings. Options of a command that are settings are only listed
here; [settings](settings.md) has their defaults and meanings, for the command line, YAML files and Python.

`alps --version` prints the version, and `alps --install-completion` makes the shell complete commands, options and the
words that an option takes.

| stream | what is printed |
|---|---|
| stdout | results: the summary of a run, the tables of `alps inspect`, the text of `alps generate`, JSON, help |
| stderr | progress, the tables of `alps eval`, warnings, and errors in one line |

| exit code | meaning |
|---:|---|
| 0 | done |
| 1 | a fault of alps itself: a traceback is printed |
| 2 | an error that the user can correct: one line says what is wrong, where, and what to do |
| 130 | interrupted with Ctrl-C |
| 143 | stopped with SIGTERM |

`OUT` never exists in part: it is renamed into place when it is complete. An interrupted `alps prune`, `alps shrink` or
`alps compare` continues when the same command is repeated ([long runs](../how-to/long-runs.md)).

This page is generated from the code: `python tests/helpers/command_line_page.py > docs/reference/command-line.md`.

| command | what it does |
|---|---|
"""


def command_line_page() -> str:
    """Return the page as Markdown."""
    rows = [f"| [`alps {name}`](#alps-{name}) | {_cell(line)} |\n" for name, (_, _, line) in COMMANDS.items()]
    return _INTRODUCTION + "".join(rows) + "".join(map(_section, COMMANDS))


def _section(name: str) -> str:
    command = import_command(name)
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    config = CONFIGS.get(name)
    settings = [field.option for field in describe_fields(config) if field.name != "model"] if config else []
    own = [param for param in command.params if param not in arguments and param.opts[0] not in settings]
    words = [param.metavar if param.required else f"[{param.metavar}]" for param in arguments]
    lines = [f"\n## alps {name}\n", f"\n{inspect.cleandoc(command.help)}\n"]
    lines += [f"\n```\nalps {' '.join([name, *words, '[OPTIONS]' if own or settings else '']).rstrip()}\n```\n"]
    lines += ["\n| argument | meaning |\n|---|---|\n"]
    lines += [f"| `{param.metavar}` | {_cell(param.help)}{_default(param)} |\n" for param in arguments]
    if own:
        lines += ["\n| option | default | meaning |\n|---|---|---|\n"]
        lines += [f"| {_option(param)} | {_option_default(param)} | {_cell(param.help)} |\n" for param in own]
    if settings:
        listed = f"[Settings](settings.md#alps-{name}): {', '.join(f'`{option}`' for option in settings)}."
        lines += [f"\n{textwrap.fill(listed, 120, break_on_hyphens=False)}\n"]
    return "".join(lines)


def _default(param: Any) -> str:
    return "" if param.default is None or param.required else f" Default: `{param.default}`."


def _option(param: Any) -> str:
    return f"`{param.opts[0]}`" if param.is_flag else f"`{param.opts[0]} {param.metavar}`"


def _option_default(param: Any) -> str:
    if param.required:
        return "required"
    if param.is_flag:
        return "off"
    if isinstance(param.default, float):
        return f"{param.default:g}"
    return "none" if param.default is None else str(param.default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    print(command_line_page(), end="")
