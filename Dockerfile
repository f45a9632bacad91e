# The whole environment, from the pinned requirements, LaTeX included:
#   docker build -t snella-bench . && docker run --rm -v "$PWD/results:/opt/snella-bench/results" snella-bench
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ git make texlive-latex-base texlive-latex-recommended poppler-utils \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/snella-bench
COPY envs/requirements.txt envs/requirements.txt
RUN python -m pip install --no-cache-dir --requirement envs/requirements.txt
COPY . .
RUN python -m pip install --no-cache-dir --no-deps --editable .

ENV HF_HUB_OFFLINE=1
CMD ["snakemake", "--cores", "all", "--", "results/table1.tex"]
