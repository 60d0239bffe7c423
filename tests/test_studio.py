"""The studio: page, HTTP and command line give the same bytes; what a stranger sends ends in one line; and a real
Chromium uses every control once. All against one process, as a user would start it."""
import base64
import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, assert_error, call, free_port, load_explore, load_script, read_json
from PIL import Image, ImageDraw

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None,
                                reason="needs gradio: pip install -r requirements-studio.txt")


def start(*flags, **env) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "studio" / "studio.py", "--no-browser", *map(str, flags)],
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | env)


class Studio:
    """A studio that runs, and what a client without any library asks of it."""

    def __init__(self, port: int, process: subprocess.Popen) -> None:
        self.url, self.process = f"http://127.0.0.1:{port}", process
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor())

    def request(self, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind} if body is not None else {})
        with self.opener.open(request, timeout=600) as answer:
            return answer.read()

    def call(self, name: str, **inputs) -> list:
        """The answer of an end point; AssertionError with the line where it is an error."""
        post = self.request(f"/gradio_api/call/v2/{name}", json.dumps(inputs).encode())
        text = self.request(f"/gradio_api/call/{name}/{json.loads(post)['event_id']}").decode()
        event, data = re.findall(r"^event: (\w+)\ndata: (.*)$", text, re.MULTILINE)[-1]
        if event != "complete":
            raise AssertionError(json.loads(data)["error"])
        return json.loads(data)

    def error(self, name: str, **inputs) -> str:
        """The one line that an end point refuses with."""
        with pytest.raises(AssertionError) as caught:
            self.call(name, **inputs)
        line = str(caught.value)
        assert line and "\n" not in line and "Traceback" not in line, line
        assert not re.search(r"/(tmp|work|home|root|usr)\b|\.py\b", line), line
        return line

    def upload(self, name: str, content: bytes) -> dict:
        head = f'--XX\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        paths = json.loads(self.request("/gradio_api/upload", head + content + b"\r\n--XX--\r\n",
                                        "multipart/form-data; boundary=XX"))
        return {"path": paths[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def bytes_of(self, file: dict) -> bytes:
        return self.request(file["url"].removeprefix(self.url))


@contextlib.contextmanager
def running(*flags, end=signal.SIGINT, silent=True, **env):
    """Ends with a signal. Where Gradio itself has refused something, it has told the terminal, and only that."""
    port = free_port()
    process = start("--port", port, *flags, **env)
    try:
        said = process.stdout.readline()
        assert said == f"http://127.0.0.1:{port} is open; Ctrl-C closes it\n", said + process.stdout.read()
        yield Studio(port, process)
        process.send_signal(end)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 128 + end and not (silent and rest), rest
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def studio():
    root = ["--data_root", os.environ["MNIST_ROOT"]] if os.environ.get("MNIST_ROOT") else []
    german = {"LANG": "de_DE.UTF-8", "LC_ALL": "de_DE.UTF-8"}
    with running("--max_mb", "3", "--max_seconds", "20", *root, silent=False, **german) as it:
        yield it


def line_of_command(name: str, tmp: Path, *words) -> Path:
    """What the command line writes, in this process."""
    done = call(load_script(name), "--mode", "infer", "--results_dir", tmp / "cli", *words)
    assert done.code == 0, done.err
    return tmp / "cli"


@pytest.mark.parametrize("model, extra", [
    ("diffusion_mnist", {"label": "7,2", "steps": 4, "guidance": 1.5}), ("diffusion_mnist_fast", {}), ("gan_mnist", {}),
    ("vae_mnist", {"label": "3"})])
def test_draw_gives_the_bytes_of_the_command_line(studio, tmp_path, model, extra):
    note, picture, archive, *_ = studio.call("draw", model=model, num_samples=5, seed=11, **extra)
    assert re.match(r"5 image\(s\) in [\d.]+ s, [\d.]+ images/s on ", note)
    cli = line_of_command("image_gen", tmp_path, "--checkpoint", ROOT / f"image_gen/pretrained/{model}.pt",
                          "--num_samples", 5, "--seed", 11, "--output_dir", tmp_path / "each",
                          *(word for key, value in extra.items() for word in (f"--{key}", value)))
    assert studio.bytes_of(picture) == (cli / "final_samples.png").read_bytes()
    (tmp_path / "images.zip").write_bytes(studio.bytes_of(archive))
    with zipfile.ZipFile(tmp_path / "images.zip") as file:
        drawn = {path.name: path.read_bytes() for path in (tmp_path / "each").glob("*.png")}
        assert len(drawn) == 5 and {name: file.read(name) for name in file.namelist()} == drawn


@pytest.mark.parametrize("inputs, words", [
    ({"model": "gan_mnist", "num_samples": 10_000}, "10,000 images: the page draws at most 400"),
    ({"model": "gan_mnist", "num_samples": "many"}, "--num_samples: 'many' is not an int"),
    ({"model": "gan_mnist", "num_samples": 0}, "0 is out of range"),
    ({"model": "gan_mnist", "num_samples": 1e300}, "at most"),
    ({"model": "gan_mnist", "seed": -1}, "--seed: -1 is out of range"),
    ({"model": "gan_mnist", "seed": float("nan")}, "--seed: 'nan' is not an int"),
    ({"model": "gan_mnist", "num_samples": float("inf")}, "--num_samples: 'inf' is not an int"),
    ({"model": "gan_mnist", "label": "9" * 100_000}, "999 ..."), ({"model": ["gan_mnist"]}, "there is no model"),
    ({"model": "classifier_mnist"}, "there is no model 'classifier_mnist': choose from diffusion_mnist, "),
    ({"model": "gan_mnist", "steps": 4}, "--steps belongs to --model diffusion"),
    ({"model": "gan_mnist", "label": "7 --seed x\n<script>"}, "--label 7 --seed x &lt;script>: the classes are"),
    ({"model": "../../etc/passwd"}, "there is no model '../../etc/passwd': choose from"),
    ({"model": {"path": "/etc/passwd"}}, "there is no model"), ({"model": None}, "there is no model 'None'")])
def test_draw_refuses_in_the_words_of_the_command_line(studio, inputs, words):
    assert words in studio.error("draw", **inputs)


SHIPPED = ROOT / "audio_gen" / "pretrained"


def wave(seconds: float = 0.5, rate: int = 16_000, nan: bool = False, channels: int = 1) -> bytes:
    sound = 0.1 * np.sin(np.arange(round(seconds * rate))[:, None] * 0.2) * np.ones(channels)
    sound[100:200] = np.nan if nan else 0.2
    file = io.BytesIO()
    soundfile.write(file, sound, rate, "FLOAT", format="WAV")
    return file.getvalue()


def picture(width: int, height: int, kind: str = "PNG", value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), value).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("model, flags, heard", [
    ("audio_codec", ["--bitrate", 48], "44,100 Hz, 2"), ("audio_vae", [], "16,000 Hz, 1"),
    ("audio_autoencoder", [], "16,000 Hz, 1")])
def test_encode_and_decode_give_the_bytes_of_the_command_line(studio, tmp_path, model, flags, heard):
    """Whose file it is, its header says."""
    (tmp_path / "tone.wav").write_bytes(wave(1.0, 44_100, channels=2))
    weights = "--checkpoint", SHIPPED / f"{model}.pt"
    note, file = studio.call("encode", sound=studio.upload("tone.wav", wave(1.0, 44_100, channels=2)), bitrate=48,
                             model=model)
    cli = line_of_command("audio_gen", tmp_path, *weights, "--input", tmp_path / "tone.wav", "--encode", *flags)
    small = studio.bytes_of(file)
    assert small == (cli / "tone.iag").read_bytes() and f"{len(small):,} bytes" in note
    note, sound = studio.call("decode", file=studio.upload("tone.iag", small))
    line_of_command("audio_gen", tmp_path, *weights, "--decode", cli / "tone.iag")
    assert studio.bytes_of(sound) == (cli / "tone_decoded.wav").read_bytes()
    assert note == f"1.0 s, {heard} channel(s)"


def test_regenerate_gives_the_bytes_of_the_command_line(studio, tmp_path):
    (tmp_path / "tone.wav").write_bytes(sound := wave(2.0))  # once: libsndfile writes the time into it
    note, original, result, spectra, small = studio.call(
        "regenerate", sound=studio.upload("tone.wav", sound), model="audio_vae", bitrate=64)
    cli = line_of_command("audio_gen", tmp_path, "--checkpoint", SHIPPED / "audio_vae.pt", "--input",
                          tmp_path / "tone.wav")
    assert studio.bytes_of(result) == (cli / "tone_reconstructed.wav").read_bytes()
    assert studio.bytes_of(small) == (cli / "tone.iag").read_bytes() and "kbit/s" in note
    assert studio.bytes_of(spectra) == (cli / "inference_comparison.png").read_bytes()
    assert studio.bytes_of(original) == sound and "mel error" in note


@pytest.fixture(scope="module")
def digit():
    """A seven in black ink on paper, larger than any of MNIST's, in a corner."""
    image = Image.new("L", (200, 160), 250)
    ImageDraw.Draw(image).line([(10, 12), (70, 12), (35, 100)], fill=10, width=12)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.real_data
@pytest.mark.parametrize("fit", ["mnist", "none"])
def test_look_says_what_explore_inspect_says(studio, tmp_path, mnist_root, digit, fit):
    note, sheet, seen, *_ = studio.call("look", model="vae_mnist", picture=studio.upload("seven.png", digit), fit=fit)
    (tmp_path / "seven.png").write_bytes(digit)
    done = call(load_explore("image_gen"), "inspect", "--model", "vae", "--checkpoint",
                ROOT / "image_gen/pretrained/vae_mnist.pt", "--data_root", mnist_root, "--results_dir",
                tmp_path / "cli", "--input", tmp_path / "seven.png", "--fit", fit)
    assert done.code == 0, done.err
    found = read_json(tmp_path / "cli" / "inspect.json")
    assert studio.bytes_of(sheet) == (tmp_path / "cli" / "inspect.png").read_bytes()
    assert f"ELBO {found['elbo_nats']:.1f} nats" in note and f"{found['unlike_percent']:.1f} %" in note
    assert seen["label"] == max(found["classes"], key=found["classes"].get)
    if fit == "mnist":  # as it is, black on white in a corner, it is like nothing that the model has seen
        assert seen["label"] == "7" and {near["class"] for near in found["nearest"]} <= {"7", "9", "1"}
        assert found["unlike_percent"] < 99.9
    else:
        assert found["unlike_percent"] == 100


def test_look_does_without_the_dataset(tmp_path, digit, monkeypatch):
    """Nothing is downloaded; what needs no real images is there all the same."""
    explore = load_explore("image_gen")

    def absent(*_):
        raise explore.ig.UserError("not here")

    monkeypatch.setattr(explore.ig, "download", absent)
    (tmp_path / "seven.png").write_bytes(digit)
    done = call(explore, "inspect", "--checkpoint", ROOT / "image_gen/pretrained/vae_mnist.pt", "--data_root",
                tmp_path / "none", "--results_dir", tmp_path, "--input", tmp_path / "seven.png", "--fit", "mnist")
    found = read_json(tmp_path / "inspect.json")
    assert done.code == 0 and found["reasons"] == ["not compared with real images: not here"]
    assert found["unlike_percent"] is None and found["classes"] and len(found["dimensions"]) == 32
    (tmp_path / "empty.png").write_bytes(picture(50, 50, value=200))
    assert_error(call(explore, "inspect", "--checkpoint", ROOT / "image_gen/pretrained/vae_mnist.pt", "--results_dir",
                      tmp_path, "--input", tmp_path / "empty.png", "--fit", "mnist"), 1, "empty.png shows nothing")


def test_the_page_looks_without_the_dataset(module, tmp_path, digit, monkeypatch):
    monkeypatch.setattr(module.an, "OPTIONS", module.Options(data_root=tmp_path))
    monkeypatch.setattr(module.ig, "download", module.no_download)
    drawing = "data:image/png;base64," + base64.b64encode(digit).decode()
    *_, (note, sheet, classes, _) = module.an.look("vae_mnist", drawing, "mnist")
    assert re.fullmatch(r"ELBO -\d+\.\d nats, of which \d+\.\d are paid for the code\nnot compared with real images: "
                        r"MNIST is not on this machine: .* or --data_root names its folder", note)
    assert Path(sheet).name == "inspect.png" and len(classes) == 10


def test_nearest_images_are_the_nearest():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(256, (30_001, 1, 4, 4), generator=generator, dtype=torch.uint8)
    distances, numbers = load_explore("image_gen").nearest_images(train[[30_000, 5]], train, 3)
    assert [row[0] for row in numbers] == [30_000, 5] and all(row == sorted(row) for row in distances)
    exact = (train.float() - train[5].float()).square().sum((1, 2, 3)).sqrt().sort().values[:3]
    assert torch.allclose(torch.tensor(distances[1]), exact, atol=1e-2)


def test_models_lists_what_there_is(studio):
    note, found = studio.call("models")
    names = {entry["name"]: entry for entry in found}
    assert names.keys() >= {"diffusion_mnist", "gan_mnist", "vae_mnist", "audio_codec", "audio_vae"}
    assert names["gan_mnist"]["family"] == "gan" and names["gan_mnist"]["trained_on"] == "MNIST"
    assert note.startswith(f"{len(found)} models") and not names["gan_mnist"]["training_now"]


def test_speak_gives_the_bytes_of_the_command_line(studio, tmp_path):
    note, sound, strip = studio.call("speak", digits="4,2", seed=3)
    weights = SHIPPED / "audio_diffusion_spoken_digits.pt"
    cli = line_of_command("audio_gen", tmp_path, "--checkpoint", weights, "--label", "4,2", "--seed", 3)
    assert studio.bytes_of(sound) == (cli / "drawn_in_a_row.wav").read_bytes() and "for a second of sound" in note
    assert studio.bytes_of(strip) == (cli / "drawn_sounds.png").read_bytes()
    assert studio.error("speak", digits="eleven").startswith("--label eleven: the classes are zero, one")
    assert studio.error("speak", digits="1," * 100 + "1") == "more than 100 digits: say fewer at a time"


HOSTILE = [  # end point, name of the upload, content, words of the answer
    ("encode", "text.wav", b"this is no sound at all" * 100, "text.wav can't be encoded"),
    ("encode", "empty.wav", b"", "empty.wav can't be encoded"),
    ("encode", "nan.wav", wave(nan=True), "nan.wav can't be encoded (it holds NaN or infinite samples)"),
    ("encode", "cut.wav", wave()[:-99], "it is truncated, 99 bytes"),
    ("encode", "long.wav", wave(20.1), "long.wav is longer than 20 s"),
    ("encode", "slow.wav", wave(0.1, rate=8), "it claims"), ("encode", "many.wav", wave(0.1, channels=9), "9 channels"),
    ("encode", "sound.exe", wave(), "sound.exe is no sound that the page reads"),
    ("encode", "../../../up.wav", wave()[:-99], "up.wav can't be encoded"),
    ("encode", "a b;$(touch x)'.wav", b"x", "can't be encoded"),
    ("regenerate", "nan.wav", wave(nan=True), "nan.wav can't be encoded (it holds NaN"),
    ("decode", "noise.iag", bytes(range(256)) * 9, "noise.iag is no file of this script"),
    ("decode", "empty.iag", b"", "empty.iag is no file of this script"),
    ("look", "text.png", b"no picture", "text.png can't be read as an image"),
    ("look", "empty.png", b"", "empty.png can't be read as an image"),
    ("look", "bomb.png", picture(9000, 9000), "exceeds limit"),
    ("look", "blank.png", picture(300, 300), "blank.png shows nothing"),
    ("look", "picture.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "can't be read as an image"),
]


@pytest.mark.parametrize("name, file, content, words", HOSTILE, ids=[f"{row[0]}-{row[1]}" for row in HOSTILE])
def test_hostile_uploads_end_in_one_line(studio, name, file, content, words):
    key = {"decode": "file", "look": "picture"}.get(name, "sound")
    more = {"model": "vae_mnist"} if name == "look" else {}
    assert words in studio.error(name, **{key: studio.upload(file, content)}, **more)


def test_files_that_the_codec_wrote_may_be_damaged_or_promise_too_much(studio):
    _, file = studio.call("encode", sound=studio.upload("tone.wav", wave(2.0)), bitrate=32)
    small = studio.bytes_of(file)
    assert "damaged" in studio.error("decode", file=studio.upload("cut.iag", small[:-20]))
    flipped = bytearray(small)
    flipped[len(small) // 2] ^= 1
    assert "damaged" in studio.error("decode", file=studio.upload("flip.iag", bytes(flipped)))
    codec = load_script("audio_gen")
    header = codec.Header(*codec.HEADER.unpack(small[:codec.HEADER.size])[2:])
    foreign = header._replace(digest=b"no model").pack() + small[codec.HEADER.size + 4:]
    assert "written with another model" in studio.error("decode", file=studio.upload("foreign.iag", foreign))
    forged = header._replace(samples=2 ** 50).pack() + small[codec.HEADER.size + 4:]
    assert "longer than 20 s" in studio.error("decode", file=studio.upload("long.iag", forged))


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "README.md"), "http://127.0.0.1:9/x.wav",
                                  "http://example.com/x.wav", "../../../../etc/passwd"])
