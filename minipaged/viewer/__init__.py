"""What a browser gets to see: a run of the engine, replayed.

Reading order: state.py (a moment as plain data, and what changes), words.py (the texts of sequences while they grow),
trace.py (a run in a file: TRACE.md) and old_trace.py (files of version 1), page.py (a trace as one HTML file, whose
parts stand in page/), recording.py (a run kept as both while it goes on), perfetto.py (the same for another viewer).
"""
