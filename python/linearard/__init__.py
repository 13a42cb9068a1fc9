"""Linear-memory relation distillation: compare the attention relations of a student and a frozen teacher.

Importing this package registers the operators `torch.ops.linearard.*`. It imports torch and nothing heavier; the
training method lives in submodules.
"""

from __future__ import annotations

from linearard._library import load as _load

_C = _load()

from linearard._build_config import VERSION as __version__  # noqa: E402
from linearard.ops import (  # noqa: E402
    attention_kl,
    attention_kl_backward,
    attention_kl_forward,
    relation_kl,
    relation_kl_backward,
    relation_kl_forward,
    relation_lse,
)
