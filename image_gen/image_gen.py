#!/usr/bin/env python3
"""Train, sample and honestly measure small generative models of images: one file, no framework.

    python image_gen.py                                         train a diffusion model on MNIST
    python image_gen.py --mode infer --num_samples 16           draw digits (shipped weights if none were trained yet)
    python image_gen.py --mode evaluate                         FID, IS, KID, precision, recall ... beside their floors

Read top to bottom; `grep '^# ===' image_gen.py` prints this table of contents:
    plumbing, data, building blocks, diffusion, VAE, GAN, classifier, registry, metrics, trainer, figures, command line

Letters for shapes: B batch, C channels, H W height and width, N images, D features, K classes, E embedding width.
Images are float in [-1, 1] inside the models and uint8 in [0, 255] outside of them.

References
    [Ho20]     Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020
    [Nichol21] Nichol, Dhariwal: Improved Denoising Diffusion Probabilistic Models, 2021
    [Song21]   Song, Meng, Ermon: Denoising Diffusion Implicit Models, 2021
    [Salimans22] Salimans, Ho: Progressive Distillation for Fast Sampling of Diffusion Models, 2022
    [HoSal22]  Ho, Salimans: Classifier-Free Diffusion Guidance, 2022
    [Karras22] Karras, Aittala, Aila, Laine: Elucidating the Design Space of Diffusion-Based Generative Models, 2022
    [Lu22]     Lu et al.: DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, 2022
    [Lipman23] Lipman et al.: Flow Matching for Generative Modeling, 2023
    [Esser24]  Esser et al.: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024
    [Kingma21] Kingma, Salimans, Poole, Ho: Variational Diffusion Models, 2021
    [Kingma14] Kingma, Welling: Auto-Encoding Variational Bayes, 2014
    [Higgins17] Higgins et al.: beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework, 2017
    [Rybkin21] Rybkin, Daniilidis, Levine: Simple and Effective VAE Training with Calibrated Decoders, 2021
    [Theis16]  Theis, van den Oord, Bethge: A Note on the Evaluation of Generative Models, 2016
    [Good14]   Goodfellow et al.: Generative Adversarial Networks, 2014
    [Radford16] Radford, Metz, Chintala: Unsupervised Representation Learning with DCGANs, 2016
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
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import signal
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent

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

MNIST_MD5 = {  # of the unpacked files, so that an interrupted unpacking is noticed as well
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
NO_NETWORK = 3  # exit status that says "the dataset could not be downloaded", and nothing else
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
DATA_KEYS = ("dataset", "title", "channels", "image_size", "classes", "class_counts", "train_images")


@dataclass
class Images:
    """A dataset in memory: uint8 [N C H W] with int64 labels [N] (all 0 when there is one class)."""
    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: list[str]
    title: str  # for figures and messages

    def info(self) -> dict:
        """What a model must know about its data; stored in every checkpoint."""
        counts = torch.bincount(self.train_labels, minlength=len(self.classes)).tolist()
        channels, size = self.train.shape[1], self.train.shape[-1]
        return dict(zip(DATA_KEYS, (self.name, self.title, channels, size, self.classes, counts, len(self.train))))


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float [-1, 1]"""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], rounded to the nearest level as a saved picture is"""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def damaged_files(folder: Path, sums: dict[str, str]) -> list[Path]:
    """Those of the files with known md5 sums that are missing or other than they were."""
    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""
    return [folder / name for name, digest in sums.items() if md5(folder / name) != digest]


def download(title: str, megabytes: int, folder: Path, damaged: Callable[[], list[Path]], fetch: Callable[[], Any],
             hint: str, attempts: int = 3) -> None:
    """Fetch a dataset with torchvision (md5). Raises `UserError` with code 3 when it can't be reached."""
    import errno
    import http.client
    import socket
    check_writable(folder)
    socket.setdefaulttimeout(30)  # torchvision sets none: a stalled connection would hang for ever
    print(f"{title}: downloading about {megabytes} MB into {folder}", flush=True)
    for attempt in range(attempts):
        for path in damaged():  # torchvision takes any file of the right name for a finished download
            path.unlink(missing_ok=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                fetch()
            reason = f"the files that arrived are not {title}'s"
        except (OSError, http.client.HTTPException, RuntimeError, EOFError, ValueError, tarfile.TarError) as error:
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Tried")]
            reason = (lines[-1] if lines else type(error).__name__).strip("<>")[:160]
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"can't write {folder} ({error.strerror}); free some space or name another folder with "
                                "--data_root") from None
        if not damaged():
            return
        if attempt + 1 < attempts:
            time.sleep(2 ** attempt)
    raise UserError(f"{title} can't be downloaded ({reason}; {attempts} attempts): connect to a network, name a folder "
                    f"that has {hint} with --data_root, or use --dataset digits, which needs no download", NO_NETWORK)


def provide(world: World | None, own: bool, title: str, megabytes: int, folder: Path,
            damaged: Callable[[], list[Path]], fetch: Callable[[], Any], hint: str) -> None:
    """Download what is missing, once for all processes; damaged files in a folder of the user's `own` stay."""
    if world is None or world.main:
        bad = damaged()
        if own and any(path.exists() for path in bad):
            names = ", ".join(path.name for path in bad if path.exists())
            raise UserError(f"{folder}: {names} is truncated or not {title}'s file (md5 differs): delete it, and it is "
                            "downloaded again")
        if bad:
            download(title, megabytes, folder, damaged, fetch, hint)
    if world is not None:
        world.wait()


def load_mnist(root: Path | None, _size: int | None, world: World | None = None) -> Images:
    """The 60,000 + 10,000 handwritten digits, [1 28 28]; downloaded unless the user names a folder of their own."""
    from torchvision.datasets import MNIST
    given, root, own = root is not None, root or HERE / "data", os.environ.get("MNIST_MIRROR")
    only = own and os.environ.get("MNIST_MIRROR_ONLY") == "1"
    mirrors = ([own.rstrip("/") + "/"] if own else []) + ([] if only else list(MNIST.mirrors))
    source = type("MNIST", (MNIST,), {"mirrors": mirrors})  # torchvision names the folder after the class
    raw = root / "MNIST" / "raw"
    provide(world, given, "MNIST", 12, raw, lambda: damaged_files(raw, MNIST_MD5),
            lambda: source(str(root), download=True), "MNIST/raw/*-ubyte")
    train, test = (MNIST(str(root), train=part, download=False) for part in (True, False))
    return Images("mnist", train.data[:, None], train.targets, test.data[:, None], test.targets, list("0123456789"),
                  "MNIST")


def load_cifar10(root: Path | None, _size: int | None, world: World | None = None) -> Images:
    """The 50,000 + 10,000 small photographs of ten kinds of things, [3 32 32]; downloaded as MNIST is."""
    from torchvision.datasets import CIFAR10
    return load_cifar(CIFAR10, "cifar10", "CIFAR-10", root, world)


def load_cifar100(root: Path | None, _size: int | None, world: World | None = None) -> Images:
    """As many photographs of a hundred other kinds of things."""
    from torchvision.datasets import CIFAR100
    return load_cifar(CIFAR100, "cifar100", "CIFAR-100", root, world)


def load_cifar(source: Any, name: str, title: str, root: Path | None, world: World | None) -> Images:
    """torchvision's `source`, whose files are pickles: their md5 sums are checked before any is opened."""
    given, root = root is not None, root or HERE / "data"
    folder, archive = root / source.base_folder, root / source.filename
    sums = dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])

    def fetch() -> None:
        source(str(root), download=True)
        archive.unlink()

    provide(world, given, title, 170, folder, lambda: damaged_files(folder, sums), fetch, source.base_folder)
    train, test = (source(str(root), train=part) for part in (True, False))
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    return Images(name, pixels[0], torch.tensor(train.targets), pixels[1], torch.tensor(test.targets),
                  list(train.classes), title)


def load_digits(root: Path | None, _size: int | None, _world: World | None = None) -> Images:
    """scikit-learn's 1,797 handwritten digits, [1 8 8], 17 grey levels; a fixed stratified fifth is held out."""
    if root is not None:
        raise UserError("--data_root has no effect with --dataset digits, which scikit-learn holds: leave it out", 2)
    from sklearn.datasets import load_digits as read
    from sklearn.model_selection import train_test_split
    images, labels = read(return_X_y=True)
    images = torch.from_numpy(images.reshape(-1, 1, 8, 8) * (255 / 16)).round().to(torch.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    labels = torch.from_numpy(labels).long()
    return Images("digits", images[train], labels[train], images[test], labels[test], list("0123456789"),
                  "digits (scikit-learn)")


def open_image(path: Path) -> Any:
    """A PIL image in mode L or RGB: 16-bit scaled, palette expanded, first frame of an animation, alpha on white."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it remarks on odd metadata; what can't be read is an error all the same
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                image.load()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if not path.is_file():
            raise UserError(f"{path} is not a file: name an image file") from None
        reason = "no image format is recognised in it" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path} can't be read as an image ({reason}): repair or remove it") from None
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image, dtype=np.float64)
        scale = 257 if image.mode.startswith("I;16") or levels.max(initial=0) > 255 else 1
        return Image.fromarray(np.clip(levels / scale, 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "P") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
        red, green, blue = image.split()
        return red if red.tobytes() == green.tobytes() == blue.tobytes() else image
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def read_image_folder(folder: Path, size: int) -> tuple[list[np.ndarray], list[str]]:
    """All pictures below `folder`, centre-cropped to a square and resized: arrays [H W] or [H W 3], labels by
    sub-folder ("" when a picture lies in `folder` itself)."""
    from PIL import ImageOps
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    arrays = [np.asarray(ImageOps.fit(open_image(path), (size, size))) for path in paths]
    return arrays, [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]


def load_folder(root: Path | None, size: int | None, _world: World | None = None) -> Images:
    """A folder of one's own pictures. Sub-folders are labels. `train/` and `test/` inside it are taken as the split,
    otherwise a tenth, drawn with a fixed seed, is held out. Colour if any picture has colour, else grey."""
    if root is None:
        raise UserError("--dataset folder needs --data_root DIR, the folder with your images", 2)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: --data_root takes the folder with your images")
    size = size or 32
    split = (root / "train").is_dir() and (root / "test").is_dir()
    arrays, labels = read_image_folder(root / "train" if split else root, size)
    held_out, held_labels = read_image_folder(root / "test", size) if split else ([], [])
    if len(arrays) < 2 or (split and not held_out):
        raise UserError(f"{root} holds {len(arrays) + len(held_out)} image(s) ({', '.join(sorted(IMAGE_SUFFIXES))}): "
                        "at least two are needed, one to train on and one to hold out")
    classes = sorted(set(labels))
    if unknown := set(held_labels) - set(classes):
        raise UserError(f"{root / 'test'} has the class {min(unknown)!r} that {root / 'train'} lacks: make them agree")
    depth = 3 if any(a.ndim == 3 for a in arrays + held_out) else 1

    def stack(items: list[np.ndarray]) -> Tensor:
        planes = [np.broadcast_to(a[..., None] if a.ndim == 2 else a, (size, size, depth)) for a in items]
        return torch.from_numpy(np.stack(planes)).permute(0, 3, 1, 2).contiguous()

    images, targets = stack(arrays), torch.tensor([classes.index(name) for name in labels])
    if split:
        return Images("folder", images, targets, stack(held_out),
                      torch.tensor([classes.index(name) for name in held_labels]), classes,
                      root.resolve().name)
    order = some_rows(images, len(images))
    train, test = order[max(1, len(images) // 10):], order[:max(1, len(images) // 10)]
    return Images("folder", images[train], targets[train], images[test], targets[test], classes, root.resolve().name)


def some_rows(images: Tensor, count: int) -> Tensor:
    """Numbers of `count` images, drawn with a fixed seed: the first ones of a file are rarely typical (MNIST's test
    set begins with its cleaner half)."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]


DATASETS: dict[str, Callable[..., Images]] = {"mnist": load_mnist, "cifar10": load_cifar10,
                                              "cifar100": load_cifar100, "digits": load_digits, "folder": load_folder}


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
    images: Tensor  # [B C H W] in [-1, 1]
    labels: Tensor  # [B] int64
    draw: Draw


class ImageNoise:
    """Noise for a list of image numbers: image i of seed s gets the same numbers in a batch of any size."""

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed32(seed, int(i), 1)) for i in indices]
        self.device = device

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, *shape: int) -> Tensor:
        """[B *shape] from N(0, 1); each call goes on where the last one ended."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

# === building blocks ===


class PositionalEncoding(nn.Module):
    """Sinusoidal embedding of diffusion times: [B] in 1..1000 -> [B E], sines then cosines ([Ho20] appendix B)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.arange(width // 2) * (-math.log(10_000) / (width // 2))),
                             persistent=False)

    def forward(self, times: Tensor) -> Tensor:
        angles = times.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


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
        self.heads = max(1, channels // 48)
        while channels % self.heads:
            self.heads -= 1
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [B heads HW C/heads]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(b, c, h, w))


