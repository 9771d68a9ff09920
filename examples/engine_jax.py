"""Many sequences at once: they are added, cancelled and end between the steps of one engine.

python examples/engine_jax.py [FOLDER OF A CHECKPOINT]     # without one, a tiny random one is written and read
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from moekit.models.qwen3next import Engine, Sampling, load, write_random_checkpoint

kernels = None if jax.default_backend() == "gpu" else "xla"
folder = Path(sys.argv[1] if len(sys.argv) > 1 else write_random_checkpoint(Path(tempfile.mkdtemp()) / "tiny"))
model = load(folder, Mesh(np.array(jax.devices()[:1]), ("tp",)))

# Four slots, of 128 tokens each with its prompt; prompts are read 16 tokens at a time, between the steps of the others.
engine = Engine(model, slots=4, length=128, piece=16, kernels=kernels)
rng = np.random.default_rng(0)
for i in range(10):
    prompt = rng.integers(0, model.config.vocab_size, rng.integers(1, 40))
    engine.add(prompt, max_new_tokens=4 + 2 * i, sampling=Sampling(temperature=0.8, top_p=0.95, seed=i))

# `step` says what has come of any of them; another thread could add and cancel meanwhile.
for _ in range(12):
    for token in engine.step():
        print(f"sequence {token.sequence}: {token.token}" + (f", its last ({token.end})" if token.end else ""))
engine.cancel(10)

# `results` steps until all have ended.
for number, result in sorted(engine.results().items()):
    print(f"sequence {number}: {len(result.tokens)} tokens, {result.end}")
