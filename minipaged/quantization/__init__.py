"""What does a weight lose when it is kept in four bits, and how does one lose least?

Read rtn.py (the grid, and rounding to it), layers.py (one layer in plain PyTorch, and what its products read),
gptq.py (what rounding a column lost, the columns after it make good), awq.py (columns that read large inputs are
made larger before they are rounded), whole.py (a model, layer by layer), writing.py (the folder that others read):
`python -m minipaged.quantize`. Then texts.py and perplexity.py: `python -m minipaged.perplexity` measures what was
lost, on methods.py's table of ways to run a model. progress.py says how far it is.

Owns: which codes and scales stand for a matrix, calibration, the files that are written, and measuring.
Does not own: how packed weights are read (models) or multiplied (kernels).
"""
