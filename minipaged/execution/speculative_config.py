"""What `LLM(speculative_config={...})` may say: who guesses, and how. The names are vLLM's where it has one."""

import difflib
from dataclasses import dataclass, fields
from typing import Any

from minipaged.requests.checks import is_number

METHODS = ("ngram", "draft", "head")
ALIASES = {"draft_model": "draft"}  # vLLM's names
ACCEPTANCE = ("draw", "rejection")
SAMPLE_METHODS = ("greedy", "probabilistic")
MOST_TOKENS, MOST_BRANCHES = 32, 8
NUM_SPECULATIVE_TOKENS = {"ngram": 16, "draft": 4, "head": 2}  # by default
LOOKUP_MIN, LOOKUP_MAX = 2, 5
ONLY_FOR = {
    "prompt_lookup_min": ("ngram",), "prompt_lookup_max": ("ngram",), "model": ("draft", "head"),
    "draft_sample_method": ("draft", "head"),
}  # fmt: skip


@dataclass(frozen=True)
class SpeculativeConfig:
    """ValueError, or TypeError for a key that there is not, says what is right.

    method: "ngram", what followed the same tokens before; "draft", a smaller model; "head", a small network on the
        model's own last hidden state. See decoding/ngram.py, execution/draft_proposer.py, execution/head_proposer.py.
    model: of "draft" any model that loads and has the same vocabulary; of "head" a file of train_head, None: the one
        that stands in the package.
    num_speculative_tokens: the most guesses in a row.
    prompt_lookup_min, prompt_lookup_max: the lengths of what ngram looks up. If only one is given, both are that.
    num_branches: the most rows of guesses for one sequence at a time, which begin differently.
    acceptance: "draw", a guess is right if the model draws it: the same tokens as without guesses; "rejection", the
        rule of the papers, for draft and head: other tokens, and the same distribution. See decoding/rejection.py.
    draft_sample_method: what draft and head guess where the model draws by chance. "greedy": what they think likeliest;
        "probabilistic": they draw too, with the same random number, so that they come to the same token where they
        think alike. A good draft does, a small head does not: so these are the defaults. For a head, tokens that a
        step gave at temperature 1: 1.28 greedy, 1.27 drawn, and 1.49 by the rule of the papers (bench/acceptance.py).
    adaptive: whether fewer are guessed where few are right, and where many sequences run.
    """

    method: str
    model: str | None = None
    num_speculative_tokens: int = 0
    prompt_lookup_min: int = LOOKUP_MIN
    prompt_lookup_max: int = LOOKUP_MAX
    num_branches: int = 1
    acceptance: str = "draw"
    draft_sample_method: str | None = None
    adaptive: bool = True

    @classmethod
    def of(cls, given: Any) -> "SpeculativeConfig | None":
        """From what a caller wrote: None, such a dict, or this."""
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, dict):
            raise ValueError(f"speculative_config={given!r}: must be None or a dict such as {{'method': 'ngram'}}")
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f": there are {', '.join(known)}"
                raise TypeError(f"speculative_config has no key {name!r}{hint}")
        values = {name: value for name, value in given.items() if value is not None}
        method = values.get("method", "draft" if "model" in values else None)
        values["method"] = ALIASES.get(method, method) if isinstance(method, str) else method
        lookups = [values[name] for name in ("prompt_lookup_min", "prompt_lookup_max") if name in values]
        if len(lookups) == 1:
            values["prompt_lookup_min"] = values["prompt_lookup_max"] = lookups[0]
        if "model" in values:
            values["model"] = str(values["model"])
        return cls(**values)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise _wrong("method", self.method, f"one of {', '.join(METHODS)}")
        if self.num_speculative_tokens == 0:
            object.__setattr__(self, "num_speculative_tokens", NUM_SPECULATIVE_TOKENS[self.method])
        for name, most in _MOST.items():
            value = getattr(self, name)
            if not is_number(int, value) or not 1 <= value <= most:
                raise _wrong(name, value, f"an integer from 1 to {most}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise _wrong("prompt_lookup_min", self.prompt_lookup_min, f"at most {self.prompt_lookup_max}, the max")
        if self.acceptance not in ACCEPTANCE:
            raise _wrong("acceptance", self.acceptance, f"one of {', '.join(ACCEPTANCE)}")
        if self.draft_sample_method not in (None, *SAMPLE_METHODS):
            raise _wrong("draft_sample_method", self.draft_sample_method, f"one of {', '.join(SAMPLE_METHODS)}")
        if not isinstance(self.adaptive, bool):
            raise _wrong("adaptive", self.adaptive, "True or False")
        self._must_fit()

    @property
    def guesses_greedily(self) -> bool:
        default = "greedy" if self.method == "head" and self.acceptance == "draw" else "probabilistic"
        return (self.draft_sample_method or default) == "greedy"

    def _must_fit(self) -> None:
        if self.method == "draft" and self.model is None:
            raise ValueError("speculative_config: method 'draft' needs a model: a smaller one with the same vocabulary")
        if self.acceptance == "rejection" and self.method == "ngram":
            raise ValueError(
                "speculative_config: acceptance='rejection' is for guesses that were drawn by chance; ngram's are not"
            )
        if self.acceptance == "rejection" and self.draft_sample_method == "greedy":
            raise ValueError("speculative_config: acceptance='rejection' needs draft_sample_method='probabilistic'")
        if self.acceptance == "rejection" and self.num_branches > 1:
            raise ValueError("speculative_config: acceptance='rejection' judges one row of guesses: num_branches=1")
        for name, methods in ONLY_FOR.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and self.method not in methods:
                raise ValueError(f"speculative_config: {name} is for {' and '.join(methods)}, not for {self.method}")


_MOST = {
    "num_speculative_tokens": MOST_TOKENS, "prompt_lookup_min": 1000, "prompt_lookup_max": 1000,
    "num_branches": MOST_BRANCHES,
}  # fmt: skip


def _wrong(name: str, value: Any, right: str) -> ValueError:
    return ValueError(f"speculative_config: {name}={value!r}: must be {right}")
