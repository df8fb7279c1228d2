"""python -m kernels.bench: how fast the kernels are, against what the memory can do and against PyTorch's own.

    cells.py     what is measured: shapes of models, bytes and operations of a cell, grids of cells
    runner.py    how a cell is measured: random inputs, a check against the reference, times
    peers.py     who stands beside: PyTorch's attention on contiguous tensors, FlexAttention on paged ones
    timing.py    how time is taken, on a CPU and on a GPU; the machine
    tables.py    the report for eyes
    __main__.py  the flags, and the whole run

Works on a GPU and on a CPU. What is wrong is not timed.
"""
