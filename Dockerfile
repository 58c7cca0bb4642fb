# diffmoe_dist for NVIDIA GPUs, on Debian with PyPI's CUDA build of torch. From the root of the clone:
#
#   docker build --tag diffmoe .
#   docker run --gpus all --shm-size=8g --volume "$PWD:/work" diffmoe diffmoe-train --config configs/digits.yaml
#
# The pip commands are those of docs/install.md; tests/test_packaging.py holds the two together and
# installs the package from the files that are copied here.
FROM python:3.11-slim-bookworm

# g++ is for train.compile and Triton's kernels, MPI for data_tools on many cores.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ openmpi-bin \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HWLOC_COMPONENTS=-gl

# Layers that change seldom come first: torch with CUDA's libraries is some gigabytes.
RUN pip install torch==2.13.0
WORKDIR /opt/diffmoe_dist
COPY requirements.txt .
RUN pip install -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY diffmoe_dist diffmoe_dist
COPY data_tools data_tools
COPY configs configs
RUN pip install --no-deps .

RUN useradd --create-home --uid 1000 diffmoe
USER diffmoe
WORKDIR /work
CMD ["diffmoe-train", "--help"]
