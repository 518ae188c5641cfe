"""A tiny CLIP and pictures of coloured shapes: nothing is downloaded."""

import io
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from PIL import ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

COLOURS = {"red": (230, 40, 40), "green": (40, 210, 70), "blue": (50, 80, 230)}
"""A domain each."""
SHAPES = ("disc", "square", "cross", "bar")
TEMPERATURE = 0.1
LABELS = [f"a {colour} {shape}" for colour in sorted(COLOURS) for shape in SHAPES]
_SIDE = 24


def clip_folder(folder: Path) -> Path:
    """A random CLIP with its tokenizer and image processor."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", *COLOURS, *SHAPES]
    tokenizer: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_convert_rgb=True
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_factor": 2.0}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 24}
        | {"max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config={**sizes, "hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def drawn(colour: tuple[int, int, int], shape: str, seed: object) -> bytes:
    """Return a PNG file of a shape, its place and size by chance."""
    rng = random.Random(f"{colour} {shape} {seed}")
    picture = Picture.new("RGB", (_SIDE, _SIDE), (rng.randrange(40), rng.randrange(40), rng.randrange(40)))
    pen, reach = ImageDraw.Draw(picture), rng.randrange(6, 9)
    x, y = (rng.randrange(reach, _SIDE - reach) for _ in range(2))
    box = (x - reach, y - reach, x + reach, y + reach)
    if shape == "disc":
        pen.ellipse(box, fill=colour)
    if shape == "square":
        pen.rectangle(box, fill=colour)
    if shape in ("cross", "bar"):
        pen.rectangle((box[0], y - 1, box[2], y + 1), fill=colour)
    if shape == "cross":
        pen.rectangle((x - 1, box[1], x + 1, box[3]), fill=colour)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def pictures(colour: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of `id`, `picture` (a PNG file's bytes), `shape` and `colour`."""
    return [
        {
            "id": f"{colour}-{seed}-{i}",
            "picture": drawn(COLOURS[colour], SHAPES[i % len(SHAPES)], f"{seed} {i}"),
            "shape": SHAPES[i % len(SHAPES)],
            "colour": colour,
        }
        for i in range(n)
    ]


def write_images(folder: Path) -> dict[str, dict[str, Any]]:
    """Write each domain's rows in a way of its own; return how a recipe reads them.

    The red ones are an `Image` feature with a class, the green ones plain bytes, the blue ones a folder of files.
    """
    features = Features(
        {"id": Value("string"), "picture": Image(), "shape": ClassLabel(names=list(SHAPES)), "colour": Value("string")}
    )
    Dataset.from_list(pictures("red", 80, 1), features=features).to_parquet(folder / "red.parquet")
    Dataset.from_list(pictures("green", 80, 1)).to_parquet(folder / "green.parquet")
    for i, row in enumerate(pictures("blue", 80, 1)):
        file = folder / "blue" / f"blue_{row['shape']}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["picture"])
    return {
        "red": {"dataset": "red.parquet", "image": "picture", "label": "a red {shape}"},
        "green": {"dataset": "green.parquet", "image": "picture", "label": "a {colour}_{shape}"},
        "blue": {"dataset": "blue", "image": "image", "label": "a {label}"},
    }


def image_recipe(folder: Path) -> dict[str, Any]:
    """Write a CLIP, data for three clients and a pool; return a recipe that needs seconds."""
    clip_folder(folder / "clip")
    pool = [row for colour in COLOURS for row in pictures(colour, 40, 2)]
    Dataset.from_list(pool).to_parquet(folder / "pool.parquet")
    experts = [
        {"name": name, "license": "mit", "client": {"private": private, "tag": name}}
        for name, private in write_images(folder).items()
    ]
    return {
        "base_model": "clip",
        "public_pool": {"dataset": "pool.parquet", "image": "picture", "tag": "colour", "license": "cc0-1.0"},
        "experts": experts,
        "selection": {"budget": 20},
        "alignment": {
            "max_steps": 80,
            "batch_size": 16,
            "learning_rate": 2e-2,
            "warmup_steps": 0,
            "rank": 4,
            "alpha": 8,
        },
        "matching": {"temperature": TEMPERATURE},
        "router": {"training": {"max_steps": 4, "batch_size": 8}},
        "card": {"license": "mit"},
    }


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file
