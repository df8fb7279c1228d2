"""How do the blocks of a prompt come from another engine (disaggregated prefill and decode)?

Read config.py, what an engine is told of it; connector.py, what all ways to move blocks have in common; link.py, what
two engines say to each other; shared_memory.py, between engines of one machine; torch_distributed.py, between machines.
Which blocks, for whom, and who waits for them: scheduling/transfer.py.

Owns: the connections, and the bytes on their way.
Does not own: any decision.
"""
