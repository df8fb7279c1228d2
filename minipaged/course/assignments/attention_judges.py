"""What is wrong with an answer in assignment 1. Expected is what the reference makes of the same case."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from minipaged.course.assignment import Case, Failure
from minipaged.course.inside import drive_attention
from minipaged.course.inside.drive_attention import unpacked

# How far two right ways of computing may lie apart: of each number, and of the largest beside it.
TOLERANCE = {"float32": 1e-4, "float16": 6e-3, "bfloat16": 5e-2}
ROUNDED = 0.3  # of a whole model in bf16, of the largest number: only what is grossly wrong
TURNED = 4e-3  # cos and sin of an angle of thousands: fp32 knows such an angle to so many radians


def wrong_at(expected: Tensor, got: Tensor, tolerance: float) -> Tensor:
    """Where numbers differ: NaN only equals NaN."""
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    least = 0.1 * largest if tolerance < ROUNDED else largest
    close = (got - expected).abs() <= tolerance * (expected.abs() + least) + 1e-30
    return ~(close | (expected.isnan() & got.isnan()))


def differing(
    expected: dict[str, Any], got: dict[str, Any], name: str, tolerance: float | None = None,
    picture: Callable[[Tensor], str] = lambda wrong: "",
) -> Failure | None:  # fmt: skip
    """The first thing that is wrong with one tensor: its shape, its dtype, a number."""
    if got["shape"] != expected["shape"]:
        return Failure(f"{name} has the wrong shape", str(expected["shape"]), str(got["shape"]))
    if got["dtype"] != expected["dtype"]:
        return Failure(f"{name} has the wrong dtype", expected["dtype"], got["dtype"])
    right, ours = unpacked(expected), unpacked(got)
    wrong = wrong_at(right, ours, tolerance or TOLERANCE[expected["dtype"]])
    if not wrong.any():
        return None
    place = tuple(wrong.nonzero()[0].tolist())
    what = f"{name}[{', '.join(map(str, place))}] is wrong ({int(wrong.sum())} of {wrong.numel()} numbers are)"
    return Failure(what, _text(right, place), _text(ours, place), picture(wrong))


def _text(tensor: Tensor, place: tuple[int, ...]) -> str:
    """The number, and if it is one of a few, the row in which it stands."""
    row = tensor[place[:-1]] if place else tensor.reshape(1)
    numbers = " ".join(f"{number:.5g}" for number in row.flatten().tolist())
    return f"{float(tensor[place]):.6g}" + (f"   in the row  {numbers}" if 1 < row.numel() <= 8 else "")


def changed(expected: dict[str, Any], got: dict[str, Any], results: tuple[str, ...] = ()) -> Failure | None:
    """Whether something that was only lent has been written to."""
    for name, right in expected.items():
        if name not in results and differing(right, got[name], name, 1e-9):
            return Failure(f"{name}, which was given, has been changed", "what came in stays as it is")
    return None


def judge_formula(
    case: Case, answer: Any, driver: Callable[[Case], Any], picture: Callable[[Tensor], str] = lambda wrong: ""
) -> Failure | None:
    """A result, and what was given."""
    expected = driver(case)
    failure = differing(expected["result"], answer["result"], "the result", picture=picture)
    return failure or changed(expected, answer, ("result",))


def judge_norm(case: Case, answer: Any) -> Failure | None:
    return judge_formula(case, answer, drive_attention.norm)


def judge_frequencies(case: Case, answer: Any) -> Failure | None:
    expected = drive_attention.frequencies(case)
    for name, said, least in ("result", "frequencies", 1e-5), ("cos", "cos", TURNED), ("sin", "sin", TURNED):
        if failure := differing(expected[name], answer[name], said, least):
            return failure
    return changed(expected, answer, ("result", "cos", "sin"))


def judge_turning(case: Case, answer: Any) -> Failure | None:
    return judge_formula(case, answer, drive_attention.turning)


def judge_attention(case: Case, answer: Any) -> Failure | None:
    return judge_formula(case, answer, drive_attention.attention, partial(_mask, case))


def _mask(case: Case, wrong: Tensor) -> str:
    """Who may see whom; and for which queries the answer is wrong."""
    context, first = len(case["keys"][0]), len(case["keys"][0]) - len(case["q"])
    if context > 24:
        return ""
    lines = ["query at  sees the keys at", "          " + " ".join(f"{j:2}" for j in range(context))]
    for i in range(len(case["q"])):
        heads = [h for h, bad in enumerate(wrong[i].any(-1).tolist()) if bad]
        marks = " ".join(" x" if j <= first + i else " ." for j in range(context))
        lines.append(f"{first + i:8}  {marks}" + (f"   <- wrong in heads {heads}" if heads else ""))
    return "\n".join(lines)


def judge_cache(case: Case, answer: Any) -> Failure | None:
    expected = drive_attention.cache(case)
    if case["turn"]:
        for at, (right, ours) in enumerate(zip(expected["q"], answer["q"], strict=True)):
            if failure := differing(right, ours, f"q of step {at}, turned,"):
                return failure
    failure = differing(expected["cache"], answer["cache"], "the cache [2, G, N, B, D]", picture=partial(_slots, case))
    return failure or _steps_changed(expected, answer)


def _steps_changed(expected: dict[str, Any], answer: dict[str, Any]) -> Failure | None:
    found = (changed(*both) for both in zip(expected["given"], answer["given"], strict=True))
    return next(filter(None, found), None)


def _slots(case: Case, wrong: Tensor) -> str:
    """All slots: which token belongs there, and where keys or values are wrong."""
    size = case["block_size"]
    tokens: dict[int, str] = {}
    for at, step in enumerate(case["steps"]):
        tokens |= {slot: f"{at}.{t}" for t, slot in enumerate(step["slots"]) if slot >= 0}
    lines = ["step.token that belongs into each slot; k!, v!: what stands there is wrong"]
    for block in range(min(case["num_blocks"], 12)):
        cells = []
        for offset in range(size):
            bad = wrong[:, :, block, offset].flatten(1).any(1).tolist()
            marks = " k!" * bad[0] + " v!" * bad[1]
            cells.append(f"{tokens.get(block * size + offset, '-') + marks:>10}")
        lines.append(f"block {block:2} |{'|'.join(cells)}|")
    return "\n".join(lines)


def rows_of(step: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Of each row of a step: its sequence, and its position there."""
    for s, start, count in step:
        yield from ((s, p) for p in range(start, start + count))


