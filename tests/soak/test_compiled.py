"""A compiled training takes the steps of a plain one; the compiler alone takes half a minute."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import skimage.data
from trainings import BASE

from pipeline.training.base import BaseTraining


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiling_changes_no_more_than_rounding() -> None:
    images: list[np.ndarray] = [skimage.data.astronaut()[:100, :130], skimage.data.coffee()[:70, :90]]
    plain, compiled = BaseTraining(BASE, images), BaseTraining(BASE, images, compiled=True)
    for _ in range(2):
        assert compiled.advance() == pytest.approx(plain.advance(), rel=1e-3)
