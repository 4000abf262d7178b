"""Models: loading, decoder blocks, prunable layers (sites), weights that stay on disk, and saving."""
