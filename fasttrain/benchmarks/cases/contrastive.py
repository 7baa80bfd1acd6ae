"""NT-Xent and SupCon: loss, gradient, and the gradient of the gradient's squared norm."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.benchmarks.cases import OURS, PYTORCH, REFERENCE, Case, Results
from fasttrain.benchmarks.ceilings import Work
from fasttrain_kernels.ntxent import nt_xent, sup_con

Loss = Callable[[Tensor], Tensor]
"Embeddings [2 N, d], view-major -> sum of the losses of all rows."

FIRST, SECOND = "forward, backward", "forward, backward, double backward"
FLOOR = "two products and exponentials"
TRUTH_ROWS = 1024
"Rows of the similarity matrix that the truth in float64 holds at once."


def nt_xent_cases(
    images: int, dim: int, temperature: float, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Two views of N images, forward and backward, and with the double backward."""

    def ours(impl: str) -> Loss:
        return lambda z: nt_xent(z.unflatten(0, (2, -1)), temperature, impl=impl).sum()

    plain = partial(cross_entropy, temperature=temperature)
    z = embeddings(images, dim, dtype, device)
    yield from _cases("NT-Xent", z, ours, plain, nt_xent_peers(temperature, images, device))


def sup_con_cases(
    images: int, dim: int, temperature: float, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """The same with labels of 100 classes."""
    labels = torch.randint(100, (images,), device=device)

    def ours(impl: str) -> Loss:
        return lambda z: sup_con(z.unflatten(0, (2, -1)), labels, temperature, impl=impl).sum()

    plain = partial(mean_over_positives, temperature=temperature, labels=labels.repeat(2))
    z = embeddings(images, dim, dtype, device)
    yield from _cases("SupCon", z, ours, plain, sup_con_peers(temperature, labels))


def embeddings(images: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two views [2 N, d] that resemble each other more than others, at several lengths."""
    z = torch.randn(images, dim, device=device).repeat(2, 1)
    return (z + 0.5 * torch.randn_like(z)).to(dtype)


def _cases(
    kernel: str, z: Tensor, ours: Callable[[str], Loss], plain: Callable[..., Tensor], peers: dict[str, Loss]
) -> Iterator[Case]:
    theirs = {name: in_low_precision(loss, z.dtype) for name, loss in ({PYTORCH: plain} | peers).items()}
    losses = {OURS: ours("auto"), REFERENCE: ours("reference")} | theirs
    for passes, results in ((FIRST, ("loss", "gradient")), (SECOND, ("loss", "gradient", "Hessian product"))):
        yield Case(
            kernel,
            passes,
            f"{len(z):,} x {z.shape[1]}",
            z.dtype,
            work(*z.shape, z.element_size(), passes == SECOND),
            results,
            partial(exact, plain, z, passes == SECOND),
            {name: partial(differentiate, loss, z, passes == SECOND) for name, loss in losses.items()},
            {FLOOR: two_products(z)} if passes == FIRST and z.device.type == "cpu" else {},
        )


def differentiate(loss: Loss, z: Tensor, twice: bool) -> Results:
    """(L, g = ∂L/∂z) and, if ``twice``, ∂(‖g‖²/2)/∂z, which is the Hessian times g."""
    z = z.detach().requires_grad_()
    value = loss(z)
    (gradient,) = torch.autograd.grad(value, z, create_graph=twice)
    if not twice:
        return value.detach(), gradient
    (product,) = torch.autograd.grad(gradient.float().square().sum() / 2, z)
    return value.detach(), gradient.detach(), product


def cross_entropy(z: Tensor, start: int = 0, stop: int | None = None, *, temperature: float) -> Tensor:
    """NT-Xent of the rows from ``start`` to ``stop``, summed, as the cross-entropy of their similarities to all.

    The way most code has it.
    """
    logits, own, _ = _similarities(z, start, stop, temperature)
    return F.cross_entropy(logits, (own + len(z) // 2) % len(z), reduction="sum")


def mean_over_positives(
    z: Tensor, start: int = 0, stop: int | None = None, *, temperature: float, labels: Tensor
) -> Tensor:
    """SupCon of the rows from ``start`` to ``stop``, summed, by a mask of the positives, as SupContrast has it."""
    logits, own, is_self = _similarities(z, start, stop, temperature)
    positive = (labels[own][:, None] == labels) & ~is_self
    attraction = torch.where(positive, logits.log_softmax(1), 0).sum(1)
    return -(attraction / positive.sum(1).clamp(min=1)).sum()


def _similarities(z: Tensor, start: int, stop: int | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines over τ of some rows and all, −∞ with themselves; which rows; where they meet themselves."""
    z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))
    index = torch.arange(len(z), device=z.device)
    own = index[start:stop]
    is_self = own[:, None] == index
    return (z[start:stop] @ z.T / temperature).masked_fill(is_self, -torch.inf), own, is_self


