# tokenward on a CPU. Not built: it was written where no Docker daemon and no registry could be reached.
#
#   docker build --tag tokenward .
#   docker run --rm --volume "$PWD/runs:/tokenward/runs" --volume tokenward-models:/root/.cache tokenward run recipes/quickstart.yaml
#
# The report is then runs/quickstart/report/index.html. The second volume keeps downloaded models.

FROM python:3.11-slim

WORKDIR /tokenward
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
# The default build of torch for Linux contains CUDA. The index of the CPU builds, which pytorch.org names, makes a smaller image:
# docker build --build-arg TORCH_INDEX=URL --tag tokenward .
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0 \
    && pip install --no-cache-dir --constraint constraints.txt ".[eval,plots,judge]"
COPY recipes recipes

ENTRYPOINT ["tokenward"]
CMD ["--help"]
