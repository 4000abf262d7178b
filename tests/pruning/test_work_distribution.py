"""Layers shared out among processes: who solves what, and runs in several processes against those in one.

Processes are forked from a server that has imported everything. One test starts torchrun itself, as users do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alps.pruning.work_distribution import assign, assign_inputs, rank_loads, solve_cost
from alps.reporting.run_report import RunReport
from alps.solvers import get_method
from helpers import torchrun_worker
from helpers.cli_process import run_group, start_group


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_no_process_has_more_than_four_thirds_of_the_least_possible_load(costs: list[float], size: int) -> None:
    owners = assign(costs, size)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    least = max(sum(costs) / size, max(costs))
    if len(costs) > size:
        ordered = sorted(costs, reverse=True)
        least = max(least, ordered[size - 1] + ordered[size])
    assert max(loads) <= least * 4 / 3 + 1e-9


def test_an_input_is_split_where_others_would_wait() -> None:
    method = get_method("alps")
    lone = [solve_cost(method, [(4096, 1024), (4096, 1024)], 2)]
    assert assign_inputs(lone, 2) == [None]
    fixed, rows = lone[0].fixed, lone[0].rows
    assert rank_loads(lone, [None], 2) == [fixed + rows / 2] * 2
    even = [solve_cost(method, [(1024, 1024)], 2) for _ in range(4)]
    assert sorted(assign_inputs(even, 2)) == [0, 0, 1, 1]  # type: ignore[type-var]
    # Few rows and other methods are not split.
    assert not solve_cost(method, [(30, 1024)], 2).divisible
    assert not solve_cost(get_method("sparsegpt"), [(4096, 1024)], 2).divisible


@pytest.fixture
def options(english_file: Path) -> list[object]:
    """Options of a quick run: 7 windows make uneven shares, and ADMM stops early, for every step is a message."""
    config = english_file.parent / "options.yaml"
    config.write_text("options: {admm: {max_iterations: 12}}\n")
    sizes = ["--samples", 7, "--seqlen", 64]
    return ["--config", config, "--sparsity", 0.7, "--calibration", english_file, *sizes]


def _prune(size: int, model: Path, out: Path, options: list[object]) -> RunReport:
    ended = run_group(size, "prune", model, out, *options)
    assert [process.returncode for process in ended] == [0] * size, ended
    assert sum(process.stdout.count("Written to") for process in ended) == 1
    report = RunReport.read(out)
    assert report is not None
    return report


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "more", [(), ("--sparsity", 0.8, "--preset", "best", "--row-weights", "block-output")], ids=["block", "best"]
)
def test_any_number_of_processes_gives_the_same_bits(
    more: tuple[object, ...], short_stories: Path, options: list[object], tmp_path: Path
) -> None:
    """Seven windows in one to three shares; in the sequential order of `best` every input is split by rows."""
    reports = [_prune(size, short_stories, tmp_path / str(size), [*options, *more]) for size in (1, 2, 3)]
    assert len({_weights(tmp_path / str(size)) for size in (1, 2, 3)}) == 1
    layers = [[(s.name, s.zeros, s.tokens, s.error) for s in report.layers] for report in reports]
    assert layers[0] == layers[1] == layers[2] and len(layers[0]) == 14
    assert not (tmp_path / "2.partial").exists()


@pytest.mark.slow
def test_two_hosts_write_the_bits_of_one_process(short_stories: Path, options: list[object], tmp_path: Path) -> None:
    """As far as one machine can stand for two: a torchrun each, which meet by an address and a port."""
    _prune(1, short_stories, tmp_path / "one", options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    arguments = ["-m", "alps", "prune", short_stories, tmp_path / "two", *options]
    command = [sys.executable, "-m", "torch.distributed.run", *hosts, "--local-addr", "127.0.0.1", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    launchers = [subprocess.Popen(command, start_new_session=True, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    try:
        outputs = [launcher.communicate(timeout=200) for launcher in launchers]
    finally:
        for launcher in launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert sum(stdout.count("Written to") for stdout, _ in outputs) == 1
    assert _weights(tmp_path / "one") == _weights(tmp_path / "two")


def _both_sizes(*arguments: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Output of tests/helpers/torchrun_worker.py in one process, and in two."""
    groups = [run_group(size, *arguments, work=torchrun_worker.main) for size in (1, 2)]
    assert all(process.returncode == 0 for group in groups for process in group), groups
    one, two = ("".join(process.stdout for process in group) for group in groups)
    return json.loads(one), json.loads(two)


@pytest.mark.parametrize(("kind", "order"), [("qwen2_moe", "sequential"), ("gpt2", "block")])
def test_experts_and_transposed_weights_are_those_of_one_process(kind: str, order: str) -> None:
    """Wanda amplifies no rounding: tokens of every expert, pooled tokens, and all weights are equal."""
    one, two = _both_sizes(kind, order, 0)
    assert two["same"] and two["weights"] == pytest.approx(one["weights"], rel=1e-12)
    layers = {name: figures for name, *figures in two["layers"]}
    assert layers.keys() == {name for name, *_ in one["layers"]}
    assert any(site[2] for site in one["layers"]) == (kind != "gpt2")
    for name, tokens, added, zeros, error in one["layers"]:
        assert layers[name] == [tokens, added, zeros, pytest.approx(error, rel=1e-5)], name


