"""Maps of the page: the colour of every layer is that of its error."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from PIL import Image

from alps.reporting.compare_results import Result
from alps.reporting.run_selection import Runs
from helpers.comparisons import KINDS
from helpers.html_page import pictures


def test_maps_have_the_colour_of_every_site(results: list[Result], text: str) -> None:
    assert Runs(results).patterns[0] == "0.7"
    shown = [r for r in results if r.pattern == "0.7" and r.seed == 0]
    errors = [site.error for r in shown for site in r.layers if site.error is not None]
    magnitude = [site.magnitude_error for site in shown[0].layers if site.magnitude_error is not None]
    norm = LogNorm(min(errors + magnitude), max(errors + magnitude))
    for result in shown:
        (drawing,) = pictures(text, f"{result.method}, 0.7: mean ")
        encoded = re.search(r"base64,([^\"]+)", drawing)
        assert encoded is not None
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))).convert("RGB"), dtype=int)
        assert pixels.shape == (7, 4, 3)
        for site in result.layers:
            expected = np.array(colormaps["viridis"](norm(site.error or 0.0)), dtype=float)[:3] * 255
            assert np.abs(pixels[KINDS.index(site.kind), site.block] - expected).max() < 3
    assert "magnitude pruning on the inputs of wanda, 0.7" in text
