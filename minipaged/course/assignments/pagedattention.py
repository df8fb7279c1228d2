"""Assignment 3: PagedAttention."""

from minipaged.course.assignment import Assignment, Part
from minipaged.course.assignments import pagedattention_cases as cases
from minipaged.course.assignments import pagedattention_judges as judges

REFERENCE = "kernels/reference.py"
TORCH = "kernels/torch_attention.py"
TRITON = "kernels/triton_attention.py"
COLUMNS = "of values, columns from D on are nobody's: what is in them is never stored"
SCORES = "of keys or their scales more is loaded, and the score that it makes is masked"
ENTRIES = "an entry of the page table more is loaded, and what it says isn't used"

ASSIGNMENT = Assignment(
    number=3,
    title="PagedAttention",
    parts=(
        Part(
            "write into slots", 8, REFERENCE, ("write_slots",), "write", cases.write_cases, judges.judge_write,
            smaller=cases.smaller_writes, show=cases.show_write, num_cases=30,
        ),
        Part(
            "copy and move blocks", 8, REFERENCE, ("copy_blocks", "move_blocks"), "move", cases.move_cases,
            judges.judge_move, smaller=cases.smaller_moves, show=cases.show_move, num_cases=30,
        ),
        Part(
            "attention through page tables", 20, REFERENCE, ("paged_attention",), "attention", cases.attention_cases,
            judges.judge_attention, smaller=cases.smaller_batches, show=cases.show_batch, num_cases=50,
        ),
        Part(
            "online softmax", 22, REFERENCE, ("paged_attention_by_blocks",), "by_blocks", cases.by_blocks_cases,
            judges.judge_by_blocks, smaller=cases.smaller_batches, show=cases.show_batch, num_cases=50,
        ),
        Part(
            "many sequences at once", 16, TORCH, ("AttentionPlan._bucket", "_decode"), "together",
            cases.together_cases, judges.judge_together, smaller=cases.smaller_batches, show=cases.show_batch,
            num_cases=50,
        ),
        Part(
            "a tile of keys in Triton", 18, TRITON, ("_attend",), "in_triton", cases.attend_cases,
            judges.judge_triton, smaller=cases.smaller_batches, show=cases.show_batch, num_cases=12, seconds=30,
            needs=("triton",),
        ),
        Part(
            "merging splits in Triton", 8, TRITON, ("_merge_kernel",), "in_triton", cases.merge_cases,
            judges.judge_triton, smaller=cases.smaller_batches, show=cases.show_batch, num_cases=8, seconds=30,
            needs=("triton",),
        ),
    ),
    chapters=(6, 7),
    hours="7 to 10",
    imports=("torch", "triton", "triton.language"),
    environment={"TRITON_INTERPRET": "1"},
    generate=("--kernels", "torch"),
    memory=6 << 30,
    harmless={
        "AttentionPlan._bucket: width = -(-int(contexts.max()) // self.block_size) -> "
        "width = -(-int(contexts.max()) * self.block_size)": "wider than need be; what lies beyond is masked anyhow",
        "_decode: values.masked_fill_(bucket.beyond.transpose(1, 2), 0) -> "
        "values.masked_fill_(bucket.beyond.transpose(1, 2), 1)": "any number will do: its weight is 0",
        "_attend: block = _load(table + j // B, j < end, not MASKED).to(tl.int64) -> "
        "block = _load(table + j // B, j <= end, not MASKED).to(tl.int64)": ENTRIES,
        "_attend: block = _load(table + j // B, j < end, not MASKED).to(tl.int64) -> "
        "block = _load(table + j // B, j < end, not not MASKED).to(tl.int64)": ENTRIES,
        "_attend: products *= _load(key_scales + scale, j < end, not MASKED)[None, :] -> "
        "products *= _load(key_scales + scale, j <= end, not MASKED)[None, :]": SCORES,
        "_attend: products *= _load(key_scales + scale, j < end, not MASKED)[None, :] -> "
        "products *= _load(key_scales + scale, j < end, not not MASKED)[None, :]": SCORES,
        "_attend: k = _load(keys + numbers, inside, not MASKED and D == D_PAD).to(q.dtype) -> "
        "k = _load(keys + numbers, inside, not not MASKED and D == D_PAD).to(q.dtype)": SCORES,
        "_attend: v = _load(values + numbers, inside, not MASKED and D == D_PAD) -> "
        "v = _load(values + numbers, inside, not MASKED)": COLUMNS,
        "_attend: v = _load(values + numbers, inside, not MASKED and D == D_PAD) -> "
        "v = _load(values + numbers, inside, not MASKED and D != D_PAD)": COLUMNS,
        "_merge_kernel: filled = (z > 0)[:, None] & (d < D)[None, :] -> "
        "filled = (z > 0)[:, None] & (d <= D)[None, :]": COLUMNS,
        "_merge_kernel: merged = tl.sum(weight[:, None] * o, 0) / tl.where(total > 0, total, 1.0) -> "
        "merged = tl.sum(weight[:, None] * o, 0) / tl.where(total > 1, total, 1.0)":
            "a total that isn't 0 is at least 1: the largest score counts 2^0",
    },
)  # fmt: skip
