"""Slow models of the baselines in plain Python, written from the paper's rules."""

import dataclasses


class Buddy:
    """A buddy allocator: the set of free chunks (begin, size), in KV slots."""

    def __init__(self, num_slots: int, smallest: int, largest: int):
        self.largest = largest
        self.free: set[tuple[int, int]] = set()
        begin, size = 0, largest
        while size >= smallest:
            while begin + size <= num_slots:
                self.free.add((begin, size))
                begin += size
            size //= 2

    def copy(self) -> "Buddy":
        other = Buddy(0, 1, self.largest)
        other.free = set(self.free)
        return other

    def allocate(self, size: int) -> tuple[int, int] | None:
        fitting = [chunk for chunk in self.free if chunk[1] >= size]
        if not fitting:
            return None
        begin, found = min(fitting, key=lambda chunk: (chunk[1], chunk[0]))
        self.free.remove((begin, found))
        while found > size:
            found //= 2
            self.free.add((begin + found, found))
        return begin, found

    def release(self, chunk: tuple[int, int]) -> None:
        begin, size = chunk
        while size < self.largest:
            # The first chunk of a pair begins at a multiple of the pair's size.
            is_first = begin % (2 * size) == 0
            buddy = (begin + size if is_first else begin - size, size)
            if buddy not in self.free:
                break
            self.free.remove(buddy)
            begin, size = min(begin, buddy[0]), 2 * size
        self.free.add((begin, size))

    def num_free(self) -> int:
        return sum(size for _, size in self.free)


@dataclasses.dataclass
class SlowRequest:
    """A running or waiting request."""

    number: int
    prompt: int
    output: int
    num_seqs: int
    generated: int = 0
    chunks: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def total(self) -> int:
        return self.prompt + self.output


def power_of_two(number: int) -> int:
    power = 1
    while power < number:
        power *= 2
    return power


class SlowOrca:
    """Iteration-level scheduling, first come first served, with whole reservations."""

    def __init__(self, num_slots, reserve, max_len, min_chunk, max_seqs, max_tokens):
        self.buddy = Buddy(num_slots, min_chunk, max_len)
        self.num_slots, self.reserve, self.max_len = num_slots, reserve, max_len
        self.min_chunk, self.max_seqs, self.max_tokens = min_chunk, max_seqs, max_tokens
        self.waiting: list[SlowRequest] = []
        self.running: list[SlowRequest] = []

    def needed(self, one: SlowRequest) -> int:
        estimate = {
            "max": self.max_len,
            "pow2": power_of_two(one.output),
            "oracle": one.output,
        }[self.reserve]
        return min(one.prompt + estimate, self.max_len)

    def allocate(self, one: SlowRequest) -> bool:
        before = self.buddy.copy()
        size = max(power_of_two(self.needed(one)), self.min_chunk)
        for _ in range(one.num_seqs):
            chunk = self.buddy.allocate(size)
            if chunk is None:
                self.buddy, one.chunks = before, []
                return False
            one.chunks.append(chunk)
        return True

    def release(self, one: SlowRequest) -> None:
        for chunk in one.chunks:
            self.buddy.release(chunk)

    def admit(self) -> bool:
        """Admit requests that fit; return whether memory prevents the next one."""
        while self.waiting:
            one = self.waiting[0]
            num_seqs = sum(other.num_seqs for other in self.running)
            # A running request computes a token per sequence; a new one its prompt.
            tokens = sum(o.num_seqs if o.generated else o.prompt for o in self.running)
            if num_seqs + one.num_seqs > self.max_seqs:
                break
            if tokens + one.prompt > self.max_tokens:
                break
            if not self.allocate(one):
                return True
            self.running.append(self.waiting.pop(0))
        if not self.waiting:
            return False
        if self.allocate(self.waiting[0]):
            self.release(self.waiting[0])
            self.waiting[0].chunks = []
            return False
        return True

    def rows(self, one: SlowRequest) -> list[tuple[int, int]]:
        if not one.generated:
            return [(one.prompt, one.prompt)]
        return [(1, one.prompt + one.generated)] * one.num_seqs

    def usage(self, is_stuck: bool) -> dict[str, int]:
        usage = dict.fromkeys(
            ("token_states", "reservation", "internal", "external"), 0
        )
        for one in self.running:
            # The purpose of every KV slot in the chunk of each sequence.
            for number, (_, size) in enumerate(one.chunks):
                has_states = one.generated or number == 0
                stored = one.prompt + one.generated if has_states else 0
                usage["token_states"] += stored
                usage["reservation"] += one.total - stored
                usage["internal"] += self.needed(one) - one.total
                usage["external"] += size - self.needed(one)
        free = self.buddy.num_free()
        taken = sum(size for one in self.running for _, size in one.chunks)
        usage["external"] += self.num_slots - free - taken
        usage["external" if is_stuck else "free"] = (
            usage["external"] + free if is_stuck else free
        )
        usage.setdefault("free", 0)
        return usage

    def step(self):
        """Run a step; return (rows, copied tokens, usage, first, ended)."""
        is_stuck = self.admit()
        usage = self.usage(is_stuck)
        rows = sorted(row for one in self.running for row in self.rows(one))
        copied = sum(
            (one.num_seqs - 1) * one.prompt
            for one in self.running
            if one.generated == 1
        )
        first, ended = [], []
        for one in self.running:
            one.generated += 1
            if one.generated == 1:
                first.append(one.number)
            if one.generated == one.output:
                ended.append(one.number)
                self.release(one)
        self.running = [one for one in self.running if one.number not in ended]
        return rows, copied, usage, sorted(first), sorted(ended)


