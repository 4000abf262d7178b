"""Training of the kept weights of pruned models: block reconstruction and distillation."""
