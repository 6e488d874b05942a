"""The smallest build backend (PEP 517): a wheel of the package in this folder."""

import base64
import hashlib
import zipfile
from pathlib import Path

NAME, VERSION = "hf_eff_coin_flip", "0.3"
INFO = f"{NAME}-{VERSION}.dist-info"
ENTRY_POINTS = """[hf_eff.selection]
coin_flip = hf_eff_coin_flip.selection:SPEC

[hf_eff.governor]
first_steps = hf_eff_coin_flip.governor:SPEC
"""


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    files = {f"{NAME}/{path.name}": path.read_bytes() for path in sorted(Path(NAME).glob("*.py"))}
    about = f"Metadata-Version: 2.1\nName: {NAME.replace('_', '-')}\nVersion: {VERSION}\nRequires-Dist: hf_eff\n"
    files[f"{INFO}/METADATA"] = about.encode()
    files[f"{INFO}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: this folder\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{INFO}/entry_points.txt"] = ENTRY_POINTS.encode()
    files[f"{INFO}/RECORD"] = "".join(
        f"{path},{_hash(content)},{len(content)}\n" for path, content in files.items()
    ).encode()
    name = f"{NAME}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    return name


def _hash(content):
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
