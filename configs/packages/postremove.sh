#!/bin/sh
# The pool is a cache, and goes when its owner says that everything should (apt purge).
set -e
[ "${1:-}" != purge ] || rm -rf /var/lib/p2pgz
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
