"""What a checkpoint says about itself in `config.json`, read as transformers reads it or refused.

Qwen3-Next, and the text model of Qwen3.5 and 3.6 MoE, which computes the same from weights under other names. A field is in
one of the tables here if its value changes what the model computes; no other is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np

from moekit.errors import MoekitError
from moekit.models.qwen3next.files import brief, read_json, shown
from moekit.models.qwen3next.fp8 import Blocks, Float8

GDN = "linear_attention"
ATTENTION = "full_attention"
DTYPES = ("float32", "float16", "bfloat16")
QWEN3_NEXT = "qwen3_next"
COMPOSITE, TEXT = "qwen3_5_moe", "qwen3_5_moe_text"  # Qwen3.5 and 3.6, with a vision tower or without
LARGEST, MOST_LAYERS = 2**31 - 1, 2**16

# positive integers, and what transformers takes where config.json has none
SIZES = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
NEXT_LAYERS, TEXT_LAYERS = 48, 40
TEXT_SIZES = {**SIZES, "vocab_size": 248320, "num_experts": 256, "num_experts_per_tok": 8}
ABOVE = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings")  # said beside a text_config that does not say them

# what is served in one way only: the values that mean it (the first is the one to give), and why others are refused
SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "other activations are not supported"),
    "attention_bias": ((False,), "biases are not supported"),
    "attn_output_gate": ((True, None), "attention without its output gate is not supported"),
    "output_gate_type": (("swish", "silu", None), "other output gates of the delta net are not supported"),
    "decoder_sparse_step": ((1,), "dense layers are not supported"),
    "mlp_only_layers": (([], None), "dense layers are not supported"),
    "use_sliding_window": ((False, None), "sliding windows are not supported"),
    "is_causal": ((True,), "attention that sees later tokens is not supported"),
    "kv_sharing_modes": ((None,), "layers that share their keys and values are not supported"),
    "per_layer_config": ((None,), "layers of their own sizes are not supported"),
    "quantization": ((None,), "quantised weights are not supported"),
    "compression_config": ((None,), "quantised weights are not supported"),
    "text_config": ((None,), "a config within the config is not read"),
    "attribute_map": ((), "other names for fields are not read"),
    "configuration_files": ((), "other config files than config.json are not read"),
    "transformers_weights": ((None,), "weights under another name than the usual are not read"),
}
# of quantization_config, as SERVED is of all: FP8 with a scale for each block, and activations as they come
QUANTISED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "activation_scheme": ("dynamic", None),
    "fmt": ("e4m3", None),
    "scale_fmt": ("float", None),
    "expert_dtype": ("fp8", None),
    "modules_to_convert": (None, []),
}


class ConfigError(MoekitError, ValueError):
    """A config.json, or a tensor-parallel size, that this model cannot serve."""


@dataclass(frozen=True)
class Config:
    """Sizes and constants of one model; hashable, so a compiled function may depend on it.

    model_type: 'qwen3_next' or 'qwen3_5_moe_text', which have their weights under other names in files and compute the same.
    blocks: of files whose weights are FP8. float8: what of that the model keeps so; all else it has in its dtype.
    ep: how many groups of ranks the experts are dealt to; no checkpoint says it. Within a group they are cut by their width.
    activations: what many tokens' experts of float8 weights multiply these by, where that is not the model's dtype.
    """

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
    model_type: str = field(default=QWEN3_NEXT, compare=False)
    blocks: Blocks | None = field(default=None, compare=False)
    ep: int = 1
    float8: Float8 | None = None
    activations: str | None = None

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
        fields = _Fields(raw, where).text()
        fields.refuse_what_is_not_served()
        defaults = TEXT_SIZES if fields.kind == TEXT else SIZES
        sizes = {name: fields.integer(name, default) for name, default in defaults.items()}
        theta, rotary_dim = fields.rope(sizes["head_dim"])
        config = cls(
            conv_width=sizes.pop("linear_conv_kernel_dim"),
            **sizes,
            layer_types=fields.layer_types(),
            rotary_dim=rotary_dim,
            rope_theta=theta,
            norm_topk_prob=fields.kind == TEXT or fields.boolean("norm_topk_prob", True),  # Qwen3.5 has no such field
            rms_norm_eps=fields.epsilon(),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            dtype=fields.dtype(),
            eos_token_ids=fields.eos(),
            model_type=fields.kind,
            blocks=fields.blocks(),
        )
        _check_sizes(config, where)
        return config

    def to_json(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this model, as a mapping that `json.dump` takes."""
        return {
            "architectures": ["Qwen3NextForCausalLM" if self.model_type == QWEN3_NEXT else "Qwen3_5MoeForCausalLM"],
            "model_type": self.model_type,
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
    """Refuse, with ConfigError, a tensor-parallel size, or an `ep` of it, that does not divide what has to be divided."""
    if tp < 1:
        raise ConfigError(f"tp must be at least 1, not {tp}")
    kv = config.num_key_value_heads
    ep = config.ep
    if ep < 1 or tp % ep or config.num_experts % ep:
        raise ConfigError(f"ep = {ep} does not divide tp = {tp} and num_experts = {config.num_experts}; choose one that does")
    divided = {
        "linear_num_key_heads": (config.linear_num_key_heads, tp),
        "num_attention_heads": (config.num_attention_heads, tp),
        "moe_intermediate_size": (config.moe_intermediate_size, tp // ep),
        "shared_expert_intermediate_size": (config.shared_expert_intermediate_size, tp),
    }
    for name, (size, ranks) in divided.items():
        if size % ranks:
            share = f"tp = {tp}" if ranks == tp else f"tp / ep = {ranks}"
            raise ConfigError(f"{share} does not divide {name} = {size}; choose a tp that divides it")
    if kv % tp and tp % kv:
        raise ConfigError(f"tp = {tp} neither divides num_key_value_heads = {kv} nor is a multiple of it; choose another tp")


class _Fields:
    """Typed access to the raw mapping, with errors that say which field and where.

    A field of null is missing only where transformers takes it so. Types are transformers' too: true is no integer.
    """

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def refuse(self, what: str) -> NoReturn:
        raise ConfigError(f"{self.where}: {what}")

    def wrong(self, name: str, value: object, needed: str) -> NoReturn:
        self.refuse(f"{name} is {brief(value)} where {needed} is needed")

    @property
    def kind(self) -> str:
        """The model_type, once `text` has checked it."""
        return self.raw["model_type"]

    def text(self) -> _Fields:
        """The fields of the text model, which stand by themselves or beside a vision tower's."""
        kind = self.raw.get("model_type")
        if kind in (QWEN3_NEXT, TEXT):
            return self
        if kind != COMPOSITE:
            self.wrong("model_type", kind, f"{QWEN3_NEXT!r}, {COMPOSITE!r} or {TEXT!r}")
        inner = self.raw.get("text_config")
        if not isinstance(inner, Mapping):
            self.wrong("text_config", inner, "a JSON object")
        if inner.get("model_type", TEXT) != TEXT:
            self.wrong("model_type of text_config", inner["model_type"], repr(TEXT))
        beside = {name: value for name, value in self.raw.items() if name != "text_config"}
        _Fields(beside, self.where).refuse_what_is_not_served()
        above = {name: value for name, value in beside.items() if name in ABOVE}
        said, own = beside.get("quantization_config"), inner.get("quantization_config")
        if own not in (None, said):
            self.refuse("quantization_config of text_config is not read; it must stand beside text_config")
        return _Fields({**above, **inner, "model_type": TEXT, "quantization_config": said}, self.where)

    def refuse_what_is_not_served(self) -> None:
        raw = self.raw
        for name, (served, why) in SERVED.items():
            if name in raw and not any(type(raw[name]) is type(value) and raw[name] == value for value in served):
                needed = f"{brief(served[0])} is needed" if served and served[0] is not None else "the field must not be there"
                self.refuse(f"{name} is {brief(raw[name])}, and {why} ({needed})")

    def integer(self, name: str, default: int, most: int = LARGEST) -> int:
        value = self.raw.get(name, default)
        if type(value) is not int or value < 1:
            self.wrong(name, value, "a positive integer")
        if value > most:
            self.wrong(name, value, f"at most {most}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            self.wrong(name, value, "true or false")
        return value

    def epsilon(self) -> float:
        value = self.raw.get("rms_norm_eps", 1e-6)
        if not (isinstance(value, float) and _is_positive(value)):
            self.wrong("rms_norm_eps", value, "a positive float32 number, with a point or an exponent,")
        return value

    def layer_types(self) -> tuple[str, ...]:
        count = self.integer("num_hidden_layers", TEXT_LAYERS if self.kind == TEXT else NEXT_LAYERS, MOST_LAYERS)
        kinds = self.raw.get("layer_types")
        if kinds is None:
            interval = self.integer("full_attention_interval", 4)
            kinds = [GDN if (i + 1) % interval else ATTENTION for i in range(count)]
        if not isinstance(kinds, (list, tuple)):
            self.wrong("layer_types", kinds, f"a list of {GDN!r} and {ATTENTION!r}")
        if len(kinds) != count:
            self.refuse(f"layer_types has {len(kinds)} entries where num_hidden_layers is {count}")
        for kind in kinds:
            if kind not in (GDN, ATTENTION):
                self.refuse(f"layer_types contains {brief(kind)} where {GDN!r} or {ATTENTION!r} is needed")
        return tuple(kinds)

    def rope(self, head_dim: int) -> tuple[float, int]:
        """Theta and how many dimensions of a head are rotated.

        The order is transformers': a `rope_scaling` that holds something stands for all of `rope_parameters`; what
        the mapping does not say, fields at the top level do.
        """
        name = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"
        rope = self.raw.get(name)
        if rope is None:
            rope = {}
        if not isinstance(rope, Mapping):
            self.wrong(name, rope, "a JSON object or null")
        nested = [key for key, value in rope.items() if key in (GDN, ATTENTION) or isinstance(value, Mapping)]
        if nested:
            self.refuse(f"{name} holds {brief(nested[0])}, and rotary embeddings per layer type are not supported")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            self.refuse(f"{name}: rope type is {brief(kind)} where 'default' is needed; remove it to do without scaling")
        theta = rope.get("rope_theta", self.raw.get("rope_theta", 10000.0))
        if not _is_positive(theta):
            self.wrong("rope_theta", theta, "a positive float32 number")
        factor = rope.get("partial_rotary_factor", self.raw.get("partial_rotary_factor", 0.25))
        if "partial_rotary_factor" not in rope and factor is None:
            factor = 1.0  # null at the top level keeps transformers from its default for this model
        if not _is_positive(factor):
            self.wrong("partial_rotary_factor", factor, "a positive number")
        return float(theta), int(head_dim * factor)

    def dtype(self) -> str | None:
        name = "dtype" if self.raw.get("dtype") is not None else "torch_dtype"
        value = self.raw.get(name)
        if value is not None and value not in DTYPES:
            self.wrong(name, value, f"one of {', '.join(DTYPES)}")
        return value

    def blocks(self) -> Blocks | None:
        """The blocks of FP8 weights; None where weights are not quantised. Other quantisations are refused."""
        raw = self.raw.get("quantization_config")
        if raw is None:
            return None

        def refuse(name: str, needed: str) -> NoReturn:
            got = f"{name} is {brief(given[name])}" if name in given else f"{name} is missing"
            self.refuse(f"quantization_config: {got}, and such quantised weights are not supported ({needed} is needed)")

        given = raw if isinstance(raw, Mapping) else {}
        for name, served in QUANTISED.items():
            if given.get(name, served[-1] if None in served else None) not in served:
                refuse(name, brief(served[0]))
        size = given.get("weight_block_size")
        if not (isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and 0 < n <= LARGEST for n in size)):
            refuse("weight_block_size", "a list of two positive integers, [128, 128],")
        kept = given.get("modules_to_not_convert")
        kept = given.get("ignored_layers") if kept is None else kept
        kept = [] if kept is None else kept
        if not (isinstance(kept, (list, tuple)) and all(isinstance(name, str) for name in kept)):
            refuse("modules_to_not_convert", "a list of modules' names")
        return Blocks(size[0], size[1], frozenset(kept))

    def eos(self) -> tuple[int, ...]:
        eos = self.raw.get("eos_token_id")
        ids = [] if eos is None else eos if isinstance(eos, (list, tuple)) else [eos]
        if not all(type(token) is int for token in ids):
            self.wrong("eos_token_id", eos, "a token's id or a list of them")
        return tuple(ids)


def _is_positive(value: Any) -> TypeGuard[int | float]:
    """Whether a value of JSON is a number that float32 holds as positive and finite."""
    return type(value) in (int, float) and 0 < value <= float(np.finfo(np.float32).max) and bool(np.float32(value) > 0)


def _read(path: Path) -> tuple[Mapping[str, Any], str]:
    path = path / "config.json" if os.path.isdir(path) else path
    return read_json(path, ConfigError), shown(path)


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
