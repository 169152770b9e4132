"""A latent set as a PyTorch dataset, for networks and training loops of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from jobs.local import local_indices
from storage.inventory import find_set
from storage.latents import LatentSet
from storage.workspace import Workspace


class LatentItem(TypedDict):
    """One image: `digest` of its pixels, `indices` int16 (C, h, w), `hyper_indices` int16 (N, h', w')."""

    digest: str
    indices: torch.Tensor
    hyper_indices: torch.Tensor


class LatentDataset(Dataset[LatentItem]):
    """Map-style: a row, or an image's digest, to its quantized latents.

    The integers are copied once to this node's disk (RETRELLIS_SCRATCH, else the system's folder for temporary files),
    compared with their records on the way, and mapped into memory: rows may be read in any order, by workers of a
    DataLoader too, forked or spawned. Images differ in size, so that a batch of several takes a `collate_fn`.

    Attributes:
        digests: of the images, sorted; row i is that of digests[i].
    """

    def __init__(self, workspace: str, key: str, digests: Iterable[str] | None = None) -> None:
        """All images of a set, or some of them.

        Args:
            workspace: its root.
            key: of the set, or its first digits, as `retrellis latents ls` lists them.
            digests: of images; None for all.

        Raises:
            WorkspaceError: there is no workspace.
            LatentError: no such set, an image is missing, or a part is damaged.
            StorageFull: no room for the copy.
        """
        opened = Workspace.open(workspace, create=False)
        latents = LatentSet(opened, find_set(opened, key))
        self.digests = sorted(set(latents.images() if digests is None else digests))
        self._rows = {name: row for row, name in enumerate(self.digests)}
        self._fields = local_indices(latents, self.digests)

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, index: int | str) -> LatentItem:
        """Raises IndexError, or KeyError for a digest that is not in `digests`."""
        row = self._rows[index] if isinstance(index, str) else range(len(self))[index]
        indices, hyper_indices = (
            torch.from_numpy(np.array(self._fields[name][row])) for name in ("indices", "hyper_indices")
        )
        return {"digest": self.digests[row], "indices": indices, "hyper_indices": hyper_indices}
