"""Auto-PGD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fasttrain.attacks.evaluation import Attack, PerImageLoss, loss_and_gradient, loss_only
from fasttrain.attacks.noise import restarted
from fasttrain.attacks.search import Cases, Found, Search, Standing, Victim
from fasttrain.attacks.threat import Threat
from fasttrain.errors import UsageError
from fasttrain_kernels.apgd import State, apgd_step, initial_state

CaseLoss = Callable[[Tensor, Cases], Tensor]
"(Logits [B, C], what they are of) -> the loss of each image [B], to be raised."


def apgd(threat: Threat, steps: int, *, restarts: int = 1) -> Attack:
    """PGD with momentum whose step size, 2 eps at first, is halved per image where it no longer pays.

    Croce & Hein 2020, as their code has it (its differences from the paper, and each pass, are in
    ``kernels/fasttrain_kernels/apgd/README.md``): random start, momentum 0.75; at each of a few checkpoints an image
    whose loss rose in at most 3/4 of the steps since the last one, or whose best loss stands still, goes on from its
    best iterate with half the step. Returned is each image's iterate of the highest loss, over all restarts; the
    published evaluation rather returns any that is misclassified, which for cross-entropy is not always the same.

    Costs, a restart, ``steps`` forwards with input gradients and one forward: the published code's last gradient is
    never used.

    Raises:
        UsageError: steps or restarts below 1.
    """
    if steps < 1 or restarts < 1:
        raise UsageError(f"APGD with steps={steps}, restarts={restarts}: give at least 1 of each")
    windows = checkpoint_windows(steps)

    def run(loss_of_images: PerImageLoss, images: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        state = initial_state(start, 2 * threat.eps)
        for iteration, window in enumerate(windows):
            loss, gradient = loss_and_gradient(loss_of_images, state.x)
            state = apgd_step(
                state, loss, gradient, images, threat.eps, threat.norm, first=iteration == 0, window=window
            )
        return _higher(loss_only(loss_of_images, state.x), state.x, state.best_loss, state.best)

    def attack(loss_of_images: PerImageLoss, images: Tensor, keys: Tensor | None = None) -> Tensor:
        images = images.detach()
        keys = torch.arange(len(images), device=images.device) if keys is None else keys
        highest, best = run(loss_of_images, images, threat.start(images, keys))
        for restart in range(1, restarts):
            start = threat.start(images, restarted(keys, restart))
            highest, best = _higher(*run(loss_of_images, images, start), highest, best)
        return best

    return attack


def apgd_search(threat: Threat, steps: int, loss: CaseLoss) -> Search:
    """:func:`apgd` on ``loss`` of the logits, done with an image as soon as an iterate of it is misclassified.

    So does the published evaluation end (Croce & Hein 2020): robust is what none of the steps + 1 iterates fools, the
    start among them. An image that fell costs nothing from then on.
    """
    windows = checkpoint_windows(steps)

    def search(victim: Victim, cases: Cases) -> Found:
        standing = Standing(victim, cases)
        state = initial_state(threat.start(cases.images, cases.keys), 2 * threat.eps)
        scores: list[Tensor] = []

        def loss_of_images(x: Tensor) -> Tensor:
            scores.append(victim.logits(x))
            return loss(scores[0], standing.cases)

        for iteration, window in enumerate(windows):
            value, gradient = loss_and_gradient(loss_of_images, state.x)
            standing.note(gradient)
            if standing.strike(state.x, scores.pop().detach()):
                return standing.found
            value, gradient, *kept = standing.shrink(value, gradient, *state)
            images = standing.cases.images
            state = apgd_step(
                State(*kept), value, gradient, images, threat.eps, threat.norm, first=not iteration, window=window
            )
        with torch.no_grad():
            standing.strike(state.x, victim.logits(state.x))
        return standing.found

    return search


def checkpoint_windows(steps: int) -> list[int]:
    """For each iterate evaluated before a move, the length of the window that ends there, 0 where none does.

    Windows are max(⌊0.22 n⌋, 1) iterates, then each shorter by max(⌊0.03 n⌋, 1) down to max(⌊0.06 n⌋, 1); the start
    belongs to none.
    """
    window, decrease, shortest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    windows, position = [0] * steps, window
    while position < steps:
        windows[position] = window
        window = max(window - decrease, shortest)
        position += window
    return windows


def _higher(loss: Tensor, x: Tensor, highest: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Image by image the pair of the higher loss; the second where they are equal."""
    better = loss > highest
    return torch.where(better, loss, highest), torch.where(better[:, None, None, None], x, best)
