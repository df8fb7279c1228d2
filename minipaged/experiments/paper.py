"""The paper's numbers, each with its kind: what we compare with is only as good as where it comes from.

    said      stands in the paper's text
    printed   a label in a figure or a table
    read      read off a plot by eye: approximate
    recalled  from the paper's text as we remember it, not checked against it

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023.
"""

SLOTS = {"13b": 15_700, "66b": 9_700, "175b": 60_100}  # Table 1, printed: token slots

# Figure 2, printed: percent of the memory for keys and values.
USE = {
    "max": {"tokens": 20.4, "reserved": 13.3, "internal": 57.3, "external": 8.9},
    "pow2": {"tokens": 26.8, "reserved": 17.9, "internal": 13.6, "external": 41.6},
    "oracle": {"tokens": 38.2, "reserved": 25.2, "internal": 0.0, "external": 36.6},
    "paged": {"tokens": 96.3},
}
# Figure 12, read: requests a second at which the normalized latency of OPT-13B crosses 1 second per token.
CROSSINGS = {
    "sharegpt": {"ft": 0.27, "max": 0.55, "pow2": 0.80, "oracle": 1.12, "paged": 1.98},
    "alpaca": {"ft": 2.95, "max": 3.99, "pow2": 16.3, "oracle": 21.2, "paged": 28.1},
}
# Figure 13, printed: mean requests in the batch, OPT-13B, ShareGPT at 2 requests a second and Alpaca at 30.
BATCH = {
    "sharegpt": {"max": 7.00, "pow2": 9.81, "oracle": 13.62, "paged": 30.42},
    "alpaca": {"max": 7.00, "pow2": 43.24, "oracle": 72.75, "paged": 132.44},
}
# Figure 14, recalled (section 6.3): our rate by Orca (Oracle)'s on Alpaca, one sample and a beam search of six.
OVER_ORACLE = {("samples", 1): 1.3, ("beams", 6): 2.3}
# Figure 15, percent of blocks saved by sharing. Alpaca's are printed; of ShareGPT the text says a range.
SAVED = {
    ("samples", "alpaca"): {2: 6.09, 4: 8.53, 6: 9.79},
    ("beams", "alpaca"): {2: 37.56, 4: 53.13, 6: 55.16},
}
SAVED_RANGE = {("samples", "sharegpt"): (16.2, 30.5), ("beams", "sharegpt"): (44.3, 66.3)}
PREFIX_SPEEDUP = {80: 1.67, 341: 3.58}  # Figure 16, said: throughput by Orca (Oracle)'s, by tokens of the prefix
CHAT_SPEEDUP = 2.0  # Figure 17, recalled (section 6.4): our rate by that of each Orca
BEST_BLOCK_SIZES = {"sharegpt": (16, 128), "alpaca": (16, 32)}  # Figure 18b, said: the best lie from .. to ..
CROSSOVER = (16, 32)  # Figure 19a, read: the block sizes between which swapping becomes cheaper than recomputing
MOST_ABOVE_SWAPPING = 1.2  # Figure 19a, said: recomputing never costs more than so many times what swapping costs
