"""Every command and program of README.md works: its blocks are run, in order, in one copy of this tree.

A ```bash block is run by bash (-e: the first failing command ends it), a ```python block by this Python. Other blocks
must say that they are no program: text, json, bibtex, or csv. HTML comments on the lines before a block, which nobody
sees, give the block a tiny form; each is checked, so that none outlives what it was written for:

    <!-- readme-test: replace OLD => NEW -->        OLD must be in the block; NEW may be empty
    <!-- readme-test: append "unimat train" ARGS -->  ARGS at the end of each command that has the quoted text; one must
    <!-- readme-test: before COMMAND -->            run first, to make what the reader would have, as a folder of CIFs
    <!-- readme-test: prints TEXT -->               the output has TEXT
    <!-- readme-test: fails TEXT -->                it must fail, and the output have TEXT
    <!-- readme-test: skip REASON -->               not run (needs a GPU, takes a day). Still checked: the program, the
                                                    flags that its --help tells, and the config
    <!-- test-command -->                           the one block that runs this suite: not run here, of course

`python tests/readme_test.py --test-command` prints that last block: `.ci/run` runs it, so the two cannot differ.
"""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LANGUAGES = {"bash", "python", "text", "json", "bibtex", "csv"}
KINDS = {"replace", "append", "before", "prints", "fails", "skip"}
NOT_COPIED = (".git", ".ci", ".venv", "venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build", "dist")
NOT_COPIED += ("runs", "data")  # what a user made in the clone
TIMEOUT = 300
PROGRAMS = {"unimat": [], "python -m unimat_jax.main": ["train"], "python -m data_prep.prepare": ["prepare"]}
PROGRAMS |= {"python -m unimat_jax.generate": ["generate"], "python -m unimat_jax.quickstart": ["quickstart"]}
PROGRAMS |= {"python -m unimat_jax.evaluate": ["evaluate"], "python -m unimat_jax.stability": ["stability"]}
"""How a command of ours may begin, and its verb where that is already said."""


@dataclasses.dataclass
class Block:
    """One fenced block. markers: (kind, text) of the comments before it."""

    language: str
    source: str
    line: int
    markers: list[tuple[str, str]]
    is_test_command: bool = False

    def texts(self, kind: str) -> list[str]:
        return [text for k, text in self.markers if k == kind]

    @property
    def name(self) -> str:
        first = next((line for line in self.source.splitlines() if line.strip()), "")
        return f"line {self.line}: {first[:50]}"


def parse(readme: str) -> list[Block]:
    """The fenced blocks of a README. Raises ValueError, with the line, for a marker or a language it does not know."""
    blocks: list[Block] = []
    markers: list[tuple[str, str]] = []
    is_test_command, opened = False, None
    for number, line in enumerate(readme.splitlines(), 1):
        if opened is not None:
            if line.rstrip() == "```":
                blocks.append(opened)
                opened, markers, is_test_command = None, [], False
            else:
                opened.source += line + "\n"
        elif line.startswith("```"):
            language = line[3:].strip()
            if language not in LANGUAGES:
                raise ValueError(f"README.md:{number}: block of {language!r}: say one of {sorted(LANGUAGES)}")
            opened = Block(language, "", number, markers, is_test_command)
        elif line.lstrip().startswith("```"):
            raise ValueError(f"README.md:{number}: an indented block is not seen here: start it in the first column")
        elif match := re.fullmatch(r"<!-- readme-test: (\w+) (.*?) *-->", line.strip()):
            if match[1] not in KINDS:
                raise ValueError(f"README.md:{number}: marker {match[1]!r}: say one of {sorted(KINDS)}")
            markers.append((match[1], match[2].strip()))
        elif line.strip() == "<!-- test-command -->":
            is_test_command = True
        elif "readme-test" in line:
            raise ValueError(f"README.md:{number}: not a marker: {line.strip()}")
        elif line.strip() and (markers or is_test_command):
            raise ValueError(f"README.md:{number}: text between a marker and its block")
    if opened is not None or markers or is_test_command:
        raise ValueError("README.md: ends inside a block, or after a marker without one")
    return blocks


def commands(source: str) -> list[str]:
    """The logical lines of a bash block: continued lines joined, comments and empty lines left out."""
    joined = re.sub(r"\\\n\s*", "", source)
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def tiny_form(block: Block) -> str:
    """What is run for a block. Raises ValueError for a marker that no longer fits it."""
    source = "\n".join(commands(block.source)) if block.language == "bash" else block.source
    for text in block.texts("replace"):
        old, arrow, new = text.partition("=>")
        old, new = old.strip(), new.strip()
        if not arrow or old not in source:
            raise ValueError(f"README.md:{block.line}: nothing to replace: {text}")
        source = source.replace(old, new)
    for text in block.texts("append"):
        match = re.fullmatch(r'"([^"]+)" (.+)', text)
        if not match or not any(match[1] in line for line in source.splitlines()):
            raise ValueError(f"README.md:{block.line}: nothing to append to: {text}")
        source = "\n".join(f"{line} {match[2]}" if match[1] in line else line for line in source.splitlines())
    return source


