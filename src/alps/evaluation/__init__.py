"""Measurements of models: perplexity, divergence from the dense model, zero-shot tasks, zeros, and comparisons."""
