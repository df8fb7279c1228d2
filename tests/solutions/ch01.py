"""Chapter 1: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

import math
from itertools import islice

import numpy as np


def count_weights(config):
    e, f, d = config.hidden_size, config.intermediate_size, config.head_size
    attention = 2 * e * config.num_heads * d + 2 * e * config.num_kv_heads * d
    layer = attention + 3 * e * f + 2 * e
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * e
    return config.num_layers * layer + embeddings + e


def by_shapes(config):
    e, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    layer = [(q, e), (kv, e), (kv, e), (e, q), (f, e), (f, e), (e, f), (e,), (e,)]
    outside = [(v, e), (e,)] + [(v, e)] * (not config.tie_word_embeddings)
    return sum(math.prod(shape) for shape in layer * config.num_layers + outside)


def on_meta(config):
    """No memory is taken on PyTorch's meta device."""
    with torch.device("meta"):
        e, total = config.hidden_size, 0
        heads = 2 * (config.num_heads + config.num_kv_heads)
        for _ in range(config.num_layers):
            total += torch.empty(heads * config.head_size, e).numel()
            total += torch.empty(3, config.intermediate_size, e).numel() + torch.empty(2, e).numel()
        head = torch.nn.Linear(e, config.vocab_size, bias=False).weight.numel()
        return total + e + head * (2 - config.tie_word_embeddings)


def as_numpy(config):
    e, d = np.int64(config.hidden_size), np.int64(config.head_size)
    layer = 2 * e * d * (config.num_heads + config.num_kv_heads) + 3 * e * config.intermediate_size + 2 * e
    return config.num_layers * layer + e + config.vocab_size * e * (1 if config.tie_word_embeddings else 2)


def changed(config, **fields):
    from dataclasses import replace

    return replace(config, **fields)


def perplexity(tokens, logits):
    chances = logits[:-1].log_softmax(-1)
    return float((-chances[range(len(tokens) - 1), tokens[1:]].mean()).exp())


def with_cross_entropy(tokens, logits):
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])).exp().item()


def one_by_one(tokens, logits):
    """With numbers only, and the largest taken away first."""
    total = 0.0
    for i in range(1, len(tokens)):
        row = logits[i - 1].tolist()
        most = max(row)
        total += most + math.log(sum(math.exp(logit - most) for logit in row)) - row[tokens[i]]
    return math.exp(total / (len(tokens) - 1))


def in_bits(tokens, logits):
    scores = logits.double() / math.log(2)
    bits = torch.logsumexp(logits.double(), -1) / math.log(2) - scores[:, tokens].roll(-1, 1).diagonal()
    return 2.0 ** bits[:-1].mean()


def in_place(tokens, logits):
    logits -= logits.logsumexp(-1, keepdim=True)
    return float((-logits[range(len(tokens) - 1), tokens[1:]].mean()).exp())


def through_softmax(tokens, logits):
    chances = logits.softmax(-1)[range(len(tokens) - 1), tokens[1:]]
    return float((-chances.log().mean()).exp())


def a_product_of_chances(tokens, logits):
    chances = logits.softmax(-1)[range(len(tokens) - 1), tokens[1:]]
    return float(chances.prod() ** (-1 / (len(tokens) - 1)))


def grouped_attention(q, k, v):
    G, D = k.shape[1:]
    q = rearrange(q, "t (g r) d -> t g r d", g=G)
    scores = einsum(q, k, "i g r d, j g d -> g r i j") / D**0.5
    future = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    weights = softmax(scores.masked_fill(future, -torch.inf), -1)
    return rearrange(einsum(weights, v, "g r i j, j g d -> i g r d"), "i g r d -> i (g r) d")


