"""From the hidden states of a step to what came of it: logits, draws, which guesses were right, logprobs of prompts."""

from dataclasses import replace
from itertools import chain, islice

from torch import Tensor

from minipaged.decoding.acceptance import Drawn, accept, draws_behind
from minipaged.decoding.logprobs import top_candidates, top_logprobs
from minipaged.decoding.rejection import accept_by_chance, probabilities
from minipaged.decoding.sampling import add_logprobs, sample
from minipaged.execution.masks import Masks
from minipaged.models import Model
from minipaged.requests.sampling_params import BadLogits, Draw
from minipaged.scheduling.plan import ScheduledSequence, StepOutput

PIECE = 128  # rows whose logits are held at a time for prompt_logprobs: 25 MB with a vocabulary of 49152


def wanted_logits(model: Model, sequences: list[ScheduledSequence], hidden: Tensor) -> Tensor:
    """Logits [R, V], from hidden [T, E]: behind the last token of those that draw, and behind each of their guesses."""
    return model.logits(hidden[_rows(sequences)])


def answer(
    model: Model, sequences: list[ScheduledSequence], hidden: Tensor, logits: Tensor,
    chances: dict[int, Tensor] | None = None, masks: Masks | None = None,
) -> StepOutput:  # fmt: skip
    """What the plan asks for, from hidden [T, E], the states of all tokens of `sequences` in a row, and their logits.

    chances: for sequences whose guesses are to be judged by rejection, what they were drawn from, each [guesses, V].
    masks: for those whose outputs have a form, what it allows behind their tokens.
    """
    output = StepOutput()
    wanted = [s for s in sequences if s.draw or s.num_candidates]
    _draw(logits, wanted, chances or {}, masks or {}, output)
    _find_candidates(logits, wanted, output)
    _tell_prompt_logprobs(model, sequences, hidden, output)
    return output


def _rows(sequences: list[ScheduledSequence]) -> list[int]:
    rows: list[int] = []
    end = 0
    for s in sequences:
        end += len(s.token_ids)
        if s.draw or s.num_candidates:
            rows += range(end - 1 - s.num_drafts, end)
    return rows


def _places(wanted: list[ScheduledSequence]) -> list[tuple[ScheduledSequence, range]]:
    """The rows of logits of each."""
    places, begin = [], 0
    for s in wanted:
        places.append((s, range(begin, begin + 1 + s.num_drafts)))
        begin += 1 + s.num_drafts
    return places


def _draw(
    logits: Tensor, wanted: list[ScheduledSequence], chances: dict[int, Tensor], masks: Masks, output: StepOutput
) -> None:
    drawing = [(s, place) for s, place in _places(wanted) if s.draw]
    if not drawing:
        return
    chosen = [row for _, place in drawing for row in place]
    draws = [_draws(s, s.draw, masks) for s, _ in drawing if s.draw]
    drawn = iter(sample(logits if len(chosen) == len(logits) else logits[chosen], list(chain.from_iterable(draws))))
    families: dict[int, list[tuple[ScheduledSequence, list[Drawn]]]] = {}
    for (s, place), its in zip(drawing, draws, strict=True):
        own = list(islice(drawn, len(place)))
        if s.num_drafts:
            output.drafts[s.seq_id] = s.draft_token_ids
        if s.seq_id in chances and not isinstance(own[0], BadLogits):
            rows = logits[place.start : place.stop]
            tokens = accept_by_chance(s.draft_token_ids, own, probabilities(rows, its), chances[s.seq_id], its)
            for row, draw, token in zip(rows.split(1), its, tokens, strict=False):
                add_logprobs(row, [draw], {0: [token]})
            output.tokens[s.seq_id] = [tokens]
        else:
            families.setdefault(s.seq_id if s.branch_of is None else s.branch_of, []).append((s, own))
    for seq_id, family in families.items():
        _take(seq_id, family, output)


def _draws(s: ScheduledSequence, draw: Draw, masks: Masks) -> list[Draw]:
    """What to draw in each of its rows. Those without a mask stand behind a guess that can't be right."""
    draws = draws_behind(draw, s.draft_token_ids)
    for place, mask in enumerate(masks.get(s.seq_id, ())):
        draws[place] = replace(draws[place], mask=mask)
    return draws


def _take(seq_id: int, family: list[tuple[ScheduledSequence, list[Drawn]]], output: StepOutput) -> None:
    """What a sequence with its branches gets. Its draw behind its newest token says which of them was right."""
    (own, drawn), *_ = family
    first = drawn[0]
    if isinstance(first, BadLogits):
        output.errors[seq_id] = first.message
    elif len(first) > 1:
        output.tokens[seq_id] = [[token] for token in first]  # of a prompt of several samples
    else:
        right, rows = next(((s, d) for s, d in family if s.draft_token_ids[:1] == [first[0].token_id]), family[0])
        output.tokens[seq_id] = [accept(right.draft_token_ids, [first, *rows[1:]])]
        if right is not own:
            output.winners[seq_id] = right.seq_id


def _find_candidates(logits: Tensor, wanted: list[ScheduledSequence], output: StepOutput) -> None:
    beams = [(s, place.start) for s, place in _places(wanted) if s.num_candidates]
    if not beams:
        return
    best = top_candidates(logits[[row for _, row in beams]], max(s.num_candidates for s, _ in beams))
    for (s, _), row in zip(beams, best, strict=True):
        if isinstance(row, BadLogits):
            output.errors[s.seq_id] = row.message
        else:
            output.candidates[s.seq_id] = row[: s.num_candidates]


Target = tuple[int, int, int, int]  # whose, row of hidden, how many best tokens, token


def prompt_pieces(sequences: list[ScheduledSequence]) -> list[list[Target]]:
    """What is wanted of prompts, in pieces: the logits of a piece are made at a time."""
    wanted: list[Target] = []
    begin = 0
    for s in sequences:
        if t := s.targets:
            row = begin + t.start - 1 - s.start
            wanted += [(s.seq_id, row + i, t.num_best, token) for i, token in enumerate(t.token_ids)]
        begin += len(s.token_ids)
    return [wanted[at : at + PIECE] for at in range(0, len(wanted), PIECE)]


def _tell_prompt_logprobs(
    model: Model, sequences: list[ScheduledSequence], hidden: Tensor, output: StepOutput
) -> None:
    """Logprobs of tokens of prompts, from the rows of hidden [T, E] before them."""
    for piece in prompt_pieces(sequences):
        logits = model.logits(hidden[[row for _, row, _, _ in piece]])
        found = top_logprobs(logits, [(i, k, token) for i, (_, _, k, token) in enumerate(piece)])
        for (seq_id, *_), logprobs in zip(piece, found, strict=True):
            if isinstance(logprobs, BadLogits):
                output.errors[seq_id] = logprobs.message
            else:
                output.prompt_logprobs.setdefault(seq_id, []).append(logprobs)
