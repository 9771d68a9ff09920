"""The classes put in place of Qwen3.5-MoE's in transformers; a pickled model finds them here."""

from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig as Config

from moekit.torch.huggingface.modules import Block, GatedNorm, Layer, Norm, Router

__all__ = ["CLASSES", "Config"]


class Qwen3_5MoeRMSNorm(Norm, hf.Qwen3_5MoeRMSNorm):
    """`rms_norm`."""


class Qwen3_5MoeRMSNormGated(GatedNorm, hf.Qwen3_5MoeRMSNormGated):
    """`gated_rms_norm`."""


class Qwen3_5MoeTopKRouter(Router, hf.Qwen3_5MoeTopKRouter):
    """`topk_softmax`."""


class Qwen3_5MoeSparseMoeBlock(Block, hf.Qwen3_5MoeSparseMoeBlock):
    """`gate_projections` and `down_combine`."""

    router, mlp, activations = Qwen3_5MoeTopKRouter, hf.Qwen3_5MoeMLP, (SiLUActivation, nn.SiLU)


class Qwen3_5MoeDecoderLayer(Layer, hf.Qwen3_5MoeDecoderLayer):
    """`add_rms_norm`."""

    norm = Qwen3_5MoeRMSNorm


CLASSES = (Qwen3_5MoeRMSNorm, Qwen3_5MoeRMSNormGated, Qwen3_5MoeTopKRouter, Qwen3_5MoeSparseMoeBlock, Qwen3_5MoeDecoderLayer)
