"""How do several processes compute one model together (tensor parallelism)?

Read rank_zero.py, what the executor sees of it; orders.py, what a rank is told of a step; sums.py, how ranks add up;
worker.py, what ranks 1, 2, ... do; steps.py, how rank 0 does its part; link.py, what they say to each other; team.py,
who of them still lives; starting.py, where they come from; torchrun.py, where they come from if torchrun has
started all; environment.py, whether it has; errors.py, what goes wrong.

                         caller          the engine's thread: schedules, waits for a step, and may be broken off
    rank 0, the engine   step thread     executes steps, one after the other; tells the others what to compute
                         watcher         reads what the others say; who falls silent, or dies, ends the team
    rank 1, 2, ...       main thread     waits for orders, computes
                         listener        reads orders, says every now and then that it lives; dies with rank 0

Rank 0 alone schedules, guesses, draws and answers. The others have the same page tables and their own heads' part of
each block, and are told the tokens of a step, never what is drawn from them.
"""
