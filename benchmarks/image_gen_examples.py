#!/usr/bin/env python3
"""Cost of one epoch of image_gen.py's GAN and VAE beside the networks that PyTorch's own examples train.

    python benchmarks/image_gen_examples.py                      all contestants in turn, about five minutes
    python benchmarks/image_gen_examples.py --only vae --threads 1

The peers are the networks and recipes of github.com/pytorch/examples, `dcgan` and `vae`, written down here from their
published shapes: the DCGAN has five levels of 4x4 (transposed) convolutions between a code of 100 numbers and images of
64 pixels, 64 to 512 channels, batch 64; the VAE is 784-400-20-400-784, batch 128, a continuous Bernoulli likelihood.
Both are trained by Adam in float32, as there.

    dcgan-64      the example as it is; MNIST has to be enlarged to 64 pixels for it
    dcgan-32      the same with a level less, for images of 32 pixels: the usual way to shrink it for MNIST
    vae           the example as it is, from images in memory
    vae-loader    the same with its data loader, which on a CPU decodes in the training process
    *-bf16        the same under bfloat16 autocast, what a line would give them
Ours (28 pixels, class-conditional, bfloat16 where the CPU has it, averaged weights, statistics):
    ours-gan, ours-vae           the defaults; the VAE learns a prior of its codes beside
    ours-gan-32, ours-gan-64     --convs 0, as in the example, and --width as large as it takes to have the parameters
                                 of dcgan-32 and dcgan-64
    ours-vae-plain               --convs 0 --prior normal: the convolutions that change the resolution, and no prior
Turns are interleaved, so that a machine that slows down slows all of them. The ratio is taken turn by turn, its median
is printed: above 1, ours is faster. Pixels are random: arithmetic takes as long as for real ones.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from image_gen_peers import Ours, ig, machine, provenance, random_images, seconds_of
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
EPOCH = 60_000


class Example:
    """What both examples have in common."""

    def __init__(self, batch: int, images: ig.Images, bf16: bool = False) -> None:
        self.batch_size, self.bf16, self.images = batch, bf16, images.train
        self.precision = "bfloat16" if bf16 else "float32"

    def cast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def pixels(self) -> Tensor:
        """A random batch [B 1 28 28] in [0, 1]."""
        return self.images[torch.randint(len(self.images), (self.batch_size,))].float().div_(255)


class Dcgan(Example):
    """Radford, Metz, Chintala 2016 in the example's shape, with a level for each doubling from 4 pixels."""

    def __init__(self, images: ig.Images, side: int, bf16: bool = False) -> None:
        super().__init__(64, images, bf16)
        widths = [64 * 2 ** level for level in reversed(range((side // 8).bit_length()))]  # 64 pixels: 512 ... 64
        draw: list[nn.Module] = [nn.ConvTranspose2d(100, widths[0], 4, bias=False)]
        for a, b in zip(widths, [*widths[1:], 1], strict=True):
            draw += [nn.BatchNorm2d(a), nn.ReLU(True), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
        judge: list[nn.Module] = []
        for i, (a, b) in enumerate(zip([1, *widths[:0:-1]], widths[::-1], strict=True)):
            judge += [nn.Conv2d(a, b, 4, 2, 1, bias=False), *([nn.BatchNorm2d(b)] if i else []),
                      nn.LeakyReLU(0.2, True)]
        self.generator = nn.Sequential(*draw, nn.Tanh())
        self.discriminator = nn.Sequential(*judge, nn.Conv2d(widths[0], 1, 4, bias=False), nn.Flatten(0))
        self.network, self.side = nn.ModuleList([self.generator, self.discriminator]), side
        self.optimizers = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999)) for net in self.network]

    def train_step(self) -> None:
        real = F.interpolate(self.pixels(), size=(self.side, self.side)) * 2 - 1  # cheaper than its loader's resizing
        yes, no = torch.ones(self.batch_size), torch.zeros(self.batch_size)
        loss = F.binary_cross_entropy_with_logits
        self.discriminator.zero_grad()
        with self.cast():
            fake = self.generator(torch.randn(self.batch_size, 100, 1, 1))
            on_real = self.discriminator(real).float()
        loss(on_real, yes).backward()
        with self.cast():
            on_fake = self.discriminator(fake.detach()).float()
        loss(on_fake, no).backward()
        self.optimizers[1].step()
        self.generator.zero_grad()
        with self.cast():
            on_fake = self.discriminator(fake).float()
        loss(on_fake, yes).backward()
        self.optimizers[0].step()


class Vae(Example):
    def __init__(self, images: ig.Images, bf16: bool = False, loader: bool = False) -> None:
        super().__init__(128, images, bf16)
        self.network = nn.ModuleDict({"hidden": nn.Linear(784, 400), "mean": nn.Linear(400, 20),
                                      "spread": nn.Linear(400, 20), "back": nn.Linear(20, 400),
                                      "out": nn.Linear(400, 784)})
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-3)
        self.loader = self._loader() if loader else None

    def _loader(self) -> Any:
        """Picture by picture through PIL, as torchvision's MNIST with ToTensor does."""
        from PIL import Image
        from torchvision.transforms import ToTensor
        rows, convert = self.images, ToTensor()

        class Pictures(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(rows)

            def __getitem__(self, i: int) -> Tensor:
                return convert(Image.fromarray(rows[i, 0].numpy()))

        def endless() -> Any:
            while True:
                yield from torch.utils.data.DataLoader(Pictures(), self.batch_size, shuffle=True, drop_last=True)

        return endless()

    def train_step(self) -> None:
        x = (next(self.loader) if self.loader else self.pixels()).view(-1, 784)
        net = self.network
        self.optimizer.zero_grad()
        with self.cast():
            h = net["hidden"](x).relu()
            mean, log_variance = net["mean"](h).float(), net["spread"](h).float()
            z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            logits = net["out"](net["back"](z).relu()).float()
        share = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
        away = torch.where((share - 0.5).abs() > 0.01, share, 0.49)
        exact = (2 * torch.atanh(1 - 2 * away)).abs().log() - (1 - 2 * away).abs().log()
        near = torch.tensor(2.0).log() + 4 / 3 * (share - 0.5) ** 2 + 104 / 45 * (share - 0.5) ** 4
        norm = torch.where((share - 0.5).abs() > 0.01, exact, near)  # of the continuous Bernoulli
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        (F.binary_cross_entropy(share, x, reduction="sum") - norm.sum() + kl).backward()
        self.optimizer.step()


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def ours(family: str, batch: int, images: ig.Images, **options: Any) -> Ours:
    return Ours(argparse.Namespace(device="cpu", batch_size=batch), images, family, **options)


def wide_enough(target: int, images: ig.Images) -> int:
    """The smallest --width with which our GAN has `target` parameters."""
    return next(width for width in range(64, 1024, 8)
                if size(ig.GanModel(ig.GanConfig(width=width, convs=0), images.info())) >= target)


def contestants(images: ig.Images, only: str) -> dict[str, tuple[Any, str]]:
    """Name -> (contestant, name of ours that it is compared with)."""
    found: dict[str, tuple[Any, str]] = {}
    if only in ("gan", "all"):
        for side in (32, 64):
            peer, wide = Dcgan(images, side), f"ours-gan-{side}"
            found[wide] = ours("gan", 64, images, width=wide_enough(size(peer.network), images), convs=0), wide
            found[f"dcgan-{side}"], found[f"dcgan-{side}-bf16"] = (peer, wide), (Dcgan(images, side, True), wide)
        found["ours-gan"] = ours("gan", 64, images), "ours-gan"
    if only in ("vae", "all"):
        plain = "ours-vae-plain"
        found |= {plain: (ours("vae", 128, images, convs=0, prior="normal"), plain),
                  "vae": (Vae(images), plain), "vae-bf16": (Vae(images, True), plain),
                  "vae-loader": (Vae(images, loader=True), plain), "ours-vae": (ours("vae", 64, images), "ours-vae")}
    return found


def measure(args: argparse.Namespace) -> dict[str, dict]:
    torch.manual_seed(0)
    images = random_images()
    entrants = contestants(images, args.only)
    entries = {name: {"precision": one.precision, "parameters": size(one.network), "batch": one.batch_size,
                      "against": ours, "rounds": []} for name, (one, ours) in entrants.items()}
    for one, _ in entrants.values():
        for _ in range(3):
            one.train_step()
    for turn in range(args.rounds):
        for name, (one, _) in entrants.items():
            spent: list[float] = []
            while len(spent) < 2 or sum(spent) < args.seconds:
                spent.append(seconds_of(one.train_step))
            entries[name]["rounds"].append(len(spent) * one.batch_size / sum(spent))
        print(f"turn {turn + 1} of {args.rounds}", file=sys.stderr)
    for entry in entries.values():
        entry["images_per_second"] = statistics.median(entry["rounds"])
        entry["seconds_per_epoch"] = EPOCH / entry["images_per_second"]
        ratios = [a / b for a, b in zip(entries[entry["against"]]["rounds"], entry["rounds"], strict=True)]
        entry |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return entries


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("all", "gan", "vae"), default="all")
    parser.add_argument("--rounds", type=ig.number(int, 1), default=5, help="turns of every contestant (default 5)")
    parser.add_argument("--seconds", type=ig.number(float, 0), default=4.0, help="length of a turn (default 4)")
    parser.add_argument("--threads", type=ig.number(int, 1), help="default: as many as PyTorch takes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "image_gen_examples.json", help="file to write")
    args = parser.parse_args(argv)
    try:
        ig.results_folder(args.out.parent)
        if args.threads:
            torch.set_num_threads(args.threads)
        args.device = "cpu"
        entries = measure(args)
        lines = ["| contestant | precision | parameters | batch | images/s | s/epoch | compared with | faster by | "
                 "worst | best |", "|" + "---|" * 10]
        lines += [f"| {name} | {e['precision']} | {e['parameters']:,} | {e['batch']} | {e['images_per_second']:.0f} | "
                  f"{e['seconds_per_epoch']:.1f} | {e['against']} | {e['ratio']:.2f} | {e['ratio_min']:.2f} | "
                  f"{e['ratio_max']:.2f} |" for name, e in entries.items()]
        print("\n".join(lines))
        ig.write_json(args.out, {"benchmark": "image_gen_examples", "machine": machine(args), "made": provenance() | {
            "command": "python benchmarks/image_gen_examples.py " + " ".join(argv or sys.argv[1:])},
                                 "threads": torch.get_num_threads(), "train": entries})
        with ig.replacing(args.out.with_suffix(".md")) as part:
            part.write_text("\n".join(lines) + "\n")
        print(f"-> {args.out}", file=sys.stderr)
        return 0
    except ig.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main())
