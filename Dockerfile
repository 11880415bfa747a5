# GPU image for the cluster (cluster.yaml, docs/kuberay.md). Two layers that change at different speeds: dependencies,
# then the project without resolving anything again.
#
#   docker build -t morlaif-ray:0.1.0 .
#   docker build --build-arg EXTRAS=wandb -t morlaif-ray:0.1.0 .    a tracker, or vllm, on top
#
# The wheels of torch bring their own CUDA libraries; the base only has to match the driver of the nodes.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

ARG EXTRAS=""

# rsync and ssh: the Ray cluster launcher copies the token and its own config through them.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        openssh-client python3.12 python3.12-venv rsync \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --shell /bin/bash ray
USER ray
WORKDIR /home/ray/morlaif-ray
ENV VIRTUAL_ENV=/home/ray/venv \
    PATH=/home/ray/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0

# Layer 1: dependencies, from the same pins as every other install.
COPY --chown=ray:ray pyproject.toml ./
COPY --chown=ray:ray requirements ./requirements
RUN python3.12 -m venv "$VIRTUAL_ENV" \
    && python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
more = [d for e in sys.argv[1].split(',') if e for d in p['optional-dependencies'][e]]; \
print('\n'.join(p['dependencies'] + more))" "$EXTRAS" > /tmp/requirements.txt \
    && pip install -c requirements/cpu.txt -r /tmp/requirements.txt

# Layer 2: the project.
COPY --chown=ray:ray . .
RUN pip install --no-deps .

CMD ["morlaif", "doctor"]
