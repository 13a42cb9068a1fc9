"""C++ interface of linearard (python/bindings)."""

from collections.abc import Sequence
from enum import Enum
from typing import TypedDict

from torch import Tensor

__version__: str

class Divergence(Enum):
    FORWARD_KL = 0
    REVERSE_KL = 1
    JSD = 2

class Reduction(Enum):
    NONE = 0
    SUM = 1
    MEAN = 2

class CudaDevice(TypedDict):
    name: str
    compute_capability: str
    multiprocessors: int
    l2_bytes: int
    shared_memory_bytes_per_block: int
    global_memory_bytes: int

class CudaInfo(TypedDict):
    toolkit: str | None
    architectures: list[str]
    devices: list[CudaDevice]

class BuildInfo(TypedDict):
    version: str
    torch: str
    compiler: str
    build_type: str
    compiler_flags: str
    sanitizers: list[str]
    instruction_sets: list[str]
    cuda: CudaInfo

class Plan(TypedDict):
    backend: str
    instruction_set: str
    traversal: str
    compute_dtype: str
    tile_rows: int
    tile_columns: int
    tile_count: int
    threads: int
    workspace_bytes_forward: int
    workspace_bytes_backward: int
    deterministic: bool

def build_info() -> BuildInfo: ...
def plan(
    student: Tensor,
    teacher: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> Plan: ...
def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    row_weight: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    reduction: Reduction = Reduction.MEAN,
    num_items: Tensor | None = None,
    deterministic: bool | None = None,
    lse_teacher: Tensor | None = None,
) -> Tensor: ...
def relation_kl_forward(
    student: Tensor,
    teacher: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    deterministic: bool | None = None,
    lse_teacher: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def relation_kl_backward(
    grad_kl: Tensor,
    student: Tensor,
    teacher: Tensor,
    lse_student: Tensor,
    lse_teacher: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> Tensor: ...
def layer_relation_kl(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    row_weight: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    reduction: Reduction = Reduction.MEAN,
    num_items: Tensor | None = None,
    deterministic: bool | None = None,
) -> Tensor: ...
def layer_relation_kl_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]: ...
def layer_relation_kl_backward(
    grad_kl: Sequence[Tensor],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    lse_student: Sequence[Tensor],
    lse_teacher: Sequence[Tensor],
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> list[Tensor]: ...
def relation_lse(
    x: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    deterministic: bool | None = None,
) -> Tensor: ...
def attention_kl(
    query_student: Tensor,
    key_student: Tensor,
    query_teacher: Tensor,
    key_teacher: Tensor,
    *,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    row_weight: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = True,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    reduction: Reduction = Reduction.MEAN,
    num_items: Tensor | None = None,
    deterministic: bool | None = None,
) -> Tensor: ...
def attention_kl_forward(
    query_student: Tensor,
    key_student: Tensor,
    query_teacher: Tensor,
    key_teacher: Tensor,
    *,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = True,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def attention_kl_backward(
    grad_kl: Tensor,
    query_student: Tensor,
    key_student: Tensor,
    query_teacher: Tensor,
    key_teacher: Tensor,
    lse_student: Tensor,
    lse_teacher: Tensor,
    *,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = True,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]: ...
