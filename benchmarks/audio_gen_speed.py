#!/usr/bin/env python3
"""How fast the audio script trains and regenerates, as ratios against float32 and torchaudio in the same run.

    python benchmarks/audio_gen_speed.py [--rounds 5] [--threads 2] [--results_dir benchmarks/results]

Training, batch 32, one 5.12 s clip, for each model: the whole step, and its parts (crops and augmentation, log-mel,
the rest), as it trains by default. The peer is the same network in float32.
Signal path: log-mel and Griffin-Lim against torchaudio.transforms on the same clips with the same number of iterations.
Regeneration: three minutes of sound from waveform to waveform, real time and peak memory, of the mel models; the
codec's speed is audio_codecs.py's.

Peers take turns with ours in each round; a ratio is the median of the rounds' ratios, with the worst and best round.
"""
import argparse
import json
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "audio_gen"))
import audio_gen as ag  # noqa: E402

BATCH = 32


def clock(work, rounds: int) -> list[float]:
    work()  # warm up: allocations, kernels
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def trainer_step(model: ag.Family, batch: ag.Batch):
    """One optimizer step on a batch that is there already."""
    optimizer = model.optimizer(model)

    def step() -> None:
        for _, loss, _ in model.losses(batch):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return step


def training(data: ag.AudioData, rounds: int) -> dict:
    """Milliseconds per clip of each part, and how much faster than in float32."""
    device, rows = torch.device("cpu"), {}
    draws = iter(range(10**6))

    def crops() -> ag.Batch:
        return ag.random_crops(data.train, ag.Draw(0, next(draws), BATCH, slice(None), device), ag.RunConfig.speed)

    some = [crops() for _ in range(8)]  # for statistics, on which time does not depend
    few = SimpleNamespace(training_clips=lambda *_: iter(some), training_crops=lambda *_: iter(some))
    per_clip = {"crops_and_augmentation": statistics.median(clock(crops, rounds)) / BATCH * 1e3}
    for name, family in ag.FAMILIES.items():
        batch = crops()
        models = {}
        for kind, precision in (("ours", "auto"), ("float32", "float32")):
            torch.manual_seed(0)
            model = family(family.config_class(), data.info())
            model.prepare(few, device)
            model.precision = ag.pick_precision(precision, device)
            models[kind] = (model, trainer_step(model, batch))
        times = {kind: [] for kind in models}
        for _ in range(rounds):
            for kind, (_, step) in models.items():
                times[kind] += clock(step, 1)
        ratios = sorted(b / a for a, b in zip(times["ours"], times["float32"]))
        model = models["ours"][0]
        mel = statistics.median(clock(partial(model.preprocessor.log_mel, batch.audio), rounds)) / BATCH * 1e3
        step = statistics.median(times["ours"]) / BATCH * 1e3
        uses_mel = isinstance(model, ag.MelFamily)
        rows[name] = {"parameters": sum(p.numel() for p in model.parameters()), "ms_per_clip": step + per_clip[
            "crops_and_augmentation"], **per_clip, "log_mel": mel if uses_mel else 0.0,
            "network_and_optimizer": step - (mel if uses_mel else 0.0),
            "times_faster_than_float32": [ratios[0], statistics.median(ratios), ratios[-1]]}
    return rows


def signal_path(audio: torch.Tensor, rounds: int) -> dict:
    """Log-mel and Griffin-Lim of four clips against torchaudio."""
    import torchaudio.transforms as T
    prep = ag.AudioPreprocessor()
    mel = T.MelSpectrogram(ag.SAMPLE_RATE, ag.WINDOW, hop_length=ag.HOP, n_mels=128, norm=None, mel_scale="slaney")
    griffin = T.GriffinLim(ag.WINDOW, 32, hop_length=ag.HOP, power=1, momentum=0.99, rand_init=False)
    magnitude = ag.stft(prep, audio).abs()
    pairs = {"log_mel": (lambda: prep.log_mel(audio), lambda: (mel(audio) + 1e-8).log()),
             "griffin_lim_32": (lambda: ag.griffin_lim(prep, magnitude, 32), lambda: griffin(magnitude))}
    rows = {}
    for name, (ours, theirs) in pairs.items():
        both = [(clock(ours, 1)[0], clock(theirs, 1)[0]) for _ in range(rounds)]
        ratios = sorted(b / a for a, b in both)
        rows[name] = {"ms_per_clip": statistics.median(a for a, _ in both) / len(audio) * 1e3,
                      "times_faster_than_torchaudio": [ratios[0], statistics.median(ratios), ratios[-1]]}
    return rows


def regeneration(tracks: list, rounds: int) -> dict:
    """Three minutes of sound, from waveform to waveform, with the shipped weights."""
    sound = torch.cat([torch.from_numpy(track.audio[:].astype("float32")) for track in tracks])
    song = sound.repeat(-(-180 * ag.SAMPLE_RATE // len(sound)))[:180 * ag.SAMPLE_RATE]
    rows = {}
    for name in (name for name, family in ag.FAMILIES.items() if issubclass(family, ag.MelFamily)):
        model = ag.restore_model(ag.load_checkpoint(ag.SUBJECT.shipped(name, "musdb"))).eval()
        model.precision = ag.pick_precision("auto", torch.device("cpu"))
        times = clock(partial(model.regenerate, song), max(1, rounds // 3))
        rows[name] = {"times_real_time": 180 / statistics.median(times)}
    return {"rows": rows, "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as PyTorch takes by itself")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = ag.DATASETS["synthetic"](ag.DataOptions("synthetic"), ag.SPLITS)
    audio = ag.clip_batch(ag.fixed_clips(data.test, 4), torch.device("cpu")).audio
    report = {"machine": ag.provenance(), "threads": torch.get_num_threads(), "batch": BATCH}
    for name, work in (("regeneration", lambda: regeneration(data.test, args.rounds)),
                       ("training", lambda: training(data, args.rounds)),
                       ("signal_path", lambda: signal_path(audio, args.rounds))):
        report[name] = work()
        print(name, json.dumps(report[name], indent=2), flush=True)
    ag.write_json(ag.results_folder(args.results_dir) / "audio_gen_speed.json", report)
    print("->", args.results_dir / "audio_gen_speed.json")


if __name__ == "__main__":
    main()
