"""Registers the packed formats with Transformers wherever it is used, without `import hf_pcdvq`.

PyTorch calls `register` at the end of `import torch` (entry-point group `torch.backends`). Nothing is imported then: the
plugin follows as soon as the part of Transformers has been imported that knows the quantization methods.
`TORCH_DEVICE_BACKEND_AUTOLOAD=0`, PyTorch's own switch, turns this off.
"""

import sys
import warnings
from importlib.util import find_spec

# The second one is for programs that import the first one before PyTorch, which it then imports itself.
_MODULES = ("transformers.quantizers.auto", "transformers.modeling_utils")


class _AfterImport:
    """A finder for one module, which loads as it would otherwise; then the plugin is imported."""

    def __init__(self, name):
        self.name = name
        self.asking = False

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self.asking:
            return None
        self.asking = True  # the other finders
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                del spec.loader.exec_module  # a loader may be shared, as those of archives are
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _import_plugin()

            spec.loader.exec_module = exec_module
        return spec


def _import_plugin():
    try:
        import hf_pcdvq  # noqa: F401
    except Exception as error:  # other models must load nevertheless
        warnings.warn(f"hf_pcdvq could not be imported, so packed models do not load: {error!r}", stacklevel=2)


def register():
    """Have the plugin imported after the first of the modules that is not imported yet."""
    for name in _MODULES:
        if name not in sys.modules:
            sys.meta_path.insert(0, _AfterImport(name))
            return
