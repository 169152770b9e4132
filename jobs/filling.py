"""A latent set that is still being filled, as a finetuning reads it that has begun before it is whole (`start_at`).

Its key names the latents by their digest, which nobody knows yet. So its checkpoints note what they have seen, and
count only where the set still says the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from storage.digests import Digests
from storage.image_table import ImageTable
from storage.keys import digest_of_pairs
from storage.latents import LatentError, LatentSet
from storage.parts import PartImage

if TYPE_CHECKING:
    from pipeline.training.latent_crops import Arrays, LatentBatch, LatentCrops

POLL_S = 2.0
Array = npt.NDArray[Any]
Crops = Callable[[Mapping[str, "Arrays"], "Arrays"], "LatentCrops"]


class Seen:
    """Which latents a finetuning has been trained on; compared with those of a set."""

    def __init__(self, latents: LatentSet, digests: Digests) -> None:
        """`digests` of all its images, as far as they are known, in their order."""
        self.latents, self.digests = latents, digests

    def note(self, step: int) -> bytes | None:
        """What a checkpoint keeps; None where its key says it."""
        return None

    def agrees(self, note: bytes) -> bool:
        """Whether the set still holds what a checkpoint was trained on."""
        seen = json.loads(note)
        names = self.digests[: seen["images"]]
        try:
            same = len(names) == seen["images"] and self.latents.content_digest(names) == seen["digest"]
        except LatentError:
            return False
        return same and seen["of"] in (None, len(self.digests))


class Filling(Seen):
    """Batches from a set as far as it is filled, of the first epoch: it goes in the order of digests, as filling does.

    Once the set is whole, they come from this node's copy of all of it, and are the same.
    """

    def __init__(
        self,
        latents: LatentSet,
        wanted: Digests,
        batch_size: int,
        fields: Callable[[PartImage], Mapping[str, Array]],
        pixels: Callable[[str], Array],
        crops: Crops,
        whole: Callable[[Digests], LatentCrops],
    ) -> None:
        """
        Args:
            wanted: the images that the set will have, less those that will be given up.
            fields: of an image, as `whole` would have them.
            crops: cuts them.
            whole: of a set that is filled.
        """
        super().__init__(latents, wanted[:0])
        self._wanted, self._batch_size = wanted, batch_size
        self._fields, self._pixels, self._crops, self._open = fields, pixels, crops, whole
        self._whole: LatentCrops | None = None
        self._digest = ""  # of the latents of all images, once they are there
        self._table = ImageTable()  # what the set said last
        self._read: dict[
            str, str
        ] = {}  # digest of the latents of each image that a batch has had, in their order
        self._part = lru_cache(maxsize=2)(lambda name: {i.digest: i for i in latents.read_part(name)})

    def batch(self, step: int, size: int, rows: slice = slice(None)) -> LatentBatch:
        """As `LatentCrops.batch`, once the images are there.

        Raises:
            LatentError: a part is damaged, or parts have been replaced by others that say something else.
        """
        while self._whole is None and len(self.digests) < (step + 1) * size:
            if self._look():
                self._require_same()
                self._digest = self.latents.content_digest(self.digests)
                self._whole = self._open(self.digests)
            elif len(self.digests) < (step + 1) * size:
                time.sleep(POLL_S)
        crops = self._whole or self._window(step * size, self.digests[step * size : (step + 1) * size])
        return crops.batch(step, size, rows)

    def note(self, step: int) -> bytes | None:
        """How many images, in the order of digests, of how many once that is known, and the digest of their latents.

        Raises:
            LatentError: as `batch`.
        """
        self._require_same()
        names = self.digests[: step * self._batch_size]
        about = {"images": len(names), "of": len(self.digests) if self._whole else None}
        return json.dumps(about | {"digest": self.latents.content_digest(names)}).encode()

    def agrees(self, note: bytes) -> bool:
        """As of `Seen`, and go on from there."""
        self._look()
        if not super().agrees(note):
            return False
        names = self.digests[: json.loads(note)["images"]]
        self._read = dict(self._table.contents(self._table.find(names)))
        return True

    def _look(self) -> bool:
        """Which images are there without a gap before them; whether all are."""
        self._table = self.latents.images()
        there = self._table.find(self._wanted) >= 0
        if not there.all():
            given_up = self.latents.given_up()
            pending = [int(row) for row in np.flatnonzero(~there)]
            if pending := [row for row in pending if self._wanted[row] not in given_up]:
                self.digests = self._wanted[: pending[0]].where(there[: pending[0]])
                return False
        self.digests = self._wanted.where(there)
        return True

    def _window(self, first: int, names: Digests) -> LatentCrops:
        """The images of one batch, read from their parts."""
        found = [self._fields(self._part(self._table[name].part)[name]) for name in names]
        self._read |= {name: self._table[name].content for name in names}
        count = len(self._wanted)
        fields = {name: _Rows(first, count, [one[name] for one in found]) for name in found[0]}
        return self._crops(fields, _Rows(first, count, [self._pixels(name) for name in names]))

    def _require_same(self) -> None:
        """What has been read is what the set holds now, and in the order in which it holds it."""
        names: Iterable[str] = self.digests if self._whole else self._read
        expected = self._digest if self._whole else digest_of_pairs(self._read.items())
        in_order = self.digests[: len(self._read)] == list(self._read)
        if not in_order or self.latents.content_digest(names) != expected:
            raise LatentError(
                "expected the latents that a finetuning has read so far, found others: parts have been replaced, or an "
                "image that was given up is there now. Run again, and it begins anew"
            )


class _Rows:
    """Some neighbouring rows of arrays that are not there as a whole."""

    def __init__(self, first: int, count: int, arrays: list[Array]) -> None:
        self._first, self._count, self._arrays = first, count, arrays

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Array:
        return self._arrays[row - self._first]
