"""Generator of docs/reference/settings.md: `python -m alps.cli.settings_page` prints it from the configs."""

from __future__ import annotations

from pydantic import BaseModel

from alps.core.settings import describe_fields
from alps.evaluation.compare_config import CompareConfig
from alps.evaluation.evaluate_config import EvaluateConfig
from alps.finetuning.distill_config import DistillConfig
from alps.finetuning.reconstruct_config import ReconstructConfig
from alps.pruning.config import PruneConfig
from alps.pruning.shrink_config import ShrinkConfig

# Configs of the commands that have settings.
CONFIGS: dict[str, type[BaseModel]] = {
    "prune": PruneConfig,
    "shrink": ShrinkConfig,
    "eval": EvaluateConfig,
    "compare": CompareConfig,
    "reconstruct": ReconstructConfig,
    "distill": DistillConfig,
}
_INTRODUCTION = """\
# Settings

Every setting of `alps prune`, `alps shrink`, `alps eval`, `alps compare`, `alps reconstruct` and `alps distill`. A
setting has one name: the key in a YAML file (`--config` of `alps prune`, `alps shrink` and `alps compare`), the keyword
argument in Python (`alps.prune`, `alps.shrink`, `alps.evaluate` and `alps.evaluate_tasks`, `alps.compare`,
`alps.reconstruct`, `alps.distill`), and, with dashes, the option of the command line. A switch `--name` also has a form
`--no-name`. *By preset* means that the value of `--preset` applies where the setting is not given
([presets](../how-to/presets.md)).

This page is generated from the code: `python -m alps.cli.settings_page > docs/reference/settings.md`.
"""


def settings_page() -> str:
    """Return the page as Markdown."""
    return _INTRODUCTION + "".join(_section(command, config) for command, config in CONFIGS.items())


def _section(command: str, config: type[BaseModel]) -> str:
    lines = [f"\n## alps {command}\n"]
    fields = list(describe_fields(config))
    for panel in dict.fromkeys(field.setting.panel for field in fields):
        lines += [f"\n### {panel}\n", "\n| setting | option | default | meaning |\n", "|---|---|---|---|\n"]
        for field in fields:
            if field.setting.panel == panel:
                option = f"`{field.option}`" if field.name != "model" else "`MODEL`"
                help_text = field.help.replace("|", "\\|").replace("*", "\\*")
                lines.append(f"| `{field.name}` | {option} | {field.default} | {help_text} |\n")
    return "".join(lines)


if __name__ == "__main__":
    print(settings_page(), end="")
