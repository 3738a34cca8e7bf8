# The code location, the web server and the daemon of Dagster (deploy/compose.example.yaml starts all three).
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN useradd --create-home --uid 10001 builder && install --directory --owner=builder /opt/venv /opt/build
USER builder
WORKDIR /opt/build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=secret,id=pip,uid=10001,target=/home/builder/.config/pip/pip.conf \
    python -m venv /opt/venv && /opt/venv/bin/python -m pip install pip==25.3
COPY pyproject.toml constraints.txt ./
# What the project needs without the project itself, so that a change of the code alone installs nothing again.
RUN --mount=type=secret,id=pip,uid=10001,target=/home/builder/.config/pip/pip.conf \
    python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['aws'], sep='\n')" > requirements.txt \
    && /opt/venv/bin/python -m pip install --requirement requirements.txt --constraint constraints.txt \
    && /opt/venv/bin/python -m pip check

FROM ${PYTHON_IMAGE}
ARG CODE_REVISION
LABEL org.opencontainers.image.title="offer-assets dagster" \
      org.opencontainers.image.revision="${CODE_REVISION}"
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/program \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    DAGSTER_HOME=/opt/dagster \
    OFFER_ASSETS_HOME=/var/lib/offer-assets \
    CODE_REVISION=${CODE_REVISION}
RUN useradd --create-home --uid 10001 offers \
    && install --directory --owner=offers /opt/dagster /var/lib/offer-assets
COPY --from=build /opt/venv /opt/venv
COPY pyproject.toml dagster.yaml workspace.yaml /opt/program/
COPY ml /opt/program/ml
COPY resources /opt/program/resources
COPY offer_assets /opt/program/offer_assets
COPY sensors /opt/program/sensors
COPY deploy/dagster.yaml deploy/workspace.yaml /opt/dagster/
WORKDIR /opt/program
USER offers
EXPOSE 3000 4000
STOPSIGNAL SIGTERM
HEALTHCHECK NONE
CMD ["dagster", "api", "grpc", "--host", "0.0.0.0", "--port", "4000", "--module-name", "offer_assets.definitions", "--location-name", "offer_assets"]
