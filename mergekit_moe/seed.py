"""Train a small Llama and its tokenizer on the public pool: a seed for benchmarks and demonstrations."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe.data import texts_of, tokenize
from mergekit_moe.recipe import Seed
from mergekit_moe.training import train
from mergekit_moe.workspace import is_main_process

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


def train_tokenizer(texts: list[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE tokenizer trained on `texts`, which puts BOS before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
