"""Records of runs and their presentation: JSON, Markdown tables, model card and HTML page."""
