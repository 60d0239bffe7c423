#!/usr/bin/env python3
"""Look at trained sound models: walk between two sounds, draw new ones, measure your own files.

    python explore.py interpolate a.wav b.wav                   five steps through the latent space of a mel model
    python explore.py sample --label drums --num_samples 4      new clips from the learned prior of the VAE
    python explore.py stems --musdb_root musdb18                such clips measured beside real stems
    python explore.py table --input song.wav                    every metric between floors and ceilings, of own files
    python explore.py morph --label 3,7                         from one drawn sound to another, in steps
    python explore.py denoise --label 7                         the way from noise to a drawn sound

This adds no model code: everything comes from audio_gen.py beside it. `TASK=sample ./infer.sh` starts it as well.
Outputs go to the results folder (--results_dir); a file that is read, and one that is no earlier output, is never
overwritten.
"""
from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import audio_gen as ag  # noqa: E402
from audio_gen import CLIP, FAMILIES, HOP, SAMPLE_RATE, Command, MelFamily, UserError, World, option  # noqa: E402

CLIPS_OF_A_FILE = 8  # that the table measures, spread evenly


@dataclass(frozen=True)
class InterpolateOptions:
    input: list[Path] | None = option(None, "exploring", "the two audio files", Path, nargs=2)


@dataclass(frozen=True)
class SampleOptions:
    num_samples: int = option(4, "exploring", "clips to make", ag.number(int, 1, 1000))
    label: str | None = option(None, "exploring", "stems to draw, in turn, e.g. drums or bass,vocals (default: all)",
                               str)
    seed: int = option(0, "exploring", "clip i of a seed is always the same", ag.number(int, 0, 2**63 - 1))


@dataclass(frozen=True)
class StemsOptions:
    dataset: str = option("musdb", "exploring", "whose stems", choices=("musdb", "synthetic"))
    musdb_root: Path | None = option(None, "exploring", "folder of MUSDB18 (default: data/musdb18)", Path)
    classifier: Path | None = option(None, "exploring", "checkpoint of --model classifier for these stems (default: "
                                     "that in models/)", Path)
    num_samples: int | None = option(None, "exploring", "clips to draw (default: as many as there are test sounds)",
                                     ag.number(int, 5, 10_000))
    seed: int = option(0, "exploring", "clip i of a seed is always the same", ag.number(int, 0, 2**63 - 1))


@dataclass(frozen=True)
class TableOptions:
    input: list[Path] | None = option(None, "exploring", "audio files to measure (default: the two shipped examples)",
                                      Path, nargs="+")


@dataclass(frozen=True)
class MorphOptions:
    label: str | None = option(None, "exploring", "one class or two, e.g. 7 or 3,7 (default: the first and the "
                               "last)", str)
    other_seed: int | None = option(None, "exploring", "whose noise it ends with (default: the same noise throughout)",
                                    ag.number(int, 0, 2**63 - 1))
    num_samples: int = option(7, "exploring", "sounds from one end to the other", ag.number(int, 2, 20))


@dataclass(frozen=True)
class DenoiseOptions:
    label: str | None = option(None, "exploring", "the class to draw (default: the first)", str)


class MixedNoise(ag.Noise):
    """Noise of one item on the arc from that of one seed to that of another; each call draws from both."""

    def __init__(self, seeds: tuple[int, int], share: float, device: torch.device) -> None:
        super().__init__(seeds[0], [0], device)
        self.other, self.share = ag.Noise(seeds[1], [0], device), share

    def normal(self, *shape: int) -> Tensor:
        turn = self.share * ag.math.pi / 2  # high-dimensional noises are nearly at right angles
        return ag.math.cos(turn) * super().normal(*shape) + ag.math.sin(turn) * self.other.normal(*shape)


def results_for(command: Command, names: Sequence[str], inputs: Sequence[Path]) -> Path:
    """The results folder, where these files may be written: none of them is read, none is somebody's."""
    given = "results_dir" in command.given
    folder = command.given.get("results_dir") or ag.HERE / "results"
    ag.outputs_apart([folder / name for name in names], inputs)
    marked = (folder / ag.RESULTS_MARK).exists()
    if foreign := [folder / name for name in names if os.path.lexists(folder / name) and not marked]:
        raise UserError(f"{foreign[0]} was not written by this script and would be overwritten: name another "
                        "--results_dir", 2)
    return ag.output_folder(folder, given)


