"""`make demo`: the whole pipeline, embedded, on photographs that come with installed packages."""

from __future__ import annotations

import shutil
import time
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from jobs import experiment
from jobs.session import Options, execute

WORKSPACE = Path("demo-workspace")
EXPERIMENT = Path("experiments/demo.yaml")

# One folder's pictures are trained on, the other's tested on; no scene is in both.
PHOTOS = {
    "train": {
        "skimage/data": (
            "brick.png camera.png coins.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png "
            "retina.jpg rocket.jpg"
        ),
        "sklearn/datasets/images": "china.jpg flower.jpg",
    },
    "test": {"skimage/data": "astronaut.png chelsea.png coffee.png"},
}


def main() -> None:
    """Copy the photographs once, run the experiment, and say where to look."""
    console = Console(soft_wrap=True)
    started = time.monotonic()
    for use, packages in PHOTOS.items():
        for folder, names in packages.items():
            copy_photos(folder, names.split(), WORKSPACE / "photos" / use)
    execute(experiment.load(str(EXPERIMENT)), Options(str(WORKSPACE)), console)
    console.print(
        f"\n{time.monotonic() - started:.0f} s in all. Open the lineage in MLflow:", highlight=False
    )
    console.print(f"  .venv/bin/retrellis ui --workspace {WORKSPACE}", markup=False, highlight=False)


def copy_photos(package_folder: str, names: list[str], target: Path) -> None:
    """Copy files that lie in an installed package, with their times, so that a second run knows them again."""
    package, _, inside = package_folder.partition("/")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            f"the demo's photographs come with {package}: install it with pip install -e '.[demo]'"
        )
    source = Path(found.submodule_search_locations[0]) / inside
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (target / name).exists():
            shutil.copy2(source / name, target / name)


if __name__ == "__main__":
    main()
