# The steps are the README's: system packages, make setup, rios run.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends make gcc libc6-dev libgmp-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/rios
COPY . .
RUN make setup && rm -rf .git tests

FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgmp10 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin rios \
    && install -d -o rios -g rios /data
COPY --from=build /opt/rios /opt/rios
ENV PATH=/opt/rios/.venv/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 \
    RIOS_CONFIG=/data/rios.toml RIOS_NODE_DATA_DIR=/data
USER rios
VOLUME /data
EXPOSE 4701 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["rios", "health"]
# a fresh volume gets a config and a key first; an existing one is used as it is
ENTRYPOINT ["/bin/sh", "-c", "[ -f /data/rios.toml ] || rios init >&2 || exit; exec rios \"$@\"", "rios"]
CMD ["run"]