def test_only_uploads_are_read_and_only_answers_are_given(studio, path):
    post = studio.request("/gradio_api/call/v2/encode", json.dumps(
        {"sound": {"path": path, "meta": {"_type": "gradio.FileData"}}}).encode())
    answer = studio.request(f"/gradio_api/call/encode/{json.loads(post)['event_id']}").decode()
    assert answer.startswith("event: error") and "Traceback" not in answer and path not in answer
    with pytest.raises(urllib.error.HTTPError, match="40[0-9]"):
        studio.request(f"/gradio_api/file={path}")


def test_the_name_of_a_file_is_no_upload(module, tmp_path):
    """Also where the page sends text, as it does with a drawing."""
    (tmp_path / "mine.png").write_bytes(picture(28, 28))
    for payload in (str(tmp_path / "mine.png"), f"{module.an.SCRATCH}/../{tmp_path.name}/mine.png", "data:,x", "data:",
                    "", None, 7, {"path": "/etc/passwd"}, "x" * 100_000, "data:image/png;base64,\0"):
        with pytest.raises(module.ig.UserError, match="nothing was given"):
            module.an.uploaded(payload, tmp_path)


@pytest.mark.parametrize("path, body", [
    ("call/v2/draw", b'{"nonsense": 3}'), ("call/v2/draw", b"[1, 2]"), ("call/v2/look", b"{}"), ("queue/join", b"{}"),
    ("queue/join", b'{"fn_index": 999, "data": [], "session_hash": "a"}')])
