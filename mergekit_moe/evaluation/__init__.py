"""Judge the unified model against the seed, every expert alone and the plain average, on held-out text."""
