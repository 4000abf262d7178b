"""Inference with packed models: layers that stay packed in memory, and the kernels that multiply with them."""
