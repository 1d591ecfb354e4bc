#!/bin/sh
# Starts nothing on a new host: a node listens on the network, and its administrator says first who may join. A node that
# runs goes on as the version that is installed now, with all its mounts.
set -e
systemd-tmpfiles --create /usr/lib/tmpfiles.d/p2pgz.conf >/dev/null 2>&1 || mkdir -p -m 700 /var/lib/p2pgz
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload || true
if systemctl is-active --quiet p2pgz.service; then
    p2pgz upgrade || systemctl restart p2pgz.service || true
    systemctl try-restart p2pgz-snapshotter.service || true
else
    echo 'p2pgz: edit /etc/p2pgz/config.toml, then: systemctl enable --now p2pgz' >&2
fi
