#!/usr/bin/env python3
"""The audio script's codec beside a plain MDCT coder and Opus, AAC, MP3 and Vorbis, by the size of real files.

    python benchmarks/audio_codecs.py --musdb_root data/musdb18                      all but the hour
    python benchmarks/audio_codecs.py --folder my_music --what stereo --rates 96     own files, up to 30 s of each
    python benchmarks/audio_codecs.py --folder my_music --what speed --hour          and an hour of stereo, streamed

mono      at 16 kHz, 16 to 96 kbit/s, and the files of the mel models, which have one size; stereo: at 44.1 kHz, 64 to
          160 kbit/s. Each codec writes a file, whose true size counts; what comes back is shifted by whole samples to
          where it fits best (codecs have a delay), and not scaled. Peers seldom hit the rate they are asked for: beside
          each file of theirs ours is written again as large as that one, and the gaps are between these two files.
savings   at 16 kHz, against the plain coder: bytes of the learned probabilities for the same quantised lines, bytes
          of the whole codec at equal SNR, the rate for 27 dB, SNR at 62 kbit/s. Ours are whole files with headers,
          of the plain coder only the code length counts; its rates are interpolated along its own curve.
speed     of encoding and decoding 60 s of stereo at 128 kbit/s, file to file, by the processor's time.

SNR is what the plain coder and ours aim at. The four peers are perceptual: they shape their error to be heard least
and do not aim at SNR (LAME also lowers the level a little). Opus codes 44.1 kHz resampled to its 48 kHz; AAC is
ffmpeg's own encoder, in .m4a files.
"""
# ruff: noqa: E402
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy reads it
import argparse
import dataclasses
import functools
import itertools
import math
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.signal
import soundfile
import torch
import torch.nn.functional as F
from torchaudio.functional import melscale_fbanks

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "audio_gen"))
import audio_gen as ag

PEERS = {"Opus": ("libopus", ".opus"), "AAC": ("aac", ".m4a"), "MP3": ("libmp3lame", ".mp3"),
         "Vorbis": ("libvorbis", ".ogg")}
OURS, PLAIN = "ours", "plain MDCT"
KINDS = {"mono": (ag.SAMPLE_RATE, ag.MONO_RATES), "stereo": (44_100, ag.STEREO_RATES)}
REACH = 4096  # samples that a codec's delay is searched in, both ways
FIGURES = {  # title, format
    "kbit_per_second": ("true kbit/s", ".1f"), "snr_db": ("SNR, dB", ".2f"),
    "si_sdr_db": ("SI-SDR, dB", ".2f"), "lsd_db": ("LSD, dB", ".2f"), "mr_stft": ("MR-STFT", ".3f"),
    "mel_mse": ("mel MSE", ".4f"), "pesq_wb": ("PESQ", ".2f"), "stoi": ("STOI", ".3f")}
SAVING_RATES = (16, 32, 62)
MEL_MODELS = ("autoencoder", "vae")
BLIND = ("mel_mse", "lsd_db", "mr_stft")  # to phase
NO_SNR = "The mel models keep no phase (Griffin-Lim makes it up): SNR and SI-SDR say nothing about them."


# === the codecs ===


