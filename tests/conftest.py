"""For all tests: no network beyond this machine, no window for figures, real data only where a variable names it; and
the helpers that several test files share.

Runs of the command line happen inside this process (`Script.call`), in a folder of their own and with the script's
default folders moved there as well; a process is started only where a process is what is tested. Models are tiny, data
are those that need no download. Bit-for-bit comparisons are made in one arithmetic and with one number of threads.
"""
import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Also for the programs that tests start: a request to anywhere else fails at once instead of working on some machines.
NOWHERE = "http://127.0.0.1:9"
os.environ.update(http_proxy=NOWHERE, https_proxy=NOWHERE, HTTP_PROXY=NOWHERE, HTTPS_PROXY=NOWHERE,
                  no_proxy="127.0.0.1,localhost", NO_PROXY="127.0.0.1,localhost", MPLBACKEND="Agg")
torch.set_num_threads(1)  # models as small as these gain nothing from more, and lose much on a busy machine


@pytest.fixture(autouse=True, scope="session")
def offline():
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    socket.socket.connect = local_only
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="session")
def mnist_root():
    """The folder with MNIST/raw."""
    if not os.environ.get("MNIST_ROOT"):
        pytest.skip("needs the real MNIST: set MNIST_ROOT to the folder that holds MNIST/raw")
    return Path(os.environ["MNIST_ROOT"]).resolve()


# --- the scripts as modules


@functools.cache
def load_script(name: str) -> types.ModuleType:
    """image_gen or audio_gen."""
    sys.path.insert(0, str(ROOT / name))
    return importlib.import_module(name)


@functools.cache
def load_explore(name: str) -> types.ModuleType:
    """The explore.py beside a script: there are two of that name."""
    load_script(name)
    spec = importlib.util.spec_from_file_location(f"{name}_explore", ROOT / name / "explore.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- running the command line


class Result(NamedTuple):
    code: int
    out: str
    err: str


def call(module: types.ModuleType, *arguments, main: str = "main") -> Result:
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("always")  # a user sees warnings on stderr, all but those meant for developers
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda *w: err.write(warnings.formatwarning(*w[:4]))
        try:
            code = getattr(module, main)([str(a) for a in arguments])
        except SystemExit as exit_:
            code = exit_.code
    return Result(code, out.getvalue(), err.getvalue())


def assert_error(result: Result, code: int | tuple, *words: str, bars: bool = False) -> None:
    """Exactly one line on stderr, `error: ...` with these words, and this exit status (or one of these). With `bars`,
    progress bars and what a stop signal says may stand before it."""
    assert "Traceback" not in result.err, result.err
    lines = [line for line in re.split(r"[\r\n]", result.err) if line.strip()]
    shown = [line for line in lines if line.startswith("error: ")]
    assert len(shown) == 1 and (bars or len(lines) == 1), result.err or result
    assert lines[-1] == shown[0]
    for word in words:
        assert word in shown[0], f"{word!r} is not in: {shown[0]}"
    assert result.code in (code if isinstance(code, tuple) else (code,)), result.err


@contextlib.contextmanager
def signal_after(module: types.ModuleType, step: int, *numbers: int):
    """This process gets signals when training has done this step."""
    original = module.Trainer.train_step

    def train_step(self):
        original(self)
        if self.step == step:
            for number in numbers or (signal.SIGTERM,):
                signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Trainer, "train_step", train_step)
        yield


@contextlib.contextmanager
def disk_of(size: int):
    """No file may grow beyond this many bytes: what a full disk looks like to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def forked(work) -> int:
    """Do `work` in a copy of this process and return how that ended: minus the signal that killed it, or its status,
    which `work` returns. (What is tested about a killed process is what it leaves on the disk; a copy starts at once.)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dangers of forking beside threads: there are no others at work
        child = os.fork()
    if child == 0:
        status = 77
        try:
            status = work()
        finally:
            os._exit(status)  # the test's own clean-up is not for the copy
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def python():
    """Starts a process with as many threads as this one has, so that sums are added in the same order."""
    threads, started = str(torch.get_num_threads()), []

    def start(*arguments, cwd, env=None, **streams) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | (env or {})
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        started.append(subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, text=True,
                                        start_new_session=True, **streams))
        return started[-1]

    yield start
    for process in started:  # a test that failed leaves none behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# --- what a run leaves behind


