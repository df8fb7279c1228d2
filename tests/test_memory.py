"""The memory room: the paper's worked examples to the block number, refusals, swapping, the account."""

import pytest
from memory_model import snapshot

from minipaged.memory import (
    Allocated,
    Appended,
    BlockAllocator,
    KVCacheManager,
    MisuseError,
    NoSpace,
    PageTable,
    Swapped,
    blocks_for,
)

# --- the paper's figures ---


def test_figure_6():
    """A prompt of 7 tokens; the next token fills its last block, the one after takes a new block."""
    memory = KVCacheManager(num_blocks=9, block_size=4, free_order=[7, 1, 3])
    assert memory.allocate(0, 7) == Allocated([7, 1])
    assert filled(memory, 0) == [4, 3]
    assert memory.append({0: 1}) == Appended(copies=[])
    assert memory.block_table(0) == [7, 1] and filled(memory, 0) == [4, 4]
    assert memory.append({0: 1}) == Appended(copies=[])
    assert memory.block_table(0) == [7, 1, 3] and filled(memory, 0) == [4, 4, 1]
    assert memory.slots(0, 0, 9) == [28, 29, 30, 31, 4, 5, 6, 7, 12]


def test_figure_7():
    """A second request beside the first: neighbours in a sequence need not be neighbours in memory."""
    memory = KVCacheManager(num_blocks=9, block_size=4, free_order=[7, 1, 5, 2, 3])
    memory.allocate(0, 7)
    assert memory.allocate(1, 5) == Allocated([5, 2])
    memory.append({0: 1, 1: 1})
    memory.append({0: 1, 1: 1})
    assert memory.block_table(0) == [7, 1, 3] and filled(memory, 0) == [4, 4, 1]
    assert memory.block_table(1) == [5, 2] and filled(memory, 1) == [4, 3]


@pytest.mark.parametrize("together", [True, False])
def test_figure_8(together):
    """Two samples share their prompt. The first that writes gets a copy, the second writes in place."""
    memory = KVCacheManager(num_blocks=9, block_size=4, free_order=[7, 1, 3])
    memory.allocate(1, 7)
    memory.fork(1, 2)
    assert memory.block_table(1) == memory.block_table(2) == [7, 1]
    assert holders(memory, 7) == holders(memory, 1) == 2
    if together:
        assert memory.append({1: 1, 2: 1}) == Appended(copies=[(1, 3)])
    else:
        assert memory.append({1: 1}) == Appended(copies=[(1, 3)])
        assert holders(memory, 1) == 1
        assert memory.append({2: 1}) == Appended(copies=[])
    assert memory.block_table(1) == [7, 3] and memory.block_table(2) == [7, 1]
    assert [holders(memory, block) for block in (7, 1, 3)] == [2, 1, 1]
    assert memory.usage().copies == 1


def filled(memory, seq_id):
    """The numbers that the figures print beside the blocks: filled slots of each."""
    tokens, size = memory.num_tokens(seq_id), memory.block_size
    return [min(size, tokens - start) for start in range(0, tokens, size)]


def holders(memory, block):
    return sum(memory.block_table(seq_id).count(block) for seq_id in memory.sequences())


# --- copy-on-write ---


def test_every_holder_but_the_last_gets_a_copy():
    memory = KVCacheManager(num_blocks=8, block_size=4)
    memory.allocate(0, 6)  # blocks 0, 1
    for child in (1, 2, 3):
        memory.fork(0, child)
    assert memory.append({2: 1, 0: 3, 3: 1}) == Appended(copies=[(1, 2), (1, 3), (1, 5)])
    assert memory.block_table(0) == [0, 3, 4]
    assert memory.block_table(1) == [0, 1]  # did not write: the block is its own now
    assert memory.append({1: 1}) == Appended(copies=[])


def test_no_copy_where_nothing_shared_is_written():
    memory = KVCacheManager(num_blocks=8, block_size=4)
    memory.allocate(0, 8)
    memory.fork(0, 1)
    assert memory.append({0: 1, 1: 1}) == Appended(copies=[])  # the shared blocks are full
    memory.fork(0, 2)
    assert memory.append({0: 0, 2: 0}) == Appended(copies=[])  # nothing is written
    memory.free(2)
    assert memory.append({0: 1}) == Appended(copies=[])  # no longer shared


# --- refusals ---


def refused(memory, operation, answer):
    """`operation` gives `answer` and changes nothing at all."""
    before = snapshot(memory)
    assert operation() == answer
    assert snapshot(memory) == before
    memory.check()


def test_refusals_change_nothing():
    memory = KVCacheManager(num_blocks=4, block_size=2, num_cpu_blocks=1)
    refused(memory, lambda: memory.allocate(0, 9), NoSpace(needed=5, free=4))
    refused(memory, lambda: memory.allocate(0, 4, keep_free=3), NoSpace(needed=5, free=4))
    memory.allocate(0, 3, keep_free=2)
    memory.fork(0, 1)
    refused(memory, lambda: memory.append({0: 2, 1: 3}), NoSpace(needed=3, free=2))  # only one copies
    refused(memory, lambda: memory.append({0: 1}, keep_free=2), NoSpace(needed=3, free=2))
    refused(memory, lambda: memory.swap_out([0, 1]), NoSpace(needed=2, free=1))
    assert memory.append({0: 1, 1: 1}, keep_free=1) == Appended(copies=[(1, 2)])


def test_swap_in_respects_the_watermark():
    memory = KVCacheManager(num_blocks=3, block_size=2, num_cpu_blocks=3)
    memory.allocate(0, 4)
    memory.swap_out([0])
    refused(memory, lambda: memory.swap_in([0], keep_free=2), NoSpace(needed=4, free=3))
    assert memory.swap_in([0], keep_free=1) == Swapped([(0, 2), (1, 1)])


