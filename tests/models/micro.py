"""A checkpoint of ten thousand bytes, taken apart and put together again: for tests of what is read from files."""

import json
import struct
from pathlib import Path
from typing import Any

from moekit.models.qwen3next import Config, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN

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


def micro(directory: Path, files: int = 1, **changes: Any) -> Path:
    """Write the checkpoint, with changes to its config.json."""
    write_random_checkpoint(directory, MICRO, files=files)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory
