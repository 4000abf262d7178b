"""Standard corpora of the Hugging Face hub: one file for each split, fetched once into the hub's own cache.

The documents and their order are those of `datasets.load_dataset`, which reads the same files.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from alps.core.errors import ConfigError, first_line
from alps.data.text_files import read_text_file


@dataclass(frozen=True)
class HubCorpus:
    """Corpus in a repository of data sets.

    Attributes:
        repo: name on the hub.
        calibration, evaluation: paths of the files in the repository.
        revision: branch.
    """

    repo: str
    calibration: str
    evaluation: str
    revision: str = "main"


HUB_CORPORA = {
    "wikitext2": HubCorpus(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/train-00000-of-00001.parquet",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
    ),
    # The shards of the ALPS paper, and of SparseGPT and Wanda before it.
    "c4": HubCorpus("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"),
    # The repository holds a script, which nothing runs any more; the hub keeps what it made in a branch.
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only",
        "penn_treebank/train/0000.parquet",
        "penn_treebank/test/0000.parquet",
        "refs/convert/parquet",
    ),
}


def read_hub_corpus(name: str, calibrating: bool) -> list[str]:
    """Return the documents of a corpus, fetched from the hub unless they are in its cache.

    Args:
        name: one of `HUB_CORPORA`.
        calibrating: read the file for calibration, and not that for evaluation.

    Raises:
        ConfigError: when the file cannot be fetched, is damaged, or is parquet and pyarrow is not
            installed.
    """
    corpus = HUB_CORPORA[name]
    file = corpus.calibration if calibrating else corpus.evaluation
    if file.endswith(".parquet") and not _has_pyarrow():
        raise ConfigError(
            f"Text '{name}' is a parquet file, which needs a package: run pip install 'alps-prune[datasets]', "
            "or give a text file."
        )
    path = _fetch(name, corpus, file)
    try:
        return read_text_file(path).rows
    except ConfigError as error:
        reason = str(error).replace(f"Text '{path}'", "it").removesuffix(".").removesuffix(": fetch it again")
        raise ConfigError(
            f"The cached file of text '{name}' cannot be read ({reason}): remove '{path.resolve()}', and run again."
        ) from None


def _fetch(name: str, corpus: HubCorpus, file: str) -> Path:
    try:
        return Path(hf_hub_download(corpus.repo, file, repo_type="dataset", revision=corpus.revision))
    except Exception as error:  # the hub's client raises errors of its own, of its HTTP client, and OSError
        reason = _describe(error, f"{corpus.repo}/{file}")
        raise ConfigError(f"Text '{name}' cannot be fetched from the hub ({reason}): give a local file.") from error


def _describe(error: Exception, file: str) -> str:
    """Return in a few words why a file of the hub is not to be had."""
    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        return f"{constants.ENDPOINT} answers {error.response.status_code} for {file}"
    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the file is not in the cache"
    # huggingface_hub 1.3 loses the error of the connection in its second attempt.
    if isinstance(error, LocalEntryNotFoundError) or "client has been closed" in str(error):
        return f"{constants.ENDPOINT} does not answer, and the file is not in the cache"
    return first_line(error)


def _has_pyarrow() -> bool:
    try:
        return importlib.util.find_spec("pyarrow") is not None
    except ValueError:  # in sys.modules, as None
        return False
