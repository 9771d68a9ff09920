"""How the arguments of a face are sorted into operands and static parameters."""

from __future__ import annotations

import inspect

from moekit.lang.fusion import Fusion


def bind_arguments(fusion: Fusion, args: tuple, kwargs: dict) -> tuple[dict, dict]:
    """Operands and static parameters of a call; raises TypeError naming what is missing or too much."""
    try:
        bound = fusion.signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"{fusion.name}: {error}; call it as {fusion.name}{fusion.signature}") from None
    return {n: bound[n] for n in fusion.tensors}, {n: v for n, v in bound.items() if n not in fusion.tensors}


def face_signature(fusion: Fusion) -> inspect.Signature:
    """The declaration's signature with the keywords every face adds."""
    extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in ("out", "implementation", "schedule")]
    return inspect.Signature([*fusion.signature.parameters.values(), *extra])
