"""The masks of a step (decoding/grammar.py), made while the model computes.

A thread of its own makes them: llguidance lets the others run meanwhile. It alone touches matchers, one step after
the other, so a step that is broken off leaves nothing behind but matchers that stand where nobody asked for; and those
find their way, whatever they are asked next.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from minipaged.decoding.grammar import Matcher
from minipaged.requests.structured_outputs import Mask
from minipaged.scheduling.plan import ScheduledSequence

# By sequence or branch: behind its own tokens, and behind each guess as far as the grammar allows it.
Masks = dict[int, list[Mask]]


class MaskMaker:
    """Keeps a matcher for each sequence of the last step that has a grammar. Others are made anew when they come."""

    def __init__(self) -> None:
        self._matchers: dict[int, Matcher] = {}
        self._helper: ThreadPoolExecutor | None = None

    def start(self, sequences: list[ScheduledSequence]) -> Callable[[], Masks]:
        """Begin with the masks of a step. What is returned waits for them."""
        wanted = [s for s in sequences if s.draw and s.draw.grammar]
        if not wanted:
            self._matchers = {}
            return dict
        if self._helper is None:
            self._helper = ThreadPoolExecutor(1, "masks")
        return self._helper.submit(self._make, wanted, self._matchers).result

    def _make(self, wanted: list[ScheduledSequence], old: dict[int, Matcher]) -> Masks:
        """Branches share the matcher of their sequence: it goes from one's guesses to the other's."""
        self._matchers, masks = {}, {}
        for s in wanted:
            assert s.draw
            family = s.seq_id if s.branch_of is None else s.branch_of
            matcher = self._matchers.get(family) or old.get(family)
            if matcher is None or matcher.grammar is not s.draw.grammar:
                matcher = Matcher(s.draw.grammar)
            self._matchers[family] = matcher
            masks[s.seq_id] = matcher.masks(s.draw.output_token_ids, s.draft_token_ids, s.draw.stop_ids)
        return masks
