"""Images that installed packages carry, or that are drawn with what they carry."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mergekit_moe.data import load_rows
from mergekit_moe.errors import DataError
from mergekit_moe.installed_images import CORPORA, SCRIPTS, Row
from mergekit_moe.recipe import DataSource


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return {name: list(corpus()) for name, corpus in CORPORA.items()}


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_image_has_an_id_of_its_own_a_name_and_pixels(rows: dict[str, list[Row]], corpus: str) -> None:
    ids = [row["id"] for row in rows[corpus]]
    assert len(ids) == len(set(ids)) > 1000
    for row in rows[corpus][::50]:
        assert np.asarray(Image.open(io.BytesIO(row["image"]))).std() > 0  # type: ignore[arg-type]
        assert row["name"] and row["corpus"] == corpus and row["bucket"] in range(10)


def test_a_corpus_is_the_same_twice(rows: dict[str, list[Row]]) -> None:
    for name in ("digits", "photographs"):
        assert list(CORPORA[name]()) == rows[name]
    again = CORPORA["glyphs"]()
    assert [next(again) for _ in range(300)] == rows["glyphs"][:300]


def test_digits_are_scikit_learn_s(rows: dict[str, list[Row]]) -> None:
    loaded = load_digits()
    for row in rows["digits"][::100]:
        number = int(row["id"])
        grey = np.asarray(Image.open(io.BytesIO(row["image"])))  # type: ignore[arg-type]
        assert np.array_equal(np.round(grey / 255.0 * 16), loaded.images[number])
        assert row["group"] == str(loaded.target[number])
    held_out = [row for row in rows["digits"] if row["split"] == "test"]
    assert 0.15 < len(held_out) / len(loaded.images) < 0.25
    assert {row["name"] for row in held_out} == {row["name"] for row in rows["digits"]}


def test_glyphs_are_of_all_scripts_and_named_as_unicode_names_them(rows: dict[str, list[Row]]) -> None:
    assert {row["group"] for row in rows["glyphs"]} == set(SCRIPTS)
    shown = {(row["name"], row["character"]) for row in rows["glyphs"]}
    assert {("digit three", "3"), ("greek small letter alpha", "\u03b1")} <= shown


def test_rows_of_a_recipe_are_images_with_the_parts_of_a_path_as_their_label() -> None:
    source = DataSource(installed="glyphs", image="image", label="{group} {id:1}", where={"group": "digits"}, limit=20)
    rows = load_rows([source], Path(), "the seed")
    assert len(rows) == 20
    assert set(rows["label"]) == {"digits DejaVuSans"}
    assert rows[0]["image"].size == (32, 32)


def test_a_path_without_that_part_is_named() -> None:
    source = DataSource(installed="glyphs", image="image", label="{id:3}", limit=1)
    with pytest.raises(DataError, match=r"\{id:3\} is no part of '0030/DejaVuSans/0'; parts lie between slashes"):
        load_rows([source], Path(), "the seed")
