#!/usr/bin/env python3
"""Everything in a local web page, and over HTTP: draw, look inside, small files of sounds, compare.

    python studio.py                        http://127.0.0.1:7860 in the browser
    python studio.py --port 8000 --no-browser
    STUDIO_AUTH=name:password python studio.py --host 0.0.0.0        for other machines as well

This file has the page and its start; what is behind the buttons stands in answers.py. Gradio makes the page, the queue
and the end points. One request is worked on at a time, in order; nothing is fetched from another machine.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import answers as an  # noqa: E402  before gradio, whose settings it makes
import gradio as gr  # noqa: E402
from answers import CODEC, ag, ig  # noqa: E402
from fastapi import HTTPException  # noqa: E402  it comes with gradio
from PIL import Image  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.responses import JSONResponse  # noqa: E402

# === the page ===

PAD = """<canvas width="280" height="280" role="img" tabindex="0" aria-label="Draw a digit with mouse, pen or finger"
 style="touch-action:none;background:#000;border-radius:8px;cursor:crosshair;max-width:100%"></canvas>
<br><button type="button">Clear</button>"""
PEN = """
const canvas = element.querySelector('canvas'), pen = canvas.getContext('2d');
const at = e => { const box = canvas.getBoundingClientRect();
  return [(e.clientX - box.x) * 280 / box.width, (e.clientY - box.y) * 280 / box.height]; };
const line = e => { pen.lineTo(...at(e)); pen.stroke(); };
const clear = () => { pen.fillStyle = '#000'; pen.fillRect(0, 0, 280, 280); props.value = ''; };
Object.assign(pen, {lineWidth: 20, lineCap: 'round', lineJoin: 'round', strokeStyle: '#fff'});
canvas.onpointerdown = e => { canvas.setPointerCapture(e.pointerId); pen.beginPath(); pen.moveTo(...at(e)); line(e); };
canvas.onpointermove = e => { if (e.buttons) line(e); };
canvas.onpointerup = () => { props.value = canvas.toDataURL('image/png'); };
element.querySelector('button').onclick = clear;
clear();
"""
STYLE = """.captioned img {padding: 2em 0}  /* labels and captions lie on the picture */
.captioned .grid-container {grid-template-columns: repeat(auto-fit, minmax(9em, 1fr)) !important}
.figures :is(th, td) {min-width: 9em}"""
ALT = """() => new MutationObserver(() => document.querySelectorAll('img[alt=""]').forEach(image => {
  image.alt = image.closest('.block')?.querySelector('[data-testid=block-label]')?.innerText.trim() ?? '';
})).observe(document.body, {childList: true, subtree: true})"""  # else pictures have no name for who can't see them
ASIDE = {"api_visibility": "private", "api_name": False, "concurrency_id": "work", "concurrency_limit": 1,
         "show_progress": "hidden"}


@contextlib.contextmanager
def tab(title: str, able: bool, reason: str) -> Iterator[None]:
    """One that can't work says why; its end points are there and say it, too."""
    with gr.Tab(title):
        if not able:
            gr.Markdown(f"**{title} does not work here:** {reason}.")
        with gr.Column(visible=bool(able)):
            yield


def columns() -> tuple[gr.Column, gr.Column]:
    with gr.Row():
        return gr.Column(scale=1, min_width=280), gr.Column(scale=2, min_width=280)


def runs(text: str, work: Callable, inputs: list, outputs: list, name: str | None = None) -> Any:
    """A button that starts a job, and one that stops it; `name` makes it an end point."""
    with gr.Row():
        start, stop = gr.Button(text, variant="primary", scale=3), gr.Button("Stop", variant="stop", min_width=60)
    event = start.click(work, inputs, outputs, **ASIDE | {
        "api_visibility": "public" if name else "private", "api_name": name or False, "show_progress": "minimal"})
    stop.click(None, cancels=[event], api_visibility="private")
    return event


def plain(component: Any) -> Any:
    """An input that comes as it is: what is wrong with it, the scripts say, not the widget."""
    component.preprocess = lambda payload: getattr(payload, "path", payload)
    return component


def number(value: int | None, label: str, info: str) -> Any:
    """Where there is no value, a text: Gradio shows an empty number as 0."""
    return plain(gr.Textbox("", label=label, info=info) if value is None else
                 gr.Number(value, label=label, info=info, precision=0))


