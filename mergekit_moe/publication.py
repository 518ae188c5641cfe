"""What a client publishes: a plain PEFT adapter, its proxies, routing statistics and a card, in one folder."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_moe.adapters import ADAPTER, ADAPTER_CONFIG
from mergekit_moe.data import batches
from mergekit_moe.experts import ABOUT, PROXIES, STATISTICS
from mergekit_moe.workspace import write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

_BATCH = 16


def publish_expert(
    aligned: Path,
    base: Path,
    *,
    about: dict[str, Any],
    proxies: dict[str, Any],
    proxy_tokens: "Dataset",
    statistics: Path | None = None,
    out: Path,
) -> None:
    """Assemble the folder that a client may publish; what each file can tell is the ledger's to say.

    Args:
        aligned: the folder that `align_expert` wrote.
        about: expert.json: name, base model and its fingerprint, licence, domain-free tokens.
        proxies: proxies.json: the pool's fingerprint and the picked rows.
        proxy_tokens: those rows, tokenised.
        statistics: routing statistics to publish in place of those over the proxies.
    """
    shutil.copyfile(aligned / ADAPTER, out / ADAPTER)
    config = json.loads((aligned / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    # PEFT recorded the folder that the base was loaded from, which means nothing elsewhere.
    write_json(
        out / ADAPTER_CONFIG,
        {**config, "base_model_name_or_path": about["base_model"], "revision": about["base_revision"]},
    )
    write_json(out / ABOUT, about)
    write_json(out / PROXIES, proxies)
    if statistics is not None:
        shutil.copyfile(statistics, out / STATISTICS)
    else:
        write_statistics(out, base, proxy_tokens, about["domain_free_token_ids"])


def write_statistics(expert: Path, base: Path, proxy_tokens: "Dataset", silent_tokens: list[int]) -> None:
    """Write the expert's routing statistics over its proxies, exact running sums over tokens.

    For each layer: `count` (), `sum` (H,) and `sum_of_squares` (H,) of the FFN's input, float64, along the
    expert's own path, without padding and without the domain-free tokens (MetaMoE, section 3.3: e_p is
    their mean).
    """
    import torch
    from safetensors.torch import save_file

    from mergekit_moe.models import (
        adapter_silent_on,
        as_used,
        counted_tokens,
        load_adapted,
        recorded_ffn_inputs,
        scored_inputs,
    )

    model = as_used(load_adapted(base, expert), base).eval()
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), adapter_silent_on(model, silent_tokens):
        for batch in batches(proxy_tokens, _BATCH, model.device):
            with recorded_ffn_inputs(model) as inputs:
                model(**scored_inputs(model, batch), use_cache=False)
            counted = counted_tokens(batch, inputs[0], silent_tokens)
            for layer, hidden in enumerate(inputs):
                tokens = hidden[counted].cpu().double()
                for name, value in (
                    ("count", torch.tensor(len(tokens), dtype=torch.float64)),
                    ("sum", tokens.sum(0)),
                    ("sum_of_squares", tokens.square().sum(0)),
                ):
                    key = f"layers.{layer}.{name}"
                    sums[key] = sums[key] + value if key in sums else value
    save_file(sums, str(expert / STATISTICS))
