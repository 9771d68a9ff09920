"""The JAX face of any fusion: a pure function on arrays and Views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moekit.compile import tile as t
from moekit.compile.passes.form import out_of_place, written_name
from moekit.compile.rules.alike import settled
from moekit.compile.rules.warpgroups import warpgroups
from moekit.compile.schedule import Schedule
from moekit.compile.schedule.legal import legal
from moekit.errors import AliasError, DtypeError, MoekitError, ScheduleError, ShapeError, UnavailableError
from moekit.jax import launch
from moekit.jax.doors import DOORS, KERNELS, best, gpu, refusal
from moekit.jax.explicit import automatically, axes_cut, kept
from moekit.jax.link import Link
from moekit.jax.program import Static, evaluated, launched
from moekit.jax.view import View, held, in_range, view
from moekit.lang.arguments import bind_arguments, face_signature, refuse_empty, refuse_schedule
from moekit.lang.fusion import LONGEST, Fusion
from moekit.lang.graph import Graph
from moekit.tune.table import serves, untuned
from moekit.tune.way import MOSAIC, TRITON, in_rows, way

IMPLEMENTATIONS = (*KERNELS, "xla")
COUNTED = 2**31  # elements that Pallas can tell apart in 32 bits; arrays of more than 2³² bytes have offsets of 64 (jax 0.11)
LINKED = (*DOORS, TRITON)  # whose kernels reach other ranks
PSUM = "psum"  # the one more that a sum over a mesh axis has


class Call:
    """One call of a fusion: operands as views, static parameters, where outputs go. Checked on construction.

    `link`: by what kernels reach the other ranks, where there are any. `kernels` keeps the link for the next call there.
    """

    def __init__(
        self, fusion: Fusion, operands: Mapping[str, object], params: Mapping[str, object], out, schedule,
        link: Link | None = None,
    ):  # fmt: skip
        refuse_schedule(fusion.name, schedule, Schedule)
        self.fusion, self.schedule, self.link = fusion, schedule, link
        self.views = {n: _operand(fusion, n, x) for n, x in operands.items()}
        shapes = {n: v.shape for n, v in self.views.items()}
        dtypes = {n: v.dtype.name for n, v in self.views.items()}
        self.binding = fusion.bind(shapes, dtypes, fusion.bind_params(params))
        self.graph = fusion.trace(self.binding)
        self.sizes = self.graph.sizes(dict(self.binding.sizes))
        refuse_empty(self.graph, self.sizes)
        _refuse_wide(self.graph)
        if schedule is not None and (why := legal(self.graph, schedule)):
            raise ScheduleError(why)
        self.names = [w.tensor for w in self.graph.writes]
        self.out = self._outputs(out)
        self._check_aliases()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an operand or output."""
        return self.graph.shape(name, self.sizes)

    def _outputs(self, out) -> dict[str, View]:
        if out is None:
            return {}
        given = out if isinstance(out, Sequence) and not isinstance(out, View) else (out,)
        if len(given) != len(self.names):
            raise ShapeError(
                f"{self.fusion.name}: out has {len(given)} entries; it needs {len(self.names)} ({', '.join(self.names)})"
            )
        views: dict[str, View] = {}
        for n, v in zip(self.names, given, strict=True):
            if v is None:
                continue
            if not isinstance(v, View):
                raise ShapeError(
                    f"{self.fusion.name}: out for {n} is {type(v).__name__}; it must be a View of the array to write to"
                )
            if v.shape != self.shape(n):
                raise ShapeError(f"{self.fusion.name}: out for {n} has shape {list(v.shape)}; it must be {list(self.shape(n))}")
            if v.dtype.name != self.graph.tensors[n].dtype:
                raise DtypeError(f"{self.fusion.name}: out for {n} is {v.dtype.name}; it must be {self.graph.tensors[n].dtype}")
            views[n] = v
        return views

    def _check_aliases(self) -> None:
        """Refuse an output that overlaps an operand or another output, unless it is that operand updated in place."""
        for n, v in self.out.items():
            others = [(m, w) for m, w in self.out.items() if m != n]
            others += [(m, w) for m, w in self.views.items() if not (m == n and w.base is v.base and w.same_elements(v))]
            for m, w in others:
                if w.base is v.base and v.overlaps(w):
                    raise AliasError(
                        f"{self.fusion.name}: out for {n} overlaps {m}; write to other elements, or to another array"
                    )

    def xla(self, library: str = "jax") -> dict[str, jax.Array]:
        """The outputs by array evaluation; a base written to is returned whole. `library`: "jax", or "psum" (libraries.py)."""
        evaluating = partial(self._evaluated, library)
        every = (*self.views.values(), *self.out.values())
        bases = {id(a): a for v in every for a in (v.base, *(at for _, at in v.picked))}
        if not self.cut:
            return evaluating(bases)
        dims = {n: [d.text for d in tensor.dims] for n, tensor in self.graph.tensors.items()}
        operands = [(dims[n], v) for n, v in self.views.items()]
        outs = {n: jax.typeof(self.out[n].base).sharding.spec if n in self.out else kept(operands, dims[n], self.shape(n))
                for n in self.names}  # fmt: skip
        return automatically(evaluating, bases, outs)

    def _evaluated(self, library: str, bases: dict[int, jax.Array]) -> dict[str, jax.Array]:
        def lying(v: View) -> View:
            return replace(v, base=bases[id(v.base)], picked=tuple((axis, bases[id(at)]) for axis, at in v.picked))

        outs = evaluated(self.fusion, self.binding, library)({n: lying(v).array() for n, v in self.views.items()})
        for n, v in self.out.items():  # outputs that go to one base are written one after the other
            bases = bases | {id(v.base): lying(v).set(outs[n])}
        return {n: bases[id(self.out[n].base)] if n in self.out else x for n, x in outs.items()}

    @property
    def cut(self) -> tuple[str, ...]:
        """The axes of a mesh with explicit axes over which operands, or bases to write to, are cut."""
        return axes_cut((*self.views.values(), *self.out.values()))

    def kernels(self, implementation: str) -> dict[str, jax.Array]:
        """The outputs by the emitted kernels; raises UnavailableError where they cannot go that way."""
        if why := refusal(implementation):
            raise UnavailableError(f"{self.fusion.name}: {why}; choose another implementation than {implementation}")
        if all(0 in self.shape(n) for n in self.names):
            return {
                n: self.out[n].base if n in self.out else launch.empty(self.shape(n), self.graph.tensors[n].dtype)
                for n in self.names
            }
        if any(v.size == 0 for v in self.views.values()):
            return self.xla()
        self._keep_rows()
        bases, layouts, separate, fresh = self._buffers()
        door = self._door(implementation, layouts)
        static = Static(self.fusion, self.binding, tuple(bases), tuple(layouts.items()), separate, frozenset(self.out), fresh,
                        self._scheduled(separate, layouts, door), door)  # fmt: skip
        results = launched(static)(*bases.values())
        if self.link is not None:
            self.link = self.link.after(results)
        return {n: results[layouts[static.target(n)].buffer] for n in self.names}

    def _door(self, implementation: str, layouts: Mapping) -> str:
        """By what kernels go: of `pallas` what a table of the GPU at hand says, but for a schedule, which is the caller's."""
        if implementation == "pallas" and self.schedule is None and self.link is None and (device := gpu()):
            placed = ((layouts[m], x) for n, x in self.graph.tensors.items() for m in (n, written_name(n)) if m in layouts)
            implementation = MOSAIC if way(device, self.graph) == MOSAIC and in_rows(self.graph, placed) else TRITON
        return "pallas" if implementation == TRITON else implementation

    def _scheduled(self, separate: frozenset[str], layouts: Mapping, target: str) -> Schedule:
        """The schedule that was given, or the rules' for the form of this call."""
        form = out_of_place(self.graph, separate)
        if target == "mosaic":
            return self.schedule or warpgroups(form, self.sizes)
        chosen = untuned(self.graph if serves(self.graph, form) else form, self.sizes)
        return self.schedule or settled(form, chosen, layouts)

    def unlinked(self) -> str | None:
        """Why packets do not serve this call; None where they do."""
        if self.link is None:
            return f"no link reaches the other ranks of {', '.join(self.graph.ranks)}"
        return self.link.room.refuses(self.graph, self.sizes, self.schedule or untuned(self.graph, self.sizes))

    def _keep_rows(self) -> None:
        """Where a `put` does not go in place, put the old rows there first: the kernel writes those at its ids only."""
        for n in [w.tensor for w in self.graph.writes if w.ids and not self._in_place(w.tensor)]:
            old = self.views[n].array()
            if n in self.out:
                base, was = self.out[n].set(old), self.out[n]
                self.out = {m: replace(v, base=base) if v.base is was.base else v for m, v in self.out.items()}
            else:
                self.views[n] = view(old)

    def _buffers(self):
        """Every base array once, the layout of every tensor in them, and the InOut tensors not updated in place."""
        bases: dict[str, jax.Array] = {}
        layouts: dict[str, t.Viewed | t.Mailbox] = {}

        def buffer(name: str, v: View) -> str:
            known = next((b for b, base in bases.items() if base is v.base), name)
            bases.setdefault(known, v.base)
            return known

        picking: dict[tuple[int, int], str] = {}  # what says at run time where operands lie: an operand of its own, once

        def layout(name: str, v: View) -> t.Viewed:
            places = []
            for axis, at in v.picked:
                key = id(at), v.base.shape[axis]
                if key not in picking:
                    picking[key] = f"{name}_at_{axis}"
                    while picking[key] in {*self.views, *self.names, *bases}:
                        picking[key] += "_"
                    bases[picking[key]] = in_range(at, v.base.shape[axis]).reshape(1)
                places.append((axis, picking[key]))
            return replace(_layout(buffer(name, v), v), picked=tuple(places))

        for n, v in self.views.items():
            layouts[n] = layout(n, v)
        if self.link is not None:
            held, lying = self.link.buffers(self.graph)
            bases, layouts = bases | held, layouts | lying
        separate, fresh = set(), []
        for n in self.names:
            is_update = n in self.views
            in_place = is_update and self._in_place(n)
            if is_update and not in_place:
                separate.add(n)
            target = written_name(n) if n in separate else n
            if n in self.out:
                layouts[target] = layout(f"{target}_base", self.out[n])
            elif not in_place:
                shape = self.shape(n)
                fresh.append((target, shape, self.graph.tensors[n].dtype))
                layouts[target] = t.Viewed.whole(target, shape)
        return bases, layouts, frozenset(separate), tuple(fresh)

    def _in_place(self, name: str) -> bool:
        """Whether an InOut operand's own buffer takes its new value: the out given is it, or it is a whole array of its own."""
        mine = self.views[name]
        if name in self.out:
            return self.out[name].base is mine.base and self.out[name].same_elements(mine)
        alone = all(v.base is not mine.base for n, v in self.views.items() if n != name)
        return alone and mine.same_elements(view(mine.base)) and all(v.base is not mine.base for v in self.out.values())