def choice(names: Sequence[str], info: str) -> Any:
    return plain(gr.Dropdown([*names], value=next(iter(names), None), label="Model", info=info))


def note(label: str = "What was done") -> gr.Textbox:
    return gr.Textbox(label=label, interactive=False, lines=1, max_lines=8)


def sound(label: str, **more: Any) -> gr.Audio:
    """Without the button that would share it on another machine."""
    return gr.Audio(label=label, type="filepath", buttons=["download"], **more)


def image(label: str) -> gr.Image:
    return gr.Image(label=label, interactive=False, buttons=["download", "fullscreen"], elem_classes="captioned")


def draw_page() -> None:
    names = an.weights(ig, an.draws)
    with tab("Draw", names, "there are no whole weights of such a model: image_gen/train.sh trains one"):
        left, right = columns()
        with right:
            told, picture, looks = note(), image("Images"), gr.State([])
            archive = gr.File(label="Each image as a PNG file, all in one zip file", interactive=False)
            place = gr.Slider(1, an.WAY, an.WAY, step=1, label="From noise to image",
                              info="Diffusion: noise at the left, the finished images at the right.")
            seen = [note("Where this is"), image("On the way")]
        with left:
            inputs = [choice(names, "Which trained model draws."),
                      plain(gr.Textbox("", label="Classes", info="To draw in turn, such as 7 or 3,8. Empty: all.")),
                      number(16, "Number of images", f"1 to {ig.GRID}."),
                      number(0, "Seed", "The same seed gives the same images, also on the command line."),
                      number(None, "Steps", "Diffusion: looks of the sampler. Empty: what suits the model."),
                      number(None, "Guidance", "Diffusion: above 1, truer to the class, less varied. Empty: 1.")]
            event = runs("Draw", an.draw, inputs, [told, picture, archive, looks], "draw")
        for trigger in (event.success, place.change):
            trigger(an.way, [looks, place], seen, trigger_mode="always_last", **ASIDE)


def look_page() -> None:
    names = an.weights(ig, an.has_code)
    with tab("Look inside", names, "there are no whole weights of a VAE: MODEL=vae image_gen/train.sh trains one"):
        left, right = columns()
        with right:
            looked, outputs = gr.State(None), [
                note("What the model says"),
                image("Seen, rebuilt, and nearest in training"),
                gr.Label(label="The classifier's probabilities", num_top_classes=5)]
        with left:
            model = choice(names, "Whose code of the picture is looked at.")
            fit = plain(gr.Radio([("like MNIST", "mnist"), ("as it is", "none")], value="mnist", label="Preparation",
                                 info="MNIST's digits are white on black, 20 of 28 pixels large, in the middle."))
            gr.Markdown("Draw a digit:")
            pad = gr.HTML("", html_template=PAD, js_on_load=PEN)
            by_hand = runs("Look at the drawing", an.look, [model, pad, fit], [*outputs, looked])
            picture = plain(gr.Image(type="filepath", label="Or drop a picture", sources=["upload", "clipboard"]))
            by_file = runs("Look at the picture", an.look, [model, picture, fit], [*outputs, looked], "look")
        gr.Markdown("### Move the code\nEach slider moves one of the numbers that tell most about an image.")
        left, right = columns()
        with left:
            moved = [note("The picture"), image("The moved code")]
        with right:
            sliders = [gr.Slider(-4, 4, 0, step=0.1, label=f"Number {i + 1}", info="Standard deviations of the prior.")
                       for i in range(an.SLIDERS)]
        for event in (by_hand, by_file):
            event.success(an.slider_values, looked, sliders, api_visibility="private", show_progress="hidden").success(
                an.move, [looked, *sliders], moved, **ASIDE)
        for slider in sliders:
            slider.input(an.move, [looked, *sliders], moved, trigger_mode="always_last", **ASIDE)
        gr.Markdown("### From one drawing to another\nThe drawing above is the first; draw the second:")
        left, right = columns()
        with right:
            outputs = [note(), image("Through the codes")]
        with left:
            second = gr.HTML("", html_template=PAD, js_on_load=PEN)
            runs("Walk", an.walk, [model, pad, second, fit], outputs)


