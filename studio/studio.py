#!/usr/bin/env python3
"""Everything in a local web page, and over HTTP: draw, look inside, small files of sounds, compare.

    python studio.py                        http://127.0.0.1:7860 in the browser
    python studio.py --port 8000 --no-browser
    STUDIO_AUTH=name:password python studio.py --host 0.0.0.0        for other machines as well

There is no model code here: an answer is what `--mode infer` of image_gen.py and audio_gen.py, or a task of explore.py,
writes into a folder of its own, so that page, HTTP and command line give the same bytes. Gradio makes the page, the
queue and the end points. One request is worked on at a time, in order; nothing is fetched from another machine.
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
import signal
import socket
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
os.environ.pop("FLAGS_FROM_ENVIRONMENT", None)  # what the page asks of the scripts is all that they are told
sys.path[:0] = [str(ROOT / "image_gen"), str(ROOT / "audio_gen")]

import gradio as gr  # noqa: E402
import torch  # noqa: E402

import audio_gen as ag  # noqa: E402
import explore as ex  # noqa: E402
import image_gen as ig  # noqa: E402

UserErrors = (ig.UserError, ag.UserError)

# === options ===


@dataclass(frozen=True)
class Options:
    port: int = ig.option(7860, "server", "port to listen on", ig.number(int, 1, 65535))
    host: str = ig.option("127.0.0.1", "server", "address to listen on; 0.0.0.0 lets every machine of the network in: "
                          "set STUDIO_AUTH as well", str)
    browser: bool = ig.option(True, "server", "open the page in the browser")
    data_root: Path | None = ig.option(None, "data", "folder with MNIST/raw, where it is not image_gen/data", Path)
    max_mb: float = ig.option(25.0, "limits", "megabytes of one upload", ig.number(float, 0.001, 2000))
    max_seconds: float = ig.option(60.0, "limits", "seconds of one sound", ig.number(float, 1, 36_000))
    waiting: int = ig.option(100, "limits", "requests that may wait", ig.number(int, 1, 10_000))


def read_options(argv: Sequence[str]) -> tuple[Options, tuple[str, str] | None]:
    """From the command line and from variables: STUDIO_PORT is --port, as HOST and PORT often mean something else. The
    name and password come only from a variable: the command line is for all users of a machine to see."""
    words = [f"--{f.name}={value}" for f in dataclasses.fields(Options) if f.type != "bool"
             and (value := os.environ.get(f"STUDIO_{f.name.upper()}"))]
    if any(word.split("=")[0] == "--auth" for word in argv):
        raise ig.UserError("--auth: give STUDIO_AUTH=NAME:PASSWORD as a variable; the command line is no place for a "
                           "password, every user of this machine can read it", 2)
    parser = ig.Parser(dataclasses.fields(Options), prog="studio.py", description=__doc__.split("\n\n")[0])
    options = Options(**vars(parser.parse_args([*words, *argv])))
    name, colon, password = os.environ.get("STUDIO_AUTH", "").partition(":")
    if (name or colon) and not (name and password):
        raise ig.UserError("STUDIO_AUTH is not of the form NAME:PASSWORD", 2)
    return options, (name, password) if name else None


# === work ===

WORK = threading.Lock()  # held by the one request that is worked on: in order, memory bounded, sums added the same way
NOW = threading.local()  # `say` tells the page how far a request is


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
    return without_folders(" ".join(text.split()))


def without_folders(text: str) -> str:
    for folder in (SCRATCH, ROOT, Path.home()):
        text = re.sub(re.escape(str(folder)) + r"/(?:[\w.-]+/)*", "", text)
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:;,()'\"]+/)+", "", text)


def say(text: str) -> None:
    NOW.box["note"] = text


def job(outputs: int) -> Callable[[Callable], Callable]:
    """Makes of a function, which returns a note and other `outputs`, a generator for Gradio: the function runs in a
    thread of its own, in an empty `folder`; while it does, its note says how far it is. When the client stops it or goes
    away, Gradio closes the generator, and an exception ends the thread wherever it is."""

    def decorate(work: Callable) -> Callable:
        @functools.wraps(work)
        def run(*inputs: Any) -> Iterator[Any]:
            box, held, started = {"note": "working"}, False, time.perf_counter()
            folder = Path(tempfile.mkdtemp(dir=SCRATCH))

            def body() -> None:
                NOW.box = box
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
                    raise gr.Error(one_line(box["error"]), duration=20, print_exception=False)
                yield box["result"]  # Gradio copies the files before it asks for more
            finally:
                while thread.is_alive():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Stopped))
                    thread.join(0.2)
                if held:
                    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # should it have ended while they were led away
                    WORK.release()
                shutil.rmtree(folder, ignore_errors=True)

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
    """--mode infer, as on the command line; returns the lines that it prints."""
    command, said = script.read_command([*words, f"--results_dir={folder}"], "infer"), io.StringIO()
    if watch:
        command = Watched(**vars(command), watch=watch)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        script.SUBJECT.infer(command, world(script))
    return without_folders(said.getvalue()).splitlines()


@functools.cache
def world(script: Any) -> Any:
    return script.World("auto")


def flags(**values: Any) -> list[str]:
    """What the page was told, as words of a command line, whose parser judges them; nothing is nothing."""
    whole = {k: int(v) if isinstance(v, float) and v == int(v) else v for k, v in values.items()
             if v is not None and v != ""}
    return [f"--{name}={' '.join(str(value).split())}" for name, value in whole.items()]


# === weights ===


@functools.lru_cache(64)
def read(path: Path, _time: float) -> tuple[dict | None, str]:
    """(checkpoint, why there is none)"""
    script = ig if path.is_relative_to(ig.HERE) else ag
    try:
        return script.load_checkpoint(path), ""
    except script.UserError as error:
        return None, one_line(error)


def weights(script: Any, able: Callable[[type], bool] = lambda _: True) -> dict[str, Path]:
    """Name -> file of what is shipped, and of what was trained here, of families that are `able`."""
    found = {}
    for place in ("pretrained", "models"):
        for path in sorted((script.HERE / place).glob("*.pt")):
            state = None if ".previous" in path.name else read(path, path.stat().st_mtime)[0]
            if state and able(script.FAMILIES[state["family"]]):
                found[path.stem if place == "pretrained" else f"{path.stem} (trained here)"] = path
    return found


def chosen(script: Any, name: str) -> str:
    """The flag of a checkpoint that the page names; any other file stays closed."""
    found = weights(script)
    if str(name) not in found:
        raise ig.UserError(f"there is no model {str(name)!r}: choose from {', '.join(found) or 'none'}", 2)
    return f"--checkpoint={found[name]}"


# === draw ===

WAY = 12  # pictures from noise to image that the slider keeps


@job(outputs=3)
def draw(folder: Path, model: str, label: str = "", num_samples: int = 16, seed: int = 0, steps: int | None = None,
         guidance: float | None = None) -> tuple:
    """Images of a model; `label`: classes to draw in turn, such as 7 or 3,8 (empty: all)."""
    words = flags(label=label, num_samples=num_samples, seed=seed, steps=steps, guidance=guidance)
    count = ig.Parser(dataclasses.fields(ig.InferOptions)).parse_known_args(words)[0].num_samples
    if count > ig.GRID:
        raise ig.UserError(f"{count:,} images: the page draws at most {ig.GRID} at a time, the command line any number")
    looks: list[tuple] = []

    def watch(t: int, x: torch.Tensor, estimate: torch.Tensor) -> None:
        looks.append((t, *(ig.to_uint8(part[:8].float()).cpu() for part in (x, estimate))))
        say(f"look {len(looks)} of the sampler")

    said = infer(ig, [chosen(ig, model), *words, f"--output_dir={folder / 'images'}"], folder, watch)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in sorted((folder / "images").glob("*.png")):
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())  # without dates: the same bytes each time
    every = sorted({round(i * (len(looks) - 1) / (WAY - 1)) for i in range(WAY)}) if looks else []
    return (f"{count} image(s) in {said[-1]}", str(folder / "final_samples.png"), str(folder / "images.zip"),
            [looks[i] for i in every])


def way(folder: Path, looks: list, place: int) -> tuple:
    """One look of the sampler: what it held of the first images, and the images that it expected from that."""
    if not looks:
        return "", None
    t, noisy, estimate = looks[min(int(place), len(looks)) - 1]
    ex.sheet([noisy, estimate], folder / "way.png", f"t = {t} of {ig.TIMESTEPS}", ["at hand", "expected"])
    return f"look {min(int(place), len(looks))} of {len(looks)} that were kept", str(folder / "way.png")


def page(title: str, reason: str = "") -> Any:
    """A tab; one that can't work says why, in place of what it would offer."""
    tab = gr.Tab(title)
    with tab:
        if reason:
            gr.Markdown(f"**{title} is not available here:** {reason}", elem_classes="reason")
    return tab


