"""A VAE that the library does not know, taught to it: ``python examples/own_decoder.py``."""

import torch
from torch import nn
from torch.nn import functional as F

import chopgrad
from chopgrad import CausalDecoder, FrameGroup
from chopgrad.testing import check_decoder


class MyVAE(nn.Module):
    """Somebody's VAE: its decode runs two causal convolutions over all frames at once."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.ModuleList([nn.Conv3d(4, 16, 3, padding=(0, 1, 1)), nn.Conv3d(16, 3, 3, padding=(0, 1, 1))])

    def decode(self, z, return_dict=True):
        for convolution in self.decoder:
            z = convolution(F.pad(z, (0, 0, 0, 0, 2, 0))).tanh()
        return (z,)


class MyDecoder(CausalDecoder):
    """The same frame by frame: the state holds the two frames that each convolution saw before."""

    latent_channels = 4

    def frame_groups(self, latent_frames):
        return [FrameGroup(slice(i, i + 1), slice(i, i + 1)) for i in range(latent_frames)]

    def initial_state(self):
        return None, None  # one slice for each piece

    def blocks(self):
        def piece(convolution):
            def run(features, before):
                seen = F.pad(features[0], (0, 0, 0, 0, 2, 0)) if before is None else torch.cat([before, features[0]], 2)
                return (convolution(seen).tanh(),), seen[:, :, -2:]

            return run

        return [[[piece(convolution)]] for convolution in self.vae.decoder]

    def denormalize(self, latents):
        return latents

    normalize = denormalize


chopgrad.register_decoder("MyVAE", MyDecoder)
vae = MyVAE().double()
print("holds:", ", ".join(check_decoder(chopgrad.decoder_for(vae))))

with chopgrad.patch(vae.requires_grad_(False)):
    latents = torch.randn(1, 4, 40, 8, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(vae.decode(latents, return_dict=False)[0].mean(), latents)
print("latents without a gradient:", (gradient.flatten(3).norm(dim=3) == 0).sum().item())
