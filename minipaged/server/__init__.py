"""Many clients over HTTP: who may ask, and how do answers reach them?

Read config.py, protocol.py (what may be asked), elsewhere.py (what not), bodies.py (how it is read), asked.py (what the
engine gets of it), answers.py and logprobs.py (what a client gets), transport.py (how), manners.py (what happens to
every request before and after), generation.py (one request from its body to its last byte), errors.py, metrics.py,
live.py (what the page shows of the engine), schema.py and described.py (/openapi.json), app.py (the routes), running.py
(sockets, signals). The page is page.html, of the scripts in page/ (ask.js, chat.js, numbers.js, live.js) and those that
the viewer's page is made of, too. Many servers: see the room routing.

Owns: HTTP, its limits, and what clients are told. The engine steps in a thread of its own: see async_llm.py.
Does not own: tokens, memory, when to compute.
"""
