# syntax=docker/dockerfile:1.7
# docker build --target cpu|gpu|mlflow -t recsys .        `recsys` is the entrypoint; what it reads and writes lies under /srv/recsys
FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/recsys/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN python -m venv /opt/recsys \
    && useradd --uid 10001 --no-create-home --home-dir /srv/recsys recsys \
    && install -d -o recsys -g recsys /srv/recsys
WORKDIR /srv/recsys

# This package alone: a change of it makes no dependency anew.
FROM base AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY recsys recsys
COPY features features
COPY training training
COPY serving serving
RUN --mount=type=cache,target=/root/.cache/pip pip wheel -q --no-deps --wheel-dir /wheels .

# Every dependency, in the versions that requirements/ pins; two lists of one project, without those that test it.
FROM base AS needs
ARG EXTRAS="lmdb postgresql redis torchrec tracing"
WORKDIR /source
COPY pyproject.toml ./
COPY requirements requirements
COPY packaging/fbgemm-gpu packaging/fbgemm-gpu
RUN <<'END'
python - $EXTRAS <<'LIST'
import sys, tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for flavour in ("cpu", "gpu"):
    pinned = [line for line in Path(f"requirements/{flavour}.txt").read_text().splitlines() if not line.startswith("-e ")]
    extras = [line for extra in (flavour, *sys.argv[1:]) for line in project["optional-dependencies"][extra]]
    Path(f"requirements/image-{flavour}.txt").write_text("\n".join([*pinned, *project["dependencies"], *extras]) + "\n")
LIST
END

FROM needs AS needs-cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -q --no-deps --index-url "$TORCH_CPU_INDEX" "$(grep '^torch=' requirements/cpu.txt)" \
    && pip install -q --requirement requirements/image-cpu.txt

FROM needs AS needs-gpu
RUN --mount=type=cache,target=/root/.cache/pip pip install -q --requirement requirements/image-gpu.txt

# The MLflow server, which the others need not hold; it wants pyarrow below 26, which is pinned for what reads tables.
FROM base AS mlflow
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=requirements,target=/requirements \
    sed '/^pyarrow==/d' /requirements/pins.txt > /tmp/pins.txt \
    && pip install -q --constraint /tmp/pins.txt "mlflow==$(sed -n 's/^mlflow-skinny==//p' /tmp/pins.txt)" "psycopg[binary]"
USER 10001
ENV HOME=/tmp
VOLUME /srv/recsys
EXPOSE 5000
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:5000/health', timeout=4)"]
ENTRYPOINT ["mlflow"]
CMD ["server", "--host", "0.0.0.0", "--port", "5000"]

FROM base AS served
# what libraries keep for themselves goes where every user may write
ENV HOME=/tmp
VOLUME /srv/recsys
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["recsys"]
CMD ["serve", "bundles/live", "--host", "0.0.0.0", "--port", "8000"]

# A driver of the host is needed: `docker run --gpus all`.
FROM served AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=needs-gpu /opt/recsys /opt/recsys
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install -q --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && pip check
USER 10001

FROM served AS cpu
COPY --from=needs-cpu /opt/recsys /opt/recsys
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install -q --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && pip check
USER 10001
