"""Which gradients a backward pass asks a ``torch.autograd.Function`` for."""

from __future__ import annotations

import torch


def wanted_gradients(ctx: torch.autograd.function.FunctionCtx) -> tuple[bool, ...]:
    """``ctx.needs_input_grad`` of the backward pass under way; to be called in ``Function.backward``.

    ``ctx.needs_input_grad`` says which inputs require gradients, whatever is asked for: in
    ``torch.autograd.grad(loss, images)`` it is true of every weight, and a Function that goes by it computes weight
    gradients that are thrown away. Here an input counts only if the engine will go on from it, as PyTorch's own
    operations have it. Works on the engine's device threads too, and under ``create_graph``.
    """
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])  # one for each input that needs it
    return tuple(needed and _will_run(next(nodes)) for needed in ctx.needs_input_grad)


def _will_run(node: torch.autograd.graph.Node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        if "leaf node" not in str(error):
            raise
        return True  # torch refuses to answer for a leaf that autograd.grad was asked for


__all__ = ["wanted_gradients"]
