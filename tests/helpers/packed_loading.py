"""Loading of a packed directory by transformers, in an interpreter of its own: what happens is printed as JSON.

    PYTHON tests/helpers/packed_loading.py without PACKED
    PYTHON tests/helpers/packed_loading.py {before,after,module,trust} PACKED DENSE OUT

`without` never imports alps, `before` imports it before transformers, `after` after it, and `module` begins with the
module of the quantizer. `trust` leaves that to the code in the directory, which `trust_remote_code=True` allows to run.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_in_three_ways(packed: str, **options: Any) -> dict[str, Callable[[], Any]]:
    """Return calls that load a model: by an auto class, a pipeline, and the class of the model."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline

    named = {name: value for name, value in options.items() if name != "trust_remote_code"}
    return {
        "auto": lambda: AutoModelForCausalLM.from_pretrained(packed, **options),
        "pipeline": lambda: pipeline("text-generation", model=packed, device="cpu", **options).model,
        "named": lambda: LlamaForCausalLM.from_pretrained(packed, **named),
    }


def refusals(packed: str) -> dict[str, str]:
    """Return how each way fails without alps, or that it does not."""
    outcomes = {}
    for way, load in load_in_three_ways(packed).items():
        try:
            outcomes[way] = f"loaded {type(load()).__name__}"
        except Exception as error:
            outcomes[way] = f"{type(error).__name__}: {error}"
    assert "alps" not in sys.modules
    return outcomes


def comparisons(packed: str, dense: str, out: Path, **options: Any) -> dict[str, Any]:
    """Compare the model that each way gives with the dense one, with that of alps.load, and with what it saves."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 60).view(3, 19)
    outcomes: dict[str, Any] = {}
    models = {way: load() for way, load in load_in_three_ways(packed, **options).items()}
    alps = importlib.import_module("alps")
    with torch.no_grad():
        expected, loaded = AutoModelForCausalLM.from_pretrained(dense)(ids).logits, alps.load(packed).model(ids).logits
        for way, model in models.items():
            logits = model(ids).logits
            model.save_pretrained(out / way)
            again = AutoModelForCausalLM.from_pretrained(out / way)(ids).logits
            outcomes[way] = {
                "layers": sum(type(layer).__name__ == "PackedLinear" for layer in model.modules()),
                "difference": float((logits - expected).abs().max() / expected.abs().max()),
                "as_loaded": torch.equal(logits, loaded),
                "as_saved": torch.equal(logits, again),
                "config": model.config.to_dict().get("quantization_config"),
                "files": sorted(path.name for path in (out / way).iterdir()),
                "same_shard": _shard(out / way) == _shard(packed),
            }
        if "trust_remote_code" not in options:
            _, info = AutoModelForCausalLM.from_pretrained(packed, output_loading_info=True)
            outcomes["info"] = {name: sorted(map(str, keys)) for name, keys in info.items()}
    return outcomes


def _shard(folder: str | Path) -> bytes:
    return (Path(folder) / "packed.safetensors").read_bytes()


def main() -> None:
    mode, packed, *rest = sys.argv[1:]
    if mode == "without":
        print(json.dumps(refusals(packed)))
        return
    orders = {"before": ["alps"], "after": ["transformers.modeling_utils", "alps"]}
    for module in {**orders, "module": ["alps.inference.transformers_quantizer"]}.get(mode, []):
        importlib.import_module(module)
    options = {"trust_remote_code": True} if mode == "trust" else {}
    print(json.dumps(comparisons(packed, rest[0], Path(rest[1]), **options)))


if __name__ == "__main__":
    main()
