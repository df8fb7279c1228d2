"""Chapter 1: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821


def count_weights(config):
    e, f, d = config.hidden_size, config.intermediate_size, config.head_size
    attention = 2 * e * config.num_heads * d + 2 * e * config.num_kv_heads * d
    layer = attention + 3 * e * f + 2 * e
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * e
    return config.num_layers * layer + embeddings + e


def replace_head_size(config):
    from dataclasses import replace

    return replace(config, head_size=config.hidden_size // config.num_heads)


def perplexity(tokens, logits):
    chances = logits[:-1].log_softmax(-1)
    return float((-chances[range(len(tokens) - 1), tokens[1:]].mean()).exp())


def grouped_attention(q, k, v):
    q = rearrange(q, "t (g r) d -> t g r d", g=G)
    scores = einsum(q, k, "i g r d, j g d -> g r i j") / D**0.5
    future = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    weights = softmax(scores.masked_fill(future, -torch.inf), -1)
    return rearrange(einsum(weights, v, "g r i j, j g d -> i g r d"), "i g r d -> i (g r) d")


def greedy_until(model, tokens, max_tokens, end):
    new = []
    while len(new) < max_tokens and not (new and new[-1] in end):
        new.append(int(model([*tokens, *new])[-1].argmax()))
    return new


def logit_lens(tokens):
    positions, best = torch.arange(len(tokens)), []
    x = W["model.embed_tokens.weight"][tokens]
    for layer in range(L):
        at = f"model.layers.{layer}."
        x = x + attend(rms_norm(x, W[at + "input_layernorm.weight"]), layer, positions)
        x = x + mlp(rms_norm(x, W[at + "post_attention_layernorm.weight"]), layer)
        logits = rms_norm(x[-1], W["model.norm.weight"]) @ W["model.embed_tokens.weight"].T
        best.append(int(logits.argmax()))
    return best


WRONG = {
    "count_weights": [
        lambda config: sum(w.numel() for w in W.values()),  # blind to the config
        lambda config: count_weights(config) - config.hidden_size,  # without the last norm
        lambda config: count_weights(replace_head_size(config)),  # as if H heads always made up E
    ],
    "perplexity": [
        lambda tokens, logits: float(-logits.log_softmax(-1)[range(len(tokens)), tokens].mean().exp()),  # not shifted
        lambda tokens, logits: 1 / perplexity(tokens, logits),
    ],
    "grouped_attention": [
        lambda q, k, v: attention(q, k, v),  # repeats
        lambda q, k, v: grouped_attention(q, k, v.roll(1, 1)),
    ],
    "greedy_until": [
        lambda model, tokens, max_tokens, end: greedy_until(model, tokens, max_tokens, ()),  # never ends
        lambda model, tokens, max_tokens, end: [*greedy_until(model, tokens, max_tokens, end)][:-1],
    ],
    "logit_lens": [lambda tokens: [answer[len(tokens)]] * L],
}
