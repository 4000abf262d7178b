"""Options of a command, made from the fields of a config, and options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from alps.core.run_config import RunConfig
from alps.core.settings import MODEL, OUTPUT, ConfigField, describe_fields

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
Device = Annotated[str, typer.Option(metavar="NAME", help=RunConfig.model_fields["device"].description)]
Dtype = Annotated[str, typer.Option(metavar="NAME", help=RunConfig.model_fields["dtype"].description)]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print what would be removed, with sizes and estimates; write nothing.",
        rich_help_panel=OUTPUT,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue an unfinished run, and fail when there is none.", rich_help_panel=OUTPUT),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with any of these settings; options override it.",
        metavar="FILE",
        rich_help_panel=OUTPUT,
    ),
]


def config_options(config: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for every field of a config.

    The command receives the values in its parameter `values`, by field name: those that were given, and None for the
    others. A field that the command declares as a parameter of its own, such as a positional argument, is left out.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = dict(inspect.signature(command, eval_str=True).parameters)
        del own["values"]
        fields = [field for field in describe_fields(config) if field.name not in own]
        arguments = [parameter for parameter in own.values() if _is_argument(parameter)]
        others = [parameter for parameter in own.values() if not _is_argument(parameter)]
        parameters = [*arguments, *map(_parameter, fields), *others]

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            values = {field.name: _value(given.pop(field.name)) for field in fields}
            command(**given, values=values)

        # Keyword-only, because Python's rule on the order of defaults does not matter to a command line.
        keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        wrapper.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
        return wrapper

    return decorate


def _is_argument(parameter: inspect.Parameter) -> bool:
    marks = getattr(parameter.annotation, "__metadata__", ())
    return any(isinstance(mark, typer.models.ArgumentInfo) for mark in marks)


def _parameter(field: ConfigField) -> inspect.Parameter:
    switch = field.value_type is bool
    option = typer.Option(
        f"{field.option}/--no-{field.option.removeprefix('--')}" if switch else field.option,
        help=option_help(field),
        metavar=None if switch else field.setting.metavar,
        rich_help_panel=field.setting.panel,
        show_default=False,
        autocompletion=(lambda: list(field.choices)) if field.choices else None,
    )
    value: Any = list[str] if field.setting.repeated else field.value_type
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, kind, default=None, annotation=Annotated[value | None, option])


def option_help(field: ConfigField) -> str:
    """Return the description of an option with its default."""
    return f"{field.help} (default: {field.default})"


def _value(value: Any) -> Any:
    return None if value == [] else value
