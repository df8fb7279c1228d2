"""What do tokens mean, and when does a text end?

Read tokenizer.py, chat_template.py, inputs.py, intake.py, detokenizer.py, sequence_text.py, logprobs.py, outputs.py,
texts.py, mailbox.py, stream.py. Where a checkpoint has no tokenizer.json, the tokenizer is built from what it has:
vocabulary.py, word_rules.py, byte_level.py, sentencepiece.py, gguf_tokenizer.py.

Owns: the way from prompts to tokens and back, chat templates, stop strings.
Does not own: when something is computed.
"""
