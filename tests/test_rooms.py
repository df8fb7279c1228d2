"""The house stands as its plan says: which room may know of which, read from the imports themselves."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# room -> the rooms that it may import, besides itself. The order is from the ground up.
MAY_IMPORT = {
    "kernels": set(),
    "memory": set(),
    "requests": set(),
    "decoding": {"requests"},
    "scheduling": {"memory", "requests", "decoding"},
    "text": {"requests", "decoding"},
    "models": {"kernels", "text"},
    "execution": {"kernels", "memory", "requests", "decoding", "scheduling", "models"},
    "engine": {"kernels", "memory", "requests", "decoding", "scheduling", "text", "models", "execution"},
}  # fmt: skip
ENGINE = {*MAY_IMPORT}
MAY_IMPORT |= {
    "llm": ENGINE,
    "training": ENGINE | {"llm"},
    "quantization": ENGINE | {"llm"},
    "terminal": ENGINE | {"llm"},
    "viewer": ENGINE | {"llm", "terminal"},
    "generate": ENGINE | {"llm", "terminal", "viewer"},
    "async_llm": ENGINE,
    "server": ENGINE | {"async_llm", "terminal", "viewer"},
    "routing": {"terminal", "server"},
    "route": {"terminal", "server", "routing"},
    "serve": ENGINE | {"async_llm", "terminal", "server", "routing"},
    "train_head": ENGINE | {"llm", "terminal", "training"},
    "quantize": ENGINE | {"terminal", "quantization"},
    "perplexity": ENGINE | {"terminal", "quantization"},
    "trace": {"terminal", "viewer"},
    "bench": ENGINE | {"llm"},
    "course": ENGINE | {"llm", "terminal", "quantization"},  # whose texts it asks about
    "teaching": {"memory"},
    "experiments": ENGINE | {"llm", "viewer", "teaching", "bench", "routing"},
}
NO_TENSORS = ("memory", "requests", "scheduling")  # nor what they import
TENSORS = {"torch", "numpy", "triton", "einops"}


def sources() -> dict[str, str]:
    """Module name -> source, of everything that is installed."""
    files = [file for folder in ("kernels", "minipaged") for file in (ROOT / folder).rglob("*.py")]
    return {module_name(file): file.read_text(encoding="utf-8") for file in files}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "kernels" or len(parts) == 1 else parts[1]


def imports(source: str, known: dict[str, str]) -> set[str]:
    """What a source imports, wherever in it: at the top, in a function, for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in inner}
    return found


def faults(known: dict[str, str]) -> list[str]:
    """All imports that the plan of the house does not have, in words."""
    edges = {module: imports(source, known) for module, source in known.items()}
    said = []
    for module, targets in edges.items():
        if module == "minipaged":
            continue  # the front door: it imports when it is asked
        for target in targets:
            if target.split(".")[0] in ("minipaged", "kernels") and target != "minipaged":
                if room(target) not in MAY_IMPORT[room(module)] | {room(module)}:
                    said.append(f"{module} must not know {target}")
            elif room(module) == "memory" and target.split(".")[0] not in sys.stdlib_module_names:
                said.append(f"{module}: memory needs nothing but the standard library, not {target}")
    for module in edges:
        if room(module) in NO_TENSORS and module != "minipaged":
            reached = reach(module, edges)
            said += [f"{module} sees tensors through {via}" for via in reached if TENSORS & edges.get(via, set())]
    inner = {module: [t for t in targets if t in known and t != "minipaged"] for module, targets in edges.items()}
    said += [f"{module} and {target} import each other, by a detour at most"
             for module, targets in inner.items() for target in targets
             if target != module and module in reach(target, inner) and not packaged(module, target)]  # fmt: skip
    return said


def packaged(module: str, target: str) -> bool:
    """A package's own door may list what stands behind it."""
    return module.startswith(target + ".") or target.startswith(module + ".")


def reach(start: str, edges: dict) -> set[str]:
    reached, stack = set(), [start]
    while stack:
        module = stack.pop()
        if module not in reached and module != "minipaged":
            reached.add(module)
            stack += [target for target in edges.get(module, ()) if target in edges]
    return reached


def test_every_import_is_in_the_plan_of_the_house():
    assert faults(sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("minipaged.memory.page_table", "import torch", "standard library"),
        ("minipaged.memory.page_table", "from minipaged.requests.request import Request", "must not know"),
        ("minipaged.requests.request", "from minipaged.decoding.beam_search import BeamSearch", "must not know"),
        ("minipaged.requests.sequence", "from minipaged.requests.request import Request", "import each other"),
        ("minipaged.scheduling.admission", "from minipaged.scheduling import scheduler", "import each other"),
        ("minipaged.scheduling.admission", "def f():\n    import torch", "sees tensors"),
        ("minipaged.scheduling.growth", "from minipaged.decoding.sampling import sample", "sees tensors"),
        ("minipaged.scheduling.plan", "from minipaged.execution.stats import Times", "must not know"),
        ("minipaged.text.outputs", "from minipaged.models.config import ModelConfig", "must not know"),
        ("minipaged.execution.runner", "from minipaged.engine import LLM", "must not know"),
        ("minipaged.teaching.loads", "from minipaged.experiments.loads import jobs", "must not know"),
        ("kernels.batch", "from minipaged.memory import blocks_for", "must not know"),
        ("minipaged.text.inputs",
         "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minipaged.engine import LLM", "must not know"),
    ],
)  # fmt: skip
def test_a_forbidden_import_is_found(module, line, said):
    known = sources()
    known[module] += f"\n{line}\n"
    assert any(module in fault and said in fault for fault in faults(known))


def test_every_room_says_what_it_is_for():
    for file in sorted((ROOT / "minipaged").glob("*/__init__.py")):
        words = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").lower()
        room_files = {f.name for f in file.parent.glob("*.py")} - {"__init__.py", "__main__.py"}
        if file.parent.name in ENGINE:
            assert all(name in words for name in room_files), f"{file}: it names all its files, in reading order"
            assert "?" in words.splitlines()[0], f"{file}: a room has a question"
            assert "owns:" in words and "does not own:" in words
    loose = {f.name for f in (ROOT / "minipaged").glob("*.py")}
    doors = "llm async_llm engine serve route generate trace train_head quantize perplexity"
    assert loose == {"__init__.py", *(f"{name}.py" for name in doors.split())}
