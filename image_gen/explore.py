"""What one can ask of a trained image model: the tasks of `image_gen.py --mode infer --task ...`, and `--compare`.

    python image_gen.py --mode infer --model vae --task reconstruct       held-out images, and what their codes keep
    python image_gen.py --mode infer --model gan --task interpolate       from one noise to another, strip and GIF
    python image_gen.py --mode evaluate --compare A.pt B.pt C.pt          families side by side

This file stands beside image_gen.py, which starts it; there is no model code here. Each task writes TASK.png and
TASK.json into the results folder. `grep '^# ===' explore.py` prints the contents:
    pictures, inputs, interpolate, reconstruct, traverse, denoise, ood, latent, compare

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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.exit("error: this file holds tasks of image_gen.py: start python image_gen.py --mode infer --task NAME")

import image_gen as ig

DEAD = 0.01  # nats: a dimension whose mean KL is below tells nothing about the image ([Burda16] asks for 0.01 variance)
NEIGHBOURS = 10  # that vote on a class in the space of codes

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


def animation(frames: Tensor, path: Path, hold: int, there_and_back: bool, milliseconds: int = 90) -> None:
    """Save uint8 [F N C H W] as a GIF that loops: the N images side by side. The ends stay for `hold` frames."""
    from PIL import Image
    count, number, size = len(frames), frames.shape[1], frames.shape[-1]
    cell, gap = size * max(1, 112 // size), 6
    pictures = []
    for images in frames:
        canvas = Image.new("RGB", (number * (cell + gap) + gap, cell + 2 * gap), "white")
        for x, image in enumerate(images):
            tile = ig.picture(image).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(tile, (gap + x * (cell + gap), gap))
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


@dataclasses.dataclass
class Scene:
    """What a task works with."""
    given: dict[str, Any]
    model: ig.Family
    state: dict
    path: Path
    results: Path
    loaded: ig.Images | None = None

    def count(self, usual: int) -> int:
        return self.given.get("num_samples", usual)

    def frames(self, usual: int = 12) -> int:
        return self.given.get("frames", usual)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def images(self) -> ig.Images:
        """The dataset that the model was trained on."""
        if self.loaded is None:
            self.loaded = ig.load_test_data(self.given, self.model, self.state, self.path, None)
        return self.loaded

    def title(self, *more: str) -> str:
        return ig.title_of(self.model, *more)

    def held_out(self, count: int) -> tuple[Tensor, list[str]]:
        """`count` test images with the names of their classes; the classes of --label in turn, if it is given."""
        images, classes = self.images, self.model.data["classes"]
        order = ig.some_rows(images.test, len(images.test))
        if "label" in self.given:
            chosen = [item.strip() for item in self.given["label"].split(",")]
            if len(classes) < 2:
                raise ig.UserError(f"--label {self.given['label']}: {images.title} has no classes", 2)
            if unknown := [item for item in chosen if item not in classes]:
                raise ig.UserError(f"--label {unknown[0]}: {images.title} has {', '.join(classes[:20])}", 2)
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
        if "input" not in self.given:
            return self.held_out(count)
        for name in ("label", "num_samples", *(["data_root"] if self.given["task"] != "traverse" else [])):
            if name in self.given:
                raise ig.UserError(f"--{name} has no effect with --input: leave one of them out", 2)
        paths = self.given["input"]
        if not least <= len(paths) <= (most or len(paths)):
            raise ig.UserError(f"--input: --task {self.given['task']} takes {least} file(s), not {len(paths)}", 2)
        return own_images(paths, self.model.data), [path.name for path in paths]

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
            net, _ = ig.find_feature_net({}, self.model.data, self.device)
        except ig.UserError:  # models/classifier_folder.pt may well be of another folder
            return None
        return net if net and net.names_classes else None

    def classes_seen(self, images: Tensor) -> tuple[list[str], Tensor] | None:
        """What the classifier takes each image for and how sure it is; None where there is no classifier."""
        if self.net is None:
            return None
        share, best = self.net(images).logits.softmax(1).max(1)
        return [self.model.data["classes"][k] for k in best], share

    def write(self, report: dict[str, Any]) -> Path:
        path = self.results / f"{self.given['task']}.json"
        ig.write_json(path, {"task": self.given["task"], "model": ig.family_name(self.model),
                             "checkpoint": str(self.path), "checkpoint_sha256": ig.file_digest(self.path),
                             "dataset": self.model.data["title"], "seed": self.model.config.seed}
                      | report | {"machine": ig.provenance()})
        return path


def own_images(paths: Sequence[Path], data: dict) -> Tensor:
    """Files of any size and mode -> uint8 [N C H W] as the model knows them: cropped, resized, grey or colour."""
    from PIL import ImageOps
    size, mode = (data["image_size"],) * 2, "L" if data["channels"] == 1 else "RGB"
    arrays = [np.asarray(ImageOps.fit(ig.open_image(path).convert(mode), size)) for path in paths]
    return torch.from_numpy(np.stack(arrays)).reshape(len(arrays), *size, data["channels"]).permute(0, 3, 1, 2)


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
    """Stands in for `ImageNoise`: item i lies at the i-th of `shares` on the way from one image's noise to another's.
    What a sampler draws after its start is the same for all of them."""

    def __init__(self, seed: int, ends: tuple[int, int], shares: Sequence[float], device: torch.device) -> None:
        self.sources = [ig.ImageNoise(seed, [end], torch.device("cpu")) for end in ends]
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
    model, given, shares = scene.model, scene.given, np.linspace(0, 1, scene.frames()).tolist()
    if "reconstruct" in model.tasks and given.get("input") is None and "label" in given and \
            given["label"].count(",") != 1:
        raise ig.UserError(f"--label {given['label']}: name two classes, e.g. 3,8, to go from one to the other", 2)
    if "reconstruct" in model.tasks:
        pairs = 1 if "label" in given and "num_samples" not in given else scene.count(5)
        ends, names = scene.inputs(2 * pairs, 2, 2)
        codes, _ = scene.codes(ends)
        if len(codes) < 2:
            raise ig.UserError(f"{scene.images.title} has one test image: two are needed, name them with --input", 2)
        between = "the codes (means of q(z|x)) of two images"
        strips = [scene.decode(torch.stack([a + (b - a) * share for share in shares]))
                  for a, b in zip(codes[0::2], codes[1::2], strict=False)]
        row_names = [f"{a} to {b}"[:28] for a, b in zip(names[0::2], names[1::2], strict=False)]
    else:
        for name in ("input", "data_root"):
            if name in given:
                raise ig.UserError(f"--{name} has no effect here: a {ig.family_name(model)} can't encode an image, it "
                                   "interpolates between two noises", 2)
        between, strips, row_names = "the noises of two samples, spherically", [], []
        labels, chosen = ig.pick_labels(given, model)
        for pair in range(scene.count(5)):
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
        error, kl, _ = scene.model.bound(batch)
        squared = ((scene.model.reconstruct(x) - x) / 2).square().flatten(1).mean(1)
        for name, value in (("mse", squared), ("reconstruction_nats", error), ("kl_nats", kl)):
            parts.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def decibels(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pixels in [0, 1]; an exact copy counts as one wrong by a millionth."""
    return -10 * mse.clamp(min=1e-12).log10()


