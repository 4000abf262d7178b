"""Recipes of the paper's tables on layer problems, read from YAML; unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from alps.core.errors import ConfigError
from alps.core.yaml_io import format_validation_error, read_yaml

SparsityOf = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    """No key that nobody reads, and no text where a number belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Published(Strict):
    """Figures of the paper: columns of numbers, each as long as `keys`, with the place they are taken from.

    Attributes:
        source: table, model and site.
        keys: what the rows are: sparsities, or iterations.
        columns: the numbers, by name of the column.
    """

    source: str
    keys: list[float]
    columns: dict[str, list[float]]

    @model_validator(mode="after")
    def _as_long_as_the_keys(self) -> Published:
        for name, column in self.columns.items():
            if len(column) != len(self.keys):
                raise ValueError(f"column {name} has {len(column)} figures for {len(self.keys)} keys")
        return self

    def figure(self, column: str, key: float) -> float | None:
        """One figure; None where the paper has none."""
        if column not in self.columns or key not in self.keys:
            return None
        return self.columns[column][self.keys.index(key)]


class LayerRecipe(Strict):
    """Layer problems of a recipe: layers of a model, and their inputs in the dense model.

    Attributes:
        model, calibration, samples, seqlen, seed: as in `alps.pruning.config.PruneConfig`.
        sites: full names of linear maps.
    """

    model: str
    calibration: str = "c4"
    samples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=2048, ge=2)
    seed: int = 0
    sites: list[str] = Field(min_length=1)


class Supports(LayerRecipe):
    """Optimal weights on the support of every method."""

    table: Literal["supports"]
    sparsity: list[SparsityOf] = Field(min_length=1)
    methods: list[str] = Field(min_length=1)
    paper: Published


class Refits(LayerRecipe):
    """No refit, conjugate gradients, and an exact solve on the supports of some methods."""

    table: Literal["refit"]
    sparsity: list[SparsityOf] = Field(min_length=1)
    methods: list[str] = Field(min_length=1)
    steps: int = Field(ge=1)
    paper: Published


class Penalties(LayerRecipe):
    """The splitting under its schedule and under fixed penalties, looked at after some iterations."""

    table: Literal["rho"]
    sparsity: list[SparsityOf] = Field(min_length=1)
    iterations: list[int] = Field(min_length=1)
    fixed: list[Annotated[float, Field(gt=0)]]
    paper_sparsity: float
    errors: Published
    changes: Published


class Dependence(LayerRecipe):
    """ALPS's support over SparseGPT's, site by site, and on the first site by what may matter.

    Attributes:
        sparsity: one fraction of zeros.
        windows: calibration windows to try on the first site, besides `samples`.
        dampings: ridges to try on the first site, as fractions of the Gram's mean diagonal.
        widths: numbers of inputs, the first of the first site's, to try.
        blocks: columns of SparseGPT's mask selections to try on the first site.
        inputs: how many the made-up problems have.
        paper: ALPS's and SparseGPT's figure at that sparsity.
    """

    table: Literal["dependence"]
    sparsity: SparsityOf
    windows: list[int]
    dampings: list[Annotated[float, Field(gt=0)]]
    widths: list[int]
    blocks: list[Annotated[int, Field(ge=1)]]
    inputs: int = Field(ge=3)
    paper: Published


Recipe = Supports | Refits | Penalties | Dependence
_RECIPES: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Field(discriminator="table")])


def load_recipe(path: Path, overrides: dict[str, Any]) -> Recipe:
    """A recipe of layer problems from a YAML file, with every override that is not None on top.

    Raises:
        ConfigError: for a missing or broken file, unknown keys, or values of the wrong kind.
    """
    values = {**read_yaml(path), **{key: value for key, value in overrides.items() if value is not None}}
    try:
        return _RECIPES.validate_python(values)
    except ValidationError as error:
        known = {name for kind in (Supports, Refits, Penalties, Dependence) for name in kind.model_fields}
        raise ConfigError(format_validation_error(error, str(path), known)) from None
