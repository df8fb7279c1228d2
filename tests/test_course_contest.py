"""The contest: right answers stand, wrong ones don't, whatever a submission does. No test here says how fast it is.

All submissions but the first play one round after the first, beside one reference.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tiny_model import make_folder

from minipaged.course.__main__ import main
from minipaged.course.assignment import load
from minipaged.course.contest import command
from minipaged.course.contest.load import KINDS, Sizes, draw
from minipaged.course.contest.playing import Contest, Round, Standing, leaderboard
from minipaged.course.contest.points import points_of, standing_of
from minipaged.course.contest.process import Figures
from minipaged.course.contest.tree import Unfit, build_library, build_tree
from minipaged.course.process import missing
from minipaged.course.submission import ROOT, reference

SIZES = Sizes(requests=8, scale=0.15, num_blocks=96)
LLM = "minipaged/llm.py"
locked_in = pytest.mark.skipif(bool(missing()), reason="; ".join(missing()))
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    model = make_folder(tmp_path_factory.mktemp("model"))
    with Contest("a secret", str(model), locked=not missing(), sizes=SIZES, threads=1, patience=10.0) as contest:
        yield contest


def submission(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "src" / name).write_text(text)
    return folder


def with_step(lines: str) -> dict[str, str]:
    """The package with an LLM whose step is another one."""
    body = "".join(f"        {line}\n" for line in lines.splitlines())
    return {LLM: f"{reference(LLM)}\n\nTheirs = LLM\n\n\nclass LLM(Theirs):\n    def step(self):\n{body}"}


def play(beside, folder, files, rounds=1) -> Standing:
    return beside.play(submission(folder, files), rounds)


@needs_compiler
def test_the_package_as_it_is_is_right(beside, tmp_path):
    standing = play(beside, tmp_path, {LLM: reference(LLM) + "\n# mine\n"}, rounds=2)
    assert standing.faults == [] and standing.points >= 40
    assert set(standing.ratios) == {"speed", "first", "late", "blocks", "memory"}
    assert all(ratio > 0 for ratio in standing.ratios.values())
    assert [one.number for one in standing.rounds] == [1, 2]
    for one in standing.rounds:
        assert one.yours.tokens == one.reference.tokens
        assert all(one.yours.tokens) and len(one.yours.first) == SIZES.requests
        assert 0 < one.yours.mean_first <= one.yours.seconds and min(one.yours.first) > 0
        assert one.yours.blocks > 0


@needs_compiler
def test_several_threads_do_not_begin_before_the_locks(tmp_path):
    model = make_folder(tmp_path / "model")
    with Contest("a secret", str(model), locked=not missing(), sizes=SIZES, threads=2) as contest:
        assert all(contest.first.tokens)


@needs_compiler
def test_answers_all_at_the_end_are_right_too(beside, tmp_path):
    lines = "last = {}\nwhile self.has_unfinished_requests:\n    last |= {o.request_id: o for o in super().step()}\n"
    standing = play(beside, tmp_path, with_step(lines + "return list(last.values())"))
    assert standing.faults == [] and standing.points >= 40


MEMORY = """
known = self.__dict__.setdefault("known", {})
outputs = super().step()
for output in outputs:
    tokens = output.outputs[0].token_ids
    if len(known.get(output.request_id, [])) >= len(tokens) and output.request_id in self.__dict__.get("ended", ()):
        output.outputs[0].token_ids = known[output.request_id][:len(tokens)]
    else:
        known[output.request_id] = list(tokens)
    if output.finished:
        self.__dict__.setdefault("ended", set()).add(output.request_id)
