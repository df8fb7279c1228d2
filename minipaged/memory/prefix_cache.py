"""Which blocks can be found again, and by what: keys and values that were computed once are not computed twice.

What a token's keys and values are depends on all tokens before it. So a full block is known by its own tokens and
by the block before it, and finding a prompt is a walk from its beginning, block by block, to the first that is
unknown. Here is the hash chain of vLLM; radix_cache.py has the tree of SGLang, behind the same interface. Both are
an index and nothing more: which blocks are in use, and which of the others is given up first, the allocator knows.

Three rules keep every index a tree that is shed from its leaves:

    a block is added when its keys and values were really computed, never before
    whoever holds a block holds all blocks on the path to it, since page tables begin at position 0
    so a block falls out of use before the one that it follows, and is forgotten before it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Salt = str | None  # whose tokens they are: what was computed under one salt is not found under another


class PrefixCache(Protocol):
    """Tokens from the beginning of a sequence -> the full blocks that hold their keys and values."""

    def find(self, tokens: Sequence[int], salt: Salt = None) -> list[int]:
        """The blocks of the longest known beginning of `tokens`; a last, partly filled block is never known."""
        ...

    def add(self, block: int, parent: int | None, tokens: Sequence[int], salt: Salt = None) -> int:
        """Let `block` be found by its tokens after those of `parent` (None: at the beginning).

        Returns the block that is found from now on: an older one, if these tokens were computed before. Then `block`
        itself isn't known.
        """
        ...

    def remove(self, block: int) -> None:
        """Forget a known block. The caller sees to it that no known block follows it."""
        ...

    def clear(self) -> None:
        """Forget all."""
        ...

    def parents(self) -> dict[int, int | None]:
        """All known blocks, each with the one that it follows. For checks: it visits every block."""
        ...

    def __contains__(self, block: int) -> bool: ...

    def __len__(self) -> int: ...


@dataclass(slots=True, eq=False)
class _Entry:
    """A known block, and what it is known by."""

    block: int
    key: int
    parent: "_Entry | None"
    tokens: tuple[int, ...]
    salt: Salt


class HashCache:
    """One table for all prefixes: hash(key of the block before, own tokens, salt) -> block (vLLM).

    Finding a block costs the same in a table of ten and of a million. A hash may lie, so tokens are compared on a
    hit; of two contents with one key only the first is known.

    >>> cache = HashCache(block_size=2)
    >>> cache.add(7, None, [1, 2]), cache.add(3, 7, [3, 4]), cache.add(5, 7, [3, 4])
    (7, 3, 3)
    >>> cache.find([1, 2, 3, 4, 5]), cache.find([1, 2, 9, 9]), cache.find([3, 4]), cache.find([1, 2], salt="me")
    ([7, 3], [7], [], [])
    """

    def __init__(self, block_size: int, hash_function: Callable[[object], int] = hash):
        self._block_size, self._hash = block_size, hash_function
        self._by_key: dict[int, _Entry] = {}
        self._by_block: dict[int, _Entry] = {}

    def find(self, tokens: Sequence[int], salt: Salt = None) -> list[int]:
        """As PrefixCache says. It looks at each token a few times, however many blocks are known."""
        found: list[int] = []
        entry: _Entry | None = None
        for end in range(self._block_size, len(tokens) + 1, self._block_size):
            entry = self._get(entry, tuple(tokens[end - self._block_size : end]), salt)
            if entry is None:
                break
            found.append(entry.block)
        return found

    def add(self, block: int, parent: int | None, tokens: Sequence[int], salt: Salt = None) -> int:
        """As PrefixCache says. A block whose key other contents have, or whose parent isn't known, stays unknown."""
        before = None if parent is None else self._by_block.get(parent)
        if parent is not None and before is None:
            return block  # it follows one whose key was taken by other tokens: nobody could walk here
        own = tuple(tokens)
        if known := self._get(before, own, salt):
            return known.block
        key = self._key(before, own, salt)
        if key not in self._by_key:
            self._by_key[key] = self._by_block[block] = _Entry(block, key, before, own, salt)
        return block

    def remove(self, block: int) -> None:
        """As PrefixCache says. Nothing of it is left, and its key is free for others."""
        del self._by_key[self._by_block.pop(block).key]

    def clear(self) -> None:
        self._by_key.clear()
        self._by_block.clear()

    def parents(self) -> dict[int, int | None]:
        return {block: entry.parent.block if entry.parent else None for block, entry in self._by_block.items()}

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def __len__(self) -> int:
        return len(self._by_block)

    def _key(self, before: _Entry | None, tokens: tuple[int, ...], salt: Salt) -> int:
        return self._hash((before.key if before else None, tokens, salt))

    def _get(self, before: _Entry | None, tokens: tuple[int, ...], salt: Salt) -> _Entry | None:
        entry = self._by_key.get(self._key(before, tokens, salt))
        # That `parent` is the very entry we came from vouches for all tokens before.
        if entry and entry.tokens == tokens and entry.parent is before and entry.salt == salt:
            return entry
        return None
