"""The training loop. It knows no framework: an engine factory is passed in."""
