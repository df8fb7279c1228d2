"""Chapter 13: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

from itertools import product, takewhile


def tokens_saved(before, prompt, B):
    same = 0
    for a, b in zip(before, prompt[:-1], strict=False):
        if a != b:
            break
        same += 1
    return same - same % B


def block_by_block(before, prompt, B):
    saved = 0
    while saved + B < len(prompt) and prompt[saved : saved + B] == before[saved : saved + B]:
        saved += B
    return saved


def with_takewhile(before, prompt, B):
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, prompt, strict=False)))
    return min(same, len(prompt) - 1) // B * B


def chain(tokens, B, salt):
    found, parent = [], None
    for i in range(len(tokens) // B):
        text = repr((parent, tokens[i * B : (i + 1) * B], salt, B))
        parent = hashlib.sha256(text.encode()).hexdigest()
        found.append(parent)
    return found


def running_hash(tokens, B, salt):
    """One hash that goes on, and a look at it after each block."""
    found, state = [], hashlib.sha512(f"{B} {salt!r}:".encode())
    for i, token in enumerate(tokens, 1):
        state.update(f"{token},".encode())
        if i % B == 0:
            found.append(state.digest())
    return found


def as_numbers(tokens, B, salt):
    found, number = [], int.from_bytes(hashlib.blake2b(repr((B, salt)).encode()).digest(), "big")
    for end in range(B, len(tokens) + 1, B):
        own_tokens = b"".join(token.to_bytes(8, "big", signed=True) for token in tokens[end - B : end])
        number = int.from_bytes(hashlib.blake2b(number.to_bytes(64, "big") + own_tokens).digest(), "big")
        found.append(number)
    return found


NUMBERS = {}


def numbered(tokens, B, salt):
    """A number for each pair of a number and a block that ever came: what a tree does, and no hash at all."""
    found, parent = [], (B, salt)
    for end in range(B, len(tokens) + 1, B):
        parent = NUMBERS.setdefault((parent, tuple(int(token) for token in tokens[end - B : end])), len(NUMBERS))
        found.append(parent)
    return found


def whole_prefixes(tokens, B, salt):
    return [hashlib.sha256(repr((tokens[:end], salt, B)).encode()).hexdigest() for end in range(B, len(tokens) + 1, B)]


def joined(tokens, B, salt):
    """12 and 1, 2 are the same text."""
    found, state = [], hashlib.sha256(f"{B}{salt!r}".encode())
    for i, token in enumerate(tokens, 1):
        state.update(str(token).encode())
        if i % B == 0:
            found.append(state.digest())
    return found


class Idle:
    def __init__(self):
        self.blocks = OrderedDict()

    def put(self, block):
        self.blocks[block] = True

    def take(self):
        if not self.blocks:
            raise IndexError("nothing is idle")
        return self.blocks.popitem(last=False)[0]

    def remove(self, block):
        del self.blocks[block]

    def __len__(self):
        return len(self.blocks)


class WithTickets:
    """A queue in which those who left are passed over."""

    def __init__(self):
        self.queue, self.ticket, self.next = deque(), {}, 0

    def put(self, block):
        self.next += 1
        self.ticket[block] = self.next
        self.queue.append((block, self.next))

    def take(self):
        while self.queue:
            block, ticket = self.queue.popleft()
            if self.ticket.get(block) == ticket:
                del self.ticket[block]
                return block
        raise IndexError

    def remove(self, block):
        self.ticket.pop(block)

    def __len__(self):
        return len(self.ticket)


class Linked:
    """A list of links in both directions, as an operating system would have it."""

    def __init__(self):
        self.after, self.before = {None: None}, {None: None}

    def put(self, block):
        last = self.before[None]
        self.after[last], self.before[block] = block, last
        self.after[block], self.before[None] = None, block

    def remove(self, block):
        if block is None or block not in self.after:
            raise KeyError(block)
        left, right = self.before.pop(block), self.after.pop(block)
        self.after[left], self.before[right] = right, left

    def take(self):
        first = self.after[None]
        if first is None:
            raise IndexError
        self.remove(first)
        return first

    def __len__(self):
        return len(self.after) - 1


class AsAList(Idle):
    def __init__(self):
        self.blocks = []

    def put(self, block):
        self.blocks.append(block)

    def take(self):
        return self.blocks.pop(0)

    def remove(self, block):
        if block not in self.blocks:
            raise KeyError(block)
        self.blocks.remove(block)


class Copies(Idle):
    def take(self):
        if not self.blocks:
            raise IndexError
        block = list(self.blocks)[0]
        del self.blocks[block]
        return block


class AThousand(Idle):
    def put(self, block):
        super().put(block)
        if len(self.blocks) > 1000:
            self.blocks.popitem()


class NewestFirst(Idle):
    def take(self):
        if not self.blocks:
            raise IndexError
        return self.blocks.popitem()[0]


class Forgiving(Idle):
    def remove(self, block):
        self.blocks.pop(block, None)


class SaysKeyError(Idle):
    def take(self):
        return self.blocks.popitem(last=False)[0]


class OneForAll(Idle):
    everywhere = OrderedDict()

    def __init__(self):
        self.blocks = self.everywhere


class BySmallest(Idle):
    def take(self):
        if not self.blocks:
            raise IndexError
        block = min(self.blocks)
        del self.blocks[block]
        return block


class CountsAll(Idle):
    def __init__(self):
        super().__init__()
        self.all = 0

    def put(self, block):
        super().put(block)
        self.all += 1

    def __len__(self):
        return self.all


def spy_out(ask, words, B, blocks):
    known = []
    for _ in range(blocks):
        for guess in product(words, repeat=B):
            if ask([*known, *guess, -7]) == 1:
                known += guess
                break
    return known


def cached_by_itself(ask, words, B, blocks):
    """With B = 1, the token behind a guess is a block as well, and is found for the next guess."""
    known = []
    for _ in range(blocks):
        for guess in product(words, repeat=B):
            if ask([*known, *guess, words[0]]) == 1:
                known += guess
                break
    return known


def by_recursion(ask, words, B, blocks):
    if blocks == 0:
        return []

    def guesses(n):
        return [[]] if n == 0 else [[*rest, word] for rest in guesses(n - 1) for word in words]

    def search(known):
        if len(known) == B * blocks:
            return known
        for guess in guesses(B):
            if ask(known + guess + [-5]) <= 1:
                return search(known + guess)
        return known

    return search([])


def without_the_last_guess(ask, words, B, blocks):
    """What remains when all others are wrong needs no question."""
    secret = []
    every = list(product(words, repeat=B))
    for _ in range(blocks):
        secret += next((g for g in every[:-1] if ask([*secret, *g, 0]) < B + 1), every[-1])
    return secret


def no_token_behind(ask, words, B, blocks):
    """The last token is always computed, so a whole block at the end is never found whole."""
    known = []
    for _ in range(blocks):
        for guess in product(words, repeat=B):
            if ask([*known, *guess]) == 0:
                known += guess
                break
    return known


def all_at_once(ask, words, B, blocks):
    for guess in product(words, repeat=B * blocks):
        if ask([*guess, 0]) == 1:
            return list(guess)
    return []


def last_hit(ask, words, B, blocks):
    """Asks everything, each twice: its own questions are cached, too."""
    known = []
    for _ in range(blocks):
        best = None
        for guess in product(words, repeat=B):
            ask([*known, *guess, 0])
            if ask([*known, *guess, 0]) == 1:
                best = guess
        known += best
    return known


def looks_inside(ask, words, B, blocks):
    """Reads the server's memory instead of asking."""
    memory = next(cell.cell_contents for cell in ask.__closure__ if isinstance(cell.cell_contents, PrefixMemory))
    known, parent = [], ""
    for _ in range(blocks):
        for guess in product(words, repeat=B):
            name = hashlib.sha256(repr((parent, guess, "")).encode()).hexdigest()
            if name in memory.block:
                known, parent = [*known, *guess], name
                break
    return known


