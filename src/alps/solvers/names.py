"""Names of the pruning methods and of their efforts, for help texts and checks that do not wait for torch."""

from __future__ import annotations

METHOD_NAMES = ("alps", "magnitude", "wanda", "sparsegpt", "dsnot", "dsnot-sparsegpt")
EFFORT_NAMES = ("normal", "high")
