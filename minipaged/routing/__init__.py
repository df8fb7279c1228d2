"""Which of many servers gets a request, and what becomes of it if that one dies?

Read policies.py (which of them), fleet.py (who lives), forwarded.py and proxy.py (one request, sent on), handover.py
(one server computes prompts, and another goes on), router.py (the application in front of them), replicas.py (servers
that are started on Ray, and started again).

Owns: what is known of servers from outside: who lives, how much they have to do, what they were sent.
Does not own: an engine. It speaks HTTP with any server that has OpenAI's API, and needs no tensors.
"""
