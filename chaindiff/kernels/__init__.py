"""Fused operations: for each a plain reference, a Triton implementation, and a dispatch between them."""
