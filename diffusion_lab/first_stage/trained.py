"""First stages trained by `diffusion-lab train-autoencoder`."""

from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.images import require_finite, to_uint8
from diffusion_lab.common.messages import say
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.data import EncodedImages, ImageData
from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.first_stage.base import Latents, Shape


class TrainedAutoencoder(Latents):
    """The autoencoder of the run folder `run`, scaled by the latents of its training images.

    A diffusion run saves the file and its `sha256`. Raises ValueError for a file that is missing,
    of another kind or image shape, or not the one that a run was trained with.
    """

    kinds: tuple[str, ...]  # accepted kinds of autoencoders

    def __init__(
        self, image_shape: Shape, run: str, sha256: str | None, cache: bool, cache_dir: str
    ):
        self.path = Path(run) / saving.FIRST_STAGE_FILE
        network, self.trained, self.content = saving.load_autoencoder(self.path)
        self.sha256 = hashing.of_bytes(self.content)
        if self.trained.kind not in self.kinds:
            raise ValueError(
                f"run={run} is a {self.trained.kind} autoencoder, but this first stage takes "
                f"{' or '.join(self.kinds)}; choose the first stage for its kind"
            )
        if sha256 is not None and sha256 != self.sha256:
            raise ValueError(
                f"{self.path} is not the first stage that this run was trained with: its sha256 "
                f"begins with {self.sha256[:12]}, not with {sha256[:12]}; restore the file"
            )
        if tuple(image_shape) != tuple(self.trained.image_shape):
            raise ValueError(
                f"{self.path} was trained on images of shape {tuple(self.trained.image_shape)}, "
                f"but these have {tuple(image_shape)}; train a first stage on these data"
            )
        super().__init__(image_shape, network.latent_shape, network, cache, cache_dir)
        self.shift, self.scale = (
            torch.tensor(numbers, dtype=torch.float32)[:, None, None]
            for numbers in (self.trained.latent_mean, self.trained.latent_std)
        )
        if not (self.scale > 0).all():
            raise ValueError(
                f"{self.path} has a channel that is the same for all images; train it longer, or "
                "with fewer latent channels"
            )

    def prepare(self, data: ImageData, device: torch.device) -> EncodedImages | None:
        data.images_fingerprint = on_rank_zero(lambda: data.images_fingerprint)
        if data.images_fingerprint != self.trained.data:
            say(
                f"Advice: {self.path} was trained on other images of this shape: its latents may "
                "have a different scale here, and its rFID does not apply to these images"
            )
        return super().prepare(data, device)

    def facts(self) -> dict[str, object]:
        return {"sha256": self.sha256}

    def reconstruction_metrics(self, data: ImageData) -> dict[str, float]:
        return self.trained.metrics if self.trained.data == data.images_fingerprint else {}

    def copy_into(self, folder: Path) -> None:
        write_atomically(folder / saving.FIRST_STAGE_FILE, self.content)


class TrainedKL(TrainedAutoencoder):
    """Latents of `train-autoencoder autoencoder=kl` or `vae`, drawn from the posterior."""

    kinds = ("kl",)


class TrainedVQ(TrainedAutoencoder):
    """Latents of `train-autoencoder autoencoder=vq` or `fsq`, before they are quantised.

    Its codes, (B, h, w) whole numbers below `num_codes`, are for models of sequences.
    """

    kinds = ("vq", "fsq")

    @property
    def num_codes(self) -> int:
        """The number of values that a code has."""
        return self.network.codes

    @torch.no_grad()
    def codes(self, moments: Tensor) -> Tensor:
        """Moments (B, c, h, w) -> codes (B, h, w) int64."""
        self.network.to(moments.device)
        return self.network.assign(self.mean(moments))[1].long()

    @torch.no_grad()
    def from_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) int64 -> images uint8 (B, C, H, W), in the caller's precision."""
        self.network.to(codes.device)
        return to_uint8(require_finite(self.network.decode_quantised(self.network.vectors(codes))))
