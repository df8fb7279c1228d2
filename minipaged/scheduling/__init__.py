"""Who computes how many tokens in this step?

Read plan.py, queues.py, scheduler.py, admission.py, preemption.py, growth.py, undo.py,
speculation.py, transfer.py.

Owns: the plan of a step, and the three queues: waiting, running, swapped out. It is the only user of memory.
Does not own: tensors, logits, text. All of it runs without PyTorch.
"""
