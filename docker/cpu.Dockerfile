# For CPUs:
#   docker build -f docker/cpu.Dockerfile -t sparse-cpu .
#   docker run --rm -v "$PWD/runs:/work/runs" sparse-cpu
FROM python:3.11-slim
WORKDIR /work
# torch.compile generates C++
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# setup.sh uses this interpreter, and installs once for as long as the pins stay
COPY requirements.txt ./
COPY scripts/setup.sh scripts/help.sh scripts/
RUN bash scripts/setup.sh
COPY . .
ENV PATH=/work/.venv/bin:$PATH
CMD ["bash", "scripts/quickstart.sh"]
