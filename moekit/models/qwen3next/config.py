"""What a Qwen3-Next checkpoint says about itself in `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.errors import MoekitError

GDN = "linear_attention"
ATTENTION = "full_attention"
DTYPES = ("float32", "float16", "bfloat16")


class ConfigError(MoekitError, ValueError):
    """A config.json, or a tensor-parallel size, that this model cannot serve."""


@dataclass(frozen=True)
class Config:
    """Sizes and constants of one Qwen3-Next model; hashable, so a compiled function may depend on it."""

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    conv_width: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    dtype: str | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layer_types)

    @property
    def values_per_key(self) -> int:
        """Value heads served by one key head of a gated delta net."""
        return self.linear_num_value_heads // self.linear_num_key_heads

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> Config:
        """Read a Hugging Face `config.json`: its path, the directory that holds it, or the parsed mapping.

        Raises ConfigError where the file describes a model that is not built here.
        """
        raw, where = (source, "config") if isinstance(source, Mapping) else _read(Path(source))
        fields = _Fields(raw, where)
        fields.refuse_what_is_not_built()
        rope_theta, rotary_factor = fields.rope()
        head_dim = fields.integer("head_dim", 256)
        config = cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            layer_types=fields.layer_types(),
            num_attention_heads=fields.integer("num_attention_heads"),
            num_key_value_heads=fields.integer("num_key_value_heads", 2),
            head_dim=head_dim,
            rotary_dim=int(head_dim * rotary_factor),
            rope_theta=rope_theta,
            linear_num_key_heads=fields.integer("linear_num_key_heads", 16),
            linear_num_value_heads=fields.integer("linear_num_value_heads", 32),
            linear_key_head_dim=fields.integer("linear_key_head_dim", 128),
            linear_value_head_dim=fields.integer("linear_value_head_dim", 128),
            conv_width=fields.integer("linear_conv_kernel_dim", 4),
            num_experts=fields.integer("num_experts"),
            num_experts_per_tok=fields.integer("num_experts_per_tok", 10),
            moe_intermediate_size=fields.integer("moe_intermediate_size"),
            shared_expert_intermediate_size=fields.integer("shared_expert_intermediate_size"),
            norm_topk_prob=bool(raw.get("norm_topk_prob", True)),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            dtype=fields.dtype(),
            eos_token_ids=fields.eos(),
        )
        _check_sizes(config, where)
        return config

    def to_json(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this model, as a mapping that `json.dump` takes."""
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.shared_expert_intermediate_size,
            "num_hidden_layers": self.num_layers,
            "layer_types": list(self.layer_types),
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "partial_rotary_factor": self.rotary_dim / self.head_dim,
            "rope_theta": self.rope_theta,
            "linear_num_key_heads": self.linear_num_key_heads,
            "linear_num_value_heads": self.linear_num_value_heads,
            "linear_key_head_dim": self.linear_key_head_dim,
            "linear_value_head_dim": self.linear_value_head_dim,
            "linear_conv_kernel_dim": self.conv_width,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "moe_intermediate_size": self.moe_intermediate_size,
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "dtype": self.dtype,
            "eos_token_id": list(self.eos_token_ids) or None,
        }


def check_tensor_parallel(config: Config, tp: int) -> None:
    """Refuse, with ConfigError, a tensor-parallel size that does not divide what has to be divided."""
    if tp < 1:
        raise ConfigError(f"tp must be at least 1, not {tp}")
    kv = config.num_key_value_heads
    divided = {
        "linear_num_key_heads": config.linear_num_key_heads,
        "num_attention_heads": config.num_attention_heads,
        "moe_intermediate_size": config.moe_intermediate_size,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
    }
    for name, size in divided.items():
        if size % tp:
            raise ConfigError(f"tp = {tp} does not divide {name} = {size}; choose a tp that divides it")
    if kv % tp and tp % kv:
        raise ConfigError(f"tp = {tp} neither divides num_key_value_heads = {kv} nor is a multiple of it; choose another tp")


