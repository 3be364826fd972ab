"""Every pairwise gradient dL_i/dz_j and dL_i/dtheta_j of the full graph, and the mask that defines a strategy.

The reference knows nothing of the engine: one graph over the whole video, and one copy of the model per group so that
the use of a parameter in group j can be told from its use in group k.
"""

from __future__ import annotations

import copy

import torch

import chopgrad


class Pairwise:
    def __init__(self, vae, latents, target, loss_fn, context_frames=0, clamp=True):
        self.groups = chopgrad.decoder_for(vae).frame_groups(latents.shape[2])
        self.copies = [copy.deepcopy(vae) for _ in self.groups]
        decoders = [chopgrad.decoder_for(v, clamp=clamp) for v in self.copies]
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
            for j in range(i + 1):
                grads = torch.autograd.grad(loss, [zs[j], *thetas[j]], retain_graph=True, allow_unused=True)
                grads = [torch.zeros_like(p) if d is None else d for d, p in zip(grads, [zs[j], *thetas[j]])]
                self.dz[i][j], self.dtheta[i][j] = grads[0], grads[1:]

    def expected(self, strategy):
        """Gradients of latents and parameters under the semantics: i reaches j iff j <= i <= end of j's block + D."""
        count = len(self.groups)
        block = getattr(strategy, "block", count)
        distance = getattr(strategy, "distance", 0)
        latents = []
        parameters = [0.0] * self.names
        for j in range(count):
            last = (j // block + 1) * block - 1 + distance
            kept = [i for i in range(j, count) if i <= last]
            latents.append(sum(self.dz[i][j] for i in kept))
            for k in range(self.names):
                parameters[k] = parameters[k] + sum(self.dtheta[i][j][k] for i in kept)
        return torch.cat(latents, dim=2), parameters


def relative_error(got, expected):
    scale = expected.norm()
    return ((got - expected).norm() / scale if scale > 0 else got.norm()).item()