def calls_inside(ask, words, B, blocks):
    memory = next(cell.cell_contents for cell in ask.__closure__ if isinstance(cell.cell_contents, PrefixMemory))
    return spy_out(lambda prompt: len(prompt) - B * len(memory.find(prompt[:-1])), words, B, blocks)


def first_block_only(ask, words, B, blocks):
    return spy_out(ask, words, B, 1) * blocks


RIGHT = {
    "tokens_saved": [tokens_saved, block_by_block, with_takewhile],
    "chain": [chain, running_hash, as_numbers, numbered],
    "Idle": [Idle, WithTickets, Linked],
    "spy_out": [spy_out, by_recursion, without_the_last_guess],
}
WRONG = {
    "tokens_saved": [
        lambda before, prompt, B: with_takewhile(before, [*prompt, None], B),  # the last need not be computed?
        lambda before, prompt, B: min(with_takewhile(before, prompt, 1), len(prompt) - 1),  # half blocks too
        lambda before, prompt, B: len(serve_names(before, prompt, B)) * B,
        lambda before, prompt, B: sum(a == b for a, b in zip(before, prompt[:-1], strict=False)) // B * B,
        lambda before, prompt, B: max(0, with_takewhile(before, prompt, B) - B),
        lambda before, prompt, B: (before.reverse(), before.reverse(), before.append(0), 0)[-1],
    ],
    "chain": [
        whole_prefixes,
        joined,
        lambda tokens, B, salt: chain(tokens, B, salt or ""),  # no salt, and an empty one
        lambda tokens, B, salt: chain(tokens, 1, salt)[B - 1 :: B],  # B itself is forgotten
        lambda tokens, B, salt: names(tokens, B, salt),
        lambda tokens, B, salt: [name[:2] for name in chain(tokens, B, salt)],  # 256 names
        lambda tokens, B, salt: [name[:8] for name in chain(tokens, B, salt)],  # 32 bits
        lambda tokens, B, salt: [chain(tokens[i : i + B], B, salt)[0] for i in range(0, len(tokens) // B * B, B)],
        lambda tokens, B, salt: chain(tokens, B, str(salt)),
        lambda tokens, B, salt: chain([*tokens, *[0] * (-len(tokens) % B)], B, salt),
    ],
    "Idle": [AsAList, Copies, AThousand, NewestFirst, Forgiving, SaysKeyError, OneForAll, BySmallest, CountsAll],
    "spy_out": [
        no_token_behind, cached_by_itself, all_at_once, last_hit, looks_inside, calls_inside, first_block_only,
        lambda ask, words, B, blocks: [words[0]] * (B * blocks),
        lambda ask, words, B, blocks: tuple(map(str, spy_out(ask, words, B, blocks))),
    ],
}  # fmt: skip


def serve_names(before, prompt, B):
    return {*names(before, B)} & {*names(prompt[:-1], B)}
