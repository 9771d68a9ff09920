"""Qwen3-Next as functions: load, read two prompts, take steps, read on, step again.

python examples/model_jax.py [FOLDER OF A CHECKPOINT]      # without one, a tiny random one is written and read
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from moekit.models.qwen3next import Room, decode_step, extend, greedy_step, load, most_likely, prefill, write_random_checkpoint

kernels = None if jax.default_backend() == "gpu" else "xla"
folder = Path(sys.argv[1] if len(sys.argv) > 1 else write_random_checkpoint(Path(tempfile.mkdtemp()) / "tiny"))
ranks = min(2, len(jax.devices()))
mesh = Mesh(np.array(jax.devices()[:ranks]), ("tp",))
model = load(folder, mesh, room=Room(batch=2, length=64, prompt=8))  # FitError where that is too much for a device

# Two prompts of unequal lengths, padded at the end: no row depends on another's padding.
tokens = np.array([[5, 6, 7, 8], [9, 10, 0, 0]], np.int32)
logits, cache = prefill(model, tokens, np.array([4, 2], np.int32), cache_length=64, kernels=kernels)

# A step takes a token of each row, and the cache, which is donated: only the new one may be used. Nothing leaves the devices.
made = [most_likely(model, logits)]
for _ in range(8):
    token, cache = greedy_step(model, made[-1], cache, kernels=kernels)
    made.append(token)
print("continued with", np.stack(made, axis=1).tolist())

# The logits themselves, for sampling of one's own: float32, cut over the ranks along the vocabulary.
logits, cache = decode_step(model, made[-1], cache, kernels=kernels)
print("logits", logits.shape, logits.sharding.spec)

# What somebody says next is read behind what is there.
turn = np.array([[20, 21, 22], [23, 0, 0]], np.int32)
logits, cache = extend(model, turn, np.array([3, 1], np.int32), cache, kernels=kernels)
print("tokens seen by each row", cache.lengths.tolist(), "and then", most_likely(model, logits).tolist())
