"""Replaces what would ask a GPU's driver, or would look into a GPU's memory."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch._dynamo  # before its rules find one function under several names
import torch.distributed as dist
from torch import Tensor, nn

from helpers.simulated_gpu import counts, files, tensors

GIB = 2**30
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 (simulated)",
    major=9,
    minor=0,
    total_memory=80 * GIB,
    multi_processor_count=132,
    gcnArchName="",
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_multiprocessor=233472,
    uuid="0",
)


class Stream:
    """A stream or an event: all that was sent is done."""

    cuda_stream = 0

    def __init__(self, *_, **__): ...

    def record(self, *_) -> None: ...

    def wait(self, *_) -> None: ...

    def wait_stream(self, *_) -> None: ...

    def wait_event(self, *_) -> None: ...

    def record_event(self, *_) -> "Stream":
        return Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _) -> float:
        return 1.0

    def synchronize(self) -> None:
        counts.wait("synchronize")


def replace(devices: int) -> None:
    """Replaces functions of torch that would ask a driver."""
    nothing, always = (lambda *_, **__: None), (lambda *_, **__: True)
    bytes_used = lambda *_: GIB  # noqa: E731
    state = torch.zeros(16, dtype=torch.uint8)
    stream = Stream()
    replaced = {
        **dict.fromkeys(("_lazy_init", "empty_cache", "set_rng_state", "set_stream"), nothing),
        **dict.fromkeys(("set_rng_state_all", "reset_peak_memory_stats"), nothing),
        **dict.fromkeys(("manual_seed", "manual_seed_all", "seed_all"), nothing),
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), always),
        **dict.fromkeys(("max_memory_allocated", "memory_allocated"), bytes_used),
        **dict.fromkeys(("max_memory_reserved", "memory_reserved"), bytes_used),
        **dict.fromkeys(("device_count", "_device_count_nvml"), lambda: devices),
        **dict.fromkeys(("current_stream", "default_stream"), lambda *_: stream),
        **dict.fromkeys(("device", "stream"), lambda *_: nullcontext()),
        **dict.fromkeys(("is_current_stream_capturing", "_is_in_bad_fork"), lambda: False),
        **dict.fromkeys(("Event", "Stream"), Stream),
        "current_device": lambda: tensors.current,
        "set_device": tensors.set_device,
        "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda *_: PROPERTIES.name,
        "get_device_properties": lambda *_: PROPERTIES,
        "mem_get_info": lambda *_: (70 * GIB, 80 * GIB),
        "memory_stats": lambda *_: {},
        "get_rng_state": lambda *_: state,
        "get_rng_state_all": lambda: [state] * devices,
        "synchronize": lambda *_: counts.wait("synchronize"),
        "set_sync_debug_mode": counts.set_debug_mode,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    for name in ("manual_seed_all", "get_rng_state_all"):
        setattr(torch.cuda.random, name, replaced[name])
    torch.cuda.memory.reset_peak_memory_stats = nothing
    torch.backends.cuda.is_built = always
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_synchronize", "_cuda_emptyCache"):
        if not hasattr(torch._C, name):
            setattr(torch._C, name, nothing)
    Tensor.pin_memory = lambda self, *_: self
    Tensor.record_stream = nothing
    replace_constructors()
    replace_data()
    replace_safetensors()
    replace_distributed()
    files.register()


def replace_constructors() -> None:
    """Makes tensors from numbers on the CPU, and copies them: the copy is what can be counted."""
    tensor, as_tensor = torch.tensor, torch.as_tensor

    def made(data, *, device=None, requires_grad=False, **kwargs):
        if device is None or torch.device(device).type != "cuda":
            return tensor(data, device=device, requires_grad=requires_grad, **kwargs)
        return tensor(data, **kwargs).to(device).requires_grad_(requires_grad)

    def made_like(self, data, *, dtype=None, device=None, requires_grad=False):
        place = self.device if device is None else device
        return made(data, dtype=dtype or self.dtype, device=place, requires_grad=requires_grad)

    def taken(data, dtype=None, device=None):
        if device is None or torch.device(device).type != "cuda":
            return as_tensor(data, dtype=dtype, device=device)
        return (data if isinstance(data, Tensor) else tensor(data)).to(device, dtype)

    torch.tensor, torch.as_tensor, Tensor.new_tensor = made, taken, made_like


def replace_data() -> None:
    """Lets `tensor.data = other` move a tensor between devices."""
    data = Tensor.data

    def set_data(self, value):
        if not (tensors.on_gpu(self) or tensors.on_gpu(value)):
            data.__set__(self, value)
            return
        with torch.no_grad():
            new = value.detach()
            if isinstance(self, nn.Parameter):
                new = nn.Parameter(new, self.requires_grad)
            torch.utils.swap_tensors(self, new)

    Tensor.data = property(data.__get__, set_data)
    swap = torch.utils.swap_tensors

    def swapped(first, second):
        try:
            swap(first, second)
        except RuntimeError:  # a graph in a reference cycle holds one, which a GPU does not mind
            gc.collect()
            swap(first, second)

    torch.utils.swap_tensors = swapped


def replace_safetensors() -> None:
    """Gives safetensors, which looks into memory, the numbers."""
    from safetensors import torch as files_of_weights

    def with_numbers(save):
        def saved(named, *args, **kwargs):
            numbers = {key: tensors.plain(value).clone() for key, value in named.items()}
            return save(numbers, *args, **kwargs)

        return saved

    for name in ("save", "save_file"):
        setattr(files_of_weights, name, with_numbers(getattr(files_of_weights, name)))


class WithoutTimes:
    """DDP's logger without the times of kernels, for which there is no timer."""

    def __init__(self, logger):
        self._logger = logger

    def set_runtime_stats_and_log(self) -> None: ...

    def __getattr__(self, name):
        return getattr(self._logger, name)


def replace_distributed() -> None:
    """Takes gloo for nccl, and spares DDP and FSDP what needs a GPU's timers and memory."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    started, DDP = dist.init_process_group, nn.parallel.DistributedDataParallel
    begun = DDP.__init__

    def init_process_group(backend=None, *args, device_id=None, **kwargs):
        return started("gloo" if backend == "nccl" else backend, *args, **kwargs)

    def begin(self, *args, **kwargs):
        begun(self, *args, **kwargs)
        self.logger = WithoutTimes(self.logger)

    dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group
    dist.is_nccl_available = lambda: True
    DDP.__init__ = begin
    _fsdp_param.free_storage = _fsdp_param.alloc_storage = lambda tensor: None
