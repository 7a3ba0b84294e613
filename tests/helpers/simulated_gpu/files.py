"""Files of tensors on a simulated GPU, which say on which GPU a tensor was."""

import torch
from torch import Tensor

from helpers.simulated_gpu import counts

_on_gpu: dict[int, tuple[str, Tensor]] = {}  # storages that are saved; kept, or they might recur


class LoadedToGPU(BaseException):
    """The program loads a file without `map_location`, so its tensors go to the GPU named in it.

    It is no Exception, for which the program would look in the file.
    """


def tagged(numbers: Tensor, device: torch.device) -> Tensor:
    """Lets files say that this tensor is on a GPU; returns it."""
    _on_gpu[numbers.untyped_storage()._cdata] = (str(device), numbers)
    return numbers


def register() -> None:
    """Tells torch.save and torch.load of these GPUs."""
    load, asked = torch.load, []

    def watched_load(*args, map_location=None, **kwargs):
        asked.append(map_location is not None)
        try:
            return load(*args, map_location=map_location, **kwargs)
        finally:
            asked.pop()

    def tag(storage) -> str | None:
        return _on_gpu.get(storage._cdata, (None,))[0]

    def restore(storage, location: str):
        """Leaves the tensors of a test's own files on the CPU."""
        if not location.startswith("cuda"):
            return None
        file, function = counts.place()
        if not file.startswith("tests") and not (asked and asked[-1]):
            raise LoadedToGPU(f"{function} in {file} loads a tensor to {location}")
        return storage

    torch.load = watched_load
    torch.serialization.register_package(1, tag, restore)
