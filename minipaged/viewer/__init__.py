"""What a browser gets to see: a run of the engine, replayed.

Reading order: state.py (a moment as plain data, and what changes), words.py (the texts of sequences while they grow),
trace.py (a run in a file: TRACE.md) and old_trace.py (files of version 1), thinning.py (a long run in fewer steps),
page.py (traces as one HTML file), recording.py (a run kept as both while it goes on); spans.py (what each request did
when) and perfetto.py (the same for another viewer).

page/ is what the HTML file is made of: a body, plain scripts, styles. The scripts have one scope in common, and
replay.html names them in reading order: common.js (elements, names, patches), glossary.js (words), trace.js (any moment
of a run) and view.js (a run on the screen), then the parts that draw a moment, of which pool.js is the one to begin
with, and last player.js, search.js, and replay.js, which puts all together. Those from pool.js to queues.js, and
prefixes.js, need no trace: the server's page is made of them, too (server/page.html). blocks.css has the colours.

It owns how a run is told, kept and drawn. It decides nothing, and the engine doesn't know of it.
"""
