"""Random schedules of several engines, without processes (recall_transfer.py); and what is broken shows in them."""

from collections import Counter

import pytest

from minipaged.scheduling.transfer import Exports, Transfers
from tests import recall_transfer

OFTEN = {
    "num_loads": 60, "num_failed_loads": 25, "num_exports": 120, "given up": 2, "broken off": 4, "lies": 4,
    "aborted loading": 1, "preempted loading": 1, "swapped_in": 20, "recompute": 25, "forked_beams": 200, "right": 300,
}  # fmt: skip


def test_what_is_read_outlives_its_lease():
    now = 0.0
    exports = Exports(10, lambda: now)
    name = exports.keep("r", 7, [4, 2], "d")
    export, blocks = exports.pin(name, "d", 1, 1)
    now = 11.0
    assert blocks == [2] and exports.take_ended() == []
    assert exports.unpin(export, False) and exports.take_ended() == [7]
    assert exports.pin(name, "d", 0, 2) == "the blocks are not kept any more"
    name = exports.keep("r", 8, [4, 2], "d")
    export, _ = exports.pin(name, "d", 0, 2)
    exports.end(name)
    assert isinstance(exports.pin(name, "d", 0, 2), str) and exports.take_ended() == [] and not exports.has_ended()
    exports.clear()
    assert not exports.unpin(export, True)


def test_random_schedules_of_several_engines():
    seen = Counter()
    for seed in range(100):
        seen.update(recall_transfer.run(seed))
    assert not {name: seen[name] for name, least in OFTEN.items() if seen[name] < least}


def publish_at_once(self, request, num_found, memory):
    RIGHT_ALLOC(self, request, num_found, memory)
    [leader] = request.live
    memory.publish(leader.seq_id, (request.load.first + len(request.load.blocks)) * memory.block_size, leader.tokens)


def keep_nothing(self, request, seq, reason, memory, new_id):
    RIGHT_FINISHED(self, request, seq, reason, memory, new_id)
    for export in self.exports._by_name.values() if self.exports else ():
        if export.seq_id in memory.sequences():
            memory.free(export.seq_id)
            export.seq_id = new_id()
            memory.allocate(export.seq_id, 0)


def one_block_further(self, name, digest, first, count):
    answer = RIGHT_PIN(self, name, digest, first, count)
    if isinstance(answer, str) or len(answer[1]) < 2:
        return answer
    return answer[0], answer[1][1:] + answer[1][:1]


def any_prompt(self, name, digest, first, count):
    export = self._by_name.get(name)
    return RIGHT_PIN(self, name, export.digest if export else digest, first, count)


def all_of_it(self, request, num_found, block_size):
    if not RIGHT_MATCH(self, request, num_found, block_size):
        return 0
    return len(request.kv_transfer.remote_block_ids) * block_size - num_found


def never_free(self):
    return []


RIGHT_ALLOC, RIGHT_FINISHED = Transfers.update_state_after_alloc, Transfers.request_finished
RIGHT_PIN, RIGHT_MATCH, RIGHT_ENDED = Exports.pin, Transfers.get_num_new_matched_tokens, Transfers.load_ended
BROKEN = {
    "what comes can be found before it is there": (Transfers, "update_state_after_alloc", publish_at_once),
    "blocks are freed as soon as they are promised": (Transfers, "request_finished", keep_nothing),
    "the wrong blocks": (Exports, "pin", one_block_further),
    "blocks of another prompt": (Exports, "pin", any_prompt),
    "the last token is taken too": (Transfers, "get_num_new_matched_tokens", all_of_it),
    "failed ones go on as if all were there": (
        Transfers, "load_ended", lambda self, request, error, memory: RIGHT_ENDED(self, request, None, memory)
    ),
    "what was kept is not freed": (Exports, "take_ended", never_free),
    "it is always good": (Exports, "unpin", lambda self, export, done: True),
    "memory is given up, and what is kept isn't": (Exports, "clear", lambda self: None),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_it_notices_what_is_broken(monkeypatch, broken):
    monkeypatch.setattr(*BROKEN[broken])
    with pytest.raises(Exception) as failure:
        for seed in range(200):
            recall_transfer.run(seed)
    assert "replay it: python -m tests.recall_transfer" in failure.value.__notes__[0]