return outputs
"""
CHEATS = {
    "wrong tokens": (
        "outputs = super().step()\n"
        "for output in outputs:\n"
        "    output.outputs[0].token_ids = [7] * len(output.outputs[0].token_ids)\n"
        "return outputs",
        "where the reference has token",
    ),
    "ends too early": (
        "outputs = super().step()\n"
        "for output in outputs:\n"
        "    if not output.finished:\n"
        "        self.abort(output.request_id)\n"
        "    output.finished = True\n"
        "return outputs",
        "comes its end",
    ),
    "more tokens than asked for": (
        "outputs = super().step()\n"
        "for output in outputs:\n"
        "    output.outputs[0].token_ids += [7] * 99\n"
        "return outputs",
        "has 1",
    ),
    "the first round's answers": (MEMORY, "round 1, request"),
    "ends": ("import os\nos._exit(3)", "ended the process, with status 3"),
    "raises": ("raise OverflowError('too much')", "OverflowError: too much"),
    "hangs": ("import time\ntime.sleep(1000)", "weren't answered in"),
    "says what isn't asked": (
        "import os\n"
        "for handle in range(3, 20):\n"
        "    try:\n"
        "        os.write(handle, b'{\"id\": 99, \"new\": [1], \"end\": true}\\n')\n"
        "    except OSError:\n"
        "        pass\n"
        "return super().step()",
        "nothing such was asked",
    ),
    "says no JSON": (
        "import os\n"
        "for handle in range(3, 20):\n"
        "    try:\n"
        "        os.write(handle, b'done\\n')\n"
        "    except OSError:\n"
        "        pass\n"
        "return super().step()",
        "what came was no answer",
    ),
    "floods": (
        "import os\n"
        "while True:\n"
        "    for handle in range(3, 20):\n"
        "        try:\n"
        "            os.write(handle, b'x' * 100000)\n"
        "        except OSError:\n"
        "            pass\n",
        "no answer",
    ),
    "imports the course": ("import minipaged.course", "ModuleNotFoundError: No module named 'minipaged.course'"),
}


@needs_compiler
@pytest.mark.parametrize("name", CHEATS)
def test_nothing_but_right_answers_gets_points(name, beside, tmp_path):
    lines, fault = CHEATS[name]
    standing = play(beside, tmp_path, with_step(lines.strip()))
    assert standing.points == 0
    assert fault in standing.faults[0]


@needs_compiler
@locked_in
def test_the_reference_can_not_be_read(beside, tmp_path):
    standing = play(beside, tmp_path, with_step(f"open({str(ROOT / LLM)!r})"))
    assert standing.points == 0 and "PermissionError" in standing.faults[0]


@needs_compiler
def test_a_model_that_is_read_no_more_goes_on(beside, tmp_path):
    """The reference is none the worse for all that has played beside it."""
    assert play(beside, tmp_path, {LLM: reference(LLM) + "\n# mine\n"}).faults == []


# --- the tree and its library ---------------------------------------------------------------------------------------


def test_a_tree_is_the_reference_with_what_was_changed(tmp_path):
    secret = tmp_path / "secret.py"
    secret.write_text("SECRET = 1")
    folder = submission(tmp_path / "mine", {LLM: "MINE = 1", "minipaged/idea/__init__.py": "", "other/file.py": ""})
    (folder / "src/minipaged/link.py").symlink_to(secret)
    (folder / "src/minipaged/linked").symlink_to(tmp_path)
    build_tree(tmp_path / "tree", load(6), folder)
    tree = tmp_path / "tree"
    assert (tree / LLM).read_text() == "MINE = 1" and (tree / "minipaged/idea/__init__.py").is_file()
    assert (tree / "minipaged/engine.py").read_text() == reference("minipaged/engine.py")
    for absent in ("other", "minipaged/link.py", "minipaged/linked", "minipaged/course"):
        assert not (tree / absent).exists()


@pytest.mark.parametrize(
    ("files", "fault"),
    [({"file.py": ""}, "neither minipaged nor kernels"), ({"minipaged/table.bin": "x" * (5 << 20)}, "more than 4 MiB")],
)
def test_what_can_not_take_part_is_told_why(files, fault, tmp_path):
    with pytest.raises(Unfit, match=fault):
        build_tree(tmp_path / "tree", load(6), submission(tmp_path / "mine", files))


@needs_compiler
def test_c_plus_plus_is_built(tmp_path):
    cpu = tmp_path / "kernels/cpu"
    cpu.mkdir(parents=True)
    (cpu / "mine.cpp").write_text('#include <vector>\nextern "C" int one() { return std::vector<int>{1}[0]; }\n')
    assert build_library(tmp_path, tmp_path / "library", locked=not missing()).is_file()


@needs_compiler
@locked_in
def test_a_compiler_reads_nothing_of_others(tmp_path):
    secret, tree = tmp_path / "secret.h", tmp_path / "tree"
    secret.write_text('#error "the secret"\n')
    (tree / "kernels/cpu").mkdir(parents=True)
    (tree / "kernels/cpu/mine.cpp").write_text(f'#include "{secret}"\n')
    with pytest.raises(Unfit, match="can't be built") as raised:
        build_library(tree, tmp_path / "library", locked=True)
    assert "the secret" not in str(raised.value)


# --- the load and the points ----------------------------------------------------------------------------------------


def test_a_load_is_drawn_from_its_seed():
    sizes = Sizes()
    asks = draw("a", 1, sizes)
    assert asks == draw("a", 1, sizes)
    assert len(asks) == sizes.requests and asks[0].at == 0 and asks[-1].at < 1
    assert [ask.at for ask in asks] == sorted(ask.at for ask in asks)
    assert {ask.kind for ask in asks} == set(KINDS)
    texts = [ask.text for seed in "ab" for number in range(5) for ask in draw(seed, number, sizes)]
    assert len(set(texts)) == len(texts) and all(text.isascii() for text in texts)


def test_questions_of_a_round_begin_alike():
    one, two = ([ask.text for ask in draw("a", number, Sizes()) if ask.kind == "question"] for number in (1, 2))
    assert len({text[:200] for text in one}) == 1 and one[0][:200] != two[0][:200]


FIGURES = Figures([[1] * 10] * 10, [float(number) for number in range(1, 11)], 50.0, 40, 1000)


def test_figures_are_of_all_requests():
    assert (FIGURES.speed, FIGURES.mean_first, FIGURES.late_first) == (2.0, 5.5, 9.0)


def test_medians_stand():
    rounds = [
        Round(number, dataclasses.replace(FIGURES, seconds=seconds), FIGURES)
        for number, seconds in enumerate((50.0, 25.0, 1.0), 1)
    ]
    standing = standing_of("me", rounds, [])
    assert standing.ratios == {"speed": 2.0, "first": 1.0, "late": 1.0, "blocks": 1.0, "memory": 1.0}
    assert standing.points == 70
    assert standing_of("me", rounds, ["wrong"]).points == 0
    assert standing_of("me", [], []).points == 0


def test_who_takes_too_much_memory_has_the_base():
    one = Round(1, dataclasses.replace(FIGURES, seconds=10.0, memory=1600), FIGURES)
    standing = standing_of("me", [one], [])
    assert standing.points == 40 and "1.60 times the reference's memory" in standing.faults[0]


def test_what_got_worse_costs_what_was_gained():
    ratios = {"speed": 1.275, "first": 1.0, "late": 1.0}
    assert points_of(ratios) == 55
    assert points_of({**ratios, "late": 0.5}) == 45
    assert points_of({"speed": 0.1, "first": 0.1, "late": 0.1}) == 40


def test_the_leaderboard_has_the_best_first():
    ratios = {"speed": 1.234, "first": 1.0, "late": 1.0, "blocks": 1.0, "memory": 1.0}
    rows = leaderboard([
        Standing("c", 0, faults=["it ended\nTraceback"]), Standing("b", 50, ratios),
        Standing("a", 50, {**ratios, "speed": 1.3}),
    ])  # fmt: skip
    assert [(row["place"], row["name"], row["points"]) for row in rows] == [(1, "a", 50), (2, "b", 50), (3, "c", 0)]
    assert rows[1]["speed"] == 1.23 and rows[2]["speed"] is None and rows[2]["fault"] == "it ended"


def test_the_command_tells_and_writes_what_came_of_it(tmp_path, monkeypatch, capsys):
    asked = []

    def fake(folder, seed, rounds, model, **options):
        asked.append((folder.name, seed, rounds, model))
        one = [Round(1, dataclasses.replace(FIGURES, seconds=25.0), FIGURES)] if folder.name == "good" else []
        return standing_of("someone", one, [] if one else ["it ended"])

    monkeypatch.setattr(command, "contest", fake)
    for name in ("good", "bad"):
        (tmp_path / "all" / name).mkdir(parents=True)
    out = tmp_path / "out.json"
    status = main(["contest", str(tmp_path / "all"), "--each", "--seed", "x", "--unlocked", "--out", str(out)])
    assert status == 1 and asked == [("bad", "x", 3, "smollm2"), ("good", "x", 3, "smollm2")]
    told, written = capsys.readouterr(), json.loads(out.read_text())
    assert "good" in told.out and "70" in told.out and "bad: it ended" in told.err
    assert [(row["name"], row["points"]) for row in written["leaderboard"]] == [("good", 70), ("bad", 0)]
    assert written["rounds"]["good"][0]["yours"]["tokens_per_second"] == 4.0 and written["rounds"]["bad"] == []
    assert main(["contest", str(tmp_path / "all" / "good"), "--rounds", "1"]) == 0
    assert asked[-1] == ("good", "public", 1, "smollm2")


def test_assignment_6_is_started_whole_and_played(tmp_path, capsys):
    folder = tmp_path / "work"
    assert main(["start", "6", str(folder)]) == 0
    assert (folder / "src" / LLM).read_text() == reference(LLM)
    assert "{" + "parts}" not in (folder / "assignment-6.md").read_text()
    for words in (["check", str(folder)], ["grade", str(folder), "--assignment", "6", "--seed", "x"]):
        assert main(words) != 0
        assert "contest" in capsys.readouterr().err
    build_tree(tmp_path / "tree", load(6), folder)
    assert (tmp_path / "tree" / LLM).is_file()
