"""The shell layer: env.sh, the wrappers, run_tests.sh and .ci/run, without a network and without installing anything.

Each test copies the real shell files into a folder of its own, whose name has spaces. What they start is replaced:
image_gen.py by a recorder of its arguments, pip (and pytest, torchrun) by a recorder inside a real, empty virtual
environment. The Python and the shell tools are real.
"""
import atexit
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELL_FILES = sorted([*ROOT.glob("*.sh"), *ROOT.glob("*_gen/*.sh"), ROOT / ".ci" / "run"])
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)  # of which the tests' own environment was made

# Records how it was called, then does what the variables named after its role say.
RECORDER = """
import json, os, sys, time
role = {role!r}
if "--version" in sys.argv:
    sys.exit()
if role == "script" and "--prepare_data" in sys.argv:
    role = "prepare"
entry = {{"role": role, "argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(entry) + "\\n")
print(os.environ.get(role.upper() + "_SAYS", ""), end="", file=sys.stderr)
time.sleep(float(os.environ.get(role.upper() + "_SLEEPS", 0)))
sys.exit(int(os.environ.get(role.upper() + "_EXITS", 0)))
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


class Project:
    """A copy of the shell files in which everything that they start is a recorder."""

    template: Path | None = None

    def __init__(self, tmp: Path) -> None:
        self.root, self.bin, self.calls_file = tmp / "my project", tmp / "tool box", tmp / "calls.jsonl"
        for path in [*SHELL_FILES, ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]:
            target = self.root / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        for script in ("image_gen", "audio_gen"):
            if (self.root / script).is_dir():
                (self.root / script / f"{script}.py").write_text(RECORDER.format(role="script"))
        self.stubs = tmp / "stubs"
        for module, role in (("pip", "pip"), ("pytest", "pytest"), ("torch.distributed.run", "torchrun")):
            package = self.stubs
            for part in module.split("."):
                package = package / part
                package.mkdir(parents=True)
                (package / "__init__.py").touch()
            (package / "__main__.py").write_text(RECORDER.format(role=role))
        # The python3 that users have, but `-m venv` adds the stubs instead of a pip: that would take seconds.
        self.bin.mkdir()
        executable(self.bin / "python3", f"""#!/bin/sh
            if [ "$1 $2" != "-m venv" ]; then exec "{BASE_PYTHON}" "$@"; fi
            for target; do :; done  # the last argument
            "{BASE_PYTHON}" "$@" --without-pip && cp -R "{self.stubs}"/. "$target"/lib/python*/site-packages/
            """)
        room = "disk 900000000 0 900000000 0% /"  # the tests' own machine may have less than PyTorch needs
        executable(self.bin / "df", f"#!/bin/sh\necho head\necho '{room}'\necho '{room}'\n")
        self.env = {"HOME": str(tmp), "LANG": "C.UTF-8", "CALLS": str(self.calls_file),
                    "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_CONFIG_FILE": os.devnull,  # should a real pip get in
                    "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}

    def tools_only(self) -> None:
        """Hide every Python of this machine except what stands in `self.bin`."""
        for name in ("bash", "sh", "env", "dirname", "cmp", "cp", "mkdir", "ls", "df", "awk", "grep", "tr", "cat",
                     "uname", "getconf", "flock"):
            if (found := shutil.which(name)) and not (self.bin / name).exists():
                (self.bin / name).symlink_to(found)
        self.env["PATH"] = str(self.bin)

    def venv(self, path: Path | None = None, stamped: bool = True) -> Path:
        """An environment as env.sh would have left it (default: .venv)."""
        path = path or self.root / ".venv"
        if not Project.template:  # made once, then copied: nothing in it names its place
            Project.template = Path(tempfile.mkdtemp()) / "template"
            atexit.register(shutil.rmtree, Project.template.parent)
            subprocess.run([self.bin / "python3", "-m", "venv", Project.template], check=True)
        shutil.copytree(Project.template, path, symlinks=True)
        for name in ("requirements.txt", "requirements-dev.txt") if stamped else ():
            shutil.copy(self.root / name, path / f".installed-{name}")
        return path

    def start(self, *command: str | Path, cwd: Path | None = None, **env: str) -> subprocess.Popen:
        return subprocess.Popen([str(part) for part in command], cwd=cwd or self.root, env=self.env | env, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                start_new_session=True,
                                # a runner started in the background ignores Ctrl-C, and bash hands that down
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def run(self, *command: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
        process = self.start(*command, cwd=cwd, **env)
        try:
            out, err = process.communicate(timeout=30)
        finally:
            if process.poll() is None:  # leave nothing behind that goes on by itself
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def calls(self, role: str | None = None) -> list[dict]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [call for call in map(json.loads, lines) if role in (None, call["role"])]

    def arguments(self, *command: str, **env: str) -> list[str]:
        """What the script gets from this call of a wrapper, which must succeed and start the script once."""
        self.calls_file.unlink(missing_ok=True)
        done = self.run(*command, **env)
        assert done.returncode == 0, done.stderr
        (call,) = self.calls("script")
        return call["argv"]


@pytest.fixture
def fresh(tmp_path):
    """As cloned: nothing is set up."""
    return Project(tmp_path)


@pytest.fixture
def ready(tmp_path):
    """After the first run."""
    project = Project(tmp_path)
    project.venv()
    return project


def assert_one_error_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode not in (0, 126, 127), done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


# === the files ===


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_files_parse_and_are_executable(path):
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert os.access(path, os.X_OK)
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def variables(wrapper: str) -> tuple[set[str], set[str]]:
    """(those that the wrapper's opening comment documents, those that it turns into flags)"""
    text = (ROOT / wrapper).read_text()
    listed = re.search(r"these are understood:\n((?:#  +[A-Z_ ]+\n)+)", text)
    used = re.search(r"^env_flags ((?:[A-Z_ ]|\\\n)+)$", text, re.M)
    return set(re.findall(r"[A-Z_]+", listed[1])), set(re.findall(r"[A-Z_]+", used[1]))


@pytest.mark.parametrize("wrapper", ["image_gen/infer.sh", "image_gen/train.sh"])
def test_variables_are_documented_and_are_flags_of_the_script(wrapper):
    documented, used = variables(wrapper)
    assert documented == used
    spec = importlib.util.spec_from_file_location("image_gen_of_wrappers", ROOT / "image_gen" / "image_gen.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.build_parser().format_help()
    assert {name for name in used if f"--{name.lower()} " not in text} == set()


# === infer.sh ===


def test_infer_leaves_defaults_to_the_script(ready):
    assert ready.arguments("image_gen/infer.sh") == ["--mode", "infer"]
    assert ready.arguments("image_gen/infer.sh", CHECKPOINT="", LABEL="") == ["--mode", "infer"]


def test_infer_passes_variables_then_flags(ready):
    got = ready.arguments("image_gen/infer.sh", "--output_dir", "out put/*", "--label", "7", NUM_SAMPLES="36",
                          CHECKPOINT="my models/a $HOME.pt", LABEL="0,1", STEPS="20", EPOCHS="5")
    assert got == ["--mode", "infer", "--num_samples=36", "--label=0,1", "--steps=20",
                   "--checkpoint=my models/a $HOME.pt", "--output_dir", "out put/*", "--label", "7"]


def test_wrappers_run_from_anywhere_and_stay_there(ready, tmp_path):
    elsewhere = tmp_path / "else where"
    (elsewhere / "image_gen").mkdir(parents=True)  # CDPATH must not lead the wrapper to another folder of this name
    for command, cwd in ((["../my project/image_gen/infer.sh"], elsewhere), (["image_gen/infer.sh"], ready.root),
                         (["bash", "infer.sh"], ready.root / "image_gen")):
        ready.calls_file.unlink(missing_ok=True)
        done = ready.run(*command, cwd=cwd, CDPATH=str(elsewhere))
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert Path(ready.calls("script")[0]["cwd"]).samefile(cwd)


@pytest.mark.parametrize("wrapper", ["image_gen/infer.sh", "image_gen/train.sh"])
def test_exit_code_and_error_of_the_script_pass_through(ready, wrapper):
    done = ready.run(wrapper, SCRIPT_EXITS="143", SCRIPT_SAYS="error: stopped\n")
    assert (done.returncode, done.stderr) == (143, "error: stopped\n")


# === train.sh ===

UNREACHABLE = {"PREPARE_EXITS": "3", "PREPARE_SAYS": "a warning\nerror: MNIST can't be downloaded (no route to host)\n"}


def test_train_prepares_mnist_then_trains(ready):
    done = ready.run("image_gen/train.sh", "--seed", "3", BATCH_SIZE="32", LEARNING_RATE="1e-4", PREPARE_SAYS="a note")
    assert done.returncode == 0 and done.stderr == "a note\n"
    assert [call["argv"] for call in ready.calls()] == [
        ["--mode", "train", "--prepare_data", "--dataset", "mnist"],
        ["--mode", "train", "--batch_size=32", "--learning_rate=1e-4", "--seed", "3"]]


def test_train_falls_back_to_the_embedded_digits_loudly(ready):
    done = ready.run("image_gen/train.sh", **UNREACHABLE)
    assert done.returncode == 0
    assert done.stderr.startswith("*" * 80) and done.stderr.rstrip().endswith("*" * 80)
    for words in ("MNIST can't be reached", "MNIST can't be downloaded (no route to host)", "1,797 digits"):
        assert words in done.stderr
    assert ready.calls("script")[0]["argv"] == ["--mode", "train", "--epochs=150", "--dataset=digits"]


def test_train_fallback_keeps_the_users_epochs(ready):
    assert "--epochs=5" in ready.arguments("image_gen/train.sh", EPOCHS="5", **UNREACHABLE)
    assert ready.arguments("image_gen/train.sh", "--epochs", "2", **UNREACHABLE)[-2:] == ["--epochs", "2"]


@pytest.mark.parametrize("flags, env", [
    (["--dataset", "mnist"], {}), (["--seed", "1", "--dataset=mnist"], {}), ([], {"DATASET": "mnist"}),
    (["--data_root", "my data"], {}), (["--data_root=my data"], {}), ([], {"DATA_ROOT": "my data"}),
    (["--resume"], {}), (["--help"], {}), (["-h"], {}), (["--prepare_data"], {}), (["--mode", "evaluate"], {})])
def test_train_never_replaces_the_users_choice(ready, flags, env):
    """The script alone decides, and its exit code for "can't be downloaded" reaches the user."""
    message = "error: MNIST can't be downloaded\n"
    done = ready.run("image_gen/train.sh", *flags, **env, SCRIPT_EXITS="3", SCRIPT_SAYS=message, PREPARE_EXITS="3",
                     PREPARE_SAYS=message)
    assert (done.returncode, done.stderr) == (3, message)
    expected = [f"--{name.lower()}={value}" for name, value in env.items()]
    assert [call["argv"] for call in ready.calls()] == [["--mode", "train", *expected, *flags]]


@pytest.mark.parametrize("code", [1, 2, 130])
def test_train_stops_when_preparing_fails_otherwise(ready, code):
    done = ready.run("image_gen/train.sh", PREPARE_EXITS=str(code), PREPARE_SAYS="error: disk full\n")
    assert (done.returncode, done.stderr) == (code, "error: disk full\n")
    assert not ready.calls("script")


def test_train_with_processes_goes_through_torchrun(ready):
    done = ready.run("image_gen/train.sh", "--dataset", "digits", NPROC="2", SEED="4", OMP_NUM_THREADS="")
    assert done.returncode == 0, done.stderr
    (call,) = ready.calls()
    assert call["role"] == "torchrun"
    assert call["argv"] == ["--standalone", "--nproc_per_node", "2", str(ready.root / "image_gen" / "image_gen.py"),
                            "--mode", "train", "--seed=4", "--dataset", "digits"]
    assert int(call["env"]["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_train_refuses_a_wrong_number_of_processes(ready, count):
    done = ready.run("image_gen/train.sh", NPROC=count)
    assert_one_error_line(done, f"NPROC={count}")
    assert done.returncode == 2 and not ready.calls()


# === env.sh ===

SOURCE = ("bash", "-c", 'set -euo pipefail; source ./env.sh; printf "%s" "$PYTHON"')


def test_first_run_installs_once(fresh):
    first = fresh.run(*SOURCE)
    assert first.returncode == 0, first.stderr
    assert first.stdout == str(fresh.root / ".venv" / "bin" / "python")  # nothing else: stdout is the script's
    assert re.search(r"Size on disk.*: about [\d.]+ GB", first.stderr)
    (call,) = fresh.calls("pip")
    assert call["argv"][0] == "install" and call["argv"][-2:] == ["-r", str(fresh.root / "requirements.txt")]
    assert (fresh.root / ".venv" / ".installed-requirements.txt").exists()

    start = time.perf_counter()
    second = fresh.run(*SOURCE)
    assert time.perf_counter() - start < 2  # some 30 ms; the margin is for a busy machine
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert len(fresh.calls()) == 1


def test_changed_requirements_are_installed(ready):
    with (ready.root / "requirements.txt").open("a") as file:
        file.write("a-new-package\n")
    done = ready.run(*SOURCE)
    assert done.returncode == 0 and "a-new-package" in done.stderr
    assert len(ready.calls("pip")) == 1
    assert ready.run(*SOURCE).stderr == ""


def test_failed_install_is_repeated(fresh):
    failed = fresh.run("image_gen/infer.sh", PIP_EXITS="1", PIP_SAYS="ERROR: no network\n")
    assert failed.returncode == 1
    *_, reason, last = failed.stderr.splitlines()
    assert reason == "ERROR: no network" and last.startswith("error: pip failed")
    assert not list((fresh.root / ".venv").glob(".installed-*")) and not fresh.calls("script")
    assert fresh.run("image_gen/infer.sh").returncode == 0
    assert len(fresh.calls("pip")) == 2 and len(fresh.calls("script")) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_install_is_repeated(fresh, number, code):
    process = fresh.start(*SOURCE, PIP_SLEEPS="20")
    while not fresh.calls("pip"):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as the terminal does on Ctrl-C
    process.communicate(timeout=10)
    assert process.returncode == code
    assert not list((fresh.root / ".venv").glob(".installed-*"))
    assert fresh.run(*SOURCE).returncode == 0
    assert len(fresh.calls("pip")) == 2


def test_an_environment_without_pip_gets_it_and_keeps_the_rest(fresh, tmp_path):
    """A creation that was interrupted after its Python was there, or one by another tool."""
    (site,) = fresh.venv(stamped=False).glob("lib/python*/site-packages")
    shutil.rmtree(site / "pip")
    (site / "treasure.py").touch()
    (tmp_path / "path" / "ensurepip").mkdir(parents=True)
    (tmp_path / "path" / "ensurepip" / "__init__.py").touch()
    (tmp_path / "path" / "ensurepip" / "__main__.py").write_text(
        f"import shutil\nshutil.copytree({str(fresh.stubs / 'pip')!r}, {str(site / 'pip')!r})\n")
    done = fresh.run(*SOURCE, PYTHONPATH=str(tmp_path / "path"))
    assert done.returncode == 0, done.stderr
    assert fresh.calls("pip")[-1]["argv"][0] == "install" and (site / "treasure.py").exists()


def test_interrupted_creation_is_repeated(fresh):
    venv = fresh.venv(stamped=False)
    shutil.rmtree(venv / "lib")
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/nowhere/python")
    done = fresh.run(*SOURCE)
    assert done.returncode == 0 and "Creating" in done.stderr
    assert len(fresh.calls("pip")) == 1


def test_a_folder_that_is_no_environment_is_left_alone(fresh):
    (fresh.root / ".venv").mkdir()
    (fresh.root / ".venv" / "thesis.txt").write_text("years of work")
    assert_one_error_line(fresh.run(*SOURCE), ".venv is not a virtual environment")
    assert (fresh.root / ".venv" / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock(1) nothing keeps two installations apart")
def test_two_wrappers_at_once_install_once(fresh):
    both = [fresh.start("image_gen/infer.sh", PIP_SLEEPS="0.7") for _ in range(2)]
    errors = [process.communicate(timeout=30)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert len(fresh.calls("pip")) == 1 and len(fresh.calls("script")) == 2
    assert sum("waiting for it" in error for error in errors) == 1


def test_torch_index_url_is_for_torch_alone(fresh):
    url = "https://download.pytorch.org/whl/cpu"
    done = fresh.run(*SOURCE, TORCH_INDEX_URL=url)
    assert done.returncode == 0 and "about 1.3 GB" in done.stderr and "5.4 GB" not in done.stderr
    wheels, rest = (call["argv"] for call in fresh.calls("pip"))
    names = [re.split("[=<>~!]", line)[0] for line in wheels[wheels.index(url) + 1:]]
    assert wheels[wheels.index(url) - 1] == "--index-url" and names == ["torch", "torchvision", "torchaudio"]
    assert url not in rest and rest[-2:] == ["-r", str(fresh.root / "requirements.txt")]


def test_a_complete_active_environment_is_taken_as_it_is(fresh, tmp_path):
    active = fresh.venv(tmp_path / "my env", stamped=False)
    (site,) = active.glob("lib/python*/site-packages")
    (fresh.root / "requirements.txt").write_text("# a comment\n\npytest>=1  # one more\nnone; python_version < '3'\n")
    (site / "real.pth").write_text(sysconfig.get_paths()["purelib"])  # lends it this environment's packages
    done = fresh.run(*SOURCE, VIRTUAL_ENV=str(active))
    assert (done.returncode, done.stdout, done.stderr) == (0, str(active / "bin" / "python"), "")
    assert (active / ".installed-requirements.txt").exists()
    assert not fresh.calls() and not (fresh.root / ".venv").exists()


def test_an_incomplete_active_environment_is_completed(fresh, tmp_path):
    active = fresh.venv(tmp_path / "my env", stamped=False)
    (site,) = active.glob("lib/python*/site-packages")
    (site / "real.pth").write_text(sysconfig.get_paths()["purelib"])
    (fresh.root / "requirements.txt").write_text("pytest>=1\npluggy<0.1\nno-such-package\n")
    info = site / "broken-1.0.dist-info"  # itself there, but what it requires is not
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\nRequires-Dist: lost-part>=2\n")
    with (fresh.root / "requirements.txt").open("a") as file:
        file.write("broken\n")
    done = fresh.run(*SOURCE, VIRTUAL_ENV=str(active))
    assert done.returncode == 0, done.stderr
    listed = done.stderr.split("To install: ")[1].splitlines()[0]
    assert re.fullmatch(r"pluggy<0\.1 \(here: [\d.]+\), no-such-package, lost-part>=2", listed)
    assert "GB" not in done.stderr  # torch is not among them
    assert len(fresh.calls("pip")) == 1


@pytest.mark.parametrize("python", [None, "not a program", "#!/nowhere/python\n"], ids=["missing", "garbage", "moved"])
@pytest.mark.parametrize("active", [True, False], ids=["active", "own"])
def test_a_broken_interpreter_is_one_line(ready, python, active):
    path = ready.root / ".venv" / "bin" / "python"
    path.unlink()
    if python:
        executable(path, python)
    done = ready.run("image_gen/infer.sh", **({"VIRTUAL_ENV": str(ready.root / ".venv")} if active else {}))
    assert_one_error_line(done, "start", ".venv")
    assert not ready.calls()


def test_python_is_missing_old_or_without_venv(fresh):
    fresh.tools_only()
    (fresh.bin / "python3").unlink()
    assert_one_error_line(fresh.run(*SOURCE), "no python3")
    executable(fresh.bin / "python3", "#!/bin/sh\necho 3.8\n")
    assert_one_error_line(fresh.run(*SOURCE), "Python 3.8", "3.10 to 3.14")
    executable(fresh.bin / "python3", '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\necho 3.12\n')
    assert_one_error_line(fresh.run(*SOURCE), "apt-get install python3.12-venv")


def test_a_newer_python_beside_an_old_one_is_found(fresh):
    fresh.tools_only()
    (fresh.bin / "python3").rename(fresh.bin / "python3.12")
    executable(fresh.bin / "python3", "#!/bin/sh\necho 3.8\n")
    done = fresh.run(*SOURCE)
    if sys.version_info[:2] not in [(3, minor) for minor in range(10, 15)]:
        pytest.skip("the tests' own Python is none that env.sh takes")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("disk, temporary, words", [
    ("one 9000000 8000000 1000000 90% /", "one 9000000 8000000 1000000 90% /", (".venv", "1 GB free", "needs 3 GB")),
    ("one 9000000 7000000 2000000 90% /", "one 9000000 7000000 2000000 90% /", (".venv", "2 GB free", "needs 3 GB")),
    ("one 9000000 7000000 2000000 90% /", "tmp 9000000 8900000 100000 99% /tmp", ("TMPDIR", "0 GB free", "needs 1 GB")),
    ("one 9000000 7000000 2000000 90% /", "tmp 9000000 7000000 2000000 80% /tmp", None)])
def test_a_full_disk_is_found_before_the_download(fresh, disk, temporary, words):
    """The environment's disk and that of pip's downloads, which may be one."""
    executable(fresh.bin / "df", f"#!/bin/sh\necho head\necho '{disk}'\necho '{temporary}'\n")
    done = fresh.run(*SOURCE, TORCH_INDEX_URL="http://localhost/cpu")
    if words is None:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1 and not fresh.calls()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last


def test_a_folder_that_can_not_be_written_is_one_line(fresh):
    (fresh.root / ".venv").write_text("a file, so that no folder can be made here, not even by root")
    assert_one_error_line(fresh.run(*SOURCE), "can't create", ".venv")


def test_sourcing_by_hand_never_closes_the_shell(fresh):
    fresh.tools_only()
    (fresh.bin / "python3").unlink()
    done = fresh.run("bash", "-c", "source ./env.sh; echo still here")
    assert done.stdout == "still here\n" and done.stderr.startswith("error: no python3")


# === run_tests.sh and .ci/run ===


def test_run_tests_installs_what_tests_need_and_runs_offline(fresh):
    done = fresh.run("../run_tests.sh", "-k", "one or two", cwd=fresh.root / "image_gen", PYTEST_EXITS="5")
    assert done.returncode == 5, done.stderr
    assert [call["argv"][-1] for call in fresh.calls("pip")] == \
        [str(fresh.root / name) for name in ("requirements.txt", "requirements-dev.txt")]
    (call,) = fresh.calls("pytest")
    assert call["argv"] == ["-k", "one or two"] and Path(call["cwd"]).samefile(fresh.root)
    assert call["env"]["https_proxy"].startswith("http://127.0.0.1:") and "127.0.0.1" in call["env"]["no_proxy"]
    assert int(call["env"]["OMP_NUM_THREADS"]) == 2


@pytest.mark.parametrize("failing", [None, "pytest", "ruff", "shellcheck"])
def test_ci_runs_all_checks_and_reports_each_failure(ready, tmp_path, failing):
    for tool in ("ruff", "shellcheck"):
        recorder = tmp_path / f"{tool}.py"
        recorder.write_text(RECORDER.format(role=tool))
        executable(ready.root / ".venv" / "bin" / tool, f'#!/bin/sh\nexec "{BASE_PYTHON}" "{recorder}" "$@"\n')
    done = ready.run(".ci/run", CI="true", **({f"{failing.upper()}_EXITS": "1"} if failing else {}))
    assert (done.returncode == 0) == (failing is None), done.stderr
    assert {call["role"] for call in ready.calls()} == {"pytest", "ruff", "shellcheck"}
    if failing:
        assert done.stderr == f"error: failed: {'tests' if failing == 'pytest' else failing}\n"
    checked = {Path(name).name for name in ready.calls("shellcheck")[0]["argv"]}
    assert checked >= {path.name for path in SHELL_FILES}
