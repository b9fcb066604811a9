# docker build -t simclr . && docker run --rm simclr                                     the demo, on CPUs
# docker build --build-arg BASE=nvidia/cuda:TAG -t simclr . && docker run --gpus all …    a tag for Ubuntu 24.04: what jobs with GPUs start from
#
# BASE is any Debian or Ubuntu with Python 3.11 or 3.12. For an image that you keep, give its digest as well
# (ubuntu:24.04@sha256:…; `docker buildx imagetools inspect ubuntu:24.04` prints it). torch's CUDA libraries come with the locked packages,
# the driver comes from the host. The distribution's packages come newest, checked by apt's signatures.
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG BASE
# cluster/kuberay/Dockerfile asks for it.
ENV SIMCLR_BASE=${BASE}
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home --non-unique simclr
WORKDIR /opt/simclr
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY cluster/bootstrap.sh cluster/build.lock cluster/head.lock cluster/
COPY simclr simclr
COPY pipelines pipelines
COPY tune tune
RUN sh cluster/bootstrap.sh node && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/simclr/.venv/bin:$PATH
# Runs, shards and the local registry are written to the working directory: mount a volume here to keep them.
RUN install -d -o 1000 -g 1000 /work
WORKDIR /work
USER 1000
CMD ["simclr", "demo"]
