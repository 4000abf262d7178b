"""The notebooks of the documentation hold no output, and run from top to bottom on a small model."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials" / "notebooks"
# Settings of a small model, in place of the cell that is tagged so.
_PARAMETERS = {
    "errors-by-layer": "MODEL, SPARSITY, SAMPLES, SEQLEN, WINDOWS = {model!r}, 0.6, 6, 64, 4",
    "one-layer": "MODEL, BLOCK, SPARSITIES, SAMPLES, SEQLEN = {model!r}, 1, [0.4, 0.6, 0.8], 8, 64",
}
BOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def is_parameters(cell: Any) -> bool:
    return "parameters" in cell["metadata"].get("tags", ())


def assigned(source: str) -> set[str]:
    """Return the names that a piece of code assigns."""
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stripped_valid_and_linked(path: Path) -> None:
    book = json.loads(path.read_text())
    cells = code_cells(book)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    for cell in cells:
        ast.parse("".join(cell["source"]))
    (parameters,) = filter(is_parameters, cells)
    assert assigned("".join(parameters["source"])) == assigned(_PARAMETERS[path.stem].format(model=""))
    assert f"(notebooks/{path.name})" in (FOLDER.parent / "index.md").read_text()
    links = re.findall(r"\]\(([^):#]+\.md)", "".join(line for cell in book["cells"] for line in cell["source"]))
    assert [link for link in links if not (FOLDER / link).is_file()] == []


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, short_stories: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra notebooks")
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    (parameters,) = filter(is_parameters, code_cells(book))
    parameters["source"] = _PARAMETERS[path.stem].format(model=str(short_stories))
    nbclient.NotebookClient(book, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code_cells(book) for output in cell["outputs"]]
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    assert kinds.count("image/png") == {"errors-by-layer": 1, "one-layer": 3}[path.stem]
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert {"errors-by-layer": "60.00% zeros: KL", "one-layer": "of its weights are those of ALPS"}[
        path.stem
    ] in printed
