"""What a transformer block is: tokens and a condition -> tokens, whatever mixes and conditions."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from diffusion_lab.conditioning import Condition


class Block(ABC, nn.Module):
    """One layer of a token network.

    A block is configured as a factory: the network calls it with the facts `width` and `mixer`, a
    constructor of the module that mixes tokens, (B, N, D) -> (B, N, D).
    """

    @abstractmethod
    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """x (B, N, D) -> (B, N, D); the network has added its noise embedding to the condition."""

    def initialise(self) -> None:
        """The block's exceptions to the network's initialisation, called after it."""
