"""What the studio asks of the scripts: each end point as a function, and the thread that it runs in.

There is no model code here. An answer is what `--mode infer` of image_gen.py and audio_gen.py, or a task of explore.py,
writes into a folder of its own: page, HTTP and command line give the same bytes.
"""
from __future__ import annotations

import base64
import contextlib
import ctypes
import dataclasses
import functools
import inspect
import io
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = Path(tempfile.mkdtemp(prefix="studio-")).resolve()  # all that is uploaded or made; goes when the page does
# Before gradio is imported: it reads these then.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(SCRATCH / "cache"), HF_HUB_OFFLINE="1",
                  GRADIO_ALLOWED_PATHS="", GRADIO_SHARE="False", MPLBACKEND="Agg")
os.environ.pop("FLAGS_FROM_ENVIRONMENT", None)  # the scripts are told only what the page says
sys.path[:0] = [str(ROOT / "image_gen"), str(ROOT / "audio_gen")]

getfile = inspect.getfile


def no_stubs(thing: Any) -> str:
    """Gradio writes stubs of all its classes anew at each import, half of its time, unless they have no file."""
    if isinstance(thing, type) and thing.__module__.startswith("gradio."):
        raise OSError
    return getfile(thing)


inspect.getfile = no_stubs
import explore as ex  # noqa: E402
import gradio as gr  # noqa: E402
import matplotlib.pyplot  # noqa: E402, F401  gradio trips over one that is just being imported in another thread
import soundfile  # noqa: E402
import torch  # noqa: E402

import audio_gen as ag  # noqa: E402
import image_gen as ig  # noqa: E402

inspect.getfile = getfile
UserErrors = (ig.UserError, ag.UserError)
CODEC = "audio_codec"


OPTIONS: Any = None  # what studio.py was told: data_root, max_seconds

# === work ===

WORK = threading.Lock()  # held by the one request that is worked on: in order, memory bounded, sums added the same way
NOW = threading.local()  # of the thread of a job: how far it is, and what it prints


