"""Measures of sharpness: against an exact Hessian, closed forms, and on any number of ranks."""

import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from flatcal_dist.sharpness.measures import MeanLoss, MeasureError, Options, Sharpness, measure
from flatcal_dist.sharpness.measures.spectrum import largest_eigenvalue, trace
from tests.support.ranks import on_ranks

README = Path(__file__).parents[2] / "flatcal_dist/sharpness/README.md"
IMAGES, M = 48, 12


def make_network(kind: str = "plain") -> nn.Module:
    """A tiny network; the others hold what behaves otherwise in training."""
    torch.manual_seed(1)
    between = {"plain": [nn.Tanh()], "norm": [nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5)]}
    network = nn.Sequential(nn.Linear(3, 4), *between[kind], nn.Linear(4, 3)).double()
    if kind == "norm":  # statistics that differ from those of the images
        network[1].running_mean += 0.3
    return network


def make_images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(IMAGES, 3).double() * 2, torch.randint(0, 3, (IMAGES,))


def make_groups(
    rank: int = 0, world_size: int = 1, count: int = 4
) -> list[list[tuple[Tensor, Tensor]]]:
    """Groups of M images, each in two batches; every rank has some of them."""
    images, labels = make_images()
    groups = list(zip(images.split(M), labels.split(M), strict=True))[rank:count:world_size]
    return [list(zip(x.split(7), y.split(7), strict=True)) for x, y in groups]


def flat_loss(network: nn.Module, images: Tensor, labels: Tensor):
    """The mean loss as a function of one vector, written with torch alone."""
    named = {name: w.detach() for name, w in network.named_parameters()}

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([w.numel() for w in named.values()])
        shaped = {n: p.view_as(w) for (n, w), p in zip(named.items(), pieces, strict=True)}
        return cross_entropy(functional_call(network, shaped, (images,)), labels)

    return loss, torch.cat([w.flatten() for w in named.values()])


def on_some_ranks(rank: int, world_size: int, groups: int) -> Sharpness:
    loss = MeanLoss(make_network("norm"), make_groups(rank, world_size, groups))
    return measure(loss, Options(rho=0.1, m=M, samples=8))


@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_curvature_is_that_of_the_exact_hessian(kind: str) -> None:
    network = make_network(kind)
    found = measure(MeanLoss(network, make_groups()), Options(m=M, samples=80, tolerance=1e-6))
    assert network.training, "the mode comes back"
    loss, w = flat_loss(network.eval(), *make_images())
    exact = hessian(loss, w)
    eigenvalues = torch.linalg.eigvalsh(exact)
    assert found.weights == len(w)
    assert found.loss == pytest.approx(float(loss(w)))
    top = found.eigenvalue
    assert top.converged
    assert top.value == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert top.residual <= 1e-6 * top.value
    error = found.trace.standard_error
    assert abs(found.trace.value - float(exact.trace())) < 3 * error
    # The variance of Hutchinson's estimate with signs: 2 * the squares off the diagonal.
    variance = 2 * float((exact - exact.diag().diag()).square().sum())
    assert error == pytest.approx(math.sqrt(variance / 80), rel=0.2)


def test_rises_and_lines_are_their_formulas() -> None:
    """m-sharpness of Foret et al., ASAM's ascent of Kwon et al., and steps of a given length."""
    network, images_labels, rho = make_network(), make_images(), 0.2
    found = measure(MeanLoss(network, make_groups()), Options(rho=rho, adaptive_rho=0.7, m=M))
    loss, w = flat_loss(network, *images_labels)
    named = network.named_parameters()
    scale = torch.cat([w.abs().flatten() + 0.01 if "weight" in n else torch.ones_like(w).flatten()
                       for n, w in named]).detach()  # fmt: skip

    def rise(loss, rule: str) -> float:
        g = torch.autograd.functional.jacobian(loss, w)
        t, length = (scale, 0.7) if rule == "asam" else (torch.ones_like(w), rho)
        return float(loss(w + length * t**2 * g / (t * g).norm()) - loss(w))

    split = [flat_loss(network, x, y)[0]
             for x, y in zip(*(part.split(M) for part in images_labels), strict=True)]  # fmt: skip
    kinds = [(one.rule, one.images, one.groups) for one in found.rises]
    assert kinds == [("sam", 48, 1), ("sam", 12, 4), ("asam", 48, 1), ("asam", 12, 4)]
    for one in found.rises:
        if one.groups == 1:
            assert one.rise.value == pytest.approx(rise(loss, one.rule), rel=1e-5)
            continue
        each = torch.tensor([rise(part, one.rule) for part in split])
        assert one.rise.value == pytest.approx(float(each.mean()), rel=1e-5)
        assert one.rise.standard_error == pytest.approx(float(each.std()) / 2, rel=1e-4)
    g = torch.autograd.functional.jacobian(loss, w)
    for t, value in zip(found.distances, found.along_ascent, strict=True):
        assert value == pytest.approx(float(loss(w + t * g / g.norm())))
    assert all(line[4] == found.loss for line in found.along_random), "distance 0"
    curved = [(line[3] + line[5] - 2 * line[4]) / (rho / 2) ** 2 for line in found.along_random]
    exact = hessian(loss, w)
    assert all(float(torch.linalg.eigvalsh(exact)[0]) - 0.1 < c for c in curved)


