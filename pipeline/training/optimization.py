"""What both loops share: the learning-rate schedule, number formats, and the whole state of a training as bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pipeline.pixels import Pixels

LEAST_LEARNING_RATE = 0.01  # of the peak, at the end of the cosine


class CheckpointError(ValueError):
    """Checkpoint bytes are damaged, or do not fit the training that should go on from them."""


class DivergedError(RuntimeError):
    """The loss is no longer finite."""


def step_metrics(step: int, lower: str, **values: Tensor) -> dict[str, float]:
    """A step's numbers as floats, `mse` (of values in [0, 1]) as `psnr_db`.

    Raises:
        DivergedError: one is not finite; says at which step, and to lower the setting named `lower`.
    """
    found = torch.stack([value.detach().float() for value in values.values()])
    numbers = dict(zip(values, found.tolist(), strict=True))  # waits for the device once
    if not all(math.isfinite(number) for number in numbers.values()):
        raise DivergedError(f"training diverged at step {step} ({numbers}): lower {lower} and run again")
    return numbers | {"psnr_db": unit_psnr_db(numbers.pop("mse"))}


def unit_psnr_db(mse: float) -> float:
    """PSNR in dB of values in [0, 1]; 120 at most."""
    return -10 * math.log10(max(mse, 1e-12))


def image_batch(pixels_BHWC: Pixels | Tensor, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [0, 1]; channels last, as the bytes are."""
    return torch.as_tensor(pixels_BHWC).to(device).permute(0, 3, 1, 2).float().div_(255)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear rise over `warmup` steps, then a cosine from 1 down to LEAST_LEARNING_RATE at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return LEAST_LEARNING_RATE + (1 - LEAST_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def resolve_precision(precision: str, device: torch.device) -> str:
    """'auto' is bfloat16 where the device multiplies in it (CUDA, AMX, AVX-512 BF16), float32 elsewhere."""
    if precision != "auto":
        return precision
    is_native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if device.type == "cuda" or is_native else "float32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def training_device() -> torch.device:
    """CUDA when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Adam:
    """Adam (Kingma & Ba 2015) with its default moments, fused."""
    return torch.optim.Adam(list(parameters), lr=learning_rate, fused=True)


def make_optimizers(
    parameters: Iterable[nn.Parameter], learning_rate: float, kind: str, share: float = 1.0
) -> dict[str, torch.optim.Optimizer]:
    """By name: `filters`, Muon on the weights of convolutions where `kind` is muon; `main`, Adam on all else.

    Args:
        share: of every learning rate that `set_learning_rate` will set.
    """
    parameters = list(parameters)
    filters = [parameter for parameter in parameters if kind == "muon" and parameter.dim() == 4]
    others = [parameter for parameter in parameters if kind != "muon" or parameter.dim() != 4]
    optimizers: dict[str, torch.optim.Optimizer] = {"main": make_adam(others, learning_rate)}
    optimizers |= {"filters": FilterMuon(filters, learning_rate)} if filters else {}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["share"] = share
    return optimizers


class FilterMuon(torch.optim.Muon):
    """Muon on filters: each (A, B, kh, kw) weight is the matrix (A, kh·kw·B) of its memory in channels_last.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale of the update
    after Liu et al., "Muon is scalable for LLM training" (2025), section 2.2, so that Adam's learning rates fit.
    """

    def __init__(self, filters: Iterable[nn.Parameter], learning_rate: float) -> None:
        self.filters = list(filters)
        matrices = [nn.Parameter(_matrix(weight.detach())) for weight in self.filters]
        for weight, matrix in zip(self.filters, matrices, strict=True):
            if weight.data_ptr() != matrix.data_ptr():
                raise ValueError(f"expected filters in channels_last, found strides {weight.stride()}")
        super().__init__(matrices, learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.register_step_pre_hook(lambda *_: self._take_gradients())

    def _take_gradients(self) -> None:
        for weight, matrix in zip(self.filters, self.param_groups[0]["params"], strict=True):
            matrix.grad = None if weight.grad is None else _matrix(weight.grad)


def _matrix(filters: Tensor) -> Tensor:
    return filters.permute(0, 2, 3, 1).flatten(1)


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Of those parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def set_learning_rate(optimizers: Mapping[str, torch.optim.Optimizer], learning_rate: float) -> None:
    """For all parameters, or the share of it that theirs is."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["share"]


def state_to_bytes(
    modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer], step: int
) -> bytes:
    """Weights, optimizer moments and the step, as safetensors.

    Schedule, sampler and noise are functions of (seed, step), so the step is their whole state.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module/{name}/{leaf}": value for leaf, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{name}/{index}/{leaf}": value for leaf, value in state.items()}
    dense = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save_tensors(dense, {"training": json.dumps({"step": step})})


def state_from_bytes(
    data: bytes, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> int:
    """Put a state back and return its step.

    Raises:
        CheckpointError: the bytes are damaged, or a leaf is missing, unknown or of another shape (it is named);
            nothing has been put back.
    """
    tensors, step = _parse(data)
    weights = {name: _leaves(f"module/{name}/", tensors) for name in modules}
    moments = {name: _leaves(f"optimizer/{name}/", tensors) for name in optimizers}
    for name, module in modules.items():
        _check_leaves(f"module/{name}/", module.state_dict(), weights[name])
    for name, optimizer in optimizers.items():
        _check_leaves(f"optimizer/{name}/", _expected_moments(optimizer, moments[name]), moments[name])
    for name, module in modules.items():
        module.load_state_dict(weights[name])
    for name, optimizer in optimizers.items():
        _load_moments(optimizer, moments[name])
    return step


def _parse(data: bytes) -> tuple[dict[str, Tensor], int]:
    try:
        return load_tensors(data), _step_of(data)
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"expected a whole checkpoint, found {len(data)} damaged bytes ({error})"
        ) from error


def _leaves(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {leaf.removeprefix(prefix): value for leaf, value in tensors.items() if leaf.startswith(prefix)}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _expected_moments(optimizer: torch.optim.Optimizer, found: Iterable[str]) -> dict[str, Tensor]:
    """The optimizer's leaves for the parameters of which there are any: those without a gradient have none."""
    indices = {leaf.partition("/")[0] for leaf in found}
    expected: dict[str, Tensor] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        if str(index) in indices:
            moments = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            if isinstance(optimizer, torch.optim.Muon):
                moments = {"momentum_buffer": parameter}
            expected |= {f"{index}/{moment}": like for moment, like in moments.items()}
    return expected


def _load_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for leaf, value in moments.items():
        index, _, moment = leaf.partition("/")
        state.setdefault(int(index), {})[moment] = _like(parameters[int(index)], value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment in its parameter's memory format: the fused step walks both in the order of memory."""
    return value if value.dim() == 0 else torch.empty_like(parameter).copy_(value)


def _check_leaves(prefix: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for leaf in sorted(expected.keys() | found.keys()):
        wanted = tuple(expected[leaf].shape) if leaf in expected else "no such leaf"
        there = tuple(found[leaf].shape) if leaf in found else "none"
        if wanted != there:
            raise CheckpointError(f"checkpoint leaf {prefix}{leaf}: expected {wanted}, found {there}")


def _step_of(data: bytes) -> int:
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return int(json.loads(metadata["training"])["step"])
