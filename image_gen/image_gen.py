#!/usr/bin/env python3
"""Train, sample and honestly measure small generative models of images: one file, no framework.

    python image_gen.py                                         train a diffusion model on MNIST
    python image_gen.py --mode infer --num_samples 16           draw digits (shipped weights if none were trained yet)
    python image_gen.py --mode evaluate                         FID, IS, KID, precision, recall ... beside their floors

Read top to bottom; `grep '^# ===' image_gen.py` prints the table of contents. First what the models are told and what
they have in common, then one chapter for each, from the simplest on; then data sets, metrics, figures; last, and alike
in both scripts of this project, the machine room: trainer, checkpoints, command line.

Letters for shapes: B batch, C channels, H W height and width, N images, D features, K classes, E embedding width.
Images are float in [-1, 1] inside the models and uint8 in [0, 255] outside of them.

References
    [Ho20]     Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020
    [Song21]   Song, Meng, Ermon: Denoising Diffusion Implicit Models, 2021
    [HoSal22]  Ho, Salimans: Classifier-Free Diffusion Guidance, 2022
    [Karras22] Karras, Aittala, Aila, Laine: Elucidating the Design Space of Diffusion-Based Generative Models, 2022
    [Lu22]     Lu et al.: DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, 2022
    [Lipman23] Lipman et al.: Flow Matching for Generative Modeling, 2023
    [Jordan24] Jordan et al.: Muon: An Optimizer for Hidden Layers in Neural Networks, 2024
    [Song23]   Song, Dhariwal, Chen, Sutskever: Consistency Models, 2023
    [Geng24]   Geng, Pokle, Luo, Lin, Kolter: Consistency Models Made Easy, 2024
    [Karras24] Karras et al.: Guiding a Diffusion Model with a Bad Version of Itself, 2024
    [Esser24]  Esser et al.: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024
    [Burda16]  Burda, Grosse, Salakhutdinov: Importance Weighted Autoencoders, 2016
    [Kingma14] Kingma, Welling: Auto-Encoding Variational Bayes, 2014
    [Higgins17] Higgins et al.: beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework, 2017
    [Rybkin21] Rybkin, Daniilidis, Levine: Simple and Effective VAE Training with Calibrated Decoders, 2021
    [Theis16]  Theis, van den Oord, Bethge: A Note on the Evaluation of Generative Models, 2016
    [Good14]   Goodfellow et al.: Generative Adversarial Networks, 2014
    [Mesch18]  Mescheder, Geiger, Nowozin: Which Training Methods for GANs do actually Converge? (R1, R2), 2018
    [Miyato18] Miyato, Koyama: cGANs with Projection Discriminator, 2018
    [Huang24]  Huang et al.: The GAN is Dead; Long Live the GAN! A Modern GAN Baseline (R3GAN), 2024
    [Heusel17] Heusel et al.: GANs Trained by a Two Time-Scale Update Rule (FID), 2017
    [Salim16]  Salimans et al.: Improved Techniques for Training GANs (Inception Score), 2016
    [Bink18]   Binkowski et al.: Demystifying MMD GANs (KID), 2018
    [Kynk19]   Kynkaanniemi et al.: Improved Precision and Recall Metric for Assessing Generative Models, 2019
"""
from __future__ import annotations

import abc
import argparse
import collections
import contextlib
import dataclasses
import datetime
import difflib
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# === options ===


class UserError(Exception):
    """Something the user can mend. Printed as one line without a traceback; `code` is the exit status."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(" ".join(message.splitlines()))  # what it quotes may hold line breaks
        self.code = code


def option(default: Any, group: str, text: str, kind: Any = None, choices: Sequence[str] = (),
           nargs: Any = None) -> Any:
    """A dataclass field that is also a command-line flag: the only place where its default and help stand."""
    return field(default=default, metadata={"group": group, "help": text, "type": kind, "choices": choices,
                                            "nargs": nargs})


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], Any]:
    """An argparse type: an int or float in [low, high], or (low, high] with `open_low`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            float(value)  # an int of 400 digits is not a usable number either
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n' * (kind is int)} {kind.__name__}") from None
        if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
            limit = f"{'above' if open_low else 'at least'} {low:g}" + f" and at most {high:,.12g}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {limit}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """Flags from dataclass fields that `option` made; only those that were given appear in the result."""

    def __init__(self, fields: Iterable[dataclasses.Field], **more: Any) -> None:
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, formatter_class=lambda prog: (
            argparse.HelpFormatter(prog, max_help_position=30, width=110)), **more)
        groups: dict[str, Any] = {}
        for f in fields:
            name, how = f.metadata["group"], {k: f.metadata[k] for k in ("type", "choices", "nargs") if f.metadata[k]}
            if isinstance(f.default, bool):
                how = {"action": argparse.BooleanOptionalAction if f.default else "store_true"}
            text = f.metadata["help"] + ("" if f.default is None or f.default is False else f" (default: {f.default})")
            groups[name] = groups.get(name) or self.add_argument_group(name)
            groups[name].add_argument(f"--{f.name}", help=text.replace("%", "%%"), **how)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message} (--help lists all flags)", 2)


# === data ===


@dataclass(frozen=True)
class DataInfo:
    """What a model must know of its data; stored in every checkpoint."""
    dataset: str
    title: str  # for figures and messages
    channels: int
    image_size: int
    classes: list[str]  # of one name where there are no classes
    class_counts: list[int]  # in the training set
    train_images: int


class Batch(NamedTuple):
    images: Tensor  # [B C H W] in [-1, 1]
    labels: Tensor  # [B] int64
    draw: Draw
    progress: float = 1.0  # share of the run that is done


def seed32(*numbers: int) -> int:
    """Mix integers into one 32-bit seed. (torch's CPU generator uses only the low 32 bits of a seed, so that
    plain sums or shifts would make streams collide.)"""
    return int(np.random.SeedSequence([n & 0xFFFFFFFFFFFFFFFF for n in numbers]).generate_state(1)[0])


class Draw:
    """The random numbers of one training step. They depend on (seed, step) alone and are drawn for the whole batch,
    of which each process keeps its rows: any number of processes sees the same noise, and a resumed run needs
    no generator state beyond the step."""

    def __init__(self, seed: int, step: int, total: int, rows: slice, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed32(seed, step))
        self.total, self.rows, self.device = total, rows, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.total, *shape, generator=self.generator)[self.rows].to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.total, *shape, generator=self.generator)[self.rows].to(self.device)


class Noise:
    """Noise for a list of sample numbers: sample i of seed s gets the same numbers in a batch of any size."""

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed32(seed, int(i), 1)) for i in indices]
        self.device = device

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, *shape: int) -> Tensor:
        """[B *shape] from N(0, 1); each call goes on where the last one ended."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float [-1, 1]"""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], rounded to the nearest level as a saved picture is"""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


# === what models have in common ===


@dataclass(frozen=True)
class RunConfig:
    """Options of every family: `sampling` may be changed at any time, the other groups are fixed by training."""
    epochs: int = option(20, "optimisation", "passes over the training set", number(int, 1))
    batch_size: int = option(64, "optimisation", "images per step, over all processes", number(int, 1))
    learning_rate: float = option(1e-3, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    weight_decay: float = option(0.01, "optimisation", "of AdamW", number(float, 0))
    warmup_steps: int = option(200, "optimisation", "steps of linear warm-up", number(int, 0))
    decay_fraction: float = option(0.6, "optimisation", "last share of the run: the rate falls", number(float, 0, 1))
    ema_decay: float = option(0.999, "optimisation", "of the average of the weights", number(float, 0, 0.999999))
    grad_clip: float = option(1.0, "optimisation", "largest norm of a gradient", number(float, 0, open_low=True))
    save_every: int = option(500, "optimisation", "steps between checkpoints inside an epoch", number(int, 1))
    flip: str = option("auto", "optimisation", "mirror images at random; auto: CIFAR", choices=("auto", "on", "off"))
    seed: int = option(0, "run", "seed of everything random", number(int, 0, 2 ** 63 - 1))

    def rate(self, step: int, total: int) -> float:
        """Share of the learning rate: linear warm-up, a plateau, linear decay to zero at the end of the run."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return min(warm, max(0.0, (total - step) / total / self.decay_fraction) if self.decay_fraction else 1.0)


class Family(nn.Module, abc.ABC):
    """What the machine room knows of a model; nothing else asks what it is. `config_class` is the frozen dataclass of a
    family's options, `options` names the dataclass of what each mode can be told beside."""
    config_class: type
    options: dict[str, type]
    data_options: dict[str, type]  # the same of its data
    remembered: tuple[str, ...] = ()  # of these, what a look at a trained model takes from its run
    results_folder = ""  # below results/
    can_sample = True  # whether it is what --mode infer and evaluate take unless told otherwise
    descends = True  # whether the loss is to fall: if so, one that explodes stops the run
    held_out_count = 1000  # held-out examples that are looked at after each epoch
    betas = (0.9, 0.99)  # AdamW's memory of gradients and of their squares
    fixed: dict[str, tuple] = {}  # options that are gone, and the values that a file which has them may hold
    older: dict[str, Any] = {}  # options that are new, and what a file without them means

    def __init__(self, config: Any, data: DataInfo) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.precision = torch.float32

    @classmethod
    def file_name(cls, _data: DataInfo | None) -> str:
        """Of its checkpoint in models/; a pattern for all of them where the data are not known."""
        return FILE_NAME.format(family_name(cls))

    def cast(self) -> Any:
        """The autocast region of the forward passes, in the precision that the run has chosen."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision is torch.bfloat16)

    def players(self) -> dict[str, nn.Module]:
        """Sub-modules that have an optimizer of their own."""
        return {"model": self}

    def optimizer(self, player: nn.Module) -> torch.optim.Optimizer:
        config, fused = self.config, next(player.parameters()).device.type != "mps"
        return torch.optim.AdamW(player.parameters(), config.learning_rate, self.betas, fused=fused,
                                 weight_decay=config.weight_decay)

    def prepare(self, data: Any, device: torch.device) -> None:
        """Take statistics of the training data, which live in the checkpoint from then on."""

    @abc.abstractmethod
    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yield (player, loss, statistics); the trainer steps that player before it asks for the next."""

    def validate(self, batch: Batch) -> dict[str, float]:
        """Figures on held-out data; {} where the family has none."""
        return {}

    def warnings(self, figures: dict[str, Any]) -> list[str]:
        """What the figures of an epoch (means of statistics, metrics) say against the run, a line each."""
        return []

    def describe_sampling(self) -> dict[str, Any]:
        """How samples are made, for figures and records."""
        return {}


class ImageModel(Family):
    """What is particular to images: a family that `can_sample` draws them, for given classes where it is `labelled`."""
    labelled = True
    panel_every = 10  # epochs between pictures of samples (always after the first, the fifth and the last)
    measures_held_out = False  # whether `validate` measures the model itself: --mode evaluate asks it as well

    def __init__(self, config: Any, data: DataInfo) -> None:
        super().__init__(config, data)
        self.labelled = self.labelled and len(data.classes) > 1

    def sample(self, labels: Tensor | None, noise: Noise) -> Tensor:
        """Draw images [B C H W] in [-1, 1], one for each item of `noise`."""
        raise UserError(f"a {type(self).__name__} draws no images: use --model {' or '.join(SUBJECT.preferred)}", 2)

    def more_figures(self, images: Images, device: torch.device) -> dict[str, dict[str, Any]]:
        """What only --mode evaluate asks, as entries of evaluation.json."""
        return {}


# === classifier ===
# The judge before the artists: the simplest family, and the one through whose eyes the others are measured.


