"""Several processes under torchrun against one: the same answers, one loss of a process, and who does what."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alps.core.distributed import ProcessGroup
from alps.core.errors import ConfigError
from alps.core.statistics import InputStats, InputSums
from alps.pruning.work_sharing import assign, loads_of, shared_out, solve_cost
from alps.reporting.run_report import RunReport
from alps.solvers import get_method
from alps.solvers.alps import Alps
from alps.solvers.patterns import SemiStructured, Unstructured
from alps.solvers.row_parallel import RowShard, distributed_topk_mask
from alps.solvers.topk import topk_mask
from helpers import torchrun_worker as together
from helpers.cli_process import run_group
from helpers.thread_group import Process, in_threads


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 4), st.data())
@settings(max_examples=60)
def test_the_largest_of_all_processes_are_those_of_one(values: list[int], size: int, data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32) / 3
    kept = data.draw(st.integers(0, len(values)))
    parts = torch.tensor_split(scores, size)
    found = in_threads(size, lambda rows: distributed_topk_mask(parts[rows.rank], kept, rows))
    assert torch.equal(torch.cat(found), topk_mask(scores, kept))


@pytest.mark.parametrize("pattern", [Unstructured(0.7), SemiStructured(2, 4)], ids=str)
@pytest.mark.parametrize("shape", [(96, 32), (512, 256)])
def test_rows_solved_apart_are_those_of_the_whole(
    pattern: Unstructured | SemiStructured, shape: tuple[int, int]
) -> None:
    """To the bit: small sites by the plain steps, large ones by those that stream, whose selections are not exact."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(shape[1], shape[1], generator=generator)
    inputs = torch.randn(4 * shape[1], shape[1], generator=generator) @ mixing
    weight = torch.randn(shape, generator=generator)
    method, stats = Alps(precision="float32"), InputStats.of(inputs)
    state = method.prepare(stats)
    whole = method.solve(weight, state, pattern)
    bounds = [0, shape[0] // 4, shape[0]]

    def solve(rows: Process) -> Any:
        mine = weight[bounds[rows.rank] : bounds[rows.rank + 1]]
        return method.solve_rows(mine, method.prepare(stats), pattern, weight.numel(), rows)

    parts = in_threads(2, solve)
    mask, answer = (torch.cat([getattr(part, name) for part in parts]) for name in ("mask", "weight"))
    assert int((~mask).sum()) == pattern.pruned_count(weight.numel())
    assert torch.equal(mask, whole.mask) and torch.equal(answer, whole.weight)
    for part in parts:
        assert (part.info.iterations, part.info.refit_steps) == (whole.info.iterations, whole.info.refit_steps)


def test_who_does_not_own_sums_lets_go_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reduce", "all_reduce"):
        monkeypatch.setattr(torch.distributed, name, lambda part, dst=None: part.mul_(2))
    for rank, owner, held in [(0, 0, True), (1, 0, False), (0, None, True), (1, None, True)]:
        sums = InputSums.of(torch.ones(3, 2))
        ProcessGroup(rank, 2).reduce_statistics(sums, owner)
        assert (sums.panels is not None) == held and sums.tokens == 6
        assert not held or sums.rounded().gram().tolist() == [[6, 6], [6, 6]]


@given(st.integers(1, 400), st.integers(1, 4), st.integers(1, 61), st.data())
@settings(max_examples=60)
def test_a_sample_of_parts_is_that_of_the_whole(entries: int, size: int, stride: int, data: st.DataObject) -> None:
    whole = torch.arange(1.0, entries + 1)
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, entries), min_size=size - 1, max_size=size - 1))), entries]

    def sample(rows: Process) -> Any:
        mine = whole[bounds[rows.rank] : bounds[rows.rank + 1]]
        scores = RowShard.of(mine[None], 0.5, entries, rows).scores(mine)
        return scores.sample(stride), scores.total(len(mine)), scores.entries

    for found, total, counted in in_threads(size, sample):
        assert torch.equal(found, whole[::stride]) and total == counted == entries


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_batches_are_the_same_rows_in_any_number_of_processes(count: int, batch: int, size: int) -> None:
    rows = torch.arange(max(count, size))
    shares = [ProcessGroup(rank, size).shard_batch_sizes(len(rows), batch) for rank in range(size)]
    wanted = torch.split(rows, max(batch, size))
    for i, part in enumerate(wanted):
        found = []
        for rank, mine in enumerate(shares):
            own = ProcessGroup(rank, size).shard(rows)
            found += own[sum(mine[:i]) : sum(mine[: i + 1])].tolist()
        assert sorted(found) == part.tolist()
    for mine in shares:
        assert len(mine) in (len(wanted), len(wanted) - 1) and min(mine) > 0


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_nobody_has_more_than_four_thirds_of_what_must_be(costs: list[float], size: int) -> None:
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
    assert shared_out(lone, 2) == [None]
    fixed, rows = lone[0].fixed, lone[0].rows
    assert loads_of(lone, [None], 2) == [fixed + rows / 2] * 2
    even = [solve_cost(method, [(1024, 1024)], 2) for _ in range(4)]
    assert sorted(shared_out(even, 2)) == [0, 0, 1, 1]  # type: ignore[type-var]
    # Few rows and other methods are not split.
    assert not solve_cost(method, [(30, 1024)], 2).divisible
    assert not solve_cost(get_method("sparsegpt"), [(4096, 1024)], 2).divisible