def over_processes(mean: Tensor) -> Tensor:
    """The mean of a tensor over all processes, differentiable; every process must come here."""
    if not torch.distributed.is_initialized():
        return mean
    from torch.distributed.nn.functional import all_reduce
    return all_reduce(mean) / torch.distributed.get_world_size()


class BatchNorm(nn.Module):
    """Batch norm over the whole batch also where several processes share it (PyTorch's own does so on CUDA only)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.02 * torch.randn(channels))  # [Radford16]
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        means, variances = self.running_mean, self.running_var
        if not (self.training and torch.distributed.is_initialized()):
            return F.batch_norm(x, means, variances, self.weight, self.bias, self.training)
        h = x.float()
        mean, power = over_processes(torch.stack([h.mean((0, 2, 3)), h.square().mean((0, 2, 3))])).unbind()
        variance = power - mean.square()
        with torch.no_grad():
            count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
            means.lerp_(mean, 0.1)
            variances.lerp_(variance * (count / max(1, count - 1)), 0.1)
        scale = self.weight * (variance + 1e-5).rsqrt()
        return (h * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


def pyramid(data: dict, width: int) -> tuple[int, list[int]]:
    """(side of the coarsest feature map, channels from it up to the image): 28 pixels -> 7, [2 width, width, C]."""
    side, levels = data["image_size"], 0
    while side > 4 and side % 2 == 0:
        side, levels = side // 2, levels + 1
    if side > 16:
        raise UserError(f"images of {data['image_size']} pixels can't be halved down to 16 or fewer: use an "
                        "--image_size divisible by a higher power of two", 2)
    return side, [width * 2 ** min(level, 3) for level in reversed(range(levels))] + [data["channels"]]


def convolved(channels: int, convs: int, norm: Callable[[int], nn.Module], activation: nn.Module) -> list[nn.Module]:
    """3x3 convolutions that keep the resolution. On 28 pixels the strided ones alone are too shallow: after one epoch
    of MNIST, one more at each resolution halves the GAN's FID."""
    layers = [(nn.Conv2d(channels, channels, 3, padding=1), norm(channels), activation) for _ in range(convs)]
    return [layer for group in layers for layer in group]


def downward(widths: Sequence[int], convs: int, norm: Callable[[int], nn.Module],
             activation: nn.Module) -> nn.Sequential:
    """Image -> coarsest feature map by 4x4 convolutions of stride 2; no norm after the first ([Radford16])."""
    return nn.Sequential(*(layer for i, (a, b) in enumerate(itertools.pairwise(reversed(widths))) for layer in (
        nn.Conv2d(a, b, 4, stride=2, padding=1), norm(b) if i else nn.Identity(), activation,
        *convolved(b, convs, norm, activation))))


def upward(widths: Sequence[int], convs: int, norm: Callable[[int], nn.Module], activation: nn.Module) -> nn.Sequential:
    """Coarsest feature map -> image by 4x4 transposed convolutions of stride 2, each after norm and activation."""
    return nn.Sequential(*(layer for a, b in itertools.pairwise(widths) for layer in (
        norm(a), activation, *convolved(a, convs, norm, activation),
        nn.ConvTranspose2d(a, b, 4, stride=2, padding=1))))


class Family(nn.Module, abc.ABC):
    """What the trainer, the checkpoints and the command line know of a model; nothing else asks what it is.

    Subclasses set `config_class`, `checkpoint_name` (default file in models/) and `results_folder` (below results/).
    """
    config_class: type
    checkpoint_name: str
    results_folder: str
    can_sample = True
    tasks: tuple[str, ...] = ("sample", "interpolate")  # of --mode infer
    labelled = True  # whether images are drawn for given classes, where the data has any
    panel_every = 10  # epochs between pictures of samples (always after the first, the fifth and the last)
    descends = True  # whether the loss is to fall: if so, one that explodes stops the run
    measures_held_out = False  # whether `validate` measures the model itself: then on all test images, if not too many

    def __init__(self, config: Any, data: dict) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.labelled = self.labelled and len(data["classes"]) > 1
        self.precision = torch.float32

    def cast(self) -> Any:
        """The autocast region of the forward passes, in the precision that the run has chosen."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision is torch.bfloat16)

    def players(self) -> dict[str, nn.Module]:
        """Sub-modules that have an optimizer of their own."""
        return {"model": self}

    def compilable(self) -> list[nn.Module]:
        return list(self.players().values())

    @abc.abstractmethod
    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yield (player, loss, statistics); the trainer steps that player before it asks for the next."""

    def validate(self, batch: Batch) -> dict[str, float]:
        """Figures on held-out data; {} where the family has none."""
        return {}

    def warnings(self, figures: dict[str, Any]) -> list[str]:
        """What the figures of an epoch (means of statistics, metrics) say against the run, a line each."""
        return []

    def sample(self, labels: Tensor | None, noise: ImageNoise) -> Tensor:
        """Draw images [B C H W] in [-1, 1], one for each item of `noise`."""
        raise UserError(f"a {type(self).__name__} draws no images: use --model " + " or ".join(
            name for name, family in FAMILIES.items() if family.can_sample))

    def describe_sampling(self) -> dict[str, Any]:
        """How samples are made, for figures and records."""
        return {}


@dataclass(frozen=True)
class RunConfig:
    """Options of every family. Groups `optimisation` and `model` belong to training and are read from the checkpoint
    afterwards; `sampling` may be changed at any time."""
    epochs: int = option(20, "optimisation", "passes over the training set", number(int, 1))
    batch_size: int = option(64, "optimisation", "images per step, over all processes", number(int, 1))
    learning_rate: float = option(1e-3, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    weight_decay: float = option(0.01, "optimisation", "of AdamW", number(float, 0))
    adam_beta1: float = option(0.9, "optimisation", "AdamW's memory of gradients", number(float, 0, 0.9999))
    adam_beta2: float = option(0.99, "optimisation", "AdamW's memory of squared gradients", number(float, 0, 0.999999))
    warmup_steps: int = option(200, "optimisation", "steps of linear warm-up", number(int, 0))
    decay_fraction: float = option(0.6, "optimisation", "last part of the run, over which the rate falls linearly to 0",
                                   number(float, 0, 1))
    ema_decay: float = option(0.999, "optimisation", "of the exponential moving average of the weights",
                              number(float, 0, 0.999999))
    grad_clip: float = option(1.0, "optimisation", "largest norm of a gradient", number(float, 0, open_low=True))
    save_every: int = option(500, "optimisation", "steps between checkpoints inside an epoch", number(int, 1))
    seed: int = option(0, "run", "seed of everything random", number(int, 0, 2 ** 63 - 1))


# === diffusion ===

TIMESTEPS = 1000


@dataclass(frozen=True)
class DiffusionConfig(RunConfig):
    objective: str = option("flow", "model", "what the network predicts: the noise [Ho20], the velocity "
                            "alpha*noise - sigma*image [Salimans22], or the flow noise - image [Lipman23]",
                            choices=("noise", "velocity", "flow"))
    schedule: str | None = option(None, "model", "signal and noise over time: linear betas [Ho20], cosine [Nichol21], "
                                  "straight line [Lipman23] (default: straight for flow, else cosine)",
                                  choices=("linear", "cosine", "straight"))
    time_sampling: str | None = option(None, "model", "times that training visits: uniform [Ho20] or logit_normal, "
                                       "more of the middle [Esser24] (default: logit_normal for flow, else uniform)",
                                       choices=("uniform", "logit_normal"))
    channels: int = option(80, "model", "width at the highest resolution, a multiple of 16", number(int, 16, 1024))
    levels: int = option(2, "model", "resolutions; the width doubles at each", number(int, 1, 5))
    blocks: int = option(2, "model", "residual blocks per level, each way", number(int, 1, 16))
    label_dropout: float = option(0.1, "model", "share of training images whose label is hidden, for guidance",
                                  number(float, 0, 1))
    sampler: str = option("dpm++", "sampling", "ddpm (ancestral), ddim, heun or dpm++ (2M)",
                          choices=("ddpm", "ddim", "heun", "dpm++"))
    steps: int | None = option(None, "sampling", "sampling steps (default: 1000 for ddpm, 20 for the others)",
                               number(int, 1, TIMESTEPS))
    guidance: float = option(1.25, "sampling", "classifier-free guidance scale [HoSal22]; 1 is none and costs nothing, "
                             "other values double the work", number(float, 0, 100))

    def __post_init__(self) -> None:
        if self.channels % 16:
            raise UserError(f"--channels {self.channels}: must be a multiple of 16", 2)


class NoiseSchedule:
    """x_t = alpha_t * image + sigma_t * noise for t = 0..1000 (float64 [1001]); alpha_0 = 1, sigma_0 = 0."""

    def __init__(self, name: str) -> None:
        t = torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
        if name == "straight":  # ends at alpha = 0.001, so that every objective stays defined at the last step
            self.alphas, self.sigmas = 1 - 0.999 * t, 0.999 * t
            return
        if name == "linear":  # [Ho20] section 4
            betas = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
        else:  # [Nichol21] eq. 17, betas clipped at 0.999 as they do
            signal_power = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - signal_power[1:] / signal_power[:-1]).clamp(max=0.999)
        signal_power = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
        self.alphas, self.sigmas = signal_power.sqrt(), (1 - signal_power).sqrt()

    def times(self, steps: int, sigma_max: float = 80.0, sigma_min: float = 0.02, rho: float = 7.0) -> list[int]:
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


def sample_ddpm(denoise: Denoiser, x: Tensor, times: Sequence[int], schedule: NoiseSchedule,
                noise: ImageNoise) -> Tensor:
    """Ancestral sampling: draw from q(x_s | x_t, image) ([Ho20] eq. 6-7, for any pair of times [Kingma21] eq. 25)."""
    for t, s in zip(times, [*times[1:], 0], strict=True):
        (a_t, a_s), (n_t, n_s) = schedule.alphas[[t, s]].tolist(), schedule.sigmas[[t, s]].tolist()
        step_power = n_t ** 2 - (a_t / a_s) ** 2 * n_s ** 2  # variance of q(x_t | x_s)
        x = (a_t / a_s) * (n_s / n_t) ** 2 * x + a_s * step_power / n_t ** 2 * denoise(x, t)
        if s:
            x = x + math.sqrt(step_power) * n_s / n_t * noise.normal(*x.shape[1:])
    return x


def sample_ddim(denoise: Denoiser, x: Tensor, times: Sequence[int], schedule: NoiseSchedule,
                noise: ImageNoise | None = None) -> Tensor:
    """Deterministic: keep the predicted noise, change its amount ([Song21] eq. 12 with zero variance)."""
    for t, s in zip(times, [*times[1:], 0], strict=True):
        (a_t, a_s), (n_t, n_s) = schedule.alphas[[t, s]].tolist(), schedule.sigmas[[t, s]].tolist()
        image = denoise(x, t)
        x = a_s * image + n_s * ((x - a_t * image) / n_t)
    return x


def sample_heun(denoise: Denoiser, x: Tensor, times: Sequence[int], schedule: NoiseSchedule,
                noise: ImageNoise | None = None) -> Tensor:
    """Second order: a DDIM step corrected by the noise predicted at its end ([Karras22] algorithm 1, no churn).
    Takes two evaluations a step, one for the last."""
    for t, s in zip(times, [*times[1:], 0], strict=True):
        (a_t, a_s), (n_t, n_s) = schedule.alphas[[t, s]].tolist(), schedule.sigmas[[t, s]].tolist()
        image = denoise(x, t)
        direction = (x - a_t * image) / n_t
        x_next = a_s * image + n_s * direction
        if s:
            change = (x_next - a_s * denoise(x_next, s)) / n_s - direction
            x_next = x_next + 0.5 * (n_s - a_s / a_t * n_t) * change
        x = x_next
    return x


