#!/usr/bin/env python3
"""Regenerate music from a few numbers, and honestly measure how well: one file, no framework.

    python audio_gen.py --dataset synthetic                     train an autoencoder, no download
    python audio_gen.py --mode infer --input song.wav           give a file back (shipped weights if none were trained)
    python audio_gen.py --mode evaluate                         SDR, SNR, PESQ ... between their floors and ceilings

Read top to bottom; `grep '^# ===' audio_gen.py` prints this table of contents:
    plumbing, data, signal path, building blocks, autoencoder, variational autoencoder, waveform variational
    autoencoder, registry, metrics, measuring, trainer, regeneration and its figures, command line

Letters for shapes: B batch, L samples, M mel bins, T frames, Z latent width, K pairs of a sparse code, R rows.
Sound is mono at 16 kHz, float in [-1, 1]; a clip has 81,920 samples (5.12 s) in 256 frames. The order of arguments of
every metric is (estimate, reference).

References
    [Aharon06]   Aharon, Elad, Bruckstein: K-SVD: An Algorithm for Designing Overcomplete Dictionaries, 2006
    [Gray76]     Gray, Markel: Distance Measures for Speech Processing (log-spectral distance), 1976
    [Griffin84]  Griffin, Lim: Signal Estimation from Modified Short-Time Fourier Transform, 1984
    [He16]       He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, 2016
    [Kingma14]   Kingma, Welling: Auto-Encoding Variational Bayes, 2014
    [Kingma16]   Kingma et al.: Improved Variational Inference with Inverse Autoregressive Flow (free bits), 2016
    [Lee01]      Lee, Seung: Algorithms for Non-negative Matrix Factorization, 2001
    [LeRoux19]   Le Roux, Wisdom, Erdogan, Hershey: SDR - Half-baked or Well Done?, 2019
    [Lewicki00]  Lewicki, Sejnowski: Learning Overcomplete Representations, 2000
    [Mallat93]   Mallat, Zhang: Matching Pursuits with Time-Frequency Dictionaries, 1993
    [Perraudin13] Perraudin, Balazs, Sondergaard: A Fast Griffin-Lim Algorithm, 2013
    [Princen87]  Princen, Johnson, Bradley: Subband/Transform Coding Based on Time Domain Aliasing Cancellation, 1987
    [Prusa17]    Prusa, Balazs, Sondergaard: A Noniterative Method for Reconstruction of Phase from STFT Magnitude, 2017
    [Rafii17]    Rafii, Liutkus, Stoeter, Mimilakis, Bittner: The MUSDB18 Corpus for Music Separation, 2017
    [Rybkin21]   Rybkin, Daniilidis, Levine: Simple and Effective VAE Training with Calibrated Decoders, 2021
    [Taal11]     Taal, Hendriks, Heusdens, Jensen: An Algorithm for Intelligibility Prediction (STOI), 2011
    [Vincent06]  Vincent, Gribonval, Fevotte: Performance Measurement in Blind Audio Source Separation, 2006
    [Yamamoto20] Yamamoto, Song, Kim: Parallel WaveGAN (multi-resolution STFT distance), 2020
"""
from __future__ import annotations

import abc
import argparse
import contextlib
import dataclasses
import errno
import hashlib
import heapq
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import stat
import sys
import textwrap
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent

SAMPLE_RATE = 16_000  # Hz
HOP = 320  # samples between frames: 20 ms
WINDOW = 1024  # samples of one analysis window
FRAMES = 256  # frames of one clip
CLIP = HOP * FRAMES  # samples of one clip: 5.12 s
STEMS = ("mixture", "drums", "bass", "other", "vocals")  # the order of the streams in a MUSDB18 file

# === plumbing ===
# >>> shared plumbing: the same lines stand in both scripts of this project, so that each runs alone


