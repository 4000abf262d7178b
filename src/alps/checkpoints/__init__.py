"""Checkpoints on disk: atomic files, safetensors, the journal of a run, and the packed format."""