def runs(button: gr.Button, work: Callable, inputs: list, outputs: list, name: str | None = None) -> Any:
    """A button that starts a job, and one that stops it; `name` makes it an end point."""
    stop = gr.Button("Stop", variant="stop", size="sm")
    event = button.click(work, inputs, outputs, api_name=name, api_visibility="public" if name else "private",
                         concurrency_id="work", concurrency_limit=1, show_progress="minimal")
    stop.click(None, cancels=[event], api_visibility="private")
    return event


def plain(component: Any) -> Any:
    """An input that comes as it is: what is wrong with it, the scripts say, not the widget."""
    component.preprocess = lambda payload: getattr(payload, "path", payload)
    return component


def note(label: str = "What was done") -> gr.Textbox:
    return gr.Textbox(label=label, interactive=False, max_lines=6, elem_classes="note")


def draw_page() -> None:
    names = [*weights(ig, lambda family: family.can_sample)]
    with page("Draw", "" if names else "no weights of a model that draws are in image_gen/pretrained or "
              "image_gen/models: train one with image_gen/train.sh"):
        if not names:
            return
        gr.Markdown("Ask a model for images. The same seed gives the same images, here, over HTTP and on the command line.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                inputs = [plain(part) for part in (
                    gr.Dropdown(names, value=names[0], label="Model", info="Which trained model draws."),
                    gr.Textbox("", label="Classes", info="What to draw, in turn, such as 7 or 3,8. Empty: all classes."),
                    gr.Number(16, label="Number of images", info=f"1 to {ig.GRID}.", precision=0),
                    gr.Number(0, label="Seed", info="Another seed, other images.", precision=0),
                    gr.Number(None, label="Steps", info="Diffusion only: looks of the sampler. Empty: what suits the "
                              "model.", precision=0),
                    gr.Number(None, label="Guidance", info="Diffusion only: above 1, closer to the class and less "
                              "varied. Empty: 1."))]
                button = gr.Button("Draw", variant="primary")
                holder = gr.Group()
            with gr.Column(scale=2, min_width=280):
                told = note()
                picture = gr.Image(label="Images", interactive=False, buttons=["download", "fullscreen"])
                archive = gr.File(label="All images, a PNG file each, in one zip file", interactive=False)
                looks = gr.State([])
                slider = gr.Slider(1, WAY, WAY, step=1, label="From noise to image", info="Diffusion only: move from "
                                   "pure noise (left) to the finished image (right).")
                seen, shown = note("Which look"), gr.Image(label="On the way", interactive=False, buttons=[])
        with holder:
            event = runs(button, draw, inputs, [told, picture, archive, looks], "draw")
        for trigger in (event.success, slider.release):
            trigger(job(outputs=1)(way), [looks, slider], [seen, shown], api_visibility="private",
                    concurrency_id="work", show_progress="hidden")


