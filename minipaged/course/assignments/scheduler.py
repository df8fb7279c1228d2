"""Assignment 4: the scheduler."""

from minipaged.course.assignment import Assignment, Part
from minipaged.course.assignments import scheduler_cases as cases
from minipaged.course.assignments import scheduler_judges as judges
from minipaged.course.assignments import scheduler_parts as parts

SCHEDULER = "minipaged/scheduling/scheduler.py"
PLAN = "minipaged/scheduling/plan.py"
ADMISSION = "minipaged/scheduling/admission.py"
PREEMPTION = "minipaged/scheduling/preemption.py"
GROWTH = "minipaged/scheduling/growth.py"

HARMLESS = {
    "Admission._has_to_wait: return request not in self._queues.swapped and todo > step.short and "
    "(step.grant(todo) < 1) -> return request not in self._queues.swapped and todo >= step.short and "
    "(step.grant(todo) < 1)":
        "of no more than `short` all that is spare is granted, and that is 1 at least",
    "LiveSequences._append: for one, tokens in zip([seq, *children], rows, strict=True):"
    " -> for one, tokens in zip([seq, *children], rows, strict=False):":
        "there are as many sequences as rows",
    "Scheduler._preempt: request.load = None -> pass":
        "blocks from other engines are no part of the assignment",
    "share_rebuilt_prompt: if all((seq.in_memory for seq in others)) or leader.num_computed_tokens != "
    "len(request.prompt_token_ids): -> if any((seq.in_memory for seq in others)) or leader.num_computed_tokens != "
    "len(request.prompt_token_ids):":
        "of the others all are in memory or none; and who is alone has found all that there is when it came in",
}  # fmt: skip

ASSIGNMENT = Assignment(
    number=4,
    title="The scheduler",
    parts=(
        Part(
            "say no early", 6, SCHEDULER, ("Scheduler._check_size",), "refuse", parts.refuse_cases,
            judges.judge_refusal, smaller=parts.smaller_refusal, show=parts.show_refusal, num_cases=60,
        ),
        Part(
            "the budget", 18, PLAN, ("Step.counts_of", "Step.grant", "Step.take"), "share", parts.share_cases,
            judges.judge_share, helpers=("Step._is_long",), smaller=parts.smaller_share, show=parts.show_share,
            num_cases=120,
        ),
        Part(
            "admission", 22, ADMISSION,
            ("Admission.let_in", "Admission._has_to_wait", "Admission._first_chunk", "Admission._start",
             "Admission._keep_free", "Admission._find"),
            "serve", cases.admit_cases, judges.judge_server, smaller=cases.smaller_server, show=cases.show_server,
            num_cases=120,
        ),
        Part(
            "running", 20, SCHEDULER,
            ("Scheduler._continue_running", "Scheduler._preempt", "Scheduler._scheduled", "Scheduler._count_computed"),
            "serve", cases.run_cases, judges.judge_server, smaller=cases.smaller_server, show=cases.show_server,
            num_cases=90,
        ),
        Part(
            "making way", 14, PREEMPTION, ("preempt", "share_rebuilt_prompt"), "serve", cases.make_way_cases,
            judges.judge_server, smaller=cases.smaller_server, show=cases.show_server, num_cases=40,
        ),
        Part(
            "coming back", 8, ADMISSION, ("Admission._resume",), "serve", cases.resume_cases, judges.judge_server,
            smaller=cases.smaller_server, show=cases.show_server, num_cases=40,
        ),
        Part(
            "tokens", 12, GROWTH,
            ("LiveSequences._append", "LiveSequences._append_tokens", "LiveSequences._forget"),
            "grow", parts.grow_cases, judges.judge_growth, smaller=parts.smaller_grow, show=parts.show_grow,
            num_cases=150,
        ),
    ),
    chapters=(10, 11, 12),
    hours="8 to 10",
    harmless=HARMLESS,
)  # fmt: skip
