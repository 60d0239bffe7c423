#!/usr/bin/env python3
"""Regenerate music from a few numbers, and honestly measure how well: one file, no framework.

    python audio_gen.py --dataset synthetic                     train an autoencoder, no download
    python audio_gen.py --mode infer --input song.wav           make a small file of it, and give it back from that
    python audio_gen.py --mode evaluate                         SDR, SNR, PESQ ... between their floors and ceilings

Read top to bottom; `grep '^# ===' audio_gen.py` prints the table of contents: the models first, the machine room last.
Letters for shapes: B batch, L samples, M mel bins, T frames, C channels, N lines of a frame, Z latent width, R rows.
Sound is mono at 16 kHz, float in [-1, 1], but for the codec's files; a clip has 256 frames (5.12 s). Metrics take
(estimate, reference), in this order.

References
    [Balle18]    Balle, Minnen, Singh, Hwang, Johnston: Variational Image Compression with a Scale Hyperprior, 2018
    [Bink18]     Binkowski et al.: Demystifying MMD GANs (kernel distance), 2018
    [Esser24]    Esser et al.: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024
    [Gray76]     Gray, Markel: Distance Measures for Speech Processing (log-spectral distance), 1976
    [Griffin84]  Griffin, Lim: Signal Estimation from Modified Short-Time Fourier Transform, 1984
    [He16]       He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, 2016
    [Heusel17]   Heusel et al.: GANs Trained by a Two Time-Scale Update Rule (Frechet distance), 2017
    [Ho20]       Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020
    [HoSal22]    Ho, Salimans: Classifier-Free Diffusion Guidance, 2022
    [Jordan24]   Jordan et al.: Muon: An Optimizer for Hidden Layers in Neural Networks, 2024
    [Karras22]   Karras, Aittala, Aila, Laine: Elucidating the Design Space of Diffusion-Based Generative Models, 2022
    [Kingma14]   Kingma, Welling: Auto-Encoding Variational Bayes, 2014
    [Kynk19]     Kynkaanniemi et al.: Improved Precision and Recall Metric for Assessing Generative Models, 2019
    [Lee01]      Lee, Seung: Algorithms for Non-negative Matrix Factorization, 2001
    [LeRoux19]   Le Roux, Wisdom, Erdogan, Hershey: SDR - Half-baked or Well Done?, 2019
    [Lipman23]   Lipman et al.: Flow Matching for Generative Modeling, 2023
    [Lu22]       Lu et al.: DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, 2022
    [Perraudin13] Perraudin, Balazs, Sondergaard: A Fast Griffin-Lim Algorithm, 2013
    [Princen87]  Princen, Johnson, Bradley: Subband/Transform Coding Based on Time Domain Aliasing Cancellation, 1987
    [Rafii17]    Rafii, Liutkus, Stoeter, Mimilakis, Bittner: The MUSDB18 Corpus for Music Separation, 2017
    [Rybkin21]   Rybkin, Daniilidis, Levine: Simple and Effective VAE Training with Calibrated Decoders, 2021
    [Salim16]    Salimans et al.: Improved Techniques for Training GANs (Inception Score), 2016
    [Song21]     Song, Meng, Ermon: Denoising Diffusion Implicit Models, 2021
    [Taal11]     Taal, Hendriks, Heusdens, Jensen: An Algorithm for Intelligibility Prediction (STOI), 2011
    [Tran03]     Tran, Liang, Tu: Lapped Transform via Time-Domain Pre- and Post-Filtering, 2003
    [Vincent06]  Vincent, Gribonval, Fevotte: Performance Measurement in Blind Audio Source Separation, 2006
    [Yamamoto20] Yamamoto, Song, Kim: Parallel WaveGAN (multi-resolution STFT distance), 2020
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
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE_RATE = 16_000  # Hz
HOP = 320  # samples between frames: 20 ms
WINDOW = 1024  # samples of one analysis window
FRAMES = 256  # frames of one clip
CLIP = HOP * FRAMES  # samples of one clip: 5.12 s

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
    """What a model must know about its data; stored in every checkpoint. `digest` tells other data apart."""
    dataset: str
    title: str
    sample_rate: int
    stems: list[str]
    tracks: dict[str, int]  # of each split
    seconds: dict[str, float]
    digest: str
    frames: int = 0  # of a picture of a short sound, with its classes and how many sounds of each train
    classes: list[str] = field(default_factory=list)
    class_counts: list[int] = field(default_factory=list)


class Batch(NamedTuple):
    audio: Tensor  # [B CLIP]
    frames: Tensor  # [B] int64: how many frames hold sound; the rest is zeros that pad a shorter track
    labels: Tensor  # [B] int64: which of STEMS they are
    draw: Draw | None
    progress: float = 1.0  # share of the run that is done, for what is warmed up


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


# === building blocks ===

@dataclass(frozen=True)
class RunConfig:
    """Options that every family has."""
    epochs: int = option(30, "optimisation", "passes over the training set", number(int, 1))
    batch_size: int = option(32, "optimisation", "clips per step, over all processes", number(int, 1, 1e6))
    learning_rate: float = option(1e-3, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    weight_decay: float = option(0.01, "optimisation", "weight decay of AdamW", number(float, 0))
    warmup_steps: int = option(50, "optimisation", "steps of linear warm-up, before the cosine", number(int, 0))
    ema_decay: float = option(0.998, "optimisation", "decay of the averaged weights", number(float, 0, 1))
    grad_clip: float = option(1.0, "optimisation", "largest norm of a gradient", number(float, 0, open_low=True))
    save_every: int = option(200, "optimisation", "steps between checkpoints inside an epoch", number(int, 1))
    seed: int = option(0, "optimisation", "of everything random", number(int, 0, 2**63 - 1))

    def rate(self, step: int, total: int) -> float:
        """Linear warm-up, then half a cosine down to zero at the end of the last epoch."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


@dataclass(frozen=True)
class CropConfig(RunConfig):
    """Options of the families that learn from crops of longer tracks."""
    epochs: int = option(30, "optimisation", "passes over the training set, of --crops crops each", number(int, 1))
    crops: int = option(1024, "optimisation", "random 5.12 s crops that make one epoch", number(int, 1, 1e9))
    speed: float = option(0.4, "optimisation", "octaves by which crops are sped up or down", number(float, 0, 1))
    n_mels: int = option(128, "model", "mel bins, of the model and of the metrics on them", number(int, 8, 513))


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


class SoundFamily(Family):
    """What regeneration and metrics know of a family beside: its files, and how a decoded clip becomes audible."""
    held_out_count = 64
    can_interpolate = True
    actions: dict[str, Callable[[Command, World], int]]  # what --mode infer and evaluate do

    def __init__(self, config: Any, data: DataInfo) -> None:
        super().__init__(config, data)
        self.preprocessor = AudioPreprocessor(config.n_mels)

    def prepare(self, data: Any, device: torch.device) -> None:
        self.preprocessor.fit(data.training_clips(device))

    @abc.abstractmethod
    def rate_text(self) -> str:
        """What its files weigh, for titles"""

    @abc.abstractmethod
    def coder(self) -> SymbolCoder:
        """What writes and reads its files"""

    @abc.abstractmethod
    def regenerate(self, audio: Tensor) -> Tensor:
        """Waveform [L] of any length -> what the model makes of it, [L]"""

    @abc.abstractmethod
    def rows(self, audio: Tensor, frames: Tensor) -> Iterator[Row]:
        """What it makes of clips [B CLIP], of which `frames` [B] hold sound"""

    def measure(self, tracks: Sequence[Track], count: int) -> tuple[dict[str, Any], dict[str, int]]:
        """All figures of a test set -> rows of the table, how many of what they are measured on"""
        clips = fixed_clips(tracks, count)
        return measure_rows(self, clips, "measuring"), {
            "clips": len(clips), "tracks": len({track.name for track, _ in clips})}


# === autoencoder ===

@dataclass(frozen=True)
class MelConfig(CropConfig):
    width: int = option(96, "model", "channels of the networks", number(int, 8, 4096))


@dataclass(frozen=True)
class AutoencoderConfig(MelConfig):
    latent_dim: int = option(128, "model", "latent numbers per clip", number(int, 2, 65536))


