"""Base codecs trained on one CUDA device without Ray, each in a process of its own.

    python benchmarks/cuda_training.py IMAGES HELD_OUT OUT [--seconds S] [--batch B] [--only 1,2,…] [--mps] [--compiled]

Folders of JPEG. Each process goes on from a codec that comes with the project, with a whole step as one CUDA graph
(bfloat16, Muon, crops of 256 × 256). Prints how many images a second each takes in, and how busy the device is. With
--seconds all go on for as long, on a cosine that ends there; OUT then has weights rounded to bfloat16, whose names are
CompressAI's; `main` says how they become a codec. The codecs of docs/codecs.md were made so, from those before them,
and benchmarks/cuda_training.txt is that run's log.

    --mps        share the device by NVIDIA's MPS, so that kernels of several processes run at once
    --compiled   fuse what is not convolution in g_a and g_s; without --seconds both are measured
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from pipeline import shipped
from pipeline.bitstream import ImageCoder
from pipeline.pixels import canonical_pixels
from pipeline.training.base import BaseSettings, BaseTraining
from pipeline.training.optimization import image_batch, unit_psnr_db

CROP, WARMUP, RATE = 256, 300, 1e-3
EAGER_STEPS, MEASURE_S, LOG_EVERY, SAVES, MEETING_S = 40, 8.0, 500, 8, 100
QUERY = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]


class Graphed(BaseTraining):
    """`BaseTraining` whose whole step is one CUDA graph: a network this small computes faster than it is launched.

    The noise comes from one generator that goes on from step to step, and the learning rate moves every EVERY steps,
    when the step is captured anew. Metrics are summed on the device. On a CPU the step is just computed.
    """

    EVERY = 250

    def prepare(self) -> None:
        """After some steps of `BaseTraining`, which make the optimizers' state."""
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["capturable"] = True
        s = self.settings
        self.pixels = torch.zeros(s.batch, s.crop, s.crop, 3, dtype=torch.uint8, device=self.device)
        self.noise = torch.Generator(self.device).manual_seed(s.seed)
        self.sums = torch.zeros(4, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def advance_graphed(self) -> None:
        self.pixels.copy_(torch.from_numpy(self._batch()))
        if self.device.type == "cpu":
            self._set_learning_rate()
            self._whole_step()
        else:
            if self.graph is None or self.step % self.EVERY == 0:
                self.graph = self._captured()
            self.graph.replay()
        self.step += 1

    def means(self, steps: int) -> tuple[float, float, float]:
        """Loss, bpp and mean squared error over the steps since it was last asked."""
        loss, bpp, mse, _ = (self.sums / steps).tolist()
        self.sums.zero_()
        if not math.isfinite(loss):
            raise SystemExit(f"diverged before step {self.step}")
        return loss, bpp, mse

    def _captured(self) -> torch.cuda.CUDAGraph:
        self._set_learning_rate()
        self.graph = None
        self.network.zero_grad()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.noise)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self._whole_step()
        return graph

    def _whole_step(self) -> None:
        found = self._backward(image_batch(self.pixels, self.device), self.noise)
        self.sums += torch.stack([value.detach() for value in found.values()])
        self._take_step()


def pictures(folder: str) -> list[np.ndarray]:
    return [canonical_pixels(path.read_bytes()) for path in sorted(Path(folder).rglob("*.jpg"))]


def started(quality: int, images: list[np.ndarray], batch: int) -> Graphed:
    """One that has taken some steps, which also choose the convolutions' algorithms."""
    codec = ImageCoder.from_bytes(shipped.codec_file(quality)).codec
    settings = BaseSettings(
        N=codec.network.N,
        M=codec.network.M,
        lmbda=shipped.SHIPPED[quality].lmbda,
        steps=10**6,
        batch=batch,
        crop=CROP,
        learning_rate=RATE,
        warmup=WARMUP,
        clip=1.0,
        precision="bfloat16",
        seed=quality,
        optimizer="muon",
    )
    training = Graphed(settings, images, start=codec)
    for _ in range(EAGER_STEPS):
        training.advance()
    training.prepare()
    for _ in range(3):
        training.advance_graphed()
    return training


def compile_transforms(training: Graphed) -> None:
    """The steps after it are computed before they are captured again: nothing may be compiled within a capture."""
    training.network.g_a.compile(dynamic=False)
    training.network.g_s.compile(dynamic=False)
    training.graph = None
    for _ in range(3):
        training.step += 1
        training._whole_step()
    for _ in range(3):
        training.advance_graphed()


def speed(training: Graphed) -> str:
    """Steps for some seconds; says how many."""
    begin, first = time.perf_counter(), training.step
    while time.perf_counter() - begin < MEASURE_S:
        training.advance_graphed()
    training.means(training.step - first)
    rate = (training.step - first) / (time.perf_counter() - begin)
    batch = training.settings.batch
    return f"{rate:.1f} steps/s of {batch}: {rate * batch:.0f} images/s"


def say(quality: int, text: str) -> None:
    print(f"quality {quality}: {text}", flush=True)


