"""Experiments and measurements behind the figures in the documentation; `python -m benchmarks` lists them."""
