"""python -m minipaged.bench.acceptance: how many guesses are right, by rule, temperature and branches. No times.

Ten short questions at once (the load talk1), each answered with 96 tokens: how many a step with guesses gave, and the
share of first guesses that were right.

    draw, greedy           the model's own draw decides, and the likeliest token is guessed
    draw, probabilistic    the same, and guesses are drawn with the same random number
    rejection              the rule of the papers
"""

import argparse
import sys
from typing import Any

from minipaged import LLM, SamplingParams
from minipaged.bench.__main__ import encoder
from minipaged.bench.texts import QUESTIONS

TOKENS = 96
RULES: dict[str, dict[str, Any]] = {
    "draw, greedy": {"draft_sample_method": "greedy"},
    "draw, probabilistic": {"draft_sample_method": "probabilistic"},
    "rejection": {"acceptance": "rejection"},
}
CHANCE: list[dict[str, Any]] = [{"temperature": 0.7}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minipaged.bench.acceptance", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--speculate", choices=["draft", "head"], default="head")
    parser.add_argument("--speculative-model", metavar="MODEL")
    args = parser.parse_args(argv)
    how = {"method": args.speculate, "model": args.speculative_model, "adaptive": False}
    try:
        print(f"{'':50} tokens a step  first right")
        for rule, chance in [("draw, greedy", {"temperature": 0.0})] + [(r, c) for c in CHANCE for r in RULES]:
            words = ", ".join(f"{name} {value}" for name, value in chance.items())
            told(args.model, f"{words}: {rule}", how | RULES[rule] | {"num_speculative_tokens": 3}, chance)
        for k in (1, 2):
            for branches in (1, 2, 3):
                more = {"num_speculative_tokens": k, "num_branches": branches}
                told(args.model, f"temperature 0: {k} in a row, {branches} branches", how | more, {"temperature": 0.0})
    except ValueError as error:
        print(f"minipaged.bench.acceptance: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def told(model: str, words: str, how: dict[str, Any], chance: dict[str, Any]) -> None:
    """A line for one setting."""
    params = [SamplingParams(max_tokens=TOKENS, seed=seed, **chance) for seed in range(len(QUESTIONS))]
    with LLM(model, speculative_config=how, num_blocks=1000) as llm:
        prompts = [encoder(llm.tokenizer)(text.ask + text.about) for text in QUESTIONS]
        llm.generate(prompts, params)
        counts = llm.stats().speculation
        assert counts is not None
        print(f"{words:50} {counts.mean_acceptance_length:13.2f} {counts.acceptance_rate_per_pos[0]:12.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
