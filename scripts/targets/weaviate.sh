#!/bin/sh
# Builds and runs a real Weaviate on this machine.
#   weaviate.sh install            builds it into var/bin, a few minutes
#   weaviate.sh run DATA PORT      runs it in the foreground; uses PORT to PORT+5
#   weaviate.sh start [DATA PORT]  runs it in the background until stopped
#   weaviate.sh stop [DATA]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
binary="$root/var/bin/weaviate-server"
version=v1.35.2
action=${1:-start}
data=${2:-$root/var/weaviate}
port=${3:-8079}

install() {
  if [ ! -x "$binary" ]; then
    mkdir -p "$root/var/bin"
    GOBIN="$root/var/bin" go install "github.com/weaviate/weaviate/cmd/weaviate-server@$version"
  fi
}

run() {
  mkdir -p "$data"
  cd "$data"
  # Without the two 127.0.0.1 it dies on an IPv6 address; the internal Raft port must be the next one.
  exec env \
    PERSISTENCE_DATA_PATH="$data/store" \
    AUTHENTICATION_ANONYMOUS_ACCESS_ENABLED=true \
    DEFAULT_VECTORIZER_MODULE=none \
    GRPC_PORT=$((port + 1)) \
    CLUSTER_HOSTNAME=node1 \
    CLUSTER_IN_LOCALHOST=true \
    CLUSTER_ADVERTISE_ADDR=127.0.0.1 \
    CLUSTER_BIND_ADDR=127.0.0.1 \
    CLUSTER_GOSSIP_BIND_PORT=$((port + 2)) \
    CLUSTER_DATA_BIND_PORT=$((port + 3)) \
    RAFT_PORT=$((port + 4)) \
    RAFT_INTERNAL_RPC_PORT=$((port + 5)) \
    RAFT_BOOTSTRAP_EXPECT=1 \
    DISABLE_TELEMETRY=true \
    LOG_LEVEL=warning \
    "$binary" --host 127.0.0.1 --port "$port" --scheme http
}

case "$action" in
  install) install ;;
  run) run ;;
  start)
    install
    mkdir -p "$data"
    sh "$0" run "$data" "$port" >"$data/log" 2>&1 &
    echo $! >"$data/pid"
    echo "Weaviate $version: http://127.0.0.1:$port, gRPC $((port + 1)), pid $(cat "$data/pid")"
    ;;
  stop)
    kill "$(cat "$data/pid")"
    rm "$data/pid"
    ;;
  *)
    echo "usage: weaviate.sh install|run|start|stop [DATA [PORT]]" >&2
    exit 2
    ;;
esac
