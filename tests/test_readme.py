"""README.md can't drift: its flag tables are those of the parsers, and its commands are understood by them."""
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "RESULTS.md").read_text()


def load(path):
    spec = importlib.util.spec_from_file_location(f"readme_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


EXPLORERS = {name: load(ROOT / name / "explore.py") for name in ("image_gen", "audio_gen")}
SCRIPTS = {"image_gen": EXPLORERS["image_gen"].ig, "audio_gen": EXPLORERS["audio_gen"].ag}


def commands(text):
    """Lines of shell blocks and of `code` in running text that start one of the scripts, a wrapper or an explorer."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines() + re.findall(r"`([^`\n]+)`", text)
    for line in blocks:
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 and line.count('"') % 2 == 0 else []
        while words and (re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] == "time"):
            words.pop(0)
        found = [i for i, word in enumerate(words) if re.search(r"(image_gen|audio_gen|explore)\.py$", word)]
        wrapper = words and re.fullmatch(r"\./(image_gen|audio_gen)/(train|infer)\.sh", words[0])
        if (found and words[0] in ("python", "torchrun")) or wrapper:
            yield line, words[found[0] if found else 0], words[(found[0] if found else 0) + 1:]


def subject(path, words):
    name = "audio_gen" if "audio" in path else "image_gen"
    if path.endswith("explore.py") and "/" in path:
        name = path.split("/")[-2]
    return name


ALL = [pytest.param(*found, id=found[0][:90]) for found in dict.fromkeys(
    (line, path, tuple(words)) for text in (README, RESULTS) for line, path, words in commands(text))]


@pytest.mark.parametrize(("line", "path", "words"), ALL)
def test_command_is_understood(line, path, words):
    words = [re.sub(r"^[A-Z…]$", "1", word) for word in words if word not in ("…", "...")]
    name = subject(path, words)
    script, explorer = SCRIPTS[name], EXPLORERS[name]
    wanted = dict(zip(words, words[1:], strict=False))
    mode = wanted.get("--mode", "infer" if path.endswith("infer.sh") else "train")
    key = wanted.get("--model", next(iter(script.FAMILIES)) if mode == "train" else script.SUBJECT.preferred[0])
    if key not in script.FAMILIES:  # MODEL stands for each of them
        key = words[words.index("--model") + 1] = next(iter(script.FAMILIES))
    kind = None
    if path.endswith("explore.py"):
        task, words, mode = words[0], words[1:], "infer"
        if task not in explorer.TASKS:
            assert task in ("compare", "fid") and hasattr(explorer, task)
            return
        kind = next(part for part in explorer.TASKS[task] if isinstance(part, type))
        words = words[next((i for i, word in enumerate(words) if word.startswith("-")), len(words)):]
    parser = script.Parser(script.flags(mode, key, kind).values())
    _, unknown = parser.parse_known_args([word for word in words if word not in ("N", "K", "G", "S")])
    assert not unknown, f"{line}: {unknown}"


def test_the_readme_holds_enough_commands_to_be_worth_testing():
    assert sum("image_gen" in str(p.values[1]) for p in ALL) >= 15
    assert sum("audio_gen" in str(p.values[1]) for p in ALL) >= 10


def test_flag_tables_are_those_of_the_parsers():
    run = subprocess.run([sys.executable, str(ROOT / "docs" / "flag_tables.py"), "--check"], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr


def test_lines_of_python_draw_and_measure():
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "image_gen")
    assert run.returncode == 0, run.stderr
    assert "'fid_mnist_cnn'" in run.stdout and "'recall_mnist_cnn'" in run.stdout


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "RESULTS"])
def test_every_linked_file_is_there(text):
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
