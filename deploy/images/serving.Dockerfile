# Serves models compiled for cpu. SageMaker runs it as `docker run IMAGE serve`, with the model in /opt/ml/model.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN useradd --create-home --uid 10001 builder && install --directory --owner=builder /opt/venv /opt/build
USER builder
WORKDIR /opt/build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=secret,id=pip,uid=10001,target=/home/builder/.config/pip/pip.conf \
    python -m venv /opt/venv && /opt/venv/bin/python -m pip install pip==25.3
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip,uid=10001,target=/home/builder/.config/pip/pip.conf \
    /opt/venv/bin/python -m pip install --group serving --constraint constraints.txt \
    && /opt/venv/bin/python -m pip check \
    && /opt/venv/bin/python -m pip uninstall --yes pip

FROM ${PYTHON_IMAGE}
ARG CODE_REVISION
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port="true" \
      org.opencontainers.image.title="offer-assets serving" \
      org.opencontainers.image.revision="${CODE_REVISION}"
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/program \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    CODE_REVISION=${CODE_REVISION}
COPY --from=build /opt/venv /opt/venv
COPY ml /opt/program/ml
WORKDIR /opt/program
# It reads /opt/ml/model and writes nothing, so it needs no more than anybody may.
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('SAGEMAKER_BIND_TO_PORT', '8080') + '/ping', timeout=2)"]
ENTRYPOINT ["python", "-m", "ml"]
CMD ["serve"]