@dataclass(frozen=True)
class ClassifierConfig(RunConfig):
    epochs: int = option(8, "optimisation", "passes over the training set", number(int, 1))
    learning_rate: float = option(2e-3, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    width: int = option(32, "model", "channels of the first convolutions, a multiple of 8", number(int, 8, 1024))
    features: int = option(128, "model", "width of the layer that the metrics look at", number(int, 2, 4096))

    def __post_init__(self) -> None:
        if self.width % 8:
            raise UserError(f"--width {self.width}: must be a multiple of 8", 2)


class Classifier(ImageModel):
    """Its last hidden layer is the feature space of `fid_<dataset>_cnn` and the other metrics that carry `_cnn` in
    their name. Group norm and no dropout: the same losses on any number of processes."""
    config_class = ClassifierConfig
    results_folder = "classifier"
    can_sample = False
    measures_held_out, held_out_count = True, 10_000

    def __init__(self, config: ClassifierConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        if len(data.classes) < 2:
            raise UserError(f"a classifier needs two or more classes, {data.title} has one: use sub-folders")
        w, size = config.width, data.image_size

        def convolution(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU())

        pool = [2 if size >= 8 else 1, 2 if size >= 16 else 1]  # keep at least 4x4 positions
        size = size // pool[0] // pool[1]
        self.body = nn.Sequential(
            convolution(data.channels, w), convolution(w, w), nn.MaxPool2d(pool[0]),
            convolution(w, 2 * w), convolution(2 * w, 2 * w), nn.MaxPool2d(pool[1]),
            convolution(2 * w, 4 * w), nn.Flatten(), nn.Linear(4 * w * size * size, config.features), nn.ReLU())
        self.head = nn.Linear(config.features, len(data.classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B C H W] in [-1, 1] -> features [B D], logits [B K]"""
        features = self.body(x)
        return features, self.head(features)

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Cross-entropy on images that are turned, scaled and shifted a little at random."""
        angle, scale, shift_x, shift_y = ((batch.draw.uniform(4) * 2 - 1) *
                                          batch.images.new_tensor([0.175, 0.15, 0.12, 0.12])).unbind(1)
        cos, sin = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
        affine = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], 1).view(-1, 2, 3)
        grid = F.affine_grid(affine, list(batch.images.shape), align_corners=False)
        x = F.grid_sample(batch.images + 1, grid, align_corners=False) - 1  # outside is -1, black
        with self.cast():
            _, logits = self(x.contiguous(memory_format=torch.channels_last))
        logits = logits.float()
        yield "model", F.cross_entropy(logits, batch.labels), {
            "accuracy": (logits.detach().argmax(1) == batch.labels).float().mean()}

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        _, logits = self(batch.images)
        return {"val_loss": F.cross_entropy(logits, batch.labels).item(),
                "val_accuracy": (logits.argmax(1) == batch.labels).float().mean().item()}

    @classmethod
    def file_name(cls, data: DataInfo | None) -> str:
        """By the identity of its data, as those of two folders must not be taken for one another."""
        if data is None or data.dataset != "folder":
            return f"classifier_{data.dataset if data else '*'}.pt"
        known = json.dumps([data.classes, data.channels, data.image_size])
        slug = re.sub(r"[^a-z0-9]+", "-", data.title.lower()).strip("-") or "folder"
        return f"classifier_{slug[:40]}_{hashlib.sha256(known.encode()).hexdigest()[:8]}.pt"


# === diffusion ===

TIMESTEPS = 1000
HUBER = 0.03  # where the consistency loss turns from squared to absolute


class PositionalEncoding(nn.Module):
    """Sinusoidal embedding of diffusion times: [B] in 1..1000 -> [B E], sines then cosines ([Ho20] appendix B)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.arange(width // 2) * (-math.log(10_000) / (width // 2))),
                             persistent=False)

    def forward(self, times: Tensor) -> Tensor:
        angles = times.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def settled(x: Tensor) -> Tensor:
    """Grey pixels [B 1 H W] within 16 levels of black or white are means over images that mostly have just that."""
    return torch.where(x.abs() > 0.875, x.sign(), x) if x.shape[1] == 1 else x


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 16, channels)


def zeroed(layer: nn.Module) -> nn.Module:
    """Start a residual branch at nothing, so that the network begins as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, around a shortcut; the embedding is added between the two ([Ho20])."""

    def __init__(self, inputs: int, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(inputs), group_norm(channels)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.conv2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.embed = nn.Linear(embedding, channels)
        self.shortcut = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.embed(embedding)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions of a feature map, heads of 48 to 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(max(1, channels // 48), 0, -1) if channels % heads == 0)
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # each [B heads HW C/heads]; PyTorch's fused attention trains slower on a CPU, but keeps no weights HW x HW
        mixed = F.scaled_dot_product_attention(q, k, v) if h * w > 1024 else \
            (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2))


class Muon(torch.optim.AdamW):
    """AdamW, but the weights in `matrices` (convolutions and linear layers, flattened to 2-D) move by their
    orthogonalised momentum [Jordan24]. torch.optim.Muon has no AdamW beside it and takes 2-D parameters only."""

    def __init__(self, matrices: Sequence[Tensor], others: Sequence[Tensor], rate: float, **adamw: Any) -> None:
        if not all(self._flat(p).data_ptr() == p.data_ptr() for p in matrices):
            raise ValueError("Muon moves convolutions in channels_last order only")
        super().__init__([{"params": others}], **adamw)
        self.add_param_group({"params": matrices, "lr": rate, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group, alike = self.param_groups[1], {}  # matrices of one shape are multiplied at once
        for p in (p for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            nesterov, p.grad = p.grad.lerp(state["momentum"], group["momentum"]), None  # so that AdamW skips it
            alike.setdefault(p.flatten(1).shape, []).append((p, nesterov))
        for (rows, columns), pairs in alike.items():
            # channels_last: the 2-D form in this order is a view; the order of columns means nothing to Muon
            moves = orthogonal(torch.stack([self._flat(gradient) for _, gradient in pairs])).float()
            for (p, _), move in zip(pairs, moves, strict=True):
                self._flat(p).mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                    move, alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)
        return super().step(closure)

    @staticmethod
    def _flat(p: Tensor) -> Tensor:
        return p.permute(0, 2, 3, 1).reshape(len(p), -1) if p.ndim == 4 else p


def orthogonal(x: Tensor) -> Tensor:
    """[N R C] -> roughly the nearest semi-orthogonal matrices: Newton-Schulz in bfloat16 ([Jordan24]), but three steps
    with factors of their own: singular values from 1/200 of the norm on come to 0.5..1.5, smaller ones stay small."""
    tall = x.shape[1] > x.shape[2]
    x = F.normalize((x.mT if tall else x).bfloat16(), dim=(1, 2), eps=1e-7)
    for a, b, c in (7.8645, -23.0414, 17.0341), (3.8846, -3.1396, 0.6601), (3.2183, -2.4803, 0.5567):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class NoiseSchedule:
    """x_t = alpha_t * image + sigma_t * noise for t = 0..1000 (float64 [1001]): the straight line from image to noise
    of [Lipman23], but for a trace of signal (alpha = 0.001) that keeps sigma / alpha finite at its end."""

    def __init__(self) -> None:
        t = torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
        self.alphas, self.sigmas = 1 - 0.999 * t, 0.999 * t

    def times(self, steps: int, sigma_max: float = 80.0, sigma_min: float = 0.1, rho: float = 7.0) -> list[int]:
        """Decreasing timesteps, the last one above 0: evenly spaced in (sigma/alpha)^(1/rho) as in [Karras22] eq. 5,
        rounded to the grid; fewer than `steps` where rounding makes two of them meet."""
        ratio = self.sigmas / self.alphas
        high, low = (min(max(s, ratio[1].item()), ratio[-1].item()) ** (1 / rho) for s in (sigma_max, sigma_min))
        wanted = torch.linspace(high, low, steps, dtype=torch.float64) ** rho
        grid = torch.searchsorted(ratio, wanted * (1 - 1e-9)).clamp(1, TIMESTEPS)
        return sorted(set(grid.tolist()), reverse=True)


# A sampler is a pure function of (denoise, x, times, schedule, noise): `denoise(x, t)` estimates the clean image
# [B C H W] from x at timestep t, `x` is x_t at the first of `times`, which decrease and are followed by t = 0.
Denoiser = Callable[[Tensor, int], Tensor]


def sample_ddim(denoise: Denoiser, x: Tensor, times: Sequence[int], schedule: NoiseSchedule,
                _noise: Noise | None = None) -> Tensor:
    """Deterministic: keep the predicted noise, change its amount ([Song21] eq. 12 with zero variance)."""
    for t, s in zip(times, [*times[1:], 0], strict=True):
        (alpha_t, alpha_s), (sigma_t, sigma_s) = schedule.alphas[[t, s]].tolist(), schedule.sigmas[[t, s]].tolist()
        image = denoise(x, t)
        x = alpha_s * image + sigma_s * ((x - alpha_t * image) / sigma_t)
    return x


def sample_dpm(denoise: Denoiser, x: Tensor, times: Sequence[int], schedule: NoiseSchedule,
               _noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(2M): second order from one evaluation a step, by the denoised image of the step before
    ([Lu22] algorithm 2); the first and the last step are of first order."""
    logsnr = (schedule.alphas / schedule.sigmas.clamp(min=1e-12)).log()
    previous, previous_h = None, 0.0
    for t, s in zip(times, [*times[1:], 0], strict=True):
        alpha_s, sigma_t, sigma_s = (v.item() for v in (schedule.alphas[s], schedule.sigmas[t], schedule.sigmas[s]))
        h = (logsnr[s] - logsnr[t]).item()
        image = estimate = denoise(x, t)
        if previous is not None and s:
            ratio = h / (2 * previous_h)
            estimate = (1 + ratio) * image - ratio * previous
        x = sigma_s / sigma_t * x - alpha_s * math.expm1(-h) * estimate
        previous, previous_h = image, h
    return x


def sample_consistency(denoise: Denoiser, x: Tensor, times: Sequence[int], schedule: NoiseSchedule,
                       noise: Noise) -> Tensor:
    """Estimate the image, add fresh noise of the next level, and again ([Song23] algorithm 1)."""
    for t, s in zip(times, [*times[1:], 0], strict=True):
        x = denoise(x, t)
        if s:
            x = schedule.alphas[s].item() * x + schedule.sigmas[s].item() * noise.normal(*x.shape[1:])
    return x


SAMPLERS = {"ddim": sample_ddim, "dpm++": sample_dpm, "consistency": sample_consistency}


DIFFUSION_RECIPES = {  # what suits each objective, flow and consistency, where the user does not say
    "epochs": (2, 4), "batch_size": (48, 64), "learning_rate": (2e-3, 1e-3), "muon_rate": (0.02, 0.01),
    "weight_decay": (0.01, 0.0), "warmup_steps": (50, 20), "steps": (8, 2), "sampler": ("dpm++", "consistency"),
    "contrast": (0.3, 0.0)}
OBJECTIVES = ("flow", "consistency")


def recipe(name: str, group: str, text: str, kind: Any = None, choices: Sequence[str] = ()) -> Any:
    """An `option` whose default depends on --objective."""
    return option(None, group, text + " (default: {}; consistency: {})".format(*DIFFUSION_RECIPES[name]), kind, choices)


@dataclass(frozen=True)
class DiffusionConfig(RunConfig):
    objective: str = option("flow", "model", "flow [Lipman23], or consistency: few steps, learned from --init [Song23]",
                            choices=OBJECTIVES)
    init: str | None = option(None, "model", "checkpoint of a diffusion model to start from", os.path.abspath)
    epochs: int | None = recipe("epochs", "optimisation", "passes over the training set", number(int, 1))
    batch_size: int | None = recipe("batch_size", "optimisation", "images per step, over all processes", number(int, 1))
    learning_rate: float | None = recipe("learning_rate", "optimisation", "peak rate of AdamW, for embeddings, norms, "
                                         "first and last layer", number(float, 0, open_low=True))
    muon_rate: float | None = recipe("muon_rate", "optimisation", "peak rate of Muon [Jordan24], for all other layers",
                                     number(float, 0, open_low=True))
    weight_decay: float | None = recipe("weight_decay", "optimisation", "of both", number(float, 0))
    warmup_steps: int | None = recipe("warmup_steps", "optimisation", "steps of linear warm-up", number(int, 0))
    decay_fraction: float = option(1.0, "optimisation", "last share of the run: the rate falls", number(float, 0, 1))
    channels: int = option(64, "model", "width at the highest resolution, a multiple of 16", number(int, 16, 1024))
    levels: int = option(2, "model", "resolutions; the width doubles at each", number(int, 1, 5))
    blocks: int = option(2, "model", "residual blocks per level, each way", number(int, 1, 16))
    label_dropout: float = option(0.03, "model", "share of labels that are hidden, for guidance", number(float, 0, 1))
    teacher_guidance: float | None = option(None, "model", "guidance that consistency learns (default: --init's)",
                                            number(float, 0, 100))
    sampler: str | None = recipe("sampler", "sampling", "ddim, dpm++ (2M) or consistency", choices=tuple(SAMPLERS))
    steps: int | None = recipe("steps", "sampling", "sampling steps, one evaluation each", number(int, 1, TIMESTEPS))
    guidance: float = option(1.0, "sampling", "classifier-free guidance scale [HoSal22]; 1 is none, other values "
                             "double the work", number(float, 0, 100))
    contrast: float | None = recipe("contrast", "sampling", "guidance away from a normal distribution of each class "
                                    "[Karras24]; costs no evaluation", number(float, 0, 100))
    temperature: float | None = option(None, "sampling", "factor of the starting noise (default: 1 in colour, else "
                                       "0.96; consistency: 1.1)", number(float, 0, 10))

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UserError(f"--objective {self.objective} is no more: use the version of the script that knew it")
        for name, values in DIFFUSION_RECIPES.items():
            if getattr(self, name) in (None, "ddpm", "heun"):  # ddpm, heun: in older files
                object.__setattr__(self, name, values[OBJECTIVES.index(self.objective)])  # the class is frozen
        if (self.sampler == "consistency") != (self.objective == "consistency"):
            raise UserError(f"--sampler {self.sampler} does not draw from a model of --objective {self.objective}", 2)


class FlowModel(Family):
    """A U-Net that predicts the flow noise - picture from x_t, time and class label: network, objective and sampling.

    Works on 2x2 pixel blocks (pixel-unshuffle): half the resolution with four times the channels, which on a CPU is
    several times faster. Deviations from [Ho20]: that door; attention at the lowest level only; no dropout.
    """

    def build(self, planes: int, classes: int) -> None:
        """The network for x [B planes H W], H and W divisible by 2^levels, and 2 or more classes, or without labels"""
        config, embedding, pixels = self.config, 256, 4 * planes
        if config.channels % 16:
            raise UserError(f"--channels {config.channels}: must be a multiple of 16", 2)
        widths = [config.channels * 2 ** level for level in range(config.levels)]
        self.classes = classes if classes > 1 else 0
        self.time = nn.Sequential(PositionalEncoding(config.channels), nn.Linear(config.channels, embedding), nn.SiLU(),
                                  nn.Linear(embedding, embedding))
        self.label = nn.Embedding(self.classes + 1, embedding)  # the last row stands for "no label"

        def blocks(width: int, inputs: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(inputs, width, embedding) for _ in range(config.blocks))

        self.enter = nn.Conv2d(pixels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(blocks(width, width) for width in widths)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.attention = SelfAttention(widths[-1])
        self.middle = ResidualBlock(widths[-1], widths[-1], embedding)
        self.up_blocks = nn.ModuleList(blocks(width, 2 * width) for width in reversed(widths))
        self.ups = nn.ModuleList(nn.Conv2d(b, 4 * a, 1) for b, a in itertools.pairwise(reversed(widths)))
        self.norm = group_norm(widths[0])
        self.leave = zeroed(nn.Conv2d(widths[0], pixels, 3, padding=1))
        self.noise_schedule = NoiseSchedule()
        for name in ("alphas", "sigmas"):
            self.register_buffer(name, getattr(self.noise_schedule, name).float(), persistent=False)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """x_t [B C H W], times [B] in 1..1000, labels [B] in 0..K (K: none) -> the flow, [B C H W]."""
        embedding = F.silu(self.time(times) + self.label(labels))
        h = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)  # [B 4C H/2 W/2]
        h, skips = self.enter(h), []
        for level, level_blocks in enumerate(self.down_blocks):
            if level:
                h = self.downs[level - 1](h)
            for block in level_blocks:
                h = block(h, embedding)
                skips.append(h)
        h = self.middle(self.attention(h), embedding)
        for level, level_blocks in enumerate(self.up_blocks):
            if level:
                h = F.pixel_shuffle(self.ups[level - 1](h), 2).contiguous(memory_format=torch.channels_last)
            for block in level_blocks:
                h = block(torch.cat([h, skips.pop()], 1), embedding)
        return F.pixel_shuffle(self.leave(F.silu(self.norm(h))), 2)

    def optimizer(self, player: nn.Module) -> torch.optim.Optimizer:
        """Muon for what lies between the first and the last layer."""
        self.check_guidance(self.config.guidance)  # before hours are spent
        matrices, others = [], []
        for name, p in self.named_parameters():
            (others if p.ndim < 2 or name.startswith(("enter", "leave", "label")) else matrices).append(p)
        return Muon(matrices, others, self.config.muon_rate, lr=self.config.learning_rate, betas=self.betas,
                    weight_decay=self.config.weight_decay, fused=self.alphas.device.type != "mps")

    def visited_times(self, share: Tensor) -> Tensor:
        """Timesteps 1..1000 at the given quantiles (0..1) of the logit-normal distribution that training visits: more
        of the middle, where there is most to learn ([Esser24]), and of the noisy end, where half of drawing happens."""
        return ((1.2 * torch.special.ndtri(share) + 0.3).sigmoid() * TIMESTEPS).long().clamp(0, TIMESTEPS - 1) + 1

    def noisy(self, pictures: Tensor, times: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """x_t and the flow."""
        noise = draw.normal(*pictures.shape[1:])
        alpha, sigma = (s[times][:, None, None, None] for s in (self.alphas, self.sigmas))
        return alpha * pictures + sigma * noise, noise - pictures

    def some_hidden(self, labels: Tensor, draw: Draw) -> Tensor:
        """Labels [B] of which a share is replaced by "no label"."""
        hidden = draw.uniform() < self.config.label_dropout
        return labels.masked_fill(hidden, self.classes) if self.classes else torch.zeros_like(labels)

    def flow_loss(self, pictures: Tensor, labels: Tensor, draw: Draw) -> Tensor:
        """Mean squared error of the predicted flow ([Lipman23] eq. 23) at random times: one from each of as many equal
        parts as the batch has pictures, for a steadier gradient."""
        parts = torch.arange(draw.total, device=draw.device)[draw.rows]
        times = self.visited_times((parts + draw.uniform()) / draw.total)
        x, flow = self.noisy(pictures, times, draw)
        with self.cast():
            prediction = self(x, times, labels)
        return F.mse_loss(prediction.float(), flow)

    @torch.no_grad()
    def held_out_loss(self, pictures: Tensor, labels: Tensor, draw: Draw) -> dict[str, float]:
        """Over the times that training visits, also by quarter of them (0: cleanest, 3: noisiest)."""
        times = self.visited_times((torch.arange(len(pictures), device=pictures.device) + 0.5) / len(pictures))
        x, flow = self.noisy(pictures, times, draw)
        with self.cast():
            prediction = self(x, times, labels if self.classes else torch.zeros_like(labels))
        errors = (prediction.float() - flow).square().flatten(1).mean(1)
        quarters = {f"t{i}_val_loss": quarter.mean().item() for i, quarter in enumerate(errors.tensor_split(4))
                    if len(quarter)}
        return {"val_loss": errors.mean().item()} | quarters

    def check_guidance(self, scale: float) -> None:
        if self.classes and not self.config.label_dropout and scale != 1:
            raise UserError(f"guidance of {scale} needs training with a --label_dropout above 0: use --guidance 1", 2)

    def guided(self, x: Tensor, times: Tensor, labels: Tensor, scale: float) -> Tensor:
        """The flow, led away from what it would be without label ([HoSal22]); twice the work unless `scale` is 1."""
        self.check_guidance(scale)
        if scale == 1 or not self.classes:
            return self(x, times, labels).float()
        hidden = torch.full_like(labels, self.classes)
        with_label, without = self(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, hidden])).float().chunk(2)
        return without + scale * (with_label - without)

    def denoiser(self, labels: Tensor | None, count: int) -> Denoiser:
        """The function that samplers call: the guided estimate of the clean picture, clipped to [-1, 1]."""
        labels = torch.full((count,), self.classes, device=self.alphas.device) if labels is None or not self.classes \
            else labels

        def denoise(x: Tensor, t: int) -> Tensor:
            flow = self.guided(x, torch.full((count,), t, device=x.device), labels, self.config.guidance)
            alpha, sigma = self.noise_schedule.alphas[t].item(), self.noise_schedule.sigmas[t].item()
            return ((x - sigma * flow) / (alpha + sigma)).clamp(-1, 1)  # both equations, solved for the picture

        return denoise

    def times(self) -> list[int]:
        return self.noise_schedule.times(self.config.steps)

    @torch.no_grad()
    def draw(self, labels: Tensor | None, noise: Noise, shape: Sequence[int],
             watch: Callable[[int, Tensor, Tensor], None] = lambda *_: None) -> Tensor:
        """Pictures of the given shape [C H W]. `watch` is told of each look that the sampler takes: t, x_t and the
        estimate of the picture, [B C H W]."""
        times, denoise = self.times(), self.denoiser(labels, len(noise))

        def watched(x: Tensor, t: int) -> Tensor:
            estimate = denoise(x, t)
            watch(t, x, estimate)
            return estimate

        # but for x_t's trace of signal (alpha is about 0.01); on the straight path sigma is 0.988 there, not 1
        x = self.config.temperature * self.noise_schedule.sigmas[times[0]].item() * noise.normal(*shape)
        with self.cast():
            return SAMPLERS[self.config.sampler](watched, x, times, self.noise_schedule, noise)

    def describe_sampling(self) -> dict[str, Any]:
        steps, guided = len(self.times()), self.classes > 0 and self.config.guidance != 1
        return {"sampler": self.config.sampler, "steps": steps, "guidance": self.config.guidance,
                "temperature": self.config.temperature, "network_evaluations": steps * (1 + guided)}


