"""Layer rules: names with wildcards that keep layers dense or give them a pattern of their own.

A rule is a name with the wildcards of `fnmatch`, whose `*` matches dots, too. It applies to every module, parameter and
expert slice that it matches, and to everything inside a module that it matches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from alps.core.errors import ConfigError, did_you_mean
from alps.models.blocks import Block
from alps.models.dense_parameters import dense_parameters
from alps.models.sites import Site
from alps.reporting.run_report import DenseRecord
from alps.solvers.patterns import Pattern, parse_pattern


@dataclass(frozen=True)
class Rules:
    """Layers to keep dense and patterns of single layers, by name.

    Attributes:
        keep_dense: rules of parameters that stay unchanged, to the bit.
        overrides: pattern by rule. If several rules match a layer, the last one applies.
    """

    keep_dense: Sequence[str] = ()
    overrides: Mapping[str, Pattern] = field(default_factory=dict)

    def apply(self, model: nn.Module, blocks: list[Block]) -> AppliedRules:
        """Apply the rules to one model.

        Args:
            model: the model of the blocks.
            blocks: its decoder blocks, with all of their sites.

        Raises:
            ConfigError: for a rule that matches nothing, an override that applies to no layer, or rules that leave
                nothing to prune.
        """
        sites = [site for block in blocks for site in block.sites]
        _check_named([*self.keep_dense, *self.overrides], model, sites)
        kept = {site.name: rule for site in sites if (rule := _first(self.keep_dense, site)) is not None}
        if len(kept) == len(sites):
            rules = ", ".join(f"'{rule}'" for rule in dict.fromkeys(kept.values()))
            raise ConfigError(f"Nothing is left to prune: every linear layer is kept dense by {rules}; keep fewer.")
        latest = list(self.overrides)[::-1]
        chosen = {site.name: rule for site in sites if site.name not in kept and (rule := _first(latest, site))}
        for rule in self.overrides:
            if rule not in chosen.values():
                raise ConfigError(
                    f"Override '{rule}' applies to no linear layer: its layers are never pruned, kept dense, or "
                    "matched by a later override; leave it out, or put it last."
                )
        patterns = {name: self.overrides[rule] for name, rule in chosen.items()}
        return AppliedRules([self._open(block, kept) for block in blocks], kept, patterns)

    def _open(self, block: Block, kept: dict[str, str]) -> Block:
        names = [name for name, _ in block.module.named_parameters()]
        fixed = {name for name in names if any(matches(rule, f"{block.name}.{name}") for rule in self.keep_dense)}
        sites = [site for site in block.sites if site.name not in kept]
        return replace(block, sites=sites, frozen=frozenset(fixed))


@dataclass(frozen=True)
class AppliedRules:
    """The rules of a run, resolved on the blocks of one model.

    Attributes:
        blocks: blocks with only those sites that are pruned.
        kept: rule that keeps a site dense, by the name of the site.
        patterns: pattern of a site that does not use the one of the run, by name.
    """

    blocks: list[Block]
    kept: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, Pattern] = field(default_factory=dict)

    def dense(self, model: nn.Module, blocks: Sequence[Block], pruned: set[str]) -> list[DenseRecord]:
        """List the dense parameters of two or more dimensions with the reason; of a fused one, its dense slices.

        Args:
            model: the model of the blocks.
            blocks: its decoder blocks, with all of their sites.
            pruned: names of the sites that were pruned.
        """
        owners: dict[str, list[Site]] = {}
        for block in blocks:
            for site in block.sites:
                owners.setdefault(site.parameter_name, []).append(site)
        touched = {name for name, sites in owners.items() if any(site.name in pruned for site in sites)}
        rows = []
        for left in dense_parameters(model, touched):
            rules = [self.kept.get(site.name) for site in owners.get(left.name, [])]
            rule = rules[0] if rules and None not in rules else None
            rows.append(DenseRecord(name=left.name, shape=left.shape, reason=_reason(rule) or left.reason, rule=rule))
        return rows + [
            DenseRecord(name=site.name, shape=site.shape, reason=_reason(rule), rule=rule)
            for name, sites in owners.items()
            for site in sites
            if name in touched and (rule := self.kept.get(site.name)) is not None
        ]


def parse_overrides(values: Mapping[str, Pattern | str | float]) -> dict[str, Pattern]:
    """Parse the patterns of overrides: 0.6, `60%`, `2:4`, or pattern objects.

    Raises:
        ConfigError: for a pattern that cannot be parsed; names its rule.
    """
    patterns: dict[str, Pattern] = {}
    for rule, value in values.items():
        try:
            patterns[rule] = parse_pattern(str(value)) if isinstance(value, str | float | int) else value
        except ConfigError as error:
            raise ConfigError(f"Override '{rule}': {error}") from None
    return patterns


def matches(rule: str, name: str) -> bool:
    """Return True if a rule matches a dotted name, or the name of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:length]), rule) for length in range(1, len(parts) + 1))


def _first(rules: Sequence[str], site: Site) -> str | None:
    names = (site.name, site.parameter_name)
    return next((rule for rule in rules if any(matches(rule, name) for name in names)), None)


def _reason(rule: str | None) -> str:
    return "" if rule is None else f"kept dense by the rule '{rule}'"


def _check_named(rules: Sequence[str], model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse a rule that matches nothing of a model.

    Raises:
        ConfigError: names the rule, and a similar name that exists.
    """
    names = [name for name, _ in model.named_modules()] if rules else []
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)] if rules else []
    names += [site.name for site in sites]
    for rule in rules:
        if not any(fnmatchcase(name, rule) for name in names if name):
            ends = dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in names if "." in name)
            raise ConfigError(
                f"Rule '{rule}' names nothing in {type(model).__name__}: write a name of a module, with * for any part "
                f"of it, such as '{sites[0].name}' or '*.{sites[0].name.rpartition('.')[2]}'."
                f"{did_you_mean(rule, [*ends, *filter(None, names)])}"
            )
