#!/usr/bin/env python3
"""Speed and quality of image_gen.py beside two well-known libraries, measured on the same machine in the same way.

    pip install -r benchmarks/requirements.txt
    python benchmarks/image_gen_peers.py --what train                           training images/s
    python benchmarks/image_gen_peers.py --what sample                          seconds per image
    python benchmarks/image_gen_peers.py --what sample --ancestral_steps 100    the same, long chains cut and marked so
    python benchmarks/image_gen_peers.py --what quality --minutes 10 --samples 2000      FID after equal minutes
    python benchmarks/image_gen_peers.py --what quality --minutes 10 --samples 2000 --only ours     one of them alone

Results are merged into one JSON file, with Markdown tables of the same name beside it, and for `quality` a picture of
FID against minutes: `train` is always replaced as a whole (its ratios hold within one run), `sample` and `quality`
contestant by contestant.

Contestants. All train from images in memory with gradients clipped to norm 1; for speed on the same batch size, for
quality on that of their own recipe (the peers' examples take 16) unless --batch_size is given. None pays for a data
loader (the peers' own would read image files), for progress bars or for logging.
    ours               image_gen.py in its default settings, a diffusion model: class-conditional, bfloat16 where the
                       CPU has it
    ours-gan, ours-vae its other families, by their defaults as well
    diffusers          UNet2DModel, widths (32, 64, 128): as large as ours, and not larger; the recipe is the library's
                       train_unconditional.py: epsilon loss with DDPMScheduler, AdamW 1e-4, cosine rate with warm-up,
                       EMA; unconditional, float32
    diffusers-small    the same with the widths (32, 64, 64) of Hugging Face's course on MNIST
    ddp                denoising_diffusion_pytorch: Unet(dim=32, dim_mults=(1, 2, 4)), as its default fourth level does
                       not fit 28 pixels; GaussianDiffusion's defaults and the recipe of its Trainer: Adam 1e-4,
                       constant rate, EMA; unconditional, float32
    *-bf16, *-bf16-cl  the peers under bfloat16 autocast, and also in channels_last: what a line or two would give them
    ours-float32       ours without its bfloat16
Quality: one process for each; the first 4 % of the minutes measure the speed, to which learning-rate schedules that
need a length are fitted. After an eighth, a quarter and a half of the minutes, and at their end, averaged weights draw
and are measured, while the clock stands still: ours as by default, the peers by DDIM with --peer_evaluations. The
time to a FID is that of the first of these measurements which is as low.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "image_gen"))
import image_gen as ig  # noqa: E402

# === contestants: train_step(), plan(steps), draw(image numbers, total, sampler, steps, run) -> images in [-1, 1] ===


class Ours:
    """image_gen.py's own Trainer, driven step by step."""

    def __init__(self, args: argparse.Namespace, images: ig.Images, family: str = "diffusion",
                 precision: str = "auto", **options: Any) -> None:
        world, kind = ig.World(args.device), ig.FAMILIES[family]
        if args.batch_size:
            options["batch_size"] = args.batch_size
        model = kind(kind.config_class(**options), images.info()).to(world.device)
        model.prepare(images, world.device)
        model.precision = ig.pick_precision(precision, world.device)
        self.trainer = ig.Trainer(model, images, world, HERE / "unused.pt", HERE, {})  # only fit() would write
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the Trainer's own handlers wait for fit()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.network, self.train_step, self.device = model.train(), self.trainer.train_step, world.device
        self.batch_size, self.precision = model.config.batch_size, str(model.precision).removeprefix("torch.")
        self.conditioning = "class" if model.labelled else "none"
        how = model.describe_sampling()
        self.samplers = ((how.get("sampler", "one pass"), how.get("network_evaluations", 1)),)

    def plan(self, total: int) -> str:
        """Fit the schedule to `total` steps; those so far were part of its warm-up."""
        self.trainer.total = total
        return f"default, for {total / self.trainer.steps_per_epoch:.2f} epochs"

    @torch.no_grad()
    def draw(self, numbers: range, total: int, sampler: str, steps: int, run: int | None = None) -> Tensor:
        model = self.trainer.averaged.eval()
        model.precision = self.network.precision
        labels = ig.proportional_labels(model.data, total, model.labelled)
        labels = None if labels is None else labels[list(numbers)].to(self.device)
        return model.sample(labels, ig.Noise(0, numbers, self.device))


