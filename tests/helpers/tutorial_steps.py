"""Steps of a page that teaches: its commands and Python blocks in order, each with the output that the page shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]\d+)?")
# Differ between machines or models, and are not numbers: kernels, a plural, widths of tables, the best of a column.
_VARIABLE = {
    "kernel K,": re.compile(r"kernel \S+,"),
    "thread": re.compile(r"\bthreads\b"),
    "─": re.compile("[━─]+"),
    "": re.compile(r"\*\*"),
}
# Their text is the model's own.
_SAMPLING = ("alps generate", ".generate(", "create_completion")


@dataclass(frozen=True)
class Step:
    """A block of code in a page.

    Attributes:
        language: `sh` or `python`.
        code: the block.
        shown: the output that the page shows below it; empty if there is none.
    """

    language: str
    code: str
    shown: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of every command of a block of `sh`."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    @property
    def compared_lines(self) -> list[str]:
        """The lines of the output that the program has to print; of text that a model writes, those with figures."""
        lines = [line for line in self.shown.splitlines() if line.strip(" .")]
        is_sampled = any(word in self.code for word in _SAMPLING)
        return [line for line in lines if re.search(r"\d", line)] if is_sampled else lines


def read_steps(page: Path) -> list[Step]:
    """Return the steps of a page; blocks of `text` are the output of the code before them."""
    steps: list[Step] = []
    for language, code in _FENCE.findall(page.read_text()):
        if language == "text":
            assert steps, f"{page.name}: output without a command"
            steps[-1] = Step(steps[-1].language, steps[-1].code, steps[-1].shown + code)
        else:
            assert language in ("sh", "python"), f"{page.name}: a block of '{language}'"
            steps.append(Step(language, code, ""))
    return steps


def missing_lines(step: Step, printed: str) -> Iterator[str]:
    """Yield the lines that a page shows and the program does not print, apart from numbers and the ends of lines."""
    lines = [mask_numbers(line) for line in printed.splitlines()]
    for line in step.compared_lines:
        masked = mask_numbers(line)
        if not any(candidate.startswith(masked) for candidate in lines):
            yield line


def mask_numbers(line: str) -> str:
    """Replace what differs between models and machines: numbers, kernels, and the spaces of tables."""
    for name, pattern in _VARIABLE.items():
        line = pattern.sub(name, line)
    return " ".join(_NUMBER.sub("#", line).split())
