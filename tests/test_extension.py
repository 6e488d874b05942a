"""``hf eff ...``: what the real ``hf`` command line needs in order to find this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from hf_eff import __version__
from hf_eff.cli import extension, main

ROOT = Path(__file__).parents[1]
HF = shutil.which("hf", path=sysconfig.get_path("scripts"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    scripts = tmp_path / "bin"
    scripts.mkdir()
    script = scripts / "hf-eff"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom hf_eff.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    monkeypatch.setattr(extension.sysconfig, "get_path", lambda name: str(scripts))
    return tmp_path


def hf(home, *words):
    environment = {**os.environ, "HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    return subprocess.run([HF, *words], capture_output=True, text=True, check=False, env=environment, timeout=100)


@pytest.mark.skipif(HF is None, reason="the hf command is not installed")
def test_the_real_hf_runs_this_command(home, capsys):
    assert main(["extension", "install"]) == 0
    assert "'hf eff' runs" in capsys.readouterr().out
    done = hf(home, "eff", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"hf-eff {__version__}")
    done = hf(home, "eff", "methods", "no_such_method")
    assert done.returncode == 2
    assert "is neither a kind" in done.stderr
    assert main(["extension", "remove"]) == 0
    assert hf(home, "eff", "--version").returncode != 0


def test_a_foreign_extension_is_neither_replaced_nor_removed(home, capsys):
    folder = home / ".local" / "share" / "hf" / "extensions" / "hf-eff"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"repo_id": "someone/hf-eff"}))
    assert main(["extension", "install"]) == 2
    assert "hf extensions remove eff" in capsys.readouterr().err
    assert main(["extension", "remove"]) == 2
    assert json.loads((folder / "manifest.json").read_text()) == {"repo_id": "someone/hf-eff"}


def test_an_environment_beside_our_note_is_left_alone(home, capsys):
    assert main(["extension", "install"]) == 0
    folder = home / ".local" / "share" / "hf" / "extensions" / "hf-eff"
    (folder / "venv").mkdir()
    assert main(["extension", "remove"]) == 2
    assert (folder / "venv").is_dir()


def test_the_package_has_the_layout_that_hf_extensions_install_wants():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'hf-eff = "hf_eff.cli:main"' in text  # the console script that it requires of OWNER/hf-eff
    assert not (ROOT / "hf-eff").exists()  # a file of that name would be run instead of the package