class _Fields:
    """Typed access to the raw mapping, with errors that say which field and where."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def refuse_what_is_not_built(self) -> None:
        raw = self.raw
        if raw.get("model_type") != "qwen3_next":
            self.refuse(f"model_type is {raw.get('model_type')!r} where 'qwen3_next' is needed")
        if raw.get("hidden_act", "silu") != "silu":
            self.refuse(f"hidden_act is {raw['hidden_act']!r} where 'silu' is needed")
        if raw.get("attention_bias"):
            self.refuse("attention_bias is true, and biases are not supported")
        if raw.get("quantization_config"):
            self.refuse("quantization_config is set, and quantised weights are not supported")
        if raw.get("mlp_only_layers"):
            self.refuse(f"mlp_only_layers is {raw['mlp_only_layers']}, and dense layers are not supported")
        if raw.get("decoder_sparse_step", 1) != 1:
            step = raw["decoder_sparse_step"]
            self.refuse(f"decoder_sparse_step is {step}, and dense layers are not supported (1 is needed)")

    def refuse(self, what: str) -> None:
        raise ConfigError(f"{self.where}: {what}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(f"{name} is {value!r} where a positive integer is needed")
        return int(value)  # type: ignore[arg-type]

    def layer_types(self) -> tuple[str, ...]:
        count = self.integer("num_hidden_layers")
        kinds = self.raw.get("layer_types")
        if kinds is None:
            interval = self.integer("full_attention_interval", 4)
            kinds = [GDN if (i + 1) % interval else ATTENTION for i in range(count)]
        if len(kinds) != count:
            self.refuse(f"layer_types has {len(kinds)} entries where num_hidden_layers is {count}")
        for kind in kinds:
            if kind not in (GDN, ATTENTION):
                self.refuse(f"layer_types contains {kind!r} where {GDN!r} or {ATTENTION!r} is needed")
        return tuple(kinds)

    def rope(self) -> tuple[float, float]:
        """Theta and the fraction of a head that is rotated; older files keep them at the top level."""
        scaling = self.raw.get("rope_scaling") or {}
        rope = {**scaling, **(self.raw.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            self.refuse(f"rope type is {kind!r} where 'default' is needed")
        theta = rope.get("rope_theta", self.raw.get("rope_theta", 10000.0))
        factor = rope.get("partial_rotary_factor", self.raw.get("partial_rotary_factor", 0.25))
        return float(theta), float(factor)

    def dtype(self) -> str | None:
        name = self.raw.get("dtype", self.raw.get("torch_dtype"))
        if name is not None and name not in DTYPES:
            self.refuse(f"dtype is {name!r} where one of {', '.join(DTYPES)} is needed")
        return name

    def eos(self) -> tuple[int, ...]:
        eos = self.raw.get("eos_token_id")
        if eos is None:
            return ()
        return tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)


def _read(path: Path) -> tuple[Mapping[str, Any], str]:
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint directory holds config.json") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__} where a JSON object is needed")
    return raw, str(path)


def _check_sizes(config: Config, where: str) -> None:
    pairs = (
        ("linear_num_value_heads", "linear_num_key_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    )
    for many, few in pairs:
        if getattr(config, many) % getattr(config, few):
            got = f"{many} = {getattr(config, many)} is no multiple of {few} = {getattr(config, few)}"
            raise ConfigError(f"{where}: {got}")
    if config.num_experts_per_tok > config.num_experts:
        got = f"num_experts_per_tok = {config.num_experts_per_tok} exceeds num_experts = {config.num_experts}"
        raise ConfigError(f"{where}: {got}")
    if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        got = f"{config.rotary_dim} of {config.head_dim} head dimensions are rotated"
        raise ConfigError(f"{where}: {got}, where an even number up to head_dim is needed")