# === start ===

STYLE = """.note textarea {font-size: .95em} .reason {padding: 2em} footer {opacity: .7}"""


def build() -> gr.Blocks:
    with gr.Blocks(title="ImageAudioGen studio", analytics_enabled=False, delete_cache=(300, 3600)) as blocks:
        gr.Markdown("# ImageAudioGen studio\nTrained models of images and of sound, on this machine.")
        draw_page()
    return blocks


def stay_here(options: Options) -> Callable[[str, tuple], None]:
    """Refuses every connection to another machine, whoever in this process tries: a library that counts its users, a
    client that names an address instead of a file, a dataset that would be downloaded."""
    own = {options.host, "localhost", "0.0.0.0", "::1", "::"}

    def audit(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.sendto"):
            host = args[1][0] if isinstance(args[1], tuple) else "localhost"
        elif event == "socket.getaddrinfo":
            host = args[0]
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host or "localhost"
        if host not in own and not host.startswith("127."):
            raise PermissionError(f"the studio does not reach for {host}: it works without a network")

    return audit


def check_port(options: Options) -> None:
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((options.host, options.port))
    except OSError as error:
        raise ig.UserError(f"can't listen on {options.host} port {options.port} ({error.strerror or error}): another "
                           "studio may be open; give another --port") from None


def serve(argv: Sequence[str] | None) -> int:
    options, auth = read_options(sys.argv[1:] if argv is None else argv)
    check_port(options)
    sys.addaudithook(stay_here(options))
    blocks, stop, signals = build(), threading.Event(), []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (signals.append(number), stop.set()))
    blocks.queue(max_size=options.waiting, default_concurrency_limit=4)
    blocks.launch(server_name=options.host, server_port=options.port, inbrowser=options.browser, auth=auth, quiet=True,
                  share=False, prevent_thread_lock=True, max_file_size=int(options.max_mb * 2 ** 20), ssr_mode=False,
                  run_history=False, footer_links=["api"], enable_monitoring=False, css=STYLE,
                  state_session_capacity=100, theme=gr.themes.Base(font=["system-ui", "sans-serif"],
                                                                   font_mono=["ui-monospace", "monospace"]))
    ig.say(f"http://{options.host}:{options.port} is open; Ctrl-C closes it" + (
        "" if options.host.startswith("127.") else ". It is open to every machine that reaches this one"
        + (", with name and password" if auth else " WITHOUT A PASSWORD: set STUDIO_AUTH=NAME:PASSWORD")))
    stop.wait()
    blocks.close(verbose=False)
    return 128 + signals[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal says stop; returns the exit status."""
    try:
        return ig.guarded(lambda: serve(argv))
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    exit_status = main()
    os._exit(exit_status)  # torch aborts an orderly end while a thread is at work
