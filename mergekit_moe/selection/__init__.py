"""Pick, for each client, public samples that are relevant to its domain and diverse: its proxies."""

from mergekit_moe.selection.dpp import select_dpp

__all__ = ["select_dpp"]
