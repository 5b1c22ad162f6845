#!/bin/sh
# A private PostgreSQL on loopback: `start FOLDER PORT` makes and starts it and prints its URL, `stop FOLDER` ends it.
set -eu
tool() {
  found=$(command -v "$1" 2>/dev/null || ls /usr/lib/postgresql/*/bin/"$1" 2>/dev/null | tail -n 1)
  if [ -z "$found" ]; then
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql >&2
    found=$(ls /usr/lib/postgresql/*/bin/"$1" | tail -n 1)
  fi
  echo "$found"
}
# The server refuses to run as root; anybody else runs it as themselves.
as_owner() {
  if [ "$(id -u)" = 0 ]; then su postgres -s /bin/sh -c "$1"; else sh -c "$1"; fi
}
case "$1" in
  start)
    initdb=$(tool initdb) pg_ctl=$(tool pg_ctl)
    mkdir -p "$2"
    [ "$(id -u)" != 0 ] || chown postgres "$2"
    as_owner "$initdb -D $2/data -A trust -E UTF8 -U countersign --no-sync" >/dev/null
    options="-p $3 -c listen_addresses=127.0.0.1 -c unix_socket_directories="
    as_owner "$pg_ctl -D $2/data -l $2/log -w -o '$options' start" >/dev/null
    echo "postgresql+psycopg://countersign@127.0.0.1:$3/postgres"
    ;;
  stop)
    as_owner "$(tool pg_ctl) -D $2/data -m immediate -w stop" >/dev/null
    ;;
esac