def head_by_head(q, k, v):
    T, H, D = q.shape
    out, share = torch.empty_like(q), H // k.shape[1]
    mask = torch.full((T, T), -torch.inf).triu(1)
    for h in range(H):
        scores = q[:, h] @ k[:, h // share].T / math.sqrt(D) + mask
        out[:, h] = scores.softmax(-1) @ v[:, h // share]
    return out


def group_by_group(q, k, v):
    """The queries of a group stand below each other: r T rows, one product."""
    (T, H, D), G, answers = q.shape, k.shape[1], []
    for g in range(G):
        mine = q[:, g * (H // G) : (g + 1) * (H // G)].transpose(0, 1).reshape(-1, D)
        scores = (mine * D**-0.5) @ k[:, g].T
        scores = scores.view(-1, T, T).masked_fill(~torch.tril(torch.ones(T, T)).bool(), -1e9)
        answers.append((scores.softmax(-1).view(-1, T) @ v[:, g]).view(-1, T, D))
    return torch.cat(answers).transpose(0, 1)


def token_by_token(q, k, v):
    """No mask: each query gets the keys that it may see."""
    T, H, D = q.shape
    q = q.view(T, k.shape[1], -1, D)
    rows = []
    for i in range(T):
        weights = torch.einsum("grd,jgd->grj", q[i], k[: i + 1]).div(D**0.5).softmax(-1)
        rows.append(torch.einsum("grj,jgd->grd", weights, v[: i + 1]).reshape(H, D))
    return torch.stack(rows)


def with_bmm(q, k, v):
    T, H, D = q.shape
    G = k.shape[1]
    rows = q.reshape(T, G, -1, D).permute(1, 2, 0, 3).reshape(G, -1, D)
    scores = torch.bmm(rows, k.permute(1, 2, 0)).view(G, -1, T, T) / D**0.5
    scores = torch.where(torch.arange(T)[:, None] >= torch.arange(T), scores, -torch.inf)
    o = torch.bmm(scores.softmax(-1).flatten(1, 2), v.transpose(0, 1))
    return o.view(G, -1, T, D).permute(2, 0, 1, 3).reshape(T, H, D)


def spread_by_matmul(q, k, v):
    T, H, D = q.shape
    q = q.view(T, k.shape[1], -1, D).permute(1, 2, 0, 3)  # [G, r, T, D]
    keys, values = (x.transpose(0, 1)[:, None] for x in (k, v))  # [G, 1, T, D]
    scores = (q @ keys.transpose(-1, -2) / D**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ values).permute(2, 0, 1, 3).reshape(T, H, D)


def interleaved(q, k, v):
    share = q.shape[1] // k.shape[1]
    return grouped_attention(q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1))


def one_head_after_the_other_into_a_copy(q, k, v):
    share = q.shape[1] // k.shape[1]
    keys, values = torch.empty_like(q), torch.empty_like(q)
    for h in range(q.shape[1]):
        keys[:, h], values[:, h] = k[:, h // share], v[:, h // share]
    return grouped_attention(q, keys, values)


def pytorchs_own(q, k, v):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


def this_notebooks_sizes(q, k, v):
    """H, G and D are those of smollm2."""
    q = rearrange(q, "t (g r) d -> t g r d", g=G)
    scores = einsum(q, k, "i g r d, j g d -> g r i j") / D**0.5
    future = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    weights = softmax(scores.masked_fill(future, -torch.inf), -1)
    return rearrange(einsum(weights, v, "g r i j, j g d -> i g r d"), "i g r d -> i (g r) d")


def other_neighbours(q, k, v):
    """Query head h reads h modulo G."""
    share = q.shape[1] // k.shape[1]
    q = rearrange(q, "t (r g) d -> t (g r) d", r=share)
    return rearrange(grouped_attention(q, k, v), "t (g r) d -> t (r g) d", r=share)


def without_a_mask(q, k, v):
    q = rearrange(q, "t (g r) d -> t g r d", g=k.shape[1])
    weights = softmax(einsum(q, k, "i g r d, j g d -> g r i j") / q.shape[-1] ** 0.5, -1)
    return rearrange(einsum(weights, v, "g r i j, j g d -> i g r d"), "i g r d -> i (g r) d")


def greedy_until(model, tokens, max_tokens, end):
    new = []
    while len(new) < max_tokens and not (new and new[-1] in end):
        new.append(int(model([*tokens, *new])[-1].argmax()))
    return new


def with_a_for(model, tokens, max_tokens, end):
    seen = list(tokens)
    for _ in range(max_tokens):
        best = model(seen)[-1].argmax().item()
        seen.append(best)
        if best in end:
            break
    return seen[len(tokens) :]


def by_recursion(model, tokens, max_tokens, end):
    if max_tokens <= 0:
        return []
    best = torch.topk(model(tokens)[len(tokens) - 1], 1).indices.item()
    return [best] if best in set(end) else [best, *by_recursion(model, [*tokens, best], max_tokens - 1, end)]


def as_a_stream(model, tokens, max_tokens, end):
    def stream(so_far):
        while True:
            best = model(so_far)[-1].numpy().argmax()
            yield best
            if best in end:
                return
            so_far = (*so_far, best)

    return list(islice(stream(tuple(tokens)), max_tokens))


def into_the_prompt(model, tokens, max_tokens, end):
    before = len(tokens)
    while len(tokens) - before < max_tokens and not (len(tokens) > before and tokens[-1] in end):
        tokens.append(int(model(tokens)[-1].argmax()))
    return tokens[before:]


def ends_with_the_prompt(model, tokens, max_tokens, end):
    """As greedy_until, but the prompt's last token may be the end, too."""
    seen = list(tokens)
    while len(seen) - len(tokens) < max_tokens and seen[-1] not in end:
        seen.append(int(model(seen)[-1].argmax()))
    return seen[len(tokens) :]


def at_least_one(model, tokens, max_tokens, end):
    seen = list(tokens)
    while True:
        seen.append(int(model(seen)[-1].argmax()))
        if seen[-1] in end or len(seen) - len(tokens) >= max_tokens:
            return seen[len(tokens) :]


def cut_afterwards(model, tokens, max_tokens, end):
    """Generates everything, and then looks for the end."""
    new = greedy_until(model, tokens, max_tokens, ())
    stop = next((i for i, token in enumerate(new) if token in end), len(new))
    return new[: stop + 1]


def newest_token_only(model, tokens, max_tokens, end):
    new, feed = [], list(tokens)
    while len(new) < max_tokens and not (new and new[-1] in end):
        new.append(int(model(feed)[-1].argmax()))
        feed = [new[-1]]
    return new


def logit_lens(tokens):
    best, x = [], embedding[tokens]
    for layer in range(L):
        x = layers(x, layer, layer + 1)
        best.append(int(forecast(x[-1:]).argmax()))
    return best


def anew_for_each(tokens):
    return [int(forecast(layers(embedding[tokens], 0, n)[-1:])[0].argmax()) for n in range(1, L + 1)]


def written_out(tokens):
    positions, x, rows = torch.arange(len(tokens)), W["model.embed_tokens.weight"][tokens], []
    for layer in range(L):
        at = f"model.layers.{layer}."
        x = x + attend(rms_norm(x, W[at + "input_layernorm.weight"]), layer, positions)
        x = x + mlp(rms_norm(x, W[at + "post_attention_layernorm.weight"]), layer)
        rows.append(rms_norm(x[-1], W["model.norm.weight"]))
    return (torch.stack(rows) @ embedding.T).argmax(-1).tolist()


def lens(tokens, norm=None, row=-1, shift=0, half=False):
    """logit_lens with something wrong."""
    positions, x, best = torch.arange(len(tokens)), embedding[tokens], []
    for layer in range(L):
        before = x
        x = x + attend(rms_norm(x, weight(layer, "input_layernorm")), layer, positions)
        middle = x
        x = x + mlp(rms_norm(x, weight(layer, "post_attention_layernorm")), layer)
        seen = middle if half else before if shift else x
        y = norm(seen, layer) if norm else rms_norm(seen, W["model.norm.weight"])
        best.append(int((y[row] @ embedding.T).argmax()))
    return best


RIGHT = {
    "count_weights": [count_weights, by_shapes, on_meta, as_numpy],
    "perplexity": [perplexity, with_cross_entropy, one_by_one, in_bits],
    "grouped_attention": [grouped_attention, head_by_head, group_by_group, token_by_token, with_bmm],
    "greedy_until": [greedy_until, with_a_for, by_recursion, as_a_stream],
    "logit_lens": [logit_lens, anew_for_each, written_out],
}
WRONG = {
    "count_weights": [
        lambda config: sum(w.numel() for w in W.values()),  # blind to the config
        lambda config: count_weights(config) - config.hidden_size,  # without the last norm
        lambda config: count_weights(changed(config, head_size=config.hidden_size // config.num_heads)),
        lambda config: count_weights(changed(config, num_kv_heads=config.num_heads)),  # no groups
        lambda config: count_weights(changed(config, tie_word_embeddings=True)),
        lambda config: count_weights(config) - config.num_layers * config.hidden_size * config.intermediate_size,
        lambda config: float(count_weights(config)),
        lambda config: sum(math.prod(shape) for shape in Llama.tensor_shapes(config).values()),  # the package's
        lambda config: {30: 134_515_008, 126: 405_853_388_800}.get(config.num_layers),  # by heart
        lambda config: count_weights(changed(config, intermediate_size=F, vocab_size=V)),  # this notebook's
    ],
    "perplexity": [
        lambda tokens, logits: float(-logits.log_softmax(-1)[range(len(tokens)), tokens].mean().exp()),
        lambda tokens, logits: float((-logits.log_softmax(-1)[range(len(tokens)), tokens].mean()).exp()),  # not shifted
        lambda tokens, logits: 1 / perplexity(tokens, logits),
        lambda tokens, logits: perplexity(tokens[::-1], logits),
        lambda tokens, logits: perplexity(tokens, logits) ** ((len(tokens) - 1) / len(tokens)),  # one too many
        lambda tokens, logits: perplexity(tokens, logits) ** (len(tokens) - 1),  # a sum
        lambda tokens, logits: math.log(perplexity(tokens, logits)),
        lambda tokens, logits: perplexity(tokens[1:], logits[1:]) if len(tokens) > 2 else 1.0,
        in_place, through_softmax, a_product_of_chances,
    ],
    "grouped_attention": [
        lambda q, k, v: attention(q, k, v),  # repeats
        lambda q, k, v: grouped_attention(q, k.roll(1, 1), v.roll(1, 1)),
        lambda q, k, v: grouped_attention(q * q.shape[-1] ** 0.5, k, v),
        lambda q, k, v: grouped_attention(q, k, v).flatten(1),
        spread_by_matmul, interleaved, one_head_after_the_other_into_a_copy, pytorchs_own, this_notebooks_sizes,
        other_neighbours, without_a_mask,
    ],
    "greedy_until": [
        lambda model, tokens, max_tokens, end: greedy_until(model, tokens, max_tokens, ()),  # never ends
        lambda model, tokens, max_tokens, end: greedy_until(model, tokens, max_tokens, end)[:-1],
        lambda model, tokens, max_tokens, end: tokens + greedy_until(model, tokens, max_tokens, end),
        lambda model, tokens, max_tokens, end: greedy_until(model, tokens, max_tokens, end[:1]),
        lambda model, tokens, max_tokens, end: greedy_until(lambda seen: llama(seen), tokens, max_tokens, end),
        lambda model, tokens, max_tokens, end: (model(tokens), greedy_until(model, tokens, max_tokens, end))[1],
        into_the_prompt, ends_with_the_prompt, at_least_one, cut_afterwards, newest_token_only,
    ],
    "logit_lens": [
        lambda tokens: [answer[len(tokens)] if len(tokens) < len(answer) else 0] * L,
        lambda tokens: lens(tokens, norm=lambda x, layer: x),
        lambda tokens: lens(tokens, norm=lambda x, layer: rms_norm(x, weight(layer, "input_layernorm"))),
        lambda tokens: lens(tokens, row=0),
        lambda tokens: lens(tokens, shift=1),
        lambda tokens: lens(tokens, half=True),
        lambda tokens: [tokenizer.decode([token]) for token in logit_lens(tokens)],
        lambda tokens: [tokens[-1], *logit_lens(tokens)],  # the embedding, too
        lambda tokens: logit_lens([504, 3575, 282, 4649, 314]),  # of one text, by heart
        lambda tokens: [
            int((state[0, -1] @ embedding.T).argmax())
            for state in hf_llama(torch.tensor([tokens]), output_hidden_states=True).hidden_states[1:]
        ],
    ],
}  # fmt: skip
