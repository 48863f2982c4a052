"""Check an installed wheel: its platform's instruction-set levels are built, minnow generates text.

Runs outside the source tree: see [tool.cibuildwheel] in pyproject.toml.
"""

import platform
import subprocess
import sys

LEVELS = {
    "x86_64": ["amx", "avx512", "avx2", "portable"],
    "aarch64": ["neon", "portable"],
}
COMMAND = ["-m", "lowlat", "generate", "minnow", "--raw", "--prompt", "The capital of France"]


def main() -> None:
    import lowlat._native as native

    expected, built = LEVELS[platform.machine()], native.built_levels()
    if built != expected:
        sys.exit(f"built levels are {built}, expected {expected}")
    done = subprocess.run(
        [sys.executable, *COMMAND, "--max-tokens", "8"], check=True, capture_output=True, text=True
    )
    if not done.stdout.strip():
        sys.exit("lowlat generate printed nothing")
    print(f"levels {', '.join(built)}, {native.level()} in use; text: {done.stdout.strip()}")


if __name__ == "__main__":
    main()