def sample_dpm(denoise: Denoiser, x: Tensor, times: Sequence[int], schedule: NoiseSchedule,
               noise: ImageNoise | None = None) -> Tensor:
    """DPM-Solver++(2M): second order from one evaluation a step, by the denoised image of the step before
    ([Lu22] algorithm 2); the first and the last step are of first order."""
    logsnr = (schedule.alphas / schedule.sigmas.clamp(min=1e-12)).log()
    previous, previous_h = None, 0.0
    for t, s in zip(times, [*times[1:], 0], strict=True):
        (a_s, n_t, n_s) = schedule.alphas[s].item(), schedule.sigmas[t].item(), schedule.sigmas[s].item()
        h = (logsnr[s] - logsnr[t]).item()
        image = denoise(x, t)
        if previous is None or s == 0:
            estimate = image
        else:
            ratio = h / (2 * previous_h)
            estimate = (1 + ratio) * image - ratio * previous
        x = n_s / n_t * x - a_s * math.expm1(-h) * estimate
        previous, previous_h = image, h
    return x


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "heun": sample_heun, "dpm++": sample_dpm}


class DiffusionModel(Family):
    """A U-Net that predicts the noise (or an equivalent target) in x_t, conditioned on time and class label.

    Works on 2x2 pixel blocks (pixel-unshuffle): half the resolution with four times the channels, which on a CPU is
    several times faster. Deviations from [Ho20]: that door; attention at the lowest level only; no dropout.
    """
    config_class = DiffusionConfig
    checkpoint_name = "diffusion_model.pt"
    results_folder = ""
    tasks = (*Family.tasks, "denoise")

    def __init__(self, config: DiffusionConfig, data: dict) -> None:
        super().__init__(config, data)
        if data["image_size"] % 2 ** config.levels:
            raise UserError(f"images of {data['image_size']} pixels can't be halved --levels {config.levels} times: "
                            f"use an --image_size divisible by {2 ** config.levels}, or fewer levels", 2)
        widths = [config.channels * 2 ** level for level in range(config.levels)]
        embedding, pixels = 256, 4 * data["channels"]
        self.classes = len(data["classes"]) if len(data["classes"]) > 1 else 0
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
        flow = config.objective == "flow"
        self.noise_schedule = NoiseSchedule(config.schedule or ("straight" if flow else "cosine"))
        self.time_sampling = config.time_sampling or ("logit_normal" if flow else "uniform")
        for name in ("alphas", "sigmas"):
            self.register_buffer(name, getattr(self.noise_schedule, name).float(), persistent=False)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """x_t [B C H W], times [B] in 1..1000, labels [B] in 0..K (K: none) -> the objective's target, [B C H W]."""
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

    def _noisy(self, batch: Batch, times: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the target of the objective."""
        noise = batch.draw.normal(*batch.images.shape[1:])
        alpha, sigma = (s[times][:, None, None, None] for s in (self.alphas, self.sigmas))
        target = {"noise": lambda: noise, "velocity": lambda: alpha * noise - sigma * batch.images,
                  "flow": lambda: noise - batch.images}[self.config.objective]()
        return alpha * batch.images + sigma * noise, target

    def _image(self, x: Tensor, prediction: Tensor, t: int) -> Tensor:
        """Solve x = alpha * image + sigma * noise and the objective's definition for the image."""
        alpha, sigma = self.noise_schedule.alphas[t].item(), self.noise_schedule.sigmas[t].item()
        if self.config.objective == "noise":
            return (x - sigma * prediction) / max(alpha, 1e-3)
        if self.config.objective == "velocity":
            return (alpha * x - sigma * prediction) / (alpha ** 2 + sigma ** 2)
        return (x - sigma * prediction) / (alpha + sigma)

    def _times(self, share: Tensor) -> Tensor:
        """Timesteps 1..1000 at the given quantiles (0..1) of the distribution that training visits."""
        if self.time_sampling == "logit_normal":
            share = torch.special.ndtri(share).sigmoid()
        return (share * TIMESTEPS).long().clamp(0, TIMESTEPS - 1) + 1

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Mean squared error of the prediction at random times ([Ho20] eq. 14 for the noise objective)."""
        times = self._times(batch.draw.uniform())
        hidden = batch.draw.uniform() < self.config.label_dropout
        labels = batch.labels.masked_fill(hidden, self.classes) if self.classes else torch.zeros_like(batch.labels)
        x, target = self._noisy(batch, times)
        with self.cast():
            prediction = self(x, times, labels)
        yield "model", F.mse_loss(prediction.float(), target), {}

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        """Held-out loss over the times that training visits, also by quarter of them (0: cleanest, 3: noisiest)."""
        times = self._times((torch.arange(len(batch.images), device=batch.images.device) + 0.5) / len(batch.images))
        x, target = self._noisy(batch, times)
        with self.cast():
            prediction = self(x, times, batch.labels if self.classes else torch.zeros_like(batch.labels))
        errors = (prediction.float() - target).square().flatten(1).mean(1)
        quarters = {f"val_loss_t{i}": part.mean().item() for i, part in enumerate(errors.tensor_split(4))
                    if len(part)}
        return {"val_loss": errors.mean().item()} | quarters

    def denoiser(self, labels: Tensor | None, count: int) -> Denoiser:
        """The function that samplers call: the guided estimate of the clean image, clipped to [-1, 1]."""
        device, scale = self.alphas.device, self.config.guidance
        nothing = torch.full((count,), self.classes, device=device)
        labels = nothing if labels is None or not self.classes else labels
        guided = scale != 1 and labels is not nothing

        def denoise(x: Tensor, t: int) -> Tensor:
            times = torch.full((count,), t, device=device)
            if guided:
                both = self(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, nothing])).float()
                with_label, without = both.chunk(2)
                prediction = without + scale * (with_label - without)
            else:
                prediction = self(x, times, labels).float()
            return self._image(x, prediction, t).clamp(-1, 1)

        return denoise

    def sampling_times(self) -> list[int]:
        config = self.config
        if config.sampler != "ddpm":
            return self.noise_schedule.times(config.steps or 20)
        steps = config.steps or TIMESTEPS
        return torch.linspace(TIMESTEPS, 1, steps).round().long().unique().flip(0).tolist()

    @torch.no_grad()
    def sample(self, labels: Tensor | None, noise: ImageNoise,
               watch: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
        """`watch` is told of each look that the sampler takes: t, x_t and the estimate of the image, [B C H W]."""
        times, size = self.sampling_times(), self.data["image_size"]
        denoise = self.denoiser(labels, len(noise))

        def watched(x: Tensor, t: int) -> Tensor:
            estimate = denoise(x, t)
            if watch:
                watch(t, x, estimate)
            return estimate

        # x_t but for its trace of signal (alpha is about 0.01); on the straight path sigma is 0.988 there, not 1
        x = self.noise_schedule.sigmas[times[0]].item() * noise.normal(self.data["channels"], size, size)
        with self.cast():
            return SAMPLERS[self.config.sampler](watched, x, times, self.noise_schedule, noise)

    def describe_sampling(self) -> dict[str, Any]:
        steps = len(self.sampling_times())
        guided = self.classes > 0 and self.config.guidance != 1
        evaluations = (2 * steps - 1 if self.config.sampler == "heun" else steps) * (1 + guided)
        return {"sampler": self.config.sampler, "steps": steps, "guidance": self.config.guidance,
                "network_evaluations": evaluations}


# === VAE ===


@dataclass(frozen=True)
class VaeConfig(RunConfig):
    likelihood: str | None = option(None, "model", "of pixels given the code: bernoulli (images are binarised at "
                                    "random anew in each step), or gaussian of the variance that suits the errors best "
                                    "[Rybkin21] (default: bernoulli for grey images, gaussian for colour)",
                                    choices=("bernoulli", "gaussian"))
    latent_dim: int = option(32, "model", "numbers in the code that an image is made from", number(int, 1, 4096))
    beta: float = option(1.0, "model", "weight of the KL divergence [Higgins17]; 1 is the evidence lower bound",
                         number(float, 0, 1e6))
    network: str = option("conv", "model", "conv (convolutions) or mlp (fully connected layers, 8 times --width wide, "
                          "with --convs residual blocks: faster, for small grey images)", choices=("conv", "mlp"))
    width: int = option(64, "model", "channels of the first convolutions, a multiple of 8", number(int, 8, 1024))
    convs: int = option(1, "model", "3x3 convolutions at each resolution, beside the 4x4 ones that change it",
                        number(int, 0, 16))


class ResidualLinear(nn.Module):
    """x + f(x) with a hidden layer, for the fully connected VAE."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(width), nn.Linear(width, width)
        self.second = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(self.norm(x))))


