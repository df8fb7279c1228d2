"""Assignment 4: what is wrong with an answer. Where the contract fixes what happens, the reference does it too."""

from typing import Any

from minipaged.course.assignment import Case, Failure
from minipaged.course.assignments.scheduler_cases import served
from minipaged.course.inside import drive_scheduler

COLUMNS = 14  # steps that a picture shows


def judge_refusal(case: Case, answer: Any) -> Failure | None:
    expected = drive_scheduler.refuse(case)
    if answer != expected:
        return Failure("whether the request is refused when it is added", expected, str(answer))
    return None


def judge_share(case: Case, answer: Any) -> Failure | None:
    words = {
        "granted": "what grant gives", "counts": "how many tokens each sequence gets (sequence, tokens)",
        "spare": "the tokens that are nobody's yet, after it took its own",
        "filled": "whether somebody got more than one token for each sequence (Step.filled)",
        "copies": "the copies in the plan", "noted": "what is noted in Step.counts (request, tokens)",
    }  # fmt: skip
    expected = drive_scheduler.share(case)
    for number, (wanted, got) in enumerate(zip(expected, answer, strict=True)):
        for key, what in words.items():
            if got[key] != wanted[key]:
                return Failure(f"request {number}: {what}", str(wanted[key]), str(got[key]))
        if got["asked"] > wanted["asked"]:
            return Failure(
                f"request {number}: how often it was asked what short prompts want (at most once a step, and only for "
                "a long one)", str(wanted["asked"]), str(got["asked"]),
            )  # fmt: skip
    return None


def judge_growth(case: Case, answer: Any) -> Failure | None:
    words = {
        "tokens": "its output", "again": "its output again, as it was drawn (sampled)",
        "ended": "how it ended (finish_reason, stop_reason)", "slots": "its slots in memory (None: it holds none)",
        "computed": "its computed tokens", "found": "how many of its tokens the prefix cache finds now",
    }  # fmt: skip
    expected = drive_scheduler.grow(case)
    for step, (wanted, got) in enumerate(zip(expected, answer, strict=True), 1):
        if len(got["sequences"]) != len(wanted["sequences"]):
            samples = [len(one["sequences"]) for one in (wanted, got)]
            return Failure(f"step {step}: the number of sequences", *map(str, samples))
        for sample, (right, one) in enumerate(zip(wanted["sequences"], got["sequences"], strict=True)):
            if one["sample"] != right["sample"]:
                return Failure(f"step {step}: the index of sequence {sample}", str(right["sample"]), str(one["sample"]))
            for key, what in words.items():
                if one[key] != right[key]:
                    return Failure(f"step {step}, sample {sample}: {what}", str(right[key]), str(one[key]))
        for key, what in (("free", "free blocks"), ("held", "sequences in memory"), ("living", "living sequences")):
            if got[key] != wanted[key]:
                return Failure(f"step {step}: the number of {what}", str(wanted[key]), str(got[key]))
        if got["changed"] != wanted["changed"]:
            return Failure(f"step {step}: whether anything was appended", str(wanted["changed"]), str(got["changed"]))
    return None


# --- servers ---------------------------------------------------------------------------------------------------


def judge_server(case: Case, answer: Any) -> Failure | None:
    expected = served(case)
    if answer["refused"] != expected["refused"]:
        return Failure("which requests are refused", str(expected["refused"]), str(answer["refused"]))
    for number, (wanted, got) in enumerate(zip(expected["steps"], answer["steps"], strict=False)):
        if failure := _wrong_step(case, wanted, got):
            return _drawn(case, failure, number, expected["steps"], answer["steps"])
    if failure := _wrong_end(expected, answer):
        last = min(len(expected["steps"]), len(answer["steps"])) - 1
        return _drawn(case, failure, last, expected["steps"], answer["steps"])
    return None


def _wrong_step(case: Case, wanted: Case, got: Case) -> Failure | None:
    computed = sum(len(s["tokens"]) for s in got["sequences"])
    if computed > case["budget"]:
        return Failure("more tokens than a step may compute", f"at most {case['budget']}", str(computed))
    if not got["sequences"] and wanted["sequences"]:
        return Failure("a step that computes nothing, though there is work", _counts(wanted), "nothing")
    for s in got["sequences"]:
        if failure := _wrong_slots(case, s):
            return failure
    for key, what in (("preempted", "who makes way"), ("resumed", "who comes back"), ("admitted", "who is let in")):
        if got[key] != wanted[key]:
            return Failure(what, _list(wanted[key]), _list(got[key]))
    if _counts(got) != _counts(wanted):
        return Failure("how many tokens of whom are computed", _counts(wanted), _counts(got))
    by_name = {(s["request"], s["sample"]): s for s in got["sequences"]}
    words = {
        "start": "the position of the first token", "tokens": "the tokens", "draws": "how many tokens are drawn then",
        "candidates": "how many candidates are asked for", "targets": "the targets (start, tokens)",
    }  # fmt: skip
    for s in wanted["sequences"]:
        one = by_name[s["request"], s["sample"]]
        for key, what in words.items():
            if one[key] != s[key]:
                return Failure(f"{_name(s)}: {what}", str(s[key]), str(one[key]))
    return _wrong_rest(wanted, got)


