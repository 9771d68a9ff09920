"""`@fusion`: a declaration, its operands, its numpy reference, and how a call binds to it."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from moekit.errors import DeclarationError, DtypeError, MoekitError, ShapeError
from moekit.lang.graph import Graph, Index, Tensor, Write
from moekit.lang.indexing import Put
from moekit.lang.spec import Dim, Spec
from moekit.lang.trace import LONGEST, Builder, Value, as_value, tracing


@dataclass(frozen=True)
class Binding:
    """A call bound to a declaration: the size of every axis, dtypes, static parameters, and `?` dimensions of size 1."""

    sizes: tuple[tuple[str, int], ...]
    dtypes: tuple[tuple[str, str], ...]
    params: tuple[tuple[str, object], ...]
    ones: tuple[tuple[str, frozenset[int]], ...]
    spelled: str = field(init=False)  # tells apart parameters that Python finds equal: 1, 1.0 and True, 0.0 and -0.0

    def __post_init__(self):
        object.__setattr__(self, "spelled", repr(self.params))


class Fusion:
    """A declared fusion. Faces, compiler and tests all start from here; it knows nothing of any backend."""

    def __init__(
        self,
        fn: Callable,
        reference: Callable | None,
        specs: Mapping[str, Spec],
        dynamic: tuple[str, ...],
        axes: Mapping[str, Callable[..., int]] = MappingProxyType({}),
        mesh: tuple[str, ...] = (),
    ):
        self.mesh = mesh
        self.fn, self.reference, self.dynamic, self.axes = fn, reference, dynamic, MappingProxyType(dict(axes))
        self.name = fn.__name__ if fn.__name__.isidentifier() else "unnamed"  # a lambda
        self.doc = inspect.getdoc(fn) or ""
        self.__name__, self.__doc__, self.__module__ = self.name, self.doc, fn.__module__
        operands = {n: s for n, s in specs.items() if s.role != "Out"}
        self.out_specs = MappingProxyType({n: s for n, s in specs.items() if s.role == "Out"})
        self.tensors = MappingProxyType(operands)
        self.signature = inspect.signature(fn)
        names = list(self.signature.parameters)
        if names[: len(operands)] != list(operands):
            raise DeclarationError(
                f"{self.name}: its parameters begin {names[: len(operands)]}, but it declares the tensors {list(operands)}; "
                "name them alike and in one order"
            )
        self.params = MappingProxyType({n: self.signature.parameters[n] for n in names[len(operands) :]})
        self._dims = {n: s.dims for n, s in operands.items()}
        self._check_names()
        self._check_mesh()
        self._trace = functools.lru_cache(maxsize=512)(self._trace_uncached)

    def _check_names(self) -> None:
        """Variables of kernels are named after axes in lower case, and values are aligned by axis."""
        seen: dict[str, str] = {}
        for tensor, dims in {**self._dims, "": tuple(map(Dim.parse, self.axes))}.items():
            for d in dims:
                for axis in [a for _, a in d.terms]:
                    if seen.setdefault(axis.lower(), axis) != axis:
                        raise DeclarationError(f"{self.name}: axes {seen[axis.lower()]!r} and {axis!r} differ only in case")
            if twice := [d.text for i, d in enumerate(dims) if d.terms and d.text in [e.text for e in dims[:i]]]:
                raise DeclarationError(f"{self.name}: {tensor} has axis {twice[0]!r} twice; give each dimension its own name")

    def _check_mesh(self) -> None:
        """A static parameter says how many ranks a mesh axis has; no array has such an axis."""
        for axis in self.mesh:
            if (p := self.params.get(axis)) is None or p.annotation not in (int, "int"):
                raise DeclarationError(f"{self.name}: nothing says how many ranks mesh axis {axis!r} has; add {axis}: int = 1")
            if any(axis in (name for _, name in d.terms) for dims in self._dims.values() for d in dims):
                raise DeclarationError(f"{self.name}: {axis!r} is an axis of operands and of the mesh; give one another name")

    def __repr__(self) -> str:
        tensors = ", ".join(f"{n}={s}" for n, s in self.tensors.items())
        return f"<fusion {self.name}({tensors})>"

    def __reduce__(self) -> str:
        """Pickled by name, as a function is: the reader imports the module and gets its declaration, caches and all."""
        module = sys.modules.get(self.__module__)
        interactive = self.__module__ == "__main__" and not os.path.isfile(getattr(module, "__file__", ""))
        names = [] if module is None or interactive else [n for n, x in vars(module).items() if x is self]
        if not names:
            raise MoekitError(
                f"{self.name}: it is pickled by its name, which {self.__module__} does not have at the top of a file; "
                "declare it at the top of a module that the reader can import"
            )
        return names[0]

    def __copy__(self) -> Fusion:
        """Nothing changes a declaration: a copy is itself."""
        return self

    def __deepcopy__(self, memo) -> Fusion:
        return self

    def bind(self, shapes: Mapping[str, tuple], dtypes: Mapping[str, str], params: Mapping[str, object]) -> Binding:
        """Sizes of all axes from the operands' shapes; raises ShapeError or DtypeError where they do not fit."""
        for name, spec in self.tensors.items():
            if dtypes[name] not in spec.dtypes:
                raise DtypeError(f"{self.name}: {name} is {dtypes[name]}; it must be {_either(spec.dtypes)}")
            if len(shapes[name]) != len(self._dims[name]):
                raise ShapeError(
                    f"{self.name}: {name} has shape {list(shapes[name])}; it must have {len(self._dims[name])} dimensions "
                    f"[{', '.join(d.text for d in self._dims[name])}]"
                )
        sizes = self._solve(shapes)
        ones: dict[str, frozenset[int]] = {}
        for name, dims in self._dims.items():
            ones[name] = frozenset(i for i, d in enumerate(dims) if d.optional and shapes[name][i] == 1 != sizes[d.text])
            if any(shapes[name][i] != d.size(sizes) and i not in ones[name] for i, d in enumerate(dims)):
                raise ShapeError(self._misfit(name, shapes[name], sizes))
        found = self.follow(sizes, params)
        if wrong := [a for a, n in found.items() if sizes.get(a, n) != n]:
            raise ShapeError(
                f"{self.name}: axis {wrong[0]} has {sizes[wrong[0]]} elements in the operands; it must have {found[wrong[0]]} "
                "as its rule says"
            )
        sizes |= found
        every = {d.text: d.size(sizes) for dims in self._dims.values() for d in dims} | {a: sizes[a] for a in self.axes}
        if long := [a for a, n in every.items() if n > LONGEST]:
            raise ShapeError(
                f"{self.name}: axis {long[0]} has {every[long[0]]} elements; kernels count to {LONGEST}, so split the call"
            )
        every = {**{d: s for d, s in sizes.items() if d not in every}, **every}
        return Binding(tuple(every.items()), tuple(dtypes.items()), tuple(params.items()), tuple(ones.items()))

    def _solve(self, shapes: Mapping[str, tuple]) -> dict[str, int]:
        """Sizes of the plain axes, first from plain dimensions, then from those with one unknown left."""
        sizes: dict[str, int] = {}
        pending = [(n, i, d) for n, dims in self._dims.items() for i, d in enumerate(dims)]
        for name, i, d in sorted(pending, key=lambda p: (p[2].optional, not p[2].plain)):
            if d.plain:
                sizes.setdefault(d.text, shapes[name][i])
        for name, i, d in pending:
            unknown = [(factor, axis) for factor, axis in d.terms if axis not in sizes]
            if len(unknown) == 1:
                factor, axis = unknown[0]
                rest = d.constant + sum(f * sizes[a] for f, a in d.terms if a in sizes)
                if shapes[name][i] < rest or (shapes[name][i] - rest) % factor:
                    raise ShapeError(
                        f"{self.name}: {name} has {shapes[name][i]} elements in dimension {i}; it must be {d.text}"
                    )
                sizes[axis] = (shapes[name][i] - rest) // factor
        for name, _, d in pending:
            for _, axis in d.terms:
                if axis not in sizes:
                    raise DeclarationError(f"{self.name}: no operand says the size of {axis} in {name} ({d.text})")
        return sizes

    def follow(self, sizes: Mapping[str, int], params: Mapping[str, object]) -> dict[str, int]:
        """The sizes of the axes that follow from others and from static parameters."""
        known, found = {**sizes, **params}, {}
        for axis, rule in self.axes.items():
            names = inspect.signature(rule).parameters
            if lacking := [n for n in names if n not in known]:
                raise DeclarationError(f"{self.name}: the size of {axis} follows from {lacking[0]}, no axis or parameter")
            size = self._ruled(axis, rule, {n: known[n] for n in names})
            if size is None or isinstance(size, bool | float) or size < 0:  # under torch.compile a symbol
                raise ShapeError(f"{self.name}: axis {axis} would have {size!r} elements; sizes are 0 or more, and integers")
            known[axis] = found[axis] = size
        return found

    def _ruled(self, axis: str, rule: Callable[..., int], given: Mapping[str, Any]) -> int:
        """What the rule of an axis gives; a rule that fails is the declaration's fault, or the sizes'."""
        try:
            return rule(**given)
        except MoekitError:
            raise
        except Exception as error:
            sizes = ", ".join(f"{n} = {value}" for n, value in given.items()) or "nothing"
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise ShapeError(
                f"{self.name}: the rule for axis {axis} fails for {sizes} ({why}); pass sizes that it has a number for"
            ) from error

    def _misfit(self, name: str, shape: tuple, sizes: dict[str, int]) -> str:
        wanted = ", ".join(f"{d.text} = {d.size(sizes)}" if d.terms else str(d.constant) for d in self._dims[name])
        return f"{self.name}: {name} has shape {list(shape)}; it must be [{wanted}] to fit the other operands"

    def bind_params(self, values: Mapping[str, object]) -> dict[str, object]:
        """Static parameters with defaults filled in; raises TypeError naming an unknown or missing one."""
        bound = {}
        for name, p in self.params.items():
            if name not in values and p.default is p.empty:
                raise TypeError(f"{self.name}: parameter {name!r} is missing")
            value = values.get(name, p.default)
            if not isinstance(value, (bool, int, float, str, type(None))):
                raise TypeError(f"{self.name}: {name} must be a Python number, bool or str, got {type(value).__name__}")
            bound[name] = self._typed(name, p.annotation, value)
        if unknown := set(values) - set(self.params):
            known = ", ".join(self.params) or "none"
            raise TypeError(f"{self.name}: there is no parameter {sorted(unknown)[0]!r}; it has {known}")
        return bound

    def _typed(self, name: str, annotation, value):
        """A parameter as its annotation says: an int where a float is wanted becomes one, a bool is no number."""
        wanted = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        if wanted == "float" and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if wanted in ("int", "float", "bool", "str") and type(value).__name__ != wanted:
            raise TypeError(f"{self.name}: {name} must be {wanted}, got {type(value).__name__} {value!r}")
        return value

    def trace(self, binding: Binding) -> Graph:
        """The Graph of a call; the sizes of dynamic axes do not matter to it."""
        sizes = tuple((a, None if self._is_dynamic(a) else s) for a, s in binding.sizes)
        return self._trace(sizes, binding.dtypes, binding.params, binding.ones, binding.spelled)

    def may_be_empty(self) -> str:
        """The end of a sentence that refuses an empty axis: which of the operands' axes may be, if any."""
        own = {axis for s in self.tensors.values() for d in s.dims for _, axis in d.terms}
        found = [axis for axis in self.dynamic if axis in own]
        return f"; only {', '.join(found)} may be 0" if found else ""

    def _is_dynamic(self, axis: str) -> bool:
        dim = Dim.parse(axis)
        if any(name in self.dynamic for _, name in dim.terms):
            if not dim.plain:
                raise DeclarationError(f"{self.name}: {axis!r} is made of the dynamic axis; only a plain axis can be dynamic")
            return True
        return False

    def _trace_uncached(self, sizes: tuple, dtypes: tuple, params: tuple, ones: tuple, spelled: str) -> Graph:
        ones_of, dtype_of = dict(ones), dict(dtypes)
        tensors = {n: Tensor(n, s.role, self._dims[n], dtype_of[n], ones_of[n]) for n, s in self.tensors.items()}
        order = [*self.axes, *(d.axis for dims in self._dims.values() for d in dims)]
        known = dict(sizes)
        axes = {a: known[a] for a in dict.fromkeys([*order, *known])}
        builder = Builder(self.name, axes, self.fn.__code__, {a: dict(params).get(a, 1) for a in self.mesh})
        with tracing(builder):
            operands = {n: _read(builder, t) for n, t in tensors.items()}
            result = self.fn(**operands, **dict(params))
            results = result if isinstance(result, dict) else {"out": result}
            if not results:
                raise DeclarationError(f"{self.name}: it returns nothing; return a value, or values by name")
            writes = tuple(self._write(builder, tensors, name, value) for name, value in results.items())
        self._check_updates(tensors, writes, builder)
        axes, nodes = builder.arranged()
        return Graph(
            self.name,
            axes,
            tensors,
            nodes,
            writes,
            builder.names(),
            builder.lines,
        )

    def _write(self, builder: Builder, tensors: dict[str, Tensor], name: str, value) -> Write:
        target = value if isinstance(value, Put) else Put(value, None, "")
        out = as_value(target.value, "float32")
        if name not in tensors:
            dims = self.out_specs[name].dims if name in self.out_specs else tuple(Dim.parse(a) for a in out.axes)
            tensors[name] = Tensor(name, "Out", dims, out.dtype)
        t = tensors[name]
        if t.role == "In":
            raise DeclarationError(f"{self.name}: it returns {name!r}, which is declared In; declare it InOut")
        if out.dtype != t.dtype:
            raise DeclarationError(f"{self.name}: {name} is {t.dtype} but is given {out.dtype}; cast it")
        index = tuple(Index.of(0 if target.over == d.axis and target.over else d.axis) for d in t.dims)
        reach = {a for i in index for a in i.axes} | set(target.ids.axes if target.ids is not None else ())
        if extra := set(out.axes) - reach:
            raise DeclarationError(f"{self.name}: {name} has axes {t.axes}, but its value also varies over {sorted(extra)}")
        for d in t.dims:
            builder.axis_size(d.axis)
        return Write(name, out.node, index, () if target.ids is None else (target.ids.node,))

    def _check_updates(self, tensors: dict[str, Tensor], writes: tuple[Write, ...], builder: Builder) -> None:
        """An InOut tensor may be read only where the same program writes it, or programs would race.

        One program holds all of a static axis if it must, and reads it all before it writes.
        """
        written = {w.tensor: w for w in writes}
        for name, t in tensors.items():
            if t.role == "InOut" and name not in written:
                raise DeclarationError(f"{self.name}: {name} is InOut but is not returned")
        graph = Graph(self.name, builder.sizes, tensors, tuple(builder.nodes), writes)
        for name, d in ((n, d) for n, dims in graph.elsewhere.items() for d in sorted(dims)):
            t, axis = tensors[name], tensors[name].dims[d].axis
            reasons = {
                f"{axis} is dynamic": builder.axis_size(axis) is None,
                "it is put there at ids": bool(written[name].index[d].operands),
                "it came with size 1": d in t.ones,
            }
            if why := next((why for why, holds in reasons.items() if holds), None):
                raise DeclarationError(
                    f"{self.name}: {name} is updated along {axis} and read at other elements of it, of which no program holds "
                    f"all, as {why}; read it where it is written"
                )


