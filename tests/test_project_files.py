"""Files of the project around the code: workflows, templates, citation and guides name what exists."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GUIDES = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")]


def read(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict), path
    return content


def commands(workflow: dict[Any, Any]) -> list[str]:
    """List the commands of all steps, those of a matrix filled in."""
    found = []
    for job in workflow["jobs"].values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        steps = [step["run"] for step in job["steps"] if "run" in step]
        found += [_filled_in(step, row) for step in steps for row in rows]
    return found


def _filled_in(command: str, row: dict[str, str]) -> str:
    return re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda match: row.get(match[1], ""), command)


def missing_names(command: str) -> list[str]:
    """List scripts, constraint files, extras and tests that a command names and that do not exist."""
    names = [name for name in re.findall(r"(?<!\S)\.ci/[\w-]+", command) if not (ROOT / name).is_file()]
    names += [name for name in re.findall(r"-c (\S+\.txt)", command) if not (ROOT / name).is_file()]
    extras = [extra for part in re.findall(r"(?:\.|\.whl)\[([\w,-]+)\]", command) for extra in part.split(",")]
    names += [extra for extra in extras if extra not in PROJECT["optional-dependencies"]]
    return names + [name for name in re.findall(r"(?<!\S)tests/[\w/.]+", command) if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_what_exists_and_may_do_little(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert [name for command in commands(workflow) for name in missing_names(command)] == []
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 120 and set(job.get("needs", [])) <= {*workflow["jobs"], *job.get("needs", "")}
        assert not {"id-token", "pages"} & job.get("permissions", {}).keys() or name == "publish"
        for action in (step["uses"] for step in job["steps"] if "uses" in step):
            assert re.fullmatch(r"(actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1)", action)


def test_missing_names_are_found() -> None:
    command = 'pip install -c gone.txt -e ".[test,gone]" && .ci/gone && .ci/run && pytest tests/gone.py tests/solvers'
    assert missing_names(command) == [".ci/gone", "gone.txt", "gone", "tests/gone.py"]


def test_every_supported_python_is_tested() -> None:
    versions = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)}
    matrix = read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    assert {row["python"] for row in matrix} == versions
    assert f">={min(versions, key=lambda version: int(version[2:]))}" == PROJECT["requires-python"]
    assert f"for version in {' '.join(sorted(versions))}; do" in (ROOT / ".ci" / "check-wheel").read_text()


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["demo"], *extras["report"], *extras["compress"], *extras["test"]]
    bounds = dict(re.findall(r"^([\w.-]+)>=([\d.]+)", "\n".join(wanted), re.MULTILINE))
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    # Linters are not run with old versions.
    for name in bounds.keys() - {"ruff", "mypy", "types-PyYAML"}:
        assert re.fullmatch(rf"{re.escape(bounds[name])}(\.0)*", pinned.pop(name)), name
    assert pinned.keys() <= {"click"}, "pins of packages that alps does not name"


def test_hooks_run_the_linters_of_ci() -> None:
    hooks = {hook["id"]: hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    linters = [hooks[name]["entry"].split(" --")[0] for name in ("ruff-format", "ruff-check", "mypy")]
    run = (ROOT / ".ci" / "run").read_text()
    assert all(re.search(rf"^{linter}\b", run, re.MULTILINE) for linter in linters)


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_are_complete(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] in ("input", "textarea", "checkboxes") and field["attributes"]["label"]
    asked = path.read_text()
    assert path.stem == "feature" or ("`alps --version`" in asked and "`alps inspect DIR`" in asked)


def test_the_citation_has_the_version_and_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert (citation["cff-version"], str(citation["version"])) == ("1.2.0", PROJECT["version"])
    assert citation["license"] == PROJECT["license"] and citation["authors"] == PROJECT["authors"]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Meng", "Behdin", "Wang", "Mazumder"]
    released = re.search(rf"^## \[{re.escape(PROJECT['version'])}\] - (\S+)$", GUIDES[-1].read_text(), re.MULTILINE)
    assert released is not None and released[1] == citation["date-released"]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guides_name_files_and_tests_that_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    paths = [name for name in re.findall(r"`([\w.-]+(?:/[\w.-]+)+)`", text) if "NAME" not in name]
    assert [name for name in [*links, *paths] if not (ROOT / name).exists()] == []
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        tests = {
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in tests, f"{file}::{name}"
    for command in re.findall(r"^(?:pip|pytest|\.ci).*$", text, re.MULTILINE):
        assert missing_names(command) == []
