"""A tiny CLIP, and pictures of coloured discs in three places: nothing is downloaded."""

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
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PLACES = {"night": (15, 15, 25), "day": (235, 235, 220), "fog": (120, 125, 130)}
"""A domain each, and the colour of its ground."""
COLOURS = {"red": (240, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 240), "yellow": (230, 230, 20)}
TEMPERATURE = 0.1
LABELS = sorted(f"a {colour} {place}" for place in PLACES for colour in COLOURS)
_SIDE = 24
_PUBLIC = 3
"""Random seed of the pictures that the seed model learns from."""


@torch.enable_grad()
def clip_folder(folder: Path) -> Path:
    """A CLIP that has learnt to tell places, and no colours; its tokenizer and its image processor."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", *COLOURS, *PLACES]
    tokenizer: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    known = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)
    known.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_factor": 2.0}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**sizes, "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 24}
            | {"max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            vision_config={**sizes, "hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": 4},
            projection_dim=16,
        )
    )
    rows = [row for place in PLACES for row in pictures(place, 48, _PUBLIC)]
    pixels = processor([opened(row["picture"]) for row in rows], return_tensors="pt")["pixel_values"]
    names = known([f"a {place}" for place in PLACES], return_tensors="pt", return_token_type_ids=False)
    targets = torch.tensor([list(PLACES).index(row["place"]) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        some = torch.randperm(len(rows))[:32]
        seen = functional.normalize(model.get_image_features(pixels[some]).pooler_output, dim=-1)
        said = functional.normalize(model.get_text_features(**names).pooler_output, dim=-1)
        functional.cross_entropy(seen @ said.T / TEMPERATURE, targets[some]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def opened(file: bytes) -> Any:
    return Picture.open(io.BytesIO(file)).convert("RGB")


def drawn(place: str, colour: str, seed: object) -> bytes:
    """Return a PNG file of a coloured disc on a place's ground, all of it a little by chance."""
    rng = random.Random(f"{place} {colour} {seed}")

    def varied(rgb: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(max(0, min(255, value + rng.randrange(-20, 21))) for value in rgb)

    picture = Picture.new("RGB", (_SIDE, _SIDE), varied(PLACES[place]))
    reach = rng.randrange(5, 9)
    x, y = (rng.randrange(reach, _SIDE - reach) for _ in range(2))
    ImageDraw.Draw(picture).ellipse((x - reach, y - reach, x + reach, y + reach), fill=varied(COLOURS[colour]))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def pictures(place: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of `id`, `picture` (a PNG file's bytes), `colour` and `place`."""
    colours = [list(COLOURS)[i % len(COLOURS)] for i in range(n)]
    return [
        {"id": f"{place}-{seed}-{i}", "picture": drawn(place, colour, f"{seed} {i}"), "colour": colour, "place": place}
        for i, colour in enumerate(colours)
    ]


def write_images(folder: Path) -> dict[str, dict[str, Any]]:
    """Write each domain's rows in a way of its own; return how a recipe reads them.

    Those of the night are an `Image` feature with a class, those of the day plain bytes, those in fog files in folders.
    """
    features = Features(
        {"id": Value("string"), "picture": Image(), "colour": ClassLabel(names=list(COLOURS)), "place": Value("string")}
    )
    Dataset.from_list(pictures("night", 96, 1), features=features).to_parquet(folder / "night.parquet")
    Dataset.from_list(pictures("day", 96, 1)).to_parquet(folder / "day.parquet")
    for i, row in enumerate(pictures("fog", 96, 1)):
        file = folder / "fog" / f"{row['colour']}_fog" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["picture"])
    return {
        "night": {"dataset": "night.parquet", "image": "picture", "label": "a {colour} night"},
        "day": {"dataset": "day.parquet", "image": "picture", "label": "a {colour}_{place}"},
        "fog": {"dataset": "fog", "image": "image", "label": "a {label}"},
    }


def image_recipe(folder: Path) -> dict[str, Any]:
    """Write a CLIP, data for three clients and a pool; return a recipe that needs seconds."""
    clip_folder(folder / "clip")
    pool = [row for place in PLACES for row in pictures(place, 32, 2)]
    Dataset.from_list(pool).to_parquet(folder / "pool.parquet")
    experts = [
        {"name": name, "license": "mit", "client": {"private": private, "tag": name}}
        for name, private in write_images(folder).items()
    ]
    public = {"dataset": "pool.parquet", "image": "picture", "label": "a {place}", "tag": "place"}
    return {
        "base_model": "clip",
        "public_pool": {**public, "license": "cc0-1.0"},
        "experts": experts,
        "selection": {"budget": 20},
        "alignment": {
            "max_steps": 100,
            "batch_size": 16,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "rank": 8,
            "alpha": 16,
        },
        "matching": {"temperature": TEMPERATURE},
        # Of a tower of random weights no dimension means anything by itself.
        "router": {"shrinkage": 0.1, "training": {"max_steps": 4, "batch_size": 8}},
        "card": {"license": "mit"},
    }


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file
