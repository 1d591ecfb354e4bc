"""`p2pgz mount` and `p2pgz umount`."""

from __future__ import annotations

import os
import signal
from typing import Any

import click

from p2pgz.cli.client import running_node, show_progress, show_warnings
from p2pgz.cli.context import (
    Settings,
    absolute,
    image_request,
    json_option,
    print_json,
    registry_options,
    unverified_option,
)
from p2pgz.errors import P2pgzError


@click.command()
@click.argument("reference", metavar="REF")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option(
    "--mode",
    type=click.Choice(["auto", "tree", "erofs"]),
    default="auto",
    show_default=True,
    help="How the kernel is served; auto is erofs where this host can, else tree.",
)
@click.option("--fill/--no-fill", "fill", default=None, help="Fetch the rest in the background.")
@click.option("--suid", is_flag=True, help="Honour setuid bits and file capabilities (root).")
@click.option("--dev", is_flag=True, help="Honour device nodes (root).")
@click.option("--context", default="", metavar="LABEL", help="SELinux context of all files.")
@click.option("--persist", is_flag=True, help="Mount it again after a reboot.")
@click.option("--foreground", is_flag=True, help="Stay until the mount ends; unmount on Ctrl-C.")
@registry_options
@unverified_option
@json_option
@click.pass_obj
def mount(
    settings: Settings, /, reference: str, directory: str, foreground: bool, as_json: bool, **options: Any
) -> None:
    """Mount the image REF, read-only, at DIR; its bytes arrive on demand, each one verified.

    REF is a registry reference (`python:3.12`, `host:5000/name@sha256:…`), `oci:DIR[:TAG]` or `oci-archive:FILE[:TAG]`.
    Returns once the mount is usable. `umount DIR` ends it.
    """
    from p2pgz.mount.attach import attach
    from p2pgz.mount.umount import FS_TYPE, check_mount_point, clear_dead_mount, top_mount, unmount

    target = absolute(directory)
    there = top_mount(target)
    if there is not None and there.fs_type == FS_TYPE and not clear_dead_mount(target):
        running_node(settings)  # it may only wait for a node that takes it over
    check_mount_point(target)
    client = running_node(settings)
    request = image_request(reference, {**options, "directory": str(target)})
    fill = options["fill"]
    if fill is not None:
        request["fill"] = fill
    result = client.call("/v1/mounts", request, show_progress(settings))
    if result["token"]:
        descriptor = client.descriptor(result["token"])
        try:
            attach(descriptor, target)
        finally:
            os.close(descriptor)
    if as_json:
        print_json({key: value for key, value in result.items() if key not in {"event", "token"}})
    elif not settings.quiet:
        click.echo(f"{result['reference']} on {target}", err=True)
        show_warnings(result)
    if foreground:
        # both explicitly: a shell starts background jobs with SIGINT ignored, and Python leaves it so
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            client.call("/v1/mounts/wait", {"id": result["id"]})
        except KeyboardInterrupt:
            unmount(target)


@click.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=click.Path())
@click.option("-l", "--lazy", is_flag=True, help="Detach now, end when the last user is gone.")
@click.pass_obj
def umount(settings: Settings, /, directories: tuple[str, ...], lazy: bool) -> None:
    """Unmount images. The same as umount(8) or fusermount3 -u."""
    from p2pgz.mount.umount import unmount

    failure: P2pgzError | None = None
    for directory in directories:
        try:
            unmount(absolute(directory), lazy=lazy)
        except P2pgzError as error:
            if failure is not None:
                click.echo(f"p2pgz: {failure}", err=True)
            failure = error
    if failure is not None:
        raise failure
