"""Files of a packed directory that transformers reads: a configuration that names the format, and how to import alps.

Without alps, transformers finds no weights: none of the files has a name that it looks for. With alps, the quantizer in
`alps.inference.transformers_quantizer` names `MARKER_NAME` as the file of weights, and reads the packed tensors itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alps.checkpoints.manifest import FORMAT, Manifest
from alps.checkpoints.quantization import PACKED_METHOD
from alps.checkpoints.safetensors_io import DTYPES
from alps.core.errors import CheckpointError
from alps.core.json_text import to_json

CONFIG_NAME = "config.json"
MARKER_NAME = "alps.safetensors"
CODE_NAME = "alps_packed.py"
# Names in a packed directory for files of the checkpoint whose own names are taken by the files that are written here.
RENAMED = {
    CONFIG_NAME: "config.original.json",
    MARKER_NAME: "alps.original.safetensors",
    CODE_NAME: "alps_packed.original.py",
}
_SETTINGS = "quantization_config"
_AUTO_MAP = "auto_map"
_TEXT = "text_config"
# A guarded import is not checked by transformers, which would name a package that only happens to be called alps.
_CODE = '''"""Import of alps, by which transformers loads this packed model; run with trust_remote_code=True."""

try:
    from alps.inference.transformers_quantizer import ConfigLoader  # noqa: F401
except ImportError as error:
    raise ImportError("This model is packed: install alps (the Python package alps-prune) to load it.") from error
'''


def write_config(folder: Path, manifest: Manifest) -> None:
    """Write config.json, and the files that it refers to, into a packed directory.

    Nothing is written for a checkpoint without a configuration.

    Args:
        folder: packed directory, with the files of the checkpoint in it.
        manifest: its content.
    """
    stored = _stored_name(manifest)
    if stored is None:
        return
    config = _read(folder / stored)
    if isinstance(config, dict):
        config = {**_dtype(config, manifest), **config, **_additions()}
        if isinstance(config.get(_TEXT), dict):  # all that transformers passes on to the class of a text part
            config[_TEXT] = {**config[_TEXT], _SETTINGS: config[_SETTINGS]}
        save_file({}, folder / MARKER_NAME, {"format": FORMAT})
        (folder / CODE_NAME).write_text(_CODE, encoding="utf-8")
    (folder / CONFIG_NAME).write_text(to_json(config, indent=2) + "\n", encoding="utf-8")


def without_additions(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a configuration without what refers to the packed format."""
    plain = {name: value for name, value in config.items() if name not in _additions()}
    if isinstance(plain.get(_TEXT), dict):
        plain[_TEXT] = {name: value for name, value in plain[_TEXT].items() if name != _SETTINGS}
    return plain


def check_packed_config(directory: Path, manifest: Manifest) -> None:
    """Check that config.json is that of the checkpoint, apart from what refers to the packed format.

    Raises:
        CheckpointError: when it is missing or says something else.
    """
    stored = _stored_name(manifest)
    if stored is None or stored == CONFIG_NAME:
        return
    original, config = _read(directory / stored), _read(directory / CONFIG_NAME)
    if isinstance(config, dict) and isinstance(original, dict):
        original = without_additions({**_dtype(original, manifest), **original})
        config = without_additions(config)
    if config != original:
        raise CheckpointError(
            f"'{directory / CONFIG_NAME}' differs from {stored}: fetch the packed directory again, or unpack it, edit "
            "the result and pack that."
        )


def _additions() -> dict[str, Any]:
    module = CODE_NAME.removesuffix(".py")
    return {_SETTINGS: {"quant_method": PACKED_METHOD}, _AUTO_MAP: {"AutoConfig": f"{module}.ConfigLoader"}}


def _dtype(config: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Return the dtype that transformers would read from the first tensor, for a configuration without one."""
    if config.get("dtype") or config.get("torch_dtype"):
        return {}
    dtypes = (DTYPES[record.dtype] for record in manifest.tensors.values() if record.dtype in DTYPES)
    first = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    return {"dtype": str(first).removeprefix("torch.")}


def _stored_name(manifest: Manifest) -> str | None:
    """Return the name of the checkpoint's own config.json in the packed directory; None if it has none."""
    return next((stored for stored, record in manifest.files.items() if record.name == CONFIG_NAME), None)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"'{path}' is missing or no JSON: fetch the packed directory again.") from None
