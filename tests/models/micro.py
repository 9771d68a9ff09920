"""A checkpoint of ten thousand bytes, and transformers' reading of a config: for tests of what is read from files."""

import copy
import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding

from moekit.models.qwen3next import Config, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN, SIZES
from moekit.models.qwen3next.files import DTYPES, read_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

MICRO = Config(
    vocab_size=6,
    hidden_size=4,
    layer_types=(GDN, ATTENTION),
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    rotary_dim=2,
    rope_theta=10_000.0,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=2,
    linear_value_head_dim=2,
    conv_width=2,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=2,
    shared_expert_intermediate_size=2,
)


def take_apart(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(header: bytes, data: bytes) -> bytes:
    """A safetensors file of any header."""
    return struct.pack("<Q", len(header)) + header + data


def load_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, of FP8 too, which the safetensors library does not read for numpy."""
    found = {}
    for key, tensor in read_tensors(folder).items():
        found[key] = np.fromfile(tensor.file, DTYPES[tensor.dtype], prod(tensor.shape), offset=tensor.start).reshape(
            tensor.shape
        )
    return found


def micro(directory: Path, files: int = 1, **changes: Any) -> Path:
    """Write the checkpoint, with changes to its config.json."""
    write_random_checkpoint(directory, MICRO, files=files)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


# what a model of transformers is built from: read off the object, whatever the file looked like
NUMBERS = (*SIZES, "rms_norm_eps", "norm_topk_prob", "tie_word_embeddings")


def theirs(raw):
    """transformers' config and rotary embedding, or None where either cannot be made."""
    try:
        config = Qwen3NextConfig.from_dict(copy.deepcopy(raw))
        return config, Qwen3NextRotaryEmbedding(config)
    except Exception:
        return None


def check_sentence(text):
    """An error's message is one sentence, of a length that is read."""
    assert text.isprintable()
    assert len(text) < 600


def check_same(mine, config, rotary):
    """What we read is what transformers computes with."""
    names = {name: "conv_width" if name == "linear_conv_kernel_dim" else name for name in NUMBERS}
    assert {name: getattr(mine, own) for name, own in names.items()} == {name: getattr(config, name) for name in NUMBERS}
    assert list(mine.layer_types) == config.layer_types
    assert len(mine.layer_types) == config.num_hidden_layers
    assert mine.dtype == (None if config.dtype is None else str(config.dtype).removeprefix("torch."))
    eos = config.eos_token_id
    assert list(mine.eos_token_ids) == ([] if eos is None else eos if isinstance(eos, list) else [eos])
    frequencies = rotary.inv_freq.numpy()
    assert rotary.attention_scaling == 1.0
    assert mine.rotary_dim == 2 * len(frequencies)
    exponents = np.arange(0, mine.rotary_dim, 2) / mine.rotary_dim  # as attention.py has it, in float64
    np.testing.assert_allclose(frequencies, mine.rope_theta**-exponents, rtol=1e-5)
    assert (config.hidden_act, config.attention_bias) in (("silu", False), ("swish", False))
    assert (config.decoder_sparse_step, config.mlp_only_layers) == (1, [])