def _operand(fusion: Fusion, name: str, x) -> View:
    if isinstance(x, View):
        return x
    if isinstance(x, jax.Array | np.ndarray):
        return view(held(x, f"{fusion.name}: {name}"))
    raise MoekitError(f"{fusion.name}: {name} is {type(x).__name__}; it must be a JAX array or a View")


def _refuse_wide(graph: Graph) -> None:
    """Raise DtypeError for 64-bit integers where JAX would make 32-bit ones of them."""
    made = {n.dtype for n in graph.live_nodes()} | {t.dtype for t in graph.tensors.values()}
    if wide := [d for d in sorted(made) if jax.dtypes.canonicalize_dtype(d) != jnp.dtype(d)]:
        raise DtypeError(f"{graph.name}: it computes in {wide[0]}, which JAX has only with jax_enable_x64; enable it")


def _layout(buffer: str, v: View) -> t.Viewed:
    if long := [n for n in v.base.shape if n > LONGEST]:
        raise ShapeError(f"{buffer}: the base has {long[0]} elements along one axis; kernels count to {LONGEST}, so reshape it")
    if (elements := prod(v.base.shape)) > COUNTED and elements * v.dtype.itemsize <= 2 * COUNTED:
        raise ShapeError(
            f"{buffer}: the base has {elements} elements of one byte, and Pallas counts offsets in 32 bits up to {2 * COUNTED} "
            f"bytes; cut it into arrays of at most {COUNTED} elements"
        )
    return t.Viewed(buffer, tuple(v.base.shape), v.axes, v.starts, v.steps, v.fixed)


