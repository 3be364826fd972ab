"""A decoder whose influence is known in closed form: x_i = A s_i, s_i = rho s_{i-1} + z_i."""

import torch
from torch import nn

from chopgrad import CausalDecoder, FrameGroup


class LinearDecoder(CausalDecoder):
    """One frame per latent; dx_i/dz_j = rho^(i-j) A. Two pieces: the recurrence, and the mixing of its channels."""

    def __init__(self, rho, channels=4, seed=0):
        vae = nn.Module()
        generator = torch.Generator().manual_seed(seed)
        vae.mixing = nn.Parameter(torch.randn(3, channels, generator=generator, dtype=torch.float64), False)
        super().__init__(vae)
        self.rho, self.channels = rho, channels

    @property
    def latent_channels(self):
        return self.channels

    def frame_groups(self, latent_frames):
        return [FrameGroup(slice(i, i + 1), slice(i, i + 1)) for i in range(latent_frames)]

    def blocks(self):
        def recurrence(features, state):
            state = features[0] if state is None else self.rho * state + features[0]
            return (state,), state

        def mixing(features, state):
            return (torch.einsum("kc,bcthw->bkthw", self.vae.mixing, features[0]),), state

        return [[[recurrence], [mixing]]]

    def initial_state(self):
        return None, None

    def parameters(self):
        yield self.vae.mixing

    def denormalize(self, latents):
        return latents

    normalize = denormalize
