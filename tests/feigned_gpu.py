"""A GPU that is not there: tensors that compute on the CPU, say that they are on cuda:0, and are as strict as if.

Two things go wrong only on a GPU, and no test on a CPU sees them: tensors of both devices meet in one operation, which
is an error; or the program waits for the GPU in the midst of a step, which makes it slow. Within `feigned_gpu` the
first raises, and the second is counted. With `cuda_rules` a third is seen, on the way forward: autocast has another
list of operations for CUDA than for a CPU, and what it leaves in two dtypes raises. How fast a GPU is, how much memory
it has and what its own kernels and numbers are, it cannot tell; and what is to be copied without waiting it takes for
pinned.
"""
from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
PACKING = {aten._pack_padded_sequence.default, aten._pack_padded_sequence_backward.default}  # lengths stay on the CPU
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
SIZED_BY_VALUES = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
                   aten.equal.default, aten.bincount.default, aten._unique2.default, aten.repeat_interleave.Tensor}


def in_float32(operation: Any, scores: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return operation(scores.float() if half_to_float else scores, dim, False)


def fused_lstm_cell(of_input: Tensor, of_hidden: Tensor, c: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if len({each.dtype for each in (of_input, of_hidden, c, *biases)}) > 1:
        raise RuntimeError(f"aten._thnn_fused_lstm_cell: gates in {of_hidden.dtype}, and c in {c.dtype}")
    gates = of_input.float() + of_hidden.float() + sum(each.float() for each in biases)
    i, f, g, o = gates.chunk(4, dim=1)
    new_c = f.sigmoid() * c.float() + i.sigmoid() * g.tanh()
    return (o.sigmoid() * new_c.tanh()).to(c.dtype), new_c.to(c.dtype), gates.to(c.dtype)


ONLY_ON_CUDA = {  # operations, or ways to call them, for which a CPU has no kernel
    **{each: partial(in_float32, each) for each in (aten._softmax.default, aten._log_softmax.default)},
    aten._thnn_fused_lstm_cell.default: fused_lstm_cell,
    aten.cudnn_batch_norm.default: lambda *args: (*aten.native_batch_norm(*args), torch.empty(0))}


class Seen(NamedTuple):
    """What a feigned GPU was asked to do."""

    operations: Counter[str]  # by name; nearly each is a kernel or several
    waits: Counter[str]       # by the function of ours that waited


class OnGPU(Tensor):
    """A tensor whose numbers are in the CPU's tensor `held`."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), dtype=held.dtype,
                                               storage_offset=held.storage_offset(),
                                               device=GPU if Feigning.active.cuda_rules else None)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Feigning.active.compute(operation, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device == GPU:
            return self if dtype in (None, self.dtype) else super().to(dtype)
        if not non_blocking:
            Feigning.active.wait()
        return self.detach().held.to(dtype or self.dtype, copy=True)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:  # for torch.save, which would save the numbers' device, too
        return self.to("cpu").__reduce_ex__(protocol)


class Feigning(TorchDispatchMode):
    """Sees every operation, those that make a new tensor on the GPU too."""

    active: Feigning

    def __init__(self, cuda_rules: bool) -> None:
        super().__init__()
        self.cuda_rules = cuda_rules
        self.seen = Seen(Counter(), Counter())

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(operation, args, kwargs or {})

    def wait(self) -> None:
        """Remembers which function of ours waits."""
        frame = sys._getframe(1)
        while frame.f_back and ("site-packages" in (code := frame.f_code).co_filename or code.co_filename == __file__
                                or code.co_name.startswith("<")):
            frame = frame.f_back
        self.seen.waits[frame.f_code.co_name] += 1

    def compute(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        ours = [each for each in tensors if isinstance(each, OnGPU)]
        others = [each for each in tensors if not isinstance(each, OnGPU) and each.dim() > 0]
        on_gpu = bool(ours)
        if kwargs.get("device") is not None:
            # Without CUDA's rules PyTorch's own C++ takes these tensors for the CPU's, and makes what it adds there.
            on_gpu = on_gpu or kwargs["device"].type == "cuda" or (
                not tensors and not self.cuda_rules and made_for_the_gpu(operation))
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if on_gpu and kwargs.get("generator") is not None:
            raise RuntimeError(f"{operation}: the generator is on the CPU, and the tensor on cuda:0")
        if operation in INDEXING and ours:
            if others and isinstance(args[0], OnGPU):  # allowed, but the index has to get there first
                self.wait()
                others = []
            if any(each is not None and each.dtype == torch.bool for each in args[1]):
                self.wait()
        if operation in PACKING and len(ours) > 1:
            raise RuntimeError(f"{operation}: the lengths are on cuda:0, and have to be on the CPU")
        if ours and others and operation not in MOVES | PACKING:
            raise RuntimeError(f"{operation}: some tensors are on cuda:0, and some on the CPU, those of the shapes "
                               f"{[tuple(each.shape) for each in others]}")
        blocking = operation in MOVES and on_gpu and others and not (
            kwargs.get("non_blocking") or any(each is True for each in args))
        if blocking or (operation in SIZED_BY_VALUES and ours):
            self.wait()

        held = {id(each.held): each for each in ours}
        args, kwargs = tree_map_only(OnGPU, lambda each: each.held, (args, kwargs))
        result = ONLY_ON_CUDA.get(operation, operation)(*args, **kwargs)
        if not on_gpu:
            return result
        if not operation.is_view:
            self.seen.operations[str(operation)] += 1
        if operation is aten._pack_padded_sequence.default:
            return OnGPU(result[0]), result[1]
        return tree_map_only(Tensor, lambda each: held.get(id(each)) if id(each) in held else OnGPU(each), result)


def made_for_the_gpu(operation: Any) -> bool:
    """Whether it is in the midst of a backward pass, or of padding what is on the GPU."""
    names, frame = [], sys._getframe(2)
    while frame and len(names) < 8:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return "_engine_run_backward" in names or ("pad_packed_sequence" in names and operation is aten.full.default)


class CPUAutocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


@contextmanager
def feigned_gpu(cuda_rules: bool = False) -> Iterator[Seen]:
    """There is one GPU, cuda:0. Gives what it was asked to do.

    Args:
        cuda_rules: PyTorch's own C++, too, takes its tensors for a GPU's: they get CUDA's dispatch keys and autocast.
            On the way forward only; a backward pass would need a real GPU.
    """
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) is seen as a copy to the GPU, which waits
    Feigning.active = Feigning(cuda_rules)
    if cuda_rules:
        torch._C._ensureCUDADeviceGuardSet()  # where no GPU is found, one that guards nothing
        autocast = mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    else:
        autocast = mock.patch("torch.autocast", CPUAutocast)
    try:
        with (mock.patch("torch.cuda._lazy_init"), mock.patch("torch.cuda.set_device"),
              mock.patch("torch.cuda.is_bf16_supported", lambda **_: True), autocast,
              mock.patch("torch.cuda.get_device_capability", lambda _: (8, 0)),
              mock.patch("torch.cuda.mem_get_info", lambda _: (10 ** 9, 10 ** 9)),
              mock.patch("torch._C._InferenceMode", lambda on: torch.set_grad_enabled(not on)), Feigning.active):
            yield Feigning.active.seen
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
