"""Trees of arguments: moved, cut into windows, and filled with what earlier blocks handed on."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given

from alps.calibration.block_arguments import (
    BlockArguments,
    Container,
    ContainerKey,
    HandedOn,
    leaves,
    make_call,
    map_leaves,
    select_window,
    to_device,
    to_meta,
)

_CPU = torch.device("cpu")
_Pair = namedtuple("_Pair", "left right")
_TREES = st.recursive(
    st.one_of(st.none(), st.integers(), st.booleans(), st.sampled_from(["a", "b"])),
    lambda items: st.one_of(
        st.lists(items, max_size=3),
        st.lists(items, max_size=3).map(tuple),
        st.tuples(items, items).map(lambda pair: _Pair(*pair)),
        st.dictionaries(st.sampled_from("xyz"), items, max_size=3),
        st.dictionaries(st.sampled_from("xyz"), items, max_size=3).map(OrderedDict),
        st.dictionaries(st.sampled_from("xyz"), items, max_size=3).map(UserDict),
    ),
    max_leaves=12,
)


@given(_TREES)
def test_a_mapped_tree_has_the_same_shape_and_new_containers(tree: Any) -> None:
    mapped = map_leaves(tree, lambda leaf: leaf)
    assert mapped == tree and type(mapped) is type(tree)
    assert mapped is not tree or not isinstance(tree, list | dict | UserDict)


def test_tensors_are_moved_through_tuples_lists_and_dicts() -> None:
    tensor = torch.ones(2)
    moved = to_device({"mask": None, "tables": (tensor, [tensor, 3]), "flag": True}, torch.device("meta"))
    assert moved["mask"] is None and moved["flag"] is True and moved["tables"][1][1] == 3
    assert moved["tables"][0].is_meta and moved["tables"][1][0].is_meta
    assert isinstance(moved["tables"], tuple) and isinstance(moved["tables"][1], list)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
def test_a_window_is_cut_along_the_axis_that_grows(windows: int, size: int, axis: int) -> None:
    # Every window holds `size` rows of its own number; the other axes have sizes that a batch may have, too.
    parts = [torch.full((2, 3, 4), float(window)).narrow(axis, 0, min(size, 2)) for window in range(windows)]
    batch, table = torch.cat(parts, dim=axis), torch.rand(3)
    tree = {"own": (batch, [table, windows]), "key": HandedOn(0, 1)}
    single = to_meta({"own": (parts[0], [table, 1]), "key": HandedOn(0, 1)})
    for window in range(windows):
        selected = select_window(tree, single, window)
        assert torch.equal(selected["own"][0], parts[window])
        assert selected["own"][1][0] is table and selected["own"][1][1] == 1 and selected["key"] == HandedOn(0, 1)


def test_a_call_gets_the_values_of_earlier_blocks_and_its_own_containers() -> None:
    key, states = ContainerKey(0, "shared"), torch.rand(2)
    empty = Container(key, {})
    arguments = BlockArguments((HandedOn(0, 1), empty), {"again": empty, "flag": 3})
    call = make_call(arguments, {HandedOn(0, 1): states}, _CPU)
    assert call.args[0] is states and call.args[1] == {} and call.kwargs["flag"] == 3
    assert call.args[1] is call.kwargs["again"] and call.args[1] is not empty.initial
    assert call.changed_containers() == {}
    call.args[1]["keys"] = states
    assert call.changed_containers() == {key: {"keys": states}} and empty.initial == {}
    later = make_call(arguments, {HandedOn(0, 1): states, key: {"keys": states}}, _CPU)
    assert later.args[1]["keys"] is states and later.changed_containers() == {}
    later.args[1]["keys"] = states.clone()
    assert list(later.changed_containers()) == [key]


def test_leaves_of_a_container_follow_it() -> None:
    container = Container(ContainerKey(1, "x"), {"a": (1, 2)})
    assert list(leaves((0, container, []))) == [0, container, 1, 2]
