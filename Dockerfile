# docker build -t megainter .                       the package on CUDA, as tested versions (constraints.txt)
# docker build --build-arg APEX=1 -t megainter .    with NVIDIA apex built from source (adds about half an hour)
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev git build-essential ninja-build \
        openssh-server openssh-client pdsh openmpi-bin libopenmpi-dev libaio-dev tini \
    && rm -rf /var/lib/apt/lists/* && mkdir -p /run/sshd
# Pods of an MPIJob have new host keys at every start, and their keys lie on a read-only mount that sshd finds too open.
RUN printf 'Host *\n    StrictHostKeyChecking no\n    UserKnownHostsFile /dev/null\n    LogLevel ERROR\n' > /etc/ssh/ssh_config.d/mpi.conf \
    && printf 'StrictModes no\nPasswordAuthentication no\n' > /etc/ssh/sshd_config.d/mpi.conf
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv

WORKDIR /opt/megainter
COPY pyproject.toml constraints.txt LICENSE README.md ./
COPY megainter megainter
COPY preprocessing preprocessing
COPY launcher launcher
COPY ds_configs ds_configs
# Without the checkout's history the version is told: --build-arg VERSION=1.2.3
ARG VERSION=0.1.0.dev0
RUN SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MEGAINTER="$VERSION" pip install --no-cache-dir --constraint constraints.txt '.[mpi]'

# The PyPI package called apex is another program: this is NVIDIA's, at a fixed commit.
ARG APEX=0
ARG APEX_COMMIT=6424da3b
RUN if [ "$APEX" = 1 ]; then \
        git clone https://github.com/NVIDIA/apex /tmp/apex && cd /tmp/apex && git checkout "$APEX_COMMIT" \
        && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation . && rm -rf /tmp/apex; \
    fi

WORKDIR /data
ENTRYPOINT ["tini", "--", "megainter"]
CMD ["--help"]
