"""Which token lives where. Integers and lists only: no tensor is ever seen here.

Read block_allocator.py, page_table.py, kv_manager.py, and then accounting.py.
"""

from minipaged.memory.accounting import MemoryUsage
from minipaged.memory.block_allocator import BlockAllocator, IntegrityError, MisuseError, NoSpace
from minipaged.memory.kv_manager import Allocated, Appended, KVCacheManager, Swapped
from minipaged.memory.page_table import PageTable, blocks_for

__all__ = [
    "Allocated", "Appended", "BlockAllocator", "IntegrityError", "KVCacheManager", "MemoryUsage",
    "MisuseError", "NoSpace", "PageTable", "Swapped", "blocks_for",
]
