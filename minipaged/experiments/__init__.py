"""The paper's evaluation, redone: python -m minipaged.experiments.

A simulation with the package's own scheduler and memory manager beside the systems that the paper compares itself
with, and a cost model instead of a GPU; and the same comparison live, on the real model. In reading order:

    loads.py         what requests look like, and when they come
    traces.py        and those of real traces: quantiles in traces.json
    prefixes.py      what prefix caches find on a real trace: in prefixes.json
    hardware.py      how long an iteration takes: a roofline
    systems.py       what a system is; FasterTransformer and Orca (their memory: buddy.py)
    paged.py         our own system; beams.py: the same for beam search, divergence.py: how beams part
    simulation.py    the clock
    capacity.py      without one: a crowd is served once, and priced with any constants
    runs.py          a simulation as data; its cache; the search for the rate at which a system gives up
    study.py         all runs of a figure, on all processors
    paper.py         the paper's numbers
    serving.py       an engine of today (machine.py: its costs), cluster.py: many under one clock
    goodput.py       how much they take within limits
    routing.py       many replicas, the router's policies (policies.py), and a trace; routing.json: what came of it
    figures/         the figures
    report.py        tables and pictures
    live.py          the comparison on the real model (live_systems.py, live_client.py, live_report.py)
    live_record.py   the same to look at: traces and pages
    gallery.py       six short runs as pages (gallery_runs.py: which; gallery_pictures.py)
"""
