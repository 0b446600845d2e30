"""Megatron on a machine without a GPU: stand-ins for what it asks of CUDA. Call `install` before importing Megatron.

Megatron names its device in hundreds of places ("cuda", `torch.cuda.current_device()`), so whatever of torch makes a
tensor or moves one does so on the CPU, and the few functions of `torch.cuda` that its training loop calls do nothing.
The rest is Megatron's own: parser, training loop, schedules, communication (by gloo), optimizer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
import typing
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any
from unittest import mock

import torch

# Files with Triton kernels that Megatron imports without a guard.
_KERNEL_MODULES = ("megatron.core.transformer.moe.paged_stash", "megatron.core.transformer.moe.ops.paged_stash")
_CPU = torch.device("cpu")
# What makes a tensor on a device. A mode of torch would be asked about everything else, too, which is half of the time
# that a small model takes.
_MAKERS = {
    torch: (
        *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
        *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
        *("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like"),
    ),
    torch.Tensor: ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"),
}


def install() -> None:
    """Put the stand-ins in place, for the rest of the process; `torch.cuda.is_available` goes on saying no."""
    if torch.compile is _as_is:
        return
    if importlib.util.find_spec("triton") is None:
        sys.meta_path.insert(0, _WithoutTriton())
    if not hasattr(typing, "override"):  # Python 3.11 and before
        typing.override = lambda method: method
    # Megatron compiles a dozen small functions; on a CPU that takes a C++ compiler and minutes.
    torch.compile = _as_is
    cuda: Any = torch.cuda
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.Stream = _Stream
    cuda.current_stream = lambda device=None: _Stream()
    cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    # The newest architecture: older ones ask for environment variables.
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(name="none", major=10, minor=0)
    cuda.device_memory_used = lambda device=None: 0
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _new_nothing())  # torch wants each of its functions to be another object
    torch.nn.Module.cuda = lambda module, device=None: module
    _put_tensors_on_cpu()


def let_megatron_start() -> None:
    """Megatron refuses to start without CUDA, and compiles an index builder that its wheel brings along.

    It also takes the help of its flags from its sources, whenever it parses: that is kept.
    """
    import megatron.core.datasets.utils as datasets
    import megatron.core.tensor_parallel as tensor_parallel
    import megatron.training.argument_utils as flags
    import megatron.training.training as training

    datasets.compile_helpers = _new_nothing()
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    flags.ArgumentGroupFactory._get_field_docstrings = _kept(flags.ArgumentGroupFactory._get_field_docstrings)
    if hasattr(training, "FullCudaGraphWrapper"):
        training.FullCudaGraphWrapper.__call__ = _run_or_replay
        seed = tensor_parallel.model_parallel_cuda_manual_seed
        tensor_parallel.model_parallel_cuda_manual_seed = functools.wraps(seed)(functools.partial(_seeded, seed))


def _kept(find: Callable[[Any, type], dict[str, str]]) -> Callable[[Any, type], dict[str, str]]:
    known: dict[type, dict[str, str]] = {}

    def found(self: Any, of: type) -> dict[str, str]:
        if of not in known:
            known[of] = find(self, of)
        return known[of]

    return found


class _Graph:
    """A CUDA graph without a GPU: a replay runs what was captured once more, on the batch at hand."""

    def __init__(self) -> None:
        self.run: Callable[[], Any] = lambda: None

    def replay(self) -> None:
        self.result = self.run()


def _seeded(
    seed: Callable[..., Any], number: int, te: bool = False, inference: bool = False, *_: Any, **of: Any
) -> Any:
    """Without the states for CUDA graphs, which there are on a GPU only."""
    return seed(number, te, inference, False, **of)


def _run_or_replay(wrapper: Any, **call: Any) -> Any:
    """Megatron's `FullCudaGraphWrapper.__call__`, but that nothing is captured and nothing copied to a GPU."""
    stage = "validation" if call["forward_only"] else "training"
    if wrapper.curr_iter(stage) == wrapper.cuda_graph_warmup_steps:
        wrapper.cuda_graph[stage] = _Graph()
    wrapper.next_iter(stage)
    graph = wrapper.cuda_graph[stage]
    if graph is None:
        return wrapper.forward_backward_func(**call)
    graph.run = lambda: wrapper.forward_backward_func(**call)
    graph.replay()
    return graph.result


def _put_tensors_on_cpu() -> None:
    """Whatever device is named; `tensor.cuda()` gives the tensor itself."""
    for owner, names in _MAKERS.items():
        for name in names:
            setattr(owner, name, _made_on_cpu(getattr(owner, name)))
    tensor: Any = torch.Tensor
    stock_to, stock_type = tensor.to, tensor.type

    @functools.wraps(stock_to)
    def to(self: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if "device" in keywords:
            keywords["device"] = _on_cpu(keywords["device"])
        return stock_to(self, *map(_on_cpu, arguments), **keywords)

    @functools.wraps(stock_type)
    def type_(self: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        found = stock_type(self, *arguments, **keywords)
        # Optimizers refuse half precision parameters whose type does not name CUDA.
        return found if arguments or keywords else found.replace("torch.", "torch.cuda.")

    tensor.to, tensor.type = to, type_
    tensor.cuda = lambda self, *arguments, **keywords: self


def _made_on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*arguments: Any, **keywords: Any) -> Any:
        if "device" in keywords:
            keywords["device"] = _on_cpu(keywords["device"])
        return make(*arguments, **keywords)

    return made


def _on_cpu(device: Any) -> Any:
    """The CPU for whatever names a CUDA device; everything else (a dtype, the meta device) as it is."""
    is_cuda = (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )
    return _CPU if is_cuda or (isinstance(device, int) and not isinstance(device, bool)) else device


class _Stream:
    """A stream on which nothing is ever waited for."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.cuda_stream = 0

    wait_stream = wait_event = record_event = synchronize = lambda self, *arguments, **keywords: None

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class _WithoutTriton(MetaPathFinder):
    """Lets the kernel modules be imported where there is no Triton, which only they see as if it were there."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in _KERNEL_MODULES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _execute(stock: Callable[[types.ModuleType], None], module: types.ModuleType) -> None:
    names = ("triton", "triton.language")
    sys.modules.update({name: mock.MagicMock() for name in names})
    try:
        stock(module)
    finally:
        for name in names:
            sys.modules.pop(name, None)  # one kernel module imports the other


def _new_nothing() -> Callable[..., None]:
    return lambda *arguments, **keywords: None


def _as_is(function: Any = None, **keywords: Any) -> Any:
    """What a decorator returns that changes nothing, with or without arguments."""
    return function if function is not None else _as_is