def sound_page() -> None:
    names = an.weights(ag, an.keeps_sound)
    with tab("Sound", names, "there are no whole weights of such a model: audio_gen/train.sh trains one"):
        left, right = columns()
        with right:
            told = note()
            players = [sound(label, interactive=False) for label in ("Original", "Given back, as loud")]
            small = gr.File(label="The small file (.iag)", interactive=False)
            spectra = image("Waveforms, spectrograms and their difference")
        with left:
            given = plain(sound("Sound to give back", sources=["upload", "microphone"]))
            gr.Examples([str(path) for path in sorted((ag.HERE / "examples").glob("*.flac"))], given,
                        label="Or take an example", api_visibility="private")
            model = choice(sorted(names, key=lambda name: name != CODEC), "The codec keeps the waveform; the others "
                           "make much smaller files and guess the phase.")
            rate = plain(gr.Slider(12, 192, 64, step=4, label="Bitrate", info="Codec: kbit/s of the small file."))
            runs("Give it back", an.regenerate, [given, model, rate], [told, *players, spectra, small], "regenerate")
            runs("Only make the small file", an.encode, [given, rate, model], [told, small], "encode")
            file = plain(gr.File(label="Or a small file (.iag), to hear it", file_types=[".iag"]))
            runs("Hear the small file", an.decode, [file], [told, players[1]], "decode")


def speak_page() -> None:
    with tab("Speak", *an.speakers()):
        left, right = columns()
        with right:
            outputs = [note(), sound("What is said", interactive=False), image("Its spectrogram")]
        with left:
            inputs = [plain(gr.Textbox("7", label="Digits", info="What is said, such as 4,2. Empty: all ten.")),
                      number(0, "Seed", "Another seed, another take."),
                      number(None, "Guidance", "Higher: clearer and less varied. Empty: as trained.")]
            runs("Say it", an.speak, inputs, outputs, "speak")


def compare_page() -> None:
    names = [*an.weights(ig), *an.weights(ag)]
    with tab("Compare", names, "there are no weights at all"):
        picked = gr.CheckboxGroup(names, value=[n for n in names if n in an.weights(ig, an.draws)],
                                  label="Models", info="Shipped, and trained here.")
        seed = number(0, "Seed", "Of the images that each model draws.")
        holder, told = gr.Column(), note()
        gallery = gr.Gallery(label="Samples of the same seed", columns=4, height=360, object_fit="contain",
                             elem_classes="captioned", buttons=["download", "fullscreen"])
        table = gr.Dataframe(label="Figures of evaluation.json, beside their floor", interactive=False,
                             elem_classes="figures")
        with holder:
            runs("Compare", an.compare, [picked, seed], [told, gallery, table])
        gr.Markdown("### Training")
        curves, timer = [note("Last read"), image("Curves of training")], gr.Timer(5, active=False)
        live = gr.Checkbox(False, label="Follow", info="Reads the records of training again every five seconds.")
        live.change(lambda on: gr.Timer(active=on), live, timer, api_visibility="private", show_progress="hidden")
        for trigger in (timer.tick, live.change):
            trigger(an.follow, [picked], curves, trigger_mode="always_last", **ASIDE)
        listed = [note("Models"), gr.JSON(label="What is known of each: figures with their floors", max_height=300)]
        runs("List the models again", an.models, [], listed, "models").success(
            lambda: gr.CheckboxGroup([*an.weights(ig), *an.weights(ag)]), None, picked, api_visibility="private",
            show_progress="hidden")


def build() -> gr.Blocks:
    with gr.Blocks(title="ImageAudioGen studio", analytics_enabled=False, delete_cache=(300, 3600)) as blocks:
        gr.Markdown("# ImageAudioGen studio\nTrained models of images and sound, on this machine; nothing leaves it.")
        for page in (draw_page, look_page, sound_page, speak_page, compare_page):
            page()
    return blocks


# === start ===


@dataclass(frozen=True)
class Options:
    port: int = ig.option(7860, "server", "port to listen on", ig.number(int, 1, 65535))
    host: str = ig.option("127.0.0.1", "server", "address to listen on; 0.0.0.0 lets every machine of the network in: "
                          "set STUDIO_AUTH as well", str)
    browser: bool = ig.option(True, "server", "open the page in the browser")
    data_root: Path | None = ig.option(None, "data", "folder with MNIST/raw, where it is not image_gen/data", Path)
    max_mb: float = ig.option(25.0, "limits", "megabytes of one upload", ig.number(float, 0.001, 2000))
    max_seconds: float = ig.option(60.0, "limits", "seconds of one sound", ig.number(float, 1, 36_000))


