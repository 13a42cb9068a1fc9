"""linearard._C: enums, build information, plan, and the C++ API against torch.ops; the check of torch's version."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generators import gaussian, perturbed

import linearard
from linearard import _C, _library

ops = torch.ops.linearard


def pair(tokens=70, head_dim=16, device="cpu"):
    teacher = gaussian(1, 2, tokens, head_dim, device=device).float()
    return perturbed(teacher.double(), 0.2).float(), teacher


def test_enums():
    assert [x.name for x in _C.Divergence] == ["FORWARD_KL", "REVERSE_KL", "JSD"]
    assert [x.name for x in _C.Reduction] == ["NONE", "SUM", "MEAN"]
    with pytest.raises(TypeError):
        _C.relation_kl(*pair(), divergence="forward_kl")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_relation_kl_is_the_operator(device, divergence, reduction):
    student, teacher = pair(device=device)
    options = {
        "key_padding_mask": torch.rand(1, 70, device=device) > 0.2,
        "row_weight": torch.rand(1, 70, device=device),
        "scale_student": 0.3,
        "causal": True,
        "beta": 0.3,
        "deterministic": True,
    }
    results = []
    for function, names in (
        (ops.relation_kl, {"divergence": divergence, "reduction": reduction}),
        (
            _C.relation_kl,
            {"divergence": _C.Divergence[divergence.upper()], "reduction": _C.Reduction[reduction.upper()]},
        ),
    ):
        leaf = student.clone().requires_grad_()
        value = function(leaf, teacher, **options, **names)
        value.sum().backward()
        results.append((value.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_kernels_are_the_operators(device):
    student, teacher = pair(device=device)
    options = {"causal": True, "scale_teacher": 0.2, "deterministic": True}
    rows = ops.relation_kl_forward(student, teacher, **options)
    for left, right in zip(_C.relation_kl_forward(student, teacher, **options), rows, strict=True):
        assert torch.equal(left, right)
    gradient = ops.relation_kl_backward(rows[0], student, teacher, *rows[1:], **options)
    assert torch.equal(_C.relation_kl_backward(rows[0], student, teacher, *rows[1:], **options), gradient)
    lse = ops.relation_lse(teacher, scale=0.2, causal=True, deterministic=True)
    assert torch.equal(_C.relation_lse(teacher, scale=0.2, causal=True, deterministic=True), lse)


def test_layer_relation_kl_is_the_operator(device):
    pairs = [pair(device=device), pair(device=device)]
    students, teachers = [p[0] for p in pairs], [p[1] for p in pairs]
    options = {"causal": True, "scale_teacher": 0.2, "deterministic": True}
    rows = ops.layer_relation_kl_forward(students, teachers, **options)
    gradients = ops.layer_relation_kl_backward(rows[0], students, teachers, *rows[1:], **options)
    for module in (_C, linearard):
        loss = module.layer_relation_kl(students, teachers, num_items=torch.tensor(9, device=device), **options)
        assert torch.equal(
            loss, ops.layer_relation_kl(students, teachers, num_items=torch.tensor(9, device=device), **options)
        )
        for left, right in zip(module.layer_relation_kl_forward(students, teachers, **options), rows, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
        own = module.layer_relation_kl_backward(rows[0], students, teachers, *rows[1:], **options)
        assert all(torch.equal(a, b) for a, b in zip(own, gradients, strict=True))


def test_attention_kl_is_the_operator(device):
    query, query_teacher = pair(device=device)
    key, key_teacher = pair(tokens=90, device=device)
    value = ops.attention_kl(query, key, query_teacher, key_teacher, deterministic=True)
    assert torch.equal(_C.attention_kl(query, key, query_teacher, key_teacher, deterministic=True), value)


def test_typed_functions_are_the_operators(device):
    """linearard.relation_kl and the others hand every argument to torch.ops."""
    student, teacher = pair(device=device)
    for options in ({"divergence": "jsd", "beta": 0.2, "reduction": "none"}, {"causal": True, "scale_student": 0.1}):
        assert torch.equal(
            linearard.relation_kl(student, teacher, deterministic=True, **options),
            ops.relation_kl(student, teacher, deterministic=True, **options),
        )
    rows = linearard.relation_kl_forward(student, teacher, deterministic=True)
    for left, right in zip(rows, ops.relation_kl_forward(student, teacher, deterministic=True), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(
        linearard.relation_kl_backward(rows[0], student, teacher, *rows[1:], deterministic=True),
        ops.relation_kl_backward(rows[0], student, teacher, *rows[1:], deterministic=True),
    )
    assert torch.equal(
        linearard.relation_lse(teacher, deterministic=True), ops.relation_lse(teacher, deterministic=True)
    )
    inputs = (student, student, teacher, teacher)
    attention = linearard.attention_kl_forward(*inputs, causal=False, deterministic=True)
    expected = ops.attention_kl_forward(*inputs, causal=False, deterministic=True)
    for left, right in zip(attention, expected, strict=True):
        assert torch.equal(left, right)
    gradients = linearard.attention_kl_backward(expected[0], *inputs, *expected[1:], causal=False, deterministic=True)
    for left, right in zip(
        gradients,
        ops.attention_kl_backward(expected[0], *inputs, *expected[1:], causal=False, deterministic=True),
        strict=True,
    ):
        assert torch.equal(left, right)


def test_build_information():
    info = _C.build_info()
    assert info["version"] == linearard.__version__
    assert torch.__version__.split("+")[0] == info["torch"].split("+")[0]
    assert info["compiler"]
    assert info["instruction_sets"][-1] == "generic"
    assert isinstance(info["cuda"]["architectures"], list)


def test_plan():
    student, teacher = pair(tokens=1000, head_dim=64)
    plan = _C.plan(student, teacher)
    assert plan["backend"] == "cpu"
    assert plan["instruction_set"] in _C.build_info()["instruction_sets"]
    assert plan["traversal"] in ("triangular", "dense")
    assert plan["compute_dtype"] == "float32"
    assert _C.plan(student.double(), teacher)["compute_dtype"] == "float64"
    assert plan["threads"] >= 1
    assert plan["workspace_bytes_forward"] > 0
    assert plan["workspace_bytes_backward"] > 0
    rows, columns = -(-1000 // plan["tile_rows"]), -(-1000 // plan["tile_columns"])
    # A head has at least the tiles of the lower triangle, at most all of them; there are two heads.
    assert rows * columns <= plan["tile_count"] * 2 <= 2 * 2 * rows * columns
    assert _C.plan(student, teacher, deterministic=True)["deterministic"]
    with pytest.raises(RuntimeError, match="teacher"):
        _C.plan(student, teacher[:, :1])


def test_errors_of_the_cpp_api_name_the_operator():
    student, teacher = pair()
    with pytest.raises(RuntimeError, match=r"^relation_kl: teacher"):
        _C.relation_kl(student, teacher[:, :1])


def test_another_version_of_torch_is_one_clear_sentence():
    _library.check_torch_version("2.11.0", "2.11.0+cu130")
    _library.check_torch_version("2.11.0+cpu", "2.11.1+cu130")
    for built, running in (("2.11.0", "2.12.0"), ("2.11.0+cpu", "2.1.1+cpu"), ("2.9.1", "3.9.1")):
        with pytest.raises(ImportError) as raised:
            _library.check_torch_version(built, running)
        message = str(raised.value)
        assert built in message
        assert running in message
        assert "\n" not in message


def test_import_under_another_version_of_torch(tmp_path: Path):
    """The whole import in a fresh process whose torch claims another version: the sentence, no undefined symbol."""
    script = tmp_path / "old_torch.py"
    paths = [path for path in sys.path if path]
    script.write_text(
        f"import sys\nsys.path[:0] = {paths!r}\n"
        "import torch\ntorch.__version__ = torch.torch_version.TorchVersion('2.3.1+cpu')\nimport linearard\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: linearard was built against torch 2.")
    assert "2.3.1" in last
    assert "undefined symbol" not in done.stderr


def test_importing_releases_no_warning(tmp_path: Path):
    """Importing registers the operators and prints nothing."""
    paths = [path for path in sys.path if path]
    script = tmp_path / "import_only.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {paths!r}\nimport linearard, torch\ntorch.ops.linearard.relation_kl\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