def run(language: str, source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", source] if language == "bash" else [sys.executable, "-c", source]
    # No resolve(): an environment's python is a link to one outside it.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def check(block: Block, folder: Path) -> None:
    """Runs a block in its tiny form, or checks what of it can be checked."""
    if block.language not in ("bash", "python") or block.is_test_command:
        return
    source = tiny_form(block)
    if block.texts("skip"):
        for command in commands(source) if block.language == "bash" else []:
            check_flags(command, folder)
        return
    for command in block.texts("before"):
        done = run("bash", command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}"
    done = run(block.language, source, folder)
    said = f"README.md:{block.line}\n{source}\nexit code {done.returncode}\n{done.stdout}"
    assert (done.returncode != 0) == bool(block.texts("fails")), said
    assert "Traceback" not in done.stdout, said
    for text in block.texts("prints") + block.texts("fails"):
        assert text in done.stdout, f"{text!r} is not in the output of {said}"


def check_flags(command: str, folder: Path) -> None:
    """Checks a command that is not run: its program exists, tells of the flags in its --help, and has the config."""
    begin = next((b for b in PROGRAMS if command == b or command.startswith(b + " ")), None)
    if begin is None:
        return
    words = PROGRAMS[begin] + shlex.split(command[len(begin) :])
    if not words or words[0].startswith("-"):
        return
    done = run("bash", shlex.join(["unimat", words[0], "--help"]), folder)
    assert "--" in done.stdout and "Traceback" not in done.stdout, f"{command}\n{done.stdout}"
    for word in words[1:]:
        flag = re.match(r"--(?:no)?([a-z_]+)", word)
        if flag and not word.startswith("--config"):
            names = rf"--(\[no\])?({flag[1]}|{word[2:].partition('=')[0]})\b"
            assert re.search(names, done.stdout), f"{command}\nhas no flag {word}:\n{done.stdout}"
        if word.startswith("--config="):
            config = folder / "configs" / f"{Path(word.partition('=')[2]).stem}.py"
            assert config.is_file(), f"{command}\nnames a config that is not there"


def read_blocks() -> list[Block]:
    return parse((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of this tree as a user has it, in which the README's commands are run one after another."""
    target = tmp_path_factory.mktemp("readme") / "unimat-jax"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return target


@pytest.mark.parametrize("block", read_blocks(), ids=lambda block: block.name)
def test_readme(block, clone):
    check(block, clone)


def test_readme_has_one_test_command_and_commands_to_run():
    blocks = read_blocks()
    assert [b.language for b in blocks if b.is_test_command] == ["bash"]
    assert any(b.language == "bash" and not b.is_test_command and not b.texts("skip") for b in blocks)


SAMPLE = """
# Sample
<!-- readme-test: replace 20000 => 2 -->
<!-- readme-test: append "unimat --v" && echo appended -->
<!-- readme-test: before echo made > made.txt -->
<!-- readme-test: prints made -->
<!-- readme-test: prints appended -->

```bash
# a comment
test 20000 -eq 2
cat made.txt
unimat \\
  --version
```
Text.
```python
from pathlib import Path
print(Path("made.txt").read_text())  # the same folder
```
<!-- readme-test: fails no verb -->
```bash
unimat dance
```
<!-- readme-test: skip takes a day -->
```bash
sleep 86400
```
<!-- test-command -->
```bash
python -m pytest
```
```text
no program
```
"""


def test_of_this_machinery_a_readme_that_works(tmp_path):
    blocks = parse(SAMPLE)
    assert [b.language for b in blocks] == ["bash", "python", "bash", "bash", "bash", "text"]
    assert tiny_form(blocks[0]).splitlines()[-1].split() == ["unimat", "--version", "&&", "echo", "appended"]
    for block in blocks:
        check(block, tmp_path)


@pytest.mark.parametrize(
    "readme",
    [
        "```bash\nfalse\ntrue\n```",
        "```bash\nfalse | true\n```",
        "```bash\nno_such_program_here\n```",
        "```python\nraise SystemExit(3)\n```",
        "```sh\ntrue\n```",
        "```\ntrue\n```",
        "<!-- readme-test: replace 3 => 4 -->\n```bash\ntrue\n```",
        '<!-- readme-test: append "unimat train" --x -->\n```bash\ntrue\n```',
        "<!-- readme-test: fails oh -->\n```bash\necho oh\n```",
        "<!-- readme-test: prints oh -->\n```bash\necho ah\n```",
        "<!-- readme-test: skipp it -->\n```bash\ntrue\n```",
        "<!-- readme-test: skip it -->\nText.\n```bash\ntrue\n```",
        "<!-- readme-test: skip it -->\n```bash\nunimat dance --long\n```",
        "<!-- readme-test: before false -->\n```bash\ntrue\n```",
        "- a list\n  ```bash\n  true\n  ```",
        "```bash\ntrue",
    ],
)
def test_of_this_machinery_a_readme_that_does_not(readme, tmp_path):
    with pytest.raises((AssertionError, ValueError)):
        for block in parse(readme):
            check(block, tmp_path)


def test_of_this_machinery_flags_of_a_command_that_is_not_run(tmp_path):
    """Takes whatever flag `unimat generate` has, and one that it has not."""
    check_flags("unimat generate --output_dir=x", tmp_path)
    with pytest.raises(AssertionError, match="no flag"):
        check_flags("unimat generate --output_dirr=x", tmp_path)
    with pytest.raises(AssertionError, match="not there"):
        check_flags("unimat train --config=no_such_config", tmp_path)


if __name__ == "__main__":
    if sys.argv[1:] != ["--test-command"]:
        sys.exit("usage: python tests/readme_test.py --test-command")
    found = [block for block in read_blocks() if block.is_test_command]
    if len(found) != 1:
        sys.exit(f"error: README.md has {len(found)} blocks marked <!-- test-command -->: mark exactly one")
    print(found[0].source, end="")
