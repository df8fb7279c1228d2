"""Which token comes next, given logits or log-probabilities?

Read adjust.py, sampling.py, logprobs.py, beam_search.py; for outputs of a form, grammar.py; and for guesses that are
checked, ngram.py, acceptance.py, rejection.py.

Owns: the way from a row of logits to a token, and which beams survive.
Does not own: the memory of sequences. It says what should be forked and freed; scheduling does it.
beam_search.py and ngram.py know no tensors, so that the scheduler can use them; nor does grammar.py, by which the text
room compiles what is asked. The others are used by execution only.
"""
