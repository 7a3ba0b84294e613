"""Draws images code by code, from seeds and labels to uint8 images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.common.images import require_finite
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.families.autoregressive.sampling import CodeSampler, LogitGuidance
from diffusion_lab.families.autoregressive.transformer import CodeTransformer
from diffusion_lab.first_stage import TrainedVQ
from diffusion_lab.pipeline import LabelledGenerator


@dataclass(frozen=True)
class CodePipeline(LabelledGenerator):
    """A model of codes, the way to draw from it, and the first stage that decodes them.

    Sample i is fixed by `seed` and i alone, up to the network's rounding.
    """

    model: CodeTransformer
    sampler: CodeSampler
    guidance: LogitGuidance
    first_stage: TrainedVQ
    kind: Labels

    @property
    def conditioning(self) -> Any:
        return self.model.conditioning

    @property
    def steps(self) -> int:
        return self.model.tokens

    def drawn(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        codes = self.codes(ids, seed, labels, on_step)
        return self.first_stage.from_codes(codes.unflatten(1, self.first_stage.latent_shape[1:]))

    def codes(
        self,
        ids: Sequence[int],
        seed: int,
        labels: Tensor | None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Draws the codes of samples `ids`, (B, N) int64."""
        model = self.model
        device = model.start.device
        labels = None if labels is None else labels.to(device)
        guided = self.guidance.scale != 1
        if guided and labels is not None:
            labels = torch.cat([labels, model.conditioning.labels.null(len(labels), device)])
        # normal numbers, each a uniform one by its distribution function
        uniform = torch.special.ndtr(SampleNoise(seed, ids)((model.tokens,)).double())
        codes = torch.empty(len(ids), 0, dtype=torch.int64, device=device)
        # the cache grows from call to call, and a compiled block would be compiled for each
        with torch.compiler.set_stance("force_eager"), model.remembering():
            for place in range(model.tokens):
                known = codes[:, -1:].repeat(2, 1) if guided else codes[:, -1:]
                logits = model(known, labels, begun=place)[:, -1]
                if guided:
                    logits = self.guidance(*logits.chunk(2))
                # on the CPU, as a GPU's sums along an axis depend on its kind
                drawn = self.sampler(require_finite(logits).cpu(), uniform[:, place]).to(device)
                codes = torch.cat([codes, drawn[:, None]], dim=1)
                on_step()
        return codes