def _read(builder: Builder, t: Tensor) -> Value:
    index = tuple(Index() if i in t.ones else Index.of(d.axis) for i, d in enumerate(t.dims))
    return builder.add("read", (), (("tensor", t.name), ("index", index)), t.dtype)


def _either(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def fusion(
    reference: Callable | None = None,
    /,
    *,
    dynamic: str = "T",
    axes: Mapping[str, Callable[..., int]] = MappingProxyType({}),
    mesh: str = "",
    **tensors: Spec,
) -> Callable[[Callable], Fusion]:
    """Declare a fusion: `@fusion(reference, x=In("T H"), residual=InOut("T H"), weight=In("H"))`.

    `reference` takes the operands as numpy arrays in their own dtypes and the parameters by name, computes in float64
    and returns the outputs by name. Axes listed in `dynamic` are run-time sizes; all others are constants of a compiled kernel.
    `axes`: axes that no operand need have, each with a function of sizes and static parameters, by name, that gives its size:
    `axes={"B": lambda T, K: T * K}`. In blocks and outputs they come before the others, but for one
    of `blocks`: in a program's blocks that stands beside the axis of their elements.
    `mesh`: axes of a mesh of devices that the declaration may `all_reduce` over; operands are then one rank's, and a static
    parameter of the same name says how many ranks there are.
    """
    return lambda fn: Fusion(fn, reference, tensors, tuple(dynamic.split()), axes, tuple(mesh.split()))
