#!/usr/bin/env python3
"""What one can ask of trained image models: a command line of its own beside image_gen.py, which holds the models.

    python explore.py reconstruct --model vae           held-out images, and what their codes keep
    python explore.py interpolate --model gan           from one noise to another, strip and GIF
    python explore.py compare A.pt B.pt C.pt            models side by side, between floors and ceilings
    python explore.py fid FOLDER mnist                  pictures, whoever drew them, beside others

There is no model code here. Each task has flags of its own (`explore.py TASK --help`) and writes TASK.png and TASK.json
into the results folder of the model. `grep '^# ===' explore.py` prints the contents.

Letters for shapes are those of image_gen.py; F frames, D numbers of a code.

References
    [White16]    White: Sampling Generative Networks, 2016 (spherical interpolation)
    [Nalisnick19] Nalisnick et al.: Do Deep Generative Models Know What They Don't Know?, 2019
    [Nalisnick19b] Nalisnick et al.: Detecting Out-of-Distribution Inputs ... Using Typicality, 2019
    [Burda16]    Burda, Grosse, Salakhutdinov: Importance Weighted Autoencoders, 2016 (units that carry nothing)
    [Maaten08]   van der Maaten, Hinton: Visualizing Data using t-SNE, 2008
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import image_gen as ig

DEAD = 0.01  # nats: a dimension whose mean KL is below tells nothing about the image ([Burda16] asks for 0.01 variance)
NEIGHBOURS = 10  # that vote on a class in the space of codes

# === flags ===


@dataclass(frozen=True)
class HeldOutOptions(ig.DataOptions):
    label: str | None = ig.option(None, "looking", "classes of held-out images (or to draw), in turn, e.g. 7 or "
                                  "3,8", str)
    input: Any = ig.option(None, "looking", "image files to start from instead of held-out images", Path, nargs="+")


@dataclass(frozen=True)
class ReconstructOptions(HeldOutOptions):
    num_samples: int = ig.option(16, "looking", "images", ig.sample_count)


@dataclass(frozen=True)
class InterpolateOptions(HeldOutOptions):
    num_samples: int | None = ig.option(None, "looking", "pairs (default: 5, or 1 with two classes in --label)",
                                        ig.number(int, 1, 1000))
    frames: int = ig.option(12, "looking", "pictures from one end to the other", ig.number(int, 2, 100))


@dataclass(frozen=True)
class TraverseOptions(HeldOutOptions):
    frames: int = ig.option(13, "looking", "pictures from -3 to 3 standard deviations", ig.number(int, 2, 100))


FITS = ("none", "mnist")


@dataclass(frozen=True)
class InspectOptions(HeldOutOptions):
    fit: str = ig.option("none", "looking", "how --input is prepared; mnist: white on black, 20 of 28 pixels large, "
                         "the centre of mass in the middle", choices=FITS)


@dataclass(frozen=True)
class DenoiseOptions:
    num_samples: int = ig.option(3, "looking", "images, of which every step is kept", ig.number(int, 1, 100))
    label: str | None = ig.option(None, "looking", "classes to draw, in turn, e.g. 7 or 0,1,2 (default: all)", str)
    frames: int = ig.option(12, "looking", "steps to show in the picture", ig.number(int, 2, 100))


@dataclass(frozen=True)
class OodOptions(ig.DataOptions):
    num_samples: int = ig.option(10_000, "looking", "images of each set", ig.sample_count)
    ood_dataset: str | None = ig.option(None, "looking", "dataset of foreign images (default: cifar100 for colour, "
                                        "folder with --ood_root)", choices=ig.DATASETS)
    ood_root: Path | None = ig.option(None, "looking", "folder with foreign images: pictures, or files in MNIST's "
                                      "format", Path)


@dataclass(frozen=True)
class LatentOptions(ig.DataOptions):
    num_samples: int = ig.option(3000, "looking", "test images on the map", ig.sample_count)


@dataclass(frozen=True)
class CompareOptions(ig.DataOptions, ig.MeasureOptions):
    eval_samples: int | None = ig.option(None, "evaluation", "images to measure of each model (default: 2,000, or the "
                                         "size of a smaller test set)", ig.number(int, 2))
    checkpoints: Any = ig.option(None, "run", "files of the models to compare; also without the flag", Path, nargs="+")


@dataclass(frozen=True)
class FidOptions(ig.MeasureOptions):
    dataset: str | None = ig.option(None, "evaluation", "whose classifier measures (default: of the dataset that is "
                                    "named, else one that fits the pictures)", choices=ig.DATASETS[:-1])
    data_root: Path | None = ig.option(None, "data", "folder with the files of the datasets that are named", Path)
    results_dir: Path | None = ig.option(None, "run", "folder to write to; else results/ beside this script", Path)
    device: str = ig.option("auto", "run", "auto, cpu, cuda, cuda:N or mps", str)


# === pictures ===


def sheet(rows: Sequence[Tensor], path: Path, title: str, row_names: Sequence[str] = (),
          column_names: Sequence[str] = ()) -> None:
    """Save rows of uint8 images, [F C H W] each, as one picture with a title and names at the left and above."""
    from PIL import Image, ImageDraw, ImageFont
    size, columns = rows[0].shape[-1], max(map(len, rows))
    cell = size * max(1, 72 // size)
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    left = 10 + max([int(small.getlength(name)) + 8 for name in row_names], default=0)
    head, gap = 34 + (18 if column_names else 0), 4
    width = max(left + columns * (cell + gap) + 6, int(font.getlength(title)) + 20)
    canvas = Image.new("RGB", (width, head + len(rows) * (cell + gap) + 6), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((10, 8), title, fill="black", font=font)
    for x, name in enumerate(column_names):
        pen.text((left + x * (cell + gap) + cell // 2, 34), name, fill="#555555", font=small, anchor="ma")
    for y, row in enumerate(rows):
        if y < len(row_names):
            pen.text((left - 8, head + y * (cell + gap) + cell // 2), row_names[y], fill="#555555", font=small,
                     anchor="rm")
        for x, image in enumerate(row):
            place = (left + x * (cell + gap), head + y * (cell + gap))
            canvas.paste(ig.picture(image).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST), place)
    with ig.replacing(path) as part:
        canvas.save(part, format="PNG")


def animation(frames: Tensor, path: Path, hold: int, there_and_back: bool, captions: Sequence[str] = (),
              rows: int = 1, milliseconds: int = 90) -> None:
    """Save uint8 [F N C H W] as a GIF that loops: the N images in rows, a caption above. The ends stay for `hold`
    frames."""
    from PIL import Image, ImageDraw, ImageFont
    count, columns, size = len(frames), frames.shape[1] // rows, frames.shape[-1]
    cell, gap, head = size * max(1, 112 // size), 6, 24 if captions else 0
    font, pictures = ImageFont.load_default(size=13), []
    width = max([columns * (cell + gap) + gap, *(int(font.getlength(text)) + 2 * gap for text in captions)])
    for number, images in enumerate(frames):
        canvas = Image.new("RGB", (width, head + rows * (cell + gap) + gap), "white")
        if captions:
            ImageDraw.Draw(canvas).text((gap, 4), captions[number], fill="black", font=font)
        for i, image in enumerate(images):
            tile = ig.picture(image).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(tile, (gap + i % columns * (cell + gap), head + gap + i // columns * (cell + gap)))
        pictures.append(canvas)
    order = list(range(count)) + (list(range(count - 2, 0, -1)) if there_and_back else [])
    times = [milliseconds * hold if i == count - 1 or (i == 0 and there_and_back) else milliseconds for i in order]
    with ig.replacing(path) as part:
        pictures[0].save(part, format="GIF", save_all=True, append_images=[pictures[i] for i in order[1:]],
                         duration=times, loop=0)


@contextlib.contextmanager
def figure(path: Path, columns: int, **more: Any) -> Any:
    """matplotlib axes side by side, saved as PNG at the end."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawn, axes = plt.subplots(1, columns, layout="constrained", squeeze=False, **more)
    try:
        yield drawn, axes[0]
        with ig.replacing(path) as part:
            drawn.savefig(part, format="png", dpi=130)
    finally:
        plt.close(drawn)