class Terminal:
    """Stands in for stdout or stderr: what the thread of a job prints stays with it, all else goes where it went."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(NOW, "said", self.stream), name)


class Stopped(BaseException):
    """Raised in a thread whose request was cancelled, or whose client has gone away."""


def one_line(error: BaseException) -> str:
    """What a person is told: what the command line says, without the folders of this machine."""
    if isinstance(error, (*UserErrors, gr.Error)):
        text = str(getattr(error, "message", error))
    elif isinstance(error, OSError):
        text = f"{Path(str(error.filename or 'file')).name}: {error.strerror or 'failed'}"
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        text = "out of memory: ask for less at a time"
    else:
        traceback.print_exception(error)
        text = f"this should not have happened ({type(error).__name__}); the studio's terminal says more"
    line = without_folders(" ".join(text.split()))
    return (line[:400] + " ..." * (len(line) > 400)).replace("<", "&lt;")  # the page would take it for HTML


def without_folders(text: str) -> str:
    for folder in (SCRATCH, ROOT, Path.home()):
        text = re.sub(re.escape(str(folder)) + r"/(?:[\w.-]+/)*", "", text)
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:;,()'\"]+/)+", "", text)


def say(text: str) -> None:
    NOW.box["note"] = text


def end(thread: threading.Thread, folder: Path, held: bool) -> None:
    while thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Stopped))
        thread.join(0.2)
    shutil.rmtree(folder, ignore_errors=True)
    if held:
        WORK.release()


def job(outputs: int) -> Callable[[Callable], Callable]:
    """Makes of a function, which returns a note and other `outputs`, a generator for Gradio: it runs in a thread of its
    own, with an empty folder; meanwhile the note says how far it is. When the client stops it or goes away, Gradio
    closes the generator, and an exception ends the thread wherever it is."""

    def decorate(work: Callable) -> Callable:
        @functools.wraps(work)
        def run(*inputs: Any) -> Iterator[Any]:
            box, held, started = {"note": "working"}, False, time.perf_counter()
            folder = Path(tempfile.mkdtemp(dir=SCRATCH))

            def body() -> None:
                NOW.box, NOW.said = box, io.StringIO()
                try:
                    with torch.no_grad():
                        box["result"] = work(folder, *inputs)
                except BaseException as error:  # all of them: the other thread tells it
                    box["error"] = error

            thread = threading.Thread(target=body, daemon=True)
            try:
                while not (held := WORK.acquire(timeout=0.5)):
                    yield ("waiting", *[gr.skip()] * outputs)
                thread.start()
                while thread.join(0.5) or thread.is_alive():
                    yield (f"{box['note']}, {time.perf_counter() - started:.0f} s", *[gr.skip()] * outputs)
                if "error" in box:
                    raise gr.Error(one_line(box["error"]), duration=None, print_exception=False)
                yield box["result"]  # Gradio copies the files before it asks for more
            finally:  # perhaps in Gradio's event loop, which must not wait for the thread to notice
                tidy = functools.partial(end, thread, folder, held)
                threading.Thread(target=tidy, daemon=True).start() if thread.is_alive() else tidy()

        parameters = [*inspect.signature(work).parameters.values()][1:]
        run.__signature__ = inspect.Signature(parameters)  # Gradio names an end point's inputs after them
        return run

    return decorate


@dataclass(frozen=True)
class Watched(ig.Command):
    """A command whose model tells `watch` of each look that its sampler takes, where it has a sampler."""
    watch: Any = None

    def model(self, world: ig.World) -> ig.Family:
        model = super().model(world)
        if hasattr(model, "denoiser"):
            model.sample = functools.partial(model.sample, watch=self.watch)
        return model


def infer(script: Any, words: Sequence[str], folder: Path, watch: Any = None) -> list[str]:
    """--mode infer, as on the command line; returns the lines that were printed."""
    command = script.read_command([*words, f"--results_dir={folder}"], "infer")
    if watch:
        command = Watched(**vars(command), watch=watch)
    script.SUBJECT.infer(command, world(script))
    return without_folders(NOW.said.getvalue()).splitlines()


@functools.cache
def world(script: Any) -> Any:
    return script.World("auto")


def flags(**values: Any) -> list[str]:
    """What the page was told, as words of a command line, whose parser judges them; nothing is nothing."""
    whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in values.items()
             if v is not None and v != ""}
    return [f"--{name}={' '.join(str(value).split())}" for name, value in whole.items()]


# === weights ===


@functools.lru_cache(64)
def read(path: Path, _time: float) -> dict | None:
    with contextlib.suppress(*UserErrors):
        return script_of(path).load_checkpoint(path)
    return None  # a damaged file is no choice


def script_of(path: Path) -> Any:
    return ig if path.is_relative_to(ig.HERE) else ag


def state_of(path: Path) -> dict | None:
    return read(path, path.stat().st_mtime)


def all_of(family: type) -> bool:
    return True


def draws(family: type) -> bool:
    return family.can_sample


def has_code(family: type) -> bool:
    return hasattr(family, "encode")


def keeps_sound(family: type) -> bool:
    return issubclass(family, ag.SoundFamily)


def weights(script: Any, able: Callable[[type], bool] = all_of) -> dict[str, Path]:
    """Name -> file of what is shipped, and of what was trained here, of families that are `able`."""
    files = [path for place in ("pretrained", "models") for path in sorted((script.HERE / place).glob("*.pt"))]
    return {path.stem + " (trained here)" * (path.parent.name == "models"): path for path in files
            if ".previous" not in path.name and (state := state_of(path)) and able(script.FAMILIES[state["family"]])}


def chosen(script: Any, name: str, able: Callable[[type], bool]) -> str:
    """The flag of a checkpoint that the page names; any other file stays closed."""
    if str(name) not in (found := weights(script, able)):
        raise ig.UserError(f"there is no model {str(name)!r}: choose from {', '.join(found) or 'none'}", 2)
    return f"--checkpoint={found[name]}"


# === draw ===

WAY = 12  # looks of a sampler that the slider keeps


@job(outputs=3)
def draw(folder: Path, model: str, label: str = "", num_samples: int = 16, seed: int = 0, steps: int | None = None,
         guidance: float | None = None) -> tuple:
    """Images of a model; `label`: classes to draw in turn, such as 7 or 3,8 (empty: all)."""
    words = flags(label=label, num_samples=num_samples, seed=seed, steps=steps, guidance=guidance)
    options, _ = ig.Parser(dataclasses.fields(ig.InferOptions)).parse_known_args(words)
    count = ig.InferOptions(**vars(options)).num_samples
    if count > ig.GRID:
        raise ig.UserError(f"{count:,} images: the page draws at most {ig.GRID} at a time, the command line any number")
    looks: list[tuple] = []

    def watch(t: int, x: torch.Tensor, estimate: torch.Tensor) -> None:
        looks.append((t, *(ig.to_uint8(part[:8].float()).cpu() for part in (x, estimate))))
        say(f"look {len(looks)} of the sampler")

    said = infer(ig, [chosen(ig, model, draws), *words, f"--output_dir={folder / 'images'}"], folder, watch)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in sorted((folder / "images").glob("*.png")):
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())  # without dates: the same bytes each time
    kept = sorted({round(i * (len(looks) - 1) / (WAY - 1)) for i in range(WAY)}) if looks else []
    return (f"{count} image(s) in {said[-1]}", str(folder / "final_samples.png"), str(folder / "images.zip"),
            [looks[i] for i in kept])


@job(outputs=1)
def way(folder: Path, looks: list, place: float) -> tuple:
    """One look of the sampler: what was at hand of the first images, and the images that it expected from that."""
    if not looks:
        return "only diffusion models go from noise to image in steps", None
    t, noisy, expected = looks[round((place - 1) / (WAY - 1) * (len(looks) - 1))]
    ex.sheet([noisy, expected], folder / "way.png", f"t = {t} of {ig.TIMESTEPS}", ["at hand", "expected"])
    return f"t = {t}: {ig.TIMESTEPS} is pure noise, 0 the finished image", str(folder / "way.png")


# === look inside ===

SLIDERS = 8  # numbers of the code, those with the largest KL


@functools.lru_cache(1)
def scene(flag: str) -> ex.Scene:
    """A VAE with its dataset, which are read once."""
    downloaded = state_of(Path(flag.partition("=")[2]))["data"]["dataset"] not in ("digits", "folder")
    root = [f"--data_root={OPTIONS.data_root}"] if OPTIONS.data_root and downloaded else []
    command = ig.read_command([flag, *root], "infer", ex.ENCODING, ex.InspectOptions)
    return ex.Scene("inspect", command, command.options(ex.InspectOptions), command.model(world(ig)), SCRATCH)


def uploaded(payload: Any, folder: Path, name: str = "drawing.png") -> Path:
    """The file of an upload, which lies where Gradio keeps them; a drawing comes as text. A client may send the name of
    any file instead: only what was uploaded is read."""
    nothing = ig.UserError("nothing was given: draw or choose something first", 2)
    if not payload or not isinstance(payload, str):
        raise nothing
    head, _, drawing = payload.partition(",")
    if head.startswith("data:") and drawing:
        with contextlib.suppress(ValueError):
            (folder / name).write_bytes(base64.b64decode(drawing, validate=True))
            return folder / name
    path = Path(os.path.realpath(payload[:4096].replace("\0", "")))
    if not path.is_relative_to(SCRATCH):
        raise nothing
    return path


@job(outputs=3)
def look(folder: Path, model: str, picture: Any, fit: str = "none") -> tuple:
    """What a VAE makes of a picture; `fit`: mnist to prepare it as MNIST's digits are, none to take it as it is."""
    if fit not in ex.FITS:
        raise ig.UserError(f"--fit {fit}: choose from {', '.join(ex.FITS)}", 2)
    at = scene(flag := chosen(ig, model, has_code))
    at.options = dataclasses.replace(at.options, input=[uploaded(picture, folder)], fit=fit)
    at.results = folder
    found = ex.inspect(at)
    lines = [f"ELBO {found['elbo_nats']:.1f} nats, of which {found['kl_nats']:.1f} are paid for the code"]
    if found["unlike_percent"] is not None:  # MNIST is on this machine
        lines.append(f"more unlike the training data than {found['unlike_percent']:.1f} % of real test images")
    lines += [without_folders(reason) for reason in found["reasons"]]
    return "\n".join(lines), str(folder / "inspect.png"), found["classes"], (flag, found["dimensions"])


