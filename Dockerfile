# The service alone, on the CPU; `--build-arg TORCH=cuda` takes PyPI's PyTorch with CUDA instead (a 7 GB image).
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
COPY pyproject.toml constraints.txt ./
RUN case "$TORCH" in \
      cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
      cuda) ;; \
      *) echo "TORCH is cpu or cuda, not $TORCH" >&2; exit 1 ;; \
    esac \
    && python -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --constraint constraints.txt pip \
    && /opt/venv/bin/python -m pip install --constraint constraints.txt --group run

# The native step for any x86-64 processor of the last ten years; on others torch does it, and the log says so.
FROM ${BASE} AS native
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY service service
RUN if [ "$(uname -m)" = x86_64 ]; then python -m service.engine.native.library; else mkdir service/engine/native/built; fi

FROM ${BASE}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin moescope
WORKDIR /app
COPY --from=packages /opt/venv /opt/venv
COPY pyproject.toml ./
COPY service service
COPY --from=native /app/service/engine/native/built service/engine/native/built
COPY model model
COPY checkpoints checkpoints
# Whoever cloned this may keep files from others, and the user below is one.
RUN find . ! -perm -o=r -exec chmod a+rX {} +
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MOESCOPE_HOST=0.0.0.0 MOESCOPE_PORT=8000
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['MOESCOPE_PORT'] + '/readyz', timeout=4)"]
CMD ["python", "-m", "service"]
