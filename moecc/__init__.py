"""moecc compiles Mixture-of-Experts models: where experts live, when bytes move, which kernels run."""

__version__ = "0.1.0"
