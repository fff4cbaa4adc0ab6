# Two images from one file: `docker build .` is the orchestrator, `--target agent` the reference agent.
ARG PYTHON_IMAGE=python:3.14-slim

FROM ${PYTHON_IMAGE} AS base
# HOME: the one directory that is writable when the root file system is not.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    HOME=/tmp
# Celery warns of a group without a name.
RUN groupadd --gid 1000 armada && useradd --uid 1000 --gid armada --home-dir /tmp --no-create-home armada
WORKDIR /app
COPY requirements.txt .
# Wheels only, so that nothing is ever compiled here.
RUN pip install --only-binary :all: --requirement requirements.txt
# A number, since Kubernetes cannot tell from a name that it is not root.
USER 1000:1000

FROM base AS agent
COPY agent.py .
CMD ["python", "agent.py"]

FROM base AS orchestrator
COPY app.py merge.py agent.py ./
USER root
RUN python -m compileall -q .
USER 1000:1000
EXPOSE 8080
CMD ["python", "-m", "app"]
