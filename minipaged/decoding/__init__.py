"""Which token comes next, given logits or log-probabilities?

Read sampling.py, beam_search.py.

Owns: the way from a row of logits to a token, and which beams survive.
Does not own: the memory of sequences. It says what should be forked and freed; scheduling does it.
beam_search.py knows no tensors, so that the scheduler can use it; sampling.py does, and only execution uses it.
"""
