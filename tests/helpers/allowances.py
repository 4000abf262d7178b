"""Generator of the table in docs/reference/shrinking.md: what structured pruning can remove from each family.

python tests/helpers/allowances.py
"""

from __future__ import annotations

from alps.models.shrink_families import FAMILIES
from alps.models.shrink_layout import Family

_HEAD = """| model type | MLP channels | heads | experts, their channels | MLP added |
|---|---|---|---|---|
"""


def allowance_table() -> str:
    """Return the table, with one row for all families that allow the same."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES.values():
        rows.setdefault(_cells(family), []).append(f"`{family.model_type}`")
    lines = (f"| {', '.join(names)} | {' | '.join(cells)} |\n" for cells, names in rows.items())
    return _HEAD + "".join(lines)


def _cells(family: Family) -> tuple[str, ...]:
    return _width(family), _heads(family), _experts(family), "yes" if family.adds_mlp else "no"


def _width(family: Family) -> str:
    if family.no_width:
        return f"no: {family.no_width}"
    return "" if family.mlp is None else f"`{family.mlp.field}`"


def _heads(family: Family) -> str:
    if family.no_heads:
        return f"no: {family.no_heads}"
    if family.heads == "free":
        return "any number"
    return "divisors of the hidden size" + ("; any, as Mistral" if family.as_mistral else "")


def _experts(family: Family) -> str:
    if family.no_experts:
        return f"no: {family.no_experts}"
    return "" if family.experts is None else f"`{family.experts.count}`, `{family.experts.width}`"


if __name__ == "__main__":
    print(allowance_table(), end="")
