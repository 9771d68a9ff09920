"""moekit: Mixture-of-Experts fusions declared once, lowered to Triton for PyTorch and Pallas for JAX."""

__version__ = "0.1.0"
