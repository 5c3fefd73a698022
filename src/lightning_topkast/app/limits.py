"""What the files of a run may hold at most.

No run comes near these limits, and whatever reads the files can work with what is within them: add it up, square it,
draw and show it. What exceeds them is damaged, or made to fill the memory.
"""

from __future__ import annotations

from typing import Any

LARGEST = 1e100  # magnitude of a number; squares of sums are finite, too
LONGEST_NAME = 1_000  # characters of a name
LONGEST_TEXT = 131_072  # characters of any other text: what Linux passes as one argument of a command
DEEPEST = 50  # levels of nested lists and mappings
MOST_VALUES = 100_000  # in nested lists and mappings
MOST_CHARACTERS = 10_000_000  # of their texts, and of the keys that lead to each value, such as model.layers.width


def check_plain(content: Any) -> None:
    """Refuse plain data, such as a configuration, that exceeds the limits.

    Raises:
        ValueError: It does.
    """
    level, values, characters = [(content, 0)], 0, 0
    for _ in range(DEEPEST + 1):
        below = []
        for each, path in level:
            characters += path + (len(each) if isinstance(each, str) else 0)
            if isinstance(each, int | float) and not abs(each) <= LARGEST:
                raise ValueError(f"a number in it is not finite, or beyond ±{LARGEST:g}")
            if isinstance(each, dict):
                below += [(part, path + len(key) + 1) for key, part in each.items()]
            elif isinstance(each, list):
                below += [(part, path) for part in each]
        values += len(level)
        if values > MOST_VALUES or characters > MOST_CHARACTERS:
            raise ValueError(f"it has more than {MOST_VALUES:,} values, or {MOST_CHARACTERS:,} characters")
        if not below:
            return
        level = below
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")
