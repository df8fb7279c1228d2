"""The command `python -m minipaged.course`: for students start, check, generate; the others are for instructors."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from minipaged.course.assignment import TITLES, Assignment, load
from minipaged.course.process import NotStarted
from minipaged.course.starter import StarterError, start, started
from minipaged.terminal.command import EPILOG, BadInput, CommandFailed, Parser, run
from minipaged.terminal.engine_flags import count

PROGRAM = "python -m minipaged.course"
DESCRIPTION = """\
An engine in six assignments. For a student:

  start 2 my-work/             a folder with assignment 2: the package, in which parts
                               are yours to write, its tests and a handout
  check my-work/               which parts work, and the smallest case that fails
  contest my-work/             assignment 6: your engine beside the reference
  generate my-work/ "Hello"    the real model runs on what is there

For an instructor, see also minipaged/course/INSTRUCTORS.md:

  grade DIR ... --assignment 2 --seed WORD --out results/
  autograder 2 --seed WORD     a zip for Gradescope
  classroom 2                  a workflow for GitHub Classroom
  contest DIR ... --seed WORD  the same with a hidden load, and a leaderboard
  mutants 2                    what the tests find of one-line faults of the reference"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit status: see the end of --help."""

    def work() -> int:
        args, rest = _parser().parse_known_args(argv)
        if rest and args.command != "generate":
            raise BadInput(f"unrecognized arguments: {' '.join(rest)} (--help tells of all options)")
        try:
            return COMMANDS[args.command](args) if args.command != "generate" else _generate(args, rest)
        except StarterError as error:
            raise BadInput(str(error)) from None
        except NotStarted as error:
            raise CommandFailed(f"no process for a student's code could be made ready here: {error}") from None

    return run("minipaged.course", work)


def _start(args: argparse.Namespace) -> int:
    files = start(args.number, args.folder)
    if not files:
        print(f"{args.folder} is ready. Read {args.folder / f'assignment-{args.number}.md'}; all of src/ is yours,")
        print(f"and `{PROGRAM} contest {args.folder}` lets it play.")
        return 0
    print(f"{args.folder} is ready. Read {args.folder / f'assignment-{args.number}.md'}; what you write is in")
    for file in files:
        print(f"  {file}")
    print(f"and `{PROGRAM} check {args.folder}` says how far you are.")
    return 0


def _check(args: argparse.Namespace) -> int:
    from minipaged.course.checking import PUBLIC_SEED, check
    from minipaged.course.report import print_result
    from minipaged.course.running import made_whole
    from minipaged.course.submission import read

    numbers = started(args.folder)
    assignment = _assignment(args.assignment or numbers[-1])
    if assignment.number not in numbers:
        raise BadInput(f"assignment {assignment.number} was not started in {args.folder}: {_list(numbers)} was")
    if not assignment.parts:
        raise BadInput(f"assignment {assignment.number} has no parts; it is played: `{PROGRAM} contest {args.folder}`")
    submission = read(args.folder, assignment)
    earlier = [number for number in numbers if number < assignment.number] if args.mine else []
    changed, _, missing = made_whole(args.folder, earlier)
    if args.mine:
        print(f"with your own assignments {_list(earlier) or '(none was started here)'}", file=sys.stderr)
        if missing:
            print(f"the reference's, since you haven't written them: {', '.join(missing)}", file=sys.stderr)
    console = Console(highlight=False)
    seed = PUBLIC_SEED if args.seed is None else args.seed
    with Console(stderr=True).status("starting") as status:
        result = check(
            submission, assignment, seed, changed=changed, doctests=True,
            notice=lambda part: status.update(f"trying {part}"),
        )  # fmt: skip
    print_result(result, assignment, console)
    return 0 if result.points == assignment.points else 1


def _generate(args: argparse.Namespace, rest: list[str]) -> int:
    from minipaged.course.running import generate

    return generate(args.folder, started(args.folder), rest)


def _grade(args: argparse.Namespace) -> int:
    from minipaged.course.commands import grade

    assignment = _assignment(args.assignment)
    if not assignment.parts:
        raise BadInput(f"assignment {assignment.number} is played, not graded: see `{PROGRAM} contest --help`")
    return grade(args, assignment)


def _contest(args: argparse.Namespace) -> int:
    from minipaged.course.commands import folders_of, seed_of
    from minipaged.course.contest.command import PUBLIC_SEED, play

    hidden = args.seed is not None or args.seed_file is not None
    return play(args, folders_of(args), seed_of(args) if hidden else PUBLIC_SEED)


def _autograder(args: argparse.Namespace) -> int:
    from minipaged.course.autograder import gradescope
    from minipaged.course.commands import seed_of

    out = args.out or Path(f"autograder-{args.number}.zip")
    out.write_bytes(gradescope(_assignment(args.number), seed_of(args)))
    print(f"{out} is an autograder for Gradescope. The seed is in it: keep it.")
    return 0


