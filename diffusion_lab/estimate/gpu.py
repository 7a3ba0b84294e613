"""A kind of GPU, as its maker describes it: the peaks of a roofline.

A roofline (doi:10.1145/1498765.1498785) takes max(FLOPs / peak, bytes / bandwidth) for the time.
"""

from diffusion_lab.common.ranges import Positive, settings

# shares of the peak of tensor cores that published runs reached, by what most products of a network
# are: ADM's U-Net 0.15 (EDM's README), DiT-XL/2 0.33 (fast-DiT's README); a state space is as far
# behind a transformer as in training VMamba (its issue 234)
UTILISATION = {"convolutions": 0.15, "matrix products": 0.33, "state spaces": 0.2}
PLAIN = 0.65  # the same without tensor cores, in float32: DiT-XL/2 (facebookresearch/DiT, issue 22)
CONTEXT = 0.6e9  # bytes that CUDA and its libraries hold in each process


@settings
class GPU:
    """The peaks of a GPU and of the links to others.

    The peaks are FLOP/s of dense matrix products, by the type of the numbers; `memory` is in bytes,
    `bandwidth` the memory's in bytes/s. `link` goes to the GPUs of the same node and `network`, a
    GPU's share of its node's, to other nodes, both in bytes/s and one direction.
    """

    name: str
    bf16_flops: Positive
    float32_flops: Positive
    tf32_flops: Positive
    memory: Positive
    bandwidth: Positive
    link: Positive
    network: Positive

    def speed(self, precision: str, tf32: bool, mfu: float, plain: float) -> float:
        """The FLOP/s of products in one of Lightning's precisions; fp16 is as fast as bf16.

        Tensor cores reach `mfu` of their peak, other units `plain`. Products in float32 are those
        of tensor cores if TF32 is allowed and faster.
        """
        if precision != "32-true":
            return mfu * self.bf16_flops
        without = plain * self.float32_flops
        return max(without, mfu * self.tf32_flops) if tf32 else without

    def bus(self, devices: int, nodes: int) -> float:
        """The bytes/s of a ring over all GPUs; each of a node's has its own way to other nodes."""
        return self.link if nodes == 1 else min(self.link, devices * self.network)
