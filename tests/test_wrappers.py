"""The shell layer: env.sh, the wrappers, run_tests.sh and .ci/run, without a network and without installing anything.

Each test copies the real shell files into a folder of its own, whose name has spaces. What they start is a recorder of
how it was called: in place of the scripts, and of pip, pytest and torchrun in a real, empty virtual environment."""
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELL_FILES = sorted([*ROOT.glob("*.sh"), *ROOT.glob("*_gen/*.sh"), *ROOT.glob("studio/*.sh"), ROOT / ".ci" / "run"])
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)  # of which the tests' own environment was made
SOURCE = ("bash", "-c", 'set -euo pipefail; source ./env.sh; printf "%s" "$PYTHON"')
DATA = {"image": "mnist", "audio": "musdb"}
TROUBLE = "a warning\nerror: can't be downloaded (no route to host)\n"
both_halves = pytest.mark.parametrize("half", DATA)

# Records how it was called, then does what the variables named after its role say.
RECORDER = """
import json, os, signal, sys, time
role = {role!r}
role = "prepare" if "--prepare_data" in sys.argv else "probe" if "--no-index" in sys.argv else role
def record(**values):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(dict(role=role, **values)) + "\\n")
def stop(number, frame):
    record(signal=number)
    time.sleep(0.3)  # it saves
    sys.exit(1 if role == "torchrun" else 128 + number)
if "--version" not in sys.argv:
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    asks = open(sys.argv[-1]).read() if sys.argv[-1].startswith("/dev/fd/") else ""
    record(argv=sys.argv[1:], cwd=os.getcwd(), env=dict(os.environ), asks=asks)
    print(os.environ.get(role.upper() + "_SAYS", ""), end="", file=sys.stderr)
    if role == "torchrun":
        open(os.environ["ERROR_FILE"], "w").write(os.environ.get("SCRIPT_ERROR", ""))
    time.sleep(float(os.environ.get(role.upper() + "_SLEEPS", 0)))
    sys.exit(int(os.environ.get(role.upper() + "_EXITS", role == "probe")))
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


class Project:
    """A copy of the shell files in which everything that they start is a recorder."""

    def __init__(self, tmp: Path, template: Path) -> None:
        self.root, self.bin, self.calls_file, self.template = tmp / "my project", tmp / "bin", tmp / "calls", template
        for path in [*SHELL_FILES, *ROOT.glob("requirements*.txt")]:
            target = self.root / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        for half in DATA:
            (self.root / f"{half}_gen" / f"{half}_gen.py").write_text(RECORDER.format(role="script"))
            (self.root / f"{half}_gen" / "explore.py").write_text(RECORDER.format(role="explore"))
        (self.root / "studio" / "studio.py").write_text(RECORDER.format(role="studio"))
        self.bin.mkdir()  # of the user's python3 only `-m venv` is replaced: a real pip would take seconds
        executable(self.bin / "python3", '#!/bin/sh\n[ "$1 $2" != "-m venv" ] || exec cp -RP '
                   f'"{template}/." "$3"\nexec "{BASE_PYTHON}" "$@"\n')
        self.env = {"HOME": str(tmp), "LANG": "C.UTF-8", "CALLS": str(self.calls_file), "OMP_NUM_THREADS": "1",
                    "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_CONFIG_FILE": os.devnull,  # should a real pip get in
                    "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}

    def venv(self, stamped: bool = True, lent: bool = False) -> Path:
        """An environment as env.sh would have left it -> its packages; `lent`: with those of the tests' own instead."""
        shutil.copytree(self.template, self.root / ".venv", symlinks=True)
        for name in ("requirements.txt", "requirements-dev.txt", "requirements-studio.txt") if stamped else ():
            shutil.copy(self.root / name, self.root / ".venv" / f".installed-{name}")
        (site,) = self.root.glob(".venv/lib/python*/site-packages")
        if lent:
            for module in ("pip", "pytest", "torch"):
                shutil.rmtree(site / module)
            (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"])
        return site

    def start(self, *command: str | Path, cwd: Path | None = None, **env: str) -> subprocess.Popen:
        return subprocess.Popen([str(part) for part in command], cwd=cwd or self.root, env=self.env | env, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                start_new_session=True,
                                # a runner started in the background ignores Ctrl-C, and bash hands that down
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def run(self, *command: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
        process = self.start(*command, cwd=cwd, **env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def interrupted(self, role: str, send: object, number: int, *command: str, **env: str) -> tuple[int, str]:
        """Exit status and stderr of a command that gets a signal while that role is at work."""
        process = self.start(*command, **env, **{f"{role.upper()}_SLEEPS": "20"})
        while not self.calls(role):
            assert process.poll() is None
            time.sleep(0.05)
        send(process.pid, number)
        return process.wait(60), process.stderr.read()

    def calls(self, *roles: str) -> list[dict]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [call for call in map(json.loads, lines) if not roles or call["role"] in roles]

    def called(self, *command: str, **env: str) -> list[dict]:
        """What this command, which must succeed, starts."""
        self.calls_file.unlink(missing_ok=True)
        done = self.run(*command, **env)
        assert done.returncode == 0, done.stderr
        return self.calls()


@pytest.fixture(scope="session")
def template(tmp_path_factory):  # a virtual environment with recorders for packages
    path = tmp_path_factory.mktemp("template") / "venv"
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", path], check=True)
    (site,) = path.glob("lib/python*/site-packages")
    for role, file in (("pip", "pip/__main__.py"), ("pytest", "pytest/__main__.py"),
                       ("torchrun", "torch/distributed/run.py")):
        (site / file).parent.mkdir(parents=True)
        (site / file).write_text(RECORDER.format(role=role))
    return path


@pytest.fixture
def fresh(tmp_path, template):  # as cloned: nothing is set up
    return Project(tmp_path, template)


@pytest.fixture
def ready(fresh):  # after the first run
    fresh.venv()
    return fresh


def assert_one_error_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode in (1, 2) and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_files_parse_are_executable_and_short(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and os.access(path, os.X_OK)
    assert text.count("\n") <= (80 if path.name == "env.sh" else 50) and max(map(len, text.splitlines())) <= 120
    subprocess.run(["bash", "-n", path], check=True)


@both_halves
def test_infer_starts_the_script_or_explore(ready, half):
    """No variable becomes a flag here: the script reads them."""
    sampling = "script", ["--mode", "infer"]
    for task, (role, first) in {"": sampling, "sample": sampling, "latent": ("explore", ["latent"])}.items():
        (call,) = ready.called(f"{half}_gen/infer.sh", "--label", "out put/*", INPUT="a b.wav", TASK=task)
        assert (call["role"], call["argv"]) == (role, [*first, "--label", "out put/*"])
        assert (call["env"]["FLAGS_FROM_ENVIRONMENT"], call["env"]["INPUT"]) == ("1", "a b.wav")


def test_studio_installs_gradio_once_and_says_its_size(ready):
    (ready.root / ".venv" / ".installed-requirements-studio.txt").unlink()
    first = ready.run("studio/studio.sh", "--port", "8000", STUDIO_HOST="127.0.0.1")
    assert "gradio, once: 0." in first.stderr and "GB" in first.stderr
    assert [call["role"] for call in ready.calls()] == ["probe", "pip", "studio"]
    (call,) = ready.called("studio/studio.sh", "--port", "8000")
    assert (call["role"], call["argv"]) == ("studio", ["--port", "8000"])


@both_halves
@pytest.mark.parametrize("wrapper", ["infer.sh", "train.sh"])
def test_wrappers_run_from_anywhere_and_the_script_has_the_last_word(ready, tmp_path, half, wrapper):
    elsewhere = tmp_path / "else where"
    (elsewhere / f"{half}_gen").mkdir(parents=True)  # CDPATH must not lead the wrapper to another folder of this name
    for command, cwd in (([f"../my project/{half}_gen/{wrapper}"], elsewhere), ([f"{half}_gen/{wrapper}"], ready.root),
                         (["bash", wrapper], ready.root / f"{half}_gen")):
        done = ready.run(*command, cwd=cwd, CDPATH=str(elsewhere), SCRIPT_EXITS="143", SCRIPT_SAYS="error: stopped\n")
        assert (done.returncode, done.stderr) == (143, "error: stopped\n")
        assert Path(ready.calls("script")[-1]["cwd"]).samefile(cwd)


@both_halves
@pytest.mark.parametrize("role, send, number", [
    ("prepare", os.killpg, signal.SIGINT), ("script", os.killpg, signal.SIGINT), ("script", os.kill, signal.SIGTERM),
    ("torchrun", os.killpg, signal.SIGINT), ("torchrun", os.kill, signal.SIGTERM)])
def test_a_stop_signal_reaches_the_program_once(ready, half, role, send, number):
    """Ctrl-C goes to all that the terminal started, `kill` to the wrapper alone."""
    status, _ = ready.interrupted(role, send, number, f"{half}_gen/train.sh", NPROC="2" if role == "torchrun" else "")
    assert status == 128 + number
    assert [call["signal"] for call in ready.calls() if "signal" in call] == [number]


@both_halves
def test_train_prepares_then_trains(ready, half):
    done = ready.run(f"{half}_gen/train.sh", "--seed", "3", BATCH_SIZE="32", PREPARE_SAYS="a note\n")
    assert (done.returncode, done.stderr) == (0, "a note\n")
    assert [call["argv"] for call in ready.calls()] == [
        ["--mode", "train", *more, "--seed", "3"] for more in (
            ["--prepare_data", *["--dataset", "mnist"] * (half == "image")], [])]
    assert all(call["env"]["FLAGS_FROM_ENVIRONMENT"] == "1" for call in ready.calls())


@pytest.mark.parametrize("half, code, stand_in, epochs, words", [
    ("image", "3", "digits", "150", ("MNIST can't be reached", "1,797 digits", "INSTEAD")),
    *(("audio", c, "synthetic", "", ("data set can't be used", "made-up sounds", "INSTEAD")) for c in ("3", "4"))])
def test_train_falls_back_to_stand_in_data_loudly(ready, half, code, stand_in, epochs, words):
    """3: no network, 4: no ffmpeg."""
    done = ready.run(f"{half}_gen/train.sh", "--seed", "2", EPOCHS="", PREPARE_EXITS=code, PREPARE_SAYS=TROUBLE)
    assert done.stderr.startswith(TROUBLE + "*" * 80) and done.stderr.endswith("*" * 80 + "\n")
    assert all(word in done.stderr for word in words)
    (call,) = ready.calls("script")
    assert (call["argv"][2:], call["env"]["DATASET"], call["env"]["EPOCHS"]) == (["--seed", "2"], stand_in, epochs)
    assert ready.called(f"{half}_gen/train.sh", EPOCHS="5", PREPARE_EXITS=code)[-1]["env"]["EPOCHS"] == "5"


@pytest.mark.parametrize("code", ["3", "4"])
@pytest.mark.parametrize("half, flags, env", [
    *((half, flags, env) for half in DATA for flags, env in (
        (["--dataset", DATA[half]], {}), (["--seed", "1", "--dataset=mnist"], {}), ([], {"DATASET": DATA[half]}),
        (["--data_root=my data"], {}), ([], {"DATA_ROOT": "my data"}), (["--resume"], {}), ([], {"RESUME": "1"}),
        (["--help"], {}), (["-h"], {}), (["--prepare_data"], {}), (["--mode", "evaluate"], {}))),
    ("audio", ["--musdb_root", "my data"], {}), ("audio", [], {"MUSDB_ROOT": "my data"})])
def test_train_never_replaces_the_users_choice(ready, half, flags, env, code):
    """The script alone decides, and its exit code for "can't be downloaded" reaches the user."""
    done = ready.run(f"{half}_gen/train.sh", *flags, **env, SCRIPT_EXITS=code, PREPARE_EXITS=code)
    (call,) = ready.calls()
    assert (done.returncode, done.stderr, call["argv"]) == (int(code), "", ["--mode", "train", *flags])


@pytest.mark.parametrize("half, code, env", [(half, code, {}) for half in DATA for code in (1, 2, 130)] + [
    ("image", 4, {}), ("audio", 3, {"MUSDB": "full"}), ("audio", 4, {"MUSDB": "full"})])
def test_train_stops_when_preparing_fails_otherwise(ready, half, code, env):
    done = ready.run(f"{half}_gen/train.sh", **env, PREPARE_EXITS=str(code), PREPARE_SAYS="error: disk full\n")
    (call,) = ready.calls()
    assert (done.returncode, done.stderr, call["role"]) == (code, "error: disk full\n", "prepare")


def test_musdb_says_what_is_downloaded(ready):
    calls = ready.called("audio_gen/train.sh", MUSDB="full", MUSDB_ROOT="/big disk/m")
    assert [call["env"].get("MUSDB") for call in calls] == ["full", None]  # for the download alone
    (call,) = ready.called("audio_gen/train.sh", MUSDB="full", DATASET="synthetic")
    assert call["role"] == "script" and "MUSDB" not in call["env"]
    (ready.root / "audio_gen/data/musdb18").mkdir(parents=True)
    (ready.root / "audio_gen/data/musdb18/.downloaded").write_text("sample")
    assert ready.run("audio_gen/train.sh").stderr.endswith("4.7 GB, sound better: MUSDB=full audio_gen/train.sh\n")
    assert not ready.run("audio_gen/train.sh", MUSDB="sample").stderr  # knows already


@both_halves
@pytest.mark.parametrize("error, exits, code", [("", "0", 0), ("", "1", 1), ("2 no such thing\n", "1", 2)])
def test_processes_go_through_torchrun_whose_pages_hide_no_error(ready, half, error, exits, code):
    done = ready.run(f"{half}_gen/train.sh", "--dataset", "digits", NPROC="2", OMP_NUM_THREADS="", TORCHRUN_EXITS=exits,
                     TORCHRUN_SAYS="pages\n", SCRIPT_ERROR=error)
    assert (done.returncode, done.stderr) == (code, "pages\n" + "error: no such thing\n" * bool(error))
    (call,) = ready.calls()
    assert call["role"] == "torchrun" and int(call["env"]["OMP_NUM_THREADS"]) >= 1
    assert call["argv"] == ["--standalone", "--nproc_per_node", "2", str(ready.root / f"{half}_gen" / f"{half}_gen.py"),
                            "--mode", "train", "--dataset", "digits"]
    assert not Path(call["env"]["ERROR_FILE"]).exists()
    for count in ("0", "-1", "two", "1.5"):
        assert_one_error_line(ready.run(f"{half}_gen/train.sh", NPROC=count), f"NPROC={count} is not a number")


def test_set_up_happens_once(fresh):
    first = fresh.run(*SOURCE)
    assert first.stdout == str(fresh.root / ".venv" / "bin" / "python"), first.stderr  # stdout is the script's
    assert re.search(r"Setting up .*Size on disk: up to 5.4 GB.*TORCH_INDEX_URL=http\S+/cpu.*1.3 GB", first.stderr)
    assert [call["argv"][-2:] for call in fresh.calls("pip")] == [["-r", str(fresh.root / "requirements.txt")]]
    start, count = time.perf_counter(), len(fresh.calls())
    second = fresh.run(*SOURCE)
    assert time.perf_counter() - start < 2  # some 30 ms; the margin is for a busy machine
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "") and len(fresh.calls()) == count
    (fresh.root / "requirements.txt").write_text((ROOT / "requirements.txt").read_text() + "a-new-package\n")
    _, wheels, rest = fresh.called(*SOURCE, TORCH_INDEX_URL="https://host/cpu")
    assert wheels["argv"][-4:-1] == ["--index-url", "https://host/cpu", "-r"] and "--index-url" not in rest["argv"]
    assert wheels["asks"].split() == ["torch==2.11.*", "torchvision==0.26.*", "torchaudio==2.11.*"]


@pytest.mark.parametrize("number, code", [(0, 1), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_set_up_that_failed_or_was_interrupted_is_repeated(fresh, number, code):
    status, said = fresh.interrupted("pip", os.killpg, number, *SOURCE) if number else (
        (done := fresh.run("image_gen/infer.sh", PIP_EXITS="1", PIP_SAYS="ERROR: disk full\n")).returncode, done.stderr)
    assert status == code and ("ERROR: disk full\nerror: pip failed" in said) == (not number)
    assert not list((fresh.root / ".venv").glob(".installed-*")) and not fresh.calls("script")
    assert [call["role"] for call in fresh.called("image_gen/infer.sh")] == ["probe", "pip", "script"]


def test_an_environment_without_pip_gets_it(fresh, tmp_path):
    """One by another tool, or a creation that was interrupted."""
    site = fresh.venv(stamped=False)
    (site / "pip").rename(site / "pip_of_ensurepip")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "ensurepip.py").write_text(
        f"import shutil\nshutil.copytree({str(site / 'pip_of_ensurepip')!r}, {str(site / 'pip')!r})\n")
    assert [call["role"] for call in fresh.called(*SOURCE, PYTHONPATH=str(tmp_path / "path"))] == ["probe", "pip"]


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock(1) nothing keeps two installations apart")
def test_two_wrappers_at_once_install_once(fresh):
    both = [fresh.start("image_gen/infer.sh", PIP_SLEEPS="1") for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert len(fresh.calls("pip")) == 1 and len(fresh.calls("script")) == 2
    assert sum("waiting for it" in error for error in errors) == 1


@pytest.mark.parametrize("lack", ["", "pluggy<0.1\n"], ids=["complete", "incomplete"])
def test_a_real_pip_does_nothing_in_a_complete_environment(fresh, lack):
    fresh.venv(stamped=False, lent=True)
    (fresh.root / "requirements.txt").write_text(f"# a comment\npytest>=1\nnone; python_version < '3'\n{lack}")
    done = fresh.run(*SOURCE, VIRTUAL_ENV=str(fresh.root / ".venv"), PIP_RETRIES="0")
    assert done.returncode == bool(lack) and ("pluggy<0.1" in done.stderr if lack else not done.stderr), done.stderr
    assert (fresh.root / ".venv" / ".installed-requirements.txt").exists() == (not lack)


@pytest.mark.parametrize("python", [None, "not a program", "#!/nowhere/python\n"], ids=["missing", "garbage", "moved"])
@pytest.mark.parametrize("active", [{}, {"VIRTUAL_ENV": ".venv"}], ids=["own", "active"])
def test_a_broken_interpreter_is_one_line(ready, python, active):
    path = ready.root / ".venv" / "bin" / "python"
    path.unlink()
    if python:
        executable(path, python)
    assert_one_error_line(ready.run("image_gen/infer.sh", **active), "starts", ".venv")
    shutil.rmtree(ready.root / ".venv")
    (ready.root / ".venv").touch()  # no folder can be made here, not even by root
    assert_one_error_line(ready.run("image_gen/infer.sh", **active), "can't create", ".venv")


@pytest.mark.parametrize("answer, words", [
    ("", "no python3"), ("3.8 True", "Python 3.8, PyTorch here needs 3.10"), ("3.12 False", "install python3.12-venv")])
def test_python_is_missing_old_or_without_venv(fresh, answer, words):
    for name in ("bash", "sh", "env", "dirname", "cmp", "cp", "mkdir", "ls", "grep", "uname"):
        (fresh.bin / name).symlink_to(shutil.which(name))
    fresh.env["PATH"] = str(fresh.bin)  # hides this machine's
    (fresh.bin / "python3").rename(fresh.bin / "python3.11")
    executable(fresh.bin / "python3", f"#!/bin/sh\necho {answer or '; exit 1'}\n")
    assert fresh.run(*SOURCE).returncode == 0  # another one beside it will do
    shutil.rmtree(fresh.root / ".venv")
    (fresh.bin / "python3.11").unlink()
    assert_one_error_line(fresh.run(*SOURCE), words)
    assert fresh.run("bash", "-c", "source ./env.sh; echo here").stdout == "here\n"  # never closes a terminal


@pytest.mark.parametrize("failing", ["", "pytest", "ruff", "shellcheck"])
def test_ci_runs_all_checks_and_reports_each_failure(fresh, tmp_path, failing):
    fresh.venv(stamped=False)
    for tool in ("ruff", "shellcheck"):
        (tmp_path / tool).write_text(RECORDER.format(role=tool))
        executable(fresh.root / ".venv/bin" / tool, f'#!/bin/sh\nexec "{BASE_PYTHON}" "{tmp_path / tool}" "$@"\n')
    executable(fresh.bin / "apt-get", "#!/bin/sh\nexit 1\n")  # a test installs nothing
    done = fresh.run(fresh.root / ".ci" / "run", cwd=tmp_path, **{f"{failing.upper()}_EXITS": "1"})
    said = f"error: failed: {failing.replace('pytest', 'tests')}\n" if failing else ""
    assert done.returncode == bool(said) and done.stderr.endswith(said)
    assert [call["argv"][-1] for call in fresh.calls("pip")] == \
        [str(fresh.root / name) for name in ("requirements.txt", "requirements-dev.txt", "requirements-studio.txt")]
    tests, _, shellcheck = fresh.calls("pytest", "ruff", "shellcheck")
    assert Path(tests["cwd"]).samefile(fresh.root) and tests["env"]["https_proxy"].startswith("http://127.0.0.1:")
    assert {Path(name).name for name in shellcheck["argv"]} >= {path.name for path in SHELL_FILES}


@both_halves
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_every_flag_has_its_variable(monkeypatch, half, mode):
    monkeypatch.syspath_prepend(ROOT / f"{half}_gen")
    script = importlib.import_module(f"{half}_gen")
    known = {name: f for key in script.FAMILIES for name, f in script.flags(mode, key).items() if name != "mode"}
    assert not {"home", "path", "user", "term", "lang", "nproc", "task"} & set(known)  # these mean something else
    assert "input" in known or (half, mode) != ("audio", "infer")
    for name, f in known.items():
        value = "0" if f.default is True else "1"
        monkeypatch.setattr(os, "environ", {"FLAGS_FROM_ENVIRONMENT": "1", name.upper(): value})
        assert script.environment(known)[0].split("=")[0] == f"--{'no-' * (f.default is True)}{name}"


@pytest.mark.parametrize("wrapper, env, code, words", [
    ("image_gen/infer.sh", {"NUM_SAMPLE": "3", "DEVICE": "quantum"}, 2, ("you mean NUM_SAMPLES?", "--device quantum")),
    ("audio_gen/infer.sh", {"BITRATES": "9", "INPUT": "'no such.wav' b.wav"}, 1, ("you mean BITRATE?", "no such.wav:")),
    ("image_gen/train.sh", {"NPROC": "2", "DATASET": "digits", "BATCH_SIZE": "7"}, 2, ("--batch_size 7",))])
def test_real_scripts_heed_variables_say_near_misses_and_have_the_last_line(fresh, wrapper, env, code, words):
    fresh.venv(lent=True)
    half = wrapper.split("/")[0]
    shutil.copytree(ROOT / half, fresh.root / half, dirs_exist_ok=True, ignore=lambda *_: ["data", "models", "results"])
    done = fresh.run(wrapper, **env)
    assert done.returncode == code and all(word in done.stderr for word in words), done.stderr
    assert re.search(rf"\nerror: .*{words[-1]}.*\n$", "\n" + done.stderr)
