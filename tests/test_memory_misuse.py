"""The memory room, wrongly used or damaged: every mistake is named and changes nothing. And its doctests."""

import ast
import doctest
import sys
from pathlib import Path

import pytest
from memory_model import snapshot

import minipaged.memory
from minipaged.memory import (
    BlockAllocator,
    IntegrityError,
    KVCacheManager,
    MisuseError,
    accounting,
    block_allocator,
    kv_manager,
    page_table,
)

# --- misuse ---


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda m: m.allocate(0, 1), "sequence 0 exists already"),
        (lambda m: m.allocate(2, 1), "sequence 2 exists already"),  # swapped out
        (lambda m: m.allocate(9, -1), "sequence 9 cannot start with -1"),
        (lambda m: m.allocate(9, 1, keep_free=-1), "keep_free"),
        (lambda m: m.append({0: 1, 9: 1}), "there is no sequence 9"),
        (lambda m: m.append({0: 1, 2: 1}), "sequence 2 is swapped out"),
        (lambda m: m.append({0: 1, 1: -1}), "sequence 1 cannot grow by -1"),
        (lambda m: m.fork(9, 10), "there is no sequence 9"),
        (lambda m: m.fork(0, 0), "sequence 0 exists already"),
        (lambda m: m.fork(0, 2), "sequence 2 exists already"),
        (lambda m: m.free(9), "there is no sequence 9"),
        (lambda m: m.swap_out([0, 9]), "there is no sequence 9"),
        (lambda m: m.swap_out([0, 2]), "sequence 2 is swapped out"),
        (lambda m: m.swap_in([2, 1]), "sequence 1 is on the GPU"),
        (lambda m: m.slots(2, 0, 1), "sequence 2 is swapped out"),
        (lambda m: m.slots(0, 2, 2), "2 positions from 2 on: the page table has slots for positions 0..2"),
        (lambda m: m.slots(0, -1, 1), "1 positions from -1 on"),
        (lambda m: m.num_tokens(9), "there is no sequence 9"),
        (lambda m: m.is_swapped(9), "there is no sequence 9"),
        (lambda m: m.block_table(9), "there is no sequence 9"),
    ],
)
def test_misuse_is_named_and_changes_nothing(misuse, message):
    memory = KVCacheManager(num_blocks=8, block_size=2, num_cpu_blocks=4)
    memory.allocate(0, 3)
    memory.fork(0, 1)
    memory.allocate(2, 2)
    memory.swap_out([2])
    before = snapshot(memory)
    with pytest.raises(MisuseError, match=message):
        misuse(memory)
    assert snapshot(memory) == before


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda pool: pool.release(1), "block 1 is free already"),
        (lambda pool: pool.share(1), "block 1 is free"),
        (lambda pool: pool.release(2), "block 2 does not exist: the pool has blocks 0..1"),
        (lambda pool: pool.share(-1), "block -1 does not exist"),
        (lambda pool: pool.ref_count(2), "block 2 does not exist"),
        (lambda pool: pool.allocate(-1), "at least 0"),
        (lambda pool: pool.allocate(0, keep_free=-1), "at least 0"),
    ],
)
def test_misuse_of_the_allocator(misuse, message):
    pool = BlockAllocator(2)
    pool.allocate(1)
    before = snapshot(pool)
    with pytest.raises(MisuseError, match=message):
        misuse(pool)
    assert snapshot(pool) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 4, "block_size": 0}, "block_size must be at least 1, not 0"),
        ({"num_blocks": -1, "block_size": 4}, "num_blocks must be at least 0, not -1"),
        ({"num_blocks": 4, "block_size": 4, "free_order": [1, 1]}, "free_order must name different blocks"),
        ({"num_blocks": 4, "block_size": 4, "free_order": [4]}, r"different blocks of 0..3, not \[4\]"),
    ],
)
def test_impossible_pools(arguments, message):
    with pytest.raises(MisuseError, match=message):
        KVCacheManager(**arguments)


# --- the integrity check finds what is broken by hand ---


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m._gpu.allocator._free.append(0), "block 0 has 2 references and is in the free list"),
        (lambda m: m._gpu.allocator._free.append(7), "twice in the free list"),
        (lambda m: m._gpu.allocator._free.remove(7), "block 7 has 0 references and is not in the free list"),
        (lambda m: m._gpu.allocator.share(2), "block 2 has count 2, but 1 page tables hold it"),
        (lambda m: m._gpu.allocator.release(0), "block 0 has count 1, but 2 page tables hold it"),
        (lambda m: m._gpu.allocator._ref_counts.__setitem__(2, 2), "num_shared is 2"),
        (lambda m: m._gpu.tables[3].blocks.__setitem__(0, 99), "do not exist: .99."),
        (lambda m: m._gpu.tables[3].blocks.append(7), "sequence 3 has 1 tokens in blocks"),
        (lambda m: setattr(m._gpu.tables[0], "num_tokens", 7), "block 1: 2 tokens for 1, 3 for another"),
        (lambda m: m._cpu.allocator.allocate(1), "block 1 has count 1, but 0 page tables hold it"),
        (lambda m: m._gpu.tables.__setitem__(4, m._cpu.tables[4]), r"sequences \[4\] live on the GPU and"),
    ],
)
def test_check_finds(damage, message):
    memory = KVCacheManager(num_blocks=8, block_size=4, num_cpu_blocks=2)
    memory.allocate(0, 6)  # blocks 0 and 1
    memory.fork(0, 1)
    memory.allocate(3, 1)  # block 2
    memory.allocate(4, 1)
    memory.swap_out([4])
    memory.check()
    damage(memory)
    with pytest.raises(IntegrityError, match=message):
        memory.check()


# --- the room itself ---


@pytest.mark.parametrize("module", [accounting, block_allocator, page_table, kv_manager])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_memory_imports_the_standard_library_only():
    for file in Path(minipaged.memory.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                allowed = name.split(".")[0] in sys.stdlib_module_names or name.startswith("minipaged.memory")
                assert allowed, f"{file.name} imports {name}"
