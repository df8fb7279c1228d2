"""How does a plan become tokens?

Read engine_args.py, speculative_config.py, executor.py, loading.py, runner.py, flat_batch.py, answers.py, masks.py,
decode_graphs.py, pool_size.py, stats.py, timing.py; who guesses: proposer.py, draft_proposer.py, head_proposer.py;
ranks/, several processes that compute one model together; transfer/, blocks that go from one engine to another.

Owns: tensors, devices, the keys and values of all blocks.
Does not own: any decision. Which block, which token, who goes first stands in the plan.
"""
