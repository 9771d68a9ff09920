"""`scaled_conv_projections` of more rows than one, by the matrix unit."""

from moekit.fusions.causal_conv1d_step import causal_conv1d_step
from moekit.fusions.scaled import BLOCK, of_rows, products
from moekit.fusions.scaled_conv_projections import AXES, OPERANDS, reference
from moekit.lang import cast, fusion


@fusion(reference, **OPERANDS, axes=AXES)
def scaled_conv_products(
    x, mixing, mixing_scale, others, others_scale, gates, state, weight, rows: int = BLOCK, columns: int = BLOCK
):
    """`scaled_conv_projections` for few rows and not for one: sixteen read the matrices once, by the matrix unit.

    Operands, outputs, roundings and the state in place are as there. Blocks of D are multiplied as they are, scaled in float32,
    if they have a scale, and added up in their order.
    """

    def made(matrix, scale):
        return cast(products(x, matrix, scale, "D", "Db I", columns), x.dtype)

    mixed = made(mixing, of_rows(mixing_scale, "C", "Cb", rows))
    rest = made(others, of_rows(others_scale, "P", "Pb", rows))
    return {"rest": rest, "gated": made(gates, None), **causal_conv1d_step.fn(mixed, state, weight)}
