"""RadixAttention's tree (SGLang): prefixes as paths. The interface is that of prefix_cache.py, the idea another.

A node holds a run of blocks that have always followed each other; where two sequences part within a run, it is
split, and both go on as children. So a tree shows at a glance what a hash table can't: who shares what with whom.

    before                       after "a b c d x y" came to "a b c d e f g h" (blocks of 2 tokens)

    root -- ab cd ef gh          root -- ab cd --+-- ef gh
                                                 +-- xy

SGLang's nodes count the requests on their path, and keep the time of their last use; what nobody holds is given
up leaf by leaf, least recently used first. Here the reference counts of the blocks are that count: whoever holds
a block holds the path to it. And the allocator's queue of idle blocks, in the order in which they fell out of
use, is that time: on every path it runs from the tail to the head. So the order of eviction is the same, block by
block instead of leaf by leaf, and `remove` refuses any other.
"""

from collections.abc import Callable, Iterator, Sequence

from minipaged.memory.prefix_cache import Salt


class _Node:
    """A run of blocks, with the tokens of each. children: by the tokens of their first block. salt: of a root."""

    __slots__ = ("parent", "tokens", "blocks", "salt", "children")

    def __init__(
        self, parent: "_Node | None", tokens: list[tuple[int, ...]], blocks: list[int], salt: Salt = None
    ):
        self.parent, self.tokens, self.blocks, self.salt = parent, tokens, blocks, salt
        self.children: dict[tuple[int, ...], _Node] = {}


class RadixCache:
    """A radix tree for each salt.

    >>> cache = RadixCache(block_size=2)
    >>> for block, parent, tokens in [(0, None, "ab"), (1, 0, "cd"), (2, 1, "ef"), (3, 2, "gh"), (4, 1, "xy")]:
    ...     _ = cache.add(block, parent, [ord(letter) for letter in tokens])
    >>> cache.find([ord(letter) for letter in "abcdxyz"])
    [0, 1, 4]
    >>> print(cache.draw(lambda tokens: "".join(map(chr, tokens))))
    5 blocks
    `-- 2 blocks 0 1: abcd
        |-- 2 blocks 2 3: efgh
        `-- 1 block 4: xy
    """

    def __init__(self, block_size: int):
        self._block_size = block_size
        self._roots: dict[Salt, _Node] = {}
        self._nodes: dict[int, _Node] = {}  # where each known block stands

    def find(self, tokens: Sequence[int], salt: Salt = None) -> list[int]:
        """As PrefixCache says. It looks at each token a few times, however many blocks are known."""
        found: list[int] = []
        node, at = self._roots.get(salt), 0  # `at` blocks of the node were walked
        for end in range(self._block_size, len(tokens) + 1, self._block_size):
            own = tuple(tokens[end - self._block_size : end])
            if node and at == len(node.blocks):
                node, at = node.children.get(own), 0
            if node is None or node.tokens[at] != own:
                break
            found.append(node.blocks[at])
            at += 1
        return found

    def add(self, block: int, parent: int | None, tokens: Sequence[int], salt: Salt = None) -> int:
        """As PrefixCache says, for a known parent. Runs end only where sequences part (until blocks are removed)."""
        own = tuple(tokens)
        if parent is None:
            node = self._roots.setdefault(salt, _Node(None, [], [], salt))
            at = 0
        else:
            node = self._nodes[parent]
            at = len(node.blocks) if node.blocks[-1] == parent else node.blocks.index(parent) + 1
        if at < len(node.blocks):
            if node.tokens[at] == own:
                return node.blocks[at]
            self._split(node, at)
        elif own in node.children:
            return node.children[own].blocks[0]
        if node.children or node.parent is None:
            node.children[own] = self._nodes[block] = _Node(node, [own], [block])
        else:  # a leaf grows
            node.tokens.append(own)
            node.blocks.append(block)
            self._nodes[block] = node
        return block

    def _split(self, node: _Node, at: int) -> None:
        """Cut a run: the node keeps its first `at` blocks, and the others become its only child."""
        lower = _Node(node, node.tokens[at:], node.blocks[at:])
        lower.children = node.children
        for child in lower.children.values():
            child.parent = lower
        for block in lower.blocks:
            self._nodes[block] = lower
        del node.tokens[at:], node.blocks[at:]
        node.children = {lower.tokens[0]: lower}

    def remove(self, block: int) -> None:
        """As PrefixCache says. ValueError, and nothing changed, if known blocks follow. An empty tree goes."""
        node = self._nodes[block]
        if node.children or node.blocks[-1] != block:
            raise ValueError(f"block {block} is not the end of a path: what follows it must be removed first")
        del self._nodes[block]
        first = node.tokens[0]
        node.blocks.pop()
        node.tokens.pop()
        if not node.blocks and node.parent:
            del node.parent.children[first]
            if not node.parent.children and node.parent.parent is None:
                del self._roots[node.parent.salt]

    def clear(self) -> None:
        self._roots.clear()
        self._nodes.clear()

    def parents(self) -> dict[int, int | None]:
        result: dict[int, int | None] = {}
        for node, _ in self._walk():
            last = node.parent.blocks[-1] if node.parent and node.parent.blocks else None
            result |= zip(node.blocks, [last, *node.blocks], strict=False)
        return result

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    # --- seeing it ----------------------------------------------------------------------------------------------

    def _walk(self) -> Iterator[tuple[_Node, str]]:
        """All nodes but the roots, parents first, each with the branches that are drawn before it."""
        stack = [(child, "") for root in self._roots.values() for child in root.children.values()][::-1]
        last = {id(stack[0][0])} if stack else set()
        while stack:
            node, before = stack.pop()
            yield node, before + ("`-- " if id(node) in last else "|-- ")
            children = list(node.children.values())
            last |= {id(child) for child in children[-1:]}
            before += "    " if id(node) in last else "|   "
            stack += [(child, before) for child in reversed(children)]

    def draw(self, words: Callable[[list[int]], str] = str, width: int = 100, most: int | None = None) -> str:
        """The tree as text, a line for each node. words: what to print for a node's tokens. most: lines for nodes.

        Trees of different salts stand beside each other, and the salts are not shown.
        """
        lines = [_count(len(self))]
        for number, (node, before) in enumerate(self._walk()):
            if number == most:
                return "\n".join([*lines, "..."])
            blocks = " ".join(map(str, node.blocks[:3] + [".."] * (len(node.blocks) > 3)))
            text = " ".join(words([token for own in node.tokens for token in own]).split())
            line = f"{before}{_count(len(node.blocks))} {blocks}: {text}"
            lines.append(line if len(line) <= width else line[: width - 3] + "...")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.draw()


def _count(blocks: int) -> str:
    return f"{blocks} block{'s' * (blocks != 1)}"
