# The service with its reference models, for the CPU. For CUDA:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t mcdrop .
# Models of your own, torch or ONNX; the default model, which they lack, is taken back:
#   docker run -e MCDROP_DEFAULT_MODEL= -v /path/to/store:/app/models/store:ro -p 8000:8000 mcdrop
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV MCDROP_DEFAULT_MODEL=noisy-line \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /app

# torch alone comes from its own index, all else, what torch itself needs included, from PyPI
RUN pip install --no-deps --index-url "${TORCH_INDEX}" torch==2.13.0

# before the sources, so that a change of code does not install everything again
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --constraint constraints.txt --editable '.[serve,models,onnx]'

COPY mcdrop mcdrop
COPY service service
COPY models models
# safetensors writes files that their owner alone may read, and the service is another user
RUN python -m models.train --store models/store && chmod -R a+rX models/store

# the service reads its models and writes nothing
RUN useradd --system --no-create-home mcdrop
USER mcdrop

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
CMD ["python", "-m", "mcdrop", "serve", "models/store", "--host", "0.0.0.0", "--port", "8000"]
