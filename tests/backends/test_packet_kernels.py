"""The emitted kernels of a sum over two ranks, run on a CPU with memory in place of what only a GPU has, packets.

Each rank's kernel runs twice: what it sends does not hang on what comes, so the second time everything is there.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moekit.backends import packet, pallas
from moekit.compile import tile as t
from moekit.compile.plan import plan
from moekit.compile.tile.ranks import SLOTS

from .samples import viewed
from .test_packets import bound

ROWS, RANKS, LAST = 6, 2, 40  # of a call; the last epoch


def drawn(width: int, dtype: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Each rank's part, residual and weight."""
    rng = np.random.default_rng(width)
    kind = jnp.dtype(dtype)
    parts = [rng.standard_normal((ROWS, width)).astype(kind) for _ in range(RANKS)]
    return parts, rng.standard_normal((ROWS, width)).astype(kind), rng.standard_normal(width).astype(kind)


def in_order(parts: list[np.ndarray], residual: np.ndarray) -> np.ndarray:
    """The float32 sum in the order of ranks, rounded once."""
    return (parts[0].astype(np.float32) + parts[1].astype(np.float32) + residual.astype(np.float32)).astype(residual.dtype)


class Memory:
    """Words by address: what `send` puts there, and `receive` finds."""

    def __init__(self):
        self.words: dict[int, tuple[int, int]] = {}
        self.missing = 0

    def places(self, shape: tuple[int, ...], words: int, way, row, epoch, column, columns, mask) -> tuple[np.ndarray, ...]:
        """Addresses, epochs and where there are any, for each element."""
        row, slot, column = (np.asarray(x).astype(np.int64) for x in (row, epoch & 1, column))
        at = int(way) + ((row * SLOTS + slot) * columns + column) * words * packet.BYTES
        return tuple(np.broadcast_to(np.asarray(x), shape) for x in (at, epoch, mask & (int(way) != 0)))

    def send(self, words: int):
        """What stands for `send_N`."""

        def send(way, row, epoch, column, columns, mask, *data):
            at, number, there = self.places(data[0].shape, words, way, row, epoch, column, columns, mask)
            for i in zip(*there.nonzero(), strict=True):
                for w, x in enumerate(data):
                    assert at[i] % (words * packet.BYTES) == 0
                    self.words[int(at[i]) + w * packet.BYTES] = int(np.asarray(x)[i]), int(number[i])
            return data[0]

        return send

    def receive(self, words: int):
        """What stands for `receive_NxM`."""

        def receive(way, row, epoch, column, columns, mask, errors, most, sender, *own):
            at, number, there = self.places(own[0].shape, words, way, row, epoch, column, columns, mask)
            found = [np.array(x) for x in own]
            for i in zip(*there.nonzero(), strict=True):
                for w in range(words):
                    data, came = self.words.get(int(at[i]) + w * packet.BYTES, (0, 0))
                    self.missing += came != number[i]
                    found[w][i] = data
            return tuple(map(jnp.asarray, found)) if words > 1 else jnp.asarray(found[0])

        return receive


class Ref:
    """An array that a kernel loads from and stores to."""

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def at(self):
        """`ref.at[index]`, as `plt.load` and `plt.store` take it."""
        return self

    def __getitem__(self, index):
        return self.array, index if isinstance(index, tuple) else (index,)


def load(at, mask=None, other=0):
    """`plt.load`."""
    array, index = at
    index = np.broadcast_arrays(*map(np.asarray, index))
    mask = np.broadcast_to(True if mask is None else np.asarray(mask), index[0].shape)
    return jnp.asarray(np.where(mask, array[tuple(np.where(mask, i, 0) for i in index)], np.asarray(other).astype(array.dtype)))


def store(at, value, mask=None):
    """`plt.store`."""
    array, index = at
    index = np.broadcast_arrays(*map(np.asarray, index))
    mask = np.broadcast_to(True if mask is None else np.asarray(mask), index[0].shape)
    array[tuple(i[mask] for i in index)] = np.broadcast_to(np.asarray(value), mask.shape)[mask]


