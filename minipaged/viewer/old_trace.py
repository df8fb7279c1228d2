"""Traces of version 1, read as if they were of version 2: each line had the whole plan, output and memory.

They know neither times nor texts, nor which block is found after which, nor what a request is called where it came
from, nor when requests end.
"""

from typing import Any

from minipaged.viewer.state import State, merge_patch


def new_step(line: dict[str, Any], before: State) -> dict[str, Any]:
    """A line of version 2, after the state `before`. KeyError or TypeError if it is no line of version 1."""
    plan, memory = line["plan"], line["memory"]
    usage = {name: value for name, value in memory["usage"].items() if name != "waste_percent"}
    blank = {"id": "", "prompt": 0, "output": 0, "sequences": 1, "most": 0}
    queues = ("running", "waiting", "swapped")
    requests = {name: {**blank, "state": queue} for queue in queues for name in memory[queue]}
    tables = {
        one["name"]: {"tokens": one["num_tokens"], "blocks": one["blocks"], "swapped": one.get("swapped", False)}
        for one in memory["tables"]
    }
    tokens = sum(len(s["token_ids"]) + s.get("num_to_draft", 0) for s in plan["sequences"])
    state = {
        "step": {"number": line["step"], "sequences": len(plan["sequences"]), "tokens": tokens},
        "usage": {"cached": 0, "evicted": 0, **usage},
        "num_preemptions": memory["num_preemptions"],
        "requests": requests,
        "tables": tables,
        "cached": dict.fromkeys(map(str, memory["cached"]), 1),
    }
    gone = before.get("requests", {}).keys() - requests.keys()
    did = {name: plan[name] for name in ("copies", "swap_out", "swap_in", "freed") if plan[name]}
    did |= {"finished": dict.fromkeys(sorted(gone), "")} if gone else {}
    return {"step": line["step"], "patch": merge_patch(before, state), "did": did, "events": line["events"]}
