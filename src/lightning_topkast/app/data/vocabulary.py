"""Words and their numbers as in the code of Transformer-XL, so that perplexities compare with published ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lightning_topkast.app.errors import AppError

END, UNKNOWN = "<eos>", "<unk>"
_CHUNK = 1 << 20  # numbers per write


def count_words(text: Path) -> dict[str, int]:
    """Number the words of a text: `<eos>` is 0, then by decreasing frequency and in the order of their first use.

    Words are what stands between white space, capital letters and all.
    """
    counts: Counter[str] = Counter()
    for words in _lines(text):
        counts.update(words)
    vocabulary = {END: 0}
    for word, _ in counts.most_common():
        vocabulary.setdefault(word, len(vocabulary))
    return vocabulary


def encode(text: Path, vocabulary: Mapping[str, int], target: Path) -> None:
    """Write the numbers of the words of a text as int32, with `<eos>` at the end of each line.

    Raises:
        AppError: A word is not in the vocabulary, which has no `<unk>` either.
    """
    unknown = vocabulary.get(UNKNOWN)
    chunk: list[int] = []
    with open(target, "wb") as file:
        for words in _lines(text):
            for word in words:
                number = vocabulary.get(word, unknown)
                if number is None:
                    raise AppError(f"{text} has the word '{word}', but the training text has neither it nor {UNKNOWN}")
                chunk.append(number)
            chunk.append(vocabulary[END])
            if len(chunk) >= _CHUNK:
                np.array(chunk, dtype=np.int32).tofile(file)
                chunk.clear()
        np.array(chunk, dtype=np.int32).tofile(file)


def _lines(text: Path) -> Iterator[list[str]]:
    """Yield the words of each line, without words for an empty line."""
    try:
        with open(text, encoding="utf-8") as file:
            for line in file:
                yield line.split()
    except UnicodeDecodeError as error:
        raise AppError(f"{text} is not valid UTF-8 ({error.reason}): download it again") from error
