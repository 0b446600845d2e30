#!/bin/bash
# A container that sets clocks itself. With zeusd on the host: leave --cap-add out, mount /run/zeusd instead of /run/perseus.
# IMAGE and what follows it are yours.
set -euo pipefail
exec docker run --rm --gpus all --ipc host --cap-add SYS_ADMIN --stop-timeout 60 \
    --volume /run/perseus:/run/perseus --volume "$PWD:/job" --workdir /job "${IMAGE:?the image that trains}" "$@"
