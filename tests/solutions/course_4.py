"""Assignment 4, the scheduler: right solutions in several styles, and wrong ones."""

from course_solutions import Wrong

SCHEDULER = "minipaged/scheduling/scheduler.py"
PLAN = "minipaged/scheduling/plan.py"
ADMISSION = "minipaged/scheduling/admission.py"
PREEMPTION = "minipaged/scheduling/preemption.py"
GROWTH = "minipaged/scheduling/growth.py"

# --- one thing after the other: plain loops, early returns ------------------------------------------------------

PLAIN = {
    PLAN: '''
class Step:
    def counts_of(self, request):
        counts = {}
        extra = 0
        for seq in request.live:
            if not seq.in_memory:
                continue
            todo = request.target(seq) - seq.num_computed_tokens
            if todo < 1:
                continue
            more = self.grant(todo) - extra
            if more > todo - 1:
                more = todo - 1
            if more < 0:
                more = 0
            counts[seq.seq_id] = 1 + more
            extra += more
        return counts

    def grant(self, todo):
        if self.spare < 1:
            return self.spare
        if todo <= self.short:
            return self.spare
        if self.for_long is None:
            for_short = self.wanted_by_short(self)
            if for_short > self.spare // 2:
                for_short = self.spare // 2
            self.for_long = self.spare - for_short
        if self.for_long < self.spare:
            return self.for_long
        return self.spare

    def take(self, request, counts, copies, set_aside):
        total = 0
        for count in counts.values():
            total += count
        is_long = False
        for seq in request.live:
            if seq.in_memory and request.target(seq) - seq.num_computed_tokens > self.short:
                is_long = True
        self.spare -= total - set_aside
        if is_long and self.for_long is not None:
            self.for_long -= total - set_aside
        if total > len(counts):
            self.filled = True
        self.counts.append((request, counts))
        self.add_copies(copies)
''',
    ADMISSION: '''
class Admission:
    def let_in(self, step, room):
        if step.spare < 1:
            return
        for request in list(self._in_order()):
            if step.spare < 1:
                return
            if request.width > room:
                return
            if self._has_to_wait(request, step):
                continue
            if not self._may_overtake(request):
                return
            if request in self._queues.swapped:
                came = self._resume(request, step)
            else:
                came = self._admit(request, step)
            if not came:
                return
            room = room - request.width
            put(self._queues.running, request)

    def _has_to_wait(self, request, step):
        if request in self._queues.swapped:
            return False
        todo = request.target(request.live[0])
        if todo <= step.short:
            return False
        return step.grant(todo) <= 0

    def _find(self, request):
        if request.needs_prompt_logits:
            return self._memory.find([], request.cache_salt)
        first = request.live[0]
        return self._memory.find(first.tokens(0, request.target(first) - 1), request.cache_salt)

    def _first_chunk(self, request, prefix, step):
        wanted = request.target(request.live[0]) - prefix.num_tokens
        granted = step.grant(wanted)
        if granted >= wanted:
            return wanted
        if step.filled and not self._chunked_prefill:
            return 0
        return granted

    def _start(self, request, prefix, count):
        first = request.live[0]
        num_tokens = prefix.num_tokens + count
        size = self._memory.block_size
        rest = request.num_blocks(size) - (num_tokens + size - 1) // size
        answer = self._memory.allocate(first.seq_id, num_tokens, self._keep_free(rest), prefix)
        if isinstance(answer, NoSpace):
            return False
        first.in_memory = True
        first.num_computed_tokens = prefix.num_tokens
        return True

    def _keep_free(self, rest):
        if not self._queues.running:
            return 0
        return self.watermark_blocks + rest

    def _resume(self, request, step):
        live = request.live
        if len(live) > step.spare:
            return False
        size = self._memory.block_size
        rest = 0
        computed = {}
        for seq in live:
            blocks = -(-len(seq) // size) + (-seq.num_computed_tokens // size)
            rest += blocks if blocks > 0 else 1
            if seq.in_memory:
                computed[seq.seq_id] = seq.tokens(0, seq.num_computed_tokens)
        answer = self._memory.swap_in(list(computed), self._keep_free(rest), computed)
        if isinstance(answer, NoSpace):
            return False
        step.plan.resumed.append(request.request_id)
        for move in answer.moves:
            step.plan.swap_in.append(move)
        self._leave(self._queues.swapped, request)
        step.spare -= len(live)
        counts = step.counts_of(request)
        grown = self._memory.append(counts)
        if isinstance(grown, NoSpace):
            return True
        step.take(request, counts, grown.copies, len(counts))
        return True
''',
    PREEMPTION: '''
def preempt(request, memory, mode):
    held = []
    for seq in request.live:
        if seq.in_memory:
            held.append(seq)
    if mode == "auto":
        mode = "swap" if len(held) > 1 else "recompute"
    if mode == "swap":
        answer = memory.swap_out([seq.seq_id for seq in held])
        if not isinstance(answer, NoSpace):
            return Preempted("swap", answer.moves)
    for seq in held:
        memory.free(seq.seq_id)
        seq.num_computed_tokens = 0
        seq.in_memory = False
    return Preempted("recompute", [])

def share_rebuilt_prompt(request, memory):
    first = request.live[0]
    without = [seq for seq in request.live if not seq.in_memory]
    if not without:
        return
    if first.num_computed_tokens < len(request.prompt_token_ids):
        return
    for seq in without:
        memory.fork(first.seq_id, seq.seq_id)
        seq.in_memory = True
        seq.num_computed_tokens = first.num_computed_tokens
    _find_outputs_again(request, memory)

from minipaged.memory import NoSpace
''',
    SCHEDULER: '''
class Scheduler:
    def _check_size(self, request):
        if request.width > self.max_num_seqs:
            raise RequestRefused(f"{request.width} sequences are more than max_num_seqs={self.max_num_seqs}")
        blocks = request.most_blocks(self.memory.block_size)
        if blocks > self.memory.num_blocks:
            raise RequestRefused(f"{blocks} blocks are more than the pool's {self.memory.num_blocks}")

    def _continue_running(self, step):
        for request in list(self.ready()):
            if request not in self.running:
                continue
            counts = step.counts_of(request)
            while True:
                grown = self.memory.append(counts)
                if not isinstance(grown, NoSpace):
                    step.take(request, counts, grown.copies, len(counts))
                    break
                latest = self.running[-1]
                del self.running[-1]
                self._preempt(latest, step)
                if latest is request:
                    break

    def _preempt(self, request, step):
        mode = self.preemption
        if request.load is not None:
            mode = "recompute"
        done = preempt(request, self.memory, mode)
        request.load = None
        if done.mode == "swap":
            put(self.swapped, request)
        else:
            put(self.waiting, request)
        request.metrics.num_preemptions += 1
        self.num_preemptions[done.mode] += 1
        for move in done.moves:
            step.plan.swap_out.append(move)
        step.plan.preempted.append((request.request_id, done.mode))
        step.spare += len(request.live)

    def _scheduled(self, request, counts):
        result = []
        for seq_id in counts:
            seq = self.sequences[seq_id]
            start, end = seq.num_computed_tokens, seq.num_computed_tokens + counts[seq_id]
            draw, candidates = None, 0
            if end == len(seq):
                if request.search:
                    candidates = request.search.num_candidates
                else:
                    draw = request.draw(seq)
            result.append(ScheduledSequence(
                seq_id=seq_id, request_id=request.request_id, token_ids=seq.tokens(start, end - start), start=start,
                slots=self.memory.slots(seq_id, start, end - start), block_table=self.memory.current_table(seq_id),
                draw=draw, num_candidates=candidates, targets=request.targets(end),
            ))
        return result

    def _count_computed(self, plan):
        for scheduled in plan.sequences:
            if scheduled.branch_of is not None:
                continue
            seq = self.sequences[scheduled.seq_id]
            seq.num_computed_tokens = scheduled.start + scheduled.num_own
            self.memory.publish(seq.seq_id, seq.num_computed_tokens, seq.tokens)
''',
    GROWTH: '''
class LiveSequences:
    def _forget(self, seq):
        self._by_id.pop(seq.seq_id)
        if not seq.in_memory:
            return
        self._memory.free(seq.seq_id)
        seq.in_memory = False

    def _append(self, request, seq, output):
        rows = output.tokens[seq.seq_id]
        family = [seq]
        while len(family) < len(rows):
            child = self._fork(seq, len(family))
            family.append(child)
            request.sequences.append(child)
        for place in range(len(rows)):
            reason, stop_reason = self._append_tokens(request, family[place], rows[place])
            self._settle(family[place])
            if reason is not None:
                self.end(request, family[place], reason, stop_reason)

    def _append_tokens(self, request, seq, tokens):
        for token in tokens:
            seq.output_token_ids.append(token.token_id)
            seq.sampled.append(token)
            if token.token_id in request.stop_ids:
                return "stop", request.stop_reason(token.token_id)
            if len(seq.output_token_ids) == request.max_tokens:
                return "length", None
        return None, None
''',
}

