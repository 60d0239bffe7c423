#!/usr/bin/env python3
"""How near each family of image_gen.py comes to CIFAR-10 in a given time, on any device, with one command.

    python benchmarks/cifar10_speedrun.py --minutes 10                               the original, downloaded
    python benchmarks/cifar10_speedrun.py --minutes 60 --data_root cifar10_jpg       a folder with train/ and test/
    python benchmarks/cifar10_speedrun.py --minutes 10 --families gan --device cuda

FID is that of our own classifier's features between samples of the averaged weights and as many test images; beside it
stands its floor, real training images in the place of samples. It is measured after an eighth, a quarter and a half of
the minutes and at their end, while the clock stands still. The classifier is trained first where none fits, and kept.
Results: one JSON file, a plot of FID against seconds, and of each family a checkpoint and a picture of samples, a strip
for each class.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from image_gen_peers import SHARES, Ours, draw_all, ig, machine, provenance, train_for

HERE = Path(__file__).resolve().parent
STRIP = 10  # samples of each class in the picture


class Silent:
    """Nothing is measured or drawn between the epochs of the classifier."""

    def measure(self, _trainer: Any, _epoch: int) -> dict:
        return {}

    def draw(self, _trainer: Any, _epoch: int) -> None:
        pass


def load(root: Path | None) -> ig.Images:
    """The original, or a folder of pictures with train/ and test/."""
    if root and (root / "train").is_dir():
        return ig.load_images(ig.DataOptions("folder", root, 32))
    return ig.load_images(ig.DataOptions("cifar10", root))


def feature_net(args: argparse.Namespace, images: ig.Images) -> ig.FeatureNet:
    """The classifier that an earlier run has left, else a new one."""
    path, world = args.out.parent / f"cifar10_speedrun_{args.classifier_epochs}.pt", ig.World(args.device)
    if not path.exists():
        print(f"training a classifier for {args.classifier_epochs} epochs -> {path}", file=sys.stderr)
        torch.manual_seed(0)
        config = ig.ClassifierConfig(epochs=args.classifier_epochs, flip="on", save_every=10 ** 9)
        model = ig.Classifier(config, images.info())
        model.precision = ig.pick_precision("auto", world.device)
        ig.Trainer(model, images, world, path, ig.results_folder(path.with_suffix("")), {}).fit(Silent())
    return ig.classifier_net(path, world.device, images.info())


def run_family(family: str, args: argparse.Namespace, images: ig.Images, net: ig.FeatureNet) -> dict[str, Any]:
    """Train, and measure on the way."""
    import explore  # beside image_gen.py, which image_gen_peers has put on the path
    reference = net(images.test[ig.some_rows(images.test, args.samples)])
    floors, _ = ig.measure(net(images.train[ig.some_rows(images.train, args.samples)]), reference, net)
    torch.manual_seed(0)
    # guidance matters here as it does not for digits, and so does what it draws away from: images without labels;
    # with contrast beside it, it is too much
    options = {"guidance": args.guidance, "temperature": args.temperature, "label_dropout": 0.1, "contrast": 0.0} \
        if family == "diffusion" else {}
    runner, curve = Ours(args, images, family, flip="on", **options), []
    labels = ig.proportional_labels(images.info(), args.samples, runner.network.labelled)
    strips = list(torch.arange(100).split(STRIP)) if labels is None else [
        (labels == k).nonzero().flatten()[:STRIP] for k in range(len(images.classes))]
    names = () if labels is None else images.classes

    def look(minutes: float) -> None:
        drawn, seconds = draw_all(runner, args, f"{family}: drawing")
        values, _ = ig.measure(net(drawn), reference, net)
        curve.append({"seconds": 60 * minutes, "images_per_second_drawn": args.samples / seconds} | {
            key: values[f"{key}_{net.name}"] for key in ("fid", "is", "kid", "precision", "recall")})
        print(f"{family}: FID {curve[-1]['fid']:.2f} (real {floors[f'fid_{net.name}']:.2f}) after {60 * minutes:.0f} s",
              file=sys.stderr)
        explore.sheet([drawn[rows] for rows in strips], args.out.with_name(f"{args.out.stem}_{family}.png"),
                      f"CIFAR-10, {family} after {minutes:.1f} minutes, FID {curve[-1]['fid']:.1f}", names)

    trained = train_for(runner, args, family, look)
    runner.trainer.checkpoint = args.out.with_name(f"{args.out.stem}_{family}.pt")
    runner.trainer.fresh = False  # there is no metrics.jsonl beside it
    runner.trainer.save()
    return trained | options | {"checkpoint": runner.trainer.checkpoint.name, "curve": curve,
                      "parameters": sum(p.numel() for p in runner.network.parameters()),
                      "precision": runner.precision, "batch": args.batch_size, "samples": args.samples,
                      "floor": {key: floors[f"{key}_{net.name}"] for key in ("fid", "is", "kid")},
                      "feature_net": net.name, "feature_net_sha256": net.digest}


def draw_curves(families: dict[str, dict], title: str, path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, entry in families.items():
        axis.plot([p["seconds"] for p in entry["curve"]], [p["fid"] for p in entry["curve"]], marker="o", label=name)
    floor = next(iter(families.values()))["floor"]["fid"]
    axis.axhline(floor, color="black", ls="--", label=f"real training images {floor:.2f}")
    axis.set(xscale="log", yscale="log", xlabel="seconds of training", ylabel="FID by our classifier's features",
             title=title)
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    with ig.replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, kind, text in (
            ("families", "diffusion,gan,vae", str, "what to train, separated by commas"),
            ("minutes", 10.0, ig.number(float, 0, open_low=True), "of training, for each"),
            ("samples", 2000, ig.number(int, 130, 10_000), "images to measure; more than 128, the features"),
            ("batch_size", 64, ig.number(int, 1), "images per step"),
            ("guidance", 1.5, ig.number(float, 0, 100), "of the diffusion model's drawing"),
            ("temperature", 1.0, ig.number(float, 0, 10), "of the diffusion model's starting noise"),
            ("classifier_epochs", 15, ig.number(int, 1), "of the classifier that measures"),
            ("threads", None, ig.number(int, 1), "of PyTorch; as many as it takes where not given"),
            ("device", "auto", str, "auto, cpu, cuda, cuda:N or mps"),
            ("data_root", None, Path, "folder with train/ and test/ of pictures, or with cifar-10-batches-py"),
            ("out", HERE / "results/cifar10_speedrun.json", Path, "results")):
        parser.add_argument(f"--{name}", default=default, type=kind, help=f"{text} (default {default})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        names = args.families.split(",")
        for name in names:
            if name not in ig.FAMILIES or not ig.FAMILIES[name].can_sample:
                raise ig.UserError(f"--families {name}: choose from diffusion, gan, vae", 2)
        if args.threads:
            torch.set_num_threads(args.threads)
        args.out, args.shares = args.out.resolve(), SHARES  # when train_for() looks
        ig.results_folder(args.out.parent)
        images = load(args.data_root)
        net, families = feature_net(args, images), {}
        for name in names:
            families[name] = run_family(name, args, images, net)
            ig.write_json(args.out, {"benchmark": "cifar10_speedrun", "machine": machine(args), "made": provenance(),
                                     "data": images.describe(), "threads": torch.get_num_threads(),
                                     "families": families})
            draw_curves(families, f"CIFAR-10 from scratch, {machine(args)['device']}", args.out.with_suffix(".png"))
        print("| family | FID (after seconds) | real | images/s |\n|---|---|---|---|")
        for name, entry in families.items():
            points = ", ".join(f"{point['fid']:.1f} ({point['seconds']:.0f})" for point in entry["curve"])
            print(f"| {name} | {points} | {entry['floor']['fid']:.2f} | {entry['images_per_second']:.0f} |")
        print(f"-> {args.out}")
        return 0
    except ig.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