def ffmpeg(*words: Any) -> str:
    done = subprocess.run(["ffmpeg", "-hide_banner", "-nostdin", "-y", "-v", "error", *map(str, words)],
                          capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise ValueError(f"ffmpeg refuses: {lines[0].split('] ')[-1]}")
    return done.stdout


@functools.cache
def encoders() -> set[str]:
    if not shutil.which("ffmpeg"):
        raise ag.UserError("ffmpeg is missing, which codes Opus, AAC, MP3 and Vorbis: install it (sudo apt-get "
                           "install ffmpeg)")
    return {line.split()[1] for line in ffmpeg("-encoders").splitlines() if line.startswith(" A")}


def aligned(estimate: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, int]:
    """Decoded sound [L' C] -> [L C], shifted by the lag at which it fits best; the lag in samples"""
    size = 2 ** (len(estimate) + len(reference)).bit_length()
    product = np.fft.rfft(estimate, size, 0) * np.fft.rfft(reference, size, 0).conj()
    lags = np.r_[0:REACH + 1, -REACH:0]
    lag = int(lags[np.fft.irfft(product.sum(1), size)[lags].argmax()])
    moved = np.pad(estimate, ((max(0, -lag), 0), (0, 0)))[max(0, lag):][:len(reference)]
    return np.pad(moved, ((0, len(reference) - len(moved)), (0, 0))), lag


def resampled(audio: np.ndarray, old: int, new: int) -> np.ndarray:
    """[L C] by FFT, which loses nothing of the band: no filter may be what limits a codec's SNR"""
    if old == new:
        return audio
    padded = np.pad(audio, ((0, -len(audio) % (old // math.gcd(old, new))), (0, 0)))
    return scipy.signal.resample(padded, len(padded) * new // old)


def peer_encode(name: str, source: Path, target: Path, kbits: float) -> None:
    encoder, _ = PEERS[name]
    if encoder not in encoders():
        raise ValueError(f"this ffmpeg has no {encoder}")
    ffmpeg("-threads", 1, "-i", source, "-c:a", encoder, "-b:a", round(1000 * kbits), target)


def through_peer(name: str, audio: np.ndarray, rate: int, kbits: float,
                 folder: Path) -> tuple[np.ndarray, int, int]:
    """Sound [L C] -> what the codec makes of it, aligned; bytes of the file, lag; ValueError where it can't"""
    source, small, target = folder / "in.wav", folder / f"peer{PEERS[name][1]}", folder / "out.wav"
    own = 48_000 if name == "Opus" and rate not in (16_000, 48_000) else rate
    soundfile.write(source, resampled(audio, rate, own), own, subtype="FLOAT")
    peer_encode(name, source, small, kbits)
    ffmpeg("-i", small, "-c:a", "pcm_f32le", target)
    decoded, found = soundfile.read(target, dtype="float32", always_2d=True)
    estimate, lag = aligned(resampled(decoded, found, rate), audio)
    return estimate, small.stat().st_size, lag


# === figures ===


@functools.cache
def mel_bank() -> torch.Tensor:
    return melscale_fbanks(1025, 0.0, 22_050.0, 128, 44_100, "slaney", "slaney")


def wide_mel(audio: torch.Tensor) -> torch.Tensor:
    """44.1 kHz [C L] -> log-mel power [C T M]"""
    power = torch.stack([ag.power_spectra(channel, 2048, 512) for channel in audio])
    return (power.mT @ mel_bank() + ag.MEL_FLOOR).log()


@torch.no_grad()
def figures(estimate: np.ndarray, reference: np.ndarray, prep: Any, reasons: dict[str, str]) -> dict[str, Any]:
    """Of sounds [L C]. Mono: the audio script's own. Stereo: ratios over both channels together, spectral
    distances the mean of both, the mel distance at 44.1 kHz over the variance of the reference's log-mel."""
    ours, true = (torch.from_numpy(x.T.copy()) for x in (estimate, reference))
    if len(true) == 1:
        values = ag.wave_metrics(ours, true, torch.tensor([len(reference)]), reasons)
        mels = [prep.standardise(prep.log_mel(F.pad(x, (0, -len(reference) % ag.HOP)))) for x in (ours, true)]
        values |= ag.mel_metrics(*mels, torch.tensor([mels[0].shape[2]]))
        return {key: None if values[key][0] is None else float(values[key][0]) for key in FIGURES
                if key in values}
    row = {m.__name__: float(m(ours.flatten(), true.flatten())) for m in (ag.snr_db, ag.si_sdr_db)}
    for measure in (ag.lsd_db, ag.mr_stft):
        row[measure.__name__] = float(np.mean([measure(a, b) for a, b in zip(ours, true)]))
    one, two = wide_mel(ours), wide_mel(true)
    return row | {"mel_mse": float((one - two).square().mean() / two.var())}


def load(args: argparse.Namespace) -> Iterator[tuple[ag.Track, dict[str, np.ndarray]]]:
    """Each track with its sound by kind, [L C], at most 30 s"""
    songs = ag.MUSDBDataset.songs(args.musdb_root / "test") if args.musdb_root else {}
    if args.musdb_root and not songs:
        raise ag.UserError(f"{args.musdb_root} holds no songs in test/: --musdb_root takes MUSDB18's folder")
    entries = [(name, stem, path if path.is_file() else path / f"{stem}.wav")
               for name, path in songs.items() for stem in ("mixture", "vocals")]
    entries += [(path.stem, "own files", path) for path in ag.audio_files(args.folder, "--folder")] \
        if args.folder else []
    for name, group, path in entries:
        with tempfile.TemporaryDirectory() as folder:
            stem = group if group in ag.STEMS else "mixture"
            mono = ag.read_audio(path, "--folder", stem)[:ag.LONGEST * ag.SAMPLE_RATE].numpy()
            pair = ag.stereo_of(ag.Track(name, stem, mono, path), Path(folder))
        if np.square(mono).mean() < ag.INAUDIBLE ** 2:
            ag.say(f"{name}, {group}: left out, it is silent", sys.stderr)
            continue
        if pair is None:
            ag.say(f"{name}: no stereo at 44.1 kHz, measured as mono only", sys.stderr)
        stereo = {} if pair is None else {"stereo": pair}
        yield ag.Track(name, group, mono, path), {"mono": mono[:, None]} | stereo


class Bench:
    """The codec with its options, and a folder to work in."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.model = ag.restore_model(ag.load_checkpoint(args.checkpoint)).eval()
        if not isinstance(self.model, ag.Codec):
            raise ag.UserError(f"{args.checkpoint} holds no codec: name one with --checkpoint")
        self.coder, self.folder, self.reasons = ag.Coder(self.model), folder, {}

    def config(self, kbits: float) -> ag.CodecConfig:
        return dataclasses.replace(self.model.config, bitrate=kbits, quality=None)

    def ours(self, audio: np.ndarray, rate: int, kbits: float) -> tuple[np.ndarray, int]:
        self.coder.config = self.config(kbits)
        return ag.coded(self.coder, audio, rate, self.folder)

    def latents(self, audio: np.ndarray) -> Iterator[dict[str, Any]]:
        """One sound [L 1] by the file of each mel model: its phases are made up, so that of the figures that compare
        waveforms none means anything."""
        for name in MEL_MODELS:
            coder = ag.restore_model(ag.load_checkpoint(ag.SUBJECT.shipped(name, "musdb"))).eval().coder()
            entry = self.entry(name, audio, *ag.coded(coder, audio, ag.SAMPLE_RATE, self.folder), ag.SAMPLE_RATE)
            yield {"codec": name} | {k: v for k, v in entry.items() if k in ("bytes", "kbit_per_second", *BLIND)}

    def entry(self, codec: str, audio: np.ndarray, estimate: np.ndarray, size: int, rate: int) -> dict:
        reasons = self.reasons.setdefault(codec, {})
        return {"bytes": size, "kbit_per_second": size * rate / len(audio) / 125} | figures(
            estimate, audio, self.model.preprocessor, reasons)

    def compare(self, audio: np.ndarray, rate: int, kbits: float) -> Iterator[dict[str, Any]]:
        """One sound at one nominal rate: an entry of each codec, with ours at the same size in it"""
        estimate, size = self.ours(audio, rate, kbits)
        own = self.entry(OURS, audio, estimate, size, rate)
        yield {"codec": OURS} | own
        if audio.shape[1] == 1:
            plain = ag.plain_codec(torch.from_numpy(audio[:, 0]), 8 * size).numpy()[:, None]
            yield {"codec": PLAIN} | self.entry(PLAIN, audio, plain, size, rate) | {"ours_as_large": own}
        for name in PEERS:
            try:
                estimate, size, lag = through_peer(name, audio, rate, kbits, self.folder)
            except ValueError as error:
                yield {"codec": name, "reason": str(error)}
                continue
            entry = {"codec": name, "lag": lag} | self.entry(name, audio, estimate, size, rate)
            again = self.ours(audio, rate, entry["kbit_per_second"])
            yield entry | {"ours_as_large": self.entry(OURS, audio, *again, rate)}


# === savings ===


def plain_curve(lines: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """kbit/s and SNR in dB of the plain coder for lines [T N], from coarse to fine steps"""
    rows, energy = [], np.square(lines).sum()
    for index in range(0, 30 * ag.STEP_OCTAVE, ag.STEP_OCTAVE // 4):
        scaled = lines / ag.step_size(index)
        values = np.rint(scaled)
        if values.any():
            error = np.square(scaled - values).sum() * ag.step_size(index) ** 2
            rows.append((ag.plain_bits(values) * rate / lines.size / 1000, 10 * np.log10(energy / error)))
            if rows[-1][1] > 70:
                break
    return tuple(np.array(rows).T)


def same_lines(coder: ag.Coder, values: np.ndarray) -> tuple[int, float]:
    """Bytes of the file that holds quantised lines [T N] by the learned probabilities, their code length"""
    size, bits = ag.HEADER.size + 4, 0.0
    for at in range(0, len(values), ag.CHUNK_FRAMES):
        part = values[None, at:at + ag.CHUNK_FRAMES].astype(np.int32)
        magnitudes = np.abs(part).astype(np.int64)
        top = ag.top_line(magnitudes)
        tables = coder.tables(magnitudes, ag.SAMPLE_RATE, top)
        length = float(coder.code_lengths(tables, magnitudes[..., :top]).sum())
        size += 8 + len(coder.pack(ag.Quantised(part, tables, length), bytes(3)))  # 8: length and checksum
        bits += length
    return size, bits


def savings(bench: Bench, mono: np.ndarray) -> dict[str, float]:
    """Of a sound [L] at 16 kHz"""
    audio = torch.from_numpy(mono).double()
    lines = bench.model.lines(F.pad(audio, (0, -len(audio) % ag.frame_size(ag.SAMPLE_RATE)))).numpy()
    rates, ratios = plain_curve(lines, ag.SAMPLE_RATE)
    row, curve = {}, []

    def file_at(kbits: float) -> tuple[float, float]:
        estimate, size = bench.ours(mono[:, None], ag.SAMPLE_RATE, kbits)
        snr = ag.snr_db(torch.from_numpy(estimate[:, 0]).double(), audio)
        curve.append((size * ag.SAMPLE_RATE / len(mono) / 125, float(snr)))
        return curve[-1]

    for kbits in SAVING_RATES:
        low, high = 0, 30 * ag.STEP_OCTAVE  # the finest step at which the plain coder fits into the rate
        while high - low > 1:
            middle = (low + high) // 2
            bits = ag.plain_bits(np.rint(lines / ag.step_size(middle)))
            low, high = (middle, high) if bits * ag.SAMPLE_RATE <= 1000 * kbits * lines.size else (low, middle)
        values = np.rint(lines / ag.step_size(low))
        size, bits = same_lines(bench.coder, values)
        row[f"probabilities_{kbits}"] = 100 * (1 - 8 * size / ag.plain_bits(values))
        row[f"over_code_length_{kbits}"] = 100 * (8 * size / bits - 1)
        rate, snr = file_at(kbits)
        row[f"codec_{kbits}"] = 100 * (1 - rate / float(np.interp(snr, ratios, rates)))
    row["snr_62"], row["plain_snr_62"] = curve[-1][1], float(np.interp(62, rates, ratios))
    row["plain_rate_27_db"] = float(np.interp(27, ratios, rates))
    while min(curve)[1] > 27 and min(curve)[0] > 4:
        file_at(min(curve)[0] / 2)
    while max(curve)[1] < 27 and max(curve)[0] < 200:
        file_at(max(curve)[0] * 2)
    for turn in range(4):  # files whose SNR comes ever closer to 27 dB
        sizes, found = np.array(sorted(curve)).T
        row["rate_27_db"] = float(np.interp(27, found, sizes))
        if turn == 3 or np.abs(found - 27).min() < 0.05 or not found[0] < 27 < found[-1]:
            return row
        file_at(row["rate_27_db"])


# === speed ===


def clock(work: Callable[[], Any]) -> float:
    """Of a minute's sound: times real time, by the time that the processor worked here and in ffmpeg"""
    def worked() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    started = worked()
    work()
    return 60 / (worked() - started)


def speed(bench: Bench, pair: np.ndarray) -> list[dict[str, Any]]:
    source, target, rows = bench.folder / "minute.wav", bench.folder / "out.wav", []
    soundfile.write(source, np.resize(pair, (60 * 44_100, 2)), 44_100, subtype="PCM_16")
    for name in (OURS, *PEERS):
        small = bench.folder / f"minute{PEERS[name][1] if name in PEERS else '.iag'}"
        works = (partial(peer_encode, name, source, small, 128), partial(ffmpeg, "-threads", 1, "-i", small, target)
                 ) if name in PEERS else (partial(ag.encode_file, bench.coder, bench.config(128), source, small),
                                          partial(ag.decode_file, bench.coder, small, target))
        try:
            rows.append({"codec": name} | dict(zip(("encode", "decode"), map(clock, works))))
        except ValueError as error:
            rows.append({"codec": name, "encode": str(error), "decode": "–"})
    return rows


def hour(args: argparse.Namespace, pair: np.ndarray, folder: Path) -> list[dict[str, Any]]:
    """Encode and decode a long file by the command line; speed and peak memory of each process"""
    source, rows = folder / "long.wav", []
    with soundfile.SoundFile(source, "w", 44_100, 2, "PCM_16") as file:
        minute = np.resize(pair, (60 * 44_100, 2))
        for _ in range(args.hour):
            file.write(minute)
    words = [sys.executable, ROOT / "audio_gen/audio_gen.py", "--mode", "infer", "--model", "codec",
             "--checkpoint", args.checkpoint, "--results_dir", folder / "long"]
    for what, more in (("encode", ["--input", source, "--encode", "--bitrate", "128"]),
                       ("decode", ["--decode", folder / "long/long.iag"])):
        child = subprocess.Popen([str(word) for word in words + more], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if status:
            raise ag.UserError(f"the audio script failed to {what} {args.hour} minutes, see above")
        unit = 2 ** 20 if sys.platform.startswith("linux") else 2 ** 30
        rows.append({"what": f"{what}, {args.hour} minutes", "peak_gib": usage.ru_maxrss / unit,
                     "times_real_time": 60 * args.hour / sum(usage[:2])})
    return rows


# === records ===


def spread(values: list[float | None]) -> dict[str, float] | None:
    good = [value for value in values if value is not None]
    return {"mean": float(np.mean(good)), "sd": float(np.std(good)), "median": float(np.median(good)),
            "n": len(good)} if good else None


def summarise(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each kind, group, codec and nominal rate: figures, what ours has more at equal size"""
    rows = {}
    for e in entries:
        rows.setdefault((e["kind"], e["group"], e["codec"], e["asked"]), []).append(e)
    table = []
    for key, tracks in rows.items():
        row = dict(zip(("kind", "group", "codec", "asked"), key)) | {"tracks": len(tracks)}
        measured = [e for e in tracks if "reason" not in e]
        row |= {"measured": len(measured), "reason": next((e["reason"] for e in tracks if "reason" in e), None)}
        row |= {name: spread([e.get(name) for e in measured]) for name in FIGURES}
        pairs = [(e, e["ours_as_large"]) for e in measured if "ours_as_large" in e]
        row["ours_more"] = {name: spread([ours[name] - e[name] for e, ours in pairs if None not in (
            e.get(name), ours.get(name))]) for name in FIGURES}
        table.append(row)
    return table


def shown(figure: dict[str, float] | None, form: str) -> str:
    return "–" if figure is None else (f"{figure['mean']:{form}} ± {figure['sd']:{form.strip('+')}} "
                                       f"({figure['median']:{form}})")


def grid(titles: list[str], rows: list[list[Any]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (titles, ["---"] * len(titles), *rows)] + [""]


AIMS = (("SNR at 62 kbit/s", "≥ 41.5 mixture, 42 vocals", "snr_62"),
        ("plain coder's SNR at 62 kbit/s", "", "plain_snr_62"),
        ("kbit/s for 27 dB", "≤ 24.5 mixture, 23 vocals", "rate_27_db"),
        ("plain coder's kbit/s for 27 dB", "", "plain_rate_27_db"),
        *((f"% fewer bytes, {what}, {kbits} kbit/s", aim, f"{key}_{kbits}") for what, aim, key in (
            ("learned probabilities on the same lines", "≥ 8", "probabilities"),
            ("whole codec at equal SNR", "≥ 15 (11 to pass)", "codec")) for kbits in SAVING_RATES),
        *((f"% of the file beyond its code length, {kbits} kbit/s", "≤ 0.5", f"over_code_length_{kbits}")
          for kbits in SAVING_RATES))


def aims(results: dict[str, Any]) -> list[str]:
    """The project's aims beside what was measured, means over tracks"""
    groups = dict.fromkeys(row["group"] for row in results["savings"] + results["table"])
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for group, (title, aim, key) in itertools.product(groups, AIMS):
        if values := [row[key] for row in results["savings"] if row["group"] == group]:
            lines.setdefault((title, aim), {})[group] = f"{np.mean(values):.2f}"
    for row in (row for row in results["table"] if row["codec"] in PEERS and row["ours_more"]["snr_db"]):
        more = {key: None if value is None else value["mean"] for key, value in row["ours_more"].items()}
        if row["kind"] == "stereo" and row["asked"] in (96, 128):
            line = (f"stereo, {row['asked']:g} kbit/s, SNR in dB above {row['codec']} at equal size", "≥ 6")
            lines.setdefault(line, {})[row["group"]] = f"{more['snr_db']:+.2f}"
        if (row["kind"], row["codec"], row["asked"]) == ("mono", "MP3", 64):
            for key, aim in (("mel_mse", "≤ 0"), ("pesq_wb", "≥ 0")):
                line = (f"mono, 64 kbit/s, {FIGURES[key][0]} more than MP3's at equal size", aim)
                lines.setdefault(line, {})[row["group"]] = "–" if more[key] is None else f"{more[key]:+.4f}"
    return grid(["what", "aim", *groups], [[*line, *(cells.get(group, "–") for group in groups)]
                                           for line, cells in lines.items()])


def markdown(results: dict[str, Any]) -> str:
    machine = results["machine"]
    text = ["# The codec beside others, by file size", "",
            f"`{machine['command']}`, {machine['date']}, {machine['hardware']}; {results['checkpoint']}", "",
            "Mean ± standard deviation (median) over tracks; *ours more*: what ours has more in a file as large. "
            "The peers are perceptual and do not aim at SNR.", ""]
    for kind, group in dict.fromkeys((row["kind"], row["group"]) for row in results["table"]):
        rows = [row for row in results["table"] if (row["kind"], row["group"]) == (kind, group)]
        names, cells = [name for name in FIGURES if any(row[name] for row in rows)], []
        for row in rows:
            cells.append([row["codec"], f"{row['asked']:g}"] + [shown(row[k], FIGURES[k][1]) for k in names])
            cells[-1] += [shown(row["ours_more"][key], form) for key, form in (("snr_db", "+.2f"),
                                                                               ("mel_mse", "+.4f"))]
            cells[-1] += [f"{row['measured']}" + f" of {row['tracks']}: {row['reason']}" * bool(row["reason"])]
        text += [f"## {kind}, {group}", "", *grid(["codec", "asked", *(FIGURES[name][0] for name in names),
                                                   "ours more: SNR, dB", "mel MSE", "tracks"], cells)]
    if results["mel_models"]:
        groups = dict.fromkeys((e["group"], e["codec"]) for e in results["mel_models"])
        rows = [[e for e in results["mel_models"] if (e["group"], e["codec"]) == key] for key in groups]
        text += ["## mono, files of the mel models", "", NO_SNR, "", *grid(
            ["group", "model", *(FIGURES[name][0] for name in ("kbit_per_second", *BLIND)), "tracks"],
            [[*key, *(shown(spread([e[k] for e in row]), f".{2 if k == 'kbit_per_second' else 3}f")
                      for k in ("kbit_per_second", *BLIND)), len(row)] for key, row in zip(groups, rows)])]
    text += [f"{name}: {reason}\n" for name, reason in results["reasons"].items()]
    text += ["## aims", "", *aims(results)] if results["savings"] or results["table"] else []
    for what, rows in (("speed, times real time", results["speed"]), ("long file", results["hour"])):
        cells = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
        text += [f"## {what}", "", *grid(list(rows[0]), cells)] if rows else []
    return "\n".join(text)


def draw(table: list[dict[str, Any]], mel_models: list[dict[str, Any]], path: Path) -> None:
    """SNR and mel distance against true kbit/s, means over tracks; of the mel models, at one rate each, the latter"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = list(dict.fromkeys((row["kind"], row["group"]) for row in table))
    figure, axes = plt.subplots(len(panels), 2, figsize=(11, 3.6 * len(panels)), layout="constrained",
                                squeeze=False)
    for (panel, pair), number in itertools.product(zip(panels, axes), range(2)):
        axis, name = pair[number], ("snr_db", "mel_mse")[number]
        rows = [row for row in table if (row["kind"], row["group"]) == panel and row[name]]
        for color, codec in enumerate((OURS, PLAIN, *PEERS)):
            points = sorted((row["kbit_per_second"]["mean"], row[name]["mean"]) for row in rows
                            if row["codec"] == codec)
            if points:
                axis.plot(*zip(*points), marker="o", ms=4, lw=2.5 if codec == OURS else 1.3, label=codec,
                          color=f"C{color}", ls="--" if codec == PLAIN else "-")
        ticks = sorted({row["asked"] for row in rows})
        for color, model in enumerate(MEL_MODELS, len(PEERS) + 2):
            found = [e for e in mel_models if panel == ("mono", e["group"]) and e["codec"] == model]
            if found and number:
                point = [np.mean([e[key] for e in found]) for key in ("kbit_per_second", "mel_mse")]
                axis.plot(*point, marker="*", ms=12, ls="", label=f"{model}, file of its latents", color=f"C{color}")
                ticks.append(round(point[0], 2))
            elif found and model == MEL_MODELS[0]:
                axis.text(0.98, 0.02, "autoencoder, vae: phase made up, no SNR", transform=axis.transAxes, ha="right",
                          fontsize=7)
        label = ("SNR, dB (higher is better)", "mel MSE (lower is better)")[number]
        axis.set(xscale="log", yscale=("linear", "log")[number], title=", ".join(panel), ylabel=label,
                 xlabel="kbit/s of the whole file")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize=8)
    with ag.replacing(path) as part:
        figure.savefig(part, format="png", dpi=90)
    plt.close(figure)


# === command line ===


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=(*KINDS, "savings", "speed"),
                        default=[*KINDS, "savings", "speed"], help="default: all")
    parser.add_argument("--musdb_root", type=Path, help="MUSDB18: mixture and vocals of its test/ are measured")
    parser.add_argument("--folder", type=Path, help="folder of your own audio files, measured as well")
    parser.add_argument("--rates", type=lambda text: list(map(ag.number(float, 4, 512), text.split(","))),
                        help="kbit/s, separated by commas, instead of the usual ones")
    parser.add_argument("--hour", type=ag.number(int, 1, 600), nargs="?", const=60, metavar="MINUTES",
                        help="code so much stereo (default 60 minutes) by the command line, measure its memory")
    parser.add_argument("--checkpoint", type=Path, default=ag.SUBJECT.shipped("codec", "musdb"))
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    if not args.musdb_root and not args.folder:
        raise ag.UserError("there is nothing to measure: give --musdb_root or --folder", 2)
    encoders()
    place = ag.results_folder(args.results_dir) / "audio_codecs.json"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        bench, tracks = Bench(args, Path(name)), list(load(args))
        results: dict[str, Any] = {
            "machine": ag.provenance(), "entries": [], "mel_models": [], "savings": [], "speed": [], "hour": [],
            "checkpoint": f"{args.checkpoint.name} (sha256 {ag.file_digest(args.checkpoint)[:12]})"}
        pair = next((sounds["stereo"] for _, sounds in tracks if "stereo" in sounds), None)
        if pair is None and (args.hour or "speed" in args.what):
            raise ag.UserError("no track is stereo at 44.1 kHz, as speed needs: leave it out by --what", 2)
        jobs = [(track, sounds[kind], kind, kbits) for track, sounds in tracks for kind in KINDS
                if kind in args.what and kind in sounds for kbits in args.rates or KINDS[kind][1]]
        with ag.progress(len(jobs), "comparing", unit="file", leave=False) as bar:
            for track, audio, kind, kbits in jobs:
                key = {"kind": kind, "group": track.stem, "track": track.name, "asked": kbits}
                results["entries"] += [key | e for e in bench.compare(audio, KINDS[kind][0], kbits)]
                ag.write_json(place.with_suffix(".part.json"), results)  # what a stopped run leaves
                bar.update()
        for track, sounds in tracks if "mono" in args.what else ():
            key = {"group": track.stem, "track": track.name}
            results["mel_models"] += [key | entry for entry in bench.latents(sounds["mono"])]
        for track, _ in tracks if "savings" in args.what else ():
            row = savings(bench, track.audio)
            results["savings"].append({"track": track.name, "group": track.stem} | row)
        results["speed"] = speed(bench, pair) if "speed" in args.what else []
        results["hour"] = hour(args, pair, Path(name)) if args.hour else []
    results |= {"table": summarise(results["entries"]), "definitions": ag.definitions(*FIGURES),
                "reasons": {key: why for found in bench.reasons.values() for key, why in found.items()
                            if key in FIGURES}}
    ag.write_json(place, results)
    place.with_suffix(".part.json").unlink(missing_ok=True)
    with ag.replacing(place.with_suffix(".md")) as part:
        part.write_text(markdown(results))
    if results["table"]:
        draw(results["table"], results["mel_models"], place.with_suffix(".png"))
    ag.say(f"{markdown(results)}\n-> {place}, {place.with_suffix('.md').name}" +
           f", {place.with_suffix('.png').name}" * bool(results["table"]))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return ag.guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