def exact(plain: Callable[..., Tensor], z: Tensor, twice: bool) -> Results:
    """What :func:`differentiate` of ``plain`` is in float64, by a block of rows at a time."""
    z = z.detach().double().requires_grad_()
    blocks = [(start, start + TRUTH_ROWS) for start in range(0, len(z), TRUTH_ROWS)]
    loss, gradient, product = z.new_zeros(()), torch.zeros_like(z), torch.zeros_like(z)
    for block in blocks:
        value = plain(z, *block)
        loss += value.detach()
        gradient += torch.autograd.grad(value, z)[0]
    for block in blocks if twice else ():
        (part,) = torch.autograd.grad(plain(z, *block), z, create_graph=True)
        product += torch.autograd.grad(part, z, gradient)[0]
    return (loss, gradient, product) if twice else (loss, gradient)


def work(rows: int, dim: int, element: int, twice: bool) -> Work:
    """Products of [M, M] with [M, d] and of [M, d] with [d, M], 2 M² d each; z in, loss and derivatives out.

    Where rows and columns are the same z, the gradient G of the similarities S reaches z through G + Gᵀ. So the forward
    is one product, S = z zᵀ, the backward one, (G + Gᵀ) z, and the second derivative along u three more: u zᵀ,
    (G + Gᵀ) u and (G' + G'ᵀ) z.
    """
    return Work((5 if twice else 2) * 2 * rows**2 * dim, (3 if twice else 2) * rows * dim * element)


def two_products(z: Tensor) -> Callable[[], Tensor]:
    """exp(z zᵀ) z by 256 rows at a time: what a forward and a backward cannot do without."""
    z = F.normalize(z.float()).to(z.dtype)
    weights, result = z.new_empty(256, len(z)), torch.empty_like(z)

    def run() -> Tensor:
        for start in range(0, len(z), 256):
            rows = z[start : start + 256]
            block = torch.mm(rows, z.T, out=weights[: len(rows)]).exp_()
            torch.mm(block, z, out=result[start : start + 256])
        return result

    return run


def in_low_precision(loss: Loss, dtype: torch.dtype) -> Loss:
    """The loss under autocast where ``dtype`` is a low precision."""

    def run(z: Tensor) -> Tensor:
        with nullcontext() if dtype == torch.float32 else torch.autocast(z.device.type, dtype):
            return loss(z)

    return run


def nt_xent_peers(temperature: float, images: int, device: torch.device) -> dict[str, Loss]:
    """Other libraries' NT-Xent, of those that are installed and import."""
    index = torch.arange(images, device=device)
    found = sup_con_peers(temperature, index)  # NTXentLoss there holds every positive against every negative *pair*
    index = index.repeat(2)
    try:
        from lightly.loss import NTXentLoss as Lightly

        found["lightly"] = lambda z: Lightly(temperature)(*z.chunk(2)) * len(z)
    except (ImportError, RuntimeError):  # the latter from torchvision, beside a torch that it was not built for
        pass
    try:
        from solo.losses.simclr import simclr_loss_func

        by_index = "indexes" in inspect.signature(simclr_loss_func).parameters  # the repository's; PyPI's is older
        found["solo-learn"] = lambda z: (
            simclr_loss_func(*((z, index) if by_index else z.chunk(2)), temperature) * len(z)
        )
    except (ImportError, RuntimeError):
        pass
    return found


def sup_con_peers(temperature: float, labels: Tensor) -> dict[str, Loss]:
    """Other libraries' SupCon, of those that are installed and import; NT-Xent where each image is its own class."""
    try:
        from pytorch_metric_learning.losses import SupConLoss
    except ImportError:
        return {}
    both = labels.repeat(2)
    return {"pytorch-metric-learning's SupConLoss": lambda z: SupConLoss(temperature)(z, both) * len(z)}