def slider_values(looked: tuple) -> list[Any]:
    return [gr.Slider(value=round(min(4.0, max(-4.0, d["code"])), 1), label=f"z{d['dimension']}: {d['kl_nats']:.2f} "
                      "nats") for d in looked[1][:SLIDERS]]


@job(outputs=1)
def move(folder: Path, looked: tuple | None, *values: float) -> tuple:
    """The picture of a code of which some numbers were moved."""
    if looked is None:
        return "look at a drawing first", None
    flag, dimensions = looked
    codes = {d["dimension"]: d["code"] for d in dimensions} | {
        d["dimension"]: float(value) for d, value in zip(dimensions, values, strict=False)}
    drawn = scene(flag).decode(torch.tensor([[codes[d] for d in sorted(codes)]]))
    ex.sheet([drawn], folder / "moved.png", "the moved code")
    return "moved by hand", str(folder / "moved.png")


@job(outputs=1)
def walk(folder: Path, model: str, first: Any, second: Any, fit: str) -> tuple:
    """From one drawing to another, through their codes."""
    at, paths = scene(flag := chosen(ig, model, has_code)), []
    for number, drawing in enumerate((first, second)):
        path = uploaded(drawing, folder, f"{number}.png")
        paths.append(ex.fitted(path, at.model.data.image_size, folder / f"{number} fitted.png", fit))
    ex.look("interpolate", [flag, "--input", *map(str, paths), f"--results_dir={folder}"])
    return "through the codes of the two", str(folder / "interpolate.png")