def test_what_takes_no_block_is_never_refused():
    memory = KVCacheManager(num_blocks=1, block_size=4)
    memory.allocate(0, 3)
    assert memory.append({0: 1}, keep_free=5) == Appended(copies=[])
    assert memory.append({}, keep_free=5) == Appended(copies=[])
    assert memory.allocate(1, 0, keep_free=5) == Allocated([])
    refused(memory, lambda: memory.append({1: 1}), NoSpace(needed=1, free=0))


# --- swapping ---


def test_shared_blocks_move_once_and_stay_shared():
    memory = KVCacheManager(num_blocks=8, block_size=4, num_cpu_blocks=8)
    memory.allocate(0, 6)
    memory.fork(0, 1)
    memory.append({0: 1, 1: 1})  # 0: [0, 2], 1: [0, 1]
    assert memory.swap_out([0, 1]) == Swapped([(0, 0), (2, 1), (1, 2)])
    assert memory.block_table(0) == [0, 1] and memory.block_table(1) == [0, 2]
    assert memory.is_swapped(0) and memory.is_swapped(1)
    assert memory.num_free == 8 and memory.usage().cpu_used == 3
    assert memory.swap_in([0, 1]) == Swapped([(0, 3), (1, 4), (2, 5)])
    assert memory.block_table(0) == [3, 4] and memory.block_table(1) == [3, 5]
    usage = memory.usage()
    assert (usage.shared, usage.swapped_out_blocks, usage.swapped_in_blocks, usage.cpu_used) == (1, 3, 3, 0)
    memory.check()


def test_a_block_shared_outside_the_group_stays_where_it_is():
    memory = KVCacheManager(num_blocks=8, block_size=4, num_cpu_blocks=8)
    memory.allocate(0, 6)
    memory.fork(0, 1)
    assert memory.swap_out([1]) == Swapped([(0, 0), (1, 1)])
    assert memory.block_table(0) == [0, 1] and memory.num_free == 6 and memory.take_freed() == []
    assert memory.append({0: 1}) == Appended(copies=[])  # it is alone with its block now
    memory.check()


def test_a_swapped_sequence_can_be_forked_and_freed():
    memory = KVCacheManager(num_blocks=2, block_size=4, num_cpu_blocks=2)
    memory.allocate(0, 6)
    memory.swap_out([0])
    memory.fork(0, 1)
    assert memory.is_swapped(1)
    memory.check()
    memory.free(0)
    assert memory.usage().cpu_used == 2
    memory.free(1)
    assert memory.usage().cpu_used == 0 and memory.sequences() == []


# --- freed blocks ---


def test_freed_blocks_are_told_once_and_reused_last():
    pool = BlockAllocator(3)
    assert pool.allocate(2) == [0, 1]
    pool.release(1)
    pool.release(0)
    assert pool.allocate(2) == [2, 1]  # the block that has been free longest comes first
    assert pool.take_freed() == [1, 0]  # also block 1, which is in use again
    pool.release(1)
    assert pool.allocate(2) == [0, 1]
    pool.release(1)
    assert pool.take_freed() == [1]
    assert pool.take_freed() == []


# --- the account ---


def test_usage():
    memory = KVCacheManager(num_blocks=10, block_size=4, num_cpu_blocks=5)
    memory.allocate(0, 6)  # 2 blocks, 2 slots empty
    memory.fork(0, 1)
    memory.fork(0, 2)
    memory.append({2: 1})  # 1 copy, 1 slot empty
    memory.allocate(3, 9)  # 3 blocks, 3 slots empty
    memory.allocate(4, 8)
    memory.swap_out([4])
    usage = memory.usage()
    assert (usage.num_blocks, usage.free, usage.used, usage.shared, usage.peak_used) == (10, 4, 6, 2, 8)
    assert (usage.tokens_stored, usage.tokens_logical) == (18, 6 + 6 + 7 + 9)
    assert usage.waste_percent == 25.0  # 6 of 24 slots
    assert usage.blocks_saved_by_sharing == 3  # 2 + 2 + 2 + 3 without sharing
    assert (usage.cpu_total, usage.cpu_used) == (5, 2)
    assert (usage.copies, usage.swapped_out_blocks, usage.swapped_in_blocks) == (1, 2, 0)
    assert usage.block_size == memory.block_size == 4
    assert KVCacheManager(num_blocks=0, block_size=4).usage().waste_percent == 0.0


def test_waste_is_less_than_a_block_for_each_sequence():
    memory = KVCacheManager(num_blocks=1000, block_size=16)
    for seq_id in range(32):
        memory.allocate(seq_id, 100 + seq_id)
    usage = memory.usage()
    assert usage.used * 16 - usage.tokens_stored < 32 * 16
    assert usage.tokens_stored == usage.tokens_logical == sum(range(100, 132))


# --- the page table ---


def test_page_table():
    table = PageTable(block_size=4, blocks=[7, 1, 3], num_tokens=9)
    assert [table.locate(position) for position in (0, 3, 4, 8)] == [(7, 0), (7, 3), (1, 0), (3, 0)]
    assert [table.slot(position) for position in range(9)] == table.slots(0, 9)
    assert table.slots(9, 0) == [] and table.room == 3
    assert [blocks_for(tokens, 4) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]
    for position in (-1, 9):
        with pytest.raises(MisuseError, match=f"1 positions from {position} on"):
            table.locate(position)


def test_a_page_table_that_was_asked_for_is_a_copy():
    memory = KVCacheManager(num_blocks=4, block_size=4)
    memory.allocate(0, 5).blocks.clear()
    memory.block_table(0).clear()
    assert memory.block_table(0) == [0, 1]
