"""What kernels call to send and receive packets, in the text of each backend."""

from __future__ import annotations

from collections.abc import Callable

from moekit.backends import packet
from moekit.compile.tile.layouts import PAIR


def _data(name: str, words: int) -> str:
    return ", ".join(f"{name}_{w}" for w in range(words))


def _triton_send(words: int) -> str:
    data, put = _data("data", words), packet.send(words)
    return f'''@triton.jit
def send_{words}(way, row, epoch, column, columns: tl.constexpr, there, {data}):
    """Put packets into a mailbox, {words} at once, but into one's own; the first one's data again."""
    put: tl.constexpr = {packet.literal(put.text)}
    at = packets(way, row, epoch, column, columns, {words * packet.BYTES})
    args = [{data}, at, epoch, there & tl.cast(way != 0, tl.int32)]
    return tl.inline_asm_elementwise(put, "{put.operands}", args, dtype=tl.int32, is_pure=False, pack=1)
'''


def _triton_receive(words: int, n: int) -> str:
    data = "data.to(tl.int32), (data >> 32).to(tl.int32)" if words == 2 else "data"
    return f'''@triton.jit
def receive_{words}x{n}(way, row, epoch, column, columns: tl.constexpr, there, errors, most, sender: tl.constexpr,
                {_data("own", words)}):
    """Wait for accesses of {words} packets of an epoch, {n} at a time; their data, or one's own. What comes too late is said in
    the word of errors."""
    wait: tl.constexpr = {packet.literal(packet.receive(words, n).text)}
    at = packets(way, row, epoch, column, columns, {words * packet.BYTES})
    there = there & tl.cast(way != 0, tl.int32)
    args = [{_data("own", words)}, at, epoch, there, errors, most, tl.full((), sender + 1, tl.int32)]
    kinds: tl.constexpr = "{packet.receive(words, n).operands}"
    data = tl.inline_asm_elementwise(wait, kinds, args, dtype=tl.int{32 * words}, is_pure=False, pack={n})
    return {data}
'''


def _pallas_send(words: int) -> str:
    data, put = _data("data", words), packet.send(words)
    return f'''def send_{words}(way, row, epoch, column, columns, mask, {data}):
    """Put packets into a mailbox, {words} at once, but into one's own; the first one's data again."""
    put = {packet.literal(put.text)}
    at, there = packets(way, row, epoch, column, columns, {words * packet.BYTES}, mask)
    return elementwise(put, "{put.operands}", ({data}, at, epoch, there), data_0.shape)
'''


def _pallas_receive(words: int, n: int) -> str:
    own = _data("own", words)
    data = f"    return elementwise(wait, kinds, args, own_0.shape, {n})"
    if words == 2:  # which JAX's lowering has no two results for
        data = f"""    with jax.enable_x64(True):
        data = elementwise(wait, kinds, args, own_0.shape, {n}, jnp.int64)
        return data.astype(jnp.int32), (data >> 32).astype(jnp.int32)"""
    return f'''def receive_{words}x{n}(way, row, epoch, column, columns, mask, errors, most, sender, {own}):
    """Wait for accesses of {words} packets of an epoch, {n} at a time; their data, or one's own. What comes too late is said in
    the word of errors."""
    wait = {packet.literal(packet.receive(words, n).text)}
    at, there = packets(way, row, epoch, column, columns, {words * packet.BYTES}, mask)
    args = {own}, at, epoch, there, errors, most, jnp.full(own_0.shape, sender + 1, jnp.int32)
    kinds = "{packet.receive(words, n).operands}"
{data}
'''


def _each(send: Callable[[int], str], receive: Callable[[int, int], str]) -> dict[str, str]:
    """A helper for each number of packets in an access, and of accesses that a lane waits for."""
    counts = range(1, PAIR + 1)
    found = {f"send_{words}": send(words) for words in counts}
    return found | {f"receive_{words}x{n}": receive(words, n) for words in counts for n in packet.TOGETHER}


TRITON = _each(_triton_send, _triton_receive) | {
    "packets": '''@triton.jit
def packets(way, row, epoch, column, columns: tl.constexpr, size: tl.constexpr):
    """The addresses of packets: two slots for each row, each of so many columns of so many bytes."""
    return way + ((tl.cast(row, tl.int64) * 2 + tl.cast(epoch & 1, tl.int64)) * columns + column) * size
''',
    "split_4": '''@triton.jit
def split_4(fours):
    """Neighbours, four at a time, apart: the last two dimensions count them."""
    first, second = tl.split(fours)
    data_0, data_2 = tl.split(first)
    data_1, data_3 = tl.split(second)
    return data_0, data_1, data_2, data_3
''',
}

PALLAS = _each(_pallas_send, _pallas_receive) | {
    "ways": '''def ways(mail_ref, n):
    """Addresses, of which each half is an int32, the lower one first: JAX has int64 in kernels, and not as a rule in arrays."""
    halves = [plt.load(mail_ref.at[i]) for i in range(2 * n)]
    with jax.enable_x64(True):
        pairs = zip(halves[0::2], halves[1::2], strict=True)
        return [high.astype(jnp.int64) * 2**32 + (low.astype(jnp.int64) & 0xFFFFFFFF) for low, high in pairs]
''',
    "packets": '''def packets(way, row, epoch, column, columns, size, mask):
    """The addresses of packets: two slots for each row, which may be a literal, each of so many columns of so many bytes. And
    where there are any: of those of `mask`, if the way does not lead to oneself."""
    with jax.enable_x64(True):
        at = way + (((epoch & 1).astype(jnp.int64) + row + row) * columns + column) * size
        return at, (mask & (way != 0)).astype(jnp.int32)
''',
    "elementwise": """def elementwise(text, operands, args, shape, pack=1, dtype=jnp.int32):
    args = [jnp.broadcast_to(x, shape) for x in args]
    out = [jax.ShapeDtypeStruct(shape, dtype)]
    return plt.elementwise_inline_asm(text, args=args, constraints=operands, pack=pack, result_shape_dtypes=out)[0]
""",
    "deinterleave": '''def deinterleave(x, n):
    """Neighbours along the last dimension, n at a time, apart."""
    if n == 1:
        return (x,)
    sides = jnp.split(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2), 2, axis=-1)
    first, second = (deinterleave(side.reshape(*x.shape[:-1], x.shape[-1] // 2), n // 2) for side in sides)
    return tuple(x for pair in zip(first, second, strict=True) for x in pair)
''',
    "interleave": '''def interleave(a, b):
    """An element of each in turn along the last dimension."""
    pairs = lax.concatenate([a.reshape(*a.shape, 1), b.reshape(*b.shape, 1)], a.ndim)
    return pairs.reshape(*a.shape[:-1], 2 * a.shape[-1])
''',
}