class DiffusionModel(FlowModel, ImageModel):
    """A `FlowModel` of images, or what consistency tuning made of one."""
    config_class = DiffusionConfig
    fixed = {"schedule": (None, "straight")}
    older = {"muon_rate": 0.0, "contrast": 0.0, "temperature": 1.0}

    def __init__(self, config: DiffusionConfig, data: DataInfo) -> None:
        if config.temperature is None:  # in colour less noise is less light and shade
            usual = 1.0 if data.channels > 1 else 0.96 if config.objective == "flow" else 1.1
            config = dataclasses.replace(config, temperature=usual)
        super().__init__(config, data)
        if data.image_size % 2 ** config.levels:
            raise UserError(f"images of {data.image_size} pixels can't be halved --levels {config.levels} times: "
                            f"use an --image_size divisible by {2 ** config.levels}, or fewer levels", 2)
        self.build(data.channels, len(data.classes))
        pixels = data.channels * data.image_size ** 2
        self.register_buffer("means", torch.zeros(self.classes + 1, pixels))  # of each class; the last: of all
        kept = max(1, min(pixels, 256, 1_000_000 // pixels))  # fewer of large pictures: a file should stay small
        self.register_buffer("axes", torch.zeros(pixels, kept))  # the principal ones within the classes, and
        self.register_buffer("variances", torch.zeros(kept))  # what lies along them

    def prepare(self, data: Any, device: torch.device) -> None:
        """Start from the averaged weights of --init. Take the statistics that --contrast needs."""
        if self.config.init:
            self.load_state_dict(self.teacher().state_dict())
        elif self.config.objective == "consistency":
            raise UserError("--objective consistency tunes a trained diffusion model: name its file with --init", 2)
        labels, sums = data.train_labels, torch.zeros(self.means.shape)
        for rows in torch.arange(len(labels)).split(1000):
            sums.index_add_(0, labels[rows], to_float(data.train[rows]).flatten(1))
        counts = torch.bincount(labels, minlength=len(sums))[:, None]
        means = (sums + sums.sum(0) / len(labels)) / (counts + 1)  # nobody is in the last, for pictures without label
        rows = some_rows(data.train, max(2, min(10_000, 30_000_000 // sums.shape[1])))
        rest = to_float(data.train[rows]).flatten(1) - means[labels[rows]]
        with torch.random.fork_rng():
            _, scales, axes = torch.pca_lowrank(rest, min(*self.axes.shape, len(rest)), center=False)
        self.means.copy_(means)
        self.axes[:, :len(scales)], self.variances[:len(scales)] = axes, scales.square() / len(rest)

    def _load_from_state_dict(self, state: dict, prefix: str, *others: Any) -> None:
        if prefix + "means" not in state and self.config.contrast:
            raise UserError("--contrast: this file is older than it and lacks the statistics: leave it out", 2)
        for name in ("means", "axes", "variances"):
            state.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state, prefix, *others)

    def guided(self, x: Tensor, times: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Led away, too, from the exact flow of a normal distribution of the class: the errors of so much worse a model
        lie on the way of this one's own ([Karras24])."""
        flow = super().guided(x, times, labels, scale)
        if not self.config.contrast or not self.variances.any():
            return flow
        (alpha, sigma), means = (s[times][:, None] for s in (self.alphas, self.sigmas)), self.means[labels]
        gains = alpha * self.variances / (alpha ** 2 * self.variances + sigma ** 2)
        picture = means + (((x.flatten(1) - alpha * means) @ self.axes) * gains) @ self.axes.T
        worse = (x - (alpha + sigma)[:, :, None, None] * picture.view_as(x)) / sigma[:, :, None, None]
        return flow + self.config.contrast * (flow - worse)

    def describe_sampling(self) -> dict[str, Any]:
        return super().describe_sampling() | {"contrast": self.config.contrast}

    def teacher(self) -> DiffusionModel:
        """The frozen model in --init, read when it is needed first; no part of the checkpoint."""
        if not self.__dict__.get("frozen"):

            def about(model: Family, objective: str) -> str:
                size = " ".join(f"--{n} {getattr(model.config, n, '-')}" for n in ("channels", "levels", "blocks"))
                return (f"{family_name(type(model))} model, --objective {objective} {size}, of {model.data.title}, "
                        f"{model.data.image_size} pixels, classes {', '.join(model.data.classes)[:60]}")

            model = restore_model(load_checkpoint(Path(self.config.init)))
            held, needed = about(model, getattr(model.config, "objective", "-")), about(self, "flow")
            if held != needed:
                raise UserError(f"--init {self.config.init} holds a {held}, needed is a {needed}: name another", 2)
            model.precision, asked = self.precision, self.config.teacher_guidance
            model.config = dataclasses.replace(model.config, guidance=model.config.guidance if asked is None else asked)
            self.__dict__["frozen"] = [model.to(self.alphas.device).eval().requires_grad_(False)]  # no sub-module
        return self.frozen[0]

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The flow's, or `consistency_loss`"""
        labels = self.some_hidden(batch.labels, batch.draw)
        yield "model", self.consistency_loss(batch, labels) if self.config.objective == "consistency" else \
            self.flow_loss(batch.images, labels, batch.draw), {}

    def consistency_loss(self, batch: Batch, labels: Tensor) -> Tensor:
        """The network's flow becomes the mean one from t down to 0 ([Song23]; the gap shrinks over the run, [Geng24]):
        the teacher steps from t to r, whence the network's own estimate, held fixed, is the target. Pseudo-Huber."""
        times = ((1.6 * batch.draw.normal() + 0.4).sigmoid() * TIMESTEPS).round().clamp(3, TIMESTEPS)
        times = times.masked_fill((times > 997) | (batch.draw.uniform() < 0.05), TIMESTEPS).long()  # where it begins
        gap = 0.5 * 0.125 ** batch.progress  # share of the way: from a half to a sixteenth
        earlier = F.threshold((times * (1 - gap)).round(), 200, 0).long()  # the last step is long, as in drawing
        x, _ = self.noisy(batch.images, times, batch.draw)
        sigma, rest = (self.sigmas[t][:, None, None, None] for t in (times, earlier))
        with torch.no_grad(), self.cast():
            flow = self.teacher().guided(x, times, labels, self.teacher().config.guidance)
            onward = self(x - (sigma - rest) * flow, earlier.clamp(min=1), labels).float()
        with self.cast():
            prediction = self(x, times, labels).float()
        target = flow + rest / sigma * (onward - flow)
        errors = (prediction - target).square().flatten(1).mean(1)
        return ((errors + HUBER ** 2).sqrt() - HUBER).mean()

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        return self.held_out_loss(*batch[:3]) if self.config.objective == "flow" else {}

    def times(self) -> list[int]:
        """Those of few steps were tried out (RESULTS.md)."""
        if self.config.sampler != "consistency":
            return super().times()
        return [1000, 650, 350, 150][:self.config.steps] if self.config.steps <= 4 else \
            torch.linspace(TIMESTEPS, 100, self.config.steps).round().int().unique().flip(0).tolist()

    def sample(self, labels: Tensor | None, noise: Noise,
               watch: Callable[[int, Tensor, Tensor], None] = lambda *_: None) -> Tensor:
        shape = self.data.channels, self.data.image_size, self.data.image_size
        return settled(self.draw(labels, noise, shape, watch))


# === convolutions between image and code ===
# Shared by the VAE and the GAN.


def pyramid(data: DataInfo, width: int) -> tuple[int, list[int]]:
    """(side of the coarsest feature map, channels from it up to the image): 28 pixels -> 7, [2 width, width, C]."""
    side, levels = data.image_size, 0
    while side > 4 and side % 2 == 0:
        side, levels = side // 2, levels + 1
    if side > 16:
        raise UserError(f"images of {data.image_size} pixels can't be halved down to 16 or fewer: use an "
                        "--image_size divisible by a higher power of two", 2)
    return side, [width * 2 ** min(level, 3) for level in reversed(range(levels))] + [data.channels]


def convolved(channels: int, convs: int, norm: Callable[[int], nn.Module], activation: nn.Module) -> list[nn.Module]:
    """3x3 convolutions that keep the resolution. On 28 pixels the strided ones alone are too shallow: after one epoch
    of MNIST, one more at each resolution halves the GAN's FID."""
    layers = [(nn.Conv2d(channels, channels, 3, padding=1), norm(channels), activation) for _ in range(convs)]
    return [layer for group in layers for layer in group]


def downward(widths: Sequence[int], convs: int, norm: Callable[[int], nn.Module],
             activation: nn.Module) -> nn.Sequential:
    """Image -> coarsest feature map by 4x4 convolutions of stride 2; no norm after the first."""
    return nn.Sequential(*(layer for i, (a, b) in enumerate(itertools.pairwise(reversed(widths))) for layer in (
        nn.Conv2d(a, b, 4, stride=2, padding=1), norm(b) if i else nn.Identity(), activation,
        *convolved(b, convs, norm, activation))))


def upward(widths: Sequence[int], convs: int, norm: Callable[[int], nn.Module], activation: nn.Module) -> nn.Sequential:
    """Coarsest feature map -> image by 4x4 transposed convolutions of stride 2, each after norm and activation."""
    return nn.Sequential(*(layer for a, b in itertools.pairwise(widths) for layer in (
        norm(a), activation, *convolved(a, convs, norm, activation),
        nn.ConvTranspose2d(a, b, 4, stride=2, padding=1))))


# === VAE ===


@dataclass(frozen=True)
class VaeConfig(RunConfig):
    prior: str = option("flow", "model", "of the codes that are drawn: flow, learned beside the VAE and for each class "
                        "where there are classes [Lipman23], or normal", choices=("flow", "normal"))
    likelihood: str | None = option(None, "model", "of pixels given the code: bernoulli (binarised at random in each "
                                    "step; default of grey images) or gaussian (of the best variance [Rybkin21])",
                                    choices=("bernoulli", "gaussian"))
    latent_dim: int = option(32, "model", "numbers in the code that an image is made from", number(int, 1, 4096))
    beta: float = option(1.0, "model", "weight of the KL divergence [Higgins17]; 1: the ELBO", number(float, 0, 1e6))
    width: int = option(64, "model", "channels of the first convolutions, a multiple of 8", number(int, 8, 1024))
    convs: int = option(1, "model", "3x3 convolutions at each resolution, beside the 4x4", number(int, 0, 16))

    def __post_init__(self) -> None:
        if self.prior == "flow" and self.latent_dim < 2:
            raise UserError("--prior flow needs codes of 2 numbers or more: give --prior normal or a larger "
                            "--latent_dim", 2)


class ResidualLinear(nn.Module):
    """x + f(x) with a hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(width), nn.Linear(width, width)
        self.second = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(self.norm(x))))


class CodePrior(nn.Module):
    """A learned prior of codes: a flow [Lipman23] along cos(a) z + sin(a) noise, a from a quarter turn down to 0, whose
    velocity cos(a) noise - sin(a) z has mean 0 everywhere for codes from N(0, 1): untrained, it is that prior."""

    def __init__(self, dims: int, classes: int, width: int = 384, blocks: int = 3) -> None:
        super().__init__()
        self.classes, self.angle = classes, PositionalEncoding(64)
        self.layers = nn.Sequential(
            nn.Linear(dims + 64 + classes, width), *(ResidualLinear(width) for _ in range(blocks)), nn.LayerNorm(width),
            nn.SiLU(), zeroed(nn.Linear(width, dims)))
        # what so narrow a network can't pass on, a factor for each number
        self.factors = zeroed(nn.Linear(width, dims)) if dims > width else None

    def forward(self, z: Tensor, share: Tensor, labels: Tensor | None) -> Tensor:
        """z [B Z], share [B] of the quarter turn, labels [B] -> velocity [B Z]"""
        label = [F.one_hot(labels, self.classes).to(z)] if self.classes else []
        hidden = self.layers[:-1](torch.cat([z, self.angle(1000 * share), *label], 1))
        return self.layers[-1](hidden) + (0 if self.factors is None else self.factors(hidden) * z)

    def loss(self, z: Tensor, labels: Tensor, draw: Draw) -> Tensor:
        share, noise = draw.uniform(), draw.normal(z.shape[1])
        cos, sin = (f(share[:, None] * (math.pi / 2)) for f in (torch.cos, torch.sin))
        return F.mse_loss(self(cos * z + sin * noise, share, labels), cos * noise - sin * z)

    def draw(self, z: Tensor, labels: Tensor | None, steps: int = 10) -> Tensor:
        """Codes from noise z [B Z]: Adams-Bashforth of second order, one evaluation a step."""
        last = None
        for i in range(steps):
            slope = self(z, z.new_full((len(z),), 1 - i / steps), labels)
            z, last = z - math.pi / 2 / steps * (slope if last is None else 1.5 * slope - 0.5 * last), slope
        return z


class VaeModel(ImageModel):
    """A variational autoencoder ([Kingma14]): q(z|x) and p(x|z) are networks. The ELBO is that of the prior N(0, 1);
    codes to draw from come from a model of what q(z|x) leaves of it (`CodePrior`).

    What it draws is the mean of p(x|z), without the pixel noise of the likelihood."""
    config_class = VaeConfig
    fixed = {"network": ("conv",)}
    older = {"prior": "normal"}
    results_folder = "vae"
    measures_held_out, held_out_count = True, 10_000

    def __init__(self, config: VaeConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.bernoulli = (config.likelihood or ("gaussian", "bernoulli")[data.channels == 1]) == "bernoulli"
        self.pixels = data.channels * data.image_size ** 2
        side, widths = pyramid(data, config.width)
        cells = widths[0] * side * side

        def norm(channels: int) -> nn.Module:
            return nn.GroupNorm(math.gcd(8, channels), channels)

        self.encoder = nn.Sequential(downward(widths, config.convs, norm, nn.SiLU()), nn.Flatten(),
                                     nn.Linear(cells, 2 * config.latent_dim))
        self.decoder = nn.Sequential(nn.Linear(config.latent_dim, cells), nn.Unflatten(1, (widths[0], side, side)),
                                     upward(widths, config.convs, norm, nn.SiLU()))
        self.register_buffer("variance", torch.ones(()))  # of the Gaussian, for data that training does not see
        self.labelled = self.labelled and config.prior == "flow"
        self.prior = CodePrior(config.latent_dim, len(data.classes) * self.labelled) if config.prior == "flow" else None

    def players(self) -> dict[str, nn.Module]:
        both = {"model": nn.ModuleList([self.encoder, self.decoder])}
        return both if self.prior is None else both | {"prior": self.prior}

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B C H W] in [-1, 1] -> mean and log variance of q(z|x), [B D] each"""
        with self.cast():
            mean, log_variance = self.encoder(x.contiguous(memory_format=torch.channels_last)).float().chunk(2, 1)
        return mean, log_variance.clamp(-12, 12)

    def pixels_given(self, z: Tensor) -> Tensor:
        """[B D] -> logits of the Bernoulli or mean of the Gaussian, [B C H W]"""
        with self.cast():
            return self.decoder(z).float()

    def decode(self, z: Tensor) -> Tensor:
        """[B D] -> images in [-1, 1], [B C H W]"""
        pixels = self.pixels_given(z)
        return pixels.sigmoid() * 2 - 1 if self.bernoulli else pixels.clamp(-1, 1)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)[0])

    def bound(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Both parts of the negative ELBO in nats, [B] each: -log p(x|z) at one z, and KL(q(z|x) || p(z)); and that z.
        For 8-bit images the density is taken at a point drawn inside the level's bin and
        multiplied by the bin's width: a bound on the probability of the levels ([Theis16])."""
        share = batch.draw.uniform(*batch.images.shape[1:])
        x = (share < (batch.images + 1) / 2).float() * 2 - 1 if self.bernoulli else batch.images + (share - 0.5) / 127.5
        noise = batch.draw.normal(self.config.latent_dim)
        mean, log_variance = self.encode(x)
        z = mean + noise * (log_variance / 2).exp()
        pixels = self.pixels_given(z)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        if self.bernoulli:
            errors = F.binary_cross_entropy_with_logits(pixels, (x + 1) / 2, reduction="none")
            return errors.flatten(1).sum(1), kl, z
        errors = (pixels - x).square().flatten(1).sum(1)
        variance = self.variance
        if self.training:  # of the batch: the gradient is that of pixels/2 * log(mean error), the best variance's bound
            variance = over_processes(errors.detach().mean()) / self.pixels
            self.variance.lerp_(variance, 0.05)
        nats = errors / (2 * variance) + self.pixels * (0.5 * (2 * math.pi * variance).log() + math.log(127.5))
        return nats, kl, z

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The negative ELBO, its KL weighted by beta, in bits per dimension; then the prior's, of the same codes."""
        error, kl, z = self.bound(batch)
        yield "model", (error + self.config.beta * kl).mean() / (self.pixels * math.log(2)), {
            "kl": kl.detach().mean(), "reconstruction": error.detach().mean()}
        if self.prior is not None:
            loss = self.prior.loss(z.detach(), batch.labels, batch.draw)
            yield "prior", loss, {"prior_loss": loss.detach()}

    @torch.no_grad()
    def nll(self, batch: Batch, codes: int = 1000, at_once: int = 50) -> Tensor:
        """-log p(x) of images binarised at random, in nats [B], with the prior N(0, 1): bounded from above by `codes`
        importance-weighted codes ([Burda16])."""
        x = (batch.draw.uniform(*batch.images.shape[1:]) < (batch.images + 1) / 2).float()
        mean, log_variance = self.encode(x * 2 - 1)
        weights = []
        for _ in range(codes // at_once):
            noise = batch.draw.normal(at_once, self.config.latent_dim)  # [B A Z]
            z = mean[:, None] + noise * (log_variance[:, None] / 2).exp()
            logits = self.pixels_given(z.flatten(0, 1)).view(len(x), at_once, -1)
            likelihood = (logits * x.flatten(1)[:, None] - F.softplus(logits)).sum(2)
            weights.append(likelihood + 0.5 * (noise.square() - z.square() + log_variance[:, None]).sum(2))
        return math.log(codes) - torch.cat(weights, 1).logsumexp(1)

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        """The held-out ELBO in nats per image and, negated, in bits per dimension (which is also `val_loss`)."""
        error, kl, _ = self.bound(batch)
        nats = (error + kl).mean().item()
        bits = nats / (self.pixels * math.log(2))
        return {"val_loss": bits, "val_elbo": -nats, "val_bits_per_dim": bits, "val_kl": kl.mean().item()}

    def more_figures(self, images: Images, device: torch.device) -> dict[str, dict[str, Any]]:
        if not self.bernoulli:
            return {}
        rows, codes = some_rows(images.test, 500), 1000
        nats = torch.cat([self.nll(Batch(to_float(images.test[part].to(device)), images.test_labels[part].to(device),
                                         Draw(0, i, len(part), slice(None), device)), codes)
                          for i, part in enumerate(rows.split(20))])
        return {"iw_nll_nats": {"value": nats.mean().item(), "standard_error": (nats.std() / len(nats) ** 0.5).item(),
                                "n": len(rows), "codes": codes, "reference": "test, binarised at random"}}

    def warnings(self, figures: dict[str, Any]) -> list[str]:
        return [f"the codes carry next to nothing (KL {figures['val_kl']:.2g} nats), all images come out alike: lower "
                "--beta or --learning_rate"] * (figures["val_kl"] < 1)

    @torch.no_grad()
    def sample(self, labels: Tensor | None, noise: Noise) -> Tensor:
        z = noise.normal(self.config.latent_dim)
        return settled(self.decode(z if self.prior is None else self.prior.draw(z, labels)))


def over_processes(mean: Tensor) -> Tensor:
    """The mean of a tensor over all processes; every process must come here."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return mean


# === GAN ===


@dataclass(frozen=True)
class GanConfig(RunConfig):
    learning_rate: float = option(5e-4, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    weight_decay: float = option(0.0, "optimisation", "of AdamW", number(float, 0))
    grad_clip: float = option(10.0, "optimisation", "largest norm of a gradient", number(float, 0, open_low=True))
    conditional: bool = option(True, "model", "show the class to both networks: better by far, and --label works")
    penalty: float = option(0.1, "model", "weight of the gradient penalties", number(float, 0, 1e6))
    latent_dim: int = option(100, "model", "numbers in the code that an image is made from", number(int, 1, 4096))
    width: int = option(64, "model", "channels of the first convolutions, a multiple of 8", number(int, 8, 1024))
    convs: int = option(1, "model", "3x3 convolutions at each resolution, beside the 4x4", number(int, 0, 16))


def batch_norm(channels: int) -> nn.Module:
    """Deviation: under torchrun each process normalises by its own rows, so that a network with batch norm learns a
    little otherwise on another number of processes."""
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.weight, 1, 0.02)
    return norm


class Generator(nn.Module):
    """Noise (and class) -> image, by strided transposed convolutions."""

    def __init__(self, config: GanConfig, data: DataInfo, classes: int) -> None:
        super().__init__()
        side, widths = pyramid(data, config.width)
        self.classes = classes
        self.enter = nn.Linear(config.latent_dim + classes, widths[0] * side * side)
        self.body = nn.Sequential(nn.Unflatten(1, (widths[0], side, side)),
                                  upward(widths, config.convs, batch_norm, nn.ReLU()))

    def forward(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """[B D], labels [B] where there are classes -> images in (-1, 1)"""
        if self.classes:
            noise = torch.cat([noise, F.one_hot(labels, self.classes).to(noise.dtype)], 1)
        return self.body(self.enter(noise)).float().tanh()


class Discriminator(nn.Module):
    """Image (and class) -> logit of being real; the class takes part as a direction in feature space ([Miyato18]). No
    norms: the penalties take their place ([Huang24])."""

    def __init__(self, config: GanConfig, data: DataInfo, classes: int) -> None:
        super().__init__()
        side, widths = pyramid(data, config.width)
        self.body = nn.Sequential(downward(widths, config.convs, nn.Identity, nn.LeakyReLU(0.2)), nn.Flatten())
        self.head = nn.Linear(widths[0] * side * side, 1, bias=False)  # between pairs it would cancel
        self.label = nn.Embedding(classes, widths[0] * side * side) if classes else None
        if classes:
            nn.init.zeros_(self.label.weight)  # its usual N(0, 1), summed over thousands of features, drowns the rest

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """[B C H W] -> [B]"""
        features = self.body(x.contiguous(memory_format=torch.channels_last))
        logits = self.head(features).squeeze(1).float()
        return logits if self.label is None else logits + (self.label(labels) * features).sum(1).float()


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Half the mean squared norm of the logits' gradient by the images: R1 on real, R2 on drawn ones ([Mesch18])."""
    gradient, = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


class GanModel(ImageModel):
    """Two networks that play against each other ([Good14]): one draws, the other tells drawn images from real ones, of
    which it sees one beside each drawn one ([Huang24])."""
    config_class = GanConfig
    fixed = {"gan_loss": ("relativistic",)}
    results_folder = "gan"
    panel_every = 5
    descends = False  # what one player wins the other loses: the sum need not fall
    betas = (0.0, 0.99)

    def __init__(self, config: GanConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.labelled = self.labelled and config.conditional
        classes = len(data.classes) if self.labelled else 0
        self.generator, self.discriminator = (kind(config, data, classes) for kind in (Generator, Discriminator))

    def players(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator, "generator": self.generator}

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Cross-entropy of telling which of a pair is the real one, with penalties; then (after that step) of the
        generator, which wants it told wrongly. `d_real` and `d_fake` are mean probabilities of being called real."""
        judge, labels = self.discriminator, batch.labels
        with self.cast():
            fake = self.generator(batch.draw.normal(self.config.latent_dim), labels)
            real, seen = (x.detach().requires_grad_() for x in (batch.images, fake))
            on_real, on_fake = judge(real, labels), judge(seen, labels)
        sure = on_real - on_fake
        loss = F.softplus(-sure).mean()
        penalty = gradient_penalty(on_real, real) + gradient_penalty(on_fake, seen)
        yield "discriminator", loss + self.config.penalty * penalty, {
            "d_loss": loss.detach(), "d_real": sure.detach().sigmoid().mean(),
            "d_fake": (-sure.detach()).sigmoid().mean(), "penalty": penalty.detach()}
        judge.requires_grad_(False)  # no need of its gradients now
        with self.cast():
            on_fake, on_real = judge(fake, labels), judge(batch.images, labels)
        loss = F.softplus(on_real - on_fake).mean()
        yield "generator", loss, {"g_loss": loss.detach()}
        judge.requires_grad_(True)

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        """`d_real` on images that training has not seen: much lower there, the discriminator knows them by heart."""
        with self.cast():
            fake = self.generator(batch.draw.normal(self.config.latent_dim), batch.labels)
            sure = self.discriminator(batch.images, batch.labels) - self.discriminator(fake, batch.labels)
        return {"val_d_real": sure.sigmoid().mean().item()}

    def warnings(self, figures: dict[str, Any]) -> list[str]:
        lines, share = [], figures.get("class_share_min")
        if figures["d_real"] > 0.97 and figures["d_fake"] < 0.03:
            lines.append("the discriminator wins outright, and a generator that always loses learns nothing: try a "
                         "lower --learning_rate")
        if share is not None and share < 0.1 / len(self.data.classes):
            lines.append("classes vanish from what is drawn (class_share_min in metrics.jsonl): try another --seed, a "
                         "lower --learning_rate")
        return lines

    @torch.no_grad()
    def sample(self, labels: Tensor | None, noise: Noise) -> Tensor:
        with self.cast():
            return settled(self.generator(noise.normal(self.config.latent_dim), labels))


# === registry ===

FAMILIES: dict[str, type[Family]] = {"diffusion": DiffusionModel, "vae": VaeModel, "gan": GanModel,
                                     "classifier": Classifier}
HERE = Path(__file__).resolve().parent
FILE_NAME = "{}_model.pt"


def known_fields(kind: type, values: dict) -> dict:
    """A field that a newer script dropped must not stop an old file from loading."""
    return {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}


def restore_model(state: dict, **changes: Any) -> Family:
    """The model of a checkpoint with its averaged weights; `changes` replace fields of its config."""
    family = FAMILIES[state["family"]]
    try:
        for name, values in family.fixed.items():
            if state["config"].get(name, values[0]) not in values:
                raise ValueError(f"it was made with --{name} {state['config'][name]}, which is no more")
        config = family.config_class(**family.older | known_fields(family.config_class, state["config"]) | changes)
        model = family(config, DataInfo(**known_fields(DataInfo, state["data"])))
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state["ema"].items()})
        if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
            raise ValueError("its weights are not finite")
    except (TypeError, KeyError, RuntimeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"the checkpoint does not fit its own description ({first_line(error)}): it was "
                        "altered, or written by another version of this script") from None
    return model.to(memory_format=torch.channels_last)


def export_model(model: Family, state: dict, path: Path) -> None:
    """What is shipped: averaged weights in half precision (statistics of the data keep theirs), description, last
    figures and origin. Only an earlier export is ever replaced."""
    replaceable = not os.path.lexists(path)
    with contextlib.suppress(UserError):
        replaceable = replaceable or "model" not in load_checkpoint(path)
    if not replaceable:
        raise UserError(f"--export {path} would replace another file: name a new one", 2)
    weights = {name for name, _ in model.named_parameters()}
    save_checkpoint(path, {key: state[key] for key in ("format", "family", "data", "made")} | {
        "config": dataclasses.asdict(model.config), "history": [r for r in state["history"] if "epoch" in r][-1:],
        "ema": {key: v.half() if key in weights else v for key, v in model.state_dict().items()}})
    say(f"averaged weights in half precision -> {path}")


def family_name(family: type[Family]) -> str:
    return next(name for name, known in FAMILIES.items() if known is family)


# === files ===

RESULTS_MARK = ".results"  # lies in folders that were written here, so that nothing in them is taken for data


def first_line(error: BaseException) -> str:
    """What an exception says, fit for an error message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def say(text: str, stream: Any = None, end: str = "\n") -> None:
    """Print. A reader that has gone away (`| head`) ends neither a training nor its exit status."""
    stream = stream or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress(total: int, title: str, hidden: bool = False, **more: Any) -> Any:
    """A progress bar with rate and time left; in a log file it writes a line a minute instead of a thousand."""
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no thread for each bar

        def display(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().display(*args, **kwargs)
            except OSError:
                say("", sys.stderr)  # which notices that nobody reads it

    if not (sys.stderr and sys.stderr.isatty()):
        more |= {"mininterval": 60, "maxinterval": 60, "delay": 60, "leave": False,
                 "bar_format": "{l_bar}{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]\n"}
    return Bar(total=total, desc=title, miniters=1, disable=hidden or sys.stderr is None, **more)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move it there once it is whole: readers never see half a file, and
    a full disk or a kill leaves what stood there before."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"can't write {path} ({error.strerror or error}); any earlier file there is unchanged: "
                        "free some space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def results_folder(folder: Path) -> Path:
    """Make sure that results can be written there: now, rather than after an hour of training."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: results need a folder")
    with replacing(folder / RESULTS_MARK) as part:
        part.write_text("Written by a script: not training data.\n")
    return folder


def lock(path: Path) -> Any:
    """Hold `path` until this process ends, however it ends; a second one is refused."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = open(path, "w")  # noqa: SIM115
        with contextlib.suppress(ImportError):  # a system without it has no such locks
            import fcntl
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        reason = "another training holds it" if isinstance(error, BlockingIOError) else error.strerror
        raise UserError(f"can't take {path} ({reason}): wait, or name another --checkpoint and --results_dir") from None
    return held


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """NaN and infinities are no JSON: `allow_nan=False` makes them an error instead of a broken file."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_checkpoint(path: Path, state: dict, when_whole: Callable[[], None] = lambda: None) -> None:
    """`state` holds only tensors and plain Python values, so that it can be read with `weights_only=True`."""
    buffer = io.BytesIO()  # in memory first: a full disk is then an OSError, not a crash inside the zip writer
    torch.save(state, buffer)
    with replacing(path) as part:
        part.write_bytes(buffer.getbuffer())
        when_whole()


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this script on the CPU: never running code that it may hold, its checksums compared."""
    other = "restore a copy, train again or name another with --checkpoint"
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # torch remarks on unusual pickles before it refuses them
            if bad := archive.testzip():
                raise ValueError(f"the checksum of its {bad} differs")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"no checkpoint at {path} ({error.strerror}): train one with --mode train, or name another "
                        "file with --checkpoint") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is no plain-tensor checkpoint: it holds pickled objects that could run code, and is "
                        "not loaded; name another with --checkpoint") from None
    except Exception as error:  # damaged bytes can make the readers fail in any way
        raise UserError(f"{path} is truncated, damaged or no checkpoint ({first_line(error)}): {other}") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path} was not written by this script: {other}")
    if state["format"] != SUBJECT.format:
        raise UserError(f"{path} has format {str(state['format'])!r}, this script reads {SUBJECT.format!r}: use the "
                        "matching version of the script, or train again")
    parts = {"family": str, "config": dict, "data": dict, "ema": dict, "history": list, "made": dict, "run": dict}
    if missing := [name for name, kind in parts.items() if not isinstance(({"run": {}} | state).get(name), kind)]:
        raise UserError(f"{path} lacks its {', '.join(missing)}, it was altered: {other}")
    if state["family"] not in FAMILIES:
        raise UserError(f"{path} holds a model {state['family']!r}, this script knows {', '.join(FAMILIES)}: use the "
                        "version of the script that wrote it")
    try:
        restore_model(state)  # must succeed also where only a run is to be continued
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return state


# === datasets ===

MNIST_MD5 = {  # of the unpacked files, so that an interrupted unpacking is noticed as well
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
NO_NETWORK = 3  # exit status that says "the dataset could not be downloaded", and nothing else
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass
class Images:
    """A dataset in memory: uint8 [N C H W] with int64 labels [N] (all 0 when there is one class)."""
    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: list[str]
    title: str
    epoch: int | None = None  # whose order is at hand

    def info(self) -> DataInfo:
        counts = torch.bincount(self.train_labels, minlength=len(self.classes)).tolist()
        return DataInfo(self.name, self.title, self.train.shape[1], self.train.shape[-1], self.classes, counts,
                        len(self.train))

    def describe(self) -> str:
        train, test = self.train, self.test
        return f"{self.title}: {len(train)} training and {len(test)} test images of {train.shape[-1]} pixels"

    def plan(self, config: RunConfig) -> tuple[int, int]:
        """(batch size, steps per epoch): an epoch is as many whole batches as there are."""
        batch_size = min(config.batch_size, len(self.train))
        return batch_size, len(self.train) // batch_size

    def training_batch(self, config: RunConfig, step: int, draw: Draw) -> Batch:
        """This process's rows of the batch of a step; each epoch has an order of its own."""
        batch_size, steps = self.plan(config)
        epoch, position = divmod(step, steps)
        if epoch != self.epoch:
            self.epoch, generator = epoch, torch.Generator().manual_seed(seed32(config.seed, epoch, 7))
            self.order = torch.randperm(len(self.train), generator=generator)
            self.train, self.train_labels = self.train.to(draw.device), self.train_labels.to(draw.device)
        rows = self.order[position * batch_size:][:batch_size][draw.rows].to(draw.device)
        images = to_float(self.train[rows])
        if config.flip == "on" or (config.flip == "auto" and self.name.startswith("cifar")):
            images = torch.where((draw.uniform() < 0.5)[:, None, None, None], images.flip(-1), images)
        return Batch(images, self.train_labels[rows], draw)

    def held_out(self, count: int, device: torch.device) -> Iterator[Batch]:
        """The first `count` test images."""
        for rows in torch.arange(min(count, len(self.test))).split(500):
            yield Batch(to_float(self.test[rows].to(device)), self.test_labels[rows].to(device),
                        Draw(0, int(rows[0]), len(rows), slice(None), device))


def some_rows(images: Tensor, count: int) -> Tensor:
    """Numbers of `count` images, drawn with a fixed seed: MNIST's test set begins with its cleaner half."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]


def provide(world: World | None, own: bool, title: str, folder: Path, sums: dict[str, str],
            fetch: Callable[[], Any]) -> None:
    """Download files that are missing or not those of the md5 `sums`, once for all processes; damaged files in a folder
    of the user's `own` stay."""
    from torchvision.datasets.utils import check_integrity

    def damaged() -> list[Path]:
        return [folder / name for name, digest in sums.items() if not check_integrity(str(folder / name), digest)]

    if world is None or world.main:
        bad = damaged()
        if own and (names := ", ".join(path.name for path in bad if path.exists())):
            raise UserError(f"{folder}: {names} is truncated or not {title}'s file (md5 differs): delete it, and it is "
                            "downloaded again")
        if bad:
            download(title, folder, damaged, fetch)
    if world is not None:
        world.wait()


def download(title: str, folder: Path, damaged: Callable[[], list[Path]], fetch: Callable[[], Any]) -> None:
    """Fetch a dataset with torchvision, in three attempts. `UserError` with code 3 where it can't be reached."""
    import errno
    import socket
    socket.setdefaulttimeout(30)  # torchvision sets none: a stalled connection would hang for ever
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{title}: downloading into {folder}")
    for pause in (1, 2, 0):
        for path in damaged():  # torchvision takes any file of the right name for a finished download
            path.unlink(missing_ok=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                fetch()
            reason = f"the files that arrived are not {title}'s"
        except Exception as error:  # what arrives can make the readers of HTTP, gzip and tar fail in any way
            disk = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EACCES)
            if isinstance(error, OSError) and error.errno in disk:
                raise UserError(f"can't write {folder} ({error.strerror}); free some space or name another folder with "
                                "--data_root") from None
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Tried")]
            reason = (lines[-1] if lines else type(error).__name__).strip("<>")[:160]
        if not damaged():
            return
        time.sleep(pause)
    raise UserError(f"{title} can't be downloaded ({reason}): connect to a network, name a folder that has its files "
                    "with --data_root, or use --dataset digits, which needs no download", NO_NETWORK)


def load_mnist(root: Path | None, world: World | None = None) -> Images:
    """The 60,000 + 10,000 handwritten digits, [1 28 28]; downloaded unless the user names a folder of their own."""
    from torchvision.datasets import MNIST
    own, root, mirror = root is not None, root or HERE / "data", os.environ.get("MNIST_MIRROR")
    mirrors = [mirror.rstrip("/") + "/", *MNIST.mirrors] if mirror else MNIST.mirrors
    source = type("MNIST", (MNIST,), {"mirrors": mirrors})  # torchvision names the folder after the class
    provide(world, own, "MNIST", root / "MNIST" / "raw", MNIST_MD5, lambda: source(str(root), download=True))
    train, test = (MNIST(str(root), train=part) for part in (True, False))
    return Images("mnist", train.data[:, None], train.targets, test.data[:, None], test.targets, list("0123456789"),
                  "MNIST")


def load_cifar(name: str, root: Path | None, world: World | None = None) -> Images:
    """The 50,000 + 10,000 small photographs, [3 32 32]. The files are pickles: md5 is checked before one is opened."""
    from torchvision import datasets
    source, title = getattr(datasets, name.upper()), name.upper().replace("R1", "R-1")
    own, root = root is not None, root or HERE / "data"
    sums = dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])

    def fetch() -> None:
        source(str(root), download=True)
        (root / source.filename).unlink()

    provide(world, own, title, root / source.base_folder, sums, fetch)
    train, test = (source(str(root), train=part) for part in (True, False))
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    return Images(name, pixels[0], torch.tensor(train.targets), pixels[1], torch.tensor(test.targets),
                  list(train.classes), title)


def load_digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, [1 8 8], 17 grey levels; a fixed stratified fifth is held out."""
    from sklearn.datasets import load_digits as read
    from sklearn.model_selection import train_test_split
    images, labels = read(return_X_y=True)
    images = torch.from_numpy(images.reshape(-1, 1, 8, 8) * (255 / 16)).round().to(torch.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    labels = torch.from_numpy(labels).long()
    return Images("digits", images[train], labels[train], images[test], labels[test], list("0123456789"),
                  "digits (scikit-learn)")


def open_image(path: Path) -> Any:
    """A PIL image in mode L or RGB: 16-bit scaled, palette expanded, first frame of an animation, alpha on white; float
    pictures are in 0..1 or in 0..255."""
    from PIL import Image, ImageOps
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it remarks on odd metadata; what can't be read is an error all the same
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                image.load()
    except FileNotFoundError:
        raise UserError(f"{path} is not a file: name an image file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} can't be read as an image ({first_line(error)}): repair or remove it") from None
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(levels).all():
            raise UserError(f"{path} can't be read as an image (it holds NaN or infinite values): repair or remove it")
        top = levels.max(initial=0)
        scale = 1 / 255 if image.mode == "F" and top <= 1 else 257 if image.mode.startswith("I;16") or top > 255 else 1
        return Image.fromarray(np.clip(levels / scale, 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "P") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        red, green, blue = image.split()
        return red if red.tobytes() == green.tobytes() == blue.tobytes() else image
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def image_files(folder: Path) -> list[Path]:
    """All pictures below `folder`, but for folders that this script wrote. What else lies there is counted and said."""
    for mark in (folder / RESULTS_MARK, folder.parent / RESULTS_MARK):  # also of train/ and test/ in a marked folder
        if mark.exists():
            raise UserError(f"{mark.parent} holds results that a script wrote, not training data: name another folder, "
                            f"or delete {mark} if you mean to learn from these pictures")
    written = {mark.parent for mark in folder.rglob(RESULTS_MARK)}
    pictures, others = [], Counter()
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name.startswith(".") or not written.isdisjoint(path.parents):
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            pictures.append(path)
        else:
            others[path.suffix.lower() or "without suffix" if path.is_file() else "broken link"] += 1
    if others:
        say(f"{folder}: left out {', '.join(f'{count} {kind}' for kind, count in others.most_common(8))} (read are "
            f"{', '.join(sorted(IMAGE_SUFFIXES))})", sys.stderr)
    return pictures


def own_images(paths: Sequence[Path], data: DataInfo) -> Tensor:
    """Files of any size and mode -> uint8 [N C H W] as the model knows them: cropped, resized, grey or colour."""
    from PIL import ImageOps
    size, mode = (data.image_size,) * 2, "L" if data.channels == 1 else "RGB"
    arrays = [np.asarray(ImageOps.fit(open_image(path).convert(mode), size)) for path in paths]
    return torch.from_numpy(np.stack(arrays)).reshape(len(arrays), *size, data.channels).permute(0, 3, 1, 2)


def read_image_folder(folder: Path, size: int, skip_bad: bool = False) -> tuple[list[np.ndarray], list[str]]:
    """All pictures below `folder`, centre-cropped to a square and resized: arrays [H W] or [H W 3], labels by
    sub-folder ("" when a picture lies in `folder` itself)."""
    from PIL import ImageOps
    arrays, labels, reasons = [], [], []
    for path in image_files(folder):
        try:
            arrays.append(np.asarray(ImageOps.fit(open_image(path), (size, size))))
            labels.append(path.relative_to(folder).parts[0] if path.parent != folder else "")
        except UserError as error:
            reasons.append(str(error).removesuffix(": repair or remove it"))
    if reasons:
        listed = "; ".join(reasons[:5]) + f"; and {len(reasons) - 5} more" * (len(reasons) > 5)
        if not skip_bad:
            raise UserError(f"{len(reasons)} picture(s) can't be read: {listed}: repair or remove them, or leave them "
                            "out with --skip_bad")
        say(f"{folder}: left out {len(reasons)} picture(s) that can't be read: {listed}", sys.stderr)
    return arrays, labels


def load_folder(root: Path | None, size: int, skip_bad: bool = False) -> Images:
    """A folder of one's own pictures. Sub-folders are labels. `train/` and `test/` inside it are taken as the split,
    otherwise a tenth, drawn with a fixed seed, is held out. Colour if any picture has colour, else grey."""
    if root is None:
        raise UserError("--dataset folder needs --data_root DIR, the folder with your images", 2)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: --data_root takes the folder with your images")
    split = (root / "train").is_dir() and (root / "test").is_dir()
    parts = [read_image_folder(folder, size, skip_bad)
             for folder in ((root / "train", root / "test") if split else (root,))]
    arrays, labels = (list(itertools.chain(*part)) for part in zip(*parts))
    count = len(parts[0][0])
    if count < 2 or (split and count == len(arrays)):
        raise UserError(f"{root} holds {len(arrays)} image(s) ({', '.join(sorted(IMAGE_SUFFIXES))}): at least two are "
                        "needed, one to train on and one to hold out")
    classes = sorted(set(labels[:count]))
    if unknown := set(labels) - set(classes):
        raise UserError(f"{root / 'test'} has the class {min(unknown)!r} that {root / 'train'} lacks: make them agree")
    depth = 3 if any(a.ndim == 3 for a in arrays) else 1
    planes = [np.broadcast_to(a[..., None] if a.ndim == 2 else a, (size, size, depth)) for a in arrays]
    images = torch.from_numpy(np.stack(planes)).permute(0, 3, 1, 2).contiguous()
    targets = torch.tensor([classes.index(name) for name in labels])
    order = some_rows(images, count)
    train, test = order[max(1, count // 10):], order[:max(1, count // 10)]
    if split:
        train, test = torch.arange(count), torch.arange(count, len(images))
    return Images("folder", images[train], targets[train], images[test], targets[test], classes, root.resolve().name)


DATASETS = ("mnist", "cifar10", "cifar100", "digits", "folder")


@dataclass(frozen=True)
class DataOptions:
    dataset: str = option("mnist", "data", "digits are scikit-learn's, without a download", choices=DATASETS)
    data_root: Path | None = option(None, "data", "folder with MNIST/raw or cifar-10-batches-py, or with your images, "
                                    "one sub-folder per label", Path)
    image_size: int | None = option(None, "data", "side of a folder's images (default: 32)", number(int, 4, 1024))
    skip_bad: bool = option(False, "data", "leave out pictures of a folder that can't be read")


def load_images(options: DataOptions, world: World | None = None) -> Images:
    """The dataset that was asked for, downloaded where it is one to download."""
    name, root = options.dataset, options.data_root
    if name == "folder":
        return load_folder(root, options.image_size or 32, options.skip_bad)
    for flag, told in (("image_size", options.image_size), ("skip_bad", options.skip_bad),
                       ("data_root", root if name == "digits" else None)):
        if told:
            raise UserError(f"--{flag} has no effect with --dataset {name}: leave it out", 2)
    if name == "digits":
        return load_digits()
    return load_mnist(root, world) if name == "mnist" else load_cifar(name, root, world)


# === metrics ===

INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 "weights-inception-2015-12-05-6726825d.pth")  # the hash in the name is checked after the download
FRECHET, KERNEL = "fid", "kid"  # what the distances are called
NEIGHBOURS = 3  # k of precision and recall, as in [Kynk19]
CLASS_FIGURES = ("class_share_min", "class_share_max", "classes_covered", "class_balance", "label_agreement")
EVALUATION_SHARE = 0.1  # of an epoch's work may go into measuring it


class Features(NamedTuple):
    vectors: Tensor  # [N D] float32
    logits: Tensor  # [N K]


@dataclass(frozen=True)
class FeatureNet:
    """A frozen network that turns examples into feature vectors and class logits."""
    name: str
    width: int
    digest: str
    apply: Callable[[Tensor], tuple[Tensor, Tensor]]  # of images, uint8 [B C H W]; of sounds, float [B L]
    names_classes: bool  # its classes are those of the data, so that balance can be judged

    @torch.no_grad()
    def __call__(self, examples: Tensor, batch: int = 250) -> Features:
        """Examples [N ...] as `apply` takes them -> Features on the CPU"""
        vectors, logits = zip(*map(self.apply, examples.split(batch)), strict=True)
        return Features(torch.cat(vectors).float().cpu(), torch.cat(logits).float().cpu())

    def describe(self) -> str:
        return f"{self.name} ({self.digest[:12]})"


def classifier_net(path: Path, device: torch.device, data: DataInfo) -> FeatureNet:
    """The feature net `<dataset>_cnn` from the checkpoint of a classifier of the same classes and kind of images."""
    state = load_checkpoint(path)
    if state["family"] != "classifier":
        raise UserError(f"{path} holds a {state['family']} model: --classifier takes a --model classifier")
    for key in ("channels", "image_size", "classes"):
        if state["data"][key] != getattr(data, key):
            known, needed = (str(value)[:60] for value in (state["data"][key], getattr(data, key)))
            raise UserError(f"{path} was trained with {key} {known}, {data.title} has {needed}: name a matching one "
                            "with --classifier")
    model = restore_model(state).to(device).eval()
    return FeatureNet(f"{state['data']['dataset']}_cnn", model.config.features, file_digest(path),
                      lambda images: model(to_float(images.to(device))), True)


def inception_net(weights: Path | None, device: torch.device) -> FeatureNet:
    """The 2015 Inception v3 that published FID, IS and KID figures use, through torchmetrics."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
        state = torch.load(weights, map_location="cpu", weights_only=True) if weights else \
            torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True)
        buffer = io.BytesIO()  # the library reads its weights with pickle enabled: hand it only what was read safely
        torch.save(state, buffer)
        digest = file_digest(weights) if weights else hashlib.sha256(buffer.getvalue()).hexdigest()
        buffer.seek(0)
        net = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], buffer, antialias=False).to(device)
    except ModuleNotFoundError as error:
        raise UserError(f"Inception metrics need the package {error.name}: pip install torch-fidelity") from None
    except Exception as error:  # of the network, or of a file that holds anything
        where = f"{weights} is not the Inception weights file" if weights else "the Inception weights can't be fetched"
        raise UserError(f"{where} ({first_line(error)}): download {INCEPTION_URL} where there is a "
                        "network and name the file with --inception_weights") from None
    return FeatureNet("inception", 2048, digest,
                      lambda images: net._torch_fidelity_forward(images.to(device).expand(-1, 3, -1, -1)), False)