# === sound ===


def heard(payload: Any, folder: Path) -> Path:
    """An upload that is a sound of an allowed length; what else is wrong with it, the script says."""
    path = uploaded(payload, folder)
    if path.suffix.lower() not in ag.AUDIO_SUFFIXES:
        raise ag.UserError(f"{path.name} is no sound that the page reads: give {', '.join(sorted(ag.AUDIO_SUFFIXES))}")
    with contextlib.suppress(OSError, RuntimeError), soundfile.SoundFile(path) as file:
        count = 0  # of samples that are there: a header may say anything
        while got := len(file.read(1 << 16, dtype="float32")):
            short_enough(path, count := count + got, file.samplerate)
    return path


def short_enough(path: Path, samples: int, rate: int) -> None:
    if samples > OPTIONS.max_seconds * rate:
        raise ag.UserError(f"{path.name} is longer than {OPTIONS.max_seconds:g} s: cut it, or start with --max_seconds")


def record_of(folder: Path) -> tuple[dict, str]:
    """What the script wrote about the one file, and that in words."""
    record = json.loads((folder / "inference.json").read_text())["files"][0]
    words = {"seconds": "{:g} s", "bytes": "{:,} bytes", "kbit_per_second": "{:.1f} kbit/s", "snr_db": "SNR {:.1f} dB",
             "mel_mse": "mel error {:.3f}"}
    return record, ", ".join(text.format(record[key]) for key, text in words.items() if record.get(key) is not None)


