"""gated_rms_norm in every implementation."""

from moekit.fusions import FUSIONS
from moekit.testing import FusionSuite


class TestGatedRmsNorm(FusionSuite):
    """The suite, with one head and with several in a block."""

    fusion = FUSIONS["gated_rms_norm"]
    sizes = (
        {"T": 3, "V": 4, "D": 33},
        {"T": 0, "V": 2, "D": 8},
        {"T": 1, "V": 1, "D": 1},
        {"T": 5, "V": 3, "D": 128},
        {"T": 2, "V": 1, "D": 257},
    )
