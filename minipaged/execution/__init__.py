"""How does a plan become tokens?

Read engine_args.py, speculative_config.py, executor.py, loading.py, runner.py, flat_batch.py, answers.py, masks.py,
decode_graphs.py, pool_size.py, stats.py, timing.py; who guesses: proposer.py, draft_proposer.py, head_proposer.py;
ranks/, several processes that compute one model together; and blocks of other engines: transfer_config.py, transfer.py,
transfer_link.py, shared_memory_connector.py, torch_distributed_connector.py.

Owns: tensors, devices, the keys and values of all blocks.
Does not own: any decision. Which block, which token, who goes first stands in the plan.
"""
