"""Linear-memory relation distillation: compare the attention relations of a student and a frozen teacher.

Importing this package registers the operators `torch.ops.linearard.*`. It imports torch and nothing heavier; the
training method lives in submodules.
"""

from linearard import _library
from linearard._library import cmake_prefix_path
from linearard.ops import (
    attention_kl,
    attention_kl_backward,
    attention_kl_forward,
    layer_relation_kl,
    layer_relation_kl_backward,
    layer_relation_kl_forward,
    relation_kl,
    relation_kl_backward,
    relation_kl_forward,
    relation_lse,
)

__version__: str = _library.load().__version__

__all__ = [
    "__version__",
    "attention_kl",
    "attention_kl_backward",
    "attention_kl_forward",
    "cmake_prefix_path",
    "layer_relation_kl",
    "layer_relation_kl_backward",
    "layer_relation_kl_forward",
    "relation_kl",
    "relation_kl_backward",
    "relation_kl_forward",
    "relation_lse",
]
