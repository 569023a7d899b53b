"""What weighting by provenance does and does not do: the figures, tables and pictures of docs/weighting.md."""
