"""The language of declarations: named axes, tensors, traced values. See docs/language.md."""

from moekit.lang.dtypes import bfloat16, float16, float32, int8, int16, int32, int64, round_to
from moekit.lang.fusion import Binding, Fusion, fusion
from moekit.lang.graph import Graph
from moekit.lang.ops import (
    abs,
    argmax,
    argmin,
    bitcast,
    cast,
    contract,
    cumsum,
    exp,
    extent,
    f32,
    gather,
    halves,
    iota,
    isnan,
    log,
    max,
    maximum,
    mean,
    min,
    minimum,
    put,
    rsqrt,
    sigmoid,
    silu,
    size,
    slice,
    softmax,
    softplus,
    sqrt,
    sum,
    top_k,
    where,
)
from moekit.lang.spec import In, InOut, Out
from moekit.lang.trace import Value

__all__ = [name for name in dir() if not name.startswith("_")]
