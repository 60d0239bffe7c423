"""audio_gen/train.sh and audio_gen/infer.sh, in the manner of test_wrappers.py: the script is a recorder of its
arguments, nothing is installed or downloaded."""
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from test_wrappers import ROOT, Project, assert_one_error_line, variables

PREPARE = ["--mode", "train", "--prepare_data", "--dataset", "musdb"]
UNREACHABLE = {"PREPARE_EXITS": "3", "PREPARE_SAYS": "error: MUSDB18 can't be downloaded (no route to host)\n"}
NO_FFMPEG = {"PREPARE_EXITS": "4", "PREPARE_SAYS": "error: MUSDB18's files need ffmpeg: sudo apt-get install ffmpeg\n"}


@pytest.fixture
def ready(tmp_path):
    project = Project(tmp_path)
    project.venv()
    return project


@pytest.mark.parametrize("wrapper", ["audio_gen/infer.sh", "audio_gen/train.sh"])
def test_variables_are_documented_and_are_flags_of_the_script(wrapper):
    documented, used = variables(wrapper)
    assert documented == used
    spec = importlib.util.spec_from_file_location("audio_gen_of_wrappers", ROOT / "audio_gen" / "audio_gen.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.build_parser().format_help()
    assert {name for name in used | {"MUSDB"} if f"--{name.lower()} " not in text} == set()
    assert (module.NO_NETWORK, module.NO_FFMPEG) == (3, 4)  # what train.sh takes them for


@pytest.mark.parametrize("wrapper", ["infer.sh", "train.sh"])
def test_both_halves_share_their_manner(wrapper):
    """Apart from names and data, the two wrappers of a kind say the same."""
    def frame(half):
        text = (ROOT / half / wrapper).read_text()
        start = text[text.index("set -euo"):text.index("# Whoever" if wrapper == "train.sh" else "env_flags")]
        return start, re.sub(r"image_gen|audio_gen| </dev/null", "", text[text.rindex("exec "):])
    assert frame("image_gen") == frame("audio_gen")


# === infer.sh ===


def test_infer_needs_no_data_and_leaves_defaults_to_the_script(ready):
    assert ready.arguments("audio_gen/infer.sh") == ["--mode", "infer"]
    assert ready.arguments("audio_gen/infer.sh", MODEL="", DATASET="musdb", MUSDB="full") == ["--mode", "infer"]
    assert not ready.calls("prepare")


def test_infer_passes_variables_then_flags(ready):
    got = ready.arguments("audio_gen/infer.sh", "--input", "my song *.wav", "$b.flac", MODEL="vae", PHASE="original",
                          CHECKPOINT="my models/a $HOME.pt", OUTPUT_DIR="out put")
    assert got == ["--mode", "infer", "--model=vae", "--checkpoint=my models/a $HOME.pt", "--phase=original",
                   "--output_dir=out put", "--input", "my song *.wav", "$b.flac"]


@pytest.mark.parametrize("wrapper", ["audio_gen/infer.sh", "audio_gen/train.sh"])
def test_exit_code_and_error_of_the_script_pass_through(ready, wrapper):
    done = ready.run(wrapper, SCRIPT_EXITS="143", SCRIPT_SAYS="error: stopped\n")
    assert (done.returncode, done.stderr) == (143, "error: stopped\n")


def test_wrappers_run_from_anywhere_and_stay_there(ready, tmp_path):
    for command, cwd in ((["../my project/audio_gen/train.sh"], tmp_path / "bin"), (["bash", "train.sh"],
                                                                                    ready.root / "audio_gen")):
        cwd.mkdir(exist_ok=True)
        ready.calls_file.unlink(missing_ok=True)
        done = ready.run(*command, cwd=cwd)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert Path(ready.calls("script")[0]["cwd"]).samefile(cwd)


# === train.sh ===


def test_train_prepares_musdb_then_trains(ready):
    done = ready.run("audio_gen/train.sh", "--seed", "3", BATCH_SIZE="16", STEM="vocals", PREPARE_SAYS="a note\n")
    assert done.returncode == 0 and done.stderr == "a note\n"
    assert [call["argv"] for call in ready.calls()] == [
        [*PREPARE, "--stem=vocals"], ["--mode", "train", "--batch_size=16", "--stem=vocals", "--seed", "3"]]


def test_train_tells_how_to_get_the_whole_songs(ready):
    (ready.root / "audio_gen" / "data" / "musdb18").mkdir(parents=True)
    mark = ready.root / "audio_gen" / "data" / "musdb18" / ".downloaded"
    mark.write_text("sample")
    done = ready.run("audio_gen/train.sh")
    assert "MUSDB=full audio_gen/train.sh" in done.stderr and "4.7 GB" in done.stderr and done.stderr.count("\n") == 1
    assert ready.run("audio_gen/train.sh", MUSDB="sample").stderr == ""  # knows already
    mark.write_text("full")
    assert ready.run("audio_gen/train.sh").stderr == ""


@pytest.mark.parametrize("trouble", [UNREACHABLE, NO_FFMPEG], ids=["unreachable", "no ffmpeg"])
def test_train_falls_back_to_synthetic_sound_loudly(ready, trouble):
    done = ready.run("audio_gen/train.sh", "--latent_dim", "64", EPOCHS="3", **trouble)
    assert done.returncode == 0
    reason, box = done.stderr.split("\n", 1)
    assert reason + "\n" == trouble["PREPARE_SAYS"]
    assert box.startswith("*" * 80) and box.rstrip().endswith("*" * 80)
    assert "made-up sounds (--dataset synthetic) INSTEAD" in box and "the line above" in box
    assert ready.calls("script")[0]["argv"] == ["--mode", "train", "--epochs=3", "--dataset=synthetic", "--latent_dim",
                                                "64"]


@pytest.mark.parametrize("flags, env", [
    (["--dataset", "musdb"], {}), (["--seed", "1", "--dataset=musdb"], {}), ([], {"DATASET": "musdb"}),
    (["--musdb_root", "my data"], {}), (["--musdb_root=my data"], {}), ([], {"MUSDB_ROOT": "my data"}),
    (["--data_root=my data"], {}), ([], {"DATA_ROOT": "my data"}),
    (["--resume"], {}), (["--help"], {}), (["-h"], {}), (["--prepare_data"], {}), (["--mode", "evaluate"], {})])
@pytest.mark.parametrize("code", ["3", "4"])
def test_train_never_replaces_the_users_choice(ready, flags, env, code):
    message = "error: there is no MUSDB18\n"
    done = ready.run("audio_gen/train.sh", *flags, **env, SCRIPT_EXITS=code, SCRIPT_SAYS=message, PREPARE_EXITS=code,
                     PREPARE_SAYS=message)
    assert (done.returncode, done.stderr) == (int(code), message)
    expected = [f"--{name.lower()}={value}" for name, value in env.items()]
    assert [call["argv"] for call in ready.calls()] == [["--mode", "train", *expected, *flags]]


@pytest.mark.parametrize("trouble", [UNREACHABLE, NO_FFMPEG], ids=["unreachable", "no ffmpeg"])
def test_musdb_that_is_asked_for_is_never_replaced(ready, trouble):
    done = ready.run("audio_gen/train.sh", MUSDB="full", **trouble)
    assert (done.returncode, done.stderr) == (int(trouble["PREPARE_EXITS"]), trouble["PREPARE_SAYS"])
    assert [call["argv"] for call in ready.calls()] == [[*PREPARE, "--musdb=full"]]


def test_musdb_says_what_is_downloaded_and_where_to(ready):
    assert ready.arguments("audio_gen/train.sh", MUSDB="full", MUSDB_ROOT="/big disk/m") == \
        ["--mode", "train", "--musdb_root=/big disk/m"]
    assert ready.calls()[0]["argv"] == [*PREPARE, "--musdb=full", "--musdb_root=/big disk/m"]
    assert ready.arguments("audio_gen/train.sh", MUSDB="full", DATASET="synthetic") == \
        ["--mode", "train", "--dataset=synthetic"]
    assert len(ready.calls()) == 1


@pytest.mark.parametrize("code", [1, 2, 130])
def test_train_stops_when_preparing_fails_otherwise(ready, code):
    done = ready.run("audio_gen/train.sh", PREPARE_EXITS=str(code), PREPARE_SAYS="error: disk full\n")
    assert (done.returncode, done.stderr) == (code, "error: disk full\n")
    assert not ready.calls("script")


def test_train_with_processes_goes_through_torchrun(ready):
    done = ready.run("audio_gen/train.sh", "--dataset", "synthetic", NPROC="2", SEED="4", OMP_NUM_THREADS="")
    assert done.returncode == 0, done.stderr
    (call,) = ready.calls()
    assert call["role"] == "torchrun"
    assert call["argv"] == ["--standalone", "--nproc_per_node", "2", str(ready.root / "audio_gen" / "audio_gen.py"),
                            "--mode", "train", "--seed=4", "--dataset", "synthetic"]
    assert int(call["env"]["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_train_refuses_a_wrong_number_of_processes(ready, count):
    done = ready.run("audio_gen/train.sh", NPROC=count)
    assert_one_error_line(done, f"NPROC={count}")
    assert done.returncode == 2 and not ready.calls()