def read_options(argv: Sequence[str]) -> tuple[Options, tuple[str, str] | None]:
    """From the command line and from variables: STUDIO_PORT is --port, as HOST and PORT often mean something else. The
    name and password come only from a variable: the command line is for all users of a machine to see."""
    words = []
    for name, default in dataclasses.asdict(Options()).items():
        if value := os.environ.get(f"STUDIO_{name.upper()}"):
            no = value.lower() in ("0", "no", "false")
            words.append(f"--{'no-' * no}{name}" if isinstance(default, bool) else f"--{name}={value}")
    if any(word.split("=")[0] == "--auth" for word in argv):
        raise ig.UserError("--auth: give STUDIO_AUTH=NAME:PASSWORD as a variable; the command line is no place for a "
                           "password, every user of this machine can read it", 2)
    parser = ig.Parser(dataclasses.fields(Options), prog="studio.py", description=__doc__.split("\n\n")[0])
    options = Options(**vars(parser.parse_args([*words, *argv])))
    name, colon, password = os.environ.get("STUDIO_AUTH", "").partition(":")
    if (name or colon) and not (name and password):
        raise ig.UserError("STUDIO_AUTH is not of the form NAME:PASSWORD", 2)
    return options, (name, password) if name else None


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


class Limited:
    """Around Gradio's server, which counts the bytes of an uploaded file, but not those of other requests."""

    def __init__(self, app: Callable, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        left = 2 ** 16 + (self.most if scope.get("path", "").endswith("/upload") else 2 ** 20)

        async def counted() -> dict:
            nonlocal left
            left -= len((message := await receive()).get("body", b""))
            if left < 0:
                raise HTTPException(413, "the request is too large: see --max_mb")
            return message

        await self.app(scope, counted, send)


def misformed(_: Any, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "the request is not of the form that /gradio_api/info describes"}, 422)


def no_download(title: str, *_: Any) -> None:
    raise ig.UserError(f"{title} is not on this machine: image_gen/train.sh --prepare_data fetches it, or --data_root "
                       "names its folder")


def serve(argv: Sequence[str] | None) -> int:
    options, auth = read_options(sys.argv[1:] if argv is None else argv)
    an.OPTIONS = options
    check_port(options)
    sys.addaudithook(stay_here(options))
    ig.download = no_download
    Image.MAX_IMAGE_PIXELS = 20_000_000  # a picture of twice as many is refused before it is unpacked
    sys.stdout, sys.stderr = an.Terminal(sys.stdout), an.Terminal(sys.stderr)
    most = int(options.max_mb * 2 ** 20)
    blocks, stop, signals = build(), threading.Event(), []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (signals.append(number), stop.set()))
    blocks.queue(max_size=100, default_concurrency_limit=4)
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # of this machine
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")  # dark enough to read
    blocks.launch(server_name=options.host, server_port=options.port, inbrowser=options.browser, auth=auth, quiet=True,
                  share=False, prevent_thread_lock=True, max_file_size=most, ssr_mode=False, run_history=False,
                  footer_links=["api"], enable_monitoring=False, state_session_capacity=100, css=STYLE, js=ALT,
                  theme=theme, app_kwargs={"middleware": [Middleware(Limited, most=most)], "exception_handlers":
                                           dict.fromkeys((IndexError, KeyError, TypeError, ValueError), misformed)})
    ig.say(f"http://{options.host}:{options.port} is open; Ctrl-C closes it" + (
        "" if options.host == "localhost" or options.host.startswith("127.") else
        ". It is open to every machine that reaches this one"
        + (", with name and password" if auth else " WITHOUT A PASSWORD: set STUDIO_AUTH=NAME:PASSWORD")))
    stop.wait()
    blocks.close(verbose=False)
    return 128 + signals[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal says stop; returns the exit status."""
    try:
        return ig.guarded(lambda: serve(argv))
    finally:
        shutil.rmtree(an.SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    exit_status = main()
    os._exit(exit_status)  # torch aborts an orderly end while a thread is at work
