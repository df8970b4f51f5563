# One image for every scheduler of docs/cluster.md. It starts `scripts/launch.sh`.
#   docker build -t weighted-mtp .
#   docker run --rm -v "$PWD/storage:/app/storage" -e PROCESSES=2 weighted-mtp configs/baseline.toml --preset ci
FROM python:3.11-slim-bookworm

# bubblewrap: the stricter of the two sandboxes for judged programs. Landlock is used if bubblewrap does not work.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY weighted_mtp_core weighted_mtp_core
COPY plugins plugins
RUN pip install --no-cache-dir -c constraints.txt '.[dask]' ./plugins/*/

COPY configs configs
COPY scripts scripts
RUN useradd --create-home --uid 1000 wmtp && mkdir storage && chown wmtp storage
USER 1000
ENTRYPOINT ["scripts/launch.sh"]
CMD ["configs/verifiable.toml"]
