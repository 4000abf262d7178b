"""Compare a bfloat16 model on the CPU with torch's own products, with float32 products, and in float32.

    python benchmarks/halves.py smollm2-135m

All take turns on the same tokens, forward and backward; figures are medians. On processors with bfloat16 instructions
alps uses these, and the second column has the time without them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import alps
from alps.core.half_precision import Float32MatmulMode, multiplies_by_float32
from alps.core.provenance import provenance
from alps.core.text_format import dtype_name
from layers import ended_in_words, markdown


def forward(model: Any, ids: Tensor) -> None:
    """Compute the hidden states, without the output head."""
    with torch.inference_mode():
        model.base_model(ids, use_cache=False)


def step(model: Any, ids: Tensor) -> None:
    """Run forward and backward."""
    model.base_model(ids, use_cache=False).last_hidden_state.float().pow(2).mean().backward()
    model.zero_grad()


def attention_rows(model: Any, seqlen: int, rounds: int) -> list[list[str]]:
    """Return rows with the milliseconds of causal attention and its gradients, by torch and by float32 products."""
    heads = model.config.num_attention_heads
    features = model.config.hidden_size // heads
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        query, key, value = (torch.randn(1, heads, seqlen, features).to(dtype).requires_grad_() for _ in range(3))
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for way, context in (("torch's own", nullcontext), ("by float32", Float32MatmulMode)):
                with context():
                    start = time.perf_counter()
                    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
                    between = time.perf_counter()
                    out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]
                    end = time.perf_counter()
                times.setdefault(f"forward {way}", []).append(between - start)
                times.setdefault(f"backward {way}", []).append(end - between)
        medians = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        for part in ("forward", "backward"):
            own, wide = (medians[f"{part} {way}"] for way in ("torch's own", "by float32"))
            name = f"{heads} x {seqlen}, {dtype_name(dtype)}, {part}"
            rows.append([name, f"{own:.2f}", f"{wide:.2f}", f"{own / wide:.2f}"])
    return rows


def main() -> None:
    """Print two tables, of the model and of its attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    half, full = (alps.load(options.model, dtype).model.requires_grad_() for dtype in ("bfloat16", "float32"))
    ids = torch.randint(0, half.config.vocab_size, (options.windows, options.seqlen))
    ways = [
        ("torch's own", half, nullcontext),
        ("by float32", half, Float32MatmulMode),
        ("in float32", full, nullcontext),
    ]
    works: list[tuple[str, Callable[[Any, Tensor], None]]] = [("forward", forward), ("forward and backward", step)]
    rows = []
    for name, work in works:
        seconds: dict[str, list[float]] = {way: [] for way, _, _ in ways}
        for _ in range(options.rounds):
            for way, model, context in ways:
                start = time.perf_counter()
                with context():
                    work(model, ids)
                seconds[way].append(time.perf_counter() - start)
        medians = [statistics.median(values) for values in seconds.values()]
        rows.append([name, *(f"{median:.2f}" for median in medians), f"{medians[0] / medians[1]:.2f}"])
    facts = provenance()
    used = "by float32" if multiplies_by_float32(torch.bfloat16, torch.device("cpu")) else "torch's own"
    print(
        f"{options.model}, {options.windows} x {options.seqlen} tokens, seconds; {facts['machine']}, torch "
        f"{facts['torch']}, commit {facts['commit']}; alps goes {used} here\n"
    )
    print(markdown(["", *(way for way, _, _ in ways), "torch's own / by float32"], rows))
    print("\nMilliseconds of causal attention, heads x tokens; the forward in bfloat16 is torch's own both times\n")
    columns = ["attention", "torch's own", "as alps does it", "ratio"]
    print(markdown(columns, attention_rows(half, options.seqlen, options.rounds)))


if __name__ == "__main__":
    ended_in_words(main)
