"""What a terminal gets to see: flags, prompts and reports of the command lines, and the drawings of the memory.

Reading order: command.py (how all commands end), engine_flags.py, server_flags.py and options.py (the flags),
loading.py, prompts.py (what is asked), report.py (what is said), snapshot.py (one moment of the memory as plain data),
draw.py (its picture, which the chapters use too), slots.py (a few blocks, with every token), watch.py (the picture,
live). A run in a file, and in a browser: see the room viewer.
"""
