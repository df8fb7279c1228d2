"""What a terminal gets to see: flags, prompts and reports of the command line, and the drawings of the memory.

Reading order: options.py (the flags), prompts.py (what is asked), report.py (what is said), snapshot.py (one moment of
the memory as plain data), draw.py (its picture, which the chapters use too), watch.py (the picture, live).
"""