def test_one_process_is_a_group_without_messages() -> None:
    group, sums = ProcessGroup(), InputSums.of(torch.ones(3, 2))
    values = torch.arange(4)
    group.reduce_statistics(sums, 0)
    group.barrier()
    assert sums.tokens == 3 and group.broadcast_from_main(lambda: 5) == 5 and group.all_gather_object(1) == [1]
    assert torch.equal(group.shard(values), values) and group.all_reduce_sum(values) is values
    with pytest.raises(ConfigError, match="4 windows cannot be split over 5 processes"):
        ProcessGroup(1, 5).shard(values)


def _torchrun(*arguments: object) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [sys.executable, *launcher, "-m", "alps", *map(str, arguments)]


def _prune(processes: int, out: Path, model: Path, text: Path, *more: object) -> RunReport:
    done = run_group(processes, "prune", model, out, *_settings(text), *more)
    assert [one.returncode for one in done] == [0] * processes, done
    assert sum(one.stdout.count("Written to") for one in done) == 1
    report = RunReport.read(out)
    assert report is not None
    return report


def _settings(text: Path) -> list[object]:
    return ["--sparsity", 0.7, "--calibration", text, "--samples", 13, "--seqlen", 128]


@pytest.mark.parametrize(
    "more",
    [("--sparsity", 0.7), ("--sparsity", 0.8, "--preset", "best", "--channels", "block")],
    ids=["block", "best"],
)
def test_any_number_of_processes_gives_the_same_bits(
    more: tuple[object, ...], stories: Path, wikitext: Path, tmp_path: Path
) -> None:
    """Thirteen windows in one to three shares; in the sequential order of `best` every input is split by rows."""
    reports = [_prune(count, tmp_path / str(count), stories, wikitext, *more) for count in (1, 2, 3)]
    weights = {(tmp_path / str(count) / "model.safetensors").read_bytes() for count in (1, 2, 3)}
    assert len(weights) == 1
    for report in reports[1:]:
        assert [(s.name, s.zeros, s.tokens, s.error) for s in report.sites] == [
            (s.name, s.zeros, s.tokens, s.error) for s in reports[0].sites
        ]
    assert not (tmp_path / "2.partial").exists()


