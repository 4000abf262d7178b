"""Generator of docs/reference/models.md: tested architectures, what is pruned, what stays dense, parity of blocks.

    python tests/helpers/architectures.py > docs/reference/models.md

Runs every tiny model of `decoders.py`, which takes two minutes. Tests compare the page with new runs, except the times.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import alps
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.lm_head import LMHead
from alps.models.blocks import find_blocks
from helpers.decoders import DENSE, HYBRID, MOE, RECENT, decoder
from helpers.packed_architectures import packed_result
from helpers.vision import VISION, vision_model

_HEAD = """# Supported architectures

Blocks and linear layers are discovered, not scripted, so other models of these kinds work as well. Every row is a tiny
random model, built from its configuration, run block by block and pruned (with transformers {version}). *Parity* is the
largest difference between the model's own logits and those of running its blocks one by one, divided by the largest
logit; it has to be below 1e-5. Then ALPS prunes the model to 60 %, and the zeros of every layer and every expert are
counted: all are exact. A separate test shows that each model gives the same bits when it is read block by block
([long runs](../how-to/long-runs.md)).

*Dense* lists parameters with two dimensions or more that are not pruned, and why. Embeddings and output heads are never
pruned and are not listed. Seconds are those of pruning, on one thread.

*Packed* says which of the pruned layers stay packed in memory when `alps.load` reads what `alps pack` wrote of the
model, pruned to 50 % by magnitude ([inference](../how-to/inference.md)). The logits are those of the dense model to
1e-5 of the largest one in float32, because kernels add in another order; three tokens generated with a cache are the
same, and unpacking restores the bits, also after `save_pretrained` of the packed model.

| architecture | class | pruned in each block | dense besides embeddings | parity | s | packed |
|---|---|---|---|---:|---:|---|
"""
_FOOT = """
**Vision-language models.** The text decoder is pruned, on calibration text alone. Vision tower and projector are
unchanged, bit for bit, and are listed as outside the decoder blocks. The text decoder is the one that the model itself
names (`get_decoder`), so a vision tower with more layers is not mistaken for it. Models are loaded with
AutoModelForImageTextToText if there is no causal language model of the kind, or if the checkpoint says that it holds
more than a causal one; the files of the image processor are copied. What pruning does to answers about images has not
been measured. Idefics 3 and SmolVLM are read block by block. Checkpoints of the other three use other tensor names than
transformers and are loaded whole, and so is OLMo-Hybrid.

**What stays dense.** Blocks may be of several classes, as in hybrids of attention and state-space layers. Inside them
these are left dense, and listed in the report with the reason:

- routers of mixtures of experts, and gates of shared experts, to the bit. They are recognised by their place next to
  experts and by having one output per expert, whatever they are called;
- subclasses of linear layers that compute something else than the product of their inputs and their weight, such as the
  block-diagonal projection of DeepSeek V4. The forward of the class is compared with the product on random inputs;
- weights that several layers share, as in Zamba: pruned for the inputs of one layer, they would be wrong for another;
- layers that a forward on text does not call, since their inputs are unknown: Mamba reads the weight of `dt_proj`
  without a call, and Mllama skips its cross-attention layers without an image. A forward with eight tokens shows them
  before any run, so that no setting changes which layers are pruned. It ends once one block of every structure has run;
- convolutions, norms, state matrices, tables of positions, and all parameters whose owner is no linear layer.

**Refused**, from config.json alone and before anything else: encoder-decoders, also as the text part of another model,
their lone decoders, encoders, classifiers and reward models, base models without an output head, models of audio or
images alone, and quantized checkpoints. What a class is for is read from the tables of transformers. Models that look
ahead (XLNet, XLM) are found by two short forwards through the first block, and refused.

**GGUF files** are read by transformers, whose reader drops many of their keys. Every key is therefore compared with the
configuration made of the file. Carried over are rotary bases and scalings (linear, YaRN, long-rope, `rope_freqs`), soft
caps, scales, windows, epsilons and sizes for which the configuration has a field of that meaning. Anything else that
has an effect is refused with its name, as are biases and norms that the class does not have, and files in parts.

