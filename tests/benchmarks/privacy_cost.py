"""What noise buys and costs: membership AUC on routing statistics / routing accuracy, by texts and epsilon.

`python tests/benchmarks/privacy_cost.py [--draws 20]`. Made-up texts, described in tests/privacy/privacy_data.py.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "privacy"))

from privacy_data import routing_accuracy, traced

from mergekit_moe.errors import PrivacyError

EPSILONS = (None, 0.5, 1.0, 2.0, 4.0, 8.0)


def main() -> None:
    """Print a table in markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=20)
    draws = parser.parse_args().draws
    print("| texts | " + " | ".join("no noise" if e is None else f"eps {e:g}" for e in EPSILONS) + " |")
    print("|---:|" + "---:|" * len(EPSILONS))
    for texts in (100, 1000, 5000):
        cells = []
        for epsilon in EPSILONS:
            try:
                auc = np.mean([traced(texts, epsilon, seed) for seed in range(max(2, draws * 100 // texts))])
                right = np.mean([routing_accuracy(texts, epsilon, seed) for seed in range(6)])
                cells.append(f"{auc:.2f} / {right:.3f}")
            except PrivacyError:
                cells.append("refused")
        print(f"| {texts:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
