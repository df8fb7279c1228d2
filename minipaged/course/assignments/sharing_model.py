"""Assignment 5: what a prefix cache promises, in the plainest way: whole prefixes in a dictionary."""

from minipaged.memory.prefix_cache import Salt
from minipaged.memory.radix_cache import RadixCache

Prefix = tuple[Salt, tuple[int, ...]]


class Prefixes:
    """The contract, in the plainest way. Which of the blocks a cache took, it is told."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.blocks: dict[Prefix, int] = {}
        self.prefixes: dict[int, Prefix] = {}  # the same, the other way round

    def find(self, tokens: list[int], salt: Salt) -> list[int]:
        found = []
        for end in range(self.block_size, len(tokens) + 1, self.block_size):
            if (block := self.blocks.get((salt, tuple(tokens[:end])))) is None:
                break
            found.append(block)
        return found

    def prefix(self, parent: int | None, own: list[int], salt: Salt) -> Prefix:
        return salt, (() if parent is None else self.prefixes[parent][1]) + tuple(own)

    def add(self, block: int, prefix: Prefix) -> None:
        self.blocks[prefix], self.prefixes[block] = block, prefix

    def remove(self, block: int) -> None:
        del self.blocks[self.prefixes.pop(block)]

    def parents(self) -> list[list[int | None]]:
        pairs = [(block, self.blocks.get((salt, own[: -self.block_size]))) for block, (salt, own) in self._items()]
        return [list(pair) for pair in sorted(pairs, key=lambda pair: pair[0])]

    def _items(self) -> list[tuple[int, Prefix]]:
        return list(self.prefixes.items())

    def leaves(self) -> list[int]:
        inner = {parent for _, parent in self.parents()}
        return [block for block in self.prefixes if block not in inner]

    def tree(self) -> RadixCache:
        """For a picture of it."""
        cache, by_length = RadixCache(self.block_size), sorted(self._items(), key=lambda item: len(item[1][1]))
        for block, (salt, tokens) in by_length:
            cache.add(block, self.blocks.get((salt, tokens[: -self.block_size])), tokens[-self.block_size :], salt)
        return cache