def op(fusion: Fusion) -> Callable:
    """The JAX function of a fusion: `op(my_fusion)(x, …, implementation=None, out=None, schedule=None)`.

    Operands are arrays or Views; outputs come back in declared order (one alone as itself). An InOut operand is updated
    functionally: its new value is returned. `out=View(...)` (a tuple where there are several outputs, None for those that
    are not redirected) writes there and returns the new base instead. `implementation`: None takes "pallas" on CUDA devices
    ("triton" where jax has no Pallas-Triton) and "xla" elsewhere and for operands cut over explicit mesh axes; both by name are
    interpreted on CPU. "pallas" goes by "pallas-triton", or by "mosaic" where a table of the GPU at hand says that this is
    faster for a fusion, its sizes and dtypes, whatever the number of tokens (moekit/tune/way.py); both can be named.
    Derivatives of both modes and vmap go through array evaluation; under `jax.shard_map` outputs vary as array evaluation's.
    Raises ShapeError, DtypeError, AliasError, ScheduleError or UnavailableError, each in one sentence, before anything runs.
    """

    def face(*args, implementation: str | None = None, out=None, schedule: Schedule | None = None, **kwargs):
        operands, params = bind_arguments(fusion, args, kwargs)
        call = Call(fusion, operands, params, out, schedule)
        outs = _serve(call, implementation)
        results = tuple(outs[n] for n in call.names)
        return results[0] if len(results) == 1 else results

    face.__name__ = face.__qualname__ = fusion.name
    face.__doc__ = f"{fusion.doc}\n\nAccepts arrays and Views; see `moekit.jax.op` for out=, implementation= and errors."
    face.__signature__ = face_signature(fusion)
    face.fusion = fusion
    return face


