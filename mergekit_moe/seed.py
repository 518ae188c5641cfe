"""Train a small model and its tokenizer on public rows: a seed for benchmarks and demonstrations.

A Llama on the pool, or a CLIP model on labelled images.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_moe.data import label_names, texts_of, tokenize
from mergekit_moe.images import ImageReader
from mergekit_moe.matching import PROJECTED, LabelMatcher
from mergekit_moe.recipe import ClipSeed, Seed
from mergekit_moe.training import train
from mergekit_moe.workspace import is_main_process, wait_for_everyone

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_seed(pool: "Dataset", settings: Seed, *, seed: int, out: Path) -> None:
    """Write a seed model and its tokenizer, both made from the pool alone, to the folder `out`."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    tokenizer = train_tokenizer(texts_of(pool), settings.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    model = LlamaForCausalLM(config)
    train(model, tokenize(pool, tokenizer, settings.max_length), settings, seed=seed, folder=out)
    if is_main_process():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def train_clip_seed(rows: "Dataset", settings: ClipSeed, *, seed: int, out: Path) -> None:
    """Write a CLIP model, its tokenizer and its image processor, made from `rows` alone, to the folder `out`.

    Args:
        rows: images with labels, whose names are what the text tower reads.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, set_seed

    names = label_names(rows)
    tokenizer = _train_name_tokenizer(names, settings)
    side = {"height": settings.image_size, "width": settings.image_size}
    if is_main_process():
        CLIPImageProcessorPil(size=side, do_center_crop=False).save_pretrained(out)
    wait_for_everyone()
    set_seed(seed)
    model = CLIPModel(_clip_config(settings, tokenizer))
    tokens = tokenizer(names, padding=True, truncation=True, return_tensors="pt")
    matcher = _NameMatcher(model, tokens["input_ids"], tokens["attention_mask"])
    train(matcher, tokenize(rows, ImageReader(out), settings.max_length, names), settings, seed=seed, folder=out)
    if is_main_process():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


class _NameMatcher(nn.Module):
    """A CLIP model that learns to put an image nearest to its own name, of all names in a batch.

    CLIP's loss from the images' side: many images of a batch have the same name.

    Shapes: N names of T tokens, B images.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def __init__(self, clip: Any, input_ids: Tensor, attention_mask: Tensor) -> None:
        super().__init__()
        self.matcher = LabelMatcher(clip, PROJECTED)
        self.register_buffer("input_ids", input_ids, persistent=False)
        self.register_buffer("attention_mask", attention_mask, persistent=False)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean loss of a batch; `labels` (B,) are numbers of names."""
        present, targets = labels.unique(return_inverse=True)
        names = self.matcher.embed(input_ids=self.input_ids[present], attention_mask=self.attention_mask[present])
        images = self.matcher.embed(pixel_values=pixel_values)
        scale = self.matcher.encoder.logit_scale.exp().clamp(max=100)
        return {"loss": F.cross_entropy(scale * images @ names.T, targets)}


def _clip_config(settings: ClipSeed, tokenizer: "PreTrainedTokenizerFast") -> Any:
    from transformers import CLIPConfig

    both = {
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_attention_heads": settings.heads,
    }
    text = {
        "num_hidden_layers": settings.text_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": settings.max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "num_hidden_layers": settings.layers,
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
    }
    return CLIPConfig(text_config=both | text, vision_config=both | vision, projection_dim=settings.hidden_size)


def _train_name_tokenizer(names: list[str], settings: ClipSeed) -> "PreTrainedTokenizerFast":
    """Return a tokenizer of names, which CLIP reads off at their EOS."""
    from tokenizers import processors

    # CLIP takes an EOS of id 2 for one of a config from before it was read from there: for the largest id of a text.
    tokenizer = train_tokenizer(names, settings.vocab_size, specials=(EOS, BOS, PAD))
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=specials
    )
    tokenizer.model_max_length = settings.max_length
    return tokenizer


def train_tokenizer(
    texts: list[str], vocab_size: int, *, specials: tuple[str, ...] = (PAD, BOS, EOS)
) -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE tokenizer trained on `texts`, which puts BOS before a text.

    Args:
        specials: PAD, BOS and EOS, in the order of their ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
