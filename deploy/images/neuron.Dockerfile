# Compiles for AWS Neuron (`train`) and serves what it compiled on inf2 (`serve`), with one and the same SDK.
# torch, torch-neuronx and neuronx-cc are those of the image it begins with; ml refuses any other SDK.
ARG NEURON_IMAGE=public.ecr.aws/neuron/pytorch-inference-neuronx:2.9.0-neuronx-py312-sdk2.31.1-ubuntu24.04

FROM ${NEURON_IMAGE} AS build
RUN useradd --create-home --uid 10001 builder && install --directory --owner=builder /opt/offers /opt/build
USER builder
WORKDIR /opt/build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=secret,id=pip,uid=10001,target=/home/builder/.config/pip/pip.conf \
    python -m venv --system-site-packages /opt/offers \
    && /opt/offers/bin/python -m pip install pip==25.3
COPY pyproject.toml constraints.txt ./
# Without the pins of what the SDK brings itself; the last line ends the build if it is not to be seen.
RUN --mount=type=secret,id=pip,uid=10001,target=/home/builder/.config/pip/pip.conf \
    sed --in-place --regexp-extended '/^(torch|numpy)==/d' constraints.txt \
    && /opt/offers/bin/python -m pip install --group neuron --constraint constraints.txt \
    && /opt/offers/bin/python -c "import importlib.metadata as m; assert m.version('torch-neuronx').startswith('2.9.'), m.version('torch-neuronx'); print(m.version('neuronx-cc'))"

FROM ${NEURON_IMAGE}
ARG CODE_REVISION
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port="true" \
      org.opencontainers.image.title="offer-assets neuron" \
      org.opencontainers.image.revision="${CODE_REVISION}"
ENV PATH=/opt/offers/bin:$PATH \
    PYTHONPATH=/opt/program \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    HF_HUB_OFFLINE=1 \
    CODE_REVISION=${CODE_REVISION}
COPY --from=build /opt/offers /opt/offers
COPY ml /opt/program/ml
WORKDIR /opt/program
# As a job it writes to folders that SageMaker mounts for root alone (training.Dockerfile).
USER root
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('SAGEMAKER_BIND_TO_PORT', '8080') + '/ping', timeout=2)"]
ENTRYPOINT ["python", "-m", "ml"]
CMD ["serve"]
