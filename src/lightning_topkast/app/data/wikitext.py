"""WikiText as published: words between spaces, of three files, with a vocabulary of the training text's words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock

from lightning_topkast.app.data.base import ArrayData
from lightning_topkast.app.data.text import Windows
from lightning_topkast.app.errors import AppError

END, UNKNOWN = "<eos>", "<unk>"
_PARTS = ("train", "valid", "test")


class WikiText(ArrayData):
    """`wiki.train.tokens`, `wiki.valid.tokens` and `wiki.test.tokens` as numbers of words.

    Lines are split at whitespace and end with `<eos>`, which is word 0; the others follow by their frequency in the
    training text. For WikiText-103 these are the 267,735 words that Transformer-XL has. The numbers are written once,
    beside the text, and mapped into memory.

    Args:
        folder: Where the three files are.
        cache: Folder for the numbers; None: `folder`.
        sequence_length: Words a training example.
        batch_size: Examples a step and process.
        num_workers: Loader processes.
        seed: Of the order of the training examples.
        num_classes: Size of the vocabulary; models read it.
        fetch: The command that fetches missing files, for the message.
    """

    def __init__(
        self,
        folder: str,
        cache: str | None = None,
        sequence_length: int = 150,
        batch_size: int = 60,
        num_workers: int = 0,
        seed: int = 0,
        num_classes: int = 267_735,
        fetch: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1; got {sequence_length}")
        self.folder = Path(folder).expanduser()
        self.cache = Path(cache).expanduser() if cache else self.folder
        self.sequence_length = sequence_length
        self.num_classes = num_classes
        self.fetch = fetch

    def prepare_data(self) -> None:
        """Number the words unless that was done; Lightning calls this on one process a node."""
        target = self._numbered()
        if target.is_dir():
            return
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            with FileLock(self.cache / ".wikitext.lock"):
                if not target.is_dir():
                    self._number_words(target)
        except OSError as error:
            raise AppError(f"{self.cache} can't be written ({error}): name another folder by data.cache=...") from error

    def load(self) -> None:
        """Map the numbers."""
        folder = self._numbered()
        if not folder.is_dir():  # another node's file system
            self.prepare_data()
        size = len(json.loads((folder / "words.json").read_text(encoding="utf-8")))
        if size != self.num_classes:
            raise AppError(
                f"{self.folder} has {size:,} different words, but data.num_classes={self.num_classes}: set "
                f"data.num_classes={size}"
            )
        windows = []
        for part in _PARTS:
            numbers = np.load(folder / f"{part}.npy", mmap_mode="r", allow_pickle=False)
            windows.append(Windows(numbers, self.sequence_length))
            if len(windows[-1]) == 0:
                raise AppError(
                    f"{self._file(part)} has {len(numbers)} words, which is not enough for one sequence and its next "
                    "word: a shorter data.sequence_length"
                )
        self.train_set, self.val_set, self.test_set = windows

    def _file(self, part: str) -> Path:
        return self.folder / f"wiki.{part}.tokens"

    def _numbered(self) -> Path:
        """The folder of the numbers, whose name changes when a file does."""
        stamp = hashlib.sha256()
        for part in _PARTS:
            try:
                stat = self._file(part).stat()
            except FileNotFoundError:
                how = f"fetch it with `{self.fetch}`" if self.fetch else "name the folder of the three files"
                raise AppError(f"there is no {self._file(part).absolute()}: {how} (data.folder=...)") from None
            stamp.update(f"{stat.st_size} {stat.st_mtime_ns};".encode())
        return self.cache / f".words-{stamp.hexdigest()[:16]}"

    def _number_words(self, target: Path) -> None:
        counts = Counter(word for line in self._lines("train") for word in line)
        counts.pop(END, None)
        words = [END, *(word for word, _ in counts.most_common())]
        numbers = {word: number for number, word in enumerate(words)}
        temporary = Path(tempfile.mkdtemp(prefix=".words-", suffix=".part", dir=target.parent))
        try:
            for part in _PARTS:
                np.save(temporary / f"{part}.npy", self._numbers(part, numbers))
            (temporary / "words.json").write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
            temporary.chmod(0o755)  # mkdtemp's is for the owner only
            os.replace(temporary, target)  # whoever reads at any moment finds none, or all of it
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _numbers(self, part: str, numbers: dict[str, int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        unknown = numbers.get(UNKNOWN)
        found = array("i")
        for line in self._lines(part):
            for word in line:
                number = numbers.get(word, unknown)
                if number is None:
                    raise AppError(
                        f"{self._file(part)}: the training text has neither '{word}' nor '{UNKNOWN}'; are these "
                        "WikiText's files of tokens, not the raw ones?"
                    )
                found.append(number)
            found.append(numbers[END])
        return np.frombuffer(found, dtype=np.int32) if found else np.empty(0, np.int32)

    def _lines(self, part: str) -> Iterator[list[str]]:
        try:
            with self._file(part).open(encoding="utf-8") as file:
                for line in file:
                    yield line.split()
        except UnicodeDecodeError as error:
            raise AppError(f"{self._file(part)} is no text in UTF-8: {error}") from error
