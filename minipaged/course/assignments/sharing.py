"""Assignment 5: sharing. Beam search on forks; finding again what was computed: a hash chain, a radix tree."""

from minipaged.course.assignment import Assignment, Part
from minipaged.course.assignments import sharing_beams as beams
from minipaged.course.assignments import sharing_prefixes as prefixes
from minipaged.course.assignments import sharing_publishing as publishing

BEAMS, HASH = "minipaged/decoding/beam_search.py", "minipaged/memory/prefix_cache.py"
RADIX, PUBLISHING = "minipaged/memory/radix_cache.py", "minipaged/memory/publishing.py"
_NOT_FULL = "one slice more, of too few tokens: no known block has so few"
_WALK = "for end in range(self._block_size, len(tokens) + 1, self._block_size):"
HARMLESS = {
    "BeamSearch._can_improve: if self.params.early_stopping == 'never' and penalty > 0: "
    "-> if self.params.early_stopping == 'never' and penalty >= 0:": "any length to the power of 0 is 1",
    "HashCache.find: entry: _Entry | None = None -> entry: _Entry & None = None": "a local name's type isn't evaluated",
    f"HashCache.find: {_WALK} -> {_WALK.replace('+ 1', '+ 2')}": _NOT_FULL,
    f"RadixCache.find: {_WALK} -> {_WALK.replace('+ 1', '+ 2')}": _NOT_FULL,
    "RadixCache.add: at = 0 -> at = 1": "a root has no blocks: both are behind its end",
    "RadixCache.remove: if not node.blocks and node.parent: -> if not node.blocks:": "a node with blocks is no root",
}

ASSIGNMENT = Assignment(
    number=5,
    title="Sharing",
    parts=(
        Part(
            "a step of the search", 20, BEAMS, ("BeamSearch.advance",), "search", beams.search_cases,
            beams.judge_search, helpers=("BeamSearch._rank", "BeamSearch._finish"), smaller=beams.smaller_search,
            show=beams.show_search, num_cases=150,
        ),
        Part(
            "the end of the search", 10, BEAMS, ("BeamSearch._can_improve",), "search", beams.ending_cases,
            beams.judge_search, smaller=beams.smaller_search, show=beams.show_search, num_cases=150,
        ),
        Part(
            "moves in memory", 10, BEAMS, ("memory_moves",), "moves", beams.moves_cases, beams.judge_moves,
            smaller=beams.smaller_moves, show=beams.show_moves, num_cases=50,
        ),
        Part(
            "hash chain", 25, HASH, ("HashCache.find", "HashCache.add", "HashCache.remove"), "chain",
            prefixes.chain_cases, prefixes.judge, helpers=("HashCache._key", "HashCache._get"),
            smaller=prefixes.smaller, show=prefixes.show, num_cases=150,
        ),
        Part(
            "radix tree", 20, RADIX, ("RadixCache.find", "RadixCache.add"), "tree", prefixes.tree_cases,
            prefixes.judge, helpers=("RadixCache._split",), smaller=prefixes.smaller, show=prefixes.show,
        ),
        Part(
            "shedding leaves", 5, RADIX, ("RadixCache.remove",), "tree", prefixes.shed_cases, prefixes.judge,
            smaller=prefixes.smaller, show=prefixes.show,
        ),
        Part(
            "publishing", 10, PUBLISHING, ("publish",), "publish", publishing.cases, publishing.judge,
            helpers=("_replace",), smaller=publishing.smaller, show=publishing.show,
        ),
    ),
    chapters=(9, 13, 14),
    hours="6 to 9",
    harmless=HARMLESS,
    generate=("--beam-width", "3", "--prefix-cache", "radix"),
)  # fmt: skip
