#!/bin/sh
# Installs Hugo from the distribution if it is missing. Pages are built without it too, by the plain builder.
set -eu
if ! command -v hugo >/dev/null 2>&1; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq hugo
fi
hugo version