def read(path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def strict_json(text: str):
    """Standard JSON, in which NaN and infinities do not exist."""
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")
    return json.loads(text, parse_constant=refuse)


def read_json(path):
    return strict_json(Path(path).read_text())


def records(folder) -> list[dict]:
    return [strict_json(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# Of two runs that are otherwise the same.
UNEQUAL = {"seconds", "images_per_second", "clips_per_second", "made", "results_dir"}


def differences(a, b, path="") -> list[str]:
    """Paths at which two checkpoints differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}/{key}" for key in a.keys() ^ b.keys()]
        kept = a.keys() & b.keys() - (set() if path == "/data" else UNEQUAL)
        return missing + [d for k in kept for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}/{i}")]
    if torch.is_tensor(a) and torch.is_tensor(b):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if type(a) is type(b) and a == b else [f"{path}: {a!r} != {b!r}"]


def finite(state: dict) -> bool:
    return all(torch.isfinite(value).all() for key in ("model", "ema") for value in state[key].values())


# --- both scripts, described for the tests of what they share


class Quiet:
    """Nothing is measured or drawn between epochs: it takes longer than to train a tiny model. A file with the number
    of the epoch takes the place of the figures."""
    notes: list[str] = []
    remembered: dict = {}

    def __init__(self, output: str) -> None:
        self.output = output

    def measure(self, _trainer, _epoch) -> dict:
        return {}

    def draw(self, trainer, epoch) -> None:
        (trainer.results / self.output).write_text(str(epoch))


def quiet(module: types.ModuleType, here: Path, patch=None) -> None:
    """Default folders in `here`, no figures, data and what a model prepares from them made once in all."""
    patch, subject = patch or pytest.MonkeyPatch(), module.SUBJECT
    output = next(name for name in subject.outputs if Path(name).suffix and name != "metrics.jsonl")
    patch.setattr(module, "HERE", here)
    patch.setattr(subject, "between", lambda *_: Quiet(output))
    load = subject.load
    patch.setattr(subject, "load", lambda command, world: loaded(
        module, command.mode, command.options(module.FAMILIES[command.key].data_options["train"]),
        lambda: load(command, world)))
    for family in module.FAMILIES.values():
        patch.setattr(family, "prepare", prepared(family.prepare))


LOADED: dict = {}
PREPARED: dict = {}


def loaded(module: types.ModuleType, mode: str, options, load):
    key = (module.__name__, mode, repr(options))
    if getattr(options, "data_root", None):
        return load()
    if key not in LOADED:
        data = LOADED[key] = load()
        if crops := getattr(data, "training_crops", None):  # for statistics: a few are enough here
            data.training_crops = lambda *args: itertools.islice(crops(*args), 3)
    return copy.copy(LOADED[key])  # it may remember the order of an epoch


def prepared(prepare):
    """Runs that begin with the same model and data take over what the first of them has found out about the data, which
    is most of the work of a run as short as these."""
    @functools.wraps(prepare)
    def wrapper(self, data, device):
        key = (type(self), dataclasses.replace(self.config, epochs=1, save_every=1), data.info())
        if repr(key) not in PREPARED:
            prepare(self, data, device)
            PREPARED[repr(key)] = copy.deepcopy(self.state_dict()), torch.get_rng_state()
        self.load_state_dict(PREPARED[repr(key)][0])
        torch.set_rng_state(PREPARED[repr(key)][1])
    return wrapper


COMMON = ("--device", "cpu", "--precision", "float32", "--checkpoint", "model.pt", "--results_dir", "results")
SMALL = ("--warmup_steps", "4", "--epochs", "2", "--save_every", "2")
PER_EPOCH = 5  # steps, of the runs that `Script.run` describes


@dataclasses.dataclass(frozen=True, eq=False)
class Script:
    """What the tests of the machine room know of a script."""
    name: str
    data: tuple  # flags of data that need no download
    size: tuple  # of which one epoch has PER_EPOCH steps
    tiny: dict[str, tuple]  # family -> flags; the first is what most tests train
    drawing: tuple  # flags of an --mode infer that takes no time
    own: dict[str, tuple] = dataclasses.field(default_factory=dict)  # family -> what takes the place of data and size

    def __str__(self) -> str:
        return self.name

    @property
    def module(self) -> types.ModuleType:
        return load_script(self.name)

    @property
    def path(self) -> Path:
        return ROOT / self.name / f"{self.name}.py"

    @property
    def family(self) -> str:
        return next(iter(self.tiny))

    def run(self, family: str = "", data: tuple = ()) -> tuple:
        """A training of 2 epochs of 5 steps each, with a checkpoint after every second step."""
        family = family or self.family
        told = data or self.own[family] if family in self.own else (*self.size, *(data or self.data))
        return (*COMMON, *told, "--model", family, *self.tiny[family], *SMALL)

    def infer(self) -> tuple:
        return ("--mode", "infer", *COMMON, *self.drawing)

    def evaluate(self) -> tuple:
        return ("--mode", "evaluate", *COMMON)

    def call(self, *arguments) -> Result:
        return call(self.module, *arguments)

    def ok(self, *arguments) -> Result:
        result = self.call(*arguments)
        assert result.code == 0, result.err
        return result

    def stopped(self, *arguments, at: int, number: int = signal.SIGTERM) -> Result:
        """A training that is asked to stop after a step."""
        with signal_after(self.module, at, number):
            result = self.call(*arguments)
        assert result.code == 128 + number, result.err
        return result

    def driver(self, folder: Path, body: str = "") -> Path:
        """A program that runs the script's `main` after the changes of `body`, quietly."""
        path = folder / "driver.py"
        path.write_text(f"""import os, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest
from pathlib import Path
script = conftest.load_script({self.name!r})
conftest.quiet(script, Path("script").resolve())
step = script.Trainer.train_step
{body}
status = script.main(sys.argv[1:])
sys.stdout.flush(), sys.stderr.flush()
os._exit(status)  # as the script itself leaves when there are several processes: gloo's threads may abort a shutdown
""")
        return path

    def write_data(self, folder: Path) -> tuple:
        """A small data set of one's own; returns the flags that name it."""
        rng = np.random.default_rng(0)
        folder.mkdir(parents=True)
        if self.name == "image_gen":
            from PIL import Image
            for number in range(60):
                (folder / "ab"[number % 2]).mkdir(exist_ok=True)
                picture = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
                picture.save(folder / "ab"[number % 2] / f"{number}.png")
            return "--dataset", "folder", "--data_root", folder, "--batch_size", "10"
        import soundfile
        for number in range(5):
            soundfile.write(folder / f"{number}.wav", rng.normal(0, 0.1, 8000), 16000)
        return "--dataset", "folder", "--data_root", folder


SCRIPTS = (
    Script("image_gen", ("--dataset", "digits"), ("--batch_size", "280"), {
        "vae": ("--width", "8"), "diffusion": ("--channels", "16", "--levels", "1", "--blocks", "1", "--steps", "2"),
        "gan": ("--width", "8"), "classifier": ("--width", "8", "--features", "8")}, ("--num_samples", "2")),
    Script("audio_gen", ("--dataset", "synthetic", "--num_samples", "5"), ("--crops", "10", "--batch_size", "2"), {
        "autoencoder": ("--width", "16", "--latent_dim", "8", "--n_mels", "32"),
        "vae": ("--width", "16", "--latent_dim", "8", "--n_mels", "32"),
        "codec": ("--hidden", "8", "--n_mels", "32"),
        "diffusion": ("--channels", "16", "--levels", "1", "--blocks", "1", "--steps", "2", "--n_mels", "16"),
        "classifier": ("--width", "8", "--features", "8", "--n_mels", "16")},
        ("--input", "tone.wav"), dict.fromkeys(("diffusion", "classifier"), (
            "--dataset", "synthetic", "--seconds", "0.25", "--batch_size", "119"))))


@contextlib.contextmanager
def home(folder: Path):
    """Work in a folder, with the default folders of both scripts below it; what a run changes is put back."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FLAGS_FROM_ENVIRONMENT"):
            patch.delenv(name, raising=False)
        yield patch
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture(params=SCRIPTS, ids=str)
def script(request, tmp_path):
    """Each of the two scripts, in a folder of its own, quiet."""
    import soundfile
    with home(tmp_path) as patch:
        quiet(request.param.module, tmp_path / "script", patch)
        soundfile.write("tone.wav", 0.1 * np.sin(np.arange(4000) / 5), 16000)
        yield request.param


REFERENCES: dict[tuple, Path] = {}


def reference_folder(script: Script, family: str, factory) -> Path:
    if (script.name, family) not in REFERENCES:
        folder = REFERENCES[script.name, family] = factory.mktemp(f"{script}_{family}")
        with home(folder) as patch:
            quiet(script.module, folder / "script", patch)
            script.ok(*script.run(family))
    return REFERENCES[script.name, family]


@pytest.fixture
def reference(script, tmp_path_factory):
    """reference(family): the folder of an uninterrupted `script.run(family)`, for comparison with all others."""
    return lambda family="": reference_folder(script, family or script.family, tmp_path_factory)


@pytest.fixture
def model_file(script, reference, tmp_path):
    """Puts a family's trained checkpoint into the current folder, as model.pt, with its results."""
    def put(family: str = "") -> Path:
        shutil.copytree(reference(family) / "results", tmp_path / "results")
        return Path(shutil.copy(reference(family) / "model.pt", tmp_path / "model.pt"))
    return put


def assert_same_run(folder, reference: Path) -> None:
    """The run in `folder` ended exactly as the reference did."""
    folder = Path(folder)
    assert differences(read(folder / "model.pt"), read(reference / "model.pt")) == []
    assert differences(records(folder / "results"), records(reference / "results")) == []
    assert files(folder / "results").keys() == files(reference / "results").keys()
    assert not list(folder.rglob("*.part"))


def files(folder) -> dict[str, bytes]:
    """What a run wrote, but for its marks and locks."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.name not in (".results", ".lock")}


def nearly(a: float, b: float, rel: float = 2e-3) -> bool:
    """Equal up to the order of float additions."""
    return math.isclose(a, b, rel_tol=rel, abs_tol=1e-4)
