"""A loopback Hub with what the paper's recipes name: the same ids, branches and columns, tiny models, few rows."""

import hashlib
import io
import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hub_tools import hub_with_users
from loopback_hub import Hub
from loopback_hub.store import is_large
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mergekit_moe.seed import train_tokenizer

CLIPS = {"openai/clip-vit-base-patch32": 8, "openai/clip-vit-base-patch16": 4}
"""Id -> its stand-in's patch size, of 16 by 16 pixels."""
CLIP_WORDS = ["<s>", "</s>", "a", "This", "is", "photo", "of", "pug", "Annual", "Crop", "Forest", "primrose", "daisy"]
IMAGENET = "benjamin-paine/imagenet-1k-256x256"
EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
LLAMAS = {"meta-llama/Llama-3.2-3B": ("llama3.2", True), "meta-llama/Llama-3.1-8B": ("llama3.1", False)}
"""Id -> its licence, and whether the head is the embedding."""
WORDS = {
    "csqa": "river bank money teacher bridge garden hammer kitchen window doctor",
    "cosmosqa": "yesterday friend concert dinner because afterwards weekend driving holiday mother",
    "socialiqa": "cameron felt others wanted grateful helped angry proud party result",
    "alpaca": "describe list explain rewrite classify sentence paragraph recipe planet number river friend felt",
}
POOL, ROWS = 520, 12
"""Rows of the pool, more than the paper's 500 proxies, and of each split."""


def words(domain: str, seed: int, count: int = 6) -> str:
    return " ".join(random.Random(f"{domain} {seed}").choices(WORDS[domain].split(), k=count))


def commonsense_qa(i: int) -> dict[str, Any]:
    choices = {"label": list("ABCDE"), "text": [words("csqa", 100 * i + k, 1) for k in range(5)]}
    return {"id": f"{i:032x}", "question": words("csqa", i), "question_concept": "bank", "choices": choices} | {
        "answerKey": "ABCDE"[i % 5]
    }


def cosmos_qa(i: int) -> dict[str, Any]:
    answers = {f"answer{k}": words("cosmosqa", 100 * i + k, 3) for k in range(4)}
    return {"id": f"3Q{i}", "context": words("cosmosqa", i, 12), "question": "why ?", **answers, "label": i % 4}


def social_i_qa(i: int) -> dict[str, Any]:
    answers = {f"answer{k}": words("socialiqa", 100 * i + ord(k), 2) for k in "ABC"}
    return {"context": words("socialiqa", i, 8), "question": "what next ?", **answers, "label": str(i % 3 + 1)}


def alpaca(i: int) -> dict[str, Any]:
    row = {"instruction": words("alpaca", i), "input": words("alpaca", -i, 3) if i % 2 else ""}
    return {**row, "output": words("alpaca", 1000 + i), "text": "unused"}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pd.DataFrame(rows).to_parquet(file)
    return file.getvalue()


def paper_hub(folder: Path) -> Hub:
    """Return a Hub with all that the paper's recipes name."""
    hub = hub_with_users()
    add_language(hub, folder)
    add_vision(hub, folder)
    return hub


def add_language(hub: Hub, folder: Path) -> None:
    """Add the Llamas, the embedder and the four data sets of text."""
    for number, (name, (license, tied)) in enumerate(LLAMAS.items()):
        add(hub, name, llama(folder / f"llama-{number}", license, tied=tied))
    add(hub, EMBEDDER, embedder(folder / "embedder"))
    splits = {"train": range(ROWS), "validation": range(ROWS, 2 * ROWS)}
    rows = {split: parquet([commonsense_qa(i) for i in numbers]) for split, numbers in splits.items()}
    # Its test split has no answers; nobody may need it.
    rows["test"] = parquet([commonsense_qa(i) | {"answerKey": ""} for i in range(3)])
    add_rows(hub, "tau/commonsense_qa", {f"data/{split}-00000-of-00001.parquet": made for split, made in rows.items()})
    add_rows(hub, "tatsu-lab/alpaca", {"data/train-00000-of-00001-a09b.parquet": parquet([*map(alpaca, range(POOL))])})
    for name, made in (("cosmos_qa", cosmos_qa), ("social_i_qa", social_i_qa)):
        files = {f"default/{split}/0000.parquet": parquet([*map(made, numbers)]) for split, numbers in splits.items()}
        add_script(hub, f"allenai/{name}", files)


