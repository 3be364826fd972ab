"""Every pairwise gradient dL_i/dz_j and dL_i/dtheta_j of the full graph, and the mask that defines a strategy.

The reference knows nothing of the engine: one graph over the whole video, and one copy of the model per group so that
the use of a parameter in group j can be told from its use in group k.
"""

from __future__ import annotations

import torch

import chopgrad
from tests.models import twin


class Pairwise:
    def __init__(self, vae, latents, target, loss_fn, context_frames=0, clamp=True):
        self.groups, self.latents = chopgrad.decoder_for(vae).frame_groups(latents.shape[2]), latents.detach()
        self.copies = [twin(vae) for _ in self.groups]
        decoders = [chopgrad.decoder_for(v, clamp=clamp, check=False) for v in self.copies]
        zs = [latents[:, :, g.latents].clone().requires_grad_() for g in self.groups]
        frames, state = [], decoders[0].initial_state()
        for decoder, z in zip(decoders, zs):
            x, state = decoder.step(z, state)
            frames.append(x)
        video = torch.cat(frames, dim=2)
        total = video.shape[2]
        count = len(self.groups)
        thetas = [[p for p in d.parameters() if p.requires_grad] for d in decoders]
        self.names = len(thetas[0])
        self.loss = 0.0
        self.dz = [[None] * count for _ in range(count)]
        self.dtheta = [[None] * count for _ in range(count)]
        for i, (g, x) in enumerate(zip(self.groups, frames)):
            args = (x, target[:, :, g.frames])
            if context_frames:
                before = slice(max(0, g.frames.start - context_frames), g.frames.start)
                args += ((video[:, :, before], target[:, :, before]) if i else None,)
            loss = loss_fn(*args) * g.frame_count / total
            self.loss = self.loss + loss.detach()
            sources = [x for j in range(i + 1) for x in (zs[j], *thetas[j])]
            grads = torch.autograd.grad(loss, sources, retain_graph=True, allow_unused=True)
            grads = [torch.zeros_like(x) if d is None else d for d, x in zip(grads, sources)]
            for j in range(i + 1):
                self.dz[i][j], *self.dtheta[i][j] = grads[j * (1 + self.names) : (j + 1) * (1 + self.names)]

    def expected(self, strategy):
        """Gradients of latents and parameters under the semantics: i reaches j iff j <= i <= end of j's block + D."""
        count = len(self.groups)
        block = getattr(strategy, "block", count)
        distance = getattr(strategy, "distance", 0)
        latents = torch.zeros_like(self.latents)
        parameters = [0.0] * self.names
        for j in range(count):
            last = (j // block + 1) * block - 1 + distance
            kept = [i for i in range(j, count) if i <= last]
            latents[:, :, self.groups[j].latents] += sum(self.dz[i][j] for i in kept)  # groups may overlap
            for k in range(self.names):
                parameters[k] = parameters[k] + sum(self.dtheta[i][j][k] for i in kept)
        return latents, parameters


class PairwiseAdjoint(torch.autograd.Function):
    """A decode whose backward keeps, for every group j, the adjoints of the groups i that reach it under the semantics.

    ``PairwiseAdjoint.of(vae, latents, strategy)`` -> frames, to be used like those of ``vae.decode``: whatever dL/dx_i
    the loss has, latents and parameters of group j get the sum of J_{j,i}^T dL/dx_i over the kept i. As in
    ``Pairwise`` one graph over the whole video, one copy of the model per group, and nothing of the engine.
    """

    @classmethod
    def of(cls, vae, latents, strategy, clamp=True, groups=None, history=True):
        parameters = [p for p in chopgrad.decoder_for(vae, check=False).parameters() if p.requires_grad]
        return cls.apply(vae, strategy, clamp, groups, history, latents, *parameters)

    @staticmethod
    def forward(ctx, vae, strategy, clamp, groups, history, latents, *parameters):
        spans = chopgrad.decoder_for(vae, check=False).frame_groups(latents.shape[2])
        chosen = range(len(spans))[groups or slice(None)]
        decoders = [chopgrad.decoder_for(twin(vae), clamp=clamp, check=False) for _ in range(chosen.stop)]
        ctx.zs = [latents[:, :, span.latents].detach().requires_grad_() for span in spans[: chosen.stop]]
        ctx.thetas = [[p for p in decoder.parameters() if p.requires_grad] for decoder in decoders]
        ctx.frames, state = [], decoders[0].initial_state()
        with torch.enable_grad():
            for decoder, z in zip(decoders, ctx.zs):
                x, state = decoder.step(z, state)
                ctx.frames.append(x)
        ctx.strategy, ctx.chosen, ctx.first = strategy, chosen, 0 if history else chosen.start
        ctx.shape = latents.shape
        return torch.cat([ctx.frames[i].detach() for i in chosen], dim=2)

    @staticmethod
    def backward(ctx, adjoint):
        counts = [ctx.frames[i].shape[2] for i in ctx.chosen]
        adjoints = dict(zip(ctx.chosen, adjoint.split(counts, dim=2)))
        start, block = ctx.chosen.start, getattr(ctx.strategy, "block", None)
        of_latents, of_parameters = [], [None] * len(ctx.thetas[0])
        for j, (z, theta) in enumerate(zip(ctx.zs, ctx.thetas)):
            # Blocks begin at the first group whose frames were asked for, and so before it end there.
            end = start + ((j - start) // block + 1) * block if block else ctx.chosen.stop
            last = end - 1 + getattr(ctx.strategy, "distance", 0)
            kept = [i for i in ctx.chosen if j <= i <= last] if j >= ctx.first else []
            found = [None] * (1 + len(theta))
            if kept:
                found = torch.autograd.grad(
                    [ctx.frames[i] for i in kept],
                    [z, *theta],
                    [adjoints[i] for i in kept],
                    retain_graph=True,
                    allow_unused=True,
                )
            of_latents.append(torch.zeros_like(z) if found[0] is None else found[0])
            for k, x in enumerate(found[1:]):
                if x is not None:
                    of_parameters[k] = x if of_parameters[k] is None else of_parameters[k] + x
        missing = ctx.shape[2] - sum(z.shape[2] for z in ctx.zs)
        of_latents = torch.nn.functional.pad(torch.cat(of_latents, dim=2), (0, 0, 0, 0, 0, missing))
        return None, None, None, None, None, of_latents, *of_parameters


def relative_error(got, expected):
    scale = expected.norm()
    return ((got - expected).norm() / scale if scale > 0 else got.norm()).item()
