"""Fresh processes: importing the package is enough to load its models, in any order and by any Auto class."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import tiny_moe, tokens
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LOADS = {
    "package first": "import mergekit_moe; import transformers as t",
    "transformers first": "import transformers as t; import mergekit_moe",
    "Auto classes first": "import transformers as t; t.AutoModelForCausalLM; import mergekit_moe",
}
USES = {
    "AutoConfig": "assert type(t.AutoConfig.from_pretrained(folder)).__name__ == 'MetaMoeLlamaConfig'",
    "AutoModel": "assert type(t.AutoModel.from_pretrained(folder)).__name__ == 'MetaMoeLlamaModel'",
    "AutoModelForCausalLM": (
        "model = t.AutoModelForCausalLM.from_pretrained(folder)\n"
        "assert type(model).__name__ == 'MetaMoeLlamaForCausalLM'\n"
        "assert type(model).__module__ == 'mergekit_moe.modeling.modeling_metamoe'"
    ),
}


def fresh(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    tiny_moe("Llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("load", "use"), [(a, b) for a in LOADS for b in USES if a == "package first" or b == "AutoModel"]
)
def test_importing_the_package_registers_its_models(folder: Path, load: str, use: str) -> None:
    done = fresh(f"import sys\nfolder = sys.argv[1]\n{LOADS[load]}\n{USES[use]}", str(folder))
    assert done.returncode == 0, done.stderr


def test_without_the_package_nothing_is_registered(folder: Path) -> None:
    """The negative control."""
    done = fresh(f"import sys\nimport transformers as t\nfolder = sys.argv[1]\n{USES['AutoConfig']}", str(folder))
    assert done.returncode != 0


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = fresh("import sys, mergekit_moe\nassert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()")
    assert done.returncode == 0, done.stderr


CONTEXT_PARALLEL = """
import sys, torch, torch.distributed as dist
import mergekit_moe, transformers
from torch.distributed.tensor.experimental import context_parallel
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(2, 10).unsqueeze(0)
model(ids, use_cache=False)
try:
    with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
        model(ids, use_cache=False)
except ValueError as error:
    assert "set cp_size and sp_size to 1" in str(error), error
else:
    raise AssertionError("not refused")
model(ids, use_cache=False)
"""


def test_context_parallelism_is_refused(folder: Path) -> None:
    done = fresh(CONTEXT_PARALLEL, str(folder))
    assert done.returncode == 0, done.stderr


def test_ulysses_is_refused_where_the_router_has_context(monkeypatch: pytest.MonkeyPatch) -> None:
    native = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def wrapper(*args: object, **kwargs: object) -> object:
        return native(*args, **kwargs)  # type: ignore[operator]

    names = {"__name__": "deepspeed.runtime.sequence_parallel.ulysses_sp"}
    ulysses = types.FunctionType(wrapper.__code__, names, closure=wrapper.__closure__)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", ulysses)
    with pytest.raises(ValueError, match="set cp_size and sp_size to 1"):
        tiny_moe("Llama")(tokens())
    without = tiny_moe("Llama", router_context="none")
    without(tokens())
    assert without.supports_context_parallel and not tiny_moe("Llama").supports_context_parallel
