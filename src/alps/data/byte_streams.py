"""Bytes of text files as UTF-8: decompression by magic number, byte order marks, and what is no text at all."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from alps.checkpoints.layout import check_no_pointer
from alps.core.errors import ConfigError

# Bytes from the beginning that decide what a file is.
HEAD_BYTES = 2**16
_CHUNK_BYTES = 2**16
_BYTE_ORDER_MARKS = [  # the marks of UTF-32 begin with those of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32", "utf-32"),
    (codecs.BOM_UTF32_BE, "UTF-32", "utf-32"),
    (codecs.BOM_UTF8, "", "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "UTF-16", "utf-16"),
    (codecs.BOM_UTF16_BE, "UTF-16", "utf-16"),
]
_NO_TEXT = [
    (b"PK\x03\x04", "is a zip archive: unpack it, and give a file of it"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive: unpack it, and give a file of it"),
    (b"%PDF-", "is a PDF document: give its text as a plain file"),
    (b"{\\rtf", "is an RTF document: save it as plain text"),
    (b"%!PS", "is a PostScript document: give its text as a plain file"),
    (b"\x04\x22\x4d\x18", "is compressed by lz4: decompress it"),
    (b"GGUF", "is a GGUF model: give a file of text"),
]


@dataclass(frozen=True)
class TextBytes:
    """File of text: its first bytes, decompressed and in UTF-8, and its encodings.

    Attributes:
        path: of the file.
        compression: `gzip`, `zstd`, `bzip2`, `xz`, or empty.
        encoding: codec of Python, for the decompressed bytes.
        head: the first `HEAD_BYTES` bytes of the decompressed file, undecoded.
        layers: names of compression and encoding, for reports.
    """

    path: Path
    compression: str
    encoding: str
    head: bytes
    layers: tuple[str, ...]

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Context with the whole file as UTF-8 without a byte order mark.

        Raises:
            ConfigError: when it is damaged.
        """
        with readable_file(self.path), _decompressed(self.path, self.compression) as stream:
            if self.encoding == "utf-8-sig":
                stream.read(len(codecs.BOM_UTF8))
            if self.encoding.startswith("utf-8"):
                yield stream
                return
            # Rare enough to be held whole.
            try:
                text = stream.read().decode(self.encoding)
            except UnicodeDecodeError as error:
                raise ConfigError(f"Text '{self.path}' is damaged {self.layers[-1]} (byte {error.start}).") from None
            yield io.BytesIO(text.encode("utf-8"))

    def text(self) -> str:
        """Return the whole file, decoded.

        Raises:
            ConfigError: when it is damaged, not UTF-8, or holds NUL bytes.
        """
        with self.open() as stream:
            return decode(stream.read(), self.path)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Iterate over the lines, which end at line feeds only, with their numbers.

        Raises:
            ConfigError: as for `text`.
        """
        with self.open() as stream:
            start = 0
            for number, line in enumerate(stream, start=1):
                yield number, decode(line, self.path, start)
                start += len(line)

    def head_text(self) -> str:
        """Return the beginning of the file, decoded; a character that is cut at the end is left out."""
        decoder = codecs.getincrementaldecoder(self.encoding)("replace")
        return decoder.decode(self.head)


def inspect_bytes(path: Path) -> TextBytes:
    """Find compression and encoding of a file.

    Raises:
        ConfigError: for a file that cannot be read, or is no text.
        CheckpointError: for a pointer of Git LFS.
    """
    check_no_pointer(path)
    with readable_file(path):
        with path.open("rb") as raw:
            compression = _compression(raw.read(HEAD_BYTES))
        with _decompressed(path, compression) as stream:
            head = stream.read(HEAD_BYTES)
    if nested := _compression(head):
        raise ConfigError(f"Text '{path}' is compressed twice (then {nested}): decompress it once.")
    if head[257:262] == b"ustar":
        raise ConfigError(f"Text '{path}' is a tar archive: unpack it, and give a file of it.")
    for magic, sentence in _NO_TEXT:
        if head.startswith(magic):
            raise ConfigError(f"Text '{path}' {sentence}.")
    name, encoding = next(((n, e) for mark, n, e in _BYTE_ORDER_MARKS if head.startswith(mark)), ("", "utf-8"))
    if encoding == "utf-8":
        _check_no_utf16(head, path)
    return TextBytes(path, compression, encoding, head, tuple(layer for layer in (compression, name) if layer))


def decode(data: bytes, path: Path, start: int = 0) -> str:
    """Decode UTF-8; `start` is the number of bytes before `data`, for the message.

    Raises:
        ConfigError: for bytes that are not UTF-8, or NUL.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Text '{path}' is not UTF-8 (byte {start + error.start}): give a plain text file, "
            "converted with `iconv -t UTF-8` if it is in another encoding, such as Latin-1."
        ) from None
    if "\0" in text:
        raise ConfigError(f"Text '{path}' holds NUL bytes: it is not a plain text file.")
    return text


@contextmanager
def readable_file(path: Path) -> Iterator[None]:
    """Context that turns errors of reading and decompression into one sentence."""
    try:
        yield
    except ConfigError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ConfigError(f"Text '{path}' is damaged or cut short ({error}): fetch it again.") from None
    except OSError as error:
        raise ConfigError(f"Text '{path}' cannot be read: {error.strerror or error}.") from None


def _compression(head: bytes) -> str:
    magic = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
    return next((name for start, name in magic.items() if head.startswith(start)), "")


def _decompressed(path: Path, compression: str) -> BinaryIO:
    openers: dict[str, Callable[[Path], Any]] = {
        "": lambda path: path.open("rb"),
        "gzip": gzip.GzipFile,
        "bzip2": bz2.BZ2File,
        "xz": lzma.LZMAFile,
        "zstd": _open_zstd,
    }
    return cast(BinaryIO, openers[compression](path))


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise ConfigError(
            f"Text '{path}' is compressed by zstd, which needs a package: "
            "run pip install 'alps-prune[compress]', or decompress it."
        ) from None
    return io.BufferedReader(_Zstd(path.open("rb"), zstandard), _CHUNK_BYTES)


class _Zstd(io.RawIOBase):
    """Decompressed bytes of a file of zstd frames; the reader of zstandard does not notice a file that is cut short."""

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        super().__init__()
        self._file, self._package = file, zstandard
        self._frame: Any = None
        self._compressed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while not self._plain:
            self._compressed = self._compressed or self._file.read(_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._decompress()
        count = min(len(view), len(self._plain))
        view[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _decompress(self) -> None:
        zstd = self._package
        try:
            if self._frame is None:
                # Frames of `zstd --long` have windows beyond the default limit.
                self._frame = zstd.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._plain = memoryview(self._frame.decompress(self._compressed))
        except zstd.ZstdError as error:
            raise EOFError(str(error)) from None
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        self._file.close()
        super().close()


def _check_no_utf16(head: bytes, path: Path) -> None:
    """Refuse UTF-16 without a byte order mark, of which every second byte is NUL for English text."""
    for offset, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        halves = head[offset::2], head[1 - offset :: 2]
        if halves[0].count(0) * 2 > len(halves[0]) > 1 and not halves[1].count(0):
            raise ConfigError(
                f"Text '{path}' looks like {name} without a byte order mark: "
                f"convert it with `iconv -f {name} -t UTF-8`."
            )
