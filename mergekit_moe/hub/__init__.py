"""Models and data sets from the Hub: every revision pinned to a commit, every file compared with what the Hub says."""

from mergekit_moe.hub.downloads import PACKAGE, Resolved, load_hub_dataset, resolve_dataset, resolve_model

__all__ = ["PACKAGE", "Resolved", "load_hub_dataset", "resolve_dataset", "resolve_model"]
