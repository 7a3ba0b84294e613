"""Batch algebra: only the global batch is configured, everything else follows from it."""

from dataclasses import dataclass

from diffusion_lab.common.messages import UserError


@dataclass(frozen=True)
class BatchLayout:
    """The layout of a batch: batch_size = micro_batch x accumulate x world, in images."""

    batch_size: int
    micro_batch: int
    accumulate: int
    world: int

    def __str__(self) -> str:
        ranks = f"{self.world} rank{'s' if self.world > 1 else ''}"
        return (
            f"global batch {self.batch_size} = micro-batch {self.micro_batch} "
            f"x {self.accumulate} accumulated x {ranks}"
        )


def solve_batch(batch_size: int, world: int, micro_batch_size: int | None) -> BatchLayout:
    """The layout of a global batch over `world` ranks, each taking `micro_batch_size` at a time.

    If micro_batch_size is None, a rank takes its whole share at once. Raises UserError if the sizes
    do not divide, since a silently rounded batch would be another experiment.
    """
    share, rest = divmod(batch_size, world)
    if rest or share < 1:
        low = world * max(1, share)
        raise UserError(
            f"batch_size={batch_size} cannot be divided evenly among {world} ranks; "
            f"write batch_size={low} or batch_size={low + world}"
        )
    micro = share if micro_batch_size is None else micro_batch_size
    if micro < 1 or share % micro:
        fitting = [n for n in range(1, share + 1) if share % n == 0 and n <= max(micro, 1)]
        raise UserError(
            f"micro_batch_size={micro} does not divide the {share} images of the global batch on "
            f"each rank; write micro_batch_size={fitting[-1]}"
        )
    return BatchLayout(batch_size, micro, share // micro, world)
