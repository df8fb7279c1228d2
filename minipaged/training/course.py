"""The whole course in a given time: write, think it through again, learn, be examined, be kept."""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minipaged.llm import LLM
from minipaged.training.files import Frozen, config_like, frequent_tokens, new_network, rounded, save
from minipaged.training.learning import loss_of, right_guesses, teach
from minipaged.training.network import HeadNetwork
from minipaged.training.states import Lesson, lessons
from minipaged.training.text import HELD_OUT, Writer

WRITING, LEARNING = 0.5, 0.97  # of all the time: when they end; the rest is for the examination
NUM_EXAMINED, ANSWER_EXAMINED = 24, 128  # texts of its own that are never learned from; tokens of the others' answers
ROUND, BATCH = 128, 8  # questions at a time; texts in a step
RATE, FUSE_RATE, NORM_RATE = 1.5e-3, 0.5e-3, 1e-3  # the highest learning rates
WARM = 10  # steps until they are reached
NUM_EXAMS = 6  # on the way: the learning curve

Tell = Callable[[str, float, str], None]  # what is being done, the share of the time gone, a remark


@dataclass
class Report:
    """What was reached. shares: of first, second and third guesses that were right; own: on the model's own questions,
    held_out: on the list of text.py, None without chat. curve: minutes, share of first guesses right."""

    own: list[float] = field(default_factory=list)
    held_out: list[float] | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    num_texts: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    num_bytes: int = 0


class Course:
    """One run. minutes: all together. vocabulary: V', how many tokens are guessed among. tell: is told what goes on."""

    def __init__(self, llm: LLM, minutes: float, seed: int, vocabulary: int, tell: Tell):
        self.llm, self.seed, self.vocabulary, self.tell = llm, seed, vocabulary, tell
        self.model = llm.executor.runner.model
        self.seconds, self.began = 60 * minutes, time.monotonic()
        self.report = Report()

    def run(self, out: Path, made_by: str) -> Report:
        torch.manual_seed(self.seed)
        examined, held_out, learned = self._texts()
        network, frozen = self._beginning(learned)
        exam = held_out or examined
        self._learn(network, frozen, learned, exam)
        network = rounded(network)
        self.report.own = right_guesses(network, examined, frozen)
        self.report.held_out = right_guesses(network, held_out, frozen) if held_out else None
        save(network, frozen.token_ids, out, made_by)
        self.report.seconds, self.report.num_bytes = self._elapsed(), out.stat().st_size
        return self.report

    def _elapsed(self) -> float:
        return time.monotonic() - self.began

    def _texts(self) -> tuple[list[Lesson], list[Lesson], list[Lesson]]:
        """For the two examinations, and to learn from."""
        writer = Writer(self.llm, self.seed)
        questions = list(HELD_OUT) if self.llm.tokenizer.has_chat_template else []
        held_out = lessons(self.model, writer.answer(questions, ANSWER_EXAMINED)) if questions else []
        found: list[Lesson] = []
        while len(found) < 2 * NUM_EXAMINED or self._elapsed() < WRITING * self.seconds:
            found += lessons(self.model, writer.write(ROUND))
            self.report.num_texts = len(found)
            self.report.num_tokens = sum(len(t.token_ids) - t.begin for t in found)
            self.tell("writing", self._elapsed() / self.seconds, f"{self.report.num_tokens} tokens of answers")
        examined = [t for t in found if t.greedy][:NUM_EXAMINED]
        chosen = {id(t) for t in examined}
        return examined, held_out, [t for t in found if id(t) not in chosen]

    def _beginning(self, learned: list[Lesson]) -> tuple[HeadNetwork, Frozen]:
        config = self.model.config
        frozen = Frozen(self.model, frequent_tokens(learned, config.vocab_size, self.vocabulary))
        teach(learned, frozen)
        return new_network(config_like(config), frozen, learned), frozen

    def _learn(self, network: HeadNetwork, frozen: Frozen, learned: list[Lesson], exam: list[Lesson]) -> None:
        optimizers = _optimizers(network)
        began, end = self._elapsed(), LEARNING * self.seconds
        self._examine(network, frozen, exam)
        for batch in _batches(learned, random.Random(self.seed)):
            done = (self._elapsed() - began) / max(end - began, 1e-9)
            if done >= 1 and self.report.num_steps:
                break
            if done * NUM_EXAMS >= len(self.report.curve):
                self._examine(network, frozen, exam)
            self._step(network, optimizers, batch, frozen, min(done, 1.0))
        self._examine(network, frozen, exam)

    def _step(
        self, network: HeadNetwork, optimizers: list[torch.optim.Optimizer], batch: list[Lesson], frozen: Frozen,
        done: float,
    ) -> None:  # fmt: skip
        rate = min(1.0, (self.report.num_steps + 1) / WARM) * (0.5 + 0.5 * math.cos(math.pi * done))
        loss, first = loss_of(network, batch, frozen, calls=1 if done < 0.6 else 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["highest"]
            optimizer.step()
            optimizer.zero_grad()
        self.report.num_steps += 1
        self.report.losses.append(first)
        self.tell("learning", self._elapsed() / self.seconds, f"loss {first:.2f}")

    def _examine(self, network: HeadNetwork, frozen: Frozen, exam: list[Lesson]) -> None:
        share = right_guesses(network, exam, frozen)[0]
        self.report.curve.append((self._elapsed() / 60, share))
        self.tell("learning", self._elapsed() / self.seconds, f"{share:.0%} of first guesses right")


def _optimizers(network: HeadNetwork) -> list[torch.optim.Optimizer]:
    """Muon (kellerjordan.github.io/posts/muon) for matrices, which takes fewer steps than AdamW; AdamW for the norms.

    `fuse` is right by and large from the beginning: it goes more slowly.
    """
    matrices = [p for name, p in network.named_parameters() if p.ndim == 2 and name != "fuse.weight"]
    groups = [{"params": matrices, "highest": RATE}, {"params": [network.fuse.weight], "highest": FUSE_RATE}]
    norms = [{"params": [p for p in network.parameters() if p.ndim == 1], "highest": NORM_RATE}]
    return [
        torch.optim.Muon(groups, lr=RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(norms, lr=NORM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _batches(texts: list[Lesson], chance: random.Random) -> Iterator[list[Lesson]]:
    """All texts again and again, each time in another order."""
    while True:
        order = chance.sample(texts, len(texts))
        yield from (order[at : at + BATCH] for at in range(0, len(order), BATCH))
