"""The text that a head learns from: the model asks itself questions, and answers them.

Magpie (arXiv:2406.08464): given only the beginning of a user's turn, a chat model writes what users ask. What a head
has to guess is what this model says, so nobody else's text would be better, and none has to be fetched.
"""

import random
from dataclasses import dataclass

from minipaged.llm import LLM
from minipaged.requests.sampling_params import SamplingParams

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
QUESTION_TOKENS, ANSWER_TOKENS = 60, 128
GREEDY_SHARE = 0.6  # of answers; the others are drawn, to show what else may be said

HELD_OUT = (  # to be examined with: never to be learned from
    "What is the capital of France, and what is it known for?",
    "Write a short poem about the sea.",
    "Explain how a refrigerator works.",
    "Give me three tips for learning a new language.",
    "What is the difference between a list and a tuple in Python?",
    "Summarize the story of Romeo and Juliet in a few sentences.",
    "How do I make a good cup of coffee?",
    "Why is the sky blue?",
    "Write an email to my boss asking for a day off.",
    "What are the main causes of climate change?",
    "Tell me a joke about computers.",
    "Explain photosynthesis to a ten-year-old.",
    "List five healthy breakfast ideas.",
    "What happened during the French Revolution?",
    "Write a Python function that checks if a number is prime.",
    "How can I sleep better at night?",
)


@dataclass
class Text:
    """token_ids: prompt and answer. The model's own words begin at `first`, its answer at `begin`.

    greedy: each token of the answer was the likeliest.
    """

    token_ids: list[int]
    first: int
    begin: int
    greedy: bool


class Writer:
    """Lets an engine write. seed: the same texts again."""

    def __init__(self, llm: LLM, seed: int = 0):
        self.llm, self.random = llm, random.Random(seed)
        tokenizer = llm.tokenizer
        self.opening: list[int] = []  # of a user's turn
        if tokenizer.has_chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}]).partition(MARK)[0]
            self.opening = tokenizer.encode(text, add_special_tokens=False)

    def write(self, count: int) -> list[Text]:
        """Ask `count` questions, and answer those that came to an end."""
        questions = self._questions(count)
        greedy = [self.random.random() < GREEDY_SHARE for _ in questions]
        params = [self._params(ANSWER_TOKENS, 0.0 if g else 1.0) for g in greedy]
        outputs = self.llm.generate(questions, params)
        return [
            Text([*o.prompt_token_ids, *o.outputs[0].token_ids], len(self.opening), len(o.prompt_token_ids), g)
            for o, g in zip(outputs, greedy, strict=True)
            if o.outputs[0].token_ids
        ]

    def answer(self, questions: list[str], max_tokens: int) -> list[Text]:
        """Greedy answers to questions from elsewhere."""
        prompts = [[{"role": "user", "content": q}] for q in questions] if self.opening else questions
        outputs = self.llm.generate(prompts, self._params(max_tokens, 0.0))
        begins = [len(o.prompt_token_ids) for o in outputs]
        return [
            Text([*o.prompt_token_ids, *o.outputs[0].token_ids], begin, begin, True)
            for o, begin in zip(outputs, begins, strict=True)
        ]

    def _questions(self, count: int) -> list:
        if not self.opening:  # no chat model: any token may begin a text
            return [[self.random.randrange(self.llm.config.vocab_size)] for _ in range(count)]
        asked = self.llm.generate(
            [self.opening] * count, [self._params(QUESTION_TOKENS, 1.0) for _ in range(count)]
        )
        ended = [o.outputs[0].text.strip() for o in asked if o.outputs[0].finish_reason == "stop"]
        texts = [text for text in ended if text and text not in HELD_OUT] or [o.outputs[0].text for o in asked]
        return [[{"role": "user", "content": text}] for text in texts]

    def _params(self, max_tokens: int, temperature: float) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=self.random.getrandbits(31))