# --- expressions, generators, recursion -------------------------------------------------------------------------

EXPRESSIONS = {
    PLAN: '''
class Step:
    def counts_of(self, request):
        todos = {s.seq_id: request.target(s) - s.num_computed_tokens for s in request.live if s.in_memory}
        return dict(self._shares([(seq_id, todo) for seq_id, todo in todos.items() if todo > 0], 0))

    def _shares(self, todos, taken):
        if todos:
            (seq_id, todo), *others = todos
            extra = min(todo - 1, max(0, self.grant(todo) - taken))
            yield seq_id, 1 + extra
            yield from self._shares(others, taken + extra)

    def grant(self, todo):
        long = todo > self.short and self.spare >= 1
        if long and self.for_long is None:
            self.for_long = max(self.spare - self.spare // 2, self.spare - self.wanted_by_short(self))
        return min(self.spare, self.for_long) if long else self.spare

    def take(self, request, counts, copies, set_aside):
        total, sequences = sum(counts.values()), (seq for seq in request.live if seq.in_memory)
        if self.for_long is not None and max(map(request.target_left, sequences), default=0) > self.short:
            self.for_long += set_aside - total
        self.spare += set_aside - total
        self.filled = self.filled or any(count > 1 for count in counts.values())
        self.counts += [(request, counts)]
        self.add_copies(copies)
'''.replace("map(request.target_left, sequences)", "(request.target(s) - s.num_computed_tokens for s in sequences)"),
    ADMISSION: '''
class Admission:
    def let_in(self, step, room):
        if step.spare > 0:
            self._let_in_first(iter(self._in_order()), step, room)

    def _let_in_first(self, requests, step, room):
        request = next(requests, None)
        if request is None or step.spare < 1 or request.width > room:
            return
        if self._has_to_wait(request, step):
            return self._let_in_first(requests, step, room)
        width, away = request.width, any(request is other for other in self._queues.swapped)
        if self._may_overtake(request) and (self._resume if away else self._admit)(request, step):
            put(self._queues.running, request)
            self._let_in_first(requests, step, room - width)

    def _has_to_wait(self, request, step):
        todo = request.target(request.live[0])
        return request not in self._queues.swapped and todo > step.short and step.grant(todo) < 1

    def _find(self, request):
        wanted = 0 if request.needs_prompt_logits else request.target(request.live[0]) - 1
        return self._memory.find(request.live[0].tokens(0, wanted), request.cache_salt)

    def _first_chunk(self, request, prefix, step):
        wanted = request.target(request.live[0]) - prefix.num_tokens
        count = min(step.grant(wanted), wanted)
        may_be_cut = self._chunked_prefill or not step.filled
        return count if count == wanted or may_be_cut else 0

    def _start(self, request, prefix, count):
        [leader, *_], slots = request.live, prefix.num_tokens + count
        missing = request.num_blocks(self._memory.block_size) - self._memory.blocks_for(slots)
        match self._memory.allocate(leader.seq_id, slots, prefix=prefix, keep_free=self._keep_free(missing)):
            case NoSpace():
                return False
        leader.num_computed_tokens, leader.in_memory = prefix.num_tokens, True
        return True

    def _keep_free(self, rest):
        return (self.watermark_blocks + rest) * bool(self._queues.running)

    def _resume(self, request, step):
        live, blocks_for = request.live, self._memory.blocks_for
        rest = sum(max(blocks_for(len(seq)) - blocks_for(seq.num_computed_tokens), 1) for seq in live)
        tokens = {seq.seq_id: seq.tokens(0, seq.num_computed_tokens) for seq in live if seq.in_memory}
        if len(live) > step.spare:
            return False
        match self._memory.swap_in(tokens.keys(), self._keep_free(rest), tokens):
            case NoSpace():
                return False
            case swapped:
                step.plan.swap_in.extend(swapped.moves)
        step.plan.resumed.append(request.request_id)
        self._leave(self._queues.swapped, request)
        step.spare -= len(live)
        counts = step.counts_of(request)
        match self._memory.append(counts):
            case NoSpace():
                pass
            case grown:
                step.take(request, counts, grown.copies, set_aside=len(counts))
        return True
''',
    PREEMPTION: '''
def preempt(request, memory, mode):
    held = {seq.seq_id: seq for seq in request.live if seq.in_memory}
    wants_swap = {"swap": True, "recompute": False, "auto": len(held) > 1}[mode]
    moved = memory.swap_out(held) if wants_swap else None
    return Preempted("swap", moved.moves) if isinstance(moved, Swapped) else _drop(list(held.values()), memory)

def _drop(held, memory):
    if not held:
        return Preempted("recompute")
    seq, *others = held
    memory.free(seq.seq_id)
    seq.in_memory, seq.num_computed_tokens = False, 0
    return _drop(others, memory)

def share_rebuilt_prompt(request, memory):
    leader, *others = request.live
    away = [seq for seq in others if not seq.in_memory]
    if away and leader.num_computed_tokens == len(request.prompt_token_ids):
        for seq in away:
            memory.fork(leader.seq_id, seq.seq_id)
            seq.in_memory, seq.num_computed_tokens = leader.in_memory, leader.num_computed_tokens
        _find_outputs_again(request, memory)
''',
    SCHEDULER: '''
class Scheduler:
    def _check_size(self, request):
        numbers = {
            "sequences": (request.width, self.max_num_seqs),
            "blocks": (request.most_blocks(self.memory.block_size), self.memory.num_blocks),
        }
        if too_many := {what: pair for what, pair in numbers.items() if pair[0] > pair[1]}:
            raise RequestRefused(f"too many (wanted, there are): {too_many}")

    def _continue_running(self, step):
        todo = deque(self.ready())
        while todo:
            request = todo.popleft()
            counts = step.counts_of(request)
            grown = self.memory.append(counts)
            while isinstance(grown, NoSpace) and request in self.running:
                latest = max(self.running, key=lambda other: other.arrival)
                self.running.remove(latest)
                self._preempt(latest, step)
                if latest in todo:
                    todo.remove(latest)
                if latest is not request:
                    grown = self.memory.append(counts)
            if request in self.running:
                step.take(request, counts, grown.copies, set_aside=len(counts))

    def _preempt(self, request, step):
        mode, request.load = "recompute" if request.load else self.preemption, None
        done = preempt(request, self.memory, mode)
        put({"swap": self.swapped, "recompute": self.waiting}[done.mode], request)
        step.spare, plan = step.spare + len(request.live), step.plan
        plan.swap_out.extend(done.moves)
        plan.preempted.append((request.request_id, done.mode))
        request.metrics.num_preemptions, self.num_preemptions[done.mode] = (
            request.metrics.num_preemptions + 1, self.num_preemptions[done.mode] + 1)

    def _scheduled(self, request, counts):
        return [self._row(request, self.sequences[seq_id], count) for seq_id, count in counts.items()]

    def _row(self, request, seq, count):
        span = seq.num_computed_tokens, count
        row = ScheduledSequence(
            seq.seq_id, request.request_id, seq.tokens(*span), span[0], self.memory.slots(seq.seq_id, *span),
            self.memory.current_table(seq.seq_id), targets=request.targets(sum(span)),
        )
        if sum(span) < len(seq):
            return row
        if request.search is None:
            return replace(row, draw=request.draw(seq))
        return replace(row, num_candidates=request.search.num_candidates)

    def _count_computed(self, plan):
        for seq, count in [(self.sequences[s.seq_id], s.num_own) for s in plan.sequences if s.branch_of is None]:
            seq.num_computed_tokens += count
            self.memory.publish(seq.seq_id, seq.num_computed_tokens, seq.tokens)

from collections import deque
from dataclasses import replace
''',
    GROWTH: '''
class LiveSequences:
    def _forget(self, seq):
        held, seq.in_memory = seq.in_memory, False
        if held:
            self._memory.free(seq.seq_id)
        self._by_id = {seq_id: other for seq_id, other in self._by_id.items() if other is not seq}

    def _append(self, request, seq, output):
        first, *others = output.tokens[seq.seq_id]
        rows = {0: (seq, first)} | {i: (self._fork(seq, i), row) for i, row in enumerate(others, 1)}
        request.sequences += [rows[i][0] for i in range(1, len(rows))]
        for one, row in rows.values():
            why = self._append_tokens(request, one, row)
            self._settle(one)
            if any(why):
                self.end(request, one, *why)

    def _append_tokens(self, request, seq, tokens):
        if not tokens:
            return None, None
        token, *others = tokens
        seq.sampled += [token]
        seq.output_token_ids += [token.token_id]
        if token.token_id in request.stop_ids:
            return "stop", request.stop_reason(token.token_id)
        left = request.max_tokens - len(seq.output_token_ids)
        return self._append_tokens(request, seq, others) if left else ("length", None)
''',
}