class VaeModel(Family):
    """A variational autoencoder ([Kingma14]): q(z|x) and p(x|z) are networks, the prior is N(0, 1).

    What it draws is the mean of p(x|z), without the pixel noise of the likelihood."""
    config_class = VaeConfig
    checkpoint_name = "vae_model.pt"
    results_folder = "vae"
    tasks = (*Family.tasks, "reconstruct", "traverse", "ood", "latent")
    labelled = False
    measures_held_out = True

    def __init__(self, config: VaeConfig, data: dict) -> None:
        super().__init__(config, data)
        self.bernoulli = (config.likelihood or ("gaussian", "bernoulli")[data["channels"] == 1]) == "bernoulli"
        self.pixels = data["channels"] * data["image_size"] ** 2
        self.encoder, self.decoder = (self._mlp if config.network == "mlp" else self._convolutions)(config, data)
        self.register_buffer("variance", torch.ones(()))  # of the Gaussian, for data that training does not see

    def _convolutions(self, config: VaeConfig, data: dict) -> tuple[nn.Module, nn.Module]:
        side, widths = pyramid(data, config.width)
        cells = widths[0] * side * side

        def norm(channels: int) -> nn.Module:
            return nn.GroupNorm(math.gcd(8, channels), channels)

        return (nn.Sequential(downward(widths, config.convs, norm, nn.SiLU()), nn.Flatten(),
                              nn.Linear(cells, 2 * config.latent_dim)),
                nn.Sequential(nn.Linear(config.latent_dim, cells), nn.Unflatten(1, (widths[0], side, side)),
                              upward(widths, config.convs, norm, nn.SiLU())))

    def _mlp(self, config: VaeConfig, data: dict) -> tuple[nn.Module, nn.Module]:
        width, size = 8 * config.width, data["image_size"]

        def layers(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Linear(inputs, width), *(ResidualLinear(width) for _ in range(config.convs)),
                    nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, outputs)]

        return (nn.Sequential(nn.Flatten(), *layers(self.pixels, 2 * config.latent_dim)),
                nn.Sequential(*layers(config.latent_dim, self.pixels), nn.Unflatten(1, (data["channels"], size, size))))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B C H W] in [-1, 1] -> mean and log variance of q(z|x), [B D] each"""
        with self.cast():
            mean, log_variance = self.encoder(x.contiguous(memory_format=torch.channels_last)).float().chunk(2, 1)
        return mean, log_variance.clamp(-12, 12)

    def _decode(self, z: Tensor) -> Tensor:
        """[B D] -> logits of the Bernoulli or mean of the Gaussian, [B C H W]"""
        with self.cast():
            return self.decoder(z).float()

    def decode(self, z: Tensor) -> Tensor:
        """[B D] -> images in [-1, 1], [B C H W]"""
        found = self._decode(z)
        return found.sigmoid() * 2 - 1 if self.bernoulli else found.clamp(-1, 1)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)[0])

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B C H W], noise [B D] -> what the decoder says of a code drawn from q(z|x), its mean and log variance"""
        mean, log_variance = self.encode(x)
        return self._decode(mean + noise * (log_variance / 2).exp()), mean, log_variance

    def bound(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Both parts of the negative ELBO in nats, [B] each: -log p(x|z) at one z, and KL(q(z|x) || p(z)); and the
        variance of the Gaussian. For 8-bit images the density is taken at a point drawn inside the level's bin and
        multiplied by the bin's width: a bound on the probability of the levels ([Theis16])."""
        share = batch.draw.uniform(*batch.images.shape[1:])
        x = (share < (batch.images + 1) / 2).float() * 2 - 1 if self.bernoulli else batch.images + (share - 0.5) / 127.5
        found, mean, log_variance = self(x, batch.draw.normal(self.config.latent_dim))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        if self.bernoulli:
            return F.binary_cross_entropy_with_logits(found, (x + 1) / 2, reduction="none").flatten(1).sum(1), kl, \
                self.variance
        errors = (found - x).square().flatten(1).sum(1)
        # of the batch at hand: the gradient is that of pixels/2 * log(mean error), the bound at the best variance
        variance = over_processes(errors.detach().mean()) / self.pixels if self.training else self.variance
        return errors / (2 * variance) + self.pixels * (0.5 * (2 * math.pi * variance).log() + math.log(127.5)), kl, \
            variance

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The negative ELBO, its KL weighted by beta, in bits per dimension."""
        error, kl, variance = self.bound(batch)
        with torch.no_grad():
            self.variance.lerp_(variance, 0.05)
        yield "model", (error + self.config.beta * kl).mean() / (self.pixels * math.log(2)), {
            "kl": kl.detach().mean(), "reconstruction": error.detach().mean()}

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        """The held-out ELBO in nats per image and, negated, in bits per dimension (which is also `val_loss`)."""
        error, kl, _ = self.bound(batch)
        nats = (error + kl).mean().item()
        bits = nats / (self.pixels * math.log(2))
        return {"val_loss": bits, "val_elbo": -nats, "val_bits_per_dim": bits, "val_kl": kl.mean().item()}

    @torch.no_grad()
    def sample(self, labels: Tensor | None, noise: ImageNoise) -> Tensor:
        return self.decode(noise.normal(self.config.latent_dim))


# === GAN ===


GAN_RECIPES = {  # what suits each loss, where the user does not say
    "dcgan": {"learning_rate": 1e-3, "adam_beta1": 0.5, "adam_beta2": 0.999, "penalty": 0.0},
    "relativistic": {"learning_rate": 5e-4, "adam_beta1": 0.0, "adam_beta2": 0.99, "penalty": 0.1},
}


@dataclass(frozen=True)
class GanConfig(RunConfig):
    learning_rate: float | None = option(None, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    weight_decay: float = option(0.0, "optimisation", "of AdamW", number(float, 0))
    adam_beta1: float | None = option(None, "optimisation", "AdamW's memory of gradients", number(float, 0, 0.9999))
    adam_beta2: float | None = option(None, "optimisation", "AdamW's memory of squared gradients",
                                      number(float, 0, 0.999999))
    grad_clip: float = option(10.0, "optimisation", "largest norm of a gradient", number(float, 0, open_low=True))
    gan_loss: str = option("relativistic", "model", "relativistic (pairs of real and drawn, penalties instead of norms "
                           "in the discriminator [Huang24]) or dcgan (non-saturating [Radford16])",
                           choices=tuple(GAN_RECIPES))
    conditional: bool = option(True, "model", "show the class, where the data has classes, to both networks: better by "
                               "far, and --label works")
    penalty: float | None = option(None, "model", "weight of the relativistic loss's gradient penalties (default 0.1)",
                                   number(float, 0, 1e6))
    latent_dim: int = option(100, "model", "numbers in the code that an image is made from", number(int, 1, 4096))
    width: int = option(64, "model", "channels of the first convolutions, a multiple of 8", number(int, 8, 1024))
    convs: int = option(1, "model", "3x3 convolutions at each resolution, beside the 4x4 ones that change it",
                        number(int, 0, 16))

    def __post_init__(self) -> None:
        if self.gan_loss == "dcgan" and self.penalty:
            raise UserError("--penalty belongs to --gan_loss relativistic, not to dcgan", 2)
        for name, value in GAN_RECIPES[self.gan_loss].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the way to set a field of a frozen dataclass while it is made


class Generator(nn.Module):
    """Noise (and class) -> image, by strided transposed convolutions ([Radford16])."""

    def __init__(self, config: GanConfig, data: dict, classes: int) -> None:
        super().__init__()
        side, widths = pyramid(data, config.width)
        self.classes = classes
        self.enter = nn.Linear(config.latent_dim + classes, widths[0] * side * side)
        self.body = nn.Sequential(nn.Unflatten(1, (widths[0], side, side)),
                                  upward(widths, config.convs, BatchNorm, nn.ReLU()))

    def forward(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """[B D], labels [B] where there are classes -> images in (-1, 1)"""
        if self.classes:
            noise = torch.cat([noise, F.one_hot(labels, self.classes).to(noise.dtype)], 1)
        return self.body(self.enter(noise)).float().tanh()


class Discriminator(nn.Module):
    """Image (and class) -> logit of being real; the class takes part as a direction in feature space ([Miyato18])."""

    def __init__(self, config: GanConfig, data: dict, classes: int) -> None:
        super().__init__()
        side, widths = pyramid(data, config.width)
        norm = BatchNorm if config.gan_loss == "dcgan" else nn.Identity
        self.body = nn.Sequential(downward(widths, config.convs, norm, nn.LeakyReLU(0.2)), nn.Flatten())
        self.head = nn.Linear(widths[0] * side * side, 1, bias=config.gan_loss == "dcgan")  # between pairs it cancels
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


class GanModel(Family):
    """Two networks that play against each other ([Good14]): one draws, the other tells drawn images from real ones."""
    config_class = GanConfig
    checkpoint_name = "gan_model.pt"
    results_folder = "gan"
    panel_every = 5
    descends = False  # what one player wins the other loses: the sum need not fall

    def __init__(self, config: GanConfig, data: dict) -> None:
        super().__init__(config, data)
        self.labelled = self.labelled and config.conditional
        classes = len(data["classes"]) if self.labelled else 0
        self.generator, self.discriminator = (kind(config, data, classes) for kind in (Generator, Discriminator))
        self.paired = config.gan_loss == "relativistic"
        if not self.paired:
            for layer in self.modules():
                if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                    nn.init.normal_(layer.weight, std=0.02)  # [Radford16]
                    nn.init.zeros_(layer.bias)

    def players(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator, "generator": self.generator}

    def compilable(self) -> list[nn.Module]:
        """Compiled code has no second derivative, which the penalties take of the discriminator."""
        return [self.generator] if self.paired else [self.generator, self.discriminator]

    def win(self, logits: Tensor, others: Tensor) -> Tensor:
        """How sure the discriminator is of what `logits` belong to: against zero, or against its partner in a pair."""
        return logits - others if self.paired else logits

    def losses(self, batch: Batch) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Cross-entropy of the discriminator, then (after its step) the generator's non-saturating loss. `d_real` and
        `d_fake` are mean probabilities of being real; with pairs, of being the real one of two."""
        judge, labels, real = self.discriminator, batch.labels, batch.images
        judge.requires_grad_(True)
        with self.cast():
            fake = self.generator(batch.draw.normal(self.config.latent_dim), labels)
            seen = fake.detach()
            if self.paired:
                real, seen = real.detach().requires_grad_(), seen.requires_grad_()
            on_real, on_fake = judge(real, labels), judge(seen, labels)
        sure, fooled = self.win(on_real, on_fake), self.win(on_fake, on_real)
        loss = F.softplus(-sure).mean() + (0 if self.paired else F.softplus(fooled).mean())
        stats = {"d_loss": loss.detach(), "d_real": sure.detach().sigmoid().mean(),
                 "d_fake": fooled.detach().sigmoid().mean()}
        if self.paired:
            penalty = gradient_penalty(on_real, real) + gradient_penalty(on_fake, seen)
            loss, stats = loss + self.config.penalty * penalty, stats | {"penalty": penalty.detach()}
        yield "discriminator", loss, stats
        judge.requires_grad_(False)  # no need of its gradients now
        with self.cast():
            on_fake = judge(fake, labels)
            on_real = judge(real.detach(), labels) if self.paired else on_fake
        loss = F.softplus(-self.win(on_fake, on_real)).mean()
        yield "generator", loss, {"g_loss": loss.detach()}
        judge.requires_grad_(True)

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        """`d_real` on images that training has not seen. With --gan_loss dcgan it is lower than `d_real` mostly because
        batch norm uses running statistics here; with the relativistic loss a gap means images known by heart."""
        with self.cast():
            fake = self.generator(batch.draw.normal(self.config.latent_dim), batch.labels)
            on_real, on_fake = (self.discriminator(x, batch.labels) for x in (batch.images, fake))
        return {"val_d_real": self.win(on_real, on_fake).sigmoid().mean().item()}

    def warnings(self, figures: dict[str, Any]) -> list[str]:
        found, other = [], "" if self.paired else " or --gan_loss relativistic"
        if figures["d_real"] > 0.97 and figures["d_fake"] < 0.03:
            found.append("the discriminator wins outright, and a generator that always loses learns nothing: try a "
                         f"lower --learning_rate{other}")
        if figures.get("class_share_min", 1) < 0.1 / len(self.data["classes"]):
            found.append("classes vanish from what is drawn (class_share_min in metrics.jsonl): try another --seed, a "
                         f"lower --learning_rate{other}")
        return found

    @torch.no_grad()
    def sample(self, labels: Tensor | None, noise: ImageNoise) -> Tensor:
        with self.cast():
            return self.generator(noise.normal(self.config.latent_dim), labels)


# === classifier ===


@dataclass(frozen=True)
class ClassifierConfig(RunConfig):
    epochs: int = option(8, "optimisation", "passes over the training set", number(int, 1))
    learning_rate: float = option(2e-3, "optimisation", "peak rate of AdamW", number(float, 0, open_low=True))
    width: int = option(32, "model", "channels of the first convolutions, a multiple of 8", number(int, 8, 1024))
    features: int = option(128, "model", "width of the layer that the metrics look at", number(int, 2, 4096))

    def __post_init__(self) -> None:
        if self.width % 8:
            raise UserError(f"--width {self.width}: must be a multiple of 8", 2)


class Classifier(Family):
    """A small convolutional classifier. Its last hidden layer is the feature space of `fid_<dataset>_cnn` and the
    other metrics that carry `_cnn` in their name. Group norm and no dropout: the same losses on any number of
    processes."""
    config_class = ClassifierConfig
    checkpoint_name = "classifier_{dataset}.pt"
    results_folder = "classifier"
    can_sample = False
    tasks = ()
    measures_held_out = True

    def __init__(self, config: ClassifierConfig, data: dict) -> None:
        super().__init__(config, data)
        if len(data["classes"]) < 2:
            raise UserError(f"a classifier needs two or more classes, {data['title']} has one: use sub-folders")
        w, size = config.width, data["image_size"]

        def convolution(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU())

        pool = [2 if size >= 8 else 1, 2 if size >= 16 else 1]  # keep at least 4x4 positions
        size = size // pool[0] // pool[1]
        self.body = nn.Sequential(
            convolution(data["channels"], w), convolution(w, w), nn.MaxPool2d(pool[0]),
            convolution(w, 2 * w), convolution(2 * w, 2 * w), nn.MaxPool2d(pool[1]),
            convolution(2 * w, 4 * w), nn.Flatten(), nn.Linear(4 * w * size * size, config.features), nn.ReLU())
        self.head = nn.Linear(config.features, len(data["classes"]))

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


# === registry ===

FAMILIES: dict[str, type[Family]] = {"diffusion": DiffusionModel, "vae": VaeModel, "gan": GanModel,
                                     "classifier": Classifier}

# === metrics ===

INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 "weights-inception-2015-12-05-6726825d.pth")  # the hash in the name is checked after the download
ALONE = {"sync_on_compute": False}  # rank 0 measures alone: torchmetrics must not wait there for the other processes
NEIGHBOURS = 3  # k of precision and recall, as in [Kynk19]
CLASS_FIGURES = ("class_share_min", "class_share_max", "classes_covered", "class_balance")


class Features(NamedTuple):
    vectors: Tensor  # [N D] float32
    logits: Tensor  # [N K]


class FeatureNet:
    """A frozen network that turns uint8 images into feature vectors and class logits."""

    def __init__(self, name: str, width: int, digest: str, apply: Callable[[Tensor], tuple[Tensor, Tensor]],
                 names_classes: bool) -> None:
        self.name, self.width, self.digest, self.apply = name, width, digest, apply
        self.names_classes = names_classes  # its classes are those of the data, so that balance can be judged

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 250) -> Features:
        """uint8 [N C H W] -> Features on the CPU"""
        vectors, logits = zip(*map(self.apply, images.split(batch)), strict=True)
        return Features(torch.cat(vectors).float().cpu(), torch.cat(logits).float().cpu())


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def classifier_net(path: Path, device: torch.device, data: dict) -> FeatureNet:
    """The feature net `<dataset>_cnn` from a classifier checkpoint of the same kind of images."""
    state = open_checkpoint(path)
    if state["family"] != "classifier":
        raise UserError(f"{path} holds a {state['family']} model: --classifier takes a --model classifier")
    for key in ("dataset", "channels", "image_size"):
        if state["data"][key] != data[key]:
            raise UserError(f"{path} was trained with {key} {state['data'][key]}, the images have {data[key]}: "
                            "name a matching one with --classifier")
    model = restore_model(state).to(device).eval()
    name = f"{data['dataset']}_cnn"
    return FeatureNet(name, model.config.features, file_digest(path), lambda part: model(to_float(part.to(device))),
                      state["data"]["classes"] == data["classes"])


