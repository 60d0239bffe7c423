#!/usr/bin/env python3
"""The same minutes of training for ours and for a peer on the same pictures of spoken digits, heard by the same ears.

    pip install -r benchmarks/requirements.txt
    python benchmarks/audio_gen_peers.py --minutes 10 [--threads 2] [--data_root FOLDER] [--results_dir FOLDER]

    ours    audio_gen.py's --model diffusion as it is by default, its learning rate falling over these minutes
    ddp     denoising_diffusion_pytorch's class-conditional Unet(dim=32, dim_mults=(1, 2, 4)) and GaussianDiffusion as
            they are by default, trained as its Trainer does it: Adam at 1e-4 with an average of the weights; batches of
            32. It takes squares only: its pictures get 16 empty columns, which are cut off again

Both draw as many sounds (--samples; by default as many as the test set has) with labels in its proportions; pictures
become sounds by our way back and are measured by the shipped classifiers. The peer is drawn with each of several
guidance scales, so that it is not judged by our habits.
Reads nothing private; writes one JSON and one table.
"""
from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "audio_gen"))
import audio_gen as ag  # noqa: E402

CPU = torch.device("cpu")
BATCH = 32


def batches(data: ag.ShortSounds, seed: int) -> Iterator[ag.ShortBatch]:
    config = ag.DiffusionConfig(batch_size=BATCH, seed=seed)
    for step in range(10 ** 9):
        yield data.training_batch(config, step, ag.Draw(seed, step, BATCH, slice(None), CPU))