class Peer:
    """What the two libraries have in common: data in memory, one optimizer step, averaged weights."""
    conditioning = "none"

    def __init__(self, args: argparse.Namespace, images: ig.Images, network: nn.Module, bf16: bool = False,
                 channels_last: bool = False) -> None:
        self.device, self.bf16, self.batch_size = ig.pick_device(args.device), bf16, args.batch_size or 16
        self.samplers = (("ddpm", 1000), ("ddim", args.peer_evaluations))
        self.precision = "bfloat16" if bf16 else "float32"
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(self.device, memory_format=layout)
        self.images, self.order = images.train.to(self.device), torch.empty(0, dtype=torch.long)
        self.rate = args.peer_learning_rate or 1e-4

    def cast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def batch(self) -> Tensor:
        """The next images [B 1 28 28] in [0, 1], in a new random order each epoch."""
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(len(self.images))
        chosen, self.order = self.order.tensor_split([self.batch_size])
        return self.images[chosen.to(self.device)].float().div_(255)

    def optimize(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()


class Diffusers(Peer):
    def __init__(self, args: argparse.Namespace, images: ig.Images, last: int = 128, **options: bool) -> None:
        import diffusers
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        network = diffusers.UNet2DModel(
            sample_size=28, in_channels=1, out_channels=1, layers_per_block=2, block_out_channels=(32, 64, last),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
        super().__init__(args, images, network, **options)
        kinds = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}
        self.noising = {name: kind(num_train_timesteps=1000) for name, kind in kinds.items()}
        self.optimizer = torch.optim.AdamW(network.parameters(), self.rate, betas=(0.95, 0.999), weight_decay=1e-6)
        self.get_scheduler = get_scheduler
        self.scheduler = get_scheduler("constant_with_warmup", self.optimizer, num_warmup_steps=500)
        self.ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.copied: tuple[int, Any] = (-1, None)  # step and averaged weights

    def plan(self, total: int) -> str:
        """The example's cosine over the rest of the run. Its 500 steps of warm-up are cut to a tenth of a short run."""
        rest = max(1, total - self.scheduler.last_epoch)
        warmup = min(500, rest // 10)
        self.scheduler = self.get_scheduler("cosine", self.optimizer, num_warmup_steps=warmup, num_training_steps=rest)
        return f"{self.rate:g}, {warmup} steps of warm-up, cosine"

    def train_step(self) -> None:
        images = self.batch() * 2 - 1
        noise, times = torch.randn_like(images), torch.randint(0, 1000, (len(images),), device=self.device)
        with self.cast():
            predicted = self.network(self.noising["ddpm"].add_noise(images, noise, times), times).sample
        self.optimize(F.mse_loss(predicted.float(), noise))
        self.scheduler.step()
        self.ema.step(self.network.parameters())

    def averaged(self) -> nn.Module:
        """A copy, made anew when training has gone on."""
        if self.copied[0] != self.scheduler.last_epoch:
            network = copy.deepcopy(self.network).eval()
            self.ema.copy_to(network.parameters())
            self.copied = self.scheduler.last_epoch, network
        return self.copied[1]

    @torch.no_grad()
    def draw(self, numbers: range, total: int, sampler: str, steps: int, run: int | None = None) -> Tensor:
        """The loop of DDPMPipeline or DDIMPipeline, of which `run` steps are taken (all by default)."""
        network, noising = self.averaged(), self.noising[sampler]
        noising.set_timesteps(steps)
        x = torch.randn(len(numbers), 1, 28, 28, device=self.device)
        for t in noising.timesteps[:run]:
            with self.cast():
                predicted = network(x, t).sample.float()
            x = noising.step(predicted, t, x).prev_sample
        return x


class DenoisingDiffusion(Peer):
    def __init__(self, args: argparse.Namespace, images: ig.Images, **options: bool) -> None:
        import denoising_diffusion_pytorch.denoising_diffusion_pytorch as library
        from ema_pytorch import EMA
        library.tqdm = lambda steps, **_: steps  # its samplers draw a progress bar for every batch
        network = library.Unet(dim=32, dim_mults=(1, 2, 4), channels=1)
        super().__init__(args, images, library.GaussianDiffusion(network, image_size=28, timesteps=1000), **options)
        self.optimizer = torch.optim.Adam(self.network.parameters(), self.rate, betas=(0.9, 0.99))
        self.ema = EMA(self.network, beta=0.995, update_every=10)

    def plan(self, total: int) -> str:
        return f"{self.rate:g}, constant"

    def train_step(self) -> None:
        with self.cast():
            loss = self.network(self.batch())
        self.optimize(loss)
        self.ema.update()

    @torch.no_grad()
    def draw(self, numbers: range, total: int, sampler: str, steps: int, run: int | None = None) -> Tensor:
        """GaussianDiffusion.sample(); for a part of the 1000 ancestral steps, the loop inside it."""
        diffusion = self.ema.ema_model.eval()
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = steps, sampler == "ddim"
        with self.cast():
            if run is None:
                return diffusion.sample(batch_size=len(numbers)).float() * 2 - 1
            x = torch.randn(len(numbers), 1, 28, 28, device=self.device)
            for t in range(999, 999 - run, -1):
                x, _ = diffusion.p_sample(x, t)
        return x.float()


BF16, BF16_CL = {"bf16": True}, {"bf16": True, "channels_last": True}
CONTESTANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "ours": (Ours, {}), "ours-gan": (Ours, {"family": "gan"}), "ours-vae": (Ours, {"family": "vae"}),
    "ours-float32": (Ours, {"precision": "float32"}),
    "diffusers": (Diffusers, {}), "diffusers-bf16": (Diffusers, BF16), "diffusers-bf16-cl": (Diffusers, BF16_CL),
    "diffusers-small": (Diffusers, {"last": 64}), "diffusers-small-bf16": (Diffusers, {"last": 64, **BF16}),
    "ddp": (DenoisingDiffusion, {}), "ddp-bf16": (DenoisingDiffusion, BF16),
    "ddp-bf16-cl": (DenoisingDiffusion, BF16_CL)}
DEFAULTS = {"train": tuple(name for name in CONTESTANTS if name not in ("ours-gan", "ours-vae")),
            "sample": ("ours", "diffusers", "diffusers-bf16", "ddp", "ddp-bf16-cl"),
            "quality": ("ours", "ours-gan", "ours-vae", "diffusers", "ddp")}
SHARES = [1 / 8, 1 / 4, 1 / 2]  # of the minutes, after which is measured; and at their end
PACKAGES = {Diffusers: ("diffusers",), DenoisingDiffusion: ("denoising_diffusion_pytorch", "ema_pytorch")}

# === measurements ===


def enter(name: str, args: argparse.Namespace, images: ig.Images) -> tuple[Any, dict[str, Any]]:
    """The contestant, and what is recorded of it in every measurement."""
    torch.manual_seed(0)
    kind, options = CONTESTANTS[name]
    one = kind(args, images, **options)
    return one, {"contestant": name, "precision": one.precision, "labels": one.conditioning, "batch": one.batch_size,
                 "parameters": sum(p.numel() for p in one.network.parameters()), "threads": torch.get_num_threads()}


def seconds_of(call: Callable[..., Any], *arguments: Any) -> float:
    """How long the call takes, the accelerator's unfinished work included."""
    started = time.perf_counter()
    call(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def random_images() -> ig.Images:
    """Stand-in for MNIST where only speed counts: no download, and arithmetic takes as long."""
    pixels = torch.randint(0, 256, (4096, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(4096) % 10
    return ig.Images("mnist", pixels, labels, pixels[:1], labels[:1], list("0123456789"), "random pixels")


def measure_training(args: argparse.Namespace) -> dict[str, dict]:
    """Turns of --seconds, --rounds times round: a machine that slows down for a while slows all of them."""
    images, runners, entries = random_images(), {}, {}
    for name in args.only:
        runners[name], entries[name] = enter(name, args, images)
        for _ in range(args.warmup):
            runners[name].train_step()
        entries[name]["rounds"] = []
    for _ in range(args.rounds):
        for name, runner in runners.items():
            spent: list[float] = []
            while len(spent) < 2 or sum(spent) < args.seconds:
                spent.append(seconds_of(runner.train_step))
            entries[name]["rounds"].append(len(spent) * args.batch_size / sum(spent))
            print(f"{name}: {entries[name]['rounds'][-1]:.1f} images/s", file=sys.stderr)
    for entry in entries.values():
        entry["images_per_second"] = statistics.median(entry["rounds"])
        if "ours" in entries:
            ratios = sorted(a / b for a, b in zip(entries["ours"]["rounds"], entry["rounds"], strict=True))
            entry |= {"ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1]}
    return entries


def measure_sampling(args: argparse.Namespace) -> dict[str, dict]:
    """Seconds for --sample_batch images in interleaved rounds; untrained weights, as time does not depend on them."""
    images, jobs, entries = random_images(), {}, {}
    count = args.sample_batch
    for name in args.only:
        runner, common = enter(name, args, images)
        for sampler, steps in runner.samplers:
            run = args.ancestral_steps if args.ancestral_steps < steps == 1000 else None
            note = f"extrapolated from {run} steps" if run else "one round" if steps > 100 else ""
            jobs[f"{name}, {sampler} {steps}"] = runner, sampler, steps, run
            entries[f"{name}, {sampler} {steps}"] = common | {"sampler": sampler, "evaluations": steps, "batch": count,
                                                              "note": note, "rounds": []}
        runner.draw(range(count), count, *runner.samplers[0], 2)  # warm-up
    for turn in range(args.rounds):
        for key, (runner, sampler, steps, run) in jobs.items():
            if turn == 0 or (run or steps) <= 100:
                spent = seconds_of(runner.draw, range(count), count, sampler, steps, run) * steps / (run or steps)
                entries[key]["rounds"].append(spent)
                print(f"{key}: {spent:.2f} s {entries[key]['note']}", file=sys.stderr)
    ours = next((statistics.median(e["rounds"]) for k, e in entries.items() if k.startswith("ours,")), None)
    for entry in entries.values():
        seconds = statistics.median(entry["rounds"])
        entry |= {"seconds_per_image": seconds / count, "seconds_per_batch": seconds,
                  "ms_per_evaluation": 1000 * seconds / count / entry["evaluations"], "ratio": ours and seconds / ours}
    return entries


def train_for(runner: Any, args: argparse.Namespace, title: str, look: Callable[[float], None]) -> dict[str, Any]:
    """Train for wall-clock minutes, the measurement of the speed included; `look` is called with the minutes so far,
    while the clock stands still."""
    budget, step, total, plan, marks = 60 * args.minutes, 0, 0, "", [60 * args.minutes * share for share in args.shares]
    started, probed = time.perf_counter(), 0.0
    with ig.progress(round(budget), title, unit="s") as bar:
        while (elapsed := time.perf_counter() - started) < budget and not (plan and step >= total):
            if marks and plan and elapsed >= marks[0]:
                marks = [mark for mark in marks if mark > elapsed]
                paused = time.perf_counter()
                look(elapsed / 60)
                started += time.perf_counter() - paused
                continue
            if step == 2:
                probed = elapsed  # the first steps pay for set-up
            if not plan and step >= 4 and elapsed >= 0.04 * budget:
                total = step + int(0.98 * (budget - elapsed) * (step - 2) / (elapsed - probed))
                plan = runner.plan(total)
            seconds_of(runner.train_step)
            step += 1
            bar.update(round(elapsed) - bar.n)
    look(elapsed / 60)
    unit = 2 ** 20 if sys.platform.startswith("linux") else 2 ** 30
    return {"minutes": elapsed / 60, "steps": f"{step} of {total} planned", "schedule": plan,
            "images_seen": step * runner.batch_size, "images_per_second": step * runner.batch_size / elapsed,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def draw_all(runner: Any, args: argparse.Namespace, title: str) -> tuple[Tensor, float]:
    """--samples images as uint8, and the seconds that they took. The random numbers of training stay as they are."""
    (sampler, steps), started, parts = runner.samplers[-1], time.perf_counter(), []
    with ig.progress(args.samples, title, unit="image") as bar, torch.random.fork_rng():
        for first in range(0, args.samples, 50):  # more at once no longer fit a processor's cache: half as fast
            numbers = range(first, min(first + 50, args.samples))
            parts.append(runner.draw(numbers, args.samples, sampler, steps).cpu())
            bar.update(len(numbers))
    drawn = torch.cat(parts)
    if not torch.isfinite(drawn).all():
        raise ig.UserError(f"{title}: its samples are not finite numbers, the training diverged")
    return ig.to_uint8(drawn), time.perf_counter() - started


def measure_quality(args: argparse.Namespace) -> dict[str, dict]:
    """One contestant: train on MNIST from scratch, draw, compare with test images; beside it real training images."""
    name, images = args.only[0], ig.load_images(ig.DataOptions("mnist", args.data_root))
    net = ig.classifier_net(args.classifier, ig.pick_device(args.device), images.info())
    reference = net(images.test[ig.some_rows(images.test, args.samples)])
    floors, _ = ig.measure(net(images.train[ig.some_rows(images.train, args.samples)]), reference, net, quick=True)
    runner, entry = enter(name, args, images)
    curve: list[dict[str, Any]] = []
    last: list[Any] = []  # samples, and the seconds of drawing them

    def look(minutes: float) -> None:
        last[:] = draw_all(runner, args, f"{name}: drawing after {minutes:.2f} minutes")
        values, reasons = ig.measure(net(last[0]), reference, net, quick=True)
        if reasons:
            raise ig.UserError(f"--samples {args.samples}: {next(iter(reasons.values()))}", 2)
        curve.append({"minutes": minutes} | {key: values[f"{key}_{net.name}"] for key in ("fid", "is", "kid")})
        print(f"{name}: FID {curve[-1]['fid']:.2f} after {minutes:.2f} minutes", file=sys.stderr)

    entry |= train_for(runner, args, name, look)
    entry |= curve[-1] | {f"{key}_floor": floors[f"{key}_{net.name}"] for key in ("fid", "is", "kid")}
    levels = {"to_10": 10.0, "to_5": 5.0, "to_2_floors": 2 * entry["fid_floor"]}
    entry |= {key: next((f"{point['minutes']:.1f}" for point in curve if point["fid"] <= level), "not reached")
              for key, level in levels.items()}
    rate = f" at {args.peer_learning_rate:g}" if args.peer_learning_rate and isinstance(runner, Peer) else ""
    ig.grid_image(last[0][:64], args.out.with_name(f"{args.out.stem}_{name}{rate.replace(' ', '_')}.png"),
                  f"{name}{rate}, {args.minutes:g} minutes")
    sampler, steps = runner.samplers[-1]
    return {name + rate: entry | {
        "curve": curve, "sampler": sampler, "evaluations": steps, "samples": args.samples, "reference": "test images",
        "feature_net": net.name, "feature_net_sha256": net.digest,
        "images_per_second_drawn": args.samples / last[1]}}


def draw_quality(entries: dict[str, dict], path: Path) -> None:
    """FID against minutes, a line for each contestant; real data below."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, entry in entries.items():
        axis.plot([p["minutes"] for p in entry["curve"]], [p["fid"] for p in entry["curve"]], marker="o", label=name)
    for (samples, floor), style in zip(sorted({(e["samples"], e["fid_floor"]) for e in entries.values()}),
                                       itertools.cycle((":", "--", "-.")), strict=False):  # fewer samples: higher
        axis.axhline(floor, color="black", ls=style, label=f"{samples:,} real training images {floor:.2f}")
    axis.set(xscale="log", yscale="log", xlabel="minutes of training", ylabel="FID by the features of mnist_cnn",
             title="MNIST from scratch: FID against wall-clock time")
    for level in ("major", "minor"):  # 2, not 2 x 10^0
        getattr(axis.xaxis, f"set_{level}_formatter")(FormatStrFormatter("%g"))
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    with ig.replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


# === records ===

COMMON = (("contestant", "contestant", ""), ("precision", "precision", ""), ("parameters", "parameters", ","),
          ("threads", "threads", ""), ("batch", "batch", ""))
COLUMNS = {  # of the Markdown tables: title, key of the entry, format
    "train": (("images/s", "images_per_second", ".1f"), ("ours is faster by", "ratio", ".2f"),
              ("in the worst round", "ratio_min", ".2f"), ("in the best round", "ratio_max", ".2f")),
    "sample": (("sampler", "sampler", ""), ("evaluations", "evaluations", ""), ("s/batch", "seconds_per_batch", ".2f"),
               ("s/image", "seconds_per_image", ".4f"), ("ms/image and evaluation", "ms_per_evaluation", ".2f"),
               ("ours is faster by", "ratio", ".1f"), ("note", "note", "")),
    "quality": (("labels", "labels", ""), ("minutes", "minutes", ".1f"), ("steps", "steps", ""),
                ("learning rate", "schedule", ""), ("sampler", "sampler", ""), ("evaluations", "evaluations", ""),
                ("samples", "samples", ","), ("FID of mnist_cnn", "fid", ".2f"), ("real", "fid_floor", ".2f"),
                ("minutes to FID 10", "to_10", ""), ("to 5", "to_5", ""), ("to 2 x real", "to_2_floors", ""),
                ("IS", "is", ".2f"), ("real", "is_floor", ".2f"), ("drawn images/s", "images_per_second_drawn", ".1f"),
                ("peak GiB", "peak_gib", ".2f"))}


def markdown(results: dict[str, Any]) -> str:
    lines = ["# image_gen.py beside its peers", "", ", ".join(map(str, results["machine"].values())), ""]
    for what in [key for key in COLUMNS if key in results]:
        columns = COMMON + COLUMNS[what]
        lines += [f"## {what}", "", *("| " + " | ".join(cells) + " |" for cells in (
            [title for title, _, _ in columns], ["---"] * len(columns),
            *(["-" if e.get(k) is None else format(e[k], spec) for _, k, spec in columns]
              for e in results[what].values()))), ""]
    return "\n".join(lines)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What runs must share for their figures to be compared."""
    cpu, device = platform.processor() or platform.machine(), ig.pick_device(args.device)
    with contextlib.suppress(OSError):
        cpu = next((line.split(": ")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": f"{os.cpu_count()} cores", "system": platform.system(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}


def provenance() -> dict[str, Any]:
    """Date, versions, and the command line without the folders of this machine."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "diffusers", "denoising-diffusion-pytorch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *words])
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "versions": versions, "command": command,
            "load_average": os.getloadavg()[0]}


def load_results(args: argparse.Namespace) -> dict[str, Any]:
    """Earlier results to add to, if they come from this machine."""
    fresh = {"benchmark": "image_gen_peers", "machine": machine(args)}
    try:
        results = json.loads(args.out.read_text()) if args.out.exists() else fresh
        if results["machine"] != fresh["machine"]:
            raise ig.UserError(f"{args.out} was measured on another machine or device: name another file with --out")
    except (OSError, ValueError, KeyError, TypeError):
        raise ig.UserError(f"{args.out} holds no results of this benchmark: name another file with --out") from None
    return results


# === command line ===


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", required=True, choices=tuple(DEFAULTS))
    parser.add_argument("--only", help=f"contestants, separated by commas: {', '.join(CONTESTANTS)}")
    for name, default, kind, text in (
            ("batch_size", None, ig.number(int, 1), "images per training step; for speed 64, for quality each its own"),
            ("rounds", 5, ig.number(int, 1), "turns of every contestant"),
            ("seconds", 10.0, ig.number(float, 0), "train: length of a turn, at least two steps"),
            ("warmup", 3, ig.number(int, 0), "train: steps before the first turn"),
            ("sample_batch", 16, ig.number(int, 1), "sample: images drawn at once"),
            ("ancestral_steps", 1000, ig.number(int, 1, 1000), "sample: run only so many of the peers' 1000 steps"),
            ("minutes", 10.0, ig.number(float, 0, open_low=True), "quality: wall-clock minutes of training"),
            ("samples", 2000, ig.number(int, 2, 10_000), "quality: images drawn, and test images beside them"),
            ("looks", 4, ig.number(int, 1, 4), "quality: the last so many of the four measurements of each"),
            ("peer_evaluations", 50, ig.number(int, 2, 1000), "evaluations of the peers' DDIM"),
            ("peer_learning_rate", None, ig.number(float, 0, open_low=True), "quality: instead of the peers' own 1e-4"),
            ("threads", 2, ig.number(int, 1), "of PyTorch"),
            ("device", "cpu", str, "auto, cpu, cuda, cuda:N"),
            ("data_root", None, Path, "quality: folder with MNIST/raw, instead of downloading to image_gen/data"),
            ("classifier", HERE.parent / "image_gen/pretrained/classifier_mnist.pt", Path, "quality: feature net"),
            ("out", HERE / "results/image_gen_peers.json", Path, "results")):
        parser.add_argument(f"--{name}", default=default, type=kind, help=f"{text} (default {default})")
    args = parser.parse_args(argv)
    if args.what != "quality":
        args.batch_size = args.batch_size or 64
    return args


def check(args: argparse.Namespace) -> None:
    """Find what would stop the run before it starts."""
    args.only, args.shares = args.only.split(",") if args.only else list(DEFAULTS[args.what]), SHARES[4 - args.looks:]
    for name in args.only:
        if name not in CONTESTANTS:
            raise ig.UserError(f"--only {name}: the contestants are {', '.join(CONTESTANTS)}", 2)
        for package in PACKAGES.get(CONTESTANTS[name][0], ()):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ig.UserError(f"{name} needs the package {package} ({error}): pip install -r "
                                   "benchmarks/requirements.txt") from None
    if args.what == "quality" and not args.classifier.is_file():
        raise ig.UserError(f"no classifier at {args.classifier}: name one with --classifier")
    args.out = args.out.resolve()
    ig.results_folder(args.out.parent)
    load_results(args)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        check(args)
        torch.set_num_threads(args.threads)
        if args.what == "quality" and len(args.only) > 1:  # one process each: own memory, own threads
            words = sys.argv[1:] if argv is None else argv
            codes = (subprocess.call([sys.executable, __file__, *words, "--only", name]) for name in args.only)
            return next((code for code in codes if code), 0)
        measure = {"train": measure_training, "sample": measure_sampling, "quality": measure_quality}[args.what]
        run = provenance()
        entries = {key: entry | {"run": run} for key, entry in measure(args).items()}
        results = load_results(args)  # not earlier: another process may have added to them
        results[args.what] = entries if args.what == "train" else results.get(args.what, {}) | entries
        ig.write_json(args.out, results)
        with ig.replacing(args.out.with_suffix(".md")) as part:
            part.write_text(markdown(results))
        if args.what == "quality":
            curves = {name: entry for name, entry in results["quality"].items() if "curve" in entry}
            draw_quality(curves, args.out.with_name(f"{args.out.stem}_quality.png"))
        print(f"{markdown(results)}\n-> {args.out}, {args.out.with_suffix('.md').name}")
        return 0
    except ig.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
