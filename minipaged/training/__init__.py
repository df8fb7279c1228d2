"""How does a head learn to guess what a model says?

Read text.py (the model writes questions to itself, and answers them), states.py (what it thought at each token),
network.py (the head with gradients), learning.py (loss, steps, how many guesses are right), files.py (where a
head begins, and how it is kept); course.py puts them in a row: `python -m minipaged.train_head`.

Owns: texts, losses, optimizers: all that is over before a head is used.
Does not own: the head that serves (models/head.py), or when it guesses (scheduling, execution).
"""
