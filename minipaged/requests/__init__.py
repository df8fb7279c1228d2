"""What is being computed, and what was asked for?

Read checks.py, structured_outputs.py, kv_transfer.py, sampling_params.py, beam_search_params.py, sequence.py,
request.py.

Owns: tokens, limits, what was asked and what was drawn. Plain data, that every other room may look at.
Does not own: where keys and values are (memory), who goes next (scheduling), text (text).
"""
