"""Pruning runs: settings, the loop over the blocks, allocation, resume, dry run, and the Python API."""
