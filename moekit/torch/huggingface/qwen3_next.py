"""The classes put in place of Qwen3-Next's in transformers; a pickled model finds them here."""

from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.qwen3_next import modeling_qwen3_next as hf
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig as Config

from moekit.torch.huggingface.modules import Block, GatedNorm, Layer, Norm, Router

__all__ = ["CLASSES", "Config"]


class Qwen3NextRMSNorm(Norm, hf.Qwen3NextRMSNorm):
    """`rms_norm`."""


class Qwen3NextRMSNormGated(GatedNorm, hf.Qwen3NextRMSNormGated):
    """`gated_rms_norm`."""


class Qwen3NextTopKRouter(Router, hf.Qwen3NextTopKRouter):
    """`topk_softmax`."""


class Qwen3NextSparseMoeBlock(Block, hf.Qwen3NextSparseMoeBlock):
    """`gate_projections` and `down_combine`."""

    router, mlp, activations = Qwen3NextTopKRouter, hf.Qwen3NextMLP, (SiLUActivation, nn.SiLU)


class Qwen3NextDecoderLayer(Layer, hf.Qwen3NextDecoderLayer):
    """`add_rms_norm`."""

    norm = Qwen3NextRMSNorm


CLASSES = (Qwen3NextRMSNorm, Qwen3NextRMSNormGated, Qwen3NextTopKRouter, Qwen3NextSparseMoeBlock, Qwen3NextDecoderLayer)
