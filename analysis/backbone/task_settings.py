"""Every setting of the restoration task, as a command line has it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from bench.tasks.task import SMALLEST


@dataclass(frozen=True)
class TaskSettings:
    """The task and its backbone. ``--vae``, ``--subfolder``, ``--device`` and ``--dtype`` go without the prefix too."""

    vae: Annotated[str, arg(aliases=("--vae",))] = "wan2.1"
    """wan2.1 or cogvideox (the embedded decoders), a folder written by save_pretrained, or a hub id."""
    subfolder: Annotated[str | None, arg(aliases=("--subfolder",))] = None
    """Folder of the VAE inside a pipeline, usually 'vae'."""
    device: Annotated[str, arg(aliases=("--device",))] = "cpu"
    dtype: Annotated[Literal["float32", "bfloat16"], arg(aliases=("--dtype",))] = "float32"
    """Of the VAE's weights and activations; losses, what trains, and its gradients stay in float32."""
    frames: int = 33
    """Frames of a clip."""
    size: int = 32
    """Height and width of a clip in pixels."""
    blur: float = 1.5
    """Degradation: standard deviation of the blur in pixels."""
    shrink: int = 4
    """Degradation: factor of the shrinking."""
    noise: float = 0.3
    """Degradation: standard deviation of the noise; pixels lie in [-1, 1]."""
    width: int = 64
    """Inner width of the backbone, a multiple of 32."""
    layers: int = 2
    """Blocks of the backbone."""
    warm_up_steps: int = 300
    """Adam steps on the loss in latent space; they make the backbone that all measurements start from."""
    warm_up_clips: int = 48
    """Clips of the warm-up."""
    warm_up_rate: float = 1e-3
    """Its learning rate."""

    def check(self) -> None:
        """Raises ValueError with one sentence where a setting is out of range."""
        if self.frames < 1 or self.size < SMALLEST or self.shrink < 1 or min(self.blur, self.noise) < 0:
            raise ValueError(
                f"A task needs frames and shrink of at least 1, a size of at least {SMALLEST}, and blur and noise of "
                "at least 0; got "
                f"frames {self.frames}, size {self.size}, shrink {self.shrink}, blur {self.blur}, noise {self.noise}."
            )
        if self.width < 32 or self.width % 32 or self.layers < 1:
            raise ValueError(
                f"The backbone's width must be a multiple of 32 and layers at least 1, got {self.width} and "
                f"{self.layers}."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype}.")

    def described(self) -> dict[str, Any]:
        """As JSON values for a record; of an absolute path only the last part.

        Where the VAE lay and on which device it ran is left out: the hash of the inputs and the provenance say it.
        """
        values = asdict(self) | {"vae": Path(self.vae).name if Path(self.vae).is_absolute() else self.vae}
        return {k: v for k, v in values.items() if k not in ("subfolder", "device")}