class UserError(Exception):
    """Something the user can mend. Printed as one line without a traceback; `code` is the exit status."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(" ".join(message.splitlines()))  # what it quotes may hold line breaks
        self.code = code


def first_line(error: BaseException) -> str:
    """What an exception says, fit for an error message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def seed32(*numbers: int) -> int:
    """Mix integers into one 32-bit seed. (torch's CPU generator uses only the low 32 bits of a seed, so that
    plain sums or shifts would make streams collide.)"""
    return int(np.random.SeedSequence([n & 0xFFFFFFFFFFFFFFFF for n in numbers]).generate_state(1)[0])


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`; a device that is asked for and absent is an error."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name[5:]) if ":" in name else local_rank
        if index >= count:
            raise UserError(f"--device {name}: PyTorch sees {count} CUDA device(s) here; use --device cpu or auto")
        return torch.device("cuda", index)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: no Metal device here; use --device cpu or auto")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively (emulation is slower than float32)."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and any(
            getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if native else torch.float32


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


def check_writable(folder: Path) -> None:
    """Fail now rather than after an hour of training."""
    with replacing(folder / ".write_test") as part:
        part.write_bytes(b"ok")
    (folder / ".write_test").unlink()


def write_json(path: Path, content: Any) -> None:
    """NaN and infinities are no JSON: `allow_nan=False` makes them an error instead of a broken file."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_checkpoint(path: Path, state: dict) -> None:
    """`state` holds only tensors and plain Python values, so that it can be read with `weights_only=True`."""
    buffer = io.BytesIO()  # in memory first: a full disk is then an OSError, not a crash inside the zip writer
    torch.save(state, buffer)
    with replacing(path) as part:
        part.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, version: str) -> dict:
    """Read a checkpoint of this script on the CPU without ever running code that the file may hold."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it remarks on unusual pickles before it refuses them
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"no checkpoint at {path} ({error.strerror}): train one with --mode train, or name another "
                        "file with --checkpoint") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not a plain-tensor checkpoint: it is damaged, or holds pickled Python objects "
                        "that could run code, and is not loaded; name another with --checkpoint") from None
    except Exception as error:  # damaged bytes can make the reader fail in any way
        raise UserError(f"can't read the checkpoint {path}, it is truncated or damaged ({first_line(error)}); restore "
                        "a copy or train again") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path} was not written by this script; name one of its checkpoints with --checkpoint")
    if state["format"] != version:
        raise UserError(f"{path} has format {str(state['format'])!r}, this script reads {version!r}: use the matching "
                        "version of the script, or train again")
    if missing := {"family", "config", "data", "ema", "history", "made"} - state.keys():
        raise UserError(f"{path} lacks its {', '.join(sorted(missing))}: it was altered; restore a copy or train again")
    return state


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag that the training loop looks at; a second one is immediate."""

    def __init__(self) -> None:
        self.number = 0
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        print(f"\n{signal.Signals(number).name}: saving, then stopping (again: stop at once)", file=sys.stderr)


class World:
    """The processes of one torchrun; alone without it. Every rank runs the same steps, rank 0 alone writes."""

    def __init__(self, device_name: str) -> None:
        try:
            self.rank, self.size, local = (int(os.environ.get(*pair)) for pair in
                                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
            if not 0 <= self.rank < self.size or local < 0:
                raise ValueError(f"RANK {self.rank}, LOCAL_RANK {local} of WORLD_SIZE {self.size}")
            self.device, self.main = pick_device(device_name, local), self.rank == 0
            if self.size > 1:
                torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise UserError("RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are not as torchrun sets them "
                            f"({first_line(error)}): start the script with torchrun, or unset them", 2) from None

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes: one all-reduce over one flat buffer."""
        if self.size == 1:
            return
        flat = torch.cat([t.detach().float().flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, mean in zip(tensors, (flat / self.size).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def gather(self, part: Tensor, total: int) -> Tensor:
        """Put rows `rank::size` of every process back in order: [n, ...] on each -> [total, ...] on all."""
        if self.size == 1:
            return part
        part = torch.cat([part, part.new_zeros(-(-total // self.size) - len(part), *part.shape[1:])])  # of one length
        parts = [torch.empty_like(part) for _ in range(self.size)]
        torch.distributed.all_gather(parts, part.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)[:total]

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], Any]:
    """An argparse type: an int or float in [low, high], or (low, high] with `open_low`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            float(value)  # an int of 400 digits is not a usable number either
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n' * (kind is int)} {kind.__name__}") from None
        if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
            limit = f"{'above' if open_low else 'at least'} {low:g}" + f" and at most {high:g}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {limit}")
        return value

    return parse


def progress(total: int, title: str, hidden: bool = False, **more: Any) -> Any:
    """A progress bar with rate and time left; in a log file it writes a line now and then instead of a thousand."""
    from tqdm import tqdm
    return tqdm(total=total, desc=title, disable=hidden, mininterval=0.5 if sys.stderr.isatty() else 30, **more)


def option(default: Any, group: str, text: str, kind: Any = None, choices: Sequence[str] | None = None) -> Any:
    """A config field that is also a command-line flag: the dataclass is the only place where its default stands."""
    return field(default=default, metadata={"group": group, "help": text, "type": kind, "choices": choices})


# <<< shared plumbing

# === data ===

NO_NETWORK = 3  # exit status that says "the dataset could not be downloaded", and nothing else
NO_FFMPEG = 4  # exit status that says "this dataset needs ffmpeg, which is not installed", and nothing else
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
MUSDB_ROOT, CACHE = HERE / "data" / "musdb18", HERE / "data" / "cache"
SILENCE = 1e-3  # RMS below which a crop counts as silent: -60 dB
MUSDB_FILES = {  # kind: (address, bytes, md5, what it is); None: not published
    "full": ("https://zenodo.org/records/1117372/files/musdb18.zip", 4_684_228_845, "af06762477334799bfc5abf237648207",
             "MUSDB18, 150 whole songs, 4.7 GB"),
    "sample": ("https://github.com/sigsep/sigsep-mus-db/releases/download/v0.4.0/MUSDB18-7-STEMS.zip", None, None,
               "7 seconds of each MUSDB18 song, 140 MB"),
}


class Track(NamedTuple):
    name: str
    stem: str  # one of STEMS
    audio: np.ndarray  # float16 [L], often a memory map


class AudioData:
    """Tracks in three splits that share no song."""

    def __init__(self, name: str, title: str, train: list[Track], valid: list[Track], test: list[Track]) -> None:
        self.name, self.title, self.train, self.valid, self.test = name, title, train, valid, test
        if not any(np.abs(track.audio).max() > SILENCE for track in train):
            raise UserError(f"{title}: all of its training tracks are silent; give some that sound")

    def info(self) -> dict:
        """What a model must know about its data; stored in every checkpoint. `digest` tells other data apart."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        rows = [(split, t.name, t.stem, len(t.audio)) for split, tracks in splits.items() for t in tracks]
        return {"dataset": self.name, "title": self.title, "sample_rate": SAMPLE_RATE,
                "stems": [stem for stem in STEMS if any(stem == row[2] for row in rows)],
                "tracks": {split: len(tracks) for split, tracks in splits.items()},
                "seconds": {s: round(sum(row[3] for row in rows if row[0] == s) / SAMPLE_RATE, 2) for s in splits},
                "digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}


def resample(blocks: Iterator[np.ndarray], rate: int) -> Tensor:
    """Blocks [n] at `rate` Hz -> [L] at SAMPLE_RATE, in little memory and equal to resampling in one go: each piece
    begins where input and output grids meet and is filtered together with the samples around it."""
    from torchaudio.transforms import Resample
    ratio = Fraction(rate, SAMPLE_RATE).limit_denominator(640)  # exact for all usual rates, else within 3e-6: the
    down, up = ratio.numerator, ratio.denominator  # exact filters of a rate such as 44,101 Hz would need 3 GB
    if down == up:
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *blocks]))
    filters = Resample(down, up, lowpass_filter_width=32)
    context, step = -(-filters.width // down) + 1, max(1, 480_000 // down)  # in periods of the grids
    piece = (2 * context + step) * down
    held, done, count = torch.zeros(context * down), [], 0
    for block in itertools.chain(blocks, [None]):  # None, the end: zeros, so that nothing is left behind
        count += 0 if block is None else len(block)
        held = torch.cat([held, torch.zeros(piece) if block is None else torch.from_numpy(block)])
        while len(held) >= piece:
            done.append(filters(held[:piece])[context * up:(context + step) * up].clone())
            held = held[step * down:]
    return torch.cat(done)[:-(-count * up // down)]


def read_audio(path: Path, flag: str = "--input") -> Tensor:
    """Any file that soundfile reads, any rate and channels -> float32 mono [L] at SAMPLE_RATE. `flag` has named it."""
    import soundfile
    if not path.is_file():
        raise UserError((f"{path} is a folder, not an audio file" if path.is_dir() else f"there is no file {path}")
                        + f": give audio files with {flag}")

    def blocks(file: Any) -> Iterator[np.ndarray]:
        while len(block := file.read(1 << 18, dtype="float32", always_2d=True)):
            if not np.isfinite(mono := block.mean(1)).all():
                raise UserError(f"{path} holds NaN or infinite samples: repair or remove it")
            yield mono

    try:
        with soundfile.SoundFile(path) as file:
            if not 1000 <= file.samplerate <= 1_000_000:
                raise UserError(f"{path} claims {file.samplerate} Hz: rates from 1 kHz to 1 MHz can be read")
            audio = resample(blocks(file), file.samplerate)
    except (OSError, RuntimeError, ValueError) as error:  # soundfile's own errors are RuntimeErrors
        raise UserError(f"{path} can't be read as audio ({first_line(error)}): repair or remove it, or convert it "
                        "to WAV or FLAC") from None
    if not len(audio):
        raise UserError(f"{path} holds no samples: remove it or give another file")
    return audio


def need_ffmpeg() -> None:
    if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        raise UserError("MUSDB18's .stem.mp4 files need ffmpeg: install it (sudo apt-get install ffmpeg, brew install "
                        "ffmpeg); MUSDB18-HQ's WAV files, --dataset folder and --dataset synthetic work without",
                        NO_FFMPEG)


def read_stem(path: Path, stem: str) -> Tensor:
    """One of the five streams of a .stem.mp4, by the musdb package -> float32 mono [L] at SAMPLE_RATE."""
    need_ffmpeg()
    from musdb import MultiTrack
    number = STEMS.index(stem)
    try:
        track = MultiTrack(path=str(path), name=path.name.removesuffix(".stem.mp4"), stem_id=0)
        streams = track.info.audio_stream_idx()
        if len(streams) != len(STEMS):
            raise UserError(f"{path} has {len(streams)} audio stream(s), a MUSDB18 file has {len(STEMS)} "
                            f"({', '.join(STEMS)}): remove it")
        audio, whole = track.load_audio(str(path), streams[number]), track.info.duration(number) * track.rate
    except Exception as error:  # ffmpeg, ffprobe and stempeg fail in many ways; what ffprobe says comes last
        if isinstance(error, UserError):
            raise
        said = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").split("\n")
        raise UserError(f"{path} can't be decoded, it is truncated or damaged ({['', *filter(None, said)][-1][-99:]}): "
                        "remove it or download it again") from None
    if not len(audio) or len(audio) < whole - 1024:  # a frame of AAC
        raise UserError(f"{path} is truncated, its {stem} has {len(audio)} of {whole:.0f} samples: remove it or "
                        "download it again")
    return resample(iter([audio.reshape(len(audio), -1).mean(1).astype(np.float32)]), track.rate)


def cache_read(place: Path, source: list[int]) -> np.ndarray | None:
    """The decoded samples, unless they are missing, torn or made from another version of their source."""
    with contextlib.suppress(OSError, ValueError):
        with open(place, "rb") as file:
            head = json.loads(file.read(512))
        audio = np.memmap(place, np.float16, "r", 512)
        if head == {"source": source, "samples": len(audio), "crc32": zlib.crc32(audio)}:
            return audio
    return None


def cache_write(place: Path, source: list[int], audio: np.ndarray) -> np.ndarray:
    """Store float16 [L] behind a header of 512 bytes and return it as a memory map."""
    head = json.dumps({"source": source, "samples": len(audio), "crc32": zlib.crc32(audio)}).encode()
    with replacing(place) as part, open(part, "wb") as file:
        file.write(head.ljust(512))
        file.write(audio.data)
    return np.memmap(place, np.float16, "r", 512)


def load_tracks(entries: dict[str, list[tuple[str, str, Path]]], cache: Path | None) -> dict[str, list[Track]]:
    """Split -> [(name, stem, file)] becomes split -> tracks, each file decoded once. Without a cache that can be
    written, the samples are kept in memory."""

    def load(entry: tuple[str, str, Path]) -> Track:
        nonlocal cache
        name, stem, path = entry
        if not path.is_file():
            raise UserError(f"there is no file {path}: complete the dataset")
        source = [path.stat().st_size, path.stat().st_mtime_ns]
        key = hashlib.sha256(f"1 {path.resolve()} {stem} {SAMPLE_RATE}".encode()).hexdigest()[:24]
        audio = cache_read(cache / f"{key}.f16", source) if cache else None
        if audio is None:
            audio = read_stem(path, stem) if path.name.endswith(".stem.mp4") else read_audio(path)
            audio = (audio / audio.abs().max().clamp(min=1)).half().numpy()  # what exceeds full scale keeps its shape
            try:
                audio = cache_write(cache / f"{key}.f16", source, audio) if cache else audio
            except UserError as error:
                if cache:  # said once
                    print(f"going on without a cache: {error}", file=sys.stderr)
                cache = None
        return Track(name, stem, audio)

    flat = [entry for rows in entries.values() for entry in rows]
    with progress(len(flat), "reading audio", delay=1) as bar, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        tracks = []
        for track in pool.map(load, flat):
            tracks.append(track)
            bar.update()
    found = iter(tracks)
    return {split: [next(found) for _ in rows] for split, rows in entries.items()}


def by_hash(names: Iterable[str]) -> list[str]:
    """In an order that looks random and depends on each name alone: who is held out hardly changes with the rest."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def audio_files(folder: Path, flag: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: {flag} takes the folder with your audio files")
    found = sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"{folder} holds no audio files ({', '.join(sorted(AUDIO_SUFFIXES))}): {flag} takes another")
    return found


def extra_entries(given: dict, taken: Iterable[Path]) -> list[tuple[str, str, Path]]:
    """The files of --extra_root, for training only: none of them may be held out elsewhere."""
    root = given.get("extra_root")
    files = audio_files(root, "--extra_root") if root else []
    if twice := {p.resolve() for p in files} & {p.resolve() for p in taken}:
        raise UserError(f"--extra_root holds {min(twice)}, which belongs to the dataset already: name another folder")
    return [(f"extra/{p.relative_to(root)}", "mixture", p) for p in files]


class MUSDBDataset(AudioData):
    """MUSDB18 [Rafii17] or MUSDB18-HQ's WAV files: `train/` and `test/` with *.stem.mp4 files, or one folder for
    each song. Each stem is a track of its own. Validation: the musdb package's list, else a tenth of `train/`."""

    def __init__(self, given: dict) -> None:
        root, stem = given.get("musdb_root", MUSDB_ROOT), given.get("stem", "all")
        train, test = self.songs(root / "train"), self.songs(root / "test")
        if len(train) < 2 or not test:
            free = not root.exists() or root.is_dir() and not any(root.iterdir())  # a download adds to nothing else
            remedy = "get them with --prepare_data --musdb sample" if free else "add some"
            raise UserError(f"{root} holds {len(train)} song(s) in train/ and {len(test)} in test/, needed are 2 and 1 "
                            f"(*.stem.mp4, or folders with mixture.wav ...): {remedy}, name another folder with "
                            "--musdb_root, or use --dataset synthetic")
        if both := train.keys() & test.keys():
            raise UserError(f"{root}: {min(both)!r} is in train/ and in test/; remove one of them")
        import yaml
        # The package can't be imported without ffmpeg, so that its list is read as a file.
        package = Path(importlib.util.find_spec("musdb").origin).parent
        listed = yaml.safe_load((package / "configs" / "mus.yaml").read_text())["validation_tracks"]
        held_out = train.keys() & set(listed) or set(by_hash(train)[:max(1, len(train) // 10)])
        rows = {split: [(name, s, path if path.is_file() else path / f"{s}.wav")
                        for name, path in named.items() if (name in held_out) == (split == "valid")
                        for s in (STEMS if stem == "all" else (stem,))]
                for split, named in (("train", train), ("valid", train), ("test", test))}
        rows["train"] += extra_entries(given, [row[2] for part in rows.values() for row in part])
        super().__init__("musdb", "MUSDB18" + f" ({stem})" * (stem != "all"),
                         **load_tracks(rows, given.get("cache", CACHE)))

    @staticmethod
    def songs(folder: Path) -> dict[str, Path]:
        """Name -> .stem.mp4 file, or folder with WAV files."""
        files = {p.name.removesuffix(".stem.mp4"): p for p in sorted(folder.glob("[!.]*.stem.mp4"))}
        return files or {p.parent.name: p.parent for p in sorted(folder.glob("*/mixture.wav"))}


class FolderDataset(AudioData):
    """A folder of one's own audio files. `train/` and `test/` inside it are taken as the split; otherwise a tenth is
    held out for testing. Another tenth validates. Files that differ only in their suffix stay together."""

    def __init__(self, given: dict) -> None:
        root = given.get("data_root")
        if root is None:
            raise UserError("--dataset folder needs --data_root DIR, the folder with your audio files", 2)
        files = {p: str(p.relative_to(root).with_suffix("")) for p in audio_files(root, "--data_root")}
        if (root / "train").is_dir() and (root / "test").is_dir():
            test = {song for song in files.values() if song.startswith("test" + os.sep)}
            order = by_hash({song for song in files.values() if song.startswith("train" + os.sep)})
        else:
            order = by_hash(set(files.values()))
            test, order = set(order[:max(1, len(order) // 10)]), order[max(1, len(order) // 10):]
        if len(order) < 2 or not test:
            raise UserError(f"{root} holds {len(order)} file(s) to train on and {len(test)} to test with; needed are 2 "
                            "and 1, of different names: add some")
        valid = set(order[:max(1, round(len(order) / 10))])
        rows = {split: [(str(p.relative_to(root)), "mixture", p) for p, song in files.items() if song in songs]
                for split, songs in (("train", set(order) - valid), ("valid", valid), ("test", test))}
        rows["train"] += extra_entries(given, files)
        super().__init__("folder", root.resolve().name, **load_tracks(rows, given.get("cache", CACHE)))


class SyntheticMUSDBDataset(AudioData):
    """Made-up songs of one clip each, with a fixed seed of their own: no download. `num_samples` counts the clips,
    which take turns in being one of MUSDB18's stems."""

    SCALE = 2 ** (np.array([0, 4, 7]) / 12)  # a major triad

    def __init__(self, given: dict) -> None:
        count, stem = given.get("num_samples", 100), given.get("stem", "all")
        if count < 3:
            raise UserError(f"--num_samples {count}: needed are 3, a clip each to train, to validate and to test", 2)
        kinds, tenth = STEMS if stem == "all" else (stem,), max(1, count // 10)
        turns = [kinds[n % len(kinds)] for n in range(count)]
        tracks = [Track(f"synthetic {n}", turn, self.clip(n, turn)) for n, turn in enumerate(turns)]
        extra = load_tracks({"train": extra_entries(given, ())}, given.get("cache", CACHE))["train"]
        super().__init__("synthetic", "synthetic stems", tracks[2 * tenth:] + extra, tracks[tenth:2 * tenth],
                         tracks[:tenth])

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


DATASETS: dict[str, Callable[[dict], AudioData]] = {
    "musdb": MUSDBDataset, "synthetic": SyntheticMUSDBDataset, "folder": FolderDataset}


def fetch(url: str, part: Path, size: int | None) -> None:
    """Download into `part`, going on where an earlier attempt was cut; gives up after five that brought nothing."""
    idle, reason = 0, ""
    while idle < 5:
        have = before = part.stat().st_size if part.exists() else 0
        if have == size:
            return
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "audio_gen.py"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                have = have if answer.status == 206 else 0  # a server that does not know ranges sends all of it
                rest = answer.headers["Content-Length"]
                total = have + int(rest) if rest else size
                if total and shutil.disk_usage(part.parent).free < 2 * total - have:  # the archive and what is in it
                    raise UserError(f"{part.parent} needs {(2 * total - have) / 1e9:.1f} GB free to fetch and unpack "
                                    "MUSDB18: free some space, or name another folder with --musdb_root")
                with open(part, "ab" if have else "wb") as file, progress(
                        total, "downloading", initial=have, unit="B", unit_scale=True) as bar:
                    while chunk := answer.read(1 << 18):
                        file.write(chunk)
                        bar.update(len(chunk))
            if total is None or part.stat().st_size >= total:
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # nothing beyond what is there: the check that follows will tell
                return
            reason = f"{url}: {error}"
            idle = 9 if error.code in (401, 403, 404, 410) else idle
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = first_line(error)
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EACCES):
                raise UserError(f"can't write {part} ({error.strerror}): free some space, or name another folder with "
                                "--musdb_root") from None
        idle = 0 if part.exists() and part.stat().st_size > before else idle + 1
        time.sleep(2 ** idle / 2 if 0 < idle < 5 else 0)
    raise UserError(f"MUSDB18 can't be downloaded ({reason.strip('<>')}): connect to a network (the next run goes on "
                    "where this one ended), name a folder that has it with --musdb_root, or use --dataset synthetic",
                    NO_NETWORK)


def unpack(part: Path, folder: Path) -> None:
    """The songs of a MUSDB18 archive -> folder/train, folder/test. zipfile compares the checksum of each."""
    with zipfile.ZipFile(part) as archive:
        for member in archive.infolist():
            name = PurePosixPath(member.filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts or stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"the archive holds {member.filename!r}, which leads out of its folder: it is not "
                                "MUSDB18's, nothing was unpacked; get it from elsewhere")
        for member in archive.infolist():
            name = PurePosixPath(member.filename)
            if name.parent.name in ("train", "test") and fnmatch(name.name, "[!.]*.stem.mp4"):
                target = folder / name.parent.name / name.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise zipfile.BadZipFile("no songs in train/ and test/")


def download_musdb(kind: str, root: Path) -> None:
    """Put MUSDB18 (`full`, or the `sample` excerpts) into `root`, whole or not at all; what is there already is kept,
    except that `full` takes the place of a sample downloaded earlier. MUSDB_MIRROR names another server's folder."""
    url, size, md5, what = MUSDB_FILES[kind]
    root = root.resolve()
    part, fresh, old = (root.parent / f".{root.name}.{end}" for end in (f"{kind}.zip.part", "fresh", "old"))
    there, mark = bool(MUSDBDataset.songs(root / "train")), root / ".downloaded"
    if there and not (kind == "full" and mark.is_file() and mark.read_text() == "sample"):
        print(f"MUSDB18: using what is in {root}", flush=True)
        return
    if not there and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} holds no MUSDB18 but other things: move it away, or name another with --musdb_root")
    need_ffmpeg()
    check_writable(root.parent)
    print(f"MUSDB18: downloading {what}, into {root}", flush=True)
    if os.environ.get("MUSDB_MIRROR"):
        url = f"{os.environ['MUSDB_MIRROR'].rstrip('/')}/{url.rsplit('/', 1)[1]}"
    fetch(url, part, size)
    try:
        with open(part, "rb") as file:
            digest = hashlib.md5()
            while md5 and (block := file.read(1 << 20)):
                digest.update(block)
        if md5 and digest.hexdigest() != md5:
            raise zipfile.BadZipFile("its md5 differs")
        shutil.rmtree(fresh, ignore_errors=True)
        unpack(part, fresh)
        (fresh / ".downloaded").write_text(kind)
        if there:
            os.rename(root, old)
        os.rename(fresh, root)  # onto nothing or onto an empty folder
        shutil.rmtree(old, ignore_errors=True)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        part.unlink()
        raise UserError(f"the downloaded MUSDB18 archive is damaged ({first_line(error)}) and was deleted: run this "
                        "again", NO_NETWORK) from None
    except OSError as error:
        raise UserError(f"can't unpack MUSDB18 into {root} ({error.strerror or error}): free some space, or name "
                        "another folder with --musdb_root") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    part.unlink()


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


class Batch(NamedTuple):
    audio: Tensor  # [B CLIP]
    frames: Tensor  # [B] int64: how many frames hold sound; the rest is zeros that pad a shorter track
    draw: Draw | None
    progress: float = 1.0  # how much of the run is behind us, for what is warmed up


def cut(track: Track, start: int, length: int = CLIP) -> Tensor:
    """float32 [length], or shorter where the track ends"""
    return torch.from_numpy(np.array(track.audio[start:start + length])).float()  # torch converts 3 times as fast


def stretched(crop: Tensor, speed: float) -> Tensor:
    """The crop played at another speed, cut to at most a clip: linear interpolation, enough for learning"""
    if speed == 1:
        return crop
    return F.interpolate(crop[None, None], size=max(1, int(len(crop) / speed)), mode="linear")[0, 0, :CLIP]


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
    for row, (candidates, (*gains, sign, sign2, mix)) in enumerate(zip(places, others)):
        taken = -1
        for layer, flip in enumerate((sign, sign2)[:2 if mix < 0.5 else 1]):
            crop = None
            for u, v in candidates[layer]:
                index = int(np.searchsorted(edges, u * edges[-1], "right"))
                if index == taken:
                    continue
                length = math.ceil(CLIP * speeds[row, layer].item())
                crop = cut(tracks[index], int(v * (max(len(tracks[index].audio) - length, 0) + 1)), length)
                if torch.dot(crop, crop) > SILENCE ** 2 * len(crop):
                    break
            if crop is not None:  # there may be no other track
                crop = stretched(crop, speeds[row, layer].item())
                gain = 10 ** ((15 * gains[layer] - 12) / 20)
                audio[row, :len(crop)].add_(crop, alpha=gain if flip < 0.5 else -gain)
                frames[row] = max(int(frames[row]), -(-len(crop) // HOP))
                taken = index
    audio /= audio.abs().amax(1, keepdim=True).clamp(min=1)
    return Batch(audio.to(draw.device), frames.to(draw.device), draw)


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
    return Batch(audio.to(device), torch.tensor([-(-len(crop) // HOP) for crop in crops], device=device), None)

# === signal path ===

PHASES = ("griffinlim", "pghi", "original")  # how a mel spectrogram becomes sound again; the last is an upper bound
UPPER_BOUND = "the input's own: an upper bound, not the model's result"  # which is said wherever "original" is
MEL_FLOOR = 1e-8  # added to mel power before the logarithm: -80 dB of a full-scale sine, and what silence looks like
BLOCK = 256  # frames transformed at a time on CPUs: what fits the cache takes a third of the time
INVERSE_STEPS = 16  # from mel to frequencies: 50 would add 0.2 dB of SDR


class AudioPreprocessor(nn.Module):
    """Waveform [B L] in [-1, 1] to log-mel spectrogram [B M T] and back, with T = L / HOP.

    log-mel = ln(mel power + MEL_FLOOR), where a full-scale sine has power 1. It is standardised with the training set's
    mean of each mel bin and one deviation for all, which `fit` takes and the checkpoint keeps.
    """

    def __init__(self, n_mels: int = 128) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks
        with warnings.catch_warnings():  # it would name an argument that nobody here has given
            warnings.simplefilter("ignore")
            filters = melscale_fbanks(WINDOW // 2 + 1, 0.0, SAMPLE_RATE / 2, n_mels, SAMPLE_RATE, None, "htk")
        filters[0, 0] = 1  # no triangle holds 0 Hz, but real recordings hold much below 8 Hz, which SDR would count
        self.bands = []  # 16 filters each, and the frequencies where they are not zero: an eighth of the products
        for first in range(0, n_mels, 16):
            used = filters[:, first:first + 16].any(1).nonzero().flatten().tolist() or [0]
            self.bands.append((slice(first, first + 16), slice(used[0], used[-1] + 1)))
        window = torch.hann_window(WINDOW)
        self.register_buffer("window", window * (2 / window.sum()), persistent=False)
        self.register_buffer("filters", filters, persistent=False)  # [513 M], triangles of height 1
        self.register_buffer("mean", torch.zeros(n_mels))
        self.register_buffer("std", torch.ones(()))

    def _spectra(self, audio: Tensor) -> Iterator[Tensor]:
        """[B L] -> blocks of the spectrogram, [... 513] complex: in all B * L / HOP frames, clip by clip"""
        edge = (WINDOW - HOP) // 2
        frames = F.pad(audio, (edge, edge)).unfold(-1, WINDOW, HOP)
        blocks = itertools.chain(*(clip.split(BLOCK) for clip in frames)) if audio.device.type == "cpu" else [frames]
        for block in blocks:
            yield torch.fft.rfft(block * self.window).flatten(0, -2)

    def stft(self, audio: Tensor) -> Tensor:
        """[B L], L a multiple of HOP -> complex [B 513 T]: frame t is centred on sample (t + 1/2) HOP."""
        return torch.cat(list(self._spectra(audio))).view(len(audio), -1, WINDOW // 2 + 1).mT

    def istft(self, spectrum: Tensor) -> Tensor:
        """Complex [B 513 T] -> [B L = T HOP]: the inverse of `stft`, in the least-squares sense of [Griffin84]."""
        frames = torch.fft.irfft(spectrum.mT) * self.window
        return self._overlap_add(frames) / self._overlap_add(self.window.square().expand(1, *frames.shape[1:]))

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """[B T WINDOW] -> [B T HOP], in the few slices that a window has hops: 15 times as fast as F.fold"""
        count, slices = frames.shape[1], frames.split(HOP, -1)
        total = frames.new_zeros(len(frames), count + len(slices) - 1, HOP)
        for first, part in enumerate(slices):
            total[:, first:first + count, :part.shape[-1]] += part
        edge = (WINDOW - HOP) // 2
        return total.flatten(1)[:, edge:edge + count * HOP]

    def log_mel(self, audio: Tensor) -> Tensor:
        """[B L], L a multiple of HOP -> log-mel [B M T]"""
        mel = []
        for spectrum in self._spectra(audio):
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

    def magnitude(self, log_mel: Tensor) -> Tensor:
        """log-mel [B M T] -> magnitude [B 513 T] that has these mel bands: non-negative, by the multiplicative updates
        that minimise the Kullback-Leibler divergence [Lee01], from a start with the bands' own slopes. A filter that
        holds no frequency (an empty band of a fine mel scale) has no say."""
        mel = (log_mel.mT.clamp(max=10).exp() - MEL_FLOOR).clamp(min=0)  # no sound has more: only a network that errs
        spread = self.filters.T / self.filters.sum(1).clamp(min=1e-6)
        power = (mel / self.filters.sum(0).clamp(min=1e-6)) @ spread
        for _ in range(INVERSE_STEPS):
            power = power * ((mel / (power @ self.filters + 1e-20)) @ spread)
        return power.sqrt().mT

    def to_audio(self, log_mel: Tensor, length: int, phase: str = "griffinlim", original: Tensor | None = None,
                 iterations: int = 32) -> Tensor:
        """log-mel [B M T] -> waveform [B length <= T HOP]. phase="original" takes that of the waveform `original`
        [B T HOP]: an upper bound, not something a model has done."""
        magnitude = self.magnitude(log_mel)
        if phase == "original":
            return self.istft(magnitude * torch.sgn(self.stft(original)))[:, :length]
        start = pghi(magnitude) if phase == "pghi" else magnitude.to(torch.complex64)
        rows = 1 if magnitude.device.type == "cpu" else len(magnitude)  # one clip at a time fits a CPU's cache
        return torch.cat([self.griffin_lim(goal, first, iterations)[:, :length]
                          for goal, first in zip(magnitude.split(rows), start.split(rows))])

    def griffin_lim(self, magnitude: Tensor, spectrum: Tensor, iterations: int, momentum: float = 0.99) -> Tensor:
        """Fast Griffin-Lim [Perraudin13] from a first complex spectrum [B 513 T] -> waveform [B T HOP]"""
        previous = 0
        for step in range(iterations):
            current = self.stft(self.istft(spectrum))
            spectrum = magnitude * torch.sgn(current + momentum * (current - previous) if step else current)
            previous = current
        return self.istft(spectrum)


def pghi(magnitude: Tensor, tolerance: float = 0.03) -> Tensor:
    """Phase gradient heap integration [Prusa17]: magnitude [B 513 T] -> complex spectrum with a phase made for it.

    The logarithm of the magnitude of a transform with a Gaussian window gives the gradient of its phase, and a Hann
    window is nearly Gaussian. It is integrated from the loudest point outwards, the loudest neighbour first; what is
    below `tolerance` of its frame's loudest keeps phase 0 (the paper: of the whole signal's, and random phase)."""
    gamma = 0.25645 * WINDOW**2  # of the Gaussian closest to a Hann window
    log = (magnitude.mT + 1e-8).log().double()  # [B T 513]
    along_t = torch.arange(log.shape[2], device=log.device) * (2 * math.pi * HOP / WINDOW) + torch.zeros_like(log)
    along_t[:, :, 1:-1] += (log[:, :, 2:] - log[:, :, :-2]) * (HOP * WINDOW / gamma / 2)
    along_f = torch.full_like(log, -math.pi)  # a frame starts half a window before its centre
    along_f[:, 1:-1] -= (log[:, 2:] - log[:, :-2]) * (gamma / HOP / WINDOW / 2)
    loud = magnitude.mT > tolerance * magnitude.mT.amax(2, keepdim=True)
    grids = [F.pad(grid, (0, 1, 0, 1)).cpu() for grid in (-log, along_t, along_f, loud)]
    angle = [integrate(*(grid.flatten().tolist() for grid in clip), clip[0].shape[1]) for clip in zip(*grids)]
    angle = torch.tensor(angle, dtype=torch.float64).remainder(2 * math.pi).float().view(grids[0].shape)[:, :-1, :-1]
    return torch.polar(magnitude, angle.mT.to(magnitude.device))


def integrate(level: list, along_t: list, along_f: list, todo: list, width: int) -> list[float]:
    """The heap of `pghi`: the phase at each point of a grid with `width` points a frame, given as flat lists. `level`
    is minus the log-magnitude; the grid's last row and column are never `todo`, which spares looking for its edges."""
    phase, heap = [0.0] * len(level), []
    for seed in sorted(itertools.compress(range(len(level)), todo), key=level.__getitem__):
        if todo[seed]:  # the loudest point of an island: its phase is free
            todo[seed] = False
            heap.append((level[seed], seed))
        while heap:
            _, here = heapq.heappop(heap)
            for there, slope, sign in ((here - width, along_t, -0.5), (here + width, along_t, 0.5),
                                       (here - 1, along_f, -0.5), (here + 1, along_f, 0.5)):
                if todo[there]:
                    todo[there] = False
                    phase[there] = phase[here] + sign * (slope[here] + slope[there])
                    heapq.heappush(heap, (level[there], there))
    return phase


# === building blocks ===


class Conv1d(nn.Conv2d):
    """A 1-D convolution over frames, [B C 1 T] -> [B C' 1 T/stride], written as a 2-D one: only that has fast
    channels-last bfloat16 kernels on CPUs."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(inputs, outputs, (1, kernel), (1, stride), (0, (kernel - 1) // 2))


class ConvTranspose1d(nn.ConvTranspose2d):
    """The way back: [B C 1 T] -> [B C' 1 2T]"""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, (1, 4), (1, 2), (0, 1))


def zeroed(layer: nn.Module) -> nn.Module:
    """Start a residual branch at nothing, so that the network begins as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """norm, SiLU, convolution, twice, around a shortcut; [B C 1 T] stays [B C 1 T] [He16]"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1, self.conv2 = Conv1d(channels, channels), zeroed(Conv1d(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def encoder_stack(n_mels: int, width: int, stages: int) -> nn.Sequential:
    """[B M 1 256] -> [B C 1 256/2^stages]: a residual block, then a strided convolution, at each stage."""
    steps = [(ResidualBlock(width), Conv1d(width, width, 4, 2)) for _ in range(stages)]
    return nn.Sequential(Conv1d(n_mels, width), *itertools.chain(*steps), ResidualBlock(width))


def decoder_stack(n_mels: int, width: int, stages: int) -> nn.Sequential:
    """The mirror image: [B C 1 256/2^stages] -> [B M 1 256]"""
    steps = [(ConvTranspose1d(width, width), ResidualBlock(width)) for _ in range(stages)]
    return nn.Sequential(ResidualBlock(width), *itertools.chain(*steps), nn.SiLU(), zeroed(Conv1d(width, n_mels)))


def masked_mean(values: Tensor, frames: Tensor) -> Tensor:
    """Mean of [B ... T] over the first `frames` [B] frames of each clip: padding is never learned or measured."""
    mask = torch.arange(values.shape[-1], device=values.device) < frames[:, None]
    mask = mask.view(len(values), *[1] * (values.dim() - 2), -1)
    return (values * mask).sum() / (mask.sum() * values[0].numel() / values.shape[-1])


@dataclass(frozen=True)
class RunConfig:
    """Options that every family has."""
    epochs: int = option(30, "optimisation", "passes over the training set, of --crops random crops each",
                         number(int, 1))
    crops: int = option(1024, "optimisation", "random 5.12 s crops that make one epoch", number(int, 1, 1e9))
    batch_size: int = option(32, "optimisation", "clips per step, over all processes", number(int, 1, 1e6))
    learning_rate: float = option(1e-3, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    weight_decay: float = option(0.01, "optimisation", "weight decay of AdamW", number(float, 0))
    warmup_steps: int = option(50, "optimisation", "steps of linear warm-up, before the cosine", number(int, 0))
    ema_decay: float = option(0.998, "optimisation", "decay of the averaged weights, which regenerate",
                              number(float, 0, 1))
    grad_clip: float = option(1.0, "optimisation", "largest norm of a gradient", number(float, 0, open_low=True))
    save_every: int = option(200, "optimisation", "steps between checkpoints inside an epoch", number(int, 1))
    speed: float = option(0.4, "optimisation", "octaves by which training crops are at most sped up or slowed down",
                          number(float, 0, 1))
    n_mels: int = option(128, "model", "mel bins, of the model and of the metrics on them", number(int, 8, 513))
    seed: int = option(0, "run", "of everything random", number(int, 0, 2**63 - 1))


Clips = Callable[[], Iterator[Batch]]


class Family(nn.Module, abc.ABC):
    """What the trainer, the checkpoints and the command line know of a model; nothing else asks what it is.

    Subclasses set `config_class`, `checkpoint_name` (default file in models/), `phases` (ways to make the decoded clip
    audible), `per_frame` (elements of a decoded clip's last axis per frame), `margin` (frames at either end of a clip
    that it decodes worse than the others) and `whole_clips` (a code is as long for a part of a clip as for all of it),
    and what they can do beyond regenerating.
    """
    config_class: type
    checkpoint_name: str
    phases: tuple[str, ...] = PHASES
    per_frame = 1
    margin = 0
    whole_clips = False
    can_sample = False
    can_interpolate = True

    def __init__(self, config: Any, data: dict) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.precision = torch.float32
        self.preprocessor = AudioPreprocessor(config.n_mels)

    def cast(self) -> Any:
        """The autocast region of the networks, in the precision that the run has chosen."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision is torch.bfloat16)

    def players(self) -> dict[str, nn.Module]:
        """Sub-modules that have an optimizer of their own."""
        return {"model": self}

    def prepare(self, clips: Clips, crops: Clips | None = None) -> None:
        """Take statistics of the training set's `clips`, which live in the checkpoint from then on, and start the
        weights from what random `crops` (default: the same) have in common."""
        self.preprocessor.fit(clips())

    def latents_per_second(self) -> float:
        """How many numbers describe one second of sound."""
        return self.config.latent_dim * SAMPLE_RATE / CLIP

    @abc.abstractmethod
    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yield (player, loss, statistics); the trainer steps that player before it asks for the next."""

    @abc.abstractmethod
    def encode(self, audio: Tensor, frames: Tensor | None = None) -> Any:
        """Waveform [B CLIP], of which `frames` [B] hold sound (default: all) -> latent numbers [B ...]"""

    @abc.abstractmethod
    def decode(self, latent: Any) -> Tensor:
        """Latent numbers -> a decoded clip [B R FRAMES * per_frame]: standardised log-mel, or waveform"""

    def validate(self, batch: Batch) -> dict[str, float]:
        """Figures on held-out clips; {} where the family has none."""
        return {}

    def render(self, decoded: Tensor, phase: str, original: Tensor | None = None) -> Tensor:
        """A decoded clip [B R ...] -> waveform [B L]; `original` [B L] lends its phase to phase="original"."""
        log_mel = self.preprocessor.unstandardise(decoded)
        return self.preprocessor.to_audio(log_mel, decoded.shape[-1] * HOP, phase, original)

    def baselines(self, _audio: Tensor, _frames: Tensor) -> dict[str, Tensor]:
        """What codecs without a network make of the clips with the same count of numbers, in decoded form."""
        return {}

    def sample(self, noise: Noise) -> Tensor:
        """New decoded clips from the prior, one for each generator of `noise`."""
        raise UserError(f"--sample: {a_model(family_name(self))} has no prior to sample from: use --model " +
                        " or ".join(name for name, family in FAMILIES.items() if family.can_sample), 2)


# === autoencoder ===

LATENT_HELP = "latent numbers: per clip (autoencoder), per latent frame (vae), per frame on average (waveform_vae)"
WIDTH_HELP = "channels of the network, a multiple of 8"


@dataclass(frozen=True)
class AutoencoderConfig(RunConfig):
    latent_dim: int = option(128, "model", LATENT_HELP, number(int, 1, 65536))
    width: int = option(192, "model", WIDTH_HELP, number(int, 8, 4096))
    latent_dropout: float = option(0.05, "model", "share of latent numbers dropped in training", number(float, 0, 0.9))

    def __post_init__(self) -> None:
        check_width(self.width)


def check_width(width: int) -> None:
    if width % 8:
        raise UserError(f"--width {width}: must be a multiple of 8", 2)


class MelFamily(Family):
    """What the two families on log-mel spectrograms share: two networks around `codes` numbers in each of `frames`
    steps of time, each beside a linear path that starts as the principal components of the training set's
    spectrograms. The network has to learn only what is not linear."""
    whole_clips = True

    def __init__(self, config: Any, data: dict, codes: int, frames: int) -> None:
        super().__init__(config, data)
        mels, width, patch = config.n_mels, config.width, FRAMES // frames
        stages, kernel = int(math.log2(FRAMES // max(16, frames))), 16 if frames == 1 else 1
        self.analysis = nn.Conv2d(mels, codes, (1, patch), (1, patch))
        self.synthesis = nn.ConvTranspose2d(codes, mels, (1, patch), (1, patch))
        self.encoder = nn.Sequential(encoder_stack(mels, width, stages), nn.SiLU(),
                                     zeroed(nn.Conv2d(width, codes, (1, kernel))))
        self.decoder = nn.Sequential(nn.ConvTranspose2d(codes, width, (1, kernel)), decoder_stack(mels, width, stages))

    def log_mel(self, audio: Tensor) -> Tensor:
        """Waveform [B L] -> standardised log-mel [B M T]"""
        return self.preprocessor.standardise(self.preprocessor.log_mel(audio))

    def to_codes(self, mel: Tensor) -> Tensor:
        """Standardised log-mel [B M T] -> [B codes frames]"""
        with self.cast():
            return from_planes(self.analysis(to_planes(mel))) + from_planes(self.encoder(to_planes(mel)))

    def from_codes(self, codes: Tensor) -> Tensor:
        """[B codes frames] -> standardised log-mel [B M T]"""
        with self.cast():
            return from_planes(self.synthesis(to_planes(codes))) + from_planes(self.decoder(to_planes(codes)))

    @torch.no_grad()
    def prepare(self, clips: Clips, crops: Clips | None = None) -> None:
        super().prepare(clips, crops)
        mels, patch = self.config.n_mels, self.analysis.kernel_size[1]
        parts = torch.cat([
            mel[:, :max(count, patch)].unfold(1, patch, max(1, patch // 2)).transpose(0, 1).reshape(-1, mels * patch)
            for b in itertools.islice((crops or clips)(), 60)
            for mel, count in zip(self.log_mel(b.audio), b.frames.tolist())])
        basis, spread = principal_components(parts[torch.randperm(len(parts))[:12_000]], self.analysis.out_channels)
        basis = basis.view(-1, mels, 1, patch)
        self.analysis.weight.copy_(basis / spread[:, None, None, None])
        self.synthesis.weight.copy_(basis * spread[:, None, None, None])
        nn.init.zeros_(self.analysis.bias)
        nn.init.zeros_(self.synthesis.bias)

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        figures = mel_metrics(self.decode(self.encode(batch.audio)), self.log_mel(batch.audio), batch.frames)
        return {f"val_{name}": values.mean().item() for name, values in figures.items()}


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[N D] -> the first `count` directions [count D] and the deviations [count] of the data along them; where the data
    have fewer directions, the rest are zeros."""
    basis, spread = rows.new_zeros(count, rows.shape[1]), rows.new_ones(count)
    known = min(count, *rows.shape)
    if known:
        _, values, directions = torch.pca_lowrank(rows, known, center=False, niter=3)
        basis[:known], spread[:known] = directions.T, (values / math.sqrt(len(rows))).clamp(min=1e-3)
    return basis, spread


class AudioAutoencoder(MelFamily):
    """A residual autoencoder: a clip's log-mel [1 128 256] becomes one vector of `latent_dim` numbers and returns."""
    config_class = AutoencoderConfig
    checkpoint_name = "audio_autoencoder.pt"
    margin = 16
    CODES = 64

    def __init__(self, config: AutoencoderConfig, data: dict) -> None:
        super().__init__(config, data, self.CODES, 16)
        self.to_latent = nn.Linear(self.CODES * 16, config.latent_dim)
        self.from_latent = nn.Linear(config.latent_dim, self.CODES * 16)

    def encode(self, audio: Tensor, frames: Tensor | None = None) -> Tensor:
        """Waveform [B CLIP] -> [B Z]"""
        return self.to_latent(self.to_codes(self.log_mel(audio)).flatten(1))

    def decode(self, latent: Tensor) -> Tensor:
        """[B Z] -> standardised log-mel [B M T]"""
        return self.from_codes(self.from_latent(latent).view(len(latent), self.CODES, 16))

    @torch.no_grad()
    def prepare(self, clips: Clips, crops: Clips | None = None) -> None:
        super().prepare(clips, crops)
        rows = torch.cat([self.to_codes(self.log_mel(b.audio)).flatten(1) for b in (crops or clips)()])
        weights = self.synthesis.weight.square().sum((1, 2, 3)).sqrt().repeat_interleave(16)  # errors count as heard
        basis, spread = principal_components(rows * weights, self.config.latent_dim)
        self.to_latent.weight.copy_(basis * weights / spread[:, None])
        self.from_latent.weight.copy_((basis / weights.clamp(min=1e-6) * spread[:, None]).T)
        nn.init.zeros_(self.to_latent.bias)
        nn.init.zeros_(self.from_latent.bias)

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """MSE + L1 on the standardised log-mel. Dropout by the step's own random numbers, as everything else."""
        target, drop = self.log_mel(batch.audio), self.config.latent_dropout
        latent = self.to_latent(self.to_codes(target).flatten(1))
        keep = (batch.draw.uniform(self.config.latent_dim) >= drop) / (1 - drop)
        error = self.decode(latent * keep) - target
        mse, mae = masked_mean(error.square(), batch.frames), masked_mean(error.abs(), batch.frames)
        yield "model", mse + mae, {"mse": mse.detach()}


def to_planes(mel: Tensor) -> Tensor:
    """[B M T] -> [B M 1 T], channels last"""
    return mel[:, :, None].contiguous(memory_format=torch.channels_last)


def from_planes(planes: Tensor) -> Tensor:
    """[B M 1 T] -> [B M T] float32"""
    return planes[:, :, 0].float()


# === variational autoencoder ===


@dataclass(frozen=True)
class VaeConfig(RunConfig):
    latent_dim: int = option(160, "model", LATENT_HELP, number(int, 1, 65536))
    latent_frames: int = option(16, "model", "latent vectors per clip, in time: 1, 16, 32, 64, 128 or 256",
                                number(int, 1, FRAMES))
    width: int = option(192, "model", WIDTH_HELP, number(int, 8, 4096))
    beta: float = option(1.0, "model", "weight of the KL divergence; 1 is the evidence lower bound", number(float, 0))
    kl_warmup: float = option(0.3, "model", "first part of the run over which that weight rises from 0",
                              number(float, 0, 1))
    free_bits: float = option(0.0, "model", "nats of KL divergence per latent number that cost nothing [Kingma16]",
                              number(float, 0))

    def __post_init__(self) -> None:
        check_width(self.width)
        if self.latent_frames not in (1, 16, 32, 64, 128, 256):
            raise UserError(f"--latent_frames {self.latent_frames}: must be 1, 16, 32, 64, 128 or 256", 2)


class AudioVAE(MelFamily):
    """A convolutional VAE on log-mel, with one latent vector per clip or several along time [Kingma14]."""
    config_class = VaeConfig
    checkpoint_name = "audio_vae.pt"
    can_sample = True

    def __init__(self, config: VaeConfig, data: dict) -> None:
        super().__init__(config, data, config.latent_dim, config.latent_frames)
        self.log_variance = zeroed(Conv1d(config.latent_dim, config.latent_dim, 1))
        nn.init.constant_(self.log_variance.bias, -3.0)

    def latents_per_second(self) -> float:
        return self.config.latent_dim * self.config.latent_frames * SAMPLE_RATE / CLIP

    def posterior(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised log-mel [B M T] -> mean and log-variance [B Z frames] of q(z|x)"""
        mean = self.to_codes(mel)
        return mean, from_planes(self.log_variance(to_planes(mean))).clamp(-14, 4)

    def encode(self, audio: Tensor, frames: Tensor | None = None) -> Tensor:
        """Waveform [B CLIP] -> mean of the posterior [B Z frames]"""
        return self.to_codes(self.log_mel(audio))

    def decode(self, latent: Tensor) -> Tensor:
        """[B Z frames] -> standardised log-mel [B M T]"""
        return self.from_codes(latent)

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The negative evidence lower bound in nats per mel bin. The likelihood is a Gaussian whose variance is the
        best one for the batch, so that no weight between the two terms has to be guessed ([Rybkin21] eq. 9). With
        several processes it is the best one for each process's share."""
        target = self.log_mel(batch.audio)
        mean, log_variance = self.posterior(target)
        latent = mean + (0.5 * log_variance).exp() * batch.draw.normal(*mean.shape[1:])
        mse = masked_mean((self.decode(latent) - target).square(), batch.frames)
        kl = gaussian_kl(mean, log_variance)
        per_bin = kl.clamp(min=self.config.free_bits).sum() / (batch.frames.sum() * self.config.n_mels)
        warm = min(1.0, batch.progress / self.config.kl_warmup) if self.config.kl_warmup else 1.0
        loss = 0.5 * (math.log(2 * math.pi) + 1 + (mse + 1e-6).log()) + warm * self.config.beta * per_bin
        yield "model", loss, {"mse": mse.detach(), "kl": kl.detach().sum((1, 2)).mean()}

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        kl = gaussian_kl(*self.posterior(self.log_mel(batch.audio))).sum((1, 2)).mean().item()
        return super().validate(batch) | {"val_kl_nats": kl}

    @torch.no_grad()
    def sample(self, noise: Noise) -> Tensor:
        """Decode latents drawn from the prior N(0, 1)."""
        return self.decode(noise.normal(self.config.latent_dim, self.config.latent_frames))


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each latent number, in nats ([Kingma14] appendix B)"""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


# === waveform variational autoencoder ===


class MDCT(nn.Module):
    """Modified discrete cosine transform, window 640 (sine), hop 320 [Princen87]: waveform [B L] <-> [B 320 L/320].
    Orthogonal and exact both ways, and an error in coefficients is the same error in the waveform: neighbouring blocks
    are rotated into each other around their border, then each gets a DCT-IV. Nothing is folded at the two ends."""

    def __init__(self) -> None:
        super().__init__()
        n = torch.arange(HOP, dtype=torch.float64) + 0.5
        self.register_buffer("dct", (torch.cos(math.pi / HOP * n[:, None] * n) * math.sqrt(2 / HOP)).float(), False)
        window = torch.sin(math.pi / (2 * HOP) * n).float()
        self.register_buffer("near", window[HOP // 2:], False)  # from the border outwards
        self.register_buffer("far", window[:HOP // 2].flip(0), False)

    def _rotate(self, blocks: Tensor, sign: float) -> Tensor:
        left, right = blocks[:, :-1, HOP // 2:].flip(-1), blocks[:, 1:, :HOP // 2]
        left, right = self.near * left - sign * self.far * right, self.near * right + sign * self.far * left
        first, last = blocks[:, :1, :HOP // 2], blocks[:, -1:, HOP // 2:]
        return torch.cat([torch.cat([first, right], 1), torch.cat([left.flip(-1), last], 1)], 2)

    def forward(self, audio: Tensor) -> Tensor:
        return (self._rotate(audio.view(len(audio), -1, HOP), 1) @ self.dct).transpose(1, 2)

    def inverse(self, lines: Tensor) -> Tensor:
        return self._rotate(lines.transpose(1, 2) @ self.dct, -1).flatten(1)


class SparseCode(NamedTuple):
    """What a clip is reduced to: K pairs of numbers, and its level."""
    atom: Tensor  # [B K] int64, patch * atoms + atom: which pattern stands where
    amplitude: Tensor  # [B K] in units of the level; 0 for pairs that a shorter clip does not get
    level: Tensor  # [B 1] root mean square of the waveform


@dataclass(frozen=True)
class WaveformConfig(RunConfig):
    learning_rate: float = option(3e-3, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    latent_dim: int = option(80, "model", LATENT_HELP, number(int, 2, 320))
    atoms: int = option(1024, "model", "patterns in the dictionary", number(int, 16, 65536))
    width: int = option(192, "model", WIDTH_HELP, number(int, 8, 4096))
    blocks: int = option(0, "model", "residual blocks over time that refine what the dictionary gives; 0: none (two "
                         "gained 0.01 dB, RESULTS.md)", number(int, 0, 64))
    spectral_weight: float = option(1.0, "model", "weight of the spectral term, in dB per neper of band level",
                                    number(float, 0))
    beta: float = option(0.2, "model", "weight of the KL divergence, in dB per nat and amplitude", number(float, 0))

    def __post_init__(self) -> None:
        check_width(self.width)
        if not 2 <= self.latent_dim <= HOP:
            raise UserError(f"--latent_dim {self.latent_dim}: must be from 2 to {HOP} for waveform_vae", 2)


class WaveformVAE(Family):
    """A VAE that keeps the phase: its latent is a sparse code of the waveform's MDCT.

    A clip [320 x 256] is cut into 5,120 patches of 4 lines x 4 frames. Latent numbers are pairs: which of the learned
    patterns (atoms) stands in which patch, and how strong. The posterior of an amplitude is a Gaussian around what
    matching pursuit finds [Mallat93], its prior a Gaussian learned for each atom; the choice of atoms is the most
    likely one, as in [Lewicki00]. All pairs of a clip share one budget, so that loud and dense moments get more than
    silence (RESULTS.md has what each part is worth). The decoder adds the atoms up and may refine the sum with residual
    convolutions over time. No phase of the input is used."""
    config_class = WaveformConfig
    checkpoint_name = "audio_waveform_vae.pt"
    phases = ("own",)
    per_frame = HOP
    can_interpolate = False
    PATCH = 4  # lines and frames of a patch

    def __init__(self, config: WaveformConfig, data: dict) -> None:
        super().__init__(config, data)
        self.mdct = MDCT()
        self.dictionary = nn.Parameter(F.normalize(torch.randn(config.atoms, self.PATCH ** 2), dim=1))
        self.log_prior = nn.Parameter(torch.zeros(config.atoms))  # of the amplitudes' standard deviation
        self.log_posterior = nn.Parameter(torch.tensor(-4.0))
        blocks = [ResidualBlock(config.width) for _ in range(config.blocks)]
        self.refine = nn.Sequential(Conv1d(HOP, config.width), *blocks, nn.SiLU(),
                                    zeroed(Conv1d(config.width, HOP))) if blocks else None
        self.register_buffer("principal", torch.zeros(HOP, HOP))  # PCA of the training frames, for comparison
        self.register_buffer("band_edges", (HOP * (torch.linspace(0, 1, 25)[1:] ** 2)).round().long() - 1, False)

    def latents_per_second(self) -> float:
        return self.config.latent_dim * SAMPLE_RATE / HOP

    def atoms(self) -> Tensor:
        return F.normalize(self.dictionary, dim=1)

    def patches(self, lines: Tensor) -> Tensor:
        """[B 320 T] -> [B patches 16]"""
        size = self.PATCH
        planes = lines.view(len(lines), HOP // size, size, -1, size).permute(0, 1, 3, 2, 4)
        return planes.reshape(len(lines), -1, size * size)

    def lines(self, patches: Tensor) -> Tensor:
        """[B patches 16] -> [B 320 T]"""
        size = self.PATCH
        planes = patches.view(len(patches), HOP // size, -1, size, size).permute(0, 1, 3, 2, 4)
        return planes.reshape(len(patches), HOP, -1)

    def pairs(self, frames: int) -> int:
        """How many pairs a clip of so many frames is worth; one number goes to its level."""
        return (self.config.latent_dim * frames - 1) // 2

    @torch.no_grad()
    def encode(self, audio: Tensor, frames: Tensor | None = None) -> SparseCode:
        """Waveform [B L] -> its code; a clip of which only `frames` [B] hold sound gets a smaller budget."""
        level = audio.square().mean(1, keepdim=True).sqrt().clamp(min=1e-8)
        patches, atoms = self.patches(self.mdct(audio / level)), self.atoms()
        most, total = self.pairs(audio.shape[1] // HOP), audio.shape[1] // HOP
        code = patches.new_zeros(len(audio), most, dtype=torch.long), patches.new_zeros(len(audio), most)
        for i, clip in enumerate(patches):
            count = self.pairs(int(frames[i]) if frames is not None else total)
            where, atom, amplitude = pursue(clip, atoms, count)
            code[0][i, :len(atom)] = where * len(atoms) + atom
            code[1][i, :len(atom)] = amplitude
        return SparseCode(*code, level)

    def decode(self, code: SparseCode) -> Tensor:
        """Its code -> waveform [B 1 CLIP]"""
        return self.mdct.inverse(self._decode(code) * code.level[:, None])[:, None]

    def _sum(self, code: SparseCode) -> Tensor:
        """Atoms added up: [B 320 T] in units of the level"""
        atoms, count = self.atoms(), FRAMES * HOP // self.PATCH ** 2
        clip = torch.arange(len(code.atom), device=atoms.device)[:, None] * count
        terms = code.amplitude[..., None] * atoms[code.atom % len(atoms)]
        patches = terms.new_zeros(len(code.atom) * count, atoms.shape[1])
        where = (code.atom // len(atoms) + clip).flatten()
        return self.lines(patches.index_add(0, where, terms.flatten(0, 1)).view(len(code.atom), count, -1))

    def _decode(self, code: SparseCode) -> Tensor:
        lines = self._sum(code)
        if self.refine is None:
            return lines
        local = F.avg_pool2d(lines.abs()[:, None], (9, 5), 1, (4, 2))[:, 0]  # correct in proportion to what is there
        with self.cast():
            view = lines.sign() * (8 * lines.abs()).log1p()  # loud and soft lines alike are seen
            correction = from_planes(self.refine(to_planes(view)))
        return lines + correction * local

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Waveform error in dB, band levels in nepers, and the KL divergence of the amplitudes in nats."""
        code = self.encode(batch.audio, batch.frames)
        used = code.amplitude != 0
        noise = batch.draw.normal(code.amplitude.shape[1]) * self.log_posterior.exp()
        sent = code._replace(amplitude=(code.amplitude + noise) * used)
        target, estimate = self.mdct(batch.audio / code.level), self._decode(sent)
        error = (estimate - target).square().sum((1, 2)) + 1e-6 * target.square().sum((1, 2)) + 1e-9
        decibels = 10 * (error.log10() - (target.square().sum((1, 2)) + 1e-9).log10()).mean()
        bands = self._bands(estimate) - self._bands(target)
        kl = (self._kl(code) * used).sum() / used.sum().clamp(min=1)
        yield "model", (decibels + self.config.spectral_weight * masked_mean(bands.abs(), batch.frames)
                        + self.config.beta * kl), {"sdr_db": -decibels.detach(), "kl": kl.detach()}

    def _kl(self, code: SparseCode) -> Tensor:
        """KL(posterior || prior) of each amplitude, in nats: [B K]"""
        prior, noise = self.log_prior[code.atom % self.config.atoms], self.log_posterior
        return prior - noise + 0.5 * ((code.amplitude.square() + (2 * noise).exp()) / (2 * prior).exp() - 1)

    def _bands(self, lines: Tensor) -> Tensor:
        """Level of 24 bands that widen with frequency, natural log of amplitude: [B 24 T]"""
        energy = lines.square().cumsum(1)[:, self.band_edges]
        return 0.5 * (torch.diff(energy, dim=1, prepend=torch.zeros_like(energy[:, :1])) + 1e-4).log()

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        """Signal to distortion in dB, and what the code weighs: amplitudes by their KL divergence, places by log2 of
        the choices."""
        code, target = self.encode(batch.audio, batch.frames), batch.audio
        estimate, sound, used = self.decode(code)[:, 0], target.square().sum(1) > 0, code.amplitude != 0
        ratio = target.square().sum(1) / (estimate - target).square().sum(1).clamp(min=1e-12)
        bits = math.log2(self.config.atoms * FRAMES * HOP // self.PATCH ** 2) + self._kl(code) / math.log(2)
        return {"val_sdr_db": (10 * ratio[sound].log10()).mean().item() if sound.any() else 0.0,
                "val_kbit_per_second": (bits * used).sum().item() / batch.frames.sum().item() * SAMPLE_RATE / HOP / 1e3}

    def prepare(self, clips: Clips, crops: Clips | None = None) -> None:
        """Besides the statistics: a first dictionary by K-SVD on the training set [Aharon06], so that the gradient
        starts from patterns instead of noise. Each atom is moved to the direction that its uses leave over."""
        super().prepare(clips, crops)
        moments = sum(torch.einsum("blt,bkt->lk", lines, lines) for lines in (self.mdct(b.audio) for b in clips()))
        self.principal.copy_(torch.linalg.eigh(moments.double())[1].flip(1))
        pool = torch.cat([self.patches(self.mdct(b.audio / b.audio.square().mean(1, keepdim=True).sqrt().clamp(1e-4)))
                          for b in itertools.islice(clips(), 24)]).flatten(0, 1)
        pool = pool[pool.square().sum(1) > 1e-3]
        draw, atoms = torch.Generator().manual_seed(self.config.seed), self.atoms().detach()
        for _ in range(30 if len(pool) else 0):
            some = pool[torch.randint(len(pool), (20_000,), generator=draw).to(pool.device)]
            count = len(some) * self.config.latent_dim * self.PATCH ** 2 // HOP // 2
            where, atom, amplitude = pursue(some, atoms, count)
            rest = some - torch.zeros_like(some).index_add_(0, where, amplitude[:, None] * atoms[atom])
            moved = torch.zeros_like(atoms).index_add_(
                0, atom, amplitude[:, None] * (rest[where] + amplitude[:, None] * atoms[atom]))
            unused = torch.bincount(atom, minlength=len(atoms)) < 3
            worst = rest.square().sum(1).topk(min(len(rest), len(atoms))).indices[:int(unused.sum())]
            moved[unused.nonzero()[:len(worst), 0]] = rest[worst]
            atoms = F.normalize(moved, dim=1)
        self.dictionary.data.copy_(atoms)

    def render(self, decoded: Tensor, phase: str, original: Tensor | None = None) -> Tensor:
        return decoded[:, 0]

    @torch.no_grad()
    def baselines(self, audio: Tensor, frames: Tensor) -> dict[str, Tensor]:
        """The same count of numbers without learning more than a PCA: the lowest lines of each frame, its largest lines
        with their indices, the principal components of the training frames, and the largest runs of four frames of a
        line with theirs, of the whole clip."""
        lines, count = self.mdct(audio), self.config.latent_dim
        low = lines * (torch.arange(HOP, device=lines.device) < count)[:, None]
        magnitude = lines.abs()
        large = lines * (magnitude >= magnitude.topk(count // 2, 1).values[:, -1:])
        runs = lines.view(len(lines), HOP, -1, self.PATCH)
        gains = runs.square().sum(3).flatten(1)
        ranks = gains.argsort(1, descending=True).argsort(1)
        budget = count * frames // (self.PATCH + 1)
        runs = runs * (ranks < budget[:, None]).view(*runs.shape[:3], 1)
        plain = {"lowest_lines": low, "largest_lines": large, "largest_runs": runs.flatten(2)}
        if self.principal.any():
            chosen = self.principal[:, :count]
            plain["pca"] = chosen @ (chosen.T @ lines)
        return {name: self.mdct.inverse(each)[:, None] for name, each in plain.items()}


def strongest(products: Tensor) -> Tensor:
    """Column of the largest magnitude in each row; in two steps, since an argmax is ten times as slow as a maximum."""
    rows, columns = products.shape
    groups = 32 if columns % 32 == 0 else 1
    magnitude = products.abs().view(rows, groups, -1)
    group = magnitude.amax(2).argmax(1)
    return group * (columns // groups) + magnitude[torch.arange(rows, device=group.device), group].argmax(1)


def pursue(patches: Tensor, atoms: Tensor, count: int, most: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Matching pursuit with one budget for all patches: the `count` terms with the largest gains.

    patches [N D], atoms [A D] of length 1 -> patch, atom and amplitude of each term, loudest first. Exact, though most
    of the work is left out: a patch with less energy than the weakest chosen term can't contribute another. The
    amplitudes are then fitted together by a few steps of conjugate gradients."""
    columns, rest = atoms.T.contiguous(), patches.clone()
    last = torch.full((len(rest),), math.inf, device=rest.device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    limit, gains = 1e-12 if count else math.inf, patches.new_zeros(0)
    for _ in range(most):
        energy = torch.minimum(rest.square().sum(1), last)
        live = (energy > limit).nonzero()[:, 0]
        if len(gains) < count and len(live) > 2048:  # as long as the limit is not known: the loudest first
            live = energy.topk(2048).indices
        if not len(live):
            break
        part = rest[live]
        products = part @ columns
        atom = strongest(products)
        amplitude = products.gather(1, atom[:, None])[:, 0]
        rest[live] = part - amplitude[:, None] * atoms[atom]
        gain = torch.minimum(last[live] * (1 - 1e-6), amplitude.square())  # a term comes after what it builds upon
        last[live] = gain
        found.append((live, atom, torch.stack([amplitude, gain], 1)))
        gains = torch.cat([gains[gains >= limit], gain])
        if len(gains) >= count:
            limit = gains.kthvalue(len(gains) - count + 1).values.item()
    if not found:
        return tuple(patches.new_zeros(0, dtype=kind) for kind in (torch.long, torch.long, patches.dtype))
    where, atom, both = (torch.cat(column) for column in zip(*found, strict=True))
    best = both[:, 1].topk(min(count, len(both))).indices
    where, atom, amplitude = where[best], atom[best], both[best, 0]
    chosen = atoms[atom]

    def add_up(values: Tensor) -> Tensor:
        return torch.zeros_like(patches).index_add_(0, where, values[:, None] * chosen)

    gradient = ((patches - add_up(amplitude))[where] * chosen).sum(1)
    direction, size = gradient, gradient.square().sum()
    for _ in range(4):
        change = add_up(direction)
        step = size / change.square().sum().clamp(min=1e-20)
        amplitude, gradient = amplitude + step * direction, gradient - step * (change[where] * chosen).sum(1)
        size, before = gradient.square().sum(), size
        direction = gradient + size / before.clamp(min=1e-20) * direction
    return where, atom, amplitude


# === registry ===

FAMILIES: dict[str, type[Family]] = {"autoencoder": AudioAutoencoder, "vae": AudioVAE, "waveform_vae": WaveformVAE}
SHIPPED_DEFAULT = "waveform_vae"  # what --mode infer takes: it sounds best by every measure (RESULTS.md)

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
    "mr_stft": ("1", "lower", "spectral convergence plus mean absolute difference of natural-log magnitudes, mean "
                "over windows of 512, 1024 and 2048 samples, hop a quarter [Yamamoto20]; blind to phase"),
    "lsd_db": ("dB", "lower", "log-spectral distance: root mean square over frequencies, mean over frames, of the "
               "difference of power spectra in dB [Gray76]; blind to phase"),
    "pesq_wb": ("MOS-LQO", "higher", "PESQ wide-band, ITU-T P.862.2, 1.04 to 4.64; made for speech, a hint on music"),
    "stoi": ("1", "higher", "short-time objective intelligibility [Taal11]; made for speech, a hint on music"),
}


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
    from torchmetrics.functional.audio import signal_noise_ratio
    return signal_noise_ratio(estimate, reference)


def si_sdr_db(estimate: Tensor, reference: Tensor) -> Tensor:
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio
    if not estimate.any():
        raise ValueError("the estimate is digital silence")
    return scale_invariant_signal_distortion_ratio(estimate, reference)


def sdr_db(estimate: Tensor, reference: Tensor) -> Tensor:
    from torchmetrics.functional.audio import signal_distortion_ratio
    need_length(reference, 512)  # its filter would otherwise fit anything
    if not estimate.any():
        raise ValueError("the estimate is digital silence")
    return signal_distortion_ratio(estimate, reference)


def need_length(reference: Tensor, samples: int) -> None:
    """The packages say it in words of their own, or not at all."""
    if len(reference) < samples:
        raise ValueError(f"the clip is too short: {len(reference) / SAMPLE_RATE:.2g} s, needed are "
                         f"{samples / SAMPLE_RATE:.2g} s")


def pesq_wb(estimate: Tensor, reference: Tensor) -> float:
    from pesq import PesqError, pesq
    need_length(reference, SAMPLE_RATE // 4)
    try:
        return pesq(SAMPLE_RATE, reference.numpy(), estimate.numpy(), "wb")
    except PesqError as error:
        text = error.args[0]
        raise ValueError(text.decode() if isinstance(text, bytes) else str(text)) from None


def stoi(estimate: Tensor, reference: Tensor) -> float:
    from pystoi import stoi as measure
    need_length(reference, STOI_LEAST)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames")  # it then returns a number without meaning
        try:
            return measure(reference.numpy(), estimate.numpy(), SAMPLE_RATE)
        except RuntimeWarning:
            raise ValueError(f"less than {STOI_LEAST / SAMPLE_RATE:.2g} s of the clip sounds (pauses don't "
                             "count)") from None


WAVE_METRICS = (snr_db, si_sdr_db, sdr_db, mr_stft, lsd_db, pesq_wb, stoi)


@torch.no_grad()
def wave_metrics(estimate: Tensor, reference: Tensor, samples: Tensor) -> tuple[dict[str, list], dict[str, str]]:
    """Metrics of waveforms [B L] over the first `samples` [B] of each: {name: value or None, for each clip}, {name: why
    one is None}. A clip that fails is None: it never takes the place of a value, nor the others with it."""
    values: dict[str, list[float | None]] = {measure.__name__: [] for measure in WAVE_METRICS}
    reasons: dict[str, str] = {}
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
    return values, reasons


def attempt(measure: Callable[[Tensor, Tensor], Any], estimate: Tensor, reference: Tensor) -> tuple[float | None, str]:
    """(value, "") or (None, why there is none)"""
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


# === measuring a model between floor and ceilings ===

SHOWN = ("mel_mse", "mel_cosine", "snr_db", "si_sdr_db", "sdr_db", "mr_stft", "lsd_db", "pesq_wb", "stoi")


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def sounds(model: Family, audio: Tensor, frames: Tensor) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """What is measured of clips [B CLIP]: (row, standardised log-mel [B M T] or None for that of the sound, sound or
    None)."""
    prep = model.preprocessor
    decoded = model.decode(model.encode(audio, frames))
    if model.per_frame == 1:
        yield "model_mel", decoded, None
    for phase in model.phases:
        yield "model" if len(model.phases) == 1 else f"model_{phase}", None, model.render(decoded, phase, audio)
    for name, plain in model.baselines(audio, frames).items():
        yield f"without_network_{name}", None, model.render(plain, model.phases[0], audio)
    true_mel, mean = prep.log_mel(audio), prep.unstandardise(torch.zeros_like(decoded if model.per_frame == 1 else
                                                                              prep.log_mel(audio)))
    for phase in PHASES:
        yield f"ceiling_true_mel_{phase}", None, prep.to_audio(true_mel, audio.shape[1], phase, audio)
    yield "floor_mean_spectrum", torch.zeros_like(mean), None
    yield "floor_mean_spectrum_griffinlim", None, prep.to_audio(mean, audio.shape[1], "griffinlim")


def measure_rows(model: Family, clips: Sequence[tuple], phase: str = "", progress_title: str = "") -> dict[str, Any]:
    """{row: {"all" or stem: {metric: summary}}} over clips (track, start) or, where the sound that a whole file became
    is at hand, (track, start, that sound [L]): it stands for the row of the `phase` that made it, and for no other."""
    values: dict[str, list[tuple[str, dict]]] = {}
    device, prep = next(model.parameters()).device, model.preprocessor
    with progress(len(clips), progress_title, not progress_title, unit="clip", leave=False) as bar:
        for first in range(0, len(clips), 4):
            part = clips[first:first + 4]
            batch = clip_batch([clip[:2] for clip in part], device)
            samples = torch.tensor([min(CLIP, len(clip[0].audio) - clip[1]) for clip in part])
            target = prep.standardise(prep.log_mel(batch.audio))
            for row, mel, sound in sounds(model, batch.audio, batch.frames):
                if row in ("model", f"model_{phase}") and len(part[0]) == 3:
                    sound = torch.stack([F.pad(whole[start:start + CLIP], (0, CLIP))[:CLIP]
                                         for _, start, whole in part]).to(device)
                mel = prep.standardise(prep.log_mel(sound)) if mel is None else mel
                each = mel_metrics(mel, target, batch.frames, prep)
                columns = {name: value.tolist() for name, value in each.items()}
                reasons: dict[str, str] = {}
                if sound is not None:
                    more, reasons = wave_metrics(sound.cpu(), batch.audio.cpu(), samples)
                    columns |= more
                for i, clip in enumerate(part):
                    values.setdefault(row, []).append(
                        (clip[0].stem, {name: column[i] for name, column in columns.items()}, reasons))
            bar.update(len(part))
    groups = ["all", *dict.fromkeys(clip[0].stem for clip in clips)]
    groups = groups if len(groups) > 2 else groups[:1]
    return {row: {stem: summarise([v for s, v, _ in entries if stem in ("all", s)], gravest([r for _, _, r in entries]))
                  for stem in groups} for row, entries in values.items()}


def gravest(reasons: Sequence[dict[str, str]]) -> dict[str, str]:
    """One reason per metric: that something is not installed matters more than that a clip is silent."""
    pairs = [pair for each in reasons for pair in each.items()]
    return dict(sorted(pairs, key=lambda pair: "not measured" in pair[1]))


def print_rows(rows: dict[str, Any], stem: str) -> None:
    """A table of medians."""
    if not any(stem in row for row in rows.values()):
        return
    count = max(entry["n"] for row in rows.values() if stem in row for entry in row[stem].values())
    print(f"\n{stem}: medians over {count} clip(s)\n{'':38}" + "".join(f"{name:>11}" for name in SHOWN))
    for name, row in rows.items():
        cells = [row[stem].get(metric, {}).get("median") for metric in SHOWN]
        print(f"{name:38}" + "".join(f"{'-' if cell is None else format(cell, '.3f'):>11}" for cell in cells))
    if any(name.endswith("_original") for name in rows):
        print(f"the phase of ..._original is {UPPER_BOUND}")
    for metric, entry in next(reversed(rows.values()))[stem].items():
        if "reason" in entry:
            print(f"{metric}: {entry['reason']}")


# === trainer ===

FORMAT = "audio_gen/1"
EXPLODED = 10  # a mean loss this many times the first one is divergence, not noise
LOG_EVERY = 10  # steps between looks at the device's loss: each look waits for the device
VALID_CLIPS = 64  # held-out clips that are measured after each epoch
DATA_KEYS = ("dataset", "title", "sample_rate", "stems", "tracks", "seconds", "digest")


class Noise:
    """Noise for a list of clip numbers: clip i of seed s gets the same numbers in a batch of any size."""

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed32(seed, int(i), 1)) for i in indices]
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        """[B *shape] from N(0, 1)"""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)


def open_checkpoint(path: Path) -> dict:
    """A checkpoint of this script, of a family that it knows, with the description of its data."""
    state = load_checkpoint(path, FORMAT)
    if state["family"] not in list(FAMILIES):  # a list: what stands there may not even be hashable
        raise UserError(f"{path} holds a model {state['family']!r}, this script knows {', '.join(FAMILIES)}: use the "
                        "version of the script that wrote it")
    described = state["data"].keys() if isinstance(state["data"], dict) else set()
    if missing := set(DATA_KEYS) - described:
        raise UserError(f"{path} does not say the {', '.join(sorted(missing))} of its data: it was altered; restore a "
                        "copy or train again")
    restore_model(state)  # must succeed also where only a run is to be continued
    return state


def module_state(model: nn.Module, half: bool = False) -> dict[str, Tensor]:
    """With `half`, weights go to half precision; statistics of the data keep theirs."""
    weights = {name for name, _ in model.named_parameters()}
    return {key: value.half() if half and key in weights else value for key, value in model.state_dict().items()}


def restore_model(state: dict, **changes: Any) -> Family:
    """The model of a checkpoint with its averaged weights; `changes` replace fields of its config (the seed)."""
    family = FAMILIES[state["family"]]
    try:
        model = family(dataclasses.replace(family.config_class(**state["config"]), **changes), state["data"])
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state["ema"].items()})
        if not all(torch.isfinite(p).all() for p in model.state_dict().values()):
            raise ValueError("its weights are not finite")
    except (TypeError, KeyError, RuntimeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"the checkpoint does not fit its own description ({first_line(error)}): it was "
                        "altered, or written by another version of this script") from None
    return model.to(memory_format=torch.channels_last)


class Trainer:
    """One training run: it owns the weights, their moving average, the optimizers and the position."""

    def __init__(self, model: Family, data: AudioData, world: World, precision: torch.dtype, compile_it: bool,
                 checkpoint: Path, results: Path) -> None:
        from torch.optim.swa_utils import AveragedModel
        self.config, self.world, self.checkpoint, self.results = model.config, world, checkpoint, results
        config, self.audio = self.config, data
        self.model = model.to(world.device, memory_format=torch.channels_last)
        self.model.precision = precision
        self.batch_size = config.batch_size
        if self.batch_size % world.size:
            raise UserError(f"--batch_size {self.batch_size} can't be shared by {world.size} processes: use a multiple "
                            f"of {world.size}", 2)
        self.steps_per_epoch = max(1, config.crops // self.batch_size)
        self.ema = AveragedModel(self.model, multi_avg_fn=self._average)
        self.optimizers = {name: torch.optim.AdamW(player.parameters(), config.learning_rate, betas=(0.9, 0.99),
                                                   weight_decay=config.weight_decay, fused=world.device.type != "mps")
                           for name, player in self.model.players().items()}
        self.schedulers = {k: torch.optim.lr_scheduler.LambdaLR(o, self._rate) for k, o in self.optimizers.items()}
        self.step = self.epoch_done = 0
        self.seconds = self.data_seconds = 0.0
        self.history: list[dict] = []
        self.sums = torch.zeros(2, device=world.device)  # loss of the current epoch: sum and number of steps,
        self.looked = torch.zeros(2, device=world.device)  # and what they were at the last look
        self.stop = StopSignal()
        self.stop_all = torch.zeros(1, device=world.device)
        if compile_it:  # the networks; a family itself is never called
            for network in self.model.children():
                if isinstance(network, nn.Sequential):
                    network.compile()

    @property
    def averaged(self) -> Family:
        """The averaged weights: all regenerated sound and held-out figures come from them."""
        return self.ema.module

    def _rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to zero at the end of the last epoch."""
        warm = min(1.0, (step + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        share = min(1.0, step / (self.config.epochs * self.steps_per_epoch))
        return warm * 0.5 * (1 + math.cos(math.pi * share))

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], _count: Any) -> None:
        """EMA whose memory grows with the run, so that early epochs do not sound of the initial weights."""
        torch._foreach_lerp_(averaged, current, 1 - min(self.config.ema_decay, (1 + self.step) / (10 + self.step)))

    # --- state

    def state(self) -> dict:
        return {"format": FORMAT, "family": family_name(self.model), "config": dataclasses.asdict(self.config),
                "data": self.model.data, "model": module_state(self.model), "ema": module_state(self.averaged),
                "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
                "schedulers": {k: s.state_dict() for k, s in self.schedulers.items()},
                "rng": torch.get_rng_state(), "step": self.step, "epoch_done": self.epoch_done,
                "batch_size": self.batch_size, "sums": self.sums.cpu(), "looked": self.looked.cpu(),
                "seconds": self.seconds, "data_seconds": self.data_seconds,
                "history": self.history, "made": provenance()}

    def save(self) -> None:
        """Write the checkpoint, unless the weights have become useless: then the last good one stays."""
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            self._diverged("the weights are no longer finite")
        self.world.average([self.sums, self.looked])  # so that another number of processes can take over
        if self.world.main:
            save_checkpoint(self.checkpoint, self.state())

    def load(self, state: dict) -> None:
        """Continue where `state` stopped; on a CPU with the same number of processes bit for bit."""
        try:
            self.model.load_state_dict(state["model"])
            self.averaged.load_state_dict(state["ema"])
            for kind in ("optimizers", "schedulers"):
                for name, part in getattr(self, kind).items():
                    part.load_state_dict(state[kind][name])
            self.ema.n_averaged.fill_(state["step"])
            torch.set_rng_state(state["rng"])
            self.step, self.epoch_done, self.seconds = state["step"], state["epoch_done"], state["seconds"]
            self.data_seconds = state.get("data_seconds", 0.0)
            self.sums, self.looked = (state[key].to(self.world.device) for key in ("sums", "looked"))
            self.history = list(state["history"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{self.checkpoint} can't be resumed ({first_line(error)}): it does not fit "
                            "this model") from None

    # --- one step

    def batch(self) -> Batch:
        """This process's rows of the batch of the current step."""
        share, started = self.batch_size // self.world.size, time.perf_counter()
        rows = slice(self.world.rank * share, (self.world.rank + 1) * share)
        batch = random_crops(self.audio.train, Draw(self.config.seed, self.step, self.batch_size, rows,
                                                    self.world.device), self.config.speed)
        self.data_seconds += time.perf_counter() - started
        return batch._replace(progress=self.step / (self.config.epochs * self.steps_per_epoch))

    def train_step(self) -> None:
        total = 0.0
        for player, loss, _ in self.model.losses(self.batch()):
            optimizer = self.optimizers[player]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            gradients = [p.grad for p in self.model.players()[player].parameters() if p.grad is not None]
            self.stop_all.fill_(float(self.stop.number))  # rides along: all processes stop after the same step
            self.world.average([*gradients, self.stop_all])
            nn.utils.clip_grad_norm_(self.model.players()[player].parameters(), self.config.grad_clip)
            optimizer.step()
            self.schedulers[player].step()
            total = total + loss.detach()
        self.sums += torch.stack([total, torch.ones_like(total)])
        self.ema.update_parameters(self.model)
        self.step += 1

    def _diverged(self, what: str) -> None:
        kept = f"the last good checkpoint is kept in {self.checkpoint}" if self.checkpoint.exists() else \
            "no checkpoint had been written yet"
        raise UserError(f"training diverged at step {self.step}: {what}; {kept}. Try a lower --learning_rate or "
                        "--precision float32")

    def record(self, **values: Any) -> None:
        """Append a line to metrics.jsonl and to the history that the checkpoint carries."""
        self.history.append({"step": self.step, **values})
        if self.world.main:
            with open(self.results / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.history[-1], allow_nan=False) + "\n")

    # --- the run

    def fit(self, on_epoch: Callable[[int], None]) -> None:
        """Train to the last epoch. Returns early, with the position saved, after a stop signal."""
        if self.world.main:  # what a checkpoint does not know happened after it, and will happen again
            with replacing(self.results / "metrics.jsonl") as part:
                part.write_text("".join(json.dumps(r) + "\n" for r in self.history))
        while self.epoch_done < self.config.epochs and not self.stopped():
            self._epoch(self.epoch_done + 1)
            if self.step == (self.epoch_done + 1) * self.steps_per_epoch:
                self._finish_epoch(self.epoch_done + 1, on_epoch)
        self.save()

    def stopped(self) -> int:
        """The number of the signal that asked to stop, 0 if none: the same answer in all processes."""
        if self.world.size > 1 and self.stop_all.item() > 0:
            return self.stop.number or int(signal.SIGTERM)
        return self.stop.number if self.world.size == 1 else 0

    def _epoch(self, epoch: int) -> None:
        end, start = epoch * self.steps_per_epoch, self.step - (epoch - 1) * self.steps_per_epoch
        self.model.train()
        started = time.perf_counter()
        with progress(self.steps_per_epoch * self.batch_size, f"epoch {epoch}/{self.config.epochs}",
                      not self.world.main, initial=start * self.batch_size, unit="clip") as bar:
            while self.step < end:
                self.train_step()
                if self.step % LOG_EVERY == 0 or self.step == end:
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
        total, steps = self.sums - self.looked
        mean = total / steps
        self.looked.copy_(self.sums)
        self.world.average([mean])
        loss = mean.item()
        first = next((r["loss"] for r in self.history if "loss" in r and "epoch" not in r), loss)
        if not math.isfinite(loss):
            self._diverged(f"the loss is {loss}")
        if loss > first + EXPLODED * max(abs(first), 1):  # losses in decibels or nats may well be negative
            self._diverged(f"the loss rose from {first:.3g} to {loss:.3g}")
        self.record(loss=loss)
        bar.set_postfix(loss=f"{loss:.4f}")

    def _finish_epoch(self, epoch: int, on_epoch: Callable[[int], None]) -> None:
        """Save first, then measure and draw: a crash while measuring costs nothing but the measurement."""
        self.averaged.eval()
        figures = held_out(self.averaged, self.audio.valid, self.world.device)
        if not all(map(math.isfinite, figures.values())):
            self._diverged("the held-out figures are not finite")
        self.save()
        mean = self.sums[0] / self.sums[1]
        self.world.average([mean])
        values: dict[str, Any] = {"epoch": epoch, "loss": mean.item(), "seconds": round(self.seconds, 2),
                                  "ms_per_clip": round(1e3 * self.seconds / (self.step * self.batch_size), 3),
                                  "learning_rate": next(iter(self.schedulers.values())).get_last_lr()[0]} | figures
        self.sums.zero_()
        self.looked.zero_()
        self.epoch_done = epoch
        self.record(**values)
        on_epoch(epoch)
        self.save()
        if self.world.main:
            print(f"epoch {epoch}: loss {values['loss']:.4f}, {values['ms_per_clip']:.1f} ms/clip"
                  + "".join(f", {k} {v:.4g}" for k, v in figures.items()), flush=True)


@torch.no_grad()
def held_out(model: Family, tracks: Sequence[Track], device: torch.device) -> dict[str, float]:
    """The family's own figures, mean over clips spread evenly over the held-out tracks."""
    sums: dict[str, float] = {}
    clips = fixed_clips(tracks, VALID_CLIPS)
    for start in range(0, len(clips), 16):
        part = clips[start:start + 16]
        for key, value in model.validate(clip_batch(part, device)).items():
            sums[key] = sums.get(key, 0.0) + value * len(part) / len(clips)
    return sums


def family_name(model: Family) -> str:
    return next(name for name, family in FAMILIES.items() if family is type(model))


def a_model(name: str) -> str:
    """a vae model, an autoencoder model"""
    return f"a{'n' * (name[0] in 'aeiou')} {name} model"


def provenance() -> dict[str, str]:
    """How a checkpoint came to be: command (paths shortened to their last part), versions, machine."""
    import platform
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else \
        f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    words = [Path(word).name if os.sep in word else word for word in sys.argv]
    return {"command": " ".join(words), "torch": str(torch.__version__), "hardware": hardware,
            "date": time.strftime("%Y-%m-%d")}


# === regeneration and its figures ===

FADE = 32  # frames over which neighbouring chunks of a long file are blended: 0.64 s; they overlap at least so far
PIECE = 1000  # frames that are made audible at a time, 20 s: what stays in the cache is three times as fast


@torch.no_grad()
def decode_long(model: Family, audio: Tensor, batch: int = 8) -> Tensor:
    """Waveform [L] of any length -> decoded [1 R frames * per_frame], in chunks of one clip that overlap and are
    blended linearly in the middle of it, so that a seam has no edge and takes nothing from the chunks' own margins.
    Where a short last chunk would cost as much as a whole one, it is moved back to be one: silence after the end takes
    its share of what a clip can hold."""
    frames, overlap, scale = max(1, -(-len(audio) // HOP)), FADE + 2 * model.margin, model.per_frame
    starts = list(range(0, max(1, frames - overlap), FRAMES - overlap))
    if model.whole_clips and len(starts) > 1:
        starts[-1] = frames - FRAMES
    padded = F.pad(audio, (0, starts[-1] * HOP + CLIP - len(audio)))
    whole, device = None, next(model.parameters()).device
    ramp = (torch.arange(FADE * scale) + 0.5) / (FADE * scale)
    end = 0  # of the chunk before
    for first in range(0, len(starts), batch):
        part = starts[first:first + batch]
        chunks = torch.stack([padded[s * HOP:s * HOP + CLIP] for s in part]).to(device)
        sound = torch.tensor([min(FRAMES, frames - s) for s in part], device=device)
        for start, decoded in zip(part, model.decode(model.encode(chunks, sound)).cpu()):
            if whole is None:
                whole = decoded.new_zeros(len(decoded), (starts[-1] + FRAMES) * scale)
            skip = (end - start - FADE) // 2 * scale if start > 0 else 0  # up to the middle of the overlap
            if start > 0:
                before = whole[:, start * scale + skip:][:, :len(ramp)]
                decoded[:, skip:skip + len(ramp)] = before * (1 - ramp) + decoded[:, skip:skip + len(ramp)] * ramp
            end = start + FRAMES
            whole[:, start * scale + skip:end * scale] = decoded[:, skip:]
    return whole[None, :, :frames * scale]


@torch.no_grad()
def render_long(model: Family, decoded: Tensor, phase: str, audio: Tensor) -> Tensor:
    """Decoded [1 R ...] -> waveform as long as `audio` [L], 20 s at a time; pieces overlap and are blended so that
    their power stays even, whether their phases agree there or not."""
    frames, device, scale = decoded.shape[-1] // model.per_frame, next(model.parameters()).device, model.per_frame
    padded = F.pad(audio, (0, frames * HOP - len(audio)))
    result, ramp = torch.zeros(frames * HOP), (torch.arange(FADE * HOP) + 0.5) / (FADE * HOP)
    for start in range(0, max(1, frames - FADE), PIECE - FADE):
        end = min(frames, start + PIECE)
        original = padded[None, start * HOP:end * HOP].to(device)
        piece = model.render(decoded[..., start * scale:end * scale].to(device), phase, original)[0].cpu()
        if start > 0:
            before, after = result[start * HOP:(start + FADE) * HOP], piece[:FADE * HOP]
            alike = (before @ after / (before.norm() * after.norm()).clamp(min=1e-9)).clamp(min=0)
            power = (ramp.square() + (1 - ramp).square() + 2 * alike * ramp * (1 - ramp)).sqrt()
            piece[:FADE * HOP] = (before * (1 - ramp) + after * ramp) / power
        result[start * HOP:end * HOP] = piece
    return result[:len(audio)]


def write_wav(path: Path, audio: Tensor) -> None:
    """16-bit mono WAV; the caller has made sure that it does not clip."""
    import soundfile
    with replacing(path) as part:
        try:
            soundfile.write(part, audio.numpy(), SAMPLE_RATE, format="WAV", subtype="PCM_16")
        except soundfile.LibsndfileError as error:
            raise OSError(getattr(error, "error_string", str(error))) from None


def level_matched(estimate: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Both as loud as `original`; if a peak would clip, both are turned down together."""
    level = original.square().mean().sqrt() / estimate.square().mean().sqrt().clamp(min=1e-9)
    estimate = estimate * level.clamp(max=1000)
    peak = max(estimate.abs().max().item(), original.abs().max().item())
    gain = min(1.0, 0.999 / peak) if peak > 0 else 1.0
    return estimate * gain, original * gain


def new_figure(rows: int, columns: int, title: str, size: tuple[float, float] = (5.5, 2.6)) -> tuple[Any, Any]:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained",
                                squeeze=False)
    figure.suptitle(textwrap.fill(title, int(10 * size[0] * columns)))  # so many letters are as wide as the picture
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def show_mel(figure: Any, axis: Any, log_mel: Tensor, title: str, low: float, high: float) -> None:
    """One log-mel spectrogram [M T] in dB of a full-scale sine, time in seconds."""
    decibels = 10 / math.log(10) * log_mel
    image = axis.imshow(decibels.cpu(), origin="lower", aspect="auto", vmin=low, vmax=high, cmap="magma",
                        extent=(0, log_mel.shape[1] * HOP / SAMPLE_RATE, 0, len(log_mel)))
    axis.set(title=title, xlabel="s", ylabel="mel bin")
    figure.colorbar(image, ax=axis, label="dB")


def spectrogram_figure(path: Path, title: str, columns: Sequence[tuple[str, Tensor, Tensor]]) -> None:
    """Per column (name, original, regenerated log-mel [M T]): original, regenerated, and the difference in dB."""
    figure, axes = new_figure(3, len(columns), title)
    for (name, original, estimate), (top, middle, bottom) in zip(columns, axes.T):
        high = 10 / math.log(10) * original.max().item()
        show_mel(figure, top, original, f"{name}: original", high - 75, high)
        show_mel(figure, middle, estimate, "regenerated", high - 75, high)
        difference = 10 / math.log(10) * (estimate - original)
        image = bottom.imshow(difference.cpu(), origin="lower", aspect="auto", vmin=-20, vmax=20, cmap="RdBu_r",
                              extent=(0, original.shape[1] * HOP / SAMPLE_RATE, 0, len(original)))
        bottom.set(title="regenerated minus original", xlabel="s", ylabel="mel bin")
        figure.colorbar(image, ax=bottom, label="dB")
    save_figure(figure, path)


def inference_figure(path: Path, title: str, columns: Sequence[tuple[str, Tensor, Tensor]], model: Family) -> None:
    """Per column (name, original, regenerated waveform [L]): both waveforms, a close-up, and both spectrograms."""
    figure, axes = new_figure(4, len(columns), title)
    for (name, original, estimate), (top, close, left, right) in zip(columns, axes.T):
        length = min(len(original), 4 * CLIP)  # a picture of more than 20 s shows nothing
        seconds = np.arange(length) / SAMPLE_RATE
        loudest = int(F.avg_pool1d(original[None, :length].abs(), 320, 320).argmax()) * 320 if length >= 320 else 0
        for axis, part in ((top, slice(0, length)), (close, slice(max(0, loudest - 240), loudest + 240))):
            axis.plot(seconds[part], original[:length][part], linewidth=0.9, label="original")
            axis.plot(seconds[part], estimate[:length][part], linewidth=0.9, alpha=0.7, label="regenerated")
            axis.set(xlabel="s", ylabel="amplitude")
        top.set_title(f"{name}, 16 kHz mono")
        close.set_title("its loudest 30 ms")
        top.legend(frameon=False, loc="upper right", ncols=2)
        whole = F.pad(torch.stack([original, estimate])[:, :length], (0, -length % HOP))
        mels = model.preprocessor.log_mel(whole.to(model.preprocessor.mean.device)).cpu()
        high = 10 / math.log(10) * mels[0].max().item()
        for axis, mel, label in ((left, mels[0], "original"), (right, mels[1], "regenerated")):
            show_mel(figure, axis, mel, label, high - 75, high)
    save_figure(figure, path)


def strip_figure(path: Path, title: str, columns: Sequence[tuple[str, Tensor]]) -> None:
    """Log-mel spectrograms [M T] in rows of five."""
    width = min(5, len(columns))
    figure, axes = new_figure(-(-len(columns) // width), width, title, (3.6, 2.8))
    high = 10 / math.log(10) * max(mel.max().item() for _, mel in columns)
    for axis, (name, mel) in itertools.zip_longest(axes.flat, columns, fillvalue=("", None)):
        if mel is None:
            axis.axis("off")
        else:
            show_mel(figure, axis, mel, name, high - 75, high)
    save_figure(figure, path)


def draw_curves(trainer: Trainer) -> None:
    """training_curves.png: the loss, and each held-out figure, over epochs."""
    epochs = [r for r in trainer.history if "epoch" in r]
    steps = [(r["step"] / trainer.steps_per_epoch, r["loss"]) for r in trainer.history if "epoch" not in r]
    names = [name for name in epochs[0] if name.startswith("val_")]
    figure, axes = new_figure(1, 1 + len(names), title_of(trainer.model), (4.6, 3.6))
    axes[0, 0].plot(*zip(*steps), linewidth=0.8, marker="o" if len(steps) < 20 else None, markersize=3,  # 1 is no line
                    label=f"training, per {LOG_EVERY} steps")
    axes[0, 0].set(xlabel="epoch", ylabel="loss")
    axes[0, 0].legend(frameon=False)
    for axis, name in zip(axes[0, 1:], names):
        axis.plot([r["epoch"] for r in epochs], [r[name] for r in epochs], marker="o", markersize=3,
                  label="held out, averaged weights")
        axis.set(xlabel="epoch", ylabel=name.removeprefix("val_"))
        axis.legend(frameon=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    save_figure(figure, trainer.results / "training_curves.png")


def phase_note(phase: str) -> str:
    return f"phase: {phase}" + f" ({UPPER_BOUND})" * (phase == "original")


def title_of(model: Family, *more: str) -> str:
    rate = f"{model.latents_per_second():.4g} numbers/s"
    return " · ".join([family_name(model), rate, f"trained on {model.data['title']}", *more])


# === command line ===

GROUPS = {"run": "run", "data": "data", "optimisation": "optimisation (training)", "model": "architecture (training)",
          "regeneration": "regeneration", "evaluation": "evaluation"}
MODES = ("train", "infer", "evaluate")
GROUP_MODES = {"optimisation": ("train",), "model": ("train",), "data": ("train", "evaluate"),
               "evaluation": ("evaluate",)}  # others: all
FLAG_MODES = {"input": ("infer",), "interpolate": ("infer",), "sample": ("infer",), "output_dir": ("infer",),
              "export": ("infer",), "resume": ("train",), "prepare_data": ("train",), "musdb": ("train",),
              "compile": ("train",), "extra_root": ("train",), "phase": ("infer",), "seed": ("train", "infer")}
FLAG_DATASETS = {"musdb_root": "musdb", "musdb": "musdb", "num_samples": "synthetic", "data_root": "folder"}
CONFIG_FIELDS = {family: {f.name: f for f in dataclasses.fields(cls.config_class)} for family, cls in FAMILIES.items()}
EXAMPLES = HERE / "examples"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message} (--help lists all flags)", 2)


def device_name(text: str) -> str:
    if text in ("auto", "cpu", "cuda", "mps") or (text.startswith("cuda:") and text[5:].isdecimal() and
                                                text.isascii()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda, cuda:N or mps")


def build_parser() -> Parser:
    """All flags of all families. Only those that were given appear in the result, so that a default is never mistaken
    for a wish; each argument's group is kept in `parser.group_of`."""
    parser = Parser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110))
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    parser.group_of = {}

    def flag(group: str, name: str, text: str, **more: Any) -> None:
        groups[group].add_argument(f"--{name}", help=text.replace("%", "%%"), **more)
        parser.group_of[name] = group

    first = next(iter(FAMILIES))
    flag("run", "mode", "train, infer (regenerate) or evaluate (default train)", choices=MODES)
    flag("run", "model", f"family (default {first} to train; else what was trained last, or the shipped "
         f"{SHIPPED_DEFAULT})",
         choices=tuple(FAMILIES))
    flag("run", "checkpoint", f"file to write or read (default models/{FAMILIES[first].checkpoint_name} and the like "
         "beside this script; infer and evaluate take the shipped weights when it does not exist yet)", type=Path)
    flag("run", "results_dir", "folder for sound, pictures and records (default results/ beside this script)",
         type=Path)
    flag("run", "device", "auto, cpu, cuda, cuda:N or mps (default auto)", type=device_name)
    flag("run", "precision", "of the network's arithmetic (default auto: bfloat16 where the hardware has it)",
         choices=("auto", "float32", "bfloat16"))
    flag("run", "compile", "torch.compile the network: slow start, possibly faster after it", action="store_true")
    flag("run", "resume", "continue the run that --checkpoint holds, exactly", action="store_true")
    flag("data", "dataset", "musdb (MUSDB18 or MUSDB18-HQ), synthetic (no download) or folder (default musdb)",
         choices=tuple(DATASETS))
    flag("data", "musdb_root", "folder with train/ and test/ of MUSDB18 (default data/musdb18 beside this script)",
         type=Path)
    flag("data", "stem", "which stems: all or one of them (default all)", choices=("all", *STEMS))
    flag("data", "num_samples", "clips of --dataset synthetic (default 100)", type=number(int, 5, 1e6))
    flag("data", "data_root", "folder with audio files of your own, for --dataset folder", type=Path)
    flag("data", "extra_root", "one more folder of audio files, for training only", type=Path)
    flag("data", "musdb", "with --prepare_data: which MUSDB18 to download, sample (140 MB, 7 s of each song) or full "
         "(4.7 GB) (default sample)", choices=tuple(MUSDB_FILES))
    flag("data", "prepare_data", "only fetch and check the dataset, then exit (status "
         f"{NO_NETWORK}: can't be downloaded, {NO_FFMPEG}: ffmpeg is missing)", action="store_true")
    for name in dict.fromkeys(name for fields in CONFIG_FIELDS.values() for name in fields):
        uses = [(family, fields[name]) for family, fields in CONFIG_FIELDS.items() if name in fields]
        meta, defaults = uses[0][1].metadata, [f"{f.default} for {family}" for family, f in uses]
        if all(f.default == uses[0][1].default for _, f in uses):
            defaults = [str(uses[0][1].default)]
            if len(uses) < len(FAMILIES):
                defaults[0] += " for " + " and ".join(family for family, _ in uses)
        flag(meta["group"], name, f"{meta['help']} (default {', '.join(defaults)})", type=meta["type"],
             choices=meta["choices"])
    flag("regeneration", "input", "audio files to regenerate, any length (default: the two shipped examples)",
         type=Path, nargs="+")
    flag("regeneration", "phase", "how a mel spectrogram becomes sound: " + ", ".join(PHASES) + "; original takes the "
         f"input's own phase, which only an upper bound may (default {PHASES[0]})", choices=PHASES)
    flag("regeneration", "interpolate", "two audio files between whose latents to go in five steps", type=Path, nargs=2,
         metavar=("A", "B"))
    flag("regeneration", "sample", "make this many new clips from the prior", type=number(int, 1, 1000))
    flag("regeneration", "output_dir", "folder for NAME_reconstructed.wav (default the results folder)", type=Path)
    flag("regeneration", "export", "also write the averaged weights alone, in half precision, to this file", type=Path)
    flag("evaluation", "eval_clips", "test clips to measure, spread evenly (default 100)", type=number(int, 1))
    return parser


def check_flags(given: dict[str, Any], family_key: str | None) -> None:
    """A flag that would do nothing is a usage error, not ignored."""
    mode, group_of = given["mode"], build_parser().group_of
    for name in given:
        modes = FLAG_MODES.get(name) or GROUP_MODES.get(group_of[name], MODES)
        if mode not in modes:
            raise UserError(f"--{name} has no effect with --mode {mode}, only with --mode {' or '.join(modes)}"
                            + (": the checkpoint fixes it" if group_of[name] == "model" else ""), 2)
        owners = [family for family, fields in CONFIG_FIELDS.items() if name in fields]
        if owners and family_key is not None and family_key not in owners:
            raise UserError(f"--{name} belongs to --model {' or '.join(owners)}, not to {family_key}", 2)
        dataset = FLAG_DATASETS.get(name)
        if dataset and given.get("dataset", dataset if given.get("resume") else "musdb") != dataset:
            raise UserError(f"--{name} belongs to --dataset {dataset}", 2)
    if "musdb" in given and not given.get("prepare_data"):
        raise UserError("--musdb says what --prepare_data downloads: give both", 2)
    if "stem" in given and given.get("dataset", "musdb") == "folder":
        raise UserError("--stem: a folder of your own files has no stems; use --dataset musdb or synthetic", 2)
    if len(tasks := [name for name in ("input", "interpolate", "sample") if name in given]) > 1:
        raise UserError(f"--{tasks[0]} and --{tasks[1]} are different tasks: give one of them", 2)
    if "output_dir" in given and tasks in (["interpolate"], ["sample"]):
        raise UserError(f"--output_dir is for regenerated files; --{tasks[0]} writes to --results_dir", 2)
    if mode == "infer" and "seed" in given and "sample" not in given:
        raise UserError("--seed has no effect on regenerating, only on --sample and --mode train", 2)


def config_given(given: dict[str, Any], family: str) -> dict[str, Any]:
    return {name: given[name] for name in CONFIG_FIELDS[family] if name in given}


def default_paths(given: dict[str, Any], family: type[Family]) -> tuple[Path, Path]:
    """(checkpoint, results folder): beside this script unless the user says where."""
    return (given.get("checkpoint", HERE / "models" / family.checkpoint_name),
            given.get("results_dir", HERE / "results"))


def load_data(given: dict[str, Any], dataset: str, world: World) -> AudioData:
    """Rank 0 first: the others find its cache."""
    options = {"cache": HERE / "data" / "cache"} | given
    if world.main:
        data = DATASETS[dataset](options)
    world.wait()
    return data if world.main else DATASETS[dataset](options)


def resumed_config(given: dict[str, Any], state: dict) -> Any:
    """The run's own options; only its length and how often it saves may be changed half-way."""
    if missing := {"model", "optimizers", "schedulers", "rng", "step", "epoch_done", "sums", "looked"} - state.keys():
        raise UserError("--resume: the checkpoint holds averaged weights for regenerating, but to continue it lacks "
                        f"{', '.join(sorted(missing))}: only one that --mode train wrote can be continued")
    config = FAMILIES[state["family"]].config_class(**state["config"])
    wanted = config_given(given, state["family"])
    for name, value in wanted.items():
        if value != getattr(config, name) and name not in ("epochs", "save_every"):
            raise UserError(f"--resume continues with --{name} {getattr(config, name)}: leave out --{name} {value}, or "
                            "start a new run", 2)
    config = dataclasses.replace(config, **wanted)
    if config.epochs <= state["epoch_done"]:
        raise UserError(f"--resume: the run is complete after {state['epoch_done']} epochs; give a larger --epochs", 2)
    return config


def made_clips(given: dict[str, Any], state: dict) -> int:
    """How many synthetic clips a checkpoint was trained on: all of its tracks but those of --extra_root. Where that
    can't be told, or the folder is not the one of the run, the data will be found to differ."""
    extra, count = given.get("extra_root"), 0
    with contextlib.suppress(AttributeError, TypeError, ValueError, OverflowError):
        count = int(sum(state["data"]["tracks"].values()))
    return min(max(count - (len(audio_files(extra, "--extra_root")) if extra else 0), 3), 1_000_000)


def run_train(given: dict[str, Any], world: World, precision: torch.dtype) -> int:
    """--mode train"""
    key, state, dataset = given.get("model", next(iter(FAMILIES))), None, given.get("dataset", "musdb")
    if given.get("resume"):
        state = open_checkpoint(default_paths(given, FAMILIES[key])[0])
        if given.get("model", state["family"]) != state["family"]:
            raise UserError(f"the checkpoint holds {a_model(state['family'])}, not --model {key}", 2)
        key, dataset = state["family"], given.get("dataset", state["data"]["dataset"])
    check_flags(given | {"dataset": dataset}, key)
    if given.get("prepare_data"):
        return prepare_data(given, dataset, world)
    checkpoint, results = default_paths(given, FAMILIES[key])
    config = resumed_config(given, state) if state else FAMILIES[key].config_class(**config_given(given, key))
    known = {"num_samples": made_clips(given, state)} if state and dataset == "synthetic" else {}
    data = load_data(known | given, dataset, world)
    if state and data.info() != state["data"]:
        raise UserError(f"{checkpoint} was trained on other data ({state['data']['title']}, tracks "
                        f"{state['data']['tracks']}): give its --dataset, folders, --stem, --num_samples")
    torch.manual_seed(config.seed)
    model = FAMILIES[key](config, data.info()).to(world.device)
    if world.main:
        check_outputs(results, checkpoint)
    if not state:
        model.prepare(lambda: training_clips(data, world.device), lambda: (  # negative steps: not those of the training
            random_crops(data.train, Draw(config.seed, -1 - i, 16, slice(None), world.device), config.speed)
            for i in range(60)))
        world.average([t for t in model.state_dict().values() if t.is_floating_point()])  # all start from the same
    trainer = Trainer(model, data, world, precision, given.get("compile", False), checkpoint, results)
    if state:
        trainer.load(state)
    if world.main:
        keep_previous(checkpoint, state)
        announce(trainer)

    def on_epoch(epoch: int) -> None:
        if world.main and (epoch in (1, 5, config.epochs) or epoch % 10 == 0):
            draw_curves(trainer)
            regenerate_held_out(trainer, epoch)

    trainer.fit(on_epoch)
    if trainer.stopped() and trainer.epoch_done < config.epochs:
        if world.main:
            print(f"stopped at step {trainer.step} of {config.epochs * trainer.steps_per_epoch}; --resume continues "
                  f"from {checkpoint}", file=sys.stderr)
        return 128 + trainer.stopped()
    if world.main:
        print(f"trained for {trainer.seconds / 60:.1f} minutes, {trainer.data_seconds / trainer.seconds:.1%} of it on "
              f"crops and augmentation; model in {checkpoint}, sound and pictures in {results}")
    return 0


def prepare_data(given: dict[str, Any], dataset: str, world: World) -> int:
    """--prepare_data: fetch what is missing, read everything once into the cache."""
    root = given.get("musdb_root", HERE / "data" / "musdb18")
    if dataset == "musdb" and world.main and ("musdb" in given or "musdb_root" not in given):
        download_musdb(given.get("musdb", "sample"), root)
    data = load_data(given, dataset, world)
    counts = f"{len(data.train)} training, {len(data.valid)} validation and {len(data.test)} test tracks"
    print(f"{data.title}: {counts} are ready")
    return 0


def training_clips(data: AudioData, device: torch.device) -> Iterator[Batch]:
    """Up to 2,000 clips spread evenly over the training set, in a fixed shuffled order, 16 at a time."""
    clips = fixed_clips(data.train, 2000)
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(clips), 16):
        yield clip_batch([clips[i] for i in order[start:start + 16]], device)


def check_outputs(results: Path, checkpoint: Path) -> None:
    check_writable(results)
    check_writable(checkpoint.parent)
    if checkpoint.is_dir():
        raise UserError(f"{checkpoint} is a folder: --checkpoint takes a file")


def keep_previous(checkpoint: Path, state: dict | None) -> None:
    """A new run does not destroy the model of an earlier one: it is moved aside."""
    if state is None and checkpoint.exists():
        names = (checkpoint.with_suffix(f".previous{n}{checkpoint.suffix}")
                 for n in itertools.count(1))
        old = next(name for name in names if not name.exists())
        os.replace(checkpoint, old)
        print(f"the model that was in {checkpoint} is kept as {old.name} (--resume would have continued it)")


def announce(trainer: Trainer) -> None:
    """What is about to happen, in a few lines."""
    model, world, config, data = trainer.model, trainer.world, trainer.config, trainer.audio
    size = sum(p.numel() for p in model.parameters()) / 1e6
    seconds = data.info()["seconds"]
    print(f"{family_name(model)} ({size:.2f} M parameters, {model.latents_per_second():.4g} latent numbers per second) "
          f"on {data.title}: {len(data.train)} training tracks ({seconds['train'] / 60:.1f} minutes), "
          f"{len(data.valid)} for validation, {len(data.test)} for test; {world.device}, "
          f"{str(model.precision).removeprefix('torch.')}, "
          f"{world.size} process(es)", flush=True)
    empty = int((model.preprocessor.filters.amax(0) == 0).sum())
    if empty and not trainer.step:  # said where it can still be changed
        print(f"warning: {empty} of {config.n_mels} mel bands are narrower than the transform resolves and stay empty: "
              "they hold no sound; use fewer --n_mels", file=sys.stderr)
    if trainer.step:
        print(f"resuming {trainer.checkpoint} at step {trainer.step} of {config.epochs * trainer.steps_per_epoch}")


@torch.no_grad()
def regenerate_held_out(trainer: Trainer, epoch: int) -> None:
    """Two test clips as the averaged weights of this epoch give them back: WAV files and a picture, so that progress
    can be heard. After the last epoch also under the names of the finished model."""
    model, last = trainer.averaged, epoch == trainer.config.epochs
    model.eval()
    clips = fixed_clips(trainer.audio.test or trainer.audio.valid, 64)
    loud = sorted(clips, key=lambda clip: -float(cut(*clip).square().mean()))
    chosen = loud[:1] + next(([c] for c in loud if c[0].name != loud[0][0].name), loud[1:2])
    columns = []
    for i, (track, start) in enumerate(chosen):
        audio = cut(track, start)[:len(track.audio) - start]
        decoded = decode_long(model, audio)
        estimate, original = level_matched(render_long(model, decoded, model.phases[0], audio), audio)
        folder, stamp = trainer.results / "progress", f"epoch_{epoch:03d}_"
        write_wav(folder / f"{stamp}{i}.wav", estimate)
        if last:
            write_wav(trainer.results / f"audio_reconstructed_{i}.wav", estimate)
            write_wav(trainer.results / f"audio_original_{i}.wav", original)
        both = F.pad(torch.stack([original, estimate]), (0, -len(audio) % HOP)).to(trainer.world.device)
        columns.append((f"{track.name[:24]} ({track.stem})", *model.preprocessor.log_mel(both).cpu()))
    title = title_of(model, f"epoch {epoch}", phase_note(model.phases[0]))
    spectrogram_figure(folder / f"spectrogram_{stamp[:-1]}.png", title, columns)
    if last:
        spectrogram_figure(trainer.results / "spectrogram_comparison.png", title, columns)


def open_model(given: dict[str, Any], world: World, precision: torch.dtype) -> tuple[Family, dict, Path, Path]:
    """(model, its checkpoint's content and path, results folder). Without --checkpoint and --model: what was trained
    last; before any training, the shipped weights. A checkpoint that is named and missing is an error."""
    trained = [name for name, family in FAMILIES.items() if (HERE / "models" / family.checkpoint_name).exists()]
    latest = max(trained, key=lambda name: (HERE / "models" / FAMILIES[name].checkpoint_name).stat().st_mtime,
                 default=SHIPPED_DEFAULT)
    key = given.get("model", latest)
    path, results = default_paths(given, FAMILIES[key])
    if "checkpoint" not in given and not path.exists():
        path = HERE / "pretrained" / FAMILIES[key].checkpoint_name
        if not path.exists():
            raise UserError(f"no {key} model yet: train one with --mode train --model {key}, or name a checkpoint with "
                            "--checkpoint")
    state = open_checkpoint(path)
    if given.get("model", state["family"]) != state["family"]:
        raise UserError(f"{path} holds {a_model(state['family'])}, not --model {given['model']}: name another "
                        "--checkpoint", 2)
    check_flags(given, state["family"])
    model = restore_model(state, **config_given(given, state["family"])).to(world.device).eval()
    model.precision = precision
    if given.get("phase", model.phases[0]) not in model.phases:
        raise UserError(f"--phase {given['phase']}: {a_model(state['family'])} makes its own phase; leave the flag "
                        "out", 2)
    if world.main:
        check_writable(results)
    return model, state, path, results


def run_infer(given: dict[str, Any], world: World, precision: torch.dtype) -> int:
    """--mode infer"""
    if world.size > 1:
        raise UserError("--mode infer runs in one process: start it without torchrun", 2)
    model, state, path, results = open_model(given, world, precision)
    shipped = " (the shipped weights)" if path.parent == HERE / "pretrained" else ""
    print(f"{title_of(model)}, from {path}{shipped}", flush=True)
    if "export" in given:
        if given["export"].resolve() == path.resolve():
            raise UserError(f"--export {given['export']} is the checkpoint itself: name another file", 2)
        save_checkpoint(given["export"], export_state(model, state))
        print(f"averaged weights in half precision -> {given['export']}")
    phase = given.get("phase", model.phases[0])
    if "sample" in given:
        return run_sample(model, given["sample"], given.get("seed", model.config.seed), phase, results)
    if "interpolate" in given:
        return run_interpolate(model, given["interpolate"], phase, results)
    return run_regenerate(model, given, phase, results)


def export_state(model: Family, state: dict) -> dict:
    """What is shipped: averaged weights in half precision, the description, the last figures and the origin."""
    return {"format": FORMAT, "family": state["family"], "config": dataclasses.asdict(model.config),
            "data": state["data"], "ema": module_state(model, half=True),
            "history": [r for r in state["history"] if "epoch" in r][-1:], "made": state["made"]}


def run_regenerate(model: Family, given: dict[str, Any], phase: str, results: Path) -> int:
    """Give every file back, compare, and measure."""
    own = given.get("input")
    files, output = own or sorted(EXAMPLES.glob("*.flac")), given.get("output_dir", results)
    if not files:
        raise UserError(f"no example in {EXAMPLES}: name audio files with --input")
    names = reconstructed_names(files) if own else [f"audio_reconstructed_{i}.wav" for i in range(len(files))]
    if taken := {(output / n).resolve() for n in names} & {f.resolve() for f in files}:
        raise UserError(f"{min(taken)} is both an input and an output: choose another --output_dir", 2)
    check_writable(output)
    columns, clips, started, seconds = [], [], time.perf_counter(), 0.0
    for i, (file, name) in enumerate(zip(files, names)):
        audio = read_audio(file)
        seconds += len(audio) / SAMPLE_RATE
        raw = render_long(model, decode_long(model, audio), phase, audio)
        if not torch.isfinite(raw).all():
            raise UserError(f"{file}: the result is not finite; use --precision float32")
        estimate, original = level_matched(raw, audio)
        write_wav(output / name, estimate)
        if not own:
            write_wav(output / f"audio_original_{i}.wav", original)
        print(f"{file.name} ({len(audio) / SAMPLE_RATE:.1f} s) -> {output / name}", flush=True)
        if i < 2:
            columns.append((file.stem[:32], original, estimate))
        track = Track(file.name, "file", audio.numpy())
        clips += [(*clip, raw) for clip in fixed_clips([track], 8)]
    spent = time.perf_counter() - started
    print(f"{seconds:.1f} s of sound in {spent:.1f} s: {seconds / spent:.1f} x real time on "
          f"{next(model.parameters()).device}, {phase_note(phase)}")
    inference_figure(results / "inference_comparison.png", title_of(model, phase_note(phase)), columns, model)
    report = {"model": family_name(model), "latent_numbers_per_second": model.latents_per_second(), "phase": phase,
              "original_phase": UPPER_BOUND, "files": [str(f) for f in files], "seconds": round(spent, 2),
              "machine": provenance()}
    report["rows"] = measure_rows(model, clips, phase)
    write_json(results / "inference.json", report)
    print_rows(report["rows"], "all")
    print(f"-> {results / 'inference_comparison.png'}, {results / 'inference.json'}")
    return 0


def reconstructed_names(files: Sequence[Path]) -> list[str]:
    """NAME.wav gives NAME_reconstructed.wav; two files of the same name would overwrite each other."""
    names = [f"{file.stem}_reconstructed.wav" for file in files]
    if doubles := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two of the --input files would be written to {min(doubles)}: regenerate them one by one, "
                        "with different --output_dir", 2)
    return names


@torch.no_grad()
def run_sample(model: Family, count: int, seed: int, phase: str, results: Path) -> int:
    """--sample N: new clips from the prior."""
    if phase == "original":
        raise UserError("--phase original: a new clip has no original phase to take; leave the flag out", 2)
    columns, device = [], next(model.parameters()).device
    for i in range(count):
        decoded = model.sample(Noise(seed, [i], device))
        audio = model.render(decoded, phase)[0].cpu()
        write_wav(results / f"sample_{i}.wav", audio * min(1.0, 0.999 / max(audio.abs().max().item(), 1e-9)))
        columns.append((f"sample {i}", model.preprocessor.unstandardise(decoded)[0].cpu()))
    strip_figure(results / "samples.png", title_of(model, "from the prior"), columns[:25])
    print(f"{count} clip(s) of {CLIP / SAMPLE_RATE:.2f} s -> {results / 'sample_0.wav'} ..., {results / 'samples.png'}")
    return 0


@torch.no_grad()
def run_interpolate(model: Family, files: Sequence[Path], phase: str, results: Path) -> int:
    """--interpolate A B: from the loudest clip of A to that of B in five steps, in latent space."""
    if not model.can_interpolate:
        raise UserError(f"--interpolate: {a_model(family_name(model))} has no latent space to walk: use --model "
                        + " or ".join(name for name, family in FAMILIES.items() if family.can_interpolate), 2)
    if phase == "original":
        raise UserError("--phase original: a sound between two has no original phase to take; leave the flag out", 2)
    tracks = [Track(file.name, "file", read_audio(file, "--interpolate").numpy()) for file in files]
    ends = [max(fixed_clips([track]), key=lambda clip: float(cut(*clip).square().sum())) for track in tracks]
    start, end = model.encode(clip_batch(ends, next(model.parameters()).device).audio).split(1)
    pieces, columns = [], []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        decoded = model.decode(start + share * (end - start))
        piece = model.render(decoded, phase)[0].cpu()
        edge = (torch.arange(HOP) + 0.5) / HOP  # 20 ms in and out, so that the joints do not click
        piece[:HOP] *= edge
        piece[-HOP:] *= edge.flip(0)
        pieces.append(piece)
        columns.append((f"{1 - share:.0%} A, {share:.0%} B", model.preprocessor.unstandardise(decoded)[0].cpu()))
    audio = torch.cat(pieces)
    write_wav(results / "interpolation.wav", audio * min(1.0, 0.999 / max(audio.abs().max().item(), 1e-9)))
    strip_figure(results / "interpolation.png", title_of(model, f"A = {files[0].name}, B = {files[1].name}"), columns)
    print(f"five steps of {CLIP / SAMPLE_RATE:.2f} s -> {results / 'interpolation.wav'}, "
          f"{results / 'interpolation.png'}")
    return 0


def run_evaluate(given: dict[str, Any], world: World, precision: torch.dtype) -> int:
    """--mode evaluate: every metric on the test split, between its floor and its ceilings."""
    if world.size > 1:
        raise UserError("--mode evaluate runs in one process: start it without torchrun", 2)
    model, state, path, results = open_model(given, world, precision)
    data = load_data(given, given.get("dataset", "musdb"), world)
    clips = fixed_clips(data.test, given.get("eval_clips", 100))
    started = time.perf_counter()
    report = {"model": family_name(model), "checkpoint": str(path), "checkpoint_sha256": file_digest(path),
              "parameters": sum(p.numel() for p in model.parameters()), "trained_on": state["data"]["title"],
              "latent_numbers_per_second": model.latents_per_second(), "dataset": data.title, "split": "test",
              "clips": len(clips), "tracks": len({track.name for track, _ in clips}), "device": str(world.device),
              "precision": str(precision).removeprefix("torch."), "original_phase": UPPER_BOUND}
    report["rows"] = measure_rows(model, clips, progress_title="measuring")
    report |= {"seconds": round(time.perf_counter() - started, 1), "machine": provenance(), "metrics": {
        name: dict(zip(("unit", "better", "definition"), entry)) for name, entry in METRICS.items()}}
    write_json(results / "evaluation.json", report)
    print(f"{title_of(model)}\non the test split of {data.title}: {len(clips)} clips of {report['tracks']} tracks")
    for stem in dict.fromkeys(["all", *(track.stem for track, _ in clips)]):
        print_rows(report["rows"], stem)
    print(f"-> {results / 'evaluation.json'}")
    return 0


MEMORY_REMEDY = {"train": "lower --batch_size, or give less data", "infer": "give fewer or shorter files",
                 "evaluate": "close other programs, or give less data"}


def out_of_memory(error: BaseException) -> bool:
    """For that of the CPU, torch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("DefaultCPUAllocator", "can't allocate memory"))


def flush_or_drop() -> None:
    """What was printed and can't be written is dropped: the interpreter would complain about it at its end."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed before the start
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    world, given = None, {"mode": "train"}
    try:
        given |= vars(build_parser().parse_args(argv))
        check_flags(given, given.get("model"))
        world = World(given.get("device", "auto"))
        precision = pick_precision(given.get("precision", "auto"), world.device)
        run = {"train": run_train, "infer": run_infer, "evaluate": run_evaluate}[given["mode"]]
        status = run(given, world, precision)
        print(end="", flush=True)  # now, while an error can still be told
        world.wait()  # a process that leaves early breaks the connections of those still at work
        return status
    except UserError as error:
        print("error:", " ".join(str(error).split("\n")), file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`: the reader has seen enough
        return 128 + signal.SIGPIPE
    except OSError as error:  # a disk that fills up, a folder that vanishes
        print(f"error: {error.filename or 'file'}: {error.strerror or error}; checkpoints written so far are whole",
              file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"error: out of memory: {MEMORY_REMEDY[given['mode']]}"
              + ", or use --device cpu" * isinstance(error, torch.OutOfMemoryError), file=sys.stderr)
        return 1
    finally:
        flush_or_drop()
        if world is not None:
            world.close()


if __name__ == "__main__":
    exit_status = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # gloo's threads now and then abort an orderly shutdown (torch 2.11)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
