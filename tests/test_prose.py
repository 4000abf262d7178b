"""The English of the package: openings of docstrings, banned words, names of modules and variables."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parent.parent / "src" / "alps"

# A docstring begins with an imperative verb or with a noun, never with a clause that leaves the noun out.
_OPENING = re.compile(r"(What|Who|Where|Which|Whether|How|The same|All that|As of|As it|One that)\b")

_BANNED = re.compile(
    r"\b(told|tells|anew|alike|beside|hardly|mend|let go|so many|at hand|for the time of the body|foretold|asked for"
    r"|goes on|gone on with|waits in vain)\b"
    # "as it is" is filler before a pause; "as it is written" is a comparison.
    r"|\bas it (is|was)\b(?! \w)",
    re.IGNORECASE,
)

# Pronouns, adverbs and participles, which name nothing.
_VARIABLES = frozenset(
    {"found", "one", "rest", "asked", "said", "given", "wanted", "known", "mine", "every", "here", "home", "there"}
)

# Modules whose names end like participles and are none.
_NOUNS = {"sampling": "the field's word for drawing tokens", "key_mapping": "a mapping is a thing"}
_ADJECTIVES = {
    "distributed": "as torch.distributed",
    "semi_structured": "as torch.sparse.to_sparse_semi_structured",
    "self_generated": "an adjective of the text that it makes",
    "admm_fused": "as torch's fused optimisers",
}


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def texts(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring, comment and string literal; consecutive comments are one text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("# ")
            if comments and comments[-1][0] + comments[-1][1].count("\n") + 1 == line:
                comments[-1] = (comments[-1][0], f"{comments[-1][1]}\n{text}")
            else:
                comments.append((line, text))
    yield from ((line, " ".join(text.split())) for line, text in comments)


def undocumented_methods(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield public methods without a docstring in classes without a base class to inherit it from."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_") or node.bases:
            continue
        for member in (member for member in node.body if isinstance(member, ast.FunctionDef)):
            if not member.name.startswith("_") and not ast.get_docstring(member):
                yield member.lineno, f"{node.name}.{member.name}"


def violations(source: str) -> list[str]:
    """List what is wrong with the prose and the variables of a module, as sentences with line numbers."""
    tree = ast.parse(source)
    wrong = [
        f"{line}: a docstring begins with '{match[0]}'"
        for line, text in docstrings(tree)
        if (match := _OPENING.match(text))
    ]
    wrong += [f"{line}: '{match[0]}'" for line, text in texts(source, tree) for match in _BANNED.finditer(text)]
    wrong += [
        f"{node.lineno}: a variable is called '{node.id}'"
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in _VARIABLES
    ]
    return wrong + [f"{line}: {name} has no docstring" for line, name in undocumented_methods(tree)]


@functools.cache
def _files() -> list[Path]:
    return sorted(_PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(_PACKAGE).as_posix()


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_prose_is_plain(path: Path) -> None:
    assert violations(path.read_text()) == []


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_modules_are_named_by_nouns(path: Path) -> None:
    assert not path.stem.endswith(("ed", "ing")) or path.stem in {*_NOUNS, *_ADJECTIVES}


def test_comments_in_c_are_plain() -> None:
    files = (_PACKAGE / "inference" / "csrc").iterdir()
    for path in sorted(files):
        assert not [match[0] for match in _BANNED.finditer(" ".join(path.read_text().split()))], path.name


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ('"""What it is."""', "1: a docstring begins with 'What'"),
        ('def f():\n    """One that does."""', "1: a docstring begins with 'One that'"),
        ("x = 1  # nobody is told", "1: 'told'"),
        ("# so\n# many", "1: 'so many'"),
        ("f'it goes {1} on, left as it was.'", "1: 'as it was'"),
        ("for one in x: pass", "1: a variable is called 'one'"),
        ("class A:\n    def f(self): pass", "2: A.f has no docstring"),
    ],
)
def test_violations_are_found(source: str, complaint: str) -> None:
    assert violations(source) == [complaint]


def test_plain_prose_passes() -> None:
    source = '"""Show the mask as it is stored."""\nclass A(B):\n    def f(self) -> None:\n        phone = x.found'
    assert violations(source) == []
