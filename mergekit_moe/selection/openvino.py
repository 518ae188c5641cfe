"""OpenVINO behind a SentenceTransformer's encoder, for CPUs: several times as many texts a second as torch."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np

from mergekit_moe.errors import SelectionError

_TRIALS = ("A word", "The quick brown fox jumps over the lazy dog.", "def add(a, b):\n    return a + b\n" * 20)
_SAME = 0.9999


def accelerate(embedder: Any) -> None:
    """Replace the encoder's network by the same one compiled by OpenVINO, once its vectors are seen to be equal.

    Raises:
        SelectionError: if OpenVINO can't take the network, or its vectors' cosine to torch's is under 0.9999.
    """
    import openvino
    import torch
    from torch.jit import TracerWarning

    before = embedder.encode(list(_TRIALS), normalize_embeddings=True)
    network = embedder[0].model
    network.loss_type = "ForCausalLM"  # tracing looks at every property, and a model without a head warns of its loss
    inputs = dict(embedder.tokenizer(["a", "b c"], padding=True, return_tensors="pt"))
    try:
        with warnings.catch_warnings():
            for kind in (TracerWarning, DeprecationWarning, FutureWarning):  # of tracing: nothing a user could do
                warnings.simplefilter("ignore", kind)
            converted = openvino.convert_model(network, example_input=inputs)
        # Its own choice of precision: bfloat16 products where the CPU has them, which is where the speed is.
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.compile_model(converted, "CPU", settings)
    except RuntimeError as error:
        raise SelectionError(
            f"OpenVINO can't take this embedder ({str(error).splitlines()[0]}); set selection.embedder_backend: torch"
        ) from None
    names = [port.get_any_name() for port in compiled.inputs]

    class Compiled(torch.nn.Module):
        """Answers as the network does, as far as a pooling layer asks."""

        config = network.config
        dtype = network.dtype

        def forward(self, **given: Any) -> SimpleNamespace:
            hidden = compiled([given[name].numpy() for name in names])[0]
            return SimpleNamespace(last_hidden_state=torch.from_numpy(np.array(hidden)))

    embedder[0].model = Compiled()
    after = embedder.encode(list(_TRIALS), normalize_embeddings=True)
    cosine = float((before * after).sum(axis=1).min())
    if not cosine >= _SAME:
        raise SelectionError(
            f"OpenVINO's vectors differ from torch's (cosine {cosine:.5f}); set selection.embedder_backend: torch"
        )
