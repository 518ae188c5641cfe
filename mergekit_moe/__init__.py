"""Unify experts that were trained apart into one Mixture-of-Experts model that loads with AutoModel."""

__version__ = "0.1.0"