@pytest.mark.parametrize("order", ["block", "sequential"])
def test_blocks_are_reconstructed_by_the_gradients_of_all_windows(order: str) -> None:
    one, two = _both_sizes("llama", order, 3)
    assert two["same"] and two["weights"] == pytest.approx(one["weights"], rel=1e-4)
    for alone, shared in zip(one["reconstructions"], two["reconstructions"], strict=True):
        assert (shared["steps"], shared["best_step"]) == (alone["steps"], alone["best_step"])
        assert shared["after"] == pytest.approx(alone["after"], rel=1e-3)
    # Otherwise the weights would be equal because nothing was tuned.
    assert any(match["after"] < match["before"] for match in one["reconstructions"])


def _forked(arguments: tuple[object, ...]) -> tuple[list[int], Callable[[], tuple[int, str]]]:
    """Processes that no launcher watches: pids, and how the first one ends."""
    processes = start_group(2, *arguments)

    def end() -> tuple[int, str]:
        errors = [process.communicate(timeout=60)[1] for process in processes]
        return processes[0].returncode or 0, errors[0]

    return [process.pid for process in processes], end


def _launched(arguments: tuple[object, ...]) -> tuple[list[int], Callable[[], tuple[int, str]]]:
    """Processes of torchrun: pids, and how torchrun ends."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "alps"]
    command = [sys.executable, *launcher, *map(str, arguments)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    while len(children.read_text().split()) < 2:
        assert running.poll() is None
        time.sleep(0.02)

    def end() -> tuple[int, str]:
        _, errors = running.communicate(timeout=60)
        return running.returncode, errors

    return [int(pid) for pid in children.read_text().split()], end


@pytest.mark.parametrize("begin", [_forked, pytest.param(_launched, marks=pytest.mark.slow)])
def test_a_killed_process_ends_all_and_the_run_resumes_with_three(
    begin: Callable[[tuple[object, ...]], tuple[list[int], Callable[[], tuple[int, str]]]],
    short_stories: Path,
    options: list[object],
    tmp_path: Path,
) -> None:
    """The whole preset: sequential order, dense target, reconstruction, an allocation; rows in every process."""
    out, model = tmp_path / "out", tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(short_stories).save_pretrained(model, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(short_stories).save_pretrained(model)
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(shards) > 3
    arguments = ("prune", model, out, *options, "--preset", "best")
    pids, end = begin(arguments)
    journal = tmp_path / "out.partial"
    deadline = time.monotonic() + 200
    while not (journal / "block-00000.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pids[-1], signal.SIGKILL)
    code, errors = end()
    assert code != 0 and not out.exists() and journal.exists()
    assert "Rank 1 of 2 died or hangs" in errors and "1 finished blocks are kept in" in errors
    resumed = run_group(3, *arguments)
    assert [process.returncode for process in resumed] == [0, 0, 0], resumed
    assert "Resuming after" in resumed[0].stderr and not journal.exists()
    report = RunReport.read(out)
    assert report is not None
    assert report.sparsity == pytest.approx(0.7, abs=1e-4) and len(report.reconstructions) == 2
    assert report.mean_error is not None and report.mean_error < 0.1
    # Each process has written some of the files.
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    for name in shards:
        assert load_file(out / name).keys() == load_file(model / name).keys()


def test_an_error_in_one_process_ends_all_with_its_sentence(
    short_stories: Path, options: list[object], tmp_path: Path
) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for path in short_stories.iterdir():
        if path.name != "model.safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(short_stories / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    ended = run_group(2, "prune", broken, tmp_path / "out", *options)
    sentences = [line for process in ended for line in process.stderr.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 2 and all("model.layers.1.mlp.up_proj.weight" in line for line in sentences)
    assert sum(line.startswith("Error: Rank ") for line in sentences) == 1
    assert all(process.returncode == 2 for process in ended)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_perplexity_is_the_same_and_other_commands_refuse(
    short_stories: Path, english_file: Path, tmp_path: Path
) -> None:
    options = ("--text", english_file, "--seqlen", 64, "--windows", 25)
    measure = ("eval", short_stories, "--reference", short_stories, *options)
    one, two = (json.loads("".join(p.stdout for p in run_group(size, *measure))) for size in (1, 2))
    assert two[0].pop("loss") == pytest.approx(one[0].pop("loss"), abs=1e-12)
    assert two[0]["windows"] == 25 and two[0]["perplexity"] == pytest.approx(one[0]["perplexity"], rel=1e-12)
    for refused in run_group(2, "pack", short_stories, tmp_path / "packed"):
        assert refused.returncode == 2 and "alps pack runs in one process" in refused.stderr