def _wrong_slots(case: Case, s: Case) -> Failure | None:
    size, places = case["block_size"], range(s["start"], s["start"] + len(s["tokens"]))
    own = [s["table"][place // size] * size + place % size if place // size < len(s["table"]) else None
           for place in places]  # fmt: skip
    if not s["tokens"] or s["slots"] != own:
        return Failure(f"{_name(s)}: slots that its page table {s['table']} doesn't give", str(own), str(s["slots"]))
    return None


def _wrong_rest(wanted: Case, got: Case) -> Failure | None:
    for place, name in enumerate(("waiting", "running", "swapped")):
        if got["queues"][place] != wanted["queues"][place]:
            return Failure(f"who is {name}, in the order of arrival", *map(_list, (wanted["queues"][place],
                                                                                  got["queues"][place])))  # fmt: skip
    for key, what in (
        ("moved", "how many blocks are swapped out, swapped in, copied"), ("free", "free blocks, once it is planned"),
        ("free_after", "free blocks, after the update"), ("changed", "which requests got new tokens"),
        ("known", "of each sequence: whether it is in memory, and its computed tokens, after the update"),
    ):  # fmt: skip
        if got[key] != wanted[key]:
            return Failure(what, str(wanted[key]), str(got[key]))
    return None


def _wrong_end(expected: Case, answer: Case) -> Failure | None:
    if len(answer["steps"]) > len(expected["steps"]):
        return Failure("it goes on and on", f"{len(expected['steps'])} steps", f"{len(answer['steps'])} and more")
    for key, what in (
        ("outputs", "the outputs (tokens, finish_reason, stop_reason)"),
        ("made_way", "metrics.num_preemptions"), ("counted", "Scheduler.num_preemptions"),
        ("left", "what is left in the end: sequences in memory, used blocks, used blocks in CPU memory"),
        ("living", "living sequences in the end"), ("steps", "steps"),
    ):  # fmt: skip
        if answer[key] != expected[key]:
            wanted, got = expected[key], answer[key]
            if isinstance(wanted, dict):
                wrong = [name for name in wanted if got.get(name) != wanted[name]]
                wanted, got = ({name: one.get(name) for name in wrong} for one in (wanted, got))
            return Failure(what, str(wanted), str(got))
    return None


def _name(s: Case) -> str:
    return f"{s['request']}, sample {s['sample']}"


def _list(items: list[Any]) -> str:
    return ", ".join(one if isinstance(one, str) else f"{one[0]} ({one[1]})" for one in items) or "nobody"


def _counts(step: Case) -> str:
    """a: 1, b: 1 1 5"""
    found: dict[str, list[tuple[int, int]]] = {}
    for s in step["sequences"]:
        found.setdefault(s["request"], []).append((s["sample"], len(s["tokens"])))
    return ", ".join(f"{name}: {' '.join(str(n) for _, n in sorted(found[name]))}" for name in sorted(found))


# --- pictures --------------------------------------------------------------------------------------------------


def _drawn(case: Case, failure: Failure, number: int, expected: list[Case], got: list[Case]) -> Failure:
    first = max(0, number + 1 - COLUMNS)
    lines = [
        "step      " + "".join(f"{step + 1:>5}" for step in range(first, number + 1)),
    ]
    for asked in case["requests"]:
        for who, steps in (("expected", expected), ("got", got)):
            cells = [_cell(asked["name"], steps[step]) for step in range(first, number + 1)]
            name = asked["name"] if who == "expected" else " "
            lines.append(f"{name} {who:8}" + "".join(f"{cell:>5}" for cell in cells))
    lines.append("a number: tokens computed, of all its sequences; w: waits; r: runs, and computes")
    lines.append("nothing; s: swapped out; W, S: makes way now, to wait or to be swapped in later")
    what = f"step {number + 1}: {failure.what}"
    return Failure(what, failure.expected, failure.got, "\n".join(lines))


def _cell(name: str, step: Case) -> str:
    """What a request does in a step, in a few letters."""
    computed = sum(len(s["tokens"]) for s in step["sequences"] if s["request"] == name)
    for request, mode in step["preempted"]:
        if request == name:
            return "S" if mode == "swap" else "W"
    if computed:
        return str(computed)
    for queue, letter in zip(step["queues"], "wrs", strict=True):
        if name in queue:
            return letter
    return "."
