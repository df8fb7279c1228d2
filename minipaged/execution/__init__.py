"""How does a plan become tokens?

Read engine_args.py, speculative_config.py, executor.py, runner.py, flat_batch.py, answers.py, masks.py,
decode_graphs.py, pool_size.py, stats.py, timing.py; and who guesses: proposer.py, draft_proposer.py, head_proposer.py.
Blocks of other engines: transfer_config.py, transfer.py, transfer_link.py, shared_memory_connector.py,
torch_distributed_connector.py.

Owns: tensors, devices, the keys and values of all blocks.
Does not own: any decision. Which block, which token, who goes first stands in the plan.
"""