def reconstruct(scene: Scene) -> dict[str, Any]:
    """Originals above, what comes back from the mean of their codes below."""
    images, names = scene.inputs(scene.count(16))
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
    if "input" not in scene.given:  # a floor: the same grey picture for all
        mean = scene.images.train.float().mean(0)
        error = ((images.float() - mean) / 255).square().flatten(1).mean(1)
        report["floor"] = {"what": "the mean training image in place of each reconstruction",
                           "mse": error.mean().item(), "psnr_db": decibels(error).mean().item()}
    print(f"PSNR {report['mean']['psnr_db']:.2f} dB" + (f" (the mean image: {report['floor']['psnr_db']:.2f} dB)"
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
    values = torch.linspace(-3, 3, scene.frames(13))
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
    print(f"{len(kl) - len(dead)} of {len(kl)} dimensions carry information; " + (
        f"dead (KL below {DEAD} nats): {', '.join(map(str, dead))}" if dead else "none is dead"))
    return {"image": names[0], "values": values.tolist(), "kl_images": len(test), "dead_below_nats": DEAD, "dead": dead,
            "dimensions": [{"dimension": d, "kl_nats": kl[d].item(), "code": code[d].item(), "change_levels": spans[d]}
                           for d in order.tolist()]}


# === denoise ===


def denoise(scene: Scene) -> dict[str, Any]:
    """The way of a diffusion sampler from noise to image: what it holds, and its estimate of the image, on the way."""
    model, count = scene.model, scene.count(3)
    if count > 100:
        raise ig.UserError(f"--num_samples {count}: --task denoise keeps every step of every image, at most 100", 2)
    labels, names = ig.pick_labels(scene.given, model)
    labels = None if labels is None else labels[torch.arange(count) % len(labels)]
    seen: list[tuple[int, Tensor, Tensor]] = []
    noise = ig.ImageNoise(model.config.seed, range(count), scene.device)
    final = ig.to_uint8(model.sample(None if labels is None else labels.to(scene.device), noise, watch=lambda t, x, e: (
        seen.append((t, ig.to_uint8(x.float()).cpu(), ig.to_uint8(e.float()).cpu()))))).cpu()
    picked = np.unique(np.linspace(0, len(seen) - 1, min(scene.frames(), len(seen))).round().astype(int))
    rows, row_names = [], []
    for i in range(min(count, 20)):
        rows += [torch.stack([seen[step][part][i] for step in picked] + [final[i]]) for part in (1, 2)]
        row_names += [f"{i}" + (f" ({names[i % len(names)]})" if names else "") + "  x_t", "estimate"]
    sheet(rows, scene.results / "denoise.png", scene.title("from noise to image", ig.sampling_title(model)), row_names,
          [*(f"t={seen[step][0]}" for step in picked), "image"])
    frames = [torch.cat([x[:3], estimate[:3]]) for _, x, estimate in seen] + [final[:3].repeat(2, 1, 1, 1)]
    kept = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), 100)).round().astype(int))
    animation(torch.stack([frames[i] for i in kept]), scene.results / "denoise.gif", 15, False)
    schedule, settled = model.noise_schedule, scene.classes_seen(final)
    looks = []
    for t, x, estimate in seen:
        look = {"t": t, "alpha": schedule.alphas[t].item(), "sigma": schedule.sigmas[t].item(),
                "x_to_image_levels": levels_apart(x, final).mean().item(),
                "estimate_to_image_levels": levels_apart(estimate, final).mean().item()}
        if settled:
            same = [a == b for a, b in zip(scene.classes_seen(estimate)[0], settled[0], strict=True)]
            look["estimate_has_final_class"] = sum(same) / len(same)
        looks.append(look)
    return model.describe_sampling() | {"images": count, "final_classes": settled[0] if settled else None,
                                        "looks": looks, "units": "levels: root mean square difference to the final "
                                        "image, 0..255, mean over images"}