class Ours:
    """A run whose length in steps is found out while it goes on: the rate follows the share of the minutes."""

    def __init__(self, data: ag.ShortSounds) -> None:
        torch.manual_seed(0)
        self.model = ag.SoundDiffusion(ag.DiffusionConfig(), data.info())
        self.model.prepare(data, CPU)
        self.model = self.model.to(memory_format=torch.channels_last)
        self.model.precision = ag.pick_precision("auto", CPU)
        self.optimizer, self.steps = self.model.optimizer(self.model), 0
        self.ema = torch.optim.swa_utils.AveragedModel(self.model, use_buffers=True, multi_avg_fn=self.average)

    @torch.no_grad()
    def average(self, averaged: list[Tensor], current: list[Tensor], _count: Any) -> None:
        if averaged[0].is_floating_point():
            decay = min(self.model.config.ema_decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(averaged, current, 1 - decay)

    def train_step(self, batch: ag.ShortBatch, share: float) -> None:
        (_, loss, _), = self.model.losses(batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.model.config.grad_clip)
        for group in self.optimizer.param_groups:
            warm = min(1.0, (self.steps + 1) / self.model.config.warmup_steps)
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * warm * (1 + math.cos(math.pi * share)) / 2
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.steps += 1

    def ways(self) -> dict[str, Callable[[Tensor], Tensor]]:
        model = self.ema.module.eval()
        return {f"default ({model.config.steps} steps, guidance {model.config.guidance:g})": lambda labels: torch.cat([
            model.sample(labels[part], ag.Noise(0, part.tolist(), CPU))
            for part in torch.arange(len(labels)).split(50)])}


class DenoisingDiffusion:
    def __init__(self, data: ag.ShortSounds, picture: Callable[[Tensor], Tensor], drawing_steps: int) -> None:
        import denoising_diffusion_pytorch.classifier_free_guidance as library
        from ema_pytorch import EMA
        library.tqdm = lambda steps, **_: steps  # its samplers draw a progress bar for every batch
        torch.manual_seed(0)
        network = library.Unet(dim=32, dim_mults=(1, 2, 4), num_classes=len(data.classes), channels=1)
        self.network, self.picture = library.GaussianDiffusion(network, image_size=64), picture
        self.drawing_steps = drawing_steps
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-4, betas=(0.9, 0.99))
        self.ema, self.frames, self.steps = EMA(self.network, beta=0.995, update_every=10), data.frames, 0

    def train_step(self, batch: ag.ShortBatch, _share: float) -> None:
        square = F.pad((self.picture(batch.audio) + 1) / 2, (0, 64 - self.frames))
        loss = self.network(square, classes=batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update()
        self.steps += 1

    def ways(self) -> dict[str, Callable[[Tensor], Tensor]]:
        diffusion = self.ema.ema_model.eval()

        def way(scale: float, steps: int) -> Callable[[Tensor], Tensor]:
            def draw(labels: Tensor) -> Tensor:
                torch.manual_seed(0)
                diffusion.sampling_timesteps, diffusion.is_ddim_sampling = steps, True
                squares = torch.cat([diffusion.sample(part, cond_scale=scale) for part in labels.split(50)])
                return squares[..., :self.frames] * 2 - 1
            return draw

        # 6 is its default; its default of 1,000 steps would take hours
        return {f"{self.drawing_steps} DDIM steps, guidance {scale:g}": way(scale, self.drawing_steps)
                for scale in (6.0, 1.5, 1.0)}


@torch.no_grad()
def measured(ours: ag.SoundDiffusion, pictures: Tensor, labels: Tensor, nets: list[ag.FeatureNet],
             target: ag.Features) -> dict[str, float]:
    sounds = torch.cat([ours.sound(part) for part in pictures.split(100)])
    found = nets[0](sounds)
    values, _ = ag.measure(found, target, nets[0], labels)
    values["label_agreement_second"] = (nets[1](sounds).logits.argmax(1) == labels).float().mean().item()
    return {key: value for key, value in values.items() if not key.endswith("_std")}


def run(args: argparse.Namespace) -> dict[str, Any]:
    data = ag.load_short(ag.ShortSoundOptions(data_root=args.data_root))
    ours = Ours(data)
    nets = [ag.classifier_net(ag.SUBJECT.shipped("classifier", name), CPU, data.info())
            for name in ("spoken_digits", "spoken_digits_cepstrum")]
    count = args.samples or len(data.test)
    target, labels = nets[0](data.test), ag.proportional_labels(data.info(), count)
    real = nets[0](data.train[ag.some_rows(data.train, count)])
    rows: dict[str, Any] = {"real training sounds": {"": ag.measure(real, target, nets[0])[0]}}
    for name, contestant in (("ours", ours), ("ddp", DenoisingDiffusion(data, ours.model.picture, args.peer_steps))):
        started, seconds = time.perf_counter(), 60 * args.minutes
        for batch in batches(data, 0):
            share = (time.perf_counter() - started) / seconds
            if share >= 1:
                break
            contestant.train_step(batch, share)
        title = f"{name}, {contestant.steps} steps of {BATCH}"
        rows[title] = {}
        for way, draw in contestant.ways().items():
            begun = time.perf_counter()
            pictures = draw(labels)
            spent = (time.perf_counter() - begun) / len(labels)
            rows[title][way] = measured(ours.model, pictures, labels, nets, target) | {"seconds_per_sound": spent}
            ag.say(f"{title}, {way}: " + ", ".join(
                f"{k} {v:.4g}" for k, v in rows[title][way].items() if v is not None))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=ag.number(float, 0, open_low=True), default=10, help="of training, for each")
    parser.add_argument("--samples", type=ag.number(int, 65), help="to draw and measure (default: as the test set)")
    parser.add_argument("--peer_steps", type=ag.number(int, 1, 1000), default=50, help="DDIM steps of the peer")
    parser.add_argument("--threads", type=ag.number(int, 1), default=torch.get_num_threads())
    parser.add_argument("--data_root", type=Path, help="the spoken digits (default: audio_gen/data/spoken_digits)")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = run(args)
    keys = ["fd_spoken_digits_cnn", "kernel_distance_spoken_digits_cnn", "label_agreement", "label_agreement_second",
            "precision_spoken_digits_cnn", "recall_spoken_digits_cnn", "seconds_per_sound"]
    lines = ["| | " + " | ".join(keys) + " |", "|---|" + "---|" * len(keys)]
    for title, ways in rows.items():
        for way, values in ways.items():
            cells = ["-" if values.get(key) is None else f"{values[key]:.4g}" for key in keys]
            lines.append(f"| {title} {way} | " + " | ".join(cells) + " |")
    ag.results_folder(args.results_dir)
    ag.write_json(args.results_dir / "audio_gen_peers.json", {
        "minutes": args.minutes, "threads": args.threads, "rows": rows, "machine": ag.provenance()})
    with ag.replacing(args.results_dir / "audio_gen_peers.md") as part:
        part.write_text("\n".join(lines) + "\n")
    ag.say("\n".join(lines) + f"\n-> {args.results_dir / 'audio_gen_peers.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(ag.guarded(main))