def _classroom(args: argparse.Namespace) -> int:
    from minipaged.course.autograder import classroom

    text = classroom(_assignment(args.number))
    if args.out is None:
        print(text, end="")
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out} is for GitHub Classroom. It asks for the secret COURSE_SEED and the variable COURSE_REPOSITORY.")
    return 0


def _mutants(args: argparse.Namespace) -> int:
    from minipaged.course.commands import mutants

    return mutants(args, _assignment(args.number))


def _assignment(number: int) -> Assignment:
    if number not in TITLES:
        raise BadInput(f"there is no assignment {number}: {_list(list(TITLES))} are")
    return load(number)


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        said = f"{text[0].upper()}{text[1:]}."
        return commands.add_parser(name, help=text, description=said, epilog=EPILOG, allow_abbrev=False)

    one = add("start", "write a folder with an assignment")
    one.add_argument("number", type=int, choices=TITLES, metavar="N", help="1 to 6")
    one.add_argument("folder", type=Path, metavar="FOLDER", help="a new one, or one that an assignment was started in")
    one = add("check", "say which parts work; exit status 1 if one does not")
    one.add_argument("folder", type=Path, metavar="FOLDER")
    one.add_argument("--assignment", type=int, metavar="N", help="default: the one that was started last")
    one.add_argument("--mine", action="store_true", help="use your own earlier assignments instead of the reference")
    one.add_argument("--seed", metavar="WORD", help="other cases than the usual ones")
    one = add("generate", "let the real model answer with what is there")
    one.add_argument("folder", type=Path, metavar="FOLDER")
    one.epilog = f"Everything behind the folder goes to python -m minipaged.generate. {EPILOG}"
    one = add("grade", "give points to submissions: folders, as students hand them in")
    one.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    one.add_argument("--assignment", type=int, required=True, metavar="N")
    one.add_argument("--each", action="store_true", help="every folder in DIR is a submission, instead of DIR itself")
    add_seed(one)
    one.add_argument("--out", type=Path, default=Path("results"), metavar="FOLDER", help="default: results")
    one.add_argument("--jobs", type=count, metavar="N", help="submissions at a time (default: as many as processors)")
    one.add_argument("--gradescope", type=Path, metavar="FILE", help="a single one's results.json goes here, too")
    one.add_argument("--unlocked", action="store_true", help="run strangers' code also where it can't be locked in")
    one = add("contest", "let engines, assignment 6, play beside the reference; exit status 1 if one is wrong")
    one.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    one.add_argument("--each", action="store_true", help="every folder in DIR is a submission, instead of DIR itself")
    add_seed(one, required=False, of="the load: keep it (default: a public one); the same gives the same requests")
    one.add_argument("--rounds", type=count, default=3, metavar="N", help="that count, after the first (default: 3)")
    one.add_argument("--model", default="smollm2", metavar="PATH", help="a folder or a .gguf file (default: smollm2)")
    one.add_argument("--threads", type=count, metavar="N", help="of both (default: as many as processors)")
    one.add_argument("--out", type=Path, metavar="FILE", help="JSON: the leaderboard, and the figures of all rounds")
    one.add_argument("--unlocked", action="store_true", help="run strangers' code also where it can't be locked in")
    one = add("autograder", "write a zip for Gradescope, without Docker")
    one.add_argument("number", type=int, choices=TITLES, metavar="N")
    add_seed(one)
    one.add_argument("--out", type=Path, metavar="FILE", help="default: autograder-N.zip")
    one = add("classroom", "write a workflow for GitHub Classroom")
    one.add_argument("number", type=int, choices=TITLES, metavar="N")
    one.add_argument("--out", type=Path, metavar="FILE", help=".github/workflows/classroom.yml, say; default: print it")
    one = add("mutants", "try the course's tests on one-line faults of the reference, made by machine")
    one.add_argument("number", type=int, choices=TITLES, metavar="N")
    one.add_argument("--jobs", type=count, metavar="N", help="at a time (default: as many as processors)")
    return parser


def add_seed(
    parser: argparse.ArgumentParser, required: bool = True,
    of: str = "the hidden cases: keep it; the same gives the same points",
) -> None:  # fmt: skip
    seed = parser.add_mutually_exclusive_group(required=required)
    seed.add_argument("--seed", metavar="WORD", help=f"of {of}")
    seed.add_argument("--seed-file", type=Path, metavar="FILE", help="a file that has it")


COMMANDS = {
    "start": _start, "check": _check, "grade": _grade, "autograder": _autograder, "classroom": _classroom,
    "contest": _contest, "mutants": _mutants,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
