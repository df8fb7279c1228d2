"""The text of the tokens that logprobs tell about: each alone, as vLLM has it."""

from dataclasses import replace

from minipaged.requests.sampling_params import Logprob
from minipaged.text.tokenizer import Tokenizer


def with_text(logprobs: dict[int, Logprob], tokenizer: Tokenizer) -> dict[int, Logprob]:
    """The same logprobs by token id, with decoded_token. Special tokens too have a text here.

    Half a character, for a token may hold no more, is U+FFFD.
    """
    return {
        token: one if one.decoded_token is not None else replace(one, decoded_token=tokenizer.decode([token], False))
        for token, one in logprobs.items()
    }
