"""One table of the ALPS paper (arXiv 2406.07831): measured here, with the paper's figures beside.

RECIPE is one of the YAML files of this folder. Recipes of layer problems print a table a site; recipes of comparisons
run `alps compare`, which goes on after a stop, and need --out, a directory. Examples:

    python benchmarks/paper/run.py benchmarks/paper/layer-supports.yaml --calibration c4.jsonl
    python benchmarks/paper/run.py benchmarks/paper/perplexity.yaml --model facebook/opt-13b --out opt-13b
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from alps.cli.console import console_output
from alps.core.device import exact_float32
from alps.core.errors import AlpsError, ConfigError
from alps.core.yaml_io import read_yaml
from alps.evaluation.compare import run_comparison
from alps.evaluation.compare_config import load_compare_config
from layers import Problem, layer_problems, origin
from paper.dependence import dependence
from paper.published import beside_the_paper
from paper.recipe import Dependence, Penalties, Recipe, Refits, Supports, load_recipe
from paper.tables import penalties, refits, supports

# Options that only comparisons know.
_WHOLE = ("out", "text", "eval_seqlen", "windows", "task", "task_data", "limit", "seeds")


def main() -> None:
    """Read the recipe, measure, print Markdown; every user error is one line on stderr and exit code 2."""
    options = _options()
    try:
        print(layers(options) if "table" in read_yaml(Path(options.recipe)) else whole_models(options))
    except AlpsError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def layers(options: argparse.Namespace) -> str:
    """The tables of a recipe of layer problems."""
    if given := [name for name in _WHOLE if getattr(options, name) is not None]:
        flag = given[0].replace("_", "-")
        raise ConfigError(f"'{options.recipe}' is about single layers: leave out --{flag}, which is for comparisons.")
    recipe = load_recipe(Path(options.recipe), {**_shared(options), "seed": options.seed, "sites": options.site})
    with exact_float32():
        problems = layer_problems(argparse.Namespace(**recipe.model_dump()), recipe.sites)
        parts = [origin(argparse.Namespace(**recipe.model_dump()))]
        if isinstance(recipe, Dependence):
            return "\n\n".join([*parts, dependence(recipe, problems)])
        for name, problem in problems.items():
            parts += [f"### {name} {tuple(problem[0].shape)}", _table(recipe, problem)]
    return "\n\n".join(parts)


def _table(recipe: Recipe, problem: Problem) -> str:
    match recipe:
        case Supports():
            return supports(recipe, problem)
        case Refits():
            return refits(recipe, problem)
        case Penalties():
            return penalties(recipe, problem)
        case Dependence():
            raise AssertionError("one table for all sites")


def whole_models(options: argparse.Namespace) -> str:
    """The tables of a comparison, run or gone on with in --out."""
    if not options.out or options.site or options.seed is not None:
        raise ConfigError(f"'{options.recipe}' is a comparison: give --out, and neither --site nor --seed.")
    evaluation = {"texts": options.text, "eval_seqlen": options.eval_seqlen, "windows": options.windows}
    evaluation |= {"tasks": options.task, "task_data": options.task_data, "limit": options.limit}
    asked = load_compare_config(Path(options.recipe), {**_shared(options), **evaluation, "seeds": options.seeds})
    with console_output() as (_, progress):
        return beside_the_paper(run_comparison(asked, Path(options.out), progress))


def _shared(options: argparse.Namespace) -> dict[str, object]:
    return {key: getattr(options, key) for key in ("model", "calibration", "samples", "seqlen")}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seqlen", type=int)
    layer = parser.add_argument_group("single layers")
    layer.add_argument("--site", action="append")
    layer.add_argument("--seed", type=int)
    whole = parser.add_argument_group("comparisons")
    whole.add_argument("--out")
    whole.add_argument("--text", action="append")
    whole.add_argument("--eval-seqlen", type=int)
    whole.add_argument("--windows", type=int)
    whole.add_argument("--task", action="append")
    whole.add_argument("--task-data")
    whole.add_argument("--limit", type=int)
    whole.add_argument("--seeds", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
