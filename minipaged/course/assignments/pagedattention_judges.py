"""Assignment 3: what an answer should be. The reference says it; here is what differs, in words and drawn."""

from typing import Any

import torch

from kernels import reference
from minipaged.course.assignment import Case, Failure
from minipaged.course.inside import drive_pagedattention as drive

TOLERANCE = {"float32": 3e-4, "float16": 5e-3}
BY_PYTORCH = {
    "__matmul__", "matmul", "mm", "bmm", "einsum", "baddbmm", "mul", "__mul__", "exp", "exp2", "softmax", "sum", "dot",
    "scaled_dot_product_attention", "embedding_bag",
}  # fmt: skip
SHOWN = 6  # numbers of a row
WIDEST = 78  # characters of a picture


def judge_write(case: Case, answer: Any) -> Failure | None:
    k, v, cache, slots = drive.to_write(case)
    before = drive.content(cache)
    reference.write_kv(k, v, cache, slots)
    return wrong_block(case, before, drive.content(cache), answer, "after writing")


def judge_move(case: Case, answer: Any) -> Failure | None:
    caches, pairs = drive.to_move(case)
    before = [drive.content(cache) for cache in caches]
    (reference.move_blocks if len(caches) == 2 else reference.copy_blocks)(*caches, *pairs)
    for at, cache in enumerate(caches):
        which = "" if len(caches) == 1 else " of the pool copied from" if at == 0 else " of the pool copied to"
        for layer, (expected, got) in enumerate(zip(drive.content(cache), answer[at], strict=True)):
            if wrong := wrong_block(case, before[at][layer], expected, got, f"of layer {layer}{which}"):
                return wrong
    return None


def wrong_block(case: Case, before: Any, expected: Any, got: Any, where: str) -> Failure | None:
    """Of caches [2, G, N, B, D] as lists."""
    for part, name in enumerate(("keys", "values")):
        for g, (heads, theirs) in enumerate(zip(expected[part], got[part], strict=True)):
            for block, (one, other) in enumerate(zip(heads, theirs, strict=True)):
                if one != other:
                    same = other == before[part][g][block]
                    what = f"{name} of head {g}, block {block} {where}" + (": it is as it was before" if same else "")
                    return Failure(what, brief(one), brief(other), pool_picture(case, expected[part][g], theirs))
    return None


def brief(block: Any) -> str:
    """A block's slots, one line each."""
    lines = [f"offset {at}: {numbers(slot)}" for at, slot in enumerate(block[:4])]
    return "\n".join(lines + ["..."] * (len(block) > 4))


def numbers(row: list[float]) -> str:
    return " ".join(f"{x:g}" if abs(x) >= 1e-3 or x == 0 or x != x else "0.000" for x in row[:SHOWN]) + (
        " ..." if len(row) > SHOWN else ""
    )


def pool_picture(case: Case, expected: Any, got: Any) -> str:
    """One row a block: which slots are as they should be."""
    lines = ["block   slots: . right, ! wrong"]
    for block, (one, other) in enumerate(zip(expected, got, strict=True)):
        marks = "".join(".!"[a != b] for a, b in zip(one, other, strict=True))
        if "!" in marks or len(expected) <= 8:
            lines.append(f"{block:5}   {marks}")
    return "\n".join(lines[:12])


def judge_attention(case: Case, answer: Any) -> Failure | None:
    given = drive.build(case)
    expected = reference.paged_attention(*given)
    if answer["is"] != case["dtype"]:
        return Failure("the answer's dtype is q's", case["dtype"], str(answer["is"]))
    try:
        got = torch.tensor(answer["numbers"], dtype=torch.float32)
    except RuntimeError as error:  # no numbers, or too large ones
        raise ValueError(str(error)) from None
    if got.shape != expected.shape:
        return Failure("the answer's shape is q's, [T, H, D]", str(list(expected.shape)), str(list(got.shape)))
    tolerance = TOLERANCE[case["dtype"]] * (1 + 30 * (abs(case["shift"]) > 1000)) * (1 + case["loud"] / 8)
    near = torch.isclose(got, expected.float(), rtol=tolerance, atol=tolerance).all(-1)
    if near.all():
        return None
    t, head = (int(x) for x in (~near).nonzero()[0])
    s, position = whose(case, t)
    query = f"the query at position {position}" if position >= 0 else "a query that sees no key"
    what = f"row {t}, head {head}: sequence {s}, {query}"
    if got[t, head].isnan().any():
        what += "; NaN came in: from a slot that isn't the context's, or from inf / inf, or inf - inf"
    expected_row, got_row = numbers(expected[t, head].tolist()), numbers(got[t, head].tolist())
    return Failure(what, expected_row, got_row, table_picture(case, s, position))


def whose(case: Case, t: int) -> tuple[int, int]:
    """The sequence of a row of the batch, and the position in it."""
    for s, one in enumerate(case["sequences"]):
        if t < one["new"]:
            return s, one["context"] - one["new"] + t
        t -= one["new"]
    raise ValueError("no such row")


def table_picture(case: Case, s: int, position: int) -> str:
    """The sequence's blocks: which slots the query sees."""
    one, size = case["sequences"][s], case["block_size"]
    if not one["blocks"]:
        return ""
    cells = []
    for logical, block in enumerate(one["blocks"]):
        slots = range(logical * size, (logical + 1) * size)
        seen = "".join("x" if j <= position else "-" if j < one["context"] else "." for j in slots)
        label, width = str(block), max(size, len(str(block)))
        cells.append((label.rjust(width), seen.rjust(width)))
    rows = [f"{name:10}" + " | ".join(cell[at] for cell in cells) for at, name in enumerate(("block", "slots"))]
    legend = "x seen by this query, - in its future, . of nobody (NaN)"
    return "\n".join([row if len(row) <= WIDEST else row[: WIDEST - 4] + " ..." for row in rows] + [legend])


def judge_by_blocks(case: Case, answer: Any) -> Failure | None:
    if wrong := judge_attention(case, answer):
        return wrong
    tokens, heads, size = sum(one["new"] for one in case["sequences"]), case["heads"], case["size"]
    block = heads * case["block_size"]
    sizes = tokens * heads * size, tokens * block, len(case["sequences"]) * block * size
    most = 2 * max(sizes)
    if answer["largest"] <= most:
        return None
    return Failure(
        "right, but a tensor was made that is too large: is a context brought together?",
        f"at most {most} numbers in a tensor: T H D = {sizes[0]}, T H B = {sizes[1]}, S H B D = {sizes[2]}, twice that",
        f"{answer['largest']} numbers",
    )


def judge_together(case: Case, answer: Any) -> Failure | None:
    if wrong := judge_attention(case, answer):
        return wrong
    few, all_of_them = answer["calls"]
    one = {(each["context"], each["new"]) for each in case["sequences"]}
    if len(one) > 1 or one.pop()[1] != 1 or all_of_them <= few + 3:
        return None
    what = f"right, but {len(case['sequences'])} sequences of one context take more calls of PyTorch than 2"
    return Failure(what, f"{few} calls, as for 2", f"{all_of_them} calls")


def judge_triton(case: Case, answer: Any) -> Failure | None:
    if by_pytorch := BY_PYTORCH & set(answer["names"]):
        return Failure("the kernels compute, not PyTorch", "no arithmetic in PyTorch", ", ".join(sorted(by_pytorch)))
    if answer["kept"] is not True:
        return Failure("D numbers of a head are written, and none behind them", "as it was", "changed")
    return judge_attention(case, answer)
