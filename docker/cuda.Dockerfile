# For NVIDIA GPUs:
#   docker build -f docker/cuda.Dockerfile -t sparse-cuda .
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" sparse-cuda
# PyPI's torch for Linux brings its CUDA libraries; the host needs a driver and the NVIDIA container toolkit.
FROM python:3.11-slim
WORKDIR /work
# torch.compile calls a C compiler
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY requirements*.txt ./
COPY scripts/setup.sh scripts/help.sh scripts/
RUN bash scripts/setup.sh requirements-dev.txt
COPY . .
ENV PATH=/work/.venv/bin:$PATH
CMD ["bash", "benchmarks/gpu.sh"]