def _rows(step: list[list[int]], wrong: Tensor) -> str:
    """The flat batch, row by row."""
    if len(wrong) > 30:
        return ""
    bad = wrong.flatten(1).any(1).tolist()
    words = ["wrong" if one else "right" for one in bad]
    lines = [f"{row:4}   {s:8}   {p:8}   {words[row]}" for row, (s, p) in enumerate(rows_of(step))]
    return "\n".join(["row    sequence   position", *lines])


def judge_layer(case: Case, answer: Any) -> Failure | None:
    expected = drive_attention.layer(case)
    names = {"attended": "what `attention` returns", "rows": "x behind the layer,"}
    for at, step in enumerate(case["steps"]):
        for name, said in names.items():
            failure = differing(expected[name][at], answer[name][at], f"step {at}: {said}",
                                picture=partial(_rows, step))  # fmt: skip
            if failure:
                return failure
    failure = differing(expected["cache"], answer["cache"], "the cache [2, G, N, B, D]")
    return failure or _steps_changed(expected, answer)


def judge_model(case: Case, answer: Any) -> Failure | None:
    expected = drive_attention.model(case)
    low = None if case["dtype"] == "float32" else ROUNDED
    for at, step in enumerate(case["steps"]):
        hidden = expected["hidden"][at], answer["hidden"][at]
        failure = differing(*hidden, f"step {at}: hidden", low, partial(_rows, step))
        failure = failure or differing(expected["logits"][at], answer["logits"][at], f"step {at}: the logits", low)
        if failure:
            return failure
    return _steps_changed(expected, answer)


def lines_of(value: Any, name: str) -> str:
    """A small tensor of a case, for a reader."""
    tensor = unpacked(value)
    text = f"{name} {list(tensor.shape)}"
    return f"{text} = {value}" if math.prod(tensor.shape) <= 24 else text


def show(case: Case) -> str:
    """A case of the small parts: all its tensors and settings."""
    tensors = ("x", "weight", "angles", "q", "keys", "values")
    lines = [lines_of(case[name], name) for name in tensors if name in case]
    settings = {name: value for name, value in case.items() if name not in tensors}
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in settings.items())])


def show_cache(case: Case) -> str:
    call = "rope_and_write" if case["turn"] else "write_kv"
    times = "once" if len(case["steps"]) == 1 else f"{len(case['steps'])} times"
    shape = f"N={case['num_blocks']}, B={case['block_size']}, G={case['kv_heads']}, D={case['head_size']}"
    lines = [f"a cache of NaN, {case['dtype']}, {shape}; {call} is called {times}"]
    for at, step in enumerate(case["steps"]):
        lines.append(f"step {at}: slot_mapping = {step['slots']}")
        lines += [f"    {lines_of(step[name], name)}" for name in ("q", "k", "v", "angles")]
    return "\n".join(lines)


def show_steps(case: Case) -> str:
    config = case["config"]
    sizes = {"L": "num_hidden_layers", "E": "hidden_size", "H": "num_attention_heads", "G": "num_key_value_heads",
             "D": "head_dim"}  # fmt: skip
    settings = ", ".join(f"{symbol}={config[name]}" for symbol, name in sizes.items())
    lines = [f"a {config['model_type']} of random weights, {case['dtype']}: {settings}, eps={config['rms_norm_eps']}"]
    for at, step in enumerate(case["steps"]):
        said = [f"sequence {s} computes positions {p} to {p + n - 1}" for s, p, n in step]
        lines.append(f"step {at}: {'; '.join(said)}")
    if "tokens" in case:
        used = sorted({s for step in case["steps"] for s, _, _ in step})
        lines += [f"tokens of sequence {s}: {case['tokens'][s][:20]}" for s in used]
    return "\n".join(lines)