def small_files(model: str, bitrate: float | None) -> list[str]:
    """The flags of a model that writes small files; the mel models have no bitrate."""
    flag = chosen(ag, model, keeps_sound)
    config = ag.FAMILIES[state_of(weights(ag)[model])["family"]].config_class
    return [flag, *(flags(bitrate=bitrate) if hasattr(config, "bitrate") else [])]


@functools.lru_cache(8)
def coder(flag: str, _time: float) -> Any:
    return ag.read_command([flag], "infer").model(world(ag)).coder()


@job(outputs=4)
def regenerate(folder: Path, sound: Any, model: str = CODEC, bitrate: float | None = 64) -> tuple:
    """A sound given back: by the codec at a bitrate, or by one of the mel models, which have none."""
    path = heard(sound, folder)
    said = infer(ag, [*small_files(model, bitrate), f"--input={path}"], folder)
    record, words = record_of(folder)
    warned = [line.strip() for line in said if line.startswith("warning") or "below the input" in line]
    return ("\n".join([words, *warned]), str(path), record["output"], str(folder / "inference_comparison.png"),
            record.get("file"))


@job(outputs=1)
def encode(folder: Path, sound: Any, bitrate: float | None = 64, model: str = CODEC) -> tuple:
    """The small file of a sound."""
    infer(ag, [*small_files(model, bitrate), f"--input={heard(sound, folder)}", "--encode"], folder)
    record, words = record_of(folder)
    return words, record["file"]


@job(outputs=1)
def decode(folder: Path, file: Any) -> tuple:
    """The sound of a small file, by the model whose digest its header has."""
    path, found = uploaded(file, folder), weights(ag, keeps_sound)
    coders = {f"--checkpoint={path}": coder(f"--checkpoint={path}", path.stat().st_mtime) for path in found.values()}
    with open(path, "rb") as opened:
        digest = ag.HEADER.unpack(opened.read(ag.HEADER.size).ljust(ag.HEADER.size, b"\0"))[2]
        flag = next((flag for flag in coders if coders[flag].digest == digest), None) or chosen(ag, CODEC, keeps_sound)
        opened.seek(0)
        header = ag.read_header(opened, path, coders[flag])
    short_enough(path, header.samples, header.rate)
    infer(ag, [flag, f"--decode={path}"], folder)
    return (f"{header.samples / header.rate:.1f} s, {header.rate:,} Hz, {header.channels} channel(s)",
            str(folder / f"{path.stem}_decoded.wav"))


def speakers() -> tuple[dict[str, Path], str]:
    """Weights that say digits, and why there are none."""
    found = {name: path for name, path in weights(ag, lambda family: family is ag.FAMILIES["diffusion"]).items()
             if "spoken_digits" in name}
    return found, "" if found else "no weights for spoken digits are in audio_gen/pretrained or audio_gen/models"


@job(outputs=2)
def speak(folder: Path, digits: str, seed: int = 0, guidance: float | None = None) -> tuple:
    """Spoken digits, made by the sound generator."""
    found, reason = speakers()
    if reason:
        raise ag.UserError(reason)
    if str(digits).count(",") >= ag.SHOWN:
        raise ag.UserError(f"more than {ag.SHOWN} digits: say fewer at a time", 2)
    said = infer(ag, [f"--checkpoint={next(iter(found.values()))}", *flags(label=digits, seed=seed, guidance=guidance)],
                 folder)
    return said[-1], str(folder / "drawn_in_a_row.wav"), str(folder / "drawn_sounds.png")


# === compare ===

ALIVE = 120  # seconds since the last line of a record up to which its run is taken to go on