def strip_figure(path: Path, title: str, columns: Sequence[tuple[str, Tensor]]) -> None:
    """Log-mel spectrograms [M T] in rows of five"""
    width = min(5, len(columns))
    figure, axes = ag.new_figure(-(-len(columns) // width), width, title, (3.6, 2.8))
    decibels = [(name, 10 / ag.math.log(10) * mel) for name, mel in columns]
    high = max(mel.max().item() for _, mel in decibels)
    for axis, (name, mel) in itertools.zip_longest(axes.flat, decibels, fillvalue=("", None)):
        if mel is None:
            axis.axis("off")
        else:
            ag.show_mel(figure, axis, mel, name, high - 75, high, "magma")
    ag.save_figure(figure, path)


def not_clipped(audio: Tensor) -> Tensor:
    return audio * min(1.0, 0.999 / max(audio.abs().max().item(), 1e-9))


@torch.no_grad()
def interpolate(command: Command, world: World) -> int:
    """From the loudest clip of A to that of B in five steps, in latent space."""
    options, model = command.options(InterpolateOptions), command.model(world)
    if options.input is None:
        raise UserError("interpolate takes two audio files: explore.py interpolate a.wav b.wav", 2)
    results = results_for(command, ("interpolation.wav", "interpolation.png"), options.input)
    tracks = [ag.Track(file.name, "mixture", ag.read_audio(file).numpy()) for file in options.input]
    ends = [max(ag.fixed_clips([track]), key=lambda clip: float(ag.cut(*clip).square().sum())) for track in tracks]
    start, end = model.encode(ag.clip_batch(ends, world.device).audio).split(1)
    loudness = [model.render(model.decode(code)).square().mean().sqrt().item() for code in (start, end)]
    spectra = [model.place(code) for code in (start, end)]  # two latents may hold numbers of different components
    pieces, columns = [], []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        decoded = model.from_spectrum(torch.lerp(*spectra, share))
        piece = model.render(decoded)[0].cpu()
        # a mean of two log spectra has fewer peaks than either: it would be quiet
        piece *= loudness[0] ** (1 - share) * loudness[1] ** share / piece.square().mean().sqrt().clamp(min=1e-9)
        edge = (torch.arange(HOP) + 0.5) / HOP  # 20 ms in and out, so that the joints do not click
        piece[:HOP] *= edge
        piece[-HOP:] *= edge.flip(0)
        pieces.append(piece)
        columns.append((f"{1 - share:.0%} A, {share:.0%} B", model.preprocessor.unstandardise(decoded)[0].cpu()))
    ag.write_wav(results / "interpolation.wav", not_clipped(torch.cat(pieces)))
    names = (f"{letter} = {file.name}" for letter, file in zip("AB", options.input))
    strip_figure(results / "interpolation.png", ag.title_of(model, ", ".join(names)), columns)
    ag.say(f"five steps of {CLIP / SAMPLE_RATE:.2f} s -> {results / 'interpolation.wav'}, "
           f"{results / 'interpolation.png'}")
    return 0


@torch.no_grad()
def sample(command: Command, world: World) -> int:
    """New clips from the prior."""
    options, model = command.options(SampleOptions), command.model(world)
    labels, stems = ag.pick_labels(options.label, model)
    names = [f"sample_{i}.wav" for i in range(options.num_samples)]
    results, columns = results_for(command, [*names, "samples.png"], ()), []
    for i, name in enumerate(names):
        chosen, title = None, f"sample {i}"
        if labels is not None:
            chosen, title = labels[[i % len(labels)]].to(world.device), f"{title}: {stems[i % len(labels)]}"
        decoded = model.sample(chosen, ag.Noise(options.seed, [i], world.device))
        ag.write_wav(results / name, not_clipped(model.render(decoded)[0].cpu()))
        columns += [(title, model.preprocessor.unstandardise(decoded)[0].cpu())] * (i < 25)
    strip_figure(results / "samples.png", ag.title_of(model, f"from the prior, seed {options.seed}"), columns)
    ag.say(f"{len(names)} clip(s) of {CLIP / SAMPLE_RATE:.2f} s -> {results / names[0]} ..., {results / 'samples.png'}")
    return 0


def short_piece(audio: Tensor, length: int) -> Tensor:
    """The first piece of a clip [L] that sounds, prepared as `ShortSounds` keeps its sounds; zeros where none does"""
    for piece in audio.cpu().split(length):
        with contextlib.suppress(ValueError):
            return ag.short_sound(piece, SAMPLE_RATE, length)[0]
    return torch.zeros(length, dtype=torch.float16)


@torch.no_grad()
def drawn_sets(model: ag.AudioVAE, data: ag.ShortSounds, options: StemsOptions, device: torch.device,
               ) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What is compared, name -> short sounds [N L] and the labels they were drawn for, if any: clips of either prior,
    and real training stems as they are and through the model"""
    count, length = options.num_samples or len(data.test), data.train.shape[1]
    rows = ag.some_rows(data.train, count)
    real, labels = data.train[rows], ag.proportional_labels(data.info(), count)
    places = torch.tensor([ag.STEMS.index(stem) for stem in data.classes])

    def drawn(learned: bool) -> Tensor:
        asked, prior = places[labels] if learned and model.labelled else None, model.prior
        model.prior = prior if learned else None
        pieces = []
        for part in torch.arange(count).split(16):
            noise = ag.Noise(options.seed, part.tolist(), device)
            decoded = model.sample(None if asked is None else asked[part].to(device), noise)
            pieces += [short_piece(clip, length) for clip in model.render(decoded)]
        model.prior = prior
        return torch.stack(pieces)

    sets = {"drawn": (drawn(True), labels if model.labelled else None)} if model.prior is not None else {}
    again = [short_piece(model.regenerate(sound.float().to(device)), length) for sound in real]
    return sets | {"drawn from N(0, 1)": (drawn(False), None), "real training stems": (real, data.train_labels[rows]),
                   "the same through the VAE": (torch.stack(again), data.train_labels[rows])}


@torch.no_grad()
def stems(command: Command, world: World) -> int:
    """Clips from the VAE's prior beside real stems of MUSDB18, heard by a classifier of stems."""
    options, model = command.options(StemsOptions), command.model(world)
    results = results_for(command, ("stems.json",), ())
    data = ag.load_short(ag.ShortSoundOptions(options.dataset, options.musdb_root))
    path = options.classifier or ag.HERE / "models" / ag.FILE_NAME.format(f"classifier_{options.dataset}")
    if not path.is_file():
        raise UserError(f"no classifier of stems at {path}: train one with --model classifier --dataset "
                        f"{options.dataset}, or name one with --classifier")
    net, judge = ag.classifier_net(path, world.device, data.info()), ag.restore_model(ag.load_checkpoint(path))
    target, sets = net(data.test), drawn_sets(model, data, options, world.device)

    def pictures(sounds: Tensor) -> Tensor:
        return ag.to_uint8(judge.picture(sounds.float()))

    train, held_out = pictures(data.train), pictures(data.test)
    rows: dict[str, dict] = {}
    for name, (sounds, asked) in sets.items():
        values, reasons = ag.measure(net(sounds), target, net, asked)
        rows[name] = values | {"n": len(sounds), "silent": int((sounds == 0).all(1).sum()), "reasons": reasons} | (
            {} if name.startswith(("real", "the same")) else {  # those are training sounds
                "near_copies": ag.near_copies(pictures(sounds), train, held_out)["value"]})
        ag.say(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in rows[name].items()
                                       if isinstance(value, float) and not key.endswith("_std")))
    ag.write_json(results / "stems.json", {
        "model": command.key, "checkpoint": str(command.path), "checkpoint_sha256": ag.file_digest(command.path),
        "dataset": data.title, "n_reference": len(data.test), "seconds_of_a_sound": data.train.shape[1] / SAMPLE_RATE,
        "feature_net": net.name, "feature_net_sha256": net.digest, "rows": rows, "machine": ag.provenance()})
    ag.say(f"-> {results / 'stems.json'}")
    return 0


@torch.no_grad()
def morph(command: Command, world: World) -> int:
    """Sounds between two classes (of one noise) or two noises (--other_seed), drawn in steps."""
    options, model = command.options(MorphOptions), command.model(world)
    results = results_for(command, ("morph.wav", "morph.png"), ())
    labels, names = ag.pick_labels(options.label, model)
    if len(names) > 2 and options.label:
        raise UserError(f"--label {options.label}: morph goes from one class to one other", 2)
    ends, seed = (0, -1), model.config.seed
    if options.other_seed is None and (labels is None or len(names) < 2):
        raise UserError("morph needs two classes (--label 3,7) or two noises (--other_seed)", 2)
    sounds, titles, table = [], [], model.label.weight.clone()
    for i in range(options.num_samples):
        share = i / (options.num_samples - 1)
        noise = MixedNoise((seed, seed if options.other_seed is None else options.other_seed),
                           0.0 if options.other_seed is None else share, world.device)
        chosen = None
        if labels is not None:  # what the network knows of a class is its row of this table
            model.label.weight[0] = torch.lerp(*(table[labels[end]] for end in ends), share)
            chosen = torch.zeros(1, dtype=torch.int64, device=world.device)
        sounds.append(model.sound(model.sample(chosen, noise))[0].cpu())
        titles.append(f"{share:.0%}")
    ag.write_wav(results / "morph.wav", ag.in_a_row(sounds, model.data.sample_rate), model.data.sample_rate)
    what = " to ".join(dict.fromkeys(names[end] for end in ends)) if labels is not None else ""
    ag.strip_of_sounds(results / "morph.png", ag.title_of(model, what), model, torch.stack(sounds), titles)
    ag.say(f"{len(sounds)} sounds -> {results / 'morph.wav'}, {results / 'morph.png'}")
    return 0


@torch.no_grad()
def denoise(command: Command, world: World) -> int:
    """What the sampler takes the sound for at each of its steps, as pictures and one after the other."""
    options, model = command.options(DenoiseOptions), command.model(world)
    results, looks = results_for(command, ("denoise.wav", "denoise.png"), ()), []
    labels, names = ag.pick_labels(options.label, model)
    chosen = None if labels is None else labels[:1].to(world.device)
    end = model.sample(chosen, ag.Noise(model.config.seed, [0], world.device),
                       lambda t, _x, estimate: looks.append((f"t {t}", estimate)))
    sounds = torch.cat([model.sound(picture).cpu() for _, picture in [*looks, ("end", end)]])
    ag.write_wav(results / "denoise.wav", ag.in_a_row(sounds, model.data.sample_rate), model.data.sample_rate)
    ag.strip_of_sounds(results / "denoise.png", ag.title_of(model, names[0]), model, sounds,
                       [*(name for name, _ in looks), "end"])
    ag.say(f"{len(sounds)} looks at it -> {results / 'denoise.wav'}, {results / 'denoise.png'}")
    return 0


def table(command: Command, world: World) -> int:
    """Own files instead of a test set: what --mode evaluate measures, between the same floor and ceilings."""
    options, model = command.options(TableOptions), command.model(world)
    files = options.input or sorted((ag.HERE / "examples").glob("*.flac"))
    results = results_for(command, ["table.json"], files)
    rows: dict[str, Any] = {}
    for file in files:
        clips = ag.fixed_clips([ag.Track(file.name, "mixture", ag.read_audio(file).numpy())], CLIPS_OF_A_FILE)
        rows[str(file)] = {name: {file.name: row["all"]} for name, row in
                           ag.measure_rows(model, clips, file.name).items()}
        ag.print_rows(rows[str(file)], file.name)
    ag.write_json(results / "table.json", {
        "model": command.key, "checkpoint": str(command.path), "checkpoint_sha256": ag.file_digest(command.path),
        "original_phase": ag.UPPER_BOUND, "clips_of_a_file": CLIPS_OF_A_FILE, "files": rows,
        "machine": ag.provenance(), "metrics": ag.definitions(*ag.METRICS)})
    ag.say(f"-> {results / 'table.json'}")
    return 0


TASKS: dict[str, tuple[Callable[[Command, World], int], type, list[str]]] = {  # task, its flags, families that can
    "interpolate": (interpolate, InterpolateOptions, [k for k, family in FAMILIES.items()
                                                      if getattr(family, "can_interpolate", False)]),
    "sample": (sample, SampleOptions, [k for k, family in FAMILIES.items()
                                       if issubclass(family, MelFamily) and family.can_sample]),
    "stems": (stems, StemsOptions, ["vae"]),
    "table": (table, TableOptions, list(ag.SUBJECT.preferred)),
    "morph": (morph, MorphOptions, ["diffusion"]),
    "denoise": (denoise, DenoiseOptions, ["diffusion"]),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""

    def run() -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        if not words or words[0] in ("-h", "--help"):
            ag.say(__doc__.rstrip() + "\n\nexplore.py TASK --help lists a task's flags.")
            return 0 if words else 2
        if words[0] not in TASKS:
            raise UserError(f"there is no task {words[0]!r}: name {', '.join(TASKS)}", 2)
        task, kind, able = TASKS[words.pop(0)]
        if "input" in ag.flags("infer", able[0], kind) and words and not words[0].startswith("-"):
            words.insert(0, "--input")  # explore.py interpolate a.wav b.wav
        command = ag.read_command(words, "infer", able, kind, prog=f"explore.py {task.__name__}",
                                  description=task.__doc__)
        if command.key not in able:
            raise UserError(f"{task.__name__}: a {command.key} model can't: use --model {' or '.join(able)}", 2)
        return task(command, World(command.given.get("device", "auto")))

    return ag.guarded(run)


if __name__ == "__main__":
    sys.exit(main())