def tables(at: list[int], width: int) -> list[list[int]]:
    """Every rank's way to the mailboxes at `at`."""
    return [packet.addresses(at, me, packet.region(16, width), 7) for me in range(RANKS)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("width", [3, 37, 40, 500])
def test_pallas(width, dtype):
    """The sum on both ranks, to the bit; nothing is waited for that nobody sends."""
    graph, sizes = bound(dtype, RANKS, width)
    channel = {
        "tp_mail": t.Mailbox("tp_mail", RANKS, width),
        "tp_epochs": t.Viewed("tp_epochs", (16,), (0,), (0,), (1,)),
    }
    (program,) = plan(graph, None, viewed(graph, sizes) | channel, sizes).programs
    namespace: dict = {}
    exec(pallas.emit(program).replace("from jax.experimental", "#"), namespace)
    parts, residual, weight = drawn(width, dtype)
    memory, outs = Memory(), []
    for again in (False, True):
        memory.missing = 0
        for me, table in enumerate(tables([1 << 20, 1 << 40], width)):
            epochs = np.full(16, LAST, np.int32)
            total, out = np.zeros_like(residual), np.zeros_like(residual)
            given = [parts[me], residual.copy(), weight, np.zeros(1, np.int32), epochs, total, out, epochs]
            namespace |= {"plt": SimpleNamespace(load=load, store=store), "barrier": lambda: None}
            namespace |= {"ways": lambda ref, n, table=table: table}
            namespace |= {f"send_{w}": memory.send(w) for w in (1, 2)}
            namespace |= {f"receive_{w}x{n}": memory.receive(w) for w in (1, 2) for n in packet.TOGETHER}
            for number in range(program.programs(sizes)):
                namespace["pl"] = SimpleNamespace(program_id=lambda axis, number=number: jnp.int32(number))
                with jax.disable_jit():  # loops in Python, so that they load and store numbers
                    namespace["all_reduce_add_rms_norm_kernel"](*map(Ref, given))
            outs += [(total, out, epochs)] if again else []
    assert not memory.missing
    for total, out, epochs in outs:
        np.testing.assert_array_equal(total, in_order(parts, residual))
        np.testing.assert_array_equal(out, outs[0][1])
        assert [*epochs] == [LAST + 1] * ROWS + [LAST] * (16 - ROWS)


TRITON = """
import re
import numpy as np
import torch
import triton
import triton.language as tl
from moekit.backends import packet
from moekit.backends import triton as emitter
from moekit.compile.plan import plan
from moekit.compile.tile.layouts import contiguous
from tests.backends.test_packet_kernels import LAST, RANKS, ROWS, drawn, in_order, tables
from tests.backends.test_packets import bound

SEND = '''@triton.jit
def send_{n}(way, row, epoch, column, columns: tl.constexpr, there, {data}):
    at = packets(way, row, epoch, column, columns, {size}).to(tl.pointer_type(tl.int32))
    mask = (there != 0) & (way != 0)
    {puts}
    return data_0
'''
RECEIVE = '''@triton.jit
def receive_{n}x{m}(way, row, epoch, column, columns: tl.constexpr, there, errors, most, sender: tl.constexpr, {own}):
    at = packets(way, row, epoch, column, columns, {size}).to(tl.pointer_type(tl.int32))
    mask = (there != 0) & (way != 0)
    {takes}
    return {came}
'''


def without_packets(text):
    for n in (1, 2):
        each = range(n)
        puts = [f"tl.store(at + {2 * w}, data_{w}, mask); tl.store(at + {2 * w + 1}, epoch + data_{w} * 0, mask)" for w in each]
        takes = [f"here_{w} = mask & (tl.load(at + {2 * w + 1}, mask, 0) == epoch)" for w in each]
        takes += [f"came_{w} = tl.where(mask, tl.where(here_{w}, tl.load(at + {2 * w}, mask, 0), -1), own_{w})" for w in each]
        names = {k: ", ".join(f"{k}_{w}" for w in each) for k in ("data", "own", "came")}
        plain = {f"send_{n}": SEND.format(n=n, size=8 * n, data=names["data"], puts="; ".join(puts))}
        for m in packet.TOGETHER:
            texts = {"own": names["own"], "came": names["came"], "takes": "; ".join(takes)}
            plain[f"receive_{n}x{m}"] = RECEIVE.format(n=n, m=m, size=8 * n, **texts)
        for name, own in plain.items():
            text = re.sub(rf"@triton.jit\\ndef {name}\\(.*?\\n\\n\\n", lambda _: own + "\\n\\n", text, flags=re.S)
    assert "asm" not in text
    return text


def run(dtype, width, folder):
    graph, sizes = bound(dtype, RANKS, width)
    (program,) = plan(graph, None, contiguous(graph, sizes)).programs
    path = f"{folder}/k_{dtype}_{width}.py"
    with open(path, "w") as file:
        file.write(without_packets(emitter.emit(program)))
    import importlib.util
    spec = importlib.util.spec_from_file_location(f"k_{dtype}_{width}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, emitter.kernel_name(program))
    parts, residual, weight = drawn(width, dtype)
    mail = [torch.zeros(RANKS * packet.region(16, width) // 8 + 2, dtype=torch.int64) for _ in range(RANKS)]
    found = []
    for again in range(2):
        for me, table in enumerate(tables([m.data_ptr() for m in mail], width)):
            epochs = torch.full((16,), LAST, dtype=torch.int32)
            given = {"partial": torch.tensor(parts[me]), "residual": torch.tensor(residual), "weight": torch.tensor(weight),
                     "out": torch.zeros(residual.shape, dtype=torch.tensor(residual).dtype), "tp_mail": torch.tensor(table),
                     "tp_epochs": epochs}
            args = [given[a.subject] if a.kind == "pointer" else ROWS if a.kind == "extent"
                    else given[a.subject].stride(a.dim) // a.unit for a in emitter.arguments(program)]
            kernel[(program.programs(sizes),)](*args, PDL=False)
            found += [given] if again else []
    for given in found:
        np.testing.assert_array_equal(given["residual"].numpy(), in_order(parts, residual))
        np.testing.assert_array_equal(given["out"].numpy(), found[0]["out"].numpy())
        assert given["tp_epochs"].tolist() == [LAST + 1] * ROWS + [LAST] * (16 - ROWS)


if __name__ == "__main__":
    import sys
    for dtype in ("float16", "float32"):
        for width in (3, 37, 40, 500):
            run(dtype, width, sys.argv[1])
    print("right")
"""


def test_triton(tmp_path):
    """The same in Triton's interpreter, with addresses of memory."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", TRITON, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "right\n", done.stderr[-3000:]
