"""Settings of a training so small that a test can afford several."""

from __future__ import annotations

from pipeline.training.base import BaseSettings

BASE = BaseSettings(
    N=4,
    M=6,
    lmbda=0.01,
    steps=6,
    batch=2,
    crop=64,
    optimizer="muon",
    learning_rate=1e-3,
    warmup=2,
    clip=1.0,
    precision="float32",
    seed=3,
)