@dataclass(frozen=True)
class MeasureOptions:
    fid_features: str = option("auto", "evaluation", "feature net: cnn (our classifier for the dataset) or inception; "
                               "auto: cnn", choices=("auto", "cnn", "inception"))
    inception_weights: Path | None = option(None, "evaluation", "Inception weights, for offline machines", Path)
    classifier: Path | None = option(None, "evaluation", "checkpoint of --model classifier for the metrics; by default "
                                     "the shipped one for the dataset, else the one in models/ for its classes", Path)
    eval_samples: int | None = option(None, "evaluation", "images to measure (default: 10,000, between epochs 400, or "
                                      "the size of a smaller test set)", number(int, 2))
    sample_batch: int = option(250, "sampling", "images drawn at once, bounds the memory", number(int, 1))


def find_feature_net(options: MeasureOptions, data: DataInfo, device: torch.device) -> tuple[FeatureNet | None, str]:
    """The feature net that was asked for, or the classifier that fits the data; else None and the reason."""
    if options.fid_features == "inception":
        return inception_net(options.inception_weights, device), ""
    if options.inception_weights:
        raise UserError("--inception_weights belongs to --fid_features inception", 2)
    usual = (SUBJECT.shipped("classifier", data.dataset), HERE / "models" / Classifier.file_name(data))
    for path in [options.classifier] if options.classifier else [path for path in usual if path.exists()]:
        return classifier_net(path, device, data), ""
    reason = (f"no classifier for {data.title}: train one with --model classifier --dataset {data.dataset}, or use "
              "--fid_features inception")
    if options.fid_features == "cnn":
        raise UserError(reason)
    return None, reason


