"""Make sure the system packages the tests use are there: installed through apt-get when we may, else one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

WANTED = {
    "cc": "gcc",
    "chromium": "chromium",
    "openssl": "openssl",
    "prometheus": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
}
"""Command to the Debian package that brings it."""


def main() -> int:
    missing = [package for command, package in WANTED.items() if shutil.which(command) is None]
    if not missing:
        return 0
    if shutil.which("apt-get") and os.geteuid() == 0:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        steps = (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", *missing])
        done = all(
            subprocess.run(s, env=environment, stdout=subprocess.DEVNULL).returncode == 0 for s in steps
        )
        if done:
            return 0
    sys.stderr.write(f"make test needs {', '.join(missing)}: sudo apt-get install {' '.join(missing)}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
