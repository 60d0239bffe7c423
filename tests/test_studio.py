"""The studio: page, HTTP and command line give the same bytes; what a stranger sends ends in one line; and a real
Chromium uses every control once. All against one process, as a user would start it."""
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, assert_error, call, free_port, load_script

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
        with self.opener.open(request, timeout=60) as answer:
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
def running(*flags, end=signal.SIGINT, **env):
    """Ends with a signal, upon which nothing may be said."""
    port = free_port()
    process = start("--port", port, *flags, **env)
    try:
        said = process.stdout.readline()
        assert said == f"http://127.0.0.1:{port} is open; Ctrl-C closes it\n", said + process.stdout.read()
        yield Studio(port, process)
        process.send_signal(end)
        rest, _ = process.communicate(timeout=30)
        assert (process.returncode, rest) == (128 + end, "")
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def studio():
    root = ["--data_root", os.environ["MNIST_ROOT"]] if os.environ.get("MNIST_ROOT") else []
    with running("--max_mb", "3", "--max_seconds", "20", *root) as it:
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
    ({"model": "gan_mnist", "steps": 4}, "--steps belongs to --model diffusion"),
    ({"model": "gan_mnist", "label": "7 --seed x\n<script>"}, "--label 7 --seed x <script>: the classes are"),
    ({"model": "../../etc/passwd"}, "there is no model '../../etc/passwd': choose from"),
    ({"model": {"path": "/etc/passwd"}}, "there is no model"), ({"model": None}, "there is no model 'None'")])
def test_draw_refuses_in_the_words_of_the_command_line(studio, inputs, words):
    assert words in studio.error("draw", **inputs)


@pytest.fixture(scope="module")
def module():
    """The studio in this process, for what ends before it serves."""
    spec = importlib.util.spec_from_file_location("studio", ROOT / "studio" / "studio.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["studio"] = module
    spec.loader.exec_module(module)
    return module


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