class MelFamily(SoundFamily):
    """What the families on log-mel spectrograms share. A linear code comes first: patches in time that lap over
    [Tran03], their principal components, and a cosine transform of each component over the clip; of all these `numbers`
    are kept, those that vary most. It is orthogonal, training leaves it alone, and by itself it is the codec that the
    networks have to beat: one before and one behind it add something to the components, at first nothing."""
    margin = 0  # frames at either end of a clip that it decodes worse than the others
    WIDER = 0  # quarters of an octave by which the numbers that it keeps are larger than those of the training set
    ROUNDING = 0.02  # error that a file's steps are to make, as a share of that of the linear code: 1 % of the model's

    def __init__(self, config: Any, data: DataInfo, numbers: int, frames: int) -> None:
        super().__init__(config, data)
        patch = FRAMES // frames
        size = patch * config.n_mels
        components = min(size, max(160, 12 * numbers // (5 * frames)))  # what a decoder may add is among the next ones
        self.chosen_count = min(numbers, components * frames)
        self.register_buffer("lapping", lapping(patch), persistent=False)
        self.register_buffer("cosines", cosines(frames, 0.0).float(), persistent=False)
        self.basis = nn.Parameter(torch.randn(size, components) / size ** 0.5, requires_grad=False)
        self.register_buffer("spread", torch.ones(frames, components))  # deviations of all, chosen or not
        self.register_buffer("chosen", torch.arange(self.chosen_count))
        self.encoder = residual_stack(components, config.width, 1)
        self.decoder = residual_stack(components, config.width, 2)

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """MSE of the standardised log-mel: what is measured"""
        target = self.log_mel(batch.audio)
        decoded = self.decode(self.pick(self.to_spectrum(target)))
        mse = masked_mean((decoded - target).square(), batch.frames)
        yield "model", mse, {"mse": mse.detach()}

    def log_mel(self, audio: Tensor) -> Tensor:
        """Waveform [B L] -> standardised log-mel [B M T]"""
        return self.preprocessor.standardise(self.preprocessor.log_mel(audio))

    def patches(self, mel: Tensor) -> Tensor:
        """Standardised log-mel [B M T] -> lapped patches [B frames patch * M]"""
        return lap(mel, self.lapping).unfold(2, *[len(self.lapping)] * 2).permute(0, 2, 3, 1).flatten(2)

    def refined(self, network: nn.Module, components: Tensor) -> Tensor:
        """Components [B frames C] and what a network adds to them"""
        scale = self.spread.square().mean(0).sqrt()
        with self.cast():
            return components + scale * network(components / scale).float()

    def to_spectrum(self, mel: Tensor, network: bool = True) -> Tensor:
        """Standardised log-mel [B M T] -> all numbers of the linear code [B frames * C], of deviation 1 over the
        training set"""
        with self.cast():
            components = (self.patches(mel) @ self.basis).float()
        components = self.refined(self.encoder, components) if network else components
        return (self.cosines @ components / self.spread).flatten(1)

    def from_spectrum(self, spectrum: Tensor, network: bool = True) -> Tensor:
        """Back again, with zeros for what was not kept"""
        components = self.cosines.T @ (spectrum.unflatten(1, self.spread.shape) * self.spread)
        components = self.refined(self.decoder, components) if network else components
        with self.cast():
            patches = (components @ self.basis.T).float()
        return lap(patches.unflatten(2, (len(self.lapping), -1)).flatten(1, 2).mT, self.lapping.T)

    def pick(self, spectrum: Tensor) -> Tensor:
        """All numbers [B frames * C] -> those that are kept [B Z]"""
        return spectrum[:, self.chosen]

    def places(self) -> Tensor:
        """[S K]: where in the linear code the K numbers of a code stand, for each of the sets there are"""
        return self.chosen[None]

    def set_of(self, codes: Tensor) -> Tensor:
        """[B Z] -> which set each belongs to [B]"""
        return codes.new_zeros(len(codes), dtype=torch.long)

    def place(self, codes: Tensor) -> Tensor:
        """Back to all numbers of the linear code, with zeros for those that were not kept"""
        places = self.places()[self.set_of(codes)]
        return codes.new_zeros(len(codes), self.spread.numel()).scatter(1, places, codes[:, :places.shape[1]])

    def missed(self) -> Tensor:
        """What the linear code leaves out of a clip: squared error, in all"""
        return self.spread.square().sum() - self.spread.flatten()[self.chosen].square().sum()

    def coder(self) -> LatentCoder:
        return LatentCoder(self)

    def rate_text(self) -> str:
        return f"about {self.coder().expected_rate():.2g} kbit/s, phase by Griffin-Lim"

    def encode(self, audio: Tensor) -> Tensor:
        """Waveform [B CLIP] -> [B Z]; of a VAE the mean of the posterior"""
        return self.pick(self.to_spectrum(self.log_mel(audio)))

    def decode(self, latent: Tensor) -> Tensor:
        """[B Z] -> standardised log-mel [B M T]"""
        return self.from_spectrum(self.place(latent))

    def render(self, decoded: Tensor, phase: str = "griffinlim", original: Tensor | None = None) -> Tensor:
        """Standardised log-mel [B M T] -> waveform [B T * HOP], see `to_audio`"""
        log_mel = self.preprocessor.unstandardise(decoded)
        return to_audio(self.preprocessor, log_mel, decoded.shape[-1] * HOP, phase, original)

    @torch.no_grad()
    def regenerate(self, audio: Tensor) -> Tensor:
        decoded = joined(self, (self.decode(self.encode(clips)) for clips in clips_of(self, audio)), len(audio))
        return render_long(self, decoded)[:len(audio)]

    def rows(self, audio: Tensor, frames: Tensor) -> Iterator[Row]:
        """The model, and the linear code alone: the principal components that vary most. Both as files hold them."""
        coder, codes, linear = self.coder(), self.encode(audio), self.to_spectrum(self.log_mel(audio), network=False)
        spectrum, rate = coder.through(self.place(codes), self.set_of(codes), frames)
        decoded = self.from_spectrum(spectrum)
        yield Row("model_mel", decoded, None, rate)
        for phase in PHASES:
            yield Row(f"model_{phase}", None, self.render(decoded, phase, audio))
        coder.places = self.chosen[None].cpu()
        spectrum, rate = coder.through(linear, torch.zeros_like(frames), frames)
        yield Row("without_network_pca", self.from_spectrum(spectrum, network=False), None, rate)

    @torch.no_grad()
    def prepare(self, data: Any, device: torch.device) -> Tensor:
        """Learn the linear code; returns the crops it was learned from, as [N frames * C] before they are scaled."""
        super().prepare(data, device)
        count = self.basis.shape[1]
        clips = [(self.log_mel(b.audio).half(), b.frames) for b in data.training_crops(self.config, device)]
        covariance = self.basis.new_zeros(*[len(self.basis)] * 2)
        for mel, frames in clips:
            starts = torch.arange(len(self.spread), device=device) * len(self.lapping)
            rows = self.patches(mel.float())[starts < frames[:, None]]  # padding is no sound
            covariance += rows.T @ rows
        self.basis.copy_(torch.svd_lowrank(covariance, min(count + 32, len(covariance)), niter=3)[0][:, :count])
        whole = [mel[frames == FRAMES] for mel, frames in clips]
        whole = whole if any(map(len, whole)) else [mel for mel, _ in clips]
        spectra = torch.cat([self.cosines @ (self.patches(mel.float()) @ self.basis) for mel in whole])
        self.spread.copy_(spectra.square().mean(0).sqrt().clamp(min=1e-2))
        self.chosen.copy_(self.spread.flatten().topk(len(self.chosen)).indices)
        return spectra.flatten(1)

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        figures = mel_metrics(self.decode(self.encode(batch.audio)), self.log_mel(batch.audio), batch.frames)
        return {f"val_{name}": values.mean().item() for name, values in figures.items()}


class AudioAutoencoder(MelFamily):
    """A residual autoencoder: a clip's log-mel [128 256] becomes one vector of `latent_dim` numbers and returns. The
    last says which of SETS sets the others belong to: with few numbers it pays to keep of drums what varies there."""
    config_class = AutoencoderConfig
    margin = 16
    can_sample = False
    SETS = 64
    WIDER = 2  # as a clip takes the set that keeps most

    def __init__(self, config: AutoencoderConfig, data: DataInfo) -> None:
        super().__init__(config, data, config.latent_dim, 16)
        total, first = self.spread.numel(), torch.arange(len(self.chosen) - 1)
        self.register_buffer("sets", (first + torch.arange(self.SETS)[:, None]) % total)

    def pick(self, spectrum: Tensor) -> Tensor:
        index = self.kept((spectrum.detach() * self.spread.flatten()).square(), self.sets).argmax(1)
        return torch.cat([spectrum.gather(1, self.sets[index]), index[:, None].to(spectrum)], 1)

    def places(self) -> Tensor:
        return self.sets

    def set_of(self, codes: Tensor) -> Tensor:
        return codes[:, -1].round().long() % self.SETS

    @staticmethod
    def kept(energies: Tensor, sets: Tensor) -> Tensor:
        """Energies [N D] -> how much of them each set [SETS Z - 1] keeps [N SETS]"""
        return energies @ energies.new_zeros(len(sets), energies.shape[1]).scatter(1, sets, 1.0).T

    @torch.no_grad()
    def prepare(self, data: Any, device: torch.device) -> None:
        """Sets like the means of k-means: each holds what varies most in those clips of which it keeps most."""
        energies = super().prepare(data, device).square()
        mean, count = energies.mean(0), self.sets.shape[1]
        seeds = energies[torch.linspace(0, len(energies) - 1, self.SETS).long()]
        self.sets.copy_((seeds + mean).topk(count).indices)
        for _ in range(8):
            index = self.kept(energies, self.sets).argmax(1)
            for number in range(self.SETS):
                self.sets[number] = (energies[index == number].sum(0) + 5 * mean).topk(count).indices


def cosines(size: int, shift: float) -> Tensor:
    """The orthogonal cosine transform [size size] of type II (shift 0) or IV (shift 1/2), in float64"""
    lines = torch.arange(size, dtype=torch.float64)[:, None] + shift
    matrix = (2 / size) ** 0.5 * torch.cos(math.pi / size * lines * (torch.arange(size) + 0.5))
    return torch.where(lines == 0, matrix * 0.5 ** 0.5, matrix)


def lapping(patch: int) -> Tensor:
    """[patch patch], orthogonal: what turns the frames around each border of two patches so that what is coded patch by
    patch shows no border and needs fewer numbers ([Tran03] figure 2, with the rotation of Malvar's fast transform)."""
    half = patch // 2
    if not half:
        return torch.ones(1, 1)
    turn = torch.eye(patch, dtype=torch.float64)
    turn[half:, half:] = (cosines(half, 0.0).T @ cosines(half, 0.5)).flip(0, 1)
    one = torch.eye(half, dtype=torch.float64)
    mirror = one.flip(1)
    butterfly = torch.cat([torch.cat([one, mirror], 1), torch.cat([mirror, -one], 1)]) / 2 ** 0.5
    return (butterfly @ turn @ butterfly).float()


def lap(mel: Tensor, matrix: Tensor) -> Tensor:
    """Turn [B M T] around every border of its patches; with the transposed matrix back again"""
    patch = len(matrix)
    inner = mel[..., patch // 2:FRAMES - patch // 2].unflatten(2, ((FRAMES - patch + patch % 2) // patch, patch))
    edges = mel[..., :patch // 2], mel[..., FRAMES - patch // 2:]
    return torch.cat([edges[0], (inner @ matrix.T).flatten(2), edges[1]], 2)


def zeroed(layer: nn.Module) -> nn.Module:
    """Start a residual branch at nothing, so that the network begins as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PatchBlock(nn.Module):
    """norm, each patch with its neighbours, SiLU, linear, around a shortcut [He16]; [B frames width] stays"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(3 * width, 2 * width), zeroed(nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(self.norm(x), (0, 0, 1, 1))
        return x + self.outer(F.silu(self.inner(torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], 2))))


def residual_stack(components: int, width: int, blocks: int) -> nn.Sequential:
    """What a network adds to the components of each patch, [B frames C] -> [B frames C]"""
    return nn.Sequential(nn.Linear(components, width), *[PatchBlock(width) for _ in range(blocks)],
                         nn.LayerNorm(width), zeroed(nn.Linear(width, components)))


def masked_mean(values: Tensor, frames: Tensor) -> Tensor:
    """Mean of [B ... T] over the first `frames` [B] frames of each clip: padding is never learned or measured."""
    mask = torch.arange(values.shape[-1], device=values.device) < frames[:, None]
    mask = mask.view(len(values), *[1] * (values.dim() - 2), -1)
    return (values * mask).sum() / (mask.sum() * values[0].numel() / values.shape[-1])


# === variational autoencoder ===

@dataclass(frozen=True)
class VaeConfig(MelConfig):
    prior: str = option("flow", "model", "of the codes that are drawn: flow, learned beside the VAE and for each stem "
                        "where all are known [Lipman23], or normal", choices=("flow", "normal"))
    latent_dim: int = option(160, "model", "latent numbers per patch", number(int, 1, 65536))
    latent_frames: int = option(16, "model", "patches that a clip is cut into", int, choices=(16, 32, 64, 128, 256))
    beta: float = option(1.0, "model", "weight of the KL divergence; 1 is the evidence lower bound", number(float, 0))
    kl_warmup: float = option(0.3, "model", "first part of the run over which that weight rises from 0",
                              number(float, 0, 1))


class PositionalEncoding(nn.Module):
    """Sinusoidal embedding of diffusion times: [B] in 1..1000 -> [B E], sines then cosines ([Ho20] appendix B)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.arange(width // 2) * (-math.log(10_000) / (width // 2))),
                             persistent=False)

    def forward(self, times: Tensor) -> Tensor:
        angles = times.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


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


class AudioVAE(MelFamily):
    """A VAE on log-mel with `latent_dim` numbers per patch, of `latent_frames` patches in time [Kingma14]. A number
    stands for a slow or fast change over the whole clip: patches that are drawn from N(0, 1) follow from each other.
    Of the numbers that vary most a prior is learned (`CodePrior`); the evidence lower bound is that of N(0, 1)."""
    config_class = VaeConfig
    older = {"prior": "normal"}
    results_folder = "vae"
    LEARNED = 1024  # numbers of which the prior is learned

    def __init__(self, config: VaeConfig, data: DataInfo) -> None:
        super().__init__(config, data, config.latent_dim * config.latent_frames, config.latent_frames)
        self.log_variance = nn.Parameter(torch.full((self.chosen_count,), -3.0))  # of q(z|x), for any x: see `prepare`
        self.labelled = config.prior == "flow" and data.stems == list(STEMS)
        self.prior = None if config.prior == "normal" else CodePrior(
            min(self.LEARNED, self.chosen_count), len(STEMS) * self.labelled, 128)

    def players(self) -> dict[str, nn.Module]:
        both = {"model": nn.ModuleList([self.encoder, self.decoder, nn.ParameterList([self.log_variance])])}
        return both if self.prior is None else both | {"prior": self.prior}

    @torch.no_grad()
    def prepare(self, data: Any, device: torch.device) -> None:
        """Begin with what is the best posterior of a linear code, whose variance is the same for all x."""
        super().prepare(data, device)
        kept, missed = self.spread.flatten()[self.chosen].square(), self.missed() / (FRAMES * self.config.n_mels)
        self.log_variance.copy_((missed / (missed + kept)).clamp(min=1e-6).log())

    def posterior(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised log-mel [B M T] -> mean and log-variance [B Z] of q(z|x)"""
        mean = self.pick(self.to_spectrum(mel))
        return mean, self.log_variance.clamp(-14, 4).expand_as(mean)

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The negative evidence lower bound in nats per mel bin. The likelihood is a Gaussian whose variance is the
        best one for the batch, so that no weight between the two terms has to be guessed ([Rybkin21] eq. 9). With
        several processes it is the best one for each process's share."""
        target = self.log_mel(batch.audio)
        mean, log_variance = self.posterior(target)
        latent = mean + (0.5 * log_variance).exp() * batch.draw.normal(*mean.shape[1:])
        mse = masked_mean((self.decode(latent) - target).square(), batch.frames)
        kl = gaussian_kl(mean, log_variance)
        per_bin = kl.sum() / (batch.frames.sum() * self.config.n_mels)
        warm = min(1.0, batch.progress / self.config.kl_warmup) if self.config.kl_warmup else 1.0
        loss = 0.5 * (math.log(2 * math.pi) + 1 + (mse + 1e-6).log()) + warm * self.config.beta * per_bin
        yield "model", loss, {"mse": mse.detach(), "kl": kl.detach().sum(1).mean()}
        if self.prior is not None:
            codes = latent[:, :self.LEARNED].detach()
            turns = (balanced(batch.labels, batch.draw) if self.labelled else slice(None) for _ in range(8))  # cheap
            loss = torch.stack([self.prior.loss(codes[rows], batch.labels[rows], batch.draw) for rows in turns]).mean()
            yield "prior", loss, {"prior_loss": loss.detach()}

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        kl = gaussian_kl(*self.posterior(self.log_mel(batch.audio))).sum(1).mean().item()
        return super().validate(batch) | {"val_kl_nats": kl}

    @torch.no_grad()
    def sample(self, labels: Tensor | None, noise: Noise) -> Tensor:
        """Decode latents drawn from the prior, of stems `labels` [B]."""
        latent = noise.normal(self.chosen_count)
        if self.prior is not None:
            latent[:, :self.LEARNED] = self.prior.draw(latent[:, :self.LEARNED], labels)
        return self.decode(latent)


def balanced(labels: Tensor, draw: Draw) -> Tensor:
    """As many rows of a batch [B] at random, each stem in it as often as any other: single stems are few"""
    weights = 1 / F.one_hot(labels, len(STEMS)).sum(0)[labels]
    return torch.searchsorted(weights.cumsum(0) / weights.sum(), draw.uniform()).clamp(max=len(labels) - 1)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each latent number, in nats ([Kingma14] appendix B)"""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


# === codec ===
# A variational autoencoder in the sense of learned compression [Balle18]: the latent is the waveform's MDCT, rounded
# to a step; its posterior is uniform noise of one step, its prior is learned: the KL divergence is a file's length.

SCALES, PER_OCTAVE = 64, 4  # of the tables of probabilities: the expected magnitude goes up by an octave in four
LARGEST = 40  # magnitude that a table still holds; a larger one is an escape
PLAIN_SCALES = 24  # tables without low bits: beyond, each octave sends one more bit of a magnitude as it is
SKEW, LAG = 5, 3  # lines that a frame stays behind the one before it, and the second channel behind the first
CHUNK_FRAMES = 256  # frames of a chunk of the file, which can be read without the others: 5.5 to 8.2 s
BANDS, PAN_BANDS, ANGLES = 32, 16, 64  # of frequency, for the network and for stereo; angles of a half turn
STEP_OCTAVE = 128  # step sizes of the quantiser per octave
FINEST = 15 * STEP_OCTAVE  # index of the smallest step: 2^-15, so that the loudest lines stay below LOUDEST steps
LOUDEST = 2 ** 22  # magnitude that a file can hold
RATES = (16_000, 44_100, 48_000)  # that are coded as they are
CONTEXT = {"now": range(-10, 0), "past1": range(-5, 5), "past2": range(-2, 4), "memory": range(-3, 5),
           "other": range(-2, 3)}  # lines around the one to be coded, in what is known before it
LEFT, RIGHT = 10, 4  # how far they reach


def frame_size(rate: int) -> int:
    """Samples of a frame: about the 23 to 32 ms that measured best."""
    return 512 if rate <= 24_000 else 1024


def rotate(blocks: Tensor, sign: float) -> Tensor:
    """[... F N] -> the same, neighbours rotated into each other around their borders by the sine window: with a DCT-IV
    of each block afterwards the MDCT [Princen87], orthogonal; sign -1 undoes it. Nothing is folded at the two ends."""
    half = blocks.shape[-1] // 2
    angle = math.pi / (4 * half) * (torch.arange(half, dtype=blocks.dtype, device=blocks.device) + 0.5 + half)
    near, far = angle.sin(), angle.cos()
    left, right = blocks[..., :-1, half:].flip(-1), blocks[..., 1:, :half]
    left, right = near * left - sign * far * right, near * right + sign * far * left
    result = blocks.clone()
    result[..., :-1, half:], result[..., 1:, :half] = left.flip(-1), right
    return result


def dct4(x: Tensor) -> Tensor:
    """The orthonormal DCT-IV of the last axis, its own inverse, by an FFT of half the length."""
    size = x.shape[-1]
    twist = torch.polar(torch.ones(size // 2, dtype=x.dtype, device=x.device),
                        -math.pi * (torch.arange(size // 2, dtype=x.dtype, device=x.device) / size + 0.125 / size))
    z = torch.fft.fft(torch.complex(x[..., ::2], x.flip(-1)[..., ::2]) * twist) * twist
    return torch.stack([z.real, -z.imag.flip(-1)], -1).flatten(-2) * math.sqrt(2 / size)


LEVELS = torch.tensor([min(127, round(16 * math.log2(1 + n))) for n in range(256)], dtype=torch.float32)


def level(magnitudes: Tensor) -> Tensor:
    """Whole numbers 0 to 127, sixteen to an octave: what the network sees of a magnitude."""
    return LEVELS.to(magnitudes.device)[magnitudes.clamp(max=255).long()]


def memories(levels: Tensor) -> Tensor:
    """[B T N] -> before each frame a mean of the levels so far, which forgets a quarter at each; whole numbers"""
    before = torch.zeros_like(levels)
    before[:, 1:2] = levels[:, :1]
    for t in range(1, levels.shape[1] - 1):
        torch.mul(before[:, t], 3, out=before[:, t + 1]).add_(levels[:, t]).add_(2).mul_(0.25).floor_()
    return before


class Activation(torch.autograd.Function):
    """A whole number of 1/64 -> the nearest whole number from 0 to 255"""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward((x > 0) & (x < 255 * 64))
        return (x / 64).clamp_(0, 255).round_()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * context.saved_tensors[0] / 64


def whole(weights: Tensor, unit: float = 64, limit: float = 127) -> Tensor:
    """Rounded to whole numbers of 1/unit, which lets gradients pass as if it were not"""
    scaled = (weights * unit).clamp(-limit, limit)
    return scaled.round().detach() + (scaled - scaled.detach())


class ContextModel(nn.Module):
    """Which table of probabilities a line's magnitude is coded with, from the magnitudes that are known before it.

    All of it is arithmetic of whole numbers below 2^24, which float32 holds exactly, in whatever order a machine adds
    them up: encoder and decoder agree to the bit, whoever runs them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        inputs, narrow = sum(map(len, CONTEXT.values())), hidden // 2
        self.enter = nn.Parameter(torch.randn(inputs, hidden) * 0.9 / inputs ** 0.5)
        self.band = nn.Parameter(torch.zeros(BANDS, hidden))
        self.channel = nn.Parameter(torch.zeros(3, hidden))  # alone, first, second
        self.inner = nn.Parameter(torch.randn(hidden, narrow) * 1.2 / hidden ** 0.5)
        self.inner_bias = nn.Parameter(torch.zeros(narrow))
        self.leave = nn.Parameter(torch.randn(narrow, 1) * 0.5 / narrow ** 0.5)
        self.leave_bias = nn.Parameter(torch.tensor([8.0]))
        scale = (0.06 * 2 ** (torch.arange(SCALES) / PER_OCTAVE) / 2.0 ** low_bits(torch.arange(SCALES)))[:, None]
        steps = torch.arange(1, LARGEST + 1)
        table = torch.cat([-torch.expm1(-0.5 / scale), (-steps / scale).exp() * 2 * (0.5 / scale).sinh()], 1)
        self.tables = nn.Parameter(table.clamp(min=1e-7).log())  # of Laplace distributions, at first

    def weights(self) -> tuple[Tensor, ...]:
        """The whole numbers that decide: inputs, biases, hidden ones, output"""
        return (whole(self.enter), whole(self.band, 2048, 2 ** 20), whole(self.channel, 2048, 2 ** 20),
                whole(self.inner), whole(self.inner_bias, 2048, 2 ** 20), whole(self.leave),
                whole(self.leave_bias, 1024, 2 ** 16))

    def forward(self, features: Tensor, bands: Tensor, channel: int) -> Tensor:
        """Levels [39 ... N] of lines in `bands` [N] -> index of the table, still with a fraction: [... N]"""
        enter, band, kind, inner, bias, leave, last = self.weights()
        shape = features[0].numel() // len(bands), len(bands), enter.shape[1]
        h = (features.flatten(1).mT @ enter).view(shape) + (band[bands] + kind[channel])
        h = Activation.apply(Activation.apply(h) @ inner + bias)
        return ((h @ leave + last) / 1024).view(features.shape[1:]).clamp(0, SCALES - 1)

    def bits(self, index: Tensor, magnitudes: Tensor) -> Tensor:
        """Code length of magnitudes and signs; between two tables, between their lengths."""
        lengths = (F.log_softmax(self.tables, 1) / -math.log(2)).view(-1, 1)
        lower = index.detach().floor().long().clamp(max=SCALES - 2)

        def length(table: Tensor) -> Tensor:
            low = low_bits(table)
            value, beyond = (magnitudes >> low).clamp(max=LARGEST), (magnitudes >> low) - LARGEST + 1
            escape = torch.frexp(beyond.clamp(min=1).float()).exponent + 4
            return F.embedding(table * (LARGEST + 1) + value, lengths)[..., 0] + low + escape * (value == LARGEST)

        share = index - lower
        return (1 - share) * length(lower) + share * length(lower + 1) + (magnitudes > 0)


def low_bits(table: Any) -> Any:
    """How many of a magnitude's bits are sent as they are, beside what the table of this index codes"""
    return (table - PLAIN_SCALES).clip(0) // PER_OCTAVE


def contexts(levels: Tensor, other: Tensor | None, frames: Any) -> list[Tensor]:
    """Levels [B T N] of a channel, of the first one for the second -> of each line of some frames what CONTEXT looks
    at, 39 times [B F N]; 0 beyond the ends"""
    past, count = F.pad(levels, (0, 0, 2, 0)), levels.shape[-1]
    planes = {"now": levels, "past1": past[:, 1:-1], "past2": past[:, :-2], "memory": memories(levels),
              "other": torch.zeros_like(levels) if other is None else other}
    padded = {name: F.pad(plane[:, frames], (LEFT, RIGHT)) for name, plane in planes.items()}
    return [padded[name][..., LEFT + d:LEFT + d + count] for name, offsets in CONTEXT.items() for d in offsets]


def bands_of(lines: int, rate: int, count: int) -> Tensor:
    """[lines] -> which of `count` bands each belongs to; they widen with frequency"""
    frequency = (torch.arange(lines) + 0.5) * rate / 2 / lines
    return (torch.log1p(frequency / 300) / math.log1p(24_000 / 300) * count).long().clamp(max=count - 1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For products so small that threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class CodecConfig(CropConfig):
    epochs: int = option(20, "optimisation", "passes over the training set, of --crops crops each", number(int, 1))
    crops: int = option(4096, "optimisation", "random 5.12 s crops that make one epoch", number(int, 1, 1e9))
    batch_size: int = option(8, "optimisation", "clips per step, over all processes", number(int, 1, 1e6))
    learning_rate: float = option(4e-3, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    weight_decay: float = option(0.0, "optimisation", "weight decay of AdamW", number(float, 0))
    hidden: int = option(64, "model", "width of the context model", number(int, 8, 256))
    bitrate: float = option(128, "regeneration", "kbit/s of the file in all, headers included",
                            number(float, 1, 10_000))
    quality: float | None = option(None, "regeneration", "step of the quantiser in dB below full scale, instead of "
                                   "--bitrate: the error has about 11 dB less", number(float, 0, 90))


class Quantised(NamedTuple):
    """Lines of a stretch of sound as a file holds them."""
    values: np.ndarray  # int32 [C T N], in steps
    tables: np.ndarray  # int64 [C F top]: which table codes each magnitude of some frames, up to the last line in use
    bits: float  # of these frames


class Codec(SoundFamily):
    """Rounds the MDCT of a sound to steps, which is all that is lost, and codes the rest by learned probabilities."""
    config_class = CodecConfig
    results_folder = "codec"
    can_sample = can_interpolate = False
    FRAMES_A_STEP = 16  # of each clip that a training step looks at: neighbours have little new to say

    def __init__(self, config: CodecConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.context = ContextModel(config.hidden)

    def rate_text(self) -> str:
        rate, quality = self.config.bitrate, self.config.quality
        return f"{rate:g} kbit/s" if quality is None else f"steps of -{quality:g} dB"

    def coder(self) -> Coder:
        return Coder(self)

    def lines(self, audio: Tensor) -> Tensor:
        """Waveform [... L], L a multiple of the frame -> its MDCT [... T N]; orthonormal"""
        return dct4(rotate(audio.unflatten(-1, (-1, frame_size(SAMPLE_RATE))), 1))

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Bits per line of crops at random steps, alone or as first and second channel: the KL divergence between the
        uniform noise of one step and the prior. The transform has nothing to learn, so that the values are the
        rounded ones themselves and the distortion is the same for all weights: rate is all there is to minimise."""
        rows, draw = len(batch.audio), batch.draw
        share, gain, leak = draw.uniform(3).T[..., None]
        second = 10 ** (-1.5 * gain) * batch.audio.roll(1, 0) + 0.5 * leak * batch.audio
        lines = self.lines(torch.stack([batch.audio, second], 1))
        loud = lines.square().mean((1, 2, 3)).sqrt().clamp(min=1e-4)
        steps = loud * 2 ** (7.5 * share[:, 0] - 6.5)
        magnitudes = (lines / steps[:, None, None, None]).round().abs().long()
        levels = level(magnitudes)  # below: what does not depend on which rows are this process's
        frames = torch.randperm(lines.shape[2], generator=draw.generator)[:self.FRAMES_A_STEP].to(levels.device)
        alone = (torch.arange(rows, device=levels.device) + (draw.rows.start or 0)) % 2 == 0
        bits = [self.bits_of(levels[alone, 0], None, magnitudes[alone, 0], 0, frames),
                self.bits_of(levels[~alone, 0], None, magnitudes[~alone, 0], 1, frames),
                self.bits_of(levels[~alone, 1], levels[~alone, 0], magnitudes[~alone, 1], 2, frames)]
        loss = torch.cat([part.flatten() for part in bits]).mean()
        yield "model", loss, {"bits_per_line": loss.detach()}

    def bits_of(self, levels: Tensor, other: Tensor | None, magnitudes: Tensor, channel: int, frames: Tensor) -> Tensor:
        """Code length [B F N] of some frames of a channel, [B T N]"""
        features = torch.stack(contexts(levels, other, frames))
        bands = bands_of(levels.shape[-1], SAMPLE_RATE, BANDS).to(levels.device)
        return self.context.bits(self.context(features, bands, channel), magnitudes[:, frames])

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        """Bits per line at a step an eighth of the root mean square, and those of the plain coder"""
        lines = self.lines(batch.audio)
        steps = lines.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-4) / 8
        magnitudes = (lines / steps).round().abs().long()
        frames = torch.arange(0, lines.shape[1], 4, device=lines.device)
        ours = self.bits_of(level(magnitudes), None, magnitudes, 0, frames)
        plain = np.mean([plain_bits(clip.cpu().numpy()) / clip.numel() for clip in magnitudes])
        return {"val_bits_per_line": ours.mean().item(), "val_plain_bits_per_line": float(plain)}

    def regenerate(self, audio: Tensor) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            found, _ = coded(self.coder(), audio.cpu().numpy()[:, None], SAMPLE_RATE, Path(folder))
        return torch.from_numpy(found[:, 0]).to(audio.device)

    def rows(self, audio: Tensor, frames: Tensor) -> Iterator[Row]:
        yield Row("model", None, torch.stack([self.regenerate(clip) for clip in audio]))

    def measure(self, tracks: Sequence[Track], count: int) -> tuple[dict[str, Any], dict[str, int]]:
        loud = [track for track in tracks if np.square(track.audio, dtype=np.float32).mean() > INAUDIBLE ** 2][:count]
        return codec_rows(self, loud), {"tracks": len(loud)}


def plain_bits(values: np.ndarray) -> float:
    """What a file of a plain adaptive coder without network would hold for [T N] values: the magnitudes of two lower
    lines and of the neighbours in the frame before choose one of 27 adaptive tables (their code length, that of the
    Dirichlet-multinomial, does not depend on the order); signs as they are, escapes in Elias' gamma code."""
    magnitudes, most = np.abs(values).astype(np.int64), 17
    padded = np.pad(magnitudes, ((1, 0), (2, 1)))
    near = 2 * padded[1:, 1:-2] + padded[1:, :-3] + padded[:-1, 1:-2] + 2 * padded[:-1, 2:-1] + padded[:-1, 3:]
    edges = [*range(7), 8, 10, 13, 17, 22, 29, 38, 50, 66, 88, 120, 160, 220, 300, 420, 600, 900, 1400, 2200]
    counts = np.zeros((len(edges), most + 1))
    np.add.at(counts, (np.searchsorted(edges, near, "right") - 1, magnitudes.clip(max=most)), 1)
    counts, prior = torch.from_numpy(counts), torch.tensor(0.125, dtype=torch.float64)
    nats = torch.lgamma(prior * (most + 1) + counts.sum(1)) - torch.lgamma(prior * (most + 1)) - (
        torch.lgamma(counts + prior) - torch.lgamma(prior)).sum(1)
    escapes = magnitudes[magnitudes >= most] - most + 1
    return nats.sum().item() / math.log(2) + float((magnitudes > 0).sum() + (2 * np.floor(np.log2(escapes)) + 1).sum())


BIT_WORTH = 0.08  # square steps of error that a bit may save (measured; 0.12 is what halving a step gains at fine ones)


def step_size(index: int) -> float:
    return 2.0 ** (-index / STEP_OCTAVE)


def top_line(magnitudes: np.ndarray) -> int:
    """Lines [C T N] above it are all zero; a multiple of 8"""
    used = magnitudes.any((0, 1)).nonzero()[0]
    return -(-(int(used[-1]) + 1) // 8) * 8 if len(used) else 0


def centres_of(values: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """int8 [C 3]: by how much the mean of what became 1, 2 and more differs from that, in 1/256 of a step"""
    magnitudes, means = np.abs(values), np.zeros((len(values), 3))
    for c, i in itertools.product(range(len(values)), range(3)):
        where = magnitudes[c] == i + 1 if i < 2 else magnitudes[c] > 2
        if where.any():
            means[c, i] = (np.abs(exact[c][where]) - magnitudes[c][where]).mean()
    return np.rint(256 * means).clip(-128, 127).astype(np.int8)


def restored(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Values [C T N] -> float64, in steps"""
    moved = np.concatenate([np.zeros((len(values), 1)), centres / 256], 1)
    return values + np.sign(values) * moved[np.arange(len(values))[:, None, None], np.abs(values).clip(max=3)]


def next_change(known: Sequence[tuple[int, float]], wanted: float, lines: int) -> int:
    """By how much to change the step's index after tries (index, bits that it took): by the slope between the last two;
    after one, as if each line that is not zero cost a bit more an octave"""
    index, spent = known[-1]
    if len(known) > 1 and known[-2][1] != spent:
        return round((wanted - spent) * (index - known[-2][0]) / (spent - known[-2][1]))
    return math.floor((wanted - spent) * STEP_OCTAVE / (max(0.2, min(1.0, 0.6 * spent / lines + 0.1)) * lines))


class SymbolCoder:
    """Magnitudes of whole numbers <-> bits, each by one of SCALES tables of probabilities; and what `encode_file` and
    `decode_file` ask of a family."""
    rates: tuple[int, ...]  # that its files can have
    channels: tuple[int, ...]
    asked: float | None = None  # kbit/s
    digest: bytes  # of the model

    def __init__(self, tables: np.ndarray) -> None:
        """Tables float64 [SCALES LARGEST + 1]; rounded to 1/2^16, they are the same on any machine."""
        try:
            import constriction
        except ImportError as error:
            raise UserError(f"files need a package for entropy coding ({first_line(error)}): pip install "
                            "constriction") from None
        self.stream = constriction.stream.queue
        self.uniform, self.tabled = (constriction.stream.model.Uniform(),
                                     constriction.stream.model.Categorical(perfect=False, lazy=True))
        self.probabilities = ((tables * 2 ** 16).round().clip(min=1) / 2 ** 16).astype(np.float32)
        self.lengths = -np.log2(self.probabilities / self.probabilities.sum(1, keepdims=True))
        self.low = low_bits(np.arange(SCALES))

    def code_lengths(self, tables: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
        """Bits of each magnitude with its sign"""
        low = self.low[tables]
        value = magnitudes >> low
        beyond = np.frexp((value - LARGEST + 1).clip(1).astype(float))[1]
        return (self.lengths[tables, value.clip(max=LARGEST)] + low + (magnitudes > 0)
                + np.where(value >= LARGEST, beyond + 4, 0))

    def put(self, magnitudes: np.ndarray, tables: np.ndarray, tabled: Any, bits: Any, escapes: Any) -> None:
        """[n] into three streams, or one: symbols of the tables, low bits, escapes"""
        low = self.low[tables]
        symbols = magnitudes >> low
        for at in range(0, len(symbols), 1 << 14):
            part = slice(at, at + (1 << 14))
            common = symbols[part].clip(max=LARGEST).astype(np.int32)
            tabled.encode(common, self.tabled, self.probabilities[tables[part]])
        if low.any():
            size = (1 << low[low > 0]).astype(np.int32)
            bits.encode((magnitudes[low > 0] & (size - 1)).astype(np.int32), self.uniform, size)
        for rest in (symbols[symbols >= LARGEST] - LARGEST + 1).tolist():  # length, then what follows the leading 1
            length = rest.bit_length() - 1
            escapes.encode(np.int32([length, rest - (1 << length)]), self.uniform, np.int32([32, max(2, 1 << length)]))

    def take(self, tables: np.ndarray, tabled: Any, bits: Any, escapes: Any) -> np.ndarray:
        """What `put` wrote, int32"""
        sizes = self.low[tables].astype(np.int32)
        symbols, rest = tabled.decode(self.tabled, self.probabilities[tables]), np.zeros_like(sizes)
        if sizes.any():
            rest[sizes > 0] = bits.decode(self.uniform, 1 << sizes[sizes > 0])
        for i in (symbols >= LARGEST).nonzero()[0]:
            length = int(escapes.decode(self.uniform, np.int32([32]))[0])
            more = int(escapes.decode(self.uniform, np.int32([max(2, 1 << min(length, 22))]))[0])
            symbols[i] += (1 << min(length, 22)) + more - 1
        return (symbols << sizes) + rest


class Coder(SymbolCoder):
    """A trained codec at work: sound <-> chunks of bytes. The network runs on numpy arrays of whole numbers."""
    rates, channels = RATES, (1, 2)

    def __init__(self, model: Codec) -> None:
        with torch.no_grad():
            enter, band, kind, *more = (w.float().cpu() for w in model.context.weights())
            super().__init__(model.context.tables.double().cpu().softmax(1).numpy())
        self.weights = enter, (kind[:, None] + band).flatten(0, 1), *more
        self.levels, self.config = LEVELS.numpy(), model.config
        self.asked = model.config.bitrate if model.config.quality is None else None
        parts = [*(w.numpy() for w in self.weights), self.probabilities]
        self.digest = hashlib.sha256(b"".join(part.astype("<f4").tobytes() for part in parts)).digest()[:8]

    def choose(self, features: Tensor, places: Tensor) -> np.ndarray:
        """Levels [R 39] of lines in `places` [R], channel * BANDS + band -> which table [R]. Every product and sum is a
        whole number below 2^24: exact in any order."""
        enter, bias, inner, inner_bias, leave, last = self.weights
        h = torch.addmm(bias[places], features, enter).mul_(1 / 64).clamp_(0, 255).round_()
        h = torch.addmm(inner_bias, h, inner).mul_(1 / 64).clamp_(0, 255).round_()
        h = (h @ leave)[:, 0].add_(last + 512).mul_(1 / 1024)
        return h.floor_().clamp_(0, SCALES - 1).long().numpy()

    def tables(self, magnitudes: np.ndarray, rate: int, top: int, frames: slice = slice(None)) -> np.ndarray:
        """[C T N] -> the table of each of the first `top` lines, from what a decoder knows before it: [C F top]"""
        bands = bands_of(magnitudes.shape[2], rate, BANDS).numpy()[:top]
        levels = torch.from_numpy(self.levels[magnitudes.clip(max=255)])
        found = np.zeros((len(levels), len(range(magnitudes.shape[1])[frames]), top), np.int64)
        for c, channel in enumerate(levels if top else ()):
            rows = [row[0, :, :top] for row in contexts(channel[None], levels[:1] if c else None, frames)]
            places = torch.from_numpy(np.tile(bands + BANDS * (c + (len(levels) > 1)), 8))
            for at in range(0, found.shape[1], 8):  # what stays in the cache
                part = torch.stack([row[at:at + 8] for row in rows]).flatten(1).T
                found[c, at:at + 8] = self.choose(part, places[:len(part)]).reshape(-1, top)
        return found

    def quantise(self, lines: np.ndarray, rate: int, step: float, frames: slice = slice(None)) -> Quantised:
        """Lines [C T N] -> values that cost little for what they lose (rate-distortion optimised rounding): the whole
        number above or below, whichever has the smaller square error + bits. Bits are those of `frames`."""
        exact = np.abs(lines) / step
        magnitudes = np.floor(exact + 0.5).clip(max=LOUDEST).astype(np.int64)
        top = top_line(magnitudes)
        if top:
            part, below = magnitudes[:, frames, :top], np.floor(exact[:, frames, :top].clip(max=LOUDEST)).astype(int)
            tables = self.tables(magnitudes, rate, top, frames)
            loss = [(exact[:, frames, :top] - guess) ** 2 + BIT_WORTH * self.code_lengths(tables, guess)
                    for guess in (below, below + 1)]
            part[...] = (below + (loss[1] < loss[0])).clip(max=LOUDEST)
            top = top_line(magnitudes)
        tables = self.tables(magnitudes, rate, top, frames)
        bits = float(self.code_lengths(tables, magnitudes[:, frames, :top]).sum())
        return Quantised(np.where(lines < 0, -magnitudes, magnitudes).astype(np.int32), tables, bits)

    def find_step(self, lines: np.ndarray, rate: int, wanted: float) -> int:
        """Index of the step at which [C T N] need about `wanted` bits: by every fourth frame, from a rough guess"""
        frames, low, high = slice(None, None, 4), 0, FINEST + 1
        part = np.abs(lines[:, frames])
        share, guess, stride = part.shape[1] / lines.shape[1], high // 2, high // 4
        while stride:
            rough = np.log2(1 + part * (1.7 / step_size(guess))).sum()
            guess, stride = guess + (stride if rough < wanted * share else -stride), stride // 2
        known: list[tuple[int, float]] = []
        while low < high:
            guess = min(max(guess, low), high - 1)
            spent = self.quantise(lines, rate, step_size(guess), frames).bits / share
            if abs(spent - wanted) < 0.005 * wanted:
                return guess
            low, high = (guess + 1, high) if spent <= wanted else (low, guess)
            known.append((guess, spent))
            guess += next_change(known, wanted, lines.size) or (1 if spent <= wanted else -1)
        return max(0, low - 1)

    def index_for(self, lines: np.ndarray, rate: int, config: CodecConfig, overhead: float = 0.0) -> int:
        """Index of the step that the options ask for; `overhead` in bits"""
        if config.quality is not None:
            return round(config.quality / 20 * math.log2(10) * STEP_OCTAVE)
        wanted = 1000 * config.bitrate * lines.shape[1] * lines.shape[2] / rate
        return self.find_step(lines, rate, wanted - overhead)

    def pack(self, quantised: Quantised, side: bytes) -> bytes:
        """A chunk's bytes: `side` information, then lengths and words of three streams (symbols of the tables, low
        bits, escapes) and the signs"""
        top, values = quantised.tables.shape[2], quantised.values.transpose(1, 0, 2)
        when = (np.arange(len(values))[:, None, None] * SKEW + np.arange(values.shape[1])[:, None] * LAG
                + np.arange(top))
        order = np.argsort(when.astype(np.int16).ravel(), kind="stable")  # the order in which `unpack` goes
        tables, values = quantised.tables.transpose(1, 0, 2).ravel()[order], values[:, :, :top].ravel()[order]
        streams = [self.stream.RangeEncoder() for _ in range(3)]
        self.put(np.abs(values), tables, *streams)
        words = [stream.get_compressed().astype("<u4").tobytes() for stream in streams]
        lengths = struct.pack("<H3I", top, *map(len, words))
        return side + lengths + b"".join(words) + np.packbits(values[values != 0] < 0).tobytes()

    def unpack(self, chunks: Sequence[tuple[bytes, int]], channels: int, size: int, rate: int) -> list[np.ndarray]:
        """[(what `pack` gave without `side`, frames of the chunk)] -> int32 values [C T N] of each. At each step every
        frame of every chunk gives its next line, SKEW lines behind the frame before it: the network looks at hundreds
        of lines at once, though each depends on the one below and on what the frame before has around it."""
        most, bands = max(frames for _, frames in chunks), bands_of(size, rate, BANDS).numpy()
        heads = [struct.unpack_from("<H3I", data) for data, _ in chunks]
        if any(head[0] > size for head in heads):
            raise ValueError("it names lines that it can't have")
        width = LEFT + size + RIGHT
        shape = (len(chunks), most + 3, channels, width)  # two frames of silence before the first, one after the last
        levels, memory = np.zeros(shape, np.float32).ravel(), np.zeros(shape, np.float32).ravel()
        values, frame = np.zeros(shape, np.int32).ravel(), channels * width
        streams, signs = [], []
        for (data, _), (_, *lengths) in zip(chunks, heads):
            ends = np.cumsum([14, *lengths])
            if any(n % 4 for n in lengths) or ends[-1] > len(data):
                raise ValueError("its lengths do not fit")
            streams.append([self.stream.RangeDecoder(np.frombuffer(data[a:b], "<u4").astype(np.uint32))
                            for a, b in itertools.pairwise(ends.tolist())])
            signs.append(np.unpackbits(np.frombuffer(data[ends[-1]:], np.uint8)))
        g, t, c = (axis.ravel() for axis in np.meshgrid(np.arange(len(chunks)), np.arange(most), np.arange(channels),
                                                        indexing="ij"))
        there = t < np.array([frames for _, frames in chunks])[g]
        g, t, c = g[there], t[there], c[there]
        delay, start, top = SKEW * t + LAG * c, (((g * shape[1] + t + 2) * channels + c) * width + LEFT), \
            np.array([head[0] for head in heads])[g]
        look = {"now": 0, "past1": -frame, "past2": -2 * frame}
        near = np.concatenate([np.add(CONTEXT[name], shift) for name, shift in look.items()])
        signed = [(start[:0], g[:0])]
        for step in range(int((delay + top).max(initial=0))):
            line = step - delay
            rows = ((line >= 0) & (line < top)).nonzero()[0]
            at, line, second = start[rows] + line[rows], line[rows], c[rows]
            other = np.where(second > 0, at - width, LEFT)[:, None] + np.array(CONTEXT["other"])  # LEFT: in silence
            features = np.concatenate([levels[at[:, None] + near], memory[at[:, None] + np.array(CONTEXT["memory"])],
                                       levels[other]], 1)
            tables = self.choose(torch.from_numpy(features),
                                 torch.from_numpy(bands[line] + BANDS * (second + (channels > 1))))
            found = self.read_step(tables, np.searchsorted(g[rows], np.arange(len(chunks) + 1)), streams)
            values[at] = found
            levels[at] = now = self.levels[found.clip(max=255)]
            memory[at + frame] = np.where(t[rows] == 0, now, np.floor((3 * memory[at] + now + 2) / 4))
            signed.append((at[found > 0], g[rows[found > 0]]))
        places, owners = (np.concatenate(parts) for parts in zip(*signed))
        for chunk, negative in enumerate(signs):
            where = places[owners == chunk]
            if len(where) > len(negative):
                raise ValueError("signs are missing")
            values[where] *= 1 - 2 * negative[:len(where)].astype(np.int32)
        whole_values = values.reshape(shape)[:, 2:-1, :, LEFT:LEFT + size].transpose(0, 2, 1, 3)
        return [chunk[:, :frames] for chunk, (_, frames) in zip(whole_values, chunks)]

    def read_step(self, tables: np.ndarray, edges: np.ndarray, streams: list[list[Any]]) -> np.ndarray:
        """The magnitudes of some lines, of which `edges` says where each chunk's begin"""
        return np.concatenate([self.take(tables[a:b], *three) if b > a else np.zeros(0, np.int32)
                               for three, a, b in zip(streams, edges[:-1], edges[1:])])

    def write(self, source: Path, target: Path, bits: int) -> Header:
        return encode_file(self, self.config, source, target, bits)

    def counts(self, header: Header) -> Iterator[int]:
        """Frames of each chunk of a file"""
        frames = -(-header.samples // frame_size(header.rate))
        return (min(CHUNK_FRAMES, frames - start) for start in range(0, frames, CHUNK_FRAMES))

    def seconds(self, header: Header, chunks: int) -> float:
        """Length of the first chunks"""
        return chunks * CHUNK_FRAMES * frame_size(header.rate) / header.rate

    @one_thread()
    def values(self, chunks: Sequence[tuple[bytes, int]], header: Header) -> list[np.ndarray]:
        """Content and count of chunks -> what the MDCT was, [C T N] of each; errors where no coder wrote it"""
        return list(decoded_lines(self, header, chunks))

    def sound(self, values: Iterable[np.ndarray], header: Header) -> Iterator[np.ndarray]:
        """Of all chunks -> blocks [L C]"""
        for block in folded((dct4(torch.from_numpy(lines)).numpy() for lines in values), -1):
            yield block.reshape(header.channels, -1).T

    def figures(self, estimate: Path, source: Path) -> dict[str, float | None]:
        return {"snr_db": file_snr(estimate, source)}


# === classifier ===
# The judge before the artist: through its ears drawn sounds are measured.

RANGE = 60 * math.log(10) / 10  # of a picture, in log-mel: 60 dB
STRIDE = 16  # ms between the frames of a picture
CEPSTRA = 32  # lowest coefficients of the cepstrum that a classifier may look at


class ShortBatch(NamedTuple):
    audio: Tensor  # [B L]
    labels: Tensor  # [B] int64
    draw: Draw
    progress: float = 1.0


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


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], rounded to the nearest level as a saved picture is"""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


class ShortSoundFamily(Family):
    """What the models of short sounds share: a sound is a picture [B 1 M T] of its log-mel spectrogram, 1 the loudest
    of the training set and -1 what is 60 dB below it, or more."""
    labelled = True
    held_out_count = 10_000

    def __init__(self, config: Any, data: DataInfo) -> None:
        super().__init__(config, data)
        self.labelled = self.labelled and len(data.classes) > 1
        hop = data.sample_rate * STRIDE // 1000
        self.preprocessor = AudioPreprocessor(config.n_mels, data.sample_rate, hop, 4 * hop)
        self.register_buffer("top", torch.zeros(()))  # log-mel that is 1

    def prepare(self, data: Any, device: torch.device) -> None:
        """The loudest, but for one bin in 20,000"""
        log_mel = self.preprocessor.log_mel(data.train[some_rows(data.train, 1000)].float().to(device)).flatten()
        self.top.copy_(log_mel.kthvalue(max(1, len(log_mel) - len(log_mel) // 20_000)).values)

    def picture(self, audio: Tensor) -> Tensor:
        """Sounds [B L] -> [B 1 M T]"""
        return (1 + 2 * (self.preprocessor.log_mel(audio)[:, None] - self.top) / RANGE).clamp(-1, 1)

    def sound(self, picture: Tensor) -> Tensor:
        """Pictures [B 1 M T] -> sounds [B L]; what is at the bottom of the range is silence."""
        log_mel = self.top + RANGE / 2 * (picture[:, 0].float() - 1)
        log_mel = log_mel.masked_fill(picture[:, 0] < -0.99, math.log(MEL_FLOOR))
        return to_audio(self.preprocessor, log_mel, log_mel.shape[2] * self.preprocessor.hop).clamp(-1, 1)

    def sample(self, labels: Tensor | None, noise: Noise) -> Tensor:
        """Draw pictures [B 1 M T], one for each item of `noise`."""
        raise UserError(f"a {type(self).__name__} draws no sounds: use --model diffusion", 2)

    @classmethod
    def file_name(cls, data: DataInfo | None) -> str:
        return FILE_NAME.format(f"{family_name(cls)}_{data.dataset if data else '*'}")


@dataclass(frozen=True)
class ClassifierConfig(RunConfig):
    epochs: int = option(24, "optimisation", "passes over the training set", number(int, 1))
    learning_rate: float = option(2e-3, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    view: str = option("mel", "model", "what it looks at: mel, the spectrogram, or cepstrum, its lowest cosine "
                       "coefficients in each frame, which know nothing of pitch: another judge",
                       choices=("mel", "cepstrum"))
    n_mels: int = option(64, "model", "mel bins", number(int, 8, 256))
    width: int = option(16, "model", "channels of the first convolutions, a multiple of 8", number(int, 8, 1024))
    features: int = option(64, "model", "width of the layer that the metrics look at", number(int, 2, 4096))


class SoundClassifier(ShortSoundFamily):
    """Its last hidden layer is the feature space of `fd_<dataset>_cnn` and the other metrics that carry `_cnn` in
    their name. Group norm and no dropout: the same losses on any number of processes."""
    config_class = ClassifierConfig
    can_sample = False

    def __init__(self, config: ClassifierConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        if len(data.classes) < 2:
            raise UserError(f"a classifier needs two or more classes, {data.title} has one: use sub-folders")
        if config.width % 8:
            raise UserError(f"--width {config.width}: must be a multiple of 8", 2)
        w, rows = config.width, min(CEPSTRA, config.n_mels) if config.view == "cepstrum" else config.n_mels
        self.register_buffer("cosines", cosines(config.n_mels, 0.0).float()[:rows], persistent=False)
        self.register_buffer("mean", torch.zeros(rows, 1))
        self.register_buffer("deviation", torch.ones(rows, 1))

        def convolution(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU())

        self.body = nn.Sequential(
            convolution(1, w), convolution(w, w), nn.MaxPool2d(2), convolution(w, 2 * w), convolution(2 * w, 2 * w),
            nn.MaxPool2d(2), convolution(2 * w, 4 * w), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(4 * w * (rows // 8) * (data.frames // 8), config.features), nn.ReLU())
        self.head = nn.Linear(config.features, len(data.classes))

    @torch.no_grad()
    def prepare(self, data: Any, device: torch.device) -> None:
        super().prepare(data, device)
        seen = self.look(self.picture(data.train[some_rows(data.train, 1000)].float().to(device)))
        self.mean.copy_(seen.mean((0, 1, 3))[:, None])
        self.deviation.copy_(seen.std((0, 1, 3))[:, None].clamp(min=1e-3))

    def look(self, picture: Tensor) -> Tensor:
        """[B 1 M T] -> what the network is given, [B 1 R T]"""
        seen = self.cosines @ picture if self.config.view == "cepstrum" else picture
        return (seen - self.mean) / self.deviation

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """[B 1 M T] -> features [B D], logits [B K]"""
        features = self.body(self.look(picture).contiguous(memory_format=torch.channels_last))
        return features, self.head(features)

    def losses(self, batch: ShortBatch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Cross-entropy on pictures that are shifted and stretched a little at random: later, slower, higher."""
        later, slower, higher, louder = ((batch.draw.uniform(4) * 2 - 1) *
                                         batch.audio.new_tensor([0.2, 0.2, 0.06, 0.2])).unbind(1)
        none, one = torch.zeros_like(later), torch.ones_like(later)
        affine = torch.stack([1 + slower, none, later, none, one, higher], 1).view(-1, 2, 3)
        picture = self.picture(batch.audio) + 1
        grid = F.affine_grid(affine, list(picture.shape), align_corners=False)
        x = (F.grid_sample(picture, grid, align_corners=False) - 1 + louder[:, None, None, None]).clamp(-1, 1)
        with self.cast():
            _, logits = self(x)
        logits = logits.float()
        yield "model", F.cross_entropy(logits, batch.labels), {
            "accuracy": (logits.detach().argmax(1) == batch.labels).float().mean()}

    @torch.no_grad()
    def validate(self, batch: ShortBatch) -> dict[str, float]:
        _, logits = self(self.picture(batch.audio))
        return {"val_loss": F.cross_entropy(logits, batch.labels).item(),
                "val_accuracy": (logits.argmax(1) == batch.labels).float().mean().item()}

    @classmethod
    def file_name(cls, data: DataInfo | None) -> str:
        """By the identity of its data, as those of two folders must not be taken for one another."""
        if data is None or data.dataset != "folder":
            return super().file_name(data)
        slug = re.sub(r"[^a-z0-9]+", "-", data.title.lower()).strip("-") or "folder"
        known = json.dumps([data.classes, data.sample_rate, data.frames])
        return FILE_NAME.format(f"classifier_{slug[:40]}_{hashlib.sha256(known.encode()).hexdigest()[:8]}")


# === diffusion ===

TIMESTEPS = 1000


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 16, channels)


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




SAMPLERS = {"ddim": sample_ddim, "dpm++": sample_dpm}


@dataclass(frozen=True)
class DiffusionConfig(RunConfig):
    epochs: int = option(40, "optimisation", "passes over the training set", number(int, 1))
    learning_rate: float = option(2e-3, "optimisation", "peak rate of AdamW, for embeddings, norms, first and last "
                                  "layer", number(float, 0, open_low=True))
    muon_rate: float = option(0.02, "optimisation", "peak rate of Muon [Jordan24], for all other layers",
                              number(float, 0, open_low=True))
    n_mels: int = option(64, "model", "mel bins", number(int, 8, 256))
    channels: int = option(32, "model", "width at the highest resolution, a multiple of 16", number(int, 16, 1024))
    levels: int = option(3, "model", "resolutions; the width doubles at each", number(int, 1, 5))
    blocks: int = option(2, "model", "residual blocks per level, each way", number(int, 1, 16))
    label_dropout: float = option(0.1, "model", "share of labels that are hidden, for guidance", number(float, 0, 1))
    sampler: str = option("dpm++", "sampling", "ddim or dpm++ (2M)", choices=tuple(SAMPLERS))
    steps: int = option(10, "sampling", "sampling steps, one evaluation each", number(int, 1, TIMESTEPS))
    guidance: float = option(1.2, "sampling", "classifier-free guidance scale [HoSal22]; 1 is none, other values "
                             "double the work", number(float, 0, 100))
    temperature: float = option(1.0, "sampling", "factor of the starting noise", number(float, 0, 10))
    seed: int = option(0, "run", "sound i of a seed is always the same", number(int, 0, 2**63 - 1))


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


class SoundDiffusion(FlowModel, ShortSoundFamily):
    """A `FlowModel` of the log-mel pictures of short sounds."""
    config_class = DiffusionConfig

    def __init__(self, config: DiffusionConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        for size, what in ((config.n_mels, "--n_mels"), (data.frames, "frames")):
            if size % 2 ** config.levels:
                raise UserError(f"{size} {what} can't be halved --levels {config.levels} times: use multiples of "
                                f"{2 ** config.levels}, or fewer levels", 2)
        self.build(1, len(data.classes))

    def losses(self, batch: ShortBatch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        labels = self.some_hidden(batch.labels, batch.draw)
        yield "model", self.flow_loss(self.picture(batch.audio), labels, batch.draw), {}

    def validate(self, batch: ShortBatch) -> dict[str, float]:
        return self.held_out_loss(self.picture(batch.audio), batch.labels, batch.draw)

    def sample(self, labels: Tensor | None, noise: Noise,
               watch: Callable[[int, Tensor, Tensor], None] = lambda *_: None) -> Tensor:
        return self.draw(labels, noise, (1, self.config.n_mels, self.data.frames), watch)


# === signal path ===

MEL_FLOOR = 1e-8  # added to mel power before the logarithm: -80 dB of a full-scale sine, and what silence looks like
BLOCK = 256  # frames transformed at a time on CPUs: what fits the cache takes a third of the time


class AudioPreprocessor(nn.Module):
    """Waveform [B L] in [-1, 1] to log-mel spectrogram [B M T], T = L / HOP; the way back follows below.
    log-mel = ln(mel power + MEL_FLOOR), where a full-scale sine has power 1. It is standardised with the training set's
    mean of each mel bin and one deviation for all, which `fit` takes and the checkpoint keeps."""

    def __init__(self, n_mels: int = 128, rate: int = SAMPLE_RATE, hop: int = HOP, window: int = WINDOW) -> None:
        super().__init__()
        self.hop, self.size = hop, window
        from torchaudio.functional import melscale_fbanks
        with warnings.catch_warnings():  # it would name an argument that nobody here has given
            warnings.simplefilter("ignore")
            filters = melscale_fbanks(window // 2 + 1, 0.0, rate / 2, n_mels, rate, None, "htk")
        filters[0, 0] = 1  # no triangle holds 0 Hz, but real recordings hold much below 8 Hz, which SDR would count
        self.bands = []  # 16 filters each, and the frequencies where they are not zero: an eighth of the products
        for first in range(0, n_mels, 16):
            used = filters[:, first:first + 16].any(1).nonzero().flatten().tolist() or [0]
            self.bands.append((slice(first, first + 16), slice(used[0], used[-1] + 1)))
        hann = torch.hann_window(window)
        self.register_buffer("window", hann * (2 / hann.sum()), persistent=False)
        self.register_buffer("filters", filters, persistent=False)  # [513 M], triangles of height 1
        self.register_buffer("mean", torch.zeros(n_mels))
        self.register_buffer("std", torch.ones(()))

    def spectra(self, audio: Tensor) -> Iterator[Tensor]:
        """[B L] -> blocks of the spectrogram, [... 513] complex: in all B * L / HOP frames, clip by clip"""
        edge = (self.size - self.hop) // 2
        frames = F.pad(audio, (edge, edge)).unfold(-1, self.size, self.hop)
        blocks = itertools.chain(*(clip.split(BLOCK) for clip in frames)) if audio.device.type == "cpu" else [frames]
        for block in blocks:
            yield torch.fft.rfft(block * self.window).flatten(0, -2)

    def log_mel(self, audio: Tensor) -> Tensor:
        """[B L], L a multiple of HOP -> log-mel [B M T]; frame t is centred on sample (t + 1/2) HOP."""
        mel = []
        for spectrum in self.spectra(audio):
            power = spectrum.real.square() + spectrum.imag.square()
            mel.append(torch.cat([power[:, rows] @ self.filters[rows, columns] for columns, rows in self.bands], 1))
        return (torch.cat(mel) + MEL_FLOOR).log().view(len(audio), -1, self.filters.shape[1]).mT

    def standardise(self, log_mel: Tensor) -> Tensor:
        return (log_mel - self.mean[:, None]) / self.std

    def unstandardise(self, standardised: Tensor) -> Tensor:
        return standardised * self.std + self.mean[:, None]

    @torch.no_grad()
    def fit(self, batches: Iterator[Batch]) -> None:
        """Take mean [M] and deviation of a training set's log-mel; padding does not count."""
        count, total, squares = 0, torch.zeros(len(self.mean), dtype=torch.float64), 0.0
        for batch in batches:
            for log_mel, frames in zip(self.log_mel(batch.audio).double().cpu(), batch.frames.tolist()):
                count += frames
                total += log_mel[:, :frames].sum(1)
                squares += log_mel[:, :frames].square().sum().item()
        mean = total / count
        variance = (squares / count - mean.square().sum().item()) / int(self.filters.any(0).sum())
        self.mean.copy_(mean)
        self.std.fill_(variance**0.5 if variance > 1e-6 else 1.0)  # digital silence only: leave it as it is


PHASES = ("griffinlim", "original")  # ways to make a log-mel audible, see `to_audio`
UPPER_BOUND = "the input's own: an upper bound, not the model's result"  # which is said wherever "original" is
INVERSE_STEPS = 16  # from mel to frequencies: 50 would add 0.2 dB of SDR


def stft(prep: AudioPreprocessor, audio: Tensor) -> Tensor:
    """[B L], L a multiple of HOP -> complex [B 513 T]"""
    return torch.cat(list(prep.spectra(audio))).view(len(audio), -1, prep.size // 2 + 1).mT


def istft(prep: AudioPreprocessor, spectrum: Tensor) -> Tensor:
    """Complex [B 513 T] -> [B L = T HOP]: the inverse of `stft`, in the least-squares sense of [Griffin84]."""
    frames = torch.fft.irfft(spectrum.mT) * prep.window
    weights = prep.window.square().expand(1, *frames.shape[1:])
    return overlap_add(frames, prep.hop) / overlap_add(weights, prep.hop)


def overlap_add(frames: Tensor, hop: int = HOP) -> Tensor:
    """[B T WINDOW] -> [B T HOP], in the few slices that a window has hops: 15 times as fast as F.fold"""
    count, slices = frames.shape[1], frames.split(hop, -1)
    total = frames.new_zeros(len(frames), count + len(slices) - 1, hop)
    for first, part in enumerate(slices):
        total[:, first:first + count, :part.shape[-1]] += part
    edge = (frames.shape[2] - hop) // 2
    return total.flatten(1)[:, edge:edge + count * hop]


def to_magnitude(prep: AudioPreprocessor, log_mel: Tensor) -> Tensor:
    """log-mel [B M T] -> magnitude [B 513 T] that has these mel bands: non-negative, by the multiplicative updates that
    minimise the Kullback-Leibler divergence [Lee01], from a start with the bands' own slopes. A filter that holds no
    frequency (an empty band of a fine mel scale) has no say."""
    mel = (log_mel.mT.clamp(max=10).exp() - MEL_FLOOR).clamp(min=0)  # no sound has more: only a network that errs
    spread = prep.filters.T / prep.filters.sum(1).clamp(min=1e-6)
    power = (mel / prep.filters.sum(0).clamp(min=1e-6)) @ spread
    for _ in range(INVERSE_STEPS):
        power = power * ((mel / (power @ prep.filters + 1e-20)) @ spread)
    return power.sqrt().mT


def griffin_lim(prep: AudioPreprocessor, magnitude: Tensor, iterations: int = 32, momentum: float = 0.99) -> Tensor:
    """Fast Griffin-Lim [Perraudin13] from phase 0: magnitude [B 513 T] -> waveform [B T HOP]"""
    spectrum, previous = magnitude.to(torch.complex64), 0
    for step in range(iterations):
        current = stft(prep, istft(prep, spectrum))
        spectrum = magnitude * torch.sgn(current + momentum * (current - previous) if step else current)
        previous = current
    return istft(prep, spectrum)


def to_audio(prep: AudioPreprocessor, log_mel: Tensor, length: int, phase: str = "griffinlim",
             original: Tensor | None = None) -> Tensor:
    """log-mel [B M T] -> waveform [B length <= T HOP]. phase="original" takes that of the waveform `original`
    [B T HOP]: an upper bound, not something a model has done."""
    magnitude = to_magnitude(prep, log_mel)
    if phase == "original":
        return istft(prep, magnitude * torch.sgn(stft(prep, original)))[:, :length]
    rows = len(magnitude)
    if magnitude.device.type == "cpu":  # one clip at a time, or as many short ones, fit its cache
        rows = max(1, FRAMES // magnitude.shape[2])
    return torch.cat([griffin_lim(prep, part)[:, :length] for part in magnitude.split(rows)])


# === registry ===

HERE = Path(__file__).resolve().parent
FILE_NAME = "audio_{}.pt"
FAMILIES: dict[str, type[Family]] = {"autoencoder": AudioAutoencoder, "vae": AudioVAE, "codec": Codec,
                                     "diffusion": SoundDiffusion, "classifier": SoundClassifier}


@dataclass(frozen=True)
class NoOptions:
    """A mode that needs to be told nothing beside."""


@dataclass(frozen=True)
class InferOptions:
    input: list[Path] | None = option(None, "regeneration", "audio files (default: shipped examples)", Path, nargs="+")
    output_dir: Path | None = option(None, "regeneration", "folder for NAME_reconstructed.wav (default: results)", Path)
    export: Path | None = option(None, "regeneration", "also write the averaged weights alone, in half precision", Path)
    encode: bool = option(False, "regeneration", "only write the small file NAME.iag of each --input")
    decode: list[Path] | None = option(None, "regeneration", "such files to turn into sound", Path, nargs="+")
    salvage: bool = option(False, "regeneration", "of a damaged file write what stands before the damage")
    bits: int | None = option(None, "regeneration", "of a sample of the WAV file: 16, 24, or 32 for floating point "
                              "(default: 16; with --decode what the file says)", int, choices=(16, 24, 32))


@dataclass(frozen=True)
class EvaluateOptions:
    eval_clips: int = option(100, "evaluation", "test clips to measure, spread evenly", number(int, 1))


@dataclass(frozen=True)
class ExportOptions:
    """Flags of --mode infer for any model of short sounds."""
    export: Path | None = option(None, "sampling", "also write the averaged weights alone, in half precision", Path)


@dataclass(frozen=True)
class DrawOptions(ExportOptions):
    num_samples: int | None = option(None, "sampling", "sounds to draw (default: one of each class, or of each "
                                     "--label)", number(int, 1, 100_000))
    label: str | None = option(None, "sampling", "classes to draw, in turn, e.g. 7 or 1,9,8,4 (default: all)", str)
    sample_batch: int = option(64, "sampling", "sounds drawn at once, bounds the memory", number(int, 1))
    output_dir: Path | None = option(None, "sampling", "folder for the WAV files (default: results)", Path)


@dataclass(frozen=True)
class ClassifyOptions(ExportOptions):
    input: list[Path] | None = option(None, "sampling", "audio files to name the classes of", Path, nargs="+")


@dataclass(frozen=True)
class MeasureOptions:
    classifier: Path | None = option(None, "evaluation", "checkpoint of --model classifier for the metrics; by default "
                                     "the shipped one for the dataset, else the one in models/ for its classes", Path)
    second_classifier: Path | None = option(None, "evaluation", "another one, asked only for its label agreement; by "
                                            "default the shipped one that looks at cepstra", Path)
    eval_samples: int | None = option(None, "evaluation", "sounds to measure (default: as many as the test set has, at "
                                      "most 2,000)", number(int, 2))


SoundFamily.options = {"train": NoOptions, "infer": InferOptions, "evaluate": EvaluateOptions}
SoundDiffusion.options = {"train": MeasureOptions, "infer": DrawOptions, "evaluate": MeasureOptions}
SoundClassifier.options = {"train": NoOptions, "infer": ClassifyOptions, "evaluate": NoOptions}


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

NO_NETWORK = 3  # exit status that says "the dataset could not be downloaded", and nothing else
NO_FFMPEG = 4  # exit status that says "this needs ffmpeg, which is not installed", and nothing else
STEMS = ("mixture", "drums", "bass", "other", "vocals")  # the order of the streams in a MUSDB18 file
SPLITS = ("train", "valid", "test")
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
FFMPEG_SUFFIXES = {".m4a", ".aac", ".mp4", ".wma"}  # what is read from a folder with ffmpeg's help
SILENCE = 1e-3  # RMS below which a crop counts as silent: -60 dB
MUSDB_FILES = {  # kind: (address, md5 where one is published, what it is)
    "full": ("https://zenodo.org/records/1117372/files/musdb18.zip", "af06762477334799bfc5abf237648207",
             "MUSDB18, 150 whole songs, 4.7 GB"),
    "sample": ("https://github.com/sigsep/sigsep-mus-db/releases/download/v0.4.0/MUSDB18-7-STEMS.zip", None,
               "7 seconds of each MUSDB18 song, 140 MB"),
}


@dataclass(frozen=True)
class DataOptions:
    """Flags that say which sounds are measured."""
    dataset: str = option("musdb", "data", "what to learn from", choices=("musdb", "synthetic", "folder"))
    musdb_root: Path | None = option(None, "data", "folder of MUSDB18 (default: data/musdb18 beside this script)", Path)
    stem: str = option("all", "data", "which stems: all or one of them", choices=("all", *STEMS))
    num_samples: int = option(100, "data", "clips of --dataset synthetic", number(int, 5, 1e6))
    data_root: Path | None = option(None, "data", "folder of your own audio files, for --dataset folder", Path)


@dataclass(frozen=True)
class TrainDataOptions(DataOptions):
    extra_root: Path | None = option(None, "data", "one more folder of audio files, for training only", Path)
    musdb: str | None = option(None, "data", "what --prepare_data downloads: 140 MB (7 s of each song) or 4.7 GB "
                               "(default: sample)", choices=tuple(MUSDB_FILES))


class Track(NamedTuple):
    name: str
    stem: str  # one of STEMS
    audio: np.ndarray  # float16 [L], often a memory map
    file: Path | None = None


class AudioData:
    """Tracks in three splits that share no song; a split that was not asked for is empty."""

    def __init__(self, name: str, title: str, tracks: dict[str, list[Track]]) -> None:
        self.name, self.title = name, title
        self.train, self.valid, self.test = (tracks.get(split, []) for split in SPLITS)
        self.own = self.train  # without those of --extra_root
        if self.train and not any(np.abs(track.audio).max() > SILENCE for track in self.train):
            raise UserError(f"{title}: all of its training tracks are silent; give some that sound")

    def add(self, root: Path) -> None:
        """The files of --extra_root, for training only: none of them may be held out elsewhere."""
        files = audio_files(root, "--extra_root")
        taken = {track.file.resolve() for track in self.train + self.valid + self.test if track.file}
        if twice := {file.resolve() for file in files} & taken:
            raise UserError(f"--extra_root holds {min(twice)}, which belongs to the dataset: name another folder")
        entries = [(f"extra/{p.relative_to(root)}", "mixture", p) for p in files]
        self.train = self.train + load_tracks({"train": entries})["train"]
        self.title += f" and {len(files)} files of {Path(*root.resolve().parts[-2:])}"  # "train" alone says little

    def info(self) -> DataInfo:
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        rows = [(split, t.name, t.stem, len(t.audio)) for split, tracks in splits.items() for t in tracks]
        stems = [stem for stem in STEMS if any(stem == row[2] for row in rows)]
        counts = {split: len(tracks) for split, tracks in splits.items()}
        seconds = {s: round(sum(row[3] for row in rows if row[0] == s) / SAMPLE_RATE, 2) for s in splits}
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
        return DataInfo(self.name, self.title, SAMPLE_RATE, stems, counts, seconds, digest)

    def describe(self) -> str:
        minutes = sum(len(track.audio) for track in self.train) / SAMPLE_RATE / 60
        return (f"{self.title}: {len(self.train)} training tracks ({minutes:.1f} minutes), {len(self.valid)} for "
                f"validation, {len(self.test)} for test")

    def plan(self, config: CropConfig) -> tuple[int, int]:
        """(batch size, steps of an epoch)"""
        return config.batch_size, max(1, config.crops // config.batch_size)

    def training_batch(self, config: CropConfig, step: int, draw: Draw) -> Batch:
        """Every third one from the dataset alone, however much longer --extra_root is: it is what will be measured."""
        return random_crops(self.train if step % 3 else self.own, draw, config.speed)

    def training_crops(self, config: CropConfig, device: torch.device) -> Iterator[Batch]:
        """Up to 4,096 crops for statistics, by negative steps: they are not those of the training."""
        for i in range(min(256, max(60, config.epochs * config.crops // 16))):
            yield self.training_batch(config, -1 - i, Draw(config.seed, -1 - i, 16, slice(None), device))

    def training_clips(self, device: torch.device) -> Iterator[Batch]:
        """Up to 2,000 clips spread evenly over the training set, in a fixed shuffled order, 16 at a time."""
        clips = fixed_clips(self.train, 2000)
        order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0)).tolist()
        return clip_batches([clips[i] for i in order], device)

    def held_out(self, count: int, device: torch.device) -> Iterator[Batch]:
        return clip_batches(fixed_clips(self.valid, count), device)


def cut(track: Track, start: int, length: int = CLIP) -> Tensor:
    """float32 [length], or shorter where the track ends"""
    return torch.from_numpy(np.array(track.audio[start:start + length])).float()  # torch converts 3 times as fast


def random_crops(tracks: Sequence[Track], draw: Draw, speed: float = 0.0) -> Batch:
    """Training clips: from a track drawn by its length, at a random start, not silent, with random gain (-12 to +3 dB,
    never clipped) and polarity; half of them have a crop of another track added, which makes new mixtures. With `speed`
    they are played faster or slower, and so higher or lower, by up to as many octaves."""
    tries = 9
    places = torch.rand(draw.total, 2, tries, 2, generator=draw.generator, dtype=torch.float64)[draw.rows].numpy()
    others = torch.rand(draw.total, 5, generator=draw.generator)[draw.rows].tolist()
    speeds = 2 ** (speed * (2 * torch.rand(draw.total, 2, generator=draw.generator)[draw.rows] - 1))
    edges = np.cumsum([max(len(track.audio), CLIP) for track in tracks])
    audio, frames = torch.zeros(len(places), CLIP), torch.zeros(len(places), dtype=torch.int64)
    labels = torch.zeros_like(frames)
    for row, (candidates, (*gains, sign, sign2, mix)) in enumerate(zip(places, others)):
        taken = -1
        for layer, flip in enumerate((sign, sign2)[:2 if mix < 0.5 else 1]):
            crop = None
            rate = speeds[row, layer].item()
            for u, v in candidates[layer]:
                index = int(np.searchsorted(edges, u * edges[-1], "right"))
                if index == taken:
                    continue
                length = math.ceil(CLIP * rate)
                crop = cut(tracks[index], int(v * (max(len(tracks[index].audio) - length, 0) + 1)), length)
                if torch.dot(crop, crop) > SILENCE ** 2 * len(crop):
                    break
            if crop is not None:  # there may be no other track
                if rate != 1:  # linear interpolation, enough for learning
                    size = max(1, int(len(crop) / rate))
                    crop = F.interpolate(crop[None, None], size=size, mode="linear")[0, 0, :CLIP]
                gain = 10 ** ((15 * gains[layer] - 12) / 20)
                audio[row, :len(crop)].add_(crop, alpha=gain if flip < 0.5 else -gain)
                frames[row] = max(int(frames[row]), -(-len(crop) // HOP))
                labels[row] = STEMS.index(tracks[index].stem) if taken < 0 else 0  # two make a mixture
                taken = index
    audio /= audio.abs().amax(1, keepdim=True).clamp(min=1)
    return Batch(audio.to(draw.device), frames.to(draw.device), labels.to(draw.device), draw)


def fixed_clips(tracks: Sequence[Track], limit: int | None = None) -> list[tuple[Track, int]]:
    """Evaluation clips (track, start): one after the other, without overlap; a last part of less than a second is left
    out unless it is all there is. `limit` keeps as many, spread evenly."""
    clips = [(track, start) for track in tracks for start in range(0, len(track.audio), CLIP)
             if start == 0 or len(track.audio) - start >= SAMPLE_RATE]
    count = min(limit or len(clips), len(clips))
    return [clips[n * len(clips) // count] for n in range(count)]


def clip_batch(clips: Sequence[tuple[Track, int]], device: torch.device) -> Batch:
    """The clips themselves, zero-padded, unchanged otherwise."""
    crops = [cut(*clip) for clip in clips]
    audio = torch.stack([F.pad(crop, (0, CLIP - len(crop))) for crop in crops])
    rows = [(-(-len(crop) // HOP), STEMS.index(track.stem)) for crop, (track, _) in zip(crops, clips)]
    return Batch(audio.to(device), *torch.tensor(rows, device=device).T, None)


def clip_batches(clips: Sequence[tuple[Track, int]], device: torch.device) -> Iterator[Batch]:
    for start in range(0, len(clips), 16):
        yield clip_batch(clips[start:start + 16], device)


def read_audio(path: Path, flag: str = "--input", stem: str = "mixture", rate: int = SAMPLE_RATE) -> Tensor:
    """A file of any rate and channels -> float32 mono [L] at `rate`; of a .stem.mp4 one of its five streams"""

    from torchaudio.functional import resample
    if not path.is_file():
        raise UserError((f"{path} is a folder, not an audio file" if path.is_dir() else f"there is no file {path}")
                        + f": give audio files with {flag}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain = path.suffix.lower() in AUDIO_SUFFIXES
            audio, held = read_mono(path if plain else decoded(path, Path(folder), STEMS.index(stem)))
    except (OSError, RuntimeError, ValueError) as error:  # soundfile's own errors are RuntimeErrors
        raise UserError(f"{path} can't be read as audio ({first_line(error)}): repair or remove it, or convert it "
                        "to WAV or FLAC") from None
    ratio = Fraction(held, rate).limit_denominator(640)  # exact for all usual rates, else within 3e-6: the
    return resample(audio, ratio.numerator, ratio.denominator, 32)  # filters of 44,101 Hz would need 3 GB


def read_mono(path: Path) -> tuple[Tensor, int]:
    """What soundfile reads -> the mean of its channels, float32 [L], and the rate"""
    import soundfile
    blocks, energy = [np.zeros(0, np.float32)], np.zeros(2)  # of the channels, of their mean
    if missing := missing_bytes(path):
        raise ValueError(f"it is truncated, {missing} bytes of the sound that its header promises are missing")
    with soundfile.SoundFile(path) as file:
        while len(block := file.read(1 << 18, dtype="float32", always_2d=True)):
            blocks.append(block.mean(1))
            energy += np.square(block, dtype=float).mean(1).sum(), np.square(blocks[-1], dtype=float).sum()
        audio = np.concatenate(blocks)
        if not len(audio):
            raise ValueError("it holds no samples")
        if len(audio) < file.frames and file.format != "MP3":  # of which the length is a guess
            raise ValueError(f"it is truncated, {len(audio)} of {file.frames} samples are there")
        if not np.isfinite(audio).all():
            raise ValueError("it holds NaN or infinite samples")
        if not 1000 <= file.samplerate <= 1_000_000:
            raise ValueError(f"it claims {file.samplerate} Hz")
        if energy[1] < 0.01 * energy[0]:
            say(f"warning: {path}: its channels cancel each other, their mean is "
                f"{10 * math.log10(energy[0] / max(energy[1], 1e-20)):.0f} dB below them: give it as mono", sys.stderr)
        return torch.from_numpy(audio), file.samplerate


def missing_bytes(path: Path) -> int:
    """How much of its sound a WAV file lacks, which libsndfile would not say; 0 for streams of unknown length."""
    with open(path, "rb") as file:
        if file.read(12)[::11] != b"RE":  # "RIFF....WAVE"
            return 0
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                return max(0, file.tell() + size - path.stat().st_size) if size < 0x7FFF0000 else 0
            file.seek(size + size % 2, 1)
    return 0


def need_ffmpeg(what: Any) -> None:
    if not shutil.which("ffmpeg"):
        raise UserError(f"{what} can't be read without ffmpeg: install it (sudo apt-get install ffmpeg, brew install "
                        "ffmpeg), or take WAV or FLAC files (MUSDB18-HQ, --dataset folder) or --dataset synthetic",
                        NO_FFMPEG)


def decoded(path: Path, folder: Path, stream: int) -> Path:
    """A WAV file in `folder` with one audio stream of what only ffmpeg reads: M4A, WMA, .stem.mp4 ..."""
    import subprocess
    need_ffmpeg(path)
    sound = folder / "sound.wav"
    words = ["-nostdin", "-v", "error", "-xerror", "-i", f"file:{path}", "-map", f"0:a:{stream}", "-c:a", "pcm_f32le"]
    done = subprocess.run(["ffmpeg", *words, "-rf64", "auto", str(sound)], capture_output=True)  # also beyond 4 GB
    if done.returncode or b"partial file" in done.stderr:
        raise ValueError(done.stderr.decode(errors="replace").strip().split("\n")[-1])
    return sound


def load_tracks(entries: dict[str, list[tuple[str, str, Path]]]) -> dict[str, list[Track]]:
    """Split -> [(name, stem, file)] becomes split -> tracks, each file decoded once: into a cache, where the name of an
    entry says which file in which version it was. Where none can be written, the samples are kept in memory."""
    from concurrent.futures import ThreadPoolExecutor
    cache = HERE / "data" / "cache"
    flat = [entry for rows in entries.values() for entry in rows]
    writable, one_at_a_time = True, threading.Lock()  # numpy parses headers, which Python 3.11 can't do in two threads
    try:
        check_writable(cache)
    except UserError as error:
        writable = False
        say(f"going on without a cache: {error}", sys.stderr)

    def load(entry: tuple[str, str, Path]) -> Track:
        name, stem, path = entry
        if not path.is_file():
            raise UserError(f"there is no file {path}: complete the dataset")
        version = f"2 {path.resolve()} {stem} {path.stat().st_size} {path.stat().st_mtime_ns} {SAMPLE_RATE}"
        place = cache / f"{hashlib.sha256(version.encode()).hexdigest()[:24]}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError), one_at_a_time:
            return Track(name, stem, np.load(place, "r"), path)
        audio = read_audio(path, "the dataset", stem)
        audio = (audio / audio.abs().max().clamp(min=1)).half().numpy()  # what exceeds full scale keeps its shape
        if writable:
            with replacing(place) as part, open(part, "wb") as file:
                np.save(file, audio)
            with one_at_a_time:
                audio = np.load(place, "r")
        return Track(name, stem, audio, path)

    tracks = []
    with progress(len(flat), "reading audio", delay=1) as bar, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for track in pool.map(load, flat):
            tracks.append(track)
            bar.update()
    in_order = iter(tracks)
    return {split: [next(in_order) for _ in rows] for split, rows in entries.items()}


def by_hash(names: Iterable[str]) -> list[str]:
    """In an order that looks random and depends on each name alone: who is held out hardly changes with the rest."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def own_folder(folder: Path, flag: str) -> Path:
    """A folder with data: not one that was written here."""
    if (folder / RESULTS_MARK).exists():
        raise UserError(f"{folder} holds results of a script, no data: {flag} takes another (or, if that is wrong, "
                        f"delete {folder / RESULTS_MARK})")
    return folder


def audio_files(folder: Path, flag: str) -> list[Path]:
    """All below the folder, but hidden ones and those in folders that were written here"""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: {flag} takes the folder with your audio files")
    files, suffixes = [], AUDIO_SUFFIXES | FFMPEG_SUFFIXES
    for place, folders, names in os.walk(own_folder(folder, flag)):
        folders[:] = [name for name in folders if not (Path(place, name) / RESULTS_MARK).exists()]
        paths = (Path(place, name) for name in names if not name.startswith("."))
        files += [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
    if not files:
        raise UserError(f"{folder} holds no audio files ({', '.join(sorted(suffixes))}): {flag} takes another")
    return sorted(files)


class MUSDBDataset(AudioData):
    """MUSDB18 [Rafii17] or MUSDB18-HQ's WAV files: `train/` and `test/` with *.stem.mp4 files, or one folder for
    each song. Each stem is a track of its own. Validation: the musdb package's list, else a tenth of `train/`."""

    def __init__(self, options: DataOptions, splits: Sequence[str] = SPLITS) -> None:
        root = own_folder(options.musdb_root or HERE / "data" / "musdb18", "--musdb_root")
        train, test = self.songs(root / "train"), self.songs(root / "test")
        if not test or (len(train) < 2 and "train" in splits):
            free = not root.exists() or root.is_dir() and not any(root.iterdir())  # a download adds to nothing else
            remedy = "get them with --prepare_data --musdb sample" if free else "add some"
            raise UserError(f"{root} holds {len(train)} song(s) in train/ and {len(test)} in test/, needed are 2 and 1 "
                            f"(*.stem.mp4, or folders with mixture.wav ...): {remedy}, name another folder with "
                            "--musdb_root, or use --dataset synthetic")
        if both := train.keys() & test.keys():
            raise UserError(f"{root}: {min(both)!r} is in train/ and in test/; remove one of them")
        held_out = train.keys() & self.validation_songs() or set(by_hash(train)[:max(1, len(train) // 10)])
        songs = {"train": {name: path for name, path in train.items() if name not in held_out},
                 "valid": {name: path for name, path in train.items() if name in held_out}, "test": test}
        stems = STEMS if options.stem == "all" else (options.stem,)
        rows = {split: [(name, stem, path if path.is_file() else path / f"{stem}.wav")
                        for name, path in songs[split].items() for stem in stems] for split in splits}
        super().__init__("musdb", "MUSDB18" + f" ({options.stem})" * (options.stem != "all"), load_tracks(rows))

    @staticmethod
    def songs(folder: Path) -> dict[str, Path]:
        """Name -> .stem.mp4 file, or folder with WAV files."""
        files = {p.name.removesuffix(".stem.mp4"): p for p in sorted(folder.glob("[!.]*.stem.mp4"))}
        return files or {p.parent.name: p.parent for p in sorted(folder.glob("*/mixture.wav"))}

    @staticmethod
    def validation_songs() -> set[str]:
        """Of the musdb package, which can't be imported without ffmpeg, so that its list is read as a file."""
        import importlib.util

        import yaml
        package = Path(importlib.util.find_spec("musdb").origin).parent
        return set(yaml.safe_load((package / "configs" / "mus.yaml").read_text())["validation_tracks"])


class FolderDataset(AudioData):
    """A folder of one's own audio files. `train/` and `test/` inside it are taken as the split; otherwise a tenth is
    held out for testing. Another tenth validates. Files that differ only in their suffix stay together."""

    def __init__(self, options: DataOptions, splits: Sequence[str] = SPLITS) -> None:
        root = options.data_root
        if root is None:
            raise UserError("--dataset folder needs --data_root DIR, the folder with your audio files", 2)
        files = {p: str(p.relative_to(root).with_suffix("")) for p in audio_files(root, "--data_root")}
        order = by_hash(set(files.values()))
        test = set(order[:max(1, len(order) // 10)])
        if (root / "test").is_dir() and ((root / "train").is_dir() or "train" not in splits):
            test = {song for song in order if song.startswith("test" + os.sep)}
            order = [song for song in order if song.startswith("train" + os.sep)]
        order = [song for song in order if song not in test]
        if not test or (len(order) < 2 and "train" in splits):
            raise UserError(f"{root} holds {len(order)} file(s) to train on and {len(test)} to test with; needed are 2 "
                            "and 1, of different names: add some")
        count = max(1, round(len(order) / 10))
        songs = {"train": set(order[count:]), "valid": set(order[:count]), "test": test}
        rows = {split: [(str(p.relative_to(root)), "mixture", p) for p, song in files.items() if song in songs[split]]
                for split in splits}
        super().__init__("folder", root.resolve().name, load_tracks(rows))


class SyntheticMUSDBDataset(AudioData):
    """Made-up songs of one clip each, with a fixed seed of their own: no download. `num_samples` counts the clips,
    which take turns in being one of MUSDB18's stems."""

    SCALE = 2 ** (np.array([0, 4, 7]) / 12)  # a major triad

    def __init__(self, options: DataOptions, splits: Sequence[str] = SPLITS) -> None:
        kinds = STEMS if options.stem == "all" else (options.stem,)
        turns = [kinds[n % len(kinds)] for n in range(options.num_samples)]
        tenth = max(1, len(turns) // 10)
        numbers = {"test": range(tenth), "valid": range(tenth, 2 * tenth), "train": range(2 * tenth, len(turns))}
        super().__init__("synthetic", "synthetic stems", {
            split: [Track(f"synthetic {n}", turns[n], self.clip(n, turns[n])) for n in numbers[split]]
            for split in splits})

    @classmethod
    def clip(cls, number: int, stem: str) -> np.ndarray:
        """float16 [CLIP], peak at most 0.5: four beats of random notes, hits and rests."""
        rng = np.random.default_rng([20_240, number])
        beats, parts = 4, STEMS[1:] if stem == "mixture" else (stem,)
        t = np.arange(CLIP // beats, dtype=np.float32) / SAMPLE_RATE
        edge = np.minimum(np.minimum(t, t[::-1]) / 0.02, 1)  # fade in and out, so that nothing clicks
        audio = np.zeros((beats, len(t)), dtype=np.float32)
        for beat in range(beats):
            pitch = cls.SCALE[rng.integers(len(cls.SCALE))]
            for part in parts:
                level = edge * 0.12 * 10 ** rng.uniform(-0.3, 0) * (rng.random() < 0.8)
                if part == "drums":
                    audio[beat] += level * (np.sin(2 * np.pi * 60 * t) * np.exp(-8 * t) if beat % 2 == 0 else
                                            0.4 * rng.standard_normal(len(t)) * np.exp(-12 * t))
                else:
                    low, decay, partials = {"bass": (110, 1, 3), "other": (440, 2, 4), "vocals": (220, 0, 8)}[part]
                    for k in range(1, partials + 1):  # the first note of `other`: 440, 880, 1320, 1760 Hz
                        audio[beat] += level / k * np.exp(-decay * t) * np.sin(2 * np.pi * low * pitch * k * t + k)
        audio = audio.reshape(-1) + 1e-4 * rng.standard_normal(CLIP)
        return (audio * min(1, 0.5 / np.abs(audio).max())).astype(np.float16)


DATASETS: dict[str, Callable[[DataOptions, Sequence[str]], AudioData]] = {
    "musdb": MUSDBDataset, "synthetic": SyntheticMUSDBDataset, "folder": FolderDataset}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPOKEN_DIGITS = ("https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip",
                 "dbd573d7cafe79c4b49f65718115e1304e24e067fa39eff18a660dc6cb9c360f")  # of the recordings in it
SHORT_DATASETS = ("spoken_digits", "speech_commands", "folder", "musdb", "synthetic")


@dataclass(frozen=True)
class WhichSounds:
    dataset: str = option("spoken_digits", "data", "that the model was trained on", str)


@dataclass(frozen=True)
class ShortSoundOptions:
    """Flags that say which short sounds are learned from and measured."""
    dataset: str = option("spoken_digits", "data", "what to learn from; folder: sub-folders are the classes; musdb: "
                          "its stems are", choices=SHORT_DATASETS)
    data_root: Path | None = option(None, "data", "its folder (default: data/NAME beside this script)", Path)
    seconds: float | None = option(None, "data", "length of a sound, rounded up to 0.256 s; longer ones are cut "
                                   "(default: 0.768 for spoken_digits, else 1.024)", number(float, 0.1, 10))
    sample_rate: int | None = option(None, "data", "Hz, a multiple of 1,000 (default: 8,000 for spoken_digits, else "
                                     "16,000)", number(int, 4000, 48_000))
    split: str = option("own", "data", "spoken_digits: own (recordings 0 to 4 of each are the test set) or speaker "
                        "(one of the six is)", choices=("own", "speaker"))


def some_rows(sounds: Tensor, count: int) -> Tensor:
    """Numbers of `count` sounds, drawn with a fixed seed"""
    return torch.randperm(len(sounds), generator=torch.Generator().manual_seed(0))[:count]


class ShortSounds:
    """Sounds of one length in memory, [N L] as float16 with labels [N]. Loudness and silence are handled here, once for
    all: what is 40 dB below a sound's loudest 16 ms is cut off its ends, it begins at once and zeros fill it up, too
    long ones are faded out at the end, and each has an RMS of -20 dB (less where it would clip)."""

    def __init__(self, name: str, title: str, rate: int, frames: int,
                 rows: dict[str, list[tuple[str, Tensor]]]) -> None:
        self.name, self.title, self.rate, self.frames, self.epoch = name, title, rate, frames, None
        counts = Counter(label for label, _ in rows["train"])
        self.classes = sorted(counts, key=DIGITS.index if set(counts) <= set(DIGITS) else None)
        if lacking := {label for label, _ in rows["test"]} - set(counts):
            raise UserError(f"{title}: {min(lacking)} is in the test set only: give it sounds to train on")
        if len(rows["train"]) < 2 or not rows["test"]:
            raise UserError(f"{title}: {len(rows['train'])} sound(s) to train on and {len(rows['test'])} to test with, "
                            "needed are 2 and 1: add some")
        (self.train, self.train_labels), (self.test, self.test_labels) = (
            (torch.stack([sound for _, sound in part]),
             torch.tensor([self.classes.index(label) for label, _ in part])) for part in (rows["train"], rows["test"]))

    def info(self) -> DataInfo:
        parts = {"train": self.train, "test": self.test}
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts.values())).hexdigest()[:16]
        return DataInfo(self.name, self.title, self.rate, [], {k: len(part) for k, part in parts.items()},
                        {k: round(part.numel() / self.rate, 2) for k, part in parts.items()}, digest, self.frames,
                        self.classes, torch.bincount(self.train_labels, minlength=len(self.classes)).tolist())

    def describe(self) -> str:
        return (f"{self.title}: {len(self.train)} training and {len(self.test)} test sounds of "
                f"{self.train.shape[1] / self.rate:.3g} s at {self.rate:,} Hz, {len(self.classes)} classes")

    def plan(self, config: RunConfig) -> tuple[int, int]:
        """(batch size, steps per epoch): an epoch is as many whole batches as there are."""
        batch_size = min(config.batch_size, len(self.train))
        return batch_size, len(self.train) // batch_size

    def training_batch(self, config: RunConfig, step: int, draw: Draw) -> ShortBatch:
        """This process's rows of the batch of a step; each epoch has an order of its own."""
        batch_size, steps = self.plan(config)
        epoch, position = divmod(step, steps)
        if epoch != self.epoch:
            self.epoch, generator = epoch, torch.Generator().manual_seed(seed32(config.seed, epoch, 7))
            self.order = torch.randperm(len(self.train), generator=generator)
        rows = self.order[position * batch_size:][:batch_size][draw.rows]
        return ShortBatch(self.train[rows].float().to(draw.device), self.train_labels[rows].to(draw.device), draw)

    def held_out(self, count: int, device: torch.device) -> Iterator[ShortBatch]:
        """The first `count` test sounds"""
        for rows in torch.arange(min(count, len(self.test))).split(100):
            yield ShortBatch(self.test[rows].float().to(device), self.test_labels[rows].to(device),
                             Draw(0, int(rows[0]), len(rows), slice(None), device))


def short_sound(audio: Tensor, rate: int, length: int) -> tuple[Tensor, bool]:
    """A sound [L] as `ShortSounds` keeps them, float16 [length], and whether it was cut"""
    block = rate * STRIDE // 1000
    loudness = F.pad(audio, (0, -len(audio) % block)).view(-1, block).square().mean(1)
    if loudness.max() < SILENCE ** 2:
        raise ValueError("it is silent")
    heard = (loudness > 1e-4 * loudness.max()).nonzero().flatten()
    audio = audio[heard[0] * block:(heard[-1] + 1) * block]
    cut_off = len(audio) > length
    sound = F.pad(audio[:length], (0, max(0, length - len(audio))))
    if cut_off:
        sound[-block:] *= torch.linspace(1, 0, block)
    gain = min(0.1 / audio[:length].square().mean().sqrt().item(), 0.999 / sound.abs().max().item())
    return (sound * gain).half(), cut_off


def load_short(options: ShortSoundOptions) -> ShortSounds:
    """The sounds of a dataset, each file read once"""
    from concurrent.futures import ThreadPoolExecutor
    digits = options.dataset == "spoken_digits"
    rate = options.sample_rate or (8000 if digits else 16_000)
    if rate % 1000:
        raise UserError(f"--sample_rate {rate}: must be a multiple of 1,000", 2)
    if options.split != "own" and not digits:
        raise UserError("--split belongs to --dataset spoken_digits", 2)
    frames = math.ceil((options.seconds or (0.768 if digits else 1.024)) / (16 * STRIDE / 1000) - 1e-9) * 16
    length = frames * rate * STRIDE // 1000
    if options.dataset in ("musdb", "synthetic"):
        return ShortSounds(options.dataset, *stem_sounds(options, rate, frames, length))
    title, entries = {"spoken_digits": spoken_digits, "speech_commands": speech_commands,
                      "folder": labelled_folder}[options.dataset](options)

    def load(entry: tuple[str, Path]) -> tuple[str, Tensor, bool]:
        try:
            return entry[0], *short_sound(read_audio(entry[1], "the dataset", rate=rate), rate, length)
        except ValueError as error:
            raise UserError(f"{entry[1]} can't be learned from ({error}): remove it") from None

    rows, shortened, total = {}, 0, sum(map(len, entries.values()))
    with progress(total, "reading sounds", delay=1) as bar, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for split, part in entries.items():
            rows[split] = []
            for label, sound, cut_off in pool.map(load, part):
                rows[split].append((label, sound))
                shortened += cut_off
                bar.update()
    if shortened:
        say(f"{title}: {shortened} of {total} sounds are longer than {length / rate:.3g} s and were cut")
    return ShortSounds(options.dataset, title, rate, frames, rows)


def stem_sounds(options: ShortSoundOptions, rate: int, frames: int, length: int) -> tuple[str, int, int, dict]:
    """Pieces of the stems of MUSDB18, or of made-up ones: the stem is the class"""
    from torchaudio.functional import resample
    told = DataOptions(options.dataset, musdb_root=options.data_root, num_samples=60)
    dataset = DATASETS[options.dataset](told, SPLITS)
    rows: dict[str, list[tuple[str, Tensor]]] = {"train": [], "test": []}
    for split, tracks in (("train", dataset.train + dataset.valid), ("test", dataset.test)):
        for track in tracks:
            audio = resample(torch.from_numpy(np.array(track.audio)).float(), SAMPLE_RATE, rate)
            for piece in audio.split(length) if track.stem != "mixture" else ():
                with contextlib.suppress(ValueError):  # pauses are no sounds
                    rows[split].append((track.stem, short_sound(piece, rate, length)[0]))
    return dataset.title, rate, frames, rows


def spoken_digits(options: ShortSoundOptions) -> tuple[str, dict[str, list[tuple[str, Path]]]]:
    """The Free Spoken Digit Dataset: files DIGIT_SPEAKER_NUMBER.wav, by its own split or by speaker"""
    root = options.data_root or HERE / "data" / "spoken_digits"
    found = sorted(root.rglob("[0-9]_*_*.wav")) if root.is_dir() else []
    files = {path.name: path for path in found if re.fullmatch(r"\d_[^_]+_\d+\.wav", path.name)}
    if not files:
        raise UserError(f"{root} holds no spoken digits (DIGIT_SPEAKER_NUMBER.wav): get them with --prepare_data, or "
                        "name another folder with --data_root")
    rows: dict[str, list[tuple[str, Path]]] = {"train": [], "test": []}
    last = max(name.split("_")[1] for name in files)
    for name, path in sorted(files.items()):
        digit, speaker, count = name.removesuffix(".wav").split("_")
        held_out = speaker == last if options.split == "speaker" else int(count) < 5
        rows["test" if held_out else "train"].append((DIGITS[int(digit)], path))
    return "Free Spoken Digit Dataset" + f" without {last}" * (options.split == "speaker"), rows


def speech_commands(options: ShortSoundOptions) -> tuple[str, dict[str, list[tuple[str, Path]]]]:
    """The ten digits of Google's Speech Commands (SC09), in its own split"""
    from torchaudio.datasets import SPEECHCOMMANDS
    root, rows = options.data_root or HERE / "data" / "speech_commands", {}
    for split, part in (("train", "training"), ("test", "testing")):
        try:
            data = SPEECHCOMMANDS(root, subset=part)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{root} holds no Speech Commands ({first_line(error)}): get them with --prepare_data, or "
                            "name another folder with --data_root") from None
        entries = (data.get_metadata(i) for i in range(len(data)))
        rows[split] = [(label, Path(root, "SpeechCommands", path) if not Path(path).is_absolute() else Path(path))
                       for path, _, label, *_ in entries if label in DIGITS]
    return "Speech Commands, digits", rows


def labelled_folder(options: ShortSoundOptions) -> tuple[str, dict[str, list[tuple[str, Path]]]]:
    """One's own sounds, CLASS/*.wav; train/CLASS and test/CLASS are the split where there are both, else a tenth of
    each class (one at least) is held out"""
    root = options.data_root
    if root is None:
        raise UserError("--dataset folder needs --data_root DIR, with a sub-folder of sounds for each class", 2)
    files, rows = audio_files(root, "--data_root"), {"train": [], "test": []}
    split = (root / "train").is_dir() and (root / "test").is_dir()
    classes: dict[str, list[Path]] = {}
    for path in files:
        parts = path.relative_to(root).parts[split:-1]
        label = parts[0] if parts else root.name
        if split:
            rows.setdefault(path.relative_to(root).parts[0], []).append((label, path))
        else:
            classes.setdefault(label, []).append(path)
    for label, paths in classes.items():
        if len(paths) < 2:
            raise UserError(f"{root}: {label} has one sound, needed are two or more: add some or remove it")
        order = by_hash(map(str, paths))
        count = max(1, len(order) // 10)
        rows["test"] += [(label, Path(path)) for path in order[:count]]
        rows["train"] += [(label, Path(path)) for path in order[count:]]
    return root.resolve().name, {split: rows[split] for split in ("train", "test")}


ShortSoundFamily.data_options = {"train": ShortSoundOptions, "infer": WhichSounds, "evaluate": ShortSoundOptions}
ShortSoundFamily.remembered = ("dataset", "data_root", "seconds", "sample_rate", "split")
SoundFamily.data_options = {"train": TrainDataOptions, "infer": NoOptions, "evaluate": DataOptions}


def check_writable(folder: Path) -> None:
    """Fail now rather than after the work."""
    with replacing(folder / ".write_test") as part:
        part.write_bytes(b"ok")
    (folder / ".write_test").unlink()


def fetch(url: str, part: Path, title: str = "MUSDB18", flag: str = "--musdb_root") -> None:
    """Download into `part`, going on where an earlier attempt was cut; gives up after five that brought nothing."""
    import errno
    import http.client
    import urllib.error
    import urllib.request
    idle, reason = 0, ""
    while idle < 5:
        have = before = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "audio_gen.py"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                have = have if answer.status == 206 else 0  # a server that does not know ranges sends all of it
                total = have + int(answer.headers["Content-Length"] or 0)
                with open(part, "ab" if have else "wb") as file, progress(
                        total, "downloading", initial=have, unit="B", unit_scale=True) as bar:
                    while chunk := answer.read(1 << 18):
                        file.write(chunk)
                        bar.update(len(chunk))
            if part.stat().st_size >= total:
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing beyond what is there: the check that follows will tell
                return
            reason = f"{url}: {error}"
            idle = 5 if error.code in (401, 403, 404, 410) else idle  # asking again is of no use
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = first_line(error)
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"can't write {part} ({reason}): free some space, or name another folder with "
                                f"{flag}") from None
        idle = 0 if part.exists() and part.stat().st_size > before else idle + 1
        time.sleep(2 ** idle / 2 if 0 < idle < 5 else 0)
    raise UserError(f"{title} can't be downloaded ({reason.strip('<>')}): connect to a network (the next run goes on "
                    f"where this one ended), name a folder that has it with {flag}, or use --dataset synthetic",
                    NO_NETWORK)


def unpack(part: Path, folder: Path) -> None:
    """The songs of a MUSDB18 archive -> folder/train, folder/test, whatever else it holds and wherever that leads"""
    with zipfile.ZipFile(part) as archive:
        for member in archive.infolist():
            name = PurePosixPath(member.filename)
            if name.parent.name in ("train", "test") and name.match("[!.]*.stem.mp4"):
                target = folder / name.parent.name / name.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise zipfile.BadZipFile("no songs in train/ and test/")


def download_musdb(kind: str, root: Path) -> None:
    """Put MUSDB18 (`full`, or the `sample` excerpts) into `root`, whole or not at all; what is there already is kept,
    except that `full` takes the place of a sample downloaded earlier. MUSDB_MIRROR names another server's folder."""
    url, md5, what = MUSDB_FILES[kind]
    root = root.resolve()
    part, fresh, old = (root.with_name(f".{root.name}.{end}") for end in (f"{kind}.zip.part", "fresh", "old"))
    there, mark = bool(MUSDBDataset.songs(root / "train")), root / ".downloaded"
    if there and not (kind == "full" and mark.is_file() and mark.read_text() == "sample"):
        say(f"MUSDB18: using what is in {root}")
        return
    if not there and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} holds no MUSDB18 but other things: move it away, or name another with --musdb_root")
    need_ffmpeg("MUSDB18")
    check_writable(root.parent)
    say(f"MUSDB18: downloading {what}, into {root}")
    if os.environ.get("MUSDB_MIRROR"):
        url = f"{os.environ['MUSDB_MIRROR'].rstrip('/')}/{url.rsplit('/', 1)[1]}"
    fetch(url, part)
    try:
        digest = hashlib.md5()
        with open(part, "rb") as file:
            while md5 and (block := file.read(1 << 20)):
                digest.update(block)
        if md5 and digest.hexdigest() != md5:
            raise zipfile.BadZipFile("its md5 differs")
        shutil.rmtree(fresh, ignore_errors=True)
        unpack(part, fresh)
        (fresh / ".downloaded").write_text(kind)
        if there:  # aside first: a kill in between must not leave less than there was
            shutil.rmtree(old, ignore_errors=True)
            os.rename(root, old)
        os.rename(fresh, root)  # onto nothing or onto an empty folder
        shutil.rmtree(old, ignore_errors=True)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        part.unlink()
        raise UserError(f"the downloaded MUSDB18 archive is damaged ({first_line(error)}) and was deleted: run this "
                        "again", NO_NETWORK) from None
    except OSError as error:
        raise UserError(f"can't unpack MUSDB18 into {root} ({error.strerror or error}): free some space, or name "
                        "another folder with --musdb_root") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    part.unlink()


def download_digits(root: Path) -> None:
    """Put the spoken digits into `root`, whole or not at all; checked by their contents, as GitHub packs its archives
    anew now and then. SPOKEN_DIGITS_MIRROR names another server's folder."""
    url, digest = SPOKEN_DIGITS
    if root.is_dir() and any(root.iterdir()):
        say(f"spoken digits: using what is in {root}")
        return
    check_writable(root.parent)
    if os.environ.get("SPOKEN_DIGITS_MIRROR"):
        url = f"{os.environ['SPOKEN_DIGITS_MIRROR'].rstrip('/')}/{url.rsplit('/', 1)[1]}"
    part, fresh = (root.with_name(f".{root.name}.{end}") for end in ("zip.part", "fresh"))
    say(f"spoken digits: downloading 16 MB, into {root}")
    fetch(url, part, "the spoken digits", "--data_root")
    try:
        with zipfile.ZipFile(part) as archive:  # by their last names: no member leads out of the folder
            sounds = {PurePosixPath(name).name: archive.read(name) for name in archive.namelist()
                      if re.fullmatch(r"(.*/)?recordings/\d_[^_/]+_\d+\.wav", name)}
        if contents_digest(sounds) != digest:
            raise zipfile.BadZipFile(f"its {len(sounds)} recordings are not those of version 1.0.10")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        for name, content in sounds.items():
            (fresh / name).write_bytes(content)
        os.replace(fresh, root)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        part.unlink()
        raise UserError(f"the downloaded spoken digits are damaged ({first_line(error)}) and were deleted: run this "
                        "again", NO_NETWORK) from None
    except OSError as error:
        raise UserError(f"can't unpack the spoken digits into {root} ({error.strerror or error}): free some space, or "
                        "name another folder with --data_root") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    part.unlink()


def contents_digest(files: dict[str, bytes]) -> str:
    """SHA-256 over names and contents, in the order of the names"""
    rows = (f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items()))
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def download_commands(root: Path) -> None:
    """By torchaudio, which checks the archive"""
    from torchaudio.datasets import SPEECHCOMMANDS
    try:
        root.mkdir(parents=True, exist_ok=True)
        SPEECHCOMMANDS(root, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Speech Commands can't be downloaded ({first_line(error).strip('<>')}): connect to a network, "
                        "name a folder that has them with --data_root, or use --dataset synthetic",
                        NO_NETWORK) from None


# === metrics ===

INAUDIBLE = 1e-4  # RMS; a reference below it (-80 dB) has no meaningful ratio to an error
STOI_LEAST = 6560  # samples, 0.41 s: the 30 frames that STOI compares at a time

METRICS = {  # name: (unit, which way is better, definition)
    "mel_mse": ("1", "lower", "mean squared error of the standardised log-mel"),
    "mel_mae": ("1", "lower", "mean absolute error of the standardised log-mel"),
    "mel_cosine": ("1", "higher", "cosine between the standardised log-mels as vectors; the mean spectrum has 0"),
    "mel_spectral_convergence": ("1", "lower", "Frobenius norm of the mel magnitudes' difference over the reference's"),
    "snr_db": ("dB", "higher", "energy of the reference over energy of the difference, level and phase included; "
               "often plainly called SDR"),
    "si_sdr_db": ("dB", "higher", "the same after the best gain [LeRoux19]"),
    "sdr_db": ("dB", "higher", "the same after the best filter of 512 taps: the SDR of BSS Eval [Vincent06]"),
    "kbit_per_second": ("kbit/s", "lower", "size of the whole file over the length of its sound"),
    "mr_stft": ("1", "lower", "spectral convergence plus mean absolute difference of natural-log magnitudes, mean "
                "over windows of 512, 1024 and 2048 samples, hop a quarter [Yamamoto20]; blind to phase"),
    "lsd_db": ("dB", "lower", "log-spectral distance: root mean square over frequencies, mean over frames, of the "
               "difference of power spectra in dB [Gray76]; blind to phase"),
    "pesq_wb": ("MOS-LQO", "higher", "PESQ wide-band, ITU-T P.862.2, 1.04 to 4.64; made for speech, a hint on music"),
    "stoi": ("1", "higher", "short-time objective intelligibility [Taal11]; made for speech, a hint on music"),
}


def definitions(*names: str) -> dict[str, dict[str, str]]:
    """For records: what the figures under these names are."""
    return {name: dict(zip(("unit", "better", "definition"), METRICS[name])) for name in names}


def mel_metrics(estimate: Tensor, reference: Tensor, frames: Tensor,
                preprocessor: AudioPreprocessor | None = None) -> dict[str, Tensor]:
    """Distances [B] of standardised log-mels [B M T] over the first `frames` [B] frames of each clip; the linear one
    needs the preprocessor that has standardised them, and is NaN (undefined) where the reference is silent."""
    frames = frames.to(reference.device)
    padding = (torch.arange(reference.shape[2], device=reference.device) >= frames[:, None])[:, None]
    count = frames * reference.shape[1]

    def flat(values: Tensor) -> Tensor:
        return values.masked_fill(padding, 0).flatten(1)

    error = flat(estimate - reference)
    values = {"mel_mse": error.square().sum(1) / count, "mel_mae": error.abs().sum(1) / count,
              "mel_cosine": F.cosine_similarity(flat(estimate), flat(reference))}
    if preprocessor is not None:
        ours, true = (flat((preprocessor.unstandardise(mel).exp() - MEL_FLOOR).clamp(min=0).sqrt())
                      for mel in (estimate, reference))
        silent = true.square().sum(1) <= count * MEL_FLOOR * 1e-3  # what rounding leaves of the floor
        convergence = (ours - true).norm(dim=1) / true.norm(dim=1)
        values["mel_spectral_convergence"] = convergence.masked_fill(silent, math.nan)
    return values


def whole_mels(prep: AudioPreprocessor, estimate: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """`mel_metrics` of two sounds [L]"""
    mels = [prep.standardise(prep.log_mel(F.pad(sound, (0, -len(sound) % HOP))[None].to(prep.mean.device)))
            for sound in (estimate, reference)]
    return mel_metrics(*mels, torch.tensor([mels[1].shape[2]], device=prep.mean.device))


def power_spectra(audio: Tensor, window: int, hop: int) -> Tensor:
    """[L] -> [window/2+1 T], scaled so that a full-scale sine has power 1"""
    hann = torch.hann_window(window, device=audio.device)
    spectrum = torch.stft(audio, window, hop, window=hann * (2 / hann.sum()), pad_mode="constant", return_complex=True)
    return spectrum.real.square() + spectrum.imag.square()


def mr_stft(estimate: Tensor, reference: Tensor) -> Tensor:
    parts = []
    for window in (512, 1024, 2048):
        ours, true = (power_spectra(audio, window, window // 4) for audio in (estimate, reference))
        convergence = (ours.sqrt() - true.sqrt()).norm() / true.sqrt().norm()
        parts.append(convergence + ((ours + MEL_FLOOR).log() - (true + MEL_FLOOR).log()).abs().mean() / 2)
    return torch.stack(parts).mean()


def lsd_db(estimate: Tensor, reference: Tensor) -> Tensor:
    ours, true = (10 * (power_spectra(audio, WINDOW, HOP) + MEL_FLOOR).log10() for audio in (estimate, reference))
    return (ours - true).square().mean(0).sqrt().mean()


def snr_db(estimate: Tensor, reference: Tensor) -> Tensor:
    tiny, noise = torch.finfo(estimate.dtype).eps, reference - estimate
    return 10 * (((reference**2).sum(-1) + tiny) / ((noise**2).sum(-1) + tiny)).log10()


def si_sdr_db(estimate: Tensor, reference: Tensor) -> Tensor:
    if not estimate.any():
        raise ValueError("the estimate is digital silence")
    tiny = torch.finfo(estimate.dtype).eps
    gain = ((estimate * reference).sum(-1, keepdim=True) + tiny) / ((reference**2).sum(-1, keepdim=True) + tiny)
    return snr_db(estimate, gain * reference)


def sdr_db(estimate: Tensor, reference: Tensor) -> Tensor:
    from torchmetrics.functional.audio import signal_distortion_ratio
    if not estimate.any():
        raise ValueError("the estimate is digital silence")
    return signal_distortion_ratio(estimate, reference)


def pesq_wb(estimate: Tensor, reference: Tensor) -> float:
    from pesq import PesqError, pesq
    try:
        return pesq(SAMPLE_RATE, reference.numpy(), estimate.numpy(), "wb")
    except PesqError as error:
        text = error.args[0]
        raise ValueError(text.decode() if isinstance(text, bytes) else str(text)) from None


def stoi(estimate: Tensor, reference: Tensor) -> float:
    from pystoi import stoi as measure
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames")  # it then returns a number without meaning
        try:
            return measure(reference.numpy(), estimate.numpy(), SAMPLE_RATE)
        except RuntimeWarning:
            raise ValueError("less than 0.41 s of the clip sounds (pauses don't count)") from None


WAVE_METRICS = {  # measure: how many samples it needs, which the packages say in words of their own or not at all
    snr_db: 1, si_sdr_db: 1, sdr_db: 512, mr_stft: 1, lsd_db: 1, pesq_wb: SAMPLE_RATE // 4, stoi: STOI_LEAST}


@torch.no_grad()
def wave_metrics(estimate: Tensor, reference: Tensor, samples: Tensor, reasons: dict[str, str]) -> dict[str, list]:
    """Metrics of waveforms [B L] over the first `samples` [B] of each: {name: value or None, for each clip}. A clip
    that fails is None, takes neither the place of a value nor the others with it, and says why in `reasons`."""
    values: dict[str, list[float | None]] = {measure.__name__: [] for measure in WAVE_METRICS}
    for ours, true, length in zip(estimate.float().cpu(), reference.float().cpu(), samples.tolist()):
        ours, true = ours[:length], true[:length]
        unfit = ("the reference is silent" if length == 0 or true.square().mean() < INAUDIBLE**2 else
                 "" if ours.isfinite().all() else "the estimate has NaN or infinite samples")
        for measure in WAVE_METRICS:
            name = measure.__name__
            value, reason = (None, unfit) if unfit else attempt(measure, ours, true)
            values[name].append(value)
            if value is None and not (unfit and name in reasons):  # a missing package matters more
                reasons[name] = reason
    return values


def attempt(measure: Callable[[Tensor, Tensor], Any], estimate: Tensor, reference: Tensor) -> tuple[float | None, str]:
    """(value, "") or (None, why there is none)"""
    if len(reference) < WAVE_METRICS[measure]:
        return None, (f"the clip is too short: {len(reference) / SAMPLE_RATE:.2g} s, needed are "
                      f"{WAVE_METRICS[measure] / SAMPLE_RATE:.2g} s")
    try:
        value = float(measure(estimate, reference))
    except ImportError as error:
        return None, f"not measured ({first_line(error)}): pip install pesq pystoi torchmetrics"
    except (RuntimeError, ValueError, ArithmeticError) as error:
        return None, first_line(error)
    return (value, "") if math.isfinite(value) else (None, f"the result was {value}")


def summarise(clips: Sequence[dict[str, float | None]], reasons: dict[str, str] | None = None) -> dict[str, dict]:
    """{metric: value} of each clip -> {metric: {"mean", "median", "n", "failed" and, where some failed, "reason"}}:
    failed clips are counted, not averaged in."""
    summary = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(clips)):
        values = [clip.get(name) for clip in clips]
        good = [value for value in values if value is not None and math.isfinite(value)]
        summary[name] = {"mean": float(np.mean(good)) if good else None,
                         "median": float(np.median(good)) if good else None,
                         "n": len(good), "failed": len(values) - len(good)}
        if len(good) < len(values):
            summary[name]["reason"] = (reasons or {}).get(name, "the reference is silent")
    return summary


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


class Row(NamedTuple):
    """Of a table of metrics: what was made of some clips"""
    name: str
    mel: Tensor | None  # standardised log-mel [B M T]; None: that of the sound
    sound: Tensor | None  # [B CLIP]
    columns: dict[str, list] = {}  # figures that are known


@torch.no_grad()
def sounds(model: SoundFamily, audio: Tensor, frames: Tensor) -> Iterator[Row]:
    """What is measured of clips [B CLIP], of which `frames` [B] hold sound"""
    prep = model.preprocessor
    yield from model.rows(audio, frames)
    true_mel = prep.log_mel(audio)
    for phase in PHASES:
        yield Row(f"ceiling_true_mel_{phase}", None, to_audio(prep, true_mel, audio.shape[1], phase, audio))
    mean = torch.zeros_like(true_mel)
    yield Row("floor_mean_spectrum", mean, None)
    yield Row("floor_mean_spectrum_griffinlim", None, to_audio(prep, prep.unstandardise(mean), audio.shape[1]))


def measure_rows(model: SoundFamily, clips: Sequence[tuple[Track, int]], title: str = "") -> dict[str, Any]:
    """{row: {"all" or stem: {metric: summary}}} over clips (track, start), between floor and ceilings"""
    values: dict[str, list[dict]] = {}
    reasons: dict[str, dict[str, str]] = {}
    device, prep = next(model.parameters()).device, model.preprocessor
    with progress(len(clips), title, not title, unit="clip", leave=False) as bar:
        for first in range(0, len(clips), 4):
            part = clips[first:first + 4]
            batch = clip_batch(part, device)
            samples = torch.tensor([min(CLIP, len(track.audio) - start) for track, start in part])
            target = prep.standardise(prep.log_mel(batch.audio))
            for row, mel, sound, columns in sounds(model, batch.audio, batch.frames):
                mel = prep.standardise(prep.log_mel(sound)) if mel is None else mel
                reasons.setdefault(row, {"kbit_per_second": "a part of a clip weighs as much as all of it"})
                columns = columns | {name: value.tolist()
                                     for name, value in mel_metrics(mel, target, batch.frames, prep).items()}
                if sound is not None:
                    columns |= wave_metrics(sound, batch.audio, samples, reasons[row])
                values.setdefault(row, []).extend(dict(zip(columns, clip)) for clip in zip(*columns.values()))
            bar.update(len(part))
    stems = [track.stem for track, _ in clips]
    groups = ["all", *dict.fromkeys(stems)] if len(set(stems)) > 1 else ["all"]
    return {row: {group: summarise([clip for clip, stem in zip(rows, stems) if group in ("all", stem)],
                                   reasons.get(row)) for group in groups} for row, rows in values.items()}


def print_rows(rows: dict[str, Any], stem: str) -> None:
    """A table of medians; below each metric's name the clips that could be measured."""
    rows = {name: row[stem] for name, row in rows.items() if stem in row}
    names = [name for name in METRICS if name not in ("mel_mae", "mel_spectral_convergence")
             and any(name in row for row in rows.values())]
    if not rows:
        return
    counts = [sorted({row[name]["n"] for row in rows.values() if name in row}) for name in names]
    ends = ["-".join(str(n) for n in dict.fromkeys([c[0], c[-1]])) if c else "-" for c in counts]
    wide = [max(11, len(name) + 2) for name in names]
    say(f"\n{stem}: medians over n clips\n{'':32}" + "".join(f"{name:>{w}}" for name, w in zip(names, wide))
        + f"\n{'n':32}" + "".join(f"{text:>{w}}" for text, w in zip(ends, wide)))
    for name, row in rows.items():
        cells = [row.get(metric, {}).get("median") for metric in names]
        say(f"{name:32}" + "".join(f"{'-' if cell is None else format(cell, '.3f'):>{w}}"
                                   for cell, w in zip(cells, wide)))
    if any(name.endswith("_original") for name in rows):
        say(f"the phase of ..._original is {UPPER_BOUND}")
    for metric, entry in next(reversed(rows.values())).items():
        if "reason" in entry:
            say(f"{metric}: {entry['reason']}")


# === metrics of drawn sounds ===

FRECHET, KERNEL = "fd", "kernel_distance"  # what the distances are called
EVALUATION_SHARE = 0.1  # of an epoch's work may go into measuring it
NEIGHBOURS = 3  # k of precision and recall, as in [Kynk19]
CLASS_FIGURES = ("class_share_min", "class_share_max", "classes_covered", "class_balance", "label_agreement")


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


def classifier_net(path: Path, device: torch.device, data: DataInfo) -> FeatureNet:
    """The feature net `<dataset>_cnn` from the checkpoint of a classifier of the same classes and kind of sounds"""
    state = load_checkpoint(path)
    if state["family"] != "classifier":
        raise UserError(f"{path} holds a {state['family']} model: a --model classifier is needed there")
    for key in ("sample_rate", "frames", "classes"):
        if state["data"].get(key) != getattr(data, key):
            known, needed = (str(value)[:60] for value in (state["data"].get(key), getattr(data, key)))
            raise UserError(f"{path} was trained with {key} {known}, {data.title} has {needed}: name a matching one "
                            "with --classifier")
    model = restore_model(state).to(device).eval()
    return FeatureNet(f"{state['data']['dataset']}_cnn", model.config.features, file_digest(path),
                      lambda sounds: model(model.picture(sounds.float().to(device))), True)


def find_feature_net(options: MeasureOptions, data: DataInfo, device: torch.device) -> tuple[FeatureNet | None, str]:
    """The classifier that was asked for, or one that fits the data; else None and the reason"""
    usual = [HERE / folder / SoundClassifier.file_name(data) for folder in ("pretrained", "models")]
    for path in [options.classifier] if options.classifier else [path for path in usual if path.exists()]:
        return classifier_net(path, device, data), ""
    return None, f"no classifier for {data.title}: train one with --model classifier --dataset {data.dataset}"


@torch.no_grad()
def generate(model: SoundDiffusion, labels: Tensor | None, count: int, batch: int, title: str = "",
             ) -> Iterator[tuple[range, Tensor]]:
    """Yield (numbers, sounds [b L] on the CPU) for sounds 0..count-1, which go through `labels` in turn."""
    device = next(model.parameters()).device
    with progress(count, title, not title, unit="sound", leave=False) as bar:
        for start in range(0, count, batch):
            numbers = range(start, min(start + batch, count))
            chosen = None if labels is None else labels[[i % len(labels) for i in numbers]].to(device)
            yield numbers, model.sound(model.sample(chosen, Noise(model.config.seed, numbers, device))).cpu()
            bar.update(len(numbers))


def generate_all(model: SoundDiffusion, labels: Tensor | None, count: int, batch: int, title: str = "") -> Tensor:
    """Sounds 0..count-1, [N L]"""
    return torch.cat([sounds for _, sounds in generate(model, labels, count, batch, title)])


@torch.no_grad()
def way_back(model: ShortSoundFamily, sounds: Tensor) -> Tensor:
    """Real sounds [N L] through picture and phase: what the best model could not do better"""
    device = next(model.parameters()).device
    return torch.cat([model.sound(model.picture(part.float().to(device))).cpu() for part in sounds.split(100)])


@torch.no_grad()
def evaluate_samples(options: MeasureOptions, model: SoundDiffusion, data: ShortSounds) -> dict[str, Any]:
    """Draw, measure, and measure as many real training sounds in the same way: as they are, and through picture and
    phase, so that the model's error and that of the way back are told apart."""
    device = next(model.parameters()).device
    net, reason = find_feature_net(options, model.data, device)
    say(f"measured by {net.describe()}" if net else f"no fd: {reason}")
    count = options.eval_samples or min(2000, len(data.test))
    labels, started = proportional_labels(model.data, count, model.labelled), time.perf_counter()
    drawn = generate_all(model, labels, count, 64, "drawing")
    seconds = time.perf_counter() - started
    order, reference = some_rows(data.train, count), data.test[some_rows(data.test, count)]
    common = {"n": count, "n_floor": len(order), "n_reference": len(reference), "reference": "test"}
    real, asked = data.train[order], data.train_labels[order]
    again, metrics = way_back(model, real), {} if net else {FRECHET: {"value": None, "reason": reason}}
    if net:
        target = net(reference)
        (values, reasons), (floors, _), (back, _) = (measure(net(sounds), target, net, given) for sounds, given in (
            (drawn, labels), (real, asked), (again, asked)))
        for key, value in values.items():
            metrics[key] = {"value": value, "floor": floors[key], "way_back": back[key], **common, "feature_net":
                            net.name, "feature_net_sha256": net.digest} | (
                                {"reason": reasons[key]} if key in reasons else {})
    second = options.second_classifier or SUBJECT.shipped("classifier", f"{model.data.dataset}_cepstrum")
    if labels is not None and (options.second_classifier or second.exists()):
        judge = classifier_net(second, device, model.data)
        shares = [(judge(sounds).logits.argmax(1) == given).float().mean().item()
                  for sounds, given in ((drawn, labels), (real, asked), (again, asked))]
        metrics["label_agreement_second"] = dict(zip(("value", "floor", "way_back"), shares)) | common | {
            "feature_net": "second classifier", "feature_net_sha256": judge.digest}
    train, *parts = (torch.cat([to_uint8(model.picture(part.float().to(device))).cpu() for part in sounds.split(500)])
                     for sounds in (data.train, drawn, reference))
    metrics["near_copies"] = near_copies(parts[0], train, parts[1]) | common
    return {"num_samples": count, "sampling_seconds": round(seconds, 1),
            "seconds_per_second_of_sound": seconds / (drawn.numel() / model.data.sample_rate), "metrics": metrics}


# === regeneration ===

FADE = 32  # frames over which neighbouring chunks of a long file are blended: 0.64 s; they overlap at least so far
PIECE = 1000  # frames that are made audible at a time, 20 s: what stays in the cache is three times as fast


def clip_count(model: MelFamily, length: int) -> int:
    """Clips that so many samples are cut into: they overlap by FADE and by what the model decodes worse"""
    frames, overlap = -(-length // HOP), FADE + 2 * model.margin
    return -(-max(1, frames - overlap) // (FRAMES - overlap)) if frames else 0


def clip_start(model: MelFamily, length: int, number: int) -> int:
    """First frame of a clip. The last one is moved back: a part of a clip would cost as much as a whole one."""
    return max(0, min(number * (FRAMES - FADE - 2 * model.margin), -(-length // HOP) - FRAMES))


def clips_of(model: MelFamily, audio: Tensor, batch: int = 8) -> Iterator[Tensor]:
    """Waveform [L] of any length -> its clips [B CLIP]"""
    padded, device = F.pad(audio, (0, CLIP)), next(model.parameters()).device
    starts = [HOP * clip_start(model, len(audio), n) for n in range(clip_count(model, len(audio)))]
    for first in range(0, len(starts), batch):
        yield torch.stack([padded[start:start + CLIP] for start in starts[first:first + batch]]).to(device)


def joined(model: MelFamily, parts: Iterable[Tensor], length: int) -> Tensor:
    """The first decoded clips [B M FRAMES] of so many samples -> [1 M T], blended linearly in the middle of their
    overlap, so that a seam has no edge and takes nothing from the clips' own margins."""
    clips = [clip for part in parts for clip in part.cpu()]
    starts = [clip_start(model, length, n) for n in range(len(clips))]
    whole, ramp = clips[0].new_zeros(len(clips[0]), starts[-1] + FRAMES), (torch.arange(FADE) + 0.5) / FADE
    for before, start, clip in zip([None, *starts], starts, clips):
        skip = 0 if before is None else (before + FRAMES - start - FADE) // 2  # up to the middle of the overlap
        if before is not None:
            clip[:, skip:skip + FADE] = torch.lerp(whole[:, start + skip:][:, :FADE], clip[:, skip:skip + FADE], ramp)
        whole[:, start + skip:start + FRAMES] = clip[:, skip:]
    return whole[None, :, :-(-length // HOP)]


@torch.no_grad()
def render_long(model: MelFamily, decoded: Tensor) -> Tensor:
    """Decoded [1 M T] -> waveform [T HOP], 20 s at a time; pieces overlap and are blended so that their power stays
    even, whether their phases agree there or not."""
    frames, device = decoded.shape[-1], next(model.parameters()).device
    result, ramp = torch.zeros(frames * HOP), (torch.arange(FADE * HOP) + 0.5) / (FADE * HOP)
    for start in range(0, max(1, frames - FADE), PIECE - FADE):
        end = min(frames, start + PIECE)
        piece = model.render(decoded[..., start:end].to(device))[0].cpu()
        if start > 0:
            before, after = result[start * HOP:(start + FADE) * HOP], piece[:FADE * HOP]
            alike = (before @ after / (before.norm() * after.norm()).clamp(min=1e-9)).clamp(min=0)
            power = (ramp.square() + (1 - ramp).square() + 2 * alike * ramp * (1 - ramp)).sqrt()
            piece[:FADE * HOP] = (before * (1 - ramp) + after * ramp) / power
        result[start * HOP:end * HOP] = piece
    return result


def write_wav(path: Path, audio: Tensor, rate: int = SAMPLE_RATE) -> None:
    """16-bit mono WAV; the caller has made sure that it does not clip."""
    import soundfile
    buffer = io.BytesIO()  # a full disk is then an OSError
    soundfile.write(buffer, audio.numpy(), rate, format="WAV", subtype="PCM_16")
    with replacing(path) as part:
        part.write_bytes(buffer.getbuffer())


def as_loud(estimate: Tensor, level: float) -> Tensor:
    """With this root mean square, or less where a peak would clip"""
    now, peak = (max(1e-9, value.item()) for value in (estimate.square().mean().sqrt(), estimate.abs().max()))
    return estimate * min(1000, level / now, 0.999 / peak)


def output_folder(folder: Path, given: bool) -> Path:
    """A folder that can be written to. One that the user named and that holds other things is not marked as results."""
    fresh = not given or not folder.is_dir() or not any(p.name != RESULTS_MARK for p in folder.iterdir())
    if fresh or (folder / RESULTS_MARK).exists():
        return results_folder(folder)
    check_writable(folder)
    return folder


def outputs_apart(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """No file that is read is ever overwritten, nor one output by another."""
    paths = [path.resolve() for path in outputs]
    if taken := set(paths) & {path.resolve() for path in inputs}:
        raise UserError(f"{min(taken)} is both an input and an output: choose another folder to write to", 2)
    if doubles := {path.name for path in paths if paths.count(path) > 1}:
        raise UserError(f"two of the --input files would be written to {min(doubles)}: regenerate them one by one, "
                        "with different --output_dir", 2)


# === codec files ===
# header | chunk | chunk ...: a chunk is its length, its content and a CRC-32 of both that starts from its number; all
# numbers are little-endian.

MAGIC, VERSION = b"IAGC", 1
HEADER = struct.Struct("<4sB8sIBBHQ")  # magic, version, digest of the model, Hz, channels, bits, step, samples
GROUP = 8  # chunks that are decoded at a time


class Header(NamedTuple):
    digest: bytes  # of the model
    rate: int
    channels: int
    bits: int  # of a sample of the WAV file that is asked for: 16, 24, or 32 for floating point
    step: int  # index of the quantiser's step
    samples: int

    def pack(self) -> bytes:
        body = HEADER.pack(MAGIC, VERSION, *self)
        return body + struct.pack("<I", zlib.crc32(body))


def unfit(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} can't be encoded ({' '.join(str(error).split())[:200]}): repair it, or convert it to WAV "
                     "or FLAC")


@contextlib.contextmanager
def open_sound(path: Path, told: bool = False) -> Iterator[Any]:
    """A soundfile of one or two channels at one of RATES, whatever the file is; resampled in memory if it must be."""

    import soundfile
    if not path.is_file():
        raise UserError((f"{path} is a folder, not an audio file" if path.is_dir() else f"there is no file {path}")
                        + ": give audio files with --input")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        try:
            if missing := missing_bytes(path):
                raise ValueError(f"it is truncated, {missing} bytes of the sound that its header promises are missing")
            plain = path if path.suffix.lower() in AUDIO_SUFFIXES else decoded(path, Path(folder), 0)
            file = stack.enter_context(soundfile.SoundFile(plain))
            if file.format == "MP3":  # of which the length is a guess until all of it was read
                file = stack.enter_context(unpacked(file, Path(folder)))
            if file.channels > 2:
                raise ValueError(f"it has {file.channels} channels, the codec knows one and two: mix it down first, "
                                 f"ffmpeg -i {path.name} -ac 2 stereo.wav")
            if not file.frames:
                raise ValueError("it holds no samples")
            if file.samplerate not in RATES:
                file = stack.enter_context(resampled(file, Path(folder), path, told))
        except (OSError, RuntimeError, ValueError) as error:  # soundfile's own errors are RuntimeErrors
            raise unfit(path, error) from None
        yield file


def unpacked(file: Any, folder: Path) -> Any:
    """The same sound in a file that knows its length"""
    import soundfile
    place = folder / "unpacked.w64"
    with soundfile.SoundFile(place, "w", file.samplerate, file.channels, "FLOAT", format="W64") as out:
        while len(block := file.read(1 << 18, dtype="float32", always_2d=True)):
            out.write(block)
    return soundfile.SoundFile(place)


def resampled(file: Any, folder: Path, path: Path, told: bool) -> Any:
    """The same sound at the next of RATES above (or the highest)"""
    import soundfile
    from torchaudio.functional import resample
    if not 1000 <= file.samplerate <= 1_000_000:
        raise ValueError(f"it claims {file.samplerate} Hz")
    rate = next((rate for rate in RATES if rate >= file.samplerate), RATES[-1])
    if not told:
        say(f"{path} has {file.samplerate} Hz: it is coded at {rate} Hz")
    ratio = Fraction(file.samplerate, rate).limit_denominator(640)
    audio = torch.from_numpy(file.read(dtype="float32", always_2d=True).T.copy())
    audio = resample(audio, ratio.numerator, ratio.denominator, 32).T.numpy()
    soundfile.write(folder / "resampled.wav", audio, rate, subtype="FLOAT")
    return soundfile.SoundFile(folder / "resampled.wav")


def regrouped(parts: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Arrays [C T N] of any T -> the same frames, `count` at a time, the rest at the end"""
    held = None
    for part in parts:
        held = part if held is None else np.concatenate([held, part], 1)
        while held.shape[1] >= count:
            yield held[:, :count]
            held = held[:, count:]
    if held is not None and held.shape[1]:
        yield held


def folded(parts: Iterable[np.ndarray], sign: float) -> Iterator[np.ndarray]:
    """`rotate` for a stream of [C T N]: the last block waits for its neighbour."""
    held = None
    for part in parts:
        both = torch.from_numpy(part if held is None else np.concatenate([held, part], 1))
        both = rotate(both, sign).numpy()
        yield both[:, :-1]
        held = both[:, -1:]
    if held is not None:
        yield held


def frames_of(file: Any, path: Path) -> Iterator[np.ndarray]:
    """A soundfile -> float64 blocks [C T N], the last one filled up with zeros"""
    size, count = frame_size(file.samplerate), 0
    try:
        while len(block := file.read(size * CHUNK_FRAMES, dtype="float64", always_2d=True)):
            if not np.isfinite(block).all():
                raise ValueError("it holds NaN or infinite samples")
            count += len(block)
            yield np.pad(block, ((0, -len(block) % size), (0, 0))).T.reshape(file.channels, -1, size)
        if count < file.frames:
            raise ValueError(f"it is truncated, {count} of {file.frames} samples are there")
    except (RuntimeError, ValueError) as error:
        raise unfit(path, error) from None


def lines_of(file: Any, path: Path) -> Iterator[np.ndarray]:
    """A soundfile -> the MDCT of each chunk, [C T N]"""
    for blocks in regrouped(folded(frames_of(file, path), 1), CHUNK_FRAMES):
        yield dct4(torch.from_numpy(blocks)).numpy()


def turned(lines: np.ndarray, rate: int, angles: np.ndarray, sign: float) -> np.ndarray:
    """Two channels [2 T N] turned into each other, by band; sign -1 undoes it."""
    angle = math.pi / ANGLES * angles[bands_of(lines.shape[2], rate, PAN_BANDS).numpy()]
    one, two = lines
    near, far = np.cos(angle), sign * np.sin(angle)
    return np.stack([near * one + far * two, near * two - far * one])


def principal_angles(lines: np.ndarray, rate: int) -> np.ndarray:
    """uint8 [PAN_BANDS]: the turns after which the first channel holds as much as it can, the second what is left"""
    one, two = lines
    bands = bands_of(lines.shape[2], rate, PAN_BANDS).numpy()
    cross, more = (np.bincount(bands, power.sum(0), PAN_BANDS) for power in (2 * one * two, one * one - two * two))
    return (np.rint(np.arctan2(cross, more) / 2 / math.pi * ANGLES) % ANGLES).astype(np.uint8)


def decorrelated(lines: np.ndarray, rate: int) -> tuple[np.ndarray, bytes]:
    """Lines [C T N] with the channels turned into each other where there are two, and what a decoder must know of it"""
    if len(lines) == 1:
        return lines, b""
    angles = principal_angles(lines, rate)
    return turned(lines, rate, angles, 1), angles.tobytes()


def pack_chunk(coder: Coder, lines: np.ndarray, rate: int, index: int) -> bytes:
    """The MDCT of a chunk [C T N] -> its content"""
    lines, side = decorrelated(lines, rate)
    step = step_size(index)
    quantised = coder.quantise(lines, rate, step)
    return coder.pack(quantised, side + centres_of(quantised.values, lines / step).tobytes())


def write_file(target: Path, header: Header, contents: Iterable[bytes]) -> int:
    """Header and chunks -> size of the file in bytes"""
    with writer_lock(target), replacing(target) as part, open(part, "wb") as out:
        size = out.write(header.pack())
        for place, content in enumerate(contents):
            record = struct.pack("<I", len(content)) + content
            size += out.write(record + struct.pack("<I", zlib.crc32(record, place)))
    return size


SAMPLED = 1600  # frames from all over a file by which its step is chosen


def sampled(file: Any, path: Path) -> np.ndarray:
    """Lines [C T N] of an open sound: all, or the middles of up to a hundred chunks"""
    chunks, some = -(-file.frames // (frame_size(file.samplerate) * CHUNK_FRAMES)), []
    every = -(-chunks // 100)
    count = min(CHUNK_FRAMES, -(-SAMPLED * every // chunks))
    for lines in itertools.islice(lines_of(file, path), 0, None, every):
        start = max(0, lines.shape[1] - count) // 2
        lines = lines[:, start:start + count].copy()  # a view would keep all of its chunk
        some.append(decorrelated(lines, file.samplerate)[0])
    return np.concatenate(some, 1)


@one_thread()
def encode_file(coder: Coder, config: CodecConfig, source: Path, target: Path, bits: int = 16) -> Header:
    """Write `source` as a codec file. The step is chosen by what some of it needs; a file that became more than 1 %
    larger or smaller than asked for is written again, four times at most; one of which only some was looked at, if it
    is 2 % off, once."""
    with open_sound(source) as file:
        rate, size = file.samplerate, frame_size(file.samplerate)
        frames = -(-file.frames // size)
        wanted = 1000 * config.bitrate * max(size, file.frames) / rate  # a frame is the least
        sample = sampled(file, source)
        share = sample.shape[1] / frames
        overhead = share * 8 * ((34 + 19 * file.channels) * -(-frames // CHUNK_FRAMES) + HEADER.size + 4)
        index = coder.index_for(sample, rate, config, overhead)
        known: list[tuple[int, int]] = []  # index of the step, bits of the file
        while True:
            file.seek(0)
            header = Header(coder.digest, rate, file.channels, bits, index, file.frames)
            spent = 8 * write_file(target, header, (pack_chunk(coder, lines, rate, index)
                                                    for lines in lines_of(file, source)))
            known.append((index, spent))
            change = min(FINEST - index, next_change(known, wanted, file.channels * frames * size))
            most, tolerance = (2, 0.02) if share < 1 else (5, 0.01)
            if len(known) == most - 1 and spent > wanted:  # the last try is what is known to fit, if anything is
                change = max((i for i, needed in known if needed <= wanted), default=index + change) - index
            if config.quality is not None or not change or index + change < 0 or len(known) == most or (
                    abs(spent - wanted) < tolerance * wanted):
                return header
            index += change


@contextlib.contextmanager
def writer_lock(target: Path) -> Iterator[None]:
    """Two writers of one file would mix their halves: the second is refused."""
    place = target.with_name(f".{target.name}.lock")
    try:
        held = lock(place)
    except UserError as error:
        why = "another process writes it" if isinstance(error.__context__, BlockingIOError) else error.__context__
        raise UserError(f"can't write {target} ({why}): wait, or choose another --output_dir") from None
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        held.close()


def read_header(file: Any, path: Path, coder: SymbolCoder) -> Header:
    """Of an open file; an error says what is the matter with it."""
    data = file.read(HEADER.size + 4)
    if data[:4] != MAGIC:
        raise UserError(f"{path} is no file of this script: give one that --encode wrote")
    if data[4:5] != bytes([VERSION]):
        raise UserError(f"{path} is of version {data[4] if len(data) > 4 else '?'} of the format, this script reads "
                        f"{VERSION}: use a newer script")
    if len(data) < HEADER.size + 4 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise UserError(f"the header of {path} is damaged: it can't be read, get another copy")
    header = Header(*HEADER.unpack(data[:-4])[2:])
    if header.digest != coder.digest:
        raise UserError(f"{path} was written with another model ({header.digest.hex()}, this one is "
                        f"{coder.digest.hex()}): name that model's file with --checkpoint")
    if header.rate not in coder.rates or header.channels not in coder.channels or header.bits not in (16, 24, 32):
        raise UserError(f"the header of {path} makes no sense: get another copy")
    return header


def read_chunks(file: Any, counts: Iterable[int]) -> Iterator[tuple[bytes, int]]:
    """(content, count) of each chunk, of whose frames or clips there are so many; ValueError where one is damaged or
    missing"""
    for place, count in enumerate(counts):
        length = file.read(4)
        content = file.read(min(int.from_bytes(length, "little"), 1 << 24))  # no chunk has as much
        if len(check := file.read(4)) < 4:
            raise ValueError("it ends too early")
        if zlib.crc32(length + content, place) != int.from_bytes(check, "little"):
            raise ValueError("its checksum is wrong")
        yield content, count
    if file.read(1):
        raise ValueError("there is more than its header promises")


def decoded_lines(coder: Coder, header: Header, chunks: Sequence[tuple[bytes, int]]) -> Iterator[np.ndarray]:
    """Chunks -> what the MDCT was, [C T N] of each"""
    pan, centres = PAN_BANDS * (header.channels == 2), 3 * header.channels
    values = coder.unpack([(content[pan + centres:], frames) for content, frames in chunks], header.channels,
                          frame_size(header.rate), header.rate)
    for (content, _), part in zip(chunks, values):
        moved = np.frombuffer(content[pan:pan + centres], np.int8).reshape(-1, 3)
        lines = restored(part, moved) * step_size(header.step)
        yield turned(lines, header.rate, np.frombuffer(content[:pan], np.uint8), -1) if pan else lines


def decode_file(coder: SymbolCoder, source: Path, target: Path, salvage: bool = False,
                bits: int | None = None) -> tuple[Header, str]:
    """Write a file's sound as WAV; returns its header and what was wrong with it, "" if nothing. With `salvage`, what
    stands before the damage is written; `bits` of a sample are else those that the header names."""
    import soundfile
    problem = ""

    def parts(file: Any, header: Header) -> Iterator[Any]:
        nonlocal problem
        chunks, done = read_chunks(file, coder.counts(header)), 0
        while True:
            try:
                group = list(itertools.islice(chunks, 1 if salvage else GROUP))
                if not group:
                    return
                values = coder.values(group, header)
            except (ValueError, struct.error, AssertionError, IndexError) as error:
                problem = f"{source} is damaged after {coder.seconds(header, done):.1f} s or more ({first_line(error)})"
                if not salvage:
                    raise UserError(f"{problem}: --salvage writes what is before it") from None
                return
            done += len(group)
            yield from values

    try:
        with open(source, "rb") as file, replacing(target) as part:
            header = read_header(file, source, coder)
            depth = bits or header.bits
            kind = {16: "PCM_16", 24: "PCM_24", 32: "FLOAT"}[depth]
            with soundfile.SoundFile(part, "w", header.rate, header.channels, kind, format="WAV") as out:
                left = header.samples
                for sound in coder.sound(parts(file, header), header):
                    if not np.isfinite(sound).all():
                        raise UserError(f"{source}: what the model makes of it is not finite; use --precision float32")
                    sound = sound[:left]
                    left -= len(sound)
                    out.write(sound if kind == "FLOAT" else pcm(sound, depth))
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}: name a file that --encode wrote") from None
    except (soundfile.LibsndfileError, AssertionError) as error:  # AssertionError: soundfile's, of a full disk
        raise UserError(f"can't write {target} ({first_line(error)}): free some space, or choose another "
                        "folder") from None
    return header, problem


def pcm(sound: np.ndarray, bits: int) -> np.ndarray:
    """float in [-1, 1] -> whole numbers in the upper bits of int32, rounded to nearest, clipped at full scale"""
    full = 2 ** (bits - 1)
    return (np.rint(sound * full).clip(-full, full - 1).astype(np.int64) << (32 - bits)).astype(np.int32)


def file_snr(estimate: Path, source: Path) -> float | None:
    """SNR in dB over all channels of two files, read side by side; None where there is no sound, or no error"""
    import soundfile
    energy, noise = 0.0, 0.0
    with open_sound(source, told=True) as one, soundfile.SoundFile(estimate) as two:
        for block in one.blocks(1 << 18, dtype="float64", always_2d=True):
            other = two.read(len(block), dtype="float64", always_2d=True)
            energy, noise = energy + float(np.square(block).sum()), noise + float(np.square(block - other).sum())
    return 10 * math.log10(energy / noise) if energy > 0 and noise > 0 else None


CLIPS_OF_A_CHUNK = 8  # of a mel model's file
UNHEARD = 255  # loudness that stands for silence


class LatentCoder(SymbolCoder):
    """Files of a mel model, one channel at 16 kHz: a chunk holds the loudness of the file in -1/2 dB and, of some
    clips, the numbers of the linear code that the model keeps, rounded to one step for all. (A VAE learns just that:
    the deviations of its posterior are 0.17 to 0.19 in the same unit, whatever the number.) Each is coded by the table
    of a Laplace distribution as wide as the training set's numbers in its place."""
    rates, channels = (SAMPLE_RATE,), (1,)

    def __init__(self, model: MelFamily) -> None:
        scale, low = 0.06 * 2 ** (np.arange(SCALES) / PER_OCTAVE), low_bits(np.arange(SCALES))
        edges = (np.arange(LARGEST + 2) << low[:, None]) - 0.5
        beyond = np.exp(-edges.clip(min=0) / scale[:, None])  # share of the numbers whose magnitude is not smaller
        beyond[:, -1] = 0
        super().__init__(-np.diff(beyond))  # a test shows that none of these is so near to a half that machines differ
        self.model, self.places, self.spread = model, model.places().cpu(), model.spread.flatten().double().cpu()
        self.sets = max(2, len(self.places))  # one bit for nothing where there is one
        step = (12 * model.ROUNDING * model.missed().item() / self.places.shape[1]) ** 0.5
        self.step = round(PER_OCTAVE * (8 - math.log2(max(step, 1e-4))))
        edges = 2 ** (np.arange(-79.5, 80) / PER_OCTAVE)  # no float32 is so near to one of them that machines differ
        self.wide = np.searchsorted(edges, self.spread.numpy()) - 80  # quarters of an octave
        weights = {name for name, _ in model.named_parameters()}  # shipped in half precision
        parts = [(v.half() if k in weights else v).cpu().numpy().tobytes() for k, v in model.state_dict().items()]
        self.digest = hashlib.sha256(b"".join(parts)).digest()[:8]

    def tables(self, sets: Tensor, step: int) -> np.ndarray:
        """[n K]; the first one's deviation is 0.06 sqrt(2) steps, 3.56 octaves below one"""
        offset = step - 8 * PER_OCTAVE + 14 + self.model.WIDER
        return (self.wide[self.places[sets].numpy()] + offset).clip(0, SCALES - 1)

    def unit(self, sets: Tensor, step: int) -> Tensor:
        """Step in units of each number [n K]"""
        return 2.0 ** (8 - step / PER_OCTAVE) / self.spread[self.places[sets]]

    def rounded(self, spectrum: Tensor, sets: Tensor) -> np.ndarray:
        """Numbers of the linear code [n D], of clips that belong to `sets` [n] -> whole numbers [n K]"""
        exact = spectrum.double().cpu().gather(1, self.places[sets]) / self.unit(sets, self.step)
        return exact.round().clamp(-LOUDEST, LOUDEST).long().numpy()

    def spectrum(self, values: np.ndarray, sets: Tensor, step: int) -> Tensor:
        """Back again: [n D]"""
        numbers = (torch.from_numpy(values) * self.unit(sets, step)).float()
        return torch.zeros(len(values), len(self.spread)).scatter(1, self.places[sets], numbers)

    def pack(self, values: np.ndarray, sets: Tensor) -> bytes:
        stream, flat = self.stream.RangeEncoder(), values.ravel()
        stream.encode(sets.numpy().astype(np.int32), self.uniform, np.full(len(sets), self.sets, np.int32))
        self.put(np.abs(flat), self.tables(sets, self.step).ravel(), stream, stream, stream)
        signs = (flat[flat != 0] < 0).astype(np.int32)
        stream.encode(signs, self.uniform, np.full_like(signs, 2))
        return stream.get_compressed().astype("<u4").tobytes()

    def unpack(self, content: bytes, count: int, step: int) -> Tensor:
        """What `pack` wrote of so many clips -> numbers of the linear code [n D]"""
        stream = self.stream.RangeDecoder(np.frombuffer(content, "<u4").astype(np.uint32))
        sets = torch.from_numpy(stream.decode(self.uniform, np.full(count, self.sets, np.int32))).long()
        values = self.take(self.tables(sets, step).ravel(), stream, stream, stream)
        values[values > 0] *= 1 - 2 * stream.decode(self.uniform, np.full((values > 0).sum(), 2, np.int32))
        return self.spectrum(values.reshape(count, -1), sets, step)

    def through(self, spectrum: Tensor, sets: Tensor, frames: Tensor) -> tuple[Tensor, dict[str, list[float]]]:
        """Clips [n D] of so many frames as a file holds them, and what a file of each whole one alone weighs"""
        sets, values = sets.cpu(), self.rounded(spectrum, sets.cpu())
        sizes = [HEADER.size + 13 + len(self.pack(one[None], its[None])) for one, its in zip(values, sets)]
        rates = [size * SAMPLE_RATE / (125 * CLIP) if n == FRAMES else None for size, n in zip(sizes, frames.tolist())]
        return self.spectrum(values, sets, self.step).to(spectrum.device), {"kbit_per_second": rates}

    def expected_rate(self) -> float:
        """kbit/s of a long file, if it is like the training set"""
        p = self.probabilities / self.probabilities.sum(1, keepdims=True)
        entropy = (p * self.lengths).sum(1) + self.low + 1 - p[:, 0]
        bits = entropy[self.tables(torch.arange(len(self.places)), self.step)].sum(1).mean()
        return bits / clip_start(self.model, 1 << 40, 1) * SAMPLE_RATE / HOP / 1000

    @torch.no_grad()
    def write(self, source: Path, target: Path, bits: int) -> Header:
        audio, model = read_audio(source), self.model
        level = audio.square().mean().sqrt().item()
        loudness = bytes([min(UNHEARD, max(0, round(-40 * math.log10(max(level, 1e-9)))))])

        def contents() -> Iterator[bytes]:
            for clips in clips_of(model, audio, CLIPS_OF_A_CHUNK):
                codes = model.encode(clips)
                if not torch.isfinite(codes).all():
                    raise UserError(f"{source}: what the model makes of it is not finite; use --precision float32")
                sets = model.set_of(codes).cpu()
                yield loudness + self.pack(self.rounded(model.place(codes), sets), sets)

        header = Header(self.digest, SAMPLE_RATE, 1, bits, self.step, len(audio))
        write_file(target, header, contents())
        return header

    def counts(self, header: Header) -> Iterator[int]:
        clips = clip_count(self.model, header.samples)
        return (min(CLIPS_OF_A_CHUNK, clips - first) for first in range(0, clips, CLIPS_OF_A_CHUNK))

    def seconds(self, header: Header, chunks: int) -> float:
        return clip_start(self.model, header.samples, chunks * CLIPS_OF_A_CHUNK) * HOP / SAMPLE_RATE

    def values(self, chunks: Sequence[tuple[bytes, int]], header: Header) -> list[tuple[int, Tensor]]:
        return [(content[0], self.unpack(content[1:], count, header.step)) for content, count in chunks]

    @torch.no_grad()
    def sound(self, values: Iterable[tuple[int, Tensor]], header: Header) -> Iterator[np.ndarray]:
        if chunks := list(values):
            model, loudness = self.model, chunks[0][0]
            device = model.spread.device
            mel = joined(model, (model.from_spectrum(spectra.to(device)) for _, spectra in chunks), header.samples)
            sound = render_long(model, mel)[:header.samples]
            yield as_loud(sound, 10 ** (-loudness / 40) * (loudness < UNHEARD)).numpy()[:, None]

    def figures(self, estimate: Path, source: Path) -> dict[str, float | None]:
        ours, true = read_audio(estimate), read_audio(source)
        silent = true.square().mean() < INAUDIBLE ** 2
        return {"snr_db": None if silent else attempt(snr_db, ours, true)[0],
                "mel_mse": whole_mels(self.model.preprocessor, ours, true)["mel_mse"].item()}


SAID = {"snr_db": "SNR {} dB", "mel_mse": "mel error {}"}


def run_infer(command: Command, world: World) -> int:
    """--mode infer: sounds become small files, which become sound again; --encode and --decode do half of it"""
    options, model = command.options(InferOptions), command.model(world)
    if options.decode and (more := {"input", "encode", "bitrate", "quality"} & command.given.keys()):
        raise UserError(f"--decode takes files as they are: leave out --{' and --'.join(sorted(more))}", 2)
    if options.salvage and not options.decode:
        raise UserError("--salvage belongs to --decode", 2)
    if {"bitrate", "quality"} <= command.given.keys():
        raise UserError("--bitrate and --quality both decide the step: give one", 2)
    results = output_folder(command.given.get("results_dir") or HERE / "results", "results_dir" in command.given)
    output = output_folder(options.output_dir, True) if options.output_dir else results
    coder = model.coder()
    if options.export:
        export_model(model, command.state, options.export)
    if options.decode:
        return decode_all(coder, options, output)
    files = options.input or sorted((HERE / "examples").glob("*.flac"))
    if not files:
        raise UserError(f"no example in {HERE / 'examples'}: name audio files with --input")
    packed = [output / f"{file.stem}.iag" for file in files]
    targets = [output / f"{file.stem}_reconstructed.wav" for file in files]
    outputs_apart([*packed, *targets, results / "inference.json", results / "inference_comparison.png"], files)
    shipped = command.path.parent == HERE / "pretrained"
    say(f"{title_of(model)}, from {command.path}" + " (the shipped weights)" * shipped)
    records, columns = [], []
    for file, small, target in zip(files, packed, targets):
        records.append(encoded(coder, file, small, options.bits or 16))
        if not options.encode:
            started = time.perf_counter()
            header, _ = decode_file(coder, small, target)
            speed, figures = header.samples / header.rate / (time.perf_counter() - started), coder.figures(target, file)
            said = (SAID[k].format("-" if v is None else f"{v:.2f}") for k, v in figures.items())
            say(f"  -> {target}: {', '.join(said)}; {speed:.1f} x real time")
            records[-1] |= {"output": str(target)} | figures
            columns += [(file.stem[:32], read_audio(file), read_audio(target))] * (len(columns) < 2)
    if columns:
        comparison_figure(results / "inference_comparison.png", title_of(model), columns, model)
    write_json(results / "inference.json", {
        "model": command.key, "checkpoint": str(command.path), "files": records, "machine": provenance(),
        "metrics": definitions("kbit_per_second", *SAID)})
    say(f"-> {results / 'inference.json'}" + f", {results / 'inference_comparison.png'}" * bool(columns))
    return 0


def encoded(coder: SymbolCoder, source: Path, target: Path, bits: int) -> dict[str, Any]:
    """Write the small file of a sound -> what is recorded of it"""
    started = time.perf_counter()
    header = coder.write(source, target, bits)
    size, seconds, spent = target.stat().st_size, header.samples / header.rate, time.perf_counter() - started
    rate, asked = size / seconds / 125, coder.asked
    say(f"{source} ({seconds:.1f} s, {header.rate} Hz, {'stereo' if header.channels == 2 else 'mono'}) -> {target}: "
        f"{size:,} bytes, {rate:.{1 if rate > 10 else 3}f} kbit/s; {seconds / spent:.1f} x real time"
        + " (no less can be had)" * bool(asked and rate > 1.1 * asked)
        + " (no more is needed)" * bool(asked and rate < 0.9 * asked))
    return {"input": str(source), "file": str(target), "bytes": size, "kbit_per_second": rate, "rate": header.rate,
            "channels": header.channels, "seconds": round(seconds, 3)}


def decode_all(coder: SymbolCoder, options: InferOptions, output: Path) -> int:
    """--decode: the sound of small files; 1 where one was damaged and only salvaged"""
    targets = [output / f"{file.stem}_decoded.wav" for file in options.decode]
    outputs_apart(targets, options.decode)
    status = 0
    for file, target in zip(options.decode, targets):
        header, problem = decode_file(coder, file, target, options.salvage, options.bits)
        if problem:
            say(f"warning: {problem}: what stands before is written", sys.stderr)
            status = 1
        kind = "stereo" if header.channels == 2 else "mono"
        say(f"{file} ({header.samples / header.rate:.1f} s, {header.rate} Hz, {kind}) -> {target}")
    return status


MONO_RATES, STEREO_RATES = (16, 24, 32, 48, 64, 96), (64, 96, 128, 160)  # kbit/s at which the codec is measured
LONGEST = 30  # seconds of a track that are measured


def plain_codec(audio: Tensor, bits: float) -> Tensor:
    """The plain MDCT coder, 512 lines, at the finest step at which [L] takes no more bits than that -> [L]"""
    padded = F.pad(audio.double(), (0, -len(audio) % 512)).view(-1, 512)
    lines = dct4(rotate(padded, 1)).numpy()
    low, high = 0, FINEST
    while high - low > 1:
        middle = (low + high) // 2
        fits = plain_bits(np.rint(lines / step_size(middle))) <= bits
        low, high = (middle, high) if fits else (low, middle)
    quantised = torch.from_numpy(np.rint(lines / step_size(low)) * step_size(low))
    return rotate(dct4(quantised), -1).flatten()[:len(audio)].float()


def coded(coder: SymbolCoder, audio: np.ndarray, rate: int, folder: Path) -> tuple[np.ndarray, int]:
    """Sound [L C] through a real file -> [L C], size of the file in bytes"""
    import soundfile
    paths = [folder / name for name in ("in.wav", "sound.iag", "out.wav")]
    soundfile.write(paths[0], audio, rate, subtype="FLOAT")
    coder.write(paths[0], paths[1], 32)
    decode_file(coder, paths[1], paths[2])
    return soundfile.read(paths[2], dtype="float32", always_2d=True)[0], paths[1].stat().st_size


def stereo_of(track: Track, folder: Path) -> np.ndarray | None:
    """The first LONGEST seconds of a track's file as it is, [L 2] at 44.1 kHz; None where it is something else"""
    import soundfile
    if not track.file:
        return None
    plain = track.file.suffix.lower() in AUDIO_SUFFIXES
    (folder / "sound.wav").unlink(missing_ok=True)  # of the track before
    path = track.file if plain else decoded(track.file, folder, STEMS.index(track.stem))
    with soundfile.SoundFile(path) as file:
        fit = file.channels == 2 and file.samplerate == 44_100
        return file.read(LONGEST * 44_100, dtype="float32") if fit else None


def codec_rows(model: Codec, tracks: Sequence[Track]) -> dict[str, Any]:
    """Like `measure_rows`, of files at several rates, beside the plain MDCT coder at the same size"""
    coder, prep, reasons = model.coder(), model.preprocessor, {}
    values: dict[str, dict[str, list[dict]]] = {}

    def through(sound: np.ndarray, hertz: int, kbits: float) -> tuple[Tensor, int, dict[str, float]]:
        coder.config = dataclasses.replace(model.config, bitrate=kbits, quality=None)
        found, size = coded(coder, sound, hertz, Path(name))
        return torch.from_numpy(found.T.copy()), size, {"kbit_per_second": size * hertz / len(sound) / 125}

    def add(row: str, columns: dict[str, float | None]) -> None:
        for group in ("all", track.stem):
            values.setdefault(row, {}).setdefault(group, []).append(columns)

    with tempfile.TemporaryDirectory() as name, progress(len(tracks), "measuring", unit="track", leave=False) as bar:
        for track in tracks:
            audio = torch.from_numpy(np.array(track.audio[:LONGEST * SAMPLE_RATE])).float()
            for kbits in MONO_RATES:
                found, size, rate = through(audio.numpy()[:, None], SAMPLE_RATE, kbits)
                for row, sound in ((f"codec_mono_{kbits:03d}", found[0]),
                                   (f"plain_mdct_mono_{kbits:03d}", plain_codec(audio, 8 * size))):
                    columns = wave_metrics(sound[None], audio[None], torch.tensor([len(audio)]),
                                           reasons.setdefault(row, {})) | whole_mels(prep, sound, audio)
                    add(row, rate | {key: None if v[0] is None else float(v[0]) for key, v in columns.items()})
            stereo = stereo_of(track, Path(name))
            for kbits in STEREO_RATES if stereo is not None else ():
                found, _, rate = through(stereo, 44_100, kbits)
                pair = found, torch.from_numpy(stereo.T.copy())
                figures = {m.__name__: float(np.mean([m(a, b) for a, b in zip(*pair)])) for m in (mr_stft, lsd_db)}
                rate["snr_db"] = float(snr_db(*(x.flatten() for x in pair)))
                add(f"codec_stereo_{kbits:03d}", rate | figures)
            bar.update()
    return {row: {group: summarise(clips, reasons.get(row)) for group, clips in groups.items()}
            for row, groups in values.items()}


def run_evaluate(command: Command, world: World) -> int:
    """--mode evaluate: every metric on the test split, between its floor and its ceilings; rates are of whole files"""
    model, results = command.model(world), output_folder(command.results(), "results_dir" in command.given)
    if {"bitrate", "quality"} & command.given.keys():
        raise UserError("--mode evaluate measures the codec at rates of its own: leave out --bitrate and --quality", 2)
    data, started = SUBJECT.load(command, world), time.perf_counter()
    rows, counts = model.measure(data.test, command.options(EvaluateOptions).eval_clips)
    write_json(results / "evaluation.json", {
        "model": command.key, "checkpoint": str(command.path), "checkpoint_sha256": file_digest(command.path),
        "parameters": sum(p.numel() for p in model.parameters()), "trained_on": model.data.title,
        "dataset": data.title, "split": "test", **counts, "device": str(world.device),
        "precision": str(model.precision).removeprefix("torch."), "original_phase": UPPER_BOUND, "rows": rows,
        "seconds": round(time.perf_counter() - started, 1), "machine": provenance(), "metrics": definitions(*METRICS)})
    say(f"{title_of(model)}\non the test split of {data.title}: {' of '.join(f'{n} {k}' for k, n in counts.items())}")
    for stem in dict.fromkeys(itertools.chain.from_iterable(rows.values())):
        print_rows(rows, stem)
    say(f"-> {results / 'evaluation.json'}")
    return 0


def pick_labels(text: str | None, model: ShortSoundFamily) -> tuple[Tensor | None, list[str]]:
    """The classes of `--label`, which the sounds go through in turn, and their names; None where there are none.
    A digit may be written as 7 or seven."""
    classes = model.data.classes or model.data.stems
    if not model.labelled:
        if text is not None:
            raise UserError(f"--label {text}: the model was trained without labels", 2)
        return None, classes
    names = list(classes) if text is None else [text] if text in classes else [word.strip() for word in text.split(",")]
    names = [DIGITS[int(name)] if re.fullmatch("[0-9]", name) and name not in classes else name for name in names]
    if unknown := [name for name in names if name not in classes]:
        raise UserError(f"--label {unknown[0]}: the classes are {', '.join(classes[:20])}", 2)
    return torch.tensor([classes.index(name) for name in names]), names


def run_draw(command: Command, world: World) -> int:
    """--mode infer of a model that draws: a WAV file for each sound, one with all in a row, and their pictures"""
    model, options = command.model(world), command.options(DrawOptions)
    labels, names = pick_labels(options.label, model)
    if model.config.guidance != 1 and not model.labelled and "guidance" in command.given:
        raise UserError(f"--guidance {model.config.guidance:g}: the model was trained without labels", 2)
    results = output_folder(command.given.get("results_dir") or HERE / "results", "results_dir" in command.given)
    output = output_folder(options.output_dir, True) if options.output_dir else results
    shipped = command.path.parent == HERE / "pretrained"
    say(f"{title_of(model)}, from {command.path}" + " (the shipped weights)" * shipped)
    if options.export:
        export_model(model, command.state, options.export)
    count, rate, shown, started = options.num_samples or len(names), model.data.sample_rate, [], time.perf_counter()
    for numbers, sounds in generate(model, labels, count, options.sample_batch,
                                    "drawing" if count > options.sample_batch else ""):
        for i, sound in zip(numbers, sounds):
            label = re.sub(r"[^\w\-+.]", "-", names[i % len(names)]) if labels is not None else "sound"
            write_wav(output / f"drawn_{i:05d}_{label}.wav", sound, rate)
        shown += sounds[:max(0, SHOWN - len(shown))]
    seconds = time.perf_counter() - started
    write_wav(output / "drawn_in_a_row.wav", in_a_row(shown, rate), rate)
    how = f"{model.config.sampler}, {model.config.steps} steps, guidance {model.config.guidance:g}"
    strip_of_sounds(results / "drawn_sounds.png", title_of(model, how), model, torch.stack(shown),
                    [names[i % len(names)] for i in range(len(shown))])
    length = count * model.data.frames * STRIDE / 1000
    more = f" (the first {SHOWN} of them)" * (count > SHOWN)
    say(f"{count} sound(s) -> {output / 'drawn_00000_...'}, {output / 'drawn_in_a_row.wav'}{more}, "
        f"{results / 'drawn_sounds.png'}\n{seconds:.2f} s, {seconds / length:.3f} s for a second of sound")
    return 0


def in_a_row(sounds: Sequence[Tensor], rate: int) -> Tensor:
    """One sound of several [L], with a tenth of a second of silence for what is left of each one's own"""
    rows = []
    for sound in sounds:
        loud = (sound.abs() > 0.01 * sound.abs().max()).nonzero().flatten()
        rows += [sound[:int(loud[-1]) + 1 if len(loud) else 0], torch.zeros(rate // 10)]
    return torch.cat(rows)


@torch.no_grad()
def run_classify(command: Command, world: World) -> int:
    """--mode infer of a classifier: the likeliest classes of sound files"""
    model, options = command.model(world), command.options(ClassifyOptions)
    if options.export:
        export_model(model, command.state, options.export)
    elif not options.input:
        raise UserError("--model classifier names what is heard: give some sounds with --input", 2)
    rate, length = model.data.sample_rate, model.data.frames * model.preprocessor.hop
    for path in options.input or ():
        try:
            sound, cut_off = short_sound(read_audio(path, rate=rate), rate, length)
        except ValueError as error:
            raise UserError(f"{path}: {error}: name another with --input") from None
        shares = model(model.picture(sound.float()[None].to(world.device)))[1].softmax(1)[0]
        best = shares.topk(min(3, len(shares)))
        say(f"{path}: " + ", ".join(f"{model.data.classes[k]} {share:.1%}" for share, k in
                                    zip(best.values.tolist(), best.indices.tolist()))
            + f" (its first {length / rate:.3g} s)" * cut_off)
    return 0


def evaluate_short(command: Command, world: World) -> int:
    """--mode evaluate of the models of short sounds, beside real sounds and the way back"""
    model, results = command.model(world), output_folder(command.results(), "results_dir" in command.given)
    data, started = SUBJECT.load(command, world), time.perf_counter()
    if data.info() != model.data:
        raise UserError(f"{command.path} was trained on {model.data.title} ({sum(model.data.class_counts)} sounds), "
                        "not on this data: give its --dataset, --data_root, --seconds and --split", 2)
    report = {"model": command.key, "checkpoint": str(command.path), "checkpoint_sha256": file_digest(command.path),
              "parameters": sum(p.numel() for p in model.parameters()), "dataset": data.title, "split": "test",
              "training_made": command.state["made"], "training_seconds": command.state.get("seconds"),
              "seed": model.config.seed, "device": str(world.device), "metrics": {}} | model.describe_sampling()
    if model.can_sample:
        report |= evaluate_samples(command.options(MeasureOptions), model, data)
    report["metrics"] |= {k: {"value": v, "n": len(data.test), "reference": "test"}
                          for k, v in held_out(model, data, world.device, len(data.test)).items()}
    report |= {"seconds": round(time.perf_counter() - started, 1), "machine": provenance()}
    write_json(results / "evaluation.json", report)
    say(f"{title_of(model)}: {report['parameters'] / 1e6:.2f} M parameters" + (
        f", {report['num_samples']} sounds, {report['seconds_per_second_of_sound']:.3f} s for a second of sound"
        if model.can_sample else ""))
    say(f"{'metric':38}{'value':>12}{'real data':>12}{'way back':>12}")
    for key, entry in report["metrics"].items():
        cells = "".join(f"{'-' if entry.get(k) is None else format(entry[k], '.4f'):>12}"
                        for k in ("value", "floor", "way_back"))
        say(f"{key:38}{cells}" + (f"  ({entry['reason']})" if "reason" in entry else ""))
    say("real data: as many training sounds; way back: the same through picture and phase"
        f"\n-> {results / 'evaluation.json'}")
    return 0


SoundFamily.actions = {"infer": run_infer, "evaluate": run_evaluate}
SoundDiffusion.actions = {"infer": run_draw, "evaluate": evaluate_short}
SoundClassifier.actions = {"infer": run_classify, "evaluate": evaluate_short}


# === figures ===


def new_figure(rows: int, columns: int, title: str, size: tuple[float, float] = (5.5, 2.6)) -> tuple[Any, Any]:
    import textwrap

    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a file's name is a $
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained",
                                squeeze=False)
    figure.suptitle(textwrap.fill(title, int(10 * size[0] * columns)))  # so many letters are as wide as the picture
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt
    with replacing(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters that its font lacks become boxes
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def show_mel(figure: Any, axis: Any, decibels: Tensor, title: str, low: float, high: float, colours: str) -> None:
    """One mel spectrogram [M T] in dB, time in seconds, frequency in Hz on the mel scale."""
    bins = len(decibels)
    image = axis.imshow(decibels.cpu(), origin="lower", aspect="auto", vmin=low, vmax=high, cmap=colours,
                        extent=(0, decibels.shape[1] * HOP / SAMPLE_RATE, 0, bins))
    ticks = (100, 250, 500, 1000, 2000, 4000)
    shares = [math.log1p(f / 700) / math.log1p(SAMPLE_RATE / 2 / 700) for f in ticks]  # of a scale of M + 1 steps
    axis.set_yticks([share * (bins + 1) - 0.5 for share in shares], [f"{f:,}" for f in ticks])
    axis.set(title=title, xlabel="s", ylabel="Hz")
    figure.colorbar(image, ax=axis, label="dB")


def comparison_figure(path: Path, title: str, columns: list[tuple[str, Tensor, Tensor]], model: SoundFamily) -> None:
    """Per column (name, original, regenerated waveform [L]): both waveforms, a close-up, and the spectrograms."""
    figure, axes = new_figure(5, len(columns), title)
    for (name, *pair), (top, close, *panels) in zip(columns, axes.T):
        both = torch.stack(pair)[:, :4 * CLIP]  # a picture of more than 20 s shows nothing
        length = both.shape[1]
        loudest = int(F.avg_pool1d(both[:1].abs(), HOP, HOP).argmax()) * HOP if length >= HOP else 0
        seconds, part = np.arange(length) / SAMPLE_RATE, slice(max(0, loudest - 240), loudest + 240)
        top.plot(seconds, both[0], linewidth=0.9, label="original")
        top.plot(seconds, both[1] - both[0], linewidth=0.9, label="regenerated minus original")  # not one behind it
        close.plot(seconds[part], both[0, part], linewidth=3, alpha=0.4, label="original")
        close.plot(seconds[part], both[1, part], linewidth=0.9, color="black", label="regenerated")
        for axis, what in ((top, f"{name}, 16 kHz mono"), (close, "its loudest 30 ms")):
            axis.set(xlabel="s", ylabel="amplitude", title=what)
            axis.legend(loc="lower right", ncols=2, fontsize=8)
        both = F.pad(both, (0, -length % HOP)).to(model.preprocessor.mean.device)
        original, estimate = 10 / math.log(10) * model.preprocessor.log_mel(both).cpu()
        high = original.max().item()
        show_mel(figure, panels[0], original, f"{name}: original", high - 75, high, "magma")
        show_mel(figure, panels[1], estimate, "regenerated", high - 75, high, "magma")
        show_mel(figure, panels[2], estimate - original, "regenerated minus original", -20, 20, "RdBu_r")
    save_figure(figure, path)


SHOWN = 100  # most sounds in one picture


def strip_of_sounds(path: Path, title: str, model: ShortSoundFamily, sounds: Tensor, names: Sequence[str]) -> None:
    """Spectrograms of short sounds [N L], ten in a row, of the range that the model knows"""
    width = min(10, len(sounds))
    figure, axes = new_figure(-(-len(sounds) // width), width, title, (1.5, 1.7))
    pictures = torch.cat([model.picture(part.to(model.top.device)).cpu() for part in sounds.split(100)])
    for axis, picture, name in itertools.zip_longest(axes.flat, pictures[:, 0], names):
        axis.axis("off")
        if picture is not None:
            axis.imshow(picture.numpy(), origin="lower", aspect="auto", vmin=-1, vmax=1, cmap="magma")
            axis.set_title(name[:14], fontsize=9)
    save_figure(figure, path)


def draw_curves(trainer: Trainer) -> None:
    """training_curves.png: the loss, and each held-out figure, over epochs."""
    epochs = [r for r in trainer.history if "epoch" in r]
    steps = [(r["step"] / trainer.steps_per_epoch, r["loss"]) for r in trainer.history if "epoch" not in r]
    names = [name for name in epochs[-1] if name.startswith(("val_", FRECHET, "label_agreement"))]
    figure, axes = new_figure(1, 1 + len(names), title_of(trainer.model), (4.6, 3.6))
    curves = {"training loss": steps}
    for name in names:
        curves[f"held-out {name.removeprefix('val_')}" if name.startswith("val_") else name] = [
            (r["epoch"], r[name]) for r in epochs if r.get(name) is not None]
    for axis, (label, points) in zip(axes.flat, curves.items()):
        axis.plot(*zip(*points), linewidth=0.8, marker="o" if len(points) < 50 else None, markersize=3)  # 1 is no line
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
    save_figure(figure, trainer.results / "training_curves.png")


def title_of(model: Family, *more: str) -> str:
    return " · ".join([family_name(type(model)), *([model.rate_text()] if isinstance(model, SoundFamily) else []),
                       f"trained on {model.data.title}", *more])


# === subject ===


class BetweenEpochs:
    """What is drawn and made audible after an epoch; the figures are those of `validate`."""

    def __init__(self, model: SoundFamily, data: AudioData) -> None:
        self.data, self.remembered = data, {}
        self.notes = []
        if empty := int((model.preprocessor.filters.amax(0) == 0).sum()):
            self.notes.append(f"warning: {empty} of {model.config.n_mels} mel bands are narrower than the transform "
                              "resolves and stay empty: they hold no sound; use fewer --n_mels")

    def measure(self, _trainer: Trainer, _epoch: int) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def draw(self, trainer: Trainer, epoch: int) -> None:
        """Two test clips as the averaged weights of this epoch give them back: WAV files and a picture, so that
        progress can be heard. After the last epoch also under the names of the finished model."""
        model, last = trainer.averaged, epoch == trainer.config.epochs
        if not (last or epoch in (1, 5) or epoch % 10 == 0):
            return
        draw_curves(trainer)
        clips = fixed_clips(self.data.test or self.data.valid, 64)
        loud = sorted(clips, key=lambda clip: -float(cut(*clip).square().mean()))
        chosen = loud[:1] + next(([c] for c in loud if c[0].name != loud[0][0].name), loud[1:2])
        columns, folder, stamp = [], trainer.results / "progress", f"epoch_{epoch:03d}"
        for i, (track, start) in enumerate(chosen):
            audio = cut(track, start)[:len(track.audio) - start]
            estimate = as_loud(model.regenerate(audio), audio.square().mean().sqrt().item())
            write_wav(folder / f"{stamp}_{i}.wav", estimate)
            if last:
                write_wav(trainer.results / f"audio_reconstructed_{i}.wav", estimate)
                write_wav(trainer.results / f"audio_original_{i}.wav", audio)
            columns.append((f"{track.name[:24]} ({track.stem})", audio, estimate))
        title = title_of(model, f"epoch {epoch}")
        comparison_figure(folder / f"spectrogram_{stamp}.png", title, columns, model)
        if last:
            comparison_figure(trainer.results / "spectrogram_comparison.png", title, columns, model)


class BetweenDrawing:
    """What happens between the epochs of the models of short sounds: averaged weights draw, which is made audible after
    epochs 1, 5, 10 ... and measured as often as costs a tenth of training."""

    def __init__(self, command: Command, model: ShortSoundFamily, data: ShortSounds, world: World) -> None:
        self.data, self.remembered, self.notes, self.net, self.epochs = data, {}, [], None, model.config.epochs
        if not model.can_sample or not world.main:
            return
        options, run = command.options(MeasureOptions), (command.state or {}).get("run", {})
        earlier = run.get("feature_net_sha256")
        self.net, reason = find_feature_net(options, model.data, world.device)
        if self.net and earlier not in (None, self.net.digest):
            self.net, self.remembered = None, {"feature_net_sha256": earlier}
            reason = "the run so far was measured by another classifier"
        if self.net is None:
            self.notes.append(f"no {FRECHET} while training: {reason}")
            return
        self.remembered = {"feature_net": self.net.name, "feature_net_sha256": self.net.digest}
        self.count = options.eval_samples or min(300, len(data.test))
        passes = self.count * model.describe_sampling()["network_evaluations"]
        self.every = math.ceil(passes / (EVALUATION_SHARE * 3 * len(data.train)))  # a training step is about 3 passes
        self.reference, real = (self.net(part[some_rows(part, self.count)]) for part in (data.test, data.train))
        self.floors = {f"real_{k}": v for k, v in measure(real, self.reference, self.net, quick=True)[0].items()
                       if not k.endswith("_std")}
        self.notes.append(f"every {self.every} epoch(s) and after the last: {self.count} sounds measured against as "
                          f"many test sounds by {self.net.describe()}")

    def measure(self, trainer: Trainer, epoch: int) -> dict[str, Any]:
        if self.net is None or (epoch % self.every and epoch != self.epochs):
            return {}
        model = trainer.averaged
        labels = proportional_labels(model.data, self.count, model.labelled)
        found = self.net(generate_all(model, labels, self.count, 64, f"measuring epoch {epoch}"))
        scores, _ = measure(found, self.reference, self.net, quick=True)
        if labels is not None:
            scores["label_agreement"] = (found.logits.argmax(1) == labels).float().mean().item()
        key = f"{FRECHET}_{self.net.name}"
        say(f"{self.count} sounds of epoch {epoch}: " + ", ".join(
            f"{k} {scores[k]:.4g}" + (f" (real {self.floors[f'real_{k}']:.4g})" if f"real_{k}" in self.floors else "")
            for k in (key, "label_agreement") if scores.get(k) is not None))
        return scores | self.floors | self.remembered | {"eval_samples": self.count}

    def draw(self, trainer: Trainer, epoch: int) -> None:
        model, last = trainer.averaged, epoch == self.epochs
        if not (last or epoch in (1, 5) or epoch % 10 == 0):
            return
        draw_curves(trainer)
        if model.can_sample:
            labels, names = pick_labels(None, model)
            names = names[:20]
            sounds, folder = generate_all(model, labels, len(names), 64), trainer.results / "progress"
            rate = model.data.sample_rate
            write_wav(folder / f"epoch_{epoch:03d}.wav", in_a_row(sounds, rate), rate)
            for path in [folder / f"epoch_{epoch:03d}.png"] + [trainer.results / "drawn_sounds.png"] * last:
                strip_of_sounds(path, title_of(model, f"epoch {epoch}"), model, sounds, names)


class Subject:
    """What the machine room knows of sound."""
    format = "audio_gen/1"
    dataset, stand_ins = "musdb", ("synthetic",)
    preferred = ("codec", "autoencoder", "vae")  # the first sounds best by every measure (RESULTS.md)
    unit, log_every, shown = "clip", 10, ("val_",)
    outputs = ("metrics.jsonl", "training_curves.png", "progress", "spectrogram_comparison.png", "evaluation.json",
               "audio_reconstructed_0.wav", "audio_reconstructed_1.wav", "audio_original_0.wav", "audio_original_1.wav",
               "inference.json", "inference_comparison.png", "drawn_sounds.png")

    def shipped(self, key: str, dataset: str | None = None) -> Path:
        short = issubclass(FAMILIES[key], ShortSoundFamily)
        return HERE / "pretrained" / FILE_NAME.format(f"{key}_{dataset or 'spoken_digits'}" if short else key)

    def options(self, command: Command) -> Any:
        """Data flags; to look at a model, those of its run unless others were given: it may be measured on other data
        than its own. One without effect is an error."""
        given, kind = command.given, FAMILIES[command.key].data_options[command.mode]
        run = command.state.get("run", {}) if command.mode == "evaluate" else {}
        if given.get("dataset", run.get("dataset")) != run.get("dataset"):
            run = {}
        run = {n: Path(value) if n.endswith("_root") else value for n, value in run.items() if value is not None}
        options = kind(**known_fields(kind, run | given))
        if command.state and command.mode != "evaluate":
            return options
        for name, datasets in {"musdb_root": ("musdb",), "musdb": ("musdb",), "num_samples": ("synthetic",),
                               "data_root": ("folder",), "stem": ("musdb", "synthetic")}.items():
            if name in given and options.dataset not in datasets:
                raise UserError(f"--{name} belongs to --dataset {' or '.join(datasets)}", 2)
        if "musdb" in given and "prepare_data" not in given:
            raise UserError("--musdb says what --prepare_data downloads: give both", 2)
        return options

    def load(self, command: Command, world: World) -> AudioData | ShortSounds:
        """Rank 0 first: the others find its cache."""
        if issubclass(FAMILIES[command.key], ShortSoundFamily):
            return load_short(command.options(ShortSoundOptions))
        options = self.options(command)
        if not world.main:
            world.wait()
        data = DATASETS[options.dataset](options, ("test",) if command.mode == "evaluate" else SPLITS)
        if getattr(options, "extra_root", None):
            data.add(options.extra_root)
        if world.main:
            world.wait()
        return data

    def prepare(self, command: Command, world: World) -> int:
        """--prepare_data: fetch what is missing, read everything once into the cache."""
        short = issubclass(FAMILIES[command.key], ShortSoundFamily)
        options = command.options(ShortSoundOptions) if short else self.options(command)
        root = (options.data_root if short else options.musdb_root) or HERE / "data" / {"musdb": "musdb18"}.get(
            options.dataset, options.dataset)
        kind = getattr(options, "musdb", None)
        fetched = {"musdb": lambda: download_musdb(kind or "sample", root),
                   "spoken_digits": lambda: download_digits(root), "speech_commands": lambda: download_commands(root)}
        if world.main and options.dataset in fetched and (kind or not (options.data_root or getattr(
                options, "musdb_root", None))):
            fetched[options.dataset]()
        say(f"{self.load(command, world).describe()}: ready")
        return 0

    def between(self, command: Command, model: Family, data: Any, world: World) -> BetweenEpochs | BetweenDrawing:
        return BetweenDrawing(command, model, data, world) if isinstance(model, ShortSoundFamily) else \
            BetweenEpochs(model, data)

    def infer(self, command: Command, world: World) -> int:
        return FAMILIES[command.key].actions["infer"](command, world)

    def evaluate(self, command: Command, world: World) -> int:
        return FAMILIES[command.key].actions["evaluate"](command, world)


SUBJECT = Subject()


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