# === ood ===

MADE_UP = ("one colour each", "uniform noise")  # images that are made on the spot


def foreign_images(scene: Scene) -> tuple[str, Tensor]:
    """The dataset to tell apart, as the model would see it: (title, uint8 [N C H W])."""
    from torchvision.transforms.functional import resize, rgb_to_grayscale
    data, root = scene.model.data, scene.given.get("ood_root")
    usual = "folder" if root else {3: "cifar100"}.get(data["channels"])
    name = scene.given.get("ood_dataset", usual)
    if name is None:
        raise ig.UserError("--task ood needs a dataset of foreign images: name a folder with --ood_root (pictures, or "
                           "files in MNIST's format, notMNIST for one) or a dataset with --ood_dataset", 2)
    idx = sorted(root.resolve().rglob("*images*idx3-ubyte")) if root and name == "folder" and root.is_dir() else []
    if idx:
        path = next((path for path in idx if path.name.startswith("t10k")), idx[0])
        title, images = path.parent.parent.name if path.parent.name == "raw" else path.parent.name, read_idx(path)
    elif name == "folder":
        if root is None or not root.is_dir():
            raise ig.UserError(f"{root or '--ood_dataset folder'}: --ood_root takes the folder with the foreign images")
        arrays, _ = ig.read_image_folder(root, data["image_size"])
        if not arrays:
            raise ig.UserError(f"{root} holds no image ({', '.join(sorted(ig.IMAGE_SUFFIXES))}): --ood_root takes the "
                               "folder with the foreign images")
        planes = [np.broadcast_to(a[..., None] if a.ndim == 2 else a, (*a.shape[:2], 3)) for a in arrays]
        title, images = root.resolve().name, torch.from_numpy(np.stack(planes)).permute(0, 3, 1, 2)
    else:
        other = ig.DATASETS[name](root, None, None)
        if other.info()["title"] == data["title"]:
            raise ig.UserError(f"--ood_dataset {name}: the model was trained on it, name another one", 2)
        title, images = other.title, other.test
    if images.shape[1] != data["channels"]:
        images = rgb_to_grayscale(images) if data["channels"] == 1 else images.repeat(1, 3, 1, 1)
    if images.shape[-1] != data["image_size"]:
        images = resize(images, [data["image_size"]] * 2, antialias=True)
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
    count, data = scene.count(10_000), scene.model.data
    if title in (data["title"], *MADE_UP):
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
    print(f"{data['title']} against {title} ({len(own)} and {len(foreign)} images), AUROC (FPR at 95 % TPR):")
    for score in inside:
        cells = [f"{table[name][score]['auroc']:.4f} ({table[name][score]['fpr_at_95_tpr']:.4f})" for name in table]
        print(f"  {score:24}" + "".join(f"{cell:>18}  " for cell in cells))
    print(f"  {'':24}" + "".join(f"{name[:18]:>18}  " for name in table))
    draw_ood(scene, title, inside, outside, table, best)
    wrong = [f"{score} on {name}" for name in table for score, v in table[name].items() if v["auroc"] < 0.5]
    if wrong:
        print(f"worse than chance: {'; '.join(wrong)}")
    return {"own": {"title": data["title"], "split": "test", "n": len(own)}, "best_score": best, "floor_score": floor,
            "foreign": {name: {"n": len(others[name]), "scores": table[name]} for name in table},
            "worse_than_chance": wrong, "means": {name: {k: v.mean().item() for k, v in values.items()}
                                                  for name, values in {data["title"]: inside, **outside}.items()},
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
            sets = {scene.model.data["title"]: inside[score]} | {k: values[score] for k, values in outside.items()}
            lowest, highest = (f(v.quantile(q).item() for v in sets.values()) for f, q in ((min, 0.001), (max, 0.999)))
            spaced = (np.geomspace, "log") if 0 < 30 * lowest < highest else (np.linspace, "linear")
            edges = spaced[0](lowest, max(highest, lowest + 1e-6), 80)
            for name, values in sets.items():
                weights = np.full(len(values), 1 / len(values))
                axis.hist(values.numpy().clip(edges[0], edges[-1]), edges, weights=weights, histtype="stepfilled",
                          alpha=0.5, label=name)
            axis.set(xlabel=score, ylabel="share of images", xscale=spaced[1],
                     title=f"{score}, AUROC {table[title][score]['auroc']:.3f}")
            axis.legend(frameon=False)
        for score, values in inside.items():
            truth = np.r_[np.zeros(len(values)), np.ones(len(outside[title][score]))]
            false, true, _ = roc_curve(truth, torch.cat([values, outside[title][score]]).numpy())
            axes[-1].plot(false, true, label=f"{score} {table[title][score]['auroc']:.3f}")
        axes[-1].set(xlabel=f"{scene.model.data['title']} taken for foreign", ylabel=f"{title} recognised as foreign",
                     title="all scores, with AUROC")
        axes[-1].legend(frameon=False, loc="lower right")
        drawn.suptitle(scene.title(f"test images against {title}"))


# === latent ===


def latent(scene: Scene) -> dict[str, Any]:
    """t-SNE of test images' codes ([Maaten08]), and how often the nearest training codes vote for the right class."""
    from sklearn.manifold import TSNE
    from sklearn.neighbors import KNeighborsClassifier
    images, classes = scene.images, scene.model.data["classes"]
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
        print(f"nearest {votes} training codes name the class of {100 * accuracies[0]:.2f} % of {len(test)} test images"
              f" (nearest pixels {100 * accuracies[1]:.2f} %, always the most common class {100 * common:.2f} %)")
    rows = ig.some_rows(images.test, scene.count(3000))
    if len(rows) < 5:
        raise ig.UserError(f"{len(rows)} test image(s) make no map: at least 5 are needed", 2)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    start = "pca" if test.shape[1] > 1 else "random"  # one number has no second principal component
    seed = ig.seed32(scene.model.config.seed)
    points = TSNE(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(test[rows.numpy()])
    labels = images.test_labels[rows].numpy()
    shown = np.unique(labels)
    with figure(scene.results / "latent.png", 1, figsize=(8, 7)) as (_, (axis,)):
        for number, k in enumerate(shown):
            axis.scatter(*points[labels == k].T, s=7, color=colour(number, len(shown)), label=classes[k] or "images")
            if 1 < len(shown) <= 20:
                axis.annotate(classes[k], np.median(points[labels == k], 0), weight="bold", size=13, ha="center",
                              va="center", bbox={"boxstyle": "round", "facecolor": "white", "alpha": 0.75, "lw": 0})
        axis.set(xticks=[], yticks=[])
        if 1 < len(shown) <= 20:
            axis.legend(frameon=False, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.set_title(scene.title(f"t-SNE of {len(rows)} test images' codes") + (
            f"\nnearest {votes} training codes name the class of {100 * accuracies[0]:.2f} % of {len(test)} test images"
            if report else ""))
    return report | {"tsne_images": len(rows), "perplexity": perplexity, "code": "mean of q(z|x)"}


def colour(number: int, count: int) -> Any:
    import matplotlib
    return matplotlib.colormaps["tab10" if count <= 10 else "tab20" if count <= 20 else "hsv"](
        number if count <= 20 else number / count)


# === compare ===


def compare(given: dict[str, Any], world: ig.World, precision: torch.dtype) -> int:
    """--mode evaluate --compare: every checkpoint measured in the same way, on the same data."""
    if wrong := [name for name in ("checkpoint", "model") if name in given]:
        raise ig.UserError(f"--{wrong[0]} has no effect with --compare, which names the checkpoints", 2)
    reports, drawn, images, first = [], [], None, None
    states = [ig.open_checkpoint(path) for path in given["compare"]]
    for path, state in zip(given["compare"], states, strict=True):
        if not ig.FAMILIES[state["family"]].can_sample:
            raise ig.UserError(f"{path} holds a {state['family']}, which draws no images: leave it out", 2)
        first = first or state["data"]
        if state["data"] != first:
            told = [f"{d['title']} ({d['train_images']} images of {d['image_size']} pixels)"
                    for d in (state["data"], first)]
            raise ig.UserError(f"{path} was trained on {told[0]}, {given['compare'][0]} on {told[1]}: compare models "
                               "of one dataset", 2)
    fields = {name for fields in ig.CONFIG_FIELDS.values() for name in fields}
    for name in sorted(fields & given.keys()):
        if not any(name in ig.CONFIG_FIELDS[state["family"]] for state in states):
            raise ig.UserError(f"--{name} belongs to none of these models", 2)
    for path, state in zip(given["compare"], states, strict=True):
        known = ig.CONFIG_FIELDS[state["family"]]
        own = {k: v for k, v in given.items() if (k not in fields or k in known) and k != "compare"}
        model, state, path, _ = ig.open_model(own | {"checkpoint": path, "results_dir": comparison_folder(given)},
                                              world, precision)
        images = images or ig.load_test_data(own, model, state, path, world)
        own = {"eval_samples": min(2000, len(images.test))} | own
        report = ig.evaluate_model(own, model, state, path, images, world)
        labels = ig.proportional_labels(model.data, 10, model.labelled)
        drawn.append(ig.generate_all(model, labels if labels is None else labels.sort().values, 10, model.config.seed,
                                     10, world))
        reports.append(report)
    if world.main:
        names = distinct([state["family"] for state in states], given["compare"])
        results = comparison_folder(given)
        ig.write_json(results / "compare.json", {"models": dict(zip(names, reports, strict=True))})
        print_comparison(names, reports)
        draw_comparison(names, reports, drawn, results / "compare.png")
        print(f"-> {results / 'compare.png'}, {results / 'compare.json'}")
    return 0


def comparison_folder(given: dict[str, Any]) -> Path:
    return given.get("results_dir", ig.HERE / "results")


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
    print(f"{reports[0]['dataset']}: {reports[0]['num_samples']} samples of each")
    wide = max(14, *(len(name) + 2 for name in names))
    print(f"{'':30}" + "".join(f"{name:>{wide}}" for name in names) + f"{'real data':>{wide}}")
    for key, (values, floor) in comparison_rows(reports).items():
        cells = ["-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in (*values, floor)]
        print(f"{key:30}" + "".join(f"{cell:>{wide}}" for cell in cells))


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


# === start ===

TASKS = {"interpolate": interpolate, "reconstruct": reconstruct, "traverse": traverse, "denoise": denoise, "ood": ood,
         "latent": latent}


@torch.no_grad()
def run(given: dict[str, Any], model: ig.Family, state: dict, path: Path, results: Path) -> int:
    """One task of --mode infer; returns the exit status."""
    scene = Scene(given, model, state, path, results)
    shipped = " (the shipped weights)" if path.parent == ig.HERE / "pretrained" else ""
    print(f"{scene.title(given['task'])} from {path}{shipped}", flush=True)
    report = TASKS[given["task"]](scene)
    written = [scene.write(report)] + [p for p in (results / f"{given['task']}.{kind}" for kind in ("png", "gif"))
                                       if p.exists()]
    print(f"-> {', '.join(map(str, written))}")
    return 0