def by_torchmetrics(kind: Any, *updates: tuple, **options: Any) -> Any:
    """A metric of torchmetrics over features that are at hand: its "feature net" returns what it is given."""
    net = nn.Identity()
    net.num_features = updates[0][0].shape[1]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it keeps features, which are few here,
        torch.manual_seed(0)  # and shuffles with the global generator
        metric = kind(net, sync_on_compute=False, **options)  # rank 0 measures alone: it must not wait for the others
        for update in updates:
            metric.update(*update)
        return metric.compute()


def frechet_distance(estimate: Tensor, reference: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of vectors [N D] ([Heusel17])."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    return by_torchmetrics(FrechetInceptionDistance, (reference, True), (estimate, False)).item()


def inception_score(logits: Tensor) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)), mean and standard deviation over ten splits ([Salim16])."""
    from torchmetrics.image.inception import InceptionScore
    mean, deviation = by_torchmetrics(InceptionScore, (logits,), splits=min(10, len(logits)))
    return mean.item(), deviation.nan_to_num().item()


def kernel_distance(estimate: Tensor, reference: Tensor) -> tuple[float, float]:
    """KID: squared MMD with a cubic kernel, mean and standard deviation over 50 subsets ([Bink18]). Of few vectors a
    subset takes half, so that subsets differ; at least four are needed."""
    from torchmetrics.image.kid import KernelInceptionDistance
    size = min(1000, len(estimate) // 2, len(reference) // 2)
    mean, deviation = by_torchmetrics(KernelInceptionDistance, (reference, True), (estimate, False), subsets=50,
                                      subset_size=size)
    return mean.item(), deviation.item()


def precision_recall(estimate: Tensor, reference: Tensor) -> tuple[float, float]:
    """Share of estimates inside the reference's manifold, and the other way round: balls around each point that reach
    its third neighbour ([Kynk19])."""

    def radii(points: Tensor) -> Tensor:
        return torch.cat([torch.cdist(rows, points).kthvalue(NEIGHBOURS + 1, dim=1).values
                          for rows in points.split(1000)])  # + 1: each point is its own nearest

    def covered(points: Tensor, centres: Tensor) -> float:
        reach = radii(centres)
        inside = [(torch.cdist(rows, centres) <= reach).any(1) for rows in points.split(1000)]
        return torch.cat(inside).float().mean().item()

    return covered(estimate, reference), covered(reference, estimate)


def nearest_distance(pictures: Tensor, train: Tensor) -> Tensor:
    """Euclidean pixel distance (levels 0..255) of each picture to the nearest training picture: uint8 -> [N]."""
    pictures, columns = pictures.flatten(1).float(), train.flatten(1).float()
    lengths = columns.square().sum(1)
    nearest = [(lengths - 2 * rows @ columns.T).min(1).values + rows.square().sum(1) for rows in pictures.split(500)]
    return torch.cat(nearest).clamp(min=0).sqrt()


def near_copies(drawn: Tensor, train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """How many pictures lie suspiciously near to a training picture: an entry of a report. uint8 [N C H W]"""
    distances = nearest_distance(held_out, train)
    threshold = torch.quantile(distances, 0.01)
    value, floor = ((d < threshold).float().mean().item() for d in (nearest_distance(drawn, train), distances))
    return {"value": value, "floor": floor, "threshold": threshold.item(), "definition": "share of samples nearer to a "
            "training example (distance of pixels) than the nearest hundredth of test examples is; floor: their share"}


def measure(estimate: Features, reference: Features, net: FeatureNet, asked: Tensor | None = None,
            quick: bool = False) -> tuple[dict[str, float | None], dict[str, str]]:
    """All metrics of a set of examples against a reference, and the reasons for those that could not be computed.
    `asked` [N] are the labels that they were drawn for; `quick` leaves out the last three."""
    values, reasons = dict[str, float | None](), dict[str, str]()
    count, name = min(len(estimate.vectors), len(reference.vectors)), net.name
    for metric, least, *keys in (
            (lambda *sets: [frechet_distance(*sets)], net.width, f"{FRECHET}_{name}"),  # covariances need full rank
            (lambda *_: inception_score(estimate.logits), 0, f"is_{name}", f"is_{name}_std"),
            (kernel_distance, NEIGHBOURS, f"{KERNEL}_{name}", f"{KERNEL}_{name}_std"),
            (precision_recall, NEIGHBOURS, f"precision_{name}", f"recall_{name}"))[:3 if quick else 4]:
        if count > least:
            values |= zip(keys, metric(estimate.vectors, reference.vectors))
        else:
            values |= dict.fromkeys(keys)
            reasons |= dict.fromkeys(keys, f"needs more than {least} {SUBJECT.unit}s, not {count}")
    predicted = estimate.logits.argmax(1)
    if net.names_classes:
        shares = torch.bincount(predicted, minlength=estimate.logits.shape[1]) / len(predicted)
        values |= {"class_share_min": shares.min().item(), "class_share_max": shares.max().item(),
                   "classes_covered": (shares * len(shares) >= 0.1).sum().item(),  # a tenth of an equal share
                   "class_balance": (torch.special.entr(shares).sum() / math.log(len(shares))).item()}
        if asked is not None and not quick:
            values["label_agreement"] = (predicted == asked.cpu()).float().mean().item()
    reason = f"the {SUBJECT.unit}s were not drawn for given labels" if net.names_classes else \
        f"the classes of {name} are not those of the data"
    for key in () if quick else CLASS_FIGURES:
        if key not in values:
            values[key], reasons[key] = None, reason
    for key, value in values.items():  # NaN or infinity is no result
        if value is not None and not math.isfinite(value):
            values[key], reasons[key] = None, f"the result was {value}"
    return values, reasons


def proportional_labels(data: DataInfo, count: int, labelled: bool = True) -> Tensor | None:
    """Labels [N] in the proportions of the training set, in a fixed shuffled order; None for unlabelled data."""
    shares = torch.tensor(data.class_counts, dtype=torch.float64).cumsum(0)
    if len(shares) < 2 or not labelled:
        return None
    labels = torch.searchsorted(shares / shares[-1], (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return labels[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def generate(model: ImageModel, labels: Tensor | None, count: int, batch: int, title: str = "",
             ) -> Iterator[tuple[range, Tensor]]:
    """Yield (image numbers, uint8 images [b C H W] on the CPU) for images 0..count-1, which go through `labels` in
    turn. Nothing here grows with `count`. With a `title` a bar shows how far it is."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with progress(count, title, not title, unit="image", leave=False) as bar:
            for start in range(0, count, batch):
                numbers = range(start, min(start + batch, count))
                chosen = None if labels is None else labels[[i % len(labels) for i in numbers]].to(device)
                yield numbers, to_uint8(model.sample(chosen, Noise(model.config.seed, numbers, device))).cpu()
                bar.update(len(numbers))
    finally:
        model.train(training)


