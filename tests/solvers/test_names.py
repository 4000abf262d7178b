"""Names in help texts are those of the methods."""

from __future__ import annotations

import pytest

import alps.solvers
from alps.solvers import EFFORTS, METHODS
from alps.solvers.names import EFFORT_NAMES, METHOD_NAMES


def test_names_are_those_of_the_tables() -> None:
    assert tuple(METHODS) == METHOD_NAMES and tuple(EFFORTS) == EFFORT_NAMES


def test_the_package_gives_its_names_on_first_access() -> None:
    assert all(getattr(alps.solvers, name) is not None for name in alps.solvers.__all__)
    with pytest.raises(AttributeError, match=r"module 'alps\.solvers' has no attribute 'Alp'"):
        alps.solvers.__getattr__("Alp")