# --- other data structures: own attributes, own helpers, a ledger beside the step -----------------------------------

OTHER_STRUCTURES = {
    PLAN: '''
class Step:
    def _todos(self, request):
        return [(s.seq_id, request.target(s) - s.num_computed_tokens) for s in request.live if s.in_memory]

    def counts_of(self, request):
        todos = [(seq_id, todo) for seq_id, todo in self._todos(request) if todo > 0]
        counts = dict.fromkeys((seq_id for seq_id, _ in todos), 1)
        for seq_id, todo in todos:
            others = sum(counts.values()) - len(counts)
            counts[seq_id] += max(0, min(self.grant(todo) - others, todo - 1))
        return counts

    def grant(self, todo):
        room = self.spare
        if room >= 1 and todo > self.short:
            self._settle_for_long()
            room = sorted([room, self.for_long])[0]
        return room

    def _settle_for_long(self):
        if self.for_long is not None:
            return
        most = self.spare // 2
        self.for_long = self.spare - sorted([most, self.wanted_by_short(self)])[0]

    def take(self, request, counts, copies, set_aside):
        self.counts.append((request, counts))
        self.add_copies(copies)
        extra = -set_aside
        for count in counts.values():
            extra += count
            self.filled |= count > 1
        longs = [seq_id for seq_id, todo in self._todos(request) if todo > self.short]
        self.spare -= extra
        if longs and self.for_long is not None:
            self.for_long -= extra
''',
    ADMISSION: '''
class _Rooms:
    """How much is left: sequences, and tokens."""

    def __init__(self, step, sequences):
        self.step, self.sequences = step, sequences

    def has(self, request):
        return self.step.spare >= 1 and request.width <= self.sequences

class Admission:
    def let_in(self, step, room):
        rooms = _Rooms(step, room)
        candidates = list(self._in_order()) if step.spare >= 1 else []
        while candidates:
            request = candidates.pop(0)
            if not rooms.has(request):
                break
            if self._has_to_wait(request, step):
                continue
            if not self._may_overtake(request) or not self._come_in(request, step):
                break
            rooms.sequences -= request.width
            put(self._queues.running, request)

    def _come_in(self, request, step):
        return self._resume(request, step) if self._is_away(request) else self._admit(request, step)

    def _is_away(self, request):
        return id(request) in {id(other) for other in self._queues.swapped}

    def _has_to_wait(self, request, step):
        todo = request.target(request.live[0])
        is_long = todo > step.short
        return is_long and not self._is_away(request) and step.grant(todo) < 1

    def _find(self, request):
        leader = request.live[0]
        known = leader.prompt_token_ids + leader.output_token_ids
        end = 0 if request.needs_prompt_logits else request.target(leader) - 1
        return self._memory.find(known[:end], request.cache_salt)

    def _first_chunk(self, request, prefix, step):
        wanted = request.target(request.live[0]) - prefix.num_tokens
        granted = step.grant(wanted)
        if granted < wanted and not self._chunked_prefill and step.filled:
            granted = 0
        return min(granted, wanted)

    def _start(self, request, prefix, count):
        leader = request.live[0]
        num_tokens = prefix.num_tokens + count
        rest = request.num_blocks(self._memory.block_size) - self._memory.blocks_for(num_tokens)
        answer = self._memory.allocate(leader.seq_id, num_tokens, self._keep_free(rest), prefix)
        if isinstance(answer, Allocated):
            leader.in_memory = True
            leader.num_computed_tokens = prefix.num_tokens
        return isinstance(answer, Allocated)

    def _keep_free(self, rest):
        alone = len(self._queues.running) == 0
        return 0 if alone else rest + self.watermark_blocks

    def _resume(self, request, step):
        live = list(request.live)
        if step.spare >= len(live) and self._swapped_in(request, live, step):
            self._leave(self._queues.swapped, request)
            step.spare -= len(live)
            counts = step.counts_of(request)
            grown = self._memory.append(counts)
            if isinstance(grown, Appended):
                step.take(request, counts, grown.copies, set_aside=len(counts))
            return True
        return False

    def _swapped_in(self, request, live, step):
        held = [seq for seq in live if seq.in_memory]
        tokens = {seq.seq_id: seq.tokens(0, seq.num_computed_tokens) for seq in held}
        rest = 0
        for seq in live:
            rest += max(1, self._memory.blocks_for(len(seq)) - self._memory.blocks_for(seq.num_computed_tokens))
        answer = self._memory.swap_in([seq.seq_id for seq in held], self._keep_free(rest), tokens)
        if isinstance(answer, Swapped):
            step.plan.swap_in.extend(answer.moves)
            step.plan.resumed.append(request.request_id)
        return isinstance(answer, Swapped)

from minipaged.memory import Allocated, Appended, Swapped
''',
    PREEMPTION: '''
def preempt(request, memory, mode):
    held = list(filter(lambda seq: seq.in_memory, request.live))
    if mode != "recompute" and (mode == "swap" or len(held) >= 2):
        answer = memory.swap_out(seq.seq_id for seq in held)
        if isinstance(answer, Swapped):
            return Preempted(mode="swap", moves=list(answer.moves))
    while held:
        seq = held.pop(0)
        seq.in_memory, seq.num_computed_tokens = False, 0
        memory.free(seq.seq_id)
    return Preempted(mode="recompute")

def share_rebuilt_prompt(request, memory):
    prompt = len(request.prompt_token_ids)
    leader = request.live[0]
    missing = sum(not seq.in_memory for seq in request.live)
    if missing == 0 or leader.num_computed_tokens != prompt:
        return
    for seq in request.live[1:]:
        memory.fork(leader.seq_id, seq.seq_id)
        seq.in_memory, seq.num_computed_tokens = True, prompt
    _find_outputs_again(request, memory)
''',
    SCHEDULER: '''
class Scheduler:
    def _check_size(self, request):
        fits = request.width <= self.max_num_seqs
        fits = fits and request.most_blocks(self.memory.block_size) <= self.memory.num_blocks
        if not fits:
            raise RequestRefused(
                f"{request.width} sequences of {self.max_num_seqs}, {request.most_blocks(self.memory.block_size)} "
                f"blocks of {self.memory.num_blocks}"
            )

    def _continue_running(self, step):
        gone = set()
        for request in self.ready():
            if id(request) in gone:
                continue
            counts = step.counts_of(request)
            grown = self._grown(request, counts, step, gone)
            if grown is not None:
                step.take(request, counts, grown.copies, set_aside=len(counts))

    def _grown(self, request, counts, step, gone):
        """What memory answers once enough have made way; None if the request itself had to."""
        answer = self.memory.append(counts)
        if isinstance(answer, Appended):
            return answer
        latest = self.running.pop()
        gone.add(id(latest))
        self._preempt(latest, step)
        return None if latest is request else self._grown(request, counts, step, gone)

    def _preempt(self, request, step):
        done = preempt(request, self.memory, "recompute" if request.load is not None else self.preemption)
        request.load = None
        queue = self.waiting if done.mode == "recompute" else self.swapped
        place = sum(other.arrival < request.arrival for other in queue)
        queue.insert(place, request)
        step.plan.preempted.append((request.request_id, done.mode))
        step.plan.swap_out.extend(done.moves)
        for _ in request.live:
            step.spare += 1
        self.num_preemptions[done.mode] += 1
        request.metrics.num_preemptions += 1

    def _scheduled(self, request, counts):
        for seq_id, count in counts.items():
            seq = self.sequences[seq_id]
            start = seq.num_computed_tokens
            table, size = self.memory.current_table(seq_id), self.memory.block_size
            slots = [table[p // size] * size + p % size for p in range(start, start + count)]
            more = {}
            if seq.num_uncomputed == count:
                key = "num_candidates" if request.search else "draw"
                more[key] = request.search.num_candidates if request.search else request.draw(seq)
            yield ScheduledSequence(
                seq_id, request.request_id, seq.tokens(start, count), start, slots, table,
                targets=request.targets(start + count), **more,
            )

    def _count_computed(self, plan):
        own = [s for s in plan.sequences if s.branch_of is None]
        for s in own:
            self.sequences[s.seq_id].num_computed_tokens += s.num_own
        for s in own:
            seq = self.sequences[s.seq_id]
            self.memory.publish(s.seq_id, seq.num_computed_tokens, seq.tokens)

from minipaged.memory import Appended
''',
    GROWTH: '''
class LiveSequences:
    def __init__(self, memory, transfers):
        self._memory, self._transfers = memory, transfers
        self._all = []
        self._ended = set()

    def __getitem__(self, seq_id):
        if seq_id in self._ended:
            raise KeyError(seq_id)
        return self._all[seq_id]

    def __len__(self):
        return sum(seq is not None for seq in self._all)

    def start_over(self):
        self._all = [None] * len(self._all)

    def add(self, seq):
        seq.seq_id = len(self._all)
        self._all.append(seq)
        return seq

    def new_id(self):
        self._all.append(None)
        return len(self._all) - 1

    def _forget(self, seq):
        self._all[seq.seq_id] = None
        self._ended.add(seq.seq_id)
        if seq.in_memory:
            seq.in_memory, seq.num_computed_tokens = False, 0
            self._memory.free(seq.seq_id)

    def _append(self, request, seq, output):
        rows = list(output.tokens[seq.seq_id])
        children = [self._fork(seq, 1 + number) for number in range(len(rows) - 1)]
        request.sequences.extend(children)
        ends = []
        for one, row in zip([seq] + children, rows):
            ends.append((one, *self._append_tokens(request, one, row)))
            self._settle(one)
        for one, reason, stop_reason in ends:
            if reason:
                self.end(request, one, reason, stop_reason)

    def _append_tokens(self, request, seq, tokens):
        ids = [token.token_id for token in tokens]
        room = request.max_tokens - len(seq.output_token_ids)
        stops = [place for place, token in enumerate(ids[:room]) if token in request.stop_ids]
        kept = stops[0] + 1 if stops else min(room, len(ids))
        seq.sampled.extend(tokens[:kept])
        seq.output_token_ids.extend(ids[:kept])
        if stops:
            return "stop", request.stop_reason(ids[stops[0]])
        return ("length", None) if len(seq.output_token_ids) == request.max_tokens else (None, None)
''',
}

