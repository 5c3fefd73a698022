"""WikiText-103, or another text in the same format, as words."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from lightning_topkast.app.data.cache import cached_folder, user_cache
from lightning_topkast.app.data.vocabulary import count_words, encode
from lightning_topkast.app.data.windows import Tokens, WindowData, Windows
from lightning_topkast.app.errors import AppError

_FORMAT = "1"  # version of the cached files, part of their folder's name
_PARTS = ("train", "valid", "test")


class WikiText(WindowData):
    """The files wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens of a folder, for next-word prediction.

    The vocabulary is of the training file's words and an `<eos>` at the end of each line; words of the others that it
    lacks are `<unk>`. For WikiText-103 these are the 267,735 of the published perplexities. The words' numbers are
    cached in a folder named after the texts' contents, and mapped into memory.

    Args:
        folder: Where the files are.
        cache: Where the numbers are kept, 4 bytes a word; None: beside the texts or, where nothing can be written to,
            in the user's cache.
        sequence_length: Words a training example.
        batch_size: Examples per step and process.
        num_workers: Worker processes of the loaders.
        seed: Seed of the order of the training examples.
        num_classes: Size of the vocabulary; models refer to it.
        fetch: The command that fetches missing files, for the message.
    """

    def __init__(
        self,
        folder: str,
        cache: str | None = None,
        sequence_length: int = 150,
        batch_size: int = 15,
        num_workers: int = 0,
        seed: int = 0,
        num_classes: int = 267_735,
        fetch: str | None = None,
    ) -> None:
        super().__init__(sequence_length, batch_size, num_workers, seed, num_classes)
        self.folder = Path(folder).expanduser()
        self.places = [Path(cache).expanduser()] if cache else [self.folder / ".topkast", user_cache()]
        self.fetch = fetch

    def prepare_data(self) -> None:
        """Number the words once per node, unless they are cached."""
        self._numbered()

    def load(self) -> None:
        """Map the numbers into memory."""
        folder = self._numbered()
        words = len((folder / "vocabulary.txt").read_text(encoding="utf-8").split("\n")) - 1
        if words != self.num_classes:
            raise AppError(
                f"{self._text('train')} has {words:,} different words, but data.num_classes={self.num_classes}: set "
                f"data.num_classes={words}"
            )
        self.train_set, self.val_set, self.test_set = (self._windows(folder, part) for part in _PARTS)

    def _windows(self, folder: Path, part: str) -> Windows:
        numbers = folder / f"{part}.int32"
        content: Tokens = np.memmap(numbers, dtype=np.int32, mode="r") if numbers.stat().st_size else np.empty(0, int)
        windows = Windows(content, self.sequence_length, complete=part != "train")
        if len(windows) == 0:
            raise AppError(
                f"{self._text(part)} has {len(content):,} words, which is not enough for one sequence and its next "
                "word: a longer text or a shorter data.sequence_length"
            )
        return windows

    def _numbered(self) -> Path:
        texts = [self._text(part) for part in _PARTS]
        missing = [text for text in texts if not text.is_file()]
        if missing:
            how = f"fetch it with `{self.fetch}`" if self.fetch else "name its folder"
            raise AppError(f"there is no text at {missing[0].absolute()}: {how} (data.folder=...)")
        return cached_folder(f"words-{_digest(texts)}", self.places, self._number)

    def _number(self, folder: Path) -> None:
        vocabulary = count_words(self._text("train"))
        (folder / "vocabulary.txt").write_text("".join(f"{word}\n" for word in vocabulary), encoding="utf-8")
        for part in _PARTS:
            encode(self._text(part), vocabulary, folder / f"{part}.int32")

    def _text(self, part: str) -> Path:
        return self.folder / f"wiki.{part}.tokens"


def _digest(texts: list[Path]) -> str:
    """Return a digest of the texts; half a second for the 540 MB of WikiText-103."""
    digest = hashlib.sha256(_FORMAT.encode())
    for text in texts:
        digest.update(text.stat().st_size.to_bytes(8, "little"))
        with open(text, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
