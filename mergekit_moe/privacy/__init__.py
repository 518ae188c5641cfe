"""Differential privacy: mechanisms, their accounting, the ledger of what a client publishes, and attacks on it."""
