"""Unify experts that were trained apart into one Mixture-of-Experts model that loads with AutoModel.

Importing this package is enough for `AutoModelForCausalLM.from_pretrained(folder)`, without
`trust_remote_code`; it imports neither torch nor transformers.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

__version__ = "0.1.0"

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class _Configurations(dict[str, Any]):
    """The configurations registered with AutoConfig, which registers ours when it is first asked for one.

    Every Auto class reads the configuration before it looks for a model, and nobody asks before
    transformers is imported whole: a hook on its import would run into half-imported modules.
    """

    def __contains__(self, model_type: object) -> bool:
        if not super().__contains__(model_type) and str(model_type).startswith("metamoe_"):
            importlib.import_module("mergekit_moe.modeling")
        return super().__contains__(model_type)


def _teach(configuration_auto: Any) -> None:
    mapping = configuration_auto.CONFIG_MAPPING
    mapping._extra_content = _Configurations(mapping._extra_content)


class _OnImport:
    """Waits for transformers' own import of its configuration mapping, once."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_teach(module: Any) -> None:
            execute(module)
            _teach(module)

        spec.loader.exec_module = execute_and_teach  # type: ignore[method-assign]
        return spec


if _AUTO_CONFIG in sys.modules:
    _teach(sys.modules[_AUTO_CONFIG])
else:
    sys.meta_path.insert(0, _OnImport())