def meet(folder: Path, quality: int, count: int) -> None:
    """Wait until all processes are here, or are not coming."""
    folder.mkdir(exist_ok=True)
    (folder / str(quality)).touch()
    end = time.monotonic() + MEETING_S
    while len(list(folder.iterdir())) < count and time.monotonic() < end:
        time.sleep(0.05)


def work(arguments: argparse.Namespace) -> None:
    """One process."""
    torch.set_num_threads(2)
    torch.backends.cudnn.benchmark = True
    quality, place, count = arguments.work, Path(arguments.meet), len(arguments.only)
    images = pictures(arguments.images)
    begin = time.perf_counter()
    training = started(quality, images, arguments.batch)
    seconds = time.perf_counter() - begin
    say(quality, f"{len(images)} images, M = {training.settings.M}; first steps {seconds:.1f} s")
    if not (arguments.compiled and arguments.seconds):
        meet(place / "plain", quality, count)
        say(quality, f"not compiled: {speed(training)}")
    if arguments.compiled:
        compile_transforms(training)
        meet(place / "compiled", quality, count)
        say(quality, f"compiled: {speed(training)}")
    if arguments.seconds:
        held_out = pictures(arguments.held_out)
        run(training, quality, held_out, Path(arguments.out), time.perf_counter() + arguments.seconds)


def run(training: Graphed, quality: int, held_out: list[np.ndarray], out: Path, end: float) -> None:
    """Until the time is over: the end of the schedule follows the speed found."""
    since, clock, begin, saved = training.step, time.perf_counter(), time.perf_counter(), 0
    while time.perf_counter() < end and training.step < training.settings.steps:
        training.advance_graphed()
        if training.step % LOG_EVERY:
            continue
        loss, bpp, mse = training.means(training.step - since)
        now = time.perf_counter()
        rate = (training.step - since) / (now - clock)
        steps = training.step + int(max(0.0, end - now) * rate) + 1
        training.settings = replace(training.settings, steps=steps)
        found = f"loss {loss:.4f}, bpp {bpp:.4f}, psnr_db {unit_psnr_db(mse):.2f}, {rate:.1f} steps/s"
        if (now - begin) / (end - begin) >= (saved + 1) / SAVES:
            saved += 1
            found += measured(training, held_out)
            save(training, quality, out)
        say(quality, f"{training.step}/{steps} steps, {found}")
        since, clock = training.step, time.perf_counter()
    say(quality, f"end, {training.step} steps{measured(training, held_out)}")
    save(training, quality, out)


def measured(training: Graphed, held_out: list[np.ndarray]) -> str:
    """On held-out images, whose batches have other shapes than what has been compiled."""
    with torch.compiler.set_stance("force_eager"):
        found = training.held_out(held_out)
    return "".join(f", {name} {value:.4f}" for name, value in found.items())


def save(training: Graphed, quality: int, out: Path) -> None:
    weights = {name: leaf.bfloat16().contiguous() for name, leaf in training.network.state_dict().items()}
    safetensors.torch.save_file(weights, out / f"weights-{quality}.safetensors")


def main(arguments: argparse.Namespace) -> None:
    """Start all, and watch the device meanwhile.

    Weights become a codec by `MeanScaleHyperprior(N, M).load_state_dict` and `Codec.from_network(…, rounded=True)`.
    """
    device = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    print(f"{device.split(' (UUID')[0]}, {versions}; {len(arguments.only)} processes", flush=True)
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    if arguments.mps:
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=False)
    workers: list[subprocess.Popen[str]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, arguments.images, arguments.held_out, arguments.out]
            options = {"--meet": folder, "--seconds": arguments.seconds, "--batch": arguments.batch}
            options |= {"--only": ",".join(map(str, arguments.only))}
            command += [str(word) for option in options.items() for word in option]
            command += ["--compiled"] * arguments.compiled
            for quality in arguments.only:
                workers.append(subprocess.Popen([*command, "--work", str(quality)], text=True))
            watch = subprocess.Popen([*QUERY, "-l", "1"], stdout=subprocess.PIPE, text=True)
            codes = [worker.wait() for worker in workers]
            watch.terminate()
            lines = watch.communicate()[0].splitlines()[:-1]  # the last may be cut
    finally:
        for worker in workers:
            worker.kill()
        if arguments.mps:
            subprocess.run(["nvidia-cuda-mps-control"], input="quit\n", text=True, check=False)
    busy = [float(line) for line in lines[len(lines) // 3 :]]  # the first third is the start
    if busy:
        print(f"device busy {sum(busy) / len(busy):.0f} % of the time, by nvidia-smi")
    sys.exit(max(map(abs, codes)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("images", "held_out", "out"):
        parser.add_argument(name)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--only", type=lambda text: [int(q) for q in text.split(",")], default=list(shipped.SHIPPED)
    )
    parser.add_argument("--mps", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)  # a process of these: its quality
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parsed()
    if not arguments.work:
        main(arguments)
    else:  # on the stream on which steps are captured too
        with torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext():
            work(arguments)