RIGHT = {
    "plain loops": PLAIN,
    "expressions and recursion": EXPRESSIONS,
    "other data structures": OTHER_STRUCTURES,
}

# --- what real engines had, and other mistakes -----------------------------------------------------------------

GITHUB = "https://github.com/"

WRONG = [
    # say no early
    Wrong(
        "only the prompt must fit into the pool", "say no early", SCHEDULER,
        "most = request.most_blocks(self.memory.block_size)",
        "most = self.memory.blocks_for(len(request.prompt_token_ids))",
        source=GITHUB + "vllm-project/vllm/issues/39734",
    ),
    Wrong(
        "a request that needs the whole pool is refused", "say no early", SCHEDULER,
        "if most > self.memory.num_blocks:", "if most >= self.memory.num_blocks:",
    ),
    # the budget
    Wrong(
        "each sample is granted all that is left", "the budget", PLAN,
        "self.grant(todo) - granted", "self.grant(todo)",
    ),
    Wrong(
        "a long prompt leaves nothing to short ones", "the budget", PLAN,
        "self.spare - min(self.spare // 2, self.wanted_by_short(self))", "self.spare",
        source=GITHUB + "ROCm/ATOM/pull/1835",
    ),
    Wrong(
        "what was set aside is paid twice", "the budget", PLAN,
        "extra = sum(counts.values()) - set_aside", "extra = sum(counts.values())",
    ),
    Wrong(
        "only a prompt counts, not what follows it", "the budget", PLAN,
        "todo = request.target(seq) - seq.num_computed_tokens if seq.in_memory else 0",
        "todo = max(1, len(seq.prompt_token_ids) - seq.num_computed_tokens) if seq.in_memory else 0",
        source=GITHUB + "vllm-project/vllm-ascend/pull/11313",
    ),
    Wrong(
        "what has no memory makes a request long", "the budget", PLAN,
        "for seq in request.live if seq.in_memory)", "for seq in request.live)",
    ),
    # admission
    Wrong(
        "what others computed under another salt is found", "admission", ADMISSION,
        "request.cache_salt)", "None)",
    ),
    Wrong(
        "without chunks a prompt is computed whole, whatever the budget is", "admission", ADMISSION,
        "count = min(wanted, step.grant(wanted))",
        "count = min(wanted, step.grant(wanted)) if self._chunked_prefill else wanted",
        source=GITHUB + "ROCm/ATOM/pull/408",
    ),
    Wrong(
        "samples count when they are forked, and not before", "admission", ADMISSION,
        "if step.spare < 1 or request.width > room:", "if step.spare < 1 or len(request.live) > room:",
        source=GITHUB + "vllm-project/vllm/pull/1034",
    ),
    Wrong(
        "a prompt may be found whole, and nothing is computed", "admission", ADMISSION,
        "leader.tokens(0, request.target(leader) - 1)", "leader.tokens(0, request.target(leader))",
        source=GITHUB + "vllm-project/vllm/pull/3239",
    ),
    Wrong(
        "blocks can be found once they are allocated", "admission", ADMISSION,
        "        leader.in_memory, leader.num_computed_tokens = True, prefix.num_tokens\n",
        "        leader.in_memory, leader.num_computed_tokens = True, prefix.num_tokens\n"
        "        self._memory.publish(leader.seq_id, slots, leader.tokens)\n",
        source=GITHUB + "GeeeekExplorer/nano-vllm/issues/208",
    ),
    Wrong(
        "the shortest prompt first, and long ones wait for ever", "admission", ADMISSION,
        "for request in self._in_order():",
        "for request in sorted(self._in_order(), key=lambda r: len(r.prompt_token_ids)):",
        source=GITHUB + "Avarok-Cybersecurity/atlas/pull/911",
    ),
    Wrong(
        "who finds no room is passed by smaller ones", "admission", ADMISSION,
        "            if not come_in(request, step):\n                return\n",
        "            if not come_in(request, step):\n                continue\n",
    ),
    Wrong(
        "the watermark is kept from a request that is alone, and it waits for ever", "admission", ADMISSION,
        "return self.watermark_blocks + rest if self._queues.running else 0", "return self.watermark_blocks + rest",
        source=GITHUB + "inference-sim/inference-sim/issues/963", also=("coming back",),
    ),
    Wrong(
        "a long prompt that gets nothing blocks short ones", "admission", ADMISSION,
        "return request not in self._queues.swapped and todo > step.short and step.grant(todo) < 1", "return False",
    ),
    # running
    Wrong(
        "the earliest makes way", "running", SCHEDULER,
        "victim = self.running.pop()  #", "victim = self.running.pop(0)  #",
    ),
    Wrong(
        "once somebody made way, nobody behind goes on", "running", SCHEDULER,
        "            else:\n                step.take(request, counts, grown.copies, set_aside=len(counts))\n",
        "            else:\n                step.take(request, counts, grown.copies, set_aside=len(counts))\n"
        "            if step.plan.preempted:\n                return\n",
        source=GITHUB + "vllm-project/vllm/pull/26765",
    ),
    Wrong(
        "who made way loses its place in the queue", "running", SCHEDULER,
        'put(self.swapped if done.mode == "swap" else self.waiting, request)',
        '(self.swapped if done.mode == "swap" else self.waiting).append(request)',
        source=GITHUB + "interestingLSY/swiftLLM/pull/6",
    ),
    Wrong(
        "what was set aside for who makes way is lost", "running", SCHEDULER,
        "        step.spare += len(request.live)\n", "",
    ),
    Wrong(
        "who makes way gives back one token, whatever its samples", "running", SCHEDULER,
        "step.spare += len(request.live)", "step.spare += 1",
    ),
    Wrong(
        "a chunk behind the prompt draws, though not all is computed again", "running", SCHEDULER,
        "last = start + count == len(seq)", "last = start + count >= len(seq.prompt_token_ids)",
        source=GITHUB + "vllm-project/vllm-ascend/pull/11313",
    ),
    Wrong(
        "computed tokens are those of the last step", "running", SCHEDULER,
        "seq.num_computed_tokens += s.num_own", "seq.num_computed_tokens = s.num_own",
    ),
    # making way
    Wrong(
        "who recomputes forgets what it has generated", "making way", PREEMPTION,
        "        seq.in_memory, seq.num_computed_tokens = False, 0\n",
        "        seq.in_memory, seq.num_computed_tokens = False, 0\n        seq.output_token_ids.clear()\n",
        source=GITHUB + "vllm-project/vllm/issues/16832",
    ),
    Wrong(
        "a full swap space ends everything", "making way", PREEMPTION,
        "        if isinstance(swapped, Swapped):\n            return",
        "        if not isinstance(swapped, Swapped):\n            raise RuntimeError('no swap space')\n"
        "        else:\n            return",
        source=GITHUB + "vllm-project/vllm/issues/5578",
    ),
    Wrong(
        "what was computed still counts after the memory is given up", "making way", PREEMPTION,
        "seq.in_memory, seq.num_computed_tokens = False, 0", "seq.in_memory = False",
        source=GITHUB + "vllm-project/vllm/pull/36752",
    ),
    Wrong(
        "samples don't fork the prompt until the first one is done", "making way", PREEMPTION,
        "leader.num_computed_tokens != len(request.prompt_token_ids)", "leader.num_computed_tokens != len(leader)",
    ),
    # coming back
    Wrong(
        "who comes back leaves no block for what it wants next", "coming back", ADMISSION,
        "moved = self._memory.swap_in(held, self._keep_free(rest), held)",
        "moved = self._memory.swap_in(held, 0, held)",
    ),
    Wrong(
        "who comes back takes more tokens than there are", "coming back", ADMISSION,
        "if step.spare < len(request.live):", "if step.spare < 1:",
    ),
    # tokens
    Wrong(
        "the first sample may end before the others fork", "tokens", GROWTH, text="""
class LiveSequences:
    def _append(self, request, seq, output):
        for index, tokens in enumerate(output.tokens[seq.seq_id]):
            one = seq
            if index:
                one = self._fork(seq, index)
                request.sequences.append(one)
            reason, stop_reason = self._append_tokens(request, one, tokens)
            self._settle(one)
            if reason:
                self.end(request, one, reason, stop_reason)
""",
    ),
    Wrong(
        "tokens behind a stop token are kept if the length ends there too", "tokens", GROWTH, text="""
class LiveSequences:
    def _append_tokens(self, request, seq, tokens):
        room = request.max_tokens - len(seq.output_token_ids)
        for token in tokens[:room]:
            seq.sampled.append(token)
            seq.output_token_ids.append(token.token_id)
            if len(tokens) < room and token.token_id in request.stop_ids:
                return "stop", request.stop_reason(token.token_id)
        if len(seq.output_token_ids) == request.max_tokens:
            return "length", None
        return None, None
""", source=GITHUB + "sgl-project/sglang/pull/33758",
    ),
    Wrong(
        "the length that was asked for counts, not what the model has room for", "tokens", GROWTH,
        ">= request.max_tokens:", ">= request.params.max_tokens:",
    ),
    Wrong(
        "an aborted request keeps its blocks in CPU memory", "tokens", GROWTH,
        "if seq.in_memory:", "if seq.in_memory and not self._memory.is_swapped(seq.seq_id):",
        source=GITHUB + "sgl-project/sglang/pull/18705",
    ),
]  # fmt: skip