**Tied heads.** If the configuration ties the head to the embedding, and the file holds another head, the head of the
file is used, as transformers 5 does, with a warning, and the written configuration says that it is not tied.

**Tokenizers.** A class that transformers does not have, a class that is code of the checkpoint, and one whose tokens of
a test sentence differ from those of `tokenizer.json` are each said in one warning. If nothing but the checkpoint's own
code can read the tokenizer, the model is refused.

**Refused when the calibration begins**: models that call a block several times (looped decoders such as HRM), and
models that compute with hidden states or with what blocks hand on between two blocks (RWKV with more blocks than its
`rescale_every`). How blocks are replayed, and how the replay is checked: [calibration](../how-to/calibration.md).

```sh
python tests/helpers/architectures.py > docs/reference/models.md
```
"""


@dataclass(frozen=True)
class Row:
    """Row of the table: the results of one architecture."""

    kind: str
    architecture: str
    pruned: str
    dense: str
    parity: float
    seconds: float
    packed: str = ""

    def __str__(self) -> str:
        cells = (
            self.kind,
            self.architecture,
            self.pruned,
            self.dense,
            f"{self.parity:.0e}" if self.parity else "0",
            f"{self.seconds:.1f}",
            self.packed,
        )
        return "| " + " | ".join(cells) + " |"

    @property
    def reproducible(self) -> tuple[str, ...]:
        """Cells that are equal in every run."""
        return self.kind, self.architecture, self.pruned, self.dense


def examine(kind: str) -> Row:
    """Run the blocks of one architecture and prune it, asserting parity and exact counts of zeros."""
    # The last tokens of vision-language models stand for images.
    ids = torch.randint(2, 60 if kind in VISION else 64, (7, 16), generator=torch.Generator().manual_seed(3))
    model = vision_model(kind) if kind in VISION else decoder(kind)
    blocks = find_blocks(model)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        inputs = capture_block_inputs(model, blocks, ids, batch_size=4)
        for block in blocks:
            inputs.advance(block.index, block.module, torch.device("cpu"))
        logits = LMHead(model, blocks)(torch.cat(inputs.hidden), ids)
    parity = float((logits - expected).abs().max() / expected.abs().max())
    assert parity < 1e-5, (kind, parity)
    start = time.perf_counter()
    report = alps.prune(model, sparsity=0.6, calibration=ids)
    seconds = time.perf_counter() - start
    assert all(site.zeros == round(0.6 * site.entries) for site in report.layers)
    names = Counter(re.sub(r"\.\d+$", "", site.kind) for site in report.layers if site.expert is None)
    experts = Counter(site.kind for site in report.layers if site.expert is not None)
    parts = [f"`{name}`{_frequency(count, len(blocks))}" for name, count in names.items()]
    parts += [f"`{name}` of every expert" for name in experts]
    reasons = Counter(
        (_short_name(row.name, kind), row.reason) for row in report.dense if row.reason != "embedding or output head"
    )
    dense = "; ".join(f"`{name.split('.N.')[-1]}`: {reason}" for name, reason in reasons) or "nothing"
    return Row(kind, type(model).__name__, ", ".join(parts), dense, parity, seconds)


def _short_name(name: str, kind: str) -> str:
    """Return a parameter's name without numbers; of a vision-language model, the part of the model that it is in."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join("N" if part.isdigit() else part for part in (parts[:2] if kind in VISION else parts))


def _frequency(count: int, blocks: int) -> str:
    if count == blocks:
        return ""
    return f" ({count // blocks} in each)" if count % blocks == 0 else f" (in {count} places of {blocks} blocks)"


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    print(_HEAD.format(version=".".join(transformers.__version__.split(".")[:2])), end="")
    for kind in (*DENSE, *MOE, *HYBRID, *RECENT, *VISION):
        with tempfile.TemporaryDirectory() as folder:
            print(replace(examine(kind), packed=packed_result(kind, Path(folder))), flush=True)
    print(_FOOT, end="")


if __name__ == "__main__":
    main()