def test_two_hosts_write_the_bits_of_one_process(stories: Path, wikitext: Path, tmp_path: Path) -> None:
    """As far as one machine can stand for two: a launcher each, which meet by an address and a port."""
    _prune(1, tmp_path / "one", stories, wikitext)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    arguments = ["-m", "alps", "prune", stories, tmp_path / "two", *_settings(wikitext)]
    command = [sys.executable, "-m", "torch.distributed.run", *hosts, "--local-addr", "127.0.0.1", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = [subprocess.Popen(command, start_new_session=True, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    try:
        words = [one.communicate(timeout=200) for one in running]
    finally:
        for one in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
    assert [one.returncode for one in running] == [0, 0], words
    assert sum(out.count("Written to") for out, _ in words) == 1
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")}) == 1


def _together(*arguments: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """What tests/helpers/torchrun_worker.py says in one process, and in two."""
    done = [run_group(size, *arguments, work=together.main) for size in (1, 2)]
    assert all(one.returncode == 0 for group in done for one in group), done
    one, two = ("".join(one.stdout for one in group) for group in done)
    return json.loads(one), json.loads(two)


@pytest.mark.parametrize(("kind", "order"), [("qwen2_moe", "sequential"), ("gpt2", "block")])
def test_experts_and_turned_weights_are_those_of_one_process(kind: str, order: str) -> None:
    """Wanda amplifies no rounding: tokens of every expert, what was added to them, and all weights are equal."""
    one, two = _together(kind, order, 0)
    assert two["same"] and two["weights"] == pytest.approx(one["weights"], rel=1e-12)
    found = {name: rest for name, *rest in two["sites"]}
    assert found.keys() == {name for name, *_ in one["sites"]}
    assert any(site[2] for site in one["sites"]) == (kind != "gpt2")
    for name, tokens, added, zeros, error in one["sites"]:
        assert found[name] == [tokens, added, zeros, pytest.approx(error, rel=1e-5)], name


def test_blocks_are_matched_by_the_gradients_of_all_windows() -> None:
    one, two = _together("llama", "block", 3)
    assert two["same"] and two["weights"] == pytest.approx(one["weights"], rel=1e-4)
    for mine, theirs in zip(one["matches"], two["matches"], strict=True):
        assert (theirs["steps"], theirs["best_step"]) == (mine["steps"], mine["best_step"])
        assert theirs["after"] == pytest.approx(mine["after"], rel=1e-3)
    assert any(match["after"] < 0.9 * match["before"] for match in one["matches"])


def test_a_killed_process_ends_all_and_the_run_goes_on_with_three(
    stories: Path, wikitext: Path, tmp_path: Path
) -> None:
    """The whole preset: sequential order, dense target, matching, a budget; rows of a site in every process."""
    out, model = tmp_path / "out", tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(stories).save_pretrained(model, max_shard_size="300KB")
    AutoTokenizer.from_pretrained(stories).save_pretrained(model)
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(shards) > 3
    arguments = ("prune", model, out, *_settings(wikitext), "--samples", 48, "--preset", "best")
    running = subprocess.Popen(
        _torchrun(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        journal = tmp_path / "out.partial"
        deadline = time.monotonic() + 200
        while not (journal / "block-00000.json").is_file():
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.02)
        victims = [int(pid) for pid in _children(running.pid)]
        os.kill(victims[-1], signal.SIGKILL)
        running.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode != 0 and not out.exists() and journal.exists()
    done = run_group(3, *arguments)
    assert [one.returncode for one in done] == [0, 0, 0], done
    assert "Going on after" in done[0].stderr and not journal.exists()
    report = RunReport.read(out)
    assert report is not None
    assert report.sparsity == pytest.approx(0.7, abs=1e-4) and len(report.matches) == 5
    assert report.mean_error is not None and report.mean_error < 0.1
    # Each process has written some of the files.
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    for name in shards:
        assert load_file(out / name).keys() == load_file(model / name).keys()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_what_one_process_finds_ends_all_in_its_words(stories: Path, wikitext: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for path in stories.iterdir():
        if path.is_file() and path.name != "model.safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(stories / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    command = _torchrun("prune", broken, tmp_path / "out", *_settings(wikitext))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 2 and all("model.layers.1.mlp.up_proj.weight" in line for line in sentences)
    assert sum(line.startswith("Error: Rank ") for line in sentences) == 1
    assert done.returncode != 0 and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_perplexity_is_the_same_and_other_commands_refuse(stories: Path, wikitext: Path, tmp_path: Path) -> None:
    measure = ("eval", stories, "--reference", stories, "--text", wikitext, "--seqlen", 128, "--windows", 50)
    one, two = (json.loads("".join(p.stdout for p in run_group(size, *measure))) for size in (1, 2))
    assert two[0].pop("loss") == pytest.approx(one[0].pop("loss"), abs=1e-12)
    assert two[0]["windows"] == 50 and two[0]["perplexity"] == pytest.approx(one[0]["perplexity"], rel=1e-12)
    for refused in run_group(2, "pack", stories, tmp_path / "packed"):
        assert refused.returncode == 2 and "alps pack runs in one process" in refused.stderr
