#!/usr/bin/env bash
# The tests of the native kernels on an emulated 64-bit ARM processor: bash tests/native/emulated.sh [pytest's options]
#
# On Debian or Ubuntu with mmdebstrap, qemu-user, g++-aarch64-linux-gnu, cmake and ninja-build. A Debian for ARM with its
# Python, the packages lowlat needs and the cross-compiled module wait in build/arm64 for the next call. Tests that start
# processes of their own are left out: those would run the machine's own Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath .venv/bin/python)
room=$PWD/build/arm64
mkdir -p "$room"

if [ ! -e "$room/root/lib" ]; then
  rm -rf "$room/root"
  mmdebstrap --variant=extract --architectures=arm64 --include=python3,libpython3-dev,libstdc++6,libgomp1 trixie "$room/root"
  ln -s usr/lib "$room/root/lib"
fi
theirs=$(basename "$room"/root/usr/bin/python3.*[0-9])
version=${theirs#python3.}

if [ ! -e "$room/site.stamp" ]; then
  # The last PyTorch for ARM that comes without CUDA from the package index.
  "$python" -m pip install --quiet --target "$room/site" --only-binary=:all: --implementation cp \
    --python-version "3.$version" --abi "cp3$version" --abi abi3 --abi none \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 \
    'torch==2.9.1' gguf httpx huggingface_hub jaxtyping jinja2 numpy pydantic rich safetensors tokenizers typer \
    beartype hypothesis pytest compressed-tensors transformers psutil xxhash
  "$python" -m pip install --quiet --target "$room/tools" nanobind
  touch "$room/site.stamp"
fi

cat > "$room/python" <<END
#!/bin/sh
exec qemu-aarch64 -L "$room/root" -E PYTHONHOME="$room/root/usr" -E PYTHONPATH="$room:$room/site" -E OMP_NUM_THREADS=1 \\
  "$room/root/usr/bin/$theirs" "\$@"
END
chmod +x "$room/python"

# Python's headers lie beside those of a whole C library, which the cross compiler has of its own.
mkdir -p "$room/include/aarch64-linux-gnu"
cp -rT "$room/root/usr/include/$theirs" "$room/include/$theirs"
cp -rT "$room/root/usr/include/aarch64-linux-gnu/$theirs" "$room/include/aarch64-linux-gnu/$theirs"
cmake -G Ninja -S . -B "$room/cmake" --log-level=NOTICE \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DPython_EXECUTABLE="$room/python" -DPython_INCLUDE_DIR="$room/include/$theirs" -DCMAKE_CXX_FLAGS="-I$room/include" \
  -Dnanobind_DIR="$room/tools/nanobind/cmake"
cmake --build "$room/cmake"

# A copy of the sources, in which no module of this machine lies.
rm -rf "$room/lowlat" "$room/tests"
cp -r lowlat tests pyproject.toml "$room"
rm -f "$room"/lowlat/_native.*.so
cp "$room"/cmake/_native.*.so "$room/lowlat/_native.so"
cd "$room"
exec "$room/python" -m pytest tests/native -p no:cacheprovider --ignore tests/native/test_native.py \
  --ignore tests/native/test_thread_pool.py --ignore tests/native/test_batch_invariance.py "$@"
