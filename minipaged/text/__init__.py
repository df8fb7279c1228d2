"""What do tokens mean, and when does a text end?

Read tokenizer.py, inputs.py, detokenizer.py, sequence_text.py, outputs.py; gguf_tokenizer.py builds a tokenizer
from a GGUF file.

Owns: the way from prompts to tokens and back, chat templates, stop strings.
Does not own: when something is computed.
"""