def add_vision(hub: Hub, folder: Path) -> None:
    """Add the CLIPs, and the four data sets of images."""
    for name, patch in CLIPS.items():
        add(hub, name, clip(folder / f"clip-{patch}", patch))
    data_sets = {
        "timm/oxford-iiit-pet": ("abyssinian", "american_bulldog", "pug"),
        "dpdl-benchmark/oxford_flowers102": ("pink primrose", "colt's foot", "globe-flower"),
        "blanchon/EuroSAT_RGB": ("Annual Crop", "Forest", "SeaLake"),
    }
    for number, (name, labels) in enumerate(data_sets.items()):
        splits = ("train", "test") if number == 0 else ("train", "validation", "test")
        made = {split: pictures(labels, ROWS, f"{name} {split}", number) for split in splits}
        add_rows(hub, name, {f"data/{split}-00000-of-00001.parquet": rows for split, rows in made.items()})
    pool = pictures(("tench, Tinca tinca", "daisy", "seashore, coast"), POOL, "pool")
    add_rows(hub, IMAGENET, {"data/train-00000-of-00001.parquet": pool})


def pictures(labels: tuple[str, ...], count: int, seed: str, tint: int | None = None) -> bytes:
    """Return rows as the Hub's image data sets have them: an `Image` of some size and a `ClassLabel`.

    Args:
        tint: the channel that is strong in all of them; by turns where not given.
    """
    rng, rows = random.Random(seed), []
    for i in range(count):
        side = rng.randrange(20, 40)
        grain = np.frombuffer(rng.randbytes(side * side * 3), np.uint8).reshape(side, side, 3) // 2
        grain[..., i % 3 if tint is None else tint] += 120
        file = io.BytesIO()
        Picture.fromarray(grain).save(file, "PNG")
        rows.append({"image": file.getvalue(), "label": i % len(labels)})
    return as_parquet(Dataset.from_list(rows, features=Features({"image": Image(), "label": ClassLabel(names=labels)})))


def clip(folder: Path, patch: int) -> Path:
    """A random CLIP with its image processor and a tokenizer that frames a text as CLIP's does."""
    tokenizer: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(CLIP_WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.post_processor = frame
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "a"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_factor": 2.0}
    text = {"vocab_size": len(CLIP_WORDS), "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": patch}
    config = CLIPConfig(text_config=sizes | text | ends, vision_config=sizes | vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    return folder


def as_parquet(rows: Dataset) -> bytes:
    file = io.BytesIO()
    rows.to_parquet(file)
    return file.getvalue()


def llama(folder: Path, license: str, *, tied: bool) -> Path:
    """A random Llama 3: grouped heads, its rotary scaling, bfloat16, a tokenizer with BOS and without padding."""
    texts = [words(domain, i) for domain in WORDS for i in range(40)] + [
        "Question: Context: Choices: Answer: A. B. C. D. E."
    ]
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.pad_token = None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    return folder


def embedder(folder: Path) -> Path:
    """A random sentence-transformers model that reads letters."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    plain = folder.with_name("embedder-plain")
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    BertTokenizer(vocab=numbers, model_max_length=128).save_pretrained(plain)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.2, pad_token_id=0, **sizes)).save_pretrained(
        plain
    )
    SentenceTransformer(modules=[Transformer(str(plain)), Pooling(32, pooling_mode="mean")]).save(str(folder))
    return folder


def add(hub: Hub, name: str, folder: Path) -> None:
    """Add a model's folder, folders in it included."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hub.add(name, {str(path.relative_to(folder)): path.read_bytes() for path in files})


def add_rows(hub: Hub, name: str, files: dict[str, bytes]) -> None:
    """Add a data set whose card says which file is which split, as those made by `push_to_hub` do."""
    splits = [{"split": Path(path).name.split("-")[0], "path": path} for path in files]
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(splits)}\n---\n"
    hub.add(name, {**files, "README.md": card.encode()}, kind="dataset")


def add_script(hub: Hub, name: str, files: dict[str, bytes]) -> None:
    """Add a data set that is a loading script on main, and files on the Hub's own branch."""
    script = {f"{name.rpartition('/')[2]}.py": b"raise SystemExit('never run')\n", "README.md": b""}
    hub.add(name, script, kind="dataset").branch("refs/convert/parquet", {".gitattributes": b"", **files})
    hub.large.update(
        {hashlib.sha256(content).hexdigest(): content for path, content in files.items() if is_large(path)}
    )