def test_values_do_not_depend_on_the_number_of_ranks() -> None:
    """Beside rounding, also where a rank has no images at all."""
    for world_size, groups in ((2, 4), (3, 2)):
        alone = on_some_ranks(0, 1, groups)
        first, *others = on_ranks(world_size, on_some_ranks, groups)
        assert all(other == first for other in others)
        assert _numbers(asdict(first)) == pytest.approx(_numbers(asdict(alone)), rel=1e-6, abs=1e-9)


def _numbers(value) -> list:
    """All numbers of nested values, in their order."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [number for one in inner for number in _numbers(one)]
    return [value] if isinstance(value, float | int) else []


def test_the_largest_eigenvalue_is_not_the_largest_in_size() -> None:
    """A matrix whose eigenvalues are known: -9 and 2, 1.9, 1.8, ..."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(30, 30).double())[0]
    values = torch.cat([torch.tensor([-9.0]), 2 - torch.arange(29) / 10]).double()
    matrix = rotation @ values.diag() @ rotation.T
    found = largest_eigenvalue(matrix.mv, torch.zeros(30).double(), tolerance=1e-8)
    assert found.converged
    assert found.value == pytest.approx(2, abs=1e-7)
    short = largest_eigenvalue(matrix.mv, torch.zeros(30).double(), most=3)
    assert not short.converged
    assert short.products == 4
    nearest = (values - short.value).abs().min()
    assert nearest <= short.residual, "an eigenvalue lies within the residual"


def test_a_multiple_of_the_identity_needs_one_product_and_no_luck() -> None:
    like = torch.zeros(7)
    found = largest_eigenvalue(lambda v: 3 * v, like)
    assert (found.value, found.products) == (pytest.approx(3), 2)
    assert trace(lambda v: 3 * v, like, samples=4).value == pytest.approx(21)
    assert trace(lambda v: 3 * v, like, samples=4).standard_error == pytest.approx(0, abs=1e-6)


class Slope(nn.Module):
    """Logits (w.x, 0) of one weight vector. At w = 0 the mean loss of x, label 0 or 1, is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ self.w, torch.zeros(len(x))], 1)


def test_a_loss_known_in_closed_form() -> None:
    """At w = 0 the Hessian is the mean of x x' / 4: here diag(9, 1) / 4 / 2, without a gradient."""
    x = torch.tensor([[3.0, 0], [3.0, 0], [0, 1], [0, 1]])
    labels = torch.tensor([0, 1, 0, 1])
    found = measure(MeanLoss(Slope(), [[(x, labels)]]), Options(rho=0.1, m=4))
    assert found.loss == pytest.approx(math.log(2))
    assert found.eigenvalue.value == pytest.approx(9 / 8)
    assert found.trace.value == pytest.approx(10 / 8)
    assert found.gradient_norm == pytest.approx(0, abs=1e-7)
    # A zero gradient has no direction. What rounding leaves of it rises by at most lambda rho^2/2.
    assert all(0 <= one.rise.value + 1e-7 < 0.5 * 9 / 8 * one.rho**2 for one in found.rises[:2])


def test_weights_buffers_and_gradients_are_untouched() -> None:
    network = make_network("norm")
    frozen = network[0].bias.requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    loss = MeanLoss(network, make_groups())
    measure(loss, Options(m=M, samples=2))
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert torch.equal(network[0].weight.grad, torch.ones(4, 3))
    assert "0.bias" not in loss.names, "frozen weights are no part of it"
    assert not frozen.requires_grad


def test_what_is_not_finite_is_named() -> None:
    network = make_network()
    with torch.no_grad():
        network[0].weight[0, 0] = float("nan")
    with pytest.raises(MeasureError, match=r"mean loss of 48 images at the weights is nan.*Look"):
        measure(MeanLoss(network, make_groups()), Options(m=M))
    big = measure(MeanLoss(make_network(), make_groups()), Options(m=M, samples=2, rho=900.0))
    assert math.isfinite(big.rises[0].rise.value)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(MeasureError, match="no images"):
        MeanLoss(make_network(), [])
    with pytest.raises(MeasureError, match="no weights that can be trained"):
        MeanLoss(make_network().requires_grad_(False), make_groups())


class Attention(nn.Module):
    """One layer of attention over four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 9)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x.flip(1), x.sin(), x.cos()], 1)[:, None]
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        return self.head(scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


def test_attention_is_differentiated_twice() -> None:
    torch.manual_seed(0)
    network = Attention().double()
    loss = MeanLoss(network, make_groups())
    flat, w = flat_loss(network, *make_images())
    v = torch.randn_like(w)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = hessian(flat, w) @ v
    assert torch.allclose(loss.hessian_times(v), expected, atol=1e-10)


class Once(torch.autograd.Function):
    """A fused operation without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


class Fused(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(super().forward(x))


def test_a_network_without_second_derivatives_is_refused() -> None:
    loss = MeanLoss(Fused(3, 3).double(), make_groups())
    with pytest.raises(MeasureError, match=r"cannot be differentiated twice.*fused or custom"):
        loss.check()
    MeanLoss(make_network(), make_groups()).check()


def test_the_readmes_example_measures() -> None:
    [block] = re.findall(r"```python\n(from flatcal_dist.sharpness.measures .*?)```",
                         README.read_text(), re.DOTALL)  # fmt: skip
    torch.manual_seed(0)
    names = {"model": nn.Linear(3, 2), "images": torch.randn(1024, 3)}
    names["labels"] = torch.randint(0, 2, (1024,))
    exec(block, names)
    assert [one.groups for one in names["found"].rises] == [1, 8, 1, 8]
