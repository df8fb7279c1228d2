"""Assignment 4: the scheduler."""

from minipaged.course.assignment import Assignment, Part
from minipaged.course.assignments import scheduler_cases as cases
from minipaged.course.assignments import scheduler_judges as judges

SCHEDULER = "minipaged/scheduling/scheduler.py"
PLAN = "minipaged/scheduling/plan.py"
ADMISSION = "minipaged/scheduling/admission.py"
PREEMPTION = "minipaged/scheduling/preemption.py"
GROWTH = "minipaged/scheduling/growth.py"

ASSIGNMENT = Assignment(
    number=4,
    title="The scheduler",
    parts=(
        Part(
            "say no early", 6, SCHEDULER, ("Scheduler._check_size",), "refuse", cases.refuse_cases,
            judges.judge_refusal, smaller=cases.smaller_refusal, show=cases.show_refusal, num_cases=60,
        ),
        Part(
            "the budget", 18, PLAN, ("Step.counts_of", "Step.grant", "Step.take"), "share", cases.share_cases,
            judges.judge_share, helpers=("Step._is_long",), smaller=cases.smaller_share, show=cases.show_share,
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
            smaller=cases.smaller_server, show=cases.show_server, num_cases=30,
        ),
        Part(
            "tokens", 12, GROWTH,
            ("LiveSequences._append", "LiveSequences._append_tokens", "LiveSequences._forget"),
            "grow", cases.grow_cases, judges.judge_growth, smaller=cases.smaller_grow, show=cases.show_grow,
            num_cases=150,
        ),
    ),
    chapters=(10, 11, 12),
    hours="8 to 10",
    harmless={},
)  # fmt: skip
