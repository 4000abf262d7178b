"""Tests lie where a reader looks for them: those of a module under its name, helpers in `helpers`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
_PACKAGE = _TESTS.parent / "src" / "alps"


# Modules without a test of their name, each with the test that covers it, and why it is there.
_COVERED_ELSEWHERE = {
    "cli/compare": "tests/evaluation/test_compare.py: the command is started there",
    "cli/demo_run": "tests/cli/test_demo.py: its one caller, the demo, is the check on the real model",
    "cli/evaluate_run": "tests/cli/test_evaluate.py: the command does nothing else",
    "cli/generate": "tests/inference/test_text_generation.py: the command prints what the function returns",
    "cli/report": "tests/reporting/test_publish.py: the command draws what that module makes",
    "cli/settings_page": "tests/cli/test_options.py: the page is compared with the options that it documents",
    "data/arrow_texts": "tests/data/test_text_files.py: one table for all formats, which are told apart there",
    "data/byte_streams": "tests/data/test_text_files.py: every compression and encoding with every format",
    "data/csv_texts": "tests/data/test_text_files.py: one table for all formats",
    "data/json_texts": "tests/data/test_text_files.py: one table for all formats",
    "data/tensor_cache": "tests/data/test_self_generated.py: damaged and half-written files of the cache of windows",
    "data/text_column": "tests/data/test_text_files.py: the choice of a column with every format",
    "evaluation/distributed_lm": "tests/evaluation/test_tasks.py: a class of lm-eval's, which runs with lm-eval alone",
    "evaluation/evaluate_config": "tests/cli/test_evaluate.py: what it rejects are options of the command",
    "finetuning/distill_config": "tests/finetuning/test_distillation.py: settings that cannot be used",
    "finetuning/reconstruct_config": "tests/finetuning/test_reconstruct_checkpoint.py: every run there has one",
    "finetuning/reconstruction_parameters": "tests/finetuning/test_block_reconstruction.py: fields without behaviour",
    "models/gguf_rope": "tests/models/test_gguf_metadata.py: rotary embeddings are compared on whole files there",
    "inference/triton_kernels": "tests/inference/test_triton_backend.py: kernels run through their backend alone",
    "solvers/registry": "tests/solvers/test_every_method.py: every method of the table solves problems there",
    "pruning/context": "tests/pruning/test_pipeline.py: fields without behaviour, which every run there sets",
}


def modules() -> Iterator[str]:
    """Yield the modules of the package as `solvers/alps`."""
    for path in sorted(_PACKAGE.glob("*/*.py")):
        if path.name != "__init__.py":
            yield f"{path.parent.name}/{path.stem}"


def imported_tests(source: str) -> list[str]:
    """List the names that a file imports from test modules or from a conftest, at any depth of nesting."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return [name for name in names if any(part.startswith("test_") or part == "conftest" for part in name.split("."))]


@pytest.mark.parametrize("path", sorted(_TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(_TESTS)))
def test_nothing_is_imported_from_a_test(path: Path) -> None:
    assert imported_tests(path.read_text()) == []


def test_the_check_finds_imports_from_tests() -> None:
    source = (
        "import conftest\nfrom solvers.test_alps import solve\ndef f():\n    from solvers import test_pcg, helpers\n"
    )
    assert imported_tests(source) == ["conftest", "solvers.test_alps.solve", "solvers.test_pcg"]


def test_helpers_lie_in_one_folder() -> None:
    others = {path for path in _TESTS.rglob("*.py") if not path.name.startswith("test_") and path.name != "conftest.py"}
    assert {path.parent.name for path in others} == {"helpers", "wheel"}


def test_every_module_has_a_test_of_its_name_or_a_reason() -> None:
    """A module that moves, appears or gets its test has to be taken care of here."""
    lacking = {module for module in modules() if not _test_of(module).is_file()}
    assert lacking == _COVERED_ELSEWHERE.keys()
    for reason in _COVERED_ELSEWHERE.values():
        assert (_TESTS.parent / reason.partition(":")[0]).is_file(), reason


def _test_of(module: str) -> Path:
    package, name = module.split("/")
    return _TESTS / package / f"test_{name}.py"
