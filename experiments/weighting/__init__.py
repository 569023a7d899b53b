"""What weighting by provenance does and does not do: figures, tables and pictures of docs/weighting.md."""
