"""A small CLIP model trained on labelled images: what is written, that it learns, and that it can be stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from killing import Killed, kill_at
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel, pipeline

from mergekit_moe.data import load_rows
from mergekit_moe.errors import WorkspaceError
from mergekit_moe.experts import read_proxies
from mergekit_moe.job import Job
from mergekit_moe.pipeline import is_current, run
from mergekit_moe.plan import plan
from mergekit_moe.recipe import ClipSeed, DataSource
from mergekit_moe.recipe_file import load_recipe
from mergekit_moe.seed import train_clip_seed
from mergekit_moe.workspace import Workspace

SOURCE = DataSource(installed="digits", image="image", label="{name}", where={"group": ["0", "1", "4"]})
TINY = {"hidden_size": 32, "intermediate_size": 32, "layers": 1, "text_layers": 1, "heads": 2, "vocab_size": 300}


def settings(**changes: Any) -> ClipSeed:
    return ClipSeed(kind="clip", rows=[SOURCE], **{**TINY, "learning_rate": 3e-3, "max_steps": 10, **changes})


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return load_rows([SOURCE], Path(), "base_model.rows")


@pytest.fixture(scope="module")
def seed(rows: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("seed")
    train_clip_seed(rows, settings(max_steps=120), seed=0, out=out)
    return out


def test_it_learns_to_name_the_images_it_is_shown(seed: Path, rows: Dataset) -> None:
    names = sorted(set(rows["label"]))
    classify = pipeline("zero-shot-image-classification", model=str(seed), image_processor=_processor(seed))
    said = classify(list(rows["image"])[::9], candidate_labels=names, hypothesis_template="{}")
    right = [one[0]["label"] == label for one, label in zip(said, rows["label"][::9], strict=True)]
    assert sum(right) / len(right) > 0.8  # by chance 0.33


def _processor(folder: Path) -> Any:
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


def test_it_is_a_clip_model_with_its_tokenizer_and_image_processor(seed: Path) -> None:
    model = AutoModel.from_pretrained(seed)
    assert isinstance(model, CLIPModel)
    assert model.vision_model.config.patch_size == 8
    assert _processor(seed).size == {"height": 32, "width": 32}


def test_names_it_never_read_lie_apart_and_end_in_eos(seed: Path) -> None:
    model, tokenizer = AutoModel.from_pretrained(seed), AutoTokenizer.from_pretrained(seed)
    batch = tokenizer(["sign for 3", "sign for 4", "handwritten digit three"], padding=True, return_tensors="pt")
    last = batch["attention_mask"].sum(1) - 1
    assert (batch["input_ids"].gather(1, last[:, None]) == tokenizer.eos_token_id).all()
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(model.get_text_features(**batch).pooler_output, dim=-1)
        alone = model.get_text_features(**tokenizer(["sign for 3"], return_tensors="pt")).pooler_output
    assert ((vectors @ vectors.T).triu(1) < 0.999).all()
    torch.testing.assert_close(vectors[:1], torch.nn.functional.normalize(alone, dim=-1), atol=1e-5, rtol=0)
    assert len(tokenizer("a name " * 50, truncation=True)["input_ids"]) == 32


def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(
    rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_clip_seed(rows, settings(), seed=0, out=whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(4, patch)
        train_clip_seed(rows, settings(), seed=0, out=killed)
    train_clip_seed(rows, settings(), seed=0, out=killed)
    assert {file.name for file in killed.iterdir()} == {file.name for file in whole.iterdir()}
    for file in whole.iterdir():
        assert (killed / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "vit"}, "Input should be 'clip'"),
        ({"rows": []}, "at least 1 item"),
        ({"rows": [{"installed": "glyphs", "image": "image"}]}, "give 'image', and the 'label'"),
        ({"patch_size": 5}, "image_size 32 must be a multiple of patch_size = 5"),
        ({"hidden_size": 33, "heads": 2}, "hidden_size 33 must be a multiple of heads = 2"),
    ],
)
def test_what_makes_no_seed_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipSeed.model_validate({"kind": "clip", "rows": [SOURCE.model_dump()], **changes})


def digits_of(*groups: str, split: str | list[str] = "train", label: str = "{name}") -> dict[str, Any]:
    return {"installed": "digits", "image": "image", "label": label, "where": {"group": list(groups), "split": split}}


def test_a_seed_that_embeds_the_pool_is_trained_before_it(tmp_path: Path) -> None:
    experts = [
        {"name": name, "client": {"private": digits_of(*groups), "test": digits_of(*groups, split="test")}}
        for name, groups in {"few": "01", "many": "23"}.items()
    ]
    public = [digits_of("7", "8", split=["train", "test"])]
    recipe = {
        "base_model": {"kind": "clip", "rows": public, **TINY, "max_steps": 2},
        "public_pool": public,
        "experts": experts,
        "selection": {"budget": 10},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    job = Job(load_recipe(tmp_path / "r.yaml"), "r", Workspace(tmp_path / "runs"))
    assert ("base", "CLIP, 1 layers of 32, to be trained on 353 labelled images") in plan(job)
    with pytest.raises(WorkspaceError, match="run `metamoe seed` on this recipe first"):
        run(job, "select")
    run(job, "seed")
    assert (tmp_path / "runs" / "seed" / "README.md").read_text().count("installed:digits") == 1
    run(job, "select")
    assert len(read_proxies(tmp_path / "runs" / "proxies" / "few", "few")["rows"]) == 10
    assert is_current(job, "select")
    (tmp_path / "runs" / "proxies" / "few" / "proxies.json").unlink()
    assert not is_current(job, "select"), "the seed comes first here"
