"""The environment of a pruning run, with its journal."""

from __future__ import annotations

from dataclasses import dataclass, field

from alps.pruning.environment import RunEnvironment
from alps.pruning.resume import NullJournal, RunJournal


@dataclass(frozen=True, kw_only=True)
class RunContext(RunEnvironment):
    """Device, ranks, limits and journal of a pruning run.

    Attributes:
        journal: keeps every finished block, and restores those of an earlier process.
    """

    journal: RunJournal = field(default_factory=NullJournal)
