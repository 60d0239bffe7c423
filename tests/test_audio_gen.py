"""audio_gen.py: its transform and its pursuit against oracles, every family through the same contract, regeneration of
files of any length, whole runs on made-up stems, the command line, and accidents. (test_audio_data.py has the data,
test_audio_signal.py the signal path and the metrics.)

Runs of the command line happen inside this process (`call`), in a folder of their own and with the script's default
folders moved there as well; a process is started only where a process is what is tested. Figures are drawn, and
everything is measured, only where that is what is tested. Bit-for-bit comparisons are made with one thread.
"""
import ast
import contextlib
import copy
import dataclasses
import errno
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "audio_gen" / "audio_gen.py"
README = ROOT / "README.md"
CPU = torch.device("cpu")
torch.set_num_threads(1)  # models as small as these gain nothing from more, and lose much on a busy machine


def load_script():
    spec = importlib.util.spec_from_file_location("audio_gen_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ag = load_script()
HOP, CLIP, FRAMES, RATE = ag.HOP, ag.CLIP, ag.FRAMES, ag.SAMPLE_RATE
FIGURES = ("draw_curves", "spectrogram_figure", "inference_figure", "strip_figure")
REAL = {name: getattr(ag, name) for name in (*FIGURES, "measure_rows")}  # most tests do without
FAMILIES = ("autoencoder", "vae", "waveform_vae")
MEL_FAMILIES = FAMILIES[:2]
ag.SyntheticMUSDBDataset.clip = staticmethod(functools.lru_cache(ag.SyntheticMUSDBDataset.clip))  # made only once

# --- helpers

COMMON = ("--device", "cpu", "--precision", "float32", "--checkpoint", "model.pt", "--results_dir", "results")
SMALL = ("--dataset", "synthetic", "--num_samples", "10", "--crops", "12", "--batch_size", "2", "--width", "16",
         "--latent_dim", "8", "--warmup_steps", "2")
EXTRA = {"autoencoder": (), "vae": (), "waveform_vae": ("--atoms", "32", "--blocks", "1")}
TRAIN = (*COMMON, *SMALL)
INFER = ("--mode", "infer", *COMMON)
EVALUATE = ("--mode", "evaluate", *COMMON)
STEPS = 12
TINY = {"autoencoder": {"latent_dim": 8, "width": 16}, "vae": {"latent_dim": 8, "width": 16},
        "waveform_vae": {"latent_dim": 16, "width": 16, "atoms": 64, "blocks": 1}}


def run_of(family: str) -> tuple:
    """6 steps an epoch, 12 in all, a checkpoint after steps 4, 6, 10 and 12"""
    return (*TRAIN, "--model", family, *EXTRA[family], "--epochs", "2", "--save_every", "4")


PREPARED: dict[tuple, tuple] = {}  # what `prepare` made of a new model: its state, and that of the random numbers


@contextlib.contextmanager
def remembered_statistics():
    """Runs that begin with the same model and data take over what the first of them has found out about the data, which
    is most of the work of a run as short as these. (That it depends on nothing else is tested below.)"""
    def remembered(prepare):
        def wrapper(self, clips, crops):
            config = dataclasses.replace(self.config, epochs=1, crops=1, save_every=1)
            key = (type(self), config, self.data["digest"])
            if key in PREPARED:
                self.load_state_dict(PREPARED[key][0])
                torch.set_rng_state(PREPARED[key][1])
            else:
                prepare(self, clips, lambda: itertools.islice(crops(), 4))
                PREPARED[key] = copy.deepcopy(self.state_dict()), torch.get_rng_state()
        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for cls, prepare in [(cls, cls.prepare) for cls in ag.FAMILIES.values()]:
            patch.setattr(cls, "prepare", remembered(prepare))
        yield


class Result(NamedTuple):
    code: int
    out: str
    err: str


def call(*arguments) -> Result:
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(), \
            remembered_statistics():
        warnings.simplefilter("always")  # a user sees warnings on stderr, all but those meant for developers
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda *w: err.write(warnings.formatwarning(*w[:4]))
        try:
            code = ag.main([str(a) for a in arguments])
        except SystemExit as exit_:
            code = exit_.code
    return Result(code, out.getvalue(), err.getvalue())


def ok(*arguments) -> Result:
    result = call(*arguments)
    assert result.code == 0, result.err
    return result


def assert_error(result: Result, code: int, *words: str, bars: bool = False) -> None:
    """Exactly one line on stderr, `error: ...` with these words, and this exit status. (With `bars`, progress bars
    may stand before it.)"""
    assert "Traceback" not in result.err, result.err
    lines = [line for line in re.split(r"[\r\n]", result.err) if line.strip()]
    shown = [line for line in lines if line.startswith("error: ")]
    assert len(shown) == 1 and (bars or len(lines) == 1), result.err
    assert lines[-1] == shown[0]
    for word in words:
        assert word in shown[0]
    assert result.code == code, result.err


def read(path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def read_json(path):
    """Standard JSON, in which NaN and infinities do not exist."""
    def refuse(name):
        raise AssertionError(f"{path} holds {name}")
    return json.loads(Path(path).read_text(), parse_constant=refuse)


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


UNEQUAL = {"seconds", "data_seconds", "ms_per_clip", "made"}  # of two runs that are otherwise the same


def differences(a, b, path="") -> list[str]:
    """Paths at which two checkpoints differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}/{key}" for key in a.keys() ^ b.keys()]
        kept = a.keys() & b.keys() - (set() if path == "/data" else UNEQUAL)
        return missing + [d for k in kept for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}/{i}")]
    if torch.is_tensor(a) and torch.is_tensor(b):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if type(a) is type(b) and a == b else [f"{path}: {a!r} != {b!r}"]


def finite(state) -> bool:
    return all(torch.isfinite(value).all() for key in ("model", "ema") for value in state[key].values())


@contextlib.contextmanager
def signal_after(step: int, number: int = signal.SIGTERM):
    """This process gets a signal when training has done this step."""
    original = ag.Trainer.train_step

    def train_step(self):
        original(self)
        if self.step == step:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ag.Trainer, "train_step", train_step)
        yield


def stopped(code: int, *arguments, at: int, number: int = signal.SIGTERM) -> Result:
    with signal_after(at, number):
        result = call(*arguments)
    assert result.code == code, result.err
    return result


@contextlib.contextmanager
def disk_of(size: int):
    """No file may grow beyond this many bytes: what a full disk looks like to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def do_without(patch: pytest.MonkeyPatch, path: Path) -> dict[str, list]:
    """Default folders in `path`, no pictures, no measurements; returns what would have been drawn or measured."""
    calls: dict[str, list] = {name: [] for name in (*FIGURES, "measure_rows")}
    patch.setattr(ag, "HERE", path / "script")
    for name in FIGURES:
        patch.setattr(ag, name, lambda *a, name=name, **k: calls[name].append(a))
    patch.setattr(ag, "measure_rows", lambda *a, **k: calls["measure_rows"].append(a) or {})
    patch.chdir(path)
    return calls


@pytest.fixture(autouse=True)
def drawn(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield do_without(monkeypatch, tmp_path)
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path


@pytest.fixture
def python():
    """Starts a process with as many threads as this one has, so that sums are added in the same order."""
    threads, started = str(torch.get_num_threads()), []

    def start(*arguments, cwd, env=None) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | (env or {})
        started.append(subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, text=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        start_new_session=True))
        return started[-1]

    yield start
    for process in started:  # a test that failed leaves none behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def driver(folder: Path, body: str) -> Path:
    """A program that runs the script's `main` after the changes of `body`; it has no pictures, which take long."""
    path = folder / "driver.py"
    path.write_text(
        "import importlib.util, itertools, os, signal, sys, time\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        f"spec = importlib.util.spec_from_file_location('audio_gen_script', {str(SCRIPT)!r})\n"
        "ag = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(ag)\n"
        f"for name in {FIGURES}:\n"
        "    setattr(ag, name, lambda *a, **k: None)\n"
        "ag.HERE = ag.Path('script').resolve()\n"
        "step = ag.Trainer.train_step\n"
        "def few(prepare):\n"
        "    return lambda self, clips, crops: prepare(self, clips, lambda: itertools.islice(crops(), 4))\n"
        "for cls, prepare in [(cls, cls.prepare) for cls in ag.FAMILIES.values()]:\n"
        "    cls.prepare = few(prepare)\n"
        f"{body}\n"
        "sys.exit(ag.main(sys.argv[1:]))\n")
    return path


def forked(work, meanwhile=lambda child: None) -> int:
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
    meanwhile(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@functools.cache
def synthetic():
    return ag.SyntheticMUSDBDataset({"num_samples": 10})


def clips(count: int = 8):
    """Batches of training clips, as `prepare` gets them."""
    chosen = ag.fixed_clips(synthetic().train, count)
    for first in range(0, len(chosen), 4):
        yield ag.clip_batch(chosen[first:first + 4], CPU)


def song(clips_long: float, seed: int = 0) -> torch.Tensor:
    """Made-up music of any length: [L]"""
    parts = [torch.from_numpy(ag.SyntheticMUSDBDataset.clip(90 + seed + n, "mixture")).float()
             for n in range(math.ceil(clips_long))]
    return torch.cat(parts)[:int(clips_long * CLIP)]


def sine(length: int, frequency: float = 440.0, amplitude: float = 0.3) -> torch.Tensor:
    return (amplitude * (2 * math.pi * frequency / RATE * torch.arange(length, dtype=torch.float64)).sin()).float()


def make_batch(count: int = 4, step: int = 0):
    return ag.random_crops(synthetic().train, ag.Draw(0, step, count, slice(None), CPU))


def build(family: str, **options):
    torch.manual_seed(0)
    cls = ag.FAMILIES[family]
    return cls(cls.config_class(**TINY[family] | options), synthetic().info())


@functools.cache
def _prepared(family: str, options: tuple):
    model = build(family, **dict(options))
    model.prepare(clips)
    return model


def prepared(family: str, **options):
    """A model before its first step, with the statistics of the made-up stems."""
    return copy.deepcopy(_prepared(family, tuple(options.items())))


def learned(family: str, steps: int = 8):
    """A few steps later, so that no branch is zero."""
    model = prepared(family)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        ((_, loss, _),) = model.losses(make_batch(2, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="session")
def models():
    return {family: learned(family).eval() for family in FAMILIES}


def snr(estimate, reference) -> float:
    return 10 * math.log10((reference.square().sum() / (estimate - reference).square().sum().clamp(min=1e-30)).item())


def level_db(audio) -> float:
    return 10 * math.log10(audio.double().square().mean().item() + 1e-30)


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> dict[str, Path]:
    """The uninterrupted run of each family: model.pt and results/, for comparison with stopped and killed ones, and as
    a model to use."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        with pytest.MonkeyPatch.context() as patch:
            do_without(patch, folders[family])
            ok(*run_of(family))
        for number, handler in handlers:
            signal.signal(number, handler)
    return folders


@pytest.fixture
def model_file(references, place):
    """Puts a family's trained checkpoint into the current folder, as model.pt."""
    return lambda family="autoencoder": Path(shutil.copy(references[family] / "model.pt", place / "model.pt"))


def assert_same_run(folder, reference) -> None:
    """The run in `folder` ended exactly as the reference did."""
    assert differences(read(Path(folder) / "model.pt"), read(reference / "model.pt")) == []
    assert differences(records(Path(folder) / "results"), records(reference / "results")) == []
    for name in ("audio_reconstructed_0.wav", "audio_original_0.wav", "progress/epoch_002_0.wav"):
        assert (Path(folder) / "results" / name).read_bytes() == (reference / "results" / name).read_bytes()
    assert not list(Path(folder).rglob("*.part"))


# === oracles: the lapped transform ===


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 256])
def test_mdct_is_exact_both_ways_and_keeps_energy(blocks):
    audio = torch.randn(2, blocks * HOP, generator=torch.Generator().manual_seed(blocks))
    lines = ag.MDCT()(audio)
    assert lines.shape == (2, HOP, blocks)
    torch.testing.assert_close(ag.MDCT().inverse(lines), audio, rtol=0, atol=2e-5)
    torch.testing.assert_close(lines.square().sum((1, 2)), audio.square().sum(1), rtol=1e-5, atol=0)


def test_mdct_is_orthogonal_and_its_inverse_the_transpose():
    size = 4 * HOP
    matrix = ag.MDCT()(torch.eye(size)).flatten(1)  # row n: what an impulse at n becomes
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    torch.testing.assert_close(ag.MDCT().inverse(torch.eye(size).view(size, HOP, 4)), matrix.T, rtol=0, atol=1e-6)


def test_mdct_is_that_of_the_textbook():
    """Inside, a block is sqrt(2/N) sum_n w(n) x(n) cos(pi/N (n + 1/2 - N/2) (k + 1/2)): the usual formula (which has
    + N/2) for time that runs backwards."""
    audio = torch.randn(5 * HOP, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n, k = torch.arange(2 * HOP).double(), torch.arange(HOP).double()
    kernel = torch.cos(math.pi / HOP * (n + 0.5 - HOP / 2)[:, None] * (k + 0.5)) * math.sqrt(2 / HOP)
    window = torch.sin(math.pi / (2 * HOP) * (n + 0.5))
    lines = ag.MDCT()(audio.float()[None])[0].double()
    for block in range(1, 4):
        start = block * HOP - HOP // 2
        expected = (audio[start:start + 2 * HOP] * window) @ kernel
        torch.testing.assert_close(lines[:, block], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("frequency", [100.0, 440.0, 1012.5, 3333.0, 7800.0])
def test_steady_tone_lands_on_its_lines(frequency):
    """A transform that is folded wrongly is still orthogonal, but smears a tone."""
    lines = ag.MDCT()(sine(CLIP, frequency)[None])[0].square()
    place = frequency / (RATE / 2 / HOP) - 0.5
    near = (torch.arange(HOP) - place).abs() <= 3
    assert lines[near, 1:-1].sum() > 0.995 * lines[:, 1:-1].sum()  # the two ends have no neighbour to fold into
    assert lines[near].sum() > 0.99 * lines.sum()


# === oracles: matching pursuit ===


def unit_atoms(count, size, seed=0):
    return F.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def naive_pursuit(patches, atoms, count):
    """The textbook's: the best term of all patches, again and again."""
    rest, terms = patches.clone(), []
    for _ in range(count):
        products = rest @ atoms.T
        where, atom = divmod(int(products.abs().argmax()), len(atoms))
        terms.append((where, atom))
        rest[where] -= products[where, atom] * atoms[atom]
    return terms, rest.square().sum().item()


def left_over(patches, atoms, terms) -> float:
    where, atom, amplitude = terms
    return (patches - torch.zeros_like(patches).index_add_(0, where, amplitude[:, None] * atoms[atom])).square().sum() \
        .item()


@pytest.mark.parametrize("seed", range(6))
def test_pursuit_finds_what_a_naive_one_finds(seed):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(40, 16, generator=generator) * torch.rand(40, 1, generator=generator) ** 2
    atoms = unit_atoms(48, 16, 100 + seed)
    for count in (1, 2, 7, 40, 100, 150):
        terms, rest = naive_pursuit(patches, atoms, count)
        found = ag.pursue(patches, atoms, count)
        assert sorted(zip(found[0].tolist(), found[1].tolist())) == sorted(terms), count
        assert left_over(patches, atoms, found) <= rest * (1 + 1e-5)
    dictionary = torch.zeros(150, 40, 16)  # the amplitudes are fitted together at the end: nearly the least squares
    dictionary[torch.arange(150), found[0]] = atoms[found[1]]
    best = torch.linalg.lstsq(dictionary.flatten(1).T.double(), patches.flatten()[:, None].double(), driver="gelsd")
    least = (dictionary.flatten(1).T.double() @ best.solution - patches.flatten()[:, None]).square().sum().item()
    assert left_over(patches, atoms, found) - least < 0.3 * (rest - least)


def test_pursuit_among_more_patches_than_it_looks_at_in_one_go():
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(5120, 4, generator=generator) * torch.logspace(-3, 0, 5120)[torch.randperm(5120)][:, None]
    atoms = unit_atoms(8, 4)
    terms, rest = naive_pursuit(patches, atoms, 300)
    found = ag.pursue(patches, atoms, 300)
    assert sorted(zip(found[0].tolist(), found[1].tolist())) == sorted(terms)
    assert left_over(patches, atoms, found) <= rest * (1 + 1e-5)


def test_pursuit_with_more_terms_is_never_worse():
    patches, atoms = torch.randn(60, 16, generator=torch.Generator().manual_seed(2)), unit_atoms(64, 16)
    rests = [left_over(patches, atoms, ag.pursue(patches, atoms, count)) for count in range(0, 400, 25)]
    assert rests[0] == pytest.approx(patches.square().sum().item())
    assert all(later < earlier for earlier, later in zip(rests, rests[1:]))


def test_pursuit_recovers_sparse_signals_of_orthonormal_atoms():
    generator = torch.Generator().manual_seed(3)
    atoms = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    amplitudes = torch.randn(30, 16, generator=generator) * (torch.rand(30, 16, generator=generator) < 0.2)
    count = int((amplitudes != 0).sum())
    where, atom, amplitude = ag.pursue(amplitudes @ atoms, atoms, count)
    assert sorted(zip(where.tolist(), atom.tolist())) == [tuple(place) for place in amplitudes.nonzero().tolist()]
    torch.testing.assert_close(amplitude, amplitudes[where, atom], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_pursuit_ends_where_there_is_nothing_more(scale):
    patches, atoms = torch.zeros(20, 16), unit_atoms(32, 16)
    assert [len(part) for part in ag.pursue(patches, atoms, 10)] == [0, 0, 0]  # digital silence
    patches[3] = scale * torch.randn(16, generator=torch.Generator().manual_seed(4))
    assert [len(part) for part in ag.pursue(patches, atoms, 0)] == [0, 0, 0]
    for count in (1, 50, 500, 5000):
        found = ag.pursue(patches, atoms, count)
        assert 0 < len(found[0]) <= count and set(found[0].tolist()) == {3}
        assert all(torch.isfinite(part).all() for part in found)
        if count >= 500:
            assert left_over(patches, atoms, found) < 1e-6 * patches.square().sum()


@pytest.mark.parametrize("columns", [1, 7, 31, 32, 50, 64, 1024])
def test_strongest_column_is_the_argmax(columns):
    products = torch.randn(200, columns, generator=torch.Generator().manual_seed(columns))
    assert torch.equal(ag.strongest(products), products.abs().argmax(1))


@pytest.mark.parametrize("kind", ["constant", "impulse", "two impulses", "square wave", "quiet noise", "loud",
                                  "nothing"])
def test_odd_sounds_have_a_code(kind):
    model, audio = build("waveform_vae", latent_dim=8, blocks=0), torch.zeros(1, CLIP)
    if kind in ("constant", "loud"):
        audio += 0.5 if kind == "constant" else 30
    elif "impulse" in kind:
        audio[0, 40_000] = 1
        audio[0, 100] = -0.3 if kind.startswith("two") else 0
    elif kind == "square wave":
        audio[0] = sine(CLIP, 100).sign()
    elif kind == "quiet noise":
        audio = 1e-6 * torch.randn(1, CLIP, generator=torch.Generator().manual_seed(0))
    code = model.encode(audio)
    decoded = model.decode(code)[:, 0]
    assert torch.isfinite(decoded).all() and (decoded - audio).square().sum() <= audio.square().sum()
    assert kind != "nothing" or not decoded.any()


# === counting numbers ===


def test_numbers_per_second_are_those_of_the_issue():
    """128 for a clip of 5.12 s; a vector in each of 16 steps; 80 in each frame of 20 ms."""
    rates = [cls(cls.config_class(), synthetic().info()).latents_per_second() for cls in ag.FAMILIES.values()]
    assert rates[0] == 25 and rates[2] == 4000
    assert rates[1] == pytest.approx(ag.VaeConfig().latent_dim * 16 / 5.12)


@pytest.mark.parametrize("family, options", [("autoencoder", {}), ("vae", {"latent_frames": 1}),
                                             ("vae", {"latent_frames": 64}), ("vae", {"latent_frames": 256})])
def test_latent_has_as_many_numbers_as_is_said(family, options):
    model = build(family, latent_dim=24, **options)
    audio = song(1)[None]
    latent = model.encode(audio)
    assert latent.numel() == round(model.latents_per_second() * CLIP / RATE)
    assert model.decode(latent).shape == (1, 128, FRAMES)
    other = latent.clone()
    other[(0,) + (-1,) * (latent.ndim - 1)] += 1  # and none of them is idle
    assert not torch.equal(model.decode(other), model.decode(latent))


@pytest.mark.parametrize("latent_dim", [2, 3, 8, 81])
def test_sparse_code_keeps_its_budget(latent_dim):
    """A pair is two numbers, the level one more; a padded clip gets what its own frames are worth."""
    model = build("waveform_vae", latent_dim=latent_dim)
    frames = torch.tensor([256, 100, 3, 1])
    audio = torch.randn(4, CLIP, generator=torch.Generator().manual_seed(0)) * (
        torch.arange(CLIP) < frames[:, None] * HOP)
    for given, counted in ((frames, frames), (None, torch.full((4,), FRAMES))):
        code = model.encode(audio, given)
        used = (code.amplitude != 0).sum(1)
        assert (2 * used + 1 <= torch.maximum(latent_dim * counted, torch.ones(4))).all()
        assert (2 * used[0] + 1 >= 0.99 * latent_dim * FRAMES - 2)  # and uses it: noise has no end of details
        assert code.level.numel() == 4 and code.atom.shape == code.amplitude.shape
        assert (code.atom < model.config.atoms * CLIP // model.PATCH ** 2).all()
    assert model.latents_per_second() * CLIP / RATE == latent_dim * FRAMES


def test_unused_pairs_of_a_code_say_nothing():
    model = build("waveform_vae", blocks=0)
    code = model.encode(song(1)[None] * (torch.arange(CLIP) < 100 * HOP), torch.tensor([100]))
    used = code.amplitude != 0
    assert not used.all()
    moved = code._replace(atom=torch.where(used, code.atom, torch.full_like(code.atom, 7)))
    torch.testing.assert_close(model.decode(moved), model.decode(code))


def test_fewer_numbers_for_less_sound_and_more_for_better_sound():
    audio = song(1)[None]
    quality = []
    for latent_dim in (8, 16, 40):
        model = prepared("waveform_vae", blocks=0, latent_dim=latent_dim)
        quality.append(snr(model.decode(model.encode(audio))[:, 0], audio))
    assert quality[0] + 3 < quality[1] < quality[2] - 3


@pytest.mark.parametrize("latent_dim", [8, 40])
def test_waveform_model_beats_codecs_that_learned_nothing(latent_dim):
    model = prepared("waveform_vae", blocks=0, latent_dim=latent_dim)
    batch = ag.clip_batch(ag.fixed_clips(synthetic().test), CPU)
    plain = model.baselines(batch.audio, batch.frames)
    assert set(plain) == {"pca", "lowest_lines", "largest_lines", "largest_runs"}
    ours = snr(model.decode(model.encode(batch.audio, batch.frames))[:, 0], batch.audio)
    for name, decoded in plain.items():
        assert decoded.shape == (1, 1, CLIP)
        if name != "largest_runs" or latent_dim == 8:  # with 64 atoms, hard to beat on tones that hardly change
            assert ours > snr(decoded[:, 0], batch.audio) + 1, name


def test_codecs_that_learned_nothing_keep_what_they_may():
    count, frames = 21, torch.tensor([FRAMES, 130])
    model = prepared("waveform_vae", latent_dim=count)
    audio = torch.randn(2, CLIP, generator=torch.Generator().manual_seed(0)) * (
        torch.arange(CLIP) < frames[:, None] * HOP)
    plain = {name: model.mdct(model.render(decoded, "own"))
             for name, decoded in model.baselines(audio, frames).items()}
    kept = {name: lines.abs() > 1e-4 for name, lines in plain.items()}
    assert (kept["lowest_lines"][0].sum(0) == count).all() and not kept["lowest_lines"][:, count:].any()
    assert (kept["largest_lines"][0].sum(0) == count // 2).all()  # a line and its index
    runs = kept["largest_runs"].view(2, HOP, -1, 4).any(3).sum((1, 2))
    assert runs.tolist() == [count * n // 5 for n in frames.tolist()]  # four lines and an index
    components = torch.einsum("lk,blt->bkt", model.principal, plain["pca"])
    assert (components.abs() > 1e-3)[0].any(1).sum() == count
    lines = model.mdct(audio)
    for name in ("lowest_lines", "largest_lines", "largest_runs"):  # what is kept is kept as it was
        torch.testing.assert_close(plain[name][kept[name]], lines[kept[name]], rtol=1e-3, atol=1e-3)
    assert lines.abs()[0][~kept["largest_lines"][0]].mean() < lines.abs()[0][kept["largest_lines"][0]].mean() / 2
    assert "pca" not in build("waveform_vae").baselines(audio, frames)  # there is none before the statistics


def test_principal_frames_are_orthonormal_and_sorted():
    model = prepared("waveform_vae")
    torch.testing.assert_close(model.principal.T @ model.principal, torch.eye(HOP), rtol=0, atol=1e-4)
    lines = torch.cat([model.mdct(b.audio) for b in clips()]).transpose(1, 2).reshape(-1, HOP)
    energy = (lines @ model.principal).square().mean(0)
    assert (energy[1:] <= energy[:-1] * 1.01 + 1e-7).all()


def test_first_dictionary_is_better_than_chance_and_depends_on_the_seed_alone():
    audio = song(1)[None]
    one, again = (prepared("waveform_vae", blocks=0), _prepared.__wrapped__("waveform_vae", (("blocks", 0),)))
    assert torch.equal(one.dictionary, again.dictionary)
    chance = build("waveform_vae", blocks=0)
    torch.testing.assert_close(one.atoms().norm(dim=1), torch.ones(64))
    assert snr(one.decode(one.encode(audio))[:, 0], audio) > snr(chance.decode(chance.encode(audio))[:, 0], audio) + 3


# === oracles: variational terms ===


def test_divergence_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(4, 3, 5, generator=generator) * 2 for _ in range(2))
    normal, divergence = torch.distributions.Normal, torch.distributions.kl_divergence
    expected = divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(ag.gaussian_kl(mean, log_variance), expected, rtol=1e-4, atol=1e-5)


def test_divergence_of_amplitudes_is_that_of_torch():
    model = build("waveform_vae")
    model.log_prior.data.normal_(generator=torch.Generator().manual_seed(0))
    code = model.encode(song(1)[None])
    normal, divergence = torch.distributions.Normal, torch.distributions.kl_divergence
    expected = divergence(normal(code.amplitude, model.log_posterior.exp().expand_as(code.amplitude)),
                          normal(0.0, model.log_prior[code.atom % 64].exp()))
    torch.testing.assert_close(model._kl(code), expected, rtol=1e-4, atol=1e-4)


def vae_loss(model, batch, progress=1.0):
    ((player, loss, stats),) = model.losses(batch._replace(progress=progress))
    assert player == "model" and all(math.isfinite(value.item()) for value in (loss, *stats.values()))
    return loss.item(), {name: value.item() for name, value in stats.items()}


def test_likelihood_is_that_of_a_gaussian_with_the_best_variance(monkeypatch):
    model, batch = prepared("vae", beta=0.0), make_batch()
    batch = batch._replace(frames=torch.tensor([256, 256, 90, 17]))
    seen = []
    monkeypatch.setattr(model, "decode", lambda latent: seen.append(type(model).decode(model, latent)) or seen[-1])
    loss, stats = vae_loss(model, batch)
    target, valid = model.log_mel(batch.audio), torch.arange(FRAMES) < batch.frames[:, None]
    errors = (seen[0] - target).mT[valid].double()
    deviation = errors.square().mean().sqrt()
    assert stats["mse"] == pytest.approx(deviation.item() ** 2, rel=1e-4)
    surprise = -torch.distributions.Normal(0.0, deviation).log_prob(errors).mean()
    assert loss == pytest.approx(surprise.item(), abs=1e-3)
    for other in (0.7, 1.4):  # it is the best
        assert -torch.distributions.Normal(0.0, other * deviation).log_prob(errors).mean() > surprise


def test_divergence_is_warmed_up():
    model = prepared("vae", beta=2.0, kl_warmup=0.4)
    (start, stats), (half, _), (full, _), (end, _) = (vae_loss(model, make_batch(), p) for p in (0, 0.2, 0.4, 1))
    per_bin = stats["kl"] / (FRAMES * 128)
    assert full - start == pytest.approx(2 * per_bin, rel=1e-3) and half - start == pytest.approx(per_bin, rel=1e-3)
    assert end == full
    assert vae_loss(prepared("vae", beta=2.0, kl_warmup=0.0), make_batch(), 0)[0] == pytest.approx(full, rel=1e-5)


def test_free_bits_cost_nothing():
    """What lies below them adds a constant and no gradient."""
    batch, model = make_batch(), prepared("vae", free_bits=1e6, kl_warmup=0.0)
    loss, _ = vae_loss(model, batch)
    without, _ = vae_loss(prepared("vae", beta=0.0), make_batch())
    assert loss - without == pytest.approx(1e6 * 8 * 16 / (FRAMES * 128), rel=1e-4)
    kl = ag.gaussian_kl(*model.posterior(model.log_mel(batch.audio)))
    free = kl.clamp(min=1e6).sum()
    assert not torch.autograd.grad(free, model.log_variance.bias)[0].any()


def test_samples_depend_on_their_number_and_the_seed_alone(models):
    model = models["vae"]
    alone, among = ag.Noise(5, [3], CPU), ag.Noise(5, [0, 3, 9], CPU)
    one, three = model.sample(alone), model.sample(among)
    assert three.shape == (3, 128, FRAMES) and not torch.equal(three[0], three[1])
    torch.testing.assert_close(one[0], three[1], rtol=0, atol=1e-4)
    assert not torch.equal(model.sample(ag.Noise(6, [3], CPU)), one)
    draws = torch.cat([ag.Noise(seed, range(100), CPU).normal(100) for seed in range(5)])
    assert len(draws[:, 0].unique()) == 500  # no two streams are the same
    assert draws.mean().item() == pytest.approx(0, abs=0.02) and draws.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_that_can_not_sample_names_one_that_can(family, models):
    if not models[family].can_sample:
        with pytest.raises(ag.UserError, match="--model vae"):
            models[family].sample(ag.Noise(0, [0], CPU))


# === contract: every family ===


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_finite_and_every_parameter_learns(family):
    """Branches that start at zero pass nothing on, so a gradient may first appear after a few steps."""
    model = prepared(family)
    optimizers = {name: torch.optim.SGD(player.parameters(), 0.01) for name, player in model.players().items()}
    moved = set()
    for step in range(4):
        for player, loss, stats in model.losses(make_batch(2, step)):
            assert loss.ndim == 0 and all(math.isfinite(value.item()) for value in (loss, *stats.values()))
            model.zero_grad()
            loss.backward()
            moved |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
            optimizers[player].step()
    assert moved == {name for name, _ in model.named_parameters()}


def fit_one_batch(model, steps=30, rate=5e-3):
    optimizer, losses, batch = torch.optim.Adam(model.parameters(), rate), [], make_batch(2)
    for _ in range(steps):
        ((_, loss, _),) = model.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_can_be_learned_by_heart(family):
    """The same clips and noise again and again: a network that is wired up right fits them. The start is chance: no
    principal components, no dictionary."""
    model = build(family)
    model.preprocessor.fit(clips())
    losses = fit_one_batch(model)
    if family == "autoencoder":
        assert min(losses[-5:]) < 0.5 * losses[0], losses
    else:  # nats per mel bin; decibels
        assert min(losses[-5:]) < losses[0] - {"vae": 0.5, "waveform_vae": 3}[family], losses


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_model_same_loss(family):
    one, two = (_prepared.__wrapped__(family, ()) for _ in range(2))
    assert differences(one.state_dict(), two.state_dict()) == []
    a, b = (fit_one_batch(model, 3) for model in (one, two))
    assert a == b


@pytest.mark.parametrize("family", FAMILIES)
def test_mode_of_the_model_is_as_it_was(family, models):
    model, audio = copy.deepcopy(models[family]), song(1.2)
    for training in (True, False):
        model.train(training)
        before = copy.deepcopy(model.state_dict())
        phase = "own" if family == "waveform_vae" else "original"
        ag.render_long(model, ag.decode_long(model, audio), phase, audio)
        figures = ag.held_out(model, synthetic().valid, CPU)
        assert figures and all(math.isfinite(value) for value in figures.values())
        assert figures == ag.held_out(model, synthetic().valid, CPU)
        assert all(module.training is training for module in model.modules())
        assert differences(model.state_dict(), before) == []


def test_mean_is_taken_over_sound_only():
    values, frames = torch.randn(3, 5, 7), torch.tensor([7, 4, 1])
    kept = torch.cat([values[i, :, :n].flatten() for i, n in enumerate(frames)])
    assert ag.masked_mean(values, frames).item() == pytest.approx(kept.mean().item(), abs=1e-6)
    for i, n in enumerate(frames):
        values[i, :, n:] = 1e6
    assert ag.masked_mean(values, frames).item() == pytest.approx(kept.mean().item(), abs=1e-6)
    assert ag.masked_mean(values[:, 0], frames).ndim == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_of_padding_does_not_count(family, models, monkeypatch):
    """Nonsense of the decoder in the padded frames changes neither the loss nor the held-out figures."""
    model, frames = copy.deepcopy(models[family]), torch.tensor([256, 120])
    padding = torch.arange(FRAMES) >= frames[:, None]
    name = "_bands" if family == "waveform_vae" else "decode"
    original = getattr(model, name)

    def loss_and_figures():
        batch = make_batch(2)
        batch = batch._replace(audio=batch.audio * ~padding.repeat_interleave(HOP, 1), frames=frames)
        ((_, loss, _),) = model.losses(batch)
        return loss.item(), *(() if family == "waveform_vae" else model.validate(batch).values())

    expected = loss_and_figures()
    monkeypatch.setattr(model, name, lambda x: original(x) + padding[:, None] * torch.randn(1).item() * 100)
    assert loss_and_figures() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_do_not_know_how_clips_were_padded(family):
    """Twice the same sound, the second time with a clip of nothing behind it."""
    def batches(extra):
        for batch in clips():
            yield batch._replace(audio=batch.audio * (torch.arange(CLIP) < 200 * HOP),
                                 frames=torch.full((len(batch.audio),), 200))
        if extra:
            yield ag.Batch(torch.zeros(2, CLIP), torch.zeros(2, dtype=torch.int64), None)

    one, two = (build(family) for _ in range(2))
    one.preprocessor.fit(batches(False))
    two.preprocessor.fit(batches(True))
    assert differences(one.preprocessor.state_dict(), two.preprocessor.state_dict()) == []
    assert one.preprocessor.mean.abs().max() > 1 and one.preprocessor.std > 0.5


@pytest.mark.parametrize("family, frames", [(f, n) for f in MEL_FAMILIES for n in (1, 10, 100)] + [
    ("waveform_vae", 1)])
def test_training_set_of_short_sounds_has_statistics(family, frames):
    """No file as long as a clip, or a batch with none: a folder of single drum hits."""
    short = [b._replace(audio=b.audio * (torch.arange(CLIP) < frames * HOP),
                        frames=torch.full((len(b.audio),), frames)) for b in clips()]
    for batches in (short, [*clips(), short[0]]):
        model = build(family)
        model.prepare(lambda batches=batches: iter(batches))
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        assert fit_one_batch(model, 2)[-1] < 1e3


def test_principal_components_of_known_data():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    deviations = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1, 0.02])
    rows = torch.linalg.qr(torch.randn(500, 6, generator=generator))[0] * math.sqrt(500) * deviations @ turn
    basis, spread = ag.principal_components(rows, 4)
    torch.testing.assert_close(spread, deviations[:4], rtol=1e-3, atol=0)
    torch.testing.assert_close((basis @ turn.T).abs(), torch.eye(6)[:4], rtol=0, atol=5e-3)
    basis, spread = ag.principal_components(rows[:3], 5)  # more directions than there are data
    assert basis.shape == (5, 6) and not basis[3:].any() and (spread[3:] == 1).all()
    torch.testing.assert_close(rows[:3] @ basis.T @ basis, rows[:3], rtol=0, atol=1e-3)
    basis, spread = ag.principal_components(rows[:0], 2)
    assert not basis.any() and (spread == 1).all()


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_start_is_the_linear_codec(family):
    """Before its first step the network gives what the principal components give: already much more than the mean."""
    model, batch = prepared(family, latent_dim=64), next(clips())
    mel = model.log_mel(batch.audio)
    figures = ag.mel_metrics(model.decode(model.encode(batch.audio)), mel, batch.frames)
    assert figures["mel_mse"].mean() < 0.35 * mel.square().mean()
    codes = model.to_codes(mel)
    assert codes.square().mean((0, 2)).median() < 30  # and of the size of the prior


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_holds_the_statistics(family, models):
    state = models[family].state_dict()
    assert {"preprocessor.mean", "preprocessor.std"} <= state.keys()
    assert (family == "waveform_vae") == ("principal" in state)
    fresh = build(family).eval()
    fresh.load_state_dict(state)
    audio = song(1)
    assert torch.equal(ag.decode_long(fresh, audio), ag.decode_long(models[family], audio))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_statistics_and_hardly_changes_the_sound(family, models):
    half = ag.module_state(models[family], half=True)
    for name, value in half.items():
        statistic = name in ("preprocessor.mean", "preprocessor.std", "principal")
        assert value.dtype == (torch.float32 if statistic else torch.float16), name
    fresh, audio = build(family).eval(), song(1)
    fresh.load_state_dict({name: value.float() for name, value in half.items()})
    one, two = (ag.decode_long(model, audio) for model in (models[family], fresh))
    assert snr(two, one) > (30 if family != "waveform_vae" else 20)  # another atom may be chosen now and then


@pytest.mark.parametrize("family", FAMILIES)
def test_clips_of_a_batch_do_not_know_of_each_other(family, models):
    model, frames = models[family], torch.tensor([FRAMES, 100, FRAMES])
    audio = torch.stack([song(1), 0.01 * song(1, 3) * (torch.arange(CLIP) < 100 * HOP), song(1, 5)])
    together = model.decode(model.encode(audio, frames))
    for n in range(3):
        alone = model.decode(model.encode(audio[n:n + 1], frames[n:n + 1]))[0]
        assert snr(together[n], alone) > 60


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close(family, models):
    model, audio = copy.deepcopy(models[family]), song(1)
    expected = ag.decode_long(model, audio)
    model.precision = torch.bfloat16
    found = ag.decode_long(model, audio)
    assert found.dtype == torch.float32 and snr(found, expected) > 20


def test_wrong_sizes_of_a_model_are_usage_errors():
    for family, options, word in (("autoencoder", {"width": 20}, "--width"), ("vae", {"latent_frames": 7}, "1, 16"),
                                  ("waveform_vae", {"latent_dim": 1}, "--latent_dim"),
                                  ("waveform_vae", {"latent_dim": 321}, "--latent_dim")):
        with pytest.raises(ag.UserError, match=word) as caught:
            build(family, **options)
        assert caught.value.code == 2


# === regeneration: files of any length ===

LENGTHS = (1, 319, 320, 321, CLIP - 1, CLIP, CLIP + 1, 3 * CLIP + 777)


class Identity(torch.nn.Module):
    """A model that gives back what it gets, and notes how much it is given at a time."""

    def __init__(self, per_frame: int, margin: int = 0, whole_clips: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.margin, self.whole_clips = margin, whole_clips
        self.per_frame, self.encoded, self.rendered, self.frames = per_frame, [], [], []
        self.preprocessor = ag.AudioPreprocessor()

    def encode(self, audio, frames):
        self.encoded.append(len(audio))
        self.frames += frames.tolist()
        return audio

    def decode(self, audio):
        return audio[:, None].clone() if self.per_frame == HOP else self.preprocessor.log_mel(audio)

    def render(self, decoded, phase, original):
        self.rendered.append(decoded.shape[-1] // self.per_frame)
        return decoded[:, 0] if self.per_frame == HOP else original


@pytest.mark.parametrize("margin, whole_clips", [(0, False), (0, True), (16, False), (16, True), (40, True)])
@pytest.mark.parametrize("length", [*LENGTHS, (FRAMES - 1) * HOP, 480 * HOP, 480 * HOP + 1, 65 * RATE])
def test_chunks_of_a_perfect_model_add_up_to_the_file(length, margin, whole_clips):
    """Fades that do not add up to one, a lost chunk or a shift by one sample would show."""
    model = Identity(HOP, margin, whole_clips)
    audio = torch.randn(length, generator=torch.Generator().manual_seed(0))
    decoded = ag.decode_long(model, audio)
    assert decoded.shape == (1, 1, -(-length // HOP) * HOP)
    torch.testing.assert_close(decoded[0, 0, :length], audio, rtol=0, atol=2e-6)
    assert not decoded[0, 0, length:].any()
    torch.testing.assert_close(ag.render_long(model, decoded, "own", audio), audio, rtol=0, atol=1e-5)
    assert model.frames[:-1] == [FRAMES] * (len(model.frames) - 1) and 1 <= model.frames[-1] <= FRAMES
    if whole_clips and length > CLIP:  # no silence after the end takes its share of the last code
        assert model.frames[-1] == FRAMES


@pytest.mark.parametrize("length", [CLIP + 1, 2 * CLIP, 3 * CLIP + 777, 20 * RATE])
@pytest.mark.parametrize("margin", [1, 16, 40])
def test_margins_of_chunks_are_left_out(length, margin, monkeypatch):
    """A model that spoils the ends of every clip spoils the two ends of the file, and nothing at the seams."""
    model, audio = Identity(HOP, margin, True), torch.randn(length, generator=torch.Generator().manual_seed(0))
    edge = margin * HOP

    def decode(clips):
        clips = clips[:, None].clone()
        clips[..., :edge] += 9
        clips[..., -edge:] -= 9
        return clips

    monkeypatch.setattr(model, "decode", decode)
    decoded = ag.decode_long(model, audio)[0, 0]
    end = len(decoded) - edge
    torch.testing.assert_close(decoded[edge:end], F.pad(audio, (0, len(decoded) - length))[edge:end], rtol=0, atol=2e-6)
    assert decoded[:edge].mean() > 8 and decoded[end:].mean() < -8


def test_steady_tone_stays_steady_in_the_shipped_autoencoder():
    """Where its chunks meet, and where the file ends, no matter how much of the last clip that leaves."""
    model = ag.restore_model(ag.open_checkpoint(SCRIPT.parent / "pretrained" / "audio_autoencoder.pt")).eval()
    audio = sine(21 * RATE, 440, 0.2) + sine(21 * RATE, 1000, 0.2)
    mel = model.preprocessor.unstandardise(ag.decode_long(model, audio))[0]
    level = F.avg_pool1d(10 * mel.exp().sum(0).log10()[None], 15, 1)[0]  # of 0.3 s
    step = FRAMES - ag.FADE - 2 * model.margin
    middle = torch.cat([level[s + 80:s + 160] for s in range(0, len(level) - FRAMES, step)]).median()
    seams = torch.stack([level[s + model.margin:s + model.margin + ag.FADE - 15].mean()
                         for s in range(step, len(level) - FRAMES, step)])
    assert (seams - middle).min() > -2.5  # with an overlap of 0.64 s: -3.1
    assert level[-80:].mean() - middle > -4  # with silence in the last clip: -9



def test_mel_chunks_of_a_perfect_model_add_up_to_the_file():
    model, audio = Identity(1), song(3.3)
    whole = model.preprocessor.log_mel(F.pad(audio, (0, -len(audio) % HOP))[None])
    decoded = ag.decode_long(model, audio)
    assert decoded.shape == whole.shape
    starts = torch.arange(0, decoded.shape[-1], FRAMES - ag.FADE)
    edges = torch.cat([starts, starts + ag.FADE - 1])  # where a chunk ends, its outermost frame sees less
    inside = ((torch.arange(decoded.shape[-1])[:, None] - edges).abs() > 1).all(1)
    torch.testing.assert_close(decoded[..., inside], whole[..., inside], rtol=0, atol=1e-3)


def test_memory_for_an_hour_is_bounded():
    """Ten minutes in the same pieces as ten seconds."""
    model, audio = Identity(HOP), torch.zeros(600 * RATE)
    ag.render_long(model, ag.decode_long(model, audio), "own", audio)
    assert max(model.encoded) <= 8 and sum(model.encoded) == math.ceil((30_000 - ag.FADE) / (FRAMES - ag.FADE))
    assert max(model.rendered) <= ag.PIECE and len(model.rendered) == math.ceil(30_000 / (ag.PIECE - ag.FADE))


@pytest.mark.slow
def test_an_hour_needs_little_memory_beyond_its_own(python, place):
    """A process that may not grow far beyond what it needs for ten seconds, given twenty minutes: 77 MB of samples."""
    body = driver(place, "").read_text().split("sys.exit")[0] + """
import resource
model = ag.FAMILIES["autoencoder"](ag.AutoencoderConfig(latent_dim=8, width=16), {}).eval()
def work(seconds):
    audio = torch.zeros(seconds * 16000)
    ag.render_long(model, ag.decode_long(model, audio), "original", audio)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = work(150)
print(work(1200) - small)
"""
    Path("memory.py").write_text(body)
    out, err = python("memory.py", cwd=place).communicate(timeout=300)
    assert float(out) < 5 * 77, err  # input, padded input, result, decoded mel [128 T] twice


PHASES_OF = {family: ag.FAMILIES[family].phases for family in FAMILIES}


@pytest.mark.parametrize("family, phase", [(f, p) for f in FAMILIES for p in PHASES_OF[f]])
def test_result_is_as_long_as_the_file(family, phase, models):
    lengths = LENGTHS if phase in ("own", "original") else (1, 321, CLIP + 1)
    for length in lengths:
        audio = song(length / CLIP + 0.1)[:length]
        decoded = ag.decode_long(models[family], audio)
        assert decoded.shape[-1] == -(-length // HOP) * models[family].per_frame
        result = ag.render_long(models[family], decoded, phase, audio)
        assert result.shape == (length,) and torch.isfinite(result).all()


def roughness(audio):
    """How far each sample is from the line between its neighbours: a click sticks out."""
    return (audio[2:] - 2 * audio[1:-1] + audio[:-2]).abs()


def assert_no_clicks(audio, seams):
    """Nothing near a seam is rougher than what is found elsewhere."""
    rough = roughness(audio)
    place = torch.arange(len(rough))
    near = torch.zeros(len(rough), dtype=torch.bool)
    for seam in seams:
        near |= (place - seam).abs() < 64
    inner = (place > 4 * HOP) & (place < len(rough) - 4 * HOP)
    assert near.any() and rough[near & inner].max() <= 1.2 * rough[~near & inner].max()


def seams_of(frames: int, stride: int) -> list[int]:
    """First and last sample of each fade"""
    starts = range(stride, max(1, frames - ag.FADE), stride)
    return [place * HOP for start in starts for place in (start, start + ag.FADE)]


def test_click_would_be_found():
    audio = sine(2 * CLIP)
    assert_no_clicks(audio, [CLIP])
    audio[CLIP:] += 0.02
    with pytest.raises(AssertionError):
        assert_no_clicks(audio, [CLIP])


def test_waveform_model_has_no_seams(models):
    """Of a steady tone that lasts over five chunks, each decoded on its own."""
    audio = sine(4 * CLIP + 5000)
    model = prepared("waveform_vae", blocks=0)
    result = ag.render_long(model, ag.decode_long(model, audio), "own", audio)
    seams = seams_of(-(-len(audio) // HOP), FRAMES - ag.FADE)
    assert len(seams) == 8
    assert_no_clicks(result, seams)
    error = (result - audio)[:len(audio) // HOP * HOP].view(-1, HOP).square().mean(1)
    fades = torch.zeros(len(error), dtype=torch.bool)
    for first, last in zip(seams[::2], seams[1::2]):
        fades[first // HOP:last // HOP] = True
    assert error[fades].mean() <= 1.5 * error[~fades].mean()
    assert error[fades].max() <= 4 * error[~fades].max()


@pytest.mark.parametrize("phase", ag.PHASES)
def test_mel_phases_have_no_seams(phase, monkeypatch):
    """Pieces that are made audible one after the other have phases of their own: where they meet there is neither a
    click nor a hole. Frames are exact, so that nothing but the phase is at fault."""
    monkeypatch.setattr(ag, "PIECE", 120)
    model, audio = prepared("autoencoder"), sine(280 * HOP, 470.0)
    decoded = model.log_mel(audio[None])
    result = ag.render_long(model, decoded, phase, audio)
    seams = seams_of(280, 120 - ag.FADE)
    assert len(seams) == 4
    assert_no_clicks(result, seams)
    levels = result.view(-1, HOP).square().mean(1).sqrt()[4:-4] / (0.3 / math.sqrt(2))
    assert levels.min() > 0.5 and levels.max() < 1.5


@pytest.mark.parametrize("alike", [0.0, 1.0, -1.0])
def test_power_stays_even_where_pieces_meet(alike, monkeypatch):
    """Two pieces whose waveforms agree, have nothing in common, or are opposite there."""
    monkeypatch.setattr(ag, "PIECE", 200)
    audio = torch.randn(300 * HOP, generator=torch.Generator().manual_seed(0))
    other = torch.randn(300 * HOP, generator=torch.Generator().manual_seed(1)) if alike == 0 else alike * audio
    model, pieces = Identity(HOP), iter([audio[:200 * HOP], other[168 * HOP:]])
    monkeypatch.setattr(model, "render", lambda *rest: next(pieces)[None].clone())
    result = ag.render_long(model, audio[None, None], "own", audio)
    fade = result[168 * HOP:200 * HOP].view(8, -1).square().mean(1).sqrt()
    if alike >= 0:
        assert (fade - 1).abs().max() < 0.06
    assert torch.equal(result[:168 * HOP], audio[:168 * HOP]) and torch.equal(result[200 * HOP:], other[200 * HOP:])


def test_silence_stays_silent_in_a_waveform_model(models):
    audio = torch.cat([torch.zeros(CLIP + 7), song(1.5), torch.zeros(2 * CLIP)])
    result = ag.render_long(models["waveform_vae"], ag.decode_long(models["waveform_vae"], audio), "own", audio)
    margin = 2 * HOP + model_patch()  # of a frame and a patch
    assert level_db(result[:CLIP + 7 - margin]) < -80
    assert level_db(result[len(audio) - 2 * CLIP + margin:]) < -80
    assert level_db(result[CLIP + 7:-2 * CLIP]) > -40
    assert not ag.decode_long(models["waveform_vae"], torch.zeros(CLIP + 7)).any()


def model_patch() -> int:
    return ag.WaveformVAE.PATCH * HOP


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_file_gives_a_silent_file(family, model_file):
    model_file(family)
    soundfile.write("silence.wav", np.zeros(2 * RATE), RATE)
    ok(*INFER, "--input", "silence.wav")
    audio, _ = soundfile.read("results/silence_reconstructed.wav")
    assert len(audio) == 2 * RATE and level_db(torch.from_numpy(audio)) < -80


@pytest.mark.parametrize("gain, peak", [(0.2, 0.5), (3.0, 0.9), (1.0, 1.0), (0.5, 2.5), (1.7, 0.01)])
def test_levels_are_matched_and_nothing_clips(gain, peak):
    original, noise = song(1), torch.randn(CLIP, generator=torch.Generator().manual_seed(0))
    original = original / original.abs().max() * peak
    estimate = gain * (original + 0.3 * original.std() * noise)
    ours, true = ag.level_matched(estimate, original)
    assert ours.square().mean().sqrt().item() == pytest.approx(true.square().mean().sqrt().item(), rel=1e-4)
    assert max(ours.abs().max(), true.abs().max()) < 1
    factor = (true / original)[original.abs() > peak / 10]
    assert factor.max() - factor.min() < 1e-5 and factor.max() <= 1.0001  # turned down together, never up
    assert torch.allclose(ours / ours.norm(), estimate / estimate.norm(), atol=1e-6)
    if peak < 0.6:
        assert torch.equal(true, original)


def test_levels_of_silence():
    zeros, tone = torch.zeros(1000), sine(1000)
    for estimate, original in ((zeros, zeros), (tone, zeros), (zeros, tone)):
        ours, true = ag.level_matched(estimate, original)
        assert torch.isfinite(ours).all() and torch.equal(true, original)
        assert not original.any() <= ours.any() or not ours.any()
    assert not ag.level_matched(1e-3 * tone, zeros)[0].any()


def test_wav_has_16_bits_and_the_samples(place):
    audio = sine(12_345, amplitude=0.999)
    ag.write_wav(place / "new" / "a.wav", audio)
    info = soundfile.info("new/a.wav")
    assert (info.subtype, info.samplerate, info.channels, info.frames) == ("PCM_16", RATE, 1, 12_345)
    found = torch.from_numpy(soundfile.read("new/a.wav", dtype="float32")[0])
    assert (found - audio).abs().max() <= 1.01 / 32768
    assert os.listdir("new") == ["a.wav"]


def test_wav_on_a_full_disk_is_one_error_and_keeps_the_old_file(place):
    ag.write_wav(place / "a.wav", sine(1000))
    before = Path("a.wav").read_bytes()
    with disk_of(10_000), pytest.raises(ag.UserError, match="can't write .*a.wav"):
        ag.write_wav(place / "a.wav", sine(100_000))
    assert Path("a.wav").read_bytes() == before and os.listdir() == ["a.wav"]


# === measuring ===

QUICK = tuple(measure for measure in ag.WAVE_METRICS if measure.__name__ in ("snr_db", "si_sdr_db", "lsd_db"))
CEILINGS = [f"ceiling_true_mel_{phase}" for phase in ag.PHASES]
FLOORS = ["floor_mean_spectrum", "floor_mean_spectrum_griffinlim"]
ROWS = {"autoencoder": ["model_mel", *(f"model_{phase}" for phase in ag.PHASES), *CEILINGS, *FLOORS],
        "waveform_vae": ["model", *(f"without_network_{name}" for name in ("lowest_lines", "largest_lines",
                                                                          "largest_runs", "pca")),
                         *CEILINGS, *FLOORS]}


@pytest.fixture
def quick(monkeypatch):
    """Three metrics, and Griffin-Lim alone of the phases that are searched for."""
    monkeypatch.setattr(ag, "WAVE_METRICS", QUICK)
    pghi = ag.pghi
    monkeypatch.setattr(ag, "pghi", lambda magnitude: pghi(magnitude, 0.5))


def test_rows_counts_and_stems(models, quick):
    tracks = [t for t in synthetic().train if t.stem in ("drums", "bass")][:3]
    measured = ag.fixed_clips([*tracks, ag.Track("silence", "bass", np.zeros(CLIP // 2, np.float16))])
    count = {stem: sum(t.stem == stem for t, _ in measured) for stem in ("drums", "bass")}
    rows = REAL["measure_rows"](models["autoencoder"], measured)
    assert list(rows) == ROWS["autoencoder"]
    for name, row in rows.items():
        assert set(row) == {"all", "drums", "bass"}
        for stem, metrics in row.items():
            clips_of = len(measured) if stem == "all" else count[stem]
            for metric, entry in metrics.items():
                assert entry["n"] + entry["failed"] == clips_of, (name, metric)
        if name not in ("model_mel", "floor_mean_spectrum"):  # which have no sound
            assert row["all"]["snr_db"]["failed"] == row["bass"]["snr_db"]["failed"] == 1  # no ratio to silence
            assert "silent" in row["bass"]["snr_db"]["reason"] and row["drums"]["snr_db"]["failed"] == 0
            assert set(row["all"]) == {"mel_mse", "mel_mae", "mel_cosine", "mel_spectral_convergence", "snr_db",
                                       "si_sdr_db", "lsd_db"}
        else:
            assert set(row["all"]) == {"mel_mse", "mel_mae", "mel_cosine", "mel_spectral_convergence"}
    json.dumps(rows, allow_nan=False)


def test_ceilings_are_above_the_model_and_the_floor(models, quick):
    measured = [clip for clip in ag.fixed_clips(synthetic().train) if clip[0].stem in ("other", "vocals")][:3]
    rows = {name: row["all"] for name, row in REAL["measure_rows"](models["waveform_vae"], measured).items()}
    assert list(rows) == ROWS["waveform_vae"]

    def median(row, metric):
        return rows[row][metric]["median"]

    for name in CEILINGS:
        assert median(name, "mel_mse") < 0.3 * median(FLOORS[1], "mel_mse")
        assert median(name, "lsd_db") < median(FLOORS[1], "lsd_db")
        assert median(name, "mel_cosine") > 0.9 > 0.1 > median("floor_mean_spectrum", "mel_cosine")
    assert median(CEILINGS[-1], "snr_db") > 20 > 0 > median(CEILINGS[0], "snr_db")
    assert median("model", "snr_db") > 10  # no input phase, no vocoder
    assert median("floor_mean_spectrum", "mel_cosine") == 0


def test_perfect_model_has_no_infinite_ratio(quick, monkeypatch):
    model = prepared("waveform_vae")
    monkeypatch.setattr(model, "encode", lambda audio, frames=None: audio)
    monkeypatch.setattr(model, "decode", lambda audio: audio[:, None])
    row = REAL["measure_rows"](model, ag.fixed_clips(synthetic().test))["model"]["all"]
    assert row["mel_mse"]["mean"] == 0 and row["mel_cosine"]["mean"] == pytest.approx(1, abs=1e-4)
    assert row["lsd_db"]["mean"] == 0
    assert row["snr_db"]["mean"] is None or row["snr_db"]["mean"] > 80  # torchmetrics adds a little to both energies
    json.dumps(row, allow_nan=False)


def test_sound_of_a_whole_file_is_what_is_measured(models, quick):
    """Where the regenerated file is given, its own samples count, those of its last clip too."""
    audio = song(1.5)
    track = ag.Track("a", "file", audio.numpy())
    given = [(*clip, audio + 0.1 * audio.std() * sine(len(audio), 1000) / 0.212) for clip in ag.fixed_clips([track])]
    rows = REAL["measure_rows"](models["waveform_vae"], given)
    assert rows["model"]["all"]["snr_db"]["n"] == 2
    assert rows["model"]["all"]["snr_db"]["mean"] == pytest.approx(20, abs=1.5)
    assert set(rows["model"]) == {"all"}


def test_table_shows_medians(capsys):
    entry = {"mean": 3.0, "median": 1.25, "n": 2, "failed": 1, "reason": "why not"}
    ag.print_rows({"model": {"all": {"snr_db": entry}}, "floor": {"all": {"mel_mse": entry, "snr_db": entry}}}, "all")
    out = capsys.readouterr().out
    assert "1.250" in out and "3.000" not in out and "2 clip" in out and "snr_db: why not" in out
    ag.print_rows({"model": {"all": {}}}, "vocals")
    ag.print_rows({}, "all")
    assert capsys.readouterr().out == ""


# === training ===


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """A run with everything it writes, in the default places."""
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        do_without(patch, path)
        for name in FIGURES:
            patch.setattr(ag, name, REAL[name])
        result = ok("--dataset", "synthetic", "--num_samples", 20, "--epochs", 1, "--crops", 16, "--batch_size", 4,
                    "--width", 16, "--latent_dim", 64, "--device", "cpu", "--precision", "float32")
    return path / "script", result


def wav(path) -> torch.Tensor:
    """A mono 16-bit file at 16 kHz: [L]"""
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def assert_picture(path, least_width: int = 700) -> None:
    """A picture with something on it"""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] >= least_width and pixels.shape[0] >= 200
    assert pixels.std() > 15 and (np.bincount(pixels.flatten()) > 0).sum() > 50


def test_training_writes_everything_it_promises(whole_run):
    home, result = whole_run
    results = home / "results"
    assert (home / "models" / "audio_autoencoder.pt").is_file()
    for name in ("training_curves.png", "spectrogram_comparison.png", "progress/spectrogram_epoch_001.png"):
        assert_picture(results / name)
    for i in range(2):
        ours, true = wav(results / f"audio_reconstructed_{i}.wav"), wav(results / f"audio_original_{i}.wav")
        assert len(ours) == len(true) == CLIP
        assert max(ours.abs().max(), true.abs().max()) < 1
        assert level_db(ours) == pytest.approx(level_db(true), abs=0.1)
        assert true.abs().max() > 0.05
        assert torch.equal(wav(results / "progress" / f"epoch_001_{i}.wav"), ours)
    test_clips = {track.name: ag.cut(track, 0) for track in ag.SyntheticMUSDBDataset({"num_samples": 20}).test}
    originals = [wav(results / f"audio_original_{i}.wav") for i in range(2)]
    for clip in test_clips.values():  # two clips, two files: each of them once
        assert sum(torch.allclose(clip / clip.norm(), other / other.norm(), atol=1e-3) for other in originals) == 1
    assert not list(home.rglob("*.part")) and not list(home.rglob(".write_test"))
    assert "autoencoder" in result.out and "held-out" not in result.err and "synthetic stems" in result.out


def test_records_of_a_run_are_whole_and_in_order(references):
    for family in FAMILIES:
        lines = records(references[family] / "results")
        assert lines == read(references[family] / "model.pt")["history"]
        assert [r["step"] for r in lines] == [6, 6, 10, 12, 12]
        epochs = [r for r in lines if "epoch" in r]
        assert [r["epoch"] for r in epochs] == [1, 2]
        expected = {"mel_mse", "mel_mae", "mel_cosine"} if family in MEL_FAMILIES else {"sdr_db", "kbit_per_second"}
        expected |= {"kl_nats"} if family == "vae" else set()
        for line in epochs:
            assert {name[4:] for name in line if name.startswith("val_")} == expected
            assert line["ms_per_clip"] > 0 and line["seconds"] > 0
        assert all(not isinstance(value, float) or math.isfinite(value) for line in lines for value in line.values())


def test_recorded_losses_are_means_over_their_steps(monkeypatch):
    """Of the steps since the last line, and of all steps of the epoch."""
    losses, original = [], ag.AudioAutoencoder.losses

    def noted(self, batch):
        for player, loss, stats in original(self, batch):
            losses.append(loss.item())
            yield player, loss, stats

    monkeypatch.setattr(ag.AudioAutoencoder, "losses", noted)
    ok(*run_of("autoencoder"))
    spans = [(0, 6), (0, 6), (6, 10), (10, 12), (6, 12)]
    assert [r["loss"] for r in records("results")] == pytest.approx([np.mean(losses[a:b]) for a, b in spans], rel=1e-4)


def test_checkpoint_describes_itself(references):
    for family in FAMILIES:
        state = read(references[family] / "model.pt")
        assert state["format"] == "audio_gen/1" and state["family"] == family
        assert state["config"]["width"] == 16 and state["config"]["epochs"] == 2
        assert state["data"]["dataset"] == "synthetic" and state["data"]["tracks"]["train"] == 8
        assert {"command", "torch", "hardware", "date"} <= state["made"].keys() and finite(state)
        assert state["step"] == STEPS and state["epoch_done"] == 2
        assert not torch.equal(state["ema"]["preprocessor.mean"], torch.zeros(128))
        assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in state["model"])


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_comes_from_the_averaged_weights(family, model_file):
    path = model_file(family)
    state = read(path)
    state["model"] = {key: torch.zeros_like(value) for key, value in state["model"].items()}
    phase = "own" if family == "waveform_vae" else "original"
    audio = song(1)
    model = ag.restore_model(state).eval()
    expected = build(family)
    config = ag.FAMILIES[family].config_class(**state["config"])
    expected = ag.FAMILIES[family](config, state["data"]).eval()
    expected.load_state_dict(state["ema"])
    ours, true = (ag.render_long(m, ag.decode_long(m, audio), phase, audio) for m in (model, expected))
    assert torch.equal(ours, true) and ours.any()


def test_average_of_the_weights_is_the_formula():
    model, data = prepared("autoencoder"), synthetic()
    trainer = ag.Trainer(model, data, ag.World("cpu"), torch.float32, False, Path("m.pt"), Path("."))
    expected = [p.detach().clone().double() for p in model.parameters()]
    for step in range(3):
        trainer.train_step()
        decay = min(model.config.ema_decay, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p.detach().double() for e, p in zip(expected, model.parameters())]
    for found, mean in zip(trainer.averaged.parameters(), expected):
        torch.testing.assert_close(found.double(), mean, rtol=1e-4, atol=1e-6)


def test_rate_warms_up_and_falls_to_zero():
    model = build("autoencoder", epochs=4, crops=320, batch_size=32, warmup_steps=5)
    trainer = ag.Trainer(model, synthetic(), ag.World("cpu"), torch.float32, False, Path("m.pt"), Path("."))
    rates = [trainer._rate(step) for step in range(41)]
    assert rates[0] == pytest.approx(0.2) and rates[4] > 0.9 and rates[40] == pytest.approx(0, abs=1e-9)
    assert all(a < b for a, b in zip(rates[:4], rates[1:5])) and all(a > b for a, b in zip(rates[5:], rates[6:]))
    assert rates[20] == pytest.approx(0.5)


def test_compiled_networks_are_those_that_are_trained(monkeypatch):
    """`--compile` wraps what training calls, and nothing in the checkpoint shows it."""
    calls = []

    def compile_(function, *rest, **options):
        return lambda *a, **k: calls.append(1) or function(*a, **k)

    monkeypatch.setattr(torch, "compile", compile_)
    ok(*run_of("autoencoder"), "--compile")
    assert len(calls) >= STEPS
    plain = read("model.pt")["model"].keys()
    assert plain == build("autoencoder").state_dict().keys()


def test_new_runs_keep_the_models_of_all_earlier_ones(model_file):
    before = model_file().read_bytes()
    quick_run = (*TRAIN, "--epochs", 1, "--crops", 2)
    assert re.search(r"kept as model\.previous\w*\.pt", ok(*quick_run).out)
    second = Path("model.pt").read_bytes()
    ok(*quick_run)
    kept = [path.read_bytes() for path in Path().glob("model.previous*.pt")]
    assert len(kept) == 2 and {before, second} == set(kept)


def test_run_that_can_not_start_leaves_the_last_model_in_its_place(model_file):
    before = model_file().read_bytes()
    result = call(*COMMON, "--dataset", "folder", "--data_root", "missing")
    assert_error(result, 1, "missing")
    assert Path("model.pt").read_bytes() == before and not list(Path().glob("*previous*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_trains(family):
    arguments = [a if a != "float32" else "bfloat16" for a in run_of(family)]
    ok(*arguments, "--epochs", 1)
    assert finite(read("model.pt"))


def test_mel_scale_with_empty_bands_works():
    """400 bands are more than the transform resolves: a warning, and no band of nothing spoils anything. The warning
    comes once, where the number can still be changed."""
    result = ok(*TRAIN, "--n_mels", 400, "--epochs", 1, "--crops", 4)
    assert result.err.count("warning") == result.err.count("21 of 400 mel bands") == 1
    assert finite(read("model.pt"))
    soundfile.write("a.wav", song(0.5).numpy(), RATE)
    for again in (ok(*INFER, "--input", "a.wav"), ok("--resume", *COMMON, "--num_samples", 10, "--epochs", 2)):
        assert "warning" not in again.err and "mel bands" not in again.err
    assert len(wav("results/a_reconstructed.wav")) == CLIP // 2


# === stopping, killing, resuming ===


@pytest.mark.parametrize("family, at", [("autoencoder", 3), ("autoencoder", 6), ("vae", 9), ("waveform_vae", 7)])
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(references, family, at):
    result = stopped(143, *run_of(family), at=at)
    assert "--resume" in result.err
    assert read("model.pt")["step"] == at
    ok(*run_of(family), "--resume")
    assert_same_run(".", references[family])


def test_run_may_be_stopped_again_and_again(references):
    stopped(130, *run_of("vae"), at=1, number=signal.SIGINT)
    stopped(143, *run_of("vae"), "--resume", at=5)
    stopped(130, *run_of("vae"), "--resume", at=10, number=signal.SIGINT)
    ok("--resume", *COMMON, "--num_samples", 10)  # the checkpoint knows all else
    assert_same_run(".", references["vae"])


def test_signal_in_the_last_step_loses_nothing(references):
    """Whether the run still ends as usual or is left to --resume: all of its outputs come to be."""
    run = run_of("autoencoder")
    with signal_after(STEPS):
        result = call(*run)
    assert result.code in (0, 143)
    if result.code:
        ok(*run, "--resume")
    assert_same_run(".", references["autoencoder"])


def test_second_signal_stops_at_once(references, monkeypatch):
    original = ag.Trainer.train_step

    def train_step(self):
        original(self)
        if self.step == 9:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ag.Trainer, "train_step", train_step)
        assert_error(call(*run_of("autoencoder")), 130, "stopped", bars=True)
    assert read("model.pt")["step"] == 8
    ok(*run_of("autoencoder"), "--resume")
    assert_same_run(".", references["autoencoder"])


# In a driver: stand still after step 7 until the signal arrives that this program asks for on stdout.
WAIT_AFTER_7 = """
def train_step(self):
    step(self)
    if self.step == 7:
        os.write(1, b"waiting\\n")
        deadline = time.monotonic() + 120
        while not self.stop.number and time.monotonic() < deadline:
            time.sleep(0.01)
ag.Trainer.train_step = train_step
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130)])
def test_signal_to_the_program_saves_and_stops(references, place, python, number, code):
    process = python(driver(place, WAIT_AFTER_7), *run_of("autoencoder"), cwd=place)
    for line in process.stdout:
        if "waiting" in line:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in err and "--resume" in err
    assert read("model.pt")["step"] == 7
    ok(*run_of("autoencoder"), "--resume")
    assert_same_run(place, references["autoencoder"])


@pytest.mark.parametrize("family, when", [("autoencoder", "step"), ("waveform_vae", "step"), ("vae", "writing")])
def test_killed_run_resumes_from_its_last_checkpoint(references, family, when):
    """kill -9 after step 11, when more is recorded than saved, and in the middle of writing what step 8 has saved."""
    def run():
        train_step, replace, writes = ag.Trainer.train_step, os.replace, itertools.count(1)

        def die_in_step(self):
            if self.step == 11:
                os.kill(os.getpid(), signal.SIGKILL)
            train_step(self)

        def die_in_writing(source, target):
            if str(target).endswith("model.pt") and next(writes) == 4:  # 4, 6, 6 with the record of the epoch, 8
                os.truncate(source, os.path.getsize(source) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        if when == "step":
            ag.Trainer.train_step = die_in_step
        else:
            os.replace = die_in_writing
        return call(*run_of(family)).code

    assert forked(run) == -signal.SIGKILL
    assert read("model.pt")["step"] == (8 if when == "step" else 6)
    if when == "writing":
        assert list(Path().glob(".*.part")), "this test should have left half a file behind"
    soundfile.write("a.wav", song(0.2).numpy(), RATE)
    ok(*INFER, "--input", "a.wav")
    ok(*run_of(family), "--resume")
    assert_same_run(".", references[family])


def test_resume_after_the_end_takes_more_epochs(references, model_file):
    path = model_file()
    before = path.read_bytes()
    assert_error(call(*run_of("autoencoder"), "--resume"), 2, "complete", "--epochs")
    assert path.read_bytes() == before
    ok("--resume", "--epochs", 3, *COMMON, "--num_samples", 10)
    assert read(path)["step"] == 18 and [r["epoch"] for r in records("results") if "epoch" in r] == [1, 2, 3]


@pytest.mark.parametrize("flags", [("--learning_rate", "0.01"), ("--width", "32"), ("--batch_size", "4"),
                                   ("--seed", "1"), ("--latent_dim", "16"), ("--n_mels", "80")])
def test_resume_with_other_options_is_refused(model_file, flags):
    path = model_file()
    before = path.read_bytes()
    assert_error(call("--resume", "--epochs", 3, *COMMON, *flags), 2, flags[0], "new run")
    assert path.read_bytes() == before


def test_resume_on_other_data_or_family_is_refused(model_file):
    model_file()
    assert_error(call("--resume", "--epochs", 3, *COMMON, "--num_samples", 20), 1, "other data", "synthetic")
    assert_error(call("--resume", "--epochs", 3, *COMMON, "--num_samples", 10, "--stem", "bass"), 1, "other data")
    assert_error(call("--resume", "--epochs", 3, *COMMON, "--model", "vae"), 2, "autoencoder", "vae")
    assert_error(call("--resume", "--epochs", 3, *COMMON, "--beta", 2), 2, "--beta", "vae")
    assert_error(call("--resume", "--epochs", 3, *COMMON, "--data_root", "."), 2, "--data_root", "folder")
    assert_error(call("--resume", "--epochs", 3, *COMMON, "--musdb_root", "."), 2, "--musdb_root", "musdb")


def test_resume_knows_how_many_made_up_clips_there_were(place):
    """Also beside those of --extra_root; and the message names the flag where that folder is not the same."""
    write_songs(place / "more", 3)
    more = ("--extra_root", "more")
    for extra in ((), more):
        size = ("--num_samples", 13, "--crops", 4, "--batch_size", 2, "--width", 16, "--latent_dim", 8)
        stopped(143, *COMMON, "--dataset", "synthetic", *size, *extra, "--epochs", 2, at=3)
        ok("--resume", *COMMON, *extra)
        state = read("model.pt")
        assert state["step"] == 4 and sum(state["data"]["tracks"].values()) == 13 + len(extra) // 2 * 3
    assert_error(call("--resume", *COMMON, "--epochs", 3), 1, "other data", "folders", "--num_samples")
    ok("--resume", *COMMON, *more, "--num_samples", 13, "--epochs", 3)
    assert_error(call("--resume", *COMMON, *more, "--num_samples", 14, "--epochs", 4), 1, "--num_samples")


@pytest.mark.parametrize("tracks", [None, {}, {"train": "many"}, {"train": math.nan}, {"train": 10 ** 400}, [3]])
def test_resume_of_a_checkpoint_that_does_not_tell_how_many_is_one_error(tracks, model_file, monkeypatch):
    state = read(model_file())
    state["data"]["tracks"] = tracks
    torch.save(state, "model.pt")
    monkeypatch.setattr(ag, "load_data", lambda given, *_: synthetic())  # not a million clips
    assert_error(call("--resume", *COMMON, "--epochs", 3), 1, "other data")


def test_share_of_the_crops_counts_what_was_before_a_resume(monkeypatch):
    """Half a second of crops before the stop, next to nothing after it."""
    crops = ag.random_crops

    def slow(*rest):
        if rest[1].total == 2:  # not those that the start takes statistics of
            time.sleep(0.1)
        return crops(*rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ag, "random_crops", slow)
        stopped(143, *run_of("autoencoder"), at=5)
    out = ok(*run_of("autoencoder"), "--resume").out
    state = read("model.pt")
    assert 0.5 < state["data_seconds"] < state["seconds"]
    share = float(re.search(r"([\d.]+)% of it on crops", out)[1]) / 100
    assert share == pytest.approx(state["data_seconds"] / state["seconds"], abs=0.002)


def test_curve_of_a_short_run_is_seen(monkeypatch):
    """A line through a single point is no line."""
    figures = []
    monkeypatch.setattr(ag, "save_figure", lambda figure, path: figures.append(figure))
    monkeypatch.setattr(ag, "draw_curves", REAL["draw_curves"])
    ok(*TRAIN, "--epochs", 1)
    loss = figures[0].axes[0]
    assert len(loss.lines[0].get_xdata()) == 1
    loss.get_legend().remove()  # which shows a line of that colour by itself
    canvas = figures[0].canvas
    canvas.draw()
    box = loss.get_window_extent()
    picture = np.asarray(canvas.buffer_rgba())[::-1][int(box.y0):int(box.y1), int(box.x0):int(box.x1), :3].astype(int)
    coloured = np.ptp(picture, axis=2) > 60  # the grid and the frame are grey
    assert coloured.sum() >= 4


def write_songs(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for n in range(count):
        soundfile.write(folder / f"song {n}.wav", song(1 + n / 10, n).numpy(), RATE)
    return folder


def test_resume_on_a_folder_refuses_flags_of_other_data(place):
    write_songs(place / "mine")
    own = (*COMMON, "--dataset", "folder", "--data_root", "mine")
    size = ("--crops", 4, "--batch_size", 2, "--width", 16, "--latent_dim", 8)
    stopped(143, *own, *size, "--epochs", 2, at=3)
    assert_error(call("--resume", *COMMON, "--data_root", "mine", "--num_samples", 20), 2, "--num_samples")
    assert_error(call("--resume", *COMMON, "--data_root", "mine", "--stem", "bass"), 2, "--stem")
    ok("--resume", *COMMON, "--data_root", "mine")
    result = call("--resume", *COMMON, "--data_root", write_songs(place / "others", 4), "--epochs", 3)
    assert_error(result, 1, "other data", "mine")


# === more than one process ===


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_train_the_same_model_and_the_first_alone_writes(place, python, family):
    """With whole clips (--speed 0): what is padded counts by its frames, and less in a batch than in one alone. The
    vae's likelihood has the best variance for the clips of a process, so that it is only alike."""
    port, processes, run = str(free_port()), [], (*run_of(family), "--speed", 0)
    for rank in range(2):
        home = place / f"rank{rank}"
        home.mkdir()
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port}
        processes.append(python(driver(home, ""), *run, cwd=home, env=environment))
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert [path.name for path in (place / "rank1").iterdir()] == ["driver.py"]
    ok(*run)
    found, expected = read("rank0/model.pt"), read("model.pt")
    assert found["step"] == expected["step"] == STEPS
    tolerance = {"autoencoder": 1e-4, "vae": 0.15, "waveform_vae": 2e-3}[family]
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for name in ours.keys() - {"seconds", "ms_per_clip"}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-4), name
    if family != "vae":
        for key, weights in expected["ema"].items():
            assert (found["ema"][key] - weights).norm() <= 0.02 + 0.01 * weights.norm(), key


def test_batch_that_can_not_be_shared_is_a_usage_error():
    world = ag.World("cpu")
    world.size = 3
    with pytest.raises(ag.UserError, match="--batch_size 32.*3 processes") as caught:
        ag.Trainer(build("vae"), synthetic(), world, torch.float32, False, Path("m.pt"), Path("r"))
    assert caught.value.code == 2


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "x"}, {"WORLD_SIZE": "2"}, {"RANK": "1"}],
                         ids=lambda given: " ".join(f"{name}={value}" for name, value in given.items()))
def test_environment_that_torchrun_would_not_make_is_one_error(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_error(call(*TRAIN), 2, "torchrun", "WORLD_SIZE")


@pytest.mark.parametrize("mode", ["infer", "evaluate"])
def test_other_modes_run_in_one_process(mode, monkeypatch, model_file):
    model_file()
    world = ag.World("cpu")
    world.size = 2
    monkeypatch.setattr(ag.World, "wait", lambda self: None)
    monkeypatch.setattr(ag, "World", lambda name: world)
    assert_error(call("--mode", mode, *COMMON), 2, "one process", "torchrun")


# === divergence and full disks ===


def poison(monkeypatch, factor: float, after: int) -> None:
    original, calls = ag.AudioAutoencoder.losses, itertools.count(1)

    def losses(self, batch):
        for player, loss, stats in original(self, batch):
            yield player, loss * (factor if next(calls) > after else 1), stats

    monkeypatch.setattr(ag.AudioAutoencoder, "losses", losses)


@pytest.mark.parametrize("log_every, after, kept, word", [
    (10, 9, 8, "the loss is nan"), (100, 6, 6, "weights are no longer finite"), (1, 2, None, "no checkpoint")])
def test_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(
        log_every, after, kept, word, monkeypatch):
    monkeypatch.setattr(ag, "LOG_EVERY", log_every)
    poison(monkeypatch, math.nan, after)
    assert_error(call(*run_of("autoencoder")), 1, word, "--learning_rate", bars=True)
    if kept:
        assert read("model.pt")["step"] == kept and finite(read("model.pt"))
    else:
        assert not Path("model.pt").exists()
    assert all(math.isfinite(line["loss"]) for line in records("results"))
    assert not list(Path().rglob("*.part"))


def test_resume_after_divergence_starts_from_the_last_good_checkpoint(references):
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, math.nan, 9)
        call(*run_of("autoencoder"))
    ok(*run_of("autoencoder"), "--resume")
    assert_same_run(".", references["autoencoder"])


def test_exploding_loss_stops_the_run(monkeypatch):
    poison(monkeypatch, 1e6, 8)
    assert_error(call(*run_of("autoencoder")), 1, "the loss rose", "--learning_rate", bars=True)
    assert finite(read("model.pt"))


@pytest.mark.parametrize("family", FAMILIES)
def test_gigantic_rate_is_one_error_and_no_useless_checkpoint(family, model_file):
    before = model_file(family).read_bytes()
    result = call(*run_of(family), "--learning_rate", 1e30, "--warmup_steps", 0)
    assert_error(result, 1, "diverged", "--learning_rate", bars=True)
    assert any(path.read_bytes() == before for path in Path().glob("*.pt"))
    for line in records("results"):
        assert all(not isinstance(value, float) or math.isfinite(value) for value in line.values())


def test_full_disk_keeps_the_last_checkpoint(references):
    """The disk is full from step 7 on; space comes back, and the run goes on as if nothing had been."""
    original, limits = ag.Trainer.train_step, contextlib.ExitStack()

    def train_step(self):
        original(self)
        if self.step == 7:
            limits.enter_context(disk_of(500_000))

    with pytest.MonkeyPatch.context() as patch, limits:
        patch.setattr(ag.Trainer, "train_step", train_step)
        result = call(*run_of("autoencoder"))
    assert_error(result, 1, "can't write", "model.pt", "space", bars=True)
    assert read("model.pt")["step"] == 6 and not list(Path().rglob("*.part"))
    ok(*run_of("autoencoder"), "--resume")
    assert_same_run(".", references["autoencoder"])


def test_full_disk_while_recording_loses_nothing(references):
    """A line of metrics.jsonl that is cut in the middle is written again."""
    original = ag.Trainer.record

    def record(self, **values):
        limit = Path("results/metrics.jsonl").stat().st_size + 20
        with disk_of(limit) if self.step == 10 else contextlib.nullcontext():
            original(self, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ag.Trainer, "record", record)
        assert_error(call(*run_of("autoencoder")), 1, "File too large", bars=True)
    assert read("model.pt")["step"] == 8 and not Path("results/metrics.jsonl").read_text().endswith("\n")
    ok(*run_of("autoencoder"), "--resume")
    assert_same_run(".", references["autoencoder"])


@pytest.mark.parametrize("take", [lambda: torch.empty(1 << 58), lambda: np.empty(1 << 58)], ids=["torch", "numpy"])
@pytest.mark.parametrize("family", FAMILIES[:1])
def test_memory_that_is_not_enough_is_one_error_with_a_remedy(family, take, model_file, monkeypatch):
    """What torch and numpy really say when there is none: neither is torch.OutOfMemoryError."""
    model_file(family)
    soundfile.write("a.wav", song(0.1).numpy(), RATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ag, "decode_long", lambda *_: take())
        assert_error(call(*INFER, "--input", "a.wav"), 1, "out of memory", "shorter files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ag, "measure_rows", lambda *_, **__: take())
        assert_error(call(*EVALUATE, "--dataset", "synthetic", "--num_samples", 5), 1, "out of memory", "programs")
    monkeypatch.setattr(ag.Trainer, "batch", lambda self: take())
    result = call(*run_of(family))
    assert_error(result, 1, "out of memory", "--batch_size", bars=True)
    assert "--device cpu" not in result.err  # where it is already


def test_memory_of_the_gpu_names_the_cpu_and_other_errors_stay_what_they_are(monkeypatch):
    def fail(error):
        def losses(self, batch):
            raise error
        return losses

    monkeypatch.setattr(ag.AudioAutoencoder, "losses", fail(torch.OutOfMemoryError("CUDA out of memory")))
    assert_error(call(*run_of("autoencoder")), 1, "out of memory", "--batch_size", "--device cpu", bars=True)
    monkeypatch.setattr(ag.AudioAutoencoder, "losses", fail(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        call(*run_of("autoencoder"))


@pytest.mark.parametrize("flags", [(*INFER, "--input", "a.wav"), ("--help",)], ids=["infer", "help"])
def test_reader_that_has_gone_ends_the_program_quietly(flags, model_file, place, python):
    """`audio_gen.py ... | head -1`"""
    model_file("waveform_vae")
    soundfile.write("a.wav", song(0.1).numpy(), RATE)
    process = python(driver(place, "ag.measure_rows = lambda *a: {}"), *flags, cwd=place, env={"PYTHONUNBUFFERED": ""})
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=300)
    assert err == "" and process.returncode in (0, 128 + signal.SIGPIPE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_can_not_be_written_is_one_error(model_file, place):
    model_file("waveform_vae")
    soundfile.write("a.wav", song(0.1).numpy(), RATE)
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, driver(place, "ag.measure_rows = lambda *a: {}"), *INFER, "--input",
                                  "a.wav"], stdout=full, cwd=place, stderr=subprocess.PIPE, text=True, timeout=300)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert len(process.stderr.splitlines()) == 1 and "No space left" in process.stderr


@pytest.mark.parametrize("name", ["metrics.jsonl", "epoch_001_0.wav", "audio_reconstructed_0.wav"])
def test_full_disk_at_any_other_file_is_one_error_line(name, monkeypatch):
    real = os.replace

    def replace(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    result = call(*run_of("autoencoder"))
    monkeypatch.undo()
    assert_error(result, 1, "can't write", name, bars=True)
    assert not list(Path().rglob("*.part"))


# === hostile checkpoints ===


class Payload:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return (open, (str(Path("pwned").absolute()), "w"))


def write_hostile(kind: str, whole: Path) -> None:
    path, state = Path("model.pt"), read(whole)
    if kind == "truncated":
        path.write_bytes(whole.read_bytes()[:-5000])
    elif kind == "cut early":
        path.write_bytes(whole.read_bytes()[:1000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are not the weights\n" * 50)
    elif kind == "foreign":
        torch.save({}, path)
    elif kind == "weights only":
        torch.save(state["ema"], path)
    elif kind == "pickled object":
        torch.save({"format": state["format"], "payload": Payload()}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif kind == "directory":
        path.mkdir()
    elif kind == "images":
        torch.save(state | {"format": "image_gen/1"}, path)
    elif kind == "other version":
        torch.save(state | {"format": "audio_gen/0"}, path)
    elif kind == "unknown family":
        torch.save(state | {"family": "gan"}, path)
    elif kind == "not a number":
        state["ema"]["decoder.0.weight"][0] = math.nan
        torch.save(state, path)
    elif kind == "other family":
        torch.save(state | {"family": "vae"}, path)
    elif kind == "other size":
        torch.save(state | {"config": state["config"] | {"width": 32}}, path)
    elif kind == "odd size":
        torch.save(state | {"config": state["config"] | {"width": 20}}, path)
    elif kind == "no data":
        torch.save(state | {"data": {}}, path)


HOSTILE = {"missing": "--mode train", "truncated": "train again", "cut early": "model.pt", "empty": "train again",
           "text": "model.pt", "foreign": "--checkpoint", "weights only": "--checkpoint",
           "pickled object": "--checkpoint", "plain pickle": "--checkpoint", "directory": "Is a",
           "images": "image_gen/1", "other version": "audio_gen/0", "unknown family": "gan",
           "not a number": "not finite", "other family": "description", "other size": "description",
           "odd size": "--width", "no data": "digest"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoint_is_one_error_line_and_never_run(kind, references):
    write_hostile(kind, references["autoencoder"] / "model.pt")
    for command in (INFER, (*EVALUATE, "--dataset", "synthetic"), ("--resume", *COMMON)):
        result = call(*command)
        assert result.code in (1, 2)
        assert_error(result, result.code, HOSTILE[kind])
    assert not Path("pwned").exists()


def mutilated(state: dict):
    """Checkpoints in the right format that lack or garble one of their parts."""
    for key in state:
        if key != "format":
            yield f"no {key}", {k: v for k, v in state.items() if k != key}
    for key, value in {"data": {}, "config": {"width": 7}, "family": ["vae"], "ema": {}, "history": None}.items():
        yield f"{key} {value}", state | {key: value}
    yield "config unknown", state | {"config": state["config"] | {"nonsense": 1}}
    yield "config type", state | {"config": state["config"] | {"width": "many"}}
    yield "config sign", state | {"config": state["config"] | {"latent_dim": -1}}


def test_checkpoint_that_lacks_a_part_never_ends_in_a_traceback(references):
    state = read(references["autoencoder"] / "model.pt")
    soundfile.write("a.wav", song(0.1).numpy(), RATE)
    for what, broken in mutilated(state):
        torch.save(broken, "model.pt")
        for command in ((*INFER, "--input", "a.wav", "--phase", "original"),
                        ("--resume", "--epochs", 7, *COMMON, "--num_samples", 10)):
            try:
                with signal_after(STEPS + 1):
                    result = call(*command)
            except Exception as error:
                raise AssertionError(f"{what}: {command} ended in {error!r}") from error
            if result.code not in (0, 143):
                assert result.code in (1, 2), what
                assert_error(result, result.code)


def test_weights_of_an_export_can_be_used_but_not_continued(model_file):
    whole = model_file()
    soundfile.write("a.wav", song(0.5).numpy(), RATE)
    ok(*INFER, "--input", "a.wav", "--export", "slim.pt")
    expected = wav("results/a_reconstructed.wav")
    assert Path("slim.pt").stat().st_size < whole.stat().st_size / 4
    assert "optimizers" not in read("slim.pt") and read("slim.pt")["made"] == read(whole)["made"]
    weights = dict(ag.restore_model(read(whole)).named_parameters())
    assert {value.dtype for name, value in read("slim.pt")["ema"].items() if name in weights} == {torch.float16}
    assert len(read("slim.pt")["history"]) == 1 and read("slim.pt")["history"][0]["epoch"] == 2
    result = call("--resume", "--epochs", 9, *COMMON, "--checkpoint", "slim.pt")
    assert_error(result, 1, "averaged weights", "--mode train")
    ok(*INFER, "--input", "a.wav", "--checkpoint", "slim.pt")
    found = wav("results/a_reconstructed.wav")
    assert level_db(found) == pytest.approx(level_db(expected), abs=0.2)


@pytest.mark.parametrize("kind", ["itself", "absolute", "another way", "link", "read through a link"])
def test_export_never_replaces_the_checkpoint_that_it_reads(kind, model_file):
    path = model_file("waveform_vae")
    before, flags = path.read_bytes(), ("--checkpoint", "model.pt")
    Path("folder").mkdir()
    Path("link.pt").symlink_to("model.pt")
    soundfile.write("a.wav", song(0.1).numpy(), RATE)
    target = {"itself": "model.pt", "absolute": path, "another way": "folder/../model.pt", "link": "link.pt",
              "read through a link": "model.pt"}[kind]
    if kind == "read through a link":
        flags = ("--checkpoint", "link.pt")
    assert_error(call(*INFER, *flags, "--input", "a.wav", "--export", target), 2, "--export", "another file")
    assert path.read_bytes() == before and Path("link.pt").is_symlink()
    ok(*INFER, *flags, "--input", "a.wav", "--export", "new.pt")
    ok(*INFER, *flags, "--input", "a.wav", "--export", "new.pt")  # any other file may be written again


# === the command line: regenerating ===


def quick_metrics(monkeypatch) -> None:
    monkeypatch.setattr(ag, "WAVE_METRICS", QUICK)
    monkeypatch.setattr(ag, "measure_rows", REAL["measure_rows"])


def test_examples_are_regenerated_measured_and_drawn(model_file, place, monkeypatch):
    """Without --input: the two shipped examples, with everything that comes of them."""
    model_file("waveform_vae")
    quick_metrics(monkeypatch)
    monkeypatch.setattr(ag, "inference_figure", REAL["inference_figure"])
    monkeypatch.setattr(ag, "EXAMPLES", place / "examples")
    (place / "examples").mkdir()
    for n, name in enumerate(("one", "two")):
        soundfile.write(f"examples/{name}.flac", song(0.8, n).numpy(), RATE)
    out = ok(*INFER).out
    assert sorted(os.listdir("results")) == ["audio_original_0.wav", "audio_original_1.wav",
                                             "audio_reconstructed_0.wav", "audio_reconstructed_1.wav",
                                             "inference.json", "inference_comparison.png"]
    for n in range(2):
        ours, true = wav(f"results/audio_reconstructed_{n}.wav"), wav(f"results/audio_original_{n}.wav")
        assert len(ours) == len(true) == int(0.8 * CLIP)
        assert max(ours.abs().max(), true.abs().max()) < 1 and level_db(ours) == pytest.approx(level_db(true), abs=0.1)
        assert snr(ours, true) > 5
        torch.testing.assert_close(true, song(0.8, n), rtol=0, atol=1e-4)
    assert_picture("results/inference_comparison.png")
    report = read_json("results/inference.json")
    assert list(report["rows"]) == ROWS["waveform_vae"]
    assert report["rows"]["model"]["all"]["snr_db"]["n"] == 2 and report["latent_numbers_per_second"] == 400
    assert "x real time" in out and "ceiling_true_mel_griffinlim" in out and "own" in out


def test_every_metric_of_a_file_is_in_its_report(model_file, monkeypatch):
    """All of them, PESQ and STOI where they are installed; None and NaN become null with a reason."""
    model_file("waveform_vae")
    monkeypatch.setattr(ag, "measure_rows", REAL["measure_rows"])
    soundfile.write("a.wav", np.concatenate([song(0.5).numpy(), np.zeros(CLIP)]), RATE)
    ok(*INFER, "--input", "a.wav")
    report = read_json("results/inference.json")
    assert set(report["rows"]["model"]["all"]) == set(ag.METRICS)
    for row in report["rows"].values():
        for entry in row["all"].values():
            assert entry["n"] + entry["failed"] == 2
            assert (entry["mean"] is None) == (entry["n"] == 0) and ("reason" in entry) == (entry["failed"] > 0)
    assert report["rows"]["model"]["all"]["snr_db"]["failed"] == 1  # the second clip is silent


@pytest.mark.parametrize("family", MEL_FAMILIES)
@pytest.mark.parametrize("phase", ag.PHASES)
def test_phase_is_the_one_that_was_asked_for_and_is_told(family, phase, model_file, monkeypatch, drawn):
    model_file(family)
    used, to_audio = [], ag.AudioPreprocessor.to_audio
    monkeypatch.setattr(ag.AudioPreprocessor, "to_audio",
                        lambda self, mel, length, phase, *rest: used.append(phase) or to_audio(
                            self, mel, length, phase, *rest))
    soundfile.write("a.wav", song(0.05).numpy(), RATE)
    result = ok(*INFER, "--input", "a.wav", "--phase", phase)
    assert used == [phase] and f"phase: {phase}" in result.out
    assert phase in drawn["inference_figure"][0][1]  # the title of the picture
    assert read_json("results/inference.json")["phase"] == phase


@pytest.mark.parametrize("phase", ag.PHASES)
def test_figures_of_a_phase_stand_in_its_own_row(phase, model_file, monkeypatch):
    """Whatever --phase made the file: each row has what its own phase gives. (The file is one clip long, so that the
    whole file and its only clip have the same sound.)"""
    model = ag.restore_model(read(model_file())).eval()
    quick_metrics(monkeypatch)
    soundfile.write("a.wav", song(1).numpy(), RATE, subtype="FLOAT")
    audio = ag.read_audio(Path("a.wav"))
    ok(*INFER, "--input", "a.wav", "--phase", phase)
    rows = read_json("results/inference.json")["rows"]
    assert list(rows) == ROWS["autoencoder"]
    decoded = model.decode(model.encode(audio[None]))
    for each in ag.PHASES:
        expected = model.render(decoded, each, audio[None])[0]
        assert rows[f"model_{each}"]["all"]["snr_db"]["mean"] == pytest.approx(snr(expected, audio), abs=1e-3)
        assert rows[f"model_{each}"]["all"]["lsd_db"]["mean"] == pytest.approx(ag.lsd_db(expected, audio).item(), 1e-4)
    assert rows["model_original"]["all"]["snr_db"]["mean"] > rows["model_griffinlim"]["all"]["snr_db"]["mean"] + 0.5


@pytest.mark.parametrize("phase", ag.PHASES)
def test_sound_of_a_whole_file_stands_for_its_phase_alone(phase, models, quick):
    track = ag.Track("a", "file", song(1).numpy())
    plain, given = (REAL["measure_rows"](models["vae"], [clip], phase)
                    for clip in ((track, 0), (track, 0, song(1) + 0.01 * sine(CLIP, 1000))))
    assert [name for name in plain if plain[name] != given[name]] == [f"model_{phase}"]


def test_phase_of_the_input_is_called_an_upper_bound_wherever_it_is_named(model_file, monkeypatch):
    words = "an upper bound, not the model's result"
    model_file()
    titles, new_figure = [], ag.new_figure
    monkeypatch.setattr(ag, "new_figure", lambda *a: titles.append(a[2]) or new_figure(*a))
    monkeypatch.setattr(ag, "inference_figure", REAL["inference_figure"])
    quick_metrics(monkeypatch)
    soundfile.write("a.wav", song(0.1).numpy(), RATE)
    for phase in ("original", "griffinlim"):
        out = ok(*INFER, "--input", "a.wav", "--phase", phase).out
        line = next(line for line in out.splitlines() if "x real time" in line)
        assert (words in line) == (words in titles.pop()) == (phase == "original")
        assert words in next(line for line in out.splitlines() if "..._original" in line)  # the rows of the table
        assert words in read_json("results/inference.json")["original_phase"]
    ok(*EVALUATE, "--dataset", "synthetic", "--num_samples", 5, "--eval_clips", 1)
    assert words in read_json("results/evaluation.json")["original_phase"]


def test_title_is_no_wider_than_its_picture():
    """Of one file, with all that has to be said."""
    title = f"autoencoder · 3.125 numbers/s · trained on MUSDB18 (vocals) · {ag.phase_note('original')}"
    for columns in (1, 2):
        figure, _ = ag.new_figure(4, columns, title)
        figure.canvas.draw()
        box = figure._suptitle.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and " ".join(figure._suptitle.get_text().split()) == title
        ag.save_figure(figure, Path("a.png"))


def test_own_files_keep_name_and_length(model_file, place):
    model_file("waveform_vae")
    (place / "deep").mkdir()
    sounds = {"one.wav": (1, RATE, 1), "slow.wav": (8001, 8000, 1), "fast.flac": (96_000, 192_000, 2),
              "deep/six.wav": (22_050, 44_100, 6), "loud.wav": (20_000, RATE, 1), "name.with.dots.wav": (5000, RATE, 1)}
    for name, (length, rate, channels) in sounds.items():
        data = np.random.default_rng(0).normal(0, 0.1 if name != "loud.wav" else 3, (length, channels))
        soundfile.write(name, data, rate, subtype="FLOAT" if name == "loud.wav" else None)
    ok(*INFER, "--input", *sounds, "--output_dir", "out")
    assert sorted(os.listdir("out")) == sorted(f"{Path(name).stem}_reconstructed.wav" for name in sounds)
    for name, (length, rate, _) in sounds.items():
        found = wav(f"out/{Path(name).stem}_reconstructed.wav")
        assert len(found) == math.ceil(length * RATE / rate), name
        assert torch.isfinite(found).all() and found.abs().max() < 1
    assert sorted(os.listdir("results")) == ["inference.json"]  # the picture is not drawn here


@pytest.mark.parametrize("kind, word", [
    ("missing", "no file"), ("folder", "folder"), ("text", "can't be read"), ("empty", "can't be read"),
    ("no samples", "no samples"), ("nan", "NaN"), ("infinite", "NaN or infinite"), ("cut", "can't be read")])
def test_bad_input_is_one_error_line(kind, word, model_file, place):
    model_file("waveform_vae")
    soundfile.write("good.wav", song(0.1).numpy(), RATE)
    path = place / "bad.wav"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("this is not a sound\n" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(Path("good.wav").read_bytes()[:30])
    elif kind != "missing":
        data = np.zeros(0 if kind == "no samples" else 1000, np.float32)
        if kind in ("nan", "infinite"):
            data[500] = math.nan if kind == "nan" else math.inf
        soundfile.write(path, data, RATE, subtype="FLOAT")
    assert_error(call(*INFER, "--input", "good.wav", "bad.wav"), 1, "bad.wav", word)
    assert_error(call("--mode", "infer", *COMMON, "--input", "bad.wav"), 1, "bad.wav")


def test_files_that_would_overwrite_each_other_are_refused(model_file, place):
    model_file("waveform_vae")
    (place / "b").mkdir()
    for name in ("a.wav", "b/a.wav", "a.flac", "a_reconstructed.wav"):
        soundfile.write(name, song(0.05).numpy(), RATE)
    before = Path("a_reconstructed.wav").read_bytes()
    for second in ("b/a.wav", "a.flac", "a.wav"):
        assert_error(call(*INFER, "--input", "a.wav", second), 2, "a_reconstructed.wav", "--output_dir")
    result = call(*INFER, "--input", "a.wav", "a_reconstructed.wav", "--output_dir", ".")
    assert_error(result, 2, "both an input and an output", "--output_dir")
    assert Path("a_reconstructed.wav").read_bytes() == before
    ok(*INFER, "--input", "a.wav", "a_reconstructed.wav", "--output_dir", "out")
    assert sorted(os.listdir("out")) == ["a_reconstructed.wav", "a_reconstructed_reconstructed.wav"]


def test_wrong_network_output_is_one_error(model_file, monkeypatch):
    model_file("waveform_vae")
    soundfile.write("a.wav", song(0.1).numpy(), RATE)
    monkeypatch.setattr(ag.WaveformVAE, "decode", lambda self, code: torch.full((1, 1, CLIP), math.nan))
    assert_error(call(*INFER, "--input", "a.wav"), 1, "a.wav", "not finite", "--precision")
    assert not Path("results/a_reconstructed.wav").exists()


def test_missing_checkpoint_falls_back_on_shipped_weights_only_when_none_was_named(references, place):
    common = ("--mode", "infer", "--device", "cpu", "--precision", "float32", "--results_dir", "results")
    soundfile.write("a.wav", song(0.1).numpy(), RATE)
    assert_error(call(*common, "--input", "a.wav"), 1, "no waveform_vae model yet", "--mode train", "--checkpoint")
    for family in FAMILIES:
        name = ag.FAMILIES[family].checkpoint_name
        (place / "script" / "pretrained").mkdir(parents=True, exist_ok=True)
        shutil.copy(references[family] / "model.pt", place / "script" / "pretrained" / name)
    assert "shipped weights" in (out := ok(*common, "--input", "a.wav").out) and "waveform_vae" in out
    for family in FAMILIES:
        out = ok(*common, "--model", family, "--input", "a.wav").out
        assert "shipped weights" in out and out.startswith(family + " ")
    (place / "script" / "models").mkdir()
    shutil.copy(references["vae"] / "model.pt", place / "script" / "models" / "audio_vae.pt")
    out = ok(*common, "--model", "vae", "--input", "a.wav").out
    assert "shipped" not in out and "audio_vae.pt" in out
    assert_error(call(*common, "--checkpoint", "named.pt"), 1, "named.pt", "--mode train")
    assert_error(call(*common, "--model", "vae", "--checkpoint", "named.pt"), 1, "named.pt")


def test_samples_from_the_prior(model_file, drawn):
    model_file("vae")
    sounds = []
    for flags in ((), (), ("--seed", 5)):
        ok(*INFER, "--sample", 2, *flags)
        sounds.append([wav(f"results/sample_{n}.wav") for n in range(2)])
    assert all(len(sound) == CLIP and sound.any() and sound.abs().max() < 1 for pair in sounds for sound in pair)
    assert torch.equal(sounds[0][0], sounds[1][0]) and torch.equal(sounds[0][1], sounds[1][1])
    assert not torch.equal(sounds[0][0], sounds[0][1]) and not torch.equal(sounds[0][0], sounds[2][0])
    path, _, columns = drawn["strip_figure"][0]
    assert path.name == "samples.png" and [name for name, _ in columns] == ["sample 0", "sample 1"]


@pytest.mark.parametrize("family", MEL_FAMILIES)
def test_interpolation_goes_from_a_to_b(family, model_file, drawn):
    path = model_file(family)
    model = ag.restore_model(read(path)).eval()
    sounds = {"a.wav": song(1), "b.wav": song(0.6, 3)}
    for name, audio in sounds.items():
        soundfile.write(name, audio.numpy(), RATE, subtype="FLOAT")
    ok(*INFER, "--interpolate", "a.wav", "b.wav")
    assert len(wav("results/interpolation.wav")) == 5 * CLIP
    _, _, columns = drawn["strip_figure"][0]
    assert len(columns) == 5
    for (_, mel), audio in zip((columns[0], columns[-1]), sounds.values()):
        expected = model.decode(model.encode(F.pad(audio, (0, CLIP - len(audio)))[None]))
        expected = model.preprocessor.unstandardise(expected)[0]
        torch.testing.assert_close(mel, expected, rtol=1e-3, atol=1e-3)
    steps = [(after - before).square().mean().item() for (_, before), (_, after) in itertools.pairwise(columns)]
    whole = (columns[-1][1] - columns[0][1]).square().mean().item()
    assert all(0 < step < whole for step in steps)
    ok(*INFER, "--interpolate", "a.wav", "a.wav")
    _, _, columns = drawn["strip_figure"][1]
    assert all(torch.allclose(mel, columns[0][1], atol=1e-4) for _, mel in columns)


def test_strip_is_drawn(model_file, monkeypatch):
    model_file("vae")
    monkeypatch.setattr(ag, "strip_figure", REAL["strip_figure"])
    ok(*INFER, "--sample", 2)
    assert_picture("results/samples.png", 500)


@pytest.mark.parametrize("family, flags, words", [
    ("autoencoder", ("--sample", 2), ("--model vae",)), ("waveform_vae", ("--sample", 2), ("--model vae",)),
    ("waveform_vae", ("--interpolate", "a.wav", "a.wav"), ("autoencoder or vae",)),
    ("vae", ("--sample", 2, "--phase", "original"), ("--phase original",)),
    ("vae", ("--interpolate", "a.wav", "a.wav", "--phase", "original"), ("--phase original",)),
    ("vae", ("--sample", 2, "--input", "a.wav"), ("different tasks",)),
    ("vae", ("--interpolate", "a.wav", "a.wav", "--sample", 1), ("different tasks",)),
    ("vae", ("--sample", 2, "--output_dir", "x"), ("--output_dir",)),
    ("vae", ("--interpolate", "a.wav"), ("--interpolate",)), ("vae", ("--sample", 0), ("--sample",)),
    ("vae", ("--input",), ("--input",)), ("vae", ("--input", "a.wav", "--seed", 3), ("--seed",)),
    *(("waveform_vae", ("--input", "a.wav", "--phase", phase), ("--phase", "own phase")) for phase in ag.PHASES)])
def test_task_that_a_model_can_not_do_is_a_usage_error(family, flags, words, model_file):
    model_file(family)
    soundfile.write("a.wav", song(0.1).numpy(), RATE)
    assert_error(call(*INFER, *flags), 2, *words)
    assert not list(Path().glob("results/*.wav"))


def test_messages_call_a_model_by_its_name(model_file):
    model_file("autoencoder")
    assert "--sample: an autoencoder model has no prior" in call(*INFER, "--sample", 1).err
    assert "holds an autoencoder model, not --model vae" in call(*INFER, "--model", "vae").err
    assert "holds an autoencoder model" in call("--resume", *COMMON, "--model", "vae").err
    model_file("waveform_vae")
    assert "--sample: a waveform_vae model has no prior" in call(*INFER, "--sample", 1).err


def test_interpolation_between_missing_files_is_one_error(model_file):
    model_file("vae")
    result = call(*INFER, "--interpolate", "a.wav", "b.wav")
    assert_error(result, 1, "no file a.wav: give audio files with --interpolate")


# === what is shipped ===


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_weights_regenerate_the_shipped_examples(family):
    """Small files without an optimizer or a path of the machine that made them, and better than their floors."""
    path = SCRIPT.parent / "pretrained" / ag.FAMILIES[family].checkpoint_name
    examples = sorted((SCRIPT.parent / "examples").glob("*.flac"))
    if not path.exists() or not examples:
        pytest.skip("not shipped yet")
    state = ag.open_checkpoint(path)
    assert state["family"] == family and "optimizers" not in state and path.stat().st_size < 20e6
    assert not re.search(r"(^|[\s'\"=])/\w+/", json.dumps([state["made"], state["data"]]))
    assert state["history"] and len(examples) == 2
    model = ag.restore_model(state).eval()
    for example in examples:
        audio = ag.read_audio(example)[:CLIP]
        decoded = ag.decode_long(model, audio)
        if family == "waveform_vae":
            assert snr(decoded[0, 0, :len(audio)], audio) > 12
        else:
            mel = model.log_mel(F.pad(audio, (0, -len(audio) % HOP))[None])
            assert (decoded - mel).square().mean() < 0.5 * mel.square().mean()


# === the command line: evaluation ===


def test_evaluation_is_whole_and_repeatable(model_file, monkeypatch):
    path = model_file("autoencoder")
    quick_metrics(monkeypatch)
    run = (*EVALUATE, "--dataset", "synthetic", "--num_samples", 20, "--eval_clips", 2)
    out = ok(*run).out
    report = read_json("results/evaluation.json")
    assert report["checkpoint_sha256"] == ag.file_digest(path) and report["clips"] == report["tracks"] == 2
    assert report["split"] == "test" and report["dataset"] == "synthetic stems" == report["trained_on"]
    assert list(report["rows"]) == ROWS["autoencoder"] and set(report["metrics"]) == set(ag.METRICS)
    assert all(entry.keys() == {"unit", "better", "definition"} for entry in report["metrics"].values())
    assert set(report["rows"]["model_original"]) == {"all", "mixture", "drums"}
    assert report["rows"]["model_original"]["all"]["snr_db"]["n"] == 2
    for row in ROWS["autoencoder"]:
        assert row in out
    ok(*run)
    assert read_json("results/evaluation.json")["rows"] == report["rows"]
    ok(*EVALUATE, "--dataset", "synthetic", "--num_samples", 20, "--eval_clips", 1)
    assert read_json("results/evaluation.json")["clips"] == 1


def test_evaluation_without_its_data_is_one_error(model_file):
    model_file()
    assert_error(call(*EVALUATE, "--musdb_root", "nowhere"), 1, "nowhere", "--musdb_root")
    assert_error(call(*EVALUATE, "--dataset", "folder"), 2, "--data_root")


# === wrong use of the command line ===

USAGE = [
    (("--epochs", "0"), "--epochs"), (("--epochs", "1.5"), "--epochs"), (("--epochs", "many"), "--epochs"),
    (("--batch_size", "0"), "--batch_size"), (("--crops", "0"), "--crops"), (("--latent_dim", "0"), "--latent_dim"),
    (("--latent_dim", "-4"), "--latent_dim"), (("--n_mels", "7"), "--n_mels"), (("--n_mels", "514"), "--n_mels"),
    (("--width", "20"), "--width"), (("--learning_rate", "0"), "--learning_rate"),
    (("--learning_rate", "nan"), "--learning_rate"), (("--learning_rate", "inf"), "--learning_rate"),
    (("--seed", "-1"), "--seed"), (("--seed", "99999999999999999999999"), "--seed"),
    (("--num_samples", "2"), "--num_samples"), (("--num_samples", "0"), "--num_samples"),
    (("--ema_decay", "1.5"), "--ema_decay"), (("--latent_dropout", "1"), "--latent_dropout"),
    (("--mode", "draw"), "infer"), (("--model", "gan"), "waveform_vae"), (("--dataset", "mnist"), "folder"),
    (("--stem", "guitar"), "vocals"), (("--device", "gpu"), "cuda:N"), (("--device", "cuda:x"), "cuda:N"),
    (("--precision", "float16"), "bfloat16"), (("--epoch", "3"), "--epoch"), (("--nonsense",), "--nonsense"),
    (("--learning-rate", "1"), "--learning-rate"), (("stray",), "stray"), (("--epochs",), "--epochs"),
    (("--phase", "vocoder"), "pghi"), (("--musdb", "all"), "sample"),
    # of another family
    (("--beta", "1"), "vae"), (("--latent_frames", "16"), "vae"), (("--free_bits", "1"), "vae"),
    (("--kl_warmup", "0"), "vae"), (("--atoms", "32"), "waveform_vae"), (("--blocks", "1"), "waveform_vae"),
    (("--spectral_weight", "1"), "waveform_vae"), (("--model", "vae", "--latent_dropout", "0.1"), "autoencoder"),
    (("--model", "vae", "--atoms", "32"), "waveform_vae"), (("--model", "waveform_vae", "--beta", "x"), "--beta"),
    (("--model", "waveform_vae", "--latent_frames", "16"), "vae"),
    (("--model", "vae", "--latent_frames", "7"), "1, 16, 32"), (("--model", "waveform_vae", "--latent_dim", "1"), "2"),
    (("--model", "waveform_vae", "--latent_dim", "321"), "320"), (("--model", "vae", "--width", "9"), "multiple of 8"),
    # of another mode
    (("--input", "a.wav"), "infer"), (("--interpolate", "a", "b"), "infer"), (("--sample", "1"), "infer"),
    (("--output_dir", "x"), "infer"), (("--export", "x"), "infer"), (("--phase", "pghi"), "infer"),
    (("--eval_clips", "3"), "evaluate"),
    # of another dataset
    (("--musdb_root", "x"), "--dataset musdb"), (("--data_root", "x"), "--dataset folder"),
    (("--dataset", "folder"), "--data_root"), (("--dataset", "folder", "--stem", "bass"), "--stem"),
    (("--dataset", "folder", "--data_root", ".", "--num_samples", "9"), "--dataset synthetic"),
    (("--dataset", "musdb", "--num_samples", "9"), "--dataset synthetic"), (("--musdb", "full"), "--dataset musdb"),
    (("--dataset", "musdb", "--musdb", "full"), "--prepare_data"),
]


@pytest.mark.parametrize("flags, word", USAGE, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_wrong_flag_is_a_usage_error(flags, word, monkeypatch):
    monkeypatch.setattr(ag.Trainer, "train_step", lambda self: pytest.fail("training started"))
    assert_error(call("--dataset", "synthetic", *COMMON, *flags), 2, word)
    assert not Path("model.pt").exists()


@pytest.mark.parametrize("mode", ["infer", "evaluate"])
@pytest.mark.parametrize("flags, word", [
    (("--epochs", "3"), "--mode train"), (("--batch_size", "3"), "--mode train"), (("--latent_dim", "3"), "fixes it"),
    (("--width", "16"), "fixes it"), (("--n_mels", "80"), "fixes it"), (("--resume",), "--mode train"),
    (("--compile",), "--mode train"), (("--prepare_data",), "--mode train"), (("--extra_root", "."), "--mode train"),
    (("--model", "vae"), "autoencoder"), (("--beta", "1"), "--beta"), (("--nonsense",), "--nonsense"),
    (("--crops", "5"), "--crops"), (("--seed", "1"), "--seed")])
def test_flag_that_a_trained_model_can_not_honour_is_a_usage_error(mode, flags, word, model_file):
    model_file()
    assert_error(call("--mode", mode, *COMMON, *flags), 2, word)
    assert not Path("results/inference.json").exists()


@pytest.mark.parametrize("mode, flags, word", [
    ("infer", ("--dataset", "synthetic"), "--mode train or evaluate"), ("infer", ("--stem", "bass"), "--mode train"),
    ("infer", ("--num_samples", "9"), "--mode train or evaluate"), ("infer", ("--eval_clips", "9"), "--mode evaluate"),
    ("infer", ("--data_root", "."), "--mode"), ("infer", ("--musdb_root", "."), "--mode"),
    ("evaluate", ("--input", "a.wav"), "--mode infer"), ("evaluate", ("--phase", "pghi"), "--mode infer"),
    ("evaluate", ("--sample", "2"), "--mode infer"), ("evaluate", ("--export", "a.pt"), "--mode infer"),
    ("evaluate", ("--output_dir", "x"), "--mode infer"), ("evaluate", ("--interpolate", "a", "b"), "--mode infer"),
    ("evaluate", ("--eval_clips", "0"), "--eval_clips"), ("evaluate", ("--data_root", "."), "--dataset folder"),
    ("evaluate", ("--num_samples", "9"), "--dataset synthetic")])
def test_flag_of_another_mode_is_a_usage_error(mode, flags, word, model_file):
    model_file()
    assert_error(call("--mode", mode, *COMMON, *flags), 2, word)


@pytest.mark.parametrize("flags", [("--checkpoint", "a\nb.pt"), ("--input", "7\r\n8"), ("--no\nsuch", "1"),
                                   ("--results_dir", "file\n\n/below"), ("--seed", "1\u2028x")])
def test_line_break_in_an_argument_does_not_break_the_error(model_file, flags):
    model_file("waveform_vae")
    Path("file\n\n").touch()
    result = call(*INFER, *flags)
    assert_error(result, result.code)
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--results_dir", "--checkpoint"])
def test_folder_that_can_not_be_written_is_found_before_training(flag, monkeypatch):
    Path("file").write_text("in the way")
    monkeypatch.setattr(ag.Trainer, "train_step", lambda self: pytest.fail("training started"))
    assert_error(call(*TRAIN, flag, "file/below/x"), 1, "can't write", "file/below", "folder")


@pytest.mark.parametrize("flag", ["--results_dir", "--output_dir", "--export"])
def test_folder_that_can_not_be_written_is_one_error_when_regenerating(flag, model_file):
    model_file("waveform_vae")
    Path("file").write_text("in the way")
    soundfile.write("a.wav", song(0.1).numpy(), RATE)
    assert_error(call(*INFER, "--input", "a.wav", flag, "file/below/x"), 1, "can't write", "file/below")


def test_folder_in_the_place_of_the_new_checkpoint_is_an_error_and_stays(monkeypatch):
    Path("mine").mkdir()
    Path("mine/diary.txt").write_text("dear diary")
    monkeypatch.setattr(ag.Trainer, "train_step", lambda self: pytest.fail("training started"))
    assert_error(call(*TRAIN, "--checkpoint", "mine"), 1, "mine", "folder")
    assert Path("mine/diary.txt").read_text() == "dear diary"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_gpu_is_an_error_and_never_replaced(model_file):
    model_file()
    for command in (INFER, TRAIN):
        assert_error(call(*command, "--device", "cuda:0"), 1, "cuda:0", "--device cpu")


# === the script as a text, and as a program ===


@pytest.mark.parametrize("mode", [(), ("--mode", "train"), ("--mode", "infer"), ("--mode", "evaluate")])
def test_help_names_every_flag(mode):
    text = ok(*mode, "--help").out
    flags = [s for action in ag.build_parser()._actions for s in action.option_strings if s.startswith("--")]
    assert len(flags) > 40 and all(flag in text for flag in flags)
    assert "%(" not in text and "None)" not in text


def test_defaults_are_those_that_are_promised():
    config = ag.AutoencoderConfig()
    assert (config.epochs, config.batch_size, config.learning_rate) == (30, 32, 1e-3)
    assert (config.n_mels, config.latent_dim, ag.VaeConfig().latent_frames, ag.WaveformConfig().latent_dim) == (
        128, 128, 16, 80)
    assert ag.FAMILIES["autoencoder"].checkpoint_name == "audio_autoencoder.pt" and CLIP == 81_920
    assert next(iter(ag.FAMILIES)) == "autoencoder" and tuple(ag.FAMILIES) == FAMILIES
    assert len({cls.checkpoint_name for cls in ag.FAMILIES.values()}) == 3
    with pytest.raises(AttributeError):
        config.epochs = 3


def shared_block(path: Path) -> str:
    return path.read_text().split("# >>> shared plumbing")[1].split("# <<< shared plumbing")[0]


def test_shared_plumbing_is_the_same_in_both_scripts_and_small():
    block = shared_block(SCRIPT)
    assert block == shared_block(ROOT / "image_gen" / "image_gen.py")
    assert len(block.splitlines()) <= 200  # one of them is the rest of the opening line


def test_functions_fit_a_screen():
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_table_of_contents_is_that_of_the_banners():
    banners = re.findall(r"^# === (.+) ===$", SCRIPT.read_text(), re.MULTILINE)
    listed = " ".join(re.search(r"table of contents:\n(.+?)\n\n", ag.__doc__, re.DOTALL)[1].split()).split(", ")
    assert [banner.split(" between ")[0].replace(" a model", "") for banner in banners] == listed


def test_references_are_listed_and_used():
    text = SCRIPT.read_text()
    listed = set(re.findall(r"^    \[(\w+)\] ", ag.__doc__, re.MULTILINE))
    used = set(re.findall(r"\[([A-Z]\w+\d\d)\]", text.replace(ag.__doc__, "")))
    assert used == listed


def test_importing_the_script_runs_nothing():
    for node in ast.parse(SCRIPT.read_text()).body:
        allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        assert isinstance(node, allowed) or docstring or guard, f"line {node.lineno} does something when imported"


LEAN = """
import sys
import audio_gen
code = audio_gen.main(sys.argv[1:])
heavy = {"matplotlib", "torchmetrics", "pesq", "pystoi", "musdb", "stempeg", "sklearn", "torchvision", "pandas"}
print("heavy:", *sorted(heavy & sys.modules.keys()))
sys.exit(code)
"""


def test_script_alone_in_a_folder_trains_without_what_training_does_not_need(place, python):
    """(One step before a stop: the end of an epoch draws.)"""
    home = place / "alone here"
    home.mkdir()
    shutil.copy(SCRIPT, home)
    stop = "import audio_gen, signal\nstep = audio_gen.Trainer.train_step\n" \
        "audio_gen.Trainer.train_step = lambda self: (step(self), signal.raise_signal(signal.SIGTERM))\n"
    process = python("-c", stop + LEAN, "--dataset", "synthetic", "--num_samples", 5, "--crops", 8, "--batch_size", 2,
                     "--width", 8, "--latent_dim", 4, "--device", "cpu", cwd=home)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert out.splitlines()[-1] == "heavy:"
    assert {path.name for path in home.iterdir()} - {"__pycache__"} == {"audio_gen.py", "results", "models"}


# === README ===


@pytest.fixture
def readme() -> str:
    if not README.exists() or "audio_gen.py" not in README.read_text():
        pytest.skip("README.md has no audio section yet")
    return README.read_text()


def readme_commands(text: str) -> list[list[str]]:
    """Arguments of each audio_gen.py, and of each wrapper in audio_gen/, in the README's code blocks and in `code`."""
    blocks = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = blocks.splitlines() + re.findall(r"`([^`\n]*(?:audio_gen\.py|audio_gen/\w+\.sh) --[^`\n]*)`", text)
    commands, folder = [], ""
    for line in lines:
        if line.lstrip().startswith("#"):
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an apostrophe in what a program prints
            continue
        for part in re.split(r"\n(?:&&|;|\|\||\|)\n", "\n".join(words)):
            part = part.split("\n")
            if part[0] == "cd":
                folder = part[1]
                continue
            if part[0] in ("cp", "grep", "cat", "less", "wc", "ls", "git"):
                continue
            start = next((i for i, word in enumerate(part) if word.endswith("audio_gen.py") or re.search(
                r"audio_gen/(train|infer)\.sh$", os.path.normpath(os.path.join(folder, word)))), None)
            if start is not None:
                mode = ["--mode", "infer"] if part[start].endswith("infer.sh") else []
                commands.append(mode + list(itertools.takewhile(
                    lambda word: word not in ("&&", "||", ";", "|", ">", "2>", "&"), part[start + 1:])))
    return commands


def test_commands_of_the_readme_are_found():
    text = "```bash\ncd audio_gen && ./train.sh --epochs 3 && ./infer.sh --input a.wav  # why\n" \
        "A=1 ./audio_gen/infer.sh\npython audio_gen/audio_gen.py --mode evaluate > x\n```\n" \
        "and `python audio_gen.py --sample 3`"
    assert readme_commands(text)[:2] == [["--epochs", "3"], ["--mode", "infer", "--input", "a.wav"]]
    assert readme_commands(text)[-2:] == [["--mode", "evaluate"], ["--sample", "3"]]


def test_commands_of_the_readme_are_understood(readme):
    commands = readme_commands(readme)
    assert commands
    for arguments in commands:
        if "--help" in arguments or any("…" in word or word == "..." for word in arguments):
            continue
        try:
            given = {"mode": "train"} | vars(ag.build_parser().parse_args(arguments))
            ag.check_flags(given, given.get("model"))
        except ag.UserError as error:
            raise AssertionError(f"{' '.join(arguments)}\n{error}") from None


def test_readme_lists_every_flag_in_a_table(readme):
    rows = "\n".join(line for line in readme.splitlines() if line.startswith("|"))
    listed = set(re.findall(r"--[a-z_]+", rows))
    flags = {s for action in ag.build_parser()._actions for s in action.option_strings if s.startswith("--")}
    assert flags - {"--help"} <= listed, f"missing: {sorted(flags - {'--help'} - listed)}"