# === inputs ===


@dataclass
class Scene:
    """What a task works with."""
    task: str
    command: ig.Command
    options: Any
    model: ig.ImageModel
    results: Path

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @functools.cached_property
    def images(self) -> ig.Images:
        """The dataset that the model was trained on."""
        return ig.SUBJECT.trained_on(self.command)

    def title(self, *more: str) -> str:
        return ig.title_of(self.model, *more)

    def held_out(self, count: int) -> tuple[Tensor, list[str]]:
        """`count` test images with the names of their classes; the classes of --label in turn, if it is given."""
        images, classes, label = self.images, self.model.data.classes, self.options.label
        order = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(self.model.config.seed))
        if label is not None:
            if len(classes) < 2:
                raise ig.UserError(f"--label {label}: {images.title} has no classes", 2)
            chosen = ig.named_classes(label, classes)
            pools = {item: order[images.test_labels[order] == classes.index(item)].tolist() for item in chosen}
            if empty := [item for item, pool in pools.items() if not pool]:
                raise ig.UserError(f"--label {empty[0]}: no test image is of that class")
            endless = {item: itertools.cycle(pool) for item, pool in pools.items()}
            order = torch.tensor([next(endless[chosen[i % len(chosen)]]) for i in range(count)])
        order = order[:count]
        return images.test[order], [classes[k] or f"test image {i}" for i, k in
                                    zip(order.tolist(), images.test_labels[order].tolist(), strict=True)]

    def inputs(self, count: int, least: int = 1, most: int | None = None) -> tuple[Tensor, list[str]]:
        """The images of --input, else held-out ones; with their names. uint8 [N C H W]"""
        paths = self.options.input
        if paths is None:
            return self.held_out(count)
        for name in ("label", "num_samples"):
            if name in self.command.given:
                raise ig.UserError(f"--{name} has no effect with --input: leave one of them out", 2)
        if not least <= len(paths) <= (most or len(paths)):
            raise ig.UserError(f"--input: {self.task} takes {least} file(s), not {len(paths)}", 2)
        return ig.own_images(paths, self.model.data), [path.name for path in paths]

    def codes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N C H W] -> mean and log variance of q(z|x) on the CPU, [N D] each"""
        parts = [self.model.encode(ig.to_float(part.to(self.device))) for part in images.split(500)]
        return tuple(torch.cat(part).float().cpu() for part in zip(*parts, strict=True))

    def decode(self, codes: Tensor) -> Tensor:
        """[N D] -> uint8 [N C H W] on the CPU"""
        return torch.cat([ig.to_uint8(self.model.decode(part.to(self.device))).cpu() for part in codes.split(500)])

    @functools.cached_property
    def net(self) -> ig.FeatureNet | None:
        """The classifier of this dataset, if there is one."""
        try:
            net, _ = ig.find_feature_net(ig.MeasureOptions(), self.model.data, self.device)
        except ig.UserError:
            return None
        return net if net and net.names_classes else None

    def classes_seen(self, images: Tensor) -> tuple[list[str], Tensor] | None:
        """What the classifier takes each image for and how sure it is; None where there is no classifier."""
        if self.net is None:
            return None
        share, best = self.net(images).logits.softmax(1).max(1)
        return [self.model.data.classes[k] for k in best], share

    @functools.cached_property
    def familiar(self) -> tuple[Tensor, Tensor]:
        """Of 2,000 test images the negative ELBO, and the mean KL of each dimension of the code."""
        test = self.images.test[ig.some_rows(self.images.test, 2000)]
        figures = bits_and_errors(self, test)
        return figures["reconstruction_nats"] + figures["kl_nats"], kl_by_dimension(*self.codes(test))

    def write(self, report: dict[str, Any]) -> Path:
        path, checkpoint = self.results / f"{self.task}.json", self.command.path
        ig.write_json(path, {"task": self.task, "model": ig.family_name(type(self.model)),
                             "checkpoint": str(checkpoint), "checkpoint_sha256": ig.file_digest(checkpoint),
                             "dataset": self.model.data.title, "seed": self.model.config.seed}
                      | report | {"machine": ig.provenance()})
        return path


def levels_apart(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference of uint8 images [N C H W], in grey levels 0..255: [N]"""
    return (a.float() - b.float()).square().flatten(1).mean(1).sqrt()


# === interpolate ===


