"""The benchmark: this engine beside others, on the same weights, under the same loads, in one run.

    python -m minipaged.bench                                  all loads, fp32
    python -m minipaged.bench --load mixed --dtype fp32 bf16 --repeat 3

Each contender lives in a process of its own, so that its memory can be told from the others'. They take
turns (minipaged, a peer, the next peer, minipaged, ...) while the others sleep: machines drift, and only what
ran side by side can be compared.

Reading order: loads.py (what is asked), contenders.py (this engine), peers.py (the others), worker.py (their
processes), report.py (machine, table, JSON), __main__.py (the run).
"""
