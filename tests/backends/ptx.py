"""A machine for the PTX of small kernels, in numpy: what Mosaic GPU compiles can be run, and its races seen, without a GPU.

All threads of all programs go along together, the ones at the lowest line first, so that they meet again behind a branch.
Memory is held to its bounds and alignment. A race is an access to what another thread of the program wrote, or a write over
what another one has read, with no barrier between; the same number written twice is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

THREADS, LANES, SPACE = 128, 32, 40  # bits of an address below the number of its buffer
SHARED = 65536
TYPES = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
    **{f"{k}{n}": np.dtype(f"{'int' if k == 's' else 'uint'}{n}") for k in "sub" for n in (16, 32, 64)},
    "b8": np.uint8, "u8": np.uint8,
}  # fmt: skip
CLASSES = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}
COMPARED: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
BINARY: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
UNARY: dict[str, Callable] = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


class Race(AssertionError):
    """Threads of a program that do not wait for each other."""


class Machine:
    """One launch of `programs` programs on `buffers`, which are written in place; `steps`: instructions at the most."""

    def __init__(self, text: str, buffers: Sequence[np.ndarray], programs: int, steps: int = 200_000):
        self.code, self.labels = _parsed(text)
        self.n, self.steps = programs * THREADS, steps
        self.thread = np.arange(self.n)
        self.special = {"%tid.x": self.thread % THREADS, "%ctaid.x": self.thread // THREADS, "%laneid": self.thread % LANES}
        self.registers: dict[str, np.ndarray] = {}
        self.memory = [b.reshape(-1).view(np.uint8) for b in buffers]
        self.memory.append(np.zeros(programs * SHARED, np.uint8))
        self.writer, self.reader = ([np.full(len(m), -1, np.int64) for m in self.memory] for _ in range(2))
        self.wrote, self.read = ([np.full(len(m), -1, np.int64) for m in self.memory] for _ in range(2))
        self.epoch = np.zeros(self.n, np.int64)
        self.copies: list[tuple] = []  # under way: buffer, places, threads, bytes, and the group of each thread's
        self.groups = np.zeros(self.n, np.int64)

    def run(self) -> None:
        """Run all threads to their end."""
        pc, end = np.zeros(self.n, np.int64), len(self.code)
        waiting = np.zeros(self.n, bool)
        for _ in range(self.steps):
            at = int(pc[~waiting].min(initial=end))
            if at >= end:
                assert not waiting.any(), "a barrier that some threads of a program do not come to"
                return
            guard, op, args = self.code[at]
            here = (pc == at) & ~waiting
            active = here
            if guard:
                on = self.registers[guard.lstrip("!")] != guard.startswith("!")
                active = here & on
            pc[here] += 1
            name = op.split(".")[0]
            if name == "bra":
                pc[active] = self.labels[args[0]]
            elif name in ("ret", "exit"):
                pc[active] = end
            elif name == "bar":
                if op.startswith("bar.red.popc"):  # of a predicate that holds nowhere
                    assert not self.get(args[3], "pred")[active].any(), op
                    self.put(args[0], np.zeros(self.n, np.uint32), active)
                waiting |= active
                together = np.repeat(waiting.reshape(-1, THREADS).all(1), THREADS)
                self.epoch[together] += 1
                waiting &= ~together
            elif active.any():
                with np.errstate(all="ignore"):
                    self.step(name, op, args, active)
        raise AssertionError("it does not end")

    def step(self, name: str, op: str, args: list[str], on: np.ndarray) -> None:
        """One instruction of the threads `on`."""
        parts = op.split(".")
        kind = parts[-1]
        if name in ("fence", "elect"):
            if name == "elect":
                self.put(args[0].split("|")[1], self.thread % LANES == 0, on)
        elif name in ("ld", "st"):
            self.access(name, parts, args, on)
        elif name == "cvta":
            self.put(args[0], self.get(args[1], "u64"), on)
        elif name == "mov":
            self.move(args, kind, on)
        elif name == "setp" and kind.endswith("x2"):
            found = self.compared(parts[1], *(self.halves(a, kind[:-2]) for a in args[1:]))
            for i, each in enumerate(args[0].split("|")):
                self.put(each, found[:, i], on)
        elif name == "setp":
            found = self.compared(parts[1], self.get(args[1], kind), self.get(args[2], kind))
            if len(args) == 4:
                other = self.get(args[3].lstrip("!"), "pred") != args[3].startswith("!")
                found = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[parts[2]](found, other)
            self.put(args[0], found, on)
        elif name == "selp":
            self.put(args[0], np.where(self.get(args[3], "pred"), self.get(args[1], kind), self.get(args[2], kind)), on)
        elif name == "shfl":
            self.put(args[0], self.shuffled(parts[2], args, on), on)
        elif name == "redux":
            self.put(args[0], self.reduced(parts[2], self.get(args[1], kind), on), on)
        elif name == "cp":
            self.copy(parts, args, on)
        elif name == "mma":
            self.multiply(parts, args, on)
        elif name == "cvt":
            self.put(args[0], self.converted(parts, args), on)
        else:
            self.put(args[0], self.computed(name, parts, args), on)

    def computed(self, name: str, parts: list[str], args: list[str]) -> np.ndarray:
        """What an arithmetic instruction makes."""
        kind = parts[-1]
        if kind.endswith("x2"):
            return _packed(self.computed_of(name, kind[:-2], [self.halves(a, kind[:-2]) for a in args[1:]]))
        values = [self.get(a, kind) for a in args[1:]]
        if name in ("mul", "mad") and parts[1] == "wide":
            wide = np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{2 * int(kind[1:])}")
            made = values[0].astype(wide) * values[1].astype(wide)
            return made + self.get(args[3], f"{kind[0]}{2 * int(kind[1:])}") if name == "mad" else made
        if name in ("mul", "mad") and parts[1] == "hi":
            assert int(kind[1:]) <= 32, parts
            made = ((values[0].astype(np.int64) * values[1].astype(np.int64)) >> int(kind[1:])).astype(values[0].dtype)
            return made + values[2] if name == "mad" else made
        if name == "shf":
            low, high, by = (v.astype(np.uint64) for v in values)
            by = by % 32 if parts[2] == "wrap" else np.minimum(by, 32)
            both = (high << np.uint64(32)) | low
            return ((both >> (32 - by)) if parts[1] == "l" else (both >> by)).astype(np.uint32)
        if name == "bfe":
            x, first, length = (v.astype(np.int64) for v in values)
            return ((x >> first) & ((1 << length) - 1)).astype(values[0].dtype)
        if name == "prmt":
            return self.permuted(values)
        return self.computed_of(name, kind, values, parts)

    def computed_of(self, name: str, kind: str, values: list[np.ndarray], parts: Sequence[str] = ()) -> np.ndarray:
        """An arithmetic instruction of values of its kind."""
        dtype = TYPES[kind]
        if name in ("fma", "mad"):
            if kind[0] in "sub" and kind != "bf16":
                return values[0] * values[1] + values[2]
            a, b, c = (v.astype(np.float64) for v in values)
            made = a * b + c
            if "rm" in parts:
                down = made.astype(dtype)
                return np.where(down.astype(np.float64) > made, np.nextafter(down, dtype(-np.inf)), down)
            return made.astype(dtype)
        if name in ("shl", "shr"):
            by, bits = values[1].astype(np.int64), 8 * np.dtype(dtype).itemsize
            moved = np.left_shift if name == "shl" else np.right_shift
            small = moved(values[0], np.minimum(by, bits - 1).astype(values[0].dtype))
            return np.where(by < bits, small, small if kind[0] == "s" and name == "shr" else 0).astype(dtype)
        if name in ("max", "min"):
            a, b = values
            ends = (np.maximum, np.minimum) if "NaN" in parts else (np.fmax, np.fmin)
            return ends[name == "min"](a, b)
        if name in UNARY:
            return UNARY[name](values[0]).astype(dtype)
        made = BINARY[name](*values)
        return made.astype(dtype)

    def compared(self, how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """A comparison; those that end in u hold for NaN."""
        if how in ("nan", "num"):
            found = (a != a) | (b != b)
            return found if how == "nan" else ~found
        if how in COMPARED:
            unordered = (a != a) | (b != b)
            return COMPARED[how](a, b) & ~unordered
        return COMPARED[how[:-1]](a, b) | (a != a) | (b != b)

    def converted(self, parts: list[str], args: list[str]) -> np.ndarray:
        """A number of another kind."""
        to, of = parts[-2:]
        if to.endswith("x2"):
            high, low = (self.get(a, of).astype(TYPES[to[:-2]]) for a in args[1:])
            return _packed([low, high])
        value = self.get(args[1], of)
        if "rni" in parts:
            value = np.rint(value)
        if "sat" in parts:
            value = np.clip(np.nan_to_num(value, nan=0.0), 0, 1)
        return value.astype(TYPES[to])

    def permuted(self, values: list[np.ndarray]) -> np.ndarray:
        """Bytes of two numbers as a third says."""
        a, b, how = (v.astype(np.uint64) for v in values)
        both, made = (b << np.uint64(32)) | a, np.zeros(self.n, np.uint64)
        for i in range(4):
            byte = (both >> (8 * ((how >> np.uint64(4 * i)) & np.uint64(7)))) & np.uint64(0xFF)
            made |= byte << np.uint64(8 * i)
        return made.astype(np.uint32)

    def move(self, args: list[str], kind: str, on: np.ndarray) -> None:
        """A register, or several that make one up."""
        if args[0].startswith("{"):
            names = args[0].strip("{}").split(",")
            raw = np.ascontiguousarray(np.broadcast_to(self.get(args[1], kind), self.n))
            pieces = raw.view(np.dtype(f"uint{8 * raw.itemsize // len(names)}")).reshape(self.n, -1)
            for i, each in enumerate(names):
                if each.strip() != "_":
                    self.put(each.strip(), pieces[:, i], on)
        elif args[1].startswith("{"):
            names = args[1].strip("{}").split(",")
            pieces = [self.get(x.strip(), f"b{8 * np.dtype(TYPES[kind]).itemsize // len(names)}") for x in names]
            self.put(args[0], np.stack(pieces, 1).reshape(-1).view(TYPES[kind]), on)
        else:
            self.put(args[0], self.get(args[1], kind), on)

    def shuffled(self, how: str, args: list[str], on: np.ndarray) -> np.ndarray:
        """What other lanes of the warp have, all of whom take part."""
        warps = on.reshape(-1, LANES)
        assert (warps.all(1) | ~warps.any(1)).all(), "a shuffle without some lanes of its warp"
        value, by = self.get(args[1], "b32"), self.get(args[2], "s32").astype(np.int64)
        lane = self.thread % LANES
        source = lane ^ by if how == "bfly" else by % LANES
        assert how in ("bfly", "idx"), how
        return value[self.thread - lane + source]

    def reduced(self, how: str, value: np.ndarray, on: np.ndarray) -> np.ndarray:
        """One number of all lanes of a warp."""
        warps = on.reshape(-1, LANES)
        assert (warps.all(1) | ~warps.any(1)).all(), "a reduction without some lanes of its warp"
        kinds = {"add": np.add, "max": np.maximum, "min": np.minimum}
        found = kinds[how].reduce(value.reshape(-1, LANES), axis=1).astype(value.dtype)
        return np.repeat(found, LANES)

    def multiply(self, parts: list[str], args: list[str], on: np.ndarray) -> None:
        """Each warp's product of 16 × 16 and 16 × 8 elements, and a sum: lanes have of them what the PTX ISA says in "Matrix
        Fragments for mma.m16n8k16 with floating point type". Products are added up exactly, then rounded once."""
        warps = on.reshape(-1, LANES)
        assert (warps.all(1) | ~warps.any(1)).all(), "a product without some lanes of its warp"
        assert parts[3:7] + parts[9:] == ["m16n8k16", "row", "col", "f32", "f32"], parts
        outs, *given = ([x.strip() for x in arg.strip("{}").split(",")] for arg in args)
        a, b = (np.stack([self.halves(x, kind) for x in held], 1) for held, kind in zip(given, parts[7:9], strict=False))
        a, b = (x.reshape(-1, 8, 4, x.shape[1], 2).astype(np.float64) for x in (a, b))  # warp, group, thread, register, half
        c = np.stack([self.get(x, "f32") for x in given[2]], 1).reshape(-1, 8, 4, 2, 2).astype(np.float64)
        left = a.reshape(-1, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
        right = b.transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
        made = left @ right + c.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)
        made = made.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(self.n, 4).astype(np.float32)
        for i, each in enumerate(outs):
            self.put(each, made[:, i], on)

    def access(self, name: str, parts: list[str], args: list[str], on: np.ndarray) -> None:
        """A load or a store of one register or several."""
        there, held = (args[1], args[0]) if name == "ld" else (args[0], args[1])
        names, kind = [x.strip() for x in held.strip("{}").split(",")], parts[-1]
        if "param" in parts or "param::entry" in parts:
            self.put(held, np.full(self.n, int(re.search(r"_param_(\d+)", there)[1]) << SPACE, np.uint64), on)
            return
        base, _, more = there.strip("[]").partition("+")
        address = self.get(base, "u64").astype(np.int64) + int(more or 0)
        size = np.dtype(TYPES[kind]).itemsize
        threads = np.flatnonzero(on)
        for i, each in enumerate(names):
            found = self.get(each, kind) if name == "st" else np.zeros(self.n, TYPES[kind])
            for b in np.unique(address[on] >> SPACE):
                mine = threads[address[threads] >> SPACE == b]
                at = address[mine] - (int(b) << SPACE)
                assert (at % (size * len(names)) == 0).all(), f"line {parts}: an access that is not aligned"
                kept = at > 0  # masked lanes read the first element, and take something else
                at += i * size
                assert ((at >= 0) & (at + size <= len(self.memory[b]))).all(), f"buffer {b}: out of bounds"
                if b == len(self.memory) - 1:
                    at += self.thread[mine] // THREADS * SHARED
                place = at[:, None] + np.arange(size)
                if name == "ld":
                    self.loads(b, place[kept], mine[kept])
                    found[mine] = self.memory[b][place].reshape(-1).view(TYPES[kind])
                else:
                    self.stores(b, place, mine, np.ascontiguousarray(found[mine]).view(np.uint8).reshape(-1, size))
            if name == "ld":
                self.put(each, found, on)

    def copy(self, parts: list[str], args: list[str], on: np.ndarray) -> None:
        """A copy into shared memory that is asked for, what ends a group of such, or waits for all groups but the last ones. It
        is there when its thread has waited, for others behind a barrier after that."""
        if parts[2] == "commit_group":
            self.groups[on] += 1
        elif parts[2] == "wait_group":
            kept = []
            for b, place, threads, found, group in self.copies:
                done = on[threads] & (group < self.groups[threads] - int(args[0]))
                self.stores(b, place[done], threads[done], found[done])
                kept.append((b, place[~done], threads[~done], found[~done], group[~done]))
            self.copies = [c for c in kept if len(c[2])]
        else:
            size, taken = int(args[2]), self.get(args[3], "u32")
            to, start = (self.get(a.strip("[]").partition("+")[0], "u64").astype(np.int64) for a in args[:2])
            to, start = (x + int(a.strip("[]").partition("+")[2] or 0) for x, a in zip((to, start), args, strict=False))
            threads, shared = np.flatnonzero(on), len(self.memory) - 1
            for b in np.unique(start[on] >> SPACE):
                mine = threads[start[threads] >> SPACE == b]
                at, end = start[mine] - (int(b) << SPACE), to[mine] % (1 << SPACE)  # of shared memory 32 bits are enough
                assert (at % size == 0).all(), "a copy that is not aligned"
                assert (end % size == 0).all(), "a copy that is not aligned"
                assert (end + size <= SHARED).all(), "out of shared memory"
                found = np.zeros((len(mine), size), np.uint8)
                there = taken[mine] == size
                assert (there | (taken[mine] == 0)).all(), "a copy of other sizes"
                assert (at[there] + size <= len(self.memory[b])).all(), f"buffer {b}: out of bounds"
                place = at[there][:, None] + np.arange(size)
                self.loads(b, place, mine[there])
                found[there] = self.memory[b][place]
                end = (end + mine // THREADS * SHARED)[:, None] + np.arange(size)
                self.copies.append((shared, end, mine, found, self.groups[mine]))

    def loads(self, b: int, place: np.ndarray, threads: np.ndarray) -> None:
        """Note who reads, and see that nobody else wrote there meanwhile."""
        epoch, who = self.epoch[threads][:, None], threads[:, None]
        raced = (self.writer[b][place] >= 0) & (self.writer[b][place] != who) & (self.wrote[b][place] == epoch)
        same = self.writer[b][place] // THREADS == who // THREADS
        if (raced & same).any():
            raise Race(f"buffer {b} is read while another thread writes it")
        again = (self.read[b][place] == epoch) & (self.reader[b][place] != who)
        self.reader[b][place] = np.where(again, -2, who)
        counts = np.unique(place, return_counts=True)
        self.reader[b][counts[0][counts[1] > 1]] = -2
        self.read[b][place] = epoch

    def stores(self, b: int, place: np.ndarray, threads: np.ndarray, values: np.ndarray) -> None:
        """Write, and see that nobody else has read or wrote something else there meanwhile."""
        epoch, who = self.epoch[threads][:, None], threads[:, None]
        raced = (self.reader[b][place] != -1) & (self.reader[b][place] != who) & (self.read[b][place] == epoch)
        if raced.any():
            raise Race(f"buffer {b} is written while another thread reads it")
        other = (self.writer[b][place] >= 0) & (self.writer[b][place] != who) & (self.wrote[b][place] == epoch)
        if (other & (self.memory[b][place] != values)).any():
            raise Race(f"buffer {b} is written twice")
        self.memory[b][place] = values
        if (self.memory[b][place] != values).any():
            raise Race(f"buffer {b} is written twice at once")
        self.writer[b][place], self.wrote[b][place] = who, epoch

    def get(self, text: str, kind: str) -> np.ndarray:
        """The numbers of an operand, one for each thread."""
        dtype = np.dtype(TYPES[kind])
        if text in self.special:
            return self.special[text].astype(dtype)
        if text.startswith("%"):
            raw = self.registers.get(text)
            if raw is None:  # what LLVM leaves undefined
                raw = np.zeros(self.n, CLASSES[re.match(r"%([a-z]+)", text)[1]])
            return raw if raw.dtype == dtype else raw.view(dtype) if raw.itemsize == dtype.itemsize else raw.astype(dtype)
        return np.full(self.n, _number(text, dtype, len(self.memory) - 1))

    def halves(self, text: str, kind: str) -> np.ndarray:
        """Two narrow floats of a register."""
        return np.ascontiguousarray(self.get(text, "b32")).view(TYPES[kind]).reshape(self.n, 2)

    def put(self, name: str, value: np.ndarray, on: np.ndarray) -> None:
        """Give the threads `on` a register's new number."""
        kind = CLASSES[re.match(r"%([a-z]+)", name)[1]]
        value = np.ascontiguousarray(np.broadcast_to(value, self.n))
        if value.dtype != kind:
            value = value.view(kind) if value.itemsize == np.dtype(kind).itemsize and kind != np.bool_ else value.astype(kind)
        old = self.registers.get(name)
        self.registers[name] = value.copy() if old is None else np.where(on, value, old)


def _packed(halves) -> np.ndarray:
    """Two narrow numbers in one of 32 bits, the first one below."""
    both = np.stack(list(halves), 1) if isinstance(halves, list) else halves
    return np.ascontiguousarray(both).view(np.uint32).reshape(-1)


def _number(text: str, dtype: np.dtype, shared: int):
    """A literal; the one symbol that there is begins shared memory."""
    if text.startswith("__dynamic_shmem__"):
        return np.array(shared << SPACE, np.uint64).astype(dtype)
    if text.startswith("0f"):
        return np.array(int(text[2:], 16), np.uint32).view(np.float32) if dtype.kind == "f" else np.uint32(int(text[2:], 16))
    if text.startswith("0d"):
        return np.array(int(text[2:], 16), np.uint64).view(np.float64)
    number = int(text.rstrip("U"), 0)
    if dtype.kind not in "iu" and dtype != np.bool_:
        return np.array(number, np.uint16).view(dtype)
    return np.array(number % (1 << 8 * dtype.itemsize), np.dtype(f"uint{8 * dtype.itemsize}")).view(dtype)


def _parsed(text: str) -> tuple[list[tuple[str, str, list[str]]], dict[str, int]]:
    """The instructions, each with its guard, name and operands; and where labels are."""
    code, labels = [], {}
    body = text[text.index("{", text.index(".entry")) :]
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if found := re.match(r"(\$\w+):", line):
            labels[found[1]] = len(code)
        elif line and line[0] not in ".{}" and line.endswith(";"):
            guard, line = re.match(r"(?:@(!?%p\d+)\s+)?(.*);", line).groups()
            op, _, rest = line.replace("\t", " ").partition(" ")
            args = [x.strip() for x in re.findall(r"\{[^}]*\}|[^,{}]+", rest) if x.strip()]
            code.append((guard or "", op, args))
    return code, labels