def test_what_is_no_request_is_a_line(studio, path, body):
    with pytest.raises(urllib.error.HTTPError, match="422") as caught:
        studio.request(f"/gradio_api/{path}", body)
    assert not re.search(r"/tmp|/work|\.py|Traceback", caught.value.read().decode())


def test_an_upload_has_a_limit(studio):
    with pytest.raises(urllib.error.HTTPError, match="413") as caught:
        studio.upload("large.wav", bytes(3 * 2 ** 20 + 1))
    assert "/" not in caught.value.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="413") as caught:  # words, too
        studio.request("/gradio_api/call/v2/draw", b'{"label": "%s"}' % (b"9" * 1_200_000))
    assert "too large: see --max_mb" in caught.value.read().decode()


def test_a_client_that_goes_away_frees_its_work(studio):
    """It would draw for minutes; the next one is served as soon as it has gone."""
    post = studio.request("/gradio_api/call/v2/draw", json.dumps(
        {"model": "diffusion_mnist", "num_samples": 400, "steps": 1000}).encode())
    port = int(studio.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as client:
        address = f"/gradio_api/call/draw/{json.loads(post)['event_id']}"
        client.sendall(f"GET {address} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        while b"look" not in client.recv(9999):  # it is at work
            pass
    began = time.monotonic()
    studio.call("draw", model="gan_mnist", num_samples=1)
    assert time.monotonic() - began < 30


@pytest.fixture(scope="module")
def module():
    """The studio in this process, for what ends before it serves."""
    spec = importlib.util.spec_from_file_location("studio", ROOT / "studio" / "studio.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["studio"] = module
    spec.loader.exec_module(module)
    yield module
    shutil.rmtree(module.an.SCRATCH, ignore_errors=True)


@pytest.mark.parametrize("flags, env, words", [
    (["--auth", "a:b"], {}, "give STUDIO_AUTH=NAME:PASSWORD as a variable"), ([], {"STUDIO_AUTH": "name"}, "NAME:PASS"),
    (["--port", "0"], {}, "out of range"), ([], {"STUDIO_PORT": "x"}, "not an int"), (["--share"], {}, "--share")])
def test_usage_errors_are_one_line(module, monkeypatch, flags, env, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert_error(call(module, *flags), 2, words)


def test_a_second_studio_on_the_port_is_one_line(studio, module):
    port = studio.url.rsplit(":", 1)[1]
    assert_error(call(module, "--port", port), 1, "can't listen on 127.0.0.1 port " + port, "give another --port")


def test_a_password_is_asked_for_and_a_signal_ends_it_in_the_middle_of_work():
    with running(end=signal.SIGTERM, STUDIO_AUTH="name:pass:word") as it:
        for path in ("/gradio_api/info", "/config", "/gradio_api/file=/etc/passwd"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                it.request(path)
        with pytest.raises(urllib.error.HTTPError, match="400"):
            it.request("/login", b"username=name&password=pass", "application/x-www-form-urlencoded")
        it.request("/login", b"username=name&password=pass:word", "application/x-www-form-urlencoded")
        work = {"model": "diffusion_mnist", "num_samples": 400, "steps": 500}
        it.request("/gradio_api/call/v2/draw", json.dumps(work).encode())
        time.sleep(1.5)  # it is at work


# --- the README's lines, as they stand there


def lines_of_readme(kind: str) -> str:
    part = (ROOT / "README.md").read_text().split("# Studio\n")[1].split("\n# ")[0]
    return next(block for block in re.findall(rf"```{kind}\n(.*?)```", part, re.DOTALL) if "/draw" in block
                or "ask draw" in block)


@pytest.mark.parametrize("kind, program", [("sh", ["bash", "-euo", "pipefail", "-c"]), ("py", [sys.executable, "-c"])])
def test_the_lines_of_the_readme_ask_every_end_point(studio, tmp_path, digit, kind, program):
    (tmp_path / "my_digit.png").write_bytes(digit)
    (tmp_path / "song.wav").write_bytes(wave(1.0))
    text = lines_of_readme(kind).replace("http://127.0.0.1:7860", studio.url)
    names = {"draw", "look", "encode", "decode", "regenerate", "speak", "models"}
    assert all(f"ask {name} " in text or f"\"/{name}\"" in text for name in names)
    done = subprocess.run([*program, text], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and '"error"' not in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "song.iag").read_bytes()[:4] == b"IAGC"
    for words in ("images/s on", "ELBO", "kbit/s", "16,000 Hz, 1 channel(s)", "mel error", "gan_mnist"):
        assert words in done.stdout, done.stdout


# --- the page, in a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs a Chromium (apt-get install chromium) and playwright (pip install playwright)")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


class Page:
    """The page as a person sees it; what it asks of other machines, and what its console says, is kept."""

    def __init__(self, browser, url: str, **screen) -> None:
        self.page = browser.new_page(**({"viewport": {"width": 1200, "height": 900}, "locale": "de-DE"} | screen))
        self.page.set_default_timeout(120_000)
        self.foreign, self.errors = [], []
        self.page.on("request", lambda r: r.url.startswith((url, "data:", "blob:")) or self.foreign.append(r.url))
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(f"{m.text} {m.location}"))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url, wait_until="commit")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def press(self, name: str) -> None:
        self.page.locator("button.lg:visible").get_by_text(name, exact=True).click()  # tabs are buttons, too

    def told(self, words: str) -> None:
        """Until a note holds these words."""
        self.page.wait_for_function("words => [...document.querySelectorAll('textarea')].some(e => e.value.includes("
                                    "words))", arg=words, polling=200)

    def saved(self, label: str) -> bytes:
        """The file behind a download link in the part of the page with this label."""
        with self.page.expect_download() as download:
            self.page.locator(f".block:visible:has-text('{label}') a[download]").last.click()
        return Path(download.value.path()).read_bytes()

    def stroke(self, number: int, *points: tuple[float, float]) -> None:
        canvas = self.page.locator("canvas:visible").nth(number)
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        self.page.mouse.move(box["x"] + points[0][0], box["y"] + points[0][1])
        self.page.mouse.down()
        for x, y in points[1:]:
            self.page.mouse.move(box["x"] + x, box["y"] + y, steps=4)
        self.page.mouse.up()


@pytest.fixture(scope="module")
def opened(studio, browser):
    page = Page(browser, studio.url)
    yield page
    assert not page.foreign and not page.errors, (page.foreign, page.errors)


def test_page_draws_what_the_command_line_draws(opened, tmp_path):
    opened.tab("Draw")
    for label, value in {"Classes": "7", "Number of images": "2", "Seed": "5", "Steps": "3", "Guidance": "1.5"}.items():
        opened.page.get_by_label(label, exact=False).locator("visible=true").first.fill(value)
    opened.press("Draw")
    opened.told("2 image(s) in")
    opened.told("0 the finished image")
    opened.page.locator("input[type=range]:visible").first.fill("1")
    opened.told("t = 989")  # where the sampler looks first
    cli = line_of_command("image_gen", tmp_path, "--checkpoint", ROOT / "image_gen/pretrained/diffusion_mnist.pt",
                          "--num_samples", 2, "--seed", 5, "--label", 7, "--steps", 3, "--guidance", 1.5)
    address = opened.page.locator("img:visible").first.get_attribute("src")
    assert opened.page.request.get(address).body() == (cli / "final_samples.png").read_bytes()


def test_page_shows_an_error_as_the_command_line_says_it(opened):
    opened.tab("Draw")
    opened.page.get_by_label("Classes").locator("visible=true").first.fill("<img src=x onerror=alert(1)>")
    opened.press("Draw")
    opened.page.get_by_text("the classes are 0, 1, 2").first.wait_for()


def test_page_stops_what_it_is_at(studio, opened):
    opened.tab("Draw")
    for label, value in {"Classes": "", "Number of images": "400", "Steps": "1000"}.items():
        opened.page.get_by_label(label).locator("visible=true").first.fill(value)
    opened.press("Draw")
    opened.told("look 2 of the sampler")
    opened.press("Stop")
    began = time.monotonic()
    studio.call("draw", model="gan_mnist", num_samples=1)
    assert time.monotonic() - began < 30


def test_page_has_a_name_for_all_that_is_in_it(opened):
    """And fits on a phone, where it is as wide as the screen."""
    opened.page.set_viewport_size({"width": 390, "height": 844})
    opened.page.wait_for_function("document.documentElement.scrollWidth <= 390")
    opened.page.set_viewport_size({"width": 1200, "height": 900})
    for tab in ("Draw", "Look inside", "Sound", "Speak", "Compare"):
        opened.tab(tab)
        nameless = opened.page.evaluate("""() => [...document.querySelectorAll('input, button, textarea, canvas, img')]
            .filter(e => e.checkVisibility() && !e.ariaLabel && !e.title && !e.alt && !e.labels?.length
                    && !e.textContent.trim() && !e.querySelector('img[alt]')).map(e => e.outerHTML.slice(0, 200))""")
        assert not nameless, (tab, nameless)


@pytest.mark.real_data
def test_page_looks_inside_a_drawing(opened, mnist_root):
    opened.tab("Look inside")
    opened.stroke(0, (80, 70), (200, 70), (120, 230))
    opened.stroke(1, (140, 40), (140, 240))
    opened.press("Look at the drawing")
    opened.told("of real test images")
    opened.told("moved by hand")
    opened.press("Walk")
    opened.told("through the codes")


def test_page_gives_a_sound_back_as_the_command_line_does(opened, tmp_path):
    opened.tab("Sound")
    (tmp_path / "tone.wav").write_bytes(wave(1.0))
    opened.page.locator("input[type=file]").locator("visible=true").or_(
        opened.page.locator("[role=tabpanel]:visible input[type=file]")).first.set_input_files(tmp_path / "tone.wav")
    opened.press("Give it back")
    opened.told("kbit/s")
    cli = line_of_command("audio_gen", tmp_path, "--checkpoint", SHIPPED / "audio_codec.pt", "--bitrate", 64, "--input",
                          tmp_path / "tone.wav")
    assert opened.saved("The small file (.iag)") == (cli / "tone.iag").read_bytes()


def test_page_speaks_and_compares(opened):
    opened.tab("Speak")
    opened.press("Say it")
    opened.told("for a second of sound")
    opened.tab("Compare")
    opened.press("Compare")
    opened.told(" drawn")
    opened.press("List the models again")
    opened.told("of them training now")