def generate_all(model: ImageModel, labels: Tensor | None, count: int, batch: int, title: str = "") -> Tensor:
    """Images 0..count-1, uint8 [N C H W]"""
    return torch.cat([images for _, images in generate(model, labels, count, batch, title)])


def provenance() -> dict[str, str]:
    """How a figure or a checkpoint came to be: command (paths shortened to their last part), versions, machine."""
    import platform
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else \
        f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {"command": " ".join(Path(word).name if os.sep in word else word for word in sys.argv),
            "torch": str(torch.__version__), "hardware": hardware, "date": time.strftime("%Y-%m-%d")}


@torch.no_grad()
def held_out(model: Family, data: Any, device: torch.device, count: int | None = None) -> dict[str, float]:
    """The family's own figures on `count` held-out examples, with noise that is the same every time."""
    sums, total = collections.Counter(), 0
    for batch in data.held_out(count or model.held_out_count, device):
        total += len(batch[0])
        for key, value in model.validate(batch).items():
            sums[key] += value * len(batch[0])
    return {key: value / total for key, value in sums.items()}


def drawing_speed(model: ImageModel) -> dict[str, Any]:
    """Milliseconds per image one by one and in the best batches: medians of about a second's work for each size."""
    speeds: dict[int, float] = {}
    for size in (1, 8, 64, 256):
        labels, times = proportional_labels(model.data, size, model.labelled), []
        while not times or (len(times) < 100 and sum(times) < (1 if len(times) > 1 else 5)):
            started = time.perf_counter()
            generate_all(model, labels, size, size)
            times.append(time.perf_counter() - started)
        speeds[size] = 1000 / size * float(np.median(times[1:] or times))  # the first one warms up
        if sum(times) > 5:
            break
    best = min(speeds, key=speeds.__getitem__)
    return {"ms_per_image_at_batch_1": round(speeds[1], 4), "ms_per_image_at_best_batch": round(speeds[best], 4),
            "best_batch": best}


def evaluate_samples(options: MeasureOptions, model: ImageModel, images: Images) -> dict[str, Any]:
    """Draw, measure, and measure as many real training images in the same way."""
    device = next(model.parameters()).device
    net, reason = find_feature_net(options, model.data, device)
    say(f"measured by {net.describe()}" if net else f"no FID: {reason}")
    count = options.eval_samples or min(10_000, len(images.test))
    labels, started = proportional_labels(model.data, count, model.labelled), time.perf_counter()
    drawn = generate_all(model, labels, count, options.sample_batch, "drawing")
    seconds = time.perf_counter() - started
    order, reference = some_rows(images.train, count), images.test[some_rows(images.test, count)]
    common = {"n": count, "n_floor": len(order), "n_reference": len(reference), "reference": "test"}
    metrics: dict[str, Any] = {} if net else {"fid": {"value": None, "reason": reason}}
    if net:
        target = net(reference)
        values, reasons = measure(net(drawn), target, net, labels)
        floors, _ = measure(net(images.train[order]), target, net, images.train_labels[order])
        for key, value in values.items():
            metrics[key] = {"value": value, "floor": floors[key], **common, "feature_net": net.name,
                            "feature_net_sha256": net.digest} | ({"reason": reasons[key]} if key in reasons else {})
    metrics["near_copies"] = near_copies(drawn, images.train, reference) | common
    return {"num_samples": count, "sampling_seconds": round(seconds, 1),
            "images_per_second": round(count / seconds, 1), "metrics": metrics}


def evaluate_model(options: MeasureOptions, model: ImageModel, state: dict, path: Path,
                   images: Images) -> dict[str, Any]:
    """All that can be measured of a model."""
    started, device = time.perf_counter(), next(model.parameters()).device
    seconds = [None, *(r["seconds"] for r in state["history"] if "seconds" in r)]
    report = {"model": family_name(type(model)), "checkpoint": str(path), "checkpoint_sha256": file_digest(path),
              "parameters": sum(p.numel() for p in model.parameters()), "training_made": state["made"],
              "training_seconds": state.get("seconds", seconds[-1]), "dataset": model.data.title,
              "seed": model.config.seed, "device": str(device),
              "precision": str(model.precision).removeprefix("torch."), "metrics": {}} | model.describe_sampling()
    if model.can_sample:
        report |= evaluate_samples(options, model, images) | drawing_speed(model)
    if model.measures_held_out:
        count = len(images.test)
        report["metrics"] |= {k: {"value": v, "n": count, "reference": "test"}
                              for k, v in held_out(model, images, device, count).items()}
        report["metrics"] |= model.more_figures(images, device)
    return report | {"seconds": round(time.perf_counter() - started, 1), "machine": provenance()}


def print_report(report: dict[str, Any], path: Path) -> None:
    how = [f"{k} {report[k]}" for k in ("sampler", "steps", "guidance", "num_samples") if k in report]
    say(f"{report['model']} on {report['dataset']}: {', '.join([*how, 'seed ' + str(report['seed'])])}")
    minutes = "unknown" if report["training_seconds"] is None else f"{report['training_seconds'] / 60:.1f} minutes"
    alone, best = (report.get(f"ms_per_image_at_{key}", 0) for key in ("batch_1", "best_batch"))
    say(f"{report['parameters'] / 1e6:.2f} M parameters, trained for {minutes}" + (
        f"; {alone:.3g} ms for one image, {best:.3g} ms each in batches of {report['best_batch']}" if best else ""))
    say(f"{'metric':34}{'value':>12}{'real data':>12}")
    for key, entry in report["metrics"].items():
        cells = "".join(f"{'-' if entry.get(k) is None else format(entry[k], '.4f'):>12}" for k in ("value", "floor"))
        say(f"{key:34}{cells}" + (f"  ({entry['reason']})" if "reason" in entry else ""))
    say(f"-> {path}")


class Between:
    """What happens between epochs, on the main process alone: averaged weights draw, and are measured such that it
    costs at most a tenth of the work of training."""

    def __init__(self, command: Command, model: ImageModel, images: Images, world: World) -> None:
        self.notes: list[str] = []
        self.remembered: dict[str, Any] = {}
        self.net: FeatureNet | None = None
        self.epochs = model.config.epochs
        if model.config.batch_size > len(images.train):
            self.notes.append(f"--batch_size {model.config.batch_size} is more than there are images: using "
                              f"{len(images.train)}")
        if model.can_sample:
            self.options = command.options(TrainSampling)
            self.labels, self.names = pick_labels(self.options.label, model)
            if world.main:
                self.prepare(model, images, world, (command.state or {}).get("run", {}).get("feature_net_sha256"))

    def prepare(self, model: ImageModel, images: Images, world: World, earlier: str | None) -> None:
        """Find the net, and measure as many real training images once: the floor of every later figure."""
        try:
            net, reason = find_feature_net(self.options, model.data, world.device)
        except UserError as error:  # a misfit must not keep anybody from training
            if self.options.fid_features == "inception" or error.code == 2:
                raise
            net, reason = None, str(error)
        if net and earlier not in (None, net.digest):
            self.remembered = {"feature_net_sha256": earlier}
            net, reason = None, (f"{net.name} is another file ({net.digest[:12]}) than this run was measured by so far "
                                 f"({earlier[:12]})")
        if net is None:
            self.notes.append(f"no FID while training: {reason}")
            return
        self.net, self.remembered = net, {"feature_net": net.name, "feature_net_sha256": net.digest}
        self.count = self.options.eval_samples or min(400, len(images.test))
        passes = self.count * model.describe_sampling().get("network_evaluations", 1)
        self.every = math.ceil(passes / (EVALUATION_SHARE * 3 * len(images.train)))  # a training step is about 3 passes
        self.reference, real = (net(split[some_rows(split, self.count)]) for split in (images.test, images.train))
        floors, _ = measure(real, self.reference, net, quick=True)
        self.floors = {f"real_{k}": v for k, v in floors.items() if not k.endswith("_std")}
        often = "after the last epoch" if self.every >= self.epochs else "after each epoch" if self.every == 1 else \
            f"every {self.every} epochs and after the last"
        self.notes.append(f"{often}: {self.count} samples measured against as many test images by {net.describe()}")

    def measure(self, trainer: Trainer, epoch: int) -> dict[str, Any]:
        if self.net is None or (epoch % self.every and epoch != self.epochs):
            return {}
        model = trainer.averaged
        labels = proportional_labels(model.data, self.count, model.labelled)
        drawn = generate_all(model, labels, self.count, 250, f"measuring epoch {epoch}")
        scores, _ = measure(self.net(drawn), self.reference, self.net, quick=True)
        shown = {k: (v, self.floors.get(f"real_{k}")) for k, v in scores.items() if k.startswith(("fid", "is_"))}
        say(f"{self.count} samples of epoch {epoch}: " + ", ".join(
            f"{k} {v:.4g} (real {real:.4g})" for k, (v, real) in shown.items() if None not in (v, real)))
        return scores | self.floors | self.remembered | {"eval_samples": self.count}

    def draw(self, trainer: Trainer, epoch: int) -> None:
        model, last = trainer.averaged, epoch == self.epochs
        milestone = epoch in (1, 5) or last or epoch % model.panel_every == 0
        if model.can_sample and milestone:
            drawn = generate_all(model, self.labels, self.options.num_samples, self.options.sample_batch)
            pictures = {f"epoch_comparisons/samples_epoch_{epoch:03d}.png": (f"epoch {epoch}",)}
            if last:
                pictures["final_samples.png"] = f"after {epoch} epochs", sampling_title(model)
            for name, words in pictures.items():
                grid_image(drawn, trainer.results / name, title_of(model, *words), self.names)
        if milestone or epoch < 20:  # an epoch of a small dataset is shorter than drawing a chart
            draw_curves(trainer)


# === figures ===

GRID = 400  # most images in one picture


