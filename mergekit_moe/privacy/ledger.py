"""The ledger: for each file that a client publishes, what it can tell, and what guarantee it has."""

import importlib.metadata
from pathlib import Path
from typing import Any

from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG
from mergekit_moe.errors import PrivacyError
from mergekit_moe.experts import ABOUT, PROXIES, STATISTICS
from mergekit_moe.privacy.accounting import Mechanism, composed_epsilon
from mergekit_moe.workspace import MANIFEST, write_json

LEDGER = "privacy.json"
CARD = "README.md"
PUBLIC, RESIDENCY, DP = "public", "residency", "dp"
"""Guarantees: made without private rows; rows never moved, and no more is promised; (epsilon, delta)-DP."""
UNIT = (
    "one private row, as the recipe's templates and `chunk` make it; neighbouring data lack one row, and the number of "
    "rows counts as known. What several rows share (a person, a long text) is protected that many times less."
)
CAVEATS = (
    "Each time that a folder is built anew and published, its mechanisms are spent again.",
    "Noise is drawn in floating point from a generator seeded by the operating system.",
    "Held-out rows that the unifier evaluates on are not covered: their mean losses stand in the unified model's card.",
)

_HOLDS = {
    ADAPTER: ("LoRA weights", "may hold rows that it learnt by heart, and tells by its loss which rows it has seen"),
    ADAPTER_CONFIG: ("rank, alpha and projections", "nothing of any row: it is from the recipe"),
    ABOUT: ("name, base model, licence, silent tokens", "nothing of any row: it is from the recipe"),
    PROXIES: ("row numbers and ids of the public pool, in picking order", "what the private rows are about"),
    STATISTICS: ("sums of FFN inputs, layer by layer", "what the rows they sum are about, and which those are"),
    CARD: ("the expert's card", "what this ledger tells, and what is from the recipe"),
    MANIFEST: ("sha256 of the other files, settings, versions", "no more than the files themselves"),
    LEDGER: ("this ledger", "the number of private rows, where a mechanism is on; the rest is from the recipe"),
}

_LABELLED = ("name, base model, licence, labels", "which labels the rows have; the rest is from the recipe")
"""Of an image classifier's ABOUT."""


def build_ledger(
    files: list[str],
    spent: dict[str, Mechanism],
    *,
    delta: float,
    proxies_depend: bool,
    expert_on_proxies: bool,
    private_statistics: bool,
    learns_labels: bool = False,
    labelled: bool = False,
) -> dict[str, Any]:
    """Return the ledger of a published folder.

    Args:
        files: names of all files that the folder has, or will have.
        spent: the mechanisms that were really applied, by their key in the recipe's `privacy`.
        delta: at which they are composed.
        proxies_depend: whether the choice of proxies depends on private rows.
        expert_on_proxies: whether the expert learnt its proxies, too.
        private_statistics: whether the statistics are over private rows, not over what the expert makes of its proxies.
        learns_labels: whether the names of the rows' labels are part of what the expert is trained on: one row's may
            be among the choices for every other row, which no mechanism bounds.
        labelled: whether the expert has a head of its own, the names of whose labels it tells.

    Raises:
        PrivacyError: if there is a file that the ledger knows nothing of.
    """
    proxies = {"relevance"} if proxies_depend else set[str]()
    learnt = {"labels"} if learns_labels or labelled else set[str]()
    named = {"labels"} if labelled else set[str]()
    expert = {"expert"} | learnt | (proxies if expert_on_proxies else set())
    statistics = {"statistics"} if private_statistics else expert | proxies
    through = {
        ABOUT: named,
        ADAPTER: expert,
        PROXIES: proxies,
        STATISTICS: statistics,
        CARD: named,
        MANIFEST: expert | proxies | statistics | named,
    }
    if unknown := sorted(set(files) - _HOLDS.keys()):
        raise PrivacyError(
            f"{', '.join(unknown)}: not in the privacy ledger; say there what it holds and can tell, or leave it out"
        )
    holds = _HOLDS | ({ABOUT: _LABELLED} if labelled else {})
    artifacts = [
        {"file": file, "holds": holds[file][0], "can_reveal": holds[file][1]}
        | _guarantee(through.get(file, set()), spent, delta)
        for file in files
    ]
    return {
        "version": 1,
        "unit": UNIT,
        "artifacts": artifacts,
        "mechanisms": [mechanism._asdict() for mechanism in spent.values()],
        "total": _guarantee(set().union(*through.values()), spent, delta),
        "accountant": _accountant() if spent else None,
        "caveats": list(CAVEATS) if spent else [],
    }


def write_ledger(out: Path, ledger: dict[str, Any]) -> None:
    """Write the ledger beside the files that it lists."""
    write_json(out / LEDGER, ledger)


def _guarantee(through: set[str], spent: dict[str, Mechanism], delta: float) -> dict[str, Any]:
    """Return the guarantee of what depends on private rows through these steps alone.

    Args:
        through: the keys of the recipe's `privacy` that stand for the steps.
    """
    if not through:
        return {"guarantee": PUBLIC, "epsilon": 0.0, "delta": 0.0, "mechanisms": []}
    if through - spent.keys():
        return {"guarantee": RESIDENCY, "epsilon": None, "delta": None, "mechanisms": sorted(through & spent.keys())}
    epsilon = composed_epsilon([spent[key] for key in sorted(through)], delta)
    return {"guarantee": DP, "epsilon": round(epsilon, 4), "delta": delta, "mechanisms": sorted(through)}


def _accountant() -> str:
    return f"privacy loss distributions, dp-accounting {importlib.metadata.version('dp-accounting')}"


def guarantee_in_words(entry: dict[str, Any]) -> str:
    """Return an artifact's or the total's guarantee as a table shows it."""
    if entry["guarantee"] == DP:
        return f"({entry['epsilon']:.3g}, {entry['delta']:.1g})-DP"
    return str(entry["guarantee"])