def _serve(call: Call, implementation: str | None) -> dict[str, jax.Array]:
    known = (*IMPLEMENTATIONS, PSUM) if call.fusion.mesh else IMPLEMENTATIONS
    if implementation not in (None, *known):
        raise UnavailableError(
            f"{call.fusion.name}: there is no implementation {implementation!r} for JAX; choose {' or '.join(known)}"
        )
    if implementation == PSUM:
        return call.xla(PSUM)
    if implementation in KERNELS and call.graph.ranks:
        over = ", ".join(call.graph.ranks)
        raise UnavailableError(f"{call.fusion.name}: kernels reach the ranks of {over} by a link; call moekit.jax.exchange")
    if implementation in KERNELS and call.cut:
        raise UnavailableError(
            f"{call.fusion.name}: its operands are cut over the explicit mesh axis {call.cut[0]!r} and kernels take whole "
            "arrays; call it inside jax.shard_map, or choose xla"
        )
    if implementation is None:
        plain = jax.default_backend() != "gpu" or call.cut or call.graph.ranks
        implementation = "xla" if plain else best()
    return call.xla() if implementation == "xla" else call.kernels(implementation)


def _refuse_link(call: Call, link: Link) -> None:
    """Raise ShapeError for what would give other sums in silence: a link that is not one rank's, a part taken for the sum."""
    name, ranks = call.fusion.name, link.ranks
    if (held := (link.table.shape, link.epochs.shape)) != link.shapes:
        raise ShapeError(
            f"{name}: the link is not one rank's: its arrays are {held}, a rank's are {link.shapes}; call it inside "
            "jax.shard_map, whose in_specs have link.specs"
        )
    if link.axis in call.fusion.mesh and not call.graph.ranks and ranks > 1:
        raise ShapeError(
            f"{name}: the link reaches {ranks} ranks over {link.axis}, the call says {link.axis}=1; pass {link.axis}={ranks}"
        )


def exchange(
    face: Any, link: Link, *args, implementation: str | None = None, schedule: Schedule | None = None, door: str | None = None,
    **kwargs,
) -> tuple[Any, Link]:  # fmt: skip
    """A call of a fusion that adds up over a mesh axis, by one kernel that reaches the other ranks: its outputs, and the link
    for the next call. It must be called inside `jax.shard_map` over that axis, by all ranks alike.

    `link` is a rank's part of `Channel.link`. `implementation`: None falls back to "xla" where packets do not serve the call
    (more rows than there is room for, say), on all ranks alike, and named kernels raise UnavailableError with the reason; "xla"
    and "psum" leave the link as it is. `door`: which kernels None takes on GPUs, if not the first there are. Raises ShapeError
    for a link of all ranks, and where the call says nothing of them.
    """
    for asked in (implementation, door):
        if asked in KERNELS and asked not in LINKED:
            known = f"{', '.join(DOORS)}, xla or psum"
            raise UnavailableError(f"{face.fusion.name}: {asked}'s kernels reach no other rank; choose {known}")
    if door not in (None, *LINKED, "xla"):
        raise UnavailableError(f"{face.fusion.name}: there is no door {door!r}; choose {', '.join(LINKED)} or xla")
    operands, params = bind_arguments(face.fusion, args, kwargs)
    call = Call(face.fusion, operands, params, None, schedule, link)
    _refuse_link(call, link)
    why = call.unlinked() if call.graph.ranks else f"{face.fusion.name} adds up over one rank"
    if implementation in LINKED and why and call.graph.ranks:
        raise UnavailableError(f"{call.fusion.name}: {why}")
    door = door or best() if implementation is None and jax.default_backend() == "gpu" else implementation
    if not why and door in LINKED:
        outs = call.kernels(door)
    else:
        plain = implementation or ("xla" if call.graph.ranks else None)
        outs = _serve(Call(face.fusion, operands, params, None, schedule), plain)
    results = tuple(outs[n] for n in call.names)
    return results[0] if len(results) == 1 else results, call.link or link