def inception_net(weights: Path | None, device: torch.device) -> FeatureNet:
    """The 2015 Inception v3 that published FID, IS and KID figures use, through torchmetrics."""
    try:
        if weights is not None:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        from torchmetrics.image.fid import NoTrainInceptionV3
        buffer = io.BytesIO()  # the library reads its weights with pickle enabled: hand it only what was read safely
        torch.save(state, buffer)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest() if weights is None else file_digest(weights)
        buffer.seek(0)
        net = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], buffer, antialias=False).to(device)
    except ModuleNotFoundError as error:
        raise UserError(f"Inception metrics need the package {error.name}: pip install torch-fidelity") from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, AttributeError, TypeError,
            pickle.UnpicklingError) as error:
        where = f"{weights} is not the Inception weights file" if weights else "the Inception weights can't be fetched"
        raise UserError(f"{where} ({first_line(error)}): download {INCEPTION_URL} where there is a "
                        "network and name the file with --inception_weights") from None

    def apply(part: Tensor) -> tuple[Tensor, Tensor]:
        part = part.to(device)
        return net._torch_fidelity_forward(part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part)

    return FeatureNet("inception", 2048, digest, apply, False)


def frechet_distance(estimate: Tensor, reference: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of vectors [N D] ([Heusel17]), by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    metric = FrechetInceptionDistance(feature=passthrough(estimate.shape[1]), **ALONE)
    metric.update(reference, real=True)
    metric.update(estimate, real=False)
    return metric.compute().item()


@contextlib.contextmanager
def seeded_and_quiet() -> Iterator[None]:
    """torchmetrics shuffles with the global generator, and warns that it keeps features (which are few here)."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def passthrough(width: int) -> nn.Module:
    """A "feature net" for torchmetrics that returns what it is given: features are computed once, not per metric."""
    module = nn.Identity()
    module.num_features = width
    return module


def inception_score(logits: Tensor) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)), mean and standard deviation over ten splits ([Salim16]), by torchmetrics."""
    from torchmetrics.image.inception import InceptionScore
    with seeded_and_quiet():
        metric = InceptionScore(feature=passthrough(logits.shape[1]), splits=min(10, len(logits)), **ALONE)
        metric.update(logits)
        mean, deviation = metric.compute()
    return mean.item(), deviation.nan_to_num().item()


def kernel_distance(estimate: Tensor, reference: Tensor) -> tuple[float, float]:
    """KID: squared MMD with a cubic kernel, mean and standard deviation over 50 subsets ([Bink18]), by torchmetrics.
    Of few vectors a subset takes half, so that subsets differ; at least four are needed."""
    from torchmetrics.image.kid import KernelInceptionDistance
    size = min(1000, len(estimate) // 2, len(reference) // 2)
    with seeded_and_quiet():
        metric = KernelInceptionDistance(passthrough(estimate.shape[1]), subsets=50, subset_size=size, **ALONE)
        metric.update(reference, real=True)
        metric.update(estimate, real=False)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def precision_recall(estimate: Tensor, reference: Tensor) -> tuple[float, float]:
    """Share of estimates inside the reference's manifold, and the other way round: balls around each point that reach
    its third neighbour ([Kynk19])."""

    def radii(points: Tensor) -> Tensor:
        return torch.cat([torch.cdist(part, points).kthvalue(NEIGHBOURS + 1, dim=1).values
                          for part in points.split(1000)])  # + 1: each point is its own nearest

    def covered(points: Tensor, centres: Tensor) -> float:
        reach = radii(centres)
        inside = [(torch.cdist(part, centres) <= reach).any(1) for part in points.split(1000)]
        return torch.cat(inside).float().mean().item()

    return covered(estimate, reference), covered(reference, estimate)


def nearest_distance(images: Tensor, train: Tensor) -> Tensor:
    """Euclidean pixel distance (levels 0..255) of each image to the nearest training image: uint8 -> [N]."""
    rows, columns = images.flatten(1).float(), train.flatten(1).float()
    lengths = columns.square().sum(1)
    nearest = [(lengths - 2 * part @ columns.T).min(1).values + part.square().sum(1) for part in rows.split(500)]
    return torch.cat(nearest).clamp(min=0).sqrt()


def finite(values: dict[str, float | None], reasons: dict[str, str]) -> dict[str, float | None]:
    """NaN or infinity is no result: null, with the reason noted."""
    for key, value in values.items():
        if value is not None and not math.isfinite(value):
            values[key], reasons[key] = None, f"the result was {value}"
    return values


def measure(estimate: Features, reference: Features, net: FeatureNet, asked: Tensor | None = None,
            quick: bool = False) -> tuple[dict[str, float | None], dict[str, str]]:
    """All metrics of a set of images against a reference, and the reasons for those that could not be computed.
    `asked` [N] are the labels that the images were drawn for; `quick` keeps to FID, IS and KID."""
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    count, name = min(len(estimate.vectors), len(reference.vectors)), net.name
    if count > net.width:
        values[f"fid_{name}"] = frechet_distance(estimate.vectors, reference.vectors)
    else:
        values[f"fid_{name}"] = None
        reasons[f"fid_{name}"] = f"needs more images ({count}) than features ({net.width})"
    values[f"is_{name}"], values[f"is_{name}_std"] = inception_score(estimate.logits)
    pairs = [(kernel_distance, f"kid_{name}", f"kid_{name}_std")]
    if not quick:
        pairs.append((precision_recall, f"precision_{name}", f"recall_{name}"))
    for metric, *keys in pairs:
        if count > NEIGHBOURS:
            values |= zip(keys, metric(estimate.vectors, reference.vectors), strict=True)
        else:
            values |= dict.fromkeys(keys)
            reasons |= dict.fromkeys(keys, f"needs more than {NEIGHBOURS} images")
    predicted = estimate.logits.argmax(1)
    if net.names_classes:
        shares = torch.bincount(predicted, minlength=estimate.logits.shape[1]) / len(predicted)
        values["class_share_min"], values["class_share_max"] = shares.min().item(), shares.max().item()
        values["classes_covered"] = (shares * len(shares) >= 0.1).sum().item()  # at least a tenth of an equal share
        values["class_balance"] = (torch.special.entr(shares).sum() / math.log(len(shares))).item()
    if quick:
        return finite(values, reasons), reasons
    if net.names_classes:
        values["label_agreement"] = None if asked is None else (predicted == asked.cpu()).float().mean().item()
        if asked is None:
            reasons["label_agreement"] = "the images were not drawn for given labels"
    else:
        for key in (*CLASS_FIGURES, "label_agreement"):
            values[key], reasons[key] = None, f"the classes of {name} are not those of the data"
    return finite(values, reasons), reasons


def proportional_labels(data: dict, count: int, labelled: bool = True) -> Tensor | None:
    """Labels [N] in the proportions of the training set, in a fixed shuffled order; None for unlabelled data."""
    shares = torch.tensor(data["class_counts"], dtype=torch.float64).cumsum(0)
    if len(shares) < 2 or not labelled:
        return None
    labels = torch.searchsorted(shares / shares[-1], (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return labels[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def generate(model: Family, labels: Tensor | None, count: int, seed: int, batch: int, world: World,
             bar: Any = None) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (image numbers, uint8 images [b C H W] on the CPU) for this process's share of images 0..count-1, which
    go through `labels` in turn. Nothing here grows with `count`."""
    mine = range(world.rank, count, world.size)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(mine), batch):
            part = list(mine[start:start + batch])
            chosen = None if labels is None else labels[[i % len(labels) for i in part]].to(world.device)
            yield part, to_uint8(model.sample(chosen, ImageNoise(seed, part, world.device))).cpu()
            if bar is not None:
                bar.update(len(part))
    finally:
        model.train(training)


def generate_all(model: Family, labels: Tensor | None, count: int, seed: int, batch: int, world: World,
                 title: str = "") -> Tensor:
    """Images 0..count-1, uint8 [N C H W], drawn by all processes together and known to all."""
    parts = [torch.empty((0, model.data["channels"], *[model.data["image_size"]] * 2), dtype=torch.uint8)]
    with progress(-(-count // world.size), title, not (title and world.main), unit="image", leave=False) as bar:
        parts += [images for _, images in generate(model, labels, count, seed, batch, world, bar)]
    return world.gather(torch.cat(parts).to(world.device), count).cpu()


# === trainer ===

FORMAT = "image_gen/1"
EXPLODED = 10  # a mean loss this many times the first one is divergence, not noise
LOG_EVERY = 25  # steps between looks at the device's loss: each look waits for the device
EVALUATION_SHARE = 0.1  # of an epoch's work may go into measuring it


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


class EpochEvaluation(NamedTuple):
    """What is measured between epochs: `count` images against a fixed part of the test set every `every` epochs."""
    net: FeatureNet | None = None
    reference: Features | None = None
    floors: dict[str, float | None] = {}  # what as many real training images score
    count: int = 0
    every: int = 1
    reason: str = ""  # why there is none


def module_state(model: nn.Module, half: bool = False) -> dict[str, Tensor]:
    return {key: value.half() if half and value.is_floating_point() else value
            for key, value in model.state_dict().items()}


def restore_model(state: dict, **changes: Any) -> Family:
    """The model of a checkpoint with its EMA weights; `changes` replace fields of its config (sampling options)."""
    family = FAMILIES[state["family"]]
    try:
        model = family(dataclasses.replace(family.config_class(**state["config"]), **changes), state["data"])
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state["ema"].items()})
    except (TypeError, KeyError, RuntimeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"the checkpoint does not fit its own description ({first_line(error)}): it was "
                        "altered, or written by another version of this script") from None
    return model.to(memory_format=torch.channels_last)


class Trainer:
    """One training run: it owns the weights, their moving average, the optimizers and the position."""

    def __init__(self, model: Family, images: Images, world: World, precision: torch.dtype, compile_it: bool,
                 checkpoint: Path, results: Path) -> None:
        from torch.optim.swa_utils import AveragedModel
        self.config, self.world, self.checkpoint, self.results = model.config, world, checkpoint, results
        config = self.config
        self.images = images
        self.model = model.to(world.device, memory_format=torch.channels_last)
        self.model.precision = precision
        self.batch_size = min(config.batch_size, len(images.train))
        if self.batch_size % world.size:
            raise UserError(f"--batch_size {self.batch_size} can't be shared by {world.size} processes: use a multiple "
                            f"of {world.size}", 2)
        self.steps_per_epoch = len(images.train) // self.batch_size
        self.train_images, self.train_labels = images.train.to(world.device), images.train_labels.to(world.device)
        self.ema = AveragedModel(self.model, multi_avg_fn=self._average, use_buffers=True)
        self.optimizers = {name: torch.optim.AdamW(player.parameters(), config.learning_rate,
                                                   weight_decay=config.weight_decay,
                                                   betas=(config.adam_beta1, config.adam_beta2),
                                                   fused=world.device.type != "mps")
                           for name, player in self.model.players().items()}
        self.schedulers = {k: torch.optim.lr_scheduler.LambdaLR(o, self._rate) for k, o in self.optimizers.items()}
        self.step = self.epoch_done = 0
        self.seconds = 0.0
        self.history: list[dict] = []
        self.stat_names: list[str] = []
        self.warned: set[str] = set()
        self.sums = torch.zeros(2, device=world.device)  # sums of the epoch: loss, steps, statistics, their squares,
        self.looked = torch.zeros(2, device=world.device)  # and what they were at the last look
        self.stop = StopSignal()
        self.stop_all = torch.zeros(1, device=world.device)
        if compile_it:
            for part in self.model.compilable():
                part.compile()

    @property
    def sampler(self) -> Family:
        """The averaged weights: all samples and held-out figures come from them."""
        return self.ema.module

    def _rate(self, step: int) -> float:
        """Linear warm-up, a plateau, linear decay to zero at the end of the last epoch."""
        config, total = self.config, self.config.epochs * self.steps_per_epoch
        warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        return min(warm, max(0.0, (total - step) / total / config.decay_fraction) if config.decay_fraction else 1.0)

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], _count: Any) -> None:
        """EMA whose memory grows with the run, so that early epochs are not pictures of the initial weights."""
        torch._foreach_lerp_(averaged, current, 1 - min(self.config.ema_decay, (1 + self.step) / (10 + self.step)))

    # --- state

    def state(self) -> dict:
        return {"format": FORMAT, "family": family_name(self.model), "config": dataclasses.asdict(self.config),
                "data": self.model.data, "model": module_state(self.model), "ema": module_state(self.sampler),
                "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
                "schedulers": {k: s.state_dict() for k, s in self.schedulers.items()},
                "rng": torch.get_rng_state(), "step": self.step, "epoch_done": self.epoch_done,
                "batch_size": self.batch_size, "sums": self.sums.cpu(), "looked": self.looked.cpu(),
                "stat_names": self.stat_names,
                "seconds": self.seconds, "history": self.history, "made": provenance()}

    def save(self) -> None:
        """Write the checkpoint, unless the weights have become useless: then the last good one stays."""
        if not all(torch.isfinite(value).all() for value in self.model.state_dict().values()):
            self._diverged("the weights are no longer finite")
        self.world.average([self.sums, self.looked])  # so that another number of processes can take over
        if self.world.main:
            save_checkpoint(self.checkpoint, self.state())

    def load(self, state: dict) -> None:
        """Continue where `state` stopped; on a CPU with the same number of processes bit for bit."""
        try:
            self.model.load_state_dict(state["model"])
            self.sampler.load_state_dict(state["ema"])
            for kind in ("optimizers", "schedulers"):
                for name, part in getattr(self, kind).items():
                    part.load_state_dict(state[kind][name])
            self.ema.n_averaged.fill_(state["step"])
            torch.set_rng_state(state["rng"])
            self.step, self.epoch_done, self.seconds = state["step"], state["epoch_done"], state["seconds"]
            self.sums, self.looked = (state[key].to(self.world.device) for key in ("sums", "looked"))
            self.history, self.stat_names = list(state["history"]), list(state.get("stat_names", ()))
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{self.checkpoint} can't be resumed ({first_line(error)}): it does not fit "
                            "this model") from None

    # --- one step

    def batch(self) -> Batch:
        """This process's rows of the batch of the current step."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if position == 0 or not hasattr(self, "order"):
            self.order = torch.randperm(len(self.train_images),
                                        generator=torch.Generator().manual_seed(seed32(self.config.seed, epoch, 7)))
        share = self.batch_size // self.world.size
        rows = slice(self.world.rank * share, (self.world.rank + 1) * share)
        chosen = self.order[position * self.batch_size:][:self.batch_size][rows].to(self.world.device)
        draw = Draw(self.config.seed, self.step, self.batch_size, rows, self.world.device)
        return Batch(to_float(self.train_images[chosen]), self.train_labels[chosen], draw)

    def train_step(self) -> None:
        total, stats = 0.0, {}
        for player, loss, more in self.model.losses(self.batch()):
            optimizer = self.optimizers[player]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            gradients = [p.grad for p in self.model.players()[player].parameters() if p.grad is not None]
            self.stop_all.fill_(float(self.stop.number))  # rides along: all processes stop after the same step
            self.world.average([*gradients, self.stop_all, *more.values()])
            nn.utils.clip_grad_norm_(self.model.players()[player].parameters(), self.config.grad_clip)
            optimizer.step()
            self.schedulers[player].step()
            total, stats = total + loss.detach(), stats | more
        if self.stat_names != list(stats):  # the first step
            self.stat_names = list(stats)
            self.sums, self.looked = (F.pad(sums[:2], (0, 2 * len(stats))) for sums in (self.sums, self.looked))
        values, steps = torch.stack([total, torch.ones_like(total), *stats.values()]), self.sums[1]
        spread = (values[2:] - self.sums[2:len(values)] / steps.clamp(min=1)).square() * (steps / (steps + 1))
        self.sums += torch.cat([values, spread])  # the squares are Welford's: those of small differences
        self.ema.update_parameters(self.model)
        self.step += 1

    def means(self, sums: Tensor) -> dict[str, float]:
        """Means over steps and processes of the loss and the family's statistics, and the latter's deviations."""
        found = sums / sums[1]
        self.world.average([found])
        loss, _, *stats = found.tolist()
        count = len(self.stat_names)
        values = {"loss": loss, **dict(zip(self.stat_names, stats[:count], strict=True)),
                  **{f"{k}_std": math.sqrt(max(0.0, v)) for k, v in zip(self.stat_names, stats[count:], strict=True)}}
        for name, value in values.items():
            if not math.isfinite(value):
                self._diverged(f"the {name} is {value}")
        return values

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

    def fit(self, evaluation: EpochEvaluation, on_epoch: Callable[[int], None]) -> None:
        """Train to the last epoch. Returns early, with the position saved, after a stop signal."""
        if self.world.main:  # what a checkpoint does not know happened after it, and will happen again
            with replacing(self.results / "metrics.jsonl") as part:
                part.write_text("".join(json.dumps(r) + "\n" for r in self.history))
        while self.epoch_done < self.config.epochs and not self.stopped():
            self._epoch(self.epoch_done + 1)
            if self.step == (self.epoch_done + 1) * self.steps_per_epoch:
                self._finish_epoch(self.epoch_done + 1, evaluation, on_epoch)
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
                      not self.world.main, initial=start * self.batch_size, unit="image") as bar:
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
        values = self.means(self.sums - self.looked)
        self.looked.copy_(self.sums)
        loss = values["loss"]
        first = next((r["loss"] for r in self.history if "loss" in r and "epoch" not in r), loss)
        if self.model.descends and abs(loss) > EXPLODED * max(abs(first), 1e-3):
            self._diverged(f"the loss rose from {first:.3g} to {loss:.3g}")
        self.record(**{name: values[name] for name in ("loss", *self.stat_names)})
        bar.set_postfix(loss=f"{loss:.4f}")

    def _finish_epoch(self, epoch: int, evaluation: EpochEvaluation, on_epoch: Callable[[int], None]) -> None:
        """Save first, then draw and measure: a crash while measuring costs nothing but the measurement."""
        self.sampler.eval()
        count = 10_000 if self.model.measures_held_out else 1000
        figures = held_out(self.sampler, self.images, count, self.world.device)
        if not all(map(math.isfinite, figures.values())):
            self._diverged("the held-out loss is not finite")
        self.save()
        values: dict[str, Any] = {"epoch": epoch, **self.means(self.sums), "seconds": round(self.seconds, 2),
                                  "images_per_second": round(self.step * self.batch_size / self.seconds, 1),
                                  "learning_rate": next(iter(self.schedulers.values())).get_last_lr()[0]}
        values |= figures
        last = epoch == self.config.epochs
        if self.model.can_sample and evaluation.net is not None and (epoch % evaluation.every == 0 or last):
            labels = proportional_labels(self.model.data, evaluation.count, self.model.labelled)
            drawn = generate_all(self.sampler, labels, evaluation.count, self.config.seed, 250, self.world,
                                 f"measuring epoch {epoch}")
            if self.world.main:
                scores, _ = measure(evaluation.net(drawn), evaluation.reference, evaluation.net, quick=True)
                values |= scores | evaluation.floors | {"eval_samples": evaluation.count}
        self.sums.zero_()
        self.looked.zero_()
        self.epoch_done = epoch
        self.record(**values)
        on_epoch(epoch)
        self.save()
        if self.world.main:
            shown = {k: v for k, v in values.items() if (k in self.stat_names or k.startswith(("val_", "fid", "is_")))
                     and not k.endswith("_std") and not k[:-1].endswith("_t") and v is not None}
            print(f"epoch {epoch}: loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s"
                  + "".join(f", {k} {v:.4g}" for k, v in shown.items()), flush=True)
            for line in self.model.warnings(values):
                if line not in self.warned:
                    self.warned.add(line)
                    print(f"warning: {line}", file=sys.stderr)


@torch.no_grad()
def held_out(model: Family, images: Images, count: int, device: torch.device) -> dict[str, float]:
    """The family's own figures on the first `count` test images, with noise that is the same every time."""
    sums: dict[str, float] = {}
    for rows in torch.arange(min(count, len(images.test))).split(500):
        draw = Draw(0, int(rows[0]), len(rows), slice(None), device)
        batch = Batch(to_float(images.test[rows].to(device)), images.test_labels[rows].to(device), draw)
        for key, value in model.validate(batch).items():
            sums[key] = sums.get(key, 0.0) + value * len(rows) / min(count, len(images.test))
    return sums


def family_name(model: Family) -> str:
    return next(name for name, family in FAMILIES.items() if family is type(model))


def provenance() -> dict[str, str]:
    """How a checkpoint came to be: command (paths shortened to their last part), versions, machine."""
    import platform
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else \
        f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    words = [Path(word).name if os.sep in word else word for word in sys.argv]
    return {"command": " ".join(words), "torch": str(torch.__version__), "hardware": hardware,
            "date": time.strftime("%Y-%m-%d")}

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


def plot(path: Path, title: str, panels: list[tuple[str, dict[str, list[tuple]], str]], x_label: str) -> None:
    """Line charts side by side, written as PNG: panels of (y label, {curve: [(x, y), ...]}, y scale)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullFormatter
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (label, curves, scale) in zip(axes[0], panels, strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 50 else None, markersize=4, label=name)
        axis.set(xlabel=x_label, ylabel=label, yscale=scale)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if scale == "log":  # 0.2, not 2 x 10^-1
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            low, high = axis.get_ylim()  # over more than a decade names between the powers of ten would overlap
            axis.yaxis.set_minor_formatter(FormatStrFormatter("%g") if high < 10 * low else NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130)
    plt.close(figure)


def title_of(model: Family, *more: str) -> str:
    return " · ".join(filter(None, [family_name(model), model.data["title"], *more]))


def draw_curves(trainer: Trainer) -> None:
    """training_loss.png and, for families that draw images, epoch_comparisons/metrics_comparison.png."""
    history, model, results = trainer.history, trainer.model, trainer.results
    epochs, steps = ([r for r in history if ("epoch" in r) is kind] for kind in (True, False))
    players = [name for name in trainer.stat_names if name.endswith("_loss")]  # their sum would say nothing
    names = {name: name for name in players} or {"loss": "training"}
    curves = {f"{title}, per {LOG_EVERY} steps": [(r["step"] / trainer.steps_per_epoch, r[name]) for r in steps]
              for name, title in names.items()}
    if "val_loss" in epochs[0]:
        curves["held out, averaged weights"] = [(r["epoch"], r["val_loss"]) for r in epochs]
    scale = "log" if model.descends else "linear"
    plot(results / "training_loss.png", title_of(model, "loss"), [("loss", curves, scale)], "epoch")
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
    plot(results / "epoch_comparisons" / "metrics_comparison.png", title_of(model, "over epochs"), panels, "epoch")


# === command line ===

GROUPS = {"run": "run", "data": "data", "optimisation": "optimisation (training)", "model": "architecture (training)",
          "sampling": "sampling", "exploring": "exploring (--mode infer --task ...)", "evaluation": "evaluation"}
MODES = ("train", "infer", "evaluate")
GROUP_MODES = {"optimisation": ("train",), "model": ("train",), "exploring": ("infer",),
               "evaluation": ("train", "evaluate")}  # others: all
TASKS = ("sample", "reconstruct", "interpolate", "traverse", "denoise", "ood", "latent")
FLAG_MODES = {"output_dir": ("infer",), "export": ("infer",), "label": ("train", "infer"), "resume": ("train",),
              "num_samples": ("train", "infer"), "prepare_data": ("train",), "compile": ("train",),
              "compare": ("evaluate",)}
TASK_FLAGS = {"output_dir": ("sample",), "export": ("sample",), "sample_batch": ("sample",), "label": TASKS[:5],
              "frames": TASKS[2:5], "input": TASKS[1:4], "ood_dataset": ("ood",), "ood_root": ("ood",),
              **dict.fromkeys(("num_samples", "seed"), tuple(task for task in TASKS if task != "traverse")),
              "data_root": tuple(task for task in TASKS if task not in ("sample", "denoise"))}  # others: all
CONFIG_FIELDS = {family: {f.name: f for f in dataclasses.fields(cls.config_class)} for family, cls in FAMILIES.items()}


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

    flag("run", "mode", "train, infer (draw images) or evaluate (default train)", choices=MODES)
    flag("run", "model", "family (default diffusion, or the first that can do the --task; the checkpoint says)",
         choices=tuple(FAMILIES))
    flag("run", "checkpoint", "file to write or read (default models/diffusion_model.pt beside this script; infer and "
         "evaluate take the shipped weights when it does not exist yet)", type=Path)
    flag("run", "results_dir", "folder for pictures and records (default results/ beside this script)", type=Path)
    flag("run", "device", "auto, cpu, cuda, cuda:N or mps (default auto)", type=device_name)
    flag("run", "precision", "of the network's arithmetic (default auto: bfloat16 where the hardware has it)",
         choices=("auto", "float32", "bfloat16"))
    flag("run", "compile", "torch.compile the network: slow start, a little faster after it", action="store_true")
    flag("run", "resume", "continue the run that --checkpoint holds, exactly", action="store_true")
    flag("data", "dataset", "mnist or cifar10 (downloaded), digits (scikit-learn's 1,797, no download) or folder "
         "(default mnist)",
         choices=tuple(DATASETS))
    flag("data", "data_root", "folder with MNIST/raw or cifar-10-batches-py, or with your images, one "
         "sub-folder per label", type=Path)
    flag("data", "image_size", "side to which images of a folder are cropped and resized (default 32)",
         type=number(int, 4, 1024))
    flag("data", "prepare_data", "only fetch and check the dataset, then exit (status 3: can't be downloaded)",
         action="store_true")
    for name in dict.fromkeys(name for fields in CONFIG_FIELDS.values() for name in fields):
        uses = [(family, fields[name]) for family, fields in CONFIG_FIELDS.items() if name in fields]
        meta = uses[0][1].metadata
        defaults = [f"{f.default} for {family}" for family, f in uses if f.default is not None]
        if all(f.default == uses[0][1].default for _, f in uses):
            defaults = [str(uses[0][1].default)] + [f"for {uses[0][0]}"] * (len(uses) == 1 < len(FAMILIES))
        text = meta["help"] + ("" if uses[0][1].default is None else f" (default {', '.join(defaults)})")
        flag(meta["group"], name, text, **({"action": argparse.BooleanOptionalAction} if uses[0][1].default is True else
                                           {"type": meta["type"], "choices": meta["choices"]}))
    flag("sampling", "num_samples", "images to draw or, with a --task, to look at (default 16; interpolate 5 pairs, "
         "denoise 3, latent 3000, ood 10000)", type=number(int, 1, sys.maxsize))
    flag("sampling", "sample_batch", "images drawn at once, bounds the memory (default 250)", type=number(int, 1))
    flag("sampling", "label", "classes to draw or to look at, in turn, e.g. 7 or 0,1,2 (default all)")
    flag("sampling", "output_dir", "also save each image as a PNG file of its own here", type=Path)
    flag("sampling", "export", "also write the averaged weights alone, in half precision, to this file", type=Path)
    add_looking_flags(flag)
    return parser


def add_looking_flags(flag: Callable[..., None]) -> None:
    """The flags of --task and of measuring."""
    flag("exploring", "task", "sample, interpolate (all), denoise (diffusion), reconstruct, traverse, ood or latent "
         "(VAE); default sample", choices=TASKS)
    flag("exploring", "input", "image files to start from instead of held-out images: reconstruct any number, "
         "interpolate two, traverse one", type=Path, nargs="+", metavar="FILE")
    flag("exploring", "frames", "pictures from one end to the other (default 12, traverse 13)",
         type=number(int, 2, 100))
    flag("exploring", "ood_dataset", "dataset of foreign images (default cifar100 for colour, folder with --ood_root)",
         choices=tuple(DATASETS))
    flag("exploring", "ood_root", "folder with foreign images: pictures, or files in MNIST's format", type=Path)
    flag("evaluation", "compare", "checkpoints to measure and to draw side by side", type=Path, nargs="+",
         metavar="FILE")
    flag("evaluation", "eval_samples", "images to measure (default: evaluate 10000 or the size of the test set, train "
         "400 between epochs)", type=number(int, 2))
    flag("evaluation", "fid_features", "feature net: cnn (our classifier for the dataset) or inception (default auto: "
         "cnn)", choices=("auto", "cnn", "inception"))
    flag("evaluation", "inception_weights", "file with the Inception weights, for offline machines", type=Path)
    flag("evaluation", "classifier", "checkpoint of --model classifier for the metrics (default: the one in models/, "
         "else the shipped one for the dataset)", type=Path)


def check_flags(given: dict[str, Any], family_key: str | None) -> None:
    """A flag that would do nothing is a usage error, not ignored."""
    mode, group_of, task = given["mode"], build_parser().group_of, given.get("task", "sample")
    if family_key is not None and task not in (possible := FAMILIES[family_key].tasks) and "task" in given:
        able = [key for key, family in FAMILIES.items() if task in family.tasks]
        raise UserError(f"--task {task} can't be done by --model {family_key}, only by {' or '.join(able)}"
                        + (f"; {family_key} can {', '.join(possible)}" if possible else ""), 2)
    for name in given:
        if mode == "infer" and task not in (tasks := TASK_FLAGS.get(name, TASKS)):
            raise UserError(f"--{name} has no effect with --task {task}, only with --task {' or '.join(tasks)}", 2)
        modes = FLAG_MODES.get(name) or GROUP_MODES.get(group_of[name], MODES)
        if mode not in modes:
            raise UserError(f"--{name} has no effect with --mode {mode}, only with --mode {' or '.join(modes)}"
                            + (": the checkpoint fixes it" if group_of[name] == "model" else ""), 2)
        owners = [family for family, fields in CONFIG_FIELDS.items() if name in fields]
        if owners and family_key is not None and family_key not in owners:
            raise UserError(f"--{name} belongs to --model {' or '.join(owners)}, not to {family_key}", 2)
        draws = family_key is None or FAMILIES[family_key].can_sample or name == "export"
        if not draws and group_of[name] in ("sampling", "evaluation"):
            raise UserError(f"--{name} has no effect with --model {family_key}, which draws no images", 2)


def config_given(given: dict[str, Any], family: str) -> dict[str, Any]:
    return {name: given[name] for name in CONFIG_FIELDS[family] if name in given}


def pick_labels(given: dict[str, Any], model: Family) -> tuple[Tensor | None, list[str] | None]:
    """The classes of `--label`, which the images go through in turn, and their names; None where there are none."""
    classes = model.data["classes"]
    if not model.labelled:
        if "label" in given:
            raise UserError(f"--label {given['label']}: the model was trained without labels", 2)
        return None, None
    chosen = [item.strip() for item in given["label"].split(",")] if "label" in given else classes
    for item in chosen:
        if item not in classes:
            raise UserError(f"--label {item}: the model knows {', '.join(classes[:20])}", 2)
    return torch.tensor([classes.index(name) for name in chosen]), chosen


def find_feature_net(given: dict[str, Any], data: dict, device: torch.device) -> tuple[FeatureNet | None, str]:
    """The feature net that was asked for, or the classifier that fits the data; else None and the reason."""
    if given.get("fid_features") == "inception":
        return inception_net(given.get("inception_weights"), device), ""
    if "inception_weights" in given:
        raise UserError("--inception_weights belongs to --fid_features inception", 2)
    name = f"classifier_{data['dataset']}.pt"
    candidates = [given["classifier"]] if "classifier" in given else \
        [path for path in (HERE / "models" / name, HERE / "pretrained" / name) if path.exists()]
    if candidates:
        return classifier_net(candidates[0], device, data), ""
    reason = (f"no classifier for {data['title']}: train one with --model classifier --dataset {data['dataset']}"
              ", or use --fid_features inception")
    if given.get("fid_features") == "cnn":
        raise UserError(reason)
    return None, reason


def default_paths(given: dict[str, Any], family: type[Family], dataset: str) -> tuple[Path, Path]:
    """(checkpoint, results folder): beside this script unless the user says where."""
    return (given.get("checkpoint", HERE / "models" / family.checkpoint_name.format(dataset=dataset)),
            given.get("results_dir", HERE / "results" / family.results_folder))


def same_data(state: dict, path: Path, images: Images) -> None:
    if images.info() != state["data"]:
        raise UserError(f"{path} was trained on {state['data']['title']} ({state['data']['train_images']} images of "
                        f"{state['data']['image_size']} pixels), not on this data: give its --dataset and --data_root")


def epoch_evaluation(given: dict[str, Any], model: Family, images: Images, world: World) -> EpochEvaluation:
    """How to measure between epochs, such that it costs at most a tenth of the work of training."""
    if not model.can_sample:
        return EpochEvaluation()
    net, reason = find_feature_net(given, model.data, world.device)
    if net is None:
        return EpochEvaluation(reason=reason)
    count = given.get("eval_samples") or min(400, len(images.test))
    passes = count * model.describe_sampling().get("network_evaluations", 1)
    every = math.ceil(passes / (EVALUATION_SHARE * 3 * len(images.train)))  # a training step is about 3 passes
    reference, real = (net(part[some_rows(part, count)]) for part in (images.test, images.train))
    floors = {f"real_{k}": v for k, v in measure(real, reference, net, quick=True)[0].items() if not k.endswith("_std")}
    return EpochEvaluation(net, reference, floors, count, every)


def resumed_config(given: dict[str, Any], state: dict) -> Any:
    """The run's own options; only its length and how often it saves may be changed half-way."""
    if missing := {"model", "optimizers", "schedulers", "rng", "step", "epoch_done", "sums", "looked"} - state.keys():
        raise UserError("--resume: the checkpoint holds averaged weights for drawing, but to continue it lacks "
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


def run_train(given: dict[str, Any], world: World, precision: torch.dtype) -> int:
    """--mode train"""
    key, state = given.get("model", next(iter(FAMILIES))), None
    dataset = given.get("dataset", "mnist")
    if given.get("resume"):
        state = open_checkpoint(default_paths(given, FAMILIES[key], dataset)[0])
        if given.get("model", state["family"]) != state["family"]:
            raise UserError(f"the checkpoint holds a {state['family']} model, not --model {key}", 2)
        key, dataset = state["family"], given.get("dataset", state["data"]["dataset"])
    check_flags(given, key)
    checkpoint, results = default_paths(given, FAMILIES[key], dataset)
    size = given.get("image_size") or (state["data"]["image_size"] if state else None)
    images = DATASETS[dataset](given.get("data_root"), size, world)
    if given.get("image_size", images.train.shape[-1]) != images.train.shape[-1]:
        raise UserError(f"--image_size is for --dataset folder: {images.title} has {images.train.shape[-1]} pixels", 2)
    if given.get("prepare_data"):
        print(f"{images.title}: {len(images.train)} training and {len(images.test)} test images are ready")
        return 0
    if state:
        same_data(state, checkpoint, images)
        config = resumed_config(given, state)
    else:
        config = FAMILIES[key].config_class(**config_given(given, key))
    torch.manual_seed(config.seed)
    model = FAMILIES[key](config, images.info())
    labels, names = pick_labels(given, model)
    if world.main:
        check_outputs(results, checkpoint)
    trainer = Trainer(model, images, world, precision, given.get("compile", False), checkpoint, results)
    evaluation = epoch_evaluation(given, model, images, world)
    if state:
        trainer.load(state)
    if world.main:
        keep_previous(checkpoint, state)
        announce(trainer, evaluation)

    def draw(name: str, *title: str) -> None:
        count = min(given.get("num_samples", 16), GRID)
        drawn = generate_all(trainer.sampler, labels, count, config.seed, given.get("sample_batch", 250), world)
        if world.main:
            grid_image(drawn, results / name, title_of(model, *title), names)

    def on_epoch(epoch: int) -> None:
        milestone = epoch in (1, 5, config.epochs) or epoch % model.panel_every == 0
        if model.can_sample and milestone:
            draw(f"epoch_comparisons/samples_epoch_{epoch:03d}.png", f"epoch {epoch}")
        if world.main and (milestone or epoch < 20):  # an epoch of a small dataset is shorter than drawing a chart
            draw_curves(trainer)

    trainer.fit(evaluation, on_epoch)
    if trainer.stopped() and trainer.epoch_done < config.epochs:  # a signal in the last step: nothing is left to resume
        if world.main:
            print(f"stopped at step {trainer.step} of {config.epochs * trainer.steps_per_epoch}; --resume continues "
                  f"from {checkpoint}", file=sys.stderr)
        return 128 + trainer.stopped()
    if model.can_sample:
        draw("final_samples.png", f"after {config.epochs} epochs", sampling_title(model))
    if world.main:
        print(f"trained for {trainer.seconds / 60:.1f} minutes; model in {checkpoint}, pictures in {results}")
    return 0


def check_outputs(results: Path, checkpoint: Path) -> None:
    check_writable(results)
    check_writable(checkpoint.parent)
    if checkpoint.is_dir():
        raise UserError(f"{checkpoint} is a folder: --checkpoint takes a file")


def keep_previous(checkpoint: Path, state: dict | None) -> None:
    """A new run destroys no model of an earlier one: it is moved aside, to a name that is still free."""
    if state is None and checkpoint.exists():
        names = (checkpoint.with_suffix(f".previous{n}{checkpoint.suffix}") for n in itertools.count(1))
        old = next(name for name in names if not os.path.lexists(name))
        os.replace(checkpoint, old)
        print(f"the model that was in {checkpoint} is kept as {old.name} (--resume would have continued it)")


def announce(trainer: Trainer, evaluation: EpochEvaluation) -> None:
    """What is about to happen, in a few lines."""
    model, world, config = trainer.model, trainer.world, trainer.config
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{family_name(model)} ({size:.2f} M parameters) on {model.data['title']}: {len(trainer.images.train)} "
          f"training and {len(trainer.images.test)} test images of {model.data['image_size']} pixels; {world.device}, "
          f"{str(model.precision).removeprefix('torch.')}, {world.size} process(es)")
    if trainer.batch_size < config.batch_size:
        print(f"--batch_size {config.batch_size} is more than there are images: using {trainer.batch_size}")
    if trainer.step:
        print(f"resuming {trainer.checkpoint} at step {trainer.step} of {config.epochs * trainer.steps_per_epoch}")
    if evaluation.net is not None:
        print(f"every {evaluation.every} epoch(s): {evaluation.count} samples measured against as many test images "
              f"by {evaluation.net.name}")
    elif evaluation.reason:
        print(f"no FID while training: {evaluation.reason}")


def sampling_title(model: Family) -> str:
    how = model.describe_sampling()
    return ", ".join(f"{how[k]} {k}" if k == "steps" else f"{how[k]}" for k in ("sampler", "steps") if k in how)


def open_model(given: dict[str, Any], world: World, precision: torch.dtype) -> tuple[Family, dict, Path, Path]:
    """(model, its checkpoint's content and path, results folder). Without --checkpoint and before any training: the
    shipped weights. A checkpoint that is named and missing is an error."""
    able = next(name for name, family in FAMILIES.items() if given.get("task", "sample") in family.tasks)
    key, dataset = given.get("model", able), given.get("dataset", "mnist")
    path = default_paths(given, FAMILIES[key], dataset)[0]
    if "checkpoint" not in given and not path.exists():
        path = HERE / "pretrained" / f"{key}_{dataset}.pt"
        if not path.exists():
            raise UserError(f"no {key} model for {dataset} yet: train one with --mode train, or name a checkpoint with "
                            "--checkpoint")
    state = open_checkpoint(path)
    for name, holds in (("model", state["family"]), ("dataset", state["data"]["dataset"]),
                        ("image_size", state["data"]["image_size"])):
        if given.get(name, holds) != holds:
            raise UserError(f"{path} was made with --{name} {holds}, not {given[name]}: name another --checkpoint", 2)
    check_flags(given, state["family"])
    model = restore_model(state, **config_given(given, state["family"])).to(world.device).eval()
    model.precision = precision
    results = default_paths(given, type(model), dataset)[1]
    if world.main:
        check_writable(results)
    return model, state, path, results


def run_infer(given: dict[str, Any], world: World, precision: torch.dtype) -> int:
    """--mode infer"""
    if world.size > 1:
        raise UserError("--mode infer runs in one process: start it without torchrun", 2)
    model, state, path, results = open_model(given, world, precision)
    if given.get("task", "sample") != "sample":
        return explorer().run(given, model, state, path, results)
    count, batch, output = given.get("num_samples", 16), given.get("sample_batch", 250), given.get("output_dir")
    labels, names = pick_labels(given, model)
    if "export" in given and given["export"].exists() and given["export"].samefile(path):
        raise UserError(f"--export {given['export']} would replace the checkpoint that is read: name another file", 2)
    if output:
        check_writable(output)
    shipped = " (the shipped weights)" if path.parent == HERE / "pretrained" else ""
    print(f"{title_of(model)} from {path}{shipped}", flush=True)
    if "export" in given:
        save_checkpoint(given["export"], export_state(model, state))
        print(f"averaged weights in half precision -> {given['export']}")
        if not model.can_sample:
            return 0
    shown, started = [], time.perf_counter()
    with progress(count, "drawing", count <= batch, unit="image", leave=False) as bar:
        for part, images in generate(model, labels, count, model.config.seed, batch, world, bar):
            shown += images[:max(0, GRID - len(shown))]
            for i, image in zip(part, images, strict=True) if output else ():
                label = "".join(c if c.isalnum() or c in "-+." else "-" for c in names[i % len(names)]) if names else ""
                with replacing(output / f"{i:05d}{'_label' + label if names else ''}.png") as file:
                    picture(image).save(file, format="PNG")
    seconds = time.perf_counter() - started
    grid_image(torch.stack(shown), results / "final_samples.png", title_of(model, sampling_title(model)), names)
    more = f" (the first {GRID} of them in the picture)" if count > GRID else ""
    print(f"{count} image(s){more} -> {results / 'final_samples.png'}" + (f", each one in {output}" if output else ""))
    print(f"{seconds:.2f} s, {count / seconds:.1f} images/s on {world.device}")
    return 0


def export_state(model: Family, state: dict) -> dict:
    """What is shipped: averaged weights in half precision, the description, the last figures and the origin."""
    return {"format": FORMAT, "family": state["family"], "config": dataclasses.asdict(model.config),
            "data": state["data"], "ema": module_state(model, half=True),
            "history": [r for r in state["history"] if "epoch" in r][-1:], "made": state["made"]}


def explorer() -> Any:
    """The sibling script explore.py, which holds what only looks at trained models. It imports this one."""
    import importlib.util
    path = HERE / "explore.py"
    if not path.exists():
        raise UserError(f"this needs {path}, which belongs beside this script: copy it there")
    sys.modules["image_gen"] = sys.modules[__name__]  # also when this one runs as __main__
    spec = importlib.util.spec_from_file_location("explore", path)
    sys.modules["explore"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["explore"])
    return sys.modules["explore"]


def run_evaluate(given: dict[str, Any], world: World, precision: torch.dtype) -> int:
    """--mode evaluate: every metric with its floor (real training images in the place of the model's)."""
    if "compare" in given:
        return explorer().compare(given, world, precision)
    model, state, path, results = open_model(given, world, precision)
    report = evaluate_model(given, model, state, path, load_test_data(given, model, state, path, world), world)
    if world.main:
        write_json(results / "evaluation.json", report)
        print_report(report, results / "evaluation.json")
    return 0


def load_test_data(given: dict[str, Any], model: Family, state: dict, path: Path, world: World | None) -> Images:
    images = DATASETS[model.data["dataset"]](given.get("data_root"), model.data["image_size"], world)
    same_data(state, path, images)
    return images


def evaluate_model(given: dict[str, Any], model: Family, state: dict, path: Path, images: Images,
                   world: World) -> dict[str, Any]:
    """All that can be measured of a model; on all processes, but only the main one's result is complete."""
    started = time.perf_counter()
    report = {"model": family_name(model), "checkpoint": str(path), "checkpoint_sha256": file_digest(path),
              "parameters": sum(p.numel() for p in model.parameters()),
              "training_seconds": state.get("seconds", next(
                  (r["seconds"] for r in reversed(state["history"]) if "seconds" in r), None)),
              "training_made": state["made"], "dataset": model.data["title"],
              "seed": model.config.seed, "device": str(world.device),
              "precision": str(model.precision).removeprefix("torch.")} | model.describe_sampling()
    if model.can_sample:
        report |= evaluate_samples(given, model, images, world)
        report |= drawing_speed(model, world) if world.main else {}
    else:
        report["metrics"] = {}
    if model.measures_held_out:
        figures = held_out(model, images, len(images.test), world.device)
        report["metrics"] |= {k: {"value": v, "n": len(images.test), "reference": "test"} for k, v in figures.items()}
    return report | {"seconds": round(time.perf_counter() - started, 1), "machine": provenance()}


def drawing_speed(model: Family, world: World) -> dict[str, Any]:
    """Milliseconds per image in batches of one and of the size that does best: medians of about a second's work for
    each size, up to the first that takes more than five."""
    found: dict[int, float] = {}
    for size in (1, 8, 64, 256):
        labels, times = proportional_labels(model.data, size, model.labelled), []
        while not times or (len(times) < 100 and sum(times) < (1 if len(times) > 1 else 5)):
            started = time.perf_counter()
            noise = ImageNoise(0, range(size), world.device)
            to_uint8(model.sample(None if labels is None else labels.to(world.device), noise)).cpu()
            times.append(time.perf_counter() - started)
        found[size] = 1000 / size * float(np.median(times[1:] or times))  # the first one warms up
        if sum(times) > 5:
            break
    best = min(found, key=found.__getitem__)
    return {"ms_per_image_at_batch_1": round(found[1], 4), "ms_per_image_at_best_batch": round(found[best], 4),
            "best_batch": best}


def evaluate_samples(given: dict[str, Any], model: Family, images: Images, world: World) -> dict[str, Any]:
    """Draw, measure, and measure as many real training images in the same way."""
    net, reason = find_feature_net(given, model.data, world.device)
    count = given.get("eval_samples") or min(10_000, len(images.test))
    labels, started = proportional_labels(model.data, count, model.labelled), time.perf_counter()
    drawn = generate_all(model, labels, count, model.config.seed, given.get("sample_batch", 250), world, "drawing")
    seconds = time.perf_counter() - started
    metrics: dict[str, Any] = {}
    report = {"num_samples": count, "sampling_seconds": round(seconds, 1),
              "images_per_second": round(count / seconds, 1), "metrics": metrics}
    if not world.main:
        return report
    order = some_rows(images.train, count)
    real, reference = images.train[order], images.test[some_rows(images.test, count)]
    common = {"n": count, "n_floor": len(real), "n_reference": len(reference), "reference": "test"}
    if net is not None:
        target = net(reference)
        values, reasons = measure(net(drawn), target, net, labels)
        floors, _ = measure(net(real), target, net, images.train_labels[order])
        for key, value in values.items():
            metrics[key] = {"value": value, "floor": floors.get(key), **common, "feature_net": net.name,
                            "feature_net_sha256": net.digest} | ({"reason": reasons[key]} if key in reasons else {})
    else:
        metrics["fid"] = {"value": None, "reason": reason}
    distances = nearest_distance(reference, images.train)
    threshold = torch.quantile(distances, 0.01)
    near = [(d < threshold).float().mean().item() for d in (nearest_distance(drawn, images.train), distances)]
    metrics["near_copies"] = {"value": near[0], "floor": near[1], **common, "threshold": threshold.item(), "definition":
                              "share of images nearer to a training image (Euclidean distance of pixels) than the "
                              "nearest hundredth of the test images is; the floor is the test images' own share"}
    return report


def print_report(report: dict[str, Any], path: Path) -> None:
    how = [f"{k} {report[k]}" for k in ("sampler", "steps", "guidance", "num_samples") if k in report]
    print(f"{report['model']} on {report['dataset']}: {', '.join([*how, 'seed ' + str(report['seed'])])}")
    minutes = "unknown" if report["training_seconds"] is None else f"{report['training_seconds'] / 60:.1f} minutes"
    alone, best = (report.get(f"ms_per_image_at_{key}", 0) for key in ("batch_1", "best_batch"))
    print(f"{report['parameters'] / 1e6:.2f} M parameters, trained for {minutes}" + (
        f"; {alone:.3g} ms for one image, {best:.3g} ms each in batches of {report['best_batch']}" if best else ""))
    print(f"{'metric':34}{'value':>12}{'real data':>12}")
    for key, entry in report["metrics"].items():
        cells = "".join(f"{'-' if entry.get(k) is None else format(entry[k], '.4f'):>12}" for k in ("value", "floor"))
        print(f"{key:34}{cells}" + (f"  ({entry['reason']})" if "reason" in entry else ""))
    print(f"-> {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    world = None
    try:
        given = {"mode": "train"} | vars(build_parser().parse_args(argv))
        check_flags(given, given.get("model"))
        world = World(given.get("device", "auto"))
        precision = pick_precision(given.get("precision", "auto"), world.device)
        run = {"train": run_train, "infer": run_infer, "evaluate": run_evaluate}[given["mode"]]
        status = run(given, world, precision)
        world.wait()  # a process that leaves early breaks the connections of those still at work
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 130
    except OSError as error:  # a disk that fills up, a folder that vanishes
        name = " ".join(str(error.filename or "file").splitlines())
        print(f"error: {name}: {error.strerror or error}; checkpoints written so far are whole", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("error: out of memory: lower --batch_size or --sample_batch, or use --device cpu", file=sys.stderr)
        return 1
    finally:
        if world is not None:
            world.close()


if __name__ == "__main__":
    exit_status = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # gloo's threads now and then abort an orderly shutdown (torch 2.11)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
