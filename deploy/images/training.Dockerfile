# Runs the stages as SageMaker jobs: `docker run IMAGE train`, by the contract of /opt/ml.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# The published wheel brings the CUDA libraries along; the driver is the host's. For another CUDA, or for none
# (torch==2.13.0+cpu, a much smaller image), name the build here and its index in the secret `pip`.
ARG TORCH=torch==2.13.0
RUN useradd --create-home --uid 10001 builder && install --directory --owner=builder /opt/venv /opt/build
USER builder
WORKDIR /opt/build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=secret,id=pip,uid=10001,target=/home/builder/.config/pip/pip.conf \
    python -m venv /opt/venv && /opt/venv/bin/python -m pip install pip==25.3
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip,uid=10001,target=/home/builder/.config/pip/pip.conf \
    /opt/venv/bin/python -m pip install "${TORCH}" --constraint constraints.txt \
    && /opt/venv/bin/python -m pip install --group training --constraint constraints.txt \
    && /opt/venv/bin/python -m pip check \
    && /opt/venv/bin/python -m pip uninstall --yes pip

FROM ${PYTHON_IMAGE}
ARG CODE_REVISION
LABEL org.opencontainers.image.title="offer-assets training" \
      org.opencontainers.image.revision="${CODE_REVISION}"
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/program \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CODE_REVISION=${CODE_REVISION}
COPY --from=build /opt/venv /opt/venv
COPY ml /opt/program/ml
WORKDIR /opt/program
# SageMaker mounts /opt/ml/model, /opt/ml/checkpoints and /opt/ml/output of a job writable for root alone.
USER root
STOPSIGNAL SIGTERM
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "ml"]
CMD ["train"]
