"""Products of ragged groups: grouped, or one for each expert; and which of the two a device gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_dist.model.expert_products import expert_linear, is_grouped
from diffmoe_dist.model.fp32_linear import fp32_linear
from diffmoe_dist.model.moe import ExpertInput, Experts, read_counts

COUNTS = [5, 0, 3, 8]


def leaves(dtype: torch.dtype) -> list[Tensor]:
    """Tokens, matrices, biases."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(20, 16), (4, 16, 24), (4, 24)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def result_and_gradients(dtype: torch.dtype, token_index: Tensor | None, grouped: bool, bias: bool) -> list[Tensor]:
    x, w, b = leaves(dtype)
    ends = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
    groups: Any = (None, ends) if grouped else (COUNTS, None)
    rows = x if token_index is not None else x[: sum(COUNTS)]
    y = expert_linear(rows, token_index, w, b if bias else None, *groups)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    return [y.detach(), *(leaf.grad for leaf in (x, w, b) if leaf.grad is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("picked", [True, False])
def test_a_product_for_each_expert_equals_the_grouped_product_also_where_an_expert_has_no_rows(
    picked: bool, bias: bool
) -> None:
    index = torch.arange(16) * 7 % 20 if picked else None

    grouped = result_and_gradients(torch.bfloat16, index, grouped=True, bias=bias)
    apart = result_and_gradients(torch.bfloat16, index, grouped=False, bias=bias)
    exact = result_and_gradients(torch.float32, index, grouped=False, bias=bias)

    assert len(grouped) == len(apart) == len(exact) == (4 if bias else 3)
    for one, other, fp32 in zip(grouped, apart, exact, strict=True):
        scale = float(fp32.abs().max())
        assert float((one.float() - other.float()).abs().max()) <= 2**-7 * scale
        assert float((one.float() - fp32).abs().max()) <= 2**-6 * scale
    assert not grouped[2][1].any() and not apart[2][1].any()  # the gradient of the matrix of the expert without rows


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("counts", [[0, 0, 0], None])  # over ranks the host knows them
def test_a_rank_whose_experts_get_no_rows_in_bf16_computes_no_grouped_product_and_has_zero_gradients(
    activation: str, counts: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = Experts(3, 8, 16, activation).bfloat16()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **options: pytest.fail("a product of nothing"))
    x = torch.empty(0, 8, dtype=torch.bfloat16, requires_grad=True)

    y = experts(ExpertInput(x, torch.zeros(3, dtype=torch.int64), None, counts))
    y.sum().backward()

    assert y.shape == (0, 8) and x.grad is not None and x.grad.shape == (0, 8)
    for parameter in experts.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def fake_rows(dtype: torch.dtype) -> Any:
    return SimpleNamespace(dtype=dtype, device=torch.device("cuda"), element_size=lambda: dtype.itemsize)


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        (torch.bfloat16, (9, 0), True), (torch.bfloat16, (10, 3), True), (torch.bfloat16, (8, 0), False),
        (torch.bfloat16, (12, 0), False), (torch.float32, (9, 0), False),
    ],
)  # fmt: skip
def test_on_cuda_the_grouped_product_is_used_where_it_has_a_kernel(
    dtype: torch.dtype, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    assert is_grouped(fake_rows(dtype), torch.empty(2, 8, 16, dtype=dtype)) is expected


def test_matrices_that_do_not_begin_at_a_multiple_of_16_bytes_are_multiplied_one_by_one() -> None:
    flat = torch.empty(300, dtype=torch.bfloat16)
    x = torch.empty(4, 8, dtype=torch.bfloat16)

    assert is_grouped(x, flat[8:264].view(2, 8, 16))
    assert not is_grouped(x, flat[4:260].view(2, 8, 16))
    assert not is_grouped(x, flat[:240].view(2, 8, 15))


def test_counts_are_read_in_one_copy() -> None:
    assert read_counts(torch.tensor([1, 2]), None, torch.tensor([3])) == [[1, 2], None, [3]]
    assert read_counts(torch.tensor([4]), None) == [[4], None] and read_counts(None) == [None]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("types", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_a_linear_layer_in_fp32_keeps_no_copy_and_has_the_gradients_of_autograd(
    types: tuple[str, str], activation: str | None
) -> None:
    x_type, w_type = (getattr(torch, name) for name in types)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 8, generator=generator).to(x_type).requires_grad_()
    w, b = (torch.randn(shape, generator=generator).to(w_type).requires_grad_() for shape in ((5, 8), (5,)))
    cotangent = torch.randn(12, 5, generator=generator)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = fp32_linear(x, w, b, activation)
    found = torch.autograd.grad(y, (x, w, b), cotangent)
    expected = F.linear((x if activation is None else F.silu(x)).float(), w.float(), b.float())
    gradients = torch.autograd.grad(expected, (x, w, b), cotangent)

    assert y.dtype == torch.float32 and torch.equal(y, expected)
    assert {id(x), id(w)} <= {id(tensor) for tensor in kept} and len(kept) == (2 if activation is None else 3)
    for mine, theirs in zip(found, gradients, strict=True):
        assert mine.dtype == theirs.dtype
        tolerance = 1e-6 if x_type == torch.float32 else 2e-2  # backward rounds the gradient of the scores to bf16
        assert float((mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()) <= tolerance