def evaluation_of(path: Path) -> dict[str, tuple]:
    """What --mode evaluate found out about exactly this file: figure -> (value, floor)."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        report = json.loads((results_of(path) / "evaluation.json").read_text())
        if report["checkpoint_sha256"] == ig.file_digest(path):
            return {key: (e.get("value"), e.get("floor")) for key, e in report["metrics"].items() if "value" in e} | {
                f"{row}: {key}": (e["mean"], None) for row, groups in report.get("rows", {}).items()
                for key, e in groups["all"].items() if isinstance(e, dict)}
    return {}


def results_of(path: Path) -> Path:
    script, state = script_of(path), state_of(path)
    usual = script.HERE / "results" / script.FAMILIES[state["family"]].results_folder
    return Path(state.get("run", {}).get("results_dir") or usual)


def history_of(path: Path) -> tuple[list[dict], bool]:
    """The records of a run, and whether it still goes on; of shipped weights, what they remember."""
    record, lines = results_of(path) / "metrics.jsonl", []
    if path.parent.name != "models" or not record.is_file():
        return state_of(path)["history"], False
    for line in record.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last one may be half written
            lines.append(json.loads(line))
    return lines, time.time() - record.stat().st_mtime < ALIVE


@job(outputs=1)
def models(folder: Path) -> tuple:
    """What there is to choose from, with the figures that were measured of each: [value, floor]."""
    found = []
    for name, path in (weights(ig) | weights(ag)).items():
        state, (history, running) = state_of(path), history_of(path)
        found.append({"name": name, "family": state["family"], "trained_on": state["data"]["title"],
                      "epochs": max((r["epoch"] for r in history if "epoch" in r), default=0), "training_now": running,
                      "figures": evaluation_of(path) or None})
    return f"{len(found)} models, {sum(entry['training_now'] for entry in found)} of them training now", found


@job(outputs=1)
def follow(folder: Path, names: Sequence[str]) -> tuple:
    """Curves of training: loss over steps, held-out loss over epochs."""
    with ex.figure(folder / "training.png", 2, figsize=(11, 4)) as (_, axes):
        for name, path in (weights(ig) | weights(ag)).items():
            history, running = history_of(path) if name in (names or ()) else ([], False)
            held_out = next((key for r in history for key in r if key.startswith("val_")), "")
            for axis, x, y in zip(axes, ("step", "epoch"), ("loss", held_out), strict=True):
                points = [(r[x], r[y]) for r in history if ("epoch" in r) == (x == "epoch") and r.get(y) is not None]
                if points:
                    axis.plot(*zip(*points), marker=".", label=name + " (training now)" * running)
                    axis.legend(frameon=False, fontsize=8)
        for axis, labels in zip(axes, (("step", "training loss"), ("epoch", "held-out loss")), strict=True):
            axis.set(xlabel=labels[0], ylabel=labels[1])
            axis.grid(alpha=0.3)
    return f"read at {time.strftime('%H:%M:%S')}; shipped weights keep one epoch", str(folder / "training.png")


@job(outputs=2)
def compare(folder: Path, names: Sequence[str], seed: int = 0) -> tuple:
    """Samples of the same seed, and figures, side by side."""
    paths = {name: path for name, path in (weights(ig) | weights(ag)).items() if name in (names or ())}
    if not paths:
        raise ig.UserError("choose at least one model", 2)
    gallery, reports = [], {name: evaluation_of(path) for name, path in paths.items()}
    for name in paths.keys() & weights(ig, draws).keys():
        say(f"drawing with {name}")
        infer(ig, [chosen(ig, name, draws), *flags(num_samples=16, seed=seed)], folder / name)
        gallery.append((str(folder / name / "final_samples.png"), name))
    keys = dict.fromkeys(key for report in reports.values() for key in report)
    cells = [[next((r[key][1] for r in reports.values() if key in r), None), *(r.get(key, [None])[0]
             for r in reports.values())] for key in keys]
    rows = [[key, *("-" if v is None else f"{v:,.4g}" for v in row)] for key, row in zip(keys, cells, strict=True)]
    unknown = [name for name, report in reports.items() if not report]
    return (f"{len(gallery)} drawn" + f"; --mode evaluate has not measured {', '.join(unknown)}" * bool(unknown),
            sorted(gallery, key=lambda entry: entry[1]), {"headers": ["figure", "floor", *paths], "data": rows})


