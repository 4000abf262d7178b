"""Seeds of independent random streams."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str) -> int:
    """Return a seed in [0, 2^63) for one of several independent random streams of a run.

    Args:
        seed: of the run.
        purpose: name of the stream.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little") >> 1
