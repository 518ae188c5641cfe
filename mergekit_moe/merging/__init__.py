"""Experts to one checkpoint: a Mixture-of-Experts model, or one of the dense merges to compare it with."""
