"""The benchmark: this engine beside others, on the same weights, under the same loads, in one run.

    python -m minipaged.bench                                  mixed and even loads, fp32
    python -m minipaged.bench --load mixed --dtype fp32 bf16 --repeat 3
    python -m minipaged.bench --peer vllm --peer-python vllm=X/bin/python
    python -m minipaged.bench --load few-shot chat --peer no-cache radix
    python -m minipaged.bench --load stall --peer no-chunks --max-num-batched-tokens 256
    python -m minipaged.bench --load beams --peer static vllm --peer-python vllm=X/bin/python
    python -m minipaged.bench --load quoting quoting8 --peer ngram head vllm vllm-ngram --peer-python vllm=X/bin/python

Each contender lives in a process of its own, so that its memory can be told from the others'. They take
turns (minipaged, a peer, the next peer, minipaged, ...) while the others sleep: machines drift, and only what
ran side by side can be compared.

Reading order: loads.py and texts.py (what is asked), contenders.py (who is), ours.py (this engine and its variants),
peer_*.py (the others), worker.py (their processes), environments.py and weights.py (what peers of another environment
need), report.py (machine, table, JSON), progress.py, flags.py and __main__.py (the run). Beside it: loading.py (how
long loading takes), decode_profile.py (where a decode step's time goes), steps.py (a decode step beside what it must
read), acceptance.py (how many guesses are right), ranks.py (what it costs to be several processes), disaggregation.py
(prompts in one engine, tokens in another), gpu.py and gpu_parts.py (all that needs a GPU, in one command).

`python -m minipaged.bench.serve` puts servers under load, over sockets: serve_traces.py (what is sent),
serve_answers.py and serve_clients.py (who sends it), serve_servers.py and serve_contest.py (to whom), serve_report.py
(figures), serve_flags.py and serve.py (the run).
"""
