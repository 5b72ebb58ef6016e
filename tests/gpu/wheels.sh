#!/usr/bin/env bash
# wheels.sh DIR [PYTHON]: downloads into DIR what a GPU machine without a network lacks to run kdpipe (about 15 MB).
# Such a machine is expected to have torch, torchvision and the common packages: numpy, OpenCV, matplotlib, tensorboard,
# tensorstore, rich, click, pytest with xdist and timeout, hypothesis. PYTHON is the version there (3.12); the wheels are
# for Linux on x86-64. `tests/gpu/run.sh` installs them.
set -euo pipefail
folder=$1 python=${2:-3.12}
packages=(
    'mmcv-lite==2.1.0' 'mmdet==3.3.0' 'mmengine==0.10.7' 'msgspec>=0.18.6' 'numcodecs>=0.15' 'obstore>=0.8.2'
    'pycocotools>=2.0.8' 'setuptools>=77,<82' 'zarr>=3.1'
    addict donfig google-crc32c platformdirs shapely termcolor terminaltables yapf # what those need
)
platforms=(--platform manylinux1_x86_64 --platform manylinux2014_x86_64)
for glibc in 17 24 27 28 31 34 35 39; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
mkdir -p "$folder"
rm -f "$folder"/*.whl # pip refuses two versions of one package
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --implementation cp --python-version "$python" "${platforms[@]}" --dest "$folder" "${packages[@]}"
echo "$(find "$folder" -name '*.whl' | wc -l) wheels for Python $python in $folder, $(du -sh "$folder" | cut -f1)"
