"""The model under JAX's settings: traced and not compiled."""

import jax
import jax.numpy as jnp
import pytest

from moekit.models.qwen3next import attention, decode_step, gdn, prefill
from moekit.models.qwen3next import moe as mixture


@pytest.fixture(params=[("jax_numpy_rank_promotion", "raise"), ("jax_numpy_dtype_promotion", "strict")])
def setting(request):
    """A setting that makes JAX refuse what it would otherwise broadcast or widen."""
    name, value = request.param
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    yield
    jax.config.update(name, before)


@pytest.mark.parametrize("kernels", ["pallas", "xla"])
def test_prefill_and_step_broadcast_nothing_by_themselves(setting, kernels, zoo, monkeypatch):
    """One token and many; all that is done in blocks of very many tokens is done in more than one."""
    model = zoo.model("two-layers")
    for batch, length in ((1, 1), (3, 70)):
        few = (
            (mixture, "SORTED", 16),
            (mixture, "DENSE", 0),
            (attention, "BLOCK", 32),
            (attention, "ROWS", 32),
            (gdn, "AT_ONCE", 64),
        )
        for module, name, number in few:
            monkeypatch.setattr(module, name, number)
        tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, length), (batch,)))
        logits, cache = jax.eval_shape(lambda t, n: prefill(model, t, n, cache_length=128, kernels=kernels), tokens, lengths)
        assert logits.shape == (batch, 256)
        logits, _ = jax.eval_shape(lambda t, c: decode_step(model, t, c, kernels=kernels), lengths, cache)
        assert logits.shape == (batch, 256)
