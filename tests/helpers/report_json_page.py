"""Generator of docs/reference/report-json.md, from the records: `python tests/helpers/report_json_page.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from alps.evaluation.inspect import Inspection
from alps.reporting.compare_results import Result
from alps.reporting.records import ComparisonRecord, EvaluationRecord, TaskRecord
from alps.reporting.run_report import INSIDE_SOLVE, PHASES, LayerRecord, RunReport
from alps.reporting.shrink_report import SHRINK_PHASES, ShrinkReport
from alps.solvers.base import SolveInfo, Status

_INTRODUCTION = """\
# report.json, and other JSON

Every figure that alps prints or draws is in a JSON file next to the weights, or on stdout. All files are UTF-8; a value
that was not measured is `null`. `alps.prune`, `alps.shrink` and the other functions return the same records as Python
objects ([Python API](python.md)), whose attributes have the names of the fields.

| JSON | written by | record |
|---|---|---|
| `report.json` | `alps prune`, `alps reconstruct`, `alps distill` | [RunReport](#runreport) |
| `shrink.json` | `alps shrink` | [ShrinkReport](#shrinkreport) |
| `results.jsonl`, a line for each run | `alps compare` | [Result](#result) |
| stdout | `alps eval` | list of [EvaluationRecord](#evaluationrecord), [ComparisonRecord](#comparisonrecord) and \
[TaskRecord](#taskrecord) |
| stdout | `alps inspect --json` | [Inspection](#inspection) |

This page is generated from the code: `python tests/helpers/report_json_page.py > docs/reference/report-json.md`.
"""
_ROOTS: dict[str, tuple[str, list[type]]] = {
    "report.json": ("A [RunReport](#runreport), with a summary at the beginning.", [RunReport]),
    "shrink.json": ("A [ShrinkReport](#shrinkreport).", [ShrinkReport]),
    "JSON of alps eval": (
        "A list: an [EvaluationRecord](#evaluationrecord) for each text, or with `--reference` a "
        "[ComparisonRecord](#comparisonrecord), and then a [TaskRecord](#taskrecord) for each task.",
        [EvaluationRecord, ComparisonRecord, TaskRecord],
    ),
    "results.jsonl": ("A [Result](#result) in each line.", [Result]),
    "JSON of alps inspect": ("An [Inspection](#inspection).", [Inspection]),
}
# Fields whose annotation does not name their record.
_RECORDS: dict[tuple[type, str], Any] = {(LayerRecord, "solve"): SolveInfo}
# Names of the code in docstrings, and what stands for them on the page.
_LINKS = {
    "PHASES": "[phases](#phases-of-reportjson)",
    "INSIDE_SOLVE": "[parts of `solve`](#phases-of-reportjson)",
    "SHRINK_PHASES": "[phases](#phases-of-shrinkjson)",
    "RunReport": "[RunReport](#runreport)",
    "LayerRecord": "[LayerRecord](#layerrecord)",
    "SolveInfo": "[SolveInfo](#solveinfo)",
}
_SUMMARY = ("sparsity", "zeros", "entries", "sparsity_with_kept", "mean_error", "mean_magnitude_error")
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "any value"}


def report_json_page() -> str:
    """Return the page as Markdown."""
    parts, seen = [_INTRODUCTION], set[type]()
    for title, (content, roots) in _ROOTS.items():
        parts.append(f"\n## {title}\n\n{content}\n")
        for root in roots:
            parts += [_section(record) for record in reachable(root) if record not in seen]
            seen.update(reachable(root))
    parts.append("\n## Phases of report.json\n\nKeys of `seconds`, beside `total`; all values are seconds.\n")
    parts.append(_rows("phase", PHASES) + "\nParts of the phase `solve`:\n" + _rows("part", INSIDE_SOLVE))
    parts.append("\n## Phases of shrink.json\n\nKeys of `seconds`, beside `total`; all values are seconds.\n")
    parts.append(_rows("phase", SHRINK_PHASES))
    return "".join(parts)


def is_record(kind: Any) -> bool:
    """Return whether a type is a class of records."""
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind))


def reachable(record: type) -> list[type]:
    """Return a class of records, and those that its fields hold, in the order of the fields."""
    found = [record]
    for kind in fields(record).values():
        for part in _parts(kind):
            found += [inner for inner in reachable(part) if inner not in found]
    return found


def fields(record: type) -> dict[str, Any]:
    """Return the types of a class's own fields by name; those of a base class of records are left out."""
    hints = get_type_hints(record, include_extras=True)
    own = [name for name in vars(record).get("__annotations__", {}) if name in hints and name != "model_config"]
    return {name: _RECORDS.get((record, name), hints[name]) for name in own}


def descriptions(record: type) -> dict[tuple[str, ...], str]:
    """Return the meanings in the section Attributes of a docstring by the fields that share each of them.

    Raises:
        AssertionError: unless every field has a meaning, and every meaning a field.
    """
    _, _, section = (inspect.getdoc(record) or "").partition("\nAttributes:\n")
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n     +.*)*)", section, re.MULTILINE)
    meanings = {tuple(names.split(", ")): " ".join(text.split()) for names, text in entries}
    described = [name for names in meanings for name in names]
    assert sorted(described) == sorted(fields(record)), (
        f"{record.__name__}: describe {set(fields(record)) ^ set(described)}"
    )
    return meanings


def _parts(kind: Any) -> Iterator[Any]:
    if is_record(kind):
        yield kind
    for part in get_args(kind):
        yield from _parts(part)


def _section(record: type) -> str:
    text = inspect.cleandoc(record.__doc__ or "").partition("\nAttributes:\n")[0].strip()
    lines = [f"\n### {record.__name__}\n", f"\n{text}\n"]
    bases = [base for base in record.__bases__ if is_record(base) and fields(base)]
    lines += [f"\nIt has the fields of {_link(base)}, and these:\n" for base in bases]
    if record is RunReport:
        lines.append("\n`summary`, at the beginning of the file, repeats what follows from the fields:\n")
        lines.append("\n| field of `summary` | meaning |\n|---|---|\n")
        lines += [f"| `{name}` | {_cell(inspect.getdoc(getattr(RunReport, name)) or '')} |\n" for name in _SUMMARY]
    lines.append("\n| field | type | meaning |\n|---|---|---|\n")
    kinds = fields(record)
    for names, meaning in descriptions(record).items():
        words = [_describe(kinds[name]) for name in names]
        kind = words[0] if len(set(words)) == 1 else ", ".join(words)
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {kind} | {_cell(meaning)} |\n")
    if record is SolveInfo:
        lines.append("\n| `status` | meaning |\n|---|---|\n")
        meanings = re.findall(r"^    (\w+): (.*)$", inspect.getdoc(Status) or "", re.MULTILINE)
        assert [name for name, _ in meanings] == [status.name for status in Status]
        lines += [f"| `{Status[name]}` | {_cell(meaning)} |\n" for name, meaning in meanings]
    return "".join(lines)


def _describe(kind: Any) -> str:
    """Return a type in words."""
    if is_record(kind):
        return _link(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        # The one annotated type: a number that may be infinite.
        return f"{_describe(arguments[0])} or null"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _describe(part) for part in arguments)
    if origin in (list, tuple):
        element = _describe(arguments[0])
        return f"list of {element}s" if element in ("integer", "number") else f"list of {element}"
    if origin is dict:
        key = "text" if arguments[0] is str else _describe(arguments[0])
        return f"object: {_describe(arguments[1])} by {'name' if key == 'text' else key}"
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if isinstance(kind, type) and issubclass(kind, Status):
        return "text"
    return _NAMES[kind]


def _rows(head: str, meanings: dict[str, str]) -> str:
    rows = "".join(f"| `{name}` | {_cell(meaning)} |\n" for name, meaning in meanings.items())
    return f"\n| {head} | meaning |\n|---|---|\n{rows}"


def _link(record: type) -> str:
    return f"[{record.__name__}](#{record.__name__.lower()})"


def _cell(text: str) -> str:
    """Return a meaning as the cell of a table: names of JSON, links, and no character that Markdown takes."""
    # Formulas hold bars, and stars outside code.
    text = re.sub(r"\|", r"\\|", re.sub(r"\*(?=[|,. ])", r"\\*", text.replace("None", "null")))
    for name, target in _LINKS.items():
        text = re.sub(rf"`(?:alps\.[\w.]+\.)?{name}`", target, text)
    return text


if __name__ == "__main__":
    print(report_json_page(), end="")