def spherical(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point at `share` of the great circle from a to b, length interpolated as well ([White16]): in many
    dimensions the straight line would pass through codes far shorter than any that training has seen."""
    lengths = a.norm(), b.norm()
    cos = ((a * b).sum() / (lengths[0] * lengths[1]).clamp(min=1e-12)).clamp(-1, 1)
    angle = torch.arccos(cos.double())
    if angle.sin() < 1e-6 or min(lengths) == 0:  # the same direction, the opposite one, or none: no one shortest way
        return a.lerp(b, share)
    weights = [(angle * part).sin() / angle.sin() for part in (1 - share, share)]
    point = weights[0] * a / lengths[0] + weights[1] * b / lengths[1]
    return (point * (lengths[0] * (1 - share) + lengths[1] * share)).to(a.dtype)


class NoisePath:
    """Stands in for `Noise`: item i lies at the i-th of `shares` on the way from one image's noise to another's.
    What a sampler draws after its start is the same for all of them."""

    def __init__(self, seed: int, ends: tuple[int, int], shares: Sequence[float], device: torch.device) -> None:
        self.sources = [ig.Noise(seed, [end], torch.device("cpu")) for end in ends]
        self.shares, self.device, self.calls = shares, device, 0

    def __len__(self) -> int:
        return len(self.shares)

    def normal(self, *shape: int) -> Tensor:
        self.calls += 1
        a, b = (source.normal(*shape)[0] for source in self.sources)
        way = [spherical(a, b, share) for share in self.shares] if self.calls == 1 else [a] * len(self)
        return torch.stack(way).to(self.device)


def interpolate(scene: Scene) -> dict[str, Any]:
    """Strips from one image to another: between the codes of two images where the family encodes, else between the
    noises of two samples."""
    model, options = scene.model, scene.options
    shares = np.linspace(0, 1, options.frames).tolist()
    if hasattr(model, "encode"):
        classes = model.data.classes
        two = not options.label or len(classes) < 2 or len(ig.named_classes(options.label, classes)) == 2
        if options.input is None and not two:
            raise ig.UserError(f"--label {options.label}: name two classes, e.g. 3,8, to go from one to the other", 2)
        ends, names = scene.inputs(2 * (options.num_samples or (1 if options.label else 5)), 2, 2)
        codes, _ = scene.codes(ends)
        if len(codes) < 2:
            raise ig.UserError(f"{scene.images.title} has one test image: two are needed, name them with --input", 2)
        between = "the codes (means of q(z|x)) of two images"
        strips = [scene.decode(torch.stack([a + (b - a) * share for share in shares]))
                  for a, b in zip(codes[0::2], codes[1::2], strict=False)]
        row_names = [f"{a} to {b}"[:28] for a, b in zip(names[0::2], names[1::2], strict=False)]
    else:
        if options.input is not None:
            raise ig.UserError(f"--input has no effect here: a {ig.family_name(type(model))} can't encode an image, it "
                               "interpolates between two noises", 2)
        between, strips, row_names = "the noises of two samples, spherically", [], []
        labels, chosen = ig.pick_labels(options.label, model)
        for pair in range(options.num_samples or 5):
            kind = None if labels is None else labels[pair % len(labels)].repeat(len(shares)).to(scene.device)
            noise = NoisePath(model.config.seed, (2 * pair, 2 * pair + 1), shares, scene.device)
            strips.append(ig.to_uint8(model.sample(kind, noise)).cpu())
            row_names.append((f"class {chosen[pair % len(chosen)]}, " if chosen else "")
                             + f"samples {2 * pair} to {2 * pair + 1}")
    sheet(strips[:40], scene.results / "interpolate.png", scene.title("interpolation"), row_names,
          [f"{share:.2f}" for share in shares])
    animation(torch.stack(strips[:6], 1), scene.results / "interpolate.gif", 8, True)
    rows = []
    for name, strip in zip(row_names, strips, strict=True):
        steps, straight = levels_apart(strip[1:], strip[:-1]), levels_apart(strip[-1:], strip[:1]).item()
        row = {"pair": name, "step_levels": steps.tolist(), "end_to_end_levels": straight,
               "largest_step_share": (steps.max() / steps.sum()).item() if steps.sum() else None}
        if seen := scene.classes_seen(strip):
            row |= {"seen_as": seen[0], "confidence": seen[1].tolist()}
        rows.append(row)
    return {"between": between, "shares": shares, "pairs": rows, "units": "levels: root mean square difference of "
            "pixels, 0..255; largest_step_share: of the strip's length, at best 1 / steps"}


# === reconstruct ===


def bits_and_errors(scene: Scene, images: Tensor) -> dict[str, Tensor]:
    """Of uint8 [N C H W], [N] each: squared error of the reconstruction from the mean code (pixels in [0, 1]), and in
    nats the two parts of the negative ELBO, at one code and, with a Bernoulli, one binarisation."""
    parts: dict[str, list[Tensor]] = {}
    for number, part in enumerate(images.split(500)):
        x = ig.to_float(part.to(scene.device))
        batch = ig.Batch(x, torch.zeros(len(x), dtype=torch.long, device=scene.device),
                         ig.Draw(scene.model.config.seed, number, len(x), slice(None), scene.device))
        error, kl, *_ = scene.model.bound(batch)
        squared = ((scene.model.reconstruct(x) - x) / 2).square().flatten(1).mean(1)
        for name, value in (("mse", squared), ("reconstruction_nats", error), ("kl_nats", kl)):
            parts.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def decibels(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pixels in [0, 1]; an exact copy counts as one wrong by a millionth."""
    return -10 * mse.clamp(min=1e-12).log10()


def reconstruct(scene: Scene) -> dict[str, Any]:
    """Originals above, what comes back from the mean of their codes below."""
    images, names = scene.inputs(scene.options.num_samples)
    back, figures = scene.decode(scene.codes(images)[0]), bits_and_errors(scene, images)
    rows, row_names = [], []
    for originals, copies in zip(images[:ig.GRID].split(8), back[:ig.GRID].split(8), strict=True):
        rows += [originals, copies]
        row_names += ["original", "reconstruction"]
    sheet(rows, scene.results / "reconstruct.png", scene.title("reconstruction"), row_names)
    report = {"images": [{"name": name, "psnr_db": psnr, **{k: v[i].item() for k, v in figures.items()}}
                         for i, (name, psnr) in enumerate(zip(names, decibels(figures["mse"]).tolist(), strict=True))],
              "mean": {"psnr_db": decibels(figures["mse"]).mean().item(), "n": len(images)}
              | {k: v.mean().item() for k, v in figures.items()}}
    if scene.options.input is None:  # a floor: the same grey picture for all
        mean = scene.images.train.float().mean(0)
        error = ((images.float() - mean) / 255).square().flatten(1).mean(1)
        report["floor"] = {"what": "the mean training image in place of each reconstruction",
                           "mse": error.mean().item(), "psnr_db": decibels(error).mean().item()}
    ig.say(f"PSNR {report['mean']['psnr_db']:.2f} dB" + (f" (the mean image: {report['floor']['psnr_db']:.2f} dB)"
                                                        if "floor" in report else ""))
    return report


# === traverse ===


def kl_by_dimension(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean KL(q(z_d|x) || N(0, 1)) in nats of each of D dimensions, from [N D] each."""
    return (0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)).mean(0)


def traverse(scene: Scene) -> dict[str, Any]:
    """One image's code with one number at a time set to -3 ... 3 standard deviations of the prior; the dimensions in
    the order of their KL over test images, which says how many nats each tells about an image."""
    image, names = scene.inputs(1, 1, 1)
    test = scene.images.test[ig.some_rows(scene.images.test, 2000)]
    kl = kl_by_dimension(*scene.codes(test))
    order, code = kl.argsort(descending=True), scene.codes(image)[0][0]
    dead = (kl < DEAD).nonzero().flatten().tolist()
    values = torch.linspace(-3, 3, scene.options.frames)
    rows, spans = [], {}
    for number, dimension in enumerate(order.tolist()):
        moved = code.repeat(len(values), 1)
        moved[:, dimension] = values
        drawn = scene.decode(moved)
        spans[dimension] = levels_apart(drawn[-1:], drawn[:1]).item()
        if number < 12:
            rows.append(torch.cat([image, scene.decode(code[None]), drawn]))
    row_names = [f"z{d}  {kl[d]:.2f} nats" + ("  dead" if kl[d] < DEAD else "") for d in order[:12].tolist()]
    sheet(rows, scene.results / "traverse.png", scene.title("traversal around one image"), row_names,
          ["image", "its code", *(f"{value:+.1f}" for value in values)])
    ig.say(f"{len(kl) - len(dead)} of {len(kl)} dimensions carry information; " + (
        f"dead (KL below {DEAD} nats): {', '.join(map(str, dead))}" if dead else "none is dead"))
    return {"image": names[0], "values": values.tolist(), "kl_images": len(test), "dead_below_nats": DEAD, "dead": dead,
            "dimensions": [{"dimension": d, "kl_nats": kl[d].item(), "code": code[d].item(), "change_levels": spans[d]}
                           for d in order.tolist()]}


# === inspect ===


def fitted(path: Path, size: int, target: Path, fit: str = FITS[1]) -> Path:
    """A picture as large and as central as MNIST's digits are, light ink on black, in `target`; or `path` as it is."""
    from PIL import Image, ImageOps
    if fit == "none":
        return path
    image = ig.open_image(path).convert("L")
    edges = np.concatenate([side.ravel() for side in (np.asarray(image)[[0, -1]], np.asarray(image)[:, [0, -1]])])
    image = ImageOps.invert(image) if edges.mean() > 127 else image
    ink = image.point(lambda level: 255 * (level > 96)).getbbox()
    if ink is None:
        raise ig.UserError(f"{path.name} shows nothing: draw something, or take it as it is with --fit none")
    digit = ImageOps.contain(image.crop(ink), [round(size * 20 / 28)] * 2, Image.Resampling.LANCZOS)
    levels, canvas = np.asarray(digit, dtype=float), Image.new("L", (size, size))
    canvas.paste(digit, tuple(min(max(round(size / 2 - 0.5 - line @ np.arange(length) / line.sum()), 0), size - length)
                              for line, length in zip((levels.sum(0), levels.sum(1)), digit.size, strict=True)))
    with ig.replacing(target) as part:
        canvas.save(part, format="PNG")
    return target


def nearest_images(images: Tensor, train: Tensor, count: int) -> tuple[list[list[float]], list[list[int]]]:
    """The `count` training images nearest to each image, uint8 [N C H W]: Euclidean distances of pixels (levels
    0..255), nearest first, and their numbers."""
    rows, distances = images.flatten(1).float(), []
    for columns in train.flatten(1).split(10_000):  # all of MNIST as floats would be 188 MB
        distances.append(torch.cdist(rows, columns.float()))
    nearest = torch.cat(distances, 1).topk(min(count, len(train)), largest=False)
    return nearest.values.tolist(), nearest.indices.tolist()


def inspect(scene: Scene) -> dict[str, Any]:
    """All that a VAE can say of one image: its ELBO and how many real test images have a better one, what comes back
    from its code, the classifier's probabilities, the nearest training images. Without the dataset, a part of it."""
    images, names = scene.inputs(1, 1, 1)
    if scene.options.input is not None:
        path, size = scene.options.input[0], scene.model.data.image_size
        images = ig.own_images([fitted(path, size, scene.results / "inspect_fitted.png", scene.options.fit)],
                               scene.model.data)
    (mean, log_variance), figures = scene.codes(images), bits_and_errors(scene, images)
    elbo = -(figures["reconstruction_nats"] + figures["kl_nats"]).item()
    rows, titles, reasons = [images, scene.decode(mean)], ["seen by the model", "back from its code"], []
    kl, unlike, nearest = kl_by_dimension(mean, log_variance), None, []
    try:
        known, kl = scene.familiar
        unlike = 100 * (known < -elbo).float().mean().item()
        train, classes = scene.images, scene.model.data.classes
        distances, numbers = nearest_images(images, train.train, 8)
        rows, titles = [*rows, train.train[numbers[0]]], [*titles, "nearest for training"]
        nearest = [{"class": classes[train.train_labels[n]], "distance": d} for n, d in zip(numbers[0], distances[0])]
    except ig.UserError as error:
        reasons.append(f"not compared with real images: {error}")
    shares = scene.net(images).logits.softmax(1)[0].tolist() if scene.net else []
    reasons += [] if shares else ["no probabilities: there is no classifier of this dataset"]
    sheet(rows, scene.results / "inspect.png", scene.title(names[0][:40]), titles)
    ig.say(f"ELBO {elbo:.1f} nats" + ("" if unlike is None else f", more unlike the training data than {unlike:.1f} % "
                                      "of real test images"))
    return {"image": names[0], "elbo_nats": elbo, "kl_nats": figures["kl_nats"].item(), "unlike_percent": unlike,
            "psnr_db": decibels(figures["mse"]).item(), "nearest": nearest, "reasons": reasons,
            "classes": dict(zip(scene.model.data.classes, shares, strict=True)) if shares else None,
            "dimensions": [{"dimension": d, "kl_nats": kl[d].item(), "code": mean[0, d].item()}
                           for d in kl.argsort(descending=True).tolist()]}


# === denoise ===


def denoise(scene: Scene) -> dict[str, Any]:
    """The way of a diffusion sampler from noise to image: what it holds, and its estimate of the image, on the way."""
    model, count = scene.model, scene.options.num_samples
    labels, names = ig.pick_labels(scene.options.label, model)
    labels = None if labels is None else labels[torch.arange(count) % len(labels)]
    seen: list[tuple[int, Tensor, Tensor]] = []
    noise = ig.Noise(model.config.seed, range(count), scene.device)
    final = ig.to_uint8(model.sample(None if labels is None else labels.to(scene.device), noise, watch=lambda t, x, e: (
        seen.append((t, ig.to_uint8(x.float()).cpu(), ig.to_uint8(e.float()).cpu()))))).cpu()
    picked = np.unique(np.linspace(0, len(seen) - 1, min(scene.options.frames, len(seen))).round().astype(int))
    rows, row_names = [], []
    for i in range(min(count, 20)):
        rows += [torch.stack([seen[step][part][i] for step in picked] + [final[i]]) for part in (1, 2)]
        row_names += [f"{i}" + (f" ({names[i % len(names)]})" if names else "") + "  x_t", "estimate"]
    sheet(rows, scene.results / "denoise.png", scene.title("from noise to image", ig.sampling_title(model)), row_names,
          [*(f"t={seen[step][0]}" for step in picked), "image"])
    frames = [torch.cat([x[:3], estimate[:3]]) for _, x, estimate in seen] + [final[:3].repeat(2, 1, 1, 1)]
    captions = [f"t = {t}: noisy image above, estimate below" for t, _, _ in seen] + ["t = 0: the finished image"]
    kept = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), 100)).round().astype(int))
    animation(torch.stack([frames[i] for i in kept]), scene.results / "denoise.gif", 12, False,
              [captions[i] for i in kept], rows=2, milliseconds=max(60, 3000 // len(kept)))
    schedule, settled = model.noise_schedule, scene.classes_seen(final)
    looks = []
    for t, x, estimate in seen:
        look = {"t": t, "alpha": schedule.alphas[t].item(), "sigma": schedule.sigmas[t].item(),
                "x_to_image_levels": levels_apart(x, final).mean().item(),
                "estimate_to_image_levels": levels_apart(estimate, final).mean().item()}
        if settled and not model.labelled:  # with labels the class is given from the start
            same = [a == b for a, b in zip(scene.classes_seen(estimate)[0], settled[0], strict=True)]
            look["estimate_has_final_class"] = sum(same) / len(same)
        looks.append(look)
    return model.describe_sampling() | {"images": count, "final_classes": settled[0] if settled else None,
                                        "looks": looks, "units": "levels: root mean square difference to the final "
                                        "image, 0..255, mean over images"}


# === ood ===

PLAIN = {"reconstruction_error": "reconstruction error", "negative_elbo": "negative ELBO", "reconstruction_nats":
         "reconstruction in nats", "kl": "KL of the code", "atypicality": "atypicality",
         "distance_to_mean_image": "distance to mean image"}
MADE_UP = ("one colour each", "uniform noise")  # images that are made on the spot


def foreign_images(scene: Scene) -> tuple[str, Tensor]:
    """The dataset to tell apart, as the model would see it: (title, uint8 [N C H W])."""
    from torchvision.transforms.functional import resize, rgb_to_grayscale
    data, root = scene.model.data, scene.options.ood_root
    if root and not root.is_dir():
        raise ig.UserError(f"{root} is not a folder: --ood_root takes the folder with the foreign images")
    name = scene.options.ood_dataset or ("folder" if root else {3: "cifar100"}.get(data.channels))
    if name is None:
        raise ig.UserError("ood needs a dataset of foreign images: name a folder with --ood_root (pictures, or "
                           "files in MNIST's format, notMNIST for one) or a dataset with --ood_dataset", 2)
    idx = sorted(root.resolve().rglob("*images*idx3-ubyte")) if root and name == "folder" else []
    if idx:
        path = next((path for path in idx if path.name.startswith("t10k")), idx[0])
        title, images = path.parent.parent.name if path.parent.name == "raw" else path.parent.name, read_idx(path)
    elif name == "folder":
        if root is None:
            raise ig.UserError("--ood_dataset folder needs --ood_root, the folder with the foreign images", 2)
        arrays, _ = ig.read_image_folder(root, data.image_size, scene.options.skip_bad)
        if not arrays:
            raise ig.UserError(f"{root} holds no image ({', '.join(sorted(ig.IMAGE_SUFFIXES))}): --ood_root takes the "
                               "folder with the foreign images")
        planes = [np.broadcast_to(a[..., None] if a.ndim == 2 else a, (*a.shape[:2], 3)) for a in arrays]
        title, images = root.resolve().name, torch.from_numpy(np.stack(planes)).permute(0, 3, 1, 2)
    else:
        other = ig.load_images(ig.DataOptions(name, root))
        if other.title == data.title:
            raise ig.UserError(f"--ood_dataset {name}: the model was trained on it, name another one", 2)
        title, images = other.title, other.test
    if images.shape[1] != data.channels:
        images = rgb_to_grayscale(images) if data.channels == 1 else images.repeat(1, 3, 1, 1)
    if images.shape[-1] != data.image_size:
        images = resize(images, [data.image_size] * 2, antialias=True)
    return title, images.contiguous()


def read_idx(path: Path) -> Tensor:
    """A file in MNIST's format: uint8 [N 1 H W]"""
    from torchvision.datasets.mnist import read_image_file
    try:
        return read_image_file(str(path))[:, None]
    except (OSError, ValueError, AssertionError, RuntimeError, TypeError, KeyError, IndexError) as error:
        raise ig.UserError(f"{path} is no whole file of images in MNIST's format ({ig.first_line(error)}): "
                           "fetch it again") from None


def ood_scores(scene: Scene, images: Tensor, typical: float | None) -> dict[str, Tensor]:
    """For each image numbers that should be higher the more foreign it is, [N] each. `typical` is the mean negative
    ELBO of training images, None to leave out the scores that need it."""
    found = bits_and_errors(scene, images)
    negative_elbo = found["reconstruction_nats"] + found["kl_nats"]
    scores = {"reconstruction_error": found["mse"], "negative_elbo": negative_elbo,
              "reconstruction_nats": found["reconstruction_nats"], "kl": found["kl_nats"]}
    if typical is not None:
        mean = scene.images.train.float().mean(0)
        scores |= {"atypicality": (negative_elbo - typical).abs(),  # of one image, after [Nalisnick19b]
                   "distance_to_mean_image": ((images.float() - mean) / 255).square().flatten(1).mean(1)}
    return scores


def separation(own: Tensor, foreign: Tensor) -> dict[str, float]:
    """AUROC, and the share of foreign images taken for own ones at the threshold that accepts 95 % of the own."""
    from sklearn.metrics import roc_auc_score
    truth = np.r_[np.zeros(len(own)), np.ones(len(foreign))]
    threshold = torch.quantile(own.double(), 0.95)
    return {"auroc": float(roc_auc_score(truth, torch.cat([own, foreign]).numpy())),
            "fpr_at_95_tpr": (foreign <= threshold).float().mean().item()}


def ood(scene: Scene) -> dict[str, Any]:
    """How well test images are told from another dataset's: each score's AUROC, histograms, and two kinds of images
    made on the spot on which a likelihood is known to fail or not ([Nalisnick19])."""
    title, foreign = foreign_images(scene)
    count, data = scene.options.num_samples, scene.model.data
    if title in (data.title, *MADE_UP):
        title += " (foreign)"
    own, foreign = (part[ig.some_rows(part, count)] for part in (scene.images.test, foreign))
    generator = torch.Generator().manual_seed(0)
    shape, few = own.shape[1:], min(1000, len(own))
    levels = torch.randint(256, (few, shape[0], 1, 1), generator=generator, dtype=torch.uint8)
    made = (levels.expand(-1, -1, *shape[1:]).contiguous(),
            torch.randint(256, (few, *shape), generator=generator, dtype=torch.uint8))
    others = {title: foreign, **dict(zip(MADE_UP, made, strict=True))}
    train = scene.images.train[ig.some_rows(scene.images.train, 2000)]
    typical = ood_scores(scene, train, None)["negative_elbo"].mean().item()
    inside = ood_scores(scene, own, typical)
    outside = {name: ood_scores(scene, images, typical) for name, images in others.items()}
    table = {name: {score: separation(inside[score], values[score]) for score in inside}
             for name, values in outside.items()}
    floor, rivals = "distance_to_mean_image", {k: v["auroc"] for k, v in table[title].items()}
    best = max((k for k in rivals if k != floor), key=rivals.get)
    ig.say(f"{data.title} against {title} ({len(own)} and {len(foreign)} images), AUROC (FPR at 95 % TPR):")
    ig.say(f"  {'':28}" + "".join(f"{name[:18]:>20}" for name in table))
    for score in inside:
        cells = [f"{table[name][score]['auroc']:.4f} ({table[name][score]['fpr_at_95_tpr']:.4f})" for name in table]
        ig.say(f"  {PLAIN[score]:28}" + "".join(f"{cell:>20}" for cell in cells))
    draw_ood(scene, title, inside, outside, table, best)
    wrong = [f"{PLAIN[score]} on {name}" for name in table for score, v in table[name].items() if v["auroc"] < 0.5]
    if wrong:
        ig.say(f"worse than chance: {'; '.join(wrong)}")
    return {"own": {"title": data.title, "split": "test", "n": len(own)}, "best_score": best, "floor_score": floor,
            "foreign": {name: {"n": len(others[name]), "scores": table[name]} for name in table},
            "worse_than_chance": wrong, "means": {name: {k: v.mean().item() for k, v in values.items()}
                                                  for name, values in {data.title: inside, **outside}.items()},
            "definitions": "scores are meant to be higher for foreign images and never turned round. auroc: "
            "probability that a foreign image scores higher than an own one; fpr_at_95_tpr: share of foreign images "
            "below the score under which 95 % of own images lie; reconstruction_error: mean squared error of the "
            "reconstruction from the mean code, pixels in [0, 1]; negative_elbo, reconstruction_nats, kl: nats, one "
            "code each; atypicality: |negative ELBO - its mean over 2,000 training images|; distance_to_mean_image: "
            "mean squared difference to the mean training image, needs no model (the floor)"}


def draw_ood(scene: Scene, title: str, inside: dict, outside: dict, table: dict, best: str) -> None:
    from sklearn.metrics import roc_curve
    shown = dict.fromkeys([best, "negative_elbo", "reconstruction_error"])
    with figure(scene.results / "ood.png", len(shown) + 1, figsize=(5 * (len(shown) + 1), 4)) as (drawn, axes):
        for axis, score in zip(axes, shown, strict=False):
            sets = {scene.model.data.title: inside[score]} | {k: values[score] for k, values in outside.items()}
            lowest, highest = (f(v.quantile(q).item() for v in sets.values()) for f, q in ((min, 0.001), (max, 0.999)))
            spaced = (np.geomspace, "log") if 0 < 30 * lowest < highest else (np.linspace, "linear")
            edges = spaced[0](lowest, max(highest, lowest + 1e-6), 80)
            for name, values in sets.items():
                weights = np.full(len(values), 1 / len(values))
                axis.hist(values.numpy().clip(edges[0], edges[-1]), edges, weights=weights, histtype="stepfilled",
                          alpha=0.5, label=name)
            axis.set(xlabel=PLAIN[score], ylabel="share of images", xscale=spaced[1],
                     title=f"{PLAIN[score]}, AUROC {table[title][score]['auroc']:.3f}")
            axis.legend(frameon=False)
        for score, values in inside.items():
            truth = np.r_[np.zeros(len(values)), np.ones(len(outside[title][score]))]
            false, true, _ = roc_curve(truth, torch.cat([values, outside[title][score]]).numpy())
            axes[-1].plot(false, true, label=f"{PLAIN[score]} {table[title][score]['auroc']:.3f}")
        axes[-1].set(xlabel=f"{scene.model.data.title} taken for foreign", ylabel=f"{title} recognised as foreign",
                     title="all scores, with AUROC")
        axes[-1].legend(frameon=False, loc="lower right")
        drawn.suptitle(scene.title(f"test images against {title}"))


# === latent ===


def latent(scene: Scene) -> dict[str, Any]:
    """t-SNE of test images' codes ([Maaten08]), and how often the nearest training codes vote for the right class."""
    from sklearn.manifold import TSNE
    from sklearn.neighbors import KNeighborsClassifier
    images, classes = scene.images, scene.model.data.classes
    train, test = (scene.codes(part)[0].numpy() for part in (images.train, images.test))
    report: dict[str, Any] = {}
    if len(classes) > 1:
        votes = min(NEIGHBOURS, len(train))
        accuracies = []
        for a, b in ((train, test), (images.train.flatten(1).float().numpy(), images.test.flatten(1).float().numpy())):
            judge = KNeighborsClassifier(votes, algorithm="brute").fit(a, images.train_labels.numpy())
            accuracies.append(float(judge.score(b, images.test_labels.numpy())))
        common = images.test_labels.bincount().max().item() / len(images.test)
        report = {"knn_accuracy": accuracies[0], "neighbours": votes, "n_train": len(train), "n_test": len(test),
                  "floors": {"knn_accuracy_of_pixels": accuracies[1], "most_common_class": common}}
        ig.say(f"nearest {votes} training codes name the class of {100 * accuracies[0]:.2f} % of {len(test)} test "
               f"images (nearest pixels {100 * accuracies[1]:.2f} %, the most common class {100 * common:.2f} %)")
    rows = ig.some_rows(images.test, scene.options.num_samples)
    if len(rows) < 5:
        raise ig.UserError(f"{len(rows)} test image(s) make no map: at least 5 are needed", 2)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    codes = test[rows.numpy()]
    alike = not np.ptp(codes, axis=0).max() > 1e-6  # such codes have no principal component and crash the fast method
    start = "random" if alike or codes.shape[1] == 1 else "pca"  # one number has no second principal component
    points = TSNE(2, perplexity=perplexity, init=start, random_state=ig.seed32(scene.model.config.seed),
                  method="exact" if alike else "barnes_hut").fit_transform(codes)
    labels = images.test_labels[rows].numpy()
    shown = np.unique(labels)
    with figure(scene.results / "latent.png", 1, figsize=(8, 7)) as (_, (axis,)):
        for number, k in enumerate(shown):
            axis.scatter(*points[labels == k].T, s=7, color=colour(number, len(shown)), label=classes[k] or "images")
            if 1 < len(shown) <= 20:
                name_group(axis, classes[k], points[labels == k], points.mean(0), colour(number, len(shown)))
        axis.set(xticks=[], yticks=[])
        if 1 < len(shown) <= 20:
            axis.legend(frameon=False, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.set_title(scene.title(f"t-SNE of {len(rows)} test images' codes") + (
            f"\nnearest {votes} training codes name the class of {100 * accuracies[0]:.2f} % of {len(test)} test images"
            if report else ""))
    return report | {"tsne_images": len(rows), "perplexity": perplexity, "code": "mean of q(z|x)"}


def name_group(axis: Any, name: str, group: np.ndarray, centre: np.ndarray, colour: Any) -> None:
    """The group's name at its outer edge, pushed outward, so that it hides no points."""
    outward = np.median(group, 0) - centre
    outward /= max(np.linalg.norm(outward), 1e-9)
    reach = (group - centre) @ outward
    edge = group[np.abs(reach - np.quantile(reach, 0.9)).argmin()]
    axis.annotate(name, edge, xytext=14 * outward, textcoords="offset points", size=9, ha="center", va="center",
                  bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": colour, "alpha": 0.9})


def colour(number: int, count: int) -> Any:
    import matplotlib
    return matplotlib.colormaps["tab10" if count <= 10 else "tab20" if count <= 20 else "hsv"](
        number if count <= 20 else number / count)


# === compare ===


def read_comparison(words: Sequence[str]) -> list[ig.Command]:
    """A command for each checkpoint; a flag that only some of the models know goes to those."""
    probe = ig.Parser([f for f in dataclasses.fields(CompareOptions) if f.name == "checkpoints"], add_help=False)
    if {"-h", "--help"} & set(words):
        flags = ig.flags("evaluate", "diffusion", CompareOptions).values()
        ig.Parser(flags, prog="explore.py compare", description="Models side by side.").parse_args(["-h"])
    paths = vars(probe.parse_known_args(words)[0]).get("checkpoints")
    if not paths:
        raise ig.UserError("compare needs the checkpoints to compare: explore.py compare A.pt B.pt", 2)
    states = [ig.load_checkpoint(path) for path in paths]
    for path, state in zip(paths, states, strict=True):
        if not ig.FAMILIES[state["family"]].can_sample:
            raise ig.UserError(f"{path} holds a {state['family']}, which draws no images: leave it out", 2)
        if state["data"] != states[0]["data"]:
            told = [f"{d['title']} ({d['train_images']} images of {d['image_size']} pixels)"
                    for d in (state["data"], states[0]["data"])]
            raise ig.UserError(f"{path} was trained on {told[0]}, {paths[0]} on {told[1]}: compare models "
                               "of one dataset", 2)
    known = [ig.flags("evaluate", state["family"], CompareOptions) for state in states]
    for flags in known:
        for name in ("mode", "model", "checkpoint"):
            flags.pop(name)
    every = {name: field for flags in reversed(known) for name, field in flags.items()}
    given, unknown = ig.Parser(every.values()).parse_known_args(words)
    if unknown:
        raise ig.UserError(f"unknown argument {unknown[0]}: explore.py compare --help lists all flags", 2)
    commands = []
    for path, state, flags in zip(paths, states, known, strict=True):
        own = {k: v for k, v in vars(given).items() if k in flags and k != "checkpoints"}
        own = ig.remembered(own, state, path, "evaluate")
        commands.append(ig.Command("evaluate", state["family"], own, path, state))
    return commands


@torch.no_grad()
def compare(words: Sequence[str]) -> int:
    """Every checkpoint measured in the same way, on the same data."""
    commands = read_comparison(words)
    world, first = ig.World(commands[0].given.get("device", "auto")), commands[0]
    results = ig.results_folder(first.given.get("results_dir", ig.HERE / "results"))
    images = ig.SUBJECT.trained_on(first)
    reports, drawn = [], []
    for command in commands:
        model, options = command.model(world), command.options(CompareOptions)
        count = options.eval_samples or min(2000, len(images.test))
        ig.say(f"{ig.title_of(model)} from {command.path}")
        reports.append(ig.evaluate_model(dataclasses.replace(options, eval_samples=count), model, command.state,
                                         command.path, images))
        labels = ig.proportional_labels(model.data, 10, model.labelled)
        drawn.append(ig.generate_all(model, labels if labels is None else labels.sort().values, 10, 10))
    names = distinct([command.key for command in commands], [command.path for command in commands])
    ig.write_json(results / "compare.json", {"models": dict(zip(names, reports, strict=True))})
    print_comparison(names, reports)
    draw_comparison(names, reports, drawn, results / "compare.png")
    ig.say(f"-> {results / 'compare.png'}, {results / 'compare.json'}")
    return 0


def distinct(families: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """The family where that tells the models apart, else with the file's name, else with a number as well."""
    if len(set(families)) == len(families):
        return list(families)
    names = [f"{family} {path.stem}" for family, path in zip(families, paths, strict=True)]
    return names if len(set(names)) == len(names) else [f"{i + 1} {name}" for i, name in enumerate(names)]


def comparison_rows(reports: Sequence[dict]) -> dict[str, tuple[list[float | None], float | None]]:
    """Row title -> (value of each model, floor)."""
    rows: dict[str, tuple[list[float | None], float | None]] = {}
    for key in dict.fromkeys(key for report in reports for key in report["metrics"]):
        entries = [report["metrics"].get(key, {}) for report in reports]
        floor = next((e["floor"] for e in entries if e.get("floor") is not None), None)
        rows[key] = [e.get("value") for e in entries], floor
    for key, scale in (("parameters", 1), ("training_seconds", 1), ("ms_per_image_at_batch_1", 1),
                       ("ms_per_image_at_best_batch", 1), ("best_batch", 1)):
        rows[key] = [report[key] and report[key] * scale for report in reports], None
    return rows


def print_comparison(names: Sequence[str], reports: Sequence[dict]) -> None:
    ig.say(f"{reports[0]['dataset']}: {reports[0]['num_samples']} samples of each")
    for name, report in zip(names, reports, strict=True):
        if "sampler" in report:
            ig.say(f"{name}: {report['sampler']}, {report['steps']} steps, guidance {report['guidance']}")
    wide = max(14, *(len(name) + 2 for name in names))
    ig.say(f"{'':30}" + "".join(f"{name:>{wide}}" for name in names) + f"{'real data':>{wide}}")
    for key, (values, floor) in comparison_rows(reports).items():
        cells = ["-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in (*values, floor)]
        ig.say(f"{key:30}" + "".join(f"{cell:>{wide}}" for cell in cells))


def draw_comparison(names: Sequence[str], reports: Sequence[dict], drawn: Sequence[Tensor], path: Path) -> None:
    """Samples of each model, one row a model, above bars of the main figures."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = comparison_rows(reports)
    shown = [key for key in rows if key.startswith(("fid", "is_", "precision", "recall")) and not key.endswith("_std")]
    panels = [(key, rows[key]) for key in (*shown, "ms_per_image_at_best_batch", "training_seconds")
              if any(v is not None for v in rows[key][0])]
    plotted = plt.figure(figsize=(2.6 * len(panels), 1.25 * len(names) + 3.6), layout="constrained")
    top, bottom = plotted.subfigures(2, 1, height_ratios=[1.25 * len(names), 3.2])
    for axis, name, images in zip(np.atleast_1d(top.subplots(len(names), 1)), names, drawn, strict=True):
        strip = torch.cat(list(torch.nn.functional.pad(images, (1, 1, 1, 1), value=255)), -1).permute(1, 2, 0).numpy()
        axis.imshow(strip.squeeze(-1) if strip.shape[-1] == 1 else strip, cmap="gray", vmin=0, vmax=255,
                    interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, (key, (values, floor)) in zip(np.atleast_1d(bottom.subplots(1, len(panels))), panels, strict=True):
        heights = [math.nan if v is None else v for v in values]
        bars = axis.bar(range(len(names)), heights, color=[colour(i, len(names)) for i in range(len(names))])
        axis.bar_label(bars, [f"{h:,.{0 if h >= 100 else 3}{'f' if h >= 100 else 'g'}}" if math.isfinite(h) else "-"
                              for h in heights], label_type="center", color="white", weight="bold", fontsize=9)
        if floor is not None:
            axis.axhline(floor, color="black", ls="--", lw=1, label=f"real data {floor:.3g}")
            axis.legend(frameon=False, fontsize=8)
        positive = [h for h in [*heights, floor or math.nan] if math.isfinite(h) and h > 0]
        if positive and max(positive) > 20 * min(positive):
            axis.set_yscale("log")
        axis.set_xticks(range(len(names)), names, rotation=20 if max(map(len, names)) > 9 else 0, fontsize=9)
        axis.set_title({"ms_per_image_at_best_batch": "ms per image", "training_seconds": "training, seconds"}.get(
            key, key), fontsize=10)
        axis.margins(y=0.18)
    plotted.suptitle(f"{reports[0]['dataset']}, {reports[0]['num_samples']} samples of each model")
    with ig.replacing(path) as part:
        plotted.savefig(part, format="png", dpi=130)
    plt.close(plotted)


# === fid ===

NAMED = ig.DATASETS[:-1]  # sets of images that have a name; all others are folders
PAIRWISE = 2 ** 31  # pixels; sets of more are not compared picture by picture


@dataclass
class PictureSet:
    name: str
    images: Tensor  # uint8 [N C H W]
    first: str  # what to call its first image in a message
    floor: Tensor | None = None  # the other split of a dataset


def read_pictures(name: str, root: Path | None) -> PictureSet:
    """`mnist`, `mnist:train`, or a folder: also one that a script wrote; colour if any picture is."""
    dataset, _, split = name.partition(":")
    if dataset in NAMED:
        if split not in ("", "train", "test"):
            raise ig.UserError(f"{name}: there are {dataset}:train and {dataset}, which is its test images", 2)
        images = ig.load_images(ig.DataOptions(dataset, None if dataset == "digits" else root))
        both = (images.train, images.test) if split == "train" else (images.test, images.train)
        return PictureSet(f"{images.title}, {split or 'test'} images", both[0], images.title, both[1])
    folder = Path(name)
    if not folder.is_dir():
        raise ig.UserError(f"{name} is neither a folder of pictures nor a dataset ({', '.join(NAMED)})", 2)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ig.IMAGE_SUFFIXES
                   and path.is_file() and not path.name.startswith("."))
    if not paths:
        raise ig.UserError(f"{name} holds no picture ({', '.join(sorted(ig.IMAGE_SUFFIXES))})")
    arrays: list[np.ndarray] = []
    for path in paths:
        arrays.append(np.asarray(ig.open_image(path)))
        same_size(str(path), arrays[-1].shape, str(paths[0]), arrays[0].shape)
    depth = max(3 if array.ndim == 3 else 1 for array in arrays)
    planes = [np.broadcast_to(a[..., None] if a.ndim == 2 else a, (*a.shape[:2], depth)) for a in arrays]
    return PictureSet(name, torch.from_numpy(np.stack(planes)).permute(0, 3, 1, 2).contiguous(), str(paths[0]))


def same_size(name: str, shape: Sequence[int], other: str, usual: Sequence[int]) -> None:
    """Both shapes begin with height and width."""
    if tuple(shape[:2]) != tuple(usual[:2]):
        raise ig.UserError(f"{name} has {shape[1]} x {shape[0]} pixels, {other} has {usual[1]} x {usual[0]}: pictures "
                           "of one size are needed")


def fitting_net(options: FidOptions, names: Sequence[str], images: Tensor, device: torch.device) -> ig.FeatureNet:
    """The net that was asked for, or a classifier that knows pictures of this kind."""
    if options.fid_features == "inception":
        return ig.inception_net(options.inception_weights, device)
    if options.inception_weights:
        raise ig.UserError("--inception_weights belongs to --fid_features inception", 2)
    named = options.dataset or next((d for name in reversed(names) if (d := name.partition(":")[0]) in NAMED), None)
    usual = [path for name in ([named] if named else NAMED) for path in (
        ig.SUBJECT.shipped("classifier", name), ig.HERE / "models" / f"classifier_{name}.pt") if path.exists()]
    channels, height, width = images.shape[1:]
    for path in [options.classifier] if options.classifier else usual:
        data = ig.load_checkpoint(path)["data"]
        if options.classifier or (channels, height, width) == (data["channels"], *[data["image_size"]] * 2):
            if height != width:
                raise ig.UserError(f"a classifier takes square pictures, these have {width} x {height} pixels: use "
                                   "--fid_features inception")
            return ig.classifier_net(path, device, ig.DataInfo(**ig.known_fields(ig.DataInfo, data) | {
                "title": "the set of pictures", "channels": channels, "image_size": height}))
    raise ig.UserError(f"no classifier{f' of {named}' if named else ''} knows {'colour' if channels == 3 else 'grey'} "
                       f"pictures of {width} x {height} pixels: name one with --classifier (--model classifier trains "
                       "one), or use --fid_features inception")


def near_copies(a: Tensor, b: Tensor) -> dict[str, Any]:
    """Share of a's pictures nearer to one of b's than the nearest hundredth of b's own are to each other."""
    if len(b) < 2 or max(len(a), len(b)) * b[0].numel() > PAIRWISE:
        return {"value": None, "reason": "needs two pictures" if len(b) < 2 else "too many pixels to compare all pairs"}
    columns = b.flatten(1).float()
    lengths, own = columns.square().sum(1), []
    for rows in torch.arange(len(b)).split(500):
        squares = lengths - 2 * columns[rows] @ columns.T + lengths[rows, None]
        squares[torch.arange(len(rows)), rows] = torch.inf  # but for itself
        own.append(squares.min(1).values)
    distances = torch.cat(own).clamp(min=0).sqrt()
    threshold = torch.quantile(distances, 0.01)
    return {"value": (ig.nearest_distance(a, b) < threshold).float().mean().item(), "threshold": threshold.item(),
            "floor": (distances < threshold).float().mean().item(), "definition": "share of A's pictures nearer to one "
            "of B's (Euclidean distance of pixels) than the nearest hundredth of B's pictures is to another of B's; "
            "the floor is B's own share"}


def fid(words: Sequence[str]) -> int:
    """How far the pictures A are from the pictures B: folders, or datasets by name (mnist, or mnist:train)."""
    parser = ig.Parser(dataclasses.fields(FidOptions), prog="explore.py fid", description=fid.__doc__)
    for name in "AB":
        parser.add_argument(name, help="folder of pictures, or dataset")
    given = vars(parser.parse_intermixed_args(list(words)))
    names = given.pop("A"), given.pop("B")
    options = FidOptions(**given)
    if options.data_root and not any(name.partition(":")[0] in {*NAMED} - {"digits"} for name in names):
        raise ig.UserError("--data_root has no effect: no dataset that is read from files is named", 2)
    device, results = ig.pick_device(options.device), ig.results_folder(options.results_dir or ig.HERE / "results")
    a, b = (read_pictures(name, options.data_root) for name in names)
    same_size(b.first, b.images.shape[2:], a.first, a.images.shape[2:])
    depth = max(a.images.shape[1], b.images.shape[1])  # grey pictures pass as colour beside colour
    a.images, b.images = (part.images.expand(-1, depth, -1, -1) for part in (a, b))
    net = fitting_net(options, names, a.images, device)
    ig.say(f"{a.name} ({len(a.images)}) against {b.name} ({len(b.images)}), by {net.describe()}")
    reference = net(b.images)
    values, reasons = ig.measure(net(a.images), reference, net)
    floors: dict[str, float | None] = {}
    if b.floor is not None:
        rows = ig.some_rows(b.floor, len(a.images))
        floors, _ = ig.measure(net(b.floor[rows].expand(-1, depth, -1, -1)), reference, net)
    common = {"n": len(a.images), "n_reference": len(b.images), "reference": b.name}
    measured = {"feature_net": net.name, "feature_net_sha256": net.digest}
    metrics = {key: {"value": values[key], "floor": floors.get(key)} | common | measured
               | ({"reason": reasons[key]} if key in reasons else {})
               for key in values if key.startswith(("fid", "kid", "is_", "precision", "recall"))}
    metrics["near_copies"] = near_copies(a.images, b.images) | common
    ig.write_json(results / "fid.json", {
        "task": "fid", "a": a.name, "b": b.name, "n": common["n"], "n_reference": common["n_reference"], **measured,
        "floor": None if b.floor is None else "as many images of B's other split", "metrics": metrics,
        "machine": ig.provenance()})
    ig.say(f"{'metric':34}{'value':>12}{'floor':>12}")
    for key, entry in metrics.items():
        cells = ["-" if entry.get(k) is None else f"{entry[k]:.4f}" for k in ("value", "floor")]
        ig.say(f"{key:34}{cells[0]:>12}{cells[1]:>12}" + (f"  ({entry['reason']})" if "reason" in entry else ""))
    ig.say(f"-> {results / 'fid.json'}")
    return 0


# === start ===

ENCODING = [key for key, family in ig.FAMILIES.items() if hasattr(family, "encode")]
DENOISING = [key for key, family in ig.FAMILIES.items() if hasattr(family, "denoiser")]
DRAWING = [key for key, family in ig.FAMILIES.items() if family.can_sample]
TASKS = {  # what to do, with which families, told by which flags
    "interpolate": (interpolate, DRAWING, InterpolateOptions),
    "reconstruct": (reconstruct, ENCODING, ReconstructOptions),
    "traverse": (traverse, ENCODING, TraverseOptions), "denoise": (denoise, DENOISING, DenoiseOptions),
    "inspect": (inspect, ENCODING, InspectOptions), "ood": (ood, ENCODING, OodOptions),
    "latent": (latent, ENCODING, LatentOptions),
}


@torch.no_grad()
def look(task: str, words: Sequence[str]) -> int:
    """One task, on one model; returns the exit status."""
    run, able, kind = TASKS[task]
    command = ig.read_command(words, "infer", able, kind, prog=f"explore.py {task}", description=run.__doc__)
    if command.key not in able:
        raise ig.UserError(f"{task} can't be done by --model {command.key}, only by {' or '.join(able)}", 2)
    world = ig.World(command.given.get("device", "auto"))
    results, options = ig.results_folder(command.results()), command.options(kind)
    outputs = [results / f"{task}.{suffix}" for suffix in ("json", "png", "gif")]
    for path in getattr(options, "input", None) or ():
        if any(os.path.exists(output) and path.exists() and path.samefile(output) for output in outputs):
            raise ig.UserError(f"--input {path} would be overwritten by the result: name another --results_dir", 2)
    scene = Scene(task, command, options, command.model(world), results)
    shipped = " (the shipped weights)" if command.path.parent == ig.HERE / "pretrained" else ""
    ig.say(f"{scene.title(task)} from {command.path}{shipped}")
    scene.write(run(scene))
    ig.say(f"-> {', '.join(str(path) for path in outputs if path.exists())}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""

    def run() -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        task = words.pop(0) if words else "--help"
        if task in ("-h", "--help"):
            ig.say(__doc__.split("References")[0].strip() + "\n\ntasks: " + ", ".join((*TASKS, "compare", "fid")))
            return 0
        if task == "fid":
            return fid(words)
        if task == "compare":
            named = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
            return compare((["--checkpoints", *named] if named else []) + words[len(named):])
        if task not in TASKS:
            raise ig.UserError(f"unknown task {task}: choose from {', '.join((*TASKS, 'compare', 'fid'))}", 2)
        return look(task, words)

    return ig.guarded(run)


if __name__ == "__main__":
    sys.exit(main())
