"""Optimisers of the training run: AdamW, or Muon for the kernels and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def as_matrix(kernel: Tensor, like: Tensor) -> Tensor:
    """[out, in, ...] as [out, in * ...], each row in the memory order of ``like``, of which it is a view therefore."""
    strides = like.stride()
    return kernel.permute(0, *sorted(range(1, kernel.ndim), key=lambda d: -strides[d])).flatten(1)


class ConvolutionMuon(torch.optim.Muon):
    """``torch.optim.Muon`` of convolution kernels: each is a matrix of one row per output channel.

    The steps are scaled to the root mean square of AdamW's, so that one learning rate serves both (Liu et al.,
    arXiv 2502.16982). Costs five products of each matrix with its Gram matrix a step, and one buffer a kernel.
    """

    def __init__(self, kernels: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.kernels = kernels
        matrices = [nn.Parameter(as_matrix(kernel.detach(), kernel)) for kernel in kernels]
        if any(m.data_ptr() != k.data_ptr() for m, k in zip(matrices, kernels, strict=True)):
            raise ValueError("A kernel of the model is not dense in memory, so that it cannot be seen as a matrix.")
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        matrices = self.param_groups[0]["params"]
        for kernel, matrix in zip(self.kernels, matrices, strict=True):
            matrix.grad = None if kernel.grad is None else as_matrix(kernel.grad, kernel)
        return super().step(closure)


def is_kernel(parameter: nn.Parameter) -> bool:
    """Whether it is a matrix or a convolution kernel, and not a bias or a scale per channel."""
    return parameter.ndim > 1 and min(parameter.shape[0], parameter[0].numel()) > 1


def optimizers(model: nn.Module, name: str, lr: float, weight_decay: float = 0.01) -> list[torch.optim.Optimizer]:
    """What to step, all of them together; move and lay out the model before."""
    parameters = list(model.parameters())
    kernels = [p for p in parameters if is_kernel(p)] if name == "muon" else []
    chosen = {id(p) for p in kernels}
    rest = [p for p in parameters if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    return [adamw, ConvolutionMuon(kernels, lr, weight_decay)] if kernels else [adamw]
