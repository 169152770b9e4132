"""The programs we compare with, made importable: none is a dependency, all live in an environment of their own.

    python3.11 -m venv peers && . peers/bin/activate
    pip install -c constraints.txt . pybind11 setuptools
    pip install constriction==0.5.0 scipy tqdm requests pandas einops
    pip install --no-deps compressai==1.2.8
    pip download --no-deps --no-build-isolation --no-binary nncodec nncodec==2.1.3   # only its C++ extension is used:
    tar xf nncodec-2.1.3.tar.gz && (cd nncodec-2.1.3 && python setup.py build_ext --inplace)
    export NNCODEC=$PWD/nncodec-2.1.3/src/nncodec/extensions

CompressAI imports torchvision and torch_geometric, which have no build for our torch; its image models need neither, so
that modules which allow any name stand in for them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

ABSENT = ("torchvision", "torch_geometric")
NNCODEC_DENSITY = 2  # its step is (4 + (qp & 3)) · 2^((qp >> 2) − 2)


class _Anything(ModuleType):
    """A module in which every name exists: a class that takes any arguments, or decorates what it is given."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        return lambda *args, **kwargs: lambda decorated: decorated


class _StandIns(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in ABSENT:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to execute."""


def compressai(module: str) -> ModuleType:
    """A module of CompressAI 1.2.8, such as "models" (`MeanScaleHyperprior`) or "ans" (its C++ rANS)."""
    if not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        sys.meta_path.append(_StandIns())
    return importlib.import_module(f"compressai.{module}")


def nncodec_tcq(samples: np.ndarray, quarter_octave: int) -> tuple[np.ndarray, float]:
    """nncodec's 8-state TCQ, distortion only.

    Args:
        samples: float32, one sequence.
        quarter_octave: qp; the step is (4 + qp mod 4) / 4 · 2^⌊qp / 4⌋.

    Returns:
        Levels of the union of both quantizers, int32 (a reconstruction is level · step), and the step.
    """
    sys.path.insert(0, os.environ["NNCODEC"])
    encoder = importlib.import_module("deepCABAC").Encoder()
    sys.path.pop(0)
    levels = np.zeros(samples.size, np.int32)
    # weights, levels, dependent quantization, density, qp, λ (0: distortion only), then CABAC's settings, unused
    used = encoder.quantLayer(
        samples.reshape(1, -1), levels, 1, NNCODEC_DENSITY, quarter_octave, 0.0, 10, 0, 0
    )
    assert used == quarter_octave
    return levels, (4 + (quarter_octave & 3)) / 4 * 2.0 ** (quarter_octave >> 2)