def picture(image: Tensor) -> Any:
    """uint8 [C H W] -> PIL image"""
    from PIL import Image
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def grid_image(images: Tensor, path: Path, title: str, names: Sequence[str] | None = None) -> None:
    """Save uint8 images [N C H W] as one picture: enlarged by a whole factor, a caption above, names below in turn.
    (Pillow rather than matplotlib: drawing samples should not wait for a plotting library to load.)"""
    from PIL import Image, ImageDraw, ImageFont
    count, size = len(images), images.shape[-1]
    columns = math.ceil(math.sqrt(count)) if count > 8 else count
    scale, gap, head, foot = max(1, 96 // size), 8, 34, 16 if names else 0
    cell = size * scale
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    width = max(columns * (cell + gap) + gap, int(font.getlength(title)) + 2 * gap)
    left = (width - columns * (cell + gap) + gap) // 2
    canvas = Image.new("RGB", (width, head + -(-count // columns) * (cell + foot + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((gap, 8), title, fill="black", font=font)
    for i, image in enumerate(images):
        x, y = left + i % columns * (cell + gap), head + i // columns * (cell + foot + gap)
        canvas.paste(picture(image).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        if names:
            pen.text((x + cell // 2, y + cell + 1), names[i % len(names)][:14], fill="#555555", font=small, anchor="ma")
    with replacing(path) as part:
        canvas.save(part, format="PNG")


def plot(path: Path, title: str, panels: list[tuple[str, dict[str, list[tuple]], str]]) -> None:
    """Line charts over epochs side by side, written as PNG: panels of (y label, {curve: [(x, y), ...]}, y scale)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (label, curves, scale) in zip(axes[0], panels, strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 50 else None, markersize=4, label=name)
        axis.set(xlabel="epoch", ylabel=label, yscale=scale)
        axis.set_xlim(0, 1.03 * axis.get_xlim()[1])  # from 0: also one epoch has two ticks
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if scale == "log":  # 0.2, not 2 x 10^-1; and several ticks, also over less than a decade
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(6))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130)
    plt.close(figure)


def title_of(model: Family, *more: str) -> str:
    return " · ".join(filter(None, [family_name(type(model)), model.data.title, *more]))


def sampling_title(model: Family) -> str:
    how = model.describe_sampling()
    return ", ".join(f"{how[k]} {k}" if k == "steps" else f"{how[k]}" for k in ("sampler", "steps") if k in how)


def draw_curves(trainer: Trainer) -> None:
    """training_loss.png and, for families that draw images, epoch_comparisons/metrics_comparison.png."""
    history, model, results = trainer.history, trainer.model, trainer.results
    epochs, steps = ([r for r in history if ("epoch" in r) is kind] for kind in (True, False))
    players = [name for name in trainer.stat_names if name.endswith("_loss")]  # their sum would say nothing
    names = {name: name for name in players} or {"loss": "training"}
    curves = {f"{title}, per {SUBJECT.log_every} steps": [(r["step"] / trainer.steps_per_epoch, r[name]) for r in steps]
              for name, title in names.items()}
    if "val_loss" in epochs[0]:
        curves["held out, averaged weights"] = [(r["epoch"], r["val_loss"]) for r in epochs]
    scale = "log" if model.descends else "linear"
    plot(results / "training_loss.png", title_of(model, "loss"), [("loss", curves, scale)])
    if not model.can_sample:
        return
    panels = [("loss", {f"{title}, epoch mean": [(r["epoch"], r[name]) for r in epochs] for name, title in
                        names.items()}, "linear")]
    for prefix, scale in (("fid_", "log"), ("is_", "linear")):
        for name in sorted({k for r in epochs for k in r if k.startswith(prefix) and not k.endswith("_std")}):
            curves = {label: [(r["epoch"], r[k]) for r in epochs if r.get(k) is not None]
                      for label, k in ((name, name), ("as many real training images", f"real_{name}"))}
            if curves[name]:
                count = max(r.get("eval_samples", 0) for r in epochs)
                panels.append((f"{name}, {count} samples", curves, scale))
    plot(results / "epoch_comparisons" / "metrics_comparison.png", title_of(model, "over epochs"), panels)


# === subject ===
# What the machine room must know of images.


sample_count = number(int, 1, 1_000_000)  # as many as names of six digits tell apart


@dataclass(frozen=True)
class TrainSampling(MeasureOptions):
    """Flags of --mode train for a family that draws."""
    num_samples: int = option(16, "sampling", "images in each epoch's picture", number(int, 1, GRID))
    label: str | None = option(None, "sampling", "classes to draw, in turn, e.g. 7 or 0,1,2 (default: all)", str)


@dataclass(frozen=True)
class ExportOptions:
    """Flags of --mode infer for any family."""
    export: Path | None = option(None, "run", "also write the averaged weights, in half precision, here", Path)


@dataclass(frozen=True)
class InferOptions(ExportOptions):
    num_samples: int = option(16, "sampling", "images to draw", sample_count)
    sample_batch: int = option(250, "sampling", "images drawn at once, bounds the memory", number(int, 1))
    label: str | None = option(None, "sampling", "classes to draw, in turn, e.g. 7 or 0,1,2 (default: all)", str)
    output_dir: Path | None = option(None, "sampling", "also save each image as a PNG file of its own here", Path)


@dataclass(frozen=True)
class ClassifyOptions(ExportOptions):
    input: tuple[Path, ...] | None = option(None, "sampling", "image files to name the classes of", Path, nargs="+")


@dataclass(frozen=True)
class WhichDataset:
    dataset: str = option("mnist", "data", "that the model was trained on", choices=DATASETS)


DiffusionModel.options = VaeModel.options = GanModel.options = {
    "train": TrainSampling, "infer": InferOptions, "evaluate": MeasureOptions}
Nothing = dataclasses.make_dataclass("Nothing", ())  # no flags of its own
Classifier.options = {"train": Nothing, "infer": ClassifyOptions, "evaluate": Nothing}
ImageModel.data_options = {"train": DataOptions, "infer": WhichDataset, "evaluate": DataOptions}
ImageModel.remembered = ("dataset", "data_root", "image_size", "skip_bad")


def named_classes(text: str, classes: Sequence[str]) -> list[str]:
    """The classes in a comma-separated list; the one whose name holds commas stands alone."""
    names = [text] if text in classes else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in classes]:
        raise UserError(f"--label {unknown[0]}: the classes are {', '.join(classes[:20])}", 2)
    return names


def pick_labels(text: str | None, model: ImageModel) -> tuple[Tensor | None, list[str] | None]:
    """The classes of `--label`, which the images go through in turn, and their names; None where there are none."""
    classes = model.data.classes
    if not model.labelled:
        if text is not None:
            raise UserError(f"--label {text}: the model was trained without labels", 2)
        return None, None
    chosen = classes if text is None else named_classes(text, classes)
    return torch.tensor([classes.index(name) for name in chosen]), list(chosen)


class ImageSubject:
    """The machine room's window on images."""
    format = "image_gen/1"
    dataset, stand_ins = "mnist", {"digits"}
    preferred = ("diffusion", "vae", "gan")  # families to look for when none is named
    unit, log_every, between = "image", 25, Between
    shown = ("val_",)
    outputs = ("metrics.jsonl", "training_loss.png", "final_samples.png", "epoch_comparisons", "evaluation.json", *(
        f"{task}.{kind}" for task in ("reconstruct", "interpolate", "traverse", "inspect", "denoise", "ood", "latent")
        for kind in ("png", "gif", "json")))

    def shipped(self, key: str, dataset: str | None = None) -> Path:
        return HERE / "pretrained" / f"{key}_{dataset or self.dataset}.pt"

    def load(self, command: Command, world: World | None = None) -> Images:
        options = command.options(DataOptions)
        if options.dataset == "folder" and options.image_size is None and command.state:
            options = dataclasses.replace(options, image_size=command.state["data"]["image_size"])
        if options.data_root and options.data_root.resolve() == command.results().resolve():
            raise UserError(f"{options.data_root} is the data folder: name another --results_dir", 2)
        return load_images(options, world)

    def trained_on(self, command: Command) -> Images:
        """The data of the checkpoint at hand."""
        images, info = self.load(command), DataInfo(**known_fields(DataInfo, command.state["data"]))
        if images.info() != info:
            raise UserError(f"{command.path} was trained on {info.title} ({info.train_images} images of "
                            f"{info.image_size} pixels), not on this data: give its --dataset and --data_root", 2)
        return images

    def prepare(self, command: Command, world: World) -> int:
        images = self.load(command, world)
        if world.main:
            say(f"ready: {images.describe()}")
        return 0

    def infer(self, command: Command, world: World) -> int:
        """--mode infer: draw images."""
        model, options = command.model(world), command.options(InferOptions)
        if not model.can_sample:
            return self.classify(model, command)
        results = results_folder(command.results())
        labels, names = pick_labels(options.label, model)
        shipped = " (the shipped weights)" if command.path.parent == HERE / "pretrained" else ""
        say(f"{title_of(model)} from {command.path}{shipped}")
        if options.export:
            export_model(model, command.state, options.export)
        output, count, shown = options.output_dir and results_folder(options.output_dir), options.num_samples, []
        digits, started = max(5, len(str(count - 1))), time.perf_counter()
        for numbers, images in generate(model, labels, count, options.sample_batch,
                                        "drawing" if count > options.sample_batch else ""):
            shown += images[:max(0, GRID - len(shown))]
            for i, image in zip(numbers, images, strict=True) if output else ():
                label = re.sub(r"[^\w\-+.]", "-", names[i % len(names)]) if names else ""
                with replacing(output / f"{i:0{digits}d}{f'_label{label}' if names else ''}.png") as file:
                    picture(image).save(file, format="PNG")
        seconds = time.perf_counter() - started
        title = title_of(model, sampling_title(model))
        grid_image(torch.stack(shown), results / "final_samples.png", title, names)
        more = f" (the first {GRID} of them in the picture)" if count > GRID else ""
        say(f"{count} image(s){more} -> {results / 'final_samples.png'}" + (f", each in {output}" if output else "")
            + f"\n{seconds:.2f} s, {count / seconds:.1f} images/s on {world.device}")
        return 0

    @torch.no_grad()
    def classify(self, model: Classifier, command: Command) -> int:
        """--mode infer of a classifier: the likeliest classes of image files."""
        options = command.options(ClassifyOptions)
        if options.export:
            export_model(model, command.state, options.export)
        elif not options.input:
            raise UserError("--model classifier names what is in pictures: give some with --input", 2)
        for path in options.input or ():
            image = own_images([path], model.data).to(next(model.parameters()).device)
            best = model(to_float(image))[1].softmax(1)[0].topk(min(3, len(model.data.classes)))
            say(f"{path}: " + ", ".join(f"{model.data.classes[k]} {share:.1%}" for share, k in
                                        zip(best.values.tolist(), best.indices.tolist(), strict=True)))
        return 0

    def evaluate(self, command: Command, world: World) -> int:
        """--mode evaluate: every metric with its floor (real training images in the place of the model's)."""
        model, images = command.model(world), self.trained_on(command)
        results = results_folder(command.results())
        report = evaluate_model(command.options(MeasureOptions), model, command.state, command.path, images)
        write_json(results / "evaluation.json", report)
        print_report(report, results / "evaluation.json")
        return 0


SUBJECT = ImageSubject()


# === machine room ===
# The same lines stand in both scripts, so that each runs alone. They know neither images nor sound: what they need
# comes through FAMILIES, SUBJECT and the data object (info, describe, plan, training_batch, held_out).

MODES = ("train", "infer", "evaluate")
EXPLODED = 10  # a mean loss that rose by this many times the first one is divergence, not noise

def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`; a device that is asked for and absent is an error."""
    cuda, metal = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    name = ("cuda" if cuda else "mps" if metal else "cpu") if name == "auto" else name
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name, re.ASCII):
        raise UserError(f"--device {name}: is not auto, cpu, cuda, cuda:N or mps", 2)
    index = int(name[5:] or local_rank) if name.startswith("cuda") else -1
    if index >= cuda or (name == "mps" and not metal):
        raise UserError(f"--device {name}: PyTorch sees {cuda} CUDA device(s) here: use --device cpu or auto")
    return torch.device("cuda", index) if index >= 0 else torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively (emulation is slower than float32)."""
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    elif name == "auto":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if device.type == "cpu" else ()
        name = "bfloat16" if any(getattr(torch.cpu, probe, bool)() for probe in probes) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


class World:
    """The processes of one torchrun; alone without it. Every rank runs the same steps, rank 0 alone writes."""

    def __init__(self, device_name: str) -> None:
        try:
            self.rank, self.size, local = (int(os.environ.get(*pair)) for pair in
                                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
            if not 0 <= self.rank < self.size or local < 0:
                raise ValueError(f"RANK {self.rank}, LOCAL_RANK {local} of WORLD_SIZE {self.size}")
            self.device, self.main = pick_device(device_name, local), self.rank == 0
            if self.size > 1:  # a master that can't be reached is waited for less than a minute
                meeting = torch.distributed.rendezvous("env://", timeout=datetime.timedelta(seconds=50))
                torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                                     store=next(meeting)[0], rank=self.rank, world_size=self.size)
        except (ValueError, RuntimeError) as error:
            raise UserError("RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are not as torchrun sets them "
                            f"({first_line(error)}): start the script with torchrun, or unset them", 2) from None

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes: one all-reduce over one flat buffer."""
        if self.size > 1:
            flat = torch.cat([t.detach().float().flatten() for t in tensors])
            torch.distributed.all_reduce(flat)
            for tensor, mean in zip(tensors, (flat / self.size).split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


class Trainer:
    """One training run: it owns the weights, their moving average, the optimizers and the position."""

    def __init__(self, model: Family, data: Any, world: World, checkpoint: Path, results: Path,
                 remembered: dict[str, Any]) -> None:
        from torch.optim.swa_utils import AveragedModel
        self.config, self.data, self.world = model.config, data, world
        self.checkpoint, self.results, self.remembered = checkpoint, results, remembered
        self.model = model.to(world.device, memory_format=torch.channels_last)
        self.batch_size, self.steps_per_epoch = data.plan(self.config)
        if self.batch_size % world.size:
            raise UserError(f"--batch_size {self.batch_size} can't be shared by {world.size} processes: use a multiple "
                            f"of {world.size}", 2)
        self.total = self.config.epochs * self.steps_per_epoch
        self.ema = AveragedModel(self.model, multi_avg_fn=self._average, use_buffers=True)
        self.averaged = self.ema.module  # all samples and held-out figures come from these weights
        self.optimizers = {name: model.optimizer(player) for name, player in self.model.players().items()}
        self.step = self.epoch_done = self.signal = 0
        self.seconds, self.fresh, self.resumed = 0.0, True, False  # fresh: nothing of this run is written yet
        self.history, self.stat_names, self.warned = [], [], []
        self.sums = torch.zeros(2, device=world.device)  # of the epoch: loss, steps, statistics;
        self.looked = torch.zeros(2, device=world.device)  # and what they were at the last look
        self.stop_all = torch.zeros(1, device=world.device)
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._stop)

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], _count: Any) -> None:
        """EMA whose memory grows with the run, so that early epochs do not show the initial weights."""
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - min(self.config.ema_decay, (1 + self.step) / (10 + self.step)))

    def _stop(self, number: int, _frame: Any) -> None:
        """The first Ctrl-C or SIGTERM is a flag that the training loop looks at; a second one is immediate."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        say(f"\n{signal.Signals(number).name}: saving, then stopping (again: at once)", sys.stderr)

    def stopped(self) -> int:
        """The number of the signal that asked to stop, 0 if none: the same answer in all processes."""
        if self.world.size > 1:
            return (self.signal or int(signal.SIGTERM)) if self.stop_all.item() else 0
        return self.signal

    def save(self) -> None:
        """Write the checkpoint, unless the weights have become useless: then the last good one stays."""
        if not all(torch.isfinite(value).all() for value in self.model.state_dict().values()):
            self._diverged("the weights are no longer finite")
        self.world.average([self.sums, self.looked])  # so that another number of processes can take over
        if self.world.main:
            save_checkpoint(self.checkpoint, {
                "format": SUBJECT.format, "family": family_name(type(self.model)), "made": provenance(),
                "config": dataclasses.asdict(self.config), "data": dataclasses.asdict(self.model.data),
                "run": self.remembered, "model": self.model.state_dict(), "ema": self.averaged.state_dict(),
                "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()}, "step": self.step,
                "epoch_done": self.epoch_done, "sums": self.sums.cpu(), "looked": self.looked.cpu(),
                "stat_names": self.stat_names, "seconds": self.seconds, "history": self.history}, self._keep_previous)
            if self.fresh:  # what a checkpoint does not know happened after it, and will happen again
                with replacing(self.results / "metrics.jsonl") as part:
                    part.write_text("".join(json.dumps(r) + "\n" for r in self.history))
        self.fresh = False

    def _keep_previous(self) -> None:
        """An earlier run's checkpoint and results move aside together, now that something whole takes their place."""
        if not self.fresh or self.resumed:
            return
        names = ((self.checkpoint.with_suffix(f".previous{n}{self.checkpoint.suffix}"),
                  Path(f"{self.results.resolve()}.previous{n}")) for n in itertools.count(1))
        old, folder = next(pair for pair in names if not any(map(os.path.lexists, pair)))
        for path in [self.results / name for name in SUBJECT.outputs if (self.results / name).exists()]:
            os.replace(path, results_folder(folder) / path.name)
        if self.checkpoint.exists():
            os.replace(self.checkpoint, old)
            say(f"the model that was in {self.checkpoint} is kept as {old.name}, its results in {folder}")

    def load(self, state: dict) -> None:
        """Continue where `state` stopped: on a CPU bit for bit."""
        try:
            self.model.load_state_dict(state["model"])
            self.averaged.load_state_dict(state["ema"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            self.ema.n_averaged.fill_(state["step"])
            self.step, self.epoch_done, self.seconds = state["step"], state["epoch_done"], float(state["seconds"])
            self.sums, self.looked = (state[key].to(self.world.device) for key in ("sums", "looked"))
            self.history, self.stat_names, self.resumed = list(state["history"]), list(state["stat_names"]), True
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{self.checkpoint} can't be resumed ({first_line(error)}): only one that --mode train of "
                            "this version wrote can be continued") from None

    def train_step(self) -> None:
        share, total, stats = self.batch_size // self.world.size, 0.0, {}
        rows = slice(self.world.rank * share, (self.world.rank + 1) * share)
        draw = Draw(self.config.seed, self.step, self.batch_size, rows, self.world.device)
        batch = self.data.training_batch(self.config, self.step, draw)._replace(progress=self.step / self.total)
        for player, loss, more in self.model.losses(batch):
            optimizer, parameters = self.optimizers[player], list(self.model.players()[player].parameters())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.stop_all.fill_(float(self.signal))  # rides along: all processes stop after the same step
            self.world.average([*(p.grad for p in parameters if p.grad is not None), self.stop_all, *more.values()])
            nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.config.rate(self.step, self.total)
            optimizer.step()
            total, stats = total + loss.detach(), stats | more
        if self.stat_names != list(stats):  # the first step
            self.stat_names = list(stats)
            self.sums, self.looked = (F.pad(sums[:2], (0, len(stats))) for sums in (self.sums, self.looked))
        self.sums += torch.stack([total, torch.ones_like(total), *stats.values()])
        self.ema.update_parameters(self.model)
        self.step += 1

    def means(self, sums: Tensor) -> dict[str, float]:
        """Means over steps and processes of the loss and the family's statistics."""
        found = sums / sums[1]
        self.world.average([found])
        loss, _, *stats = found.tolist()
        values = {"loss": loss, **dict(zip(self.stat_names, stats, strict=True))}
        for name, value in values.items():
            if not math.isfinite(value):
                self._diverged(f"the {name} is {value}")
        return values

    def _diverged(self, what: str) -> None:
        kept = "nothing of this run was written, an earlier one is untouched" if self.fresh else \
            f"the last good checkpoint is kept in {self.checkpoint}"
        raise UserError(f"training diverged at step {self.step}: {what}; {kept}. Try a lower --learning_rate or "
                        "--precision float32")

    def record(self, **values: Any) -> None:
        """Append a line to metrics.jsonl and to the history that the checkpoint carries."""
        self.history.append({"step": self.step, **values})
        if self.world.main and not self.fresh:
            with open(self.results / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.history[-1], allow_nan=False) + "\n")

    def fit(self, between: Any) -> None:
        """Train to the last epoch or a stop signal; `between` measures and draws after each epoch."""
        while self.epoch_done < self.config.epochs and not self.stopped():
            self._epoch(self.epoch_done + 1)
            if self.step == (self.epoch_done + 1) * self.steps_per_epoch:
                self._finish_epoch(self.epoch_done + 1, between)
        self.save()

    def _epoch(self, epoch: int) -> None:
        end, start = epoch * self.steps_per_epoch, self.step - (epoch - 1) * self.steps_per_epoch
        self.model.train()
        started = time.perf_counter()
        with progress(self.steps_per_epoch * self.batch_size, f"epoch {epoch}/{self.config.epochs}",
                      not self.world.main, initial=start * self.batch_size, unit=SUBJECT.unit) as bar:
            while self.step < end:
                self.train_step()
                if self.step % SUBJECT.log_every == 0 or self.step == end:
                    self._look(bar)
                    self.seconds, started = self.seconds + time.perf_counter() - started, time.perf_counter()
                if self.stopped():
                    break
                if self.step % self.config.save_every == 0 and self.step < end:
                    self.save()
                bar.update(self.batch_size)
        self.seconds += time.perf_counter() - started

    def _look(self, bar: Any) -> None:
        """Fetch the mean loss since the last look: log it, and stop a run that has left the rails."""
        values = self.means(self.sums - self.looked)
        self.looked.copy_(self.sums)
        first = next((r["loss"] for r in self.history if "loss" in r and "epoch" not in r), values["loss"])
        if self.model.descends and values["loss"] > first + EXPLODED * max(abs(first), 1):  # losses may be negative
            self._diverged(f"the loss rose from {first:.3g} to {values['loss']:.3g}")
        self.record(**values)
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def _finish_epoch(self, epoch: int, between: Any) -> None:
        """Save first, then measure and draw: a crash while measuring costs nothing but the measurement."""
        self.averaged.eval()
        figures = held_out(self.averaged, self.data, self.world.device)
        if not all(map(math.isfinite, figures.values())):
            self._diverged("the held-out figures are not finite")
        self.save()
        rate = self.step * self.batch_size / self.seconds
        values = {"epoch": epoch, **self.means(self.sums), "seconds": round(self.seconds, 2),
                  f"{SUBJECT.unit}s_per_second": round(rate, 1),
                  "learning_rate": next(iter(self.optimizers.values())).param_groups[0]["lr"]} | figures
        values |= between.measure(self, epoch) if self.world.main else {}
        self.sums.zero_()
        self.looked.zero_()
        self.epoch_done = epoch
        self.record(**values)
        if self.world.main:
            between.draw(self, epoch)
        self.save()
        if self.world.main:
            shown = (f", {k} {v:.4g}" for k, v in values.items() if isinstance(v, float) and not k.endswith("_std")
                     and (k in self.stat_names or k.startswith(SUBJECT.shown)))
            say(f"epoch {epoch}: loss {values['loss']:.4f}, {rate:.0f} {SUBJECT.unit}s/s" + "".join(shown))
            for line in (found := self.model.warnings(values)):
                if line not in self.warned:
                    say(f"warning: {line}", sys.stderr)
            self.warned = found  # said again when it comes back, not every epoch


@dataclass(frozen=True)
class RunOptions:  # flags of every mode
    mode: str = option("train", "run", "what to do", choices=MODES)
    model: str | None = option(None, "run", "family; else the first to train, the latest to see", choices=[*FAMILIES])
    checkpoint: Path | None = option(None, "run", "file to write or read; else in models/ (or pretrained/)", Path)
    results_dir: Path | None = option(None, "run", "folder to write to; else results/ beside this script", Path)
    device: str = option("auto", "run", "auto, cpu, cuda, cuda:N or mps", str)
    precision: str = option("auto", "run", "of the networks; auto: bfloat16 where the hardware has it",
                            choices=("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class TrainOptions:  # flags of training any family
    resume: bool = option(False, "run", "continue the run that --checkpoint holds, exactly: it knows its options")
    prepare_data: bool = option(False, "data", "only fetch and check the data, then exit (status 3: no network)")


@dataclass(frozen=True)
class Command:
    """A command line, read: what was `given` for which family, and the checkpoint (`state` from `path`) to look at."""
    mode: str
    key: str
    given: dict[str, Any]
    path: Path | None = None
    state: dict | None = None

    def options(self, kind: type) -> Any:
        """The flags of one dataclass, the others at their defaults."""
        return kind(**known_fields(kind, self.given))

    def results(self) -> Path:
        return self.given.get("results_dir") or HERE / "results" / FAMILIES[self.key].results_folder

    def model(self, world: World) -> Family:
        """The checkpoint's, with the options that were given, ready to be looked at."""
        config = known_fields(FAMILIES[self.key].config_class, self.given)
        model = restore_model(self.state, **config).to(world.device).eval()
        model.precision = pick_precision(self.given.get("precision", "auto"), world.device)
        return model


def flags(mode: str, key: str, extra: type | None = None) -> dict[str, dataclasses.Field]:
    """What a mode and family can be told, name -> field; `extra` takes the place of the mode's own options."""
    kinds = [RunOptions, *[TrainOptions] * (mode == "train"), FAMILIES[key].data_options[mode],
             FAMILIES[key].config_class, extra or FAMILIES[key].options[mode]]
    return {f.name: f for kind in kinds for f in dataclasses.fields(kind)
            if mode == "train" or f.metadata["group"] not in ("optimisation", "model")}


def unknown_flag(word: str, mode: str, key: str) -> str:
    """Whose flag it is, where another mode or family has it."""
    name = word.removeprefix("--").split("=")[0]
    uses = [(m, k) for m in MODES for k in FAMILIES if name in flags(m, k)]
    if not word.startswith("--") or not uses:
        near = difflib.get_close_matches(name, {n for m in MODES for k in FAMILIES for n in flags(m, k)}, 1)
        return f"unknown argument {word}" + (f": did you mean --{near[0]}?" if near else " (--help lists all flags)")
    if families := [k for m, k in uses if m == mode]:
        return f"--{name} belongs to --model {' or '.join(families)}, not to {key}"
    fixed = ": the checkpoint fixes it" * (name in {f.name for f in dataclasses.fields(FAMILIES[key].config_class)})
    modes = " or ".join(dict.fromkeys(m for m, _ in uses))
    return f"--{name} has no effect with --mode {mode}, only with --mode {modes}{fixed}"


def environment(known: dict[str, dataclasses.Field]) -> list[str]:
    """For the wrappers: variables named like flags, in capitals, as flags; near misses are said."""
    words: list[str] = []
    for variable, value in os.environ.items() if os.environ.get("FLAGS_FROM_ENVIRONMENT") == "1" else ():
        name = variable.lower()
        if name in known and variable.isupper() and name != "mode" and value:
            yes = value.lower() not in ("0", "no", "false")
            if isinstance(known[name].default, bool):
                words += [f"--{'' if yes else 'no-'}{name}"] * (yes != known[name].default)
            elif known[name].metadata["nargs"] and not os.path.exists(value):  # several: "my song.wav" b.wav
                words += [f"--{name}", *(word.strip("\"'") for word in re.findall(r"\"[^\"]*\"|'[^']*'|\S+", value))]
            else:
                words.append(f"--{name}={value}")
        elif variable.isupper() and name not in known and (near := difflib.get_close_matches(name, known, 1, 0.85)):
            say(f"warning: the variable {variable} is ignored: did you mean {near[0].upper()}?", sys.stderr)
    return words


def read_command(argv: Sequence[str] | None, mode: str = "", able: Sequence[str] = (), extra: type | None = None,
                 **parser: Any) -> Command:
    """Two stages: what decides which flags there are (--mode, --model, --checkpoint, --resume, --dataset), then those.
    `able` are the families to choose from where none is named."""
    words = list(sys.argv[1:] if argv is None else argv)
    early = [*dataclasses.fields(RunOptions)[:3], dataclasses.fields(TrainOptions)[0],
             *[f for k in FAMILIES for name, f in flags("infer", k).items() if name == "dataset"][:1]]
    mode = mode or vars(Parser(early, add_help=False).parse_known_args(words)[0]).get("mode", "train")
    words = environment({n: f for k in able or FAMILIES for n, f in flags(mode, k, extra).items()}) + words
    first = vars(Parser(early, add_help=False).parse_known_args(words)[0])
    keys = [first["model"]] if "model" in first else able or ([*FAMILIES] if mode == "train" else SUBJECT.preferred)
    path = state = None
    if (mode != "train" or "resume" in first) and not {"-h", "--help"} & set(words):
        path, state = find_checkpoint(first, keys)
    key = state["family"] if state else keys[0]
    given, unknown = Parser(flags(mode, key, extra).values(), **parser).parse_known_args(words)
    if unknown:
        raise UserError(unknown_flag(unknown[0], mode, key), 2)
    if key not in keys and ("model" in first or able):
        raise UserError(f"{path} holds a {key} model, needed is {' or '.join(keys)}: name another --checkpoint", 2)
    return Command(mode, key, remembered(vars(given), state, path, mode) if state else vars(given), path, state)


def remembered(given: dict[str, Any], state: dict, path: Path, mode: str) -> dict[str, Any]:
    """What the run that is continued was told, unless it may change half-way; for a look at a model, its data."""
    known = {n: f for n, f in flags("train", state["family"]).items()
             if mode == "train" or n in FAMILIES[state["family"]].remembered}
    run = FAMILIES[state["family"]].older | state.get("run", {"dataset": state["data"]["dataset"]}) | state["config"]
    run = {name: Path(value) if value is not None and known[name].metadata["type"] is Path else value
           for name, value in run.items() if name in known and (mode == "train" or value is not None)}
    for name, value in given.items():
        if name in run and run[name] != value and name not in ("epochs", "save_every", "device") and \
                known[name].metadata["type"] is not Path:  # folders may have moved: what is in them is compared
            raise UserError(f"{path} was made with --{name} {run[name]}: leave out --{name} {value}, or "
                            + ("start a new run" if mode == "train" else "name another --checkpoint"), 2)
    return {name: value for name, value in run.items() if value is not None} | given


def find_checkpoint(first: dict[str, Any], keys: Sequence[str]) -> tuple[Path, dict]:
    """The file that was named; else the latest that was trained, unless on stand-in data (which train.sh takes where
    nothing can be downloaded); else what is shipped."""
    if "checkpoint" in first:
        return first["checkpoint"], load_checkpoint(first["checkpoint"])
    resume, asked = "resume" in first, {k: first.get("dataset") for k in FAMILIES if "dataset" in flags("infer", k)}
    shipped = next((p for k in keys if (p := SUBJECT.shipped(k, asked.get(k))).exists() and not resume), None)
    trained = [path for k in keys for path in (HERE / "models").glob(FAMILIES[k].file_name(None))
               if ".previous" not in path.name]
    for path in sorted(trained, key=lambda path: path.stat().st_mtime, reverse=True):
        held, wanted = (state := load_checkpoint(path))["data"]["dataset"], asked.get(state["family"])
        if shipped and wanted is None and held in SUBJECT.stand_ins:
            say(f"{path} was trained on stand-in data ({state['data']['title']}): this takes the shipped weights, "
                f"--checkpoint {path} takes that one")
        elif resume or wanted in (None, held):
            say(f"this takes {path}" + f"; --checkpoint {shipped} takes the shipped weights" * bool(shipped))
            return path, state
    if shipped is None:
        raise UserError(f"no {' or '.join(keys)} model for {asked.get(keys[0]) or SUBJECT.dataset} to take: train one "
                        "with --mode train, or name a file with --checkpoint")
    return shipped, load_checkpoint(shipped)


def run_train(command: Command, world: World) -> int:
    """--mode train"""
    family, state, given, results = FAMILIES[command.key], command.state, command.given, command.results()
    if "prepare_data" in given:
        return SUBJECT.prepare(command, world)
    config = command.options(family.config_class)
    if state and (not isinstance(done := state.get("epoch_done"), int) or config.epochs <= done):
        raise UserError(f"--resume: the run in {command.path} is complete (or shipped weights): give more --epochs", 2)
    data = SUBJECT.load(command, world)
    info = data.info()
    if state and info != DataInfo(**known_fields(DataInfo, state["data"])):
        raise UserError(f"{command.path} was trained on other data ({state['data']['title']}): give its --data_root")
    torch.manual_seed(config.seed)
    model = family(config, info).to(world.device)
    checkpoint = command.path or given.get("checkpoint") or HERE / "models" / family.file_name(info)
    if checkpoint.is_dir():
        raise UserError(f"{checkpoint} is a folder: --checkpoint takes a file")
    if world.main:
        locks = lock(checkpoint.with_name(f".{checkpoint.name}.lock")), lock(results_folder(results) / ".lock")
    between = SUBJECT.between(command, model, data, world)
    if not state:
        model.prepare(data, world.device)
        world.average([t for t in model.state_dict().values() if t.is_floating_point()])  # all start from the same
    model.precision = pick_precision(given.get("precision", "auto"), world.device)  # not yet while it prepares
    known = {name: str(value.resolve()) if isinstance(value, Path) else value
             for kind in (family.data_options["train"], family.options["train"])
             for name, value in dataclasses.asdict(command.options(kind)).items()}
    trainer = Trainer(model, data, world, checkpoint, results, known | between.remembered | {
        "precision": str(model.precision).removeprefix("torch."), "results_dir": str(results.resolve())})
    if state:
        trainer.load(state)
    if world.main:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        say(f"{command.key} ({size:.2f} M parameters) on {data.describe()}; {world.device}, "
            f"{trainer.remembered['precision']}, {world.size} process(es)" + "".join(f"\n{n}" for n in between.notes)
            + f"\nresuming {checkpoint} at step {trainer.step} of {trainer.total}" * bool(state))
    trainer.fit(between)
    stopped = trainer.stopped() if trainer.epoch_done < config.epochs else 0  # by a signal, with something left to do
    if world.main:
        say(f"stopped at step {trainer.step} of {trainer.total}: --resume --checkpoint {checkpoint} goes on" if stopped
            else f"trained for {trainer.seconds / 60:.1f} minutes; model in {checkpoint}, results in {results}")
        del locks
    return 128 + stopped if stopped else 0


def guarded(run: Callable[[], int]) -> int:
    """Any failure that a user can mend is one line; returns the exit status."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream]  # None: closed before the start
    for stream in streams:
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # for a terminal that knows ASCII only
    code, text = 0, ""
    try:
        code = run()
    except UserError as error:
        code, text = error.code, str(error)
    except KeyboardInterrupt:
        code, text = 130, "stopped"
    except OSError as error:  # a disk that fills up, a folder that vanishes
        code, text = 1, f"{error.filename or 'file'}: {error.strerror or error}; checkpoints written so far are whole"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
                words in str(error) for words in ("DefaultCPUAllocator", "can't allocate memory")):  # torch's on CPUs
            raise
        code, text = 1, "out of memory: lower --batch_size or --sample_batch, give less data, or use --device cpu"
    if text and sys.stderr:
        say("error: " + " ".join(text.splitlines()), sys.stderr)
        if where := os.environ.get("ERROR_FILE"):  # torchrun prints more below: train.sh repeats this line after it
            Path(where).write_text(f"{code} {text}\n")
    for stream in streams:  # what can't be written is dropped: the interpreter would complain about it at its end
        say("", stream, "")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""

    def run() -> int:
        command = read_command(argv, description=__doc__.split("\n\n")[0])
        world = World(command.given.get("device", "auto"))
        if command.mode != "train" and world.size > 1:
            raise UserError(f"--mode {command.mode} runs in one process: start it without torchrun", 2)
        run_mode = {"train": run_train, "infer": SUBJECT.infer, "evaluate": SUBJECT.evaluate}[command.mode]
        status = run_mode(command, world)
        world.wait()  # a process that leaves early breaks the connections of those still at work
        return status

    return guarded(run)


if __name__ == "__main__":
    exit_status = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # gloo's threads now and then abort an orderly shutdown (torch 2.11)
        os._exit(exit_status)
    sys.exit(exit_status)
