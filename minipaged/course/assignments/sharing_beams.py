"""Assignment 5: what beam search is tried with. It is compared with the package's, call by call."""

import math
import random
from collections.abc import Iterator
from itertools import count
from typing import Any

from minipaged.course.assignment import Case, Failure
from minipaged.course.checking import without
from minipaged.decoding.beam_search import BeamSearch, Continuation, memory_moves
from minipaged.requests.beam_search_params import BeamSearchParams

PENALTIES = (0.0, 1.0, 1.0, 2.0, 0.5, -1.0)


def search_cases(rng: random.Random) -> Iterator[Case]:
    """All kinds; in every third equal scores are frequent."""
    for size in count():
        yield _case(rng, size, stops=rng.choice([0, 1, 1, 2]), eager=rng.random() < 0.3)


def ending_cases(rng: random.Random) -> Iterator[Case]:
    """Texts that end early, in searches that could go on for long; often "never", with a penalty below 0."""
    for size in count():
        case = _case(rng, size + 20, stops=rng.choice([1, 2]), eager=True)
        yield {**case, "early": "never", "penalty": -1.0} if size % 4 == 3 else case


def _case(rng: random.Random, size: int, stops: int, eager: bool) -> Case:
    width, exact = rng.randint(1, min(4, 1 + size // 8)), size % 3 == 0
    max_tokens = rng.randint(1, min(7, 2 + size // 8))
    tokens, stop = list(range(10, 10 + rng.randint(2, 7))), list(range(stops))
    steps: list[dict[str, Any]] = []
    for _ in range(max_tokens + 1):
        rows = [_offers(rng, tokens, stop, width, exact, eager) for _ in range(width + 1)]
        if rng.random() < 0.1 and not steps or rng.random() < 0.05:
            steps.append({"rows": rows, "spoilt": rng.choice(["nan", "one more", "one less"])})
        steps.append({"rows": rows, "spoilt": ""})
    return {
        "width": width, "max_tokens": max_tokens, "stop": stop, "early": rng.choice([False, True, "never"]),
        "penalty": 0.0 if exact else rng.choice(PENALTIES), "steps": steps,
    }  # fmt: skip


def _offers(
    rng: random.Random, tokens: list[int], stop: list[int], width: int, exact: bool, eager: bool
) -> list[list[Any]]:
    """exact: quarters, whose sums have no rounding, so that equal is equal. eager: stop tokens are likely."""
    scored = []
    for token in tokens + stop:
        logprob = -rng.randint(1, 8) / 4 if exact else math.log(rng.uniform(0.01, 1))
        scored.append([token, logprob / (4 if eager and token in stop else 1)])
    rng.shuffle(scored)
    scored.sort(key=lambda one: -one[1])
    return scored[: max(2, 1 + len(stop)) * width]


def _new(case: Case) -> BeamSearch:
    params = BeamSearchParams(case["width"], length_penalty=case["penalty"], early_stopping=case["early"])
    return BeamSearch(params, case["max_tokens"], case["stop"])


def _rows(step: Case, search: BeamSearch) -> list[list[tuple[int, float]]]:
    """One for each beam; if they are spoilt, one more or less, or with NaN."""
    count = len(search.running) + {"one more": 1, "one less": -1}.get(step["spoilt"], 0)
    rows = [[(token, logprob) for token, logprob in row] for row in step["rows"][:count]]
    if step["spoilt"] == "nan":
        rows[-1][-1] = (rows[-1][-1][0], math.nan)
    return rows


def judge_search(case: Case, answer: Any) -> Failure | None:
    search = _new(case)
    for number, (step, got) in enumerate(zip(case["steps"], answer, strict=True), start=1):
        if step["spoilt"] and not search.running:
            continue  # nothing to be spoilt
        before, rows, spoilt = list(search.running), _rows(step, search), step["spoilt"] != ""
        result: Any = "a ValueError" if spoilt else search.advance(rows)
        picture = "" if spoilt else _ranks(case, before, rows, [h.score for h in search.finished])
        if spoilt:
            returned: Any = "a ValueError" if isinstance(got["result"], dict) else got["result"]
        else:
            returned = got["result"] if isinstance(got["result"], list) else f"{got['result']['raised']}"
        where = f"call {number} of advance"
        if not _alike(returned, result):
            return Failure(f"what {where} returns", _beams(result), _beams(returned), picture)
        hypotheses = search.hypotheses()
        if not _alike(got["hypotheses"], hypotheses):
            return Failure(f"hypotheses() after {where}", _texts(hypotheses), _texts(got["hypotheses"]), picture)
        if not _alike(got["running"], search.running):
            return Failure(f"running after {where}", _texts(search.running), _texts(got["running"]), picture)
        if got["done"] is not search.done:
            return Failure(f"done after {where}", str(search.done), str(got["done"]), picture)
    return None


def _alike(a: Any, b: Any) -> bool:
    """Of equal form, and numbers equal but for rounding."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(b, float) and isinstance(a, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    return type(a) is type(b) and bool(a == b)


def _beams(result: Any) -> str:
    if isinstance(result, str):
        return result
    lines = [f"beam {parent} and token {token}: {score:.4g}" for parent, token, score in result]
    return "\n".join(lines) or "no beam: the search is over"


def _texts(found: Any) -> str:
    lines = []
    for tokens, score, *rest in found:
        more = f", {rest[1]} {'' if rest[2] is None else rest[2]}".rstrip() if rest else ""
        lines.append(f"{list(tokens)}: {score:.4g}{more}")
    return "\n".join(lines) or "none"


def _ranks(case: Case, beams: list, rows: list[list[tuple[int, float]]], finished: list[float]) -> str:
    """What is on offer, best first. finished: scores after it."""
    offers = [
        (beam.score + logprob, parent, token)
        for parent, (beam, row) in enumerate(zip(beams, rows, strict=True))
        for token, logprob in row
    ]
    lines = [f"beam_width {case['width']}, stop tokens {case['stop']}", "rank  beam  token  log-probability"]
    for rank, (score, parent, token) in enumerate(sorted(offers, key=lambda one: -one[0])[:10]):
        lines.append(f"{rank:>4}  {parent:>4}  {token:>5}  {score:>10.4g}{'  stop' * (token in case['stop'])}")
    lines.append(f"scores of finished after it: {', '.join(f'{score:.4g}' for score in finished) or 'none yet'}")
    return "\n".join(lines) if offers else ""


def show_search(case: Case) -> str:
    early, search = case["early"], _new(case)
    lines = [
        f"search = BeamSearch(BeamSearchParams(beam_width={case['width']}, length_penalty={case['penalty']},",
        f"    early_stopping={early!r}), max_tokens={case['max_tokens']}, eos_token_ids={case['stop']})",
    ]
    for step in case["steps"]:
        if step["spoilt"] and not search.running:
            continue
        rows = _rows(step, search)
        offers = ", ".join("[" + ", ".join(f"({token}, {logprob:.4g})" for token, logprob in row) + "]" for row in rows)
        remark = f"  # lists: {len(rows)}, beams: {len(search.running)}" if step["spoilt"].startswith("one") else ""
        lines.append(f"search.advance([{offers}]){remark}")
        if step["spoilt"]:
            continue
        search.advance(rows)
        if not search.running:
            break
    return "\n".join(lines)


def smaller_search(case: Case) -> Iterator[Case]:
    """Fewer steps, and fewer candidates in them."""
    for at in range(1, len(case["steps"])):
        yield {**case, "steps": case["steps"][:at]}
    yield from without(case, "steps")
    for at, step in enumerate(case["steps"]):
        for number, row in enumerate(step["rows"]):
            for gone in range(len(row) if len(row) > 1 else 0):
                rows = step["rows"][:number] + [row[:gone] + row[gone + 1 :]] + step["rows"][number + 1 :]
                yield {**case, "steps": [*case["steps"][:at], {**step, "rows": rows}, *case["steps"][at + 1 :]]}


# --- what it means for memory


def moves_cases(rng: random.Random) -> Iterator[Case]:
    yield {"beams": 1, "parents": [0, 0]}
    yield {"beams": 2, "parents": []}
    for size in count(1):
        beams = rng.randint(1, 1 + size // 4)
        yield {"beams": beams, "parents": [rng.randrange(beams) for _ in range(rng.randint(0, 1 + size // 4))]}


def judge_moves(case: Case, answer: Any) -> Failure | None:
    expected = memory_moves([Continuation(parent, 7, 0.0) for parent in case["parents"]], case["beams"])
    pairs = ", as [old, new]"
    for name, more, right in (
        ("fork", pairs, sorted(map(list, expected.fork))),
        ("keep", pairs, sorted(map(list, expected.keep))),
        ("free", "", sorted(expected.free)),
    ):
        if answer[name] != right:
            return Failure(name + more, str(right), str(answer[name]), _family(case))
    return None


def _family(case: Case) -> str:
    lines = []
    for old in range(case["beams"]):
        children = [str(new) for new, parent in enumerate(case["parents"]) if parent == old]
        lines.append(f"old beam {old}  -->  " + (f"new {', '.join(children)}" if children else "nothing"))
    return "\n".join(lines)


def show_moves(case: Case) -> str:
    return f"memory_moves(continuations of the parents {case['parents']}, num_old={case['beams']})"


def smaller_moves(case: Case) -> Iterator[Case]:
    yield from without(case, "parents")
    if case["beams"] - 1 > max(case["parents"], default=0):
        yield {**case, "beams": case["beams"] - 1}
