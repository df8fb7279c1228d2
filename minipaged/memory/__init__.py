"""Which token lives where?

Read block_allocator.py, page_table.py, copy_on_write.py, branching.py, swapping.py, kv_manager.py, accounting.py; and
then, where nothing is thrown away before it must be, prefix_cache.py, radix_cache.py and publishing.py.

Owns: block numbers, reference counts, page tables, and which blocks can be found again.
Does not own: tensors, what tokens mean, who goes first. Integers and lists, and nothing but the standard library.
"""

from minipaged.memory.accounting import MemoryUsage
from minipaged.memory.block_allocator import BlockAllocator, IntegrityError, MisuseError, NoSpace
from minipaged.memory.copy_on_write import Appended
from minipaged.memory.kv_manager import Allocated, KVCacheManager, Prefix
from minipaged.memory.page_table import PageTable, blocks_for
from minipaged.memory.prefix_cache import HashCache, PrefixCache
from minipaged.memory.radix_cache import RadixCache
from minipaged.memory.swapping import Swapped

PREFIX_CACHES: dict[str, type[HashCache] | type[RadixCache] | None] = {
    "none": None, "hash": HashCache, "radix": RadixCache,
}  # fmt: skip

__all__ = [
    "PREFIX_CACHES", "Allocated", "Appended", "BlockAllocator", "HashCache", "IntegrityError", "KVCacheManager",
    "MemoryUsage", "MisuseError", "NoSpace", "PageTable", "Prefix", "PrefixCache", "RadixCache", "Swapped",
    "blocks_for",
]  # fmt: skip