class SlowContiguous(SlowOrca):
    """A row of the longest length for each sequence."""

    def __init__(self, num_slots, max_len, max_seqs, max_tokens):
        super().__init__(num_slots, "max", max_len, 1, max_seqs, max_tokens)
        self.buddy.free = {(n, max_len) for n in range(num_slots // max_len)}

    def needed(self, one):
        return self.max_len

    def allocate(self, one):
        if len(self.buddy.free) < one.num_seqs:
            return False
        one.chunks = [self.buddy.free.pop() for _ in range(one.num_seqs)]
        return True

    def release(self, one):
        self.buddy.free |= set(one.chunks)


class SlowNoEvict(SlowOrca):
    """Blocks for the prompt and the longest declared output, in any order."""

    def __init__(self, num_slots, limit, block_size, max_len, max_seqs, max_tokens):
        super().__init__(num_slots, "max", max_len, 1, max_seqs, max_tokens)
        self.limit, self.block_size = limit, block_size
        self.buddy.free = {
            (n * block_size, block_size) for n in range(num_slots // block_size)
        }

    def needed(self, one):
        length = one.prompt + (one.output if self.limit is None else self.limit)
        blocks = 0
        while blocks * self.block_size < min(length, self.max_len):
            blocks += 1
        return blocks * self.block_size

    def allocate(self, one):
        needed_blocks = self.needed(one) // self.block_size
        if len(self.buddy.free) < needed_blocks * one.num_seqs:
            return False
        # Store the blocks of a sequence as one chunk: only their number counts.
        for _ in range(one.num_seqs):
            blocks = [self.buddy.free.pop() for _ in range(needed_blocks)]
            one.chunks.append((blocks, self.needed(one)))
        return True

    def release(self, one):
        for blocks, _ in one.chunks:
            self.buddy.free |= set(blocks)


class SlowFasterTransformer:
    """Static batches: the next one starts when all of a batch has finished."""

    def __init__(self, num_slots, max_len, max_seqs):
        self.num_slots, self.max_len = num_slots, max_len
        self.num_rows = min(num_slots // max_len, max_seqs)
        self.total_rows = num_slots // max_len
        self.waiting: list[SlowRequest] = []
        self.running: list[SlowRequest] = []
        self.clock = 0

    def step(self):
        if not self.running:
            self.clock = 0
            rows = 0
            while self.waiting and rows + self.waiting[0].num_seqs <= self.num_rows:
                rows += self.waiting[0].num_seqs
                self.running.append(self.waiting.pop(0))
        lengths = []
        longest = max(one.prompt for one in self.running)
        usage = dict(token_states=0, reservation=0, internal=0)
        for one in self.running:
            if self.clock == 0:
                lengths.append((longest, longest))
                stored = one.prompt
            else:
                context = one.prompt + min(self.clock, one.output)
                lengths += [(1, context)] * one.num_seqs
                stored = one.num_seqs * context
            usage["token_states"] += stored
            usage["reservation"] += one.num_seqs * one.total - stored
            usage["internal"] += one.num_seqs * (self.max_len - one.total)
        num_rows = sum(one.num_seqs for one in self.running)
        rest = self.num_slots - num_rows * self.max_len
        lost = self.num_slots % self.max_len
        usage["external"] = rest if self.waiting else lost
        usage["free"] = 0 if self.waiting else rest - lost
        copied = 0
        if self.clock == 1:
            copied = sum((one.num_seqs - 1) * one.prompt for one in self.running)
        first = [one.number for one in self.running] if self.clock == 0 else []
        self.clock += 1
        ended = []
        if all(one.output <= self.clock for one in self.running):
            ended = [one.number for one in self.running]
            self.running = []
        return sorted(lengths), copied, usage, sorted(first), sorted(ended)
