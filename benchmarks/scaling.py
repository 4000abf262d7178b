"""Several processes on one model: measured with one and two, simulated, and planned for GPUs that were not at hand.

    python benchmarks/scaling.py calibrate --calibration c4.jsonl --json build/constants.json
    python benchmarks/scaling.py measure --calibration c4.jsonl --json build/measured.json
    python benchmarks/scaling.py simulate --constants build/constants.json --measured build/measured.json
    python benchmarks/scaling.py plan

`simulate` knows of `measure` only what was asked for; its constants are those of `calibrate`. `plan` assumes shares of
an H100's published peaks, which are named in `machines.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from alps.checkpoints.atomic_io import write_text
from cost_model import Run
from layers import calibration_options, markdown
from machines import Measured
from scaling_plan import MODELS, VARIANTS, assumptions, memory_table, plan_table, variants_table
from scaling_rates import calibrate, shares
from scaling_runs import WAYS, measure, table
from simulator import simulate


def main() -> None:
    """Do one of the four."""
    options = _options()
    if options.what == "measure":
        record = measure(options)
        print(_head(record, f"{options.samples} x {options.seqlen} tokens, {options.rounds} rounds, medians"))
        print(table(record))
        _write(options.json, record)
    elif options.what == "calibrate":
        constants = calibrate(options)
        print(_head(constants, f"windows of {options.seqlen} tokens; alone and beside a second process"))
        print(markdown(["work", "alone s", "beside s", "share of the matrix rate"], pieces(constants)))
        _write(options.json, constants)
    elif options.what == "simulate":
        constants, measured = (json.loads(Path(path).read_text()) for path in (options.constants, options.measured))
        print(deviations(constants, measured))
    else:
        sizes = [int(size) for size in options.sizes.split(",")]
        print(assumptions() + "\n")
        *others, last = options.models.split(",")
        for name in (*others, last):
            counts = sizes if name != last else sorted({*sizes, options.goal})
            run = Run(MODELS[name], options.samples, options.seqlen)
            print(f"### {name}, {options.samples} x {options.seqlen} tokens\n\n{plan_table(run, counts)}\n")
            print(f"{memory_table(run, counts)}\n")
        print(f"### {last} on {options.goal} GPUs, and what is not built\n")
        print(variants_table(replace(run, size=options.goal)) + "\n")
        print(f"### {last} with all of that\n\n{plan_table(replace(run, changes=[*VARIANTS.values()][-1]), counts)}")


def pieces(constants: dict[str, Any]) -> list[list[str]]:
    """Seconds of every piece of work; those of passes and Grams are for one token, of messages for a byte."""
    alone, beside = constants["alone"], constants["beside"]
    found = shares(alone)
    rows = []
    for name in {**alone, **beside}:
        seconds = [f"{taken[name]:.3g}" if name in taken else "" for taken in (alone, beside)]
        rows.append([name, *seconds, f"{found[name]:.2f}" if name in found else ""])
    return rows


def deviations(constants: dict[str, Any], measured: dict[str, Any]) -> str:
    """Predicted and measured seconds of one and two processes, phase by phase."""
    if any(constants[name] != measured[name] for name in ("model", "seqlen", "dtype", "sparsity")):
        raise SystemExit("The constants are of another model, seqlen, dtype or sparsity than the runs: calibrate anew.")
    rows, walls = [], []
    for way, size in (("plain", 1), ("group of 2", 2)):
        machine = Measured(constants, measured["samples"], size)
        clocks = simulate(machine.run, machine)
        runs = measured["runs"][way]
        found = {phase: statistics.median(r["seconds"].get(phase, 0.0) for r in runs) for phase in runs[0]["seconds"]}
        spent = {phase: seconds[0] for phase, seconds in clocks.spent.items()}
        spent["solve"] += spent.pop("inverses")
        for phase in ("forward", "gram", "prepare", "solve", "measure_error", "communication", "journal"):
            rows.append([way, phase, *_pair(spent.get(phase, 0.0), found.get(phase, 0.0))])
        wall = statistics.median(run["wall"] for run in runs)
        rows.append([way, "end to end", *_pair(max(clocks.now), wall)])
        walls.append((max(clocks.now), wall))
    rows.append(["", "speed-up", *_pair(walls[0][0] / walls[1][0], walls[0][1] / walls[1][1])])
    return markdown(["", "phase of the first process", "predicted s", "measured s", "deviation"], rows)


def _pair(predicted: float, measured: float) -> list[str]:
    off = f"{100 * (predicted / measured - 1):+.1f} %" if measured > 0.05 else ""
    return [f"{predicted:.2f}", f"{measured:.2f}", off]


def _head(record: dict[str, Any], words: str) -> str:
    versions = record["versions"]
    return (
        f"{record['model']}, {record['dtype']}, {words}; {versions['machine']}, torch {versions['torch']}, "
        f"commit {versions['commit']}\n"
    )


def _write(place: str, record: dict[str, Any]) -> None:
    if place:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(place), json.dumps(record, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, text in (("measure", f"runs: {', '.join(WAYS)}"), ("calibrate", "constants of this machine")):
        command = commands.add_parser(name, help=text)
        calibration_options(command, samples=16)
        command.add_argument("--sparsity", type=float, default=0.7)
        command.add_argument("--dtype", default="float32", help="bfloat16 where the CPU has instructions for it")
        command.add_argument("--rounds", type=int, default=1)
        command.add_argument("--folder", help="for the pruned models; by default the system's")
        command.add_argument("--json", default="", help="where the record goes")
    command = commands.add_parser("simulate", help="predicted beside measured")
    command.add_argument("--constants", required=True, help="what calibrate has written")
    command.add_argument("--measured", required=True, help="what measure has written")
    command = commands.add_parser("plan", help="large models on GPUs")
    command.add_argument("--models", default=",".join(MODELS))
    command.add_argument("--sizes", default="1,2,4,8,16,32,64")
    command.add_argument("--samples", type=int, default=128)
    command.add_argument("--seqlen", type=int, default=2048)
    command.add_argument("--goal", type=int, default=128, help="GPUs of the last tables, of the last model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
